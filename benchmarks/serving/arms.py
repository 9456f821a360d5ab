"""What is compared: the arms of the serving benchmark, by names that say what they are.

`gain_50_p8` is the gain table with a vector on 50 % of the layers and 8 distinct profiles. How an
arm is started is launching's business, what it is asked loadgen's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from safegene_vllm.errors import ConfigError

TITLES = {
    "base": "stock vLLM, base model only",
    "lora_stock": "LoRA tenants without safety, stock vLLM",
    "lora": "LoRA tenants without safety, our LoRA product",
    "gain": "gain table",
    "aside": "the same engine with its vector set aside",
    "composed": "composed slots",
    "exported_stock": "adapters merged by hand, stock vLLM",
    "exported": "adapters merged by hand, our LoRA product",
    "weights": "weight load",
    "merged": "the same checkpoint merged on disk",
    "reloaded": "weight load's engine, the checkpoint merged on disk read into it",
    "guard": "a guard request before every request",
    "system_prompt": "a safety system prompt",
}
WITH_VECTOR = (
    *("gain", "aside", "composed", "exported_stock", "exported"),
    *("weights", "merged", "reloaded"),
)
WITHOUT_TENANTS = ("base", "weights", "merged", "reloaded")
OURS = ("lora", "gain", "composed", "exported", "weights")
"""Kinds whose engine runs with the plugin."""
BY_HAND = ("exported_stock", "exported")
PROTECTED = ("gain", "composed", "weights")
"""Kinds that the plugin applies the vector of, and whose workers say so in receipts."""
RIDERS = ("guard", "system_prompt")
"""Kinds that differ in what is asked, of the fair base's engine."""
CPU_ONLY = ("lora", "exported")
"""Our LoRA product exists on CPU alone; on a GPU the host's own serves."""

_NAME = re.compile(r"([a-z_]+?)(?:_(\d+))?(?:_p(\d+))?")


@dataclass(frozen=True)
class Arm:
    """One arm. `layers`: per cent of layers with a vector; `profiles` None: one per tenant.

    An arm that differs from another only in what the engine is told (`safety`) has no engine of its
    own: both share a process, so that nothing else can differ.
    """

    kind: str
    layers: int = 0
    profiles: int | None = None

    @property
    def name(self) -> str:
        share = f"_{self.layers}" if self.layers else ""
        return f"{self.kind}{share}" + ("" if self.profiles is None else f"_p{self.profiles}")

    @property
    def title(self) -> str:
        told = [f"{self.layers} % of layers"] if self.layers else []
        if self.profiles is not None:
            told.append(f"{self.profiles} profile{'s' if self.profiles > 1 else ''}")
        return TITLES[self.kind] + (f", {', '.join(told)}" if told else "")

    @property
    def has_tenants(self) -> bool:
        return self.kind not in WITHOUT_TENANTS

    @property
    def safety(self) -> str:
        """What the engine is told before this arm is asked (see switching)."""
        if self.kind in ("aside", "reloaded"):
            return self.kind
        return "all" if self.profiles is None else str(self.profiles)

    @property
    def rides(self) -> bool:
        """Whether it is asked of another arm's engine."""
        return self.kind in RIDERS or self.safety != "all"

    def engine(self, on_cpu: bool) -> Arm:
        """The arm whose engine answers for this one."""
        if self.safety != "all":
            return Arm("weights" if self.kind == "reloaded" else "gain", self.layers)
        return Arm(fair_base(on_cpu)) if self.kind in RIDERS else self


def fair_base(on_cpu: bool) -> str:
    """Tenants without safety on the LoRA product that the protected arms use too."""
    return "lora" if on_cpu else "lora_stock"


def parse_arm(text: str) -> Arm:
    """The arm of this name. Errors: ConfigError naming the known kinds."""
    match = _NAME.fullmatch(text)
    kind = match[1] if match else ""
    if match is None or kind not in TITLES:
        raise ConfigError(
            f"no arm {text!r}; expected one of {', '.join(TITLES)}, those with a vector followed "
            "by its share of layers, such as gain_50, gain_100_p1"
        )
    layers = int(match[2]) if match[2] else (100 if kind in WITH_VECTOR else 0)
    profiles = int(match[3]) if match[3] else None
    if (match[2] and kind not in WITH_VECTOR) or layers > 100 or (match[2] and layers < 1):
        raise ConfigError(f"arm {text!r}: 1 to 100 % of layers, and only of an arm with a vector")
    if profiles is not None and (kind != "gain" or profiles < 1):
        raise ConfigError(f"arm {text!r}: _pN, N at least 1, is for gain")
    return Arm(kind, layers, profiles)


def on_this_device(arms: Sequence[Arm], on_cpu: bool) -> tuple[Arm, ...]:
    """The arms that differ here; on a GPU our LoRA product is the host's."""
    return tuple(arm for arm in arms if on_cpu or arm.kind not in CPU_ONLY)


def comparisons(arms: Sequence[Arm], on_cpu: bool) -> list[tuple[Arm, Arm]]:
    """(arm, what it is compared with), for every ratio that is reported of one cell.

    Everything over its fair base; the gain table over every other way to add safety, and over
    itself without its vector or with fewer profiles; ours over the host's product where both are
    there.
    """
    found: list[tuple[Arm, Arm]] = []
    for arm in arms:
        for other in arms:
            if arm == other:
                continue
            over_fair = other.kind == fair_base(on_cpu) and arm.kind not in WITHOUT_TENANTS
            others = other.kind in ("composed", *BY_HAND, *RIDERS) and arm.kind == "gain"
            fewer = (
                arm.kind == other.kind == "gain"
                and arm.layers == other.layers
                and (arm.profiles or inf) > (other.profiles or inf)
            )
            aside = (arm.kind, arm.layers) == ("gain", other.layers) and other.kind == "aside"
            checkpoint = arm.kind == "weights" and other.kind in ("merged", "reloaded", "base")
            stock = (arm.kind, other.kind) in (("lora", "lora_stock"), ("gain", "lora_stock"))
            alone = arm.kind == fair_base(on_cpu) and other.kind == "base"
            if over_fair or others or fewer or aside or checkpoint or stock or alone:
                found.append((arm, other))
    return found
