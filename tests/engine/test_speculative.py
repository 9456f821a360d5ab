"""Speculative decoding: drafted tokens carry their tenant's gains, and completions are unchanged.

Drafts by n-gram lookup, which needs no second model. The engine runs in a process of its own: after
one with drafts, this vLLM starts no other in the same process.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from reference_engine import Completion, Request, engine, max_logprob_diff

from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

TENANTS = {"a": [0.5, 1.0], "b": [0.8, 0.6], "c": [1.2, 0.0]}
MIX = ("a", "b", None, "c", "a", None)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
DRAFTS |= {"prompt_lookup_min": 1}
TOKENS = 150


def requests(root: Path) -> list[Request]:
    """Prompts that repeat themselves, so that there is something to draft from."""
    return [
        Request([5 + i, 9, 33, 5 + i, 9, 33, 5 + i, 9], root / name if name else None)
        for i, name in enumerate(MIX)
    ]


def drafted(root: Path, apply: str) -> tuple[list[Completion], dict[str, Any]]:
    """Completions of an engine with drafts, and its counts of them by metric."""
    settings = {"family": str(root / "family"), "apply": apply}
    options = {"speculative_config": DRAFTS, "disable_log_stats": False}
    with engine(root / "model", settings, **options) as e:
        found = e.generate(requests(root), TOKENS)
        counts = {m.name: m.value for m in e.llm.get_metrics() if hasattr(m, "value")}
    return found, counts


@pytest.mark.parametrize("apply", ["gain", "composed"])
def test_drafts_change_no_completion(tmp_path: Path, apply: str) -> None:
    model = make_model("llama", tmp_path / "model")
    family = write_family(model, tmp_path / "family")
    for seed, (name, coefficients) in enumerate(TENANTS.items(), 10):
        write_tenant(model, tmp_path / name, family, coefficients, seed=seed)
    with engine(model, {"family": str(tmp_path / "family"), "apply": apply}) as e:
        expected = e.generate(requests(tmp_path), TOKENS)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found, counts = pool.submit(drafted, tmp_path, apply).result(timeout=300)
    assert [f.tokens for f in found] == [x.tokens for x in expected]
    assert max_logprob_diff(found, expected) <= 1e-3
    offered = counts["vllm:spec_decode_num_draft_tokens"]
    assert offered > counts["vllm:spec_decode_num_accepted_tokens"] > 0
