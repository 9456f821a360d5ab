"""What the commands that ask a running server share: its options, its answers shown, waiting.

Results go to stdout, as a table or with --json as the server's own JSON; notes go to stderr. What a
server says is shown without control characters: names and messages are other people's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from safegene_vllm.cli.console import clean, notes, progress_bar, results, table
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client import Client
    from safegene_vllm.client.types import Job, Rollout

LOCAL = "http://localhost:8000"
KEY_VARIABLE = "SAFEGENE_KEY"
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}

Url = Annotated[
    str,
    typer.Option(
        envvar="SAFEGENE_URL",
        metavar="URL",
        help="The server's address, e.g. --url https://models.example:8000.",
    ),
]
KeyText = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="An API key, e.g. --key sg-... But command lines are seen by others on this machine: "
        f"better set {KEY_VARIABLE}, or use --key-file.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="A file with nothing but the API key, e.g. --key-file ~/.safegene-key."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="The server's own answer, for scripts, e.g. --json | jq .name."),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait/--no-wait", help="Stay until it is done, or not, e.g. --no-wait in a script."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Stay no longer than this; what was begun goes on, e.g. --timeout 120.",
    ),
]
Expected = Annotated[
    int | None,
    typer.Option(
        "--expect",
        metavar="N",
        help="Refuse if another revision than this is published by now, e.g. --expect 3.",
    ),
]


def connect(url: str, key: str | None, key_file: Path | None) -> Client:
    """A client with the key that was given, else with SAFEGENE_KEY's. Errors: ConfigError."""
    from safegene_vllm.client import Client

    if key is not None and key_file is not None:
        raise ConfigError("--key and --key-file are both given; give one")
    if key_file is not None:
        try:
            key = key_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--key-file {key_file} cannot be read: {error}") from error
    found = os.environ.get(KEY_VARIABLE) if key is None else key
    if not found:
        raise ConfigError(f"no API key; set {KEY_VARIABLE}, or give --key-file")
    return Client(url, found)


def instant(text: str, option: str, now: datetime, *, ahead: bool) -> str:
    """`90m`, `12h` or `30d` from now (`ahead`) or ago, or a date, as ISO 8601; UTC if not said.

    Errors: ConfigError.
    """
    span = re.fullmatch(r"(\d{1,6})([mhd])", text)
    try:
        if span:
            length = timedelta(**{_UNITS[span[2]]: int(span[1])})
            found = now + length if ahead else now - length
        else:
            found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{option} {text!r}: expected a time such as 12h or 30d, or a date such as 2031-12-31"
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).isoformat()


def cell(value: object) -> str:
    """A value of an answer as people read it."""
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(str(k))}={cell(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(cell(item) for item in value)
    return clean(str(value)).replace("\n", " ")


def moment(value: object) -> str:
    """An ISO 8601 text as date and time in UTC, to the second."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return cell(value)
    return (found if found.tzinfo is None else found.astimezone(UTC)).strftime("%Y-%m-%d %H:%M:%SZ")


def show_json(value: object) -> None:
    results().print(json.dumps(value, indent=2))


def show_table(made: Table) -> None:
    """Fold long cells on a terminal; leave everything whole in a pipe or a file."""
    console = results()
    if console.is_terminal:
        for column in made.columns:
            column.no_wrap, column.overflow = False, "fold"
    else:
        console.width = 100_000
    console.print(made)


def show_list(items: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """A row per item; a column is a key of the items, `_at` at its end makes it a moment."""
    found = list(items)
    if as_json:
        show_json({"data": found})
        return
    made = table(*(c.removesuffix("_at").replace("_", " ") for c in columns))
    for column in made.columns:
        column.justify = "left"
    for item in found:
        made.add_row(*(_shown(name, item.get(name)) for name in columns))
    show_table(made)


def show_facts(facts: Mapping[str, Any], names: Sequence[str]) -> None:
    """A line per fact that is there."""
    made = Table(box=None, pad_edge=False, show_header=False)
    for name in names:
        if name in facts:
            words = name.removesuffix("_at").replace("_", " ")
            made.add_row(f"  {words}", _shown(name, facts[name]))
    show_table(made)


def _shown(name: str, value: object) -> str:
    return moment(value) if name.endswith("_at") or name == "at" else cell(value)


def follow_job(client: Client, job: Job, timeout_s: float | None) -> Job:
    """The job at its end, its progress shown meanwhile. Errors: TimeoutError, ApiError."""
    again = f"safegene job watch {job['id']}"
    with progress_bar() as bar:
        task = bar.add_task(f"job {job['id']}", total=1.0)
        say = _teller()

        def show(now: Job) -> None:
            words = f"job {now['id']} {now['state']}: {cell(now['message'])}"
            bar.update(task, completed=now["progress"], description=words)
            say(words)

        try:
            return client.wait_job(job["id"], timeout_s=timeout_s, seen=show)
        except KeyboardInterrupt:
            notes().print(
                f"job {job['id']} goes on; follow it with: {again}; stop it with: safegene job "
                f"cancel {job['id']}"
            )
            raise


def follow_rollout(client: Client, rollout: Rollout, timeout_s: float | None) -> Rollout:
    """The rollout once all live replicas follow it. Errors: TimeoutError, ApiError."""
    latest = rollout
    with progress_bar() as bar:
        task = bar.add_task(f"rollout {rollout['id']}", total=None)
        say = _teller()

        def show(now: Rollout) -> None:
            nonlocal latest
            latest = now
            words = f"rollout {now['id']}: on {now['applied']} of {now['live']} replicas"
            bar.update(task, completed=now["applied"], total=now["live"], description=words)
            say(words)

        try:
            return client.wait_rollout(rollout["id"], timeout_s=timeout_s, seen=show)
        except TimeoutError as error:
            why = "".join(
                f"\n- {cell(lag['replica'])}: {cell(lag['reason'])}" for lag in latest["lagging"]
            )
            raise TimeoutError(f"{error}{why}") from error


def _teller() -> Callable[[str], None]:
    """Prints a line when it is another one than before, where no bar is shown (a log, a pipe)."""
    console = notes()
    last = ""

    def say(words: str) -> None:
        nonlocal last
        if not console.is_terminal and words != last:
            console.print(words)
        last = words

    return say


def show_job(job: Mapping[str, Any]) -> None:
    results().print(f"job {job['id']}: {cell(job['state'])}")
    names = ("kind", "tenant", "revision", "progress", "message", "result", "attempts")
    show_facts(job, (*names, "created_at", "updated_at"))


def end_with(job: Mapping[str, Any]) -> None:
    """Exit 1, with the reason on stderr, if the job ended and did not do its work."""
    if job["state"] in ("failed", "cancelled"):
        words = cell(job["message"])
        notes().print(f"job {job['id']} ({cell(job['kind'])}) {job['state']}: {words}")
        raise typer.Exit(1)


def show_rollout(rollout: Mapping[str, Any]) -> None:
    state = "done" if rollout["done"] else "on its way"
    results().print(
        f"rollout {rollout['id']}: {state}, on {rollout['applied']} of {rollout['live']} replicas"
    )
    show_facts(rollout, ("kind", "tenants", "revisions", "created_at", "created_by"))
    for lag in rollout["lagging"]:
        results().print(f"  {cell(lag['replica'])} lags: {cell(lag['reason'])}")
