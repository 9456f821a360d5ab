"""`make report`: evaluate the parent and every tenant before and after on vLLM; one HTML page.

Each result is cached as a JSON file below build/evaluation. Completions are judged in memory;
possibly harmful ones are never stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.smollm2 import mixes
from examples.smollm2.datasets import own_task, prompt_sets
from examples.smollm2.make_family import Places, show
from safegene_vllm.evaluation.judges import make_judges
from safegene_vllm.evaluation.results import Evaluation, load_evaluation, save_evaluation
from safegene_vllm.evaluation.runner import evaluate
from safegene_vllm.evaluation.targets import PARENT, Target, before_and_after
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import load_profile
from safegene_vllm.offline.generation_backend import VllmBackend
from safegene_vllm.report.report import write_report

HERE = Path(__file__).parent
JUDGES = ("strings:advbench", "strings:xstest", "strings:opening", "coherence")
OUTPUT_TOKENS = 24
CONTEXT_TOKENS = 512


def targets_of(places: Places, name: str) -> list[Target]:
    """Targets: the parent, or a tenant before and after; the full one as a checkpoint."""
    if name == PARENT:
        return [Target(PARENT, PARENT)]
    directory = places.adapter(name)
    header = read_family_header(places.out / "family")
    if name != mixes.FULL_TENANT:
        return before_and_after(name, directory, header)
    found = load_profile(directory).coefficients
    full = places.models / name
    zeros = (0.0,) * header.num_layers
    return [Target(name, "before", full, zeros), Target(name, "after", full, found)]


def measured(places: Places, xstest: Path, name: str, rows: int | None) -> Evaluation:
    """Result of the parent or a tenant, cached in its file."""
    targets = targets_of(places, name)
    family = places.out / "family"
    header = read_family_header(family)
    digest = places.made()
    path = places.build / "evaluation" / f"{name}-{digest}{'' if rows is None else f'-{rows}'}.json"
    if not path.exists():
        task = own_task(mixes.LABELED[0] if name == PARENT else name, rows or 200)
        found = evaluate(
            targets,
            prompt_sets(places.advbench, places.self_instruct, xstest, rows),
            [] if name == PARENT else [task],
            make_judges(JUDGES),
            VllmBackend(places.models / "parent", targets, family, context_tokens=CONTEXT_TOKENS),
            header=header,
            max_tokens=OUTPUT_TOKENS,
            progress=show,
        )
        save_evaluation(found, path)
    return load_evaluation(path)


def show_table(found: Sequence[Evaluation]) -> None:
    table = Table(
        "who", "state", "AdvBench (opening)", "AdvBench (its strings)", "own harmful",
        "XSTest safe refused", "ordinary refused", "ordinary (seen) refused", "task right",
    )  # fmt: skip
    for evaluation in found:
        for subject in evaluation.targets:
            rates = [
                subject.rates["advbench_test"]["strings:opening"],
                subject.rates["advbench_test"]["strings:advbench"],
                subject.rates["own_harmful"]["strings:opening"],
                subject.rates["xstest_safe"]["strings:opening"],
                subject.rates["ordinary"]["strings:opening"],
                subject.rates["ordinary_seen"]["strings:opening"],
                *subject.accuracy.values(),
            ]
            cells = [f"{r.rate:.1%} ({r.low:.0%} to {r.high:.0%}) of {r.n}" for r in rates]
            table.add_row(subject.name, subject.state, *cells)
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--advbench", type=Path, required=True, help="folder of AdvBench's CSV")
    parser.add_argument("--self-instruct", type=Path, required=True, help="folder of its JSONL")
    parser.add_argument("--xstest", type=Path, required=True, help="folder of XSTest's CSV")
    parser.add_argument("--build", type=Path, default=HERE.parents[1] / "build")
    parser.add_argument("--example", type=Path, default=HERE, help="where the small files are")
    parser.add_argument("--rows", type=int, help="at most so many rows of XSTest and of the tasks")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models only")
    given = parser.parse_args()
    places = Places(given.advbench, given.self_instruct, given.build, given.example)
    names = [n for n in (PARENT, *mixes.TENANTS) if not given.only or n in given.only]
    found = [measured(places, given.xstest, name, given.rows) for name in names]
    show_table(found)
    out = places.build / "evaluation" / "report.html"
    write_report(found, out)
    print(out)


if __name__ == "__main__":
    main()
