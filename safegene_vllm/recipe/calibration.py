"""Few-shot calibration: tunes only the per-layer coefficients λ_l of a family, for one tenant.

Loss: mean cross-entropy of safe answers on harmful prompts + task · mean KL(p_0 ‖ p_λ) on the
tenant's own task examples + benign · the same on benign prompts + pull · mean (λ - λ_0)², where p_0
is the tenant without a vector. Projected Adam within the family's bounds, with early stopping on
held-out examples. The paper (arXiv:2606.06519) tunes scalars on few samples; this loss is ours.
The model is loaded once; layers below the first vector run once per example, not once per step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, NonFiniteError
from safegene_vllm.formats.family import Family, FamilyHeader
from safegene_vllm.formats.profile import Profile, make_profile
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, reject_exported
from safegene_vllm.recipe.attached import AttachedVector
from safegene_vllm.recipe.encoding import (
    Batch,
    Encoded,
    Example,
    batches_by_length,
    collate,
    encode,
)
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import (
    LoadedModel,
    check_head,
    completion_states,
    head_of,
    layer_modules,
    load_model,
)
from safegene_vllm.recipe.training import Progress, Run, check_ranges, silent, stop_requests

REFUSAL = "I'm sorry, but I can't help with that."
"""Safe answer where the data has none; short, because its first tokens matter most."""


@dataclass(frozen=True)
class Calibration:
    """Settings. `batch` examples of each kind per step; `tied`: one coefficient for all layers.

    Safe answers are truncated to `max_answer_tokens`, answers to retain to `retained_tokens`.
    """

    steps: int = 40
    lr: float = 0.15
    batch: int = 6
    task: float = 2.0
    benign: float = 2.0
    pull: float = 0.002
    initial: float = 1.0
    held_out: float = 0.25
    look_every: int = 5
    patience: int = 3
    tied: bool = False
    max_answer_tokens: int = 24
    retained_tokens: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        tokens, weights = ("max_answer_tokens", "retained_tokens"), ("task", "benign", "pull")
        counts = ("steps", "batch", "look_every", "patience", *tokens)
        check_ranges(self, counts=counts, rates=("lr", "held_out"), weights=weights)


@dataclass(frozen=True, eq=False)
class LossTerm:
    """Examples of one kind in fixed batches, with the outputs of the tenant without a vector.

    `reference`: its final states (K, D) per batch, None where the loss is cross-entropy. `prefix`:
    the output of the last layer below the vector, which no coefficient changes.
    """

    name: str
    weight: float
    batches: list[Batch]
    reference: list[torch.Tensor] | None
    prefix: list[Any]


def load_tenant(
    header: FamilyHeader, tenant: Path, checkpoint: Path | None, *, device: str = "auto"
) -> LoadedModel:
    """Load a tenant for calibration: its checkpoint, or `checkpoint` with its LoRA merged.

    An empty directory is a new tenant with only a profile; a missing one is an error.
    Errors: ConfigError if a checkpoint is missing or superfluous; FamilyMismatchError naming both;
    those of `kind_of`.
    """
    is_new = not (tenant.is_dir() and any(tenant.iterdir()))
    kind = kind_of(tenant, new_profile=is_new)
    reject_exported(tenant)
    check_fits(tenant, header, new_profile=is_new)
    if kind == "checkpoint":
        if checkpoint is not None:
            raise ConfigError(f"{tenant} is a full checkpoint; leave out {checkpoint}")
        return load_model(tenant, device=device)
    if checkpoint is None:
        raise ConfigError(f"{tenant} is no full checkpoint; name the model that it was tuned from")
    check_fits(checkpoint, header)
    return load_model(checkpoint, tenant if kind == "adapter" else None, device=device)


def check_inputs(
    header: FamilyHeader,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None,
    settings: Calibration,
) -> None:
    """Check data and settings before a model is loaded.

    Errors: ConfigError if a kind has too few examples to hold any out, or the initial coefficient
    is outside the family's bounds.
    """
    low, high = header.bounds
    if not low <= settings.initial <= high:
        raise ConfigError(
            f"the initial coefficient {settings.initial} is outside the family's bounds "
            f"{low} to {high}; choose one inside"
        )
    kinds = (safety, task) if benign is None else (safety, task, benign)
    if small := [f"{data.name} ({len(data.rows)})" for data in kinds if len(data.rows) < 2]:
        raise ConfigError(
            f"too few examples: {', '.join(small)}; calibration needs harmful prompts and task "
            "examples, at least 2 of each, some of which are held out"
        )


def make_examples(
    loaded: LoadedModel,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None,
    settings: Calibration,
) -> dict[str, list[Example]]:
    """Examples by kind; missing safe answers are REFUSAL, others the tenant's completions."""
    kinds = {"task": task} | ({} if benign is None else {"benign": benign})
    found = {"safety": [Example(r.prompt, r.answer or REFUSAL) for r in safety.rows]}
    for kind, data in kinds.items():
        own = [row.prompt for row in data.rows if row.answer is None]
        completions = iter(generate_greedy(loaded, own, settings.retained_tokens) if own else ())
        found[kind] = []
        for row in data.rows:
            if row.answer is not None:
                found[kind].append(Example(row.prompt, row.answer))
            else:
                completion = next(completions)
                text = completion.text or "."
                found[kind].append(Example(row.prompt, text, completion.finished))
    return found


def calibrate(
    loaded: LoadedModel,
    family: Family,
    *,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None = None,
    settings: Calibration,
    run: Run | None = None,
    progress: Progress = silent,
) -> Profile:
    """Tune the coefficients for the loaded tenant; its weights do not change.

    Errors: ConfigError (data, settings, architecture), SiteError if it is not of this family.
    """
    check_inputs(family.header, safety, task, benign, settings)
    check_head(loaded)
    examples = make_examples(loaded, safety, task, benign, settings)
    weights = {"safety": 1.0, "task": settings.task, "benign": settings.benign}
    layers = [entry.layer for entry in family.header.layers]
    train_terms: list[LossTerm] = []
    held_out_terms: list[LossTerm] = []
    # A refusal is decided in the first tokens; later ones would dilute the loss.
    limits = dict.fromkeys(examples, settings.retained_tokens)
    limits["safety"] = settings.max_answer_tokens
    for kind, given in examples.items():
        rows = encode(
            loaded.tokenizer,
            given,
            max_answer_tokens=limits[kind],
            context_tokens=loaded.context_tokens,
            what=kind,
        )
        training, held_out = _split(rows, settings.held_out, f"{settings.seed}-{kind}")
        for some, into in ((training, train_terms), (held_out, held_out_terms)):
            into.append(_loss_term(loaded, some, kind, weights[kind], layers[0], settings.batch))
    best, history = _optimize(
        loaded,
        family,
        layers,
        train_terms,
        held_out_terms,
        settings,
        run or Run(None, {}),
        progress,
    )
    record = {
        "method": "few-shot gradient",
        "settings": asdict(settings),
        "shots": {kind: len(given) for kind, given in examples.items()},
        "data": {
            "safety": safety.record(),
            "task": task.record(),
            "benign": None if benign is None else benign.record(),
        },
        **history,
    }
    values = dict(zip(layers, best, strict=True))
    return make_profile(family.header, values, record)


def _split(rows: Sequence[Encoded], share: float, seed: str) -> tuple[list[Encoded], list[Encoded]]:
    """(training, held out) rows, at least one of each."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = min(len(rows) - 1, max(1, round(len(rows) * share)))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


@contextmanager
def _from_layer(model: Any, first: int, prefix: Any) -> Iterator[None]:
    """Context manager: skip the layers before `first`; the last of them returns `prefix`."""
    modules: list[Any] = layer_modules(model)[:first]
    try:
        for module in modules:
            module.forward = lambda *args, **kwargs: prefix
        yield
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def _loss_term(
    loaded: LoadedModel, rows: list[Encoded], kind: str, weight: float, first: int, size: int
) -> LossTerm:
    """Run the tenant without a vector over the rows once, and store what later steps reuse."""
    batches, reference, prefix = [], [], []
    layers = layer_modules(loaded.model)
    for chosen in batches_by_length([len(row.ids) for row in rows], size):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        outputs: list[Any] = []
        handles = (
            [
                layers[first - 1].register_forward_hook(
                    lambda m, i, out, into=outputs: into.append(out)
                )
            ]
            if first
            else []
        )
        reference.append(completion_states(loaded.model, batch))
        for handle in handles:
            handle.remove()
        batches.append(batch)
        prefix.append(outputs[0] if outputs else None)
    return LossTerm(kind, weight, batches, None if kind == "safety" else reference, prefix)


def batch_loss(loaded: LoadedModel, term: LossTerm, number: int, first: int) -> torch.Tensor:
    """The loss of one batch of a term, at the attached coefficients."""
    batch, head = term.batches[number], head_of(loaded.model)
    with _from_layer(loaded.model, first, term.prefix[number]):
        logits = head(completion_states(loaded.model, batch))
    if term.reference is None:
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    else:
        expected = torch.log_softmax(head(term.reference[number]), dim=-1)
        losses = (expected.exp() * (expected - torch.log_softmax(logits, dim=-1))).sum(dim=-1)
    return (losses * batch.share).sum() / len(batch.ids)


def _optimize(
    loaded: LoadedModel,
    family: Family,
    layers: list[int],
    train_terms: list[LossTerm],
    held_out_terms: list[LossTerm],
    settings: Calibration,
    run: Run,
    progress: Progress,
) -> tuple[list[float], dict[str, Any]]:
    """The best coefficients by the held-out loss, in the order of the layers, and the history."""
    attached = AttachedVector(family.lora_weights, family.header.num_layers, loaded.device)
    low, high = family.header.bounds
    count = 1 if settings.tied else len(layers)
    values = torch.full((count,), settings.initial, device=loaded.device, requires_grad=True)
    index = torch.tensor(layers, device=loaded.device)
    optimizer = torch.optim.Adam([values], lr=settings.lr, betas=(0.9, 0.95))

    def apply(at: torch.Tensor) -> None:
        zeros = torch.zeros(family.header.num_layers, device=loaded.device)
        attached.coefficients = zeros.index_put((index,), at.expand(len(layers)))

    @torch.no_grad()
    def held_out_losses(at: torch.Tensor) -> dict[str, float]:
        apply(at)
        return {
            term.name: sum(
                float(batch_loss(loaded, term, n, layers[0])) * len(term.batches[n].ids)
                for n in range(len(term.batches))
            )
            / sum(len(batch.ids) for batch in term.batches)
            for term in held_out_terms
        }

    def total(found: dict[str, float]) -> float:
        return sum(term.weight * found[term.name] for term in held_out_terms)

    evaluations: list[dict[str, float]] = []
    losses: list[float] = []
    with attached.applied_to(loaded.model), stop_requests() as stop_wanted:
        before = held_out_losses(torch.zeros_like(values))
        # The first candidate is 0, or the bound nearest to it.
        best = torch.zeros_like(values).clamp(low, high)
        best_loss = total(before if low <= 0.0 <= high else held_out_losses(best))
        if (saved := run.load()) is not None:
            tensors, notes = saved
            values.data.copy_(tensors["values"])
            best, best_loss = tensors["best"].to(values.device), float(notes["best_loss"])  # type: ignore[arg-type]
            losses, evaluations = list(notes["losses"]), list(notes["looks"])  # type: ignore[call-overload]
            optimizer.state[values] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": tensors["exp_avg"].to(values.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(values.device),
            }
        since = int(evaluations[-1]["since"]) if evaluations else 0
        for step in range(len(losses), settings.steps):
            if since >= settings.patience:
                break
            apply(values)
            loss = settings.pull * (values - settings.initial).square().mean()
            for term in train_terms:
                loss = loss + term.weight * batch_loss(
                    loaded, term, step % len(term.batches), layers[0]
                )
            if not math.isfinite(loss.item()):
                raise NonFiniteError(
                    f"the loss is {loss.item()} at step {step + 1}; the tenant or the vector gives "
                    "no finite logits on these examples"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.data.clamp_(low, high)
            losses.append(round(loss.item(), 6))
            if (step + 1) % settings.look_every == 0 or step + 1 == settings.steps:
                found = held_out_losses(values.detach())
                since = 0 if total(found) < best_loss else since + 1
                if since == 0:
                    best, best_loss = values.detach().clone(), total(found)
                evaluations.append(
                    {**found, "total": total(found), "since": since, "step": step + 1}
                )
            progress(step + 1, settings.steps, f"loss {losses[-1]:.3f}, held out {best_loss:.3f}")
            stopping = stop_wanted()
            ended = step + 1 == settings.steps or since >= settings.patience
            state = optimizer.state[values]
            run.save(
                {
                    "values": values,
                    "best": best,
                    "exp_avg": state["exp_avg"],
                    "exp_avg_sq": state["exp_avg_sq"],
                },
                {"losses": losses, "looks": evaluations, "best_loss": best_loss},
                # The last step is saved too: writing the profile may fail.
                now=stopping or ended,
            )
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to continue")
        rounded = [min(max(round(v, 4), low), high) for v in best.expand(len(layers)).tolist()]
        after = held_out_losses(torch.tensor(rounded, device=loaded.device))
    history = {
        "steps": len(losses),
        "losses": losses,
        "held_out": evaluations,
        "before": {name: round(value, 6) for name, value in before.items()},
        "after": {name: round(value, 6) for name, value in after.items()},
    }
    return rounded, history
