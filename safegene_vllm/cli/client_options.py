"""Options, output and waiting that the commands for a running server share.

Results go to stdout, as a table or with --json as the server's own JSON; notes go to stderr. Text
from the server is shown without control characters: others wrote the names and messages in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from safegene_vllm.cli.console import clean, notes, progress_bar, results, table
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safegene_vllm.client import Client
    from safegene_vllm.client.schemas import Job, Rollout, Tenant

KEY_VARIABLE = "SAFEGENE_KEY"
FAILED = ("failed", "cancelled")
"""States of a job whose message is a reason, which a command prints once, on stderr."""
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the server's JSON, for scripts, e.g. --json | jq .name."),
]
Expected = Annotated[
    int | None,
    typer.Option(
        "--expect",
        metavar="N",
        help="Fail if another revision than this is published by now, e.g. --expect 3.",
    ),
]


@dataclass(frozen=True)
class Server:
    """The server a command talks to: its address and the API key."""

    url: Annotated[
        str,
        typer.Option(
            envvar="SAFEGENE_URL",
            metavar="URL",
            help="The server's address, e.g. --url https://models.example:8000.",
        ),
    ] = "http://localhost:8000"
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="An API key, e.g. --key sg-... Other users of this machine can read command "
            f"lines: set {KEY_VARIABLE} instead, or use --key-file.",
        ),
    ] = None
    key_file: Annotated[
        Path | None,
        typer.Option(help="A file with only the API key in it, e.g. --key-file ~/.safegene-key."),
    ] = None

    def connect(self) -> Client:
        """Return a client with the given key, else the one in SAFEGENE_KEY. Errors: ConfigError."""
        from safegene_vllm.client import Client

        key = self.key
        if key is not None and self.key_file is not None:
            raise ConfigError("--key and --key-file are both given; give one")
        if self.key_file is not None:
            try:
                key = self.key_file.read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise ConfigError(f"--key-file {self.key_file} cannot be read: {error}") from error
        found = os.environ.get(KEY_VARIABLE) if key is None else key
        if not found:
            raise ConfigError(f"no API key; set {KEY_VARIABLE}, or give --key-file")
        return Client(self.url, found)


@dataclass(frozen=True)
class Waiting:
    """Whether a command waits for the job or rollout it started, and how long."""

    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="Wait until it is done, e.g. --no-wait in a script."),
    ] = True
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Stop waiting after this long; the work continues, e.g. --timeout 120.",
        ),
    ] = None

    def job(self, client: Client, job: Job) -> Job:
        """Return the job, at its end if waiting. Errors: TimeoutError, ApiError."""
        return follow_job(client, job, self.timeout) if self.wait else job

    def rollout(self, client: Client, rollout: Rollout | None) -> Rollout | None:
        """Return the rollout, if any, once applied if waiting. Errors: TimeoutError, ApiError."""
        if not self.wait or rollout is None:
            return rollout
        return follow_rollout(client, rollout, self.timeout)


def instant(text: str, option: str, now: datetime, *, ahead: bool) -> str:
    """Convert `90m`, `12h`, `30d` (from now if `ahead`, else ago) or a date to ISO 8601.

    A date without a zone is UTC. Errors: ConfigError.
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
    """Format a value of a response as the text of a table cell."""
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


def timestamp(value: object) -> str:
    """Format an ISO 8601 text as date and time in UTC, to the second."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return cell(value)
    return (found if found.tzinfo is None else found.astimezone(UTC)).strftime("%Y-%m-%d %H:%M:%SZ")


def as_dict(value: Any) -> Any:
    """Convert the objects of a response, at any depth of lists and dictionaries, as in JSON."""
    if isinstance(value, Mapping):
        return {name: as_dict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_dict(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    # Not model_dump: it leaves out the fields that a newer server added.
    return as_dict(dict(value)) if hasattr(value, "model_dump") else value


def show_json(value: object) -> None:
    """Print `value` as JSON."""
    results().print(json.dumps(as_dict(value), indent=2))


def show_table(made: Table) -> None:
    """Print a table: long cells fold on a terminal and stay whole in a pipe or a file."""
    console = results()
    if console.is_terminal:
        for column in made.columns:
            column.no_wrap, column.overflow = False, "fold"
    else:
        console.width = 100_000
    console.print(made)


def show_list(items: Iterable[Any], columns: Sequence[str], as_json: bool) -> None:
    """Print a row per item; columns are keys of the items, those ending in `_at` timestamps."""
    found = as_dict(list(items))
    if as_json:
        show_json({"data": found})
        return
    made = table(*(c.removesuffix("_at").replace("_", " ") for c in columns))
    for column in made.columns:
        column.justify = "left"
    for item in found:
        made.add_row(*(_shown(name, item.get(name)) for name in columns))
    show_table(made)


def show_facts(given: Any, names: Sequence[str]) -> None:
    """Print a line for each of `names` that is in `given`."""
    facts = as_dict(given)
    made = Table(box=None, pad_edge=False, show_header=False)
    for name in names:
        if name in facts:
            words = name.removesuffix("_at").replace("_", " ")
            made.add_row(f"  {words}", _shown(name, facts[name]))
    show_table(made)


def _shown(name: str, value: object) -> str:
    return timestamp(value) if name.endswith("_at") or name == "at" else cell(value)


@contextmanager
def _progress(title: str, total: float | None) -> Iterator[Callable[[str, float, float], None]]:
    """Yield a callable that shows text and progress: a bar on a terminal, else changed lines."""
    console, last = notes(), ""
    with progress_bar() as bar:
        task = bar.add_task(title, total=total)

        def update(text: str, completed: float, total: float) -> None:
            nonlocal last
            bar.update(task, completed=completed, total=total, description=text)
            if not console.is_terminal and text != last:
                console.print(text)
            last = text

        yield update


def follow_job(client: Client, job: Job, timeout_s: float | None) -> Job:
    """Wait for the job's end, showing its progress. Errors: TimeoutError, ApiError."""
    with _progress(f"job {job.id}", 1.0) as update:

        def show(now: Job) -> None:
            text = f"job {now.id} {now.state}"
            if now.state not in FAILED:
                text += f": {cell(now.message)}"
            update(text, now.progress, 1.0)

        try:
            return client.wait_job(job.id, timeout_s=timeout_s, seen=show)
        except KeyboardInterrupt:
            notes().print(
                f"job {job.id} continues; follow it with: safegene job watch {job.id}; stop "
                f"it with: safegene job cancel {job.id}"
            )
            raise


def follow_rollout(client: Client, rollout: Rollout, timeout_s: float | None) -> Rollout:
    """Wait until all live replicas apply the rollout. Errors: TimeoutError, ApiError."""
    latest = rollout
    with _progress(f"rollout {rollout.id}", None) as update:

        def show(now: Rollout) -> None:
            nonlocal latest
            latest = now
            text = f"rollout {now.id}: on {now.applied} of {now.live} replicas"
            update(text, now.applied, now.live)

        try:
            return client.wait_rollout(rollout.id, timeout_s=timeout_s, seen=show)
        except TimeoutError as error:
            why = "".join(f"\n- {cell(lag.replica)}: {cell(lag.reason)}" for lag in latest.lagging)
            raise TimeoutError(f"{error}{why}") from error


def show_job(job: Job, *, reason: bool = True) -> None:
    """Print a job's state, result and dates; `reason`: also the message of one that failed."""
    results().print(f"job {job.id}: {cell(job.state)}")
    names = ["kind", "tenant", "revision", "progress", "message", "result", "attempts"]
    if job.state in FAILED and not reason:
        names.remove("message")
    show_facts(job, (*names, "created_at", "updated_at"))


def show_next(tenant: Tenant) -> None:
    """Note what a tenant serves although new content of it failed, and what to do."""
    name = cell(tenant.name)
    if tenant.served is not None:
        notes().print(f"{name} still serves {cell(tenant.served)}")
        return
    notes().print(
        f"{name} serves nothing; add it again with what is missing, or give the name up: safegene "
        f"tenant delete {name}"
    )


def end_with(job: Job) -> None:
    """Exit 1, with the reason on stderr, if the job failed or was cancelled."""
    if job.state in FAILED:
        words = cell(job.message)
        notes().print(f"job {job.id} ({cell(job.kind)}) {job.state}: {words}")
        raise typer.Exit(1)


def show_rollout(rollout: Rollout | None) -> None:
    """Print a rollout and its lagging replicas; nothing for None."""
    if rollout is None:
        return
    state = "done" if rollout.done else "in progress"
    results().print(
        f"rollout {rollout.id}: {state}, on {rollout.applied} of {rollout.live} replicas"
    )
    show_facts(rollout, ("kind", "tenants", "revisions", "created_at", "created_by"))
    for lag in rollout.lagging:
        results().print(f"  {cell(lag.replica)} lags: {cell(lag.reason)}")


def print_job(response: Mapping[str, Any], job: Job, as_json: bool) -> None:
    """Print a job, or all of the response as JSON; exit 1 if the job failed."""
    if as_json:
        show_json(response)
    else:
        show_job(job, reason=False)
    end_with(job)
