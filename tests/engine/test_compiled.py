"""The three ways compiled (the default on CPU) and sharded over two ranks, against the reference.

One engine per way: torch.compile on, tensor parallel size 2, GLM-4's fused MLP and grouped heads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reference_engine import Request, engine, max_logprob_diff, reference

from safegene_vllm.formats.profile import make_profile, save_profile
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

MIX = ("a", None, "b", "p", "a")
PROMPTS = [[5 + i, 9, 33, 77, 101 + i] for i in range(len(MIX))]


@pytest.fixture(scope="module", params=["llama", "glm4"])
def setup_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "a", family, [0.5, 1.0], seed=3, suffixes=("q_proj", "o_proj"))
    write_tenant(model, root / "b", family, [1.5, 0.2], seed=4)
    write_tenant(model, root / "p", family, [0.7, 0.9], adapter=False)
    shutil.copytree(model, root / "full")
    save_profile(make_profile(family.header, [0.7, 0.9]), root / "full")
    return root


@pytest.mark.parametrize("apply", ["gain", "composed", "weights"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_and_sharded_engines_match_the_reference(
    setup_dir: Path, apply: str, ranks: int
) -> None:
    if (ranks == 1) != (setup_dir.name.startswith("llama")):
        pytest.skip("llama compiled on one rank, glm4 compiled on two: every pairing is covered")
    full = apply == "weights"
    requests = [
        Request(p, None if full or n is None else setup_dir / n)
        for n, p in zip(MIX, PROMPTS, strict=True)
    ]
    model = setup_dir / ("full" if full else "model")
    expected = [
        reference(
            model, setup_dir / "family", setup_dir / "full" if full else a.tenant, [a.prompt]
        )[0]
        for a in requests
    ]
    settings = {"family": str(setup_dir / "family"), "apply": apply}
    with engine(model, settings, enforce_eager=False, tensor_parallel_size=ranks) as e:
        found = e.generate(requests)
        again = e.generate(requests[::-1])[::-1]
        with pytest.raises(Exception, match="replace weights under a safety vector"):
            e.llm.collective_rpc("reset_weights")
        receipts = e.receipts()
    assert [f.tokens for f in found] == [x.tokens for x in expected]
    assert max_logprob_diff(found, expected) <= 1e-3
    assert max_logprob_diff(again, expected) <= 1e-3
    assert [r.rank for r in receipts] == list(range(ranks))
    assert all(r.sites_applied == r.sites_expected > 0 for r in receipts)
