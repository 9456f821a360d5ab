"""Gauges of what this engine applies, from its ranks' receipts and the profiles it serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from safegene_server.metrics import definitions
from safegene_server.metrics.labels import NO_TENANT, TenantLabels
from safegene_server.metrics.series import Labels, Series
from safegene_server.verifier import Report
from safegene_vllm import __version__
from safegene_vllm.formats.profile import Profile
from safegene_vllm.formats.receipt import Receipt
from safegene_vllm.settings import EnginePlan

STATES = ("registered", "checking", "failed", "ready", "published", "superseded", "retired")


@dataclass(frozen=True)
class Served:
    """A tenant's name, the revision it leads to (the engine's own name), and its profile."""

    tenant: str
    revision: str
    profile: Profile | None


@dataclass(frozen=True)
class _Row:
    """Values computed once per profile: `info` is family, digest and way of application."""

    profile: Profile | None
    info: tuple[str, str, str]
    stats: Mapping[str, float]
    layers: int
    norm: float
    inert: bool


class Applied:
    """Exporter of receipts and profiles.

    `offered` returns what is served now, in the order of publishing; `base` is the name of the base
    model; `now` returns Unix time in seconds.
    """

    def __init__(
        self,
        labels: TenantLabels,
        plan: EnginePlan,
        offered: Callable[[], Iterable[Served]],
        base: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.labels = labels
        self.plan = plan
        self.offered = offered
        self.base = base
        self.now = now
        self._rows: dict[str, _Row] = {}
        self._norms: dict[str, float] = {}
        self._evictions = 0
        self._info = Series(definitions.REVISION_INFO)
        self._gain_norm = Series(definitions.GAIN_NORM)
        self._coefficient = Series(definitions.COEFFICIENT)
        self._layers = Series(definitions.ACTIVE_LAYERS)
        self._build = Series(definitions.BUILD_INFO)

    def take(self, report: Report) -> None:
        """Export a verification: what each rank applies, and when it was last as promised."""
        receipts = [Receipt.from_dict(rank) for rank in report.ranks if rank is not None]
        for receipt in receipts:
            rank = str(receipt.rank)
            definitions.SITES.labels(rank, "expected").set(receipt.sites_expected)
            definitions.SITES.labels(rank, "applied").set(receipt.sites_applied)
            definitions.VECTOR_BYTES.labels(rank).set(receipt.vector_bytes)
            definitions.ADAPTER_BYTES.labels(rank).set(receipt.adapter_bytes)
            if report.ready:
                definitions.RECEIPT_AT.labels(rank).set(self.now())
        if receipts:
            self._take_slots(receipts[0])
            self._build.replace({self._build_of(receipts[0]): 1.0})
            # Every rank holds a whole row of gains; a tenant can rely on the weakest.
            norms: dict[str, float] = {}
            for adapter in (a for receipt in receipts for a in receipt.adapters):
                norms[adapter.name] = min(adapter.gain_norm, norms.get(adapter.name, math.inf))
            self._norms = norms
        self.refresh()

    def refresh(self) -> None:
        """Export what is served now, with the receipts of the last verification."""
        served = [*self.offered(), Served(NO_TENANT, self.base, self.plan.base_profile)]
        known, self._rows = self._rows, {}
        info: dict[Labels, float] = {}
        norms: dict[Labels, float] = {}
        stats: dict[Labels, float] = {}
        layers: dict[Labels, float] = {}
        inert = False
        for one in served:
            row = known.get(one.revision)
            if row is None or row.profile is not one.profile:
                row = self._row(one)
            self._rows[one.revision] = row
            inert = inert or row.inert
            if not (self.labels.has_own(one.tenant) if one.tenant else one.profile is not None):
                continue
            labels = (one.tenant,)
            info[one.tenant, one.revision, *row.info] = 1.0
            norms[labels] = self._norms.get(one.revision, row.norm)
            layers[labels] = row.layers
            for stat, value in row.stats.items():
                stats[one.tenant, stat] = value
        self._info.replace(info)
        self._gain_norm.replace(norms)
        self._coefficient.replace(stats)
        self._layers.replace(layers)
        for mode, is_open in self._modes(inert).items():
            definitions.UNPROTECTED_MODE.labels(mode).set(is_open)

    def _row(self, one: Served) -> _Row:
        header, profile = self.plan.header, one.profile
        family = "" if header is None else header.name
        if header is None or profile is None:
            return _Row(profile, (family, "", ""), {}, 0, 0.0, False)
        values = [profile.coefficients[chosen.layer] for chosen in header.layers]
        return _Row(
            profile,
            (family, profile.digest, str(self.plan.settings.apply)),
            {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)},
            sum(1 for value in values if value != 0.0),
            math.hypot(*profile.coefficients),
            not any(values),
        )

    def _modes(self, inert: bool) -> Mapping[str, bool]:
        """Return each way in which requests may be served without a vector (see the docs)."""
        header, settings = self.plan.header, self.plan.settings
        return {
            "no_family": header is None,
            "serve_unprotected": settings.missing_profile == "serve_unprotected",
            "base_without_profile": header is not None and self.plan.base_profile is None,
            "zero_profile": inert,
        }

    def _take_slots(self, receipt: Receipt) -> None:
        """Export the LoRA slots of one rank: every rank has the same adapters in them."""
        definitions.SLOTS.labels("used").set(receipt.slots_used)
        definitions.SLOTS.labels("total").set(receipt.slots_total)
        if receipt.slot_evictions < self._evictions:
            # The engine was restarted.
            self._evictions = 0
        definitions.EVICTIONS.inc(receipt.slot_evictions - self._evictions)
        self._evictions = receipt.slot_evictions

    def _build_of(self, receipt: Receipt) -> Labels:
        header = self.plan.header
        family = "" if header is None else header.name
        return (__version__, receipt.vllm_version, receipt.apply, family)
