"""A real server on a registry, with adapters on disk, for tests over HTTP.

Each test module makes its own world and server.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from launched_server import end, free_port, start, until_serving

from safegene_server.artifacts import Store
from safegene_server.registry import Registry, Replica, Revision
from safegene_vllm import tiny_model
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import make_profile

ADMIN = f"sg-admin-{'0' * 40}"
CONFIG = """
registry: URL
store: store
sources: {roots: [ROOT]}
tenants: {gate: {enabled: false}}
access: {response_model: revision}
keys:
  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin], tenants: ["*"]}
"""


@dataclass
class World:
    """Adapters on disk, the registry and the store."""

    d: Path
    header: FamilyHeader
    registry: Registry
    store: Store

    def add(self, tenant: str, source: str, coefficients: list[float]) -> Revision:
        """Register and publish; a registered tenant gets another revision."""
        path = self.d / "root" / source
        if tenant not in {t.name for t in self.registry.tenants.list()}:
            self.registry.tenants.add(tenant, self.header.digest, source=str(path), actor="test")
        digest = self.store.stage(path, family=self.header).digest
        profile = make_profile(self.header, coefficients, {"method": "test"})
        added = self.registry.revisions.add(tenant, profile, adapter_digest=digest, actor="test")
        self.registry.revisions.set_state(added.id, "ready", actor="test")
        self.registry.rollouts.publish(tenant, added.number, actor="test")
        return added


def make_world(
    folder: Path, adapters: Mapping[str, int], *, url: str, more: str = "", access: str = ""
) -> World:
    """A tiny model, its family, and adapters by name and seed.

    `more` is added to the settings, `access` to their part of that name.
    """
    tiny_model.make_model("llama", folder / "m")
    family = tiny_model.write_family(folder / "m", folder / "f")
    for name, seed in adapters.items():
        tiny_model.write_tenant(folder / "m", folder / "root" / name, family, None, seed=seed)
    config = CONFIG.replace("ROOT", str(folder / "root")).replace("URL", url)
    if access:
        config = config.replace("response_model: revision", f"response_model: revision, {access}")
    (folder / "safegene.yaml").write_text(config + more)
    registry = Registry(url)
    header = read_family_header(folder / "f")
    registry.families.add(header, str(folder / "f"), actor="test")
    return World(folder, header, registry, Store(folder / "store"))


class Running:
    """A server process and clients for its keys."""

    def __init__(self, world: World, *, slots: int = 2, **env: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[str] = start(
            *(str(world.d / "m"), "--family", str(world.d / "f"), "--slots", str(slots)),
            *("--server-config", str(world.d / "safegene.yaml"), "--max-lora-rank", "8"),
            *("--served-model-name", "base", "--port", str(port), "--enable-prefix-caching"),
            ADMIN_KEY=ADMIN,
            **env,
        )
        self.lines, self.drain = until_serving(self.process)
        serving = any(line.startswith("serving at") for line in self.lines)
        assert serving, "\n".join(self.lines[-60:])
        self.pid = httpx.get(f"{self.url}/v1/safegene/ready", timeout=60).json()["pid"]
        self._clients: dict[str, openai.OpenAI] = {}
        self._https: dict[str, httpx.Client] = {}

    def http(self, key: str) -> httpx.Client:
        if key not in self._https:
            headers = {"Authorization": f"Bearer {key}"}
            self._https[key] = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self._https[key]

    def client(self, key: str) -> openai.OpenAI:
        if key not in self._clients:
            url = f"{self.url}/v1"
            self._clients[key] = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
        return self._clients[key]

    def kill(self) -> None:
        """Send SIGKILL to every process, as when a machine dies."""
        everything = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def end(self) -> None:
        for client in (*self._clients.values(), *self._https.values()):
            client.close()
        end(self.process, self.drain)

    def complete(
        self, key: str, model: str, prompt: list[int], **more: Any
    ) -> tuple[str, list[int]]:
        """Complete a prompt; return the model of the completion and its tokens."""
        completion = self.client(key).completions.create(
            model=model,
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True, **more},
        )
        ids: list[int] = completion.choices[0].token_ids  # type: ignore[attr-defined]
        return completion.model, ids

    def replica(self, registry: Registry) -> Replica:
        """This server's own row; a restored registry has none until the server joins it again."""
        begun = time.monotonic()
        while True:
            for found in registry.replicas.list(alive_s=3600.0):
                if found.pid == self.pid:
                    return found
            assert time.monotonic() - begun < 300, "the server has not joined the registry"
            time.sleep(0.02)

    def follows(self, registry: Registry) -> float:
        """Wait until this replica has applied the registry's version; return the time it took."""
        begun = time.monotonic()
        while self.replica(registry).applied_version < registry.version():
            assert time.monotonic() - begun < 300, registry.replicas.list()
            time.sleep(0.02)
        return time.monotonic() - begun
