"""Three ways, one law: every way of application generates like the merged float32 reference.

Real vLLM, tiny models of four architectures, mixed batches. Eager here; compiled and sharded
engines in test_plugin_compiled.py, the real model in test_plugin_smollm2.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reference_engine import Request, engine, max_logprob_diff, reference

from safegene_vllm.formats.profile import load_profile, make_profile, save_profile
from safegene_vllm.formats.receipt import check_engine, check_tenant, gain_digest
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

TENANTS = {
    "a": {"coefficients": [0.5, 1.0], "seed": 10, "suffixes": ("q_proj", "o_proj", "down_proj")},
    "b": {"coefficients": [0.8, 0.6], "seed": 11},
    "c": {"coefficients": [1.2, 0.0], "seed": 12, "rank": 3},
    "profile_only": {"coefficients": [0.7, 0.9], "adapter": False},
}
MIX = ("a", "b", None, "c", "profile_only", "a", None, "b")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "glm4"])
def setup_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, family, tenants and a full checkpoint with a profile, of one architecture."""
    root = tmp_path_factory.mktemp(request.param)
    tied = request.param == "qwen2"
    model = make_model(request.param, root / "model", tie_word_embeddings=tied)
    family = write_family(model, root / "family")
    for name, options in TENANTS.items():
        write_tenant(model, root / name, family, **options)
    shutil.copytree(model, root / "full")
    save_profile(make_profile(family.header, [0.7, 0.9]), root / "full")
    return root


@pytest.fixture(scope="module")
def expected(setup_dir: Path) -> list:
    prompts = [[5 + i, 9, 33, 77, 101 + i] for i in range(len(MIX))]
    return [
        reference(setup_dir / "model", setup_dir / "family", setup_dir / n if n else None, [p])[0]
        for n, p in zip(MIX, prompts, strict=True)
    ]


def requests(setup_dir: Path) -> list[Request]:
    return [
        Request([5 + i, 9, 33, 77, 101 + i], setup_dir / n if n else None)
        for i, n in enumerate(MIX)
    ]


@pytest.mark.parametrize("apply", ["gain", "composed"])
def test_lora_slots_match_the_reference(setup_dir: Path, expected: list, apply: str) -> None:
    with engine(setup_dir / "model", {"family": str(setup_dir / "family"), "apply": apply}) as e:
        found = e.generate(requests(setup_dir))
        receipts = e.receipts()
    assert [f.tokens for f in found] == [x.tokens for x in expected]
    assert max_logprob_diff(found, expected) <= 1e-3
    header = receipts[0]
    check_engine(receipts, family=header.family)
    assert header.apply == apply
    assert header.sites_applied == header.sites_expected > 0
    for name in TENANTS:
        profile = load_profile(setup_dir / name)
        check_tenant(
            receipts,
            f"{setup_dir.name}/{name}",
            profile=profile.digest,
            gain=gain_digest(profile.coefficients),
        )


def test_weight_load_matches_the_reference(setup_dir: Path) -> None:
    prompts = [[5, 9, 33, 77, 101], [40, 41, 42], list(range(3, 60))]
    expected = reference(setup_dir / "model", setup_dir / "family", setup_dir / "full", prompts)
    settings = {"family": str(setup_dir / "family"), "apply": "weights"}
    with engine(setup_dir / "full", settings) as e:
        found = e.generate([Request(p) for p in prompts])
        receipts = e.receipts()
    assert [f.tokens for f in found] == [x.tokens for x in expected]
    assert max_logprob_diff(found, expected) <= 1e-3
    assert receipts[0].sites_applied == receipts[0].sites_expected > 0
