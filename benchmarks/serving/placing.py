"""Which cores the processes of a run may use: the engine's worker its own, all others the rest.

For timing on a CPU. vLLM's engine process polls while the worker computes, and would take turns
with it on its core; how often is chance, and blurs what is measured by more than safety costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil

WORKER = "VLLM::Worker"
"""How vLLM names the process that computes."""


def shares(threads: int) -> tuple[set[int], set[int]]:
    """(the workers' cores, everybody else's); all for both where there are none to spare."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= threads:
        return set(cores), set(cores)
    return set(cores[-threads:]), set(cores[:-threads])


def place(processes: Iterable[psutil.Process], threads: int) -> None:
    """In place: a running server's processes, every thread of them, get their cores."""
    workers, others = shares(threads)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            cores = workers if process.name().startswith(WORKER) else others
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


@contextmanager
def beside(threads: int) -> Iterator[None]:
    """This thread, and what it starts, off the workers' cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, shares(threads)[1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
