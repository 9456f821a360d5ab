"""`safegene family ...`: what holds for every tenant of a family on a running server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    KeyFile,
    KeyText,
    Timeout,
    Url,
    Wait,
    cell,
    connect,
    follow_rollout,
    show_facts,
    show_json,
    show_list,
    show_rollout,
)
from safegene_vllm.cli.console import results
from safegene_vllm.cli.profile import parse_coefficients

HELP = "What holds for all tenants of a family on a running server: a floor, a freeze."
NO_FLOOR = "none"

Digest = Annotated[
    str, typer.Argument(metavar="DIGEST", help="The family, as of `family list`, e.g. sha256:0f3a.")
]


def list_(
    as_json: AsJson = False, url: Url = LOCAL, key: KeyText = None, key_file: KeyFile = None
) -> None:
    """The families the server knows, each with its floor.

    Example: safegene family list
    """
    with connect(url, key, key_file) as client:
        found = client.families()
    show_list(found, ("name", "digest", "frozen", "floor", "created_at"), as_json)


def floor(
    family: Digest,
    least: Annotated[
        str,
        typer.Argument(
            metavar="L:X,...",
            help="The least coefficient of single layers or ranges, e.g. 3-9:0.5; none for none.",
        ),
    ],
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Let no tenant of a family be served below these coefficients. Who is gets a raised revision.

    Example: safegene family floor sha256:0f3a... 3-9:0.5
    """
    given = {} if least == NO_FLOOR else parse_coefficients(least, "the floor")
    with connect(url, key, key_file) as client:
        answer = client.set_floor(family, given)
        if wait and answer["rollout"] is not None:
            answer["rollout"] = follow_rollout(client, answer["rollout"], timeout)
    if as_json:
        show_json(answer)
        return
    _show(answer["family"], False)
    if answer["rollout"] is not None:
        show_rollout(answer["rollout"])


def freeze(
    family: Digest,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Refuse every change of every tenant of a family; serving goes on.

    Example: safegene family freeze sha256:0f3a...
    """
    with connect(url, key, key_file) as client:
        _show(client.freeze_family(family), as_json)


def unfreeze(
    family: Digest,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Let the tenants of a family be changed again.

    Example: safegene family unfreeze sha256:0f3a...
    """
    with connect(url, key, key_file) as client:
        _show(client.unfreeze_family(family), as_json)


def _show(family: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(family)
    else:
        results().print(cell(family["name"]))
        show_facts(family, ("digest", "layers", "bounds", "floor", "frozen", "created_at"))


COMMANDS = {"list": list_, "floor": floor, "freeze": freeze, "unfreeze": unfreeze}
