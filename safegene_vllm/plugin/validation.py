"""Validation of adapters: every adapter passes it before a worker can serve it.

Copies a tenant's files to staging and checks the copy against the family and the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safegene_vllm.composition import compose_adapter
from safegene_vllm.errors import AdapterRejectedError, SafegeneError
from safegene_vllm.formats.adapter import Adapter, load_adapter
from safegene_vllm.formats.family import Family
from safegene_vllm.formats.profile import Profile, check_profile, has_profile, load_profile
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.staging import Staging
from safegene_vllm.plugin.target_modules import EngineShape
from safegene_vllm.settings import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Tenant:
    """A validated tenant: immutable, loaded only from `staged`.

    `content` is the digest of all its files, `weights` of its adapter's files (None without one).
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
        """Whether it is more than a profile on the base model."""
        return self.weights is not None


@dataclass(frozen=True)
class AdapterValidator:
    """Checks of one engine; safe to call from several threads.

    `family` is the loaded vector or None; `find_same_weights` returns a validated tenant whose
    adapter has the given digest, or None.
    """

    settings: Settings
    family: Family | None
    engine: EngineShape
    staging: Staging
    find_same_weights: Callable[[str], Tenant | None]

    def validate(self, name: str, path: str) -> tuple[Tenant, Adapter | None]:
        """Stage and validate a tenant; return it with its adapter, if that had to be read.

        Errors: FormatError (a file), FamilyMismatchError and BoundsError (its profile),
        AdapterRejectedError (path, missing profile, rank, target modules, values). The staged copy
        is removed then.
        """
        source = Path(path)
        if not self.settings.adapter_roots:
            source = Path(compat.resolve("get_adapter_absolute_path")(path))
        copy = self.staging.copy(source, name, self.settings.adapter_roots)
        staged = copy.directory
        try:
            profile = self._profile(staged, name)
            own = [(f, d) for f, d in copy.digests.items() if f in (CONFIG, WEIGHTS)]
            weights = _digest_of(own) if own else None
            sites, adapter = 0, None
            if weights is not None:
                sites, adapter = self._check_adapter(weights, staged, profile, name)
            if self.settings.apply == "composed" and profile is not None:
                assert self.family is not None
                composed = compose_adapter(adapter, self.family, profile)
                _reject(name, self.engine.mismatches(composed.lora_weights))
            content = _digest_of(copy.digests.items())
            return Tenant(name, path, staged, profile, sites, content, weights), adapter
        except SafegeneError as error:
            self.staging.drop(staged)
            message = str(error).replace(str(staged), path)
            prefix = "" if repr(name) in message else f"tenant {name!r} ({path}): "
            raise type(error)(prefix + message) from error
        except Exception:
            self.staging.drop(staged)
            raise

    def _profile(self, staged: Path, name: str) -> Profile | None:
        """Return the profile, checked against the family; None only in the unprotected mode."""
        if not has_profile(staged):
            if self.settings.missing_profile == "serve_unprotected":
                return None
            raise AdapterRejectedError(
                f"tenant {name!r} has no safegene.json, so it would be served unprotected. Give it "
                "a profile of this family, or set safegene.missing_profile to "
                '"serve_unprotected" to allow tenants without one.'
            )
        profile = load_profile(staged)
        if self.family is None:
            raise AdapterRejectedError(
                f"tenant {name!r} carries a profile for family {profile.family}, but this engine "
                "has no family loaded; set safegene.family."
            )
        check_profile(profile, self.family.header)
        return profile

    def _check_adapter(
        self, weights: str, staged: Path, profile: Profile | None, name: str
    ) -> tuple[int, Adapter | None]:
        """Return the number of target modules, and the adapter if it was read.

        Errors: those of `load_adapter`; AdapterRejectedError.
        """
        # Unless it is composed, the check does not depend on the profile: once per adapter.
        same = self.find_same_weights(weights)
        if same is not None and self.settings.apply != "composed":
            return same.sites, None
        adapter = load_adapter(staged)
        problems = self.engine.mismatches(adapter.lora_weights)
        vector = {} if self.family is None else self.family.lora_weights
        composed = self.settings.apply == "composed" and profile is not None
        for site in dict.fromkeys([*adapter.lora_weights, *vector]):
            own = adapter.lora_weights[site].rank if site in adapter.lora_weights else 0
            extra = vector[site].rank if composed and site in vector else 0
            if own + extra > self.engine.max_rank:
                needs = f"rank {own}" + (f" + {extra} of the vector" if extra else "")
                problems.append(
                    f"{site} needs {needs}, slots hold --max-lora-rank {self.engine.max_rank}"
                )
        _reject(name, problems)
        return len(adapter.lora_weights), adapter


def _reject(name: str, problems: list[str]) -> None:
    """Errors: AdapterRejectedError if there are problems; it lists the first five."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterRejectedError(f"tenant {name!r}: " + "; ".join(problems[:5]) + more + ".")


def _digest_of(parts: Iterable[tuple[str, str]]) -> str:
    """Return one digest of named digests, in the order of the names."""
    text = "".join(f"{name}\0{digest}\0" for name, digest in sorted(parts))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
