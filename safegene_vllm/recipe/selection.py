"""Layer selection by activation contrast on safety prompts against benign and task prompts.

Per layer l and prompt x: c_l(x) = ‖h_l^{D+BA}(x) - h_l^D(x)‖ / ‖h_l^D(x)‖, h_l the residual stream
after layer l at the last prompt token. score_l = mean of c_l over safety prompts - mu · mean over
benign and task prompts. The paper (arXiv:2606.06519) names layer-wise activation contrast without a
formula; this one is ours. The default contrasts the layer's update u_l = h_l - h_{l-1} instead, its
change over ‖h_l‖, which does not repeat the changes of earlier layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from safegene_vllm.chat import check_template, prompt_tokens
from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.family import Family, SelectedLayer, make_family
from safegene_vllm.recipe.attached import AttachedVector
from safegene_vllm.recipe.encoding import Encoded, batches_by_length, collate
from safegene_vllm.recipe.model import LoadedModel, last_prompt_states, record_layers
from safegene_vllm.recipe.training import Progress, silent

BATCH = 16
Stream = Literal["update", "residual"]


@dataclass(frozen=True)
class Contrast:
    """Per layer (L): mean relative change on safety and on other prompts, and the score."""

    safety: tuple[float, ...]
    others: tuple[float, ...]
    mu: float
    stream: Stream

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(s - self.mu * o for s, o in zip(self.safety, self.others, strict=True))


def _encoded(loaded: LoadedModel, prompts: Sequence[str], what: str) -> list[Encoded]:
    check_template(loaded.tokenizer)
    rows = prompt_tokens(loaded.tokenizer, prompts)
    if long := [n for n, row in enumerate(rows, 1) if len(row) > loaded.context_tokens]:
        raise ConfigError(
            f"{what}: the prompts of rows {long[:5]} are longer than the context of "
            f"{loaded.context_tokens} tokens; shorten or remove them"
        )
    return [Encoded(tuple(row), len(row)) for row in rows]


@torch.no_grad()
def _relative_changes(
    loaded: LoadedModel,
    attached: AttachedVector,
    rows: Sequence[Encoded],
    stream: Stream,
    progress: Progress,
) -> tuple[float, ...]:
    """Mean over the rows of ‖h with the vector - h without‖ / ‖h without‖, per layer."""
    sums: torch.Tensor | None = None
    done = 0
    for chosen in batches_by_length([len(row.ids) for row in rows], BATCH):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        plain = _streams(loaded, batch, stream)
        with attached.applied_to(loaded.model):
            changed = _streams(loaded, batch, stream)
        if stream == "update":
            gap = (changed[1] - plain[1]).norm(dim=-1) / plain[0].norm(dim=-1)
        else:
            gap = (changed[0] - plain[0]).norm(dim=-1) / plain[0].norm(dim=-1)
        sums = gap.sum(dim=0) if sums is None else sums + gap.sum(dim=0)
        done += len(chosen)
        progress(done, len(rows), "prompts")
    assert sums is not None
    return tuple(float(value) for value in sums / len(rows))


def _streams(loaded: LoadedModel, batch: Any, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, L, D) float32: the residual stream after each layer, and each layer's update of it."""
    with record_layers(loaded.model) as layers:
        loaded.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    after = last_prompt_states(layers, batch.last_prompt).float()
    return after, torch.diff(after, dim=1, prepend=torch.zeros_like(after[:, :1]))


def contrast(
    degraded: LoadedModel,
    family: Family,
    *,
    safety: Dataset,
    others: Sequence[Dataset],
    mu: float = 1.0,
    stream: Stream = "update",
    progress: Progress = silent,
) -> Contrast:
    """The scores of every layer of the degraded model for the family's vector.

    Errors: ConfigError if one class of prompts is empty, or a prompt is longer than the context.
    """
    prompts = [row.prompt for data in others for row in data.rows]
    if not safety.rows or not prompts:
        raise ConfigError(
            f"{len(safety.rows)} safety and {len(prompts)} benign or task prompts; a contrast "
            "needs both kinds"
        )
    attached = AttachedVector(family.lora_weights, family.header.num_layers, degraded.device)
    # Encoded and checked before scoring, which takes minutes.
    parts = [
        _encoded(degraded, part, what)
        for part, what in (([r.prompt for r in safety.rows], "safety"), (prompts, "benign"))
    ]
    means = [_relative_changes(degraded, attached, rows, stream, progress) for rows in parts]
    return Contrast(means[0], means[1], mu, stream)


def top_layers(scores: Sequence[float], k: int, candidates: Sequence[int]) -> list[int]:
    """The k candidates with the highest scores, ascending; ties go to the lower layer."""
    if not 1 <= k <= len(candidates):
        raise ConfigError(
            f"top-k is {k}, expected 1 to {len(candidates)}, the layers with a vector"
        )
    return sorted(sorted(candidates, key=lambda layer: (-scores[layer], layer))[:k])


def select(
    family: Family,
    contrasts: Contrast,
    k: int,
    *,
    data: Sequence[Dataset] = (),
    layers: Sequence[int] | None = None,
    name: str | None = None,
) -> Family:
    """The family with its k best layers (or `layers`); all scores go into its recipe.

    `name` None: the family's own.
    """
    available = [entry.layer for entry in family.header.layers]
    chosen = top_layers(contrasts.scores, k, available) if layers is None else sorted(layers)
    selection = {
        "mu": contrasts.mu,
        "stream": contrasts.stream,
        "k": len(chosen),
        "scores": [round(value, 6) for value in contrasts.scores],
        "safety": [round(value, 6) for value in contrasts.safety],
        "others": [round(value, 6) for value in contrasts.others],
        "data": [one.record() for one in data],
    }
    return make_family(
        name or family.header.name,
        family.header.base,
        family.lora_weights,
        layers=[SelectedLayer(n, round(contrasts.scores[n], 6)) for n in chosen],
        bounds=family.header.bounds,
        recipe={**family.header.recipe, "selection": selection},
    )
