"""Checks of deploy/prometheus by Prometheus's own programs: rules, their tests, configurations."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deploy.check import tools
from deploy.check.program import complaint


def prometheus(root: Path) -> list[str]:
    """promtool over every rule file (its lint remarks included) and over prometheus.yml."""
    promtool, folder = tools.find("promtool"), root / "deploy" / "prometheus"
    rules = sorted(folder.glob("rules/*.yml"))
    if not rules:
        return ["deploy/prometheus/rules holds no rules"]
    faults = [complaint([promtool, "check", "rules", "--lint-fatal", *rules], cwd=folder)]
    with tempfile.TemporaryDirectory() as scratch:
        # The key is a secret of the place where Prometheus runs: promtool wants to see its file.
        copy = Path(scratch, "prometheus")
        shutil.copytree(folder, copy)
        key = Path(scratch, "key")
        key.write_text("a-key")
        config = copy / "prometheus.yml"
        text = config.read_text()
        config.write_text(text.replace("/run/secrets/safegene_metrics_key", str(key)))
        faults.append(complaint([promtool, "check", "config", "--lint-fatal", config], cwd=copy))
    return [fault for fault in faults if fault]


def rule_tests(root: Path) -> list[str]:
    """promtool over the tests of the rules."""
    promtool, folder = tools.find("promtool"), root / "deploy" / "prometheus"
    tests = sorted(folder.glob("tests/*.yml"))
    if not tests:
        return ["deploy/prometheus/tests holds no tests"]
    said = complaint(
        [promtool, "test", "rules", *(test.name for test in tests)], cwd=tests[0].parent
    )
    return [said] if said else []


def alertmanager(root: Path) -> list[str]:
    """amtool over alertmanager.yml."""
    folder = root / "deploy" / "prometheus"
    said = complaint([tools.find("amtool"), "check-config", "alertmanager.yml"], cwd=folder)
    return [said] if said else []
