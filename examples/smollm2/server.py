"""`safegene serve` as a child process, for the demo and the benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

START_LIMIT_S = 300


class Server:
    """`with Server(model, family, tenants, log) as server:`; tenants None means by weight load.

    `extra` and `env` extend command line and environment. Raises: RuntimeError with the end of the
    log if the server does not become ready.
    """

    def __init__(
        self,
        model: Path,
        family: Path,
        tenants: Mapping[str, Path] | None,
        log: Path,
        *,
        name: str = "parent",
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = log
        command = [sys.executable, "-m", "safegene_vllm", "serve", str(model)]
        command += ["--family", str(family)]
        if tenants is None:
            command += ["--apply", "weights"]
        for tenant, directory in (tenants or {}).items():
            command += ["--tenant", f"{tenant}={directory}"]
        command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", "1024", "--max-num-seqs", "64"]
        command += ["--kv-cache-memory-bytes", str(1 << 30), "--enforce-eager"]
        self.command = [*command, *extra]
        self.env = {**os.environ, **(env or {})}

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=self.env
            )
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/safegene/ready", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        self.__exit__(None, None, None)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"the server did not become ready; the end of {self.log}:\n{tail}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def receipts(self) -> list[dict[str, Any]]:
        """One receipt per rank."""
        response = httpx.get(f"{self.url}/safegene/receipts", timeout=30).json()
        receipts: list[dict[str, Any]] = response["receipts"]
        return receipts

    def wait(self) -> None:
        """Wait until the server ends or the user stops it."""
        try:
            self.process.wait()
        except KeyboardInterrupt:
            return
