"""The token plan: every token in exactly one tile of its own slot, and nothing read back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from safegene_vllm.plugin.ops.batch_metadata import BLOCKS, BatchMetadata, tile_count

SLOTS = 5


def covered(plan: BatchMetadata, tokens: int) -> list[dict[int, int]]:
    """Token -> slot, by table; fails where a token is in two tiles or a tile is out of place."""
    found = []
    for block, tiles in zip(BLOCKS, plan.tiles, strict=True):
        owner: dict[int, int] = {}
        for slot, first, count in tiles[: tile_count(tokens, plan.slots, block)].tolist():
            assert count <= block
            for token in plan.order[first : first + count].tolist():
                assert token not in owner
                owner[token] = slot
        used = [count > 0 for count in tiles[:, 2].tolist()]
        assert used == sorted(used, reverse=True), "a launch sized by the token count misses a tile"
        found.append(owner)
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=200), st.integers(0, 30))
def test_every_token_is_in_one_tile_of_its_slot(slots: list[int], spare: int) -> None:
    plan = BatchMetadata(SLOTS, 200 + spare, "cpu")
    plan.set_tokens(torch.full((200,), SLOTS - 1))  # an older, longer step must leave no trace
    plan.set_tokens(torch.tensor(slots))
    for owner in covered(plan, len(slots)):
        assert owner == dict(enumerate(slots))


@pytest.mark.parametrize("count", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("slot", [-1, 0, SLOTS - 1])
def test_one_slot_for_all(count: int, slot: int) -> None:
    plan = BatchMetadata(SLOTS, 200, "cpu")
    plan.set_tokens(torch.full((count,), slot))
    for owner in covered(plan, count):
        assert owner == dict.fromkeys(range(count), slot)


def test_addresses_stay() -> None:
    plan = BatchMetadata(SLOTS, 32, "cpu")
    tensors = [plan.order, *plan.tiles, plan.idle]
    before = [t.data_ptr() for t in tensors]
    plan.set_tokens(torch.tensor([1, -1, 1]))
    plan.set_idle(False)
    assert [t.data_ptr() for t in [plan.order, *plan.tiles, plan.idle]] == before


def test_nothing_waits_for_the_device() -> None:
    """With fake tensors, a value that is read back, or a shape that hangs on one, is an error."""
    with FakeTensorMode():
        plan = BatchMetadata(SLOTS, 300, "cpu")
        slots = torch.zeros(290, dtype=torch.long)
        plan.set_tokens(slots)
        with pytest.raises(DataDependentOutputException):
            slots.max().item()
