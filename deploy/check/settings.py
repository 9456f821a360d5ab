"""Checks of every safegene.yaml that deploy/ writes, by the server that will read it.

The chart's (with every file of its ci/), Compose's, and those inside ConfigMaps. Secrets are not
read: they are of the place where the server runs.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from deploy.check import chart, objects
from safegene_server.settings import ENV, read_settings
from safegene_vllm.errors import ConfigError

FILE = "safegene.yaml"


def accepted(root: Path) -> list[str]:
    """What the server would refuse of each file."""
    faults, found = [], 0
    for name, text in _files(root):
        found += 1
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, FILE)
            path.write_text(text)
            try:
                settings = read_settings({ENV: str(path)})
                assert settings is not None
                settings.source_rules()
                settings.access_settings()
                if (settings.registry is None) == (settings.registry_file is None):
                    raise ConfigError("give `registry` or `registry_file`, one of them.")
            except ConfigError as error:
                faults.append(f"{name}: {str(error).replace(str(path), FILE)}")
    return faults if found else ["deploy/ writes no safegene.yaml"]


def _files(root: Path) -> Iterator[tuple[str, str]]:
    compose = root / "deploy" / "compose" / FILE
    yield str(compose.relative_to(root)), compose.read_text()
    texts = [(str(path.relative_to(root)), path.read_text()) for path in objects.written(root)]
    folder = chart.chart_of(root)
    for values in sorted(folder.glob("ci/*.yaml")):
        try:
            rendered = chart.render(folder, values, chart.KUBERNETES[-1])
        except subprocess.CalledProcessError as error:
            # The check of the chart says more; here it must not pass for a chart without a file.
            rendered = f"{{kind: ConfigMap, data: {{{FILE}: 'not rendered: {error.returncode}'}}}}"
        texts.append((f"ci/{values.name}", rendered))
    for name, text in texts:
        for found in yaml.safe_load_all(text):
            if found and found.get("kind") == "ConfigMap" and FILE in found["data"]:
                yield f"{name}, {FILE}", found["data"][FILE]
