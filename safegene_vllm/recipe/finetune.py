"""LoRA fine-tune through PEFT: degrades or aligns a model, or makes a tenant.

Cross-entropy over the answers, every example weighted equally. Degrading is a fine-tune on benign
data only. One device, no sharding.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import (
    CONFIG_FILE,
    OWNED_FILES,
    WEIGHTS_FILE,
    load_adapter,
)
from safegene_vllm.formats.file_io import pretty_json, read_json, replace_directory
from safegene_vllm.formats.safetensors_file import read_tensors, serialize
from safegene_vllm.recipe.degradation import RECORD_FILE, degradation_file
from safegene_vllm.recipe.encoding import Batch, Batches, Encoded, Example, collate, encode
from safegene_vllm.recipe.model import (
    LoadedModel,
    check_head,
    completion_states,
    head_of,
    linear_modules,
    load_model,
)
from safegene_vllm.recipe.training import (
    Progress,
    Run,
    Schedule,
    check_ranges,
    silent,
    train,
)


@dataclass(frozen=True)
class FineTune:
    """Settings of one fine-tune; `rank`, `alpha`, `rslora`, `alpha_pattern` as in PEFT.

    `modules` None: every linear module inside the layers. `batch` is in examples.
    """

    steps: int = 60
    lr: float = 2e-4
    batch: int = 8
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] | None = None
    rslora: bool = False
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    max_answer_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "rank", "alpha", "max_answer_tokens")
        check_ranges(self, counts=counts, rates=("lr",))

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "modules": None if self.modules is None else list(self.modules)}


def completion_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy over completion tokens: mean per example, then over the batch."""
    logits = head_of(model)(completion_states(model, batch))
    losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return (losses * batch.share).sum() / len(batch.ids)


def fine_tune(
    checkpoint: Path,
    examples: Sequence[Example],
    settings: FineTune,
    out: Path,
    *,
    base_model: str | None = None,
    data: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: Progress = silent,
    dtype: torch.dtype = torch.bfloat16,
) -> list[float]:
    """Train a LoRA on `checkpoint` into the PEFT directory `out`; returns the loss of every step.

    With `data`, the record of the examples, it and the settings are written to RECORD_FILE.
    Interrupted, it continues from `<out>.partial`. Errors: ConfigError (data, modules, settings);
    NonFiniteError (loss); those of reading the checkpoint.
    """
    loaded = load_model(checkpoint, device=device, dtype=dtype)
    check_head(loaded)
    rows = encode(
        loaded.tokenizer,
        examples,
        max_answer_tokens=settings.max_answer_tokens,
        context_tokens=loaded.context_tokens,
    )
    model = _with_lora(loaded, settings)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batches = Batches([len(row.ids) for row in rows], settings.batch, settings.seed)

    def loss_at(step: int) -> torch.Tensor:
        # A model's own dropout draws from torch's generator; a resumed run must draw the same.
        torch.manual_seed(random.Random(f"{settings.seed}-{step}").getrandbits(63))
        batch = collate([rows[i] for i in batches.at(step)], loaded.pad).to(loaded.device)
        with torch.autocast(loaded.device.type, torch.bfloat16, enabled=dtype != torch.float32):
            return completion_loss(model.get_base_model(), batch)

    state = out.with_name(f"{out.name}.partial")
    run = Run(state, {**settings.record(), "data": _digest(rows)}, [checkpoint])
    schedule = Schedule(settings.steps, settings.lr)
    losses = train(parameters, loss_at, schedule, run, progress=progress)
    more = {}
    if data is not None:
        more[RECORD_FILE] = degradation_file(base_model, data, settings.record())
    _save_peft(model, out, base_model, more)
    run.clear()
    return losses


def _digest(rows: Sequence[Encoded]) -> list[list[Any]]:
    return [[list(row.ids), row.prompt_tokens] for row in rows]


def _with_lora(loaded: LoadedModel, settings: FineTune) -> Any:
    """The model with trainable float32 LoRA factors, seeded."""
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name in linear_modules(loaded.model)}
    if unknown := sorted(set(settings.modules or ()) - names):
        raise ConfigError(f"no module is called {unknown}; there are {sorted(names)}")
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=sorted(settings.modules or names),
        use_rslora=settings.rslora,
        alpha_pattern=dict(settings.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(loaded.model, config, autocast_adapter_dtype=True).train()


def _save_peft(model: Any, out: Path, base_model: str | None, more: Mapping[str, bytes]) -> None:
    """Write the LoRA as PEFT does, in bfloat16 and without local paths, and `more` files."""
    with tempfile.TemporaryDirectory() as temp:
        model.save_pretrained(temp, safe_serialization=True)
        weights = read_tensors(Path(temp) / WEIGHTS_FILE)
        config = read_json(Path(temp) / CONFIG_FILE)
    config |= {"base_model_name_or_path": base_model, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    files = {
        CONFIG_FILE: pretty_json(dict(sorted(config.items()))),
        WEIGHTS_FILE: serialize(tensors),
        **more,
    }
    replace_directory(out, files, owned=(*OWNED_FILES, RECORD_FILE))
    load_adapter(out)
