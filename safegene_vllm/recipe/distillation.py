"""Discrepancy distillation: LoRA weights that restore the aligned model's outputs.

Freeze the degraded model D and train B, A so that D + BA matches the aligned model A on safety
prompts, and stays D on benign ones. The paper (arXiv:2606.06519) gives no equations; this loss is
ours: mean KL(p_A ‖ p_{D+BA}) over the tokens of safe answers, plus hard · their cross-entropy (hard
labels, as in Kim & Rush 2016, arXiv:1606.07947), plus retention · mean KL(p_D ‖ p_{D+BA}) over the
tokens of benign answers, plus hidden · the relative squared distance of the residual streams of A
and D + BA at the last prompt token of safety prompts, mean over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, FamilyMismatchError
from safegene_vllm.evaluation.judges import is_refusal
from safegene_vllm.formats.adapter import LoRAWeights, load_adapter, read_adapter_shapes
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import Base, base_of_checkpoint
from safegene_vllm.formats.tenant_directory import reject_exported
from safegene_vllm.recipe.attached import AttachedVector, init_lora_weights
from safegene_vllm.recipe.degradation import degradation_of
from safegene_vllm.recipe.encoding import (
    Batch,
    Batches,
    Encoded,
    Example,
    batches_by_length,
    check_example_lengths,
    collate,
    encode,
)
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import (
    LoadedModel,
    check_head,
    completion_states,
    head_of,
    last_prompt_states,
    linear_modules,
    load_model,
    merge_lora_weights,
    record_layers,
)
from safegene_vllm.recipe.training import (
    Progress,
    Run,
    Schedule,
    check_ranges,
    silent,
    train,
)

TEACHER_BATCH = 16


@dataclass(frozen=True)
class Distillation:
    """Settings. `batch` examples a step, half safety, half benign; `modules` None: every linear."""

    steps: int = 120
    lr: float = 1e-3
    batch: int = 8
    rank: int = 8
    retention: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    modules: tuple[str, ...] | None = None
    max_answer_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "rank", "max_answer_tokens")
        check_ranges(self, counts=counts, rates=("lr",), weights=("retention", "hard", "hidden"))

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "modules": None if self.modules is None else list(self.modules)}


@dataclass(frozen=True, eq=False)
class Distilled:
    """LoRA weights by target module in bfloat16, their base, and the recipe.

    `run` keeps its state on disk until the caller has written the result and clears it.
    """

    base: Base
    lora_weights: dict[str, LoRAWeights]
    recipe: dict[str, Any]
    losses: list[float]
    run: Run


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model's outputs on some rows: per row the final states (answer tokens, D), on the CPU.

    The head, weight (V, D) and bias (V,) or None, is applied again for each training batch: exact,
    and V / D times smaller than logits. `residual` is (rows, layers, D), or None if not needed.
    """

    rows: list[Encoded]
    states: list[torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor | None]
    residual: torch.Tensor | None = None

    def logits(self, chosen: Sequence[int], device: torch.device) -> torch.Tensor:
        states = torch.cat([self.states[i] for i in chosen]).to(device)
        weight, bias = self.head
        return torch.nn.functional.linear(states.to(weight.dtype), weight, bias).float()


@torch.no_grad()
def record_teacher(loaded: LoadedModel, rows: list[Encoded], *, residual: bool = False) -> Teacher:
    """Run the model once over the rows and record what the student is compared with."""
    states: dict[int, torch.Tensor] = {}
    streams: dict[int, torch.Tensor] = {}
    for chosen in batches_by_length([len(row.ids) for row in rows], TEACHER_BATCH):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        if residual:
            with record_layers(loaded.model) as layers:
                found = completion_states(loaded.model, batch)
            stream = last_prompt_states(layers, batch.last_prompt).cpu()
            streams |= {i: stream[place] for place, i in enumerate(chosen)}
        else:
            found = completion_states(loaded.model, batch)
        counts = batch.wanted.sum(dim=1).tolist()
        states |= dict(zip(chosen, found.cpu().split(counts), strict=True))
    head = loaded.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return Teacher(
        rows,
        [states[i] for i in range(len(rows))],
        (head.weight.detach(), None if bias is None else bias.detach()),
        torch.stack([streams[i] for i in range(len(rows))]) if residual else None,
    )


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean KL(p_teacher ‖ p_student) from logits (K, V): over a row's tokens, then over rows."""
    expected = torch.log_softmax(teacher, dim=-1)
    found = torch.log_softmax(student, dim=-1)
    per_token = (expected.exp() * (expected - found)).sum(dim=-1)
    return (per_token * batch.share).sum() / len(batch.ids)


def check_adapter(checkpoint: Path, adapter: Path) -> None:
    """Check that the LoRA fits the checkpoint. Errors: FamilyMismatchError."""
    found = read_checkpoint(checkpoint)
    for site, lora in read_adapter_shapes(adapter).items():
        info = found.infos.get(found.weight_name(site))
        if info is None or info.shape != (lora.d_out, lora.d_in):
            raise FamilyMismatchError(
                f"{adapter} is no LoRA on {checkpoint}: the weight of {site} is "
                f"{(lora.d_out, lora.d_in)}, there it is {None if info is None else info.shape}"
            )


def safe_examples(
    aligned: LoadedModel, safety: Dataset, max_answer_tokens: int, progress: Progress = silent
) -> list[Example]:
    """Safety prompts with safe answers: those of the data, else the aligned model's completions.

    Completions that are no refusals are left out. Errors: ConfigError if none is left.
    """
    examples = [Example(row.prompt, row.answer) for row in safety.rows if row.answer is not None]
    open_prompts = [row.prompt for row in safety.rows if row.answer is None]
    if open_prompts:
        completions = generate_greedy(aligned, open_prompts, max_answer_tokens, progress=progress)
        examples += [
            Example(c.prompt, c.text, c.finished) for c in completions if is_refusal(c.text)
        ]
    if not examples:
        raise ConfigError(
            f"the aligned model refuses none of the {len(open_prompts)} prompts of {safety.name}, "
            "so there is no safety to distill from it; name the aligned model, or give safe answers"
        )
    return examples


def distill(
    checkpoint: Path,
    *,
    safety: Dataset,
    benign: Dataset,
    degraded: Path | None = None,
    degraded_adapter: Path | None = None,
    settings: Distillation,
    state: Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
) -> Distilled:
    """Distill the safety that the aligned `checkpoint` has and its degraded copy lacks.

    The copy is a checkpoint, or a LoRA on the aligned one. Interrupted, it continues from `state`,
    which stays until the result's `run` is cleared.
    Errors: FamilyMismatchError naming both; AdapterRejectedError for an exported model; ConfigError
    (data, settings, architecture).
    """
    if (degraded is None) == (degraded_adapter is None):
        raise ConfigError("give either a degraded checkpoint or a LoRA that degraded the model")
    for directory in (checkpoint, degraded, degraded_adapter):
        if directory is not None:
            reject_exported(directory)
    base = base_of_checkpoint(checkpoint)
    if degraded is not None and (other := base_of_checkpoint(degraded)) != base:
        raise FamilyMismatchError(
            f"{checkpoint} ({base.architecture}, {base.fingerprint}) and {degraded} "
            f"({other.architecture}, {other.fingerprint}) are not of one family"
        )
    if degraded_adapter is not None:
        check_adapter(checkpoint, degraded_adapter)
    for data, what in ((safety, "safety"), (benign, "benign")):
        if not data.rows:
            raise ConfigError(f"the {what} data {data.name} is empty; both kinds are needed")
    # Rows that no training step uses need no teacher.
    reached = settings.steps * max(1, settings.batch // 2)
    safety, benign = (
        sample_rows(safety, reached, settings.seed),
        sample_rows(benign, reached, settings.seed),
    )
    loaded = load_model(checkpoint, device=device, dtype=dtype)
    check_head(loaded)
    sites = _chosen(linear_modules(loaded.model), settings.modules)
    limit = settings.max_answer_tokens
    counted = {"max_answer_tokens": limit, "context_tokens": loaded.context_tokens}
    for data, what in ((safety, "safety data"), (benign, "benign data")):
        check_example_lengths(loaded.tokenizer, data.rows, what=what, **counted)
    examples = safe_examples(loaded, safety, limit, progress)
    safe_rows = encode(loaded.tokenizer, examples, what="safety data", **counted)
    aligned = record_teacher(loaded, safe_rows, residual=settings.hidden > 0.0)
    if degraded_adapter is not None:
        merge_lora_weights(
            loaded.model, load_adapter(degraded_adapter).lora_weights, str(degraded_adapter)
        )
    else:
        assert degraded is not None
        # Only the head of the aligned model stays in memory, referenced by its teacher.
        del loaded
        loaded = load_model(degraded, device=device, dtype=dtype)
    benign_examples = _benign_examples(loaded, benign, limit, progress)
    benign_rows = encode(loaded.tokenizer, benign_examples, what="benign data", **counted)
    models = [checkpoint, degraded, degraded_adapter]
    run = Run(state, {**settings.record(), "rows": [_ids(safe_rows), _ids(benign_rows)]}, models)
    initial = init_lora_weights(sites, settings.rank, settings.seed)
    attached = AttachedVector(initial, base.num_layers, loaded.device)
    teachers = (aligned, record_teacher(loaded, benign_rows))
    lora_weights, losses = _train(loaded, attached, teachers, settings, run, progress)
    recipe = {
        "method": "distill",
        "aligned": checkpoint.resolve().name,
        "degraded": (degraded_adapter or degraded or checkpoint).resolve().name,
        **degradation_of(degraded_adapter),
        "settings": settings.record(),
        "data": {"safety": safety.record(), "benign": benign.record()},
        "safe_answers": len(safe_rows),
        "loss_per_10_steps": [
            round(sum(ten) / len(ten), 5)
            for ten in (losses[i : i + 10] for i in range(0, len(losses), 10))
        ],
    }
    return Distilled(base, lora_weights, recipe, losses, run)


def _benign_examples(
    degraded: LoadedModel, benign: Dataset, limit: int, progress: Progress
) -> list[Example]:
    """Benign prompts with the answers of the data, else the degraded model's completions."""
    open_prompts = [row.prompt for row in benign.rows if row.answer is None]
    completions = iter(generate_greedy(degraded, open_prompts, limit, progress=progress))
    found = []
    for row in benign.rows:
        if row.answer is not None:
            found.append(Example(row.prompt, row.answer))
        elif (completion := next(completions)).text:
            found.append(Example(completion.prompt, completion.text, completion.finished))
    return found


def _train(
    loaded: LoadedModel,
    attached: AttachedVector,
    teachers: tuple[Teacher, Teacher],
    settings: Distillation,
    run: Run,
    progress: Progress,
) -> tuple[dict[str, LoRAWeights], list[float]]:
    aligned, _ = teachers
    half = max(1, settings.batch // 2)
    streams = [
        (teacher, Batches([len(row.ids) for row in teacher.rows], half, settings.seed + number))
        for number, teacher in enumerate(teachers)
    ]
    weights = (1.0, settings.retention)
    head = head_of(loaded.model)

    def loss_at(step: int) -> torch.Tensor:
        total = torch.zeros((), device=loaded.device)
        for weight, (teacher, batches) in zip(weights, streams, strict=True):
            rows = batches.at(step)
            batch = collate([teacher.rows[i] for i in rows], loaded.pad).to(loaded.device)
            with record_layers(loaded.model, enabled=teacher.residual is not None) as layers:
                student = head(completion_states(loaded.model, batch))
            total = total + weight * kl_divergence(
                teacher.logits(rows, loaded.device), student, batch
            )
            if teacher is aligned and settings.hard:
                chosen = torch.nn.functional.cross_entropy(student, batch.targets, reduction="none")
                total = total + settings.hard * (chosen * batch.share).sum() / len(rows)
            if teacher.residual is not None:
                aim = teacher.residual[rows].to(loaded.device).float()
                found = last_prompt_states(layers, batch.last_prompt).float()
                gap = (found - aim).square().sum(-1) / aim.square().sum(-1)
                total = total + settings.hidden * gap.mean()
        return total

    with attached.applied_to(loaded.model):
        losses = train(
            attached.parameters(),
            loss_at,
            Schedule(settings.steps, settings.lr),
            run,
            progress=progress,
        )
    lora_weights = {
        s: LoRAWeights(p.a.to(torch.bfloat16), p.b.to(torch.bfloat16))
        for s, p in attached.lora_weights().items()
    }
    return lora_weights, losses


def _chosen(
    shapes: dict[str, tuple[int, int]], modules: tuple[str, ...] | None
) -> dict[str, tuple[int, int]]:
    """The modules whose names end in one of `modules`, by dotted parts; all for None."""
    if modules is None:
        return shapes
    chosen: dict[str, tuple[int, int]] = {}
    for ending in modules:
        found = {n: s for n, s in shapes.items() if f".{n}".endswith(f".{ending}")}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in shapes})
            raise ConfigError(f"no module is called {ending!r}; there are {known}")
        chosen |= found
    return chosen


def _ids(rows: Sequence[Encoded]) -> list[list[Any]]:
    return [[list(row.ids), row.prompt_tokens] for row in rows]
