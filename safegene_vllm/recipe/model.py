"""A causal LM from a checkpoint, with a tenant's LoRA merged, and its parts by their role.

For any `transformers` model of Llama-like blocks: a list of layers, a final norm, a linear head.
What a model is trained on is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.chat import chosen_device, load_tokenizer, pad_token
from safegene_vllm.composition import merge_into
from safegene_vllm.errors import ConfigError, SiteError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of, load_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.tenant_directory import refuse_exported
from safegene_vllm.recipe.encoding import Batch

HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode without gradients, its tokenizer, and where it is."""

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def context_tokens(self) -> int:
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def pad(self) -> int:
        """What fills up a batch; masked."""
        return pad_token(self.tokenizer)


def load_model(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> Loaded:
    """The checkpoint in `dtype`, `adapter` merged into its weights as weight load would do it.

    Errors: AdapterRejectedError if one of them was exported, so that a vector is in it already; those
    of reading; SiteError if the adapter has a site that the model has not.
    """
    from transformers import AutoModelForCausalLM

    for directory in (checkpoint, adapter):
        if directory is not None:
            refuse_exported(directory)
    read_checkpoint(checkpoint)
    where = chosen_device(device)
    tokenizer = load_tokenizer(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    if adapter is not None:
        merge_lora_weights(model, load_adapter(adapter).lora_weights, str(adapter))
    return Loaded(model.to(where).eval(), tokenizer, where)


def site_modules(model: Any, sites: Mapping[str, Any], what: str) -> dict[str, torch.nn.Module]:
    """The linear module of every site. Errors: SiteError naming those that the model has not."""
    known = dict(model.named_modules())
    missing = [s for s in sites if not isinstance(known.get(s), torch.nn.Linear)]
    if missing:
        raise SiteError(
            f"{what}: {len(missing)} sites are no linear module of this model "
            f"({', '.join(missing[:3])}); is it for another architecture?"
        )
    return {site: known[site] for site in sites}


def merge_lora_weights(
    model: Any, lora_weights: Mapping[str, LoRAWeights], what: str, coefficient: float = 1.0
) -> None:
    """W ← W + coefficient · ΔW at every site, in place, added in float32."""
    for site, module in site_modules(model, lora_weights, what).items():
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        weight.data = merge_into(weight.data, lora_weights[site], coefficient)


def layer_modules(model: Any) -> list[torch.nn.Module]:
    """The blocks in their order. Errors: ConfigError if the model has not one list of them."""
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        number = layer_of(name)
        if number is not None and layer_of(name.rpartition(".")[0]) is None:
            if number in found:
                raise ConfigError(f"{name}: there is more than one layer {number} in this model")
            found[number] = module
    if not found or sorted(found) != list(range(len(found))):
        raise ConfigError(
            "this model has no list of layers 0, 1, 2, ...; expected Llama-like blocks"
        )
    return [found[number] for number in range(len(found))]


def answer_states(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states (K, D) at the positions that predict answer tokens."""
    inner = model.base_model
    states = inner(
        input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    return states[batch.wanted]  # type: ignore[no-any-return]


def head_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """States (K, D) to logits (K, V) float32: the output head alone, so only where it is needed."""
    head = model.get_output_embeddings()
    return lambda states: head(states.to(head.weight.dtype)).float()


def check_head(loaded: Loaded) -> None:
    """ConfigError unless the logits are the head of the final states and nothing more.

    Some architectures scale or cap their logits; a loss over the head alone would be wrong there.
    """
    ids = torch.arange(4, device=loaded.device)[None]
    with torch.inference_mode():
        states = loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = head_of(loaded.model)(states)
        theirs = loaded.model(input_ids=ids, use_cache=False).logits.float()
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if gap > HEAD_TOLERANCE:
        raise ConfigError(
            f"{type(loaded.model).__name__}: its logits are not its output head applied to the "
            f"final states (relative gap {gap:.2g}); the recipe does not know this architecture"
        )
