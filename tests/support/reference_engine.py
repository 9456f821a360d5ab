"""The float32 reference that real engines are compared with; it knows nothing of vLLM.

Merges with `compose`; transformers decodes greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from safegene_vllm.composition import delta
from safegene_vllm.formats.adapter import layer_of, load_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import has_profile, load_profile
from safegene_vllm.offline.engine import Completion, Engine, Request, engine, max_logprob_diff

__all__ = ["Completion", "Engine", "Request", "engine", "max_logprob_diff", "reference"]


def reference(
    model: Path,
    family: Path,
    tenant: Path | None,
    prompts: Sequence[Sequence[int]],
    tokens: int = 12,
) -> list[Completion]:
    """Greedy completions of W + s B A + Σ λ_l B A, merged and run in float32 by transformers."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = dict(net.named_modules())
    with torch.no_grad():
        if tenant is not None and (tenant / "adapter_config.json").exists():
            for site, lora in load_adapter(tenant).lora_weights.items():
                modules[site].weight += delta(lora.folded(), 1.0)
        if tenant is not None and has_profile(tenant):
            coefficients = load_profile(tenant).coefficients
            for site, lora in load_family(family).lora_weights.items():
                modules[site].weight += delta(lora, coefficients[layer_of(site) or 0])
        return [_greedy(net, prompt, tokens) for prompt in prompts]


def _greedy(net: Any, prompt: Sequence[int], count: int) -> Completion:
    ids = torch.tensor([list(prompt)])
    tokens, logprobs = [], []
    for _ in range(count):
        scores = net(ids).logits[0, -1].log_softmax(-1)
        token = int(scores.argmax())
        tokens.append(token)
        logprobs.append(float(scores[token]))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return Completion(tuple(tokens), tuple(logprobs))
