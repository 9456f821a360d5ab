"""`safegene rollout ...`: progress of a change across the replicas of a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.client_options import (
    AsJson,
    Server,
    follow_rollout,
    show_json,
    show_list,
    show_rollout,
)
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client.schemas import Rollout

HELP = "Show and watch how changes reach the replicas of a running server."

Id = Annotated[int, typer.Argument(metavar="ID", help="The rollout's number, e.g. 12.")]


def list_(
    server: Server,
    limit: Annotated[int, typer.Option(help="Maximum number of rollouts, e.g. --limit 5.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List rollouts, newest first, with the number of live replicas that applied each.

    Example: safegene rollout list
    """
    with server.connect() as client:
        found = client.rollouts(limit=limit)
    columns = ("id", "kind", "tenants", "applied", "live", "done", "created_at", "created_by")
    show_list(found, columns, as_json)


def show(id: Id, server: Server, as_json: AsJson = False) -> None:
    """Show a rollout: where it is applied, which replica lags, and why.

    Example: safegene rollout show 12
    """
    with server.connect() as client:
        _print(client.rollout(id), as_json)


def watch(
    server: Server,
    id: Annotated[
        int | None,
        typer.Argument(metavar="[ID]", help="The rollout's number (default: the latest), e.g. 12."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop watching after this long, e.g. --timeout 60."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until every live replica applies a rollout.

    Example: safegene rollout watch --timeout 60
    """
    with server.connect() as client:
        if id is None:
            id = max((rollout.id for rollout in client.rollouts(limit=1)), default=None)
        if id is None:
            raise ConfigError("there is no rollout to watch: nothing was published yet")
        _print(follow_rollout(client, client.rollout(id), timeout), as_json)


def _print(rollout: Rollout, as_json: bool) -> None:
    (show_json if as_json else show_rollout)(rollout)


COMMANDS = {"list": list_, "show": show, "watch": watch}
