"""Checks of YAML style, Dockerfiles, Compose files, and Prometheus and Alertmanager files."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from deploy.check import tools
from deploy.check.tools import error_output

YAML_STYLE = (
    "{extends: default, rules: {line-length: disable, document-start: disable, "
    "braces: {max-spaces-inside: 0}, comments: {min-spaces-from-content: 1}, "
    "truthy: {check-keys: false}}}"
)


def yaml_style(root: Path) -> list[str]:
    """yamllint, warnings included, over every YAML file but the chart's templates."""
    found = [p for end in ("yaml", "yml") for p in (root / "deploy").rglob(f"*.{end}")]
    paths = sorted(path for path in found if "templates" not in path.parts)
    if not paths:
        return ["deploy/ contains no YAML files"]
    lint = [sys.executable, "-m", "yamllint", "--strict", "-f", "parsable", "-d", YAML_STYLE]
    return (error_output([*lint, *paths], cwd=root) or "").splitlines()


def dockerfiles(root: Path) -> list[str]:
    """hadolint over deploy/docker, its remarks included."""
    paths = sorted((root / "deploy" / "docker").glob("*.Dockerfile"))
    if len(paths) < 2:
        return [f"deploy/docker contains {len(paths)} Dockerfiles, expected gpu and cpu"]
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        raise tools.ToolsMissingError("hadolint is missing: install the `deploy` extra")
    return (error_output([hadolint, "--no-color", *paths], cwd=root) or "").splitlines()


def compose(root: Path) -> list[str]:
    """`docker-compose config` per device, with and without its required variable; all mounts."""
    program, folder = tools.find("docker-compose"), root / "deploy" / "compose"
    errors = []
    for device in ("gpu", "cpu"):
        files = ["-f", "compose.yaml", "-f", f"compose.{device}.yaml"]
        command = [program, *files, "config", "--quiet"]
        error = error_output(command, cwd=folder, env={"SAFEGENE_MODELS": "/srv/models"})
        if error:
            errors.append(f"compose.{device}.yaml: {error}")
        if error_output(command, cwd=folder, env={"SAFEGENE_MODELS": ""}) is None:
            errors.append(f"compose.{device}.yaml: SAFEGENE_MODELS is not required")
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    mounts = [m for s in services for m in s.get("volumes", ()) if isinstance(m, dict)]
    errors += [
        f"compose.yaml mounts {mount['source']}, which does not exist"
        for mount in mounts
        if mount["source"].startswith(".") and not (folder / mount["source"]).exists()
    ]
    return errors


def prometheus(root: Path) -> list[str]:
    """promtool over every rule file (lint remarks included) and over prometheus.yml."""
    promtool, folder = tools.find("promtool"), root / "deploy" / "prometheus"
    rules = sorted(folder.glob("rules/*.yml"))
    if not rules:
        return ["deploy/prometheus/rules contains no rules"]
    errors = [error_output([promtool, "check", "rules", "--lint-fatal", *rules], cwd=folder)]
    with tempfile.TemporaryDirectory() as scratch:
        # promtool requires the key's file, a secret that exists only where Prometheus runs.
        copy, key = Path(scratch, "prometheus"), Path(scratch, "key")
        shutil.copytree(folder, copy)
        key.write_text("a-key")
        config = copy / "prometheus.yml"
        text = config.read_text().replace("/run/secrets/safegene_metrics_key", str(key))
        config.write_text(text)
        command = [promtool, "check", "config", "--lint-fatal", config]
        errors.append(error_output(command, cwd=copy))
    return [error for error in errors if error]


def rule_tests(root: Path) -> list[str]:
    """promtool over the tests of the rules."""
    folder = root / "deploy" / "prometheus" / "tests"
    tests = sorted(path.name for path in folder.glob("*.yml"))
    if not tests:
        return ["deploy/prometheus/tests contains no tests"]
    error = error_output([tools.find("promtool"), "test", "rules", *tests], cwd=folder)
    return [error] if error else []


def alertmanager(root: Path) -> list[str]:
    """amtool over alertmanager.yml."""
    command = [tools.find("amtool"), "check-config", "alertmanager.yml"]
    error = error_output(command, cwd=root / "deploy" / "prometheus")
    return [error] if error else []
