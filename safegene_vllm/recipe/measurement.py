"""Measurement of a new family on held-out prompts: aligned, degraded and restored model.

Losses are mean cross-entropies of response tokens in nats. The model is loaded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.dataset import Dataset
from safegene_vllm.evaluation.judges import is_refusal
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import Family
from safegene_vllm.recipe.attached import AttachedVector
from safegene_vllm.recipe.difference import lora_norm
from safegene_vllm.recipe.encoding import Encoded, Example, batches_by_length, collate, encode
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.finetune import completion_loss
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import LoadedModel, check_head, load_model, merge_lora_weights
from safegene_vllm.recipe.training import Progress, silent

MAX_MEASURED = 64
"""Held-out rows measured of each kind: seconds on a GPU, a minute for a small model on a CPU."""
BATCH = 16


@torch.no_grad()
def mean_loss(loaded: LoadedModel, rows: Sequence[Encoded]) -> float:
    """Mean cross-entropy over response tokens: mean per example, then over the examples."""
    total = 0.0
    for chosen in batches_by_length([len(row.ids) for row in rows], BATCH):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        total += float(completion_loss(loaded.model, batch)) * len(chosen)
    return round(total / len(rows), 6)


def captured_energy(vector: Family, selected: Family) -> float:
    """Share of the vector's squared Frobenius norm in the layers of `selected`."""
    energies = {site: lora_norm(lora) ** 2 for site, lora in vector.lora_weights.items()}
    total = sum(energies.values())
    return sum(energies[s] for s in selected.lora_weights) / total if total else 0.0


def measure_family(
    checkpoint: Path,
    degraded_adapter: Path,
    family: Family,
    *,
    safety: Dataset,
    benign: Dataset,
    max_answer_tokens: int,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Losses of held-out responses without the degradation, with it, and with the vector too.

    A harmful prompt without a safe response takes the aligned model's own, if that is a refusal.
    A loss is None where no row has a response. Errors: those of loading and encoding.
    """
    loaded = load_model(checkpoint, device=device)
    check_head(loaded)
    safety, benign = (
        sample_rows(data, MAX_MEASURED, 0) if data.rows else data for data in (safety, benign)
    )
    open_prompts = [row.prompt for row in safety.rows if row.answer is None]
    completions = (
        generate_greedy(loaded, open_prompts, max_answer_tokens, progress=progress)
        if open_prompts
        else []
    )
    refusals = [Example(c.prompt, c.text, c.finished) for c in completions if is_refusal(c.text)]
    given = [Example(row.prompt, row.answer) for row in safety.rows if row.answer is not None]
    benign_given = [Example(r.prompt, r.answer) for r in benign.rows if r.answer is not None]

    def encoded(examples: list[Example], what: str) -> list[Encoded]:
        limits = {"max_answer_tokens": max_answer_tokens, "context_tokens": loaded.context_tokens}
        return encode(loaded.tokenizer, examples, what=what, **limits) if examples else []

    rows = {
        "safety": encoded(given + refusals, "held-out safety data"),
        "benign": encoded(benign_given, "held-out benign data"),
    }

    def losses() -> dict[str, float]:
        return {kind: mean_loss(loaded, found) for kind, found in rows.items() if found}

    attached = AttachedVector(family.lora_weights, family.header.num_layers, loaded.device)
    by_state = {"aligned": losses()}
    progress(1, 3, "aligned model measured")
    merge_lora_weights(
        loaded.model, load_adapter(degraded_adapter).lora_weights, str(degraded_adapter)
    )
    by_state["degraded"] = losses()
    progress(2, 3, "degraded model measured")
    with attached.applied_to(loaded.model):
        by_state["restored"] = losses()
    progress(3, 3, "vector measured")
    return {
        "open_prompts": len(open_prompts),
        "refused": len(refusals),
        **{
            key: value
            for kind, found in rows.items()
            for key, value in (
                (f"{kind}_rows", len(found)),
                (
                    f"{kind}_loss",
                    {state: loss[kind] for state, loss in by_state.items()} if found else None,
                ),
            )
        },
    }
