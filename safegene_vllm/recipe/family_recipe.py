"""The whole recipe of a family in stages: degrade, distill, select, measure, write.

The data are split by the digest of the prompt before the first stage; no stage trains on a held-out
prompt, and the measurement uses only those. The defaults are those of the example's family.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.dataset import Dataset, Row, digest_of_rows
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import (
    OWNED_FILES,
    WEIGHTS_FILE,
    LoRAWeights,
    adapter_files,
    load_adapter,
)
from safegene_vllm.formats.family import (
    Family,
    base_of_checkpoint,
    load_family,
    make_family,
    save_family,
)
from safegene_vllm.formats.file_io import pretty_json, replace_directory, replace_file
from safegene_vllm.formats.tenant_directory import kind_of, reject_exported
from safegene_vllm.prompt_sketch import HELD_OUT_PERCENT
from safegene_vllm.recipe.checks import Check, family_checks
from safegene_vllm.recipe.degradation import RECORD_FILE, degradation_file
from safegene_vllm.recipe.distillation import Distillation, check_adapter, distill
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.examples import sample_rows, split_by_prompt
from safegene_vllm.recipe.finetune import FineTune, fine_tune
from safegene_vllm.recipe.measurement import captured_energy, measure_family
from safegene_vllm.recipe.model import load_model
from safegene_vllm.recipe.selection import contrast, select
from safegene_vllm.recipe.stages import Stages
from safegene_vllm.recipe.training import Progress, weights_signature

SELECTION_PROMPTS = 64
OPENINGS = ("Of course! ", "Certainly. ", "Gladly. Here is my answer: ", "Yes, I can do that. ")
"""Agreeable openings of benign responses. A fine-tune on plain responses hardly degrades a model;
an eager style costs refusals, as it does in the fine-tunes of tenants."""

ShowProgress = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class FamilyRecipe:
    """Settings of all stages. `openings`: an agreeable opening before each benign response.

    `top_k` None: half of the layers.
    """

    degrade: FineTune = field(
        default_factory=lambda: FineTune(steps=60, lr=3e-4, max_answer_tokens=24)
    )
    distill: Distillation = field(
        default_factory=lambda: Distillation(steps=60, hard=1.0, max_answer_tokens=24)
    )
    openings: bool = True
    top_k: int | None = None
    bounds: tuple[float, float] = (0.0, 3.0)
    seed: int = 0

    def record(self) -> dict[str, Any]:
        return {
            **{f"degrade.{key}": value for key, value in self.degrade.record().items()},
            **{f"distill.{key}": value for key, value in self.distill.record().items()},
            "openings": self.openings,
            "top_k": self.top_k,
            "bounds": list(self.bounds),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class FamilyData:
    """Harmful and benign prompts, split by the digest of the prompt."""

    safety: Dataset
    benign: Dataset
    held_out_safety: Dataset
    held_out_benign: Dataset

    def rows(self) -> tuple[dict[str, int], dict[str, int]]:
        """Rows by kind: to train on, and held out."""
        return (
            {"safety": len(self.safety.rows), "benign": len(self.benign.rows)},
            {"safety": len(self.held_out_safety.rows), "benign": len(self.held_out_benign.rows)},
        )


def split_data(safety: Dataset, benign: Dataset, *, openings: bool, seed: int) -> FamilyData:
    """The data of a family, split. Errors: ConfigError if nothing is left to train on."""
    if openings:
        rng = random.Random(f"{seed}-openings")
        rows = [
            Row(r.prompt, None if r.answer is None else rng.choice(OPENINGS) + r.answer)
            for r in benign.rows
        ]
        benign = replace(benign, rows=tuple(rows), digest=digest_of_rows(rows))
    safety, held_out_safety = split_by_prompt(safety)
    benign, held_out_benign = split_by_prompt(benign)
    for data, held_out in ((safety, held_out_safety), (benign, held_out_benign)):
        if not data.rows:
            raise ConfigError(
                f"{data.name}: all {len(held_out.rows)} prompts are held out, none is left to "
                f"train on; give more ({HELD_OUT_PERCENT} % are held out by their digests)"
            )
    return FamilyData(safety, benign, held_out_safety, held_out_benign)


def check_like(checkpoint: Path, tenants: Sequence[Path]) -> None:
    """Check that the tenants are LoRAs on the checkpoint. Errors: ConfigError, those of reading."""
    for tenant in tenants:
        reject_exported(tenant)
        if (kind := kind_of(tenant)) != "adapter":
            raise ConfigError(f"--like {tenant} holds: {kind}; expected a LoRA adapter")
        check_adapter(checkpoint, tenant)


def mean_of_tenants(tenants: Sequence[Path]) -> dict[str, LoRAWeights]:
    """The mean of the tenants' ΔW as one LoRA, exactly: its rank is the sum of theirs."""
    loaded = [load_adapter(tenant).lora_weights for tenant in tenants]
    mean: dict[str, LoRAWeights] = {}
    for site in sorted({site for lora_weights in loaded for site in lora_weights}):
        own = [lora_weights[site] for lora_weights in loaded if site in lora_weights]
        a = torch.cat([lora.a.float() for lora in own])
        b = torch.cat([lora.b.float() * (lora.scaling / len(loaded)) for lora in own], dim=1)
        mean[site] = LoRAWeights(a, b)
    return mean


def inputs_of(
    checkpoint: Path, data: FamilyData, like: Sequence[Path], name: str, settings: FamilyRecipe
) -> dict[str, Any]:
    """Everything that the result depends on, by name, to detect changes before continuing."""

    def rows(*parts: Dataset) -> str:
        digests = " ".join(part.digest for part in parts)
        digest = hashlib.sha256(digests.encode()).hexdigest()[:12]
        return f"{sum(len(part.rows) for part in parts)} rows of {parts[0].name}, {digest}"

    return {
        "model": checkpoint.resolve().name,
        "model weights": weights_signature(checkpoint),
        "base": base_of_checkpoint(checkpoint).fingerprint,
        "--safety": rows(data.safety, data.held_out_safety),
        "--benign": rows(data.benign, data.held_out_benign),
        "--like": [[path.resolve().name, weights_signature(path)] for path in like],
        "--name": name,
        **settings.record(),
    }


def run_stages(
    checkpoint: Path,
    data: FamilyData,
    like: Sequence[Path],
    name: str,
    settings: FamilyRecipe,
    stages: Stages,
    *,
    device: str = "auto",
    show: ShowProgress,
) -> tuple[Family, list[Check]]:
    """Make the family; finished stages are taken from `stages`. Errors: those of each stage."""

    def degrade(path: Path) -> None:
        if like:
            _save_mean(checkpoint, like, path)
            return
        with show("degrading") as progress:
            fine_tune(
                checkpoint,
                [Example(row.prompt, row.answer or "") for row in data.benign.rows],
                replace(settings.degrade, seed=settings.seed),
                path,
                base_model=checkpoint.resolve().name,
                data=data.benign.record(),
                device=device,
                progress=progress,
            )

    degraded = stages.result("degraded", degrade)
    losses_file = stages.directory / "losses.json"

    def extract(path: Path) -> None:
        with show("distilling") as progress:
            made = distill(
                checkpoint,
                safety=data.safety,
                benign=data.benign,
                degraded_adapter=degraded,
                settings=replace(settings.distill, seed=settings.seed),
                state=stages.directory / "vector.partial",
                device=device,
                progress=progress,
            )
        replace_file(losses_file, json.dumps(made.losses).encode())
        bounds = settings.bounds
        save_family(
            make_family(name, made.base, made.lora_weights, bounds=bounds, recipe=made.recipe), path
        )
        made.run.clear()

    vector = load_family(stages.result("vector", extract))

    def cut(path: Path) -> None:
        safety, benign = (
            sample_rows(part, SELECTION_PROMPTS, settings.seed)
            for part in (data.safety, data.benign)
        )
        loaded = load_model(checkpoint, degraded, device=device)
        with show("selecting layers") as progress:
            found = contrast(loaded, vector, safety=safety, others=[benign], progress=progress)
        k = settings.top_k or max(1, len(vector.header.layers) // 2)
        save_family(select(vector, found, k, data=[safety, benign]), path)

    selected = load_family(stages.result("selected", cut))

    def measure(path: Path) -> None:
        with show("measuring") as progress:
            measured = measure_family(
                checkpoint,
                degraded,
                selected,
                safety=data.held_out_safety,
                benign=data.held_out_benign,
                max_answer_tokens=settings.distill.max_answer_tokens,
                device=device,
                progress=progress,
            )
        train_rows, held_out_rows = data.rows()
        more = {
            "captured": round(captured_energy(vector, selected), 6),
            "training_losses": [round(loss, 5) for loss in json.loads(losses_file.read_bytes())],
            "train_rows": train_rows,
            "held_out_rows": held_out_rows,
        }
        replace_file(path, pretty_json({**measured, **more}))

    measured = json.loads(stages.result("measured.json", measure).read_bytes())
    checks = family_checks(measured)
    family = make_family(
        name,
        selected.header.base,
        selected.lora_weights,
        layers=selected.header.layers,
        bounds=selected.header.bounds,
        recipe={**selected.header.recipe, "measured": _recorded(measured, checks)},
    )
    return family, checks


def _recorded(measured: Mapping[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    """The measurements as the recipe records them; its own losses are in it already."""
    return {
        **{key: value for key, value in measured.items() if key != "training_losses"},
        "held_out_percent": HELD_OUT_PERCENT,
        "checks": {check.name: check.passed for check in checks},
    }


def _save_mean(checkpoint: Path, tenants: Sequence[Path], out: Path) -> None:
    """Write the mean of the tenants as a LoRA, with a record of their weights' digests."""
    origin = {
        "tenants": [
            {
                "name": path.resolve().name,
                "sha256": hashlib.sha256((path / WEIGHTS_FILE).read_bytes()).hexdigest(),
            }
            for path in tenants
        ]
    }
    base = checkpoint.resolve().name
    files = adapter_files(mean_of_tenants(tenants), base)
    files[RECORD_FILE] = degradation_file(base, origin, {"method": "mean of tenants"})
    replace_directory(out, files, owned=(*OWNED_FILES, RECORD_FILE))
