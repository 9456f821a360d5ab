"""Training examples as token ids, padded batches, and the seeded order of batches.

Losses apply to answer tokens only. The batch of a step follows from the seed, so that an
interrupted run continues with the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safegene_vllm.chat import check_template, end_of_turn, prompt_tokens
from safegene_vllm.dataset import Row
from safegene_vllm.errors import ConfigError

POOL_BATCHES = 8


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; `whole` is False if the answer was truncated."""

    prompt: str
    answer: str
    whole: bool = True


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the first `prompt_tokens` are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Batch:
    """N examples, right-padded to T tokens: ids (N, T) int64, mask (N, T) 1 where there is a token.

    `wanted` (N, T) is True at each position whose *next* token belongs to an answer; `targets` (K,)
    are those next tokens, row by row, and `share` (K,) float32 is 1 / (the row's answer tokens).
    `last_prompt` (N,) is the position of each prompt's last token.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    share: torch.Tensor
    last_prompt: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            *(
                getattr(self, name).to(device)
                for name in ("ids", "mask", "wanted", "targets", "share", "last_prompt")
            )
        )


def encode(
    tokenizer: Any,
    examples: Iterable[Example],
    *,
    max_answer_tokens: int,
    context_tokens: int,
    what: str = "data",
) -> list[Encoded]:
    """Encode examples in order; a truncated answer has no end-of-turn tokens.

    Errors: ConfigError naming the rows that exceed the context.
    """
    check_template(tokenizer)
    end = end_of_turn(tokenizer)
    rows: list[Encoded] = []
    too_long: list[str] = []
    for number, example in enumerate(examples, 1):
        (head,) = prompt_tokens(tokenizer, [example.prompt])
        body = list(tokenizer.encode(example.answer, add_special_tokens=False))
        body = (body + end if example.whole else body)[:max_answer_tokens]
        if len(head) + len(body) > context_tokens:
            too_long.append(f"row {number} ({len(head)} + {len(body)} tokens)")
        rows.append(Encoded((*head, *body), len(head)))
    _reject_long(too_long, context_tokens, what)
    if not rows:
        raise ConfigError(f"{what} is empty; expected at least one example")
    return rows


def check_example_lengths(
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_answer_tokens: int,
    context_tokens: int,
    what: str,
) -> None:
    """Reject what `encode` would, before answers are generated for the rows without one.

    Those count `max_answer_tokens`. Errors: ConfigError naming the rows.
    """
    check_template(tokenizer)
    end = end_of_turn(tokenizer)
    too_long: list[str] = []
    for number, row in enumerate(rows, 1):
        (head,) = prompt_tokens(tokenizer, [row.prompt])
        body = max_answer_tokens
        if row.answer is not None:
            given = tokenizer.encode(row.answer, add_special_tokens=False)
            body = min(len(given) + len(end), max_answer_tokens)
        if len(head) + body > context_tokens:
            too_long.append(f"row {number} ({len(head)} + {body} tokens)")
    _reject_long(too_long, context_tokens, what)


def _reject_long(too_long: Sequence[str], context_tokens: int, what: str) -> None:
    if too_long:
        raise ConfigError(
            f"{what}: {len(too_long)} examples do not fit the context of {context_tokens} tokens: "
            f"{', '.join(too_long[:5])}; shorten or remove them"
        )


def collate(rows: Sequence[Encoded], pad: int) -> Batch:
    """The rows as one batch, in their order."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    wanted = torch.zeros((len(rows), width), dtype=torch.bool)
    targets: list[int] = []
    share: list[float] = []
    for i, row in enumerate(rows):
        answer = row.ids[row.prompt_tokens :]
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        wanted[i, row.prompt_tokens - 1 : len(row.ids) - 1] = True
        targets += answer
        share += [1.0 / len(answer)] * len(answer) if answer else []
    last = torch.tensor([row.prompt_tokens - 1 for row in rows])
    return Batch(ids, mask, wanted, torch.tensor(targets), torch.tensor(share), last)


class Batches:
    """Endless shuffled batches of row numbers; similar lengths of a pool share a batch."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed = list(lengths), min(size, len(lengths)), seed
        self.per_epoch = -(-len(self.lengths) // self.size)
        self._epoch, self._order = -1, list[list[int]]()

    def at(self, step: int) -> list[int]:
        """The rows of step `step` (from 0), independent of earlier calls."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        ready: list[list[int]] = []
        for start in range(0, len(order), self.size * POOL_BATCHES):
            pool = sorted(
                order[start : start + self.size * POOL_BATCHES], key=lambda i: self.lengths[i]
            )
            batches = [pool[i : i + self.size] for i in range(0, len(pool), self.size)]
            rng.shuffle(batches)
            ready += batches
        return ready


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of all rows once, similar lengths together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
