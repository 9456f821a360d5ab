"""Folding of vLLM's startup log, and the cause of a failed start."""

from __future__ import annotations

import sys
from io import StringIO

import pytest
from launched_server import free_port
from rich.console import Console

from safegene_vllm.launcher import Launch, launch
from safegene_vllm.launcher.startup_log import MAX_LINES, StartupLog, error_line

START = """\
(APIServer pid=1) INFO 12-01 03:58:00 [utils.py:300] non-default args: {'api_key': ['hush-hush']}
(APIServer pid=1) WARNING 12-01 03:58:02 [vllm.py:1703] Enforce eager set, disabling torch.compile
(Worker pid=3) INFO 12-01 03:59:00 [cpu_model_runner.py:68] Starting to load model /srv/m...
Loading safetensors checkpoint shards: 100% Completed | 1/1
(Worker pid=3) INFO 12-01 03:59:00 [default_loader.py:501] Loading weights took 0.01 seconds
(Worker pid=3) ERROR 12-01 03:59:01 [x.py:1] a tenant is left out
(EngineCore pid=2) INFO 12-01 03:59:03 [kv_cache_utils.py:2327] CPU KV cache size: 65,536 tokens
(APIServer pid=1) INFO 12-01 03:59:05 [__init__.py:66] Loading plugin safegene_server
INFO:     Started server process [1]
INFO:     Application startup complete.
""".splitlines()


def fed(*, verbose: bool = False, terminal: bool = False) -> tuple[StartupLog, StringIO]:
    out = StringIO()
    console = Console(file=out, width=200, force_terminal=terminal)
    log = StartupLog(console, verbose=verbose, secrets=("hush-hush", ""))
    for line in START:
        log.feed(line)
    return log, out


def test_a_start_is_folded_into_its_stages() -> None:
    log, out = fed()
    stages = [line.rpartition(" (")[0] for line in out.getvalue().splitlines()]
    assert stages == [f"starting: {s}" for s in ("weights", "KV cache", "tenants", "serving")]
    log.ready()
    log.feed("INFO: a request")
    shown = out.getvalue().splitlines()[4:]
    assert shown == [START[5], "INFO: a request"], "errors of the start, then the log as it comes"


def test_a_terminal_shows_the_stage_in_its_status_line() -> None:
    log, out = fed(terminal=True)
    assert (out.getvalue(), log.stage) == ("", "serving")


def test_the_whole_log_is_shown_on_request_and_after_a_failure_without_secrets() -> None:
    whole = [START[0].replace("hush-hush", "***"), *START[1:]]
    _, out = fed(verbose=True)
    assert out.getvalue().splitlines() == whole
    log, out = fed()
    log.fail()
    log.fail()
    assert out.getvalue().splitlines()[4:] == whole
    for number in range(MAX_LINES):
        log.feed(f"line {number}")
    assert len(log.lines) == MAX_LINES


def test_a_long_log_says_how_many_lines_are_missing() -> None:
    log, out = fed()
    for number in range(MAX_LINES):
        log.feed(f"line {number}")
    log.fail()
    assert f"[{len(START)} earlier lines are left out]" in out.getvalue()


WORKER = """\
(VllmWorker-0 pid=3) ERROR 12-01 03:45:21 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=3) ERROR 12-01 03:45:21 [m.py:953] ValueError: Available memory on node 0 is less
(EngineCore pid=2) ERROR 12-01 03:45:26 [core.py:1510] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
Exception: WorkerProc initialization failed due to an exception in a background process.
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
USAGE = """\
usage: api_server.py [-h] [--headless]
                     [model_tag]
api_server.py: error: argument --dtype: invalid choice: 'float99' (choose from 'auto', 'half')
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (WORKER, "ValueError: Available memory on node 0 is less"),
        (
            USAGE,
            "argument --dtype: invalid choice: 'float99' (choose from 'auto', 'half')",
        ),
        (
            USAGE.replace("api_server.py: error", "vllm serve: error"),
            "argument --dtype: invalid choice: 'float99' (choose from 'auto', 'half')",
        ),
        ("cc1plus: error: not a usage error\nRuntimeError: no compiler\n", "RuntimeError: no "),
        (
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n",
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore",
        ),
        (
            "KeyError: 'x'\nvllm.v1.engine.exceptions.EngineDeadError: EngineCore died.\n",
            "KeyError: 'x'",
        ),
    ],
)
def test_the_cause_is_the_first_process_s_own_error(log: str, expected: str) -> None:
    assert (error_line(log.splitlines()) or "").startswith(expected)


@pytest.mark.parametrize("log", [WORKER, USAGE])
def test_a_failed_start_ends_with_its_cause_below_the_whole_log(log: str) -> None:
    out = StringIO()
    code = f"import sys; print({log!r}); sys.exit(2)"
    command = Launch(
        (sys.executable, "-c", code), {}, f"http://127.0.0.1:{free_port()}", notes=("a note",)
    )
    assert launch(command, Console(file=out, width=200)) == 2
    first, *lines, last = out.getvalue().splitlines()
    assert first == "a note" and set(log.splitlines()) <= set(lines)
    assert last == f"vLLM exited with code 2: {error_line(log.splitlines())}"
