"""Checks of a settings file before a server starts, without opening the registry.

For `safegene serve` and `safegene config`, which import this module by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safegene_server.registry import validation
from safegene_server.registry.database import parse_url
from safegene_server.registry.keys import check_secret
from safegene_server.settings import ENV, FirstKey, ServerSettings, read_settings
from safegene_server.tenants import read_prompts
from safegene_server.tenants.declared import find_declared
from safegene_vllm.errors import ConfigError, RegistryError, SafegeneError


def check_settings(
    path: Path, environ: Mapping[str, str] = os.environ
) -> tuple[list[SafegeneError], list[SafegeneError], dict[str, Path]]:
    """Check a settings file and what it names.

    Returns its errors, errors in the names of declared tenants, and the directories of the others.
    """
    try:
        settings = read_settings({**environ, ENV: str(path)})
    except SafegeneError as error:
        return [error], [], {}
    assert settings is not None
    declared: dict[str, Path] = {}

    def find_tenants() -> None:
        if settings.tenants.directory is not None:
            declared.update(find_declared(settings.tenants.directory))

    checks: list[Callable[[], Any]] = [
        lambda: _check_registry(settings),
        lambda: _check_writable("store", settings.store),
        settings.source_rules,
        lambda: read_prompts(settings.tenants.gate.prompts),
        lambda: read_prompts(settings.probes.prompts),
        find_tenants,
        *(partial(_check_key, key, environ) for key in settings.keys),
    ]
    errors: list[SafegeneError] = []
    for check in checks:
        try:
            check()
        except SafegeneError as error:
            errors.append(type(error)(f"{path}: {error}"))
    named: dict[str, Path] = {}
    unnamed: list[SafegeneError] = []
    for name, directory in declared.items():
        try:
            named[validation.tenant_name(name)] = directory
        except SafegeneError as error:
            unnamed.append(type(error)(f"{directory}: {error}"))
    return errors, unnamed, named


def effective_settings(path: Path, environ: Mapping[str, str] = os.environ) -> ServerSettings:
    """Read the settings that a server would start with. Raises ConfigError."""
    settings = read_settings({**environ, ENV: str(path)})
    assert settings is not None
    return settings


def settings_schema() -> dict[str, Any]:
    """JSON schema of the settings, without the `serve` part."""
    return ServerSettings.model_json_schema()


def _check_key(key: FirstKey, environ: Mapping[str, str]) -> None:
    """Check a key as the registry will. Errors: ConfigError, RegistryError."""
    try:
        secret = key.secret(environ)
        validation.line(key.name, "key name", 100)
        validation.scopes(key.scopes)
        validation.key_tenants(key.tenants, key.default_tenant)
        if key.default_tenant is not None:
            validation.tenant_name(key.default_tenant)
        check_secret(secret)
    except RegistryError as error:
        raise RegistryError(f"key {key.name!r}: {error}") from error


def _check_registry(settings: ServerSettings) -> None:
    url = parse_url(settings.registry_url())
    if url.get_backend_name() == "sqlite" and url.database:
        folder = Path(url.database).parent
        if not folder.is_dir():
            raise ConfigError(f"registry {url.database}: {folder} is not a directory.")
        _check_writable("registry", folder)


def _check_writable(key: str, directory: Path) -> None:
    """Raise ConfigError if a directory can neither be written to nor created."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{key} {directory}: {place} is not a directory.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key} {directory}: {place} is not writable.")
