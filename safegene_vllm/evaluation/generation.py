"""Generation of all responses that an evaluation needs: each once, in chunks, or from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safegene_vllm.evaluation.backends import GenerationBackend
from safegene_vllm.evaluation.response_cache import ResponseCache, target_digest
from safegene_vllm.evaluation.targets import Target, checkpoint_of
from safegene_vllm.formats.family import FamilyHeader

CHUNK = 128

Progress = Callable[[int, int, str], None]
"""Callback with the work done, the total, and a description."""

Responses = Mapping[tuple[str, int, str], str]
"""By the target's NAME/STATE, the token limit and the prompt."""


def silent(done: int, total: int, what: str) -> None:
    """A Progress that shows nothing."""


def generate_all(
    targets: Sequence[Target],
    prompts_by_limit: Mapping[int, Sequence[str]],
    backend: GenerationBackend,
    *,
    header: FamilyHeader | None = None,
    cache: ResponseCache | None = None,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> Responses:
    """Responses of all targets to the prompts, which are given by their limit in tokens.

    Repeated prompts are generated once; `cache` supplies responses and stores new ones.
    Errors: those of the backend.
    """
    limits = {tokens: list(dict.fromkeys(some)) for tokens, some in prompts_by_limit.items()}
    total = len(targets) * sum(map(len, limits.values()))
    responses: dict[tuple[str, int, str], str] = {}
    # Sorted by checkpoint, so that each is loaded once.
    for target in sorted(targets, key=lambda t: str(checkpoint_of(t) or "")):
        digest = ""
        if cache is not None:
            digest = target_digest(
                target, backend.model, header, backend=backend.backend, dtype=backend.dtype
            )
        for tokens, prompts in limits.items():
            missing = []
            for prompt in prompts:
                cached = None if cache is None else cache.find(digest, prompt, tokens)
                if cached is None:
                    missing.append(prompt)
                else:
                    responses[target.key, tokens, prompt] = cached
            for start in range(0, len(missing), chunk):
                progress(len(responses), total, target.key)
                some = missing[start : start + chunk]
                texts = backend.generate(some, target, tokens)
                for prompt, text in zip(some, texts, strict=True):
                    responses[target.key, tokens, prompt] = text
                    if cache is not None:
                        cache.add(digest, prompt, tokens, text)
        progress(len(responses), total, target.key)
    return responses
