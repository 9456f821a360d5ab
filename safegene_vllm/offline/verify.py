"""`safegene verify`: exactness and isolation checks with real engines on this machine.

Runs the three ways of application on the user's own model or on a tiny model, and compares the
engines with each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import load_profile, make_profile, save_profile
from safegene_vllm.formats.receipt import check_engine
from safegene_vllm.formats.tenant_kind import slot_kind
from safegene_vllm.offline.engine import Completion, Request, engine, max_logprob_diff
from safegene_vllm.planner.slots import rank_bucket

BOUNDS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Maximum |Δ logprob| in float32, mean |Δ logprob| in 16-bit formats; in nats."""


@dataclass(frozen=True)
class Check:
    """One row of the result."""

    what: str
    passed: bool
    measured: str


def verify(
    model: Path,
    family: Path,
    tenants: Sequence[Path],
    *,
    work: Path,
    dtype: str = "float32",
    tokens: int = 16,
    progress: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> list[Check]:
    """Run four engines in turn and compare them; `work` is an empty directory for copies.

    `options` are passed to every engine. Errors: those of the plugin for the model, the family and
    the tenants; ConfigError.
    """
    if len(tenants) < 2:
        raise ConfigError(
            f"verify needs at least two tenants with profiles, found {len(tenants)}; "
            "give --tenant twice, or none to use a tiny model."
        )
    header = read_family_header(family)
    rest = [t for t in tenants if slot_kind(t) == "adapter"]
    zeros = [_with_row(t, work / f"zero-{i}", family, 0.0) for i, t in enumerate(tenants)]
    top = min(1.0, header.bounds[1])
    only = _with_row(None, work / "profile-only", family, top)
    mix = [*tenants, only, None]
    prompts = [[3 + (i * 7 + k * 11) % 250 for k in range(6)] for i in range(len(mix))]
    limits: dict[str, Any] = {
        "max_loras": 2 * len(mix) + 1,
        "max_cpu_loras": 4 * len(mix),
        "dtype": dtype,
    }
    limits |= {"max_lora_rank": _rank_bucket(rest, family)} | options
    settings = {"family": str(family)}

    def requests(directories: Sequence[Path | None]) -> list[Request]:
        return [Request(p, d) for p, d in zip(prompts, directories, strict=True)]

    progress("gain table")
    with engine(model, {**settings, "apply": "gain"}, **limits) as e:
        gain = e.generate(requests(mix), tokens)
        zero = e.generate(requests([*zeros, only, None]), tokens)
        one = e.generate(requests([zeros[0], *mix[1:]]), tokens)
        receipts = e.receipts()
    check_engine(receipts, family=header.digest)
    progress("the same engine without a vector")
    plain = [_without_profile(t, work / f"plain-{i}") for i, t in enumerate(tenants)]
    bare = {"family": None, "missing_profile": "serve_unprotected"}
    with engine(model, bare, **limits) as e:
        without = e.generate(requests([*plain, None, None]), tokens)
    progress("composed slots")
    with engine(model, {**settings, "apply": "composed"}, **limits) as e:
        composed = e.generate(requests(mix), tokens)
    progress("weight load")
    full = _full_checkpoint(model, only, work / "full")
    with engine(full, {**settings, "apply": "weights"}, dtype=dtype, **options) as e:
        weights = e.generate([Request(prompts[-2])], tokens)
    keep = [i for i, d in enumerate(mix) if d not in (only, None)]
    return [
        _agree("composed slots complete like the gain table", gain, composed, dtype),
        _agree("weight load completes like the gain table", [gain[-2]], weights, dtype),
        _same(
            "a zero row is the same engine without a vector, bit for bit",
            [zero[i] for i in [*keep, -1]],
            [without[i] for i in [*keep, -1]],
        ),
        _same(
            "a neighbor's profile changes no other completion, bit for bit",
            [gain[i] for i in range(1, len(mix))],
            [one[i] for i in range(1, len(mix))],
        ),
        Check(
            "the profile changes its own tenant's completion",
            gain[0].logprobs != one[0].logprobs,
            f"{max_logprob_diff([gain[0]], [one[0]]):.3g} nats",
        ),
        Check(
            "every rank applied every site",
            all(r.sites_applied == r.sites_expected for r in receipts),
            f"{receipts[0].sites_applied} sites on {len(receipts)} rank(s)",
        ),
    ]


def _agree(what: str, left: list[Completion], right: list[Completion], dtype: str) -> Check:
    """Compare token by token within the bound of the dtype."""
    bound = BOUNDS[dtype]
    equal = sum(a.tokens == b.tokens for a, b in zip(left, right, strict=True))
    if dtype == "float32":
        largest = max_logprob_diff(left, right)
        good = equal == len(left) and largest <= bound
        return Check(what, good, f"max |Δ logprob| {largest:.2g} (≤ {bound:g}), tokens equal")
    gaps = [gap for a, b in zip(left, right, strict=True) for gap in _common(a, b)]
    mean = fmean(gaps) if gaps else 0.0
    return Check(
        what, mean <= bound, f"mean |Δ logprob| {mean:.2g} (≤ {bound:g}), {equal}/{len(left)} equal"
    )


def _common(a: Completion, b: Completion) -> list[float]:
    """Return |Δ logprob| up to the first token that differs."""
    gaps = []
    for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True):
        if x != y:
            break
        gaps.append(abs(p - q))
    return gaps


def _same(what: str, left: list[Completion], right: list[Completion]) -> Check:
    different = sum(a != b for a, b in zip(left, right, strict=True))
    return Check(what, different == 0, f"{len(left) - different} of {len(left)} identical")


def _rank_bucket(tenants: Sequence[Path], family: Path) -> int:
    """Return the smallest --max-lora-rank for every tenant composed with the vector.

    Errors: ConfigError if vLLM has no such rank.
    """
    from safegene_vllm.formats.adapter import read_adapter_shapes

    own = max((s.rank for t in tenants for s in read_adapter_shapes(t).values()), default=0)
    extra = max(s.rank for s in read_family_header(family).sites.values())
    return rank_bucket(max(8, own + extra))


def _with_row(tenant: Path | None, target: Path, family: Path, value: float) -> Path:
    """Copy `tenant` (None: no adapter) with this coefficient on all selected layers."""
    if tenant is None:
        target.mkdir()
    else:
        shutil.copytree(tenant, target)
    save_profile(make_profile(read_family_header(family), value, {"method": "verify"}), target)
    return target


def _without_profile(tenant: Path, target: Path) -> Path | None:
    """Copy a tenant's adapter without its profile; None if it has no adapter."""
    if slot_kind(tenant) == "profile":
        return None
    shutil.copytree(tenant, target, ignore=shutil.ignore_patterns("safegene.json"))
    return target


def _full_checkpoint(model: Path, tenant: Path, target: Path) -> Path:
    """Link the model's files into a directory with the tenant's profile."""
    target.mkdir()
    for path in model.iterdir():
        if path.name != "safegene.json":
            (target / path.name).symlink_to(path.resolve())
    save_profile(load_profile(tenant), target)
    return target
