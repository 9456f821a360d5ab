"""`safegene extract`: a family from the difference between an aligned and a degraded model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.terminal import bar, check_out, notes, results, table, tracked
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.recipe.difference import Difference

DEFAULT_RANK = 16
_MOST_LAYERS = 10_000


class Method(StrEnum):
    difference = "difference"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """`0-3,7` as numbers, ascending and each once. Errors: ConfigError naming `option`."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{option}: {part!r} is no layer; write for example 0-3,7")
        if int(last or first) >= _MOST_LAYERS:
            raise ConfigError(f"{option}: no model has a layer {last or first}")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise ConfigError(f"{option}: {text!r} names no layer; write for example 0-3,7")
    return tuple(sorted(found))


def _show(difference: Difference) -> None:
    rows = table("layer", "sites", "‖ΔW‖", "captured", "", left=("",))
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
            f"note: {len(difference.left_out)} tensors that no pair can hold differ as well "
            f"({shown}{', ...' if difference.left_out[3:] else ''}); the vector does not carry them"
        )


def extract(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="The aligned checkpoint, e.g. models/qwen-instruct; with --aligned-adapter, the "
            "base that the adapter aligns."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Where the family is written, e.g. --out families/qwen.")
    ],
    degraded: Annotated[
        Path | None,
        typer.Argument(
            help="The degraded checkpoint: the same model after a light fine-tune on benign data, "
            "e.g. models/qwen-degraded."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(help="How the vector is made: difference = W_aligned - W_degraded."),
    ] = Method.difference,
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
            help=f"Largest rank per site of a difference of checkpoints, e.g. --rank 32 (default "
            f"{DEFAULT_RANK}). More captures more and costs more per token; a LoRA keeps its own."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, e.g. --layers 4-11,20 (default: all).")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Only sites with these name endings, e.g. --sites q_proj,v_proj,mlp.down_proj "
            "(default: all linear weights inside the layers)."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="What the vector is stored as, e.g. --dtype bfloat16 for half the size (default: "
            "float32; a LoRA keeps its own dtype where that loses nothing)."
        ),
    ] = None,
    bounds: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LO HI",
            help="What a tenant's coefficients may be, e.g. --bounds 0 1.5.",
        ),
    ] = (0.0, 3.0),
    name: Annotated[
        str | None,
        typer.Option(help="The family's name for people, e.g. --name qwen2.5-7b (default: OUT's)."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the SVD runs, e.g. --device cuda; it is done in float64.")
    ] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the family that is at OUT already.")
    ] = False,
) -> None:
    """Make a family: one safety vector for all fine-tunes of a model.

    Example: safegene extract models/qwen models/qwen-degraded --rank 16 --out families/qwen
    """
    others = [degraded, degraded_adapter, aligned_adapter]
    if sum(other is not None for other in others) != 1:
        raise ConfigError("give one of DEGRADED, --degraded-adapter and --aligned-adapter")
    if rank is not None and degraded is None:
        raise ConfigError("--rank: a LoRA is taken at its own rank; leave the option out")
    check_out(out, checkpoint, *others, overwrite=overwrite)
    import torch

    from safegene_vllm.family import save_family
    from safegene_vllm.recipe.difference import Scope, as_family, between_checkpoints, of_adapter

    scope = Scope(
        parse_layers(layers) if layers else None,
        tuple(part.strip() for part in sites.split(",")) if sites else None,
    )
    if degraded is not None:
        difference = between_checkpoints(
            checkpoint,
            degraded,
            rank=DEFAULT_RANK if rank is None else rank,
            scope=scope,
            device=device,
            track=tracked("extracting"),
        )
    elif degraded_adapter is not None:
        difference = of_adapter(checkpoint, degraded_adapter, "degraded", scope=scope)
    else:
        assert aligned_adapter is not None
        difference = of_adapter(checkpoint, aligned_adapter, "aligned", scope=scope)
    family = as_family(
        difference,
        name or out.resolve().name,
        bounds=bounds,
        dtype=None if dtype is None else getattr(torch, dtype.value),
    )
    save_family(family, out)
    _show(difference)
    results().print(f"{out}  {family.digest}  {len(family.pairs)} sites")
