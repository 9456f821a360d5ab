"""State of the running step: batch metadata and token gains, updated by one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.cpu_lora import CpuBatchMetadata
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.punica_proxy import PunicaProxy


class StepState:
    """Everything that a layer's product reads of a step; a part is None where no layer reads it.

    `cpu` and `triton` are the batch metadata of the two products, `table` the gain table. Metadata
    is updated before gains: the CPU product's gains are laid out by its metadata.
    """

    def __init__(self, table: GainTable | None = None, cpu: CpuBatchMetadata | None = None) -> None:
        self.table = table
        self.cpu = cpu
        self.triton: BatchMetadata | None = None
        self.reads_token_gains = False
        """Whether some layer reads `table.token_gains`; the Triton kernels read its rows."""

    def begin_step(self, mapping: Any, slots: torch.Tensor) -> None:
        """Update everything in place for a new step.

        `mapping` is vLLM's LoRAMapping (one adapter id per token, 0 for none, on the CPU); slots
        (T,) int64 on the device, -1 for no adapter.
        """
        if self.cpu is not None:
            self.cpu.set_tokens(slots)
        if self.triton is not None:
            self.triton.set_idle(not any(mapping.index_mapping))
            self.triton.set_tokens(slots)
        if self.table is not None and self.reads_token_gains:
            self.table.set_tokens(slots)
        self._refresh_cpu_gains()

    def write_gains(self, slot: int, coefficients: Sequence[float]) -> None:
        """Write a slot's row of the gain table (-1: no adapter), also for the running step."""
        assert self.table is not None
        self.table.write(slot, coefficients)
        self._refresh_cpu_gains()

    def _refresh_cpu_gains(self) -> None:
        if self.cpu is not None and self.table is not None:
            self.cpu.set_gains(self.table.rows)


class StepPunica(PunicaProxy):
    """vLLM's shared punica wrapper; every metadata update also begins a step of ours."""

    def __init__(self, inner: Any, step: StepState) -> None:
        super().__init__(inner)
        self.step = step

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Update vLLM's metadata, then ours from it."""
        self.inner.update_metadata(*args, **kwargs)
        mapping = kwargs["mapping"] if "mapping" in kwargs else args[0]
        self.step.begin_step(mapping, self.inner.token_lora_indices)
