"""Cells of the serving benchmark: one setting of every axis, and the arms that are compared there.

One axis at a time is varied around one center. Arms are compared within a cell only, on engines
with equal settings, in interleaved rounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.serving.arms import Arm, baseline, parse_arms
from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class Load:
    """Requests of one run: lengths in tokens, and how many are in flight at any time."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    guard_tokens: int = 192
    system_tokens: int = 160


@dataclass(frozen=True)
class Cell:
    """One setting of the axes. Ranks are of the tenants' adapters and of the vector."""

    name: str
    tenants: int
    rank: int
    vector_rank: int
    load: Load
    compiled: bool = False
    arms: tuple[Arm, ...] = ()
    starts: int = 1
    """Starts per engine, interleaved: more than one where start-up is compared."""
    in_turns: bool = False
    """Whether the worker also times its steps with and without the vector in turn."""
    engine: dict[str, Any] = field(default_factory=dict, hash=False)
    """vLLM flags by name, equal for all arms."""

    def settings(self) -> dict[str, Any]:
        """Everything a result depends on besides arms, commit and machine, as JSON values."""
        found = asdict(self)
        del found["arms"], found["name"]
        return found

    @property
    def digest(self) -> str:
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Axes:
    """Values of every axis; the first of each is the center, around which the others are varied."""

    tenants: Sequence[int] = (4, 1, 16, 64)
    profiles: Sequence[int] = (64, 8, 1)
    prompt_tokens: Sequence[int] = (128, 512)
    output_tokens: Sequence[int] = (64, 16)
    concurrency: Sequence[int] = (8, 1, 16)
    rank: Sequence[int] = (16, 8, 32, 64)
    layers: Sequence[int] = (50, 100, 25)
    mode: Sequence[str] = ("eager", "compiled")


LARGE_TENANTS, LARGE_RANK = 8, 64
"""A cell whose LoRA slots are as large as the base model, so that bandwidth decides."""

GROUPS = (
    *("main", "paired", "by_hand", "checkpoint", "layers", "profiles"),
    *("tenants", "rank", "length", "concurrency", "mode"),
)


def make_cells(
    axes: Axes, center: Cell, groups: Sequence[str], *, on_cpu: bool, starts: int = 5
) -> list[Cell]:
    """The cells of `groups`. `starts`: engine starts where loading a checkpoint is compared.

    Raises: ConfigError for an unknown group or an axis value below 1.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ConfigError(f"no cells {', '.join(unknown)}; expected some of {', '.join(GROUPS)}")
    counts = (*axes.tenants, *axes.profiles, *axes.concurrency, *axes.rank)
    if min(counts) < 1:
        raise ConfigError(f"{min(counts)}: tenants, profiles, concurrency and ranks are at least 1")
    base, load = baseline(on_cpu), center.load
    first, second = axes.layers[0], axes.layers[min(1, len(axes.layers) - 1)]
    short = [base, f"gain_{first}", "gain_100", "composed_100"]
    large = "exported_100" if on_cpu else "exported_stock_100"

    def gain_and_aside(percents: Iterable[int]) -> list[str]:
        return [f"{kind}_{n}" for n in percents for kind in ("gain", "aside")]

    def cell(name: str, arms: Sequence[str], **changes: Any) -> Cell:
        made = replace(center, name=name, arms=parse_arms(arms, on_cpu), **changes)
        requests = max(made.load.requests, made.tenants if "tenants" in changes else 0)
        return replace(made, load=replace(made.load, requests=requests))

    def axis(name: str, **changes: Any) -> Cell:
        return cell(name, [*short, "aside_100"], in_turns=True, **changes)

    profiles = ["gain_100", *(f"gain_100_p{n}" for n in sorted(axes.profiles)[:-1])]
    lengths = [
        (f"prompt_{p}_output_{o}", replace(load, prompt_tokens=p, output_tokens=o))
        for p in axes.prompt_tokens
        for o in axes.output_tokens
    ]
    cells = {
        "main": [cell("main", ["base", "lora_stock", *short, "guard", "system_prompt"])],
        "paired": [cell("paired", gain_and_aside((first, second)), in_turns=True)],
        "by_hand": [
            cell("by_hand", [base, "gain_100", "exported_100", "exported_stock_100"]),
            cell(
                "by_hand_large",
                [base, "gain_100", large],
                tenants=LARGE_TENANTS,
                rank=LARGE_RANK,
            ),
        ],
        "checkpoint": [
            cell(
                "checkpoint",
                ["base", "merged_100", "weights_100", "reloaded_100"],
                starts=starts,
            )
        ],
        "layers": [cell("layers", [base, *gain_and_aside(sorted(axes.layers))], in_turns=True)],
        "profiles": [cell("profiles", profiles, tenants=max(axes.profiles))],
        "tenants": [axis(f"tenants_{n}", tenants=n) for n in axes.tenants[1:]],
        "rank": [axis(f"rank_{n}", rank=n) for n in axes.rank[1:]],
        "length": [axis(name, load=changed) for name, changed in lengths if changed != load],
        "concurrency": [
            axis(f"concurrency_{n}", load=replace(load, concurrency=n))
            for n in axes.concurrency[1:]
        ],
        "mode": [cell(mode, short, compiled=mode == "compiled") for mode in axes.mode[1:]],
    }
    return [made for group in GROUPS if group in groups for made in cells[group]]
