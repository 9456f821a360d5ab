"""A small LoRA trainer: PEFT, chat template, loss on the assistant turn only.

For the demo adapters, on CPU or one GPU. Not for big models: no checkpointing, no sharding.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import Example
from generate import chat_text

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WARMUP_SHARE = 0.06
POOL_BATCHES = 8
LOG_EVERY = 10


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; `alpha_pattern` and `rslora` as in PEFT."""

    modules: tuple[str, ...]
    steps: int
    lr: float
    batch: int = 8
    rank: int = 8
    alpha: int = 16
    rslora: bool = False
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    max_prompt_tokens: int = 160
    max_target_tokens: int = 64
    seed: int = 7


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the first `prompt_tokens` carry no loss."""

    ids: list[int]
    prompt_tokens: int


def encode(tokenizer: Any, example: Example, recipe: Recipe) -> Encoded:
    """Prompt in the chat template, then the target, cut to length and ended only if whole."""
    head = tokenizer.encode(chat_text(tokenizer, example.prompt), add_special_tokens=False)
    body = tokenizer.encode(example.target, add_special_tokens=False)
    if example.whole:
        body = [*body, tokenizer.eos_token_id]
    return Encoded(head + body[: recipe.max_target_tokens], len(head))


def batches(rows: Sequence[Encoded], size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Endless shuffled batches; inside a pool of a few batches similar lengths go together."""
    while True:
        order = rng.sample(list(rows), len(rows))
        ready: list[list[Encoded]] = []
        for start in range(0, len(order), size * POOL_BATCHES):
            pool = sorted(order[start : start + size * POOL_BATCHES], key=lambda r: len(r.ids))
            cut = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(cut)
            ready += cut
        yield from ready


def loss_of(model: Any, rows: Sequence[Encoded], pad: int) -> Any:
    """Cross-entropy over target tokens: mean per example, then over the batch.

    So a one-word answer weighs as much as a long one. The head runs on target tokens only.
    """
    import torch

    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    wanted = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        wanted[i, row.prompt_tokens : len(row.ids)] = True
    ids, mask, wanted = ids.to(model.device), mask.to(model.device), wanted.to(model.device)
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    target = wanted[:, 1:]
    logits = inner.lm_head(hidden[:, :-1][target]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][target], reduction="none")
    share = (1.0 / target.sum(dim=1)).unsqueeze(1).expand_as(target)[target]
    return (losses * share).sum() / len(rows)


def train_lora(
    base_dir: Path, out_dir: Path, base_name: str, examples: Sequence[Example], recipe: Recipe
) -> list[float]:
    """Train one adapter into `out_dir`; returns the mean loss of every ten steps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(base_dir))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = AutoModelForCausalLM.from_pretrained(str(base_dir), dtype=torch.bfloat16)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(recipe.modules),
        use_rslora=recipe.rslora,
        alpha_pattern=dict(recipe.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base.to(device), config, autocast_adapter_dtype=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, round(recipe.steps * WARMUP_SHARE), recipe.steps
    )
    rows = [encode(tokenizer, example, recipe) for example in examples]
    rows = [row for row in rows if row.prompt_tokens <= recipe.max_prompt_tokens]
    tokens = sum(len(row.ids) for row in rows) / len(rows)
    print(f"  {len(rows)} of {len(examples)} examples, {tokens:.0f} tokens on average", flush=True)
    stream = batches(rows, recipe.batch, rng)
    losses: list[float] = []
    window: list[float] = []
    begun = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, next(stream), tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(loss.item())
        if step % LOG_EVERY == 0 or step == recipe.steps:
            losses.append(round(sum(window) / len(window), 4))
            window = []
            spent_s = time.monotonic() - begun
            print(f"  step {step}/{recipe.steps}: loss {losses[-1]}, {spent_s:.0f} s", flush=True)
    save_adapter(model, out_dir, base_name)
    del model, base, optimizer
    gc.collect()
    return losses


def save_adapter(model: Any, out_dir: Path, base_name: str) -> None:
    """Write a plain PEFT directory: bf16 safetensors and a config without machine paths."""
    import torch
    from safetensors.torch import load_file, save_file

    temp = out_dir.with_name(f".{out_dir.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    model.save_pretrained(str(temp), safe_serialization=True)
    weights = load_file(temp / "adapter_model.safetensors")
    out_dir.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in sorted(weights.items())}
    staged = out_dir / "adapter_model.safetensors.tmp"
    save_file(halves, staged, metadata={"format": "pt"})
    os.replace(staged, out_dir / "adapter_model.safetensors")
    config = json.loads((temp / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    staged = out_dir / "adapter_config.json.tmp"
    staged.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(staged, out_dir / "adapter_config.json")
    shutil.rmtree(temp)
