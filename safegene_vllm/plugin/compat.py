"""Compatibility table: every vLLM name that SafeGene uses, what is expected of it, and why.

Checked once at start: TABLE in every vLLM process, API_TABLE against the live objects of the API
process. No other module imports vLLM. Support for a new release starts here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from safegene_vllm.errors import VllmCompatibilityError

OLDEST = (0, 28)
NEWEST = (0, 32)


_NOT_IN_WORKERS = ("LLM", "SamplingParams")
"""Used only by the offline engine; importing them in every worker would cost start-up time."""


@dataclass(frozen=True)
class VllmName:
    """One name of vLLM; `has` lists attributes or parameters that must exist."""

    path: str
    has: tuple[str, ...]
    why: str


TABLE: dict[str, VllmName] = {
    "lora_mixin": VllmName(
        "vllm.v1.worker.lora_model_runner_mixin",
        ("LRUCacheWorkerLoRAManager",),
        "both model runners look the worker's LoRA manager up here; ours replaces it",
    ),
    "LRUCacheWorkerLoRAManager": VllmName(
        "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager",
        ("_load_adapter", "add_adapter", "add_dummy_lora", "create_lora_manager", "_manager_cls"),
        "loads an adapter when a request or the API asks for it: validate and compose there",
    ),
    "LRUCacheLoRAModelManager": VllmName(
        "vllm.lora.model_manager.LRUCacheLoRAModelManager",
        (
            "activate_adapter",
            "_init_punica_wrapper",
            "remove_all_adapters",
            "deactivate_adapter",
            "list_adapters",
        ),
        "moves an adapter into a slot: that slot's gain row is written then",
    ),
    "LoRAModel": VllmName(
        "vllm.lora.lora_model.LoRAModel",
        ("lora_model_id", "rank", "loras"),
        "vLLM's form of an adapter",
    ),
    "LoRALayerWeights": VllmName(
        "vllm.lora.lora_weights.LoRALayerWeights",
        ("module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
        "LoRA weights of one module; adapters are given to vLLM in this form",
    ),
    "parse_fine_tuned_lora_name": VllmName(
        "vllm.lora.utils.parse_fine_tuned_lora_name",
        ("name", "weights_mapper"),
        "vLLM's translation of a Hugging Face module name into its own",
    ),
    "LoRARequest": VllmName(
        "vllm.lora.request.LoRARequest",
        ("lora_name", "lora_int_id", "lora_path"),
        "name, id and path of an adapter; ours points at the staged copy",
    ),
    "get_adapter_absolute_path": VllmName(
        "vllm.lora.utils.get_adapter_absolute_path",
        ("lora_path",),
        "how vLLM resolves a LoRA path (or a hub name) to a directory",
    ),
    "BaseLayerWithLoRA": VllmName(
        "vllm.lora.layers.BaseLayerWithLoRA",
        ("set_mapping", "slice_lora_a", "slice_lora_b"),
        "every layer that can carry an adapter, and its tensor-parallel slicing",
    ),
    "BaseLinearLayerWithLoRA": VllmName(
        "vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA",
        ("_apply_lora_to_output",),
        "a linear LoRA layer: it calls punica_wrapper.add_lora_linear, where the product is added",
    ),
    "PunicaWrapperBase": VllmName(
        "vllm.lora.punica_wrapper.PunicaWrapperBase",
        ("update_metadata", "add_lora_linear", "add_lora_embedding", "add_lora_logits"),
        "computes LoRA products; a layer's wrapper is decorated, no class is changed",
    ),
    "LoRAMapping": VllmName(
        "vllm.lora.layers.LoRAMapping",
        ("index_mapping",),
        "a step's adapter ids by token, on the CPU: whether any token has an adapter",
    ),
    "WorkerBase": VllmName(
        "vllm.v1.worker.worker_base.WorkerBase",
        ("__init__", "add_lora"),
        "every worker: settings are checked as it starts, receipts are read through it",
    ),
    "LLM": VllmName(
        "vllm.LLM",
        ("generate", "collective_rpc"),
        "offline engine of verify and the benchmarks",
    ),
    "SamplingParams": VllmName(
        "vllm.SamplingParams",
        ("temperature", "max_tokens", "logprobs"),
        "greedy decoding there",
    ),
    "register_model_loader": VllmName(
        "vllm.model_executor.model_loader.register_model_loader",
        ("load_format",),
        "adds --load-format safegene",
    ),
    "DefaultModelLoader": VllmName(
        "vllm.model_executor.model_loader.default_loader.DefaultModelLoader",
        ("get_all_weights", "load_weights", "_prepare_weights"),
        "the stock loader whose weights iterator is wrapped",
    ),
    "current_platform": VllmName(
        "vllm.platforms.current_platform",
        ("is_cpu", "can_update_inplace"),
        "CPU gets our own LoRA product; a platform without in-place updates is rejected",
    ),
    "envs": VllmName(
        "vllm.envs",
        ("VLLM_LORA_ENABLE_DUAL_STREAM",),
        "dual-stream LoRA bypasses the punica wrapper, so it is rejected",
    ),
    "gpu_sync_allowed": VllmName(
        "vllm.utils.gpu_sync_debug.gpu_sync_allowed",
        (),
        "reading a gain row back for a receipt synchronizes, once per adapter",
    ),
    "get_current_vllm_config": VllmName(
        "vllm.config.get_current_vllm_config",
        (),
        "the model loader reads the engine's additional_config through it",
    ),
}

API_TABLE: dict[str, VllmName] = {
    "engine_client": VllmName(
        "vllm.engine.protocol.EngineClient",
        ("add_lora", "collective_rpc", "errored", "remove_lora", "vllm_config"),
        "adapters are added and removed, and receipts read, through the engine client",
    ),
    "openai_serving_models": VllmName(
        "app.state.openai_serving_models",
        (
            "base_model_paths",
            "engine_client",
            "load_lora_adapter",
            "lora_requests",
            "model_config",
        ),
        "maps served names to adapters; its engine client is replaced by the verifying one",
    ),
    "vllm_config": VllmName(
        "vllm.config.VllmConfig",
        ("additional_config", "load_config", "lora_config", "model_config", "parallel_config"),
        "what the engine was started with is compared with the receipts",
    ),
}
"""Names of the API process, checked on its objects: some are set by constructors only."""


@cache
def resolve(name: str) -> Any:
    """Return vLLM's object behind one entry of TABLE.

    Errors: VllmCompatibilityError naming the entry, what was expected and which vLLM was found.
    """
    entry = TABLE[name]
    try:
        return importlib.import_module(entry.path)
    except ModuleNotFoundError:
        pass
    module, _, attribute = entry.path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise VllmCompatibilityError(
            f"vLLM {version()} has no {entry.path} ({entry.why}): {error}. {_advice()}"
        ) from error


@cache
def version() -> str:
    """Return the version of the installed vLLM, such as `0.32.0`."""
    return str(importlib.import_module("vllm").__version__)


def check_vllm() -> None:
    """Check the installed vLLM against the tested range and TABLE.

    Errors: VllmCompatibilityError listing everything that is missing.
    """
    try:
        release = tuple(int(part) for part in version().split("+")[0].split(".")[:2])
    except ValueError:
        release = (0, 0)
    if not OLDEST <= release <= NEWEST:
        raise VllmCompatibilityError(f"found vLLM {version()}. {_advice()}")
    _check((entry, resolve(name)) for name, entry in TABLE.items() if name not in _NOT_IN_WORKERS)


def check_api_process(engine_client: Any, models: Any) -> None:
    """Check the API process's live objects against API_TABLE.

    `engine_client` is vLLM's engine client, `models` its OpenAIServingModels.
    Errors: VllmCompatibilityError listing everything that is missing.
    """
    objects = {"engine_client": engine_client, "openai_serving_models": models}
    objects["vllm_config"] = getattr(engine_client, "vllm_config", None)
    _check((entry, objects[name]) for name, entry in API_TABLE.items())


def _check(entries: Iterable[tuple[VllmName, Any]]) -> None:
    problems = []
    for entry, found in entries:
        missing = [name for name in entry.has if not _has(found, name)]
        if missing:
            problems.append(f"{entry.path} lacks {', '.join(missing)} ({entry.why})")
    if problems:
        raise VllmCompatibilityError(f"vLLM {version()}: " + "; ".join(problems) + f". {_advice()}")


def _has(found: Any, name: str) -> bool:
    if hasattr(found, name) or name in getattr(found, "__struct_fields__", ()):
        return True
    return callable(found) and name in inspect.signature(found).parameters


def _advice() -> str:
    low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    return (
        f"safegene-vllm is tested with vLLM {low} to {high}: install one of these, or run without "
        "SafeGene by leaving `safegene` out of VLLM_PLUGINS."
    )
