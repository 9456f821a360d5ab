"""`safegene job ...`: long-running jobs of a running server."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.client_options import (
    AsJson,
    Server,
    end_with,
    follow_job,
    show_job,
    show_json,
    show_list,
)

if TYPE_CHECKING:
    from safegene_vllm.client.schemas import Job

HELP = "Show, watch and cancel jobs of a running server, such as adding a tenant."

Id = Annotated[int, typer.Argument(metavar="ID", help="The job's number, e.g. 7.")]


class State(StrEnum):
    """State of a job."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"


def list_(
    server: Server,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant's, e.g. --tenant acme/support.")
    ] = None,
    state: Annotated[
        State | None, typer.Option(help="Only those in this state, e.g. --state failed.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of jobs, e.g. --limit 20.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first, with state and progress.

    Example: safegene job list --state failed
    """
    with server.connect() as client:
        found = client.jobs(
            tenant=tenant, state=None if state is None else state.value, limit=limit
        )
    columns = ("id", "kind", "tenant", "state", "progress", "message", "updated_at")
    show_list(found, columns, as_json)


def show(id: Id, server: Server, as_json: AsJson = False) -> None:
    """Show a job: its progress and its result.

    Example: safegene job show 7
    """
    with server.connect() as client:
        _print(client.job(id), as_json)


def cancel(id: Id, server: Server, as_json: AsJson = False) -> None:
    """Cancel a job. It stops between two of its steps.

    Example: safegene job cancel 7
    """
    with server.connect() as client:
        _print(client.cancel_job(id), as_json)


def watch(
    id: Id,
    server: Server,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop watching after this long, e.g. --timeout 120."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended; exit code 1 if it failed or was cancelled.

    Example: safegene job watch 7
    """
    with server.connect() as client:
        found = follow_job(client, client.job(id), timeout)
    if as_json:
        show_json(found)
    else:
        show_job(found, reason=False)
    end_with(found)


def _print(job: Job, as_json: bool) -> None:
    (show_json if as_json else show_job)(job)


COMMANDS = {"list": list_, "show": show, "cancel": cancel, "watch": watch}
