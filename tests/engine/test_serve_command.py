"""`safegene serve` with the real vLLM: its flags, its `vllm` command, and its folded start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from launched_server import ROOT, SMALL, end, free_port, until_serving

from safegene_vllm import tiny_model
from safegene_vllm.launcher.vllm_args import VllmArgs
from safegene_vllm.launcher.vllm_install import COMMAND, find_vllm, unknown_flags

pytestmark = pytest.mark.engine

UNCHECKED = """
import sys
from safegene_vllm import cli, doctor
doctor.check_installation = lambda *_: None
cli.main(sys.argv[1:])
"""
"""The command without the check that would find two distributions of vLLM here."""
FLAGS = """
import json
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
print("FLAGS", *(o for action in parser._actions for o in action.option_strings))
"""


def test_every_flag_of_vllm_is_known() -> None:
    """What the launcher reads from vLLM's sources is what vLLM's own parser accepts."""
    result = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True)
    (line,) = (x for x in result.stdout.splitlines() if x.startswith("FLAGS "))
    flags = [flag for flag in line.split()[1:] if flag.startswith("--")]
    assert len(flags) > 200, result.stderr[-2000:]
    assert unknown_flags(VllmArgs(tuple(flags)), find_vllm()) == []


def test_the_vllm_command_serves_with_a_kv_cache_that_fits(tmp_path: Path) -> None:
    """With a distribution named vllm, as on a GPU; its start is folded, its requests are shown."""
    tiny_model.make_model("llama", tmp_path / "m")
    family = tiny_model.write_family(tmp_path / "m", tmp_path / "f")
    tiny_model.write_tenant(tmp_path / "m", tmp_path / "t", family, 0.5, suffixes=("q_proj",))
    metadata = tmp_path / "site" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    port = str(free_port())
    small = [word for word in SMALL if word not in ("--kv-cache-memory-bytes", "67108864")]
    command = [
        sys.executable,
        "-u",
        "-c",
        UNCHECKED,
        *("serve", str(tmp_path / "m"), "--family", str(tmp_path / "f")),
    ]
    command += ["--tenant", f"acme={tmp_path / 't'}"]
    command += ["--host", "127.0.0.1", "--port", port, *small]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server"), str(metadata.parents[1])]),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    shown = subprocess.run(
        [*command, "--dry-run"], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert f"-m {COMMAND} serve {tmp_path / 'm'}" in " ".join(shown.split())
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    lines, drain = until_serving(process)
    try:
        assert lines[-1].startswith("serving at"), "\n".join(lines[-60:])
        assert lines[0].startswith("KV cache: ")
        stages = [line.partition(" (")[0] for line in lines if line.startswith("starting: ")]
        for stage in ("weights", "KV cache", "tenants", "serving"):
            assert f"starting: {stage}" in stages
        assert len(lines) < 20, "vLLM's own lines are folded"
        body = {"model": "acme", "prompt": [5, 6], "max_tokens": 2}
        response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
    finally:
        end(process, drain)
    assert any("POST /v1/completions" in line for line in lines)
