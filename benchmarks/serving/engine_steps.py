"""`make bench`: prefill and decode alone, in engines of this machine without a server around them.

For looking at the products by themselves, where the serving benchmark mixes everything. Arms: stock
vLLM multi-LoRA without safety; our LoRA product without a vector; the gain table; composed slots.
Same model, tenants, prompts and settings, interleaved rounds. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks")]

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from provenance import origin
from random_world import World
from ratios import Spread, spread
from safegene_vllm.planner.slots import rank_bucket
from shown import spread_text

ARMS = ("stock", "ours, no vector", "gain table", "composed")
Seconds = dict[str, dict[str, list[float]]]
OPEN = {"family": None, "missing_profile": "serve_unprotected"}


@dataclass(frozen=True)
class Load:
    """What every arm is asked: tenants and base requests, prompt and output lengths in tokens."""

    tenants: int
    base_requests: int
    prompt_tokens: int
    output_tokens: int
    prefill_tokens: int


def arm_settings(arm: str, family: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(settings, VLLM_PLUGINS) of an arm."""
    if arm == "stock":
        return None, ""
    if arm == "ours, no vector":
        return OPEN, None
    return {"family": str(family), "apply": "gain" if arm == "gain table" else "composed"}, None


def serve_arm(
    pipe: Any, arm: str, model: Path, world: World, load: Load, options: dict[str, Any]
) -> None:
    """Child process: one engine; answers `decode` and `prefill` with seconds, `stop` ends it."""
    from safegene_vllm.offline.engine import Request, engine

    settings, plugins = arm_settings(arm, world.family(100))
    plain = arm in ("stock", "ours, no vector")
    numbers = range(load.tenants)
    tenants = [world.plain(i) if plain else world.protected(i, 100, i) for i in numbers]
    owners = [*tenants, *[None] * load.base_requests]

    def asks(length: int, salt: int) -> list[Request]:
        return [
            Request([3 + (salt + 7 * i + 13 * k) % 900 for k in range(length)], owner)
            for i, owner in enumerate(owners)
        ]

    with engine(model, settings, plugins=plugins, **options) as e:
        e.generate(asks(load.prompt_tokens, 0), 4)
        pipe.send("ready")
        salt = 0
        while (what := pipe.recv()) != "stop":
            salt += 1
            started = time.perf_counter()
            if what == "prefill":
                e.generate(asks(load.prefill_tokens, salt), 1)
            else:
                e.generate(asks(load.prompt_tokens, salt), load.output_tokens)
            pipe.send(time.perf_counter() - started)


def measure(
    model: Path, load: Load, *, rank: int, family_rank: int, rounds: int, compiled: bool
) -> Seconds:
    """Seconds per round: arm -> "decode" | "prefill" -> one value per round."""
    context = mp.get_context("spawn")
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_loras": load.tenants,
        "max_lora_rank": rank,
        "max_num_seqs": 16,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 512 << 20,
        "enforce_eager": not compiled,
    }
    seconds: Seconds = {a: {"decode": [], "prefill": []} for a in ARMS}
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        world = World(Path(folder), model, rank, family_rank)
        task = progress.add_task("writing adapters", total=len(ARMS) + 2 * rounds * len(ARMS))
        for i in range(load.tenants):
            world.protected(i, 100, i)
        children = {}
        for arm in ARMS:
            progress.update(task, description=f"starting: {arm}")
            mine, theirs = context.Pipe()
            slots = rank_bucket(rank + (family_rank if arm == "composed" else 0))
            child = context.Process(
                target=serve_arm,
                args=(theirs, arm, model, world, load, options | {"max_lora_rank": slots}),
            )
            child.start()
            theirs.close()
            assert mine.recv() == "ready", arm
            children[arm] = (mine, child)
            progress.advance(task)
        for k in range(rounds):
            for what in ("decode", "prefill"):
                for arm in ARMS if k % 2 == 0 else ARMS[::-1]:
                    progress.update(task, description=f"round {k + 1}/{rounds}: {what}, {arm}")
                    children[arm][0].send(what)
                    seconds[arm][what].append(children[arm][0].recv())
                    progress.advance(task)
        for pipe, child in children.values():
            pipe.send("stop")
            child.join()
    return seconds


def speed_ratio(seconds: Seconds, arm: str, base: str, what: str) -> Spread:
    """Speed of `arm` over speed of `base`, round by round."""
    lora_weights = zip(seconds[base][what], seconds[arm][what], strict=True)
    return spread(b / a for b, a in lora_weights)


def report(seconds: Seconds, load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table; return what the JSON line says."""
    requests = load.tenants + load.base_requests
    table = Table(
        "arm", "decode tok/s", "prefill tok/s", "decode vs no vector", "prefill vs no vector",
        title=f"{load.tenants} tenants of rank {arguments.rank} + {load.base_requests} base, "
        f"vector of rank {arguments.family_rank} on all layers, medians of {arguments.rounds}",
    )  # fmt: skip
    result: dict[str, Any] = {"tokens_per_s": {}, "ratios": {}}
    for arm in ARMS:
        decode = requests * load.output_tokens / statistics.median(seconds[arm]["decode"])
        prefill = requests * load.prefill_tokens / statistics.median(seconds[arm]["prefill"])
        against = [speed_ratio(seconds, arm, "ours, no vector", w) for w in ("decode", "prefill")]
        cells = [spread_text(found) for found in against]
        table.add_row(arm, f"{decode:.1f}", f"{prefill:.0f}", *cells)
        result["tokens_per_s"][arm] = {"decode": round(decode, 1), "prefill": round(prefill)}
    for name, (arm, base) in {
        "gain_table_over_no_vector": ("gain table", "ours, no vector"),
        "gain_table_over_stock": ("gain table", "stock"),
        "gain_table_over_composed": ("gain table", "composed"),
        "no_vector_over_stock": ("ours, no vector", "stock"),
    }.items():
        for what in ("decode", "prefill"):
            result["ratios"][f"{name}_{what}"] = speed_ratio(seconds, arm, base, what)
    Console().print(table)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--base-requests", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="rank of the tenants' adapters")
    parser.add_argument("--family-rank", type=int, default=8, help="rank of the safety vector")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=200, help="prompt of the prefill run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    arguments = parser.parse_args()
    model = arguments.model
    if model is None:
        from base import write_base

        model = ROOT / "build" / "smollm2" / "base"
        write_base(model)
    load = Load(
        arguments.tenants,
        arguments.base_requests,
        16,
        arguments.output_tokens,
        arguments.prefill_tokens,
    )
    seconds = measure(
        model,
        load,
        rank=arguments.rank,
        family_rank=arguments.family_rank,
        rounds=arguments.rounds,
        compiled=arguments.compiled,
    )
    result = report(seconds, load, arguments)
    told = {"benchmark": "engine_steps", **origin(torch.get_num_threads())}
    print(json.dumps({**told, "compiled": arguments.compiled, **result}))


if __name__ == "__main__":
    main()
