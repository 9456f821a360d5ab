"""Proxy of vLLM's punica wrapper: overrides some methods, forwards the rest."""

from __future__ import annotations

from typing import Any


class PunicaProxy:
    """A punica wrapper (or another proxy) with some of its methods replaced.

    Forwards by attribute, not by a list of methods: a newer vLLM may call methods that this one
    does not have.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while the object is unpickled or copied
            raise AttributeError(name)
        return getattr(self.inner, name)
