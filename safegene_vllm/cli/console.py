"""Terminal output of the commands (consoles, tables, bars, progress) and checks of --out.

Results go to stdout, progress and notes to stderr. Loads rich, nothing heavier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from safegene_vllm.errors import ConfigError

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def results() -> Console:
    """Return a console on stdout, for results; text is printed as it is, without markup."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def notes() -> Console:
    """Return a console on stderr, for progress and remarks."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def clean(text: str) -> str:
    """Replace the characters of `text` that could control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def bar(value: float, top: float, *, width: int = 24) -> str:
    """Draw |value| as a bar of at most `width` characters; `top` is a full bar."""
    share = min(abs(value) / top, 1.0) if top > 0 else 0.0
    if not (results().encoding or "").lower().startswith("utf"):
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Return a plain table; columns are right-aligned except those in `left`."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return made


def coefficient_table(coefficients: Sequence[float]) -> Table:
    """Return a table with a row and a bar per layer whose coefficient is not 0."""
    made = table("layer", "coefficient", "", left=("",))
    top = max((abs(value) for value in coefficients), default=0.0)
    for layer, value in enumerate(coefficients):
        if value != 0.0:
            made.add_row(str(layer), f"{value:.4g}", bar(value, top))
    return made


def progress_bar() -> Progress:
    """Return a transient progress bar with the time left; disabled if stderr is no terminal."""
    console = notes()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def tracked(description: str) -> Callable[[Sequence[str]], Iterable[str]]:
    """Return a function that shows progress while iterating over names."""

    def track(names: Sequence[str]) -> Iterable[str]:
        with progress_bar() as progress:
            yield from progress.track(names, description=description)

    return track


def check_out(out: Path, *sources: Path | None, overwrite: bool) -> None:
    """Raise ConfigError if `out` is one of the `sources`, or exists and may not be replaced."""
    for source in sources:
        if source is not None and out.resolve() == source.resolve():
            raise ConfigError(f"--out {out} is an input as well; name another directory")
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out {out} exists; name a new directory, or replace its content with --overwrite"
        )
