"""`safegene extract`: make a family from an aligned and a degraded model."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegene_vllm.cli.console import (
    bar,
    check_out,
    notes,
    results,
    show_checks,
    table,
    tracked,
)
from safegene_vllm.cli.data import SOURCE_HELP, read_all, steps
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from safegene_vllm.dataset import Dataset
    from safegene_vllm.formats.family import Family
    from safegene_vllm.recipe.checks import Check
    from safegene_vllm.recipe.difference import Difference, Scope
    from safegene_vllm.recipe.training import Run

DEFAULT_RANK = 16
DISTILL_RANK = 8
_MAX_LAYERS = 10_000


class Method(StrEnum):
    difference = "difference"
    distill = "distill"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Parse `0-3,7` into ascending layer numbers. Errors: ConfigError naming `option`."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{option}: {part!r} is no layer; write for example 0-3,7")
        if int(last or first) >= _MAX_LAYERS:
            raise ConfigError(f"{option}: no model has a layer {last or first}")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise ConfigError(f"{option}: {text!r} names no layer; write for example 0-3,7")
    return tuple(sorted(found))


def _show(difference: Difference) -> None:
    rows = table("layer", "modules", "‖ΔW‖", "captured", "", left=("",))
    for row in difference.by_layer():
        rows.add_row(
            str(row.layer),
            str(row.sites),
            f"{row.norm:.4g}",
            f"{row.captured:.2%}",
            bar(row.captured, 1.0),
        )
    results().print(rows)
    if difference.left_out:
        shown = ", ".join(difference.left_out[:3])
        notes().print(
            f"note: {len(difference.left_out)} tensors that LoRA cannot represent differ too "
            f"({shown}{', ...' if difference.left_out[3:] else ''}); the vector leaves them out"
        )


def extract(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=local_checkpoint,
            help="The aligned checkpoint, a directory or a hub name, e.g. models/qwen-instruct; "
            "with --aligned-adapter, the base that the adapter aligns.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Where the family is written, e.g. --out families/qwen.")
    ],
    degraded: Annotated[
        Path | None,
        typer.Argument(
            parser=local_checkpoint,
            help="The degraded checkpoint: the same model after a light fine-tune on benign data, "
            "e.g. models/qwen-degraded.",
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="difference = W_aligned - W_degraded, without training; distill = LoRA weights "
            "trained so that the degraded model answers --safety prompts like the aligned one and "
            "--benign prompts as before."
        ),
    ] = Method.difference,
    safety: Annotated[
        list[str] | None,
        typer.Option(
            help="distill: harmful prompts; the aligned model answers those without a response. "
            + SOURCE_HELP
            + "--safety 'advbench.csv?licence=MIT'."
        ),
    ] = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(
            help="distill: harmless prompts, look-alikes of harmful ones included, e.g. --benign "
            "'instructions.jsonl?licence=MIT&limit=300'."
        ),
    ] = None,
    steps_: Annotated[
        int, typer.Option("--steps", help="distill: training steps, e.g. --steps 200.")
    ] = 120,
    lr: Annotated[
        float, typer.Option(help="distill: learning rate at its peak, e.g. --lr 1e-3.")
    ] = 1e-3,
    batch: Annotated[
        int, typer.Option(help="distill: examples per step, half of them safety, e.g. --batch 8.")
    ] = 8,
    retention: Annotated[
        float,
        typer.Option(help="distill: weight of unchanged benign completions, e.g. --retention 2."),
    ] = 1.0,
    hard: Annotated[
        float,
        typer.Option(
            help="distill: weight of the safe responses as hard labels, in addition to the aligned "
            "model's probabilities, e.g. --hard 1."
        ),
    ] = 0.0,
    hidden: Annotated[
        float, typer.Option(help="distill: weight of matching hidden states, e.g. --hidden 0.1.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(help="distill: same seed, same bytes on the same machine, e.g. --seed 1.")
    ] = 0,
    degraded_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Instead of DEGRADED: the LoRA that degraded the model, e.g. --degraded-adapter "
            "runs/benign-lora. The vector is minus that LoRA, exactly."
        ),
    ] = None,
    aligned_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Instead of DEGRADED: the LoRA that aligns the base, e.g. --aligned-adapter "
            "runs/refusal-lora. The vector is that LoRA, exactly."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help=f"Maximum rank per module of a difference of checkpoints, e.g. --rank 32 "
            f"(default {DEFAULT_RANK}), or of a distilled vector (default {DISTILL_RANK}). A "
            "higher rank captures more and costs more per token; a LoRA keeps its own."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, e.g. --layers 4-11,20 (default: all).")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Only these target modules, e.g. --sites q_proj,v_proj,mlp.down_proj "
            "(default: all linear weights inside the layers)."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Stored dtype, e.g. --dtype bfloat16 for half the size (default: float32; a LoRA "
            "keeps its own dtype where that is exact; distill always rounds to bfloat16)."
        ),
    ] = None,
    bounds: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LO HI",
            help="Allowed range of a tenant's coefficients, e.g. --bounds 0 1.5.",
        ),
    ] = (0.0, 3.0),
    name: Annotated[
        str | None,
        typer.Option(help="Display name of the family, e.g. --name qwen2.5-7b (default: OUT's)."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Device of the SVD (in float64) or the distillation, e.g. --device cuda "
            "(default: for distill a GPU if available, else the CPU)."
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing family at OUT.")
    ] = False,
) -> None:
    """Make a family: one safety vector for all fine-tunes of a model.

    After an interruption, the same command continues a distillation.

    Example: safegene extract models/qwen models/qwen-degraded --rank 16 --out families/qwen
    """
    others = [degraded, degraded_adapter, aligned_adapter]
    if sum(other is not None for other in others) != 1:
        raise ConfigError("give one of DEGRADED, --degraded-adapter and --aligned-adapter")
    from safegene_vllm.formats.adapter import OWNED_FILES

    check_out(out, checkpoint, *others, overwrite=overwrite, owned=OWNED_FILES)
    if not (all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
        raise ConfigError(
            f"--bounds {bounds[0]} {bounds[1]}: expected two finite numbers, the lower one first, "
            "e.g. --bounds 0 1.5"
        )
    parts = tuple(part.strip() for part in sites.split(",")) if sites else None
    chosen = parse_layers(layers) if layers else None
    import torch

    as_stored = None if dtype is None else getattr(torch, dtype.value)
    label = name or out.resolve().name
    run: Run | None = None
    checks: list[Check] = []
    if method is Method.distill:
        if aligned_adapter is not None:
            raise ConfigError(
                "--method distill needs an aligned CHECKPOINT and its degraded copy: merge the "
                "adapter into its base first"
            )
        if chosen is not None:
            raise ConfigError(
                "--layers: choose the layers of a distilled vector by `safegene select`"
            )
        family, run, checks = _distilled(
            checkpoint,
            degraded,
            degraded_adapter,
            out,
            read_all(safety or [], "safety data"),
            read_all(benign or [], "benign data"),
            {
                "steps": steps_,
                "lr": lr,
                "batch": batch,
                "rank": DISTILL_RANK if rank is None else rank,
                "retention": retention,
                "hard": hard,
                "hidden": hidden,
                "modules": parts,
                "seed": seed,
            },
            (label, bounds, as_stored, device),
        )
    else:
        if safety or benign:
            raise ConfigError(
                "--safety and --benign are for --method distill; a difference needs none"
            )
        if rank is not None and degraded is None:
            raise ConfigError("--rank: a LoRA keeps its own rank; leave the option out")
        from safegene_vllm.recipe.checks import check_captured
        from safegene_vllm.recipe.difference import Scope, as_family

        difference = _difference(
            checkpoint,
            degraded,
            degraded_adapter,
            aligned_adapter,
            rank=rank,
            scope=Scope(chosen, parts),
            device="cpu" if device == "auto" else device,
        )
        family = as_family(difference, label, bounds=bounds, dtype=as_stored)
        _show(difference)
        if degraded is not None:
            checks = [check_captured(difference.captured, "ΔW is in the vector")]
    from safegene_vllm.formats.family import save_family

    save_family(family, out)
    if run is not None:
        run.clear()
    results().print(f"{out}  {family.digest}  {len(family.lora_weights)} target modules")
    if checks:
        show_checks(checks)


def _difference(
    checkpoint: Path,
    degraded: Path | None,
    degraded_adapter: Path | None,
    aligned_adapter: Path | None,
    *,
    rank: int | None,
    scope: Scope,
    device: str,
) -> Difference:
    from safegene_vllm.recipe.difference import between_checkpoints, of_adapter

    if degraded is not None:
        return between_checkpoints(
            checkpoint,
            degraded,
            rank=DEFAULT_RANK if rank is None else rank,
            scope=scope,
            device=device,
            track=tracked("extracting"),
        )
    if degraded_adapter is not None:
        return of_adapter(checkpoint, degraded_adapter, "degraded", scope=scope)
    assert aligned_adapter is not None
    return of_adapter(checkpoint, aligned_adapter, "aligned", scope=scope)


def _distilled(
    checkpoint: Path,
    degraded: Path | None,
    degraded_adapter: Path | None,
    out: Path,
    safety: Dataset | None,
    benign: Dataset | None,
    settings: dict[str, Any],
    made_as: tuple[str, tuple[float, float], torch.dtype | None, str],
) -> tuple[Family, Run, list[Check]]:
    if safety is None or benign is None:
        raise ConfigError("--method distill needs --safety and --benign prompts")
    from safegene_vllm.formats.family import make_family
    from safegene_vllm.recipe.checks import DISTILLATION_ADVICE, check_training
    from safegene_vllm.recipe.distillation import Distillation, distill

    label, bounds, dtype, device = made_as
    with steps("distilling") as progress:
        made = distill(
            checkpoint,
            safety=safety,
            benign=benign,
            degraded=degraded,
            degraded_adapter=degraded_adapter,
            settings=Distillation(**settings),
            state=out.with_name(f"{out.name}.partial"),
            device=device,
            progress=progress,
        )
    results().print(f"loss {made.losses[0]:.3f} to {made.losses[-1]:.3f}")
    family = make_family(
        label, made.base, made.lora_weights, bounds=bounds, recipe=made.recipe, dtype=dtype
    )
    return family, made.run, [check_training(made.losses, "distillation", DISTILLATION_ADVICE)]
