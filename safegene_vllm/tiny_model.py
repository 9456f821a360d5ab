"""Tiny models, families and tenants: two layers, random weights, real file formats.

For `safegene verify`, benchmarks and tests: vLLM loads them in a second. Same name, same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from safegene_vllm.formats.adapter import Adapter, LoRAWeights, layer_of, save_adapter
from safegene_vllm.formats.family import Family, base_of_checkpoint, make_family, save_family
from safegene_vllm.formats.profile import Profile, make_profile, save_profile
from safegene_vllm.recipe.model import linear_modules

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: Mapping[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "glm4": Glm4Config,
    "phi3": Phi3Config,
}


def make_model(arch: str, directory: Path, *, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a tiny checkpoint of `arch`, its weights large enough that adapters change tokens."""
    torch.manual_seed(zlib.crc32(arch.encode()))
    shape = dict(SHAPE)
    if arch in ("qwen2", "phi3"):
        del shape["head_dim"]
    config = CONFIGS[arch](**{**shape, "initializer_range": 0.15, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    return directory


def linear_sites(directory: Path) -> dict[str, tuple[int, int]]:
    """(D_out, D_in) of every linear module inside the layers of a checkpoint, by name."""
    return linear_modules(AutoModelForCausalLM.from_pretrained(directory))


def random_lora_weights(
    sites: Mapping[str, tuple[int, int]], rank: int, seed: int, *, strength: float = 0.6
) -> dict[str, LoRAWeights]:
    """Random LoRA weights whose ΔW is comparable to the weights themselves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: LoRAWeights(
            torch.randn(rank, d_in, generator=generator) * strength / rank**0.5,
            torch.randn(d_out, rank, generator=generator) * strength / d_in**0.5,
        )
        for site, (d_out, d_in) in sites.items()
    }


def write_family(
    model: Path, directory: Path, *, rank: int = 4, seed: int = 7, layers: Sequence[int] = (0, 1)
) -> Family:
    """Write a family over all linear modules of the chosen layers."""
    sites = {s: d for s, d in linear_sites(model).items() if layer_of(s) in layers}
    family = make_family(
        "tiny",
        base_of_checkpoint(model),
        random_lora_weights(sites, rank, seed),
        bounds=(0.0, 3.0),
        recipe={"method": "random"},
    )
    save_family(family, directory)
    return family


def write_tenant(
    model: Path,
    directory: Path,
    family: Family | None,
    coefficients: Sequence[float] | float | None,
    *,
    rank: int = 4,
    seed: int = 1,
    adapter: bool = True,
    suffixes: tuple[str, ...] = (),
) -> Profile | None:
    """Write a tenant: a random adapter (on modules ending in `suffixes`), a profile, or both."""
    directory.mkdir(parents=True, exist_ok=True)
    if adapter:
        sites = linear_sites(model)
        if suffixes:
            sites = {s: d for s, d in sites.items() if s.endswith(suffixes)}
        lora_weights = random_lora_weights(sites, rank, seed)
        save_adapter(Adapter(lora_weights, None, {}), directory, base_model="tiny")
    if family is None or coefficients is None:
        return None
    profile = make_profile(family.header, coefficients, {"method": "test"})
    save_profile(profile, directory)
    return profile


@dataclass(frozen=True)
class TinyModelSetup:
    """A tiny model with its family and two tenants."""

    model: Path
    family: Path
    tenants: tuple[Path, ...]


def write_setup(root: Path, arch: str = "llama") -> TinyModelSetup:
    """Write model, family and two tenants below `root`, ready for an engine."""
    model = make_model(arch, root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0], seed=3)
    write_tenant(model, root / "globex", family, [1.5, 0.2], seed=4)
    return TinyModelSetup(model, root / "family", (root / "acme", root / "globex"))
