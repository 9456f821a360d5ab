"""What the arms serve: a base model, vectors and tenants of random values, in real files.

Speed reads no values, so tenants are random PEFT adapters of any number and rank. Everything is
written once below one folder and used again; a stamp beside each directory says that it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from safegene_vllm.export import export_adapter, export_checkpoint
from safegene_vllm.formats.adapter import Adapter, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import (
    Family,
    base_of_checkpoint,
    load_family,
    make_family,
    save_family,
)
from safegene_vllm.formats.profile import Profile, load_profile, make_profile, save_profile
from safegene_vllm.tiny_model import SHAPE, make_model, random_lora_weights

STRENGTH = 0.05
"""Of random ΔW against W: answers stay numbers, not NaN, in every precision."""
PICO_CONTEXT = 1024


def write_pico(directory: Path) -> Path:
    """A pico model with a tokenizer of one word per token, for runs of seconds."""
    if (directory / "tokenizer.json").is_file():
        return directory
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model("llama", directory, dtype="bfloat16", max_position_embeddings=PICO_CONTEXT)
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = {f"w{n}": n for n in range(len(special), SHAPE["vocab_size"])}
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
class World:
    """Tenants of `rank`, vectors of `vector_rank`, on `model`; directories are made when asked."""

    root: Path
    model: Path
    rank: int
    vector_rank: int

    @cached_property
    def sites(self) -> Mapping[str, tuple[int, int]]:
        """Every linear site inside the layers of the checkpoint: (D_out, D_in) by name."""
        return {
            name.removesuffix(".weight"): (info.shape[0], info.shape[1])
            for name, info in read_checkpoint(self.model).infos.items()
            if name.endswith(".weight") and len(info.shape) == 2 and layer_of(name) is not None
        }

    @cached_property
    def layers(self) -> int:
        return base_of_checkpoint(self.model).num_layers

    @cached_property
    def model_bytes(self) -> int:
        """What a decode step reads of the base: all weights, tied ones once."""
        infos = read_checkpoint(self.model).infos.values()
        return sum(info.end - info.begin for info in infos)

    def modules(self) -> list[str]:
        """The names for --lora-target-modules."""
        return sorted({site.rpartition(".")[2] for site in self.sites})

    def _once(self, directory: Path, make: Callable[[Path], None]) -> Path:
        """`directory`, made unless it is whole already."""
        stamp = directory.with_name(f"{directory.name}.whole")
        if not stamp.is_file():
            shutil.rmtree(directory, ignore_errors=True)
            directory.parent.mkdir(parents=True, exist_ok=True)
            make(directory)
            stamp.touch()
        return directory

    def family(self, percent: int) -> Path:
        """A vector on `percent` of the layers, on every linear site there."""

        def make(directory: Path) -> None:
            chosen = set(spread_layers(self.layers, percent))
            sites = {site: shape for site, shape in self.sites.items() if layer_of(site) in chosen}
            lora_weights = random_lora_weights(sites, self.vector_rank, 7, strength=STRENGTH)
            save_family(
                make_family(
                    f"random-{percent}",
                    base_of_checkpoint(self.model),
                    lora_weights,
                    recipe={"method": "random"},
                    dtype=torch.bfloat16,
                ),
                directory,
            )

        return self._once(self.root / f"family-v{self.vector_rank}-{percent}", make)

    def loaded_family(self, percent: int) -> Family:
        return load_family(self.family(percent))

    def plain(self, tenant: int) -> Path:
        """A random LoRA on every linear site, without a profile."""

        def make(directory: Path) -> None:
            lora_weights = random_lora_weights(
                self.sites, self.rank, 1000 + tenant, strength=STRENGTH
            )
            save_adapter(
                Adapter(lora_weights, None, {}), directory, base_model=None, dtype=torch.bfloat16
            )

        return self._once(self.root / f"tenants-r{self.rank}" / f"t{tenant}", make)

    def profile(self, percent: int, number: int) -> Profile:
        """The profile of this number: other numbers, other coefficients in every layer."""
        header = self.loaded_family(percent).header
        chosen = [entry.layer for entry in header.layers]
        row = {layer: 0.1 + 0.001 * ((7 * number + k) % 997) for k, layer in enumerate(chosen)}
        return make_profile(header, row, {"method": "random"})

    def protected(self, tenant: int, percent: int, number: int) -> Path:
        """The plain tenant with profile `number`: the same bytes of the adapter, linked."""
        place = self.root / f"protected-r{self.rank}-v{self.vector_rank}-{percent}"

        def make(directory: Path) -> None:
            directory.mkdir()
            for path in self.plain(tenant).iterdir():
                os.link(path, directory / path.name)
            save_profile(self.profile(percent, number), directory)

        return self._once(place / f"t{tenant}-p{number}", make)

    def exported(self, tenant: int, percent: int, number: int) -> Path:
        """What `safegene export` makes of the protected tenant: one adapter for stock vLLM."""
        place = self.root / f"exported-r{self.rank}-v{self.vector_rank}-{percent}"

        def make(directory: Path) -> None:
            self.export(tenant, percent, number, directory)

        return self._once(place / f"t{tenant}-p{number}", make)

    def export(self, tenant: int, percent: int, number: int, out: Path) -> None:
        """`safegene export` again, for timing it."""
        source = self.protected(tenant, percent, number)
        family, profile = self.loaded_family(percent), load_profile(source)
        export_adapter(source, family, profile, out, dtype=torch.bfloat16)

    def checkpoint_profile(self, percent: int) -> Path:
        """A directory with nothing but the profile of the full checkpoint."""

        def make(directory: Path) -> None:
            directory.mkdir()
            save_profile(self.profile(percent, 0), directory)

        return self._once(self.root / f"profile-v{self.vector_rank}-{percent}", make)

    def merged(self, percent: int) -> Path:
        """The model with that profile's vector merged in on disk."""
        place = self.root / f"merged-v{self.vector_rank}-{percent}"
        return self._once(place, lambda directory: self.export_merged(percent, directory))

    def export_merged(self, percent: int, out: Path) -> None:
        """`safegene export --checkpoint` of the model with that profile, for timing it."""
        family, profile = (
            self.loaded_family(percent),
            load_profile(self.checkpoint_profile(percent)),
        )
        export_checkpoint(self.model, None, family, profile, out)

    def adapter_bytes(self, tenant: int = 0) -> int:
        """One plain tenant's tensors."""
        lora_weights = load_adapter(self.plain(tenant)).lora_weights.values()
        return sum(t.numel() * t.element_size() for lora in lora_weights for t in (lora.a, lora.b))
