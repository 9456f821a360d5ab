"""Usage rows: added up by day, tenant and key, read page by page, deleted by day."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from datetime import date, timedelta

import pytest
from registry_setup import postgres, registry, url

from safegene_server.registry import Registry, UsageCursor, UsageRow
from safegene_vllm.errors import RegistryDownError, RegistryError

__all__ = ["registry", "url"]

DAY = date(2031, 5, 1)
ROW = UsageRow(DAY, "acme/support", "app", 1, 10, 5)


def test_counts_of_the_same_row_are_added(registry: Registry) -> None:
    registry.usage.add([ROW, replace(ROW, requests=2)])
    registry.usage.add([ROW])
    registry.usage.add([])
    assert registry.usage.list().rows == (
        replace(ROW, requests=4, prompt_tokens=30, completion_tokens=15),
    )


def test_every_day_tenant_and_key_is_a_row_of_its_own(registry: Registry) -> None:
    rows = [
        replace(ROW, day=DAY + timedelta(days=1), tenant="other"),
        ROW,
        replace(ROW, key="web"),
        replace(ROW, tenant="org/Base"),
    ]
    registry.usage.add(reversed(rows))
    assert registry.usage.list().rows == tuple(rows)


def test_sums_beyond_32_bits(registry: Registry) -> None:
    many = replace(ROW, requests=2**40, prompt_tokens=2**40, completion_tokens=2**40)
    registry.usage.add([many])
    registry.usage.add([many])
    assert registry.usage.list().rows[0].prompt_tokens == 2**41


def test_usage_is_no_change_and_not_audited(registry: Registry) -> None:
    before = registry.snapshot(), registry.audit.page(), registry.position()
    registry.usage.add([ROW])
    assert registry.usage.delete_before(DAY + timedelta(days=1)) == 1
    assert (registry.snapshot(), registry.audit.page(), registry.position()) == before


def test_old_days_are_deleted(registry: Registry) -> None:
    rows = [replace(ROW, day=DAY - timedelta(days=n)) for n in range(4)]
    registry.usage.add(rows)
    assert registry.usage.delete_before(DAY - timedelta(days=1)) == 2
    assert registry.usage.list().rows == tuple(rows[:2])
    assert registry.usage.delete_before(DAY - timedelta(days=1)) == 0


def test_filters(registry: Registry) -> None:
    days = [DAY + timedelta(days=n) for n in range(3)]
    registry.usage.add(
        replace(ROW, day=day, tenant=tenant, key=key)
        for day in days
        for tenant in ("acme", "acme/support", "other")
        for key in ("app", "web")
    )
    find = registry.usage.list
    assert {row.day for row in find(since=days[1]).rows} == set(days[1:])
    assert {row.day for row in find(until=days[1]).rows} == set(days[:2])
    assert len(find(since=days[1], until=days[1]).rows) == 6
    assert {row.tenant for row in find(tenants=["acme", "other", "none"]).rows} == {"acme", "other"}
    assert find(tenants=[]).rows == ()
    assert len(find(tenants=["acme"], key="web").rows) == 3


def test_pages_cover_every_row_once(registry: Registry) -> None:
    registry.usage.add(
        replace(ROW, day=DAY + timedelta(days=n), tenant=tenant, key=key)
        for n in range(3)
        for tenant in ("acme", "acme/support")
        for key in ("app", "web")
    )
    whole = registry.usage.list()
    assert whole.cursor is None and len(whole.rows) == 12
    read: list[UsageRow] = []
    cursor: UsageCursor | None = None
    sizes = []
    while not sizes or cursor is not None:
        page = registry.usage.list(limit=5, cursor=cursor)
        # Rows of a newer day come before what was read, and shift nothing.
        registry.usage.add([replace(ROW, day=DAY + timedelta(days=9 + len(sizes)))])
        read += page.rows
        cursor = page.cursor
        sizes.append(len(page.rows))
    assert (tuple(read), sizes) == (whole.rows, [5, 5, 2])
    for limit in (0, 1001):
        with pytest.raises(RegistryError, match="expected 1 to 1000"):
            registry.usage.list(limit=limit)


@pytest.mark.parametrize("name", ["requests", "prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("value", [-1, 1.5, None, True])
def test_what_is_no_count_is_rejected(registry: Registry, name: str, value: object) -> None:
    with pytest.raises(RegistryError, match=f"{name} = .*expected a whole number"):
        registry.usage.add([ROW, replace(ROW, **{name: value})])
    assert registry.usage.list().rows == ()


def test_a_name_that_no_database_can_hold_is_shown_otherwise(registry: Registry) -> None:
    registry.usage.add([replace(ROW, tenant="a\x00\ud800", key="\udfff")])
    (row,) = registry.usage.list().rows
    assert (row.tenant, row.key) == ("a??", "?")


def test_a_registry_that_is_down_adds_nothing(registry: Registry) -> None:
    name = str(registry.database.url.database)
    if registry.database.is_postgresql:
        postgres().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        postgres().disconnect(name)
    else:
        os.rename(name, f"{name}.away")
    with pytest.raises(RegistryDownError):
        registry.usage.add([ROW])
    if registry.database.is_postgresql:
        postgres().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    else:
        os.rename(f"{name}.away", name)
    assert registry.usage.list().rows == ()


def test_two_replicas_that_add_the_same_rows_lose_nothing(url: str) -> None:
    rows = [replace(ROW, key=f"k{n}") for n in range(50)]
    failed: list[BaseException] = []

    def replica(order: int) -> None:
        opened = Registry(url)
        try:
            for _ in range(10):
                opened.usage.add(rows[::order])
        except BaseException as error:
            failed.append(error)
        finally:
            opened.close()

    threads = [threading.Thread(target=replica, args=(order,)) for order in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    registry = Registry(url)
    found = registry.usage.list(limit=1000).rows
    registry.close()
    assert failed == []
    assert [row.requests for row in found] == [40] * 50
