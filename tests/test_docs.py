"""Documentation under test: what exists is described, and what is described exists."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from safegene_server.routes import load_router, router
from safegene_vllm.cli import COMMANDS, build_app
from safegene_vllm.plugin.host import NEWEST, OLDEST
from safegene_vllm.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SERVING = (ROOT / "docs" / "serving.md").read_text()
README = (ROOT / "README.md").read_text()


def test_every_setting_and_no_other_is_documented() -> None:
    section = SERVING.split("## Settings")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(Settings.model_fields)


def test_every_route_and_no_other_is_documented() -> None:
    section = SERVING.split("## Routes")[1].split("\n## ")[0]
    described = set(re.findall(r"^\| `(\w+ /[\w/]+)` \|", section, re.MULTILINE))
    real = {
        f"{method} {route.path}"
        for route in (*router.routes, *load_router.routes)
        for method in route.methods
    }
    assert described == real


def test_the_supported_versions_are_the_documented_ones() -> None:
    low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    assert f"vLLM outside {low} to {high}" in SERVING
    assert f"{low} to {high}" in README


def test_every_command_is_in_the_readme_and_teaches() -> None:
    command = get_command(build_app())
    assert set(command.commands) == set(COMMANDS)
    for name in COMMANDS:
        assert f"safegene {name}" in README, name
        for part in getattr(
            command.commands[name], "commands", {"": command.commands[name]}
        ).values():
            for parameter in part.params:
                told = getattr(parameter, "help", None)
                assert parameter.name == "help" or told, (name, parameter)


def test_the_file_tree_of_the_readme_is_real() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    paths = re.findall(r"^(\S+)", tree, re.MULTILINE)
    assert paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
