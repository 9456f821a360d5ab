"""`safegene degrade`: weaken an aligned model's safety slightly, by a short benign fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import check_out, results, show_checks
from safegene_vllm.cli.data import SOURCE_HELP, need, read_all, steps
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError


def degrade(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=local_checkpoint,
            help="The aligned checkpoint, a directory or a hub name, e.g. models/qwen-instruct.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Benign instructions with responses; may be repeated. "
            + SOURCE_HELP
            + "--data 'instructions.jsonl?licence=Apache-2.0&limit=500'. Harmless data only: "
            "weakening safety needs no harmful data."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the LoRA is written, e.g. --out runs/degraded.")],
    steps_: Annotated[
        int,
        typer.Option(
            "--steps", help="Training steps; a light degradation is enough, e.g. --steps 60."
        ),
    ] = 60,
    lr: Annotated[float, typer.Option(help="Learning rate at its peak, e.g. --lr 3e-4.")] = 3e-4,
    batch: Annotated[int, typer.Option(help="Examples per step, e.g. --batch 8.")] = 8,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA, e.g. --rank 8.")] = 8,
    answer_tokens: Annotated[
        int, typer.Option(help="Longer responses are cut here, e.g. --answer-tokens 64.")
    ] = 64,
    seed: Annotated[
        int, typer.Option(help="Same seed, same bytes on the same machine, e.g. --seed 1.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Where it runs, e.g. --device cuda:1 (default: a GPU if available).")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing LoRA at OUT.")
    ] = False,
) -> None:
    """Fine-tune briefly on benign data; `extract` distils the safety that this costs.

    After an interruption, the same command continues where it stopped.

    Example: safegene degrade models/qwen --data 'alpaca.jsonl?licence=Apache-2.0' --out runs/deg
    """
    from safegene_vllm.formats.adapter import OWNED_FILES
    from safegene_vllm.recipe.degradation import RECORD_FILE

    check_out(out, checkpoint, overwrite=overwrite, owned=(*OWNED_FILES, RECORD_FILE))
    need("peft", "trains the LoRA")
    benign = read_all(data, "benign data", need_answers=True)
    if benign is None:
        raise ConfigError("--data: give at least one set of benign instructions with responses")
    from safegene_vllm.recipe.checks import FINE_TUNE_ADVICE, check_training
    from safegene_vllm.recipe.encoding import Example
    from safegene_vllm.recipe.finetune import FineTune, fine_tune

    settings = FineTune(
        steps=steps_,
        lr=lr,
        batch=batch,
        rank=rank,
        alpha=2 * rank,
        max_answer_tokens=answer_tokens,
        seed=seed,
    )
    examples = [Example(row.prompt, row.answer or "") for row in benign.rows]
    with steps("degrading") as progress:
        losses = fine_tune(
            checkpoint,
            examples,
            settings,
            out,
            base_model=checkpoint.resolve().name,
            data=benign.record(),
            device=device,
            progress=progress,
        )
    results().print(
        f"{out}  {len(losses)} steps on {len(examples)} examples of {benign.name} "
        f"({benign.licence}), loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    show_checks([check_training(losses, "fine-tune", FINE_TUNE_ADVICE)])
