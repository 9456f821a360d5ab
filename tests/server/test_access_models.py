"""Resolution of model names per key; unknown and other keys' models are indistinguishable."""

from __future__ import annotations

import json

import pytest

from safegene_server.access.catalog import Limits, Principal, Tenant, make_view
from safegene_server.access.models import Target, describe, find, listing, resolve
from safegene_server.access.rejection import RequestRejectedError

LIMITS = Limits(concurrent=3)
VIEW = make_view(
    keys={},
    tenants=[
        Tenant("acme", "acme@7", frozenset({"acme@6"}), LIMITS, created=1700000000),
        Tenant("acme/support", "acme/support@2"),
        Tenant("other", "other@1"),
        Tenant("draft", None),
        Tenant("org", "org@4"),
    ],
    base_models=("org/Base", "org"),
    max_model_len=4096,
)
ACME = Principal("a", frozenset({"serve"}), frozenset({"acme", "acme/support", "draft"}), "acme")
EVERYONE = Principal("e", frozenset({"serve"}), frozenset({"*"}))
BASE = Principal("b", frozenset({"serve"}), base=True)


@pytest.mark.parametrize(
    ("requested", "served"),
    [
        ("acme", "acme@7"),
        ("acme@7", "acme@7"),
        ("acme@6", "acme@6"),
        ("acme/support", "acme/support@2"),
        (None, "acme@7"),
        ("", "acme@7"),
    ],
)
def test_model_names_resolve_to_served_names(requested: str | None, served: str) -> None:
    target = resolve(VIEW, ACME, requested)
    assert target.served == served
    assert target.account == served.partition("@")[0]
    assert target.limits == (LIMITS if target.account == "acme" else Limits())


FOREIGN = ("other", "other@1", "org/Base", "org", "org@4")
UNKNOWN = ("absent", "acme@5", "acme@", "acme@07", "acme@7@7", "acme/", "Acme", " acme", "acme\x00")
UNPUBLISHED = ("draft", "draft@1", "*", "@")


@pytest.mark.parametrize("requested", [*FOREIGN, *UNKNOWN, *UNPUBLISHED])
def test_all_other_names_are_rejected_with_the_same_message(requested: str) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        resolve(VIEW, ACME, requested)
    assert (caught.value.status, caught.value.param) == (404, "model")
    words = f"The model `{requested}` does not exist or you do not have access to it."
    assert str(caught.value) == words


@pytest.mark.parametrize("requested", [7, True, ["acme"], {"name": "acme"}, 0, False])
def test_a_model_that_is_no_name(requested: object) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        resolve(VIEW, ACME, requested)
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_without_a_name_and_without_a_default() -> None:
    with pytest.raises(RequestRejectedError) as caught:
        resolve(VIEW, EVERYONE, None)
    assert caught.value.status == 400
    assert "no default tenant" in str(caught.value)


def test_the_base_model_needs_its_own_grant() -> None:
    assert find(VIEW, EVERYONE, "org/Base") is None
    assert find(VIEW, BASE, "org/Base") == Target("org/Base", "org/Base", Limits())
    # A tenant of the base model's name does not turn one into the other.
    assert find(VIEW, EVERYONE, "org") is None
    assert find(VIEW, BASE, "org") == Target("org", "org", Limits())
    assert find(VIEW, BASE, "acme") is None


def test_a_long_name_is_not_repeated_in_full() -> None:
    with pytest.raises(RequestRejectedError) as caught:
        resolve(VIEW, ACME, "x" * 100_000)
    assert len(str(caught.value)) < 400


def test_the_list_shows_exactly_the_usable_models() -> None:
    assert [card["id"] for card in listing(VIEW, ACME)["data"]] == ["acme", "acme/support"]
    assert [card["id"] for card in listing(VIEW, BASE)["data"]] == ["org/Base", "org"]
    everyone = [card["id"] for card in listing(VIEW, EVERYONE)["data"]]
    assert everyone == ["acme", "acme/support", "other"]
    assert listing(VIEW, Principal("n", frozenset({"serve"})))["data"] == []


@pytest.mark.engine
def test_a_card_has_the_fields_of_vllms() -> None:
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    card = describe(VIEW, ACME, "acme")
    assert set(card) == set(ModelCard.model_fields)
    assert set(card["permission"][0]) == set(ModelPermission.model_fields)


def test_a_card() -> None:
    card = describe(VIEW, ACME, "acme")
    (permission,) = card.pop("permission")
    assert permission["id"] == "modelperm-acme" and permission["allow_sampling"] is True
    assert card == {
        "id": "acme",
        "object": "model",
        "created": 1700000000,
        "owned_by": "safegene",
        "root": "acme@7",
        "parent": None,
        "max_model_len": 4096,
    }
    both = Principal("both", frozenset({"serve"}), frozenset({"acme"}), base=True)
    assert describe(VIEW, both, "acme")["parent"] == "org/Base"
    assert describe(VIEW, both, "org/Base")["parent"] is None
    assert describe(VIEW, ACME, "acme@6")["root"] == "acme@6"
    assert describe(VIEW, BASE, "org")["created"] == 0
    assert "org/Base" not in json.dumps(listing(VIEW, ACME))
    assert "other" not in json.dumps(listing(VIEW, ACME))
    with pytest.raises(RequestRejectedError) as caught:
        describe(VIEW, ACME, "other")
    assert caught.value.status == 404
