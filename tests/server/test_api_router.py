"""The router as a whole: its OpenAPI document reads well, and access has a rule for every route."""

from __future__ import annotations

from typing import Any

import pytest
from tenant_setup import OURS, World, rejected, world

from safegene_server.access.route_permissions import rule_for, unclassified
from safegene_server.api.request_schemas import Calibration
from safegene_server.calibration.examples import read_examples
from safegene_server.tenants import CalibrationSettings

__all__ = ["world"]


@pytest.fixture
def document(world: World) -> dict[str, Any]:
    return world.app.openapi()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if path.startswith(OURS)
    }
    assert len(found) > 20
    return found


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert operation["tags"], name
        assert operation["summary"] and operation["description"], name
        good = next(body for code, body in operation["responses"].items() if code[0] == "2")
        assert good["content"]["application/json"]["schema"], name
        for status in ("400", "403", "404", "409", "503"):
            schema = operation["responses"][status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, name


def test_request_bodies_have_examples(document: dict[str, Any]) -> None:
    text = str(document)
    for example in ("s3://adapters/acme/support", "acme/support", "acme-production"):
        assert example in text
    schemas = document["components"]["schemas"]
    for name in ("Register", "NewRevision"):
        (whole,) = schemas[name]["properties"]["calibrate"]["examples"]
        examples = read_examples(Calibration(**whole).request().examples, CalibrationSettings())
        assert set(examples) == {"safety", "task"}


def test_the_secret_of_a_key_is_in_two_responses_only(document: dict[str, Any]) -> None:
    with_secret = [
        name
        for name, operation in operations(document).items()
        if "NewKey" in str(operation["responses"])
    ]
    assert sorted(with_secret) == [f"POST {OURS}/keys", f"POST {OURS}/keys/{{name}}/rotate"]


def test_reading_needs_read_and_changes_need_admin(world: World, document: dict[str, Any]) -> None:
    assert [name for name in unclassified(world.app) if OURS in name] == []
    for name in operations(document):
        method, _, path = name.partition(" ")
        expected = "read" if method == "GET" else "admin"
        assert rule_for(method, path).need == ("key" if path.endswith("/whoami") else expected)


def test_routes_without_the_access_check_are_403(world: World) -> None:
    world.access = world.app  # type: ignore[assignment]
    rejected(world.request("GET", "/tenants"), 403, "has checked none")
    rejected(world.request("GET", "/whoami"), 403, "has checked none")
