"""Resolution of a request's model name, and the list of models that a key may see.

Both come from the catalog alone. An unknown model and another key's are rejected with the same
message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safegene_server.access.catalog import Limits, Principal, View
from safegene_server.access.rejection import RequestRejectedError

OWNER = "safegene"
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Target:
    """A resolved model: `served` is the engine's name, `account` the name it is charged to."""

    account: str
    served: str
    limits: Limits


def resolve(view: View, principal: Principal, requested: object) -> Target:
    """Resolve `model` of a body: alias, revision, base model, or the key's default tenant.

    Errors: RequestRejectedError, 400 (not a name, or none and no default) or 404.
    """
    if requested is not None and not isinstance(requested, str):
        found = type(requested).__name__
        raise RequestRejectedError(
            400, f"`model` is a {found}; expected a string.", param="model", reason="model"
        )
    name = requested or principal.default_tenant
    if not name:
        raise RequestRejectedError(
            400,
            "the request names no `model`, and this key has no default tenant; name one of those "
            "that GET /v1/models lists.",
            param="model",
            reason="model",
        )
    target = find(view, principal, name)
    if target is None:
        raise not_found(name)
    return target


def not_found(name: str) -> RequestRejectedError:
    """Make the 404 of a model that is unknown or another key's."""
    shown = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "…"
    return RequestRejectedError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        param="model",
        reason="model",
    )


def find(view: View, principal: Principal, name: str) -> Target | None:
    """Resolve a name; None alike for an unknown, an unpublished and another key's model."""
    if name in view.base_models:
        return Target(name, name, view.base_limits) if principal.base else None
    owner = name.partition("@")[0]
    tenant = view.tenants.get(owner)
    if tenant is None or not principal.may_use(owner):
        return None
    served = tenant.served if name == owner else name
    if served is None or (served != tenant.served and served not in tenant.also):
        return None
    return Target(owner, served, tenant.limits)


def listing(view: View, principal: Principal) -> dict[str, Any]:
    """Make the body of GET /v1/models: base models if granted, then the tenants by name."""
    names = dict.fromkeys((*view.base_models, *sorted(view.tenants)))
    targets = {name: find(view, principal, name) for name in names}
    cards = [_card(view, principal, name, target) for name, target in targets.items() if target]
    return {"object": "list", "data": cards}


def describe(view: View, principal: Principal, name: str) -> dict[str, Any]:
    """Make the body of GET /v1/models/{name}. Errors: RequestRejectedError, 404."""
    target = find(view, principal, name)
    if target is None:
        raise not_found(name)
    return _card(view, principal, name, target)


def _card(view: View, principal: Principal, name: str, target: Target) -> dict[str, Any]:
    """Make a model card with vLLM's fields; `root` is the served revision in place of a path.

    `parent`, the base model, may be a path too: it is shown to keys that may use it.
    """
    base = name in view.base_models
    parents = () if base or not principal.base else view.base_models
    created = 0 if base else view.tenants[target.account].created
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": target.served,
        "parent": next(iter(parents), None),
        "max_model_len": view.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
