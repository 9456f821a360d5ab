"""Calibration on a real server: its log-probabilities, its slots, and its other tenants."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import launched_server as servers
import pytest
from launched_server import end, free_port, start, until_serving
from recipe_setup import tiny_chat_model

from safegene_vllm import tiny_model

pytestmark = pytest.mark.engine

ADMIN, GLOBEX = (f"sg-{who}-{'0' * 40}" for who in ("admin", "globex"))
LONG = [3 + (7 * i) % 250 for i in range(80)]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONFIG = """
registry: registry.sqlite
store: store
sources: {roots: [ROOT]}
keys:
  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin, read, serve], tenants: ["*"]}
  - {name: globex, secret_env: GLOBEX_KEY, tenants: [globex]}
tenants:
  gate: {enabled: false}
  calibration: {evaluations: 40, in_flight: 4, share: 0.25}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    d = tmp_path_factory.mktemp("calibrating")
    tiny_chat_model(d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    for i, (name, value) in enumerate((("support", 0.0), ("globex", 0.7), ("newcomer", None))):
        tiny_model.write_tenant(d / "m", d / "root" / name, family, value, seed=10 + i)
    (d / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(d / "root")))
    port = free_port()
    small = tuple(a for a in servers.SMALL if a != "--skip-tokenizer-init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "SMALL", small)
        process = start(
            *(str(d / "m"), "--family", str(d / "f"), "--slots", "4", "--max-lora-rank", "8"),
            *("--server-config", str(d / "safegene.yaml"), "--served-model-name", "base"),
            *("--port", str(port), "--enable-prefix-caching"),
            ADMIN_KEY=ADMIN,
            GLOBEX_KEY=GLOBEX,
        )
    lines, drain = until_serving(process)
    try:
        serving = any(line.startswith("serving at") for line in lines)
        assert serving, "\n".join(lines[-60:])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for name in ("support", "globex"):
                tenant = {"name": name, "source": str(Path(d / "root" / name))}
                added = call(client, "POST", "/v1/safegene/tenants", tenant)
                assert ended(client, added["job"]["id"])["state"] == "done"
            yield client
    finally:
        end(process, drain)


def call(
    client: httpx.Client, method: str, path: str, body: Any = None, *, key: str = ADMIN
) -> Any:
    response = client.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"})
    assert response.is_success, response.text
    return response.json()


def ended(client: httpx.Client, job: int) -> Any:
    deadline = time.monotonic() + 180
    while True:
        found = call(client, "GET", f"/v1/safegene/jobs/{job}")
        if found["state"] not in ("queued", "running"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def examples_of(
    client: httpx.Client, prompts: list[str], model: str = "support"
) -> list[dict[str, str]]:
    """The tenant's completion of each prompt, in letters, since its own tokens are seldom text."""
    body: dict[str, Any] = {"model": model, "prompt": LETTERS, "add_special_tokens": False}
    letters = call(client, "POST", "/tokenize", body)["tokens"]
    assert len(letters) == len(LETTERS)
    rows = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": turns, "add_generation_prompt": True}
        tokens = call(client, "POST", "/tokenize", body)["tokens"]
        body = {"model": model, "prompt": tokens, "max_tokens": 6, "temperature": 0}
        body["allowed_token_ids"] = letters
        text = call(client, "POST", "/v1/completions", body)["choices"][0]["text"]
        assert len(text) == 6
        rows.append({"prompt": prompt, "answer": text})
    return rows


def globex_completion(client: httpx.Client) -> Any:
    body = {
        "model": "globex",
        "prompt": LONG,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
        "return_token_ids": True,
    }
    found = call(client, "POST", "/v1/completions", body, key=GLOBEX)
    choice = found["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_it_improves_the_held_out_examples_and_no_other_tenant_changes(
    server: httpx.Client,
) -> None:
    """All completions are those of this model at strength 1.2, so from 0 there is a way up."""
    call(server, "PATCH", "/v1/safegene/tenants/support/profile", {"coefficients": 1.2})
    safety, task = (
        examples_of(server, [f"{kind} {n}" for n in range(6)]) for kind in ("bad", "task")
    )
    call(server, "POST", "/v1/safegene/tenants/support/rollback", {})
    before = globex_completion(server)
    others: list[Any] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            others.append(globex_completion(server))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        body = {"examples": {"safety": safety, "task": task}, "seed": 1}
        started = call(server, "POST", "/v1/safegene/tenants/support/calibrate", body)
        job = ended(server, started["job"]["id"])
    finally:
        stop.set()
        thread.join(60)
    assert job["state"] == "done"
    result = job["result"]
    assert len(others) > 20
    assert {tuple(tokens) for tokens, _ in others} == {tuple(before[0])}
    # Whose rows share a batch moves the last bits of a float, whatever those rows are.
    assert max(
        abs(a - b) for _, logprobs in others for a, b in zip(logprobs, before[1], strict=True)
    ) < (1e-4)
    assert result["share_while_serving"] <= 0.27
    now = call(server, "GET", "/v1/safegene/tenants/support")["published"]
    held = result["held_out"]
    assert result["better"] and held["found"] < held["current"] == held["zero"]
    assert now == 3 and result["revision"] == "support@3"
    revisions = call(server, "GET", "/v1/safegene/tenants/support/revisions")["data"]
    assert any(revisions[-1]["coefficients"])
    assert {"support@3", "globex@1"} <= held_without_candidates(server)


def held_without_candidates(client: httpx.Client) -> set[str]:
    """The adapters of the one worker, none of them a candidate."""
    receipts = call(client, "GET", "/v1/safegene/receipts")
    assert receipts["ready"], receipts["faults"]
    (rank,) = receipts["receipts"]
    names = {adapter["name"] for adapter in rank["adapters"]}
    assert names and not [name for name in names if name.startswith("@candidate/")]
    candidates = [number for number in rank["adapters"] if number["lora_int_id"] >= 2**30]
    assert candidates == []
    return names


def test_a_newcomer_without_a_profile_is_calibrated_and_served_in_one_call(
    server: httpx.Client,
) -> None:
    """The completions are those of the same adapter at 2.0, and it begins at 1.0."""
    support = call(server, "GET", "/v1/safegene/tenants/support")["source"]
    source = str(Path(support).parent / "newcomer")
    model = {"name": "model", "source": source, "coefficients": 2.0}
    started = call(server, "POST", "/v1/safegene/tenants", model)
    assert ended(server, started["job"]["id"])["state"] == "done"
    safety, task = (
        examples_of(server, [f"{kind} {n}" for n in range(6)], "model") for kind in ("bad", "task")
    )
    call(server, "DELETE", "/v1/safegene/tenants/model")
    before = globex_completion(server)
    calibrate = {"examples": {"safety": safety, "task": task}, "seed": 1}
    body = {"name": "newcomer", "source": source, "calibrate": calibrate}
    started = call(server, "POST", "/v1/safegene/tenants", body)
    assert started["job"]["kind"] == "calibrate" and started["tenant"]["served"] is None
    job = ended(server, started["job"]["id"])
    assert job["state"] == "done" and job["message"] == "newcomer@2 is published", job
    result = job["result"]
    assert result["better"] and result["held_out"]["found"] < result["held_out"]["current"]
    first, second = call(server, "GET", "/v1/safegene/tenants/newcomer/revisions")["data"]
    assert (first["state"], set(first["coefficients"])) == ("registered", {1.0})
    assert second["state"] == "published" and second["coefficients"] != first["coefficients"]
    assert call(server, "POST", "/v1/safegene/tenants", body)["job"]["id"] == job["id"]
    request = {"model": "newcomer", "prompt": LONG, "max_tokens": 2, "temperature": 0}
    assert call(server, "POST", "/v1/completions", request)["model"] == "newcomer"
    assert globex_completion(server)[0] == before[0]
    assert "newcomer@2" in held_without_candidates(server)


def test_a_candidate_is_not_a_model_for_clients(server: httpx.Client) -> None:
    for model in ("@candidate/0", f"@candidate/{'0' * 32}"):
        body = {"model": model, "prompt": [5], "max_tokens": 1}
        response = server.post(
            "/v1/completions", json=body, headers={"Authorization": f"Bearer {ADMIN}"}
        )
        assert response.status_code == 404
