"""SaLoRA (Li et al. 2025, arXiv:2501.01765): a LoRA trained away from what harmful prompts excite.

Training time: per target module a fixed C = I - V_s V_sᵀ, a task-specific start (B0, A0), and
y = W_res x + C B A x with W_res = W - C B0 A0, so training begins at exactly W. Served, it is a
plain LoRA of rank 2R on W. Repairs of trained LoRAs are in baselines.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.safety_utility.baselines import as_adapter
from safegene_vllm.chat import prompt_tokens
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of, save_adapter
from safegene_vllm.recipe.difference import truncated_lora
from safegene_vllm.recipe.encoding import (
    Batches,
    Encoded,
    Example,
    batches_by_length,
    collate,
    encode,
)
from safegene_vllm.recipe.finetune import completion_loss
from safegene_vllm.recipe.model import LoadedModel, check_head, find_target_modules, load_model
from safegene_vllm.recipe.training import Progress, Run, Schedule, silent, train

FORWARD_BATCH = 16


@dataclass(frozen=True)
class SaLoRA:
    """Settings. Published: rank 16, safety_rank = task_rank = 32, lr 1e-4.

    The rank served is twice `rank`; 8 here, so that it fits slots of 16. `modules` None: every
    linear module inside the layers. `prompts`: the most of each kind that V_s and V_t are taken
    from.
    """

    steps: int = 100
    lr: float = 1e-4
    batch: int = 8
    rank: int = 8
    safety_rank: int = 32
    task_rank: int = 32
    modules: tuple[str, ...] | None = None
    max_answer_tokens: int = 24
    prompts: int = 64
    seed: int = 0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "modules": None if self.modules is None else list(self.modules)}


def linear_sites(model: Any, modules: tuple[str, ...] | None) -> dict[str, torch.nn.Linear]:
    """Every linear module inside the layers, or those whose last name is in `modules`."""
    every = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and layer_of(name) is not None
    }
    endings = {name.rpartition(".")[2] for name in every}
    if unknown := sorted(set(modules or ()) - endings):
        raise ConfigError(f"no module is named {unknown}; expected some of {sorted(endings)}")
    return {n: m for n, m in every.items() if n.rpartition(".")[2] in (modules or endings)}


@torch.no_grad()
def output_directions(
    loaded: LoadedModel, prompts: Sequence[str], sites: Mapping[str, torch.nn.Linear], rank: int
) -> dict[str, torch.Tensor]:
    """Per site the leading left singular vectors of W X, X the inputs at all prompt tokens.

    (D_out, at most `rank`) float32, orthonormal columns; directions without any output are
    omitted. Through the Gram matrix of the smaller side of W, in float64. Errors: ConfigError.
    """
    if not prompts:
        raise ConfigError("no prompts given; expected at least one to take directions from")
    ids = prompt_tokens(loaded.tokenizer, prompts)
    rows = [Encoded(tuple(row), len(row)) for row in ids]
    grams: dict[str, torch.Tensor] = {}
    mask = torch.zeros(0)

    def record(site: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if module.out_features > module.in_features:
                found = inputs[0][mask].double()
            else:
                found = (output if module.bias is None else output - module.bias)[mask].double()
            grams[site] = grams.get(site, 0.0) + found.T @ found

        return hook

    with ExitStack() as stack:
        for site, module in sites.items():
            stack.callback(module.register_forward_hook(record(site)).remove)
        for chosen in batches_by_length([len(row.ids) for row in rows], FORWARD_BATCH):
            batch = collate([rows[i] for i in chosen], loaded.pad).to(loaded.device)
            mask = batch.mask.bool()
            loaded.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    found: dict[str, torch.Tensor] = {}
    for site, module in sites.items():
        if module.out_features > module.in_features:
            found[site] = spread(module.weight.double(), grams[site], rank).float()
        else:
            found[site] = leading(grams[site], rank)[0].float()
    return found


def leading(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (D, at most `rank`) of a Gram matrix (D, D) and their values, largest first."""
    values, vectors = torch.linalg.eigh(gram)
    nonzero = values[-rank:] > values[-1] * torch.finfo(torch.float64).eps * len(gram)
    return vectors[:, -rank:][:, nonzero].flip(1), values[-rank:][nonzero].flip(0)


def spread(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors of W X from X Xᵀ (D_in, D_in): (D_out, at most `rank`).

    Semantics: with X Xᵀ = L Lᵀ they are those of M = W L: u = M v / σ, where Mᵀ M v = σ² v.
    """
    vectors, values = leading(gram, len(gram))
    m = weight @ (vectors * values.sqrt())
    right, squares = leading(m.T @ m, rank)
    return (m @ right) / squares.sqrt()


def start_lora(weight: torch.Tensor, task: torch.Tensor, rank: int) -> LoRAWeights:
    """A0 = √S Vᵀ (R, D_in) and B0 = V_t V_tᵀ U √S (D_out, R), with U S Vᵀ the top R of W's SVD."""
    lora, _, _ = truncated_lora(weight.detach().float().cpu(), rank)
    return LoRAWeights(lora.a, task.cpu() @ (task.cpu().T @ lora.b))


class Guarded:
    """The trained part on a running model; the model's weights stay W.

    Semantics: y ← y + C B A x - C B0 A0 x, float32, cast to y's dtype, C = I - V_s V_sᵀ. With
    y = W x this is W_res x + C B A x. a (R, D_in) and b (D_out, R) are trained, from A0 and B0.
    """

    def __init__(
        self,
        starts: Mapping[str, LoRAWeights],
        safety: Mapping[str, torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.a0 = {s: p.a.to(device, torch.float32) for s, p in starts.items()}
        self.b0 = {s: p.b.to(device, torch.float32) * p.scaling for s, p in starts.items()}
        self.safety = {s: safety[s].to(device, torch.float32) for s in starts}
        self.guarded_b0 = {s: self.guard(s, b) for s, b in self.b0.items()}
        self.a = {s: t.clone() for s, t in self.a0.items()}
        self.b = {s: t.clone() for s, t in self.b0.items()}

    def parameters(self) -> dict[str, torch.Tensor]:
        """What is trained, by `<site>.A` and `<site>.B`."""
        halves = {f"{s}.A": t for s, t in self.a.items()} | {f"{s}.B": t for s, t in self.b.items()}
        return {name: halves[name].requires_grad_() for name in sorted(halves)}

    def guard(self, site: str, b: torch.Tensor) -> torch.Tensor:
        """C b for b (D_out, R)."""
        v = self.safety[site]
        return b - v @ (v.T @ b)

    def lora_weights(self) -> dict[str, LoRAWeights]:
        """The LoRA on W: a = [A; A0] (2R, D_in), b = [C B, -C B0] (D_out, 2R), float32."""
        made = {}
        for site in self.a:
            b = self.guard(site, self.b[site].detach())
            a = torch.cat([self.a[site].detach(), self.a0[site]])
            made[site] = LoRAWeights(a.cpu(), torch.cat([b, -self.guarded_b0[site]], dim=1).cpu())
        return made

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Attached while the block runs. Errors: SiteError."""
        with ExitStack() as stack:
            for site, module in find_target_modules(model, self.a, "SaLoRA").items():
                stack.callback(module.register_forward_hook(self._hook(site)).remove)
            yield

    def _hook(self, site: str) -> Callable[..., torch.Tensor]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].float()
            trained = (x @ self.a[site].T) @ self.guard(site, self.b[site]).T
            initial = (x @ self.a0[site].T) @ self.guarded_b0[site].T
            return output + (trained - initial).to(output.dtype)

        return add


def balanced(lora: LoRAWeights) -> LoRAWeights:
    """The same ΔW with factors of one size, scaling 1: b = U √S and a = √S Vᵀ of ΔW's own SVD.

    [C B, -C B0] [A; A0] is a small difference of large products; engines keep adapters in bfloat16,
    which would round those. By QR of both factors in float64, so D_out x D_in is never formed.
    """
    q_b, r_b = torch.linalg.qr(lora.b.double() * lora.scaling)
    q_a, r_a = torch.linalg.qr(lora.a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    root = s.sqrt()
    return LoRAWeights(
        (root[:, None] * (vt @ q_a.T)).float().contiguous(), (q_b @ u * root).float().contiguous()
    )


def sample(prompts: Sequence[str], most: int, seed: int) -> list[str]:
    """At most `most` of the prompts, drawn by the seed."""
    if len(prompts) <= most:
        return list(prompts)
    return random.Random(seed).sample(list(prompts), most)


def prepared(
    loaded: LoadedModel, settings: SaLoRA, harmful: Sequence[str], task: Sequence[str]
) -> Guarded:
    """C and (B0, A0) of every site, from the model as it is."""
    sites = linear_sites(loaded.model, settings.modules)
    chosen = [sample(prompts, settings.prompts, settings.seed) for prompts in (harmful, task)]
    safety = output_directions(loaded, chosen[0], sites, settings.safety_rank)
    tasks = output_directions(loaded, chosen[1], sites, settings.task_rank)
    starts = {s: start_lora(m.weight, tasks[s], settings.rank) for s, m in sites.items()}
    return Guarded(starts, safety, loaded.device)


def train_salora(
    checkpoint: Path,
    examples: Sequence[Example],
    harmful: Sequence[str],
    settings: SaLoRA,
    out: Path,
    *,
    base_model: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
) -> list[float]:
    """Train on `checkpoint` (the aligned model) into the PEFT directory `out`; every step's loss.

    `harmful`: prompts alone, no completions. An interrupted run continues from `<out>.partial`.
    Errors: ConfigError (data, modules), NonFiniteError (loss), those of reading the checkpoint.
    """
    loaded = load_model(checkpoint, device=device, dtype=dtype)
    check_head(loaded)
    rows = encode(
        loaded.tokenizer,
        examples,
        max_answer_tokens=settings.max_answer_tokens,
        context_tokens=loaded.context_tokens,
    )
    guarded = prepared(loaded, settings, harmful, [example.prompt for example in examples])
    batches = Batches([len(row.ids) for row in rows], settings.batch, settings.seed)

    def loss_at(step: int) -> torch.Tensor:
        batch = collate([rows[i] for i in batches.at(step)], loaded.pad).to(loaded.device)
        return completion_loss(loaded.model, batch)

    job = {
        **settings.record(),
        "harmful": list(harmful),
        "data": [[list(row.ids), row.prompt_tokens] for row in rows],
    }
    run = Run(out.with_name(f"{out.name}.partial"), job, [checkpoint])
    with guarded.on(loaded.model):
        losses = train(
            guarded.parameters(),
            loss_at,
            Schedule(settings.steps, settings.lr),
            run,
            progress=progress,
        )
    lora_weights = {site: balanced(lora) for site, lora in guarded.lora_weights().items()}
    save_adapter(as_adapter(lora_weights, base_model), out, base_model=base_model)
    run.clear()
    return losses
