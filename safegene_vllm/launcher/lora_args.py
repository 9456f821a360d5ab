"""LoRA flags of vLLM for the modes with LoRA slots: number, rank, target modules.

Flags the user left out are filled in; given ones that are too small for the tenants are rejected.
"""

from __future__ import annotations

import json

from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.launcher.artifacts import Artifacts
from safegene_vllm.launcher.vllm_args import ServeOptions, VllmArgs, absolute
from safegene_vllm.planner.slots import LORA_RANKS
from safegene_vllm.settings import Settings

LORA_FLAGS = ("enable-lora", "max-loras", "max-cpu-loras", "max-lora-rank", "lora-target-modules")
UNNAMED_RANK = 16
MIN_SLOTS = 4
REGISTRY_ADAPTERS = 256
"""Number of a registry's adapters cached in host memory."""


def lora_contradictions(options: ServeOptions, flags: VllmArgs, settings: Settings) -> list[str]:
    """Flags that contradict LoRA slots, each message naming both sides."""
    found = []
    if flags.given("no-enable-lora"):
        found.append(f"--no-enable-lora with --apply {settings.apply}: tenants need LoRA slots")
    slots, given = options.slots, flags.number("max-loras")
    if slots is not None and slots < 1:
        found.append(f"--slots {slots}: expected at least 1")
    if slots is not None and given is not None and slots != given:
        found.append(f"--slots {slots} and --max-loras {given}: two names of one setting; give one")
    cpu = flags.number("max-cpu-loras")
    if cpu is not None and cpu < (needed := _slots(options, flags)):
        found.append(f"--max-cpu-loras {cpu} is below --max-loras {needed}")
    outside = {"lm_head", "embed_tokens"} & set(flags.values("lora-target-modules"))
    if outside:
        found.append(
            f"--lora-target-modules {' '.join(sorted(outside))}: adapters there are rejected, and "
            "wrapping lm_head makes prompt_logprobs fail on CPU; leave it out"
        )
    return found


def _slots(options: ServeOptions, flags: VllmArgs) -> int:
    tenants = len(options.tenants) + len(flags.values("lora-modules"))
    return options.slots or flags.number("max-loras") or max(MIN_SLOTS, tenants)


def lora_arguments(
    options: ServeOptions, flags: VllmArgs, settings: Settings, artifacts: Artifacts
) -> list[str]:
    """Fill in the LoRA flags. Errors: ConfigError for given ones that are too small."""
    slots = _slots(options, flags)
    needed = artifacts.rank(composed=settings.apply == "composed", others=UNNAMED_RANK)
    bucket = next((rank for rank in LORA_RANKS if rank >= needed), None)
    modules = artifacts.modules()
    problems: list[SafegeneError] = []
    given = flags.number("max-lora-rank")
    vector = " and the composed vector" if settings.apply == "composed" else ""
    if bucket is None:
        problems.append(
            ConfigError(f"tenants{vector} need rank {needed}, vLLM allows up to {LORA_RANKS[-1]}.")
        )
    elif given is not None and artifacts.tenants and given < needed:
        problems.append(
            ConfigError(
                f"--max-lora-rank {given}: the tenants{vector} need rank {needed}; give {bucket} "
                "or leave it out."
            )
        )
    targets = flags.values("lora-target-modules")
    missing = sorted(set(modules) - set(targets))
    if targets and missing:
        problems.append(
            ConfigError(
                f"--lora-target-modules {' '.join(targets)} leaves out {', '.join(missing)}, which "
                "the family or a tenant needs; add them or leave the flag out."
            )
        )
    raise_errors(problems)
    cached = REGISTRY_ADAPTERS if options.server_config is not None else 0
    ours: dict[str, list[str]] = {
        "enable-lora": [],
        "max-loras": [str(slots)],
        "max-cpu-loras": [str(max(slots, len(artifacts.tenants), cached))],
        "max-lora-rank": [str(bucket)],
    }
    if modules:
        ours["lora-target-modules"] = modules
    return [
        token
        for name, values in ours.items()
        if not flags.given(name)
        for token in (f"--{name}", *values)
    ]


def module_arguments(options: ServeOptions) -> list[str]:
    """Build --lora-modules from the user's own entries, unchanged, and the tenants."""
    entries = VllmArgs(tuple(options.vllm_args)).values("lora-modules")
    for name, path in options.tenants.items():
        directory = str(absolute(path))
        plain = "," not in f"{name}{directory}"
        entry = {"name": name, "path": directory}
        entries.append(f"{name}={directory}" if plain else json.dumps(entry))
    return ["--lora-modules", *entries] if entries else []
