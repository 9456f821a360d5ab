"""`safegene family ...`: make a family, and settings that hold for every tenant of one."""

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
from safegene_vllm.cli.console import clean, notes, results
from safegene_vllm.cli.family_make import make
from safegene_vllm.cli.profile import parse_coefficients
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client import Client
    from safegene_vllm.client.schemas import Family

HELP = "Make a family; minimum coefficients and freezes for all tenants of a running server."
NO_FLOOR = "none"

Named = Annotated[
    str,
    typer.Argument(
        metavar="FAMILY",
        help="The family: its name, its digest, or how the digest begins, e.g. qwen2.5-7b or 0f3a.",
    ),
]


def list_(server: Server, as_json: AsJson = False) -> None:
    """List the families the server has registered, with their minimum coefficients.

    Example: safegene family list
    """
    with server.connect() as client:
        found = client.families()
    show_list(found, ("name", "digest", "frozen", "floor", "created_at"), as_json)


def floor(
    family: Named,
    minimum: Annotated[
        str,
        typer.Argument(
            metavar="L:X,...",
            help="The minimum coefficient of single layers, or of the layers with a vector in a "
            "range, e.g. 3-9:0.5; none removes it.",
        ),
    ],
    waiting: Waiting,
    server: Server,
    as_json: AsJson = False,
) -> None:
    """Set the minimum coefficients of a family; tenants below them get a raised revision.

    Example: safegene family floor qwen2.5-7b 3-9:0.5
    """
    given = {} if minimum == NO_FLOOR else parse_coefficients(minimum, "the floor")
    with server.connect() as client:
        found = _find(client, family)
        if given:
            given = parse_coefficients(minimum, "the floor", found.layers)
            layers = ", ".join(f"{layer} at least {least:g}" for layer, least in given.items())
            notes().print(f"layers with a vector: {layers}")
        response = client.set_floor(found.digest, given)
        rollout = waiting.rollout(client, response.rollout)
    if as_json:
        show_json({"family": response.family, "rollout": rollout})
        return
    _print_family(response.family, False)
    show_rollout(rollout)


def freeze(family: Named, server: Server, as_json: AsJson = False) -> None:
    """Reject every change of every tenant of a family; serving continues.

    Example: safegene family freeze qwen2.5-7b
    """
    with server.connect() as client:
        _print_family(client.freeze_family(_find(client, family).digest), as_json)


def unfreeze(family: Named, server: Server, as_json: AsJson = False) -> None:
    """Allow changes of the tenants of a family again.

    Example: safegene family unfreeze qwen2.5-7b
    """
    with server.connect() as client:
        _print_family(client.unfreeze_family(_find(client, family).digest), as_json)


def _find(client: Client, name: str) -> Family:
    """Return the one family of this name or beginning of a digest. Errors: ConfigError."""
    families = client.families()
    named = [family for family in families if name in (family.name, family.digest)]
    start = name if name.startswith("sha256:") else f"sha256:{name}"
    found = named or [family for family in families if family.digest.startswith(start)]
    if len(found) == 1:
        return found[0]
    known = "".join(f"\n- {clean(family.name)}  {family.digest}" for family in families)
    how = f"{len(found)} families are" if found else "no family is"
    raise ConfigError(f"{how} named {name!r} or have such a digest; this server has:{known}")


def _print_family(family: Family, as_json: bool) -> None:
    if as_json:
        show_json(family)
    else:
        results().print(cell(family.name))
        show_facts(family, ("digest", "layers", "bounds", "floor", "frozen", "created_at"))


COMMANDS = {"make": make, "list": list_, "floor": floor, "freeze": freeze, "unfreeze": unfreeze}
