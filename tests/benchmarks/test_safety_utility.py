"""The benchmark of repairs: prompts, choice and rates, and all of it on a tiny parent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipe_setup import tiny_chat_model, write_tokenizer

from benchmarks.safety_utility import (
    baselines,
    bench_safety,
    candidates,
    evaluation,
    methods,
    prompts,
    report,
)
from benchmarks.safety_utility.report import COLUMNS
from examples.smollm2 import data, mixes
from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.backends import GenerationBackend, TransformersBackend
from safegene_vllm.evaluation.results import load_evaluation
from safegene_vllm.evaluation.statistics import Rate, rate
from safegene_vllm.evaluation.targets import Target
from safegene_vllm.formats.adapter import Adapter, load_adapter
from safegene_vllm.recipe.model import load_model
from safegene_vllm.tiny_model import make_model, random_lora_weights, write_family, write_tenant

SITES = {f"model.layers.{n}.mlp.up_proj": (24, 16) for n in range(3)}


def adapter(seed: int, *, rank: int = 4, scaling: float = 1.0, sites: object = None) -> Adapter:
    lora_weights = random_lora_weights(SITES if sites is None else sites, rank, seed)
    return Adapter({s: replace(p, scaling=scaling) for s, p in lora_weights.items()}, "parent", {})


GRID = ("none", "safelora", "safemerge", "resta")


def point(attack: float, refused: float = 0.1, accuracy: float = 0.9) -> methods.CandidateRates:
    return methods.CandidateRates(attack, refused, accuracy)


def test_the_rule_takes_the_lowest_attack_success_within_both_limits() -> None:
    before, parent = point(0.8, 0.05), point(0.1, 0.1)
    candidates = [
        point(0.5),
        point(0.1, accuracy=0.88),
        point(0.1, refused=0.16),
        point(0.3, refused=0.15, accuracy=0.89),
        point(0.3, refused=0.15, accuracy=0.9),
        point(0.3, refused=0.15, accuracy=0.9),
    ]
    assert methods.choose(candidates, before, parent) == methods.Choice(4, True)


def test_where_nothing_is_within_the_limits_the_least_excess_is_taken_and_reported() -> None:
    candidates = [point(0.0, refused=0.9), point(0.6, accuracy=0.85), point(0.1, accuracy=0.5)]
    choice = methods.choose(candidates, point(0.8), point(0.1))
    assert choice == methods.Choice(1, False)
    rates = methods.choice_record([{"b": 1}, {"b": 2}, {"b": 3}], candidates, choice)
    assert rates["chosen"] == {"b": 2} and rates["within_limits"] is False
    assert rates["candidates"][0] == {
        "settings": {"b": 1},
        "attack": 0.0,
        "refused": 0.9,
        "accuracy": 0.9,
    }
    with pytest.raises(ConfigError, match="no candidates"):
        methods.choose([], point(0.8), point(0.1))


def parts(task: Adapter | None = None) -> methods.Parts:
    task = task or adapter(1)
    sites = {site: (lora.d_out, lora.d_in) for site, lora in task.lora_weights.items()}
    return methods.Parts(
        task,
        adapter(2, sites=sites).lora_weights,
        adapter(3, sites=sites),
        adapter(4, sites=sites).lora_weights,
    )


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.34, 2), (0.67, 3), (1.0, 3)])
def test_a_share_of_the_target_modules_is_changed_whatever_their_similarity(
    share: float, count: int
) -> None:
    given = parts()
    threshold = methods.threshold_of(given, {"share": share})
    assert methods.threshold_of(given, {"threshold": 0.35}) == 0.35
    projected = baselines.safe_lora(given.task, given.alignment, threshold=threshold)
    merged = baselines.safe_merge(given.task, given.safety, given.alignment, threshold=threshold)
    assert len(projected.changed) == count
    assert projected.changed == merged.changed


@pytest.mark.parametrize("name", GRID)
def test_every_candidate_has_a_directory_of_its_own_and_equal_bytes(
    name: str, tmp_path: Path
) -> None:
    grid = methods.METHODS[name].grid
    assert len({methods.label_of(settings) for settings in grid}) == len(grid)
    written = set()
    for settings in grid:
        out = tmp_path / methods.label_of(settings)
        methods.write_repair(name, parts(), settings, out, "parent")
        first = (out / "adapter_model.safetensors").read_bytes()
        methods.write_repair(name, parts(), settings, out, "parent")
        assert (out / "adapter_model.safetensors").read_bytes() == first
        written.add(first)
        rates = json.loads((tmp_path / f"{out.name}.json").read_text())
        assert rates["settings"] == dict(settings) and "sites" in rates
    assert len(written) == 1 if name == "none" else len(written) > 1


@pytest.fixture(scope="module")
def advbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in of AdvBench's shape, about tea."""
    folder = tmp_path_factory.mktemp("advbench")
    lines = [f"Brew tea number {number},Sure" for number in range(130)]
    (folder / "harmful_behaviors.csv").write_text("\n".join(["goal,target", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def self_instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("self_instruct")
    for name, count in (("seed_tasks.jsonl", 80), ("user_oriented_instructions.jsonl", 40)):
        rows = [
            {
                "instruction": f"{name} {n}" + " long" * (n % 2 * 80),
                "instances": [{"input": "", "output": f"answer {n}"}],
            }
            for n in range(count)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def xstest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xstest")
    rows = [f"How do I kill process {n}?,{'safe' if n % 2 else 'unsafe'}" for n in range(60)]
    (folder / "xstest_prompts.csv").write_text("\n".join(["prompt,label", *rows]) + "\n")
    return folder


@pytest.mark.parametrize("tenant", mixes.TENANTS)
def test_settings_are_chosen_on_the_training_split_alone(
    tenant: str, advbench: Path, self_instruct: Path, xstest: Path
) -> None:
    training = {kind: data.prompts(kind, "train") for kind in ("harmful", "lookalike", "ordinary")}
    chosen = prompts.choosing_prompts(tenant)
    harmful = chosen.sets[prompts.HARMFUL].prompts
    harmless = chosen.sets[prompts.HARMLESS].prompts
    assert len(set(harmful)) == 24 and set(harmful) <= set(training["harmful"])
    assert len(set(harmless)) == 24
    assert len(set(harmless) & set(training["lookalike"])) == 12
    assert len(set(harmless) & set(training["ordinary"])) == 12
    task = [row.prompt for row in chosen.task.data.rows]
    allowed = [*training["lookalike"], *training["ordinary"]]
    if tenant in mixes.LABELED:
        allowed = [row["prompt"] for row in data.task_rows(tenant, "train")]
    assert len(set(task)) == 40 and set(task) <= set(allowed)

    held = prompts.held_out(tenant, advbench, self_instruct, xstest, rows=None)
    assert {name: s.kind for name, s in held.sets.items()} == {
        prompts.ATTACK: "harmful",
        prompts.OVER_REFUSAL: "over_refusal",
        prompts.ORDINARY: "benign",
    }
    assert held.sets[prompts.ATTACK].prompts == data.advbench(advbench)[1]
    assert len(held.sets[prompts.OVER_REFUSAL].prompts) == 30
    assert (held.task.name, held.task.labels) == (chosen.task.name, chosen.task.labels)
    for one in (held.task.data, *(s.data for s in held.sets.values())):
        assert {row.prompt for row in one.rows}.isdisjoint({*harmful, *harmless, *task})
    short = prompts.held_out(tenant, advbench, self_instruct, xstest, rows=20)
    sizes = {len(s.data.rows) for s in (*short.sets.values(), short.task)}
    assert sizes == {20}


def test_the_safety_lora_sees_neither_the_prompts_of_the_choice_nor_of_the_test(
    advbench: Path,
) -> None:
    examples = candidates.safety_examples(advbench, 0)
    seen = {example.prompt for example in examples}
    goals, test = data.advbench(advbench)
    assert set(goals) <= seen
    assert seen.isdisjoint({*test, *prompts.choosing_harmful()})
    assert seen.isdisjoint(data.prompts("harmful", "demo"))
    assert {example.answer for example in examples} <= set(data.REFUSALS)


def test_salora_trains_like_the_tenant_but_for_what_is_published() -> None:
    own = mixes.ADAPTERS["sentiment"].settings
    settings = candidates.salora_settings("sentiment", 1e-4, short=False)
    assert (settings.steps, settings.batch, settings.modules) == (own.steps, own.batch, own.modules)
    assert (settings.lr, settings.rank) == (1e-4, 8)
    assert (settings.safety_rank, settings.task_rank) == (32, 32)
    assert candidates.salora_settings("sentiment", None, short=False).lr == own.lr


def test_what_is_trained_is_trained_once_per_job(tmp_path: Path) -> None:
    out, calls = tmp_path / "lora", list[int]()

    def make() -> list[float]:
        out.mkdir(exist_ok=True)
        calls.append(1)
        return [2.0] * 10 + [1.0] * 5

    job = {"settings": {"lr": 1e-4}, "data": ["a"]}
    candidates.once(out, job, make)
    candidates.once(out, job, make)
    assert len(calls) == 1
    rates = json.loads((tmp_path / "lora.json").read_text())
    assert rates["loss_per_10_steps"] == [2.0, 1.0] and rates["settings"] == job["settings"]
    candidates.once(out, {**job, "data": ["b"]}, make)
    assert len(calls) == 2


def test_only_missing_stages_of_the_example_are_needed(tmp_path: Path) -> None:
    places = candidates.Places(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    everything = ["base", "completions", "parent-merged", "degraded"]
    assert sorted(candidates.needed_stages(places, list(methods.METHODS))) == sorted(everything)
    assert sorted(candidates.needed_stages(places, ["none", "safelora"])) == [
        "base",
        "parent-merged",
    ]
    (tmp_path / "smollm2" / "base").mkdir(parents=True)
    assert candidates.needed_stages(places, ["none"]) == ["parent-merged"]
    with pytest.raises(ConfigError, match="no tenant unknown; expected some of sentiment"):
        candidates.tenant_paths(["unknown"])


@pytest.mark.parametrize("short", [False, True])
def test_the_whole_comparison_on_a_tiny_parent(
    advbench: Path,
    self_instruct: Path,
    xstest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short: bool,
) -> None:
    for limit, tokens in (("OUTPUT_TOKENS", 6), ("CHOOSING_TOKENS", 5), ("LABEL_TOKENS", 4)):
        monkeypatch.setattr(evaluation, limit, tokens)
    model_dir = tiny_chat_model(tmp_path / "parent")
    family = write_family(model_dir, tmp_path / "family", layers=[1])
    tenant = tmp_path / "sentiment"
    write_tenant(model_dir, tenant, family, [0.0, 0.7], suffixes=("q_proj", "v_proj"))
    places = candidates.Places(advbench, self_instruct, xstest, tmp_path, tmp_path / "work")
    given = parts(load_adapter(tenant))
    methods = bench_safety.with_none(["safegene", "safelora", "resta", "safegene-1"])
    planned: list[list[Target]] = []

    def backend_for(targets: Sequence[Target]) -> GenerationBackend:
        planned.append(list(targets))
        return TransformersBackend(model_dir, family, dtype="float32", device="cpu", batch=64)

    def compared(bench: evaluation.Bench) -> tuple[dict[str, Any], dict[str, Any]]:
        made = candidates.make_repairs(places, "sentiment", methods, given, short=short)
        chosen, records = evaluation.choose_settings(bench, {"sentiment": made})
        requested = prompts.held_out(
            "sentiment", advbench, self_instruct, xstest, rows=20 if short else None
        )
        found = evaluation.compare(
            bench, {"sentiment": tenant}, methods, chosen, {"sentiment": requested}
        )
        return found, bench_safety.write_results(places, found, records)

    found, numbers = compared(evaluation.Bench(places, family.header, backend_for))
    assert len(planned) == (1 if short else 2)
    assert len({target.key for target in planned[-1]}) == 6
    result = found["sentiment"]
    assert result == load_evaluation(places.work / "sentiment.json")
    assert len(result.sets[prompts.ATTACK].digest) == 71
    assert result.sets[prompts.ATTACK].n == (20 if short else 100)
    states = [target.state for target in result.targets]
    assert states == ["parent", "before", "SafeLoRA", "RESTA", "SafeGene, all 1", "after"]
    coefficients = {target.state: target.coefficients for target in result.targets}
    assert coefficients["after"] == (0.0, 0.7)
    assert coefficients["SafeGene, all 1"] == (0.0, 1.0)
    assert coefficients["SafeLoRA"] is None and coefficients["before"] is None

    rates = numbers["tenants"]["sentiment"]
    assert list(rates) == [report.title_of(state) for state in states]
    after = result.target("sentiment", "after")
    assert after is not None
    measured = after.rates[prompts.ATTACK][report.OPENING].rate
    assert rates["SafeGene"]["attack_success_opening"]["rate"] == round(measured, 4)
    assert numbers["mean"]["RESTA"]["task_accuracy"] == rates["RESTA"]["task_accuracy"]["rate"]
    assert set(numbers["chosen"]["sentiment"]) == (set() if short else {"SafeLoRA", "RESTA"})
    text = (places.work / "safety_utility.md").read_text()
    assert "| SafeGene |" in text and ("| sentiment | RESTA | b " in text) != short
    for name in ("safety_utility.svg", "safety_utility.png", "report.html"):
        assert (places.work / name).stat().st_size > 1000
    json.dumps(numbers, allow_nan=False)

    class Silent(TransformersBackend):
        def generate(self, *given: Any) -> list[str]:
            raise AssertionError("every completion is cached")

    silent = evaluation.Bench(
        places, family.header, lambda targets: Silent(model_dir, family, dtype="float32")
    )
    assert compared(silent)[1] == numbers


def test_a_parent_merged_from_another_lora_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "EXAMPLE", tmp_path / "example")
    places = candidates.Places(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    base = make_model("llama", tmp_path / "smollm2" / "base", dtype="bfloat16")
    write_tokenizer(base)
    write_tenant(base, tmp_path / "example" / "parent", None, None, seed=1)
    write_tenant(base, tmp_path / "other", None, None, seed=2)
    for adapter_dir, fits in ((tmp_path / "example" / "parent", True), (tmp_path / "other", False)):
        merged = load_model(base, adapter_dir, device="cpu").model
        merged.save_pretrained(places.parent)
        if fits:
            candidates.check_parent(places)
        else:
            with pytest.raises(ConfigError, match=r"delete that checkpoint"):
                candidates.check_parent(places)


def test_means_are_over_the_tenants_and_every_method_has_a_look_of_its_own(tmp_path: Path) -> None:
    def cells(share: int) -> dict[str, Rate]:
        return dict.fromkeys(COLUMNS, rate([True] * share + [False] * (10 - share)))

    titles = [method.title for method in methods.METHODS.values()]
    assert len(set(report.looks().values())) == len(set(report.looks())) == len(set(titles))
    rows = {
        "topic": {"the parent itself": cells(0)} | {title: cells(2) for title in titles},
        "support": {"the parent itself": cells(1)} | {title: cells(7) for title in titles},
        "writer": {"the parent itself": cells(2)} | {title: cells(9) for title in titles[1:]},
    }
    means = report.means(rows)
    assert means["the parent itself"]["task_accuracy"] == pytest.approx(0.1)
    assert means["SafeGene"]["attack_success_opening"] == pytest.approx(0.6)
    assert titles[0] not in means, "a mean over fewer tenants is not comparable"
    chosen = {"topic": {"SaLoRA": {"chosen": {"lr": None}, "within_limits": False}}}
    tables = report.tables(rows, chosen)
    text = report.as_markdown(tables)
    assert "| SafeGene | 60.0 | 60.0 |" in text and "Mean over 3 tenants" in text
    assert "| topic | SaLoRA | lr own | exceeded |" in text
    assert {line.count("|") for line in text.splitlines() if "|" in line} == {8, 5}
    lengths = [len(lines) for _, lines in tables.values()]
    assert lengths == [len(means), *map(len, rows.values()), 1]
    svg, png = report.write_plot(rows, tmp_path)
    drawn = svg.read_text()
    assert all(name in drawn for name in (*rows, *titles, "the parent"))
    assert png.read_bytes().startswith(b"\x89PNG")
