"""Inputs of the command: NAME=VALUE options, all errors reported together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipe_setup import tiny_chat_model

from safegene_vllm.errors import (
    AdapterRejectedError,
    ConfigError,
    FamilyMismatchError,
    SafegeneError,
)
from safegene_vllm.evaluation.inputs import Inputs, limited, named, read_inputs
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    model = tiny_chat_model(root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0])
    write_tenant(model, root / "plain", None, None)
    make_model("llama", root / "wide", hidden_size=256)
    rows = [{"prompt": f"prompt {n} " + "x" * 20 * n, "answer": "yes"} for n in range(5)]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def read(root: Path, **more: Any) -> Inputs:
    options: dict[str, Any] = {
        "family": root / "family",
        "tenants": [f"acme={root}/acme"],
        "sets": {"harmful": [f"bad={root}/p.jsonl"]},
        "judges": ["coherence"],
        "max_tokens": 32,
        "task_tokens": 4,
    }
    return read_inputs(more.pop("model", root / "model"), **(options | more))


def test_the_parent_and_every_tenant_before_and_after(root: Path) -> None:
    found = read(root, tasks=[f"mine={root}/p.jsonl"])
    assert [s.key for s in found.targets] == ["model/parent", "acme/before", "acme/after"]
    assert found.sets["bad"].kind == "harmful" and len(found.sets["bad"].prompts) == 5
    assert [task.name for task in found.tasks] == ["mine"]
    assert found.longest_tokens == len("<u:prompt 4 " + "x" * 80 + "<a:") + 32


def test_the_limit_is_for_sources_without_their_own(root: Path) -> None:
    sets = {"harmful": [f"a={root}/p.jsonl", f"b={root}/p.jsonl?limit=3"]}
    found = read(root, sets=sets, tasks=[f"mine={root}/p.jsonl?answer=answer"], limit=2)
    assert [s.data.source for s in found.sets.values()] == ["p.jsonl?limit=2", "p.jsonl?limit=3"]
    assert found.tasks[0].data.source == "p.jsonl?answer=answer&limit=2"
    assert (len(found.sets["a"].prompts), len(found.sets["b"].prompts)) == (2, 3)
    assert limited("x?prelimit=1", 2) == "x?prelimit=1&limit=2" and limited("x", None) == "x"


def test_names_and_values() -> None:
    assert named("a-b_1=x.csv?label=safe", "--task") == ("a-b_1", "x.csv?label=safe")
    for wrong in ("x.csv?label=safe", "a=", "=x", "a b=x", "a/b=x", "x.csv"):
        with pytest.raises(ConfigError, match=r"--task .* is not NAME=VALUE.*--task mine="):
            named(wrong, "--task")


def test_all_errors_are_reported_together(root: Path) -> None:
    with pytest.raises(SafegeneError) as caught:
        read(
            root,
            tenants=[f"plain={root}/plain", f"acme={root}/acme", f"acme={root}/acme", "odd"],
            sets={
                "harmful": [f"a={root}/none.csv", f"b={root}/p.jsonl"],
                "benign": [f"b={root}/p.jsonl?nothing=1"],
                "over_refusal": [f"c={root}/p.jsonl?nothing=1"],
            },
            tasks=[f"sst2={root}/p.jsonl", f"t={root}/p.jsonl", f"t={root}/p.jsonl"],
            judges=["gpt4", "coherence"],
        )
    message = str(caught.value)
    for part in (
        "9 errors:",
        "--harmful a",
        "none.csv cannot be read",
        "--benign b: another set has this name",
        "--over-refusal c",
        "no column nothing",
        "--task sst2",
        "needs the columns label, sentence",
        "--task t: another task has this name",
        "judge 'gpt4' is not known",
        "'plain'",
        "has no profile",
        "--tenant acme: another tenant",
        "--tenant 'odd' is not NAME=VALUE",
    ):
        assert part in message, part


def test_what_does_not_fit_together(root: Path) -> None:
    with pytest.raises(ConfigError, match="--tenant acme is given without --family"):
        read(root, family=None)
    with pytest.raises(FamilyMismatchError, match="wide is a LlamaForCausalLM"):
        read(root, model=root / "wide")
    with pytest.raises(ConfigError, match="holds: family; expected a Hugging Face checkpoint"):
        read(root, model=root / "family")
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        read(root, sets={"harmful": []})
    with pytest.raises(ConfigError, match="--tenant model: another tenant, or the model"):
        read(root, tenants=[f"model={root}/acme"])


def test_a_vector_is_not_applied_to_weights_that_carry_one(root: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    shutil.copytree(root / "model", exported)
    (exported / "safegene-export.json").write_text("{}")
    with pytest.raises(AdapterRejectedError, match=r"exported holds .*added twice"):
        read(root, model=exported, tenants=[])
    assert read(root, model=exported, family=None, tenants=[]).header is None, "as it is it may"


def test_prompts_longer_than_the_context_are_named(root: Path, tmp_path: Path) -> None:
    """Also where it is a tenant's own checkpoint whose context is too short."""
    short = tmp_path / "short"
    shutil.copytree(root / "model", short)
    shutil.copy(root / "acme" / "safegene.json", short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    read(root, tenants=[])
    with pytest.raises(ConfigError, match=r"--harmful bad: 2 prompts .* rows 4 \(\d+ tokens\), 5"):
        read(root, tenants=[f"short={short}"])
