"""vLLM as a child process: folds its startup log, waits until it is ready, forwards signals.

"ready" is printed only once /v1/safegene/ready of that very process (by its pid) responds so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from rich.console import Console

from safegene_vllm.launcher.command import Launch
from safegene_vllm.launcher.startup_log import AS_IT_IS, StartupLog, error_line

READY_PATH = "/v1/safegene/ready"
POLL_S = 0.5
REJECTED_AFTER_S = 30.0
"""Seconds for which the port may respond 401 or 404 before the start counts as failed."""
UNREADY_STOP_S = 8.0
"""Seconds a server that is not ready yet may take to stop before a second SIGTERM, then SIGKILL.

vLLM 0.32 ignores a SIGTERM while it waits for its engine's first message: the KeyboardInterrupt
that it raises ends in its own `zmq_socket_ctx`. A second SIGTERM stops it.
"""

PR_SET_PDEATHSIG = 1
"""prctl(2) option: the signal a process gets when its parent's thread ends."""


def launch(
    launch: Launch,
    console: Console,
    *,
    environ: Mapping[str, str] | None = None,
    verbose: bool = False,
) -> int:
    """Run the server until it ends and return its exit code (128 + N after signal N).

    The code is 0 only if a signal of ours stopped it. Until it is ready, its log is folded into
    stages, except with `verbose`; from then on, or if it fails, the log goes to `console`. SIGINT,
    SIGTERM and SIGHUP are forwarded. A server that was ready may take any time to stop; one that
    was not is killed after twice UNREADY_STOP_S.
    """
    child = subprocess.Popen(
        launch.argv,
        env={**(os.environ if environ is None else environ), **launch.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # In its own session, Ctrl-C reaches it once, from us, and not also from the terminal.
        start_new_session=True,
        preexec_fn=_stop_with_parent(),
    )
    for note in launch.notes:
        console.print(note, **AS_IT_IS)
    log = StartupLog(console, verbose=verbose, secrets=launch.secrets)
    reader = threading.Thread(target=_pump, args=(child, log), daemon=True)
    reader.start()
    stopping = threading.Event()
    with _forwarded(child, stopping):
        ready, rejection = _wait_until_ready(launch, child, stopping, console, log)
        # An interrupted start is no failure on a terminal; elsewhere a supervisor ended it.
        if not ready and not (stopping.is_set() and console.is_terminal):
            log.fail()
        if rejection is not None:
            cause = error_line(log.lines)
            child.terminate()
        code = child.wait() if ready else _stop_unready(child, console)
    reader.join(timeout=5.0)
    if rejection is not None:
        found = f" Last error in its log: {cause}" if cause else ""
        console.print(f"not ready: {rejection}{found}", style="bold red", **AS_IT_IS)
        code = code or 1
    elif not stopping.is_set():
        # A supervisor restarts by the exit code, and vLLM exits with 0 when its engine dies.
        cause = error_line(log.lines) or "its log above does not name an error"
        console.print(f"vLLM exited with code {code}: {cause}", style="bold red", **AS_IT_IS)
        code = code or 1
    return code if code >= 0 else 128 - code


def _stop_unready(child: subprocess.Popen[bytes], console: Console) -> int:
    """Exit code of a server that stopped before it was ready; that of SIGTERM if it was killed.

    Killing includes all processes of its session.
    """
    for _ in range(2):
        with suppress(subprocess.TimeoutExpired):
            return child.wait(UNREADY_STOP_S)
        child.terminate()
    console.print("vLLM did not stop during startup: killed", style="bold red", **AS_IT_IS)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return -signal.SIGTERM


def _stop_with_parent() -> Callable[[], None] | None:
    """For the child, on Linux: request a SIGTERM for when we are killed and cannot forward it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def ready_lines(body: Mapping[str, Any]) -> Iterator[str]:
    """Format the response of /v1/safegene/ready, a line per tenant."""
    base = body.get("base")
    if base is not None:
        how = "weights" if body["apply"] == "weights" else "requests without an adapter"
        yield f"ready: base model ({how}, {base['layers']} layers)"
    for tenant in body["tenants"]:
        slot = "not in a slot" if tenant["slot"] is None else f"slot {tenant['slot']}"
        how = f"{tenant['apply']}, {tenant['layers']} layers" if tenant["apply"] else "UNPROTECTED"
        yield f"ready: {tenant['name']} ({how}, {slot})"
    if body.get("registry") is not None:
        yield f"ready: all that the registry publishes (version {body['registry']})"
    elif base is None and not body["tenants"]:
        yield "ready: no tenants yet; load one with POST /v1/load_lora_adapter"


def _pump(child: subprocess.Popen[bytes], log: StartupLog) -> None:
    assert child.stdout is not None
    with child.stdout as output:
        for raw in output:
            log.feed(raw.decode(errors="replace").rstrip("\n"))


@contextmanager
def _forwarded(child: subprocess.Popen[bytes], stopping: threading.Event) -> Iterator[None]:
    """Forward signals to the child, which decides how to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: object) -> None:
        stopping.set()
        if child.poll() is None:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(
    launch: Launch,
    child: subprocess.Popen[bytes],
    stopping: threading.Event,
    console: Console,
    log: StartupLog,
) -> tuple[bool, str | None]:
    """Wait until the server is ready and print its ready lines.

    Returns (True, None) if ready, (False, None) if it exited or a signal arrived first, and
    (False, reason) if it runs but will never be ready.
    """
    headers = {"Authorization": f"Bearer {launch.api_key}"} if launch.api_key else {}
    transport = httpx.HTTPTransport(uds=launch.uds, verify=launch.verify_tls)
    started, rejected_since = time.monotonic(), None
    with (
        httpx.Client(
            base_url=launch.url, headers=headers, transport=transport, timeout=10.0
        ) as client,
        console.status("starting vLLM") as status,
    ):
        while child.poll() is None and not stopping.is_set():
            seconds = time.monotonic() - started
            status_code, body = _get_ready(client)
            if status_code == 200 and body.get("pid") == child.pid:
                log.ready()
                for line in ready_lines(body):
                    console.print(line, **AS_IT_IS)
                where = launch.uds or launch.url
                console.print(f"serving at {where} after {seconds:.0f} s", **AS_IT_IS)
                return True, None
            if status_code in (401, 404):
                rejected_since = rejected_since or time.monotonic()
                if time.monotonic() - rejected_since > REJECTED_AFTER_S:
                    return False, _rejection(status_code, launch)
            reason = status_code == 503 and "error" in body and body["error"]["message"]
            detail = f": {reason}" if reason else ""
            status.update(f"starting: {log.stage}, {seconds:.0f} s{detail}")
            stopping.wait(POLL_S)
    return False, None


def _get_ready(client: httpx.Client) -> tuple[int, dict[str, Any]]:
    """Status and body of READY_PATH; status 0 without a response."""
    try:
        response = client.get(READY_PATH)
        body = response.json()
    except (httpx.HTTPError, ValueError):
        return 0, {}
    return response.status_code, body if isinstance(body, dict) else {}


def _rejection(status_code: int, launch: Launch) -> str:
    if status_code == 401:
        return f"{launch.url} does not accept this API key."
    return (
        f"{launch.url}{READY_PATH} is not found: vLLM runs without the safegene_server plugin; is "
        "safegene-vllm installed with its `server` extra?"
    )
