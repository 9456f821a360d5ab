"""Generation backends: the protocol, and transformers with merged weights, greedy, in batches.

The transformers backend is for machines without vLLM, and the reference for the vLLM backend.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from safegene_vllm.chat import (
    check_template,
    completion_text,
    greedy_tokens,
    load_tokenizer,
    prompt_tokens,
    resolve_device,
    stop_tokens,
)
from safegene_vllm.composition import compose_adapter, merge_into
from safegene_vllm.errors import ConfigError, SafegeneError, SiteError, raise_errors
from safegene_vllm.evaluation.targets import Target, adapter_of, checkpoint_of, profile_of
from safegene_vllm.formats.adapter import LoRAWeights, layer_of, load_adapter
from safegene_vllm.formats.checkpoint import Checkpoint, read_checkpoint
from safegene_vllm.formats.family import Family

BATCH = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GenerationBackend(Protocol):
    """Greedy generation by a target; the same responses every time."""

    @property
    def model(self) -> Path: ...

    @property
    def backend(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def generate(self, prompts: Sequence[str], target: Target, max_tokens: int) -> list[str]:
        """One completion per prompt, in order, of at most `max_tokens` tokens."""
        ...

    def close(self) -> None:
        """Free the memory of models; a later call of `generate` loads them again."""
        ...


def merged_lora_weights(target: Target, family: Family | None) -> Mapping[str, LoRAWeights]:
    """LoRA weights to add to the target's checkpoint, by target module; may be empty.

    Semantics: composition.compose_adapter of the target's LoRA and its coefficients.
    """
    directory = adapter_of(target)
    own = None if directory is None else load_adapter(directory)
    profile = profile_of(target, None if family is None else family.header)
    if profile is None or family is None:
        return {} if own is None else own.lora_weights
    return compose_adapter(own, family, profile).lora_weights


class _Loaded:
    """One checkpoint in memory, with the LoRA weights of one target merged."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint: Checkpoint = read_checkpoint(directory)
        self.tokenizer = load_tokenizer(directory)
        check_template(self.tokenizer)
        self.stops = stop_tokens(directory, self.tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True
        )
        self.model = model.requires_grad_(False).to(device).eval()
        self.changed: set[str] = set()

    def apply(self, lora_weights: Mapping[str, LoRAWeights]) -> None:
        """Merge in place: every weight as in the files plus its LoRA weights, rounded once.

        Errors: SiteError for a target module that the model does not have, or a tied one.
        """
        modules = dict(self.model.named_modules())
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        errors: list[SafegeneError] = []
        for site in lora_weights:
            if not isinstance(modules.get(site), torch.nn.Linear):
                errors.append(SiteError(f"{self.checkpoint.directory} has no linear {site}"))
            elif tied and layer_of(site) is None:
                errors.append(SiteError(f"{site} shares its weight with the embedding"))
        raise_errors(errors)
        for site in sorted(self.changed | lora_weights.keys()):
            weight: Any = modules[site].weight
            stored = self.checkpoint.read(self.checkpoint.weight_name(site))
            if site in lora_weights:
                stored = merge_into(stored.float(), lora_weights[site], 1.0)
            weight.data.copy_(stored.to(weight.dtype))
        self.changed = set(lora_weights)


class TransformersBackend:
    """One checkpoint at a time in memory; a target's LoRA and vector are merged in float32.

    `model` is the checkpoint of targets without one of their own; `dtype` float32, bfloat16 or
    float16; `device` a torch device, or auto: CUDA if available. Errors: ConfigError.
    """

    backend = "transformers"

    def __init__(
        self,
        model: Path,
        family: Family | None = None,
        *,
        dtype: str = "bfloat16",
        device: str = "auto",
        batch: int = BATCH,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.device = resolve_device(device)
        self.model, self.family = Path(model), family
        self.dtype, self.batch = dtype, batch
        self._loaded: _Loaded | None = None
        self._target: Target | None = None

    def _ready(self, target: Target) -> _Loaded:
        directory = checkpoint_of(target) or self.model
        if self._loaded is None or self._loaded.checkpoint.directory != directory:
            self.close()
            self._loaded = _Loaded(directory, DTYPES[self.dtype], self.device)
        if self._target != target:
            self._target = None
            self._loaded.apply(merged_lora_weights(target, self.family))
            self._target = target
        return self._loaded

    def tokens(
        self, prompts: Sequence[Sequence[int]], target: Target, max_tokens: int
    ) -> list[list[int]]:
        """Greedy completions of rows of token ids; similar lengths share a batch."""
        loaded = self._ready(target)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            rows = [prompts[i] for i in chosen]
            made = greedy_tokens(loaded.model, loaded.tokenizer, rows, max_tokens, loaded.stops)
            found |= dict(zip(chosen, made, strict=True))
        return [found[i] for i in range(len(prompts))]

    def generate(self, prompts: Sequence[str], target: Target, max_tokens: int) -> list[str]:
        """One completion per prompt, in order. Errors: those of reading; SiteError."""
        tokenizer = self._ready(target).tokenizer
        rows = prompt_tokens(tokenizer, prompts)
        return [completion_text(tokenizer, ids) for ids in self.tokens(rows, target, max_tokens)]

    def close(self) -> None:
        """Free the model in memory."""
        self._loaded = self._target = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class SharedBackend:
    """A backend whose engine stays loaded over several evaluations, until `end`."""

    def __init__(self, inner: GenerationBackend) -> None:
        self.inner = inner
        self.model, self.backend, self.dtype = inner.model, inner.backend, inner.dtype

    def generate(self, prompts: Sequence[str], target: Target, max_tokens: int) -> list[str]:
        return self.inner.generate(prompts, target, max_tokens)

    def close(self) -> None:
        """Do nothing: the next evaluation uses the same engine."""

    def end(self) -> None:
        self.inner.close()
