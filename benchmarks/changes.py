"""`make bench-changes`: tenants that come, change and go back while others are being served.

One `safegene serve` on a registry, the example's model, and the official openai client. Measures
onboarding (and how long it holds up somebody else's answer), changes of coefficients under load,
and counts every request that failed, was torn
(named two revisions, or had no end) or was answered by coefficients that were already replaced when
it was sent. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "smollm2"))

import torch
from openai import APIError, AsyncOpenAI
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file

from provenance import origin
from safegene_vllm.client import Client
from serving import Server
from world import FAMILY, SLOT_TENANTS, TENANTS, build_world

CONSOLE = Console(width=None if sys.stdout.isatty() else 112)
NEWCOMERS = 8
"""Tenants that come while one answer after another streams, and go again."""
QUIET_S = 4.0
"""Between two of them, and before and after them all."""
KEY = "sg-benchmark-" + "0" * 40
CONFIG = """
registry: registry.sqlite
store: store
sources: {roots: [ROOT]}
tenants: {gate: {enabled: false}}
keys: [{name: benchmark, secret_env: BENCHMARK_KEY, scopes: [admin, serve], tenants: ["*"]}]
"""
QUESTIONS = (
    "Name three uses of a paper clip.",
    "Write a short note that thanks a neighbour for watering the plants.",
    "What should I pack for a weekend in the mountains?",
    "Explain in one sentence why the sky looks blue.",
)
GREEDY: dict[str, Any] = {"temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}


@dataclass
class Seen:
    """What the load saw, and since when each tenant's newest revision has been promised."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    revisions: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """One streamed answer; `models` are all names it gave, times are seconds since it was sent."""

    models: frozenset[str]
    finished: bool
    ttft_s: float


async def ask(client: AsyncOpenAI, tenant: str, question: str, tokens: int) -> Answer:
    """Errors: openai.APIError."""
    begun, ttft_s, finished, models = time.perf_counter(), 0.0, False, set()
    stream = await client.chat.completions.create(
        model=tenant,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        **GREEDY,
    )
    async for chunk in stream:
        models.add(chunk.model)
        if chunk.choices and chunk.choices[0].delta.content and not ttft_s:
            ttft_s = time.perf_counter() - begun
        finished = finished or bool(chunk.choices and chunk.choices[0].finish_reason)
    return Answer(frozenset(models), finished, ttft_s)


def number_of(served: str) -> int:
    """7 of 'acme@7'."""
    return int(served.rpartition("@")[2])


async def load(client: AsyncOpenAI, seen: Seen, wanted: int, tokens: int, seed: int) -> None:
    """One user after another, until `wanted` requests of all users are done."""
    draw = random.Random(seed)
    while seen.done + len(seen.failed) < wanted:
        tenant = draw.choice(sorted(seen.revisions))
        least = seen.revisions[tenant]
        try:
            answer = await ask(client, tenant, draw.choice(QUESTIONS), tokens)
        except (APIError, OSError) as error:
            seen.failed.append(f"{tenant}: {error!r:.300}")
            continue
        if len(answer.models) != 1 or not answer.finished:
            seen.torn.append(f"{tenant}: {sorted(answer.models)}, finished {answer.finished}")
        elif number_of(next(iter(answer.models))) < least:
            seen.late.append(f"{tenant}: {set(answer.models)}, promised {least}")
        seen.ttft_s.append(answer.ttft_s)
        seen.done += 1


async def change(
    client: AsyncOpenAI, admin: Client, seen: Seen, wanted: int, tokens: int, pause_s: float
) -> list[tuple[float, float]]:
    """(seconds of the call, seconds until the first token on the new revision), one a change."""
    times, draw = [], random.Random(0)
    while seen.done + len(seen.failed) < wanted:
        tenant = draw.choice(sorted(seen.revisions))
        scale = 0.9 if seen.revisions[tenant] % 2 else 1 / 0.9
        begun = time.perf_counter()
        told = await asyncio.to_thread(admin.change_profile, tenant, scale=scale)
        call_s = time.perf_counter() - begun
        seen.revisions[tenant] = number_of(told["revision"]["name"])
        answer = await ask(client, tenant, QUESTIONS[0], tokens)
        if answer.models != {told["revision"]["name"]}:
            seen.late.append(f"{tenant}: {set(answer.models)} after {told['revision']['name']}")
        times.append((call_s, call_s + answer.ttft_s))
        await asyncio.sleep(pause_s)
    return times


def write_tenants(folder: Path, count: int) -> list[Path]:
    """`count` adapters of different content: the example's, each with one weight nudged."""
    made = []
    for index in range(count):
        target = folder / f"t{index}"
        shutil.copytree(TENANTS / SLOT_TENANTS[index % len(SLOT_TENANTS)], target)
        weights = load_file(target / "adapter_model.safetensors")
        first = sorted(weights)[0]
        weights[first][0, 0] += 1e-3 * (index + 1)
        save_file(weights, target / "adapter_model.safetensors")
        made.append(target)
    return made


async def take_in(admin: Client, source: Path) -> float:
    """Seconds from the call until a tenant is published."""
    begun = time.perf_counter()
    told = await asyncio.to_thread(admin.add_tenant, source.name, source=str(source))
    job = told["job"]
    while job["state"] in ("queued", "running"):
        await asyncio.sleep(0.005)
        job = await asyncio.to_thread(admin.job, job["id"])
    if job["state"] != "done":
        raise RuntimeError(f"{source.name} was not taken in: {job['message']}")
    return time.perf_counter() - begun


async def onboard(admin: Client, client: AsyncOpenAI, source: Path) -> tuple[float, float]:
    """(seconds until it is published, seconds until its first token), both from the call."""
    published_s = await take_in(admin, source)
    answer = await ask(client, source.name, QUESTIONS[0], 1)
    return published_s, published_s + answer.ttft_s


async def stalls(
    admin: Client, client: AsyncOpenAI, tenant: str, newcomers: Sequence[Path]
) -> tuple[list[float], list[float]]:
    """While one answer after another streams: (the longest pause between two tokens during each
    onboarding, all pauses while nobody came), in seconds."""
    ended = asyncio.Event()
    pauses: list[tuple[float, float]] = []

    async def listen() -> None:
        while not ended.is_set():
            stream = await client.chat.completions.create(
                model=tenant,
                messages=[{"role": "user", "content": QUESTIONS[0]}],
                max_tokens=128,
                **GREEDY,
            )
            last = None  # a first token waits for its prompt, whoever comes
            async for chunk in stream:
                now = time.perf_counter()
                if last is not None and chunk.choices:
                    pauses.append((now, now - last))
                last = now

    listening = asyncio.create_task(listen())
    windows = []
    for source in newcomers:
        await asyncio.sleep(QUIET_S)
        begun = time.perf_counter()
        windows.append((begun, begun + await take_in(admin, source)))
        await asyncio.to_thread(admin.retire_tenant, source.name)
    await asyncio.sleep(QUIET_S)
    ended.set()
    await listening
    during = [[p for at, p in pauses if a < at and at - p < b] for a, b in windows]
    quiet = [p for at, p in pauses if not any(a - 1 < at < b + 1 for a, b in windows)]
    if not all(during) or not quiet:
        raise RuntimeError("an onboarding met no answer that streamed; nothing can be said of it")
    return [max(found) for found in during], quiet


def middle(values: Sequence[float], share: float = 0.5) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(url: str, sources: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """All numbers. Seconds, unless named otherwise."""
    admin = Client(url.removesuffix("/v1"), KEY)
    seen = Seen()
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300) as client:
        sources, newcomers = sources[: options.tenants], sources[options.tenants :]
        came = [await onboard(admin, client, source) for source in sources]
        during, quiet = await stalls(admin, client, sources[0].name, newcomers)
        seen.revisions = {source.name: 1 for source in sources}
        idle = await change_once(client, admin, seen)
        begun = time.perf_counter()
        users = [
            load(client, seen, options.requests, options.tokens, seed)
            for seed in range(options.users)
        ]
        changes = asyncio.create_task(
            change(client, admin, seen, options.requests, 1, options.pause)
        )
        with Progress(console=CONSOLE, transient=True) as bar:
            task = bar.add_task("requests", total=options.requests)
            running = asyncio.gather(*users)
            while not running.done():
                bar.update(task, completed=seen.done)
                await asyncio.sleep(0.5)
            await running
        wall_s = time.perf_counter() - begun
        times = await changes
    for what in ("failed", "torn", "late"):
        for line in getattr(seen, what)[:5]:
            CONSOLE.print(f"[red]{what}[/]: {line}")
    return {
        "onboarding_published_s_p50": middle([a for a, _ in came]),
        "onboarding_first_token_s_p50": middle([b for _, b in came]),
        "onboarding_first_token_s_max": max(b for _, b in came),
        "stall_by_onboarding_s_p50": middle(during),
        "stall_by_onboarding_s_max": max(during),
        "pause_between_tokens_s_p50": middle(quiet),
        "change_idle_s": idle,
        "change_s_p50": middle([a for a, _ in times]),
        "change_s_p95": middle([a for a, _ in times], 0.95),
        "change_first_token_s_p50": middle([b for _, b in times]),
        "ttft_s_p50": middle(seen.ttft_s),
        "changes": len(times),
        "requests": seen.done,
        "requests_per_s": seen.done / wall_s,
        "failed": len(seen.failed),
        "torn": len(seen.torn),
        "late": len(seen.late),
    }


async def change_once(client: AsyncOpenAI, admin: Client, seen: Seen) -> float:
    """The median of changes while nobody asks, in seconds."""
    times = []
    for tenant in sorted(seen.revisions):
        begun = time.perf_counter()
        told = await asyncio.to_thread(admin.change_profile, tenant, scale=0.9)
        times.append(time.perf_counter() - begun)
        seen.revisions[tenant] = number_of(told["revision"]["name"])
        await ask(client, tenant, QUESTIONS[0], 1)
    return middle(times)


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(title=f"Tenants under load: {options.users} users, {found['requests']} requests")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in found.items():
        shown = f"{1000 * value:.0f} ms" if "_s" in name and "per_s" not in name else f"{value:g}"
        table.add_row(name, shown)
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--users", type=int, default=4, help="requests in flight at once")
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between changes")
    parser.add_argument(
        "--step-tokens", type=int, help="tokens a step may hold; default: what vLLM takes"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    told = origin(torch.get_num_threads())
    world = build_world(options.build)
    with tempfile.TemporaryDirectory(prefix="safegene-changes-") as folder:
        work = Path(folder)
        (work / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(work / "tenants")))
        sources = write_tenants(work / "tenants", options.tenants + NEWCOMERS)
        extra = ["--server-config", str(work / "safegene.yaml"), "--slots", "8"]
        extra += ["--enable-prefix-caching"]
        if options.step_tokens:
            extra += ["--max-num-batched-tokens", str(options.step_tokens)]
        env = {"BENCHMARK_KEY": KEY}
        log = options.build / "bench-changes.log"
        with Server(world.parent, FAMILY, {}, log, extra=extra, env=env) as server:
            found = asyncio.run(measure(server.url, sources, options))
    show(found, options)
    settings = {k: v for k, v in vars(options).items() if k != "build"}
    print(json.dumps({"benchmark": "changes", **told, **settings, **found}))
    if found["failed"] or found["torn"] or found["late"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
