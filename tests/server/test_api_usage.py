"""Usage over HTTP: pages, CSV, and each key's own tenants only."""

from __future__ import annotations

import asyncio
import csv
import io
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from access_app import VIEW
from tenant_setup import World, rejected, world

from safegene_server.access.catalog import make_view
from safegene_server.registry import UsageRow

__all__ = ["world"]

DAY = date(2031, 5, 1)
ROW = UsageRow(DAY, "acme/support", "app", 2, 20, 10)
ROWS = [
    replace(ROW, day=date(2031, 5, 2)),
    replace(ROW, tenant="acme", key="web"),
    ROW,
    replace(ROW, key="web"),
    replace(ROW, tenant="org/Base", key="base"),
    replace(ROW, tenant="other", key="theirs"),
]
"""As the API lists them."""


def shown(row: UsageRow) -> dict[str, Any]:
    return {
        "day": row.day.isoformat(),
        "tenant": row.tenant,
        "key": row.key,
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
    }


@pytest.fixture
def used(world: World) -> World:
    world.registry.usage.add(ROWS)
    return world


def test_newest_day_first(used: World) -> None:
    assert used.json("GET", "/usage") == {"data": [shown(row) for row in ROWS], "cursor": None}
    assert used.json("GET", "/usage", key="read")["data"] == [shown(row) for row in ROWS]


def test_filters(used: World) -> None:
    def found(key: str = "admin", **params: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = used.json("GET", "/usage", params=params, key=key)["data"]
        return data

    assert found(since="2031-05-02") == [shown(ROWS[0])]
    assert found(until="2031-05-01") == [shown(row) for row in ROWS[1:]]
    assert found(key="read", tenant="org/Base") == [shown(ROWS[4])]
    assert found(tenant="none") == []
    data = used.json("GET", "/usage", params={"key": "web"})["data"]
    assert data == [shown(ROWS[1]), shown(ROWS[3])]


def test_a_key_for_some_tenants_reads_theirs_alone(used: World) -> None:
    data = used.json("GET", "/usage", key="acme")["data"]
    assert data == [shown(row) for row in ROWS[:4]]
    one = used.json("GET", "/usage", params={"tenant": "acme"}, key="acme")["data"]
    assert one == [shown(ROWS[1])]
    theirs = rejected(used.request("GET", "/usage", params={"tenant": "other"}, key="acme"), 404)
    none = rejected(used.request("GET", "/usage", params={"tenant": "ether"}, key="acme"), 404)
    assert theirs.replace("other", "ether") == none
    base = used.request("GET", "/usage", params={"tenant": "org/Base"}, key="acme")
    rejected(base, 404, "no tenant")
    text = used.request("GET", "/usage", params={"format": "csv"}, key="acme").text
    assert "theirs" not in text and "org/Base" not in text and text.count("\n") == 5
    rejected(used.request("GET", "/usage", key="serve"), 403, "scope `read`")
    rejected(used.request("GET", "/usage", key="unknown"), 401)


def key_of(world: World, name: str, *tenants: str) -> str:
    secret = world.registry.keys.add(name, scopes=["read"], tenants=tenants, actor="test").secret
    asyncio.run(world.replica.apply())
    return secret


def test_usage_of_the_base_is_for_keys_of_the_base(
    used: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = used.app.state.safegene.catalog
    secret = key_of(used, "base-reader", "base", "other")
    assert [row["tenant"] for row in used.json("GET", "/usage", key=secret)["data"]] == ["other"]
    catalog.replace(VIEW)
    assert VIEW.base_models == ("org/Base",)
    found = used.json("GET", "/usage", key=secret)["data"]
    assert [row["tenant"] for row in found] == ["org/Base", "other"]
    # A base model with the name of a tenant: its usage is not the tenant's.
    catalog.replace(make_view(keys={}, tenants=[], base_models=("acme",)))
    found = used.json("GET", "/usage", key="acme")["data"]
    assert {row["tenant"] for row in found} == {"acme/support"}
    rejected(used.request("GET", "/usage", params={"tenant": "acme"}, key="acme"), 404)


def test_a_key_without_tenants_reads_nothing(used: World) -> None:
    assert used.json("GET", "/usage", key=key_of(used, "none"))["data"] == []


def test_page_by_page(used: World) -> None:
    read, cursor, sizes = [], None, []
    while not sizes or cursor is not None:
        params = {"limit": 4} if cursor is None else {"limit": 4, "cursor": cursor}
        page = used.json("GET", "/usage", params=params)
        read += page["data"]
        cursor = page["cursor"]
        sizes.append(len(page["data"]))
    assert (read, sizes) == ([shown(row) for row in ROWS], [4, 2])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"since": "yesterday"}, "since"),
        ({"until": "2031-13-01"}, "until"),
        ({"since": "2031-05-02", "until": "2031-05-01"}, "is after until"),
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"cursor": "9"}, "cursor"),
        ({"cursor": "WyJ4Il0="}, "cursor"),
        ({"cursor": "WyIyMDMxLTA1LTAxIiwgMSwgMl0="}, "cursor"),
        ({"cursor": "W1tbW1tbW1tbW1tb" * 200}, "cursor"),
        ({"cursor": "ä"}, "cursor"),
        ({"format": "xml"}, "format"),
        ({"format": "csv", "limit": "5"}, "leave out"),
        ({"format": "csv", "cursor": "x"}, "leave out"),
    ],
)
def test_bad_parameters_are_rejected(used: World, params: dict[str, str], words: str) -> None:
    rejected(used.request("GET", "/usage", params=params), 400, words)


def test_csv_has_all_rows(used: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safegene_server.api.usage.PAGE", 2)
    response = used.request("GET", "/usage", params={"format": "csv"})
    assert response.headers["content-type"].startswith("text/csv")
    assert response.headers["content-disposition"] == 'attachment; filename="usage.csv"'
    assert response.text.endswith("\r\n")
    found = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert found == [{name: str(value) for name, value in shown(row).items()} for row in ROWS]


def test_csv_without_rows_is_its_header(world: World) -> None:
    text = world.request("GET", "/usage", params={"format": "csv"}).text
    assert text == "day,tenant,key,requests,prompt_tokens,completion_tokens\r\n"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("text/csv", "text/csv"),
        ("TEXT/CSV;q=0.9, */*;q=0.1", "text/csv"),
        ("application/json, text/csv", "application/json"),
        ("*/*", "application/json"),
        ("", "application/json"),
    ],
)
def test_accept_chooses_csv(used: World, accept: str, kind: str) -> None:
    response = used.request("GET", "/usage", headers={"Accept": accept})
    assert response.is_success and response.headers["content-type"].startswith(kind)
    params = {"format": "json"}
    again = used.request("GET", "/usage", params=params, headers={"Accept": accept})
    assert again.headers["content-type"] == "application/json"


@pytest.mark.parametrize("first", ["=", "+", "-", "@"])
def test_no_name_is_a_formula_in_a_spreadsheet(world: World, first: str) -> None:
    world.registry.usage.add([replace(ROW, tenant="t", key=f"{first}1,2")])
    text = world.request("GET", "/usage", params={"format": "csv"}).text
    assert f'2031-05-01,t,"\'{first}1,2",2,20,10' in text
