"""Requests of the scoring to the engine, and invalid responses."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from safegene_server.calibration.scoring import Encoded, end_of_turn, generate_answer, mean_loss
from safegene_vllm.errors import AdapterRejectedError, ReceiptError, SafegeneError

SHOT = Encoded((5, 6), (7, 8))


class Says:
    """Sends the same response to every request, or one per path."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self.body, self.status = body, status
        self.requested: list[dict[str, Any]] = []

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        assert method == "POST" and body is not None
        self.requested.append(body)
        if isinstance(self.body, bytes):
            return httpx.Response(self.status, content=self.body)
        content = self.body(body) if callable(self.body) else self.body
        return httpx.Response(self.status, json=content)


def scores(*given: Any, model: str = "@candidate/a") -> dict[str, Any]:
    return {"model": model, "choices": [{"prompt_logprobs": list(given)}]}


GOOD = (None, {"6": {"logprob": -9.0}}, {"7": {"logprob": -1.0}, "3": {"logprob": -0.5}})


def loss(says: Says) -> float:
    return asyncio.run(mean_loss(says, "@candidate/a", SHOT, None))  # type: ignore[arg-type]


def test_the_loss_is_over_the_completions_own_tokens() -> None:
    says = Says(scores(*GOOD, {"8": {"logprob": -2.0}}))
    assert loss(says) == 1.5
    (requested,) = says.requested
    assert requested["prompt"] == [5, 6, 7, 8] and requested["prompt_logprobs"] == 0
    assert requested["model"] == "@candidate/a" and requested["max_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        (
            b"Internal Server Error",
            500,
            AdapterRejectedError,
            "responded to .*v1/completions with 500",
        ),
        ({"error": {"message": "no such model"}}, 404, AdapterRejectedError, "404: no such model"),
        (scores(*GOOD), 200, AdapterRejectedError, "3 log-probabilities for 4 tokens"),
        (scores(*GOOD, {"9": {"logprob": 0.0}}), 200, AdapterRejectedError, "cannot be read"),
        (scores(*GOOD, None), 200, AdapterRejectedError, "cannot be read"),
        ([], 200, AdapterRejectedError, "cannot be read"),
        (
            scores(*GOOD, {"8": {"logprob": -2.0}}, model="acme@1"),
            *(200, ReceiptError, "@candidate/a was requested, 'acme@1' responded"),
        ),
    ],
)
def test_an_invalid_score_is_rejected(
    body: Any, status: int, kind: type[SafegeneError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        loss(Says(body, status))


def test_a_score_that_is_not_finite_is_rejected() -> None:
    text = '{"model":"@candidate/a","choices":[{"prompt_logprobs":[null,{"6":{"logprob":0}},'
    text += '{"7":{"logprob":NaN}},{"8":{"logprob":0}}]}]}'
    with pytest.raises(AdapterRejectedError, match="log-probability nan"):
        loss(Says(text.encode()))


def test_an_empty_completion_is_rejected() -> None:
    says = Says({"model": "m", "choices": [{"token_ids": []}]})
    with pytest.raises(AdapterRejectedError, match="empty completion"):
        asyncio.run(generate_answer(says, "m", (1, 2), 4, 9))  # type: ignore[arg-type]
    assert says.requested[0]["priority"] == 9


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ([1, 70, 71, 2, 3], (2,)),
        ([1, 70, 71], ()),
        ([1, 70, 71, 9, 70, 71, 4], (4,)),
        ([1, 70, 9], ()),
    ],
)
def test_the_end_of_turn_token_follows_the_completion(
    template: list[int], end: tuple[int, ...]
) -> None:
    def tokens(body: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": template if "messages" in body else [70, 71], "max_model_len": 9}

    assert asyncio.run(end_of_turn(Says(tokens), "m")) == end  # type: ignore[arg-type]
