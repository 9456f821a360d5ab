"""The kernel benchmark without a GPU: byte counts, and an empty result."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import SITES, Case
from benchmarks.results import ROOT


def test_the_vector_of_a_7b_model_is_81_mb() -> None:
    """Rank 16 on every linear of Qwen2.5-7B, 28 layers: what a decode step reads for safety."""
    cases = [Case(site, tokens=1, tenants=1) for site in SITES]
    vector = 28 * sum(case.bytes() - case.bytes(vector=False) for case in cases)
    assert round(vector / 1e6) == 81


def test_bytes_of_one_layer() -> None:
    case = Case("o", tokens=2, tenants=4, rank=8, safety_rank=16)
    lora = 3584 + 3584
    moved = 2 * 2 * (3584 + 2 * 3584)
    assert case.bytes(tenants=False, vector=False) == moved
    assert case.bytes() == moved + 2 * lora * (16 + 2 * 8), "two tokens use two adapters at most"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_result_is_empty() -> None:
    command = [sys.executable, "-m", "benchmarks.kernels"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert "no CUDA GPU" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["gpu"], found["results"]) == (None, [])
