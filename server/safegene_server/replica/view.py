"""Conversion of a registry snapshot to the catalog view of the access check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_server.access.catalog import Limits, Principal, Tenant, View, make_view
from safegene_server.registry import Key, Snapshot
from safegene_server.registry.validation import BASE


def view_of(snapshot: Snapshot, family: str, serving: Mapping[str, str], models: Any) -> View:
    """Build the view: all keys, and this family's tenants with the revision that serves them.

    `serving` maps a tenant to its served name, of what this engine has loaded and verified;
    `models` is vLLM's OpenAIServingModels.
    """
    return make_view(
        keys={bytes.fromhex(key.hash): principal_of_key(key) for key in snapshot.keys},
        tenants=[
            Tenant(
                name=tenant.name,
                served=serving.get(tenant.name),
                limits=Limits(**tenant.limits),
                created=int(tenant.created_at.timestamp()),
            )
            for tenant in snapshot.tenants
            if tenant.family == family
        ],
        base_models=[model.name for model in models.base_model_paths],
        max_model_len=models.model_config.max_model_len,
    )


def principal_of_key(key: Key) -> Principal:
    """Principal of a key.

    The base model is a separate grant, and the registry allows no key to have it as its default.
    """
    return Principal(
        name=key.name,
        scopes=frozenset(key.scopes),
        tenants=frozenset(key.tenants) - {BASE},
        default_tenant=key.default_tenant,
        expires_at=None if key.expires_at is None else key.expires_at.timestamp(),
        base=BASE in key.tenants,
    )
