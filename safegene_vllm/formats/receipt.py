"""Receipts: the weights and gains each worker reports as applied, checked against the files.

The check decides whether a tenant may be served. Torch-free; the plugin makes receipts inside
each worker.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from safegene_vllm.errors import ReceiptError


@dataclass(frozen=True)
class AdapterReceipt:
    """One adapter as one worker holds it. `slot` is None while it is evicted from the device."""

    name: str
    lora_int_id: int
    slot: int | None
    profile: str | None
    gain_digest: str | None
    tenant_sites: int
    safety_sites: int
    gain_norm: float


@dataclass(frozen=True)
class Receipt:
    """One worker's report. Digests are `sha256:<hex>`; norms are Euclidean, without unit.

    `adapter_bytes` are those of the adapters that are loaded, in CPU memory, each once. An adapter
    is evicted when another takes its slot; `slot_evictions` counts since the worker's start.
    """

    rank: int
    world_size: int
    apply: str
    family: str | None
    sites_expected: int
    sites_applied: int
    vector_bytes: int
    base_profile: str | None
    base_gain_digest: str | None
    unprotected_mode: bool
    vllm_version: str
    adapters: tuple[AdapterReceipt, ...] = ()
    load_s: float = 0.0
    notes: tuple[str, ...] = field(default=())
    adapter_bytes: int = 0
    slots_total: int = 0
    slots_used: int = 0
    slot_evictions: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Receipt:
        adapters = tuple(AdapterReceipt(**a) for a in raw["adapters"])
        return cls(**{**raw, "adapters": adapters, "notes": tuple(raw["notes"])})


def gain_digest(coefficients: Sequence[float]) -> str:
    """Digest of a gain row as a device holds it: float32, little endian, one value per layer."""
    return (
        "sha256:" + hashlib.sha256(struct.pack(f"<{len(coefficients)}f", *coefficients)).hexdigest()
    )


def check_engine(receipts: Sequence[Receipt], *, family: str | None) -> None:
    """Check that every rank has reported and applied the whole vector of `family`.

    Errors: ReceiptError listing every disagreement.
    """
    errors = []
    if not receipts:
        raise ReceiptError("no worker returned a receipt: the SafeGene plugin is not loaded there.")
    world = receipts[0].world_size
    ranks = sorted(r.rank for r in receipts)
    if ranks != list(range(world)):
        errors.append(f"receipts from ranks {ranks}, expected one from each of 0..{world - 1}")
    for r in receipts:
        if r.family != family:
            errors.append(f"rank {r.rank} carries family {r.family}, the file says {family}")
        if r.sites_applied != r.sites_expected:
            errors.append(
                f"rank {r.rank} applied {r.sites_applied} of {r.sites_expected} sites of the vector"
            )
    if errors:
        raise ReceiptError("; ".join(errors) + ". Not served.")


def check_tenant(receipts: Sequence[Receipt], name: str, *, profile: str, gain: str) -> None:
    """Check that every rank has adapter `name` with the profile and gain row of its files.

    Errors: ReceiptError listing every disagreement.
    """
    errors = []
    for r in receipts:
        mine = [a for a in r.adapters if a.name == name]
        if not mine:
            errors.append(f"rank {r.rank} has no adapter {name!r}")
        for a in mine:
            if a.profile != profile:
                errors.append(f"rank {r.rank} applied profile {a.profile}, the file says {profile}")
            if a.slot is not None and a.gain_digest != gain:
                errors.append(f"rank {r.rank} holds gain row {a.gain_digest}, expected {gain}")
    if errors:
        raise ReceiptError(f"tenant {name!r}: " + "; ".join(errors) + ". Not served.")
