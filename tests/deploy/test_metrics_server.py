"""Rules, dashboards and alerts against a real server under load, by a real Prometheus.

Two slots for three tenants, so that there are evictions; probes are on. What fails in the middle
of a rollout is done to the server from outside, through the registry that it follows.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import launched_server as servers
import pytest
from launched_server import end, free_port, start, until_serving
from recipe_setup import tiny_chat_model

from deploy.prometheus import live
from deploy.prometheus.page import page
from deploy.prometheus.stack import Stack, running
from safegene_server.registry import Registry
from safegene_vllm import tiny_model
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import make_profile

pytestmark = pytest.mark.engine

ADMIN, APP = (f"sg-{who}-{'0' * 40}" for who in ("admin", "app"))
TENANTS = ("acme/support", "globex", "initech")
CONFIG = """
registry: registry.sqlite
store: store
sources: {roots: [ROOT]}
keys:
  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin, read, serve], tenants: ["*"]}
  - {name: app, secret_env: APP_KEY, tenants: [acme/support, globex, initech, base]}
tenants: {gate: {enabled: false}}
probes: {enabled: true, every_s: 20, share: 0.5, concurrent: 2, max_tokens: 8, prompts: own.jsonl}
"""
UNSEEN = ('outcome="server_error"', 'state="late"', "safegene:server_errors")
"""Nothing here makes the server fail, and it is the only replica."""


@dataclass
class Server:
    """A running server, its files below `d`, and a client that speaks as its administrator."""

    d: Path
    url: str
    admin: httpx.Client

    def change(self, method: str, path: str, body: Any = None) -> Any:
        response = self.admin.request(method, f"/v1/safegene{path}", json=body)
        assert response.is_success, response.text
        return response.json()

    def job(self, number: int) -> str:
        """The state in which it ended."""
        end = time.monotonic() + 120
        while (found := self.change("GET", f"/jobs/{number}")["state"]) in ("queued", "running"):
            assert time.monotonic() < end, found
            time.sleep(0.3)
        return str(found)

    def chat(self, model: str, key: str = APP, **more: Any) -> int:
        """The status of the response."""
        body = {"model": model, "messages": [{"role": "user", "content": "Tell me a word."}]}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self.url}/v1/chat/completions"
        response = httpx.post(
            url, json=body | {"max_tokens": 12} | more, headers=headers, timeout=60
        )
        return response.status_code


def write(d: Path) -> None:
    """Model, family, adapters of three tenants, settings and probes."""
    tiny_chat_model(d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    for i, name in enumerate(TENANTS):
        tiny_model.write_tenant(
            d / "m", d / "root" / name.replace("/", "-"), family, 0.7, seed=10 + i
        )
    (d / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(d / "root")))
    kinds = {"harmful": 3, "lookalike": 2, "benign": 2}
    prompts = [{"prompt": f"{k} {i}?", "kind": k} for k, n in kinds.items() for i in range(n)]
    (d / "own.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in prompts))


@contextmanager
def serving(d: Path) -> Iterator[Server]:
    """The server with its three tenants published."""
    port = free_port()
    small = tuple(a for a in servers.SMALL if a != "--skip-tokenizer-init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "SMALL", small)
        process = start(
            *(str(d / "m"), "--family", str(d / "f"), "--slots", "2", "--max-lora-rank", "8"),
            *("--server-config", str(d / "safegene.yaml"), "--served-model-name", "base"),
            *("--port", str(port)),
            ADMIN_KEY=ADMIN,
            APP_KEY=APP,
        )
    lines, drain = until_serving(process)
    try:
        assert any(line.startswith("serving at") for line in lines), "\n".join(lines[-60:])
        url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as admin:
            made = Server(d, url, admin)
            for name in TENANTS:
                source = str(d / "root" / name.replace("/", "-"))
                body = {"name": name, "source": source}
                assert made.job(made.change("POST", "/tenants", body)["job"]["id"]) == "done"
            yield made
    finally:
        end(process, drain)


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Requests of every kind, until the block ends."""
    over = threading.Event()

    def send_requests() -> None:
        at = 0
        while not over.is_set():
            at += 1
            server.chat(TENANTS[at % 3], stream=True, stream_options={"include_usage": True})
            server.chat(TENANTS[at % 3], stream=bool(at % 2))
            if at % 3 == 0:
                server.chat("base")
                server.chat(TENANTS[0], key="sg-absent-" + "0" * 40)
                server.chat("absent")

    server.change("PUT", "/tenants/globex/limits", {"requests_per_minute": 6})
    source = str(server.d / "root" / "nothing")
    started = server.change("POST", "/tenants", {"name": "broken", "source": source})
    assert server.job(started["job"]["id"]) == "failed"
    thread = threading.Thread(target=send_requests)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    d = tmp_path_factory.mktemp("deploy")
    write(d)
    with serving(d) as made, load(made):
        yield made


@pytest.fixture(scope="module")
def stack(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running([server.url], tmp_path_factory.mktemp("stack"), key=ADMIN, fast=True) as made:
        made.until("a scrape", lambda: made.query("safegene_build_info"))
        yield made


def test_every_expression_is_known_and_returns_data(server: Server, stack: Stack) -> None:
    # A tenant whose limit is hit, and a change that is applied.
    server.change("PATCH", "/tenants/globex/profile", {"scale": 1.1})
    assert live.check(stack, tenant="globex", unseen=UNSEEN, patience_s=150) == []


def test_the_page_is_made_of_real_numbers(stack: Stack) -> None:
    printed = page(stack)
    for name in TENANTS:
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert f"{name}@" in line


def test_a_profile_set_too_low_by_hand_fires(server: Server, stack: Stack) -> None:
    def about() -> list[str]:
        found = [n for n in stack.notices if n["labels"]["alertname"] == "SafegeneTenantWeak"]
        return [notice["status"] for notice in found if notice["labels"]["tenant"] == TENANTS[0]]

    assert about() == []
    server.change("PATCH", f"/tenants/{TENANTS[0]}/profile", {"coefficients": 0.01})
    stack.until("the alert at the webhook", lambda: "firing" in about())
    server.change("POST", f"/tenants/{TENANTS[0]}/rollback", {})
    stack.until("the alert taken back", lambda: "resolved" in about())


def test_a_replica_that_stops_applying_revisions_fires(server: Server, stack: Stack) -> None:
    registry = Registry(server.d / "registry.sqlite")
    try:
        header = read_family_header(server.d / "f")
        profile = make_profile(header, [0.4] * header.num_layers, {"method": "test"})
        nowhere = "sha256:" + "0" * 64
        added = registry.revisions.add("initech", profile, adapter_digest=nowhere, actor="test")
        registry.revisions.set_state(added.id, "ready", actor="test")
        registry.rollouts.publish("initech", added.number, actor="test")
        both = {"SafegeneReplicaLagging", "SafegeneReplicaFaults"}
        stack.until("the alerts", lambda: both <= set(stack.firing()))
        registry.rollouts.rollback("initech", actor="test")
        stack.until("its end", lambda: "SafegeneReplicaLagging" not in stack.firing())
    finally:
        registry.close()
