"""The scaling benchmark: its simulation's laws, its counts on the real registry, its sums."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from registry_setup import url

from benchmarks.results import ROOT
from benchmarks.scaling import engine_simulation as simulation
from benchmarks.scaling import limits, registry_load
from benchmarks.scaling.limits import ReceiptCost
from safegene_vllm.planner import Workload, find_gpu, plan_mode, read_shape

__all__ = ["url"]

QWEN = read_shape(ROOT / "benchmarks" / "scaling" / "qwen2.5-7b")
WORKLOAD = Workload(QWEN, find_gpu("h100-sxm"), tenants=200, slots=16, concurrency=64)
ENGINE = simulation.engine_of(WORKLOAD, host_adapters=200, slot_load_s=0.005, disk_load_s=0.08)
LOAD = simulation.Traffic(200, 1.0, 8.0, 40.0, 512, 128)


def test_arrivals_follow_rate_popularity_and_length() -> None:
    found = simulation.arrivals(replace(LOAD, seconds=500.0))
    assert len(found) == pytest.approx(4000, rel=0.1)
    assert [arrived for arrived, _, _ in found] == sorted(arrived for arrived, _, _ in found)
    share = sum(1 for _, tenant, _ in found if tenant == 0) / len(found)
    assert share == pytest.approx(1 / sum(1 / (k + 1) for k in range(200)), rel=0.15)
    assert sum(tokens for _, _, tokens in found) / len(found) == pytest.approx(128, rel=0.1)
    assert {tokens for _, _, tokens in simulation.arrivals(replace(LOAD, output_tokens=1))} == {1}


def test_one_step_is_the_planners_step() -> None:
    mode = plan_mode(replace(WORKLOAD, concurrency=16), "gain")
    cached = 16 * WORKLOAD.context_tokens
    taken = ENGINE.step_s + 16 * ENGINE.active_slot_s + cached * ENGINE.cached_token_s
    assert taken == pytest.approx(mode.step.seconds)


def test_every_adapter_in_a_slot_is_never_loaded() -> None:
    outcome = simulation.simulate(simulation.without_reloads(ENGINE, 200), LOAD)
    assert outcome.reload_share == 0.0 and not outcome.overloaded
    warm = simulation.simulate(replace(ENGINE, slots=200), replace(LOAD, seconds=400.0))
    assert warm.slot_hits > 0.9 and warm.host_hits == 1.0


def test_fewer_slots_hit_less_and_wait_longer() -> None:
    outcomes = [simulation.simulate(replace(ENGINE, slots=n), LOAD) for n in (4, 16, 64)]
    waits = [o.ttft_p99_s for o in outcomes]
    assert waits[0] > waits[1] >= waits[2]
    assert outcomes[1].slot_hits < outcomes[2].slot_hits
    assert outcomes[0].active_mean <= 4


def test_less_host_memory_reads_the_disk() -> None:
    near, far = (simulation.simulate(replace(ENGINE, host_adapters=n), LOAD) for n in (200, 32))
    assert near.host_hits == 1.0 > far.host_hits
    assert far.reload_share > near.reload_share
    assert far.ttft_p99_s > near.ttft_p99_s


def test_an_overload_is_reported() -> None:
    outcome = simulation.simulate(ENGINE, replace(LOAD, requests_per_s=400.0))
    assert outcome.overloaded


def test_replicas_cost_the_registry_one_replicas_cost_each(url: str) -> None:
    found = registry_load.measure(
        url, QWEN, tenants=4, replicas=(1, 3), server=None, track=lambda _: None
    )
    each = limits.follow(found.costs)
    for count in (1, 3):
        # A change is read and reported; publishing it is three audited steps.
        assert found.statements_per_change[count] == count * each.statements
        assert found.audit_per_change[count] == 3 + 2 * count
        assert found.receipt_rows[count] == count * 4
    one, every = found.costs["receipts_one"], found.costs["receipts_all"]
    assert every.statements - one.statements == 3
    assert found.costs["beat"].writes == 1 and found.costs["poll"].writes == 0
    assert registry_load.measured_of(asdict(found)) == found
    rows = limits.rows(found, 100, 10.0)
    assert rows == {
        "receipt_rows": 400,
        "audit_rows_per_change": 203,
        "audit_rows_per_day": 2030,
    }


def test_a_receipt_grows_with_the_tenants() -> None:
    few, many = limits.measure_receipts(registry_load.header_of(QWEN), (5, 200), 4)
    assert (few.tenants, many.tenants) == (5, 200)
    assert many.receipt_s > few.receipt_s > 0


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
        found = limits.grown(runs, 300)
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
