"""vLLM's log during startup: folded into stages, and searched for the cause of a failure."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

MAX_LINES = 4000
STAGES = (
    ("weights", re.compile(r"Starting to load model|Loading (?:weights|safetensors)")),
    ("compilation", re.compile(r"Compiling a graph|Start compiling|torch\.compile took")),
    ("KV cache", re.compile(r"KV cache (?:size|memory)|for KV cache")),
    ("CUDA graphs", re.compile(r"Capturing CUDA graph|Warming up model")),
    ("tenants", re.compile(r"Loading plugin safegene_server|Loaded new LoRA adapter")),
    ("serving", re.compile(r"Started server process|Application startup complete")),
)
"""Stages of a start in their order, with the lines of vLLM 0.28 to 0.32 that begin them."""
_OURS = re.compile(r"\bsafegene_vllm\.errors\.(\w+: .*)")
_USAGE = re.compile(r"^[\w.-]+(?: \w+)?: error: (.*)")
_ANY = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Exit): .*)")
_GENERIC = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|Traceback"
    r"|^(?:\w+\.)*(?:EngineDeadError|CancelledError|BrokenPipeError|SystemExit)\b"
)
"""Errors that only report that another process failed."""
_ERROR_LEVEL = re.compile(r"(?:^|\) )(?:ERROR|CRITICAL) ")
_MIN_SECRET = 4
AS_IT_IS: Any = {"markup": False, "highlight": False, "soft_wrap": True}


class StartupLog:
    """Log of a vLLM that is starting; passed through once it is ready, or with `verbose`.

    Until then only the stages are shown. `fail` shows the whole log. `secrets` are masked.
    """

    def __init__(
        self, console: Console, *, verbose: bool = False, secrets: Sequence[str] = ()
    ) -> None:
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        self.stage = "vLLM"
        self._console = console
        self._open = verbose
        self._secrets = [secret for secret in secrets if len(secret) >= _MIN_SECRET]
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._number = -1
        self._dropped = 0

    def feed(self, line: str) -> None:
        """Take one line of vLLM's output."""
        for secret in self._secrets:
            line = line.replace(secret, "***")
        with self._lock:
            self._dropped += len(self.lines) == MAX_LINES
            self.lines.append(line)
            if self._open:
                self._console.out(line, highlight=False)
            else:
                self._advance(line)

    def ready(self) -> None:
        """Pass later lines through, after the errors of a start that succeeded in spite of them."""
        with self._lock:
            if not self._open:
                self._print(line for line in self.lines if _ERROR_LEVEL.search(line))
            self._open = True

    def fail(self) -> None:
        """Show everything that was folded, and pass later lines through."""
        with self._lock:
            if not self._open:
                if self._dropped:
                    self._print([f"[{self._dropped} earlier lines are left out]"])
                self._print(self.lines)
            self._open = True

    def _advance(self, line: str) -> None:
        for number in range(len(STAGES) - 1, self._number, -1):
            name, pattern = STAGES[number]
            if pattern.search(line):
                self._number, self.stage = number, name
                if not self._console.is_terminal:
                    seconds = time.monotonic() - self._started
                    self._print([f"starting: {name} ({seconds:.0f} s)"])
                return

    def _print(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._console.out(line, highlight=False)


def error_line(lines: Iterable[str]) -> str | None:
    """Find the cause in a log.

    Our first own error with its list, else a usage error, else the last error that is not only
    another process's report of it.
    """
    log = [line.rstrip() for line in lines]
    for number, line in enumerate(log):
        if match := _OURS.search(line):
            messages = [match[1]]
            for following in log[number + 1 :]:
                _, dash, message = following.partition("- ")
                if not dash or not re.match(r"\w+Error: ", message):
                    break
                messages.append(f"- {message}")
            return "\n".join(messages)
    if any(line.startswith("usage: ") for line in log):
        usage = [match[1] for line in log if (match := _USAGE.search(line))]
        if usage:
            return usage[-1]
    found = [(n, m[1]) for n, line in enumerate(log) if (m := _ANY.search(line))]
    causes = [(n, text) for n, text in found if not _GENERIC.search(text)]
    if not found:
        return None
    number, line = (causes or found)[-1]
    # Some errors (pydantic's) have the reason on an indented line of its own.
    more = log[number + 1] if number + 1 < len(log) else ""
    return f"{line}\n{more}" if more.startswith("  ") and more.strip() else line
