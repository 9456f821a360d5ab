"""What is varied: one cell is one setting of all axes, and the arms that are compared there.

Around one center, one axis at a time. Arms are compared within a cell only, on engines with the
same settings, in interleaved rounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from arms import Arm, fair_base, on_this_device, parse_arm
from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class Load:
    """What is asked: lengths in tokens; `concurrency` requests are in flight at any time."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    guard_tokens: int = 192
    system_tokens: int = 160


@dataclass(frozen=True)
class Cell:
    """One setting of the axes. Ranks are of tenants' adapters and of the vector."""

    name: str
    tenants: int
    rank: int
    vector_rank: int
    load: Load
    compiled: bool = False
    arms: tuple[Arm, ...] = ()
    starts: int = 1
    """How often each engine is started, in turn: more than once where start-up is compared."""
    changes: int = 3
    """How many loads and changes of a tenant are timed per arm."""
    in_turns: bool = False
    """Whether steps with and without the vector are timed in turn, beside the runs."""
    engine: dict[str, Any] = field(default_factory=dict, hash=False)
    """Engine settings that are the same for all arms: vLLM flags by name."""

    def settings(self) -> dict[str, Any]:
        """All that a result depends on but commit and machine, as JSON values; not the arms."""
        told = asdict(self)
        del told["arms"], told["name"]
        return told

    @property
    def digest(self) -> str:
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Axes:
    """The values of every axis; the first of each is the center, at which the others are varied."""

    tenants: Sequence[int] = (4, 1, 16, 64)
    profiles: Sequence[int] = (64, 8, 1)
    prompt_tokens: Sequence[int] = (128, 512)
    output_tokens: Sequence[int] = (64, 16)
    concurrency: Sequence[int] = (8, 1, 16)
    rank: Sequence[int] = (16, 8, 32, 64)
    layers: Sequence[int] = (50, 100, 25)
    mode: Sequence[str] = ("eager", "compiled")


LARGE_TENANTS, LARGE_RANK = 8, 64
"""Where slots weigh as much as the base: doubling their rank bucket is then a matter of bytes."""

GROUPS = (
    *("main", "paired", "by_hand", "checkpoint", "layers", "profiles"),
    *("tenants", "rank", "length", "concurrency", "mode"),
)


def _arms(names: Sequence[str], on_cpu: bool) -> tuple[Arm, ...]:
    found = dict.fromkeys(parse_arm(name) for name in names)
    return on_this_device(list(found), on_cpu)


def make_cells(
    axes: Axes, center: Cell, groups: Sequence[str], *, on_cpu: bool, starts: int = 5
) -> list[Cell]:
    """The cells of `groups`, in house order; those with tenants have their fair base among them.

    `starts`: how often engines are started where loading a checkpoint is compared.

    Errors: ConfigError for an unknown group, or an axis value that cannot be.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ConfigError(f"no cells {', '.join(unknown)}; expected some of {', '.join(GROUPS)}")
    few = [n for n in (*axes.tenants, *axes.profiles, *axes.concurrency, *axes.rank) if n < 1]
    if few:
        raise ConfigError(f"{few[0]}: tenants, profiles, concurrency and ranks are at least 1")
    fair = fair_base(on_cpu)
    half, whole = f"gain_{axes.layers[0]}", "gain_100"
    short = (fair, half, whole, "composed_100")
    around = (*short, "aside_100")
    found = {
        "main": [
            replace(
                center,
                name="main",
                arms=_arms(
                    ("base", "lora_stock", *short, "guard", "system_prompt"),
                    on_cpu,
                ),
            )
        ],
        "paired": [
            replace(
                center,
                name="paired",
                in_turns=True,
                arms=_arms(
                    [f"{kind}_{n}" for n in axes.layers[:2] for kind in ("gain", "aside")], on_cpu
                ),
            )
        ],
        "by_hand": [
            replace(
                center,
                name="by_hand",
                arms=_arms((fair, whole, "exported_100", "exported_stock_100"), on_cpu),
            ),
            replace(
                center,
                name="by_hand_large",
                tenants=LARGE_TENANTS,
                rank=LARGE_RANK,
                arms=_arms(
                    (fair, whole, "exported_100" if on_cpu else "exported_stock_100"), on_cpu
                ),
            ),
        ],
        "checkpoint": [
            replace(
                center,
                name="checkpoint",
                arms=_arms(("base", "merged_100", "weights_100", "reloaded_100"), on_cpu),
                starts=starts,
            )
        ],
        "layers": [
            replace(
                center,
                name="layers",
                in_turns=True,
                arms=_arms(
                    (
                        fair,
                        *(f"{kind}_{n}" for n in sorted(axes.layers) for kind in ("gain", "aside")),
                    ),
                    on_cpu,
                ),
            )
        ],
        "profiles": [
            replace(
                center,
                name="profiles",
                tenants=max(axes.profiles),
                load=_at_least(center.load, max(axes.profiles)),
                arms=_arms([whole, *(f"{whole}_p{n}" for n in sorted(axes.profiles)[:-1])], on_cpu),
            )
        ],
        "tenants": [
            replace(
                center,
                name=f"tenants_{n}",
                tenants=n,
                load=_at_least(center.load, n),
                arms=_arms(around, on_cpu),
                in_turns=True,
            )
            for n in axes.tenants[1:]
        ],
        "rank": [
            replace(center, name=f"rank_{n}", rank=n, arms=_arms(around, on_cpu), in_turns=True)
            for n in axes.rank[1:]
        ],
        "length": [
            replace(
                center,
                name=f"prompt_{p}_output_{o}",
                load=replace(center.load, prompt_tokens=p, output_tokens=o),
                arms=_arms(around, on_cpu),
                in_turns=True,
            )
            for p in axes.prompt_tokens
            for o in axes.output_tokens
            if (p, o) != (center.load.prompt_tokens, center.load.output_tokens)
        ],
        "concurrency": [
            replace(
                center,
                name=f"concurrency_{n}",
                load=replace(center.load, concurrency=n),
                arms=_arms(around, on_cpu),
                in_turns=True,
            )
            for n in axes.concurrency[1:]
        ],
        "mode": [
            replace(center, name=mode, compiled=mode == "compiled", arms=_arms(short, on_cpu))
            for mode in axes.mode[1:]
        ],
    }
    return [cell for group in GROUPS if group in groups for cell in found[group]]


def _at_least(load: Load, tenants: int) -> Load:
    """Enough requests that every tenant is asked."""
    return replace(load, requests=max(load.requests, tenants))
