"""Load on a running server by vLLM's own `bench serve`, called in this process.

Random prompts of exact length, greedy, the full output length, a closed loop. vLLM's `bench sweep`
runs one server after another; arms have to alternate between live servers, so it is not used.
Guard requests and system prompts wrap bench serve's own request function, so its clock covers them.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serving.cells import Load
from benchmarks.serving.server import BASE, BenchError

Wrap = Callable[[Any], Any]
"""Replaces bench serve's request function by another one."""

METRICS = {
    "output_tokens_per_s": "output_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}
"""Metric names with units, and bench serve's names."""

_BACKEND = "openai"


def bench_serve_args(
    url: str, tokenizer: Path, load: Load, tenants: Sequence[str], seed: int
) -> list[str]:
    """Command line of `vllm bench serve`."""
    return [
        *("--backend", _BACKEND, "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", BASE, "--tokenizer", str(tokenizer), "--dataset-name", "random"),
        *("--random-input-len", str(load.prompt_tokens)),
        *("--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--ready-check-timeout-sec", "0", "--seed", str(seed), "--temperature", "0"),
        *("--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99"),
        *("--ignore-eos", "--disable-tqdm"),
        *(("--lora-modules", *tenants, "--lora-assignment", "round-robin") if tenants else ()),
    ]


def read_metrics(result: dict[str, Any], load: Load) -> dict[str, float]:
    """Metrics of bench serve's result. Raises: BenchError for failed or short completions."""
    tokens = load.requests * load.output_tokens
    if result["completed"] != load.requests or result.get("failed"):
        raise BenchError(
            f"{result['completed']} of {load.requests} requests completed; see the server's log"
        )
    if result["total_output_tokens"] != tokens:
        found = result["total_output_tokens"]
        raise BenchError(f"{found} tokens generated, expected {tokens}; see the server's log")
    return {name: float(result[field]) for name, field in METRICS.items()}


def run_load(
    url: str,
    tokenizer: Path,
    load: Load,
    tenants: Sequence[str],
    seed: int,
    *,
    wrap: Wrap | None = None,
) -> dict[str, float]:
    """Run bench serve once against `url`, silently. Raises: BenchError."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args(bench_serve_args(url, tokenizer, load, tenants, seed))
    functions: dict[str, Any] = serve.ASYNC_REQUEST_FUNCS
    original = functions[_BACKEND]
    output = io.StringIO()
    try:
        functions[_BACKEND] = wrap(original) if wrap else original
        with contextlib.redirect_stdout(output):
            result = serve.main(arguments)
    except Exception as error:
        tail = "\n".join(output.getvalue().splitlines()[-5:])
        raise BenchError(f"bench serve against {url}: {error!r}\n{tail}") from error
    finally:
        functions[_BACKEND] = original
    return read_metrics(result, load)


def filler(tokenizer: Any, tokens: int, start: int = 11) -> str:
    """A constant text of `tokens` tokens, as a template or a system prompt is."""
    special = set(tokenizer.all_special_ids)
    ids = [n for n in range(tokenizer.vocab_size) if n not in special]
    return str(tokenizer.decode([ids[(start + 37 * k) % len(ids)] for k in range(tokens)]))


def guarded(template: str, model: str) -> Wrap:
    """Classify every prompt by one more request to `model` before it is sent.

    The guard reads its template and the prompt and generates one token: the least that a guard on
    the same engine can cost. Its time counts towards the first token.
    """

    def wrap(original: Any) -> Any:
        async def request(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
            started = time.perf_counter()
            prompt = f"{template} {request_func_input.prompt}"
            body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            async with session.post(url=request_func_input.api_url, json=body) as response:
                verdict = await response.json()
                if response.status != 200 or not verdict.get("choices"):
                    raise RuntimeError(f"guard request failed, {response.status}: {verdict}")
            guard_s = time.perf_counter() - started
            output = await original(
                request_func_input=request_func_input, session=session, pbar=pbar
            )
            output.start_time = started
            output.ttft += guard_s
            output.latency += guard_s
            return output

        return request

    return wrap


def prefixed(text: str) -> Wrap:
    """Prepend `text` to every prompt; its tokens do not count as the user's."""

    def wrap(original: Any) -> Any:
        async def request(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
            longer = replace(request_func_input, prompt=f"{text} {request_func_input.prompt}")
            return await original(request_func_input=longer, session=session, pbar=pbar)

        return request

    return wrap
