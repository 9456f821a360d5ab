"""Looking again and again until something has ended, also while the server restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from safegene_vllm.errors import ApiError

POLL_S = 0.5
PATIENCE_S = 60.0
"""How long a server that we are watching may be away, as it is while it restarts."""
_AWAY = {None, 502, 503, 504}
T = TypeVar("T")


def poll_until_done(
    look: Callable[[], T],
    ended: Callable[[T], bool],
    seen: Callable[[T], object],
    *,
    words: str,
    timeout_s: float | None,
    poll_s: float,
    patience_s: float,
) -> T:
    """What was found once it has ended; `seen` is called with every look, the last one too.

    Errors: TimeoutError that begins with `words`; ApiError if nobody answers for `patience_s`.
    """
    began = answered = time.monotonic()
    while True:
        try:
            found = look()
        except ApiError as error:
            if error.status not in _AWAY or time.monotonic() - answered >= patience_s:
                raise
        else:
            answered = time.monotonic()
            seen(found)
            if ended(found):
                return found
        if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
            raise TimeoutError(f"{words} after {timeout_s:g} s; it goes on, look again later")
        time.sleep(poll_s)
