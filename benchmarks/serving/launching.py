"""One server per arm, as a child process: started, ready, its memory and CPU looked at, stopped.

All arms get the same engine flags; what differs is what the arm is about. Stock arms run without
any plugin, the others through `safegene serve`, as a user would start them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from arms import BY_HAND, OURS, PROTECTED, Arm
from cells import Cell
from random_world import World
from safegene_vllm.errors import SafegeneError
from safegene_vllm.planner.slots import rank_bucket

ROOT = Path(__file__).resolve().parents[2]
API_SERVER = "vllm.entrypoints.openai.api_server"
BASE = "base"
"""The name that the base model is served under."""
SWITCH = "switching.Switch"
"""What is mixed into the worker of an engine that several arms share."""
SPARE_ADAPTERS = 4
START_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds")


class BenchError(SafegeneError):
    """A server or a measurement that did not work out; nothing is reported of it."""


def tenant_path(world: World, arm: Arm, tenant: int, number: int) -> Path:
    """The directory that `arm` serves as this tenant, with profile `number` where it has one."""
    match arm.kind:
        case "gain" | "composed":
            return world.protected(tenant, arm.layers, number)
        case "exported" | "exported_stock":
            return world.exported(tenant, arm.layers, number)
    return world.plain(tenant)


def is_switched(arm: Arm, cell: Cell) -> bool:
    """Whether other arms of the cell are the same engine, told something else."""
    return any(other.safety != "all" and other.engine(on_cpu=True) == arm for other in cell.arms)


def slot_rank(arm: Arm, cell: Cell) -> int:
    """The rank bucket that the arm's slots need."""
    beside = arm.kind in ("composed", *BY_HAND)
    return rank_bucket(cell.rank + (cell.vector_rank if beside else 0))


def command(arm: Arm, cell: Cell, world: World, port: int) -> list[str]:
    """The process that serves `arm`."""
    flags = ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)]
    flags += [] if cell.compiled else ["--enforce-eager"]
    for name, value in cell.engine.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    tenants = {
        f"t{i}": tenant_path(world, arm, i, i)
        for i in range(cell.tenants if arm.has_tenants else 0)
    }
    if tenants:
        flags += ["--max-loras", str(cell.tenants)]
        flags += ["--max-cpu-loras", str(cell.tenants + SPARE_ADAPTERS)]
        flags += ["--max-lora-rank", str(slot_rank(arm, cell))]
        flags += ["--lora-target-modules", *world.modules()]
    if arm.kind in PROTECTED:
        flags += ["--worker-extension-cls", SWITCH] if is_switched(arm, cell) else []
        ours = [sys.executable, "-m", "safegene_vllm", "serve", str(world.model)]
        ours += ["--family", str(world.family(arm.layers)), "--apply", arm.kind]
        if arm.kind == "weights":
            ours += ["--profile", str(world.checkpoint_profile(arm.layers))]
        for name, path in tenants.items():
            ours += ["--tenant", f"{name}={path}"]
        return [*ours, *(["--enable-lora"] if tenants else []), *flags]
    model = world.merged(arm.layers) if arm.kind == "merged" else world.model
    stock = [sys.executable, "-m", API_SERVER, "--model", str(model), *flags]
    if tenants:
        stock += ["--enable-lora", "--lora-modules"]
        stock += [f"{name}={path}" for name, path in tenants.items()]
    if arm.kind in OURS:
        open_mode = {"family": None, "missing_profile": "serve_unprotected"}
        stock += ["--additional-config", json.dumps({"safegene": open_mode})]
    return stock


def environment(arm: Arm, threads: int) -> dict[str, str]:
    """What the process is given: our plugins or none, and the same threads for every engine."""
    path = os.pathsep.join(
        [
            *(str(ROOT / folder) for folder in (".", "server", "benchmarks/serving")),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
    )
    return {
        **os.environ,
        "PYTHONPATH": path,
        "VLLM_PLUGINS": "safegene,safegene_server" if arm.kind in OURS else "",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def free_port() -> int:
    """A port nobody listens on, of those no outgoing connection is given while a server starts."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """One arm's server. `start` returns its start-up numbers; `stop` ends all its processes."""

    arm: Arm
    cell: Cell
    world: World
    threads: int
    log: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    safety: str = "all"

    def start(self) -> dict[str, float]:
        """Start and wait until it serves: `start_s` from the spawn, `load_weights_s` by its log.

        Errors: BenchError with the end of the log.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        told = command(self.arm, self.cell, self.world, port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                told,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(self.arm, self.threads),
                start_new_session=True,
            )
        path = "/v1/safegene/ready" if self.arm.kind in PROTECTED else "/health"
        while time.perf_counter() - started < START_LIMIT_S and self.process.poll() is None:
            try:
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        else:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            self.stop()
            raise BenchError(f"{self.arm.name} did not start; the end of {self.log}:\n{tail}")
        found = {"start_s": time.perf_counter() - started}
        loaded = _LOADED.findall(self.log.read_text(errors="replace"))
        return found | ({"load_weights_s": float(loaded[-1])} if loaded else {})

    def switch(self, safety: str) -> None:
        """Tell the worker which arm it is from now on. Errors: BenchError if it cannot be."""
        if not is_switched(self.arm, self.cell) or safety == self.safety:
            return
        told = str(self.world.merged(self.arm.layers)) if safety == "reloaded" else safety
        self.tell("switch_weights" if self.arm.kind == "weights" else "switch_safety", told)
        self.safety = safety

    def tell(self, method: str, *args: str) -> Any:
        """Call a method of the worker; its answer. Errors: BenchError."""
        body = {"method": method, "args": args}
        answer = httpx.post(f"{self.url}/collective_rpc", json=body, timeout=START_LIMIT_S)
        if answer.status_code != 200:
            raise BenchError(f"{self.arm.name}, {method} {args}: {answer.text[:500]}")
        return answer.json()["results"][0]

    def processes(self) -> list[psutil.Process]:
        """The server's own process and all below it."""
        if self.process is None:
            return []
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> float:
        """CPU seconds used so far by all its processes."""
        return sum(_times(process) for process in self.processes())

    def memory(self) -> dict[str, float]:
        """Bytes in memory of all its processes, added up: now, without what others share, at most.

        Shared pages count once per process in `rss_bytes` and `peak_bytes`.
        """
        found = [process.memory_full_info() for process in self.processes()]
        return {
            "rss_bytes": float(sum(memory.rss for memory in found)),
            "private_bytes": float(sum(memory.uss for memory in found)),
            "peak_bytes": float(sum(_peak(process.pid) for process in self.processes())),
        }

    def receipts(self) -> list[dict[str, Any]]:
        """What every worker says it applied; none where there is no vector or no such route."""
        if self.arm.kind not in PROTECTED:
            return []
        answer = httpx.get(f"{self.url}/v1/safegene/receipts", timeout=60)
        if answer.status_code != 200:
            return []
        found: list[dict[str, Any]] = answer.json()["receipts"]
        return found

    def stop(self) -> None:
        """End it as an operator would, by force if it does not."""
        if self.process is None:
            return
        own = self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, left = psutil.wait_procs(own, timeout=10)
        for process in left:
            process.kill()
        self.process = None


def _peak(pid: int) -> int:
    """The most memory that the process has held, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _times(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def safety_bytes(server: Server) -> dict[str, float]:
    """Bytes of safety by the receipts, and what one more slot rank costs all slots.

    `vector_bytes` is the resident vector of every rank; `slot_bytes` the LoRA slots of the engine
    as its flags size them, S slots x bucket x sum(D_in + D_out) x 2 bytes.
    """
    arm, world = server.arm, server.world
    receipts = server.receipts()
    found: dict[str, float] = {}
    if receipts:
        found["vector_bytes"] = float(sum(r["vector_bytes"] for r in receipts))
    if arm.has_tenants:
        width = sum(d_out + d_in for d_out, d_in in world.sites.values())
        found["slot_bytes"] = float(server.cell.tenants * slot_rank(arm, server.cell) * width * 2)
    return found
