"""Runs vLLM as a child: passes its log through, waits for the receipts, forwards signals.

For the life of one server process. It says "ready" only once /v1/safegene/ready does, asked of that
very process. What to run was decided in command.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from rich.console import Console

from safegene_vllm.launcher.command import Launch

READY_PATH = "/v1/safegene/ready"
POLL_S = 0.5
REFUSED_AFTER_S = 30.0
"""How long the port may answer 401 or 404 before we say that the server is not ours."""
UNREADY_STOP_S = 8.0
"""How long a server that is not ready yet may take to end, before it is asked again, then killed.

vLLM 0.32 goes on starting if it is asked while it waits for its engine's first word: the
KeyboardInterrupt that it makes of SIGTERM ends in its own `zmq_socket_ctx`. The next is heard.
"""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent's thread ends."""

_TAIL_LINES = 4000
_OURS = re.compile(r"\bsafegene_vllm\.errors\.(\w+: .*)")
_ANY = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Exit): .*)")
_AS_IT_IS: Any = {"markup": False, "highlight": False, "soft_wrap": True}
_NOT_THE_CAUSE = ("Engine core initialization failed", "Traceback")


def launch(launch: Launch, console: Console, *, environ: Mapping[str, str] | None = None) -> int:
    """Run the server until it ends; its exit code (128 + signal number if a signal ended it), never
    0 unless it was asked to end.

    Its log goes to `console` as it comes. SIGINT, SIGTERM and SIGHUP are passed on to it. Once
    it has been ready it may take its time to end; until then, one that does not end is killed.
    """
    child = subprocess.Popen(
        launch.argv,
        env={**(os.environ if environ is None else environ), **launch.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Its own session: Ctrl-C reaches it once, from us, and not a second time from the terminal.
        start_new_session=True,
        preexec_fn=_end_with_parent(),
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = threading.Thread(target=_pump, args=(child, tail, console), daemon=True)
    reader.start()
    stopping = threading.Event()
    with _forwarded(child, stopping):
        ready, refused = _wait_until_ready(launch, child, stopping, console)
        if refused is not None:
            console.print(f"not ready: {refused}", style="bold red", **_AS_IT_IS)
            child.terminate()
        code = child.wait() if ready else _end_unready(child, console)
    reader.join(timeout=5.0)
    if refused is not None:
        code = code or 1
    elif not stopping.is_set():
        # Whoever restarts servers goes by the code, and vLLM leaves with 0 when its engine dies.
        cause = error_line(tail) or "its log above does not name an error"
        console.print(f"vLLM exited with code {code}: {cause}", style="bold red", **_AS_IT_IS)
        code = code or 1
    return code if code >= 0 else 128 - code


def _end_unready(child: subprocess.Popen[bytes], console: Console) -> int:
    """The code of a server that has ended by itself or was asked to end before it was ready; the
    code of SIGTERM if it had to be killed, with all processes of its session.
    """
    for _ in range(2):
        with suppress(subprocess.TimeoutExpired):
            return child.wait(UNREADY_STOP_S)
        child.terminate()
    console.print("vLLM does not end while it starts: killed", style="bold red", **_AS_IT_IS)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return -signal.SIGTERM


def _end_with_parent() -> Callable[[], None] | None:
    """For the child, on Linux: a SIGTERM when we are killed and cannot pass anything on."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))

    return ask


def error_line(lines: Iterable[str]) -> str | None:
    """The line of a log that says why: our first own error with its list, else the last error."""
    kept = [line.rstrip() for line in lines]
    for number, line in enumerate(kept):
        match = _OURS.search(line)
        if match:
            faults = [match[1]]
            for following in kept[number + 1 :]:
                _, dash, fault = following.partition("- ")
                if not dash or not re.match(r"\w+Error: ", fault):
                    break
                faults.append(f"- {fault}")
            return "\n".join(faults)
    found = [(n, m[1]) for n, line in enumerate(kept) if (m := _ANY.search(line))]
    causes = [(n, f) for n, f in found if not any(word in f for word in _NOT_THE_CAUSE)]
    if not found:
        return None
    number, line = (causes or found)[-1]
    # Some errors (pydantic's) say what is wrong in an indented line of its own.
    more = kept[number + 1] if number + 1 < len(kept) else ""
    return f"{line}\n{more}" if more.startswith("  ") and more.strip() else line


def ready_lines(body: Mapping[str, Any]) -> Iterator[str]:
    """One line per tenant, from the answer of /v1/safegene/ready."""
    base = body.get("base")
    if base is not None:
        how = "weights" if body["apply"] == "weights" else "requests without an adapter"
        yield f"ready: base model ({how}, {base['layers']} layers)"
    for tenant in body["tenants"]:
        place = "not in a slot" if tenant["slot"] is None else f"slot {tenant['slot']}"
        how = f"{tenant['apply']}, {tenant['layers']} layers" if tenant["apply"] else "UNPROTECTED"
        yield f"ready: {tenant['name']} ({how}, {place})"
    if body.get("registry") is not None:
        yield f"ready: all that the registry publishes (version {body['registry']})"
    elif base is None and not body["tenants"]:
        yield "ready: no tenants yet; load one with POST /v1/load_lora_adapter"


def _pump(child: subprocess.Popen[bytes], tail: deque[str], console: Console) -> None:
    assert child.stdout is not None
    with child.stdout as log:
        for raw in log:
            line = raw.decode(errors="replace").rstrip("\n")
            tail.append(line)
            console.out(line, highlight=False)


@contextmanager
def _forwarded(child: subprocess.Popen[bytes], stopping: threading.Event) -> Iterator[None]:
    """Pass signals on while inside; the child decides how to end."""
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
) -> tuple[bool, str | None]:
    """Print the ready lines when the time comes. (False, None): the child or a signal came first.

    A text says why this server will never be ready, though it runs.
    """
    headers = {"Authorization": f"Bearer {launch.api_key}"} if launch.api_key else {}
    transport = httpx.HTTPTransport(uds=launch.uds, verify=launch.verify_tls)
    started, refused_since = time.monotonic(), None
    with (
        httpx.Client(
            base_url=launch.url, headers=headers, transport=transport, timeout=10.0
        ) as client,
        console.status("starting vLLM") as status,
    ):
        while child.poll() is None and not stopping.is_set():
            seconds = time.monotonic() - started
            answer, body = _ask(client)
            if answer == 200 and body.get("pid") == child.pid:
                for line in ready_lines(body):
                    console.print(line, **_AS_IT_IS)
                where = launch.uds or launch.url
                console.print(f"serving at {where} after {seconds:.0f} s", **_AS_IT_IS)
                return True, None
            if answer in (401, 404):
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since > REFUSED_AFTER_S:
                    return False, _why_refused(answer, launch)
            message = f": {body['error']['message']}" if "error" in body and answer == 503 else ""
            status.update(f"starting vLLM, {seconds:.0f} s{message}")
            stopping.wait(POLL_S)
    return False, None


def _ask(client: httpx.Client) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer; 0 as long as nothing answers."""
    try:
        answer = client.get(READY_PATH)
        body = answer.json()
    except (httpx.HTTPError, ValueError):
        return 0, {}
    return answer.status_code, body if isinstance(body, dict) else {}


def _why_refused(answer: int, launch: Launch) -> str:
    if answer == 401:
        return f"{launch.url} does not accept this API key."
    return (
        f"{launch.url}{READY_PATH} is not found: vLLM runs without the safegene_server plugin; is "
        "safegene-vllm installed with its `server` extra?"
    )
