"""Checks before vLLM starts, of everything besides the family's and the tenants' files.

The model, vLLM's flags, directories that must be writable, and the server's settings file.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.launcher.artifacts import read_declared
from safegene_vllm.launcher.config_file import ConfigFile
from safegene_vllm.launcher.vllm_args import ServeOptions, VllmArgs
from safegene_vllm.launcher.vllm_install import VllmInstall, unknown_flags
from safegene_vllm.model_source import check_model
from safegene_vllm.settings import Settings

SERVER_PREFLIGHT = "safegene_server.preflight"
"""Module of the server with the checks of its settings; imported only when they are needed."""


@dataclass
class Findings:
    """Errors stop the start; warnings are of tenants that the server would leave out."""

    errors: list[SafegeneError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_before_start(
    options: ServeOptions,
    flags: VllmArgs,
    settings: Settings,
    header: FamilyHeader | None,
    environ: Mapping[str, str],
    vllm: VllmInstall,
) -> Findings:
    """Check model, flags, directories and settings file, and collect the errors."""
    found = Findings(list(unknown_flags(flags, vllm)))
    try:
        check_model(options.model, revision=flags.value("revision"), environ=environ)
    except SafegeneError as error:
        found.errors.append(error)
    for name, path in (
        ("safegene.staging_dir", settings.staging_dir),
        ("--download-dir", flags.value("download-dir")),
    ):
        if path is not None and (problem := unwritable(Path(path))):
            found.errors.append(ConfigError(f"{name} {path}: {problem}."))
    if options.server_config is not None and options.server_config.is_file():
        server = check_server_config(options.server_config, header, environ)
        found.errors += server.errors
        found.warnings += server.warnings
    return found


def check_server_config(
    path: Path, header: FamilyHeader | None, environ: Mapping[str, str]
) -> Findings:
    """Check the server's settings file and what it names; tenants only give warnings."""
    errors, unnamed, declared = server_preflight().check_settings(path, environ)
    left_out = [*unnamed, *read_declared(declared, header)]
    return Findings(
        errors,
        [f"warning: {path}: tenants.directory: not served: {error}" for error in left_out],
    )


def server_preflight() -> Any:
    """Import the server's checks. Raises ConfigError if its dependencies are not installed."""
    try:
        return importlib.import_module(SERVER_PREFLIGHT)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a registry needs the server's dependencies ({error.name} is missing): "
            "pip install 'safegene-vllm[server]'"
        ) from error


def config_schema() -> dict[str, Any]:
    """JSON schema of safegene.yaml for editors, made from the settings' models."""
    schema: dict[str, Any] = server_preflight().settings_schema()
    serve = ConfigFile.model_json_schema()
    schema["properties"]["serve"] = serve
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **schema, "title": "safegene.yaml"}


def unwritable(directory: Path) -> str | None:
    """Reason why `directory` can neither be written to nor created; None if it can."""
    place = directory.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} is not writable"
    return None


def check_address(bind: tuple[str, int] | None) -> None:
    """Check that the server can listen on `bind`, as vLLM does. Raises ConfigError."""
    if bind is None:
        return
    host, port = bind
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            # Two sockets may be bound to one port with SO_REUSEADDR, but only one may listen.
            sock.listen(1)
        except OSError as error:
            raise ConfigError(_address_problem(host, port, error)) from error


def _address_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use by another process; stop that one, or give another port with "
            "--port."
        )
    if error.errno == errno.EACCES:
        return f"--port {port}: needs root; give one from 1024."
    return f"--host {host or '0.0.0.0'} --port {port}: cannot listen there: {error}."
