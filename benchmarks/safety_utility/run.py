"""`make bench-safety`: SafeGene against published repairs, on one parent and its tenants.

Same parent, tenants, prompts and judges for all methods; every method gives a LoRA per tenant, and
all are served side by side by one vLLM engine. Settings of the baselines are chosen on the training
split by one rule. Resumable: trained LoRAs and answers below build/safety_utility/ are used again.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks")]

import torch
from rich.console import Console

import mixes
import outcome
import repairs
import trained
from asking import Bench, choose_settings, compare
from make_family import show
from making import Places, make_repairs, parts_of, prepare, tenants_there
from provenance import origin
from questions import SHORT_ROWS, held_out
from safegene_vllm.errors import SafegeneError
from safegene_vllm.evaluation.backends import GenerationBackend
from safegene_vllm.evaluation.results import Evaluation
from safegene_vllm.evaluation.targets import Target, before_and_after
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.report.report import write_report

CONTEXT_TOKENS = 1024
FOLDERS = {
    "advbench": "harmful_behaviors.csv",
    "self-instruct": "seed_tasks.jsonl",
    "xstest": "xstest_prompts.csv",
}


def vllm_answerer(places: Places, subjects: Sequence[Target]) -> GenerationBackend:
    """One vLLM engine on the parent, the vector in its gain table, all subjects in its slots."""
    from safegene_vllm.offline.generation_backend import VllmBackend

    return VllmBackend(places.parent, subjects, places.family, context_tokens=CONTEXT_TOKENS)


def with_first(methods: Sequence[str]) -> list[str]:
    """In the house order; without a repair is always among them, the rule compares with it."""
    return [name for name in repairs.METHODS if name in {"none", *methods}]


def report(
    places: Places, evaluations: Mapping[str, Evaluation], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Table, markdown, plots and page; the numbers of the JSON line."""
    rows = outcome.rows_of(evaluations)
    Console(width=None if sys.stdout.isatty() else 160).print(outcome.table(rows))
    outcome.write_markdown(rows, chosen, places.work / "safety_utility.md")
    outcome.write_plot(rows, places.work)
    write_report(evaluations, places.work / "report.html", title="Safety and utility of repairs")
    settings = {
        tenant: {title: notes["chosen"] for title, notes in by_title.items()}
        for tenant, by_title in chosen.items()
    }
    return {**outcome.numbers(rows), "chosen": settings}


def run(
    places: Places, names: Sequence[str], methods: Sequence[str], *, short: bool, rows: int | None
) -> dict[str, Any]:
    """Everything, in order: make, train, choose, ask, report; the JSON line."""
    tenants = tenants_there(names)
    asked = {
        tenant: held_out(tenant, places.advbench, places.self_instruct, places.xstest, rows=rows)
        for tenant in tenants
    }
    prepare(places, methods)
    header = read_family_header(places.family)
    if "safegene" in methods:
        for tenant, directory in tenants.items():
            before_and_after(tenant, directory, header)
    safety = None
    if any(name.startswith("safemerge") for name in methods):
        out = places.work / "safety-lora"
        print("safety LoRA", flush=True)
        trained.train_safety(places.parent, places.advbench, out, show, short=short)
        safety = load_adapter(out)
    made = {
        tenant: make_repairs(
            places, tenant, methods, parts_of(directory, places, safety, methods), short=short
        )
        for tenant, directory in tenants.items()
    }
    bench = Bench(places, header, partial(vllm_answerer, places), short)
    chosen, records = choose_settings(bench, made)
    evaluations = compare(bench, tenants, methods, chosen, asked)
    return line(short, report(places, evaluations, records))


def line(short: bool, found: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON line: what was run, with what, and the numbers."""
    return {
        "benchmark": "safety_utility",
        **origin(torch.get_num_threads()),
        "short": short,
        "judge": outcome.OPENING,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, what in FOLDERS.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of {what}")
    parser.add_argument("--tenants", nargs="+", default=[], help=f"default: {mixes.TENANTS}")
    parser.add_argument(
        "--methods", nargs="+", default=repairs.DEFAULT, choices=list(repairs.METHODS)
    )
    parser.add_argument("--short", action="store_true", help="20 prompts a set, no choosing")
    parser.add_argument("--rows", type=int, help="so many held-out prompts a set (default: all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    arguments = parser.parse_args()
    for name, what in FOLDERS.items():
        folder = getattr(arguments, name.replace("-", "_"))
        if not (folder / what).is_file():
            parser.error(f"--{name} {folder}: there is no {what} in it")
    work = arguments.build / "safety_utility" / ("short" if arguments.short else "full")
    places = Places(
        arguments.advbench, arguments.self_instruct, arguments.xstest, arguments.build, work
    )
    methods = with_first(arguments.methods)
    try:
        rows = SHORT_ROWS if arguments.short else arguments.rows
        found = run(places, arguments.tenants, methods, short=arguments.short, rows=rows)
    except SafegeneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(json.dumps(found))


if __name__ == "__main__":
    main()
