"""Decisions of `safegene verify` before it starts an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.offline.verify import _rank_bucket
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


def test_slots_hold_every_tenant_with_the_vector_or_say_why_not(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    write_family(model, tmp_path / "family", rank=4)
    write_tenant(model, tmp_path / "small", None, None, rank=5)
    write_tenant(model, tmp_path / "large", None, None, rank=509)
    assert _rank_bucket([], tmp_path / "family") == 8
    assert _rank_bucket([tmp_path / "small"], tmp_path / "family") == 16
    with pytest.raises(ConfigError, match="rank 513: vLLM's slots hold up to 512"):
        _rank_bucket([tmp_path / "small", tmp_path / "large"], tmp_path / "family")
