"""Checks of files as they are: style of YAML, Dockerfiles, Compose files.

Not for Kubernetes objects (objects) and not for anything of Prometheus (rules).
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.check import tools
from deploy.check.program import Word, complaint

YAML_STYLE = (
    "{extends: default, rules: {line-length: disable, document-start: disable, "
    "braces: {max-spaces-inside: 0}, comments: {min-spaces-from-content: 1}, "
    "truthy: {check-keys: false}}}"
)
TEMPLATES = "templates"
"""A chart's templates are no YAML until they are rendered."""


def yaml_files(root: Path) -> list[Path]:
    """Every YAML file below deploy/ but the chart's templates."""
    found = [p for end in ("yaml", "yml") for p in (root / "deploy").rglob(f"*.{end}")]
    return sorted(p for p in found if TEMPLATES not in p.parts)


def yaml_style(root: Path) -> list[str]:
    """yamllint, warnings included."""
    paths = yaml_files(root)
    if not paths:
        return ["deploy/ holds no YAML files"]
    said = complaint(
        [sys.executable, "-m", "yamllint", "--strict", "-f", "parsable", "-d", YAML_STYLE, *paths],
        cwd=root,
    )
    return [] if said is None else said.splitlines()


def dockerfiles(root: Path) -> list[str]:
    """hadolint over deploy/docker, its remarks included."""
    paths = sorted((root / "deploy" / "docker").glob("*.Dockerfile"))
    if len(paths) < 2:
        return [f"deploy/docker holds {len(paths)} Dockerfiles, expected gpu and cpu"]
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        raise tools.ToolsMissingError("hadolint is missing: install the `deploy` extra")
    said = complaint([hadolint, "--no-color", *paths], cwd=root)
    return [] if said is None else said.splitlines()


def compose(root: Path) -> list[str]:
    """`docker-compose config` for each way to run it, and once without what it must ask for."""
    program, folder = tools.find("docker-compose"), root / "deploy" / "compose"
    faults = []
    for device in ("gpu", "cpu"):
        ask: list[Word] = [
            program,
            "-f",
            "compose.yaml",
            "-f",
            f"compose.{device}.yaml",
            "config",
            "--quiet",
        ]
        said = complaint(ask, cwd=folder, env={"SAFEGENE_MODELS": "/srv/models"})
        if said:
            faults.append(f"compose.{device}.yaml: {said}")
        if complaint(ask, cwd=folder, env={"SAFEGENE_MODELS": ""}) is None:
            faults.append(f"compose.{device}.yaml: SAFEGENE_MODELS is not asked for")
    return faults + _mounts(root)


def _mounts(root: Path) -> list[str]:
    """Files and folders of this repository that compose.yaml mounts and that are not here."""
    import yaml

    described = yaml.safe_load((root / "deploy/compose/compose.yaml").read_text())
    sources = [
        mount["source"]
        for service in described["services"].values()
        for mount in service.get("volumes", ())
        if isinstance(mount, dict) and mount["source"].startswith(".")
    ]
    folder = root / "deploy" / "compose"
    return [
        f"compose.yaml mounts {source}, which is not here"
        for source in sources
        if not (folder / source).exists()
    ]
