"""Discrepancy distillation: pairs that make a degraded model answer like the aligned one again.

Freeze the degraded model D and train the pairs so that D + BA matches the aligned model A on safety
prompts, and stays D on benign ones. The paper (arXiv:2606.06519) gives no equations; this loss is
our choice: mean KL(p_A ‖ p_{D+BA}) over the tokens of safe answers, plus hard · their
cross-entropy (hard labels, as in Kim & Rush 2016, arXiv:1606.07947), plus retention · mean
KL(p_D ‖ p_{D+BA}) over the tokens of benign answers, plus hidden · the relative squared distance of
the residual streams of A and D + BA at the last prompt token of safety prompts, mean over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.composition import merged_weight_name
from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, FamilyMismatchError
from safegene_vllm.evaluation.judges import is_refusal
from safegene_vllm.formats.adapter import LoRAWeights, layer_of, load_adapter, read_adapter_shapes
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import Base, base_of_checkpoint
from safegene_vllm.formats.tenant_directory import refuse_exported
from safegene_vllm.recipe.attached import Attached, fresh_lora_weights
from safegene_vllm.recipe.degradation import degradation_of
from safegene_vllm.recipe.encoding import (
    Batch,
    Batches,
    Encoded,
    Example,
    check_room,
    collate,
    encode,
    in_order,
)
from safegene_vllm.recipe.examples import few
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import (
    Loaded,
    answer_states,
    check_head,
    head_of,
    load_model,
    merge_lora_weights,
)
from safegene_vllm.recipe.residual import last_prompt_states, recording
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
    """Pairs by site in bfloat16, the base they fit, and how they were made.

    `run` keeps the whole run on disk: whoever has written the pairs clears it.
    """

    base: Base
    lora_weights: dict[str, LoRAWeights]
    recipe: dict[str, Any]
    losses: list[float]
    run: Run


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a model says on some rows: per row its final states (answer tokens, D), on the CPU.

    The head, weight (V, D) and bias (V,) or None, is applied again when a batch is trained on:
    exact, and V / D times smaller than logits. `residual` is (rows, layers, D), or None where it is
    not needed.
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
def listen(loaded: Loaded, rows: list[Encoded], *, residual: bool = False) -> Teacher:
    """Run the model once over the rows and keep what a student is compared with."""
    states: dict[int, torch.Tensor] = {}
    streams: dict[int, torch.Tensor] = {}
    for chosen in in_order([len(row.ids) for row in rows], TEACHER_BATCH):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        if residual:
            with recording(loaded.model) as layers:
                found = answer_states(loaded.model, batch)
            stream = last_prompt_states(layers, batch.last_prompt).cpu()
            streams |= {i: stream[place] for place, i in enumerate(chosen)}
        else:
            found = answer_states(loaded.model, batch)
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


def _check_adapter(checkpoint: Path, adapter: Path) -> None:
    """FamilyMismatchError unless every weight that the LoRA changes is in the checkpoint."""
    infos = read_checkpoint(checkpoint).infos
    for site, lora in read_adapter_shapes(adapter).items():
        info = infos.get(merged_weight_name(site))
        if info is None or info.shape != (lora.d_out, lora.d_in):
            raise FamilyMismatchError(
                f"{adapter} is no LoRA on {checkpoint}: the weight of {site} is "
                f"{(lora.d_out, lora.d_in)}, there it is {None if info is None else info.shape}"
            )


def safe_examples(
    aligned: Loaded, safety: Dataset, max_answer_tokens: int, progress: Progress = silent
) -> list[Example]:
    """Safety prompts with safe answers: the data's own, else what the aligned model says.

    Answers of the model that are no refusals are left out. Errors: ConfigError if none is left.
    """
    given = [Example(row.prompt, row.answer) for row in safety.rows if row.answer is not None]
    open_prompts = [row.prompt for row in safety.rows if row.answer is None]
    if open_prompts:
        said = generate_greedy(aligned, open_prompts, max_answer_tokens, progress=progress)
        given += [Example(a.prompt, a.text, a.finished) for a in said if is_refusal(a.text)]
    if not given:
        raise ConfigError(
            f"the aligned model refuses none of the {len(open_prompts)} prompts of {safety.name}, "
            "so there is no safety to distil from it; is it the aligned one? Else give safe answers"
        )
    return given


def distil(
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
    """Distil what the aligned `checkpoint` has and its degraded copy has not.

    The copy is a checkpoint, or a LoRA on the aligned one. Interrupted, it goes on from `state`,
    which stays until the result's `run` is cleared.
    Errors: FamilyMismatchError naming both; AdapterRejectedError for an exported model; ConfigError
    (data, settings, architecture).
    """
    if (degraded is None) == (degraded_adapter is None):
        raise ConfigError("give either a degraded checkpoint or a LoRA that degraded the model")
    for directory in (checkpoint, degraded, degraded_adapter):
        if directory is not None:
            refuse_exported(directory)
    base = base_of_checkpoint(checkpoint)
    if degraded is not None and (other := base_of_checkpoint(degraded)) != base:
        raise FamilyMismatchError(
            f"{checkpoint} ({base.architecture}, {base.fingerprint}) and {degraded} "
            f"({other.architecture}, {other.fingerprint}) are not of one family"
        )
    if degraded_adapter is not None:
        _check_adapter(checkpoint, degraded_adapter)
    for data, what in ((safety, "safety"), (benign, "benign")):
        if not data.rows:
            raise ConfigError(f"the {what} data {data.name} is empty; both kinds are needed")
    # Rows that no step would reach need no teacher.
    reached = settings.steps * max(1, settings.batch // 2)
    safety, benign = few(safety, reached, settings.seed), few(benign, reached, settings.seed)
    loaded = load_model(checkpoint, device=device, dtype=dtype)
    check_head(loaded)
    sites = _chosen(_linears(loaded.model), settings.modules)
    limit = settings.max_answer_tokens
    counted = {"max_answer_tokens": limit, "context_tokens": loaded.context_tokens}
    for data, what in ((safety, "safety data"), (benign, "benign data")):
        check_room(loaded.tokenizer, data.rows, what=what, **counted)
    examples = safe_examples(loaded, safety, limit, progress)
    safe_rows = encode(loaded.tokenizer, examples, what="safety data", **counted)
    aligned = listen(loaded, safe_rows, residual=settings.hidden > 0.0)
    if degraded_adapter is not None:
        merge_lora_weights(
            loaded.model, load_adapter(degraded_adapter).lora_weights, str(degraded_adapter)
        )
    else:
        assert degraded is not None
        # Only the head of the aligned model stays in memory, held by its teacher.
        del loaded
        loaded = load_model(degraded, device=device, dtype=dtype)
    kept = _benign_examples(loaded, benign, limit, progress)
    benign_rows = encode(loaded.tokenizer, kept, what="benign data", **counted)
    models = [checkpoint, degraded, degraded_adapter]
    run = Run(state, {**settings.record(), "rows": _digestible(safe_rows, benign_rows)}, models)
    fresh = fresh_lora_weights(sites, settings.rank, settings.seed)
    attached = Attached(fresh, base.num_layers, loaded.device)
    teachers = (aligned, listen(loaded, benign_rows))
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
    degraded: Loaded, benign: Dataset, limit: int, progress: Progress
) -> list[Example]:
    """Benign prompts with the data's own answers, else the degraded model's."""
    open_prompts = [row.prompt for row in benign.rows if row.answer is None]
    said = iter(generate_greedy(degraded, open_prompts, limit, progress=progress))
    found = []
    for row in benign.rows:
        if row.answer is not None:
            found.append(Example(row.prompt, row.answer))
        elif (answer := next(said)).text:
            found.append(Example(answer.prompt, answer.text, answer.finished))
    return found


def _linears(model: Any) -> dict[str, tuple[int, int]]:
    """(D_out, D_in) of every linear module inside the layers."""
    return {
        name: (int(module.out_features), int(module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and layer_of(name) is not None
    }


def _train(
    loaded: Loaded,
    attached: Attached,
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
            with recording(loaded.model, wanted=teacher.residual is not None) as layers:
                student = head(answer_states(loaded.model, batch))
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

    with attached.on(loaded.model):
        losses = train(
            attached.parameters(),
            loss_at,
            Schedule(settings.steps, settings.lr),
            run,
            progress=progress,
        )
    halves = {
        s: LoRAWeights(p.a.to(torch.bfloat16), p.b.to(torch.bfloat16))
        for s, p in attached.lora_weights().items()
    }
    return halves, losses


def _chosen(
    shapes: dict[str, tuple[int, int]], modules: tuple[str, ...] | None
) -> dict[str, tuple[int, int]]:
    """The sites whose names end in one of `modules` (all for None), whole parts of a name only."""
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


def _digestible(*parts: Sequence[Encoded]) -> list[list[list[Any]]]:
    return [[[list(row.ids), row.prompt_tokens] for row in rows] for rows in parts]
