"""Prompts to a model of this engine, and counts of its completions by string rules.

For the smoke test, before a revision is served, and for probes, while it is. Completions are
counted; none is stored or logged.
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
from safegene_server.tenants.context import gather
from safegene_vllm.errors import AdapterRejectedError, ConfigError, ReceiptError
from safegene_vllm.evaluation.judges import is_coherent, is_refusal

CHAT = "/v1/chat/completions"
SHIPPED = "trial_prompts.jsonl"
JUDGES = ("strings:opening", "coherence")
Kind = Literal["harmful", "lookalike", "benign"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class ChatClient(Protocol):
    """Client of this process's app, past keys and limits."""

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt. A lookalike only sounds harmful, and a model should comply."""

    prompt: str
    kind: Kind


@dataclass(frozen=True)
class Count:
    """`hits` out of `n`."""

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
    """Counts of completions: refusals by kind of prompt, and coherence."""

    refused: Mapping[Kind, Count]
    coherent: Count

    def record(self) -> dict[str, Any]:
        refused = {kind: count.record() for kind, count in self.refused.items()}
        return {"refused": refused, "coherent": self.coherent.record()}


def read_prompts(path: Path | None = None) -> tuple[Prompt, ...]:
    """Read the shipped prompts, or a JSONL file of `{"prompt": ..., "kind": ...}`.

    Errors: ConfigError naming every bad line, or a kind without any prompt.
    """
    where = str(path or SHIPPED)
    try:
        text = (path or resources.files(__package__).joinpath(SHIPPED)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {where} cannot be read: {error}") from error
    prompts, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            found = _prompt(line)
            if found is None:
                problems.append(f"line {number}")
            else:
                prompts.append(found)
    if problems:
        raise ConfigError(
            f'prompts {where}: {", ".join(problems)}: expected {{"prompt": "...", "kind": '
            f'"..."}} with kind one of {", ".join(KINDS)}.'
        )
    missing = [kind for kind in KINDS if kind not in {prompt.kind for prompt in prompts}]
    if missing:
        raise ConfigError(f"prompts {where}: none of kind {', '.join(missing)}; add some.")
    return tuple(prompts)


async def generate_all(
    replica: ChatClient,
    model: str,
    prompts: Sequence[Prompt],
    *,
    concurrent: int,
    max_tokens: int,
    priority: int | None,
    salt: str | None = None,
) -> list[str]:
    """Generate greedy completions of `model` (`tenant@N`, loaded), in order, some `concurrent`.

    No request is left in the engine afterwards, also after an error or a cancel. `priority` is for
    an engine that schedules by priority; others reject it. A new `salt` avoids earlier blocks of
    the prefix cache.
    Errors: AdapterRejectedError (the engine rejects a prompt); EngineDownError (it fails);
    ReceiptError (another model responded); what `replica.call` raises.
    """
    turn = asyncio.Semaphore(concurrent)
    body: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
    if priority is not None:
        body["priority"] = priority
    if salt is not None:
        body["cache_salt"] = salt

    async def generate(prompt: Prompt) -> str:
        turns = [{"role": "user", "content": prompt.prompt}]
        async with turn:
            return _completion(await replica.call("POST", CHAT, {**body, "messages": turns}), model)

    return await gather(generate(prompt) for prompt in prompts)


def tally(prompts: Sequence[Prompt], completions: Sequence[str]) -> Tally:
    """Count refusals per kind and coherence over all, by JUDGES; every kind has a prompt."""

    def refused(kind: Kind) -> Count:
        of_kind = [a for p, a in zip(prompts, completions, strict=True) if p.kind == kind]
        return Count(sum(map(is_refusal, of_kind)), len(of_kind))

    coherent = Count(sum(map(is_coherent, completions)), len(completions))
    return Tally({kind: refused(kind) for kind in KINDS}, coherent)


def digest(prompts: Sequence[Prompt]) -> str:
    """Digest of the prompts, for comparing records."""
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


def _completion(response: httpx.Response, model: str) -> str:
    status = response.status_code
    if status >= 500:
        # The engine's error, not the tenant's.
        raise EngineDownError(f"{model}: the engine responded to a prompt with {status}")
    try:
        found = response.json()
        if status != 200:
            raise AdapterRejectedError(
                f"{model}: the engine responded to a prompt with {status}: "
                f"{found['error']['message']:.500}"
            )
        text = found["choices"][0]["message"]["content"]
        responded_by = found["model"]
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterRejectedError(
            f"{model}: the engine responded to a prompt with {status} and no chat completion"
        ) from error
    if responded_by != model:
        raise ReceiptError(f"{model} was requested, {responded_by!r:.200} responded")
    # An empty completion is not coherent.
    return str(text or "")
