"""Triton's interpreter and compiler for tests of the kernels, and random layers to test them on.

Importing this skips the tests where Triton is not installed (`make test-kernels` has it).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here; see `make test-kernels`", allow_module_level=True)
# Read as programs are decorated, Triton's own among them: too late if Triton is loaded already.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from safegene_vllm.plugin.ops import triton_ops
from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.reference import expected

LAYERS, LAYER = 3, 1

# Interpreted programs run where the tensors are; in an engine the operator is CUDA's alone.
_LIBRARY = torch.library.Library("safegene", "FRAGMENT")
_LIBRARY.impl("gain_lora_linear", triton_ops.lora_linear, "CPU")


def _widened(handle: Any) -> Any:
    """bfloat16 as the interpreter stores it (16-bit integers), as float32."""
    if str(handle.dtype.scalar) != "bf16":
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, interpreter.tl.float32)


_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


# The interpreter multiplies bfloat16 as if it were integers; the compiler does not.
interpreter.InterpreterBuilder.create_dot = _create_dot


@dataclass
class Layer:
    """A layer with adapters in all slots and a vector, as the kernels get it."""

    a: list[torch.Tensor]
    b: list[torch.Tensor]
    safety_a: torch.Tensor
    safety_b: torch.Tensor
    gains: torch.Tensor

    @property
    def widths(self) -> list[int]:
        return [part.shape[2] for part in self.b]


def layer(
    widths: tuple[int, ...],
    d_in: int,
    rank: int,
    safety_rank: int,
    *,
    slots: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5).to(dtype)

    return Layer(
        [random(slots, 1, rank, d_in) for _ in widths],
        [random(slots, 1, width, rank) for width in widths],
        random(len(widths) * safety_rank, d_in),
        random(sum(widths), safety_rank),
        torch.randn(slots + 1, LAYERS, generator=generator),
    )


def step(slots: list[int], number: int = 3, extra: int = 0) -> BatchMetadata:
    """The metadata of a step, in tensors of spare capacity, after an older and longer step."""
    plan = BatchMetadata(number, max(len(slots) + extra, 8), "cpu")
    plan.set_tokens(torch.full((len(plan.order),), number - 1))
    plan.set_tokens(torch.tensor(slots, dtype=torch.long))
    plan.set_idle(all(slot < 0 for slot in slots))
    return plan


def inputs(one: Layer, tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x."""
    generator = torch.Generator().manual_seed(seed)
    dtype, d_in = one.safety_a.dtype, one.safety_a.shape[1]
    y = torch.randn(tokens, sum(one.widths), generator=generator).to(dtype)
    return y, torch.randn(tokens, d_in, generator=generator).to(dtype)


def run(
    one: Layer, plan: BatchMetadata, y: torch.Tensor, x: torch.Tensor, *, base: bool = True
) -> torch.Tensor:
    """The kernels' y, in a copy."""
    y = y.clone()
    triton_ops.lora_linear(
        *(y, x, one.a, one.b, one.safety_a, one.safety_b, one.gains, LAYER),
        *(torch.tensor(base), plan.order, plan.tiles, plan.idle, 1.0),
    )
    return y


def wanted(
    one: Layer, slots: list[int], y: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lora_weights = one.a, one.b, one.safety_a, one.safety_b
    return expected(y, x, *lora_weights, one.gains, LAYER, torch.tensor(slots))


@contextmanager
def launches(run_them: bool = True) -> Iterator[list[tuple[Any, int, tuple[Any, ...], Any]]]:
    """Every launch: program, grid, arguments, constants. Only recorded if not `run_them`."""
    seen: list[tuple[Any, int, tuple[Any, ...], Any]] = []
    real = triton_ops.launch

    def record(program: Any, programs: int, *args: Any, **meta: Any) -> None:
        seen.append((program, programs, args, meta))
        if run_them:
            real(program, programs, *args, **meta)

    triton_ops.launch = record
    try:
        yield seen
    finally:
        triton_ops.launch = real
