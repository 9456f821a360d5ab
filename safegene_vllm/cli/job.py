"""`safegene job ...`: the long steps of a running server: looked at, watched, stopped."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    KeyFile,
    KeyText,
    Timeout,
    Url,
    connect,
    end_with,
    follow_job,
    show_job,
    show_json,
    show_list,
)

HELP = "Long steps of a running server, such as bringing in a tenant."

Id = Annotated[int, typer.Argument(metavar="ID", help="The job's number, e.g. 7.")]


class State(StrEnum):
    """How far a job is."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"


def list_(
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant's, e.g. --tenant acme/support.")
    ] = None,
    state: Annotated[
        State | None, typer.Option(help="Only those in this state, e.g. --state failed.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many, e.g. --limit 20.")] = 100,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Jobs, the newest first: which wait, which run, which have ended, and how.

    Example: safegene job list --state failed
    """
    with connect(url, key, key_file) as client:
        found = client.jobs(
            tenant=tenant, state=None if state is None else state.value, limit=limit
        )
    columns = ("id", "kind", "tenant", "state", "progress", "message", "updated_at")
    show_list(found, columns, as_json)


def show(
    id: Id,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """One job: how far it is, and what came of it.

    Example: safegene job show 7
    """
    with connect(url, key, key_file) as client:
        found = client.job(id)
    if as_json:
        show_json(found)
    else:
        show_job(found)


def cancel(
    id: Id,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Ask a job to stop. It does so between two of its steps.

    Example: safegene job cancel 7
    """
    with connect(url, key, key_file) as client:
        found = client.cancel_job(id)
    if as_json:
        show_json(found)
    else:
        show_job(found)


def watch(
    id: Id,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Stay until a job has ended; exit code 1 if it failed or was cancelled.

    Example: safegene job watch 7
    """
    with connect(url, key, key_file) as client:
        found = follow_job(client, client.job(id), timeout)
    if as_json:
        show_json(found)
    else:
        show_job(found)
    end_with(found)


COMMANDS = {"list": list_, "show": show, "cancel": cancel, "watch": watch}
