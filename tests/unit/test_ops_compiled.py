"""The kernels through Triton's real compiler, for GPUs that need not be there.

Programs are compiled to machine code exactly as product.py would launch them; Triton brings the
assembler. Runs in a process of its own: where programs are interpreted they cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here; see `make test-kernels`", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Shared memory of one block, by compute capability (CUDA C++ programming guide)."""

COMPILE = r"""
import json, os, re, subprocess, sys, tempfile, warnings
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import safegene_vllm.plugin.ops.triton_ops as product
from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata

warnings.simplefilter("ignore")
capability, dtype, widths, d_in, rank, safety_rank = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
found = []

def compile_only(program, programs, *args, **meta):
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    signature, hints, free = {}, {}, program.params
    for i, (name, value) in enumerate(zip(program.arg_names, args)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + short[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            divisible = not free[i].do_not_specialize and value % 16 == 0
        if divisible:
            hints[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(meta, "constexpr"))
    source = ASTSource(program, signature, meta, hints)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [os.path.join(tools, "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout
    found.append({
        "name": program.fn.__name__,
        "shared": built.metadata.shared,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "dot": "mma" in built.asm["ptx"],
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*\.b16", built.asm["ptx"])),
    })

product.launch = compile_only
a = [torch.zeros(2, 1, rank, d_in, dtype=dtype) for _ in widths]
b = [torch.zeros(2, 1, w, rank, dtype=dtype) for w in widths]
safety_a = torch.zeros(len(widths) * safety_rank, d_in, dtype=dtype)
safety_b = torch.zeros(sum(widths), safety_rank, dtype=dtype)
yes, gains = torch.tensor(True), torch.zeros(3, 4)
for tokens in (5, 300, 1100):
    plan = BatchMetadata(2, tokens, "cpu")
    x = torch.zeros(tokens, d_in, dtype=dtype)
    y = torch.zeros(tokens, sum(widths), dtype=dtype)
    of_vector = (safety_a, safety_b, gains, 1, yes)
    product.lora_linear(y, x, a, b, *of_vector, plan.order, plan.tiles, plan.idle, 1.0)
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(
    ("dtype", "widths", "d_in", "ranks"),
    [
        ("bfloat16", (3584, 512, 512), 3584, (16, 16)),
        ("float16", (4864, 4864), 896, (64, 8)),
        ("float32", (576,), 1536, (8, 4)),
        ("bfloat16", (301, 7), 333, (64, 64)),
    ],
    ids=["qkv of a 7B model", "gate_up", "float32", "unaligned"],
)
def test_it_compiles_and_fits(
    capability: int, dtype: str, widths: tuple[int, ...], d_in: int, ranks: tuple[int, int]
) -> None:
    what = json.dumps([capability, dtype, widths, d_in, *ranks])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, what],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["name"] for one in found] == ["shrink", "expand"] * 3
    for one in found:
        assert one["shared"] <= SHARED_BYTES[capability], one
        assert one["dot"] or dtype == "float32", f"no tensor cores: {one}"
        if d_in % 16 == 0 and dtype != "float32":
            assert one["stack"] == 0, f"registers spilled: {one}"
            assert one["narrow"] == 0, f"loads or stores of single values: {one}"
