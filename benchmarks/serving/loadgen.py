"""Asks a running server: vLLM's own `bench serve`, called in this process, one run per call.

Random prompts of exact length, greedy, to the full output length, closed loop. What a guard or a
system prompt costs is put around each of its requests (see riding).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import Load
from launching import BASE, BenchError

Wrap = Callable[[Any], Any]
"""From bench serve's request function to the one that is used in its place."""

METRICS = {
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_token_throughput",
    "requests_per_s": "request_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "tpot_p50_ms": "median_tpot_ms",
    "e2e_p50_ms": "median_e2el_ms",
    "duration_s": "duration",
}
"""Our names, with units, and bench serve's."""

_BACKEND = "openai"


def words(url: str, tokenizer: Path, load: Load, tenants: Sequence[str], seed: int) -> list[str]:
    """The command line of `vllm bench serve`."""
    told = [
        *("--backend", _BACKEND, "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", BASE, "--tokenizer", str(tokenizer), "--dataset-name", "random"),
        *("--random-input-len", str(load.prompt_tokens)),
        *("--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--ready-check-timeout-sec", "0", "--seed", str(seed), "--temperature", "0"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--ignore-eos", "--disable-tqdm"),
    ]
    if tenants:
        told += ["--lora-modules", *tenants, "--lora-assignment", "round-robin"]
    return told


def read(result: dict[str, Any], load: Load) -> dict[str, float]:
    """Our metrics from bench serve's result.

    Errors: BenchError where a request failed or was answered too shortly.
    """
    wanted = load.requests * load.output_tokens
    faults = []
    if result["completed"] != load.requests or result.get("failed"):
        faults.append(f"{result['completed']} of {load.requests} requests were answered")
    if result["total_output_tokens"] != wanted:
        faults.append(f"{result['total_output_tokens']} tokens came back, expected {wanted}")
    if faults:
        raise BenchError("; ".join(faults) + "; see the server's log beside the results")
    return {name: float(result[theirs]) for name, theirs in METRICS.items()}


def ask(
    url: str,
    tokenizer: Path,
    load: Load,
    tenants: Sequence[str],
    seed: int,
    *,
    wrap: Wrap | None = None,
) -> dict[str, float]:
    """One run of bench serve against `url`, its metrics by our names. Prints nothing."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args(words(url, tokenizer, load, tenants, seed))
    functions: dict[str, Any] = serve.ASYNC_REQUEST_FUNCS
    theirs = functions[_BACKEND]
    said = io.StringIO()
    try:
        if wrap is not None:
            functions[_BACKEND] = wrap(theirs)
        with contextlib.redirect_stdout(said):
            result = serve.main(arguments)
    except Exception as error:
        tail = "\n".join(said.getvalue().splitlines()[-5:])
        raise BenchError(f"bench serve against {url}: {error!r}\n{tail}") from error
    finally:
        functions[_BACKEND] = theirs
    return read(result, load)
