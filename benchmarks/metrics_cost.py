"""What metrics cost: the scrape, with many tenants, and a request at the access check.

Real metrics, real middleware, no engine: the app behind answers at once, so what is left is ours.
Every case runs in a process of its own. Prints a table and ends in one JSON line.

    python benchmarks/metrics_cost.py --tenants 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

CHUNKS = 64
CHAT = "/v1/chat/completions"


def scrape(tenants: int, named: int, shared: bool) -> dict[str, float]:
    """Seconds (median of 7) and bytes of one answer of /metrics after traffic of every tenant."""
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

    from safegene_server.metrics.labels import TenantLabels
    from safegene_server.metrics.settings import MetricsSettings
    from safegene_server.metrics.traffic import Traffic
    from safegene_server.monitoring.applied import Applied, Served
    from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
    from safegene_vllm.formats.profile import Profile
    from safegene_vllm.settings import EnginePlan, Settings

    layers = tuple(SelectedLayer(number) for number in range(8, 24))
    header = FamilyHeader(
        *(Base("LlamaForCausalLM", 32, "sha256:" + "0" * 64), {}, layers, (0.0, 3.0), {}),
        *("llama", "sha256:" + "1" * 64),
    )
    labels = TenantLabels(MetricsSettings(max_tenants=named))
    profile = Profile(header.digest, (0.7,) * 32, {})
    served = [Served(f"tenant-{i:04d}", f"tenant-{i:04d}@1", profile) for i in range(tenants)]
    plan = EnginePlan(Settings(family=Path("/f"), apply="gain"), header, None)
    traffic = Traffic(labels)
    traffic.expect(one.tenant for one in served)
    applied = Applied(labels, plan, lambda: served, "base")
    applied.refresh()
    begun_s = time.perf_counter()
    applied.refresh()
    renewed_s = time.perf_counter() - begun_s
    for one in served:
        series = traffic.series(one.tenant)
        series.outcomes["ok"].inc()
        for histogram in (series.first, series.gaps, series.duration):
            histogram.observe(0.03)
    times, size, registry = [], 0, REGISTRY
    for _ in range(7):
        begun_s = time.perf_counter()
        if shared:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        size = len(generate_latest(registry))
        times.append(time.perf_counter() - begun_s)
    return {"scrape_s": statistics.median(times), "bytes": size, "renew_s": renewed_s}


def requests(tenants: int, count: int) -> dict[str, float]:
    """p50 microseconds of a request, with traffic counted and without, taken in turns."""
    from safegene_server.access.catalog import Catalog, Principal, Tenant, key_digest, make_view
    from safegene_server.access.middleware import AccessMiddleware
    from safegene_server.metrics.labels import TenantLabels
    from safegene_server.metrics.settings import MetricsSettings
    from safegene_server.metrics.traffic import Traffic

    names = [f"tenant-{i:04d}" for i in range(tenants)]
    key = Principal("k", frozenset({"serve"}), frozenset({"*"}))
    catalog = Catalog(
        make_view(keys={key_digest("sg-k"): key}, tenants=[Tenant(n, f"{n}@1") for n in names])
    )

    class Served:
        """Served models that are all protected."""

        def protected(self, served: str) -> bool:
            return True

        def adapters(self) -> list[str]:
            return names

    models = Served()
    labels = TenantLabels(MetricsSettings(max_tenants=tenants))
    counted = Traffic(labels, served_models=lambda: models)
    counted.expect(names)
    found = {}
    for kind in ("whole", "stream"):
        ways = {
            "with": AccessMiddleware(app_of(kind), catalog, traffic=counted),
            "without": AccessMiddleware(app_of(kind), catalog),
        }
        took: dict[str, list[float]] = {way: [] for way in ways}

        async def run(
            ways: dict[str, AccessMiddleware] = ways,
            took: dict[str, list[float]] = took,
            kind: str = kind,
        ) -> None:
            for i in range(count):
                body = request_of(names[i % tenants], kind == "stream")
                for way, access in ways.items():
                    begun_ns = time.perf_counter_ns()
                    await ask(access, body)
                    took[way].append((time.perf_counter_ns() - begun_ns) / 1000)

        asyncio.run(run())
        for way, times in took.items():
            found[f"{kind}_{way}_p50_us"] = statistics.median(times)
    return found


def request_of(tenant: str, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "How is this done? " * 20}]
    return json.dumps({"model": tenant, "stream": stream, "messages": messages}).encode()


def app_of(kind: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Answers at once: in one piece, or in CHUNKS pieces of a few characters and the usage."""
    if kind == "whole":
        usage = '"usage":{"prompt_tokens":90,"completion_tokens":64}'
        said = '{"index":0,"message":{"role":"assistant","content":"%s"}}' % ("word " * CHUNKS)
        pieces = [f'{{"model":"m","choices":[{said}],{usage}}}'.encode()]
        content_type = b"application/json"
    else:
        event = (
            'data: {"id":"cmpl-0","model":"m","choices":[{"index":0,"delta":{"content":"word "}}]}'
        )
        pieces = [f"{event}\n\n".encode()] * CHUNKS
        content_type = b"text/event-stream"
    told = b'data: {"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":64}}\n\n'

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        asked = kind == "stream" and b'"include_usage":true' in body
        for piece in [*pieces, told] if asked else pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def ask(access: Any, body: bytes) -> None:
    headers = [(b"authorization", b"Bearer sg-k"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pass

    await access(scope, receive, send)


def in_a_process(*case: str, shared: bool = False) -> dict[str, float]:
    """This program again, for one case, so that no case finds what another has counted."""
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
        if shared:
            env["PROMETHEUS_MULTIPROC_DIR"] = folder
        done = subprocess.run(
            [sys.executable, __file__, "--case", *case], env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tenants", type=int, default=1000, help="published on the server")
    parser.add_argument("--requests", type=int, default=2000, help="of each kind and way")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        kind, *numbers = given.case
        first, second = map(int, numbers)
        shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        print(json.dumps(requests(first, second) if kind == "r" else scrape(first, second, shared)))
        return
    n = str(given.tenants)
    found: dict[str, float] = {"tenants": given.tenants, "chunks": CHUNKS}
    print(f"{'tenants':>8} {'named':>6} {'processes':>10} {'scrape':>9} {'size':>9} {'renewed':>9}")
    for named in (min(100, given.tenants), given.tenants):
        for shared in (False, True):
            one = in_a_process("s", n, str(named), shared=shared)
            how = "several" if shared else "one"
            print(
                f"{n:>8} {named:>6} {how:>10} {one['scrape_s']:7.3f} s {one['bytes'] / 1e6:6.2f} MB"
                f" {one['renew_s']:7.3f} s"
            )
            for name, value in one.items():
                found[f"named{named}_{how}_{name}"] = value
    found |= in_a_process("r", n, str(given.requests))
    print(f"\n{'answer':>8} {'with':>10} {'without':>10} {'difference':>12}   (p50)")
    for kind in ("whole", "stream"):
        with_us, without_us = found[f"{kind}_with_p50_us"], found[f"{kind}_without_p50_us"]
        print(f"{kind:>8} {with_us:7.0f} µs {without_us:7.0f} µs {with_us - without_us:9.0f} µs")
    print(json.dumps({name: round(value, 6) for name, value in found.items()}))


if __name__ == "__main__":
    main()
