"""Counts what runs and what was used in the last minute, per tenant, and says when it is too much.

The counts are of this process: with N API processes or replicas a tenant may have N times as much.
For one event loop, no locks. Knows nothing of HTTP but the refusal.
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
"""A minute may be so much shorter, or who waits exactly as long as told is told to wait again: sums
of floating-point seconds are off by less."""


class SlidingWindow:
    """Amounts of the last minute, oldest first."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int]] = deque()
        self.total = 0

    def add(self, now: float, amount: int) -> None:
        self.entries.append((now, amount))
        self.total += amount

    def used(self, now: float) -> int:
        while self.entries and self.entries[0][0] <= now - WINDOW_S + SLACK_S:
            self.total -= self.entries.popleft()[1]
        return self.total

    def wait_s(self, now: float, most: int) -> float:
        """Seconds until at most `most` are left, if nothing is added."""
        left, wait = self.used(now), 0.0
        for at, amount in self.entries:
            if left <= most:
                break
            left -= amount
            wait = at + WINDOW_S - now
        return wait


@dataclass
class Account:
    """One tenant's counts; `running` are answers, `reserved` the tokens expected of them."""

    running: int = 0
    reserved: int = 0
    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)


class Reservation:
    """One admitted request, to be closed exactly when it has ended, however it ended."""

    def __init__(
        self, counters: Counters, target: Target, estimate_tokens: int, answers: int
    ) -> None:
        self._counters = counters
        self._target = target
        self._estimate = estimate_tokens
        self._answers = answers
        self._open = True

    def close(self, tokens: int) -> None:
        """Gives the place back and charges what was really used; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        counters, account = self._counters, self._counters.accounts[self._target.account]
        account.running -= self._answers
        account.reserved -= self._estimate
        if tokens and self._target.limits.tokens_per_minute is not None:
            account.tokens.add(counters.clock(), tokens)
        counters.running[self._target.served] -= 1
        if not counters.running[self._target.served]:
            del counters.running[self._target.served]


class Counters:
    """All accounts of this process. `clock` is in seconds and never runs backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.accounts: dict[str, Account] = {}
        self.running: Counter[str] = Counter()

    def in_flight(self, served: str) -> int:
        """Requests that still run on one revision: it may leave the engine at 0."""
        return self.running[served]

    def admit(self, target: Target, estimate_tokens: int, answers: int = 1) -> Reservation:
        """A place for one request, which counts as often as it asks for an answer.

        An estimate of 0 costs no tokens and asks for none. A request larger than the whole budget
        of tokens is let in when nothing else uses any, or it would never be. Errors: Refusal, 429
        with Retry-After, or 400 for more answers than are ever let in; it is not counted then.
        """
        account = self.accounts.setdefault(target.account, Account())
        now, limits = self.clock(), target.limits
        most = limits.concurrent
        if most is not None and account.running + answers > most:
            _refuse_never(target, "concurrent", answers, most)
            raise _too_many(target, "concurrent", f"{most} requests at once", 1.0)
        most = limits.requests_per_minute
        if most is not None and account.requests.used(now) + answers > most:
            _refuse_never(target, "requests_per_minute", answers, most)
            wait_s = account.requests.wait_s(now, most - answers)
            told = f"{most} requests per minute"
            raise _too_many(target, "requests_per_minute", told, wait_s)
        most = limits.tokens_per_minute
        if most is not None and estimate_tokens:
            used = account.tokens.used(now) + account.reserved
            if used and used + estimate_tokens > most:
                room = max(most - estimate_tokens - account.reserved, 0)
                wait_s = account.tokens.wait_s(now, room)
                told = f"{most} tokens per minute"
                raise _too_many(target, "tokens_per_minute", told, wait_s)
        if limits.requests_per_minute is not None:
            account.requests.add(now, answers)
        account.running += answers
        account.reserved += estimate_tokens
        self.running[target.served] += 1
        return Reservation(self, target, estimate_tokens, answers)


def _refuse_never(target: Target, reason: str, answers: int, most: int) -> None:
    if answers > most:
        message = (
            f"the request asks for {answers} answers, and `{target.account}` has a limit of "
            f"{most} ({reason}); ask for fewer prompts or a smaller `n` at a time."
        )
        raise RequestRejectedError(400, message, reason=reason)


def _too_many(target: Target, reason: str, limit: str, wait_s: float) -> RequestRejectedError:
    after_s = max(1, math.ceil(wait_s))
    message = (
        f"`{target.account}` has reached its limit of {limit} on this server; "
        f"try again in {after_s} s."
    )
    return RequestRejectedError(429, message, headers={"Retry-After": str(after_s)}, reason=reason)
