"""Files that the arms serve: a base model, safety vectors and tenants with random values.

Speed does not depend on values, so tenants are random PEFT adapters of any number and rank. Every
directory is written once and reused; a stamp file next to it marks it complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from safegene_vllm import tiny_model
from safegene_vllm.export import export_adapter, export_checkpoint
from safegene_vllm.formats.adapter import Adapter, layer_of, save_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import (
    Family,
    base_of_checkpoint,
    load_family,
    make_family,
    save_family,
)
from safegene_vllm.formats.profile import Profile, load_profile, make_profile, save_profile

STRENGTH = 0.05
"""Norm of a random ΔW relative to W: small enough that no dtype overflows."""


def write_tiny_model(directory: Path) -> Path:
    """Write a tiny model whose tokenizer has one word per token, unless it exists."""
    if (directory / "tokenizer.json").is_file():
        return directory
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_model.make_model("llama", directory, dtype="bfloat16", max_position_embeddings=1024)
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = {f"w{n}": n for n in range(len(special), tiny_model.SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def spread_layers(layers: int, percent: int) -> tuple[int, ...]:
    """`percent` of the layers, at least one, evenly spread."""
    count = max(1, round(layers * percent / 100))
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


@dataclass(frozen=True)
class Artifacts:
    """Tenants of `rank` and vectors of `vector_rank` on `model`, written below `root` on demand."""

    root: Path
    model: Path
    rank: int
    vector_rank: int

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Every linear module inside the layers of the checkpoint: (D_out, D_in) by name."""
        return {
            name.removesuffix(".weight"): (info.shape[0], info.shape[1])
            for name, info in read_checkpoint(self.model).infos.items()
            if name.endswith(".weight") and len(info.shape) == 2 and layer_of(name) is not None
        }

    @cached_property
    def model_bytes(self) -> int:
        """Bytes of all weights of the base, tied ones once."""
        return sum(i.end - i.begin for i in read_checkpoint(self.model).infos.values())

    @cached_property
    def width(self) -> int:
        """Sum of D_out + D_in over all modules."""
        return sum(d_out + d_in for d_out, d_in in self.modules.values())

    def target_modules(self) -> list[str]:
        """Module names for --lora-target-modules."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the directory of this name, made first unless it is complete."""
        directory = self.root / name
        stamp = directory.with_name(f"{directory.name}.complete")
        if not stamp.is_file():
            shutil.rmtree(directory, ignore_errors=True)
            directory.parent.mkdir(parents=True, exist_ok=True)
            make(directory)
            stamp.touch()
        return directory

    def family(self, percent: int) -> Path:
        """A vector on every linear module of `percent` of the layers."""

        def make(directory: Path) -> None:
            base = base_of_checkpoint(self.model)
            chosen = spread_layers(base.num_layers, percent)
            shapes = {n: shape for n, shape in self.modules.items() if layer_of(n) in chosen}
            vector = tiny_model.random_lora_weights(shapes, self.vector_rank, 7, strength=STRENGTH)
            recipe = {"method": "random"}
            family = make_family(
                f"random-{percent}", base, vector, recipe=recipe, dtype=torch.bfloat16
            )
            save_family(family, directory)

        return self._once(f"family-v{self.vector_rank}-{percent}", make)

    def loaded_family(self, percent: int) -> Family:
        return load_family(self.family(percent))

    def plain(self, tenant: int) -> Path:
        """A random LoRA on every linear module, without a profile."""

        def make(directory: Path) -> None:
            seed = 1000 + tenant
            weights = tiny_model.random_lora_weights(
                self.modules, self.rank, seed, strength=STRENGTH
            )
            adapter = Adapter(weights, None, {})
            save_adapter(adapter, directory, base_model=None, dtype=torch.bfloat16)

        return self._once(f"tenants-r{self.rank}/t{tenant}", make)

    def profile(self, percent: int, number: int) -> Profile:
        """The profile of this number; different numbers differ in every layer."""
        header = self.loaded_family(percent).header
        row = {
            entry.layer: 0.1 + 0.001 * ((7 * number + k) % 997)
            for k, entry in enumerate(header.layers)
        }
        return make_profile(header, row, {"method": "random"})

    def protected(self, tenant: int, percent: int, number: int) -> Path:
        """The plain tenant's adapter, hard-linked, with profile `number`."""

        def make(directory: Path) -> None:
            directory.mkdir()
            for path in self.plain(tenant).iterdir():
                os.link(path, directory / path.name)
            save_profile(self.profile(percent, number), directory)

        return self._once(f"protected-{self._key(percent)}/t{tenant}-p{number}", make)

    def exported(self, tenant: int, percent: int, number: int) -> Path:
        """The protected tenant merged by `safegene export`: one adapter for stock vLLM."""

        def make(directory: Path) -> None:
            source = self.protected(tenant, percent, number)
            family, profile = self.loaded_family(percent), load_profile(source)
            export_adapter(source, family, profile, directory, dtype=torch.bfloat16)

        return self._once(f"exported-{self._key(percent)}/t{tenant}-p{number}", make)

    def checkpoint_profile(self, percent: int) -> Path:
        """A directory that contains only the full checkpoint's profile."""

        def make(directory: Path) -> None:
            directory.mkdir()
            save_profile(self.profile(percent, 0), directory)

        return self._once(f"profile-v{self.vector_rank}-{percent}", make)

    def merged(self, percent: int) -> Path:
        """The model with that profile's vector merged by `safegene export --checkpoint`."""

        def make(directory: Path) -> None:
            family, profile = self.loaded_family(percent), self.profile(percent, 0)
            export_checkpoint(self.model, None, family, profile, directory)

        return self._once(f"merged-v{self.vector_rank}-{percent}", make)

    def _key(self, percent: int) -> str:
        return f"r{self.rank}-v{self.vector_rank}-{percent}"
