"""The demo's tenants on a registry, monitored by Prometheus: `make demo ARGS=--observe`.

One safegene.yaml configures the server; its tenants are the folders that the demo has written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.prometheus.page import page
from deploy.prometheus.stack import Stack, running
from examples.smollm2.demo_files import FAMILY, DemoFiles
from examples.smollm2.server import Server
from safegene_vllm.client import Client

KEY = "sg-demo-" + "0" * 40
WAIT_S = 300.0
CONFIG = """
registry: registry.sqlite
store: store
tenants:
  directory: {tenants}
  gate: {{enabled: false}}   # the demo serves unprotected tenants on purpose
probes: {{enabled: true, every_s: 3600, share: 1.0, max_tokens: 24, concurrent: 16}}
metrics: {{period_s: 2}}
keys: [{{name: demo, secret_env: DEMO_KEY, scopes: [admin, serve], tenants: ["*"]}}]
"""


@contextmanager
def monitored(files: DemoFiles, build: Path) -> Iterator[tuple[Server, Stack]]:
    """Run a server with tenants from a folder, and a Prometheus that scrapes it."""
    folder = build / "observe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = folder / "safegene.yaml"
    settings.write_text(CONFIG.format(tenants=files.tenants))
    (folder / "prometheus").mkdir()
    extra = ["--server-config", str(settings), "--slots", "9", "--max-lora-rank", "16"]
    log, env = build / "server-observe.log", {"DEMO_KEY": KEY}
    with Server(files.parent, FAMILY, {}, log, extra=extra, env=env) as server:
        url = server.url.removesuffix("/v1")
        with running([url], folder / "prometheus", key=KEY) as stack:
            _until_served(url, {path.name for path in files.tenants.iterdir()})
            yield server, stack


def wait_for_probes(server: Server, stack: Stack) -> str:
    """Wait until every tenant is probed and scraped; return the table of numbers."""
    with Client(server.url.removesuffix("/v1"), KEY) as client:
        deadline = time.monotonic() + WAIT_S
        while any(found["result"] is None for found in client.probes()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"tenants are not probed after {WAIT_S:.0f} s")
            time.sleep(1.0)
    time.sleep(5.0)
    return page(stack)


def _until_served(url: str, names: set[str]) -> None:
    """Wait until all tenants are served. Raises: RuntimeError; TimeoutError."""
    with Client(url, KEY) as client:
        deadline = time.monotonic() + WAIT_S
        while {t["name"] for t in client.tenants() if t["published"]} < names:
            failed = [job for job in client.jobs() if job["state"] == "failed"]
            if failed:
                raise RuntimeError(f"{failed[0]['tenant']}: {failed[0]['message']}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all tenants are served after {WAIT_S:.0f} s")
            time.sleep(0.5)
