"""Every subject is asked every prompt, once: in chunks, and not again what was kept.

Not for what the answers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safegene_vllm.evaluation.backends import GenerationBackend
from safegene_vllm.evaluation.response_cache import ResponseCache, subject_digest
from safegene_vllm.evaluation.targets import Target, checkpoint_of
from safegene_vllm.formats.family import FamilyHeader

CHUNK = 128

Progress = Callable[[int, int, str], None]
"""Is called with how much is done, how much there is, and what is being done."""

Answers = Mapping[tuple[str, int, str], str]
"""By the subject's NAME/STATE, the token limit and the prompt."""


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


def generate_all(
    subjects: Sequence[Target],
    wanted: Mapping[int, Sequence[str]],
    answerer: GenerationBackend,
    *,
    header: FamilyHeader | None = None,
    kept: ResponseCache | None = None,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> Answers:
    """The answers to all prompts in `wanted`, which has them by their limit in tokens.

    A prompt that occurs twice is asked once; one that is in `kept` is not asked, and what is asked
    is kept there. Errors: those of the answerer.
    """
    limits = {tokens: list(dict.fromkeys(prompts)) for tokens, prompts in wanted.items()}
    total = len(subjects) * sum(map(len, limits.values()))
    found: dict[tuple[str, int, str], str] = {}
    # One checkpoint after the other, so that each is loaded once.
    for subject in sorted(subjects, key=lambda s: str(checkpoint_of(s) or "")):
        digest = ""
        if kept is not None:
            digest = subject_digest(
                subject, answerer.model, header, backend=answerer.backend, dtype=answerer.dtype
            )
        for tokens, prompts in limits.items():
            missing = []
            for prompt in prompts:
                known = None if kept is None else kept.find(digest, prompt, tokens)
                if known is None:
                    missing.append(prompt)
                else:
                    found[subject.key, tokens, prompt] = known
            for start in range(0, len(missing), chunk):
                progress(len(found), total, subject.key)
                some = missing[start : start + chunk]
                texts = answerer.answers(some, subject, tokens)
                for prompt, text in zip(some, texts, strict=True):
                    found[subject.key, tokens, prompt] = text
                    if kept is not None:
                        kept.add(digest, prompt, tokens, text)
        progress(len(found), total, subject.key)
    return found
