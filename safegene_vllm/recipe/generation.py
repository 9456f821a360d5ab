"""Greedy answers to many prompts in batches, with transformers on CPU or one GPU.

For training targets and small measurements; whatever is attached to the model takes part. Serving
and measuring what is served are vLLM's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safegene_vllm.chat import (
    answer_text,
    chat_text,
    check_template,
    greedy_tokens,
    prompt_tokens,
    stops_of,
)
from safegene_vllm.recipe.encoding import in_order
from safegene_vllm.recipe.model import Loaded
from safegene_vllm.recipe.training import Progress, silent

BATCH = 32


@dataclass(frozen=True)
class Completion:
    """One answer, and whether the model ended it by itself before the token limit."""

    prompt: str
    text: str
    finished: bool


def generate_greedy(
    loaded: Loaded,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch: int = BATCH,
    progress: Progress = silent,
) -> list[Completion]:
    """Answers in the order of the prompts; similar lengths share a left-padded batch.

    Errors: ConfigError if the tokenizer has no chat template.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    check_template(tokenizer)
    stops = stops_of(model, tokenizer)
    lengths = [len(chat_text(tokenizer, prompt)) for prompt in prompts]
    answers: dict[int, Completion] = {}
    for chosen in in_order(lengths, batch):
        rows = prompt_tokens(tokenizer, [prompts[i] for i in chosen])
        written = greedy_tokens(model, tokenizer, rows, max_new_tokens, stops)
        for i, new in zip(chosen, written, strict=True):
            finished = len(new) < max_new_tokens
            answers[i] = Completion(prompts[i], answer_text(tokenizer, new), finished)
        progress(len(answers), len(prompts), "answers")
    return [answers[i] for i in range(len(prompts))]
