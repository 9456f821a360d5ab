"""Terminal output of the commands (consoles, tables, bars, progress) and checks of --out.

Results go to stdout, progress and notes to stderr. Loads rich, nothing heavier.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.recipe.checks import Check

STRENGTH_SCALE = 3.0
"""Coefficient of a full bar, the default upper bound: bars of different tenants compare."""
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
    """Return a table with a row and a bar per layer whose coefficient is not 0.

    A full bar is STRENGTH_SCALE in every table; a longer one ends in `+`.
    """
    made = table("layer", "coefficient", "", left=("",))
    for layer, value in enumerate(coefficients):
        if value != 0.0:
            more = "+" if abs(value) > STRENGTH_SCALE else ""
            made.add_row(str(layer), f"{value:.4g}", bar(value, STRENGTH_SCALE) + more)
    return made


def show_checks(checks: Sequence[Check]) -> bool:
    """Print the section "Does it work?"; whether every check passed."""
    console = results()
    console.print("\nDoes it work?")
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok     " if check.passed else "WARNING"
        console.print(f"  {mark}  {check.name:<{width}}  {check.measured}")
        if not check.passed:
            console.print(f"  {'':7}  {'':{width}}  try: {check.advice}")
    failed = sum(not check.passed for check in checks)
    if failed:
        console.print(f"{failed} of {len(checks)} checks failed: expect a weak protection")
    return not failed


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


def check_out(
    out: Path, *sources: Path | None, overwrite: bool, owned: Iterable[str] | None = None
) -> None:
    """Raise ConfigError unless the directory `out` can be written.

    It must not be one of the `sources`, nor exist unless it may be replaced; then it holds only
    the names in `owned` (None: any).
    """
    for source in sources:
        if source is not None and out.resolve() == source.resolve():
            raise ConfigError(f"--out {out} is an input as well; name another directory")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a directory")
    entries = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if entries and not overwrite:
        raise ConfigError(
            f"--out {out} exists; name a new directory, or replace its content with --overwrite"
        )
    if owned is not None and (others := sorted(entries - set(owned))):
        raise ConfigError(
            f"--out {out} also holds {', '.join(others[:5])}, which is no output of this command; "
            "name another directory"
        )
    check_writable(out, f"--out {out}")


def check_writable(out: Path, what: str) -> None:
    """Raise ConfigError naming `what` unless `out` can be made, by making a temporary sibling."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".safegene-", dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be written: {parent}: {error.strerror}; name another directory"
        ) from error
