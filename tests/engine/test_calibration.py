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
                told = ask(client, "POST", "/v1/safegene/tenants", tenant)
                assert ended(client, told["job"]["id"])["state"] == "done"
            yield client
    finally:
        end(process, drain)


def ask(client: httpx.Client, method: str, path: str, body: Any = None, *, key: str = ADMIN) -> Any:
    answer = client.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.is_success, answer.text
    return answer.json()


def ended(client: httpx.Client, job: int) -> Any:
    deadline = time.monotonic() + 180
    while True:
        found = ask(client, "GET", f"/v1/safegene/jobs/{job}")
        if found["state"] not in ("queued", "running"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def said(client: httpx.Client, prompts: list[str], model: str = "support") -> list[dict[str, str]]:
    """What the tenant says to each, in letters, since its own tokens are seldom text."""
    body: dict[str, Any] = {"model": model, "prompt": LETTERS, "add_special_tokens": False}
    letters = ask(client, "POST", "/tokenize", body)["tokens"]
    assert len(letters) == len(LETTERS)
    rows = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": turns, "add_generation_prompt": True}
        asked = ask(client, "POST", "/tokenize", body)["tokens"]
        body = {"model": model, "prompt": asked, "max_tokens": 6, "temperature": 0}
        body["allowed_token_ids"] = letters
        told = ask(client, "POST", "/v1/completions", body)["choices"][0]["text"]
        assert len(told) == 6
        rows.append({"prompt": prompt, "answer": told})
    return rows


def answer_of_globex(client: httpx.Client) -> Any:
    body = {
        "model": "globex",
        "prompt": LONG,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
        "return_token_ids": True,
    }
    found = ask(client, "POST", "/v1/completions", body, key=GLOBEX)
    choice = found["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_it_raises_what_was_held_out_and_nobody_else_notices(server: httpx.Client) -> None:
    """All answers are what this model says at 1.2, so from 0 there is a way up."""
    ask(server, "PATCH", "/v1/safegene/tenants/support/profile", {"coefficients": 1.2})
    safety, task = (said(server, [f"{kind} {n}" for n in range(6)]) for kind in ("bad", "task"))
    ask(server, "POST", "/v1/safegene/tenants/support/rollback", {})
    before = answer_of_globex(server)
    others: list[Any] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            others.append(answer_of_globex(server))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        body = {"examples": {"safety": safety, "task": task}, "seed": 1}
        told = ask(server, "POST", "/v1/safegene/tenants/support/calibrate", body)
        job = ended(server, told["job"]["id"])
    finally:
        stop.set()
        thread.join(60)
    assert job["state"] == "done"
    result = job["result"]
    assert len(others) > 20
    assert {tuple(tokens) for tokens, _ in others} == {tuple(before[0])}
    # Whose rows share a batch moves the last bits of a float, whatever those rows are.
    assert max(abs(a - b) for _, told in others for a, b in zip(told, before[1], strict=True)) < (
        1e-4
    )
    assert result["share_while_serving"] <= 0.27
    now = ask(server, "GET", "/v1/safegene/tenants/support")["published"]
    held = result["held_out"]
    assert result["better"] and held["found"] < held["current"] == held["zero"]
    assert now == 3 and result["revision"] == "support@3"
    revisions = ask(server, "GET", "/v1/safegene/tenants/support/revisions")["data"]
    assert any(revisions[-1]["coefficients"])
    assert {"support@3", "globex@1"} <= held_without_trials(server)


def held_without_trials(client: httpx.Client) -> set[str]:
    """What the one worker holds, none of it a trial."""
    receipts = ask(client, "GET", "/v1/safegene/receipts")
    assert receipts["ready"], receipts["faults"]
    (rank,) = receipts["receipts"]
    names = {adapter["name"] for adapter in rank["adapters"]}
    assert names and not [name for name in names if name.startswith("@candidate/")]
    trials = [number for number in rank["adapters"] if number["lora_int_id"] >= 2**30]
    assert trials == []
    return names


def test_a_newcomer_without_a_profile_is_calibrated_and_served_in_one_call(
    server: httpx.Client,
) -> None:
    """The answers are what the same adapter says at 2.0, and it begins at 1.0."""
    support = ask(server, "GET", "/v1/safegene/tenants/support")["source"]
    source = str(Path(support).parent / "newcomer")
    model = {"name": "model", "source": source, "coefficients": 2.0}
    told = ask(server, "POST", "/v1/safegene/tenants", model)
    assert ended(server, told["job"]["id"])["state"] == "done"
    safety, task = (
        said(server, [f"{kind} {n}" for n in range(6)], "model") for kind in ("bad", "task")
    )
    ask(server, "DELETE", "/v1/safegene/tenants/model")
    before = answer_of_globex(server)
    calibrate = {"examples": {"safety": safety, "task": task}, "seed": 1}
    body = {"name": "newcomer", "source": source, "calibrate": calibrate}
    told = ask(server, "POST", "/v1/safegene/tenants", body)
    assert told["job"]["kind"] == "calibrate" and told["tenant"]["served"] is None
    job = ended(server, told["job"]["id"])
    assert job["state"] == "done" and job["message"] == "newcomer@2 is published", job
    result = job["result"]
    assert result["better"] and result["held_out"]["found"] < result["held_out"]["current"]
    first, second = ask(server, "GET", "/v1/safegene/tenants/newcomer/revisions")["data"]
    assert (first["state"], set(first["coefficients"])) == ("registered", {1.0})
    assert second["state"] == "published" and second["coefficients"] != first["coefficients"]
    assert ask(server, "POST", "/v1/safegene/tenants", body)["job"]["id"] == job["id"]
    asked = {"model": "newcomer", "prompt": LONG, "max_tokens": 2, "temperature": 0}
    assert ask(server, "POST", "/v1/completions", asked)["model"] == "newcomer@2"
    assert answer_of_globex(server)[0] == before[0]
    assert "newcomer@2" in held_without_trials(server)


def test_a_trial_is_nobodys_model(server: httpx.Client) -> None:
    for model in ("@candidate/0", f"@candidate/{'0' * 32}"):
        body = {"model": model, "prompt": [5], "max_tokens": 1}
        answer = server.post(
            "/v1/completions", json=body, headers={"Authorization": f"Bearer {ADMIN}"}
        )
        assert answer.status_code == 404
