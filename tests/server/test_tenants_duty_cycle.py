"""The bounded share of engine time, on a clock of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from safegene_server.tenants.duty_cycle import DutyCycleLimiter


@dataclass
class Clock:
    now: float = 100.0
    others: int = 0
    slept: list[float] = field(default_factory=list)

    def share(self, most: float) -> DutyCycleLimiter:
        return DutyCycleLimiter(
            most, lambda: self.others, lambda: None, clock=lambda: self.now, sleep=self.sleep
        )

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_alone_it_never_waits() -> None:
    clock = Clock()
    share = clock.share(0.25)

    async def work() -> None:
        for _ in range(3):
            async with share.turn():
                clock.now += 2.0

    asyncio.run(work())
    assert clock.slept == []
    assert share.record() == {
        "seconds": 6.0,
        "busy_seconds": 6.0,
        "share": 1.0,
        "share_while_serving": None,
        "share_limit": 0.25,
    }


@pytest.mark.parametrize("most", [0.1, 0.25, 0.5, 1.0])
def test_next_to_others_it_stays_within_its_share(most: float) -> None:
    clock = Clock(others=1)
    share = clock.share(most)

    async def work() -> None:
        for took in (0.5, 3.0, 1.0):
            async with share.turn():
                clock.now += took

    asyncio.run(work())
    record = share.record()
    assert record["share"] == record["share_while_serving"] == pytest.approx(most)
    assert record["busy_seconds"] == 4.5


def test_it_yields_to_others_that_start_while_it_works() -> None:
    clock = Clock()
    share = clock.share(0.25)

    async def work() -> None:
        async with share.turn():
            clock.now += 1.0
            clock.others = 2
        clock.others = 0
        async with share.turn():
            clock.now += 1.0

    asyncio.run(work())
    assert clock.slept == [3.0] and share.record()["share_while_serving"] == 0.25


def test_work_that_fails_is_counted_and_a_stop_precedes_the_work() -> None:
    clock = Clock(others=1)
    share = clock.share(0.25)

    async def work() -> None:
        async with share.turn():
            clock.now += 1.0
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(work())
    assert share.busy_s == 1.0 and clock.slept == []

    def end() -> None:
        raise KeyError("cancelled")

    share.check = end
    with pytest.raises(KeyError):
        asyncio.run(work())
    assert share.busy_s == 1.0
