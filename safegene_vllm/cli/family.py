"""`safegene family ...`: settings of a running server that hold for every tenant of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.client_options import (
    AsJson,
    Server,
    Waiting,
    cell,
    show_facts,
    show_json,
    show_list,
    show_rollout,
)
from safegene_vllm.cli.console import results
from safegene_vllm.cli.profile import parse_coefficients

if TYPE_CHECKING:
    from safegene_vllm.client.schemas import Family

HELP = "Manage families of a running server: minimum coefficients and freezes for all tenants."
NO_FLOOR = "none"

Digest = Annotated[
    str, typer.Argument(metavar="DIGEST", help="The family, as of `family list`, e.g. sha256:0f3a.")
]


def list_(server: Server, as_json: AsJson = False) -> None:
    """List the families the server has registered, with their minimum coefficients.

    Example: safegene family list
    """
    with server.connect() as client:
        found = client.families()
    show_list(found, ("name", "digest", "frozen", "floor", "created_at"), as_json)


def floor(
    family: Digest,
    minimum: Annotated[
        str,
        typer.Argument(
            metavar="L:X,...",
            help="The minimum coefficient of layers or ranges, e.g. 3-9:0.5; none removes it.",
        ),
    ],
    waiting: Waiting,
    server: Server,
    as_json: AsJson = False,
) -> None:
    """Set the minimum coefficients of a family; tenants below them get a raised revision.

    Example: safegene family floor sha256:0f3a... 3-9:0.5
    """
    given = {} if minimum == NO_FLOOR else parse_coefficients(minimum, "the floor")
    with server.connect() as client:
        response = client.set_floor(family, given)
        rollout = waiting.rollout(client, response.rollout)
    if as_json:
        show_json({"family": response.family, "rollout": rollout})
        return
    _print_family(response.family, False)
    show_rollout(rollout)


def freeze(family: Digest, server: Server, as_json: AsJson = False) -> None:
    """Reject every change of every tenant of a family; serving continues.

    Example: safegene family freeze sha256:0f3a...
    """
    with server.connect() as client:
        _print_family(client.freeze_family(family), as_json)


def unfreeze(family: Digest, server: Server, as_json: AsJson = False) -> None:
    """Allow changes of the tenants of a family again.

    Example: safegene family unfreeze sha256:0f3a...
    """
    with server.connect() as client:
        _print_family(client.unfreeze_family(family), as_json)


def _print_family(family: Family, as_json: bool) -> None:
    if as_json:
        show_json(family)
    else:
        results().print(cell(family.name))
        show_facts(family, ("digest", "layers", "bounds", "floor", "frozen", "created_at"))


COMMANDS = {"list": list_, "floor": floor, "freeze": freeze, "unfreeze": unfreeze}
