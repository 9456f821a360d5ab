"""Greedy completions in batches with transformers, for training targets and small measurements.

A vector attached to the model takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safegene_vllm.chat import (
    chat_text,
    check_template,
    completion_text,
    greedy_tokens,
    model_stop_tokens,
    prompt_tokens,
)
from safegene_vllm.recipe.encoding import batches_by_length
from safegene_vllm.recipe.model import LoadedModel
from safegene_vllm.recipe.training import Progress, silent

BATCH = 32


@dataclass(frozen=True)
class Completion:
    """A completion; `finished`: it ended before the token limit."""

    prompt: str
    text: str
    finished: bool


def generate_greedy(
    loaded: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch: int = BATCH,
    progress: Progress = silent,
) -> list[Completion]:
    """Completions in the order of the prompts; similar lengths share a left-padded batch.

    Errors: ConfigError if the tokenizer has no chat template.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    check_template(tokenizer)
    stops = model_stop_tokens(model, tokenizer)
    lengths = [len(chat_text(tokenizer, prompt)) for prompt in prompts]
    completions: dict[int, Completion] = {}
    for chosen in batches_by_length(lengths, batch):
        rows = prompt_tokens(tokenizer, [prompts[i] for i in chosen])
        written = greedy_tokens(model, tokenizer, rows, max_new_tokens, stops)
        for i, new in zip(chosen, written, strict=True):
            finished = len(new) < max_new_tokens
            completions[i] = Completion(prompts[i], completion_text(tokenizer, new), finished)
        progress(len(completions), len(prompts), "completions")
    return [completions[i] for i in range(len(prompts))]
