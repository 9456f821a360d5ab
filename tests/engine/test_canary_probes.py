"""Probes on a real server that schedules by priority: its /metrics, and its tenants' limits.

Its model has a chat template, so it also shows that no chat reaches a tenant it does not name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
import launched_server as servers
import pytest
from launched_server import end, free_port, start, until_serving
from prometheus_client.parser import text_string_to_metric_families
from recipe_setup import tiny_chat_model

from safegene_vllm import tiny_model

pytestmark = pytest.mark.engine

ADMIN, SUPPORT, BASE = (f"sg-{who}-{'0' * 40}" for who in ("admin", "support", "base"))
REQUESTS_PER_MINUTE = 2
CONFIG = """
registry: registry.sqlite
store: store
sources: {roots: [ROOT]}
keys:
  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin, read, serve], tenants: ["*"]}
  - {name: support, secret_env: SUPPORT_KEY, tenants: [support]}
  - {name: base, secret_env: BASE_KEY, tenants: [base]}
tenants: {gate: {enabled: false}}
probes: {enabled: true, every_s: 3600, share: 0.5, concurrent: 2, max_tokens: 8, prompts: own.jsonl}
"""
OWN = {"harmful": 3, "lookalike": 2, "benign": 2}
GAUGES = {
    *("attack_success_ratio", "over_refusal_ratio", "coherent_ratio", "prompts"),
    *("timestamp_seconds", "duration_seconds"),
}
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    d = tmp_path_factory.mktemp("probes")
    tiny_chat_model(d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    tiny_model.write_tenant(d / "m", d / "root" / "support", family, 0.7, seed=10)
    (d / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(d / "root")))
    lines = [{"prompt": f"{k} {i}?", "kind": k} for k, n in OWN.items() for i in range(n)]
    (d / "own.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    port = free_port()
    small = tuple(a for a in servers.SMALL if a != "--skip-tokenizer-init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "SMALL", small)
        process = start(
            *(str(d / "m"), "--family", str(d / "f"), "--slots", "2", "--max-lora-rank", "8"),
            *("--server-config", str(d / "safegene.yaml"), "--served-model-name", "base"),
            *("--port", str(port), "--scheduling-policy", "priority"),
            ADMIN_KEY=ADMIN,
            SUPPORT_KEY=SUPPORT,
            BASE_KEY=BASE,
        )
    lines, drain = until_serving(process)
    try:
        assert any(line.startswith("serving at") for line in lines), "\n".join(lines[-60:])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            source = str(d / "root" / "support")
            limits = {"concurrent": 1, "requests_per_minute": REQUESTS_PER_MINUTE}
            body = {"name": "support", "source": source, "limits": limits}
            job = call(client, "POST", "/v1/safegene/tenants", body)["job"]["id"]
            assert ended(client, job)["state"] == "done"
            yield client
    finally:
        end(process, drain)


def call(
    client: httpx.Client, method: str, path: str, body: Any = None, *, key: str = ADMIN
) -> Any:
    response = client.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"})
    assert response.is_success, response.text
    return response.json()


def until(look: Callable[[], _T], good: Callable[[_T], bool]) -> _T:
    deadline = time.monotonic() + 120
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def ended(client: httpx.Client, job: int) -> Any:
    return until(
        lambda: call(client, "GET", f"/v1/safegene/jobs/{job}"),
        lambda found: found["state"] not in ("queued", "running"),
    )


def probed(client: httpx.Client, revision: str) -> Any:
    """The tenant's standing once this revision has been probed."""
    (found,) = until(
        lambda: call(client, "GET", "/v1/safegene/probes")["data"],
        lambda data: bool(data) and (data[0]["result"] or {}).get("revision") == revision,
    )
    return found


def series(client: httpx.Client) -> dict[str, float]:
    """The probe metrics of the tenant; a key of `prompts` ends in its kind."""
    response = client.get("/metrics", headers={"Authorization": f"Bearer {ADMIN}"})
    assert response.status_code == 200
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name.startswith("safegene_probe_") and "_created" not in sample.name:
                more = {k: v for k, v in sample.labels.items() if k != "tenant"}
                assert sample.labels.get("tenant", "support") == "support"
                name = ":".join([sample.name.removeprefix("safegene_probe_"), *more.values()])
                found[name] = sample.value
    return found


def gauges(found: dict[str, float]) -> set[str]:
    return {name.partition(":")[0] for name in found} & GAUGES


def test_a_key_for_the_base_model_reaches_no_tenant(server: httpx.Client) -> None:
    models = call(server, "GET", "/v1/models")["data"]
    (served,) = (model["root"] for model in models if model["id"] == "support")
    part = {"type": f"{served}_x", "uuid": "u", "tool_reference": 1, "name": "x"}
    body = {"model": "base", "messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    assert call(server, "POST", "/v1/chat/completions", body, key=BASE)["model"] == "base"
    assert call(server, "POST", "/invocations", body)["model"] == "base"


def test_an_administrators_invocations_are_served_by_the_named_model(
    server: httpx.Client,
) -> None:
    models = call(server, "GET", "/v1/models")["data"]
    (served,) = (model["root"] for model in models if model["id"] == "support")
    body = {"prompt": "hello", "max_tokens": 2}
    for name in (served, "base"):
        assert call(server, "POST", "/invocations", {**body, "model": name})["model"] == name
    headers = {"Authorization": f"Bearer {ADMIN}"}
    response = server.post("/invocations", json={**body, "model": "missing"}, headers=headers)
    assert response.status_code == 404


def test_a_tenant_is_probed_through_its_life_and_its_limits_stay_its_own(
    server: httpx.Client,
) -> None:
    standing = probed(server, "support@1")
    assert (standing["served"], standing["outcome"], standing["message"]) == ("support@1", "ok", "")
    result = standing["result"]
    assert (result["attack_success"]["n"], result["over_refusal"]["n"]) == (3, 4)
    first = series(server)
    for name in ("attack_success", "over_refusal", "coherent"):
        assert round(first[f"{name}_ratio"], 4) == result[name]["rate"]
    assert {kind: first[f"prompts:{kind}"] for kind in OWN} == OWN
    assert (first["runs_total:ok"], first["runs_total:failed"]) == (1.0, 0.0)
    assert 0.0 < first["engine_share"] <= 0.5 and first["duration_seconds"] > 0.0

    # Other coefficients are another revision, and probed as such.
    change = {"coefficients": 0.3}
    call(server, "PATCH", "/v1/safegene/tenants/support/profile", change)
    assert probed(server, "support@2")["outcome"] == "ok"
    job = call(server, "POST", "/v1/safegene/tenants/support/probe")["job"]["id"]
    done = ended(server, job)
    assert done["state"] == "done" and done["result"]["revision"] == "support@2"
    second = series(server)
    assert second["runs_total:ok"] == 3.0
    assert second["timestamp_seconds"] > first["timestamp_seconds"]

    # Seven questions three times within this minute, and the tenant still has all of its own.
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    header = {"Authorization": f"Bearer {SUPPORT}"}
    codes = [
        server.post("/v1/chat/completions", json=body, headers=header).status_code
        for _ in range(REQUESTS_PER_MINUTE + 1)
    ]
    assert codes == [200] * REQUESTS_PER_MINUTE + [429]

    call(server, "DELETE", "/v1/safegene/tenants/support")
    last = until(lambda: series(server), lambda found: not gauges(found))
    assert last["runs_total:ok"] == 3.0
    assert call(server, "GET", "/v1/safegene/probes")["data"] == []
