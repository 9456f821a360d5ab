"""Settings of an engine: `--additional-config '{"safegene": {...}}'` of vLLM.

All of them reach the GPU workers and enter vLLM's compile-cache key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import Profile, check_profile, load_profile

KEY = "safegene"
Apply = Literal["gain", "composed", "weights"]


class Settings(BaseModel):
    """SafeGene settings of one engine. Unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Path | None = Field(
        None, description="directory of the safety vector; null loads no vector (benchmarks only)"
    )
    apply: Apply | None = Field(
        None,
        description="gain (default), composed, or weights (implied by --load-format safegene)",
    )
    base_profile: Path | None = Field(
        None, description="profile of requests without an adapter (default: coefficients 0)"
    )
    profile: Path | None = Field(
        None, description="weights only: profile of the checkpoint (default: its own safegene.json)"
    )
    missing_profile: Literal["refuse", "serve_unprotected"] = Field(
        "refuse", description="handling of a tenant without a profile"
    )
    adapter_roots: tuple[Path, ...] = Field(
        (),
        description="if set, adapters load only from below these, and through no symlink but a "
        "Hugging Face snapshot's to its blobs",
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="gain on a GPU: auto uses the Triton kernels if they pass the self-test at "
        "load, triton does not start without them, torch never uses them",
    )
    staging_dir: Path | None = Field(
        None, description="directory of the workers' private copies (default: the temp directory)"
    )
    family_digest: str | None = Field(
        None, description="written by the worker: puts the vector into the compile-cache key"
    )
    kernels_used: str | None = Field(
        None, description="written by the worker: puts the kernels into the compile-cache key"
    )


def parse_settings(additional_config: object, *, load_format: str = "auto") -> Settings | None:
    """Parse the settings of an engine; None if `additional_config` has no `safegene` key.

    Errors: ConfigError naming every bad key, its value and what is expected.
    """
    if not isinstance(additional_config, Mapping) or additional_config.get(KEY) is None:
        if load_format == "safegene":
            raise ConfigError(
                "--load-format safegene needs "
                '--additional-config \'{"safegene": {"family": "<family directory>"}}\'; '
                "found no `safegene` key there."
            )
        return None
    raw: Any = additional_config[KEY]
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"additional-config key `safegene` is {type(raw).__name__}, expected an object such as "
            '{"family": "<family directory>"}.'
        )
    try:
        settings = Settings.model_validate(dict(raw))
    except ValidationError as error:
        problems = "; ".join(
            f"safegene.{'.'.join(map(str, each['loc']))} = {each.get('input')!r}: {each['msg']}"
            for each in error.errors()
        )
        known = ", ".join(Settings.model_fields)
        raise ConfigError(f"{problems}. Known keys: {known}.") from None
    return _complete(settings, load_format)


def _complete(settings: Settings, load_format: str) -> Settings:
    """Fill in `apply`, and reject combinations that contradict each other."""
    by_format: Apply = "weights" if load_format == "safegene" else "gain"
    apply = settings.apply or by_format
    if (apply == "weights") != (load_format == "safegene"):
        raise ConfigError(
            f"safegene.apply = {apply!r} with --load-format {load_format}: `weights` and "
            "`--load-format safegene` go together; use both or neither."
        )
    if settings.family is None:
        if settings.missing_profile == "refuse" or apply == "weights" or settings.base_profile:
            raise ConfigError(
                "safegene.family is missing: give the family directory. (To run without a "
                'vector, set {"family": null, "missing_profile": "serve_unprotected"}.)'
            )
    elif not settings.family.is_dir():
        raise ConfigError(
            f"safegene.family = {str(settings.family)!r} is not a directory; expected a family "
            "made by `safegene extract`."
        )
    if settings.base_profile is not None and apply != "gain":
        raise ConfigError(
            f"safegene.base_profile = {str(settings.base_profile)!r} with apply = {apply!r}: only "
            "the gain table can protect requests without an adapter; use apply = 'gain'."
        )
    if settings.profile is not None and apply != "weights":
        raise ConfigError(
            f"safegene.profile = {str(settings.profile)!r} is for --load-format safegene; LoRA "
            "tenants carry their own safegene.json, requests without one use safegene.base_profile."
        )
    return settings.model_copy(update={"apply": apply})


@dataclass(frozen=True)
class EnginePlan:
    """What one engine has to apply: checked settings, family header, profile of the base model."""

    settings: Settings
    header: FamilyHeader | None
    base_profile: Profile | None


def read_engine_plan(vllm_config: Any) -> EnginePlan | None:
    """Read the plan of an engine from its two small files; None without a `safegene` key.

    Errors: ConfigError, FormatError, FamilyMismatchError, BoundsError.
    """
    load_format = str(vllm_config.load_config.load_format)
    settings = parse_settings(vllm_config.additional_config, load_format=load_format)
    if settings is None:
        return None
    if settings.family is None:
        return EnginePlan(settings, None, None)
    header = read_family_header(settings.family)
    source = settings.base_profile
    if settings.apply == "weights":
        source = settings.profile or Path(vllm_config.model_config.model)
    base_profile = None if source is None else load_profile(source)
    if base_profile is not None:
        check_profile(base_profile, header)
    return EnginePlan(settings, header, base_profile)
