"""The planner's bytes against a running engine: slots, vector and gain table, byte for byte."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from reference_engine import Request, engine

from safegene_vllm.planner import LORA_RANKS, Workload, find_gpu, plan_mode, read_shape
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

CASES = (
    ("llama", "gain", (0, 1), ()),
    ("llama", "composed", (0, 1), ()),
    ("qwen2", "gain", (1,), ("o_proj", "k_proj")),
    ("glm4", "gain", (0,), ()),
)
"""Architecture, way, layers of the vector, sites of the tenant (none: all)."""


def resident(worker: Any) -> dict[str, int]:
    """Memory of one worker: bytes of all stacked slot tensors, and of the gain table."""
    manager = worker.model_runner.lora_manager._adapter_manager
    slots = 0
    for layer in manager.modules.values():
        slots += sum(t.nbytes for t in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    table = manager.runtime.step.table
    held = () if table is None else (table.rows, table.token_gains, table._token_rows)
    return {"slots": slots, "gains": sum(t.nbytes for t in held)}


@pytest.mark.parametrize(("arch", "apply", "layers", "suffixes"), CASES)
def test_bytes_are_those_of_a_real_engine(
    arch: str, apply: str, layers: tuple[int, ...], suffixes: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_model(arch, tmp_path / "model")
    family = write_family(model, tmp_path / "family", rank=4, layers=layers)
    row = [0.5 if layer in layers else 0.0 for layer in (0, 1)]
    write_tenant(model, tmp_path / "acme", family, row, rank=6, suffixes=suffixes)
    shape = read_shape(model)
    planned = plan_mode(
        Workload(
            shape,
            find_gpu("l4"),
            tenants=3,
            adapter_rank=6,
            adapter_targets=suffixes,
            vector_rank=4,
            vector_layers=len(layers),
            dtype_bytes=4,
            slots=3,
            batched_tokens=256,
        ),
        apply,
    )
    assert planned.bucket == {"gain": 8, "composed": 16}[apply]
    settings = {"family": str(tmp_path / "family"), "apply": apply}
    options = {
        "max_loras": 3,
        "max_lora_rank": planned.bucket,
        "lora_target_modules": list(shape.sites),
        "max_num_batched_tokens": 256,
    }
    with engine(model, settings, **options) as e:
        e.generate([Request([5, 9, 33], tmp_path / "acme")], tokens=2)
        (found,) = e.llm.collective_rpc(resident)
        (receipt,) = e.receipts()
    assert found == {"slots": planned.slot_bytes, "gains": planned.gain_bytes}
    assert receipt.vector_bytes == planned.vector_bytes
    assert (planned.vector_bytes > 0) is (apply == "gain")


def test_rank_buckets_are_those_of_vllm() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == LORA_RANKS
