"""Preflight: whether this engine can be protected as configured, checked before weights load.

Every option under which the vector would not be applied is rejected with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safegene_vllm.errors import FamilyMismatchError, VllmCompatibilityError
from safegene_vllm.formats.family import FamilyHeader, base_of_checkpoint
from safegene_vllm.plugin import compat
from safegene_vllm.settings import KEY, EnginePlan, Settings, read_engine_plan

__all__ = ["EnginePlan", "check_base", "prepare_engine", "read_engine_plan"]


def prepare_engine(vllm_config: Any) -> EnginePlan | None:
    """Read and check the plan of this engine at worker start; None without a `safegene` key.

    Writes the family's digest into additional_config in place, so that vLLM's compile cache never
    reuses a graph traced for another vector.

    Errors: ConfigError, FormatError, BoundsError (settings and files); FamilyMismatchError (the
    model is not of the family); VllmCompatibilityError (an option of vLLM that cannot be honored).
    """
    plan = read_engine_plan(vllm_config)
    if plan is None:
        return None
    problems = _unsupported_options(vllm_config, plan.settings)
    if problems:
        raise VllmCompatibilityError(
            "SafeGene cannot protect this engine as configured: " + "; ".join(problems) + "."
        )
    if plan.header is not None:
        check_base(vllm_config.model_config, plan.header)
        raw = dict(vllm_config.additional_config[KEY])
        raw["family_digest"] = plan.header.digest
        vllm_config.additional_config[KEY] = raw
    return plan


def check_base(model_config: Any, header: FamilyHeader) -> None:
    """Errors: FamilyMismatchError naming the family's base and the model's.

    The fingerprint is compared where the checkpoint is a local directory; elsewhere only the
    architecture is known here, and the shapes are compared site by site as the vector is placed.
    """
    wanted = header.base
    found = (getattr(model_config.hf_config, "architectures", None) or ["unknown"])[0]
    directory = Path(model_config.model)
    if any(directory.glob("*.safetensors")):
        base = base_of_checkpoint(directory)
        if base.fingerprint == wanted.fingerprint:
            return
        found = f"{base.architecture}, {base.num_layers} layers, {base.fingerprint}"
    elif found == wanted.architecture:
        return
    raise FamilyMismatchError(
        f"family {header.name!r} ({header.digest}) is for {wanted.architecture}, "
        f"{wanted.num_layers} layers, {wanted.fingerprint}; the served model {str(directory)!r} is "
        f"{found}. Serve a model of that family, or give the family of this model."
    )


def _unsupported_options(vllm_config: Any, settings: Settings) -> list[str]:
    """Return why each unsupported option cannot be honored."""
    lora = vllm_config.lora_config
    problems = []
    runner = vllm_config.model_config.runner_type
    if runner != "generate":
        problems.append(f"--runner {runner} (only generate is tested)")
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        problems.append(
            "--weight-transfer-config replaces weights that the vector was checked with"
        )
    if getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        problems.append("--enable-elastic-ep takes weights from other engines, past the checks")
    if getattr(lora, "default_mm_loras", None):
        problems.append("--default-mm-loras answers requests for the base model with an adapter")
    if getattr(compat.resolve("envs"), "VLLM_SKIP_MODEL_NAME_VALIDATION", False):
        problems.append(
            "VLLM_SKIP_MODEL_NAME_VALIDATION=1 answers requests for any unknown model with the "
            "base model"
        )
    if settings.apply == "weights":
        if lora is not None:
            problems.append(
                "--enable-lora with --load-format safegene: adapters would run on weights that "
                "already carry the vector; use apply=gain on the plain checkpoint instead"
            )
        if vllm_config.model_config.quantization is not None:
            problems.append(
                f"--quantization {vllm_config.model_config.quantization} with --load-format "
                "safegene: quantized weights cannot be added to; use apply=gain"
            )
        return problems
    if lora is None:
        problems.append("apply=gain and apply=composed need --enable-lora")
    elif lora.fully_sharded_loras:
        problems.append("--fully-sharded-loras bypasses the product that the vector is added to")
    if compat.resolve("envs").VLLM_LORA_ENABLE_DUAL_STREAM:
        problems.append("VLLM_LORA_ENABLE_DUAL_STREAM=1 runs LoRA where the vector is not added")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        problems.append("--pipeline-parallel-size > 1 is not supported; use tensor parallelism")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        problems.append("--enable-sleep-mode can discard the vector (level 2) without a trace")
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        problems.append(
            "--kv-sharing-fast-prefill runs layers on some tokens of a step, in which the others' "
            "adapters and gains would be used"
        )
    if not compat.resolve("current_platform").can_update_inplace():
        problems.append("this platform cannot update tensors in place")
    return problems
