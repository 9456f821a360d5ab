"""The vLLM backend generates like the merged float32 model, for every kind of target.

Real engines on a tiny model; the transformers backend is the reference, and is itself compared with
the reference of tests/engines.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recipe_setup import tiny_chat_model

from safegene_vllm.errors import AdapterRejectedError, BoundsError, ConfigError
from safegene_vllm.evaluation.backends import TransformersBackend
from safegene_vllm.evaluation.targets import Target, before_and_after
from safegene_vllm.formats.family import Family, load_family
from safegene_vllm.formats.profile import make_profile, save_profile
from safegene_vllm.offline.generation_backend import VllmBackend, slot_rank
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

PROMPTS = ["What is it?", "Tell me more", "x", "a longer question, about nothing at all"]
TOKENS = 10
ENGINE = {"dtype": "float32", "context_tokens": 128, "kv_cache_memory_bytes": 64 << 20}
PARENT = Target("model", "parent")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    model = tiny_chat_model(root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0], seed=3)
    write_tenant(model, root / "globex", family, [1.5, 0.2], seed=4, rank=12)
    write_tenant(model, root / "bare", family, [0.7, 0.9], adapter=False)
    write_tenant(model, root / "plain", None, None, seed=5)
    make_model("llama", root / "full", initializer_range=0.17)
    for path in model.glob("*token*"):
        shutil.copy(path, root / "full")
    for path in model.glob("*.jinja"):
        shutil.copy(path, root / "full")
    save_profile(make_profile(family.header, [0.9, 0.4]), root / "full")
    return root


@pytest.fixture(scope="module")
def family(root: Path) -> Family:
    return load_family(root / "family")


@pytest.mark.engine
def test_every_target_generates_like_the_merged_model(root: Path, family: Family) -> None:
    """More targets than slots, strengths of one tenant, a full checkpoint in its own engine."""
    tenants = [
        target
        for name in ("acme", "globex", "bare", "full")
        for target in before_and_after(name, root / name, family.header)
    ]
    strengths = [
        Target("acme", f"strength {n}", root / "acme", (0.3 * n, 2.0 - 0.3 * n)) for n in range(5)
    ]
    others = [
        Target("base", "strength", None, (1.5, 0.2)),
        Target("base", "zero", None, (0.0, 0.0)),
        Target("full", "strength", root / "full", (0.1, 1.9)),
        Target("plain", "as it is", root / "plain"),
    ]
    targets = [PARENT, *tenants, *strengths, *others]
    ours = VllmBackend(root / "model", targets, root / "family", **ENGINE)
    theirs = TransformersBackend(root / "model", family, dtype="float32")
    found = {s.key: ours.generate(PROMPTS, s, TOKENS) for s in targets}
    again = {
        s.key: ours.generate(PROMPTS[:2], s, TOKENS) for s in (*tenants[:2], *strengths, PARENT)
    }
    ours.close()
    expected = {s.key: theirs.generate(PROMPTS, s, TOKENS) for s in targets}
    assert found == expected
    assert again == {key: expected[key][:2] for key in again}, "also after other targets"
    assert found["base/zero"] == found["bare/before"] == found["model/parent"]
    distinct = {tuple(texts) for texts in found.values()}
    assert len(distinct) == len(found) - 2


@pytest.mark.engine
def test_without_a_family_adapters_are_served_as_they_are(root: Path, family: Family) -> None:
    targets = [PARENT, Target("plain", "as it is", root / "plain")]
    ours = VllmBackend(root / "model", targets, **ENGINE)
    theirs = TransformersBackend(root / "model", dtype="float32")
    for target in targets:
        found = ours.generate(PROMPTS, target, TOKENS)
        assert found == theirs.generate(PROMPTS, target, TOKENS)
    with pytest.raises(ConfigError, match="other/x was not among the targets"):
        ours.generate(PROMPTS, Target("other", "x"), TOKENS)
    ours.close()


def test_invalid_coefficients_are_reported_before_an_engine_starts(root: Path) -> None:
    with pytest.raises(BoundsError, match=r"acme/strength: layer 0 has coefficient 9\.0"):
        VllmBackend(
            root / "model", [Target("acme", "strength", root / "acme", (9.0, 0.0))], root / "family"
        )
    with pytest.raises(ConfigError, match="no family"):
        VllmBackend(root / "model", [Target("acme", "after", root / "acme")])
    with pytest.raises(AdapterRejectedError, match="is a family"):
        VllmBackend(
            root / "model", [Target("f", "x", root / "family", (0.0, 0.0))], root / "family"
        )


def test_slots_hold_the_largest_rank(root: Path) -> None:
    acme, globex = Target("a", "x", root / "acme"), Target("g", "x", root / "globex")
    assert [slot_rank(s) for s in ([PARENT], [acme], [acme, globex])] == [8, 8, 16]
