"""`make bench-safety`: SafeGene against published repairs, on one parent and its tenants.

Same parent, tenants, prompts and judges for all methods; every method gives a LoRA per tenant, and
all are served side by side by one vLLM engine. Settings of the baselines are chosen on the training
split by one rule. Trained LoRAs and completions below build/safety_utility/ are reused. Ends in one
JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import CONSOLE, ROOT, print_result, provenance, table
from benchmarks.safety_utility import report
from benchmarks.safety_utility.candidates import (
    Places,
    make_repairs,
    parts_of,
    prepare,
    tenant_paths,
    train_safety,
)
from benchmarks.safety_utility.evaluation import Bench, choose_settings, compare
from benchmarks.safety_utility.methods import METHODS
from benchmarks.safety_utility.prompts import SHORT_ROWS, held_out
from examples.smollm2 import mixes
from safegene_vllm.errors import SafegeneError
from safegene_vllm.evaluation.backends import GenerationBackend
from safegene_vllm.evaluation.results import Evaluation
from safegene_vllm.evaluation.targets import Target, before_and_after
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.report.report import write_report

CONTEXT_TOKENS = 1024
DATA_FILES = {
    "advbench": "harmful_behaviors.csv",
    "self-instruct": "seed_tasks.jsonl",
    "xstest": "xstest_prompts.csv",
}


def vllm_backend(places: Places, targets: Sequence[Target]) -> GenerationBackend:
    """One vLLM engine on the parent, the vector in its gain table, all targets in its slots."""
    from safegene_vllm.offline.generation_backend import VllmBackend

    return VllmBackend(places.parent, targets, places.family, context_tokens=CONTEXT_TOKENS)


def with_none(methods: Sequence[str]) -> list[str]:
    """The methods in order, with `none` among them, as the rule compares with it."""
    return [name for name in METHODS if name in {"none", *methods}]


def write_results(
    places: Places, evaluations: Mapping[str, Evaluation], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Tables, plots and page; the numbers of the JSON line."""
    rows = report.rows_of(evaluations)
    tables = report.tables(rows, chosen)
    for caption, found in tables.items():
        CONSOLE.print(table(found, caption))
    replace_file(places.work / "safety_utility.md", report.as_markdown(tables).encode())
    report.write_plot(rows, places.work)
    write_report(evaluations, places.work / "report.html", title="Safety and utility of repairs")
    settings = {
        tenant: {title: notes["chosen"] for title, notes in by_title.items()}
        for tenant, by_title in chosen.items()
    }
    return {**report.numbers(rows), "chosen": settings}


def run(
    places: Places, names: Sequence[str], methods: Sequence[str], *, short: bool, rows: int | None
) -> dict[str, Any]:
    """Make, train, choose, evaluate and report; return the numbers of the JSON line."""
    tenants = tenant_paths(names)
    prompts = {
        tenant: held_out(tenant, places.advbench, places.self_instruct, places.xstest, rows=rows)
        for tenant in tenants
    }
    prepare(places, methods)
    header = read_family_header(places.family)
    if "safegene" in methods:
        for tenant, directory in tenants.items():
            before_and_after(tenant, directory, header)
    safety = load_adapter(train_safety(places, short=short)) if "safemerge" in methods else None
    made = {
        tenant: make_repairs(
            places, tenant, methods, parts_of(directory, places, safety, methods), short=short
        )
        for tenant, directory in tenants.items()
    }
    bench = Bench(places, header, partial(vllm_backend, places))
    chosen, records = choose_settings(bench, made)
    return write_results(places, compare(bench, tenants, methods, chosen, prompts), records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, file in DATA_FILES.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of {file}")
    parser.add_argument("--tenants", nargs="+", default=[], help=f"default: {mixes.TENANTS}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--short", action="store_true", help="20 prompts per set, no choosing")
    parser.add_argument("--rows", type=int, help="held-out prompts per set (default: all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    arguments = parser.parse_args()
    for name, file in DATA_FILES.items():
        folder = getattr(arguments, name.replace("-", "_"))
        if not (folder / file).is_file():
            parser.error(f"--{name} {folder}: does not contain {file}")
    short = arguments.short
    work = arguments.build / "safety_utility" / ("short" if short else "full")
    rows = SHORT_ROWS if short else arguments.rows
    methods = with_none(arguments.methods)
    try:
        places = Places(
            arguments.advbench, arguments.self_instruct, arguments.xstest, arguments.build, work
        )
        found = run(places, arguments.tenants, methods, short=short, rows=rows)
    except SafegeneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    origin = {**provenance(), "short": short, "judge": report.OPENING}
    print_result("safety_utility", {**origin, **found})


if __name__ == "__main__":
    main()
