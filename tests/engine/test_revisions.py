"""A revision that changes coefficients alone: weights are not read again, completions are those of
a cold engine, and removing the old revision leaves the new one whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from reference_engine import Request, engine

from safegene_vllm.errors import AdapterRejectedError
from safegene_vllm.plugin import validation
from safegene_vllm.plugin.staging import REQUIRED_FILES, Staging
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

PROMPT = [3 + (7 * i) % 300 for i in range(40)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Revisions as a registry's store lays them out: one read-only adapter under several names."""
    root = tmp_path_factory.mktemp("store")
    model = make_model("llama", root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "adapter", family, [0.0, 0.0], seed=3)
    for name, row in {"r1": [0.5, 1.0], "r2": [2.0, 0.3], "r3": [1.0, 0.0]}.items():
        write_tenant(model, root / name, family, row, adapter=False)
        for file in REQUIRED_FILES["adapter"]:
            (root / "adapter" / file).chmod(0o444)
            os.link(root / "adapter" / file, root / name / file)
    write_tenant(model, root / "other", family, [2.0, 0.3], seed=4)
    return root


@pytest.mark.parametrize("apply", ["gain", "composed"])
def test_a_new_revision_generates_as_a_cold_engine_would(
    store: Path, apply: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    settings = {"family": str(store / "family"), "apply": apply}

    def counted(directory: Path) -> object:
        read.append(str(directory))
        return admission_load(directory)

    admission_load = validation.load_adapter
    with engine(store / "model", settings, max_lora_rank=16) as cold:
        expected = cold.generate([Request(PROMPT, store / "r2")])
    with engine(store / "model", settings, max_lora_rank=16) as e:
        monkeypatch.setattr(validation, "load_adapter", counted)
        e.add(store / "r1", "acme@1")
        first = len(read)
        before = e.generate([Request(PROMPT, store / "r1", "acme@1")])
        e.add(store / "r2", "acme@2")
        assert (len(read) == first) == (apply == "gain")
        e.add(store / "other", "globex@1")
        one, two = Request(PROMPT, store / "r1", "acme@1"), Request(PROMPT, store / "r2", "acme@2")
        assert e.generate([one]) == before and e.generate([two]) == expected
        together = [completion.tokens for completion in e.generate([one, two])]
        assert together == [before[0].tokens, expected[0].tokens]
        assert before != expected
        e.llm.llm_engine.remove_lora(1)
        assert e.generate([Request(PROMPT, store / "r2", "acme@2")]) == expected
        assert {a.name for r in e.receipts() for a in r.adapters} == {"acme@2", "globex@1"}


def test_an_evicted_revision_is_loaded_again_from_its_own_copy(store: Path) -> None:
    settings = {"family": str(store / "family")}
    with engine(store / "model", settings, max_loras=1, max_cpu_loras=1) as e:
        requests = [Request(PROMPT, store / n, f"acme@{n[1]}") for n in ("r1", "r2", "r3")]
        cold = [e.generate([request]) for request in requests]
        assert [e.generate([request]) for request in requests] == cold
        assert len({completion.logprobs for found in cold for completion in found}) == 3


def test_staging_links_only_read_only_files_of_several_names(store: Path, tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    one, two = (staging.copy(store / name, name, ()) for name in ("r1", "r2"))
    weights = "adapter_model.safetensors"
    assert one.digests[weights] == two.digests[weights]
    assert one.digests["safegene.json"] != two.digests["safegene.json"]
    assert (one.directory / weights).samefile(two.directory / weights)
    assert not (one.directory / weights).samefile(store / "r1" / weights)
    staging.drop(one.directory)
    three = staging.copy(store / "r3", "r3", ())
    assert (three.directory / weights).samefile(two.directory / weights)
    writable = tmp_path / "writable"
    shutil.copytree(store / "r1", writable)
    (writable / weights).chmod(0o644)
    os.link(writable / weights, tmp_path / "second-name")
    before = staging.copy(writable, "w", ())
    (writable / weights).write_bytes((store / "other" / weights).read_bytes())
    after = staging.copy(writable, "w", ())
    assert before.digests[weights] != after.digests[weights]


def test_a_link_never_admits_what_was_rejected(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    os.link(store / "adapter" / "adapter_model.safetensors", outside / "adapter_model.safetensors")
    staging = Staging(tmp_path / "staging")
    staging.copy(store / "r1", "r1", (store,))
    with pytest.raises(AdapterRejectedError, match=r"outside safegene\.adapter_roots"):
        staging.copy(outside, "outside", (store,))
