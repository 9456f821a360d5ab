"""The CPU LoRA product and the gain table against a plain loop: dtype × rank × tenant mix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.plugin.ops.cpu_lora import (
    DENSE_ROWS,
    RESERVED_ROWS,
    CpuBatchMetadata,
    StackedLoRAWeights,
    lora_linear,
)
from safegene_vllm.plugin.ops.gain_table import GainTable, add_safety
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.target_modules import stack_parts

SLOTS, WIDTHS, D_IN, LAYERS = 5, (24, 8, 8), 32, 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
MIXES = {
    "distinct": [0, 1, 2, 3, 4, -1],
    "uniform": [0, 1, 2, 3, 4, -1] * 9,
    "identical": [2] * 50,
    "skewed": [1] * 60 + [4, -1, 0],
    "zipf": [0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 0, 1, 4] * 4,
    "interleaved": [0, 1] * 30,
    "base only": [-1] * 7,
    "prompts next to decoding": [0, 1, 3] + [2] * 20 + [0] + [-1] * 17 + [4] * 16 + [2, -1],
    "short prompts and many decoding": ([0] * 12 + [3] * 15 + [1, 2]) * 2 + [4] * 16,
    "two prompts of one adapter": [1] * 30 + [0] * 5 + [1] * 17 + [-1] * 40,
    "one token": [3],
}


def layer(rank: int, dtype: torch.dtype) -> SimpleNamespace:
    """The tensors of vLLM's LoRA layer: one stacked tensor per part."""
    return SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(SLOTS, 1, rank, D_IN, dtype=dtype) for _ in WIDTHS),
        lora_b_stacked=tuple(torch.zeros(SLOTS, 1, w, rank, dtype=dtype) for w in WIDTHS),
    )


def filled(rank: int, dtype: torch.dtype) -> tuple[SimpleNamespace, StackedLoRAWeights]:
    """A layer whose slots vLLM has written through its own names."""
    vllm_layer = layer(rank, dtype)
    weights = StackedLoRAWeights(vllm_layer)
    generator = torch.Generator().manual_seed(rank)
    for stacked in (*vllm_layer.lora_a_stacked, *vllm_layer.lora_b_stacked):
        for slot in range(SLOTS):
            values = torch.randn(stacked[slot, 0].shape, generator=generator) / 4
            stacked[slot, 0].copy_(values)
    return vllm_layer, weights


def product(
    weights: StackedLoRAWeights,
    batch: CpuBatchMetadata,
    y: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor | None = None,
) -> None:
    """The operator that compiled graphs call; eager engines call the function behind it."""
    others, scale = (batch.others, None) if gain is None else (batch.silent[0], batch.scales[0])
    step = others, batch.order, batch.groups, batch.counts, gain, scale
    eager = y.clone()
    torch.ops.safegene.lora_linear(y, x, weights.a, weights.b, weights.rank, weights.picks, *step)
    lora_linear(eager, x, weights.a, weights.b, weights.rank, weights.picks, *step)
    assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(eager))


def begin_step(table: GainTable, batch: CpuBatchMetadata, slots: torch.Tensor) -> StepState:
    """Begin a step as the worker does."""
    step = StepState(table, batch)
    step.reads_token_gains = True
    step.begin_step(None, slots)
    return step


def plain_loop(vllm_layer: SimpleNamespace, y: torch.Tensor, x: torch.Tensor, slots: list[int]):
    """One token, one part at a time, in float64."""
    out = y.double().clone()
    for t, slot in enumerate(slots):
        if slot < 0:
            continue
        start = 0
        parts = zip(vllm_layer.lora_a_stacked, vllm_layer.lora_b_stacked, WIDTHS, strict=True)
        for a, b, width in parts:
            hidden = a[slot, 0].double() @ x[t].double()
            out[t, start : start + width] += b[slot, 0].double() @ hidden
            start += width
    return out


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product_is_the_plain_loop(dtype: torch.dtype, rank: int, mix: str) -> None:
    slots = MIXES[mix]
    vllm_layer, weights = filled(rank, dtype)
    batch = CpuBatchMetadata(SLOTS, rank, 128, dtype=dtype)
    batch.set_tokens(torch.tensor([3] * 90))  # an older, longer step must leave no trace
    batch.set_tokens(torch.tensor(slots))
    x = torch.randn(len(slots), D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.randn(len(slots), sum(WIDTHS), generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = plain_loop(vllm_layer, y, x, slots)
    before = y.clone()
    product(weights, batch, y, x)
    torch.testing.assert_close(
        y.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype]
    )
    for t, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[t], before[t]), "a token without an adapter was touched"


@pytest.mark.parametrize("mix", MIXES)
def test_a_pass_of_more_or_fewer_tokens_than_its_step(mix: str) -> None:
    """Rows beyond the step's tokens are unchanged; missing rows affect no other."""
    _, weights = filled(8, torch.float32)
    slots = MIXES[mix]
    batch = CpuBatchMetadata(SLOTS, 8, 128, dtype=torch.float32)
    batch.set_tokens(torch.tensor(slots))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(slots) + 40, D_IN, generator=generator)
    whole, padded = torch.zeros(2, len(x), sum(WIDTHS))
    product(weights, batch, whole[: len(slots)], x[: len(slots)])
    product(weights, batch, padded, x)
    assert torch.equal(padded, whole)
    few = (len(slots) + 1) // 2
    part = torch.zeros(few, sum(WIDTHS))
    product(weights, batch, part, x[:few])
    torch.testing.assert_close(part, whole[:few])


def test_overflow_in_one_slot_stays_with_its_own_tokens() -> None:
    vllm_layer, weights = filled(8, torch.float16)
    vllm_layer.lora_a_stacked[0][0, 0].fill_(60000.0)
    batch = CpuBatchMetadata(SLOTS, 8, 16, dtype=torch.float16)
    batch.set_tokens(torch.tensor([0, 1, -1]))
    y = torch.zeros(3, sum(WIDTHS), dtype=torch.float16)
    x = torch.ones(3, D_IN, dtype=torch.float16)
    product(weights, batch, y, x)
    assert not torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mix", MIXES)
def test_gain_table_scales_the_vector_per_token(dtype: torch.dtype, mix: str) -> None:
    slots = MIXES[mix]
    table = GainTable(SLOTS, LAYERS, 128, "cpu")
    rows = {-1: [0.0, 0.5, 1.0]} | {s: [0.2 * s, 1.0 - 0.1 * s, 0.0] for s in range(SLOTS)}
    for slot, row in rows.items():
        table.write(slot, row)
    table.set_tokens(torch.tensor(slots))
    generator = torch.Generator().manual_seed(3)
    a = (torch.randn(6, D_IN, generator=generator) / 4).to(dtype)
    b = (torch.randn(40, 6, generator=generator) / 4).to(dtype)
    x = torch.randn(len(slots), D_IN, generator=generator).to(dtype)
    y = torch.randn(len(slots), 40, generator=generator).to(dtype)
    for number in range(LAYERS):
        out = y.clone()
        add_safety(out, x, a, b.t().contiguous(), table.token_gains[number])
        gains = torch.tensor([rows[s][number] for s in slots], dtype=torch.float64)
        expected = y.double() + ((x.double() @ a.double().T) * gains[:, None]) @ b.double().T
        torch.testing.assert_close(
            out.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype]
        )
        for t in range(len(slots)):
            if gains[t] == 0.0:
                assert torch.equal(out[t], y[t]), "gain 0 is not exactly nothing"


def test_writing_one_row_touches_no_other() -> None:
    table = GainTable(SLOTS, LAYERS, 16, "cpu")
    for slot in range(-1, SLOTS):
        table.write(slot, [slot + 2.0] * LAYERS)
    table.set_tokens(torch.tensor([0, 1, 2]))
    before, gains = table.rows.clone(), table.token_gains.clone()
    table.write(1, [9.0, 8.0, 7.0])
    assert table.read(1) == [9.0, 8.0, 7.0]
    assert torch.equal(table.rows[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert table.token_gains[:, 1, 0].tolist() == [9.0, 8.0, 7.0], (
        "the running step sees the new row"
    )
    assert torch.equal(table.token_gains[:, [0, 2]], gains[:, [0, 2]])


def test_an_older_longer_step_leaves_no_gain_behind() -> None:
    table = GainTable(SLOTS, LAYERS, 16, "cpu")
    table.write(2, [1.0, 1.0, 1.0])
    table.set_tokens(torch.tensor([0, 2, 2, 2, 2, 2]))
    table.set_tokens(torch.tensor([0, 1]))
    assert not table.token_gains[:, :2].any()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rank", [1, 8, 32, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_vector_and_adapters_in_one_product(dtype: torch.dtype, rank: int, mix: str) -> None:
    """Adapters and vector share products, and a gain of 0 leaves the adapters' bits."""
    vllm_layer, plain = filled(8, dtype)
    other_layer = layer(8, dtype)
    gains = {-1: 0.7, 0: 0.0, 1: 0.503, 2: 2.009, 3: 0.0, 4: 1.003}
    table = GainTable(SLOTS, 1, 128, "cpu")
    for slot, value in gains.items():
        table.write(slot, [value])
    batch = CpuBatchMetadata(
        SLOTS, 8, 128, dtype=dtype, vector_rank=rank, layers=table.rows.shape[1]
    )
    without = CpuBatchMetadata(SLOTS, 8, 128, dtype=dtype)
    weights = StackedLoRAWeights(other_layer, batch.reserved)
    generator = torch.Generator().manual_seed(4)
    parts = [
        LoRAWeights(
            (torch.randn(rank, D_IN, generator=generator) / 4).to(dtype),
            (torch.randn(width, rank, generator=generator) / 4).to(dtype),
        )
        if i != 1
        else None
        for i, width in enumerate(WIDTHS)
    ]
    weights.set_vector(parts)
    for mine, theirs in zip(
        (*other_layer.lora_a_stacked, *other_layer.lora_b_stacked),
        (*vllm_layer.lora_a_stacked, *vllm_layer.lora_b_stacked),
        strict=True,
    ):
        mine.copy_(theirs)
    slots = MIXES[mix]
    for tokens in ([3] * 90, slots):  # an older, longer step must leave no trace
        begin_step(table, batch, torch.tensor(tokens))
        without.set_tokens(torch.tensor(tokens))
    gain = torch.tensor([[gains[slot]] for slot in slots])
    a, bt = stack_parts(parts, WIDTHS, dtype=dtype, device="cpu")
    x = torch.randn(len(slots), D_IN, generator=generator).to(dtype)
    y, bare = torch.zeros(2, len(slots), sum(WIDTHS), dtype=dtype)
    product(weights, batch, y, x, table.token_gains[0])
    product(plain, without, bare, x)
    expected = plain_loop(vllm_layer, torch.zeros_like(y), x, slots)
    expected += ((x.double() @ a.double().T) * gain.double()) @ bt.double()
    torch.testing.assert_close(
        y.double(), expected, atol=TOLERANCE[dtype] * 8, rtol=TOLERANCE[dtype]
    )
    if rank <= RESERVED_ROWS:
        for t, slot in enumerate(slots):
            assert gains[slot] or torch.equal(y[t], bare[t]), "gain 0 changed a bit"


@pytest.mark.parametrize("mix", MIXES)
def test_slots_too_large_for_one_product(mix: str) -> None:
    """Every adapter and the vector by runs and groups alone, where all slots at once cost more."""
    rank = 256
    table = GainTable(SLOTS, 1, 128, "cpu")
    for slot in range(-1, SLOTS):
        table.write(slot, [0.3 * (slot + 1)])
    batch = CpuBatchMetadata(
        SLOTS, rank, 128, dtype=torch.float32, vector_rank=4, layers=table.rows.shape[1]
    )
    vllm_layer, weights = filled(rank, torch.float32)
    assert not batch.max_shared and weights.b[0].shape[0] > DENSE_ROWS
    generator = torch.Generator().manual_seed(7)
    parts = [
        LoRAWeights(
            torch.randn(4, D_IN, generator=generator), torch.randn(w, 4, generator=generator)
        )
        for w in WIDTHS
    ]
    weights.set_vector([*parts])
    slots = MIXES[mix]
    begin_step(table, batch, torch.tensor(slots))
    x = torch.randn(len(slots), D_IN, generator=generator)
    y = torch.zeros(len(slots), sum(WIDTHS))
    product(weights, batch, y, x, table.token_gains[0])
    a, bt = stack_parts([*parts], WIDTHS, dtype=torch.float64, device="cpu")
    gains = table.token_gains[0, : len(slots)].double()
    expected = plain_loop(vllm_layer, torch.zeros_like(y), x, slots)
    expected += ((x.double() @ a.T) * gains) @ bt
    torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 10, 40])
def test_a_token_without_a_gain_does_not_touch_the_vector(tokens: int) -> None:
    vllm_layer = layer(8, torch.float32)
    table = GainTable(SLOTS, 1, 128, "cpu")
    table.write(1, [1.0])
    weights = StackedLoRAWeights(vllm_layer)
    weights.set_vector(
        [LoRAWeights(torch.full((4, D_IN), torch.nan), torch.ones(w, 4)) for w in WIDTHS]
    )
    for stacked in (*vllm_layer.lora_a_stacked, *vllm_layer.lora_b_stacked):
        stacked.fill_(0.5)
    slots = [0] * tokens + [1] * tokens + [-1] * 5
    batch = CpuBatchMetadata(
        SLOTS, 8, 128, dtype=torch.float32, vector_rank=4, layers=table.rows.shape[1]
    )
    begin_step(table, batch, torch.tensor(slots))
    y = torch.zeros(len(slots), sum(WIDTHS))
    product(weights, batch, y, torch.ones(len(slots), D_IN), table.token_gains[0])
    assert torch.isfinite(y[:tokens]).all() and y[:tokens].all()
    assert y[tokens:-5].isnan().all()
    assert not y[-5:].any()


@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gain_is_finer_than_the_models_dtype(dtype: torch.dtype, tokens: int) -> None:
    """A narrowed gain would be wrong in every value alike; roundings are to both sides."""
    step = torch.finfo(dtype).eps
    gain = 1.0 + 0.375 * step
    assert float(torch.tensor(gain, dtype=dtype)) == 1.0
    table = GainTable(SLOTS, 1, 128, "cpu")
    table.write(2, [gain])
    batch = CpuBatchMetadata(SLOTS, 8, 128, dtype=dtype, vector_rank=16, layers=table.rows.shape[1])
    weights = StackedLoRAWeights(layer(8, dtype), batch.reserved)
    a = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(6)).to(dtype)
    b = [torch.eye(w, 16).to(dtype) for w in WIDTHS]
    weights.set_vector([LoRAWeights(a, half) for half in b])
    begin_step(table, batch, torch.tensor([2] * tokens))
    inputs = torch.arange(tokens) % D_IN
    x = torch.nn.functional.one_hot(inputs, D_IN).to(dtype)
    y = torch.zeros(tokens, sum(WIDTHS), dtype=dtype)
    product(weights, batch, y, x, table.token_gains[0])
    expected = gain * a.double().T[inputs]
    error = (y[:, :16].double() - expected) / expected / step
    assert error.abs().max() <= 1.0
    assert error.mean().abs() < 0.15


@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize(("gain", "size"), [(2e-8, 6e4), (1e-6, 6e4), (1e5, 1e-2)])
def test_a_gain_beyond_the_range_of_float16(gain: float, size: float, tokens: int) -> None:
    table = GainTable(SLOTS, 1, 128, "cpu")
    table.write(2, [gain])
    batch = CpuBatchMetadata(
        SLOTS, 8, 128, dtype=torch.float16, vector_rank=4, layers=table.rows.shape[1]
    )
    weights = StackedLoRAWeights(layer(8, torch.float16), batch.reserved)
    a = torch.zeros(4, D_IN, dtype=torch.float16)
    a[0] = size
    weights.set_vector([LoRAWeights(a, torch.eye(w, 4, dtype=torch.float16)) for w in WIDTHS])
    begin_step(table, batch, torch.tensor([2] * tokens))
    x = torch.nn.functional.one_hot(torch.arange(tokens) % D_IN, D_IN).half()
    y = torch.zeros(tokens, sum(WIDTHS), dtype=torch.float16)
    product(weights, batch, y, x, table.token_gains[0])
    torch.testing.assert_close(
        y[:, 0].double(), gain * a[0, :1].double().expand(tokens), rtol=2e-3, atol=0
    )


def test_a_row_written_during_a_step_counts_at_once() -> None:
    table = GainTable(SLOTS, LAYERS, 64, "cpu")
    batch = CpuBatchMetadata(
        SLOTS, 8, 64, dtype=torch.bfloat16, vector_rank=4, layers=table.rows.shape[1]
    )
    step = begin_step(table, batch, torch.tensor([1, -1, 2]))
    step.write_gains(2, [0.25, 0.5, 1.003])
    begin, half = SLOTS * 8, batch.reserved // 2
    found = batch.scales[:, 2, 0, begin:].double()
    assert found[:, 0].tolist() == [0.25, 0.5, 1.0]
    torch.testing.assert_close(
        found[:, 0] + found[:, half], table.rows[3].double(), rtol=2e-5, atol=0
    )
    assert not batch.scales[:, :2, 0, begin:].any()
    assert (batch.scales[:, :, 0, :begin] == 1).all()
