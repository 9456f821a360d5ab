"""What stands around the host's punica wrapper: what it does not do itself goes to the host's.

For the products of one layer each, and for what hears of the host's steps. The host asks a wrapper
for whatever it likes, and its next release may ask for more.
"""

from __future__ import annotations

from typing import Any


class PunicaProxy:
    """A punica wrapper, or another one of these, with some of its methods replaced."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: while it is unpickled, or copied
            raise AttributeError(name)
        return getattr(self.inner, name)
