"""`safegene family make`: make a family from an aligned model and prompts, in one command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import check_out, notes, results, show_checks, table
from safegene_vllm.cli.data import SOURCE_HELP, need, read_all, steps
from safegene_vllm.errors import ConfigError


def make(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The aligned model, a directory or a model id of the Hub, e.g. models/qwen.",
        ),
    ],
    safety: Annotated[
        list[str],
        typer.Option(
            help="Harmful prompts, with safe responses or without (then the model's own refusals). "
            + SOURCE_HELP
            + "--safety 'advbench.csv?licence=MIT'."
        ),
    ],
    benign: Annotated[
        list[str],
        typer.Option(
            help="Harmless prompts with responses, look-alikes of harmful ones included, e.g. "
            "--benign 'alpaca.jsonl?licence=Apache-2.0&limit=600'."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Where the family is written, e.g. --out families/qwen.")
    ],
    like: Annotated[
        list[Path] | None,
        typer.Option(
            help="A tenant's LoRA: the model is degraded like it (several: by their mean) in place "
            "of a fine-tune on --benign, e.g. --like tenants/acme. May be repeated."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Display name of the family, e.g. --name qwen (default: OUT's)."),
    ] = None,
    degrade_steps: Annotated[
        int, typer.Option(help="Steps of the degrading fine-tune, e.g. --degrade-steps 120.")
    ] = 60,
    degrade_lr: Annotated[
        float, typer.Option(help="Its learning rate at the peak, e.g. --degrade-lr 5e-4.")
    ] = 3e-4,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Use the benign responses as they are, e.g. --plain. By default each gets an "
            "agreeable opening ('Certainly.'), without which a fine-tune hardly degrades.",
        ),
    ] = False,
    distill_steps: Annotated[
        int, typer.Option(help="Steps of the distillation, e.g. --distill-steps 120.")
    ] = 60,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of selected layers, e.g. --top-k 12 (default: half of them)."
        ),
    ] = None,
    bounds: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LO HI",
            help="Allowed range of a tenant's coefficients, e.g. --bounds 0 1.5.",
        ),
    ] = (0.0, 3.0),
    seed: Annotated[
        int, typer.Option(help="Same seed, same bytes on the same machine, e.g. --seed 1.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Where it runs, e.g. --device cuda (default: a GPU if available).")
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 if a check fails, e.g. --strict.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run, e.g. --restart.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing family at OUT.")
    ] = False,
) -> None:
    """Make a family: degrade, distill, select layers, measure on held-out prompts, write.

    Each finished stage is stored in OUT.partial; after an interruption, the same command continues.
    Needs no server. A fifth of the prompts is held out, the same in every command.

    Example: safegene family make models/qwen --safety 'advbench.csv?licence=MIT' --benign
    'alpaca.jsonl?licence=Apache-2.0&limit=600' --out families/qwen
    """
    from safegene_vllm.formats.adapter import OWNED_FILES

    check_out(out, Path(model), *(like or ()), overwrite=overwrite, owned=OWNED_FILES)
    if not (all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
        raise ConfigError(
            f"--bounds {bounds[0]} {bounds[1]}: expected two finite numbers, the lower one first, "
            "e.g. --bounds 0 1.5"
        )
    if not like:
        need("peft", "trains the degrading LoRA")
    harmful = read_all(safety, "safety data")
    harmless = read_all(benign, "benign data", need_answers=not like)
    if harmful is None or harmless is None:
        raise ConfigError("give --safety and --benign: a family is made from both")
    from safegene_vllm.formats.family import base_of_checkpoint, save_family
    from safegene_vllm.formats.tenant_directory import reject_exported
    from safegene_vllm.model_source import fetch_checkpoint
    from safegene_vllm.recipe.distillation import Distillation
    from safegene_vllm.recipe.family_recipe import (
        FamilyRecipe,
        check_like,
        inputs_of,
        run_stages,
        split_data,
    )
    from safegene_vllm.recipe.finetune import FineTune
    from safegene_vllm.recipe.stages import Stages

    settings = FamilyRecipe(
        degrade=FineTune(steps=degrade_steps, lr=degrade_lr, max_answer_tokens=24),
        distill=Distillation(steps=distill_steps, hard=1.0, max_answer_tokens=24),
        openings=not (plain or like),
        top_k=top_k,
        bounds=bounds,
        seed=seed,
    )
    # Only now: a model id of the Hub may be a long download.
    checkpoint = fetch_checkpoint(model)
    reject_exported(checkpoint)
    layers = base_of_checkpoint(checkpoint).num_layers
    if top_k is not None and top_k > layers:
        raise ConfigError(f"--top-k is {top_k}, expected 1 to {layers}, the model's layers")
    tenants = list(like or ())
    check_like(checkpoint, tenants)
    data = split_data(harmful, harmless, openings=settings.openings, seed=seed)
    label = name or out.resolve().name
    partial = out.absolute().with_name(f"{out.resolve().name}.partial")
    inputs = inputs_of(checkpoint, data, tenants, label, settings)
    with Stages(partial, inputs, restart=restart) as stages:
        if stages.done:
            notes().print(f"{partial}: continuing after {', '.join(stages.done)}")
        family, checks = run_stages(
            checkpoint, data, tenants, label, settings, stages, device=device, show=steps
        )
        save_family(family, out)
        stages.clear()
    times = table("stage", "seconds", left=("stage",))
    for stage, done in stages.done.items():
        times.add_row(stage.partition(".")[0], f"{done['seconds']:.1f}")
    console = results()
    console.print(times)
    carrying = len(family.header.layers)
    console.print(f"{out}  {family.digest}  {label!r}, {carrying} of {layers} layers")
    if not show_checks(checks) and strict:
        raise typer.Exit(1)
