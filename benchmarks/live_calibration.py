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
from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.evaluation.statistics import Rate, rate
from safegene_vllm.evaluation.tasks import correct

KEY = "sg-benchmark-" + "0" * 40
CONFIG = """
registry: registry.sqlite
store: store
tenants: {gate: {enabled: false}, calibration: {share: 1.0}}
keys: [{name: benchmark, secret_env: BENCHMARK_KEY, scopes: [admin, serve], tenants: ["*"]}]
"""
TOKENS = 24
TITLES = {
    "without": "without safety",
    "gradient": "gradients (shipped)",
    "live": "on the running engine",
}


def onboard(client: Client, name: str, **options: Any) -> dict[str, Any]:
    """Onboard one tenant; return the seconds and the job's message and result."""
    started = time.perf_counter()
    job = client.wait_job(client.add_tenant(name, **options).job.id, timeout_s=1800)
    if job.state != "done":
        raise RuntimeError(f"onboarding of {name} ended as {job.state}: {job.message}")
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "message": job.message, **(job.result or {})}


def register(
    client: Client, tenant: str, folder: Path, examples: int, evaluations: int | None
) -> dict[str, Any]:
    """Onboard all three; return what is known of the live calibration."""
    adapter = folder / "adapter"
    shutil.copytree(TENANTS / tenant, adapter)
    (adapter / "safegene.json").unlink()
    given = {
        kind: [{"prompt": row.prompt, "answer": row.answer} for row in found.rows]
        for kind, found in zip(
            ("safety", "task", "benign"), few_shot_data(tenant, examples), strict=True
        )
    }
    onboard(client, "without", source=str(adapter), coefficients=0.0)
    onboard(client, "gradient", source=str(TENANTS / tenant))
    calibrate = {"examples": given} | ({"evaluations": evaluations} if evaluations else {})
    return onboard(client, "live", source=str(adapter), calibrate=calibrate)


def evaluate(url: str, name: str, held: EvaluationPrompts) -> dict[str, Rate]:
    """Rates of one served tenant."""

    def complete(prompts: list[str]) -> list[str]:
        return asyncio.run(complete_all(url, name, prompts, TOKENS, KEY))

    found: dict[str, Rate] = {}
    coherent: list[bool] = []
    for what in (ATTACK, OVER_REFUSAL, ORDINARY):
        completions = complete([row.prompt for row in held.sets[what].data.rows])
        found[what] = rate([is_refusal(text) != (what == ATTACK) for text in completions])
        coherent += [is_coherent(text) for text in completions]
    rows = held.task.data.rows
    completions = complete([row.prompt for row in rows])
    right = [
        correct(held.task, text, str(row.answer))
        for text, row in zip(completions, rows, strict=True)
    ]
    return {**found, "task": rate(right), "coherent": rate(coherent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("advbench", "self-instruct", "xstest"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tenant", default="topic", choices=["sentiment", "topic", "writer"])
    parser.add_argument("--rows", type=int, default=60, help="prompts a set")
    parser.add_argument("--examples", type=int, default=mixes.EXAMPLES, help="of each kind")
    parser.add_argument("--evaluations", type=int, help="of the search (default: the server's)")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    held = held_out(
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
                    counts = (options.examples, options.evaluations)
                    search = register(client, options.tenant, Path(folder), *counts)
                served = {
                    name: client.revisions(name)[-1].coefficients for name in ("live", "gradient")
                }
            rates = {name: evaluate(server.url, name, held) for name in TITLES}
    layers = [n for n, value in enumerate(served["gradient"]) if value]
    rows = [
        (TITLES[name], *(f"{r.rate:.0%} ({r.low:.0%} to {r.high:.0%})" for r in found.values()))
        for name, found in rates.items()
    ]
    columns = ("attack success", "XSTest safe refused", "ordinary refused", "task", "coherent")
    CONSOLE.print(table((("coefficients", *columns), rows), "the same tenant, three profiles"))
    CONSOLE.print(f"{search['seconds']} s on the engine: {search.pop('message')}")
    print_result(
        "live_calibration",
        {
            **provenance(),
            "tenant": options.tenant,
            "rates": {TITLES[n]: {k: r.rate for k, r in f.items()} for n, f in rates.items()},
            "mean_coefficient": {
                name: sum(row[n] for n in layers) / len(layers) for name, row in served.items()
            },
            "search": search,
        },
    )


if __name__ == "__main__":
    main()
