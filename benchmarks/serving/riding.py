"""What rides on a request: a guard's classification before it, or a system prompt in it.

For arms that buy safety with requests instead of weights. Both are put around bench serve's own
request function, so the clock is the same: what the guard takes counts towards the first token.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from loadgen import Wrap


def filler(tokenizer: Any, tokens: int, start: int = 11) -> str:
    """Text of `tokens` tokens that is always the same, as a template or a system prompt is."""
    special = set(tokenizer.all_special_ids)
    ids = [n for n in range(tokenizer.vocab_size) if n not in special]
    return str(tokenizer.decode([ids[(start + 37 * k) % len(ids)] for k in range(tokens)]))


def guarded(template: str, model: str) -> Wrap:
    """Before every request one more to `model`: the guard's template and the prompt, one token.

    The request is sent when the guard has answered. One token is the least a guard can say, and the
    base model on the same engine the least it can cost without weights of its own.
    """

    def wrap(theirs: Any) -> Any:
        async def request(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
            begun = time.perf_counter()
            body = {
                "model": model,
                "prompt": f"{template} {request_func_input.prompt}",
                "max_tokens": 1,
                "temperature": 0,
            }
            async with session.post(url=request_func_input.api_url, json=body) as answer:
                verdict = await answer.json()
                if answer.status != 200 or not verdict.get("choices"):
                    raise RuntimeError(f"the guard answered {answer.status}: {verdict}")
            guard_s = time.perf_counter() - begun
            output = await theirs(request_func_input=request_func_input, session=session, pbar=pbar)
            output.start_time = begun
            output.ttft += guard_s
            output.latency += guard_s
            return output

        return request

    return wrap


def prefixed(text: str) -> Wrap:
    """Every prompt begins with `text`. Its tokens are not counted as the user's."""

    def wrap(theirs: Any) -> Any:
        async def request(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
            longer = replace(request_func_input, prompt=f"{text} {request_func_input.prompt}")
            return await theirs(request_func_input=longer, session=session, pbar=pbar)

        return request

    return wrap
