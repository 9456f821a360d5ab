"""`safegene serve` in processes of their own, for tests that act as external clients."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 240.0
SMALL = (
    *("--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"),
    *("--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864"),
)


def free_port() -> int:
    """A port without a listener, outside the range of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """`safegene serve` in a process of its own, its output in one pipe."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "safegene_vllm", "serve", *arguments, *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            **env,
        },
    )


def until_serving(process: subprocess.Popen[str]) -> tuple[list[str], threading.Thread]:
    """The server's lines up to "serving at", and the thread that continues to read them.

    A server that hangs must not hang the tests: its end closes the pipe we read.
    """
    # The launcher prints vLLM's log when it is stopped during the start.
    watchdogs = [
        threading.Timer(START_S, process.terminate),
        threading.Timer(START_S + 60.0, process.kill),
    ]
    for watchdog in watchdogs:
        watchdog.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("serving at"):
            break
    for watchdog in watchdogs:
        watchdog.cancel()
    drain = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    drain.start()
    return lines, drain


def end(process: subprocess.Popen[str], drain: threading.Thread) -> None:
    """Stop the server as an operator would, by force if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    drain.join(timeout=300)
    assert process.stdout is not None
    process.stdout.close()
