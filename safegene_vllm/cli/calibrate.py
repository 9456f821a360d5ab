"""`safegene calibrate`: find a tenant's coefficients from a few examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.console import coefficient_table, results, show_checks, table
from safegene_vllm.cli.data import SOURCE_HELP, read_all, steps
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.dataset import Dataset
    from safegene_vllm.formats.family import Family
    from safegene_vllm.recipe.calibration import Calibration


def calibrate(
    family: Annotated[Path, typer.Argument(help="The family, e.g. families/qwen2.5-7b.")],
    tenant: Annotated[
        Path,
        typer.Argument(
            help="The tenant's directory, where the profile is written: a LoRA on --model, a full "
            "checkpoint, or an empty directory for a profile alone, e.g. tenants/acme."
        ),
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
    model: Annotated[
        Path | None,
        typer.Option(
            parser=local_checkpoint, help="The LoRA's base checkpoint, e.g. --model models/qwen."
        ),
    ] = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmless prompts that must still be answered, mainly look-alikes, e.g. "
            "--benign 'lookalike.jsonl?licence=MIT'."
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
    lr: Annotated[
        float, typer.Option(help="Step size of the coefficients, e.g. --lr 0.15.")
    ] = 0.15,
    task_weight: Annotated[
        float,
        typer.Option(
            help="Weight of the task loss, e.g. --task-weight 4 to preserve the task more."
        ),
    ] = 2.0,
    benign_weight: Annotated[
        float, typer.Option(help="Weight of the benign loss, e.g. --benign-weight 2.")
    ] = 2.0,
    initial: Annotated[
        float, typer.Option(help="Start value of every coefficient, e.g. --initial 0.5.")
    ] = 1.0,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied", help="One number for all layers instead of one per layer, e.g. --tied."
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Draws the examples; same seed, same profile on one machine, e.g. --seed 1."
        ),
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Where it runs, e.g. --device cuda (default: a GPU if available).")
    ] = "auto",
) -> None:
    """Find the coefficients with which this tenant refuses harm and still does its task.

    The model is loaded once and never changed. After an interruption, the same command continues.

    Example: safegene calibrate families/qwen tenants/acme --model models/qwen --safety
    'advbench.csv?licence=MIT' --task 'tickets.jsonl?licence=private' --shots 16
    """
    harmful = read_all(safety, "safety data")
    own = read_all(task, "task data", labels=True)
    harmless = read_all(benign or [], "benign data")
    if harmful is None or own is None:
        raise ConfigError("give --safety and --task: calibration needs examples of both")
    from safegene_vllm.formats.family import load_family
    from safegene_vllm.recipe.calibration import Calibration

    settings = Calibration(
        steps=steps_,
        lr=lr,
        task=task_weight,
        benign=benign_weight,
        initial=initial,
        tied=tied,
        seed=seed,
    )
    data = (harmful, own, harmless)
    calibrate_tenant(load_family(family), tenant, model, data, shots, settings, device)


def calibrate_tenant(
    family: Family,
    tenant: Path,
    model: Path | None,
    data: tuple[Dataset, Dataset, Dataset | None],
    shots: int,
    settings: Calibration,
    device: str,
) -> bool:
    """Calibrate a tenant, write its profile and print it; whether every check passed.

    `data`: safety, task and benign, of which `shots` rows each are drawn.
    """
    from safegene_vllm.formats.metadata import DESCRIPTION_FILE
    from safegene_vllm.formats.profile import save_profile
    from safegene_vllm.recipe.calibration import calibrate, check_inputs, load_tenant
    from safegene_vllm.recipe.checks import calibration_checks
    from safegene_vllm.recipe.examples import check_classes, sample_rows
    from safegene_vllm.recipe.training import Run

    safety, task, benign = data
    check_classes(task)
    chosen = (
        sample_rows(safety, shots, settings.seed),
        sample_rows(task, shots, settings.seed),
        None if benign is None else sample_rows(benign, shots, settings.seed),
    )
    header = family.header
    check_inputs(header, *chosen, settings)
    loaded = load_tenant(header, tenant, model, device=device)
    directory = tenant.absolute()
    state = directory.with_name(f"{directory.name}.calibration.partial")
    job = {
        "family": family.digest,
        "tenant": tenant.resolve().name,
        "settings": str(settings),
        "data": [None if d is None else d.digest for d in chosen],
    }
    run = Run(state, job, [tenant, model])
    with steps("calibrating") as progress:
        profile = calibrate(
            loaded,
            family,
            safety=chosen[0],
            task=chosen[1],
            benign=chosen[2],
            settings=settings,
            run=run,
            progress=progress,
        )
    save_profile(profile, tenant)
    run.clear()
    record = profile.calibration
    losses = table("held out", "without", "with", left=("held out",))
    for kind, value in record["before"].items():
        losses.add_row(kind, f"{value:.3f}", f"{record['after'][kind]:.3f}")
    results().print(losses)
    results().print(coefficient_table(profile.coefficients))
    results().print(f"{tenant / DESCRIPTION_FILE}  {profile.digest}  {record['steps']} steps")
    carried = [profile.coefficients[entry.layer] for entry in header.layers]
    return show_checks(calibration_checks(record, carried, header.bounds))
