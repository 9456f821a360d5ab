"""Tenants of the settings' `tenants.directory`: registered at start unless the registry has them.

A registered tenant is changed over HTTP only, whatever its folder holds. A folder that is not a
tenant affects no other.
"""

from __future__ import annotations

import logging
from pathlib import Path

from safegene_server.tenants.context import TenantContext, aside
from safegene_server.tenants.profiles import Change
from safegene_server.tenants.service import register
from safegene_vllm.errors import ConfigError, RegistryDownError, SafegeneError
from safegene_vllm.formats.adapter import CONFIG_FILE
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.tenant_kind import slot_kind

logger = logging.getLogger("vllm.safegene_server")

ACTOR = "settings"


def find_declared(directory: Path) -> dict[str, Path]:
    """Tenants by name: every folder that holds an adapter or a profile, one or two levels down.

    `support` is the tenant "support", `acme/support` the tenant "acme/support".
    Errors: ConfigError if it cannot be read.
    """
    try:
        folders = [f for pattern in ("*", "*/*") for f in sorted(directory.glob(pattern))]
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is no directory")
    except OSError as error:
        raise ConfigError(f"tenants.directory cannot be read: {error}") from error
    return {
        folder.relative_to(directory).as_posix(): folder
        for folder in folders
        if any((folder / name).is_file() for name in (CONFIG_FILE, DESCRIPTION_FILE))
    }


async def register_declared(tenancy: TenantContext, directory: Path) -> list[str]:
    """Start onboarding for every tenant that the registry does not have; return their names.

    A folder that is neither an adapter nor a profile alone is logged as an error and passed over.
    Errors: ConfigError; RegistryDownError.
    """
    found = await aside(find_declared, directory)
    known = {tenant.name for tenant in await aside(tenancy.registry.tenants.list)}
    begun = []
    for name in sorted(found.keys() - known):
        try:
            await aside(slot_kind, found[name])
            await register(
                tenancy,
                name,
                source=str(found[name]),
                first=Change(),
                limits={},
                publish=True,
                actor=ACTOR,
            )
        except RegistryDownError:
            raise
        except SafegeneError as error:
            logger.error("tenant %r of %s is not registered: %s", name, directory, error)
        else:
            begun.append(name)
    return begun
