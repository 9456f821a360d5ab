"""The scaling benchmark: its counts on the real registry, and its sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
from registry_setup import url

from benchmarks.results import ROOT
from benchmarks.scaling import bench_scaling, limits, registry_load
from benchmarks.scaling.limits import ReceiptCost
from safegene_vllm.planner import read_shape

__all__ = ["url"]

QWEN = read_shape(ROOT / "benchmarks" / "scaling" / "qwen2.5-7b")


def test_replicas_cost_the_registry_one_replicas_cost_each(url: str) -> None:
    found = registry_load.measure(
        url, QWEN, tenants=4, replicas=(1, 3), server=None, progress=lambda: None
    )
    each = limits.follow(found.costs)
    for fleet, count in zip(found.fleets, (1, 3), strict=True):
        # A change is read and reported; publishing it is three audited steps.
        assert fleet.statements == count * each.statements
        assert (fleet.replicas, fleet.audit_rows) == (count, 3 + 2 * count)
        assert fleet.receipt_rows == count * 4
    one, every = found.costs["receipts_one"], found.costs["receipts_all"]
    assert every.statements - one.statements == 3
    assert found.costs["beat"].writes == 1 and found.costs["poll"].writes == 0
    compared = bench_scaling.compare([found], [ReceiptCost(5, 0.01)])
    statements, audit_rows, _ = compared
    assert statements[1:] == (3 * each.statements, 3 * each.statements)
    assert audit_rows[1:] == (9, 9)


def test_every_receipt_is_of_all_tenants() -> None:
    few, many = limits.measure_receipts(registry_load.header_of(QWEN), (5, 200), 4)
    assert (few.tenants, many.tenants) == (5, 200)


def test_a_larger_receipt_lies_on_the_line_of_the_smaller_ones() -> None:
    receipts = [ReceiptCost(10, 0.01), ReceiptCost(20, 0.02), ReceiptCost(40, 0.05)]
    (found,) = bench_scaling.compare([], receipts)
    assert found[1:] == (pytest.approx(0.04), 0.05)


def test_limits_are_products_of_costs_and_periods() -> None:
    costs = {
        name: registry_load.Cost(2, 1, 1, 0.01, 0.004, 0.001) for name in registry_load.OPERATIONS
    }
    lite = registry_load.Measured("sqlite", 50, costs)
    writer = limits.limits(lite, 100, 0.0)[0]
    # Half a beat and two claims a second, four milliseconds each, from each of a hundred.
    assert writer.load == pytest.approx(1.0)
    assert writer.exhausted_at == pytest.approx(100)
    grown = replace(lite, backend="postgresql", connections=6, connections_allowed=90)
    found = {limit.part: limit for limit in limits.limits(grown, 100, 0.0)}
    assert found["PostgreSQL: connections"].exhausted_at == pytest.approx(15)
    assert found["PostgreSQL: one core"].load == pytest.approx(100 * 4.5 * 0.001)
    follows = found["PostgreSQL: one replica follows"]
    assert follows.load == pytest.approx(2 * 0.005) and follows.of == "tenants"


def test_more_tenants_lie_on_a_line() -> None:
    def run(tenants: int) -> registry_load.Measured:
        costs = {
            n: registry_load.Cost(1, 1, tenants, 0.001 * tenants) for n in registry_load.OPERATIONS
        }
        return registry_load.Measured("sqlite", tenants, costs)

    for runs in ([run(10), run(30)], [run(30)]):
        found = limits.extrapolate(runs, 300)
        assert found.tenants == 300
        assert found.costs["snapshot"].rows == pytest.approx(300)
        assert found.costs["snapshot"].seconds == pytest.approx(0.3)
        assert found.costs["beat"] == run(30).costs["beat"]


def test_a_start_is_a_reading_and_a_receipt_of_its_own_per_tenant() -> None:
    receipts = [ReceiptCost(10, 0.012), ReceiptCost(100, 0.102)]
    stall, start = limits.engine_limits(receipts, 100, 0.08)
    assert stall.load == pytest.approx(0.102) and stall.exhausted_at == pytest.approx(98)
    assert start.load == pytest.approx(100 * (0.08 + 0.002 + 0.001))
    again = limits.engine_limits(receipts, int(start.exhausted_at or 0), 0.08)[1]
    assert again.load == pytest.approx(limits.START_S, rel=0.01)
