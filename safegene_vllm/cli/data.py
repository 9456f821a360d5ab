"""Data sources, optional packages and progress of the recipe commands."""

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
    """Raise ConfigError unless `package`, which `does` part of the command, is installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package}, which {does}, is not installed; pip install 'safegene-vllm[recipe]'"
        )


def read_all(
    sources: Sequence[str], what: str, *, labels: bool = False, need_answers: bool = False
) -> Dataset | None:
    """Read all sources of one role as one data set, each with a license; None without sources.

    Errors: ConfigError naming the source and what is missing.
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
    """Show work that reports (done, total, text): a bar on a terminal, lines in a log."""
    console = notes()
    with progress_bar() as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{description}: {text}")
            if not console.is_terminal and (done % 10 == 0 or done == total):
                console.print(f"{description}: {done}/{total}, {text}")

        try:
            yield show
        except KeyboardInterrupt as stop:
            if stop.args:
                console.print(f"{description}: {stop}")
            raise
