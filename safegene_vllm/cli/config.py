"""`safegene config check | init | show`: the settings file of a server with a registry."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from safegene_vllm.cli.console import clean, notes, results
from safegene_vllm.errors import ConfigError, raise_errors

HELP = "Check, write and show safegene.yaml, the settings file of `safegene serve`."
DEFAULT_FILE = Path("safegene.yaml")
SCHEMA_FILE = "safegene.schema.json"
_HIDDEN = "***"
_SECRET_PARTS = ("api-key", "token", "password", "secret")
_OF_SERVE = ("family", "apply", "slots", "base_profile")

FileArgument = Annotated[
    Path, typer.Argument(metavar="[FILE]", help="The settings file, e.g. safegene.yaml.")
]


def check(file: FileArgument = DEFAULT_FILE) -> None:
    """Check a settings file and all that it names, as `safegene serve` does, starting nothing.

    Tenants of `tenants.directory` that would not be served are errors here.

    Example: safegene config check safegene.yaml
    """
    from safegene_vllm.cli.serve import build
    from safegene_vllm.launcher import ServeOptions
    from safegene_vllm.launcher.preflight import check_server_config

    raw = _read(file)
    if "serve" in raw:
        launch = build(ServeOptions(model="", server_config=file))
        warnings = [note for note in launch.notes if note.startswith("warning: ")]
    else:
        found = check_server_config(file, None, os.environ)
        raise_errors(found.errors)
        warnings = found.warnings
    raise_errors([ConfigError(warning.removeprefix("warning: ")) for warning in warnings])
    part = "" if "serve" in raw else " (no `serve:` part: model and family are not checked)"
    results().print(f"{file}: OK{part}")


def init(
    out: Annotated[
        Path, typer.Option(help="The file to write, e.g. deploy/safegene.yaml.")
    ] = DEFAULT_FILE,
    model: Annotated[
        str, typer.Option(help="The base model, e.g. models/aligned.")
    ] = "models/aligned",
    family: Annotated[
        str, typer.Option(help="Directory of the safety vector, e.g. families/mine.")
    ] = "families/mine",
) -> None:
    """Write a settings file to edit, and its JSON schema for editors in the same directory.

    Example: safegene config init --model models/aligned --family families/mine
    """
    from safegene_vllm.launcher.preflight import config_schema

    if out.exists():
        raise ConfigError(f"--out {out} exists; name a new file.")
    schema = out.parent / SCHEMA_FILE
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_TEMPLATE.format(model=json.dumps(model), family=json.dumps(family)))
    schema.write_text(json.dumps(config_schema(), indent=1) + "\n")
    results().print(f"{out}: written; its schema for editors is {schema}")
    notes().print(
        f"next: export SAFEGENE_ADMIN_KEY=..., safegene config check {out}, "
        f"safegene serve --server-config {out}"
    )


def show(
    context: typer.Context,
    file: FileArgument = DEFAULT_FILE,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object per key, e.g. for jq.")
    ] = False,
) -> None:
    """Show the effective settings and their origins: default, file, environment or flag.

    Flags of `safegene serve` may follow. Secrets are not shown.

    Example: safegene config show safegene.yaml --port 9000
    """
    rows = list(effective_rows(file, tuple(context.args)))
    if as_json:
        print(json.dumps([dict(zip(("key", "value", "origin"), row, strict=True)) for row in rows]))
        return
    width = max(len(key) for key, *_ in rows)
    for key, value, origin in rows:
        shown = clean(json.dumps(value, ensure_ascii=False))
        results().print(f"{key:<{width}}  {origin:<11}  {shown}")


COMMANDS = {"check": check, "init": init, "show": show}
CONTEXTS = {"show": {"allow_extra_args": True, "ignore_unknown_options": True}}


def effective_rows(file: Path, vllm_args: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    """Key, value and origin of every setting; raises ConfigError for an invalid file."""
    from safegene_vllm.launcher.preflight import server_preflight
    from safegene_vllm.launcher.vllm_args import VllmArgs

    raw = _read(file)
    settings = server_preflight().effective_settings(file)
    yield from _serve_rows(file, raw, VllmArgs(vllm_args))
    values = settings.model_dump(mode="json", exclude={"serve"})
    for path, value in _flatten(values):
        key = ".".join(path)
        if _is_set(path, os.environ):
            origin = "environment"
        else:
            origin = "file" if _in(raw, path) else "default"
        yield key, _masked(key, value), origin


def _serve_rows(file: Path, raw: Mapping[str, Any], flags: Any) -> Iterator[tuple[str, Any, str]]:
    from safegene_vllm.launcher import read_config_file

    given = {name: flags.values(name) for name in dict.fromkeys(flags.names())}
    rows: dict[str, tuple[Any, str]] = {}
    if "serve" in raw:
        values = read_config_file(file).model_dump(mode="json")
        for path, value in _flatten(values):
            origin = "file" if _in(raw["serve"], path) else "default"
            name = path[1].replace("_", "-") if path[0] == "vllm" and path[1:] else ""
            key = ".".join(("serve", "vllm", name, *path[2:]) if name else ("serve", *path))
            rows[key] = value, origin
    for name, words in given.items():
        field = name.replace("-", "_")
        key = f"serve.{field}" if field in _OF_SERVE else f"serve.vllm.{name}"
        rows[key] = (words[0] if len(words) == 1 else words or True), "flag"
    for key, (value, origin) in rows.items():
        yield key, _masked(key, value), origin


def _read(file: Path) -> dict[str, Any]:
    """Read the file's keys as they are. Raises ConfigError."""
    from safegene_vllm.launcher.config_file import read_yaml

    raw = read_yaml(file)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds {type(raw).__name__}, expected keys such as `registry:`.")
    return raw


def _flatten(
    values: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _in(raw: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(raw, Mapping) or name not in raw:
            return False
        raw = raw[name]
    return True


def _is_set(path: tuple[str, ...], environ: Mapping[str, str]) -> bool:
    """Whether an environment variable sets the key, or a section that it is in."""
    names = {name.upper() for name in environ}
    return any(
        f"SAFEGENE_SERVER_{'__'.join(path[:depth])}".upper() in names
        for depth in range(1, len(path) + 1)
    )


def _masked(key: str, value: Any) -> Any:
    """Hide values that are secret, or may hold one."""
    if key == "registry" and isinstance(value, str) and "://" in value:
        scheme, _, rest = value.partition("://")
        credentials, at, place = rest.rpartition("@")
        user = credentials.partition(":")[0]
        return f"{scheme}://{user}:{_HIDDEN}@{place}" if at and ":" in credentials else value
    name = key.rpartition(".")[2].replace("_", "-")
    hidden = key.startswith("sources.options.") or (
        key.startswith("serve.vllm.") and any(part in name for part in _SECRET_PARTS)
    )
    return _HIDDEN if hidden else value


_TEMPLATE = """\
# yaml-language-server: $schema=safegene.schema.json
# Start with: safegene serve --server-config safegene.yaml
# Paths are relative to this file. `safegene config check` checks it, `config show` lists all keys.

serve:                          # the engine to start
  model: {model}
  family: {family}
  vllm:                         # any vLLM flags by name
    port: 8000

registry: registry.sqlite       # or postgresql://USER@HOST/DATABASE; with a password: registry_file
store: store                    # this machine's copies of adapters

keys:                           # further keys are made with `safegene key add`
  - {{name: admin, secret_env: SAFEGENE_ADMIN_KEY, scopes: [admin, serve], tenants: ["*"]}}

# tenants:
#   directory: tenants          # each folder in it with an adapter or a profile is a tenant
# sources:
#   roots: [/srv/adapters]      # adapters are read only from below these
"""
