"""Gauges of what is applied: from receipts and profiles, for one process and for several."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metrics_setup import clean, growth, values  # noqa: F401
from prometheus_client import CollectorRegistry, Gauge

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.series import Series
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.applied import Applied, Served
from safegene_server.monitoring.setup import Metrics
from safegene_server.verifier import Report
from safegene_vllm import __version__
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
from safegene_vllm.formats.profile import Profile
from safegene_vllm.formats.receipt import AdapterReceipt, Receipt
from safegene_vllm.settings import EnginePlan, Settings

pytestmark = pytest.mark.usefixtures("clean")

ROOT = Path(__file__).parents[2]
HEADER = FamilyHeader(
    base=Base("LlamaForCausalLM", 4, "sha256:" + "0" * 64),
    sites={},
    layers=(SelectedLayer(1), SelectedLayer(3)),
    bounds=(0.0, 3.0),
    recipe={},
    name="llama-tiny",
    digest="sha256:" + "1" * 64,
)
MODES = ("no_family", "serve_unprotected", "base_without_profile", "zero_profile")


def profile(first: float, second: float) -> Profile:
    return Profile(HEADER.digest, (0.0, first, 0.0, second), {})


def plan(base: Profile | None = None, **settings: Any) -> EnginePlan:
    return EnginePlan(Settings(**{"family": "/f", "apply": "gain", **settings}), HEADER, base)


def receipt(rank: int = 0, **norms: float) -> Receipt:
    adapters = tuple(
        AdapterReceipt(name, i, i, None, None, 7, 14, norm)
        for i, (name, norm) in enumerate(norms.items())
    )
    return Receipt(
        *(rank, 2, "gain", HEADER.digest, 14, 14, 4096),
        *(None, None, False, "0.32.0", adapters),
        adapter_bytes=1000,
        slots_total=4,
        slots_used=len(adapters),
    )


def report(*receipts: Receipt, faults: tuple[str, ...] = ()) -> Report:
    return Report(faults, tuple(r.to_dict() for r in receipts), ())


def of_tenants() -> dict[str, float]:
    """`name{labels}` of the gauges that have a tenant or a mode, without `safegene_`."""
    shown = ("safegene_revision_info", "safegene_gain", "safegene_coeff", "safegene_active")
    return {
        f"{name.removeprefix('safegene_')}{{{','.join(value for _, value in labels)}}}": value
        for (name, labels), value in values().items()
        if name.startswith(shown)
    }


def open_modes() -> set[str]:
    found = values("safegene_unprotected_mode")
    assert {labels[0][1] for _, labels in found} == set(MODES)
    return {labels[0][1] for (_, labels), value in found.items() if value}


def make(served: list[Served], given: EnginePlan | None = None, **more: Any) -> Applied:
    labels = TenantLabels(MetricsSettings(**more))
    return Applied(labels, given or plan(), lambda: served, "org/Base", now=lambda: 1234.0)


def test_receipts_of_the_ranks_are_exported() -> None:
    applied = make([])
    with growth() as grown:
        applied.take(report(receipt(0), replace(receipt(1), sites_applied=13)))
    assert grown.after == {**grown.after, **_ranks()}


def _ranks() -> dict[Any, float]:
    return {
        ("safegene_sites", (("rank", "0"), ("state", "applied"))): 14,
        ("safegene_sites", (("rank", "1"), ("state", "applied"))): 13,
        ("safegene_sites", (("rank", "1"), ("state", "expected"))): 14,
        ("safegene_vector_bytes", (("rank", "1"),)): 4096,
        ("safegene_adapter_bytes", (("rank", "1"),)): 1000,
        ("safegene_slots", (("state", "total"),)): 4,
        ("safegene_slots", (("state", "used"),)): 0,
        ("safegene_receipt_timestamp_seconds", (("rank", "0"),)): 1234.0,
        ("safegene_receipt_timestamp_seconds", (("rank", "1"),)): 1234.0,
        (
            "safegene_build_info",
            (
                ("apply", "gain"),
                ("family", "llama-tiny"),
                ("version", __version__),
                ("vllm_version", "0.32.0"),
            ),
        ): 1,
    }


@pytest.mark.parametrize("ranks", [(), (receipt(),)])
def test_receipts_that_break_their_promise_do_not_renew_the_time(ranks: tuple[Receipt]) -> None:
    make([]).take(report(receipt()))
    late = make([])
    late.now = lambda: 9999.0
    late.take(report(*ranks, faults=("rank 0 holds another row",)))
    at = values("safegene_receipt_timestamp_seconds")
    assert at["safegene_receipt_timestamp_seconds", (("rank", "0"),)] == 1234.0


def test_evictions_are_counted_on_over_a_restart_of_the_engine() -> None:
    applied = make([])
    with growth() as grown:
        for evictions in (2, 2, 5, 1):
            applied.take(report(replace(receipt(), slot_evictions=evictions)))
    assert grown.by("safegene_slot_evictions_total") == 6


def test_tenants_and_the_base() -> None:
    base = profile(0.5, 0.5)
    served = [Served("acme", "acme@7", profile(0.6, 0.8)), Served("bare", "bare@1", None)]
    applied = make(served, plan(base))
    applied.take(report(receipt(0, **{"acme@7": 1.0}), receipt(1, **{"acme@7": 0.9})))
    family, mine = HEADER.name, served[0].profile
    assert mine is not None
    assert of_tenants() == pytest.approx(
        {
            # Labels are sorted by name: apply, family, profile, revision, tenant.
            f"revision_info{{gain,{family},{mine.digest},acme@7,acme}}": 1,
            f"revision_info{{,{family},,bare@1,bare}}": 1,
            f"revision_info{{gain,{family},{base.digest},org/Base,}}": 1,
            # What the weakest rank holds.
            "gain_norm{acme}": 0.9,
            "gain_norm{bare}": 0.0,
            "gain_norm{}": 0.5**0.5,
            "active_layers{acme}": 2,
            "active_layers{bare}": 0,
            "active_layers{}": 2,
            # Layers 0 and 2 carry no vector, so their zeros do not count.
            "coefficient{min,acme}": 0.6,
            "coefficient{mean,acme}": 0.7,
            "coefficient{max,acme}": 0.8,
            **{f"coefficient{{{stat},}}": 0.5 for stat in ("min", "mean", "max")},
        }
    )
    served[:] = [Served("acme", "acme@8", profile(0.0, 0.4))]
    applied.plan = plan()
    applied.refresh()
    assert [name for name in of_tenants() if name.startswith("revision_info")] == [
        f"revision_info{{gain,{family},{served[0].profile.digest},acme@8,acme}}"  # type: ignore
    ]
    assert of_tenants()["gain_norm{acme}"] == pytest.approx(0.4)
    assert of_tenants()["active_layers{acme}"] == 1
    served.clear()
    applied.refresh()
    assert of_tenants() == {}


def test_tenants_beyond_the_bound_have_no_gauges() -> None:
    served = [Served(name, f"{name}@1", profile(1.0, 1.0)) for name in ("a", "b", "c")]
    applied = make(served, max_tenants=2, tenants=("c",))
    applied.refresh()
    assert {name for name in of_tenants() if name.startswith("gain_norm")} == {
        "gain_norm{a}",
        "gain_norm{c}",
    }
    served.clear()
    applied.refresh()


@pytest.mark.parametrize(
    ("given", "served", "modes"),
    [
        (plan(profile(1.0, 1.0)), [], set()),
        (plan(), [], {"base_without_profile"}),
        (
            plan(profile(1.0, 1.0), missing_profile="serve_unprotected"),
            [],
            {"serve_unprotected"},
        ),
        (
            EnginePlan(Settings(family=None, missing_profile="serve_unprotected"), None, None),
            [],
            {"no_family", "serve_unprotected"},
        ),
        (plan(profile(0.0, 0.0)), [], {"zero_profile"}),
        (
            plan(profile(1.0, 1.0)),
            [Served("acme", "acme@1", profile(0.0, 0.0))],
            {"zero_profile"},
        ),
    ],
)
def test_each_unprotected_mode_is_exported(
    given: EnginePlan, served: list[Served], modes: set[str]
) -> None:
    applied = make(served, given)
    applied.refresh()
    assert open_modes() == modes
    served.clear()
    applied.plan = plan()
    applied.refresh()


# -- several processes ---------------------------------------------------------------------------


def test_a_series_is_removed_or_with_several_processes_set_to_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("some", "of a set", ["name"], registry=registry)
    series = Series(gauge)
    series.replace({("a",): 1.0, ("b",): 2.0})
    series.replace({("b",): 3.0})
    assert registry.get_sample_value("some", {"name": "a"}) is None
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/shared")
    series.replace({})
    assert registry.get_sample_value("some", {"name": "b"}) == 0.0


PROCESS = """
import asyncio, json, sys
sys.path[:0] = json.loads(sys.argv[2])
from test_metrics_applied import profile, make, receipt, report
from test_metrics_traffic import responding, chat, guarded, traffic, full_response
from safegene_server.monitoring.applied import Served

first = sys.argv[1] == "0"
access = guarded(responding(full_response(), kind=b"application/json"), traffic=traffic())
for _ in range(2 if first else 3):
    chat(access, "acme", model="acme")
if first:
    served = [Served("acme", "acme@1", profile(1, 1)), Served("lost", "lost@1", profile(1, 1))]
    applied = make(served)
    applied.take(report(receipt()))
    served[:] = [Served("acme", "acme@2", profile(0.6, 0.8))]
    applied.refresh()
print("done", flush=True)
sys.stdin.read()
"""


def test_two_processes_are_merged_in_one_scrape(tmp_path: Path) -> None:
    """As in vLLM with several API processes: one directory, merged when it is scraped."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    folders = (".", "server", "tests/server", "tests/support")
    paths = json.dumps([str(ROOT / folder) for folder in folders])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), paths],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    scrape = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())"
    )
    try:
        assert [p.stdout.readline() for p in running if p.stdout] == ["done\n"] * 2
        scraped = subprocess.run(
            [sys.executable, "-c", scrape], env=env, capture_output=True, text=True, timeout=60
        )
    finally:
        for process in running:
            process.communicate(timeout=60)
    assert scraped.returncode == 0, scraped.stderr
    lines = scraped.stdout.splitlines()
    for line in (
        'safegene_requests_total{outcome="ok",tenant="acme"} 5.0',
        'safegene_prompt_tokens_total{tenant="acme"} 55.0',
        'safegene_request_duration_seconds_count{tenant="acme"} 5.0',
        'safegene_refusals_total{rule="strings:opening",tenant="acme"} 5.0',
        'safegene_sites{rank="0",state="applied"} 14.0',
        'safegene_gain_norm{tenant="acme"} 1.0',
        'safegene_gain_norm{tenant="lost"} 0.0',
    ):
        assert line in lines, scraped.stdout
    info = {line.split("revision=")[1][1:7]: line[-3:] for line in lines if "on_info{" in line}
    assert info == {"acme@1": "0.0", "acme@2": "1.0", "lost@1": "0.0"}


# -- the loops -----------------------------------------------------------------------------------


def test_a_step_that_fails_is_tried_again_and_stops_no_other() -> None:
    from safegene_server.monitoring.collectors import Collectors

    async def run() -> tuple[int, int]:
        looked, failed = 0, 0
        enough = asyncio.Event()

        async def look() -> None:
            nonlocal looked
            looked += 1

        async def fail() -> None:
            nonlocal failed
            failed += 1
            if failed > 2 and looked > 2:
                enough.set()
            raise ValueError("no")

        observing = Collectors(0.001, look)
        observing.start((fail, 0.001))
        async with asyncio.timeout(300):
            await enough.wait()
        await observing.stop()
        return looked, failed

    looked, failed = asyncio.run(run())
    assert looked > 2 and failed > 2


def test_reports_and_changes_are_exported_from_the_start_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served: list[tuple[str, Profile]] = []

    async def report_nothing() -> None:
        return None

    verifier: Any = SimpleNamespace(
        engine=SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace())),
        models=SimpleNamespace(base_model_paths=[SimpleNamespace(name="org/Base")]),
        plan=plan(),
        profiles=lambda: served,
        report=report_nothing,
    )

    async def run() -> None:
        metrics = Metrics(MetricsSettings(), None)
        metrics.on_report(report(receipt()))
        metrics.on_change()
        assert values("safegene_build_info") == {}
        metrics.start(verifier, None)
        metrics.on_report(report(receipt()))
        assert len(values("safegene_build_info")) == 1
        served.append(("acme@1", profile(1.0, 1.0)))
        metrics.on_change()
        assert "gain_norm{acme@1}" in of_tenants()
        verifier.profiles = None
        served.clear()
        metrics.on_change()
        await metrics.stop()

    asyncio.run(run())
    assert "metrics could not be updated" in caplog.text
