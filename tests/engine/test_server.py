"""One real vLLM server, started by `safegene serve`, by external clients: openai and httpx.

For what only the real server can show: admission at run time, what survives it, and that nothing a
client sends takes the engine down. Two slots, so that tenants are evicted all the time.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from launched_server import START_S, end, free_port, start, until_serving

from safegene_vllm import tiny_model
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, save_adapter
from safegene_vllm.formats.family import Family
from safegene_vllm.formats.profile import Profile, load_profile, save_profile

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

KEY = "a-key"
PROMPT = [5, 9, 33, 77, 101]
RANKS = min(2, len(os.sched_getaffinity(0)))
"""Tensor parallel where there are two cores: every promise is one of all ranks."""


@dataclass
class Server:
    """The running server and the files below its adapter root `root`."""

    d: Path
    root: Path
    family: Family
    http: httpx.Client
    client: openai.OpenAI
    lines: list[str]

    def load(self, name: str, path: Path | str, **more: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(path), **more}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def tokens(self, model: str, **more: Any) -> list[int]:
        response = self.client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True, **more},
        )
        assert response.model == model
        ids: list[int] = response.choices[0].token_ids  # type: ignore[attr-defined]
        return ids

    def tenants(self) -> dict[str, dict[str, Any]]:
        response = self.http.get("/v1/safegene/ready")
        assert response.status_code == 200, response.text
        return {tenant["name"]: tenant for tenant in response.json()["tenants"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Family]:
    d = tmp_path_factory.mktemp("engine")
    tiny_model.make_model("llama", d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    for i in range(4):
        tiny_model.write_tenant(
            d / "m", d / "root" / f"t{i}", family, [0.5 + i * 0.3, 1.0], seed=10 + i
        )
    tiny_model.write_tenant(d / "m", d / "root" / "p", family, [0.7, 0.9], adapter=False)
    tiny_model.write_tenant(d / "m", d / "outside", family, 0.5, seed=99)
    return d, family


@pytest.fixture(scope="module")
def server(files: tuple[Path, Family]) -> Iterator[Server]:
    d, family = files
    port, root = free_port(), d / "root"
    process = start(
        *(str(d / "m"), "--family", str(d / "f"), "--adapter-root", str(root), "--slots", "2"),
        *("--tenant", f"t0={root / 't0'}", "--tenant", f"p={root / 'p'}"),
        *("--served-model-name", "base", "--port", str(port), "--api-key", KEY),
        *("-tp", str(RANKS)),
    )
    lines, drain = until_serving(process)
    url = f"http://127.0.0.1:{port}"
    try:
        assert any(x.startswith("serving at") for x in lines), "\n".join(lines[-60:])
        with httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        ) as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
            yield Server(d, root, family, http, client, list(lines))
    finally:
        end(process, drain)


@pytest.fixture
def unharmed(server: Server) -> Iterator[None]:
    """Whatever a test does, t0 and p respond afterwards as before, and all is verified."""
    before = server.tokens("t0"), server.tokens("p"), server.tokens("base")
    yield
    assert (server.tokens("t0"), server.tokens("p"), server.tokens("base")) == before
    assert server.http.get("/v1/safegene/ready").status_code == 200


def rejected(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == ("lora_path", status)
    assert words in error["message"]
    assert "Traceback" not in error["message"] and "method failed" not in error["message"]


def test_the_launcher_prints_the_receipts(server: Server) -> None:
    ready = [line for line in server.lines if line.startswith("ready: ")]
    assert ready == ["ready: t0 (gain, 2 layers, slot 0)", "ready: p (gain, 2 layers, slot 1)"]


def test_models_are_listed_and_served(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["base", "t0", "p"]
    completions = {tuple(server.tokens(name)) for name in ("base", "t0", "p")}
    assert len(completions) == 3


def test_receipts_and_readiness(server: Server) -> None:
    body = server.http.get("/v1/safegene/receipts").json()
    assert (body["ready"], body["faults"]) == (True, [])
    assert [receipt["rank"] for receipt in body["receipts"]] == list(range(RANKS))
    for receipt in body["receipts"]:
        assert receipt["family"] == server.family.digest
        assert receipt["sites_applied"] == receipt["sites_expected"] == 14
    tenants = server.tenants()
    assert tenants["p"]["profile"] == load_profile(server.root / "p").digest
    assert (tenants["t0"]["sites"], tenants["t0"]["apply"]) == (14, "gain")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/safegene/ready"),
        ("GET", "/v1/safegene/receipts"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/t0"),
    ],
)
def test_every_route_requires_the_key(server: Server, method: str, path: str) -> None:
    response = httpx.request(method, str(server.http.base_url).rstrip("/") + path, timeout=60)
    assert response.status_code == 401, response.text


def test_a_tenant_loaded_at_run_time_is_verified_and_served(server: Server, unharmed: None) -> None:
    response = server.load("t1", server.root / "t1")
    assert response.status_code == 200, response.text
    assert server.tenants()["t1"]["profile"] == load_profile(server.root / "t1").digest
    assert server.tokens("t1") not in (server.tokens("base"), server.tokens("t0"))
    assert "t1" in [model.id for model in server.client.models.list()]


# -- rejections: what is done to a copy of a good tenant, and words of our message ---------------


def other_family(server: Server, place: Path) -> None:
    save_profile(Profile("sha256:" + "0" * 64, (0.5, 0.5), {}), place)


def without_profile(server: Server, place: Path) -> None:
    (place / "safegene.json").unlink()


def negative(server: Server, place: Path) -> None:
    save_profile(Profile(server.family.digest, (-0.5, 0.5), {}), place)


def altered(server: Server, place: Path) -> None:
    raw = json.loads((place / "safegene.json").read_text(encoding="utf-8"))
    raw["coefficients"][0] = 0.0
    (place / "safegene.json").write_text(json.dumps(raw), encoding="utf-8")


def pickle_only(server: Server, place: Path) -> None:
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")


def truncated(server: Server, place: Path) -> None:
    path = place / "adapter_model.safetensors"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-10])


def replace_adapter(place: Path, lora_weights: dict[str, LoRAWeights]) -> None:
    profile = (place / "safegene.json").read_bytes()
    shutil.rmtree(place)
    save_adapter(Adapter(lora_weights, None, {}), place, base_model=None)
    (place / "safegene.json").write_bytes(profile)


def not_a_number(server: Server, place: Path) -> None:
    path = place / "adapter_model.safetensors"
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(bytes(content))


def too_large(server: Server, place: Path) -> None:
    site = "model.layers.0.self_attn.q_proj"
    replace_adapter(place, tiny_model.random_lora_weights({site: (128, 128)}, 64, 1))


def unknown_site(server: Server, place: Path) -> None:
    replace_adapter(
        place, tiny_model.random_lora_weights({"model.layers.0.nothing": (128, 128)}, 2, 1)
    )


def on_lm_head(server: Server, place: Path) -> None:
    replace_adapter(place, tiny_model.random_lora_weights({"lm_head": (320, 128)}, 2, 1))


def full_checkpoint(server: Server, place: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).unlink()
    for name in ("config.json", "model.safetensors"):
        (place / name).touch()


def in_a_subdirectory(server: Server, place: Path) -> None:
    (place / "checkpoint-500").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).rename(place / "checkpoint-500" / name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_family, "calibrate the tenant against this family"),
        (without_profile, "would be served unprotected"),
        (negative, "layer 0 has coefficient -0.5, expected 0.0 to 3.0"),
        (altered, "altered after calibration"),
        (pickle_only, "adapter_model.bin (pickle, rejected)"),
        (truncated, "adapter_model.safetensors"),
        (not_a_number, "NaN"),
        (too_large, "slots hold --max-lora-rank 8"),
        (unknown_site, "model.layers.0.nothing has no LoRA layer here"),
        (on_lm_head, "embeddings and lm_head are not supported"),
        (full_checkpoint, "is a full checkpoint (config.json, model.safetensors)"),
        (in_a_subdirectory, "spoilt-in_a_subdirectory/checkpoint-500 instead"),
    ],
)
def test_damaged_tenants_are_rejected_and_affect_no_other(
    server: Server, unharmed: None, spoil: Callable[[Server, Path], None], words: str
) -> None:
    place = server.root / f"spoilt-{spoil.__name__}"
    shutil.copytree(server.root / "t3", place)
    spoil(server, place)
    rejected(server.load("spoilt", place), 400, words)
    assert "spoilt" not in server.tenants()
    with pytest.raises(openai.NotFoundError):
        server.tokens("spoilt")


def test_paths_outside_the_roots_are_rejected(server: Server, unharmed: None) -> None:
    outside = "is outside safegene.adapter_roots"
    rejected(server.load("x", server.d / "outside"), 400, outside)
    rejected(server.load("x", server.root / ".." / "outside"), 400, outside)
    rejected(server.load("x", "/no/such/place"), 400, outside)
    (server.root / "link").symlink_to(server.d / "outside")
    rejected(server.load("x", server.root / "link"), 400, "symbolic link")
    inner = server.root / "inner-link"
    shutil.copytree(server.root / "t3", inner)
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(
        server.d / "outside" / "adapter_model.safetensors"
    )
    rejected(server.load("x", inner), 400, "cannot be read")
    rejected(server.load("x", server.root / "none"), 404, "is not a directory")


def test_an_idle_connection_outlives_vllms_five_seconds(server: Server) -> None:
    url = server.http.base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    for pause_s in (0, 7):
        time.sleep(pause_s)
        if connection.sock is not None:
            connection.auto_open = 0  # what is closed meanwhile is not opened again
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.status == 200 and response.read() == b""
    connection.close()


def test_sagemakers_route_is_verified_too(server: Server, unharmed: None) -> None:
    body = {"name": "sage", "src": str(server.d / "outside")}
    assert server.http.post("/adapters", json=body).status_code == 400
    assert "sage" not in server.tenants()
    body["src"] = str(server.root / "t1")
    assert server.http.post("/adapters", json=body).status_code == 200
    assert server.tenants()["sage"]["profile"] == load_profile(server.root / "t1").digest


def test_a_changed_tenant_is_rejected_under_its_old_name_and_path(
    server: Server, unharmed: None
) -> None:
    place = server.root / "changing"
    shutil.copytree(server.root / "t2", place)
    assert server.load("changing", place).status_code == 200
    before = server.tokens("changing")
    rejected(server.load("changing", place, load_inplace=True), 400, "load_inplace is rejected")
    assert server.tokens("changing") == before
    unload = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "changing"})
    assert unload.status_code == 200
    save_profile(Profile(server.family.digest, (3.0, 3.0), {}), place)
    rejected(server.load("changing", place), 400, "has changed since it was first loaded")
    response = server.load("changing@2", place)
    assert response.status_code == 200, response.text
    assert server.tokens("changing@2") != before


def test_a_tenant_outlives_its_directory_and_its_eviction(server: Server, unharmed: None) -> None:
    place = server.root / "leaving"
    shutil.copytree(server.root / "t3", place)
    assert server.load("leaving", place).status_code == 200
    before = server.tokens("leaving")
    shutil.rmtree(place)
    for name in ("e0", "e1", "e2"):
        assert server.load(name, server.root / "t2").status_code == 200
        server.tokens(name)
    assert server.tenants()["leaving"]["slot"] is None
    assert server.tokens("leaving", cache_salt="again") == before
    assert server.tenants()["leaving"]["slot"] is not None


def test_prompt_logprobs_of_a_tenant_leave_the_engine_alive(server: Server, unharmed: None) -> None:
    body = {"model": "t0", "prompt": PROMPT, "max_tokens": 2, "prompt_logprobs": 1}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"][0]["prompt_logprobs"]) == len(PROMPT)


def test_an_engine_that_cannot_be_protected_does_not_start(files: tuple[Path, Family]) -> None:
    """On CPU vLLM itself rejects this setting, else the plugin does; the launcher prints why."""
    d, _ = files
    process = start(
        *(str(d / "m"), "--family", str(d / "f"), "--port", str(free_port())),
        VLLM_LORA_ENABLE_DUAL_STREAM="1",
    )
    out = process.communicate(timeout=START_S)[0]
    assert process.returncode not in (0, None)
    assert "\nready:" not in out
    last = out[out.rindex("vLLM exited with code") :]
    assert re.search("Dual CUDA streams|LORA_ENABLE_DUAL_STREAM=1", last), last
