"""`safegene audit`: the audit log of a running server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from safegene_vllm.cli.client_options import AsJson, Server, cell, instant, show_json, show_list
from safegene_vllm.cli.console import notes


def audit(
    server: Server,
    actor: Annotated[
        str | None,
        typer.Option(help="Only actions of this key or server, e.g. --actor ops-laptop."),
    ] = None,
    action: Annotated[
        str | None,
        typer.Option(help="Only this action, or a group with a final dot, e.g. --action key."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Only actions on this target, e.g. --target acme/support."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Not before this date, or this long ago, e.g. --since 24h."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Before this, in the same form, e.g. --until 2031-05-02T08:00Z."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of entries, e.g. --limit 20.")] = 50,
    cursor: Annotated[
        str | None,
        typer.Option(help="Continue where the last page ended, e.g. --cursor 1042."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List actions with actor, target and time, newest first.

    Example: safegene audit --target acme/support --limit 20
    """
    now = datetime.now(UTC)
    with server.connect() as client:
        page = client.audit(
            actor=actor,
            action=action,
            target=target,
            since=None if since is None else instant(since, "--since", now, ahead=False),
            until=None if until is None else instant(until, "--until", now, ahead=False),
            limit=limit,
            cursor=cursor,
        )
    if as_json:
        show_json(page)
        return
    show_list(page.data, ("at", "actor", "action", "target", "details"), False)
    if page.cursor is not None:
        notes().print(f"older entries: --cursor {cell(page['cursor'])}")
