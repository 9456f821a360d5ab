"""`make bench-live`: coefficients found on the running engine compared with gradients.

One tenant, one family, the same 16 examples of each kind. Served together: without safety, with the
profile of `safegene calibrate` (shipped), and registered with examples and no profile, so that
the serving engine calibrates itself. Evaluated on held-out prompts. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import CONSOLE, ROOT, print_result, provenance, table
from benchmarks.safety_utility.prompts import (
    ATTACK,
    ORDINARY,
    OVER_REFUSAL,
    EvaluationPrompts,
    held_out,
)
from examples.smollm2 import mixes
from examples.smollm2.datasets import few_shot_data
from examples.smollm2.demo import complete_all
from examples.smollm2.demo_files import FAMILY, TENANTS, build_files
from examples.smollm2.server import Server
from safegene_vllm.client import Client
from safegene_vllm.dataset import Dataset
from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.evaluation.statistics import rate
from safegene_vllm.evaluation.tasks import correct

KEY = "sg-benchmark-" + "0" * 40
CONFIG = """
registry: registry.sqlite
store: store
tenants: {gate: {enabled: false}, calibration: {share: 1.0}}
keys: [{name: benchmark, secret_env: BENCHMARK_KEY, scopes: [admin, serve], tenants: ["*"]}]
"""
TOKENS = 24
WITHOUT, GRADIENT, LIVE = "without safety", "gradients (shipped)", "on the running engine"


def rows_of(shots: Dataset) -> list[dict[str, Any]]:
    return [{"prompt": row.prompt, "answer": row.answer} for row in shots.rows]


def register(client: Client, tenant: str, folder: Path) -> dict[str, Any]:
    """Onboard all three; return the duration and the job's result of the live calibration."""
    adapter = folder / "adapter"
    shutil.copytree(TENANTS / tenant, adapter)
    (adapter / "safegene.json").unlink()
    safety, task, benign = few_shot_data(tenant, mixes.SHOTS)
    examples = {"safety": rows_of(safety), "task": rows_of(task), "benign": rows_of(benign)}
    begun = time.perf_counter()
    live = client.add_tenant("live", source=str(adapter), calibrate={"examples": examples})
    job = client.wait_job(live["job"]["id"], timeout_s=1800)
    spent_s = time.perf_counter() - begun
    if job["state"] != "done":
        raise RuntimeError(f"the calibration ended as {job['state']}: {job['message']}")
    for name, source, coefficients in (
        ("without", adapter, 0.0),
        ("gradient", TENANTS / tenant, None),
    ):
        begun_job = client.add_tenant(name, source=str(source), coefficients=coefficients)
        ended = client.wait_job(begun_job["job"]["id"])
        if ended["state"] != "done":
            raise RuntimeError(f"{name}: {ended['message']}")
    return {"seconds": round(spent_s, 1), "message": job["message"], **(job["result"] or {})}


def evaluate(url: str, name: str, prompts_of: EvaluationPrompts) -> dict[str, Any]:
    """Rates of one served tenant."""
    found: dict[str, Any] = {}
    coherent: list[bool] = []
    for what in (ATTACK, OVER_REFUSAL, ORDINARY):
        prompts = [row.prompt for row in prompts_of.sets[what].data.rows]
        completions = asyncio.run(complete_all(url, name, prompts, TOKENS, KEY))
        refused = [is_refusal(text) for text in completions]
        values = [not r for r in refused] if what == ATTACK else refused
        found[what] = rate(values)
        coherent += [is_coherent(text) for text in completions]
    rows = prompts_of.task.data.rows
    completions = asyncio.run(complete_all(url, name, [row.prompt for row in rows], TOKENS, KEY))
    right = [
        correct(prompts_of.task, a, str(r.answer)) for a, r in zip(completions, rows, strict=True)
    ]
    return {**found, "task": rate(right), "coherent": rate(coherent)}


def print_table(found: dict[str, dict[str, Any]]) -> None:
    rows = [
        (name, *(f"{r.rate:.0%} ({r.low:.0%} to {r.high:.0%})" for r in rates.values()))
        for name, rates in found.items()
    ]
    columns = ("attack success", "XSTest safe refused", "ordinary refused", "task", "coherent")
    CONSOLE.print(table((("coefficients", *columns), rows), "the same tenant, three profiles"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("advbench", "self-instruct", "xstest"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tenant", default="topic", choices=["sentiment", "topic", "writer"])
    parser.add_argument("--rows", type=int, default=60, help="prompts a set")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    prompts_of = held_out(
        options.tenant, options.advbench, options.self_instruct, options.xstest, rows=options.rows
    )
    files = build_files(options.build)
    with tempfile.TemporaryDirectory(prefix="safegene-live-") as folder:
        settings = Path(folder) / "safegene.yaml"
        settings.write_text(CONFIG)
        extra = ["--server-config", str(settings), "--slots", "8"]
        log = options.build / "bench-live.log"
        env = {"BENCHMARK_KEY": KEY}
        with Server(files.parent, FAMILY, {}, log, extra=extra, env=env) as server:
            with Client(server.url.removesuffix("/v1"), KEY) as client:
                with CONSOLE.status("calibrating on the running engine ..."):
                    search = register(client, options.tenant, Path(folder))
                served = client.revisions("live")[-1]["coefficients"]
                shipped = client.revisions("gradient")[-1]["coefficients"]
            names = {WITHOUT: "without", GRADIENT: "gradient", LIVE: "live"}
            found = {title: evaluate(server.url, name, prompts_of) for title, name in names.items()}
    print_table(found)
    CONSOLE.print(f"{search['seconds']} s on the engine: {search['message']}")
    numbers = {title: {what: r.rate for what, r in rates.items()} for title, rates in found.items()}
    means = {"live": served, "gradient": shipped}
    layers = [n for n, value in enumerate(shipped) if value]
    print_result(
        "live_calibration",
        {
            **provenance(),
            "tenant": options.tenant,
            "rates": numbers,
            "mean_coefficient": {
                name: sum(row[n] for n in layers) / len(layers) for name, row in means.items()
            },
            "search": {k: v for k, v in search.items() if k != "message"},
        },
    )


if __name__ == "__main__":
    main()
