"""Few-shot calibration: only the coefficients λ_l of a family's layers are tuned, for one tenant.

Loss: mean cross-entropy of safe answers on harmful shots + task · mean KL(p_0 ‖ p_λ) on the
tenant's own task examples + benign · the same on benign prompts + pull · mean (λ - λ_0)², where p_0
is the tenant without a vector. Projected Adam within the family's bounds; a held-out part of the
shots says when to stop. The paper (arXiv:2606.06519) tunes scalars on few samples; this loss is
ours.
The model is loaded once; layers below the first vector run once per shot, not once per step.
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
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, refuse_exported
from safegene_vllm.recipe.attached import Attached
from safegene_vllm.recipe.encoding import Batch, Encoded, Example, collate, encode, in_order
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import (
    Loaded,
    answer_states,
    check_head,
    head_of,
    layer_modules,
    load_model,
)
from safegene_vllm.recipe.training import Progress, Run, check_ranges, silent, stop_requests

REFUSAL = "I'm sorry, but I can't help with that."
"""The safe answer where the data has none: short, so that its first words carry the loss."""


@dataclass(frozen=True)
class Calibration:
    """Settings. `batch` shots of each kind a step; `tied` is one number for all layers.

    Safe answers are cut at `max_answer_tokens`, those to be retained at `retained_tokens`.
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
        check_ranges(
            self,
            counts=(
                *("steps", "batch", "look_every", "patience"),
                *("max_answer_tokens", "retained_tokens"),
            ),
            rates=("lr", "held_out"),
            weights=("task", "benign", "pull"),
        )


@dataclass(frozen=True, eq=False)
class Part:
    """Shots of one kind in fixed batches, with what the untouched tenant says on them.

    `reference` holds its log-probabilities' source: final states (K, D) per batch; None where the
    loss is cross-entropy. `below` holds what leaves the last layer without a vector.
    """

    name: str
    weight: float
    batches: list[Batch]
    reference: list[torch.Tensor] | None
    below: list[Any]


def load_tenant(
    header: FamilyHeader, tenant: Path, checkpoint: Path | None, *, device: str = "auto"
) -> Loaded:
    """The tenant ready to be calibrated: its checkpoint, or `checkpoint` with its LoRA merged.

    An empty directory is to hold nothing but the profile; one that is missing is an error.
    Errors: ConfigError if a checkpoint is missing or one too many, FamilyMismatchError naming both;
    those of `kind_of`.
    """
    fresh = not (tenant.is_dir() and any(tenant.iterdir()))
    kind = kind_of(tenant, new_profile=fresh)
    refuse_exported(tenant)
    check_fits(tenant, header, new_profile=fresh)
    if kind == "checkpoint":
        if checkpoint is not None:
            raise ConfigError(f"{tenant} is a full checkpoint; leave out {checkpoint}")
        return load_model(tenant, device=device)
    if checkpoint is None:
        raise ConfigError(f"{tenant} is no full checkpoint; name the model that it sits on")
    check_fits(checkpoint, header)
    return load_model(checkpoint, tenant if kind == "adapter" else None, device=device)


def check_inputs(
    header: FamilyHeader,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None,
    settings: Calibration,
) -> None:
    """What can be refused before a model is loaded.

    Errors: ConfigError if a kind is empty or too small to hold any out, or the coefficients would
    start outside the family's bounds.
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
            "examples, at least 2 of each, and holds some of them out"
        )


def shots(
    loaded: Loaded,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None,
    settings: Calibration,
) -> dict[str, list[Example]]:
    """The examples of each kind; missing safe answers are REFUSAL, missing others the tenant's."""
    kinds = {"safety": safety, "task": task} | ({} if benign is None else {"benign": benign})
    found = {"safety": [Example(r.prompt, r.answer or REFUSAL) for r in safety.rows]}
    for kind, data in kinds.items():
        if kind == "safety":
            continue
        own = [row.prompt for row in data.rows if row.answer is None]
        said = iter(generate_greedy(loaded, own, settings.retained_tokens) if own else ())
        found[kind] = []
        for row in data.rows:
            if row.answer is not None:
                found[kind].append(Example(row.prompt, row.answer))
            else:
                answer = next(said)
                found[kind].append(Example(row.prompt, answer.text or ".", answer.finished))
    return found


def calibrate(
    loaded: Loaded,
    family: Family,
    *,
    safety: Dataset,
    task: Dataset,
    benign: Dataset | None = None,
    settings: Calibration,
    run: Run | None = None,
    progress: Progress = silent,
) -> Profile:
    """Tune the coefficients for the tenant that is `loaded`; the model itself is not changed.

    Errors: ConfigError (data, settings, architecture), SiteError if it is not of this family.
    """
    check_inputs(family.header, safety, task, benign, settings)
    check_head(loaded)
    examples = shots(loaded, safety, task, benign, settings)
    weights = {"safety": 1.0, "task": settings.task, "benign": settings.benign}
    layers = [entry.layer for entry in family.header.layers]
    train_parts: list[Part] = []
    held_parts: list[Part] = []
    # Whether an answer becomes a refusal shows in its first tokens; later ones would dilute that.
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
        kept, held = _split(rows, settings.held_out, f"{settings.seed}-{kind}")
        for part, into in ((kept, train_parts), (held, held_parts)):
            into.append(_listen(loaded, part, kind, weights[kind], layers[0], settings.batch))
    found = _optimise(
        loaded, family, layers, train_parts, held_parts, settings, run or Run(None, {}), progress
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
        **found.record,
    }
    values = dict(zip(layers, found.best, strict=True))
    return make_profile(family.header, values, record)


def _split(rows: Sequence[Encoded], share: float, seed: str) -> tuple[list[Encoded], list[Encoded]]:
    """(kept, held out), at least one of each."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = min(len(rows) - 1, max(1, round(len(rows) * share)))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


@contextmanager
def _from_layer(model: Any, first: int, below: Any) -> Iterator[None]:
    """Layers before `first` are not run: the last of them returns `below`, as it did once."""
    modules: list[Any] = layer_modules(model)[:first]
    try:
        for module in modules:
            module.forward = lambda *args, **kwargs: below
        yield
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def _listen(
    loaded: Loaded, rows: list[Encoded], kind: str, weight: float, first: int, size: int
) -> Part:
    """Run the untouched tenant over the rows once; what later steps reuse is kept."""
    batches, reference, below = [], [], []
    layers = layer_modules(loaded.model)
    for chosen in in_order([len(row.ids) for row in rows], size):
        batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
        caught: list[Any] = []
        handles = (
            [
                layers[first - 1].register_forward_hook(
                    lambda m, i, out, into=caught: into.append(out)
                )
            ]
            if first
            else []
        )
        reference.append(answer_states(loaded.model, batch))
        for handle in handles:
            handle.remove()
        batches.append(batch)
        below.append(caught[0] if caught else None)
    return Part(kind, weight, batches, None if kind == "safety" else reference, below)


def part_loss(loaded: Loaded, part: Part, number: int, first: int) -> torch.Tensor:
    """The loss of one batch of a part, at the coefficients that are attached."""
    batch, head = part.batches[number], head_of(loaded.model)
    with _from_layer(loaded.model, first, part.below[number]):
        logits = head(answer_states(loaded.model, batch))
    if part.reference is None:
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    else:
        expected = torch.log_softmax(head(part.reference[number]), dim=-1)
        losses = (expected.exp() * (expected - torch.log_softmax(logits, dim=-1))).sum(dim=-1)
    return (losses * batch.share).sum() / len(batch.ids)


@dataclass(frozen=True)
class Found:
    """The best coefficients by the held-out loss, in the order of the layers, and how they came."""

    best: list[float]
    record: dict[str, Any]


def _optimise(
    loaded: Loaded,
    family: Family,
    layers: list[int],
    train_parts: list[Part],
    held_parts: list[Part],
    settings: Calibration,
    run: Run,
    progress: Progress,
) -> Found:
    attached = Attached(family.lora_weights, family.header.num_layers, loaded.device)
    low, high = family.header.bounds
    count = 1 if settings.tied else len(layers)
    values = torch.full((count,), settings.initial, device=loaded.device, requires_grad=True)
    place = torch.tensor(layers, device=loaded.device)
    optimizer = torch.optim.Adam([values], lr=settings.lr, betas=(0.9, 0.95))

    def put(at: torch.Tensor) -> None:
        fresh = torch.zeros(family.header.num_layers, device=loaded.device)
        attached.coefficients = fresh.index_put((place,), at.expand(len(layers)))

    @torch.no_grad()
    def held(at: torch.Tensor) -> dict[str, float]:
        put(at)
        return {
            part.name: sum(
                float(part_loss(loaded, part, n, layers[0])) * len(part.batches[n].ids)
                for n in range(len(part.batches))
            )
            / sum(len(batch.ids) for batch in part.batches)
            for part in held_parts
        }

    def total(found: dict[str, float]) -> float:
        return sum(part.weight * found[part.name] for part in held_parts)

    looks: list[dict[str, float]] = []
    losses: list[float] = []
    with attached.on(loaded.model), stop_requests() as stop_wanted:
        before = held(torch.zeros_like(values))
        # Nothing is the first guess, or what is nearest to it within the bounds.
        best = torch.zeros_like(values).clamp(low, high)
        best_loss = total(before if low <= 0.0 <= high else held(best))
        if (kept := run.load()) is not None:
            tensors, notes = kept
            values.data.copy_(tensors["values"])
            best, best_loss = tensors["best"].to(values.device), float(notes["best_loss"])  # type: ignore[arg-type]
            losses, looks = list(notes["losses"]), list(notes["looks"])  # type: ignore[call-overload]
            optimizer.state[values] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": tensors["exp_avg"].to(values.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(values.device),
            }
        since = int(looks[-1]["since"]) if looks else 0
        for step in range(len(losses), settings.steps):
            if since >= settings.patience:
                break
            put(values)
            loss = settings.pull * (values - settings.initial).square().mean()
            for part in train_parts:
                loss = loss + part.weight * part_loss(
                    loaded, part, step % len(part.batches), layers[0]
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
                found = held(values.detach())
                since = 0 if total(found) < best_loss else since + 1
                if since == 0:
                    best, best_loss = values.detach().clone(), total(found)
                looks.append({**found, "total": total(found), "since": since, "step": step + 1})
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
                {"losses": losses, "looks": looks, "best_loss": best_loss},
                # The last step is kept as well: what writes the profile may fail.
                now=stopping or ended,
            )
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to go on")
        kept_values = [min(max(round(v, 4), low), high) for v in best.expand(len(layers)).tolist()]
        after = held(torch.tensor(kept_values, device=loaded.device))
    record = {
        "steps": len(losses),
        "losses": losses,
        "held_out": looks,
        "before": {name: round(value, 6) for name, value in before.items()},
        "after": {name: round(value, 6) for name, value in after.items()},
    }
    return Found(kept_values, record)
