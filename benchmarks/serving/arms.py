"""Arms of the serving benchmark, and which of them are compared with each other.

An arm's name is its kind, the share of layers with a vector and the number of distinct profiles:
`gain_50_p8` is the gain table with a vector on 50 % of the layers and 8 profiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from safegene_vllm.errors import ConfigError

TITLES = {
    "base": "stock vLLM, base model only",
    "lora_stock": "LoRA tenants without safety, stock vLLM",
    "lora": "LoRA tenants without safety, our LoRA product",
    "gain": "gain table",
    "aside": "the same engine, vector disabled",
    "composed": "composed slots",
    "exported_stock": "adapters merged offline, stock vLLM",
    "exported": "adapters merged offline, our LoRA product",
    "weights": "weight load",
    "merged": "the same checkpoint merged on disk",
    "reloaded": "weight load's engine, merged checkpoint reloaded",
    "guard": "a guard request before every request",
    "system_prompt": "a safety system prompt",
}
WITHOUT_TENANTS = ("base", "weights", "merged", "reloaded")
OFFLINE = ("exported_stock", "exported")
PROTECTED = ("gain", "composed", "weights")
"""Kinds whose vector the plugin applies, and whose workers report receipts."""
PLUGIN = ("lora", "exported", *PROTECTED)
"""Kinds whose engine runs with the plugin."""
WITH_VECTOR = (*PROTECTED, *OFFLINE, "aside", "merged", "reloaded")
REQUEST_KINDS = ("guard", "system_prompt")
"""Kinds that change the requests and share the baseline's engine."""
CPU_ONLY = ("lora", "exported")
"""Our LoRA product exists on CPU alone; a GPU uses vLLM's."""

_NAME = re.compile(r"([a-z_]+?)(?:_(\d+))?(?:_p(\d+))?")


@dataclass(frozen=True)
class Arm:
    """One arm: per cent of `layers` with a vector, distinct `profiles` (None: one per tenant).

    Arms that differ in the worker's state alone (`worker_state`) share one process, so that their
    ratio contains nothing else.
    """

    kind: str
    layers: int = 0
    profiles: int | None = None

    @property
    def name(self) -> str:
        layers = f"_{self.layers}" if self.layers else ""
        return f"{self.kind}{layers}" + ("" if self.profiles is None else f"_p{self.profiles}")

    @property
    def title(self) -> str:
        parts = [TITLES[self.kind]] + ([f"{self.layers} % of layers"] if self.layers else [])
        if self.profiles is not None:
            parts.append(f"{self.profiles} profile{'s' if self.profiles > 1 else ''}")
        return ", ".join(parts)

    @property
    def has_tenants(self) -> bool:
        return self.kind not in WITHOUT_TENANTS

    @property
    def worker_state(self) -> str:
        """Argument of `Switch.switch_safety` before a run of this arm."""
        if self.kind in ("aside", "reloaded"):
            return self.kind
        return "all" if self.profiles is None else str(self.profiles)

    @property
    def shares_engine(self) -> bool:
        return self.kind in REQUEST_KINDS or self.worker_state != "all"

    def engine(self, on_cpu: bool) -> Arm:
        """The arm whose engine serves this one."""
        if self.worker_state != "all":
            return Arm("weights" if self.kind == "reloaded" else "gain", self.layers)
        return Arm(baseline(on_cpu)) if self.kind in REQUEST_KINDS else self


def baseline(on_cpu: bool) -> str:
    """Kind of the tenants without safety on the LoRA product that protected arms use too."""
    return "lora" if on_cpu else "lora_stock"


def parse_arm(text: str) -> Arm:
    """Parse an arm's name. Raises: ConfigError listing the known kinds."""
    match = _NAME.fullmatch(text)
    kind = match[1] if match else ""
    if match is None or kind not in TITLES:
        raise ConfigError(
            f"no arm {text!r}; expected one of {', '.join(TITLES)}, those with a vector followed "
            "by its share of layers, such as gain_50, gain_100_p1"
        )
    layers = int(match[2]) if match[2] else (100 if kind in WITH_VECTOR else 0)
    profiles = int(match[3]) if match[3] else None
    if match[2] and (kind not in WITH_VECTOR or not 1 <= layers <= 100):
        raise ConfigError(f"arm {text!r}: 1 to 100 % of layers, and only of an arm with a vector")
    if profiles is not None and (kind != "gain" or profiles < 1):
        raise ConfigError(f"arm {text!r}: _pN, N at least 1, is for gain")
    return Arm(kind, layers, profiles)


def parse_arms(names: Iterable[str], on_cpu: bool) -> tuple[Arm, ...]:
    """The distinct arms of `names` that exist on this device."""
    arms = dict.fromkeys(parse_arm(name) for name in names)
    return tuple(arm for arm in arms if on_cpu or arm.kind not in CPU_ONLY)


def comparisons(arms: Sequence[Arm], on_cpu: bool) -> list[tuple[Arm, Arm]]:
    """(arm, what it is compared with) for every ratio that is reported of one cell.

    Everything over its baseline; the gain table over every other way to add safety, and over itself
    without its vector or with fewer profiles; our LoRA product over vLLM's where both run.
    """
    base = baseline(on_cpu)

    def compared(arm: Arm, other: Arm) -> bool:
        kinds = (arm.kind, other.kind)
        if arm == other:
            return False
        if kinds == ("gain", "gain"):
            return arm.layers == other.layers and (arm.profiles or inf) > (other.profiles or inf)
        if kinds == ("gain", "aside"):
            return arm.layers == other.layers
        return (
            (other.kind == base and arm.has_tenants)
            or (arm.kind == "gain" and other.kind in ("composed", *OFFLINE, *REQUEST_KINDS))
            or (arm.kind == "weights" and other.kind in ("merged", "reloaded", "base"))
            or kinds in (("lora", "lora_stock"), ("gain", "lora_stock"), (base, "base"))
        )

    return [(arm, other) for arm in arms for other in arms if compared(arm, other)]
