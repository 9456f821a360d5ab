"""Cost of metrics: a scrape with many tenants, and a request at the access check.

Real metrics and middleware without an engine: the app behind responds at once. Every case runs in a
process of its own. Prints a table and ends in one JSON line.

    python -m benchmarks.metrics_cost --tenants 1000
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
from pathlib import Path
from typing import Any

from benchmarks.results import CONSOLE, ROOT, print_result, table

CHUNKS = 64
KINDS = ("whole", "stream")
Message = dict[str, Any]


def tenant_names(count: int) -> list[str]:
    return [f"tenant-{number:04d}" for number in range(count)]


def scrape(tenants: int, named: int) -> dict[str, float]:
    """Seconds (median of 7) and bytes of a response of /metrics after requests of every tenant."""
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
    served = [Served(name, f"{name}@1", profile) for name in tenant_names(tenants)]
    plan = EnginePlan(Settings(family=Path("/f"), apply="gain"), header, None)
    traffic = Traffic(labels)
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
    times, size, registry = [], 0, REGISTRY
    for _ in range(7):
        started = time.perf_counter()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        size = len(generate_latest(registry))
        times.append(time.perf_counter() - started)
    return {"scrape_s": statistics.median(times), "bytes": size, "refresh_s": refresh_s}


def requests(tenants: int, count: int) -> dict[str, float]:
    """Median microseconds of a request with metrics and without, taken in turns."""
    from safegene_server.access.catalog import Catalog, Principal, Tenant, key_digest, make_view
    from safegene_server.access.middleware import AccessMiddleware
    from safegene_server.metrics.labels import TenantLabels
    from safegene_server.metrics.settings import MetricsSettings
    from safegene_server.metrics.traffic import Traffic

    names = tenant_names(tenants)
    key = Principal("k", frozenset({"serve"}), frozenset({"*"}))
    tenants_of = [Tenant(name, f"{name}@1") for name in names]
    catalog = Catalog(make_view(keys={key_digest("sg-k"): key}, tenants=tenants_of))

    class ServedModels:
        """Served models that are all protected."""

        def protected(self, served: str) -> bool:
            return True

        def adapters(self) -> list[str]:
            return names

    models = ServedModels()
    labels = TenantLabels(MetricsSettings(max_tenants=tenants))
    traffic = Traffic(labels, served_models=lambda: models)
    traffic.expect(names)

    async def run(kind: str) -> dict[str, float]:
        app = app_of(kind)
        apps = {
            "with": AccessMiddleware(app, catalog, traffic=traffic),
            "without": AccessMiddleware(app, catalog),
        }
        times: dict[str, list[float]] = {way: [] for way in apps}
        messages = [{"role": "user", "content": "How is this done? " * 20}]
        for number in range(count):
            name = names[number % tenants]
            body = {"model": name, "stream": kind == "stream", "messages": messages}
            for way, access in apps.items():
                started = time.perf_counter_ns()
                await send_request(access, json.dumps(body).encode())
                times[way].append((time.perf_counter_ns() - started) / 1000)
        return {f"{kind}_{way}_p50_us": statistics.median(found) for way, found in times.items()}

    return {name: value for kind in KINDS for name, value in asyncio.run(run(kind)).items()}


def app_of(kind: str) -> Any:
    """An app that responds at once: whole, or in CHUNKS events and the usage."""
    usage = '"usage":{"prompt_tokens":90,"completion_tokens":64}'
    if kind == "whole":
        message = '{"index":0,"message":{"role":"assistant","content":"%s"}}' % ("word " * CHUNKS)
        pieces = [f'{{"model":"m","choices":[{message}],{usage}}}'.encode()]
        content_type = b"application/json"
    else:
        delta = '{"id":"cmpl-0","model":"m","choices":[{"index":0,"delta":{"content":"word "}}]}'
        pieces = [f"data: {delta}\n\n".encode()] * CHUNKS
        content_type = b"text/event-stream"
    last = f'data: {{"choices":[],{usage}}}\n\n'.encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with_usage = kind == "stream" and b'"include_usage":true' in body
        for piece in [*pieces, last] if with_usage else pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def send_request(app: Any, body: bytes) -> None:
    headers = [(b"authorization", b"Bearer sg-k"), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


def run_case(case: str, *numbers: int, shared: bool = False) -> dict[str, float]:
    """Run one case in a process of its own, so that it does not see another case's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
        env |= {"PROMETHEUS_MULTIPROC_DIR": folder} if shared else {}
        command = [sys.executable, "-m", __spec__.name, "--case", case, *map(str, numbers)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tenants", type=int, default=1000, help="published on the server")
    parser.add_argument("--requests", type=int, default=2000, help="of each kind and way")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run = {"scrape": scrape, "requests": requests}[given.case[0]]
        print(json.dumps(run(int(given.case[1]), int(given.case[2]))))
        return
    found: dict[str, float] = {"tenants": given.tenants, "chunks": CHUNKS}
    rows: list[tuple[str, ...]] = []
    for named in (min(100, given.tenants), given.tenants):
        for shared in (False, True):
            case = run_case("scrape", given.tenants, named, shared=shared)
            processes = "several" if shared else "one"
            scrape_s, size, refresh_s = case.values()
            rows.append(
                (str(named), processes, f"{scrape_s:.3f}", f"{size / 1e6:.2f}", f"{refresh_s:.3f}")
            )
            found |= {f"named{named}_{processes}_{name}": value for name, value in case.items()}
    heading = ("named tenants", "processes", "scrape s", "MB", "refresh s")
    CONSOLE.print(table((heading, rows), f"/metrics with {given.tenants} tenants"))
    found |= run_case("requests", given.tenants, given.requests)
    rows = []
    for kind in KINDS:
        with_us, without_us = found[f"{kind}_with_p50_us"], found[f"{kind}_without_p50_us"]
        numbers = (with_us, without_us, with_us - without_us)
        rows.append((kind, *(f"{value:.0f}" for value in numbers)))
    CONSOLE.print(table((("response", "with", "without", "difference"), rows), "µs, median"))
    print_result("metrics_cost", {name: round(value, 6) for name, value in found.items()})


if __name__ == "__main__":
    main()
