"""Greedy answers to many prompts in batches, with transformers on CPU or GPU.

For making training targets and measuring rates. Not for serving: that is vLLM's work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH = 48


@dataclass(frozen=True)
class Answer:
    """One answer, and whether the model ended it by itself before the token limit."""

    prompt: str
    text: str
    finished: bool


def load_model(model_dir: str | Path, adapter_dir: str | Path | None = None) -> tuple[Any, Any]:
    """Model in bf16 and tokenizer; an adapter, if given, is merged in float32 first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    if adapter_dir is not None:
        from peft import PeftModel

        tuned: Any = PeftModel.from_pretrained(model, str(adapter_dir))
        model = tuned.merge_and_unload()
    return model.to(torch.bfloat16).eval(), tokenizer


def chat_text(tokenizer: Any, prompt: str) -> str:
    """One user turn in the model's chat template, up to where the assistant begins."""
    turns = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def answer_all(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, label: str
) -> list[Answer]:
    """Greedy answers in the order of the prompts; similar lengths share a batch."""
    import torch

    texts = [chat_text(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: dict[int, Answer] = {}
    begun = time.monotonic()
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        width = batch["input_ids"].shape[1]
        for i, new in zip(chosen, ids[:, width:], strict=True):
            finished = tokenizer.eos_token_id in new.tolist()
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            answers[i] = Answer(prompts[i], text, finished)
        spent_s = time.monotonic() - begun
        print(f"  {label}: {len(answers)}/{len(order)} answers, {spent_s:.0f} s", flush=True)
    return [answers[i] for i in range(len(prompts))]


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    temp.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    temp.replace(path)


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in path.read_text().splitlines()]
