"""Symbolic links in a tenant's directory: a Hugging Face snapshot's own blobs, and no others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from safegene_vllm.errors import AdapterRejectedError
from safegene_vllm.plugin.staging import Staging, check_readable
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A tenant as huggingface_hub caches it: every file a link to a blob."""
    model = make_model("llama", tmp_path / "model")
    tenant = tmp_path / "tenant"
    write_tenant(model, tenant, write_family(model, tmp_path / "family"), 1.0)
    repository = tmp_path / "hub" / "models--acme--support"
    found = repository / "snapshots" / "0123"
    found.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in tenant.iterdir():
        data = file.read_bytes()
        blob = hashlib.sha256(data).hexdigest()
        (repository / "blobs" / blob).write_bytes(data)
        (found / file.name).symlink_to(f"../../blobs/{blob}")
    return found


def test_a_snapshot_below_a_root_is_staged(snapshot: Path, tmp_path: Path) -> None:
    roots = [tmp_path / "hub"]
    assert check_readable(snapshot, roots) == snapshot
    staging = Staging(tmp_path / "staging")
    staged = staging.copy(snapshot, "acme", roots)
    names = {"adapter_config.json", "adapter_model.safetensors", "safegene.json"}
    assert set(staged.digests) == names
    for name in names:
        assert not (staged.directory / name).is_symlink()
        assert (staged.directory / name).read_bytes() == (snapshot / name).read_bytes()


@pytest.mark.parametrize("name", ["safegene.json", "adapter_model.safetensors"])
def test_a_link_to_anything_else_is_rejected_when_checked_and_when_staged(
    snapshot: Path, tmp_path: Path, name: str
) -> None:
    other = tmp_path / "hub" / "other"
    other.write_bytes((snapshot / name).read_bytes())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../../other")
    roots = [tmp_path / "hub"]
    with pytest.raises(AdapterRejectedError, match=f"{name} cannot be read.*Hugging Face cache"):
        check_readable(snapshot, roots)
    with pytest.raises(AdapterRejectedError, match="cannot be read"):
        Staging(tmp_path / "staging").copy(snapshot, "acme", roots)
    # Without roots every file of the machine may be named, through links too.
    assert check_readable(snapshot, []) == snapshot


def test_blobs_outside_the_root_are_not_read(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError, match="cannot be read"):
        check_readable(snapshot, [snapshot.parent])
