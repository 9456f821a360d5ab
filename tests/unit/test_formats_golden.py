"""Golden files: format version 1 byte for byte, and its digests computed from the page alone.

The files may change only together with `format_version`. Nothing here calls the code that is
being checked to find out what is right: `digest_by_the_page` follows docs/reference/format.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import ramp

from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.formats.family import (
    Base,
    Family,
    SelectedLayer,
    load_family,
    make_family,
    read_family_header,
    save_family,
)
from safegene_vllm.formats.profile import (
    Profile,
    check_profile,
    load_profile,
    make_profile,
    save_profile,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILY_DIGEST = "sha256:56f7411f3047b5773d95670c5d5bc3a44284b98981e923328c081b640f36e32d"
PROFILE_DIGEST = "sha256:cc8a4dccae53ef09d8f54d0f694946ea68bdfa03e9a31b4ecac246db6d70f897"


def golden_family() -> Family:
    """Two of three layers, two ranks, two dtypes, a name that is not ASCII."""
    lora_weights = {
        "model.layers.0.self_attn.q_proj": LoRAWeights(ramp(2, 4), ramp(3, 2, 9)),
        "model.layers.0.mlp.down_proj": LoRAWeights(ramp(2, 3, 15), ramp(4, 2, 21)),
        "model.layers.2.self_attn.q_proj": LoRAWeights(
            ramp(1, 4, 29, torch.bfloat16), ramp(3, 1, 33, torch.bfloat16)
        ),
    }
    return make_family(
        "goldene Familie α",
        Base("LlamaForCausalLM", 3, "sha256:" + "0123456789abcdef" * 4),
        lora_weights,
        layers=[SelectedLayer(0, 0.1), SelectedLayer(2, None)],
        bounds=(0.0, 2.5),
        recipe={"method": "contrast", "seed": 7, "learning_rate": 1e-05, "layers": [0, 2]},
    )


def golden_profile() -> Profile:
    record = {"method": "line search", "seed": 7, "loss": 0.30000000000000004}
    return make_profile(golden_family().header, [0.1, 0.0, 2.0], record)


def digest_by_the_page(description: dict[str, Any], tensors: dict[str, Any]) -> str:
    covered = {k: v for k, v in description.items() if k != "digest" and not k.startswith("x_")}
    text = json.dumps({**covered, **tensors}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


def test_the_family_is_written_byte_for_byte(tmp_path: Path) -> None:
    save_family(golden_family(), tmp_path / "family")
    names = {"adapter_config.json", "adapter_model.safetensors", "safegene.json"}
    assert {p.name for p in (tmp_path / "family").iterdir()} == names
    for name in names:
        expected = (GOLDEN / "family" / name).read_bytes()
        assert (tmp_path / "family" / name).read_bytes() == expected, name


def test_the_profile_is_written_byte_for_byte(tmp_path: Path) -> None:
    save_profile(golden_profile(), tmp_path)
    expected = (GOLDEN / "profile" / "safegene.json").read_bytes()
    assert (tmp_path / "safegene.json").read_bytes() == expected


def test_the_golden_files_are_read() -> None:
    family, profile = load_family(GOLDEN / "family"), load_profile(GOLDEN / "profile")
    assert family.header == golden_family().header == read_family_header(GOLDEN / "family")
    assert profile == golden_profile()
    check_profile(profile, family.header)
    for site, lora in golden_family().lora_weights.items():
        assert torch.equal(family.lora_weights[site].a, lora.a)
        assert torch.equal(family.lora_weights[site].b, lora.b)


def test_the_digests_are_these() -> None:
    assert golden_family().digest == FAMILY_DIGEST
    assert golden_profile().digest == PROFILE_DIGEST


def test_the_family_digest_follows_from_the_page_and_the_bytes() -> None:
    raw = (GOLDEN / "family" / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    tensors = {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest(),
        }
        for name, entry in header.items()
    }
    description = json.loads((GOLDEN / "family" / "safegene.json").read_text())
    assert digest_by_the_page(description, {"tensors": tensors}) == FAMILY_DIGEST


def test_the_profile_digest_follows_from_the_page() -> None:
    description = json.loads((GOLDEN / "profile" / "safegene.json").read_text())
    assert digest_by_the_page(description, {}) == PROFILE_DIGEST


@pytest.mark.parametrize("name", ["family/safegene.json", "profile/safegene.json"])
def test_every_field_is_on_the_page(name: str) -> None:
    page = (GOLDEN.parent.parent / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    for key in json.loads((GOLDEN / name).read_text()):
        assert f"`{key}`" in page, key


if __name__ == "__main__":
    # Only together with a new format version.
    save_family(golden_family(), GOLDEN / "family")
    save_profile(golden_profile(), GOLDEN / "profile")
    print(golden_family().digest, golden_profile().digest)
