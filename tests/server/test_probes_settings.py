"""The settings of probes: off by default, every bad value named, paths counted from the file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from safegene_server.monitoring.probes import ProbeSettings
from safegene_server.settings import ENV, read_settings
from safegene_vllm.errors import ConfigError


def test_they_are_off() -> None:
    settings = ProbeSettings()
    assert not settings.enabled and settings.share <= 0.1 and settings.priority > 0


def test_every_bad_value_is_named() -> None:
    names = ("every_s", "concurrent", "max_tokens", "timeout_s", "share")
    with pytest.raises(ConfigError) as caught:
        ProbeSettings(every_s=0.0, concurrent=0, max_tokens=-1, timeout_s=math.inf, share=1.5)
    assert all(f"probes.{name} = " in str(caught.value) for name in names)
    for share in (0.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match=r"probes\.share"):
            ProbeSettings(share=share)


def test_they_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "safegene.yaml"
    path.write_text(
        "store: s\nprobes: {enabled: true, every_s: 60, prompts: own.jsonl, tenants: [acme]}\n"
        "tenants: {gate: {prompts: /else/where.jsonl}}\n"
    )
    found = read_settings({ENV: str(path)})
    assert found is not None
    assert found.probes == ProbeSettings(
        enabled=True, every_s=60.0, prompts=tmp_path / "own.jsonl", tenants=("acme",)
    )
    assert found.tenants.gate.prompts == Path("/else/where.jsonl")
    path.write_text("store: s\nprobes: {every: 60}\n")
    with pytest.raises(ConfigError, match=r"probes\.every = 60"):
        read_settings({ENV: str(path)})
    path.write_text("store: s\nprobes: {share: 2}\n")
    with pytest.raises(ConfigError, match=r"probes\.share = 2"):
        read_settings({ENV: str(path)})
