"""A vLLM engine inside this process, for `safegene verify`, evaluation, benchmarks and tests.

Runs a list of requests as one batch that is scheduled the same way every time, with or without a
vector.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_vllm.formats.receipt import Receipt
from safegene_vllm.plugin import compat


@dataclass(frozen=True)
class Completion:
    """Tokens of a completion with the log-probability of each, in nats."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the tenant's directory (None: the base model)."""

    prompt: Sequence[int]
    tenant: Path | None = None
    name: str | None = None


class Engine:
    """A running engine."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._ids: dict[str, int] = {}

    def lora(self, tenant: Path, name: str | None = None) -> Any:
        """Return the LoRARequest of a tenant's directory."""
        name = name or f"{tenant.parent.name}/{tenant.name}"
        number = self._ids.setdefault(name, len(self._ids) + 1)
        return compat.resolve("LoRARequest")(name, number, str(tenant))

    def add(self, tenant: Path, name: str | None = None) -> None:
        """Load a tenant the way the API server does, before any request uses it."""
        self.llm.llm_engine.add_lora(self.lora(tenant, name))

    def generate(
        self, requests: Sequence[Request], tokens: int = 12, **sampling: Any
    ) -> list[Completion]:
        """Run one batch, greedily unless `sampling` says otherwise."""
        greedy = {"temperature": 0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
        params = compat.resolve("SamplingParams")(max_tokens=tokens, **(greedy | sampling))
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(r.prompt)} for r in requests],
            params,
            lora_request=self._lora_requests(requests),
            use_tqdm=False,
        )
        return [
            Completion(
                tuple(o.outputs[0].token_ids),
                tuple(
                    step[token].logprob
                    for step, token in zip(
                        o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True
                    )
                ),
            )
            for o in outputs
        ]

    def score(
        self, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Completion]:
        """Return the given tokens with their log-probabilities under this engine.

        Compares engines whose rounding may choose another token somewhere.
        """
        params = compat.resolve("SamplingParams")(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False
        )
        outputs = self.llm.generate(
            [
                {"prompt_token_ids": [*request.prompt, *completion.tokens]}
                for request, completion in zip(requests, completions, strict=True)
            ],
            params,
            lora_request=self._lora_requests(requests),
            use_tqdm=False,
        )
        return [
            Completion(
                completion.tokens,
                tuple(
                    step[token].logprob
                    for step, token in zip(
                        output.prompt_logprobs[-len(completion.tokens) :],
                        completion.tokens,
                        strict=True,
                    )
                ),
            )
            for output, completion in zip(outputs, completions, strict=True)
        ]

    def _lora_requests(self, requests: Sequence[Request]) -> list[Any]:
        return [None if r.tenant is None else self.lora(r.tenant, r.name) for r in requests]

    def receipts(self) -> list[Receipt]:
        """Return the receipt of every rank."""
        return [Receipt.from_dict(r) for r in self.llm.collective_rpc("safegene_receipt")]


@contextmanager
def engine(
    model: Path, settings: dict[str, Any] | None, *, plugins: str | None = None, **options: Any
) -> Iterator[Engine]:
    """Start a vLLM engine with these SafeGene settings; `plugins=""` starts stock vLLM."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    if options.get("tensor_parallel_size", 1) > 1:
        environment["OMP_NUM_THREADS"] = "1"
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
    }
    if (settings or {}).get("apply") != "weights":
        defaults |= {"enable_lora": True, "max_loras": 8, "max_lora_rank": 8}
    else:
        defaults["load_format"] = "safegene"
    if settings is not None:
        defaults["additional_config"] = {"safegene": settings}
    with _environment(environment):
        llm = compat.resolve("LLM")(model=str(model), **(defaults | options))
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables and restore the previous values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def max_logprob_diff(found: Sequence[Completion], expected: Sequence[Completion]) -> float:
    """Return the largest |Δ logprob| over all tokens of all completions."""
    return max(
        abs(a - b)
        for f, e in zip(found, expected, strict=True)
        for a, b in zip(f.logprobs, e.logprobs, strict=True)
    )
