"""Limits per tenant: requests in flight, requests per minute and tokens per minute.

The counts are of this process: with N API processes or replicas a tenant may use N times as much.
For one event loop, without locks.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from safegene_server.access.models import Target
from safegene_server.access.rejection import RequestRejectedError

WINDOW_S = 60.0
SLACK_S = 1e-6
"""Rounding error of summed seconds: without it a client that waits exactly `Retry-After` would be
rejected again."""


class SlidingWindow:
    """Amounts of the last minute, oldest first."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int]] = deque()
        self.total = 0

    def add(self, now: float, amount: int) -> None:
        """Add an amount used now."""
        self.entries.append((now, amount))
        self.total += amount

    def used(self, now: float) -> int:
        """Return the sum of the last minute."""
        while self.entries and self.entries[0][0] <= now - WINDOW_S + SLACK_S:
            self.total -= self.entries.popleft()[1]
        return self.total

    def wait_s(self, now: float, limit: int) -> float:
        """Return the seconds until at most `limit` is used, if nothing is added."""
        left, wait = self.used(now), 0.0
        for at, amount in self.entries:
            if left <= limit:
                break
            left -= amount
            wait = at + WINDOW_S - now
        return wait


@dataclass
class Account:
    """Counts of one tenant: `running` completions, and the tokens `reserved` for them."""

    running: int = 0
    reserved: int = 0
    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)


class Reservation:
    """One admitted request, to be closed once it has ended, however it ended."""

    def __init__(
        self, counters: Counters, target: Target, estimate_tokens: int, completions: int
    ) -> None:
        self._counters = counters
        self._target = target
        self._estimate = estimate_tokens
        self._completions = completions
        self._open = True

    def close(self, tokens: int) -> None:
        """Release the reservation and charge the tokens used; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        counters, account = self._counters, self._counters.accounts[self._target.account]
        account.running -= self._completions
        account.reserved -= self._estimate
        if tokens and self._target.limits.tokens_per_minute is not None:
            account.tokens.add(counters.clock(), tokens)
        counters.running[self._target.served] -= 1
        if not counters.running[self._target.served]:
            del counters.running[self._target.served]


class Counters:
    """All accounts of this process. `clock` is in seconds and monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.accounts: dict[str, Account] = {}
        self.running: Counter[str] = Counter()

    def in_flight(self, served: str) -> int:
        """Return the number of running requests of one revision; at 0 it may be unloaded."""
        return self.running[served]

    def headers(self, target: Target) -> dict[bytes, bytes]:
        """Return OpenAI's `x-ratelimit-*` headers of a tenant, for each limit that it has.

        `reset` is when all of the limit is free again, if nothing is added.
        """
        account = self.accounts.get(target.account, Account())
        now = self.clock()
        found: dict[bytes, bytes] = {}
        for kind, limit, window, reserved in (
            (b"requests", target.limits.requests_per_minute, account.requests, 0),
            (b"tokens", target.limits.tokens_per_minute, account.tokens, account.reserved),
        ):
            if limit is None:
                continue
            left = max(0, limit - window.used(now) - reserved)
            newest = window.entries[-1][0] if window.entries else now - WINDOW_S
            found[b"x-ratelimit-limit-" + kind] = str(limit).encode()
            found[b"x-ratelimit-remaining-" + kind] = str(left).encode()
            reset_s = max(0.0, newest + WINDOW_S - now)
            found[b"x-ratelimit-reset-" + kind] = f"{math.ceil(1000 * reset_s)}ms".encode()
        return found

    def admit(self, target: Target, estimate_tokens: int, completions: int = 1) -> Reservation:
        """Reserve one request, which counts as often as it requests a completion.

        An estimate of 0 costs no tokens and needs none. A request larger than the whole budget of
        tokens is admitted when nothing else uses any, or it would never be.
        Errors: RequestRejectedError, 429 with Retry-After, or 400 for more completions than are
        ever admitted; a rejected request is not counted.
        """
        account = self.accounts.setdefault(target.account, Account())
        now, limits = self.clock(), target.limits
        limit = limits.concurrent
        if limit is not None and account.running + completions > limit:
            _check_possible(target, "concurrent", completions, limit)
            raise _too_many(target, "concurrent", f"{limit} requests at once", 1.0)
        limit = limits.requests_per_minute
        if limit is not None and account.requests.used(now) + completions > limit:
            _check_possible(target, "requests_per_minute", completions, limit)
            wait_s = account.requests.wait_s(now, limit - completions)
            text = f"{limit} requests per minute"
            raise _too_many(target, "requests_per_minute", text, wait_s)
        limit = limits.tokens_per_minute
        if limit is not None and estimate_tokens:
            used = account.tokens.used(now) + account.reserved
            if used and used + estimate_tokens > limit:
                left = max(limit - estimate_tokens - account.reserved, 0)
                wait_s = account.tokens.wait_s(now, left)
                text = f"{limit} tokens per minute"
                raise _too_many(target, "tokens_per_minute", text, wait_s)
        if limits.requests_per_minute is not None:
            account.requests.add(now, completions)
        account.running += completions
        account.reserved += estimate_tokens
        self.running[target.served] += 1
        return Reservation(self, target, estimate_tokens, completions)


def _check_possible(target: Target, reason: str, completions: int, limit: int) -> None:
    """Errors: RequestRejectedError, 400, for a request that no waiting would admit."""
    if completions > limit:
        message = (
            f"the request is for {completions} completions, and `{target.account}` has a limit of "
            f"{limit} ({reason}); send fewer prompts or a smaller `n` at a time."
        )
        raise RequestRejectedError(400, message, reason=reason)


def _too_many(target: Target, reason: str, limit: str, wait_s: float) -> RequestRejectedError:
    after_s = max(1, math.ceil(wait_s))
    message = (
        f"`{target.account}` has reached its limit of {limit} on this server; "
        f"try again in {after_s} s."
    )
    return RequestRejectedError(429, message, headers={"Retry-After": str(after_s)}, reason=reason)
