"""Polling until a job or rollout has ended, also across a restart of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from safegene_vllm.errors import ApiError

POLL_S = 0.5
PATIENCE_S = 60.0
"""Seconds for which a polled server may be down, as during a restart."""
_DOWN = {None, 502, 503, 504}
T = TypeVar("T", bound=Mapping[str, Any])


def poll_until_done(
    poll: Callable[[], T],
    ended: Callable[[T], bool],
    seen: Callable[[T], object],
    *,
    unfinished: str,
    timeout_s: float | None,
    poll_s: float,
    patience_s: float,
) -> T:
    """Poll until `ended` and return the last result; `seen` is called with every result.

    Errors: TimeoutError that begins with `unfinished`; ApiError without response for `patience_s`,
    or if the number stands for another object since the server's registry was restored.
    """
    began = responded = time.monotonic()
    created_at = None
    while True:
        try:
            found = poll()
        except ApiError as error:
            if error.status not in _DOWN or time.monotonic() - responded >= patience_s:
                raise
        else:
            responded = time.monotonic()
            created_at = created_at or found["created_at"]
            if found["created_at"] != created_at:
                raise ApiError(
                    f"{unfinished}, and its number now stands for another one (created "
                    f"{created_at} and {found['created_at']}): the server's registry was restored",
                    advice="list them again",
                )
            seen(found)
            if ended(found):
                return found
        if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
            raise TimeoutError(
                f"{unfinished} after {timeout_s:g} s; it continues, check again later"
            )
        time.sleep(poll_s)
