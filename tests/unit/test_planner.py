"""The planner: sizes against real checkpoints and published figures, and its invariants."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from safegene_vllm.cli import build_app, main
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import LoRAWeights, load_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.planner import (
    COMPARED,
    GPUS,
    Advice,
    ModelShape,
    Workload,
    advise,
    find_gpu,
    fit_slots,
    plan_mode,
    plan_modes,
    rank_bucket,
    read_shape,
)
from safegene_vllm.planner.slots import lora_bytes, slot_bytes, vector_bytes
from safegene_vllm.plugin.target_modules import stack_parts
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

ROOT = Path(__file__).parents[2]
QWEN = ROOT / "benchmarks" / "scaling" / "qwen2.5-7b"
H100 = find_gpu("h100-sxm")


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return read_shape(QWEN)


def stored_parameters(model: Path) -> int:
    infos = read_checkpoint(model).infos.values()
    return sum(info.end - info.begin for info in infos) // 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "glm4", "phi3"])
def test_parameters_are_those_of_the_checkpoint(arch: str, tied: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {} if arch in ("qwen2", "phi3") else {"attention_bias": True}
    if arch == "llama":
        more["mlp_bias"] = True
    model = make_model(arch, tmp_path, tie_word_embeddings=tied, **more)
    shape = read_shape(model)
    assert shape.parameters == stored_parameters(model)
    assert shape.parameters - shape.read_parameters == (0 if tied else 320 * 128)
    assert shape.remarks == ()


@pytest.mark.parametrize("arch", ["llama", "glm4", "phi3"])
def test_adapter_bytes_are_those_of_its_file(arch: str, tmp_path: Path) -> None:
    model = make_model(arch, tmp_path / "model")
    write_tenant(model, tmp_path / "all", None, None, rank=5)
    write_tenant(model, tmp_path / "some", None, None, rank=5, suffixes=("o_proj", "down_proj"))
    shape = read_shape(model)
    for name, targets in (("all", shape.sites), ("some", ("o_proj", "down_proj"))):
        lora_weights = load_adapter(tmp_path / name).lora_weights.values()
        held = sum(lora.a.nbytes + lora.b.nbytes for lora in lora_weights)
        assert lora_bytes(shape, targets, 5, 4) == held


def test_the_published_figures_of_qwen(qwen: ModelShape) -> None:
    assert qwen.parameters == 7_615_616_512
    vector = lora_bytes(qwen, qwen.sites, 16, 2)
    assert vector == 80_740_352
    weights = qwen.parameters * 2
    assert round(100 * vector / weights, 2) == 0.53
    gain = plan_mode(Workload(qwen, H100, tenants=16), "gain")
    composed = plan_mode(Workload(qwen, H100, tenants=16), "composed")
    more = composed.step.adapter_bytes - gain.step.adapter_bytes
    assert more == 16 * vector
    assert round(100 * more / weights, 1) == 8.5
    # A step does not read the embedding table.
    assert round(100 * more / gain.step.weight_bytes, 1) == 9.1


def test_stacking_packed_layers_holds_zeros(qwen: ModelShape) -> None:
    alone = ("o_proj", "down_proj")
    for stacked, every in ((True, 122_945_536), (False, 80_740_352)):
        held = vector_bytes(qwen, alone, 16, 28, 2, stacked=stacked)
        assert held == lora_bytes(qwen, alone, 16, 2)
        assert vector_bytes(qwen, qwen.sites, 16, 28, 2, stacked=stacked) == every
    real = 0
    for linear in qwen.linears:
        parts = [
            LoRAWeights(torch.zeros(16, linear.d_in), torch.zeros(w, 16)) for w in linear.widths
        ]
        found = stack_parts([*parts], linear.widths, dtype=torch.bfloat16, device="cpu")
        real += sum(tensor.nbytes for tensor in found)
    assert 28 * real == vector_bytes(qwen, qwen.sites, 16, 28, 2, stacked=True)
    assert slot_bytes(qwen, ("k_proj",), 16, 2) == slot_bytes(qwen, ("qkv_proj",), 16, 2)


def test_safety_is_constant_in_tenants_with_the_gain_table_alone(qwen: ModelShape) -> None:
    few, many = (Workload(qwen, H100, tenants=n, slots=8) for n in (8, 800))
    assert plan_mode(few, "gain").vector_bytes == plan_mode(many, "gain").vector_bytes
    assert plan_mode(few, "gain").step == plan_mode(many, "gain").step
    some, all_layers = (
        plan_mode(replace(few, vector_layers=layers), "gain").vector_bytes for layers in (14, 28)
    )
    assert 2 * some == all_layers
    eight, sixteen = (plan_mode(replace(few, slots=n, tenants=16), "composed") for n in (8, 16))
    assert sixteen.slot_bytes == 2 * eight.slot_bytes
    assert sixteen.step.adapter_bytes == 2 * eight.step.adapter_bytes


def test_a_step_adds_up(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=4, concurrency=4, launch_s=3e-6)
    gain, stock = plan_mode(workload, "gain"), plan_mode(workload, "stock")
    assert stock.step.launches == 3 * 4 * 28
    assert gain.step.launches == 2 * 4 * 28
    by_hand = 2 * qwen.read_parameters + 4 * (512 + 64) * 2 * 28 * 4 * 128 * 2
    by_hand += 4 * 80_740_352
    assert stock.step.bytes == by_hand
    assert stock.step.seconds == pytest.approx(by_hand / 3.35e12 + 336 * 3e-6)
    assert gain.step.bytes - stock.step.bytes == 80_740_352
    plain = plan_mode(replace(workload, kernels="torch"), "gain")
    assert plain.step.launches == (3 + 3) * 4 * 28
    assert plain.step.bytes - stock.step.bytes == 122_945_536


def test_memory_adds_up_to_what_vllm_may_use(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=16)
    for name in ("gain", "composed", "stock"):
        m = plan_mode(workload, name)
        used = m.weight_bytes + m.slot_bytes + m.vector_bytes + m.gain_bytes + m.overhead_bytes
        assert used + m.kv_bytes == int(80e9 * 0.92)
        assert m.kv_tokens == m.kv_bytes // (2 * 28 * 4 * 128 * 2)


def test_many_products_in_a_step_take_the_rate_not_the_bytes(qwen: ModelShape) -> None:
    slow = find_gpu("mine", memory_gb=80, bandwidth_gb_s=1000, tflops=1)
    step = plan_mode(Workload(qwen, slow, tenants=1, concurrency=8), "stock").step
    assert step.seconds > step.bytes / 1e12
    assert step.seconds == pytest.approx(step.flops / 1e12 + step.launches * 2e-6)


def test_a_guard_costs_prefill_only(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=16)
    stock, guard = plan_mode(workload, "stock"), plan_mode(workload, "guard")
    assert guard.tokens_per_s < stock.tokens_per_s
    assert guard.added_ttft_s > stock.prefill_s
    assert guard.slot_bytes == stock.slot_bytes
    longer = plan_mode(replace(workload, output_tokens=1024), "guard").tokens_per_s
    assert longer / plan_mode(replace(workload, output_tokens=1024), "stock").tokens_per_s > (
        guard.tokens_per_s / stock.tokens_per_s
    )


def advice_of(workload: Workload) -> Advice:
    return advise(workload, plan_modes(workload), "model")


def test_advice_takes_the_gain_table_where_the_bucket_would_rise(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=16)
    advice = advice_of(workload)
    assert advice.mode == "gain"
    assert any("rank 32 instead of 16" in reason for reason in advice.reasons)
    words = list(advice.command)
    assert words[words.index("--slots") + 1] == "16"
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert advice.warnings == ()


def test_advice_takes_composed_slots_where_they_are_no_larger(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=4, adapter_rank=24, vector_rank=8, concurrency=4)
    assert advice_of(replace(workload, kernels="torch")).mode == "composed"
    assert advice_of(workload).mode == "gain"


def test_advice_takes_weight_load_for_checkpoints_and_for_one_tenant(qwen: ModelShape) -> None:
    many = Workload(qwen, H100, tenants=8, checkpoints=True)
    assert list(plan_modes(many)) == ["weights"]
    assert plan_modes(many)["weights"].engines == 8
    advice = advice_of(many)
    assert advice.mode == "weights" and "--apply weights" in advice.shown()
    assert any("share a GPU" in warning for warning in advice.warnings)
    assert advice_of(Workload(qwen, H100, tenants=1)).mode == "weights"


def test_advice_when_nothing_fits(qwen: ModelShape) -> None:
    small = replace(find_gpu("l4"), memory_bytes=10**10)
    advice = advice_of(Workload(qwen, small, tenants=4))
    assert advice.mode is None and advice.command == ()
    assert "15.23" not in advice.reasons[0] and "18.23 GB of 9.20 GB" in advice.reasons[0]
    full = advice_of(Workload(qwen, find_gpu("l4"), tenants=64, concurrency=64))
    assert full.mode == "weights" and "64 slots" in full.reasons[0]


def test_slots_are_no_more_than_the_sequences_that_fit(qwen: ModelShape) -> None:
    roomy = Workload(qwen, H100, tenants=32)
    assert fit_slots(roomy) is roomy
    assert fit_slots(replace(roomy, slots=400)).slots == 400
    tight = Workload(qwen, find_gpu("l4"), tenants=64, concurrency=64, prompt_tokens=8000)
    fitted = fit_slots(tight)
    modes = plan_modes(fitted)
    assert 1 <= fitted.device_slots < 32 and modes["gain"].batch >= fitted.device_slots
    advice = advise(fitted, modes, "model", "families/mine")
    words = list(advice.command)
    assert words[words.index("--slots") + 1] == str(fitted.device_slots)
    assert words[words.index("--family") + 1] == "families/mine"
    for one in (tight, fitted):
        found = advice_of(one)
        assert not re.search(r"-\d[\d.]* [MG]B", " ".join((*found.reasons, *found.warnings)))
    warned = advice_of(replace(fitted, slots=fitted.device_slots + 8)).warnings
    assert any("slots for a batch of" in warning for warning in warned)


@pytest.mark.parametrize("name", ["h200", "b200", "mi300x"])
def test_larger_gpus_are_known(name: str, qwen: ModelShape) -> None:
    gpu = find_gpu(name)
    assert gpu.memory_bytes > H100.memory_bytes and gpu.bytes_per_s > H100.bytes_per_s
    assert advice_of(Workload(qwen, gpu, tenants=16)).mode == "gain"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": 4}, "4 slots below 16 concurrent tenants"),
        ({"tenants": 200, "concurrency": 8, "active": 8}, "200 revisions on 8 slots"),
        ({"host_bytes": 10**9, "tenants": 64}, "caches 64 of 128 revisions"),
        ({"adapter_rank": 9}, "rank 9 in slots of rank 16"),
        ({"slots": 400}, "slots take 32.30 GB"),
        ({"concurrency": 4000, "active": 16}, "sequences of 640 tokens, 4000 were requested"),
    ],
)
def test_warnings(changed: dict[str, Any], message: str, qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=16)
    assert advice_of(workload).warnings == ()
    found = advice_of(replace(workload, **changed)).warnings
    assert any(message in warning for warning in found), found


def test_profiles_on_the_base_need_slots_of_rank_one(qwen: ModelShape) -> None:
    workload = Workload(qwen, H100, tenants=4, profiles=12, adapter_rank=0)
    modes = plan_modes(workload)
    assert modes["gain"].bucket == 1 and modes["composed"].bucket == 16
    assert modes["weights"].engines == 12
    assert modes["stock"].slot_bytes == 0


def test_ranks_round_up() -> None:
    assert [rank_bucket(r) for r in (1, 2, 8, 9, 24, 257, 321)] == [1, 8, 8, 16, 32, 320, 512]
    with pytest.raises(ConfigError, match="rank 513: vLLM's slots hold up to 512"):
        rank_bucket(513)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tenants": 0, "slots": 0}, "tenants 0: expected 1 or more; slots 0"),
        ({"vector_layers": 29}, "vector layers 29: expected 1 to 28"),
        ({"adapter_targets": ("q", "o_proj")}, "adapter targets q: this model has q_proj"),
        ({"utilization": 1.2}, "memory utilization 1.2"),
        ({"launch_s": -1.0}, "expected 0 or more"),
    ],
)
def test_invalid_workloads_are_rejected(
    changed: dict[str, Any], message: str, qwen: ModelShape
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Workload(qwen, H100, tenants=1), **changed)


def config(tmp_path: Path, **changed: Any) -> Path:
    raw = json.loads((QWEN / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path / "config.json"


def test_unsupported_configs_are_rejected_or_remarked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_experts 64 found: a mixture of experts"):
        read_shape(config(tmp_path, num_experts=64))
    with pytest.raises(ConfigError, match="vocab_size None found; expected a whole number"):
        read_shape(config(tmp_path, vocab_size=None))
    assert "counted like Llama's" in read_shape(config(tmp_path, model_type="olmo")).remarks[0]
    remarks = read_shape(config(tmp_path, quantization_config={"bits": 4})).remarks
    assert "quantization is not counted" in remarks[0]
    inner = json.loads((QWEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner}))
    assert read_shape(tmp_path).parameters == 7_615_616_512


def test_custom_gpus() -> None:
    assert find_gpu("l4", memory_gb=20).memory_bytes == 20 * 10**9
    with pytest.raises(ConfigError, match=r"--gpu b999: not in the table .*--bandwidth, --tflops"):
        find_gpu("b999", memory_gb=100)
    with pytest.raises(ConfigError, match="--bandwidth -1"):
        find_gpu("l4", bandwidth_gb_s=-1)
    assert all(GPUS[name].name == name for name in GPUS)


def run(*words: str) -> str:
    outcome = CliRunner().invoke(build_app(), ["plan", *words])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_plan_prints_tables_advice_and_json() -> None:
    shown = run(str(QWEN), "--tenants", "1000", "--slots", "16", "--gpu-hour-price", "2.5")
    for part in ("80.7 MB", "gain table", "guard in front", "use gain table:", "! 16 slots below"):
        assert part in shown
    assert "0.0025* per tenant and hour" in shown
    plan = json.loads(run(str(QWEN), "--tenants", "16", "--vector-share", "0.5", "--json"))
    assert plan["vector"]["layers"] == 14
    assert plan["vector"]["pair_bytes"] == 80_740_352 // 2
    assert plan["modes"]["gain"]["vector_bytes"] == 80_740_352 // 2
    assert shlex.split(plan["advice"]["command"])[:3] == ["safegene", "serve", str(QWEN)]
    nothing = run(str(QWEN), "--tenants", "4", "--memory-gb", "10")
    assert "nothing to recommend" in nothing and "does not fit" in nothing


def test_numbers_never_compared_with_a_measurement_are_marked_as_estimates() -> None:
    """Bytes that tests/engine/test_plan_estimates.py compares are unmarked, all others marked."""
    shown = run(str(QWEN), "--tenants", "16", "--slots", "4").splitlines()
    headings = [re.split(r"  +", line.strip()) for line in shown if line.startswith("mode ")]
    columns = {name for heading in headings for name in heading}
    assert {name for name in columns if not name.endswith("*")} == {
        *("mode", "rank", "vector", "slots")
    }
    assert {"step ms*", "tok/s*", "KV left*", "sequences*", "GPUs*"} <= columns
    assert sum(line.startswith("* estimate: ") for line in shown) == 1
    assert all("(estimate)" in line for line in shown if re.search(r"\d ms\b", line))
    plan = json.loads(run(str(QWEN), "--tenants", "16", "--gpu-hour-price", "2", "--json"))
    exact = {"bucket", "weight_bytes", "vector_bytes", "slot_bytes", "gain_bytes"}
    given = {"name", "safe", "engines", "overhead_bytes"}
    for mode in plan["modes"].values():
        assert set(mode) - set(plan["estimates"]["modes"]) == exact | given
    assert exact == COMPARED


def test_the_command_reads_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("llama", tmp_path / "model")
    write_family(model, tmp_path / "family", rank=4, layers=(1,))
    words = [str(model), "--tenants", "3", "--family", str(tmp_path / "family")]
    plan = json.loads(run(*words, "--dtype", "float32", "--json"))
    command = shlex.split(plan["advice"]["command"])
    assert command[command.index("--family") + 1] == str(tmp_path / "family")
    held = sum(
        p.a.nbytes + p.b.nbytes for p in load_adapter(tmp_path / "family").lora_weights.values()
    )
    assert plan["vector"] | {"sites": None} == {
        "rank": 4,
        "layers": 1,
        "sites": None,
        "pair_bytes": held,
    }
    for extra, message in (
        (["--vector-rank", "8"], "--family sets the vector's rank"),
        (["--adapter-targets", "q"], "adapter targets q"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *words, *extra])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(QWEN), "--tenants", "3", "--family", str(tmp_path / "family")])
    assert "is for 2 layers, the model has 28" in capsys.readouterr().err


def test_serve_accepts_the_recommended_command(tmp_path: Path) -> None:
    from safegene_vllm.launcher import ServeOptions, build_command

    model = make_model("llama", tmp_path / "model")
    family = write_family(model, tmp_path / "family", rank=4)
    write_tenant(model, tmp_path / "acme", family, [0.5, 1.0], rank=4)
    plan = json.loads(run(str(model), "--tenants", "3", "--adapter-rank", "4", "--json"))
    words = shlex.split(plan["advice"]["command"])
    start = words.index("--slots")
    slots, passed = int(words[start + 1]), words[start + 2 :]
    command = build_command(
        ServeOptions(
            model=str(model),
            family=tmp_path / "family",
            tenants={"acme": tmp_path / "acme"},
            slots=slots,
            vllm_args=passed,
        ),
        {},
    )
    shown = command.shown()
    assert f"--max-loras {slots}" in shown and "--max-lora-rank 8" in shown
