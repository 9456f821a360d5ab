"""Inputs of an evaluation from NAME=VALUE options, checked before a model is loaded.

Data, judges, family, tenants, and whether every prompt fits the models' contexts. All errors are
reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safegene_vllm.chat import (
    check_lengths,
    check_template,
    context_tokens,
    load_tokenizer,
)
from safegene_vllm.dataset import read_dataset
from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.evaluation.judges import Judge, make_judges
from safegene_vllm.evaluation.results import SetKind
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.targets import PARENT, Target, before_and_after, checkpoint_of
from safegene_vllm.evaluation.tasks import Task, read_task
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, reject_exported

_NAME = re.compile(r"[\w.@+-]+")
OPTIONS: Mapping[SetKind, str] = {
    "harmful": "--harmful",
    "over_refusal": "--over-refusal",
    "benign": "--benign",
}


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of an evaluation; `longest_tokens`: the longest prompt plus its response."""

    model: Path
    targets: Sequence[Target]
    sets: Mapping[str, PromptSet]
    tasks: Sequence[Task]
    judges: Sequence[Judge]
    header: FamilyHeader | None
    longest_tokens: int


@contextmanager
def _collected(errors: list[SafegeneError]) -> Iterator[None]:
    """Append a SafegeneError raised inside to `errors`."""
    try:
        yield
    except SafegeneError as error:
        errors.append(error)


def named(text: str, option: str) -> tuple[str, str]:
    """Split `NAME=VALUE`; the value may hold further equals signs. Errors: ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not value or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{option} {text!r} is not NAME=VALUE, with a name of letters, digits and ._@+-; write "
            f"for example {option} mine={text if not equals else value or 'PATH'}"
        )
    return name, value


def limited(source: str, limit: int | None) -> str:
    """`source` with a row limit, unless it has one."""
    _, mark, query = source.partition("?")
    if limit is None or any(part.startswith("limit=") for part in query.split("&")):
        return source
    return f"{source}{'&' if mark else '?'}limit={limit}"


def read_sets(
    texts: Mapping[SetKind, Sequence[str]], limit: int | None, errors: list[SafegeneError]
) -> dict[str, PromptSet]:
    """Read the sets in `texts`, a NAME=SOURCE each, by kind; errors are appended to `errors`."""
    sets: dict[str, PromptSet] = {}
    for kind, some in texts.items():
        option = OPTIONS[kind]
        for text in some:
            with _collected(errors):
                name, source = named(text, option)
                if name in sets:
                    raise ConfigError(f"{option} {name}: another set has this name")
                data = read_dataset(limited(source, limit), what=f"{option} {name}")
                sets[name] = PromptSet(kind, data)
    return sets


def read_tasks(texts: Sequence[str], limit: int | None, errors: list[SafegeneError]) -> list[Task]:
    """Read the tasks in `texts`, a NAME=SOURCE each; errors are appended to `errors`."""
    tasks: list[Task] = []
    for text in texts:
        with _collected(errors):
            name, source = named(text, "--task")
            if name in [task.name for task in tasks]:
                raise ConfigError(f"--task {name}: another task has this name")
            tasks.append(read_task(name, limited(source, limit), what=f"--task {name}"))
    return tasks


def read_targets(
    model: Path, header: FamilyHeader | None, tenants: Sequence[str], errors: list[SafegeneError]
) -> list[Target]:
    """The model itself, then every tenant NAME=DIR before and after."""
    targets = [Target(model.resolve().name or PARENT, PARENT)]
    for text in tenants:
        with _collected(errors):
            name, directory = named(text, "--tenant")
            if header is None:
                raise ConfigError(f"--tenant {name} is given without --family; name its family")
            if name in [target.name for target in targets]:
                raise ConfigError(f"--tenant {name}: another tenant, or the model, has this name")
            targets += before_and_after(name, Path(directory), header)
    return targets


def _longest(
    directory: Path,
    sets: Mapping[str, PromptSet],
    tasks: Sequence[Task],
    max_tokens: int,
    task_tokens: int,
) -> int:
    """Tokens of the longest prompt plus its response. Errors: ConfigError naming the rows."""
    tokenizer = load_tokenizer(directory)
    check_template(tokenizer)
    prompts = {f"{OPTIONS[s.kind]} {name}": s.prompts for name, s in sets.items()}
    limits = dict.fromkeys(prompts, max_tokens)
    for task in tasks:
        prompts[f"--task {task.name}"] = [row.prompt for row in task.data.rows]
        limits[f"--task {task.name}"] = task_tokens
    return check_lengths(tokenizer, prompts, limits, context_tokens(directory))


def read_inputs(
    model: Path,
    *,
    family: Path | None = None,
    tenants: Sequence[str] = (),
    sets: Mapping[SetKind, Sequence[str]],
    tasks: Sequence[str] = (),
    judges: Sequence[str] = (),
    limit: int | None = None,
    max_tokens: int,
    task_tokens: int,
) -> Inputs:
    """Read and check everything the options name; only files are read.

    Errors: all in one, each naming its option: ConfigError, MissingFileError, FamilyMismatchError
    and the like.
    """
    errors: list[SafegeneError] = []
    header: FamilyHeader | None = None
    with _collected(errors):
        if (kind := kind_of(model)) != "checkpoint":
            raise ConfigError(f"MODEL {model} holds: {kind}; expected a Hugging Face checkpoint")
        if family is not None:
            reject_exported(model)
    if family is not None:
        with _collected(errors):
            header = read_family_header(family)
    if header is not None and not errors:
        with _collected(errors):
            check_fits(model, header)
    read = read_sets(sets, limit, errors)
    chosen = read_tasks(tasks, limit, errors)
    if not any(sets.values()) and not tasks:
        errors.append(
            ConfigError(
                "there is nothing to evaluate; give --harmful, --over-refusal, --benign or --task"
            )
        )
    made: Sequence[Judge] = ()
    with _collected(errors):
        made = make_judges(judges)
    targets: list[Target] = []
    if family is None or header is not None:
        targets = read_targets(model, header, tenants, errors)
    raise_errors(errors)
    longest = 0
    for directory in dict.fromkeys(checkpoint_of(target) or model for target in targets):
        with _collected(errors):
            longest = max(longest, _longest(directory, read, chosen, max_tokens, task_tokens))
    raise_errors(errors)
    return Inputs(model, targets, read, chosen, made, header, longest)
