"""A causal LM from a checkpoint with a LoRA merged, and access to its layers, states and head.

For any `transformers` model of Llama-like blocks: a list of layers, a final norm, a linear head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.chat import load_tokenizer, pad_token, resolve_device
from safegene_vllm.composition import merge_into
from safegene_vllm.errors import ConfigError, SiteError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of, load_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.tenant_directory import reject_exported
from safegene_vllm.recipe.encoding import Batch

HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode without gradients, its tokenizer and its device."""

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def context_tokens(self) -> int:
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def pad(self) -> int:
        """Padding token of a batch; masked."""
        return pad_token(self.tokenizer)


def load_model(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> LoadedModel:
    """Load a checkpoint in `dtype`, with `adapter` merged as at model loading.

    Errors: AdapterRejectedError if one of them was exported and contains a vector already; those of
    reading; SiteError if the adapter has a target module that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    for directory in (checkpoint, adapter):
        if directory is not None:
            reject_exported(directory)
    read_checkpoint(checkpoint)
    where = resolve_device(device)
    tokenizer = load_tokenizer(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    if adapter is not None:
        merge_lora_weights(model, load_adapter(adapter).lora_weights, str(adapter))
    return LoadedModel(model.to(where).eval(), tokenizer, where)


def find_target_modules(
    model: Any, sites: Mapping[str, Any], what: str
) -> dict[str, torch.nn.Module]:
    """The linear modules named `sites`. Errors: SiteError naming those that are missing."""
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
    """W ← W + coefficient · ΔW of every target module, in place, added in float32."""
    for site, module in find_target_modules(model, lora_weights, what).items():
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        weight.data = merge_into(weight.data, lora_weights[site], coefficient)


def layer_modules(model: Any) -> list[torch.nn.Module]:
    """The decoder layers in order, of a multimodal model those of its language model.

    Errors: ConfigError if the model has no single list of them.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in _language_model(model).named_modules():
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


def _language_model(model: Any) -> Any:
    """The part of a multimodal model with the decoder layers; any other model itself."""
    inner = getattr(model, "model", model)
    return getattr(inner, "language_model", None) or getattr(model, "language_model", None) or model


def linear_modules(model: Any) -> dict[str, tuple[int, int]]:
    """(D_out, D_in) of every linear module inside the decoder layers, by name."""
    inside = {id(module) for module in _language_model(model).modules()}
    return {
        name: (int(module.out_features), int(module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and layer_of(name) is not None
        and id(module) in inside
    }


@contextmanager
def record_layers(model: Any, *, enabled: bool = True) -> Iterator[list[torch.Tensor]]:
    """Context manager: collects each layer's output (N, T, D), in order, during one forward."""
    outputs: list[torch.Tensor] = []

    def record(_: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [m.register_forward_hook(record) for m in layer_modules(model)] if enabled else []
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def last_prompt_states(layers: list[torch.Tensor], last_prompt: torch.Tensor) -> torch.Tensor:
    """(N, L, D): each layer's output at each row's last prompt token."""
    rows = torch.arange(len(last_prompt), device=last_prompt.device)
    return torch.stack([layer[rows, last_prompt] for layer in layers], dim=1)


def completion_states(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states (K, D) at the positions that predict completion tokens."""
    inner = model.base_model
    states = inner(
        input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    return states[batch.wanted]  # type: ignore[no-any-return]


def head_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head alone: states (K, D) to logits (K, V) float32."""
    head = model.get_output_embeddings()
    return lambda states: head(states.to(head.weight.dtype)).float()


def check_head(loaded: LoadedModel) -> None:
    """Check that the logits are the head applied to the final states. Errors: ConfigError.

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
            f"final states (relative gap {gap:.2g}); this architecture is not supported here"
        )
