"""Names of the tensors in an adapter's file, and the sites and layers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from safegene_vllm.errors import SafegeneError, SiteError

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<site>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>\w+))?\.weight"
)
"""With the adapter's name where a training script saved the module's own state."""
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Segments that torch.compile, FSDP and activation checkpointing put into names."""
_VOCABULARY = re.compile(r"\.(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)\b")
_LANGUAGE = ("model.language_model.", "language_model.model.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")


def layer_of(site: str) -> int | None:
    """The layer number in a site's name (after `layers.`, `h.` or `blocks.`), None for others."""
    match = _LAYER.search(site)
    return int(match.group(1)) if match else None


def spellings(name: str) -> tuple[str, ...]:
    """`name` first, then the other name of the same module in a multimodal model, if any.

    Its language model is `language_model.model` in older checkpoints, `model.language_model` in
    transformers since 4.52.
    """
    for one, other in (_LANGUAGE, _LANGUAGE[::-1]):
        if name.startswith(one):
            return name, other + name.removeprefix(one)
    return (name,)


def tensor_name(site: str, half: str) -> str:
    """The name in the file of a site's `A` or `B`."""
    return f"base_model.model.{site}.lora_{half}.weight"


def group_halves(tensors: Iterable[str], errors: list[SafegeneError]) -> dict[str, dict[str, str]]:
    """Names of an adapter's tensors, by site and half; errors of other names go to `errors`."""
    found: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for name in tensors:
        match = _TENSOR_NAME.fullmatch(_WRAPPERS.sub("", name))
        if match is None:
            errors.append(_foreign(name))
            continue
        adapters.add(match["adapter"] or "")
        halves = found.setdefault(match["site"], {})
        if match["half"] in halves:
            errors.append(
                SiteError(
                    f"tensors {halves[match['half']]!r} and {name!r} are the same weight; save one "
                    "adapter, by PEFT's save_pretrained"
                )
            )
        halves[match["half"]] = name
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(name) for name in adapters))
        errors.append(SiteError(f"weights of several adapters ({names}); save one adapter"))
    return found


def _foreign(name: str) -> SiteError:
    """Error of a tensor that is no LoRA weight of a linear module."""
    vocabulary = _VOCABULARY.search(f".{name}")
    if ".lora_embedding_" in name:
        why = "LoRA on embeddings; train with target_modules of linear modules only"
    elif vocabulary and ".lora_" not in name:
        why = (
            f"all of {vocabulary[1]}, which PEFT saves when tokens were added and the embeddings "
            "resized (save_embedding_layers): the base has no such tokens. Train without new "
            "tokens, or save with save_embedding_layers=False if their embeddings were not trained"
        )
    elif ".lora_magnitude_vector" in name:
        why = "a magnitude of DoRA, which plain LoRA weights cannot express"
    elif name.endswith(".bias"):
        why = "a bias; train with bias='none'"
    else:
        why = "only LoRA weights of linear modules are supported"
    return SiteError(
        f"tensor {name!r} is not base_model.model.<site>.lora_A.weight or .lora_B.weight: {why}"
    )
