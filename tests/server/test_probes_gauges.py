"""The series of probes where several processes share files: nothing can be removed there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, math, sys, warnings
from datetime import UTC, datetime

warnings.simplefilter("ignore")
from prometheus_client import CollectorRegistry, multiprocess
from safegene_server.metrics.labels import TenantLabels
from safegene_server.monitoring.probes import Result, gauges
from safegene_server.tenants.smoke_prompts import Count, Tally

registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
labels = TenantLabels()
counts = {kind: Count(1, 4) for kind in ("harmful", "lookalike", "benign")}
result = Result("a", "a@1", "r", datetime.now(UTC), 2.0, Tally(counts, Count(6, 12)), 8, "sha256:")


def seen():
    names = ("attack_success_ratio", "over_refusal_ratio", "coherent_ratio", "duration_seconds")
    return [registry.get_sample_value(f"safegene_probe_{n}", {"tenant": "a"}) for n in names] + [
        registry.get_sample_value("safegene_probe_prompts", {"tenant": "a", "kind": "benign"})
    ]


shown = []
for step in (gauges.show, gauges.clear, gauges.show):
    step(labels, result)
    shown.append([None if math.isnan(value) else value for value in seen()])
print(json.dumps(shown))
"""


def test_with_several_processes_rates_become_nan(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "server")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = [0.75, 0.25, 0.5, 2.0, 4.0]
    assert json.loads(done.stdout) == [shown, [None] * 5, shown]
