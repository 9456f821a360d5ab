"""What is compared: which vector, layers, shots and coefficients, on which tenant.

A case is one line of a table in docs/results.md. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

TENANTS = ("sentiment", "topic", "support", "writer")
ONE = "topic"
PAIR = ("topic", "writer")
"""The tenants of ablations that cost a calibration per line."""

MADE_WITH = ("topic",)
"""Tenants whose training stands in for the degraded copy, to make another vector."""

SOURCES = ("distilled", "minus-degradation", "refusal-lora", "svd-16")
LAYERS = ("contrast", "residual", "random", "norm", "all")
SHOTS = (4, 8, 16, 32, 64)
DOSES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Case:
    """One tenant with one family: calibrated, or at a fixed coefficient or a multiple of ours."""

    table: str
    line: str
    tenant: str
    family: str = "distilled/contrast"
    shots: int = 16
    tied: bool = False
    fixed: float | None = None
    times: float | None = None

    @property
    def calibration(self) -> str | None:
        """Names the calibration that gives the coefficients; None if they are fixed or a dose."""
        if self.fixed is not None or self.times is not None:
            return None
        tied = "-tied" if self.tied else ""
        return f"{self.tenant}-{self.family.replace('/', '-')}-{self.shots}{tied}"

    @property
    def state(self) -> str:
        if self.times is not None:
            return f"times-{self.times}"
        return self.calibration or f"{self.family}-fixed-{self.fixed}"


def dose() -> Iterator[Case]:
    for tenant in TENANTS:
        for times in DOSES:
            yield Case("dose", f"x{times:g}", tenant, "wide/contrast", times=times)


def fixed() -> Iterator[Case]:
    for tenant in TENANTS:
        yield Case("fixed", "calibrated", tenant)
        yield Case("fixed", "1 on every layer", tenant, fixed=1.0)


def tied() -> Iterator[Case]:
    for tenant in PAIR:
        yield Case("tied", "one per layer", tenant)
        yield Case("tied", "one for all layers", tenant, tied=True)


def source() -> Iterator[Case]:
    for name in SOURCES:
        layers = "contrast" if name == "distilled" else "all"
        yield Case("source", name, ONE, f"{name}/{layers}")
    yield Case("source", "distilled, all layers", ONE, "distilled/all")


def layers() -> Iterator[Case]:
    for name in LAYERS:
        yield Case("layers", name, ONE, f"distilled/{name}")


def shots() -> Iterator[Case]:
    for count in SHOTS:
        yield Case("shots", str(count), ONE, shots=count)


def reuse() -> Iterator[Case]:
    for tenant in TENANTS:
        ours = Case("reuse", "ours, made with no task", tenant)
        yield from (ours, replace(ours, line="ours, coefficient 1", fixed=1.0))
    for made_with in MADE_WITH:
        for tenant in TENANTS:
            case = Case("reuse", f"made with {made_with}", tenant, f"from-{made_with}/all")
            yield case
            yield replace(case, line=f"made with {made_with}, coefficient 1", fixed=1.0)


TABLES = {f.__name__: f for f in (dose, fixed, tied, source, layers, shots, reuse)}
