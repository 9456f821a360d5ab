"""The environment of every test, set before anything under test is imported.

No test may reach a model hub, and vLLM speaks only when something is wrong. A process among
several computes on one core: threads that wait for each other's cores are ten times slower.
A law that hypothesis tries has no deadline: a busy machine does not fail it.
Fixtures live next to the tests that use them.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

SLOW = (
    "benchmarks/test_bench_serving_short.py",
    "engine/test_smollm2.py",
    "deploy/test_metrics_server.py",
    "engine/test_compiled.py",
    "engine/test_many_tenants.py",
    "engine/test_generation_backend.py",
    "benchmarks/test_safety_utility.py",
    "engine/test_speculative.py",
    "engine/test_calibration.py",
    "engine/test_canary_probes.py",
    "engine/test_plan_estimates.py",
    "server/test_artifacts_crash.py",
    "engine/test_revisions.py",
    "benchmarks/test_bench_serving_worker.py",
    "engine/test_cli_evaluate.py",
)
"""Files whose tests take most of the time, the longest first: `make test-slow`, marker `slow`."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files, and run files that take long first: one left over delays the end."""
    here = Path(__file__).parent

    def order(item: pytest.Item) -> tuple[int, int]:
        file = item.path.relative_to(here).as_posix()
        if file in SLOW:
            return 0, SLOW.index(file)
        return (1 if item.get_closest_marker("engine") else 2), 0

    for item in items:
        if item.path.relative_to(here).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=order)
