"""Writer of usage: every period, at the end, and later while the registry is down."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from safegene_server.access.middleware import AccessMiddleware
from safegene_server.access.usage import DAY_S, UsageCounts
from safegene_server.app import configure_app
from safegene_server.registry import UsageRow
from safegene_server.settings import ServerSettings
from safegene_server.usage_writer import UsageWriter
from safegene_vllm.errors import RegistryDownError

DAY = date(1970, 1, 12)


class Registry:
    """`usage` as a list of written rows; `error` is raised while set."""

    def __init__(self) -> None:
        self.usage = self
        self.rows: list[UsageRow] = []
        self.deleted: list[date] = []
        self.error: Exception | None = None
        self.pause_s = 0.0

    def add(self, rows: list[UsageRow]) -> None:
        time.sleep(self.pause_s)
        if self.error:
            raise self.error
        self.rows += rows

    def delete_before(self, day: date) -> int:
        if self.error:
            raise self.error
        self.deleted.append(day)
        return 0


def writer(counts: UsageCounts, registry: Any, clock: Any = None, **more: Any) -> UsageWriter:
    now = clock or SimpleNamespace(s=11.5 * DAY_S)
    return UsageWriter(counts, registry, 3, now=lambda: now.s, **more)


def count(counts: UsageCounts, requests: int = 1) -> None:
    for _ in range(requests):
        counts.add("t", "k", 10, 5, 11.5 * DAY_S)


def test_counts_are_written_every_period_and_at_the_end() -> None:
    counts, registry = UsageCounts(), Registry()

    async def run() -> None:
        made = writer(counts, registry, period_s=0.01)
        made.start()
        count(counts, 2)
        while not registry.rows:
            await asyncio.sleep(0.005)
        count(counts)
        await made.stop()

    asyncio.run(run())
    assert registry.rows == [UsageRow(DAY, "t", "k", 2, 20, 10), UsageRow(DAY, "t", "k", 1, 10, 5)]
    assert counts.requests == 0


def test_the_end_does_not_wait_for_a_period() -> None:
    counts, registry = UsageCounts(), Registry()

    async def run() -> None:
        made = writer(counts, registry, period_s=3600.0)
        made.start()
        await asyncio.sleep(0.05)
        count(counts)
        await asyncio.wait_for(made.stop(), 60)

    asyncio.run(run())
    assert len(registry.rows) == 1


def test_the_end_waits_for_a_write_that_has_begun() -> None:
    counts, registry = UsageCounts(), Registry()
    registry.pause_s = 0.2

    async def run() -> None:
        made = writer(counts, registry)
        count(counts)
        made.start()
        await asyncio.sleep(0.05)
        assert counts.requests == 0 and registry.rows == []
        await made.stop()

    asyncio.run(run())
    assert registry.rows == [UsageRow(DAY, "t", "k", 1, 10, 5)]


@pytest.mark.parametrize("error", [RegistryDownError("down"), ZeroDivisionError("bug")])
def test_a_registry_that_is_down_loses_nothing(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    counts, registry = UsageCounts(), Registry()
    made = writer(counts, registry)

    async def run() -> None:
        registry.error = error
        for _ in range(3):
            count(counts)
            await made.flush()
        assert counts.requests == 3
        registry.error = None
        count(counts)
        await made.flush()

    with caplog.at_level(logging.INFO, "vllm.safegene_server"):
        asyncio.run(run())
    assert registry.rows == [UsageRow(DAY, "t", "k", 4, 40, 20)]
    assert caplog.text.count("usage cannot be written") == 1
    assert caplog.text.count("written again") == 1


def test_the_app_counts_usage_and_writes_it_when_it_ends(tmp_path: Path) -> None:
    registry = Registry()
    app = FastAPI()
    settings = ServerSettings(registry=str(tmp_path / "r.db"), store=tmp_path / "store")
    state = configure_app(app, settings)
    (access,) = [layer for layer in app.user_middleware if layer.cls is AccessMiddleware]
    assert access.kwargs["usage"] is state.usage and settings.usage.keep_days == 400

    async def run() -> None:
        async with app.router.lifespan_context(app):
            state.usage_writer = writer(state.usage, registry)
            state.usage_writer.start()
            await asyncio.sleep(0.05)
            count(state.usage)

    asyncio.run(run())
    assert registry.rows == [UsageRow(DAY, "t", "k", 1, 10, 5)]


def test_what_cannot_be_written_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    counts, registry = UsageCounts(), Registry()
    registry.error = RegistryDownError("down")
    count(counts, 3)
    with caplog.at_level(logging.ERROR, "vllm.safegene_server"):
        asyncio.run(writer(counts, registry).stop())
    assert "usage of 3 requests is lost" in caplog.text


def test_old_days_are_deleted_once_a_day() -> None:
    counts, registry, clock = UsageCounts(), Registry(), SimpleNamespace(s=11.5 * DAY_S)
    made = writer(counts, registry, clock)

    async def run() -> None:
        for later_s in (0.0, 10.0, DAY_S / 2, DAY_S / 2, DAY_S):
            clock.s += later_s
            await made.flush()

    asyncio.run(run())
    # Three days stay: today and the two before.
    assert registry.deleted == [DAY + timedelta(days=n) for n in (-2, -1, 0)]


def test_days_that_cannot_be_deleted_are_tried_again_and_count_nothing_twice() -> None:
    counts, registry = UsageCounts(), Registry()
    made = writer(counts, registry)
    delete, tries = registry.delete_before, []

    def fail_once(day: date) -> int:
        tries.append(day)
        if len(tries) == 1:
            raise RegistryDownError("down")
        return delete(day)

    registry.delete_before = fail_once  # type: ignore[method-assign]

    async def run() -> None:
        count(counts)
        await made.flush()
        await made.flush()

    asyncio.run(run())
    assert len(registry.rows) == 1 and counts.requests == 0
    assert registry.deleted == [DAY - timedelta(days=2)]
