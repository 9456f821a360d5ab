"""Token ids and log-probabilities of known answers, over the engine's HTTP API.

/tokenize places the chat template as the chat route does; /v1/completions on those ids gives
`prompt_logprobs`, computed afresh and never from the prefix cache. The chat route would give them
too, but takes text and does not report where the answer begins among its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from safegene_server.tenants import Replica
from safegene_vllm.errors import AdapterRejectedError, ReceiptError

COMPLETIONS, TOKENIZE = "/v1/completions", "/tokenize"
PROBE = "Understood"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example. The answer may be cut."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


async def prompt_tokens(replica: Replica, model: str, prompt: str) -> tuple[tuple[int, ...], int]:
    """One user turn in the chat template up to where the assistant begins, and the longest context.

    Errors: AdapterRejectedError.
    """
    turns = [{"role": "user", "content": prompt}]
    body = {"messages": turns, "add_generation_prompt": True}
    return await _query(
        replica, TOKENIZE, model, body, lambda a: (_ids(a["tokens"]), int(a["max_model_len"]))
    )


async def text_tokens(replica: Replica, model: str, text: str) -> tuple[int, ...]:
    """The text alone, without special tokens. Errors: AdapterRejectedError."""
    body = {"prompt": text, "add_special_tokens": False}
    return await _query(replica, TOKENIZE, model, body, lambda a: _ids(a["tokens"]))


async def end_of_turn(replica: Replica, model: str) -> tuple[int, ...]:
    """The token that the template puts after an answer; none if it cannot be found.

    Errors: AdapterRejectedError.
    """
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
    body = {"messages": turns, "add_generation_prompt": False}
    whole = await _query(replica, TOKENIZE, model, body, lambda a: _ids(a["tokens"]))
    probe = await text_tokens(replica, model, PROBE)
    for begin in range(len(whole) - len(probe), -1, -1):
        if whole[begin : begin + len(probe)] == probe:
            return whole[begin + len(probe) :][:1]
    return ()


async def generate_answer(
    replica: Replica, model: str, prompt: tuple[int, ...], most: int, priority: int | None
) -> tuple[int, ...]:
    """The model's own greedy completion. Errors: AdapterRejectedError, ReceiptError."""
    body = {"prompt": list(prompt), "max_tokens": most, "return_token_ids": True}

    def read(response: Any) -> tuple[int, ...]:
        return _ids(response["choices"][0]["token_ids"])

    found = await _query(replica, COMPLETIONS, model, _greedy(body, priority), read)
    if not found:
        raise AdapterRejectedError(f"{model}: the engine returned an empty completion")
    return found[:most]


async def mean_loss(replica: Replica, model: str, example: Encoded, priority: int | None) -> float:
    """Mean negative log-probability of the answer's tokens.

    Errors: AdapterRejectedError, also if not finite; ReceiptError (response of another model).
    """
    ids = [*example.prompt, *example.answer]
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}

    def read(response: Any) -> float:
        given = response["choices"][0]["prompt_logprobs"]
        if len(given) != len(ids):
            raise ValueError(f"{len(given)} log-probabilities for {len(ids)} tokens")
        begin = len(example.prompt)
        places = range(begin, len(ids))
        return -sum(float(given[i][str(ids[i])]["logprob"]) for i in places) / len(example.answer)

    loss = await _query(replica, COMPLETIONS, model, _greedy(body, priority), read)
    if not math.isfinite(loss):
        raise AdapterRejectedError(f"{model}: the engine returned the log-probability {-loss}")
    return loss


def _greedy(body: dict[str, Any], priority: int | None) -> dict[str, Any]:
    more = {} if priority is None else {"priority": priority}
    return {**body, "temperature": 0.0, **more}


def _ids(tokens: Any) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


async def _query(
    replica: Replica, path: str, model: str, body: dict[str, Any], read: Callable[[Any], _T]
) -> _T:
    response = await replica.call("POST", path, {"model": model, **body})
    responded = f"the engine responded to the calibration's {path[1:]} with {response.status_code}"
    try:
        found = response.json()
        if response.status_code != 200:
            raise AdapterRejectedError(f"{responded}: {found['error']['message']:.500}")
        result = read(found)
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterRejectedError(
            f"{responded} and a body that cannot be read ({error!r:.200})"
        ) from error
    if path == COMPLETIONS and found.get("model") != model:
        raise ReceiptError(f"{model} was requested, {found.get('model')!r:.200} responded")
    return result
