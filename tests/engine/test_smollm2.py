"""The real model: three ways agree on SmolLM2-135M with the demo's own family and tenants.

float32: equal greedy tokens and |Δ logprob| ≤ 1e-3; bfloat16: mean |Δ logprob| ≤ 0.05 where the
texts are the same. Mixed batches, chat prompts written for the project.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from reference_engine import Completion, Request, engine, max_logprob_diff, reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.base_model import merge_adapter, write_base
from safegene_vllm.composition import delta
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import load_profile, save_profile

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
TENANTS = ("sentiment", "topic", "writer")
MIX = ("topic", "sentiment", None, "writer", "topic", None)
QUESTIONS = (
    "Which topic does this headline belong to: World, Sports, Business or Science?\n\nRain stops",
    "Is the sentiment of this review positive or negative?\n\nI would buy it again.",
    "Why do leaves change colour?",  # codespell:ignore colour
    "How do I break into somebody else's email account?",
    "Name three rivers in Europe.",
    "How can I kill a frozen program?",
)
TOKENS = 16


@pytest.fixture(scope="module")
def setup_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent, and the topic tenant as a full checkpoint in float32 and bfloat16."""
    build = ROOT / "build" / "smollm2"
    parent = merge_adapter(write_base(build / "base"), EXAMPLE / "parent", build / "parent")
    root = tmp_path_factory.mktemp("smollm2")
    (root / "parent").symlink_to(parent)
    net = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    modules = dict(net.named_modules())
    with torch.no_grad():
        for site, lora in load_adapter(EXAMPLE / "tenants" / "topic").lora_weights.items():
            modules[site].weight += delta(lora.folded(), 1.0)
    for dtype in ("float32", "bfloat16"):
        net.to(getattr(torch, dtype)).save_pretrained(root / dtype)
        save_profile(load_profile(EXAMPLE / "tenants" / "topic"), root / dtype)
    return root


@pytest.fixture(scope="module")
def prompts(setup_dir: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(setup_dir / "parent")
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def three_ways(
    setup_dir: Path, prompts: list[list[int]], dtype: str, texts: list[Completion]
) -> dict[str, list[Completion]]:
    """`texts` scored by each way; the weight load knows only the topic tenant."""
    requests = [
        Request(p, EXAMPLE / "tenants" / t if t else None)
        for t, p in zip(MIX, prompts, strict=True)
    ]
    settings = {"family": str(EXAMPLE / "family")}
    found = {}
    for apply in ("gain", "composed"):
        options = {"dtype": dtype, "max_lora_rank": 16, "max_loras": 4}
        with engine(setup_dir / "parent", {**settings, "apply": apply}, **options) as e:
            found[apply] = e.generate(requests, TOKENS), e.score(requests, texts)
            assert e.receipts()[0].sites_applied == len(
                read_family_header(EXAMPLE / "family").sites
            )
    with engine(setup_dir / dtype, {**settings, "apply": "weights"}, dtype=dtype) as e:
        topics = [Request(a.prompt) for a in topic_only(requests)]
        found["weights"] = e.generate(topics, TOKENS), e.score(topics, topic_only(texts))
    return found


def topic_only(values: list) -> list:
    return [value for value, tenant in zip(values, MIX, strict=True) if tenant == "topic"]


@pytest.fixture(scope="module")
def expected(setup_dir: Path, prompts: list[list[int]]) -> list[Completion]:
    return [
        reference(
            setup_dir / "parent",
            EXAMPLE / "family",
            EXAMPLE / "tenants" / t if t else None,
            [p],
            TOKENS,
        )[0]
        for t, p in zip(MIX, prompts, strict=True)
    ]


def test_float32(setup_dir: Path, prompts: list[list[int]], expected: list[Completion]) -> None:
    for apply, (completions, scores) in three_ways(setup_dir, prompts, "float32", expected).items():
        wanted = topic_only(expected) if apply == "weights" else expected
        assert [c.tokens for c in completions] == [c.tokens for c in wanted], apply
        assert max_logprob_diff(completions, wanted) <= 1e-3, apply
        assert max_logprob_diff(scores, wanted) <= 1e-3, apply


def test_bfloat16(setup_dir: Path, prompts: list[list[int]], expected: list[Completion]) -> None:
    """The same texts scored by each way: rounding may choose another token, not another model."""
    found = three_ways(setup_dir, prompts, "bfloat16", expected)
    gain = found["gain"][1]
    assert mean_gap(found["composed"][1], gain) <= 0.05
    assert mean_gap(found["weights"][1], topic_only(gain)) <= 0.05


def mean_gap(left: list[Completion], right: list[Completion]) -> float:
    gap = fmean(
        abs(p - q)
        for a, b in zip(left, right, strict=True)
        for p, q in zip(a.logprobs, b.logprobs, strict=True)
    )
    print(f"mean |Δ logprob| {gap:.4f}")
    return gap


def test_the_demos_profiles_are_for_the_demos_family() -> None:
    header = read_family_header(EXAMPLE / "family")
    for name in (*TENANTS, "support"):
        assert load_profile(EXAMPLE / "tenants" / name).family == header.digest
