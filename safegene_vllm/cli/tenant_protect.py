"""`safegene tenant protect`: calibrate a LoRA adapter for a family, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.calibrate import calibrate_tenant
from safegene_vllm.cli.console import check_writable
from safegene_vllm.cli.data import SOURCE_HELP, read_all
from safegene_vllm.errors import ConfigError, MissingFileError


def base_of_adapter(adapter: Path) -> Path:
    """Local directory of the base that the adapter's configuration names.

    Errors: ConfigError if it names none, or one that is not found.
    """
    from safegene_vllm.formats.adapter import CONFIG_FILE
    from safegene_vllm.formats.file_io import read_json
    from safegene_vllm.model_source import fetch_checkpoint

    base = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter / CONFIG_FILE} names no base model; give it by --model")
    try:
        return fetch_checkpoint(base)
    except (ConfigError, MissingFileError) as error:
        raise ConfigError(
            f"{adapter / CONFIG_FILE} names the base model {base!r}, which is not found: {error} "
            "Give it by --model"
        ) from error


def protect(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="The tenant's LoRA adapter or full checkpoint, where safegene.json is written, "
            "e.g. tenants/acme.",
        ),
    ],
    family: Annotated[
        Path, typer.Option(help="The family's directory, e.g. --family families/qwen.")
    ],
    safety: Annotated[
        list[str],
        typer.Option(
            help="Harmful prompts, with safe responses or without (then a short refusal). "
            + SOURCE_HELP
            + "--safety 'advbench.csv?licence=MIT'."
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            help="The tenant's own task: prompts, with responses or without (then the tenant's "
            "own), e.g. --task 'reviews.jsonl?licence=private'."
        ),
    ],
    benign: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmless prompts that must still be answered, mainly look-alikes, e.g. "
            "--benign 'lookalike.jsonl?licence=MIT'."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The LoRA's base, a directory or a model id of the Hub, e.g. --model models/qwen "
            "(default: the one that its adapter_config.json names).",
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Examples drawn of each kind, a quarter held out, e.g. --shots 32.")
    ] = 16,
    steps_: Annotated[
        int,
        typer.Option(
            "--steps", help="Maximum number of steps; stops when converged, e.g. --steps 90."
        ),
    ] = 40,
    task_weight: Annotated[
        float,
        typer.Option(
            help="Weight of the task loss, e.g. --task-weight 4 to preserve the task more."
        ),
    ] = 2.0,
    benign_weight: Annotated[
        float, typer.Option(help="Weight of the benign loss, e.g. --benign-weight 4.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Draws the examples, e.g. --seed 1.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where it runs, e.g. --device cuda (default: a GPU if available).")
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 if a check fails, e.g. --strict.")
    ] = False,
) -> None:
    """Calibrate the coefficients of one tenant and write safegene.json in its directory.

    Needs no server. Examples are drawn from the part of the prompts that is not held out, the same
    part as in `safegene family make`. After an interruption, the same command continues.

    Example: safegene tenant protect tenants/acme --family families/qwen --safety
    'advbench.csv?licence=MIT' --task 'tickets.jsonl?licence=private'
    """
    from safegene_vllm.formats.family import load_family
    from safegene_vllm.formats.metadata import DESCRIPTION_FILE
    from safegene_vllm.formats.tenant_directory import kind_of

    if (kind := kind_of(adapter, new_profile=True)) not in ("adapter", "checkpoint"):
        raise ConfigError(
            f"{adapter} holds: {kind}, no LoRA adapter and no checkpoint to protect; name the "
            "tenant's directory, or use `safegene calibrate` for a profile on the base model"
        )
    check_writable(adapter / DESCRIPTION_FILE, f"{adapter}")
    loaded_family = load_family(family)
    harmful = read_all(safety, "safety data")
    own = read_all(task, "task data", labels=True)
    harmless = read_all(benign or [], "benign data")
    if harmful is None or own is None:
        raise ConfigError("give --safety and --task: calibration needs examples of both")
    from safegene_vllm.model_source import fetch_checkpoint
    from safegene_vllm.recipe.calibration import Calibration
    from safegene_vllm.recipe.examples import split_by_prompt

    data = [None if one is None else split_by_prompt(one)[0] for one in (harmful, own, harmless)]
    assert data[0] is not None and data[1] is not None
    if kind == "checkpoint" and model is not None:
        raise ConfigError(f"{adapter} is a full checkpoint; leave out --model {model}")
    base = None
    if kind == "adapter":
        base = base_of_adapter(adapter) if model is None else fetch_checkpoint(model)
    passed = calibrate_tenant(
        loaded_family,
        adapter,
        base,
        (data[0], data[1], data[2]),
        shots,
        Calibration(steps=steps_, task=task_weight, benign=benign_weight, seed=seed),
        device,
    )
    if strict and not passed:
        raise typer.Exit(1)
