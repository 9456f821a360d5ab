"""A vLLM engine inside this process, for verify, benchmarks and tests.

For asking a whole list of requests as one batch, scheduled the same way every time, with or without
a vector. Not for serving: that is vLLM's own API server.
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
    """Greedy tokens with the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """One request: token ids, and the tenant's directory (None: the base model)."""

    prompt: Sequence[int]
    tenant: Path | None = None
    name: str | None = None


class Engine:
    """A running engine; `ask` answers a batch, `receipts` come from every rank."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._ids: dict[str, int] = {}

    def lora(self, tenant: Path, name: str | None = None) -> Any:
        name = name or f"{tenant.parent.name}/{tenant.name}"
        number = self._ids.setdefault(name, len(self._ids) + 1)
        return compat.resolve("LoRARequest")(name, number, str(tenant))

    def add(self, tenant: Path, name: str | None = None) -> None:
        """Load a tenant the way the API server does, before any request uses it."""
        self.llm.llm_engine.add_lora(self.lora(tenant, name))

    def ask(self, asks: Sequence[Request], tokens: int = 12, **sampling: Any) -> list[Completion]:
        greedy = {"temperature": 0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
        params = compat.resolve("SamplingParams")(max_tokens=tokens, **(greedy | sampling))
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(a.prompt)} for a in asks],
            params,
            lora_request=[None if a.tenant is None else self.lora(a.tenant, a.name) for a in asks],
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

    def score(self, asks: Sequence[Request], answers: Sequence[Completion]) -> list[Completion]:
        """The given answers' tokens under this engine: their log-probabilities, token by token.

        For comparing engines whose rounding may choose another token somewhere.
        """
        params = compat.resolve("SamplingParams")(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False
        )
        outputs = self.llm.generate(
            [
                {"prompt_token_ids": [*ask.prompt, *answer.tokens]}
                for ask, answer in zip(asks, answers, strict=True)
            ],
            params,
            lora_request=[None if a.tenant is None else self.lora(a.tenant, a.name) for a in asks],
            use_tqdm=False,
        )
        return [
            Completion(
                answer.tokens,
                tuple(
                    step[token].logprob
                    for step, token in zip(
                        output.prompt_logprobs[-len(answer.tokens) :], answer.tokens, strict=True
                    )
                ),
            )
            for output, answer in zip(outputs, answers, strict=True)
        ]

    def receipts(self) -> list[Receipt]:
        return [Receipt.from_dict(r) for r in self.llm.collective_rpc("safegene_receipt")]


@contextmanager
def engine(
    model: Path, settings: dict[str, Any] | None, *, plugins: str | None = None, **options: Any
) -> Iterator[Engine]:
    """Start a vLLM engine with these SafeGene settings; `plugins=""` gives stock vLLM."""
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
    """Set environment variables and put the old ones back."""
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
    """Largest |Δ logprob| over all tokens of all answers."""
    return max(
        abs(a - b)
        for f, e in zip(found, expected, strict=True)
        for a, b in zip(f.logprobs, e.logprobs, strict=True)
    )
