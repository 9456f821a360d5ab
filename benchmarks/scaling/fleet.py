"""What a fleet asks of each part, against what that part has: which one breaks first.

For telling 100 replicas with 1,000 tenants from what a few replicas cost the real registry and one
real engine. Every line is a product of measured costs and the periods in the server's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from engine import Held
from registry import Cost, Measured
from safegene_server.registry.watch import POLL_S
from safegene_server.replica.heartbeat import BEAT_S
from safegene_server.tenants.settings import TenantSettings

FOLLOW_S = 2.0
"""Within what time replicas promise to follow a change."""
START_S = 600.0
"""How long a replica may take until it is ready."""
STALL_S = 0.1
"""How long an engine may do nothing else, while tenants wait for their next token."""


@dataclass(frozen=True)
class Limit:
    """One part: what it is asked for and what it has, in the same unit. `first_at`: at how many
    replicas (or tenants) it is used up; None if that does not depend on them.
    """

    part: str
    asked: float
    has: float
    unit: str
    first_at: float | None
    of: str

    @property
    def used(self) -> float:
        return self.asked / self.has


def steady(measured: Measured) -> dict[str, float]:
    """How often one replica does what, per second, while nothing changes."""
    jobs = TenantSettings()
    return {"beat": 1 / BEAT_S, "poll": 1 / POLL_S, "claim": jobs.jobs_at_once / jobs.poll_s}


def grown(measured: Sequence[Measured], tenants: int) -> Measured:
    """One database with `tenants` tenants, from runs with fewer: what reads or writes a row per
    tenant lies on the line through the first and the last run, all else is the last run's.
    """
    few, many = measured[0], measured[-1]

    def line(name: str) -> Cost:
        one, two = asdict(few.costs[name]), asdict(many.costs[name])
        run = many.tenants - few.tenants
        more = (tenants - many.tenants) / run if run else tenants / many.tenants - 1
        base = one if run else dict.fromkeys(one, 0.0)
        return Cost(**{key: max(two[key] + more * (two[key] - base[key]), 0.0) for key in two})

    every = {name: line(name) for name in ("snapshot", "receipts_all")}
    return replace(many, tenants=tenants, costs={**many.costs, **every})


def follow(costs: dict[str, Cost]) -> Cost:
    """One replica's part of one change: it reads everything and beats with the new receipt. The
    beat then names a new version, one audit row more than the beat that was measured.
    """
    parts = [costs[name] for name in ("snapshot", "receipts_one")]
    return Cost(
        sum(p.statements for p in parts) + 1,
        sum(p.writes for p in parts) + 1,
        sum(p.rows for p in parts),
        sum(p.seconds for p in parts),
        sum(p.caller_cpu_s for p in parts),
        sum(p.server_cpu_s for p in parts),
    )


def limits(measured: Measured, replicas: int, changes_per_day: float) -> list[Limit]:
    """The registry's parts, at `replicas` replicas."""
    rates, costs = steady(measured), measured.costs
    change, per_s = follow(costs), changes_per_day / 86400
    found = []
    if measured.backend == "sqlite":
        # One writer at a time, and claims take the lock as well. The disk's time comes on top.
        burst = costs["receipts_one"].caller_cpu_s
        held = sum(rates[name] * costs[name].caller_cpu_s for name in ("beat", "claim"))
        held += per_s * burst
        found.append(_limit("SQLite: its one writer", held, replicas, 1.0, "of its time"))
        found.append(_limit("SQLite: all level after a change", burst, replicas, FOLLOW_S, "s"))
    else:
        cpu = sum(rates[name] * costs[name].server_cpu_s for name in rates)
        cpu += per_s * change.server_cpu_s
        found.append(_limit("PostgreSQL: one core", cpu, replicas, 1.0, "of its time"))
        burst = change.server_cpu_s
        found.append(_limit("PostgreSQL: all level after a change", burst, replicas, FOLLOW_S, "s"))
        if measured.connections and measured.connections_allowed:
            found.append(
                _limit(
                    "PostgreSQL: connections",
                    measured.connections,
                    replicas,
                    measured.connections_allowed,
                    "",
                )
            )
    follow_s = change.caller_cpu_s + change.server_cpu_s
    found.append(
        Limit(
            f"{_name(measured)}: one replica follows",
            follow_s,
            FOLLOW_S,
            "s",
            measured.tenants * FOLLOW_S / follow_s,
            "tenants",
        )
    )
    return found


def engine_limits(held: Sequence[Held], tenants: int, load_s: float) -> list[Limit]:
    """One engine's parts with `tenants`; between and beyond what was measured by a straight line.

    A replica that starts brings its tenants in one by one, each reported alone, and reads `load_s`
    of adapter for each.
    """
    slope = (held[-1].receipt_s - held[0].receipt_s) / (held[-1].tenants - held[0].tenants)
    base = max(held[-1].receipt_s - slope * held[-1].tenants, 0.0)
    stall = base + slope * tenants
    each = load_s + base + slope
    return [
        Limit("engine: stands still for a receipt", stall, STALL_S, "s",
              (STALL_S - base) / slope if slope > 0 else None, "tenants"),
        Limit("engine: a replica starts", tenants * each, START_S, "s", START_S / each, "tenants"),
    ]  # fmt: skip


def rows(measured: Measured, replicas: int, changes_per_day: float) -> dict[str, float]:
    """Rows that a fleet leaves: receipts in all, audit rows per change and per day."""
    counts = sorted(measured.audit_per_change)
    few, many = counts[0], counts[-1]
    each = measured.audit_per_change[many] - measured.audit_per_change[few]
    each /= max(many - few, 1)
    once = measured.audit_per_change[few] - each * few
    per_change = once + each * replicas
    return {
        "receipt_rows": float(replicas * measured.tenants),
        "audit_rows_per_change": per_change,
        "audit_rows_per_day": per_change * changes_per_day,
    }


def _name(measured: Measured) -> str:
    return "SQLite" if measured.backend == "sqlite" else "PostgreSQL"


def _limit(part: str, each: float, replicas: int, has: float, unit: str) -> Limit:
    return Limit(part, each * replicas, has, unit, has / each if each else None, "replicas")
