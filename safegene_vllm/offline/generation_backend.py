"""Generation on vLLM for evaluations: tenants in LoRA slots, the vector in the gain table.

The path that serves tenants, with receipts checked before anything is generated. A tenant that is a
full checkpoint gets an engine of its own; its coefficients are the base model's profile there.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.chat import (
    check_template,
    completion_text,
    load_tokenizer,
    prompt_tokens,
    stop_tokens,
    truncate_at_stop,
)
from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.targets import (
    Target,
    adapter_of,
    check_targets,
    checkpoint_of,
    profile_of,
)
from safegene_vllm.formats.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter_shapes
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import Profile, make_profile, save_profile
from safegene_vllm.formats.receipt import check_engine, check_tenant, gain_digest
from safegene_vllm.offline.engine import Engine, Request, engine
from safegene_vllm.planner.slots import rank_bucket
from safegene_vllm.plugin import compat

MAX_SLOTS = 8
"""Targets are evaluated one after another, so few need to be on the device at once."""

CPU_CACHE_BYTES = 1 << 30
CPU_SEQUENCES = 64
GPU_SEQUENCES = 256


@dataclass(frozen=True)
class _Running:
    """An engine on one checkpoint, with its tokenizer."""

    checkpoint: Path
    engine: Engine
    tokenizer: Any
    stops: tuple[int, ...]
    work: Path


def slot_rank(targets: Sequence[Target]) -> int:
    """Return the smallest --max-lora-rank that holds every target's own LoRA.

    The gain table needs no rank. Errors: ConfigError if vLLM has no such rank.
    """
    directories = {directory for s in targets if (directory := adapter_of(s)) is not None}
    needed = max(
        (shape.rank for d in directories for shape in read_adapter_shapes(d).values()), default=1
    )
    return rank_bucket(max(needed, 8))


class VllmBackend:
    """One vLLM engine at a time, with all targets of its checkpoint in its slots.

    `model` is the checkpoint of targets without one of their own; `family` a directory;
    `context_tokens` is for the longest prompt with its completion. `options` are passed to every
    engine and override the defaults. Errors: those of `check_targets`; ConfigError for ranks.
    """

    backend = "vllm"

    def __init__(
        self,
        model: Path,
        targets: Sequence[Target],
        family: Path | None = None,
        *,
        dtype: str = "bfloat16",
        context_tokens: int = 2048,
        **options: Any,
    ) -> None:
        self.model, self.family, self.targets = Path(model), family, tuple(targets)
        self.dtype, self.context_tokens, self.options = dtype, context_tokens, options
        self.header: FamilyHeader | None = None if family is None else read_family_header(family)
        check_targets(self.targets, self.header)
        self.rank = slot_rank(self.targets)
        self._running: _Running | None = None
        self._tenants: dict[Target, Path | None] = {}
        self._stack = ExitStack()

    def generate(self, prompts: Sequence[str], target: Target, max_tokens: int) -> list[str]:
        """Generate one greedy completion per prompt, in order.

        Errors: ReceiptError if a worker did not apply what the target says; those of validation;
        ConfigError for a target that the backend was not made for.
        """
        if target not in self.targets:
            raise ConfigError(
                f"{target.key} was not among the targets that the backend was made for"
            )
        running = self._engine_of(checkpoint_of(target) or self.model)
        rows = prompt_tokens(running.tokenizer, prompts)
        tenant = self._directory_in(running, target)
        name = None if tenant is None else target.key
        found = running.engine.generate(
            [Request(row, tenant, name) for row in rows],
            max_tokens,
            ignore_eos=False,
            stop_token_ids=list(running.stops),
        )
        return [
            completion_text(running.tokenizer, truncate_at_stop(answer.tokens, running.stops))
            for answer in found
        ]

    def close(self) -> None:
        """Stop the engine and delete the copies of profiles."""
        self._running = None
        self._tenants.clear()
        self._stack.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _engine_of(self, checkpoint: Path) -> _Running:
        if self._running is None or self._running.checkpoint != checkpoint:
            self.close()
            self._running = self._start(checkpoint)
        return self._running

    def _start(self, checkpoint: Path) -> _Running:
        tokenizer = load_tokenizer(checkpoint)
        check_template(tokenizer)
        here = [s for s in self.targets if (checkpoint_of(s) or self.model) == checkpoint]
        settings = (
            {"family": None, "missing_profile": "serve_unprotected"}
            if self.family is None
            else {"family": str(self.family), "apply": "gain"}
        )
        slots = max(1, min(len(here), MAX_SLOTS))
        on_cpu = compat.resolve("current_platform").is_cpu()
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.context_tokens,
            "max_num_seqs": CPU_SEQUENCES if on_cpu else GPU_SEQUENCES,
            "kv_cache_memory_bytes": CPU_CACHE_BYTES if on_cpu else None,
            "max_loras": slots,
            "max_cpu_loras": max(slots, len(here)),
            "max_lora_rank": self.rank,
        }
        work = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="safegene-strengths-"))
        )
        running = self._stack.enter_context(
            engine(checkpoint, settings, **(options | self.options))
        )
        check_engine(running.receipts(), family=self.header.digest if self.header else None)
        stops = tuple(stop_tokens(checkpoint, tokenizer))
        return _Running(checkpoint, running, tokenizer, stops, work)

    def _directory_in(self, running: _Running, target: Target) -> Path | None:
        """Return the directory that the target is served from; None for the model itself."""
        if target in self._tenants:
            return self._tenants[target]
        profile = profile_of(target, self.header)
        adapter = adapter_of(target)
        if profile is not None and adapter is None and not any(profile.coefficients):
            profile = None
        directory = None
        if profile is not None or adapter is not None:
            directory = self._directory_of(running, target, profile, adapter)
            running.engine.add(directory, target.key)
        if profile is not None and directory is not None:
            check_tenant(
                running.engine.receipts(),
                target.key,
                profile=profile.digest,
                gain=gain_digest(profile.coefficients),
            )
        self._tenants[target] = directory
        return directory

    def _directory_of(
        self, running: _Running, target: Target, profile: Profile | None, adapter: Path | None
    ) -> Path:
        """Return the tenant's own directory, or a new one with its adapter linked and a profile."""
        own = target.directory
        if self.header is None:
            assert adapter is not None
            return adapter
        if profile is not None and target.coefficients is None and checkpoint_of(target) is None:
            assert own is not None
            return own
        directory = running.work / f"tenant-{len(self._tenants)}"
        directory.mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE) if adapter is not None else ():
            assert adapter is not None
            (directory / name).symlink_to((adapter / name).resolve())
        zero = [0.0] * self.header.num_layers
        save_profile(
            profile or make_profile(self.header, zero, {"method": "evaluation"}), directory
        )
        return directory
