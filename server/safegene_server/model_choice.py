"""Keeps vLLM from choosing an adapter that the request does not name.

vLLM serves a chat request for the base model with an adapter whose name is the first word of a
content part's `type` (`text`, `image`, ...), and a client may write such a type so that it begins
with any adapter's name. With a registry that would bypass what the key may use.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import State

CHOICE = "_get_active_default_mm_loras"
"""vLLM's method: the adapter of a request that names none, from the types of its content parts."""


def serve_named_adapters_only(state: State) -> None:
    """Disable the choice in every serving object of the app, in place.

    --default-mm-loras, which needs it, is rejected by the workers before they load.
    """
    for serving in list(state._state.values()):
        if callable(getattr(serving, CHOICE, None)):
            setattr(serving, CHOICE, _no_adapter)


def _no_adapter(request: Any) -> None:
    """Return None: the base model serves the request."""
