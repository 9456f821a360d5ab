"""The table against the real vLLM: every route of its app has a rule, every rule a route.

Imports vLLM in a process of its own (about ten seconds) and builds its app with everything switched
on; no engine is started and no model is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from safegene_server.access.route_permissions import OPERATE, RULES

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]

BUILD = """
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

from vllm.config import ProfilerConfig
from vllm.entrypoints.openai.api_server import build_app
from vllm.tasks import GENERATION_TASKS, POOLING_TASKS

from safegene_server.access.route_permissions import named_routes, unclassified

args = SimpleNamespace(
    disable_fastapi_docs=False, enable_offline_docs=False, root_path="", api_key=None,
    allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"],
    enable_request_id_headers=False, middleware=[], enable_scale_out=True, tokens_only=True,
    enable_fault_tolerance=True, enable_tokenizer_info_endpoint=True,
    profiler_config=ProfilerConfig(profiler="torch", torch_profiler_dir="/nowhere"),
)
model = MagicMock()
model.get_pooling_task.return_value = "embed"
app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, "render"), model)
routes = sorted(named_routes(app.routes))
print("FOUND " + json.dumps({"routes": routes, "beyond": unclassified(app)}))
"""

CLOSED = """
from fastapi.testclient import TestClient

from safegene_server.access.catalog import Principal, key_digest, make_view

admin = Principal("root", frozenset({"admin"}), frozenset({"*"}))
app.state.safegene.catalog.replace(make_view(keys={key_digest("sg-root"): admin}, tenants=()))
client = TestClient(app, headers={"Authorization": "Bearer sg-root"})
calls = {
    "POST /adapters": client.post("/adapters", json={"name": "x", "src": "/x"}),
    "POST /adapters%0A": client.post("/adapters%0A", json={"name": "x", "src": "/x"}),
    "DELETE /adapters/x": client.delete("/adapters/x"),
    "POST /v1/load_lora_adapter": client.post("/v1/load_lora_adapter", json={}),
    "POST /v1/unload_lora_adapter": client.post("/v1/unload_lora_adapter", json={}),
}
print("FOUND " + json.dumps({name: response.status_code for name, response in calls.items()}))
"""

ELSEWHERE = {
    # Behind an SDK or static files that are not installed here, or served by our middleware.
    "POST /cohere/v2/chat",
    "POST /cohere/v2/chat/render",
    "MOUNT /static",
    "GET /v1/models/{model_id}",
}


def run(code: str, **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server")]),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_PLUGINS": "",
            "VLLM_SERVER_DEV_MODE": "1",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("FOUND "))
    return result


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run(BUILD)


def test_every_route_of_vllm_is_in_the_table(found: dict[str, Any]) -> None:
    assert len(found["routes"]) > 70
    assert found["beyond"] == []


def test_every_row_of_the_table_is_a_route_of_vllm(found: dict[str, Any]) -> None:
    assert set(RULES) - set(found["routes"]) == ELSEWHERE


def test_routes_of_vllm_that_change_weights_are_closed(found: dict[str, Any]) -> None:
    dangerous = [r for r in found["routes"] if "weight" in r or "lora" in r or "adapters" in r]
    assert len(dangerous) > 8
    assert {RULES[route] for route in dangerous} == {OPERATE}


def test_with_a_registry_not_even_an_administrator_loads_past_it(tmp_path: Path) -> None:
    """vLLM adds SageMaker's routes after every plugin has been attached."""
    settings = tmp_path / "safegene.yaml"
    settings.write_text("registry: r.sqlite\nstore: store\n")
    plugins = {"VLLM_PLUGINS": "safegene_server", "SAFEGENE_SERVER_CONFIG": str(settings)}
    statuses = run(BUILD + CLOSED, **plugins)
    assert len(statuses) == 5 and set(statuses.values()) == {404}, statuses
