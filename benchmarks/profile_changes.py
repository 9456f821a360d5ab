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
from statistics import median, quantiles
from typing import Any

from openai import APIError, AsyncOpenAI
from safetensors.torch import load_file, save_file

from benchmarks.results import CONSOLE, ROOT, print_result, provenance, table
from examples.smollm2.demo_files import FAMILY, SLOT_TENANTS, TENANTS, build_files
from examples.smollm2.server import Server
from safegene_vllm.client import AsyncClient

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
    "Write a short note that thanks a neighbor for watering the plants.",
    "What should I pack for a weekend in the mountains?",
    "Explain in one sentence why the sky looks blue.",
)


@dataclass(frozen=True)
class Completion:
    """One streamed completion; `models` are all model names in it."""

    models: frozenset[str]
    finished: bool
    ttft_s: float
    pauses: list[tuple[float, float]]
    """(timestamp, seconds since the token before) of every token but the first."""


def number_of(served: str) -> int:
    """Revision number of a served name, such as 7 of 'acme@7'."""
    return int(served.rpartition("@")[2])


@dataclass
class Bench:
    """Clients of the server, what the users observed, and each tenant's newest revision."""

    openai: AsyncOpenAI
    admin: AsyncClient
    requests: int
    done: int = 0
    revisions: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    problems: dict[str, list[str]] = field(
        default_factory=lambda: {"failed": [], "torn": [], "late": []}
    )

    async def complete(self, tenant: str, question: str, tokens: int) -> Completion:
        """Stream one completion. Raises: openai.APIError."""
        started = last = time.perf_counter()
        ttft_s, finished = 0.0, False
        models, pauses = set[str](), list[tuple[float, float]]()
        stream = await self.openai.chat.completions.create(
            model=tenant,
            messages=[{"role": "user", "content": question}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            now = time.perf_counter()
            models.add(chunk.model)
            if chunk.choices and chunk.choices[0].delta.content:
                if ttft_s:
                    pauses.append((now, now - last))
                ttft_s, last = ttft_s or now - started, now
            finished = finished or bool(chunk.choices and chunk.choices[0].finish_reason)
        return Completion(frozenset(models), finished, ttft_s, pauses)

    async def user(self, tokens: int, seed: int) -> None:
        """Send requests one after another until `requests` of all users are done."""
        draw = random.Random(seed)
        while self.done + len(self.problems["failed"]) < self.requests:
            tenant = draw.choice(sorted(self.revisions))
            least = self.revisions[tenant]
            try:
                found = await self.complete(tenant, draw.choice(QUESTIONS), tokens)
            except (APIError, OSError) as error:
                self.problems["failed"].append(f"{tenant}: {error!r:.300}")
                continue
            text = f"{tenant}: {sorted(found.models)}, finished {found.finished}"
            if len(found.models) != 1 or not found.finished:
                self.problems["torn"].append(text)
            elif number_of(next(iter(found.models))) < least:
                self.problems["late"].append(f"{text}, at least {least} expected")
            self.ttft_s.append(found.ttft_s)
            self.done += 1

    async def change(self, tenant: str) -> tuple[float, float]:
        """Change coefficients: seconds of the call, and until the first token on them."""
        scale = 0.9 if self.revisions[tenant] % 2 else 1 / 0.9
        started = time.perf_counter()
        name = (await self.admin.change_profile(tenant, scale=scale)).revision.name
        call_s = time.perf_counter() - started
        self.revisions[tenant] = number_of(name)
        found = await self.complete(tenant, QUESTIONS[0], 1)
        if found.models != {name}:
            self.problems["late"].append(f"{tenant}: {sorted(found.models)} after {name}")
        return call_s, call_s + found.ttft_s

    async def changes(self, pause_s: float) -> list[tuple[float, float]]:
        """Change tenants at random while the users send requests."""
        times, draw = [], random.Random(0)
        while self.done + len(self.problems["failed"]) < self.requests:
            times.append(await self.change(draw.choice(sorted(self.revisions))))
            await asyncio.sleep(pause_s)
        return times

    async def onboard(self, source: Path) -> float:
        """Seconds from the call until the tenant is published."""
        started = time.perf_counter()
        job = (await self.admin.add_tenant(source.name, source=str(source))).job
        job = await self.admin.wait_job(job.id, poll_s=0.005)
        if job.state != "done":
            raise RuntimeError(f"{source.name} was not onboarded: {job.message}")
        return time.perf_counter() - started

    async def onboard_to_first_token(self, source: Path) -> float:
        published_s = await self.onboard(source)
        return published_s + (await self.complete(source.name, QUESTIONS[0], 1)).ttft_s

    async def stalls(
        self, tenant: str, new_tenants: Sequence[Path]
    ) -> tuple[list[float], list[float]]:
        """Pauses between tokens of another tenant: the longest per onboarding, and all others."""
        ended, pauses = asyncio.Event(), list[tuple[float, float]]()

        async def listen() -> None:
            while not ended.is_set():
                pauses.extend((await self.complete(tenant, QUESTIONS[0], 128)).pauses)

        listening = asyncio.create_task(listen())
        windows = []
        for source in new_tenants:
            await asyncio.sleep(QUIET_S)
            started = time.perf_counter()
            windows.append((started, started + await self.onboard(source)))
            await self.admin.retire_tenant(source.name)
        await asyncio.sleep(QUIET_S)
        ended.set()
        await listening
        during = [[p for at, p in pauses if a < at and at - p < b] for a, b in windows]
        quiet = [p for at, p in pauses if not any(a - 1 < at < b + 1 for a, b in windows)]
        if not all(during) or not quiet:
            raise RuntimeError("no completion streamed during an onboarding; nothing was measured")
        return [max(found) for found in during], quiet


def write_tenants(folder: Path, count: int) -> list[Path]:
    """Write `count` different adapters: the example's, each with one weight changed."""
    made = []
    for index in range(count):
        target = folder / f"t{index}"
        shutil.copytree(TENANTS / SLOT_TENANTS[index % len(SLOT_TENANTS)], target)
        weights = load_file(target / "adapter_model.safetensors")
        weights[sorted(weights)[0]][0, 0] += 1e-3 * (index + 1)
        save_file(weights, target / "adapter_model.safetensors")
        made.append(target)
    return made


async def measure(url: str, sources: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """All results; seconds unless the name has another unit."""
    async with (
        AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300) as client,
        AsyncClient(url.removesuffix("/v1"), KEY) as admin,
    ):
        bench = Bench(client, admin, options.requests)
        tenants, new_tenants = sources[: options.tenants], sources[options.tenants :]
        onboarding_s = [await bench.onboard_to_first_token(source) for source in tenants]
        during, quiet = await bench.stalls(tenants[0].name, new_tenants)
        bench.revisions = {source.name: 1 for source in tenants}
        idle = [await bench.change(source.name) for source in tenants]
        started = time.perf_counter()
        changing = asyncio.create_task(bench.changes(options.pause))
        await asyncio.gather(*(bench.user(options.tokens, n) for n in range(options.users)))
        wall_s = time.perf_counter() - started
        times = await changing
    for what, lines in bench.problems.items():
        for line in lines[:5]:
            CONSOLE.print(f"[red]{what}[/]: {line}")
    call_s = [call for call, _ in times]
    return {
        "onboarding_first_token_s_p50": median(onboarding_s),
        "onboarding_first_token_s_max": max(onboarding_s),
        "stall_by_onboarding_s_p50": median(during),
        "stall_by_onboarding_s_max": max(during),
        "pause_between_tokens_s_p50": median(quiet),
        "change_idle_s_p50": median(call for call, _ in idle),
        "change_s_p50": median(call_s),
        "change_s_p95": quantiles(call_s, n=20, method="inclusive")[-1] if times[1:] else call_s[0],
        "change_first_token_s_p50": median(first for _, first in times),
        "ttft_s_p50": median(bench.ttft_s),
        "changes": len(times),
        "requests": bench.done,
        "requests_per_s": bench.done / wall_s,
        **{what: len(lines) for what, lines in bench.problems.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--users", type=int, default=4, help="requests in flight at once")
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--new-tenants", type=int, default=NEW_TENANTS, help="onboarded in between")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each completion")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between changes")
    parser.add_argument("--step-tokens", type=int, help="tokens a step may hold (default: vLLM's)")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    origin = provenance()
    files = build_files(options.build)
    with tempfile.TemporaryDirectory(prefix="safegene-changes-") as folder:
        work = Path(folder)
        (work / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(work / "tenants")))
        sources = write_tenants(work / "tenants", options.tenants + options.new_tenants)
        extra = ["--server-config", str(work / "safegene.yaml"), "--slots", "8"]
        extra += ["--enable-prefix-caching"]
        if options.step_tokens:
            extra += ["--max-num-batched-tokens", str(options.step_tokens)]
        env = {"BENCHMARK_KEY": KEY}
        log = options.build / "bench-changes.log"
        with Server(files.parent, FAMILY, {}, log, extra=extra, env=env) as server:
            found = asyncio.run(measure(server.url, sources, options))
    rows = [(name, f"{value:.4g}") for name, value in found.items()]
    CONSOLE.print(table((("what", "measured"), rows), f"{options.users} users"))
    settings = {k: v for k, v in vars(options).items() if k != "build"}
    print_result("changes", {**origin, **settings, **found})
    if found["failed"] or found["torn"] or found["late"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
