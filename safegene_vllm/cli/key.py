"""`safegene key ...`: API keys of a running server."""

from __future__ import annotations

import difflib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.client_options import (
    AsJson,
    Server,
    cell,
    instant,
    show_json,
    show_list,
    timestamp,
)
from safegene_vllm.cli.console import notes, results
from safegene_vllm.errors import ApiError, ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client import Client
    from safegene_vllm.client.schemas import NewKey

HELP = "Manage API keys of a running server: scopes, tenants, expiry."

Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, e.g. acme-app.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Write the secret into this new file, readable by you alone, e.g. --out acme.key. "
        "Without it, stdout gets the secret and nothing else."
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
    server: Server,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="serve (query models), read (show tenants) or admin (change them); may be "
            "repeated, e.g. --scope serve --scope read.",
            show_default="serve",
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            metavar="TENANT",
            help="Model of requests that name none, e.g. --default acme/support.",
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
) -> None:
    """Create a key. Its secret is shown this once; the server stores only a hash.

    Example: safegene key add acme-app --tenant acme/support --default acme/support --expires 90d
    """
    now = datetime.now(UTC)
    expires_at = None if expires is None else instant(expires, "--expires", now, ahead=True)
    if expires_at is not None and datetime.fromisoformat(expires_at) <= now:
        raise ConfigError(f"--expires {expires!r} is not in the future")
    with server.connect() as client, _SecretOutput(out) as secret:
        made = client.add_key(
            name,
            scopes=scope or ["serve"],
            tenants=tenant,
            default_tenant=default,
            expires_at=expires_at,
        )
        secret.write(made, as_json)
        _warn_of_missing(client, tenant)


def list_(server: Server, as_json: AsJson = False) -> None:
    """List all keys, without their secrets.

    Example: safegene key list
    """
    with server.connect() as client:
        found = client.keys()
    columns = ("name", "prefix", "scopes", "tenants", "default_tenant", "expires_at", "revoked_at")
    show_list(found, columns, as_json)


def rotate(name: Name, server: Server, out: Out = None, as_json: AsJson = False) -> None:
    """Replace a key's secret. The old one is invalid at once.

    Example: safegene key rotate acme-app --out acme.key
    """
    with server.connect() as client, _SecretOutput(out) as secret:
        secret.write(client.rotate_key(name), as_json)


def revoke(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Revoke a key. Requests with it are rejected from now on.

    Example: safegene key revoke acme-app
    """
    with server.connect() as client:
        response = client.revoke_key(name)
    if as_json:
        show_json(response)
    else:
        results().print(f"{cell(name)} is revoked")


def _warn_of_missing(client: Client, tenants: list[str]) -> None:
    """Note the tenants of a new key that the server does not have yet."""
    named = [name for name in tenants if name not in ("*", "base")]
    if not named:
        return
    try:
        known = {found.name for found in client.tenants()}
    except ApiError:
        # The key exists; that it cannot be compared is no failure of it.
        return
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            notes().print(f"warning: the server has no tenant {cell(name)} yet{hint}")


class _SecretOutput:
    """Destination of a secret: stdout, or a file, created before the server makes the secret."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._written = False

    def __enter__(self) -> _SecretOutput:
        if self._out is not None:
            try:
                os.close(os.open(self._out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                raise ConfigError(f"--out {self._out} exists; name a new file") from None
        return self

    def __exit__(self, *error: object) -> None:
        if self._out is not None and not self._written:
            self._out.unlink(missing_ok=True)

    def write(self, made: NewKey, as_json: bool) -> None:
        if self._out is not None:
            self._out.write_text(made.secret + "\n", encoding="utf-8")
            self._written = True
        if as_json:
            written = {"secret"} if self._out is not None else None
            show_json(made.model_dump(mode="json", exclude=written))
            return
        until = f"until {timestamp(made.expires_at)}" if made.expires_at else "until revoked"
        scopes, tenants = cell(made.scopes), cell(made.tenants)
        notes().print(f"{cell(made.name)}: may {scopes} for {tenants}, {until}")
        if self._out is None:
            notes().print("store the secret now; it cannot be shown again:")
            results().print(made.secret)


COMMANDS = {"add": add, "list": list_, "rotate": rotate, "revoke": revoke}
