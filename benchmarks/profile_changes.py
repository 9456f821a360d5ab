"""`make bench-changes`: onboarding and profile changes while other tenants are being served.

One `safegene serve` on a registry, the example's model, and the official openai client. Measures
onboarding (and the pause it causes in another tenant's stream) and changes of coefficients under
load, and counts every request that failed, was torn (two revisions, or no end), or was late: served
by coefficients that had been replaced before it was sent. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from benchmarks.results import CONSOLE, ROOT, percentile, print_result, provenance, table
from examples.smollm2.demo_files import FAMILY, SLOT_TENANTS, TENANTS, build_files
from examples.smollm2.server import Server
from safegene_vllm.client import Client

NEW_TENANTS = 8
"""Tenants onboarded and retired while completions of another tenant stream."""
QUIET_S = 4.0
"""Pause between two of them, and before and after them all."""
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
class LoadState:
    """What the users observed, and each tenant's newest revision that a change has returned."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    revisions: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """One streamed completion; `models` are all model names in it."""

    models: frozenset[str]
    finished: bool
    ttft_s: float


async def ask(client: AsyncOpenAI, tenant: str, question: str, tokens: int) -> Completion:
    """Stream one completion. Raises: openai.APIError."""
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
    return Completion(frozenset(models), finished, ttft_s)


def number_of(served: str) -> int:
    """Revision number of a served name, such as 7 of 'acme@7'."""
    return int(served.rpartition("@")[2])


async def load(client: AsyncOpenAI, state: LoadState, wanted: int, tokens: int, seed: int) -> None:
    """Send requests one after another until `wanted` requests of all users are done."""
    draw = random.Random(seed)
    while state.done + len(state.failed) < wanted:
        tenant = draw.choice(sorted(state.revisions))
        least = state.revisions[tenant]
        try:
            completion = await ask(client, tenant, draw.choice(QUESTIONS), tokens)
        except (APIError, OSError) as error:
            state.failed.append(f"{tenant}: {error!r:.300}")
            continue
        if len(completion.models) != 1 or not completion.finished:
            state.torn.append(
                f"{tenant}: {sorted(completion.models)}, finished {completion.finished}"
            )
        elif number_of(next(iter(completion.models))) < least:
            state.late.append(f"{tenant}: {set(completion.models)}, promised {least}")
        state.ttft_s.append(completion.ttft_s)
        state.done += 1


async def change(
    client: AsyncOpenAI, admin: Client, state: LoadState, wanted: int, tokens: int, pause_s: float
) -> list[tuple[float, float]]:
    """Change profiles: (seconds of the call, until the first token on the new revision) each."""
    times, draw = [], random.Random(0)
    while state.done + len(state.failed) < wanted:
        tenant = draw.choice(sorted(state.revisions))
        scale = 0.9 if state.revisions[tenant] % 2 else 1 / 0.9
        begun = time.perf_counter()
        response = await asyncio.to_thread(admin.change_profile, tenant, scale=scale)
        call_s = time.perf_counter() - begun
        state.revisions[tenant] = number_of(response["revision"]["name"])
        completion = await ask(client, tenant, QUESTIONS[0], tokens)
        if completion.models != {response["revision"]["name"]}:
            state.late.append(
                f"{tenant}: {set(completion.models)} after {response['revision']['name']}"
            )
        times.append((call_s, call_s + completion.ttft_s))
        await asyncio.sleep(pause_s)
    return times


def write_tenants(folder: Path, count: int) -> list[Path]:
    """Write `count` different adapters: the example's, each with one weight changed."""
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


async def onboard_s(admin: Client, source: Path) -> float:
    """Seconds from the call until the tenant is published."""
    begun = time.perf_counter()
    response = await asyncio.to_thread(admin.add_tenant, source.name, source=str(source))
    job = response["job"]
    while job["state"] in ("queued", "running"):
        await asyncio.sleep(0.005)
        job = await asyncio.to_thread(admin.job, job["id"])
    if job["state"] != "done":
        raise RuntimeError(f"{source.name} was not onboarded: {job['message']}")
    return time.perf_counter() - begun


async def onboard(admin: Client, client: AsyncOpenAI, source: Path) -> tuple[float, float]:
    """Seconds from the call until the tenant is published, and until its first token."""
    published_s = await onboard_s(admin, source)
    completion = await ask(client, source.name, QUESTIONS[0], 1)
    return published_s, published_s + completion.ttft_s


async def stalls(
    admin: Client, client: AsyncOpenAI, tenant: str, new_tenants: Sequence[Path]
) -> tuple[list[float], list[float]]:
    """Pauses between tokens of another tenant: the longest per onboarding, and all others."""
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
            last = None  # a first token waits for its prompt in any case
            async for chunk in stream:
                now = time.perf_counter()
                if last is not None and chunk.choices:
                    pauses.append((now, now - last))
                last = now

    listening = asyncio.create_task(listen())
    windows = []
    for source in new_tenants:
        await asyncio.sleep(QUIET_S)
        begun = time.perf_counter()
        windows.append((begun, begun + await onboard_s(admin, source)))
        await asyncio.to_thread(admin.retire_tenant, source.name)
    await asyncio.sleep(QUIET_S)
    ended.set()
    await listening
    during = [[p for at, p in pauses if a < at and at - p < b] for a, b in windows]
    quiet = [p for at, p in pauses if not any(a - 1 < at < b + 1 for a, b in windows)]
    if not all(during) or not quiet:
        raise RuntimeError("no completion streamed during an onboarding; nothing was measured")
    return [max(found) for found in during], quiet


async def measure(url: str, sources: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """All results; seconds unless the name has another unit."""
    admin = Client(url.removesuffix("/v1"), KEY)
    state = LoadState()
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300) as client:
        sources, new_tenants = sources[: options.tenants], sources[options.tenants :]
        onboarded = [await onboard(admin, client, source) for source in sources]
        during, quiet = await stalls(admin, client, sources[0].name, new_tenants)
        state.revisions = {source.name: 1 for source in sources}
        idle = await change_once(client, admin, state)
        begun = time.perf_counter()
        users = [
            load(client, state, options.requests, options.tokens, seed)
            for seed in range(options.users)
        ]
        changes = asyncio.create_task(
            change(client, admin, state, options.requests, 1, options.pause)
        )
        with Progress(console=CONSOLE, transient=True) as bar:
            task = bar.add_task("requests", total=options.requests)
            running = asyncio.gather(*users)
            while not running.done():
                bar.update(task, completed=state.done)
                await asyncio.sleep(0.5)
            await running
        wall_s = time.perf_counter() - begun
        times = await changes
    for what in ("failed", "torn", "late"):
        for line in getattr(state, what)[:5]:
            CONSOLE.print(f"[red]{what}[/]: {line}")
    return {
        "onboarding_published_s_p50": percentile([a for a, _ in onboarded]),
        "onboarding_first_token_s_p50": percentile([b for _, b in onboarded]),
        "onboarding_first_token_s_max": max(b for _, b in onboarded),
        "stall_by_onboarding_s_p50": percentile(during),
        "stall_by_onboarding_s_max": max(during),
        "pause_between_tokens_s_p50": percentile(quiet),
        "change_idle_s": idle,
        "change_s_p50": percentile([a for a, _ in times]),
        "change_s_p95": percentile([a for a, _ in times], 0.95),
        "change_first_token_s_p50": percentile([b for _, b in times]),
        "ttft_s_p50": percentile(state.ttft_s),
        "changes": len(times),
        "requests": state.done,
        "requests_per_s": state.done / wall_s,
        "failed": len(state.failed),
        "torn": len(state.torn),
        "late": len(state.late),
    }


async def change_once(client: AsyncOpenAI, admin: Client, state: LoadState) -> float:
    """Median seconds of changes on an idle server."""
    times = []
    for tenant in sorted(state.revisions):
        begun = time.perf_counter()
        response = await asyncio.to_thread(admin.change_profile, tenant, scale=0.9)
        times.append(time.perf_counter() - begun)
        state.revisions[tenant] = number_of(response["revision"]["name"])
        await ask(client, tenant, QUESTIONS[0], 1)
    return percentile(times)


def print_table(found: dict[str, Any], options: argparse.Namespace) -> None:
    def text(name: str, value: float) -> str:
        return f"{1000 * value:.0f} ms" if "_s" in name and "per_s" not in name else f"{value:g}"

    rows = [(name, text(name, value)) for name, value in found.items()]
    title = f"{options.users} users, {found['requests']} requests"
    CONSOLE.print(table((("what", "measured"), rows), title))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--users", type=int, default=4, help="requests in flight at once")
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each completion")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between changes")
    parser.add_argument(
        "--step-tokens", type=int, help="tokens a step may hold; default: what vLLM takes"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    origin = provenance()
    files = build_files(options.build)
    with tempfile.TemporaryDirectory(prefix="safegene-changes-") as folder:
        work = Path(folder)
        (work / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(work / "tenants")))
        sources = write_tenants(work / "tenants", options.tenants + NEW_TENANTS)
        extra = ["--server-config", str(work / "safegene.yaml"), "--slots", "8"]
        extra += ["--enable-prefix-caching"]
        if options.step_tokens:
            extra += ["--max-num-batched-tokens", str(options.step_tokens)]
        env = {"BENCHMARK_KEY": KEY}
        log = options.build / "bench-changes.log"
        with Server(files.parent, FAMILY, {}, log, extra=extra, env=env) as server:
            found = asyncio.run(measure(server.url, sources, options))
    print_table(found, options)
    settings = {k: v for k, v in vars(options).items() if k != "build"}
    print_result("changes", {**origin, **settings, **found})
    if found["failed"] or found["torn"] or found["late"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
