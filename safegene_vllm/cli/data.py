"""What the recipe's commands share: data and packages looked for first, progress by steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from safegene_vllm.cli.console import notes, progress_bar
from safegene_vllm.dataset import Dataset, read_dataset
from safegene_vllm.errors import ConfigError

SOURCE_HELP = (
    "CSV, TSV, JSONL, JSON or a `datasets` name, with a query that chooses rows and names columns, "
    "e.g. "
)


def need(package: str, does: str) -> None:
    """ConfigError unless the `package`, which `does` what is asked for, is installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package} is not installed, but {does}; pip install 'safegene-vllm[recipe]'"
        )


def read_all(
    sources: Sequence[str], what: str, *, labels: bool = False, need_answers: bool = False
) -> Dataset | None:
    """Every source of one role as one data set, licence required; None if there is no source.

    Errors: ConfigError naming the source and what it lacks.
    """
    from safegene_vllm.recipe.examples import concatenate

    if not sources:
        return None
    return concatenate(
        [
            read_dataset(
                source, what=what, labels=labels, need_answers=need_answers, need_license=True
            )
            for source in sources
        ]
    )


@contextmanager
def steps(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left for work that reports (done, total, words); lines in a log."""
    console = notes()
    with progress_bar() as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int, words: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{description}: {words}")
            if not console.is_terminal and (done % 10 == 0 or done == total):
                console.print(f"{description}: {done}/{total}, {words}")

        try:
            yield show
        except KeyboardInterrupt as stop:
            if stop.args:
                console.print(f"{description}: {stop}")
            raise
