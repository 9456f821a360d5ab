"""Everything an evaluation reads, from NAME=VALUE texts: checked before anything heavy is loaded.

Data, judges, the family and the tenants, and whether every prompt fits the models that will be
asked. All faults are told at once.
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
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, refuse_exported

_NAME = re.compile(r"[\w.@+-]+")
OPTIONS: Mapping[SetKind, str] = {
    "harmful": "--harmful",
    "over_refusal": "--over-refusal",
    "benign": "--benign",
}


@dataclass(frozen=True)
class Inputs:
    """What is evaluated, by whom, and the most tokens that a prompt and its answer need."""

    model: Path
    subjects: Sequence[Target]
    sets: Mapping[str, PromptSet]
    tasks: Sequence[Task]
    judges: Sequence[Judge]
    header: FamilyHeader | None
    longest_tokens: int


@contextmanager
def _collected(faults: list[SafegeneError]) -> Iterator[None]:
    """Whatever is refused inside is added to `faults`."""
    try:
        yield
    except SafegeneError as error:
        faults.append(error)


def named(text: str, option: str) -> tuple[str, str]:
    """`NAME=VALUE` as a pair; the value may hold further equals signs. Errors: ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not value or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{option} {text!r} is not NAME=VALUE, with a name of letters, digits and ._@+-; write "
            f"for example {option} mine={text if not equals else value or 'PATH'}"
        )
    return name, value


def limited(source: str, limit: int | None) -> str:
    """`source` with its rows limited, unless it limits them itself."""
    _, mark, query = source.partition("?")
    if limit is None or any(part.startswith("limit=") for part in query.split("&")):
        return source
    return f"{source}{'&' if mark else '?'}limit={limit}"


def read_sets(
    texts: Mapping[SetKind, Sequence[str]], limit: int | None, faults: list[SafegeneError]
) -> dict[str, PromptSet]:
    """The sets named in `texts` by kind, a NAME=SOURCE each; what is wrong goes to `faults`."""
    sets: dict[str, PromptSet] = {}
    for kind, some in texts.items():
        option = OPTIONS[kind]
        for text in some:
            with _collected(faults):
                name, source = named(text, option)
                if name in sets:
                    raise ConfigError(f"{option} {name}: another set has this name")
                data = read_dataset(limited(source, limit), what=f"{option} {name}")
                sets[name] = PromptSet(kind, data)
    return sets


def read_tasks(texts: Sequence[str], limit: int | None, faults: list[SafegeneError]) -> list[Task]:
    """The tasks in `texts`, a NAME=SOURCE each; what is wrong goes to `faults`."""
    tasks: list[Task] = []
    for text in texts:
        with _collected(faults):
            name, source = named(text, "--task")
            if name in [task.name for task in tasks]:
                raise ConfigError(f"--task {name}: another task has this name")
            tasks.append(read_task(name, limited(source, limit), what=f"--task {name}"))
    return tasks


def read_subjects(
    model: Path, header: FamilyHeader | None, tenants: Sequence[str], faults: list[SafegeneError]
) -> list[Target]:
    """The model itself, then every tenant NAME=DIR before and after."""
    subjects = [Target(model.resolve().name or PARENT, PARENT)]
    for text in tenants:
        with _collected(faults):
            name, directory = named(text, "--tenant")
            if header is None:
                raise ConfigError(f"--tenant {name} is given without --family; name its family")
            if name in [subject.name for subject in subjects]:
                raise ConfigError(f"--tenant {name}: another tenant, or the model, has this name")
            subjects += before_and_after(name, Path(directory), header)
    return subjects


def _longest(
    directory: Path,
    sets: Mapping[str, PromptSet],
    tasks: Sequence[Task],
    max_tokens: int,
    task_tokens: int,
) -> int:
    """The tokens that the longest prompt and answer need. Errors: ConfigError naming the rows."""
    tokenizer = load_tokenizer(directory)
    check_template(tokenizer)
    prompts = {f"{OPTIONS[s.kind]} {name}": s.prompts for name, s in sets.items()}
    answers = dict.fromkeys(prompts, max_tokens)
    for task in tasks:
        prompts[f"--task {task.name}"] = [row.prompt for row in task.data.rows]
        answers[f"--task {task.name}"] = task_tokens
    return check_lengths(tokenizer, prompts, answers, context_tokens(directory))


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
    """What the texts name, read and checked; nothing but files is touched.

    Errors: all that was found, in one: ConfigError, MissingFileError, FamilyMismatchError and the
    like, each naming its option.
    """
    faults: list[SafegeneError] = []
    header: FamilyHeader | None = None
    with _collected(faults):
        if (kind := kind_of(model)) != "checkpoint":
            raise ConfigError(f"MODEL {model} holds: {kind}; expected a Hugging Face checkpoint")
        if family is not None:
            refuse_exported(model)
    if family is not None:
        with _collected(faults):
            header = read_family_header(family)
    if header is not None and not faults:
        with _collected(faults):
            check_fits(model, header)
    read = read_sets(sets, limit, faults)
    chosen = read_tasks(tasks, limit, faults)
    if not any(sets.values()) and not tasks:
        faults.append(
            ConfigError(
                "there is nothing to ask; give --harmful, --over-refusal, --benign or --task"
            )
        )
    made: Sequence[Judge] = ()
    with _collected(faults):
        made = make_judges(judges)
    subjects: list[Target] = []
    if family is None or header is not None:
        subjects = read_subjects(model, header, tenants, faults)
    raise_errors(faults)
    longest = 0
    for directory in dict.fromkeys(checkpoint_of(subject) or model for subject in subjects):
        with _collected(faults):
            longest = max(longest, _longest(directory, read, chosen, max_tokens, task_tokens))
    raise_errors(faults)
    return Inputs(model, subjects, read, chosen, made, header, longest)
