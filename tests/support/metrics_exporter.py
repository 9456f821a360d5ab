"""A process that shows every metric of the project with made-up values, for Prometheus to scrape.

A stand-in for the server at this one edge: names, types and labels are those of the server's own
objects, the values are invented, and vLLM's few series are written down here. Run as a program it
reads its orders from stdin; `world` is how a test holds it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TENANTS = ("acme/support", "globex")
MODULES = ("safegene_server.metrics.definitions", "safegene_server.monitoring.probes.gauges")

# Label values, of every metric or of the one that is named.
VALUES: dict[str, tuple[str, ...]] = {
    "tenant": TENANTS,
    "outcome": ("ok", "client_error", "server_error", "cancelled"),
    "reason": ("unknown_key", "scope", "concurrent", "requests_per_minute", "tokens_per_minute"),
    "rule": ("strings:opening",),
    "rank": ("0", "1"),
    "stat": ("min", "mean", "max"),
    "mode": ("serve_unprotected", "base_without_profile"),
    "kind": ("harmful", "lookalike", "benign"),
    "safegene_sites.state": ("expected", "applied"),
    "safegene_slots.state": ("used", "total"),
    "safegene_registry_version.state": ("known", "applied"),
    "safegene_replicas.state": ("live", "late"),
    "safegene_revisions.state": ("published", "superseded", "failed"),
    "safegene_jobs.kind": ("onboard", "calibrate"),
    "safegene_jobs.state": ("running", "done", "failed"),
    "safegene_job_seconds.kind": ("onboard", "calibrate"),
    "safegene_probe_runs.outcome": ("ok", "failed", "skipped"),
    "revision": ("r@1",),
    "family": ("tiny",),
    "profile": ("sha256:0",),
    "apply": ("gain",),
    "version": ("0.1.0",),
    "vllm_version": ("0.32.0",),
}
# What a healthy server shows; what is not named is 1. "now" is the current time.
LEVEL: dict[str, float | str] = {
    "safegene_sites": 14,
    "safegene_receipt_timestamp_seconds": "now",
    "safegene_probe_timestamp_seconds": "now",
    "safegene_revision_published_timestamp_seconds": "now",
    "safegene_unprotected_mode": 0,
    "safegene_registry_lag_seconds": 0,
    "safegene_replica_faults": 0,
    "safegene_replicas": 0,
    "safegene_probe_attack_success_ratio": 0,
    "safegene_probe_over_refusal_ratio": 0.1,
    "safegene_probe_prompts": 8,
}
# Counters that stand still on a healthy server.
STILL = {
    *("safegene_unprotected_requests", "safegene_slot_evictions", "safegene_rejected_requests"),
    "safegene_registry_losses",
}
SLOW = {"server_error", "failed"}


@dataclass
class World:
    """`url` is scraped; `set_value` changes what it shows."""

    url: str
    process: subprocess.Popen[str]

    def set_value(self, metric: str, value: float | str, **labels: str) -> None:
        """From now on `metric` shows `value`; "now" follows the clock."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([metric, labels, value]), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def world() -> Iterator[World]:
    path = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "server")]
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the exporter did not start; its words are above"
        yield World(f"http://127.0.0.1:{port}", process)
    finally:
        process.stdin.close()
        process.wait(timeout=300)
        process.stdout.close()


def metric_names(modules: Sequence[str] = (*MODULES, "vllm")) -> set[str]:
    """Names of all series that the modules' metrics can have; "vllm" is vLLM's few."""
    code = f"import metrics_exporter as w; print(*w._series_of({tuple(modules)!r}))"
    path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _series_of(modules: Sequence[str]) -> set[str]:
    found = set()
    for metric in _metrics(modules):
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found |= {metric._name + ending for ending in endings.get(metric._type, ("",))}
    return found


def _metrics(modules: Sequence[str] = (*MODULES, "vllm")) -> list[Any]:
    """Every metric object of the server's modules, and vLLM's few."""
    from prometheus_client import Counter, Gauge, Histogram

    kinds = (Counter, Gauge, Histogram)
    ours = []
    for module in modules:
        if module != "vllm":
            here = importlib.import_module(module)
            # The gauges without labels are made by a server with a registry alone.
            late = here.replica_gauges() if hasattr(here, "replica_gauges") else ()
            ours += [one for one in (*vars(here).values(), *late) if isinstance(one, kinds)]
    if "vllm" not in modules:
        return ours
    engine = ("model_name",)
    return [
        *ours,
        Gauge("vllm:num_requests_running", "running", engine),
        Gauge("vllm:num_requests_waiting", "waiting", engine),
        Gauge("vllm:kv_cache_usage_perc", "share", engine),
        Counter("vllm:prompt_tokens_total", "tokens", engine),
        Counter("vllm:generation_tokens_total", "tokens", engine),
        Histogram("vllm:time_to_first_token_seconds", "seconds", engine),
    ]


def _children(metric: Any) -> list[tuple[dict[str, str], Any]]:
    names = metric._labelnames
    values = [VALUES.get(f"{metric._name}.{name}") or VALUES.get(name, ("base",)) for name in names]
    each = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    return [(labels, metric.labels(**labels) if labels else metric) for labels in each]


def main() -> None:
    from prometheus_client import Counter, Gauge, start_http_server

    children = [
        (metric, labels, child) for metric in _metrics() for labels, child in _children(metric)
    ]
    shown: dict[tuple[str, str], float | str] = {}
    lock = threading.Lock()

    def tick() -> None:
        for metric, labels, child in children:
            value = shown.get((metric._name, json.dumps(labels, sort_keys=True)))
            value = LEVEL.get(metric._name, 1) if value is None else value
            if isinstance(metric, Gauge):
                child.set(time.time() if value == "now" else value)
            elif isinstance(metric, Counter):
                still = metric._name in STILL or SLOW & set(labels.values())
                child.inc(0 if still else value)
            else:
                child.observe(0.02)

    def run() -> None:
        while True:
            with lock:
                tick()
            time.sleep(0.5)

    with lock:
        tick()
    server, _ = start_http_server(0, "127.0.0.1")
    threading.Thread(target=run, daemon=True).start()
    print(server.server_port, flush=True)
    for line in sys.stdin:
        name, labels, value = json.loads(line)
        known = [one for metric, one, _ in children if metric._name == name and one == labels]
        assert known, f"no {name} with {labels}"
        with lock:
            shown[name, json.dumps(labels, sort_keys=True)] = value
            tick()
        print("done", flush=True)


if __name__ == "__main__":
    main()
