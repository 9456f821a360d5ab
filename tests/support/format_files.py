"""Small things on disk for the tests of the formats: tensors, a base, a family, a tiny Llama.

Everything is deterministic. Not a conftest: tests import what they use by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.formats.adapter import Adapter, LoRAWeights
from safegene_vllm.formats.family import Base, Family, SelectedLayer, make_family, save_family

BASE = Base("LlamaForCausalLM", 3, "sha256:" + "ab" * 32)
SITES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.2.self_attn.q_proj",
)
RECIPE: Mapping[str, Any] = {"method": "contrast", "seed": 7, "learning_rate": 0.001}


def ramp(rows: int, columns: int, start: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Eighths counted up from `start`: exact in every dtype used here as long as they are small."""
    values = torch.arange(start, start + rows * columns, dtype=torch.float32) / 8
    return values.reshape(rows, columns).to(dtype)


def tiny_lora(start: int = 1, rank: int = 2, dtype: torch.dtype = torch.float32) -> LoRAWeights:
    return LoRAWeights(ramp(rank, 4, start, dtype), ramp(3, rank, start + 1, dtype))


def tiny_family(**changes: Any) -> Family:
    """Vectors in layers 0 and 2 of three, two ranks, float32."""
    lora_weights = {
        SITES[0]: tiny_lora(1),
        SITES[1]: tiny_lora(9, rank=1),
        SITES[2]: tiny_lora(5),
    }
    options: dict[str, Any] = {
        "layers": [SelectedLayer(0, 0.25), SelectedLayer(2, None)],
        "recipe": RECIPE,
    }
    return make_family("tiny", BASE, lora_weights, **{**options, **changes})


def saved_family(directory: Path, **changes: Any) -> Family:
    family = tiny_family(**changes)
    save_family(family, directory)
    return family


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load `path`, alter it in place by `change`, write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file written by hand: `header` may be JSON-able or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(begin: int, count: int) -> dict[str, Any]:
    """A header entry for `count` floats at byte `begin`."""
    return {"dtype": "F32", "shape": [count], "data_offsets": [begin, begin + 4 * count]}


def tiny_llama() -> Any:
    """Two layers, width 32, random but always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).float().eval()


def random_adapter(model: Any, targets: Mapping[str, int], seed: int = 0) -> Adapter:
    """Pairs for the linear modules of `model` whose last name is in `targets` (name to rank)."""
    generator = torch.Generator().manual_seed(seed)
    lora_weights = {}
    for name, module in model.named_modules():
        rank = targets.get(name.rsplit(".", 1)[-1])
        if rank is not None and ".layers." in name:
            d_out, d_in = module.weight.shape
            lora_weights[name] = LoRAWeights(
                torch.randn(rank, d_in, generator=generator) / 8,
                torch.randn(d_out, rank, generator=generator) / 8,
            )
    return Adapter(lora_weights, None, {})
