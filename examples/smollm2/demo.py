"""`make demo`: several fine-tunes of one family, one safety vector, one stock vLLM, real answers.

Starts `safegene serve`, talks to it with the official `openai` client, and shows what the vector
does at three doses. Numbers go to build/demo.json. Takes five minutes on two cores.
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

import data
from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.evaluation.tasks import correct
from serving import Server
from sources import own_task
from world import (
    DOSES,
    FAMILY,
    FULL_TENANT,
    SLOT_TENANTS,
    World,
    build_world,
    served_name,
    write_full_dose,
)

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = Console(width=None if sys.stdout.isatty() else 112)
AT_ONCE = 48
ANSWER_TOKENS = 24
LABEL_TOKENS = 16
SHOWN_CHARS = 56
NO_KEY = "none"
TASK_ROWS = 40


Results = dict[tuple[str, str], "Found"]
Slots = tuple[Results, dict[str, Any], dict[str, Any]]
"""Answers by (tenant, dose), each tenant's receipt, and the engine's own receipt."""


@dataclass
class Found:
    """Answers of one tenant at one dose, by prompt set; judged, never stored."""

    harmful: list[str]
    harmless: list[str]
    task: list[str]


def prompt_sets() -> tuple[list[str], list[str]]:
    """(harmful, harmless) prompts of the demo split; nothing was trained or tuned on them."""
    return data.prompts("harmful", "demo"), [
        *data.prompts("lookalike", "demo"),
        *data.prompts("ordinary", "demo"),
    ]


async def ask_all(
    url: str, model: str, prompts: Sequence[str], tokens: int, key: str = NO_KEY
) -> list[str]:
    """Answers in order, asked at once through the official client."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=url, api_key=key, timeout=300, max_retries=0) as client:

        async def one(prompt: str) -> str:
            async with gate:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=tokens,
                    temperature=0,
                )
                return answer.choices[0].message.content or ""

        return await asyncio.gather(*map(one, prompts))


def question(url: str, model: str, tenant: str, key: str = NO_KEY) -> Found:
    """All prompt sets and the tenant's own task put to one served model."""
    harmful, harmless = prompt_sets()
    answers = asyncio.run(ask_all(url, model, [*harmful, *harmless], ANSWER_TOKENS, key))
    rows = own_task(tenant, TASK_ROWS).data.rows
    labels = asyncio.run(ask_all(url, model, [row.prompt for row in rows], LABEL_TOKENS, key))
    return Found(answers[: len(harmful)], answers[len(harmful) :], labels)


def judged(found: Found, tenant: str) -> dict[str, Any]:
    """Rates with their n; refusal by the phrases of the judge strings:opening."""
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
    """One answer as it arrives, through the same client."""
    CONSOLE.print(f"\n[bold]{model}[/], streaming: {prompt}\n  ", end="")
    client = OpenAI(base_url=url, api_key="none")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        CONSOLE.print(chunk.choices[0].delta.content or "", end="", markup=False)
    CONSOLE.print()


def run_slots(world: World, progress: Progress, task_id: Any) -> Slots:
    """One engine, one vector, three tenants in three doses each."""
    names = {served_name(t, d): world.tenant(t, d) for t in SLOT_TENANTS for d in DOSES}
    results: dict[tuple[str, str], Found] = {}
    with Server(world.parent, FAMILY, names, ROOT / "build" / "server-slots.log") as server:
        progress.advance(task_id)
        for tenant in SLOT_TENANTS:
            for dose in DOSES:
                progress.update(task_id, description=f"asking {tenant}, {dose}")
                name = served_name(tenant, dose)
                results[tenant, dose] = question(server.url, name, tenant)
                progress.advance(task_id)
        progress.stop()
        stream_once(server.url, "sentiment", data.prompts("lookalike", "demo")[0])
        receipts = server.receipts()
    return results, {t: _adapter(receipts, t) for t in SLOT_TENANTS}, receipts[0]


def run_full(world: World, dose: str) -> tuple[Found, dict[str, Any]]:
    """A tenant's own checkpoint, the vector added while its weights load."""
    write_full_dose(world, dose)
    log = ROOT / "build" / f"server-{FULL_TENANT}-{dose}.log"
    with Server(world.full, FAMILY, None, log, name=FULL_TENANT) as server:
        return question(server.url, FULL_TENANT, FULL_TENANT), server.receipts()[0]


def observe(world: World) -> None:
    """`make demo ARGS=--observe`: all doses on a registry, and a page made of PromQL alone."""
    from observing import KEY, last_look, observed

    with observed(world, ROOT / "build") as (server, stack):
        with Progress(console=CONSOLE) as progress:
            task_id = progress.add_task("", total=len(SLOT_TENANTS) * len(DOSES))
            for tenant in SLOT_TENANTS:
                for dose in DOSES:
                    name = served_name(tenant, dose)
                    progress.update(task_id, description=f"asking {name}")
                    question(server.url, name, tenant, KEY)
                    progress.advance(task_id)
        with CONSOLE.status("probing what has not been probed yet ..."):
            found = last_look(server, stack)
    CONSOLE.print(found, soft_wrap=True, markup=False, highlight=False)


def _adapter(receipts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One tenant's receipt of rank 0, with the rank's own figures about the vector."""
    first = receipts[0]
    mine = next(a for a in first["adapters"] if a["name"] == name)
    return {**mine, "family": first["family"], "ranks": len(receipts)}


def show_prompts(results: dict[tuple[str, str], Found]) -> None:
    """A few prompts side by side. Answers to harmful prompts are shown only as verdicts."""
    harmful, harmless = prompt_sets()
    table = Table("tenant", "prompt", *DOSES, title="the same prompt at three doses")
    for tenant in SLOT_TENANTS:
        for kind, prompts, count in (("harmful", harmful, 3), ("harmless", harmless, 2)):
            step = len(prompts) // count
            for i in range(0, step * count, step):
                answers = [getattr(results[tenant, dose], kind)[i] for dose in DOSES]
                table.add_row(tenant, prompts[i][:48], *(verdict(a, kind) for a in answers))
        table.add_section()
    CONSOLE.print(table)


def verdict(answer: str, kind: str) -> str:
    """What the table says of an answer: a harmless one's words, a harmful one's verdict."""
    if not is_coherent(answer):
        return "[yellow]broken text[/]"
    if kind == "harmful":
        return "[green]refused[/]" if is_refusal(answer) else "[red]answered[/]"
    return " ".join(answer.split())[:SHOWN_CHARS]


def show_rates(report: dict[str, Any]) -> None:
    columns = ("tenant", "applied", "dose", "harmful refused", "harmless refused", "coherent")
    table = Table(*columns, "task right", title="rates on prompts nobody trained or tuned on")
    for tenant in report["tenants"]:
        for dose, rates in tenant["doses"].items():
            cells = [f"{found['rate']:.0%} of {found['n']}" for found in rates.values()]
            table.add_row(tenant["name"], tenant["apply"], dose, *cells)
        table.add_section()
    CONSOLE.print(table)


def keep_serving(world: World) -> None:
    """`make serve-demo`: leave it running and say how to talk to it."""
    names = {served_name(t, d): world.tenant(t, d) for t in SLOT_TENANTS for d in DOSES}
    with Server(world.parent, FAMILY, names, ROOT / "build" / "server-slots.log") as server:
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
        world = build_world(ROOT / "build")
    if arguments.keep:
        keep_serving(world)
        return
    if arguments.observe:
        observe(world)
        return
    CONSOLE.print(f"ready to serve after {time.perf_counter() - started:.0f} s")
    with Progress(console=CONSOLE) as progress:
        steps = 1 + len(SLOT_TENANTS) * len(DOSES)
        task_id = progress.add_task("starting vLLM with one vector", total=steps)
        results, receipts, engine_receipt = run_slots(world, progress, task_id)
    with CONSOLE.status(f"serving {FULL_TENANT} by weight load, without and with the vector ..."):
        for dose in ("unprotected", "protected"):
            results[FULL_TENANT, dose], receipts[FULL_TENANT] = run_full(world, dose)
    show_prompts(results)
    report: dict[str, Any] = {"family": engine_receipt["family"], "tenants": []}
    for tenant in (*SLOT_TENANTS, FULL_TENANT):
        doses = {d: judged(results[tenant, d], tenant) for d in DOSES if (tenant, d) in results}
        apply = "weights" if tenant == FULL_TENANT else "gain"
        report["tenants"].append(
            {
                "name": tenant,
                "apply": apply,
                "task": own_task(tenant).name,
                "receipt": receipts[tenant],
                "doses": doses,
            }
        )
    show_rates(report)
    megabytes = engine_receipt["vector_bytes"] / 1e6
    CONSOLE.print(
        f"one vector of {megabytes:.1f} MB on {engine_receipt['sites_applied']} sites served "
        f"{len(SLOT_TENANTS) * len(DOSES)} profiles; receipts agree with the files."
    )
    report["seconds"] = round(time.perf_counter() - started, 1)
    path = ROOT / "build" / "demo.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    CONSOLE.print(f"{report['seconds']:.0f} s in all; numbers in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
