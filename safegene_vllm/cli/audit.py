"""`safegene audit`: who did what to what, when, on a running server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    KeyFile,
    KeyText,
    Url,
    cell,
    connect,
    instant,
    show_json,
    show_list,
)
from safegene_vllm.cli.console import notes


def audit(
    actor: Annotated[
        str | None,
        typer.Option(help="Only what this key or server did, e.g. --actor ops-laptop."),
    ] = None,
    action: Annotated[
        str | None,
        typer.Option(help="Only this action, or all of a kind by a final dot, e.g. --action key."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Only what was done to this, e.g. --target acme/support."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Not before this: a date, or so long ago, e.g. --since 24h."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Before this, in the same words, e.g. --until 2031-05-02T08:00Z."),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many entries, e.g. --limit 20.")] = 50,
    cursor: Annotated[
        str | None,
        typer.Option(help="Older ones, from where the last page ended, e.g. --cursor 1042."),
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Who did what to what, the newest first.

    Example: safegene audit --target acme/support --limit 20
    """
    now = datetime.now(UTC)
    since = None if since is None else instant(since, "--since", now, ahead=False)
    until = None if until is None else instant(until, "--until", now, ahead=False)
    with connect(url, key, key_file) as client:
        page = client.audit(
            actor=actor,
            action=action,
            target=target,
            since=since,
            until=until,
            limit=limit,
            cursor=cursor,
        )
    if as_json:
        show_json(page)
        return
    show_list(page["data"], ("at", "actor", "action", "target", "details"), False)
    if page["cursor"] is not None:
        notes().print(f"older ones: --cursor {cell(page['cursor'])}")
