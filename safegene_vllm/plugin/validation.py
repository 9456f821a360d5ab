"""Lets a tenant in, or says why not: the one gate every adapter passes before it can be served.

For copying a tenant's files to staging, validating the copy against the family and the engine, and
remembering what was admitted. Not for serving it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.composition import compose_adapter
from safegene_vllm.errors import AdapterRejectedError, SafegeneError
from safegene_vllm.formats.adapter import Adapter, load_adapter
from safegene_vllm.formats.profile import Profile, check_profile, has_profile, load_profile
from safegene_vllm.plugin import compat

if TYPE_CHECKING:
    from safegene_vllm.plugin.worker_runtime import WorkerRuntime

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Tenant:
    """An admitted tenant: immutable, loaded only from `staged`.

    `content` is the digest of all its files, `weights` of its adapter's alone (None without one).
    """

    name: str
    path: str
    staged: Path
    profile: Profile | None
    sites: int
    content: str
    weights: str | None

    @property
    def has_adapter(self) -> bool:
        return self.weights is not None


def validate_adapter(request: Any, runtime: WorkerRuntime) -> tuple[Tenant, Adapter | None]:
    """Stage and validate the tenant behind a LoRARequest; with its adapter, if it was read for it.

    Changes nothing of the guest but what it has staged, so a thread may do it.
    Errors: FormatError (a file), FamilyMismatchError and BoundsError (its profile),
    AdapterRejectedError (path, missing profile, rank, sites, values). Nothing is kept then.
    """
    name, path = request.lora_name, request.lora_path
    source = Path(path)
    if not runtime.settings.adapter_roots:
        source = Path(compat.resolve("get_adapter_absolute_path")(path))
    copy = runtime.staging.copy(source, name, runtime.settings.adapter_roots)
    staged = copy.directory
    try:
        profile = _profile_of(staged, name, runtime)
        own = [(f, d) for f, d in copy.digests.items() if f in (CONFIG, WEIGHTS)]
        weights = _digest_of(own) if own else None
        sites, adapter = (
            (0, None) if weights is None else _fitting(weights, staged, profile, name, runtime)
        )
        _check_composed(adapter, profile, name, runtime)
        tenant = Tenant(
            name=name,
            path=path,
            staged=staged,
            profile=profile,
            sites=sites,
            content=_digest_of(copy.digests.items()),
            weights=weights,
        )
    except SafegeneError as error:
        runtime.staging.drop(staged)
        message = str(error).replace(str(staged), path)
        prefix = "" if repr(name) in message else f"tenant {name!r} ({path}): "
        raise type(error)(prefix + message) from error
    except Exception:
        runtime.staging.drop(staged)
        raise
    return tenant, adapter


def _profile_of(staged: Path, name: str, runtime: WorkerRuntime) -> Profile | None:
    """The tenant's profile, checked against the family; None only in the open mode."""
    if not has_profile(staged):
        if runtime.settings.missing_profile == "serve_unprotected":
            return None
        raise AdapterRejectedError(
            f"tenant {name!r} has no safegene.json, so it would be served unprotected. Give it a "
            "profile of this family, or set safegene.missing_profile to "
            '"serve_unprotected" to allow tenants without one.'
        )
    profile = load_profile(staged)
    if runtime.plan.header is None:
        raise AdapterRejectedError(
            f"tenant {name!r} carries a profile for family {profile.family}, but this engine has "
            "no family loaded; set safegene.family."
        )
    check_profile(profile, runtime.plan.header)
    return profile


def _fitting(
    weights: str, staged: Path, profile: Profile | None, name: str, runtime: WorkerRuntime
) -> tuple[int, Adapter | None]:
    """How many sites the adapter has, all of them seen to fit; and what was read of it.

    What fits does not depend on the profile, unless it is composed: an adapter that another
    revision has brought in is not read again. Errors: as `load_adapter` and `_check_fit`.
    """
    twin = runtime.twin(weights)
    if twin is not None and runtime.settings.apply != "composed":
        return twin.sites, None
    adapter = load_adapter(staged)
    _check_fit(adapter, profile, name, runtime)
    return len(adapter.lora_weights), adapter


def _check_fit(
    adapter: Adapter, profile: Profile | None, name: str, runtime: WorkerRuntime
) -> None:
    """Errors: AdapterRejectedError for sites the engine cannot adapt and ranks beyond its slots."""
    faults = runtime.site_faults(adapter.lora_weights)
    composed = runtime.settings.apply == "composed" and profile is not None
    sites = dict.fromkeys(
        [*adapter.lora_weights, *(runtime.family.lora_weights if runtime.family else ())]
    )
    for site in sites:
        own = adapter.lora_weights[site].rank if site in adapter.lora_weights else 0
        extra = 0
        if composed and runtime.family is not None and site in runtime.family.lora_weights:
            extra = runtime.family.lora_weights[site].rank
        if own + extra > runtime.max_rank:
            what = f"rank {own}" + (f" + {extra} of the vector" if extra else "")
            faults.append(f"{site} needs {what}, slots hold --max-lora-rank {runtime.max_rank}")
    _refuse(name, faults)


def _check_composed(
    adapter: Adapter | None, profile: Profile | None, name: str, runtime: WorkerRuntime
) -> None:
    """Errors: AdapterRejectedError for a sum of adapter and vector that its slot cannot hold."""
    if runtime.settings.apply == "composed" and profile is not None:
        assert runtime.family is not None
        _refuse(
            name,
            runtime.site_faults(compose_adapter(adapter, runtime.family, profile).lora_weights),
        )


def _refuse(name: str, faults: list[str]) -> None:
    """Errors: AdapterRejectedError if there are any."""
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise AdapterRejectedError(f"tenant {name!r}: " + "; ".join(faults[:5]) + more + ".")


def check_unchanged(tenant: Tenant, runtime: WorkerRuntime) -> None:
    """For whoever is about to serve it. Errors: AdapterRejectedError, and its staged copy is dropped,
    if the prefix cache may hold blocks of other content.

    The host keys cached blocks by (name, path): the same pair with other weights or coefficients
    would be answered from stale blocks.
    """
    key = (tenant.name, tenant.path)
    before = runtime.seen.setdefault(key, tenant.content)
    if before != tenant.content and runtime.prefix_cache:
        runtime.staging.drop(tenant.staged)
        raise AdapterRejectedError(
            f"tenant {tenant.name!r} at {tenant.path} has changed since it was first loaded; its "
            "cached prefixes would be stale. Load it under a new name or path (such as "
            f"'{tenant.name}@2'), or restart with --no-enable-prefix-caching."
        )


def _digest_of(parts: Iterable[tuple[str, str]]) -> str:
    """One digest of named digests, in the order of the names."""
    text = "".join(f"{name}\0{digest}\0" for name, digest in sorted(parts))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
