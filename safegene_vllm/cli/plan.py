"""`safegene plan`: memory, decode time and recommended mode for tenants on a GPU.

The arithmetic is in safegene_vllm.planner. Starts nothing and loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from safegene_vllm.cli.console import clean, results, table
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.planner import Advice, ModelShape, ServingMode, Workload


class Dtype(StrEnum):
    """Dtype of weights, adapters and KV cache."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Kernels(StrEnum):
    """Kernels of the gain table, as in the engine's setting safegene.kernels."""

    triton = "triton"
    torch = "torch"


_NAMES = {
    "gain": "gain table",
    "composed": "composed slots",
    "weights": "weight load",
    "stock": "stock, no safety",
    "guard": "guard in front",
}
_MARK = "*"
_FOOTNOTE = f"{_MARK} estimate: computed from config.json and data sheets, never measured"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, a config.json or a hub name, e.g. models/aligned.",
        ),
    ],
    tenants: Annotated[int, typer.Option(help="How many tenants, e.g. --tenants 200.")],
    gpu: Annotated[
        str,
        typer.Option(
            help="h100-sxm, h100-pcie, h200, b200, mi300x, a100-40, a100-80, l40s, l4, rtx-4090; "
            "or any name with --memory-gb, --bandwidth and --tflops."
        ),
    ] = "h100-sxm",
    family: Annotated[
        Path | None,
        typer.Option(
            help="Take the vector's rank, layers and target modules from this, e.g. families/mine.",
            show_default=False,
        ),
    ] = None,
    vector_rank: Annotated[
        int | None, typer.Option(help="Rank of the vector, without --family.", show_default="16")
    ] = None,
    vector_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the layers that carry it, e.g. --vector-share 0.5.", show_default="1"
        ),
    ] = None,
    vector_targets: Annotated[
        str | None,
        typer.Option(
            help="Its target modules, e.g. o_proj,down_proj.", show_default="every linear layer"
        ),
    ] = None,
    adapter_rank: Annotated[
        int,
        typer.Option(help="Rank of the tenants' adapters; 0: tenants are profiles on the base."),
    ] = 16,
    adapter_targets: Annotated[
        str | None,
        typer.Option(
            help="Their target modules, e.g. q_proj,v_proj.", show_default="every linear layer"
        ),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Tenants are full fine-tunes, not adapters.")
    ] = False,
    profiles: Annotated[
        int | None,
        typer.Option(help="Loaded revisions, e.g. 400.", show_default="one per tenant"),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 32,
    active: Annotated[
        int | None,
        typer.Option(help="Distinct tenants among them.", show_default="as many as can be"),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="LoRA slots.", show_default="one per active tenant that fits")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 128,
    batched_tokens: Annotated[int, typer.Option(help="vLLM's --max-num-batched-tokens.")] = 8192,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of weights, adapters and KV.")
    ] = Dtype.bfloat16,
    memory_gb: Annotated[
        float | None, typer.Option(help="GPU memory in 10^9 bytes.", show_default="the GPU's")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GPU memory bandwidth, GB/s.", show_default="the GPU's")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Dense TFLOP/s at the dtype.", show_default="the GPU's, bf16"),
    ] = None,
    link_gb_s: Annotated[
        float | None, typer.Option(help="Host memory to GPU, GB/s.", show_default="the GPU's PCIe")
    ] = None,
    utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", help="As for vLLM.")
    ] = 0.92,
    overhead_gb: Annotated[
        float, typer.Option(help="Activations, CUDA graphs and context of an engine.")
    ] = 3.0,
    host_memory_gb: Annotated[float, typer.Option(help="Host memory for cached adapters.")] = 64.0,
    launch_us: Annotated[
        float, typer.Option(help="Time per kernel launch of adapters and vector.")
    ] = 2.0,
    kernels: Annotated[
        Kernels, typer.Option(help="Kernels of the gain table; CUDA without Triton: torch.")
    ] = Kernels.triton,
    gpu_hour_price: Annotated[
        float | None,
        typer.Option(help="Print the price per tenant, e.g. --gpu-hour-price 2.5.", min=0),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, e.g. for jq .advice.command.")
    ] = False,
) -> None:
    """Plan memory, decode time and settings for tenants on a GPU, without starting anything.

    Sizes of weights, vector and slots are exact. Numbers marked * are estimates; times are a
    roofline, a lower bound from bytes and kernel launches, useful for ratios.

    Example: safegene plan models/aligned --tenants 200 --gpu l40s --vector-share 0.5
    """
    from safegene_vllm.model_source import fetch_config
    from safegene_vllm.planner import Workload, advise, find_gpu, fit_slots, plan_modes, read_shape

    shape = read_shape(fetch_config(model))
    workload = Workload(
        shape=shape,
        gpu=find_gpu(
            gpu,
            memory_gb=memory_gb,
            bandwidth_gb_s=bandwidth,
            tflops=tflops,
            link_gb_s=link_gb_s,
        ),
        tenants=tenants,
        profiles=profiles,
        checkpoints=checkpoints,
        adapter_rank=adapter_rank,
        adapter_targets=_names(adapter_targets),
        **_vector(shape, family, vector_rank, vector_share, vector_targets),
        dtype_bytes=2 if dtype is Dtype.bfloat16 else 4,
        slots=slots,
        concurrency=concurrency,
        active=active,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batched_tokens=batched_tokens,
        utilization=utilization,
        overhead_bytes=int(overhead_gb * 1e9),
        host_bytes=int(host_memory_gb * 1e9),
        launch_s=launch_us * 1e-6,
        kernels=kernels.value,
    )
    workload = fit_slots(workload)
    modes = plan_modes(workload)
    advice = advise(workload, modes, model, None if family is None else str(family))
    if as_json:
        typer.echo(json.dumps(facts(workload, modes, advice, gpu_hour_price), indent=2))
    else:
        show(results(), facts(workload, modes, advice, gpu_hour_price))


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def _vector(
    shape: ModelShape,
    family: Path | None,
    rank: int | None,
    share: float | None,
    targets: str | None,
) -> dict[str, Any]:
    """Rank, layers and target modules of the vector. Errors: ConfigError."""
    if family is None:
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"--vector-share {share:g}: expected above 0, at most 1.")
        layers = None if share is None else max(1, round(share * shape.layers))
        return {
            "vector_rank": 16 if rank is None else rank,
            "vector_layers": layers,
            "vector_targets": _names(targets),
        }
    from safegene_vllm.formats.adapter import layer_of
    from safegene_vllm.formats.family import read_family_header

    if any(value is not None for value in (rank, share, targets)):
        raise ConfigError(
            "--family sets the vector's rank, layers and target modules; leave out --vector-rank, "
            "--vector-share and --vector-targets."
        )
    header = read_family_header(family)
    if header.base.num_layers != shape.layers:
        raise ConfigError(
            f"--family {family} is for {header.base.num_layers} layers, the model has "
            f"{shape.layers}; give the family of this model."
        )
    names = {site.rpartition(".")[2] for site in header.sites}
    return {
        "vector_rank": max(site.rank for site in header.sites.values()),
        "vector_layers": len({layer_of(site) for site in header.sites}),
        "vector_targets": tuple(site for site in shape.sites if site in names),
    }


def facts(
    workload: Workload, modes: Mapping[str, ServingMode], advice: Advice, price: float | None
) -> dict[str, Any]:
    """Convert the plan to JSON values; sizes in bytes, times in seconds."""
    from safegene_vllm.planner import ESTIMATED
    from safegene_vllm.planner.slots import lora_bytes

    shape, d = workload.shape, workload.dtype_bytes
    on_disk = lora_bytes(shape, workload.safety_targets, workload.vector_rank, d)
    planned = {}
    for name, mode in modes.items():
        step = asdict(mode.step) | {"bytes": mode.step.bytes}
        planned[name] = asdict(mode) | {"step": step, "fits": mode.fits}
        planned[name]["gpus_per_tenant"] = mode.gpus / workload.tenants
        if price is not None:
            planned[name]["price_per_tenant_hour"] = price * mode.gpus / workload.tenants
    return {
        "model": {
            "name": shape.name,
            "type": shape.model_type,
            "layers": shape.layers,
            "parameters": shape.parameters,
            "weight_bytes": shape.parameters * d,
            "kv_bytes_per_token": shape.kv_bytes_per_token(d),
        },
        "gpu": asdict(workload.gpu),
        "tenants": workload.tenants,
        "held": workload.held,
        "active": workload.active_tenants,
        "slots": workload.device_slots,
        "vector": {
            "rank": workload.vector_rank,
            "layers": workload.safety_layers,
            "sites": list(workload.safety_targets),
            "pair_bytes": on_disk * workload.safety_layers // shape.layers,
        },
        "adapter": {
            "rank": workload.adapter_rank,
            "sites": list(workload.own_targets),
            "pair_bytes": lora_bytes(shape, workload.own_targets, workload.adapter_rank, d),
        },
        "modes": planned,
        "estimates": {
            "model": ["kv_bytes_per_token"],
            "modes": [*ESTIMATED, "fits", "gpus_per_tenant", "price_per_tenant_hour"],
        },
        "advice": {
            "mode": advice.mode,
            "command": advice.shown(),
            "reasons": list(advice.reasons),
            "warnings": list(advice.warnings),
        },
    }


def show(console: Console, plan: Mapping[str, Any]) -> None:
    """Print sizes, a row per mode, and the recommended command with its reasons."""
    model, gpu = plan["model"], plan["gpu"]
    vector, adapter = plan["vector"], plan["adapter"]
    console.print(
        f"{clean(model['name'])}: {model['parameters'] / 1e9:.2f} billion parameters, "
        f"{_gb(model['weight_bytes'])}, {model['layers']} layers, "
        f"{model['kv_bytes_per_token'] / 1e3:.1f} kB{_MARK} of KV per token"
    )
    console.print(
        f"{gpu['name']}: {_gb(gpu['memory_bytes'])}, {gpu['bytes_per_s'] / 1e12:.2f} TB/s"
    )
    console.print(
        f"vector  rank {vector['rank']} on {vector['layers']} layers, {_mb(vector['pair_bytes'])}; "
        f"adapter  rank {adapter['rank']}, {_mb(adapter['pair_bytes'])}; "
        f"{plan['tenants']} tenants, {plan['active']} in a batch, {plan['slots']} slots"
    )
    estimated = [f"{name}{_MARK}" for name in ("KV left", "sequences")]
    memory = table("mode", f"GPUs{_MARK}", "rank", "vector", "slots", *estimated, left=("mode",))
    times = ("batch", "GB/step", "kernels", "step ms", "TTFT ms", "tok/s", "ratio")
    time = table("mode", *(f"{name}{_MARK}" for name in times), left=("mode",))
    stock = plan["modes"].get("stock")
    for name, mode in plan["modes"].items():
        step = mode["step"]
        memory.add_row(
            _NAMES[name],
            str(mode["gpus"]),
            str(mode["bucket"] or "-"),
            _mb(mode["vector_bytes"] + mode["gain_bytes"]),
            _gb(mode["slot_bytes"]),
            _gb(mode["kv_bytes"]) if mode["fits"] else "does not fit",
            f"{mode['sequences']:,}",
        )
        time.add_row(
            _NAMES[name],
            str(mode["batch"]),
            f"{step['bytes'] / 1e9:.2f}",
            str(step["launches"]),
            f"{step['seconds'] * 1e3:.2f}",
            f"{(mode['prefill_s'] + mode['added_ttft_s']) * 1e3:.1f}",
            f"{mode['tokens_per_s']:,.0f}",
            "" if stock is None else _ratio(mode["tokens_per_s"], stock["tokens_per_s"]),
        )
    console.print()
    console.print(memory)
    console.print()
    console.print(time)
    console.print(_FOOTNOTE)
    for name, mode in plan["modes"].items():
        if "price_per_tenant_hour" in mode and mode["safe"]:
            console.print(
                f"{_NAMES[name]}: {mode['price_per_tenant_hour']:.4f}{_MARK} per tenant and hour"
            )
    advice = plan["advice"]
    if advice["mode"] is None:
        console.print("\nnothing to recommend:")
    else:
        console.print(f"\nuse {_NAMES[advice['mode']]}:\n  {clean(advice['command'])}")
    for reason in advice["reasons"]:
        console.print(f"- {reason}")
    for warning in advice["warnings"]:
        console.print(f"! {warning}")


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.3f}" if base else "-"


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _mb(value: int) -> str:
    return f"{value / 1e6:.1f} MB"
