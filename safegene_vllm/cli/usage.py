"""`safegene usage`: requests and tokens by day, tenant and key of a running server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from safegene_vllm.cli.client_options import (
    AsJson,
    Server,
    as_dict,
    cell,
    instant,
    show_json,
    show_table,
)
from safegene_vllm.cli.console import clean, notes, table
from safegene_vllm.errors import ConfigError

_NAMES = ("day", "tenant", "key")
_COUNTS = ("requests", "prompt_tokens", "completion_tokens")


def usage(
    server: Server,
    tenant: Annotated[
        str | None,
        typer.Option(help="Only this tenant, or base model, e.g. --tenant acme/support."),
    ] = None,
    key_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only requests with the key of this name, e.g. --key-name acme-app.",
        ),
    ] = None,
    since: Annotated[
        str,
        typer.Option(help="First day, or this long ago, e.g. --since 2031-05-01."),
    ] = "30d",
    until: Annotated[
        str | None,
        typer.Option(help="Last day, in the same form, e.g. --until 2031-05-31."),
    ] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV, for a spreadsheet, e.g. --csv > usage.csv.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List requests and tokens by day (UTC), tenant and key, newest day first.

    Example: safegene usage --tenant acme/support --since 30d
    """
    if as_csv and as_json:
        raise ConfigError("--csv and --json are both given; give one")
    now = datetime.now(UTC)
    first = _day(since, "--since", now)
    last = None if until is None else _day(until, "--until", now)
    with server.connect() as client:
        found = client.usage(since=first, until=last, tenant=tenant, key=key_name)
    if as_csv:
        from safegene_vllm.client.schemas import usage_csv

        typer.echo(clean(usage_csv(found).replace("\r\n", "\n")), nl=False)
    elif as_json:
        show_json({"data": found})
    else:
        made = table(*(name.replace("_", " ") for name in (*_NAMES, *_COUNTS)), left=_NAMES)
        for row in as_dict(found):
            made.add_row(*(cell(row[name]) for name in (*_NAMES, *_COUNTS)))
        show_table(made)
        sums = [f"{sum(row[name] for row in found)} {name.replace('_', ' ')}" for name in _COUNTS]
        notes().print(f"total: {', '.join(sums)}")


def _day(text: str, option: str, now: datetime) -> str:
    """Convert a time as of `instant` to its day in UTC. Errors: ConfigError."""
    found = datetime.fromisoformat(instant(text, option, now, ahead=False))
    try:
        return found.astimezone(UTC).date().isoformat()
    except OverflowError:
        return found.date().isoformat()
