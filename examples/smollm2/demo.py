"""`make demo`: several fine-tunes of one family, one safety vector, one stock vLLM.

Starts `safegene serve`, queries it with the official `openai` client, and shows the effect of the
vector at three strengths. Numbers go to build/demo.json. Takes five minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.smollm2 import data
from examples.smollm2.datasets import own_task
from examples.smollm2.demo_files import (
    FAMILY,
    FULL_TENANT,
    SLOT_TENANTS,
    STRENGTHS,
    DemoFiles,
    build_files,
    served_name,
    write_full_profile,
)
from examples.smollm2.server import Server
from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.evaluation.tasks import correct

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = Console(width=None if sys.stdout.isatty() else 112)
MAX_CONCURRENT = 48
OUTPUT_TOKENS = 24
LABEL_TOKENS = 16
TABLE_CHARS = 56
NO_KEY = "none"
TASK_ROWS = 40


Results = dict[tuple[str, str], "Completions"]
Slots = tuple[Results, dict[str, Any], dict[str, Any]]
"""Completions by (tenant, strength), each tenant's receipt, and the engine's receipt."""


@dataclass
class Completions:
    """Completions of one tenant at one strength by prompt set; judged, not stored."""

    harmful: list[str]
    harmless: list[str]
    task: list[str]


def prompt_sets() -> tuple[list[str], list[str]]:
    """Held-out (harmful, harmless) prompts of the demo split."""
    return data.prompts("harmful", "demo"), [
        *data.prompts("lookalike", "demo"),
        *data.prompts("ordinary", "demo"),
    ]


async def complete_all(
    url: str, model: str, prompts: Sequence[str], tokens: int, key: str = NO_KEY
) -> list[str]:
    """Completions in order, requested concurrently through the official client."""
    semaphore = asyncio.Semaphore(MAX_CONCURRENT)
    async with AsyncOpenAI(base_url=url, api_key=key, timeout=300, max_retries=0) as client:

        async def one(prompt: str) -> str:
            async with semaphore:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=tokens,
                    temperature=0,
                )
                return completion.choices[0].message.content or ""

        return await asyncio.gather(*map(one, prompts))


def query(url: str, model: str, tenant: str, key: str = NO_KEY) -> Completions:
    """Query one served model with all prompt sets and the tenant's own task."""
    harmful, harmless = prompt_sets()
    completions = asyncio.run(complete_all(url, model, [*harmful, *harmless], OUTPUT_TOKENS, key))
    rows = own_task(tenant, TASK_ROWS).data.rows
    labels = asyncio.run(complete_all(url, model, [row.prompt for row in rows], LABEL_TOKENS, key))
    return Completions(completions[: len(harmful)], completions[len(harmful) :], labels)


def judged(found: Completions, tenant: str) -> dict[str, Any]:
    """Rates with n; refusals by the judge strings:opening."""
    task = own_task(tenant, TASK_ROWS)
    rows = task.data.rows
    right = [correct(task, a, str(r.answer)) for a, r in zip(found.task, rows, strict=True)]
    return {
        "harmful_refused": rate([is_refusal(a) for a in found.harmful]),
        "harmless_refused": rate([is_refusal(a) for a in found.harmless]),
        "coherent": rate([is_coherent(a) for a in [*found.harmful, *found.harmless]]),
        "task_accuracy": rate(right),
    }


def rate(values: Sequence[bool]) -> dict[str, float]:
    return {"rate": round(sum(values) / len(values), 4), "n": len(values)}


def stream_once(url: str, model: str, prompt: str) -> None:
    """Stream one completion through the same client."""
    CONSOLE.print(f"\n[bold]{model}[/], streaming: {prompt}\n  ", end="")
    client = OpenAI(base_url=url, api_key="none")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        CONSOLE.print(chunk.choices[0].delta.content or "", end="", markup=False)
    CONSOLE.print()


def run_slots(files: DemoFiles, progress: Progress, task_id: Any) -> Slots:
    """Serve three tenants at three strengths on one engine with one vector."""
    names = {served_name(t, d): files.tenant(t, d) for t in SLOT_TENANTS for d in STRENGTHS}
    results: dict[tuple[str, str], Completions] = {}
    with Server(files.parent, FAMILY, names, ROOT / "build" / "server-slots.log") as server:
        progress.advance(task_id)
        for tenant in SLOT_TENANTS:
            for strength in STRENGTHS:
                progress.update(task_id, description=f"querying {tenant}, {strength}")
                name = served_name(tenant, strength)
                results[tenant, strength] = query(server.url, name, tenant)
                progress.advance(task_id)
        progress.stop()
        stream_once(server.url, "sentiment", data.prompts("lookalike", "demo")[0])
        receipts = server.receipts()
    return results, {t: _adapter(receipts, t) for t in SLOT_TENANTS}, receipts[0]


def run_full(files: DemoFiles, strength: str) -> tuple[Completions, dict[str, Any]]:
    """Serve a tenant's own checkpoint; the vector is added while its weights load."""
    write_full_profile(files, strength)
    log = ROOT / "build" / f"server-{FULL_TENANT}-{strength}.log"
    with Server(files.full, FAMILY, None, log, name=FULL_TENANT) as server:
        return query(server.url, FULL_TENANT, FULL_TENANT), server.receipts()[0]


def observe(files: DemoFiles) -> None:
    """`make demo ARGS=--observe`: all strengths on a registry, and a table from PromQL."""
    from examples.smollm2.monitoring import KEY, monitored, wait_for_probes

    with monitored(files, ROOT / "build") as (server, stack):
        with Progress(console=CONSOLE) as progress:
            task_id = progress.add_task("", total=len(SLOT_TENANTS) * len(STRENGTHS))
            for tenant in SLOT_TENANTS:
                for strength in STRENGTHS:
                    name = served_name(tenant, strength)
                    progress.update(task_id, description=f"querying {name}")
                    query(server.url, name, tenant, KEY)
                    progress.advance(task_id)
        with CONSOLE.status("waiting for probes of every tenant ..."):
            found = wait_for_probes(server, stack)
    CONSOLE.print(found, soft_wrap=True, markup=False, highlight=False)


def _adapter(receipts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One tenant's receipt of rank 0."""
    first = receipts[0]
    mine = next(a for a in first["adapters"] if a["name"] == name)
    return {**mine, "family": first["family"], "ranks": len(receipts)}


def show_prompts(results: dict[tuple[str, str], Completions]) -> None:
    """Print a few prompts at every strength; harmful ones with verdicts only."""
    harmful, harmless = prompt_sets()
    table = Table("tenant", "prompt", *STRENGTHS, title="the same prompt at three strengths")
    for tenant in SLOT_TENANTS:
        for kind, prompts, count in (("harmful", harmful, 3), ("harmless", harmless, 2)):
            step = len(prompts) // count
            for i in range(0, step * count, step):
                completions = [
                    getattr(results[tenant, strength], kind)[i] for strength in STRENGTHS
                ]
                table.add_row(tenant, prompts[i][:48], *(verdict(a, kind) for a in completions))
        table.add_section()
    CONSOLE.print(table)


def verdict(completion: str, kind: str) -> str:
    """Text of a harmless completion, verdict of a harmful one."""
    if not is_coherent(completion):
        return "[yellow]broken text[/]"
    if kind == "harmful":
        return "[green]refused[/]" if is_refusal(completion) else "[red]complied[/]"
    return " ".join(completion.split())[:TABLE_CHARS]


def show_rates(report: dict[str, Any]) -> None:
    columns = ("tenant", "applied", "strength", "harmful refused", "harmless refused", "coherent")
    table = Table(*columns, "task right", title="rates on held-out prompts")
    for tenant in report["tenants"]:
        for strength, rates in tenant["strengths"].items():
            cells = [f"{found['rate']:.0%} of {found['n']}" for found in rates.values()]
            table.add_row(tenant["name"], tenant["apply"], strength, *cells)
        table.add_section()
    CONSOLE.print(table)


def keep_serving(files: DemoFiles) -> None:
    """`make serve-demo`: serve until Ctrl-C and print curl lines."""
    names = {served_name(t, d): files.tenant(t, d) for t in SLOT_TENANTS for d in STRENGTHS}
    with Server(files.parent, FAMILY, names, ROOT / "build" / "server-slots.log") as server:
        body = json.dumps(
            {"model": "topic", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        )
        for line in (
            f"curl -s {server.url}/models",
            f"curl -s {server.url}/safegene/ready",
            f"curl -s {server.url}/safegene/receipts",
            f"curl -s {server.url}/chat/completions "
            f"-H 'content-type: application/json' -d '{body}'",
        ):
            CONSOLE.print(line, soft_wrap=True, markup=False, highlight=False)
        CONSOLE.print(f"models: {', '.join(names)}. Press Ctrl-C to stop.")
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="serve until Ctrl-C, print curl lines")
    parser.add_argument(
        "--observe", action="store_true", help="on a registry, watched by a real Prometheus"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    with CONSOLE.status("preparing the parent, the full checkpoint and the tenants ..."):
        files = build_files(ROOT / "build")
    if arguments.keep:
        keep_serving(files)
        return
    if arguments.observe:
        observe(files)
        return
    CONSOLE.print(f"ready to serve after {time.perf_counter() - started:.0f} s")
    with Progress(console=CONSOLE) as progress:
        steps = 1 + len(SLOT_TENANTS) * len(STRENGTHS)
        task_id = progress.add_task("starting vLLM with one vector", total=steps)
        results, receipts, engine_receipt = run_slots(files, progress, task_id)
    with CONSOLE.status(f"serving {FULL_TENANT} by weight load, without and with the vector ..."):
        for strength in ("unprotected", "protected"):
            results[FULL_TENANT, strength], receipts[FULL_TENANT] = run_full(files, strength)
    show_prompts(results)
    report: dict[str, Any] = {"family": engine_receipt["family"], "tenants": []}
    for tenant in (*SLOT_TENANTS, FULL_TENANT):
        strengths = {
            d: judged(results[tenant, d], tenant) for d in STRENGTHS if (tenant, d) in results
        }
        apply = "weights" if tenant == FULL_TENANT else "gain"
        report["tenants"].append(
            {
                "name": tenant,
                "apply": apply,
                "task": own_task(tenant).name,
                "receipt": receipts[tenant],
                "strengths": strengths,
            }
        )
    show_rates(report)
    megabytes = engine_receipt["vector_bytes"] / 1e6
    CONSOLE.print(
        f"one vector of {megabytes:.1f} MB on {engine_receipt['sites_applied']} sites served "
        f"{len(SLOT_TENANTS) * len(STRENGTHS)} profiles; receipts agree with the files."
    )
    report["seconds"] = round(time.perf_counter() - started, 1)
    path = ROOT / "build" / "demo.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    CONSOLE.print(f"{report['seconds']:.0f} s in all; numbers in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
