"""Which model a request means, and the models that a key may see.

For names alone. A model that is not there and one that is somebody else's are refused in the same
words. Asks the engine nothing: what the catalog says is what exists.
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
    """`served` is the name the engine knows; `account` is who is charged for it."""

    account: str
    served: str
    limits: Limits


def resolve(view: View, principal: Principal, asked: object) -> Target:
    """What `model` of a body leads to: alias, revision, base model, or the key's default tenant.

    Errors: Refusal, 400 (not a name, or none and no default) or 404.
    """
    if asked is not None and not isinstance(asked, str):
        found = type(asked).__name__
        raise RequestRejectedError(
            400, f"`model` is a {found}; expected a string.", param="model", reason="model"
        )
    name = asked or principal.default_tenant
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
    shown = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "…"
    return RequestRejectedError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        param="model",
        reason="model",
    )


def find(view: View, principal: Principal, name: str) -> Target | None:
    """None for what is not there, not published, or not this key's: the three look alike."""
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
    """The body of GET /v1/models: base models if granted, then the tenants by name."""
    names = dict.fromkeys((*view.base_models, *sorted(view.tenants)))
    targets = {name: find(view, principal, name) for name in names}
    cards = [_card(view, name, target) for name, target in targets.items() if target]
    return {"object": "list", "data": cards}


def describe(view: View, principal: Principal, name: str) -> dict[str, Any]:
    """The body of GET /v1/models/{name}. Errors: Refusal, 404."""
    target = find(view, principal, name)
    if target is None:
        raise not_found(name)
    return _card(view, name, target)


def _card(view: View, name: str, target: Target) -> dict[str, Any]:
    """OpenAI's four fields; `root` is the revision that answers, where vLLM would show a path."""
    base = name in view.base_models
    return {
        "id": name,
        "object": "model",
        "created": 0 if base else view.tenants[target.account].created,
        "owned_by": OWNER,
        "root": target.served,
    }
