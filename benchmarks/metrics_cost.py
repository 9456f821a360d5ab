"""Cost of metrics: a scrape with many tenants, and a request at the access check.

Real metrics and middleware without an engine: the app behind responds at once. With
PROMETHEUS_MULTIPROC_DIR (an empty directory) as with several API processes. Ends in one JSON line.

    python -m benchmarks.metrics_cost --tenants 1000 --named 100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

from benchmarks.results import CONSOLE, print_result, table
from safegene_server.access.catalog import Catalog, Principal, Tenant, key_digest, make_view
from safegene_server.access.middleware import AccessMiddleware
from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.metrics.traffic import Traffic
from safegene_server.monitoring.applied import Applied, Served
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer
from safegene_vllm.formats.profile import Profile
from safegene_vllm.settings import EnginePlan, Settings

CHUNKS = 64
KINDS = ("whole", "stream")
USAGE = '"usage":{"prompt_tokens":90,"completion_tokens":64}'


def names_of(count: int) -> list[str]:
    return [f"tenant-{number:04d}" for number in range(count)]


def served_models(tenants: int) -> Any:
    return SimpleNamespace(protected=lambda served: True, adapters=lambda: names_of(tenants))


def scrape(labels: TenantLabels, traffic: Traffic, tenants: int) -> dict[str, float]:
    """Seconds (median of 7) and bytes of a response of /metrics after requests of every tenant."""
    layers = tuple(SelectedLayer(number) for number in range(8, 24))
    base = Base("LlamaForCausalLM", 32, "sha256:" + "0" * 64)
    header = FamilyHeader(base, {}, layers, (0.0, 3.0), {}, "llama", "sha256:" + "1" * 64)
    profile = Profile(header.digest, (0.7,) * 32, {})
    served = [Served(name, f"{name}@1", profile) for name in names_of(tenants)]
    plan = EnginePlan(Settings(family=Path("/f"), apply="gain"), header, None)
    traffic.expect(one.tenant for one in served)
    applied = Applied(labels, plan, lambda: served, "base")
    applied.refresh()
    started = time.perf_counter()
    applied.refresh()
    refresh_s = time.perf_counter() - started
    for one in served:
        metrics = traffic.series(one.tenant)
        metrics.outcomes["ok"].inc()
        for histogram in (metrics.first, metrics.gaps, metrics.duration):
            histogram.observe(0.03)
    seconds, size, registry = list[float](), 0, REGISTRY
    for _ in range(7):
        started = time.perf_counter()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        size = len(generate_latest(registry))
        seconds.append(time.perf_counter() - started)
    return {"scrape_s": median(seconds), "bytes": size, "refresh_s": refresh_s}


async def requests(traffic: Traffic, tenants: int, count: int) -> dict[str, float]:
    """Median microseconds of a request with metrics and without, in turns."""
    names = names_of(tenants)
    key = Principal("k", frozenset({"serve"}), frozenset({"*"}))
    tenants_of = [Tenant(name, f"{name}@1") for name in names]
    catalog = Catalog(make_view(keys={key_digest("sg-k"): key}, tenants=tenants_of))
    apps = {
        "with": AccessMiddleware(respond_at_once, catalog, traffic=traffic),
        "without": AccessMiddleware(respond_at_once, catalog),
    }
    found: dict[str, float] = {}
    for kind in KINDS:
        us: dict[str, list[float]] = {way: [] for way in apps}
        for number in range(count):
            for way, access in apps.items():
                started = time.perf_counter_ns()
                await send_request(access, names[number % tenants], stream=kind == "stream")
                us[way].append((time.perf_counter_ns() - started) / 1000)
        found |= {f"{kind}_{way}_p50_us": median(values) for way, values in us.items()}
    return found


async def respond_at_once(scope: Any, receive: Any, send: Any) -> None:
    """An app that responds whole, or in CHUNKS events and the usage."""
    body = json.loads((await receive())["body"])
    content_type, choice = b"application/json", '{"message":{"content":"%s"}}' % ("word " * CHUNKS)
    pieces = [f'{{"model":"m","choices":[{choice}],{USAGE}}}']
    if body["stream"]:
        content_type, choice = b"text/event-stream", '{"index":0,"delta":{"content":"word "}}'
        pieces = [f'data: {{"id":"cmpl-0","model":"m","choices":[{choice}]}}\n\n'] * CHUNKS
        if (body.get("stream_options") or {}).get("include_usage"):
            pieces.append(f'data: {{"choices":[],{USAGE}}}\n\n')
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_request(app: Any, tenant: str, *, stream: bool) -> None:
    messages = [{"role": "user", "content": "How is this done? " * 20}]
    body = json.dumps({"model": tenant, "stream": stream, "messages": messages}).encode()
    headers = [(b"authorization", b"Bearer sg-k"), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    await app(scope, receive, send)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tenants", type=int, default=1000, help="published on the server")
    parser.add_argument(
        "--named", type=int, help="tenants with a label of their own (default: all)"
    )
    parser.add_argument("--requests", type=int, default=2000, help="of each kind and way")
    given = parser.parse_args()
    named = given.named or given.tenants
    processes = "several" if "PROMETHEUS_MULTIPROC_DIR" in os.environ else "one"
    found: dict[str, Any] = {"tenants": given.tenants, "named": named, "processes": processes}
    labels = TenantLabels(MetricsSettings(max_tenants=named))
    traffic = Traffic(labels, served_models=lambda: served_models(given.tenants))
    found |= scrape(labels, traffic, given.tenants)
    found |= asyncio.run(requests(traffic, given.tenants, given.requests))
    rows = [(name, str(value)) for name, value in found.items()]
    CONSOLE.print(table((("what", "measured"), rows), "cost of metrics"))
    print_result("metrics_cost", found)


if __name__ == "__main__":
    main()
