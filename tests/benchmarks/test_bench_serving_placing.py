"""The serving benchmark's cores: a worker shares none with what is beside it."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

import placing

CORES = os.sched_getaffinity(0)
NAMED = "import threading, time, setproctitle as s; s.setproctitle({!r}); " + (
    "threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True); time.sleep(60)"
)


@pytest.mark.skipif(len(CORES) < 2, reason="one core is shared by all")
def test_a_worker_has_its_cores_to_itself() -> None:
    names = (placing.WORKER, "VLLM::EngineCore")
    started = [
        subprocess.Popen([sys.executable, "-c", NAMED.format(name)], stdout=subprocess.PIPE)
        for name in names
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        placing.place([psutil.Process(process.pid) for process in started], 1)
        worker, other = (
            [os.sched_getaffinity(thread.id) for thread in psutil.Process(process.pid).threads()]
            for process in started
        )
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert len(worker) == len(other) == 2
    assert worker[0] == worker[1] and other[0] == other[1]
    assert len(worker[0]) == 1 and not worker[0] & other[0]
    with placing.beside(1):
        assert os.sched_getaffinity(0) == other[0]
    assert os.sched_getaffinity(0) == CORES


def test_without_cores_to_spare_all_share_them() -> None:
    assert placing.shares(len(CORES)) == (CORES, CORES)
