"""`safegene select`: select the layers of a vector by activation contrast."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import bar, check_out, results, table
from safegene_vllm.cli.data import SOURCE_HELP, need, read_all, steps
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError


class Stream(StrEnum):
    update = "update"
    residual = "residual"


def select(
    family: Annotated[
        Path, typer.Argument(help="The family with all layers, e.g. families/qwen-all.")
    ],
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=local_checkpoint,
            help="The degraded checkpoint; with --degraded-adapter, the aligned one under that "
            "LoRA, e.g. models/qwen.",
        ),
    ],
    safety: Annotated[
        list[str],
        typer.Option(
            help="Harmful prompts. " + SOURCE_HELP + "--safety 'advbench.csv?licence=MIT'."
        ),
    ],
    benign: Annotated[
        list[str],
        typer.Option(
            help="Benign and task prompts; may be repeated, e.g. --benign "
            "'instructions.jsonl?licence=MIT&limit=100'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output family, e.g. --out families/qwen.")],
    degraded_adapter: Annotated[
        Path | None,
        typer.Option(help="The LoRA that degraded CHECKPOINT, e.g. --degraded-adapter runs/deg."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Number of selected layers, e.g. --top-k 12 (default: half of them)."),
    ] = None,
    mu: Annotated[
        float,
        typer.Option(help="Weight of the benign change in the score, e.g. --mu 1; 0 ignores it."),
    ] = 1.0,
    stream: Annotated[
        Stream,
        typer.Option(
            help="Compared activations: each layer's own update, or the residual stream after it, "
            "e.g. --stream residual."
        ),
    ] = Stream.update,
    name: Annotated[
        str | None,
        typer.Option(help="Display name of the family, e.g. --name qwen2.5-7b (default: OUT's)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the scores, e.g. --plot scores.svg (or .png).")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it runs, e.g. --device cuda (default: a GPU if available).")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing family at OUT.")
    ] = False,
) -> None:
    """Score every layer and select the best; all scores are stored in the family.

    Example: safegene select families/all models/qwen --degraded-adapter runs/deg --safety
    'advbench.csv?licence=MIT' --benign 'instructions.jsonl?licence=MIT' --out families/qwen
    """
    from safegene_vllm.formats.adapter import OWNED_FILES

    check_out(out, family, checkpoint, degraded_adapter, overwrite=overwrite, owned=OWNED_FILES)
    if plot is not None:
        if plot.suffix.lower() not in (".svg", ".png"):
            raise ConfigError(f"--plot {plot}: a plot is written as .svg or .png; name the file so")
        need("matplotlib", "draws the plot")
    harmful, others = read_all(safety, "safety data"), read_all(benign, "benign data")
    if harmful is None or others is None:
        raise ConfigError("give --safety and --benign: the score compares both kinds of prompts")
    from safegene_vllm.formats.family import load_family, save_family
    from safegene_vllm.formats.tenant_directory import check_fits
    from safegene_vllm.recipe.model import load_model
    from safegene_vllm.recipe.selection import contrast
    from safegene_vllm.recipe.selection import select as cut

    loaded_family = load_family(family)
    check_fits(checkpoint, loaded_family.header)
    if degraded_adapter is not None:
        check_fits(degraded_adapter, loaded_family.header)
    carrying = [entry.layer for entry in loaded_family.header.layers]
    k = max(1, len(carrying) // 2) if top_k is None else top_k
    if not 1 <= k <= len(carrying):
        raise ConfigError(f"--top-k is {k}, expected 1 to {len(carrying)}, the family's layers")
    loaded = load_model(checkpoint, degraded_adapter, device=device)
    with steps("scoring") as progress:
        found = contrast(
            loaded,
            loaded_family,
            safety=harmful,
            others=[others],
            mu=mu,
            stream=stream.value,
            progress=progress,
        )
    label = name or out.resolve().name
    selected = cut(loaded_family, found, k, data=[harmful, others], name=label)
    save_family(selected, out)
    chosen = {entry.layer for entry in selected.header.layers}
    rows = table("layer", "safety", "benign", "score", "", "selected", left=("", "selected"))
    top = max(map(abs, found.scores))
    for layer, score in enumerate(found.scores):
        rows.add_row(
            str(layer),
            f"{found.safety[layer]:.4f}",
            f"{found.others[layer]:.4f}",
            f"{score:.4f}",
            bar(max(score, 0.0), top),
            "yes" if layer in chosen else "",
        )
    results().print(rows)
    if plot is not None:
        from safegene_vllm.report.figure import save
        from safegene_vllm.report.plots import draw_layer_scores

        save(draw_layer_scores(dict(enumerate(found.scores)), chosen), plot)
    results().print(f"{out}  {selected.digest}  {len(chosen)} of {len(carrying)} layers")
