"""Whatever is sent to our routes, by their own OpenAPI document: no 500, and one error shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from artifact_files import FAMILY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tenant_setup import SECRETS, World

EXAMPLES = 25
REAL = {"name": "acme/support", "digest": FAMILY.digest, "job": 1, "rollout": 1}
"""Names of half of the requests; the others are made up."""
GOOD = {"PATCH /v1/safegene/tenants/{name}/profile": {"scale": 1.2}}
"""In place of half of the made-up bodies, of which few make sense: Hypothesis draws them from the
constants of the source too, so they change with it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("fuzz"))
    made.serve("acme/support")
    yield made
    made.registry.close()


def test_no_request_breaks_a_route(world: World) -> None:
    schema = schemathesis.openapi.from_dict(world.app.openapi())
    schema.app = world.access
    status_counts: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        mixed = [
            operation.as_strategy(generation_mode=mode)
            for mode in (
                schemathesis.GenerationMode.POSITIVE,
                schemathesis.GenerationMode.NEGATIVE,
            )
        ]
        _try(operation.label, st.one_of(mixed), status_counts)
    labels = {name.partition(" -> ")[0] for name in status_counts}
    assert len(labels) == len(list(schema.get_all_operations())) > 20
    assert any(name.endswith("2xx") for name in status_counts)
    assert any(name.endswith("4xx") for name in status_counts)
    for label in ("GET /v1/safegene/tenants/{name}", "PATCH /v1/safegene/tenants/{name}/profile"):
        assert status_counts[f"{label} -> 2xx"] and status_counts[f"{label} -> 4xx"], label
    # It is the same server as before.
    assert world.json("GET", "/whoami")["name"] == "admin"


def _try(label: str, cases: Any, status_counts: Counter[str]) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, real=st.booleans(), good=st.booleans())
    def send(case: Any, real: bool, good: bool) -> None:
        if real and case.path_parameters:
            case.path_parameters = {name: REAL[name] for name in case.path_parameters}
            if isinstance(case.body, dict):
                # A made-up number is never the published one: hardly anything would succeed.
                case.body.pop("expected_revision", None)
            if good and label in GOOD:
                case.body, case.media_type = dict(GOOD[label]), "application/json"
        headers = {"Authorization": f"Bearer {SECRETS['admin']}"}
        response = case.call(headers=headers)
        status = response.status_code
        status_counts[f"{label} -> {status // 100}xx"] += 1
        assert status < 500, f"{case.method} {case.formatted_path}: {response.text}"
        if status >= 400 and "json" in response.headers.get("content-type", [""])[0]:
            found = response.json()
            # What no route of ours matches is handled by the app.
            assert "error" in found or found.keys() == {"detail"}, found

    send()
