"""The kernel benchmark where there is no GPU: what it counts, and that it claims nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import SITES, Case, spread

ROOT = Path(__file__).parents[2]


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


def test_spread_is_round_by_round() -> None:
    assert spread([2.0, 3.0, 8.0], [1.0, 2.0, 2.0]) == (2.0, 1.5, 4.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=True,
    )
    assert "no CUDA GPU" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["gpu"], found["results"]) == (None, [])
