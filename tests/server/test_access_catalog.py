"""Validation of a view, and its replacement as a whole."""

from __future__ import annotations

import pytest

from safegene_server.access.catalog import (
    Catalog,
    Limits,
    Principal,
    Tenant,
    View,
    key_digest,
    make_view,
)
from safegene_vllm.errors import ConfigError

KEY = key_digest("sg-one")
PRINCIPAL = Principal("one", frozenset({"serve"}), frozenset({"acme"}))


def test_a_new_catalog_rejects_every_key() -> None:
    assert Catalog().view == View()
    assert not Catalog().view.keys


def test_a_view_is_a_copy_and_cannot_be_written() -> None:
    keys = {KEY: PRINCIPAL}
    view = make_view(keys=keys, tenants=[Tenant("acme", "acme@1")])
    keys.clear()
    assert view.keys[KEY] is PRINCIPAL
    with pytest.raises(TypeError):
        view.keys[KEY] = PRINCIPAL  # type: ignore[index]
    with pytest.raises(TypeError):
        view.tenants["other"] = Tenant("other", None)  # type: ignore[index]


def test_replacing_leaves_the_old_view_as_it_was() -> None:
    old = make_view(keys={KEY: PRINCIPAL}, tenants=[])
    catalog = Catalog(old)
    catalog.replace(View())
    assert catalog.view == View()
    assert old.keys == {KEY: PRINCIPAL}


def test_text_and_bytes_of_a_key_have_one_digest() -> None:
    assert key_digest("sg-one") == key_digest(b"sg-one") != key_digest("sg-two")


@pytest.mark.parametrize(
    ("tenant", "words"),
    [
        (Tenant("a/b/c", None), "tenant name 'a/b/c': expected letters"),
        (Tenant("a@1", None), "tenant name 'a@1': expected letters"),
        (Tenant("a" * 97, None), "tenant name"),
        (Tenant("acme", "acme"), "'acme' is not acme@N"),
        (Tenant("acme", "acme@0"), "'acme@0' is not acme@N"),
        (Tenant("acme", "other@1"), "'other@1' is not acme@N"),
        (Tenant("acme", "acme@2", frozenset({"acme/x@1"})), "'acme/x@1' is not acme@N"),
        (Tenant("acme", None, limits=Limits(concurrent=0)), "concurrent is 0, expected a positive"),
        (Tenant("acme", None, limits=Limits(requests_per_minute=True)), "is True, expected"),
    ],
)
def test_a_tenant_that_cannot_be(tenant: Tenant, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_view(keys={}, tenants=[tenant])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("digest", "principal", "words"),
    [
        (b"short", PRINCIPAL, "not 32 bytes"),
        (KEY, Principal("k", frozenset({"root"})), "unknown scopes ['root']"),
        (KEY, Principal("k", frozenset(), frozenset({"a"}), "b"), "default tenant 'b' is not one"),
    ],
)
def test_a_key_that_cannot_be(digest: bytes, principal: Principal, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_view(keys={digest: principal}, tenants=[])
    assert words in str(caught.value)


def test_all_problems_are_reported_together() -> None:
    tenants = [Tenant("acme", "acme@1"), Tenant("acme", "acme@2"), Tenant("B C", None)]
    with pytest.raises(ConfigError) as caught:
        make_view(keys={b"": PRINCIPAL}, tenants=tenants, base_limits=Limits(tokens_per_minute=-1))
    for words in ("named more than once: ['acme']", "tenant name 'B C'", "not 32 bytes", "is -1"):
        assert words in str(caught.value)


def test_the_longest_names_are_names() -> None:
    name = "A" * 96 + "/" + "é" * 30
    assert name in make_view(keys={}, tenants=[Tenant(name, f"{name}@12")]).tenants
