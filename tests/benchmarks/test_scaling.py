"""The scaling benchmark: its counts on the real registry."""

from __future__ import annotations

from registry_setup import url

from benchmarks.results import ROOT
from benchmarks.scaling import registry_load, worker
from safegene_vllm.planner import read_shape

__all__ = ["url"]

QWEN = read_shape(ROOT / "benchmarks" / "scaling" / "qwen2.5-7b")


def test_replicas_cost_the_registry_one_replicas_cost_each(url: str) -> None:
    found = registry_load.measure(
        url, QWEN, tenants=4, replicas=(1, 3), server=None, progress=lambda: None
    )
    # Each reads all tenants and sends a heartbeat, which also reports the new version.
    each = found.costs["snapshot"].statements + found.costs["receipts_one"].statements + 1
    for fleet, count in zip(found.fleets, (1, 3), strict=True):
        # A change is read and reported; publishing it is three audited steps.
        assert fleet.statements == count * each
        assert (fleet.replicas, fleet.audit_rows) == (count, 3 + 2 * count)
        assert fleet.receipt_rows == count * 4
    one, every = found.costs["receipts_one"], found.costs["receipts_all"]
    assert every.statements - one.statements == 3
    assert found.costs["beat"].writes == 1 and found.costs["poll"].writes == 0


def test_receipts_are_timed_with_each_number_of_tenants() -> None:
    found = worker.receipts_s(registry_load.header_of(QWEN), (200, 5), 4)
    assert list(found) == [5, 200]
