"""The kernels under Triton's interpreter against the float32 reference, and what they launch."""

from __future__ import annotations

from typing import Any

import kernel_cases as world
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from safegene_vllm.plugin.ops import triton_ops
from safegene_vllm.plugin.ops.layer_weights import LayerShape, LayerWeights
from safegene_vllm.plugin.ops.reference import disagreement
from safegene_vllm.plugin.ops.self_test import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXES = {
    "distinct": [0, 1, 2, -1],
    "identical": [2] * 9,
    "skewed": [1] * 17 + [2, -1, 0],
    "interleaved": [0, -1, 1] * 3,
    "base only": [-1] * 5,
    "one token": [1],
}


def check_mix(one: world.Layer, slots: list[int], extra: int = 0) -> torch.Tensor:
    y, x = world.inputs(one, len(slots))
    got = world.run(one, world.step(slots, len(one.gains) - 1, extra), y, x)
    assert disagreement(got, *world.wanted(one, slots, y, x)) is None
    return got


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixes_of_tenants(dtype: torch.dtype, mix: str) -> None:
    check_mix(world.layer((40, 24, 24), 96, 8, 4, dtype=dtype), MIXES[mix])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    widths=st.lists(st.integers(3, 150), min_size=1, max_size=3).map(tuple),
    d_in=st.integers(2, 300),
    rank=st.sampled_from([8, 16, 32, 64]),
    safety_rank=st.sampled_from([4, 8, 12, 16, 32, 64]),
    slots=st.integers(1, 6),
    data=st.data(),
)
def test_any_shape(
    dtype: torch.dtype,
    widths: tuple[int, ...],
    d_in: int,
    rank: int,
    safety_rank: int,
    slots: int,
    data: st.DataObject,
) -> None:
    one = world.layer(widths, d_in, rank, safety_rank, slots=slots, dtype=dtype, seed=d_in)
    muted = data.draw(st.sets(st.integers(0, slots)))
    one.gains[sorted(muted), world.LAYER] = 0.0
    mix = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=12))
    check_mix(one, mix, data.draw(st.integers(0, 9)))


@pytest.mark.parametrize("tokens", [257, 1030])
def test_larger_steps(tokens: int) -> None:
    """The tiers of a prefill."""
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randint(-1, 3, (tokens,), generator=generator).tolist()
    check_mix(world.layer((20,), 40, 8, 4), slots)


def test_rank_beyond_one_block() -> None:
    check_mix(world.layer((33, 17), 70, 128, 80), [0, -1])


def test_padded_graph_leaves_the_rest_alone() -> None:
    """A CUDA graph runs more rows than the step has tokens; no adapter may touch those."""
    one = world.layer((24,), 48, 8, 4)
    y, x = world.inputs(one, 12)
    got = world.run(one, world.step([0, 1, -1], extra=20), y, x)
    assert torch.equal(got[3:], y[3:])
    assert disagreement(got[:3], *world.wanted(one, [0, 1, -1], y[:3], x[:3])) is None


def test_a_row_of_a_wider_tensor() -> None:
    one = world.layer((24, 8), 48, 8, 4)
    y, x = world.inputs(one, 4)
    wide_y, wide_x = torch.zeros(4, 50), torch.zeros(4, 90)
    wide_y[:, :32], wide_x[:, :48] = y, x
    triton_ops.lora_linear(
        *(wide_y[:, :32], wide_x[:, :48], one.a, one.b, one.safety_a, one.safety_b, one.gains),
        *(world.LAYER, torch.tensor(True)),
        *((plan := world.step([0, 1, 2, -1])).order, plan.tiles, plan.idle, 1.0),
    )
    assert disagreement(wide_y[:, :32], *world.wanted(one, [0, 1, 2, -1], y, x)) is None
    assert not wide_y[:, 32:].any()


def test_scale_is_the_tenants_alone() -> None:
    one = world.layer((24,), 48, 8, 4)
    y, x = world.inputs(one, 2)
    plan, scaled = world.step([0, 1]), y.clone()
    triton_ops.lora_linear(
        *(scaled, x, one.a, one.b, one.safety_a, one.safety_b, one.gains, world.LAYER),
        *(torch.tensor(True), plan.order, plan.tiles, plan.idle, 0.25),
    )
    one.b = [b * 0.25 for b in one.b]
    assert disagreement(scaled, *world.wanted(one, [0, 1], y, x)) is None


def test_a_gain_written_later_is_seen() -> None:
    one = world.layer((24,), 48, 8, 4)
    first = check_mix(one, [0, 1])
    one.gains[1, world.LAYER] += 1.0
    second = check_mix(one, [0, 1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1]), "another slot's row changed this token"


def test_a_zero_gain_shields_from_what_overflows() -> None:
    """Nothing is multiplied by zero: an infinity of the vector must not become NaN."""
    one = world.layer((24,), 48, 8, 4)
    one.gains[1] = 0.0
    y, x = world.inputs(one, 1)
    quiet = world.run(one, world.step([0]), y, x)
    one.safety_a.fill_(torch.inf)
    assert torch.equal(world.run(one, world.step([0]), y, x), quiet)


def test_a_token_depends_on_no_neighbor() -> None:
    """Bit for bit, within a tier: sums are in a fixed order and never atomic."""
    one = world.layer((24, 8), 200, 8, 4, dtype=torch.bfloat16)
    y, x = world.inputs(one, 20)
    slots = [1, -1, 0, 2] * 5
    together = world.run(one, world.step(slots), y, x)
    for t in (0, 1, 19):
        alone = world.run(one, world.step([slots[t]]), y[t : t + 1], x[t : t + 1])
        assert torch.equal(together[t], alone[0])


class Recorded(TorchDispatchMode):
    """Names of the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


STOCK_LAUNCHES = 3
"""vLLM 0.28 to 0.32 per layer with an adapter in the batch: zero the buffer, shrink, expand."""


@pytest.mark.parametrize(
    ("slots", "base", "launched"),
    [
        ([0, 1, 2], False, 2),
        ([0, -1, 2], False, 2),
        ([0, -1, 2], True, 2),
        ([-1, -1], True, 2),
        ([-1, -1], False, 0),
    ],
    ids=["tenants", "mixed", "mixed and base", "safety only", "base without profile"],
)
def test_launches_per_layer(slots: list[int], base: bool, launched: int) -> None:
    """At most stock's, and no torch operator next to them that would be a launch or a wait."""
    one = world.layer((24, 8, 8), 48, 8, 4)
    y, x = world.inputs(one, len(slots))
    plan, flag = world.step(slots), torch.tensor(base)
    with world.launches(run_them=False) as seen, Recorded() as recorded:
        triton_ops.lora_linear(
            *(y, x, one.a, one.b, one.safety_a, one.safety_b, one.gains, world.LAYER),
            *(flag, plan.order, plan.tiles, plan.idle, 1.0),
        )
    assert len(seen) == launched < STOCK_LAUNCHES
    # Two flags on the CPU are read (not the device), and one buffer is taken from the pool.
    reads = [n for n in recorded.names if "local_scalar_dense" in n]
    assert len(reads) <= 2
    assert {*recorded.names} - {*reads} <= {"aten.empty.memory_format"}


def test_grids_depend_on_shapes_alone() -> None:
    """A captured CUDA graph fits every later step of the same number of tokens."""
    one = world.layer((24, 8, 8), 48, 8, 4)
    y, x = world.inputs(one, 40)
    grids = []
    for slots in ([0] * 40, [0, 1, 2, -1] * 10, [-1] * 40, [2] * 3):
        with world.launches(run_them=False) as seen:
            world.run(one, world.step(slots, extra=40 - len(slots)), y, x)
        grids.append([(launch[1], launch[3]) for launch in seen])
    assert all(grid == grids[0] for grid in grids)
    assert len(grids[0]) == 2


def test_zero_gains_do_nothing_but_the_adapter() -> None:
    one = world.layer((24,), 48, 8, 4)
    one.gains.zero_()
    y, x = world.inputs(one, 4)
    assert torch.equal(world.run(one, world.step([-1] * 4), y, x), y)
    check_mix(one, [0, 1, 2, -1])


def test_no_tokens() -> None:
    one = world.layer((24,), 48, 8, 4)
    y, x = world.inputs(one, 0)
    assert world.run(one, world.step([]), y, x).shape == (0, 24)


SHAPES = [LayerShape((12, 8), 32, 8, 4), LayerShape((20,), 37, 8, 4)]


def test_check_trusts_the_kernels() -> None:
    assert check(SHAPES, torch.float32, "cpu", tokens=(5,)) is None


@pytest.mark.parametrize("error", ["gain of the next slot", "one column short", "no device"])
def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    real = triton_ops.launch

    def wrong(program: Any, programs: int, *args: Any, **meta: Any) -> None:
        given = list(args)
        if error == "no device":
            raise RuntimeError("no kernel image is available")
        if error == "gain of the next slot":
            given[6] = given[6].roll(1, 0)
        elif "width0" in program.arg_names:
            given[12] -= 1
        real(program, programs, *given, **meta)

    monkeypatch.setattr(triton_ops, "launch", wrong)
    message = check(SHAPES, torch.float32, "cpu", tokens=(5,))
    assert message is not None
    assert ("no kernel image" if error == "no device" else "values differ") in message


def test_check_cuts_shapes_and_preserves_alignment() -> None:
    assert LayerShape((18944, 100), 3585, 16, 8).small() == LayerShape((256, 100), 2049, 16, 8)


def test_a_compiled_graph_does_not_split_the_operator() -> None:
    """One opaque call, no graph break, and what changes between steps is not baked in."""
    one = world.layer((24, 8), 48, 8, 4)
    site = LayerWeights(one.safety_a, one.safety_b, one.gains, world.LAYER, torch.tensor(False))
    plan = world.step([0, 1, -1, 2])

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y * 2.0
        triton_ops.add_product(y, x, one.a, one.b, site, plan)
        return y + 1.0

    y, x = world.inputs(one, 4)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for slots in ([0, 1, -1, 2], [2, 2, 2, -1], [-1] * 4):
        plan.set_tokens(torch.tensor(slots))
        plan.set_idle(all(s < 0 for s in slots))
        one.gains[0] = 0.0
        want, bound = world.wanted(one, slots, y * 2.0, x)
        assert disagreement(compiled(x, y), want + 1.0, bound + 1e-6) is None
