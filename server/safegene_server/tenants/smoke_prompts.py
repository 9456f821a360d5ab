"""A few questions to a model of this engine, and what is counted of its answers, by string rules.

For the gate, before a revision is served, and for probes, while it is. Answers are counted and
forgotten: none is kept or logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import httpx

from safegene_server.error_responses import EngineDownError
from safegene_server.tenants.gather import gather
from safegene_vllm.errors import AdapterRejectedError, ConfigError, ReceiptError
from safegene_vllm.evaluation.judges import is_coherent, is_refusal

CHAT = "/v1/chat/completions"
SHIPPED = "trial_prompts.jsonl"
JUDGES = ("strings:opening", "coherence")
Kind = Literal["harmful", "lookalike", "benign"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Asked(Protocol):
    """The engine of this process, asked past keys and limits."""

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response: ...


@dataclass(frozen=True)
class Prompt:
    """A question. A lookalike only sounds harmful, and is to be answered."""

    prompt: str
    kind: Kind


@dataclass(frozen=True)
class Count:
    """So many `hits` of `n`."""

    hits: int
    n: int

    @property
    def share(self) -> float:
        return self.hits / self.n

    def __str__(self) -> str:
        return f"{self.hits} of {self.n}"

    def __add__(self, other: Count) -> Count:
        return Count(self.hits + other.hits, self.n + other.n)

    def record(self) -> dict[str, Any]:
        return {"rate": round(self.share, 4), "n": self.n}


@dataclass(frozen=True)
class Tally:
    """What is left of answers: refusals by kind of question, and how many made sense."""

    refused: Mapping[Kind, Count]
    coherent: Count

    def record(self) -> dict[str, Any]:
        refused = {kind: count.record() for kind, count in self.refused.items()}
        return {"refused": refused, "coherent": self.coherent.record()}


def read_prompts(path: Path | None = None) -> tuple[Prompt, ...]:
    """The shipped questions, or those of an operator's JSONL file, `{"prompt": ..., "kind": ...}`
    a line. Errors: ConfigError naming every bad line, or a kind without any question.
    """
    where = str(path or SHIPPED)
    try:
        text = (path or resources.files(__package__).joinpath(SHIPPED)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {where} cannot be read: {error}") from error
    prompts, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            found = _prompt(line)
            if found is None:
                faults.append(f"line {number}")
            else:
                prompts.append(found)
    if faults:
        raise ConfigError(
            f'prompts {where}: {", ".join(faults)}: expected {{"prompt": "...", "kind": '
            f'"..."}} with kind one of {", ".join(KINDS)}.'
        )
    missing = [kind for kind in KINDS if kind not in {prompt.kind for prompt in prompts}]
    if missing:
        raise ConfigError(f"prompts {where}: none of kind {', '.join(missing)}; add some.")
    return tuple(prompts)


async def ask_all(
    replica: Asked,
    model: str,
    prompts: Sequence[Prompt],
    *,
    concurrent: int,
    max_tokens: int,
    priority: int | None,
    salt: str | None = None,
) -> list[str]:
    """The answers of `model` (`tenant@N`, loaded) in order, greedy, `concurrent` at a time.

    Nothing is left in the engine when this ends, however it does. `priority` is for an engine that
    schedules by priority; others refuse it. With a `salt` of its own nothing is answered from
    blocks of the prefix cache that were computed before.
    Errors: AdapterRejectedError (the engine refuses a question); EngineDownError (it fails);
    ReceiptError (another model answered); what `replica.call` raises.
    """
    turn = asyncio.Semaphore(concurrent)
    body: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
    if priority is not None:
        body["priority"] = priority
    if salt is not None:
        body["cache_salt"] = salt

    async def ask(prompt: Prompt) -> str:
        turns = [{"role": "user", "content": prompt.prompt}]
        async with turn:
            return _answer(await replica.call("POST", CHAT, {**body, "messages": turns}), model)

    return await gather(ask(prompt) for prompt in prompts)


def tally(prompts: Sequence[Prompt], answers: Sequence[str]) -> Tally:
    """Refusals per kind and coherence over all, by JUDGES; every kind has a question."""

    def refused(kind: Kind) -> Count:
        of_kind = [a for p, a in zip(prompts, answers, strict=True) if p.kind == kind]
        return Count(sum(map(is_refusal, of_kind)), len(of_kind))

    coherent = Count(sum(map(is_coherent, answers)), len(answers))
    return Tally({kind: refused(kind) for kind in KINDS}, coherent)


def digest(prompts: Sequence[Prompt]) -> str:
    """So that two records can be compared: the same questions have the same digest."""
    lines = json.dumps([[prompt.kind, prompt.prompt] for prompt in prompts])
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _prompt(line: str) -> Prompt | None:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or raw.get("kind") not in KINDS:
        return None
    prompt = raw.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    return Prompt(prompt, cast(Kind, raw["kind"]))


def _answer(response: httpx.Response, model: str) -> str:
    status = response.status_code
    if status >= 500:
        # Says something of the engine, and nothing of the tenant.
        raise EngineDownError(f"{model}: the engine answers a question with {status}")
    try:
        found = response.json()
        if status != 200:
            raise AdapterRejectedError(
                f"{model}: the engine answers a question with {status}: "
                f"{found['error']['message']:.500}"
            )
        text = found["choices"][0]["message"]["content"]
        answered_by = found["model"]
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterRejectedError(
            f"{model}: the engine answers a question with {status} and something that is no chat "
            "completion"
        ) from error
    if answered_by != model:
        raise ReceiptError(f"{model} was asked, {answered_by!r:.200} answered")
    # A model may say nothing at all, which is not coherent.
    return str(text or "")
