"""`safegene key ...`: who may ask a running server what. A secret is told once."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

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
    moment,
    show_json,
    show_list,
)
from safegene_vllm.cli.console import notes, results
from safegene_vllm.errors import ConfigError

HELP = "API keys of a running server: what each may do, and for which tenants."

Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, e.g. acme-app.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Write the secret into this new file, readable by you alone, e.g. --out acme.key. "
        "Else it is all that stdout gets."
    ),
]


def add(
    name: Name,
    tenant: Annotated[
        list[str],
        typer.Option(
            help="A tenant it may use; may be repeated; '*' is all of them, base the base model, "
            "e.g. --tenant acme/support."
        ),
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="serve (ask models), read (look at tenants) or admin (change them); may be "
            "repeated, e.g. --scope serve --scope read.",
            show_default="serve",
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            metavar="TENANT",
            help="Who answers a request that names no model, e.g. --default acme/support.",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="A time from now, or a date, e.g. --expires 90d (default: never)."
        ),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Make a key. Its secret is told this once; the server keeps a hash of it.

    Example: safegene key add acme-app --tenant acme/support --default acme/support --expires 90d
    """
    now = datetime.now(UTC)
    expires_at = None if expires is None else instant(expires, "--expires", now, ahead=True)
    if expires_at is not None and datetime.fromisoformat(expires_at) <= now:
        raise ConfigError(f"--expires {expires!r} is not in the future")
    with connect(url, key, key_file) as client, _Secret(out) as secret:
        made = client.add_key(
            name,
            scopes=scope or ["serve"],
            tenants=tenant,
            default_tenant=default,
            expires_at=expires_at,
        )
        secret.tell(dict(made), as_json)


def list_(
    as_json: AsJson = False, url: Url = LOCAL, key: KeyText = None, key_file: KeyFile = None
) -> None:
    """All keys, without their secrets.

    Example: safegene key list
    """
    with connect(url, key, key_file) as client:
        found = client.keys()
    columns = ("name", "prefix", "scopes", "tenants", "default_tenant", "expires_at", "revoked_at")
    show_list(found, columns, as_json)


def rotate(
    name: Name,
    out: Out = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Give a key another secret. The old one ends at once.

    Example: safegene key rotate acme-app --out acme.key
    """
    with connect(url, key, key_file) as client, _Secret(out) as secret:
        secret.tell(dict(client.rotate_key(name)), as_json)


def revoke(
    name: Name,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """End a key. It lets nobody in any more.

    Example: safegene key revoke acme-app
    """
    with connect(url, key, key_file) as client:
        answer = client.revoke_key(name)
    if as_json:
        show_json(answer)
    else:
        results().print(f"{cell(name)} is revoked")


class _Secret:
    """Where a secret goes: a file, which must be new before the server is asked, or stdout."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._told = False

    def __enter__(self) -> _Secret:
        if self._out is not None:
            try:
                os.close(os.open(self._out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                raise ConfigError(f"--out {self._out} exists; name a new file") from None
        return self

    def __exit__(self, *error: object) -> None:
        if self._out is not None and not self._told:
            self._out.unlink(missing_ok=True)

    def tell(self, made: dict[str, Any], as_json: bool) -> None:
        secret = str(made["secret"])
        if self._out is not None:
            self._out.write_text(secret + "\n", encoding="utf-8")
            self._told = True
            made = {name: value for name, value in made.items() if name != "secret"}
        if as_json:
            show_json(made)
            return
        until = f"until {moment(made['expires_at'])}" if made["expires_at"] else "until revoked"
        scopes, tenants = cell(made["scopes"]), cell(made["tenants"])
        notes().print(f"{cell(made['name'])}: may {scopes} for {tenants}, {until}")
        if self._out is None:
            notes().print("keep the secret now; nobody can show it again:")
            results().print(secret)


COMMANDS = {"add": add, "list": list_, "rotate": rotate, "revoke": revoke}
