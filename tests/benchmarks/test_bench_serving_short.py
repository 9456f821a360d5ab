"""The serving benchmark's short run, whole: real servers, vLLM's own load, one JSON line.

Arms, cells, ratios and page are tested in test_bench_serving.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT

PROGRAM = "benchmarks.serving.bench_serving"
ARMS = {"lora", "gain_100", "composed_100", "guard", "system_prompt"}


def test_the_short_run_ends_in_one_line_with_every_ratio(tmp_path: Path) -> None:
    command = [sys.executable, "-m", PROGRAM, "--short", "--build", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["short"] and found["missing"] == []
    assert {"commit", "vllm", "torch", "device", "threads"} <= set(found)
    main = found["cells"]["main"]
    assert set(main["arms"]) == ARMS and main["rounds"] == 2
    for name, arm in main["arms"].items():
        assert arm["rounds"]["output_tokens_per_s"]["n"] == 2, name
    compared = [f"main.{name}_over_lora" for name in sorted(ARMS - {"lora"})]
    for name in (*compared, "paired.gain_100_over_aside_100"):
        assert found["ratios"][f"{name}.output_tokens_per_s"]["n"] == 2
    paired = found["cells"]["paired"]["arms"]
    assert paired["aside_100"]["after"] == {}
    assert all("decode_step_ms" in paired[name]["rounds"] for name in ("gain_100", "aside_100"))
    # One resident vector, against slots of twice the rank for every tenant.
    gain, composed = (main["arms"][name]["after"] for name in ("gain_100", "composed_100"))
    assert gain["vector_bytes"] > 0
    assert composed["slot_bytes"] == 2 * gain["slot_bytes"]
    assert (tmp_path / "short" / "performance.md").is_file()
