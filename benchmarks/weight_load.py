"""What does weight load cost at start? `--load-format safegene` against the stock loader.

Same checkpoint, interleaved, one process per load: seconds inside the loader and the process's peak
memory. Ends in one JSON line. Part of `make bench`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "smollm2"))

ARMS = ("stock", "safegene")


def load_once(pipe: Any, arm: str, model: Path, family: Path) -> None:
    """Child process: start an engine, send the loader's seconds and the peak memory in MB."""
    from safegene_vllm.plugin import host
    from safegene_vllm.plugin.offline import engine

    loader = host.resolve("DefaultModelLoader")
    stock, seconds = loader.load_weights, []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = stock(self, *args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    loader.load_weights = timed
    ours = arm == "safegene"
    settings = {"family": str(family), "apply": "weights"} if ours else None
    options = {} if ours else {"enable_lora": False}
    plugins = None if ours else ""
    with engine(model, settings, plugins=plugins, dtype="bfloat16", **options):
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds[0], peak_kb / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from base import write_base
    from safegene_vllm.family import read_family_header
    from safegene_vllm.profile import make_profile, save_profile

    family = ROOT / "examples" / "smollm2" / "family"
    base = write_base(ROOT / "build" / "smollm2" / "base")
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        shutil.copytree(base, model)
        save_profile(make_profile(read_family_header(family), 1.0), model)
        context = mp.get_context("spawn")
        rounds = [arm for k in range(arguments.rounds) for arm in ARMS[:: 1 if k % 2 == 0 else -1]]
        for arm in track(rounds, description="loading"):
            mine, theirs = context.Pipe()
            child = context.Process(target=load_once, args=(theirs, arm, model, family))
            child.start()
            found[arm].append(mine.recv())
            child.join()
    table = Table("loader", "seconds", "peak memory MB", title="weight load, medians")
    medians = {arm: [statistics.median(v) for v in zip(*found[arm], strict=True)] for arm in ARMS}
    for arm, (seconds, peak) in medians.items():
        table.add_row(arm, f"{seconds:.2f}", f"{peak:.0f}")
    Console().print(table)
    pairs = zip(found["safegene"], found["stock"], strict=True)
    ratios = sorted(ours[0] / stock[0] for ours, stock in pairs)
    print(
        json.dumps(
            {
                "benchmark": "weight_load",
                "load_s": {arm: round(medians[arm][0], 3) for arm in ARMS},
                "safegene_over_stock_load_time": {
                    "median": round(statistics.median(ratios), 2),
                    "min": round(ratios[0], 2),
                    "max": round(ratios[-1], 2),
                },
                "extra_peak_mb": round(medians["safegene"][1] - medians["stock"][1], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
