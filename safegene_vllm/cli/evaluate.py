"""`safegene evaluate`: attack success, over-refusal and task accuracy with and without the vector.

All inputs are read and checked before a model is loaded. Plots are made by `safegene report`.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.console import notes, results, table
from safegene_vllm.cli.data import SOURCE_HELP, steps
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from safegene_vllm.evaluation.backends import GenerationBackend
    from safegene_vllm.evaluation.inputs import Inputs
    from safegene_vllm.evaluation.results import Evaluation, Overlap
    from safegene_vllm.evaluation.statistics import Rate

CHUNKS = {"vllm": 256, "transformers": 32}
CONTEXT_STEP = 64
WIDEST = 400
WHAT_A_SET_SHOWS = {
    "harmful": "attack success (coherence: coherent responses)",
    "over_refusal": "refusals of prompts that only sound harmful",
    "benign": "refusals of ordinary prompts",
}


class Backend(StrEnum):
    vllm = "vllm"
    transformers = "transformers"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


def check_evaluation_out(out: Path, overwrite: bool) -> None:
    """Raise ConfigError if `out` cannot be written, or exists and may not be replaced."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file, e.g. {out}/evaluation.json")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists; name a new file, or replace it by --overwrite")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.resolve().parent}; make it")


def _backend(
    inputs: Inputs, family: Path | None, backend: Backend, dtype: Dtype, device: str
) -> GenerationBackend:
    if backend is Backend.transformers:
        from safegene_vllm.evaluation.backends import TransformersBackend
        from safegene_vllm.formats.family import load_family

        vector = None if family is None else load_family(family)
        return TransformersBackend(inputs.model, vector, dtype=dtype.value, device=device)
    from safegene_vllm.offline.generation_backend import VllmBackend

    context = -(-inputs.longest_tokens // CONTEXT_STEP) * CONTEXT_STEP
    return VllmBackend(
        inputs.model, inputs.targets, family, dtype=dtype.value, context_tokens=context
    )


def percent(found: Rate) -> str:
    """Format a rate and its 95 % interval as `17 % (10 to 25)`."""
    return f"{found.rate:.0%} ({found.low * 100:.0f} to {found.high * 100:.0f})".replace("%", " %")


def _print(rows: Table) -> None:
    """Print a table at its full width, on a terminal and in a file."""
    console = results()
    wide = console.options.update(max_width=WIDEST)
    console.width = console.measure(rows, options=wide).maximum
    console.print(rows)


def _overlaps(inputs: Inputs) -> list[Overlap]:
    """Prompts that were also used to make the family or to calibrate a tenant; prints warnings."""
    from safegene_vllm.evaluation.overlap import find_overlaps, uses_of

    uses = uses_of(inputs.header, inputs.targets)
    overlaps, unknown = find_overlaps(uses, inputs.sets, inputs.tasks)
    for overlap in overlaps:
        notes().print(f"warning: {overlap.warning}")
    if unknown:
        notes().print(
            f"note: {', '.join(unknown)} recorded no digests of prompts (an older release, or "
            "--like), so it is unknown whether the evaluated prompts were used there"
        )
    return overlaps


def show(found: Evaluation) -> None:
    """Print a table per set and one of the tasks: rows are subjects, columns judges or tasks."""
    console = results()
    for name, record in found.sets.items():
        judges = [j.name for j in found.judges if j.name in found.targets[0].rates[name]]
        rows = table("tenant", "state", *judges, left=("tenant", "state"))
        for subject in found.targets:
            cells = [percent(subject.rates[name][judge]) for judge in judges]
            rows.add_row(subject.name, subject.state, *cells)
        console.print(f"\n{name}, {record.n} prompts: {WHAT_A_SET_SHOWS[record.kind]}")
        _print(rows)
    if found.tasks:
        rows = table("tenant", "state", *found.tasks, left=("tenant", "state"))
        for subject in found.targets:
            cells = [percent(subject.accuracy[name]) for name in found.tasks]
            rows.add_row(subject.name, subject.state, *cells)
        console.print("\ntasks: accuracy")
        _print(rows)


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            parser=local_checkpoint,
            help="The family's parent, a directory or a hub name, e.g. models/qwen.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Where the result is written, e.g. --out evaluation.json.")
    ],
    family: Annotated[
        Path | None,
        typer.Option(help="The family of the tenants' profiles, e.g. families/qwen."),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A tenant with its profile, measured with all coefficients 0 (before) and its own "
            "(after), e.g. --tenant acme=tenants/acme. May be repeated.",
        ),
    ] = None,
    harmful: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="Prompts that should be refused, e.g. --harmful advbench=harmful_behaviors.csv. "
            f"SOURCE: {SOURCE_HELP}'xstest.csv?label=unsafe&limit=100'.",
        ),
    ] = None,
    over_refusal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="Harmless prompts that sound harmful, e.g. --over-refusal "
            "'xstest=xstest.csv?label=safe'.",
        ),
    ] = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="Ordinary prompts, e.g. --benign 'alpaca=harmless.json?limit=200'.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="A labeled task: sst2, ag_news, boolq or mnli in their usual files, or any other "
            "name for rows of prompt and answer, e.g. --task 'sst2=validation.tsv?limit=200'. "
            "A completion is correct if its first label is the row's; if all rows have the same "
            "label, if it begins with it.",
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Response judge, e.g. --judge strings:xstest --judge guard:models/guard. "
            "Forms: strings:advbench, strings:xstest, strings:opening, strings:FILE, coherence, "
            "classifier:DIR (problem_type multi_label_classification in its config.json), "
            "guard:DIR, llm:MODEL@BASE_URL (key in OPENAI_API_KEY; receives prompts and "
            "responses, first a harmless one as a check). Default: strings:advbench, "
            "strings:opening and coherence.",
        ),
    ] = None,
    backend: Annotated[
        Backend,
        typer.Option(help="Generation backend, e.g. --backend transformers without vLLM (slow)."),
    ] = Backend.vllm,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the models, e.g. --dtype float32.")
    ] = Dtype.bfloat16,
    device: Annotated[
        str,
        typer.Option(help="With --backend transformers: where it runs, e.g. --device cuda:1."),
    ] = "auto",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first rows of sources without a limit of their own, e.g. --limit 100.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of a response, e.g. --max-tokens 256.")
    ] = 64,
    task_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of a task completion, e.g. --task-tokens 16.")
    ] = 8,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Sample responses stored per set, e.g. --samples 5. To harmful prompts, only "
            "refusals are stored.",
        ),
    ] = 3,
    seed: Annotated[int, typer.Option(help="Seed of samples and intervals, e.g. --seed 1.")] = 0,
    keep_answers: Annotated[
        Path | None,
        typer.Option(
            help="A private file that caches all responses, harmful ones too, so that an "
            "interrupted run continues, e.g. --keep-answers private/answers.jsonl."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing evaluation at OUT.")
    ] = False,
) -> None:
    """Measure what the vector does: attack success, over-refusal, tasks, before and after.

    The parent model and every tenant before and after are measured on the same prompts, with 95 %
    intervals. All inputs, judges too, are read and checked before a model is loaded.

    Example: safegene evaluate models/qwen --family families/qwen --tenant acme=tenants/acme
    --harmful advbench=harmful_behaviors.csv --over-refusal 'xstest=xstest.csv?label=safe'
    --task 'sst2=validation.tsv?limit=200' --out evaluation.json
    """
    check_evaluation_out(out, overwrite)
    if backend is Backend.vllm and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--backend vllm: vLLM is not installed; install safegene-vllm[gpu] or [cpu], or use "
            "--backend transformers"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from safegene_vllm.evaluation.inputs import read_inputs
    from safegene_vllm.evaluation.judges import DEFAULT_JUDGES
    from safegene_vllm.evaluation.response_cache import ResponseCache
    from safegene_vllm.evaluation.results import save_evaluation
    from safegene_vllm.evaluation.runner import evaluate as run

    inputs = read_inputs(
        model,
        family=family,
        tenants=tenant or (),
        sets={
            "harmful": harmful or (),
            "over_refusal": over_refusal or (),
            "benign": benign or (),
        },
        tasks=task or (),
        judges=judge or DEFAULT_JUDGES,
        limit=limit,
        max_tokens=max_tokens,
        task_tokens=task_tokens,
    )
    overlaps = _overlaps(inputs)
    with ExitStack() as stack:
        cache = None if keep_answers is None else stack.enter_context(ResponseCache(keep_answers))
        progress = stack.enter_context(steps("evaluating"))
        found = run(
            inputs.targets,
            inputs.sets,
            inputs.tasks,
            inputs.judges,
            _backend(inputs, family, backend, dtype, device),
            header=inputs.header,
            max_tokens=max_tokens,
            task_tokens=task_tokens,
            samples=samples,
            seed=seed,
            chunk=CHUNKS[backend.value],
            cache=cache,
            overlaps=overlaps,
            progress=progress,
        )
    save_evaluation(found, out)
    show(found)
    results().print(f"\n{out}  plots: safegene report {out}")
