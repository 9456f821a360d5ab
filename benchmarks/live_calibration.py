"""`make bench-live`: coefficients found on the running engine beside those found with gradients.

One tenant, one family, the same 16 examples of each kind. Served side by side: without safety, with
the profile that `safegene calibrate` made (shipped), and registered with examples in place of a
profile, so that the engine that serves finds the coefficients itself. Asked on prompts that nobody
trained or tuned on. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks" / "safety_utility")]

from rich.console import Console
from rich.table import Table

import mixes
from demo import ask_all
from questions import ATTACK, ORDINARY, OVER_REFUSAL, Questions, held_out
from safegene_vllm.client import Client
from safegene_vllm.dataset import Dataset
from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.evaluation.statistics import rate
from safegene_vllm.evaluation.tasks import correct
from serving import Server
from sources import shots_of
from world import FAMILY, TENANTS, build_world

CONSOLE = Console(width=None if sys.stdout.isatty() else 112)
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
    """All three; how long the live one took, and what its job says of the search."""
    adapter = folder / "adapter"
    shutil.copytree(TENANTS / tenant, adapter)
    (adapter / "safegene.json").unlink()
    safety, task, benign = shots_of(tenant, mixes.SHOTS)
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


def question(url: str, name: str, asked: Questions) -> dict[str, Any]:
    """Rates of one served tenant, each with n and interval."""
    found: dict[str, Any] = {}
    coherent: list[bool] = []
    for what in (ATTACK, OVER_REFUSAL, ORDINARY):
        prompts = [row.prompt for row in asked.sets[what].data.rows]
        answers = asyncio.run(ask_all(url, name, prompts, TOKENS, KEY))
        refused = [is_refusal(answer) for answer in answers]
        values = [not r for r in refused] if what == ATTACK else refused
        found[what] = rate(values)
        coherent += [is_coherent(answer) for answer in answers]
    rows = asked.task.data.rows
    answers = asyncio.run(ask_all(url, name, [row.prompt for row in rows], TOKENS, KEY))
    right = [correct(asked.task, a, str(r.answer)) for a, r in zip(answers, rows, strict=True)]
    return {**found, "task": rate(right), "coherent": rate(coherent)}


def show(found: dict[str, dict[str, Any]]) -> None:
    columns = ("attack success", "XSTest safe refused", "ordinary refused", "task", "coherent")
    table = Table("coefficients", *columns, title="the same tenant, three profiles")
    for name, rates in found.items():
        cells = (f"{r.rate:.0%} ({r.low:.0%} to {r.high:.0%})" for r in rates.values())
        table.add_row(name, *cells)
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("advbench", "self-instruct", "xstest"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tenant", default="topic", choices=["sentiment", "topic", "writer"])
    parser.add_argument("--rows", type=int, default=60, help="prompts a set")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    asked = held_out(
        options.tenant, options.advbench, options.self_instruct, options.xstest, rows=options.rows
    )
    world = build_world(options.build)
    with tempfile.TemporaryDirectory(prefix="safegene-live-") as folder:
        settings = Path(folder) / "safegene.yaml"
        settings.write_text(CONFIG)
        extra = ["--server-config", str(settings), "--slots", "8"]
        log = options.build / "bench-live.log"
        env = {"BENCHMARK_KEY": KEY}
        with Server(world.parent, FAMILY, {}, log, extra=extra, env=env) as server:
            with Client(server.url.removesuffix("/v1"), KEY) as client:
                with CONSOLE.status("calibrating on the running engine ..."):
                    search = register(client, options.tenant, Path(folder))
                served = client.revisions("live")[-1]["coefficients"]
                shipped = client.revisions("gradient")[-1]["coefficients"]
            names = {WITHOUT: "without", GRADIENT: "gradient", LIVE: "live"}
            found = {title: question(server.url, name, asked) for title, name in names.items()}
    show(found)
    CONSOLE.print(f"{search['seconds']} s on the engine: {search['message']}")
    numbers = {title: {what: r.rate for what, r in rates.items()} for title, rates in found.items()}
    means = {"live": served, "gradient": shipped}
    layers = [n for n, value in enumerate(shipped) if value]
    print(
        json.dumps(
            {
                "bench": "live_calibration",
                "tenant": options.tenant,
                "rates": numbers,
                "mean_coefficient": {
                    name: sum(row[n] for n in layers) / len(layers) for name, row in means.items()
                },
                "search": {k: v for k, v in search.items() if k != "message"},
            }
        )
    )


if __name__ == "__main__":
    main()
