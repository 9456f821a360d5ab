"""`safegene rollout ...`: how far a change is on its way to the replicas."""

from __future__ import annotations

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
    follow_rollout,
    show_json,
    show_list,
    show_rollout,
)
from safegene_vllm.errors import ConfigError

HELP = "Changes on their way to the replicas of a running server."

Id = Annotated[int, typer.Argument(metavar="ID", help="The rollout's number, e.g. 12.")]


def list_(
    limit: Annotated[int, typer.Option(help="At most so many, e.g. --limit 5.")] = 20,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Rollouts, the newest first, and on how many live replicas each is applied.

    Example: safegene rollout list
    """
    with connect(url, key, key_file) as client:
        found = client.rollouts(limit=limit)
    columns = ("id", "kind", "tenants", "applied", "live", "done", "created_at", "created_by")
    show_list(found, columns, as_json)


def show(
    id: Id,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """One rollout: where it is applied, which replica lags, and why.

    Example: safegene rollout show 12
    """
    with connect(url, key, key_file) as client:
        found = client.rollout(id)
    if as_json:
        show_json(found)
    else:
        show_rollout(found)


def watch(
    id: Annotated[
        int | None,
        typer.Argument(metavar="[ID]", help="The rollout's number (default: the latest), e.g. 12."),
    ] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Stay until every live replica follows a rollout.

    Example: safegene rollout watch --timeout 60
    """
    with connect(url, key, key_file) as client:
        if id is None:
            id = max((rollout["id"] for rollout in client.rollouts(limit=1)), default=None)
        if id is None:
            raise ConfigError("there is no rollout to watch: nothing was published yet")
        found = follow_rollout(client, client.rollout(id), timeout)
    if as_json:
        show_json(found)
    else:
        show_rollout(found)


COMMANDS = {"list": list_, "show": show, "watch": watch}
