"""The LoRA product on CPU: per adapter for many tokens, all slots at once for few.

For replacing the host's CPU product, which gathers a copy of the weights per token and lets a token
without an adapter (-1) use the last slot's. Not used on other devices, and not for embedding or
lm_head adapters, which are refused before they get here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safegene_vllm.adapter import Pair
from safegene_vllm.plugin.gain import add_safety

DENSE_TOKENS = 32
DENSE_ROWS = 1056
"""Up to so many tokens, and rows per part, all slots at once cost less than one product each."""
RESERVED = 32
"""Rows per part kept for a vector, there or not (see SlotStore)."""


class StepPlan:
    """Which tokens belong to which slot in the running step; preallocated, updated in place.

    `others` (T_max, S, 1) bool: False at each token's own slot, True elsewhere.
    `order` (T_max,) int64: token numbers grouped by slot.
    `groups` (S + 1, 4) int64: row 0 is (groups, tokens, 0, 0), then one row per group: (slot,
    offset into order, tokens, first token if they are contiguous else -1).
    """

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.others = torch.ones(max_tokens, slots, 1, dtype=torch.bool)
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        self.groups = torch.zeros(slots + 1, 4, dtype=torch.long)
        self._tokens = 0

    def set_tokens(self, slots: torch.Tensor) -> None:
        """In place: slots (T,) int64 of the step's tokens."""
        count = slots.shape[0]
        self.others[count : self._tokens] = True
        self._tokens = count
        numbers = torch.arange(self.others.shape[1])
        torch.ne(slots.unsqueeze(1), numbers, out=self.others[:count].squeeze(2))
        order = torch.argsort(slots, stable=True)
        self.order[:count].copy_(order)
        values, sizes = torch.unique_consecutive(slots[order], return_counts=True)
        rows, offset = [], 0
        for slot, size in zip(values.tolist(), sizes.tolist(), strict=True):
            if slot >= 0:
                first, last = int(order[offset]), int(order[offset + size - 1])
                rows.append((slot, offset, size, first if last - first == size - 1 else -1))
            offset += size
        head = (len(rows), count, 0, 0)
        self.groups[: len(rows) + 1].copy_(torch.tensor([head, *rows], dtype=torch.long))


class SlotStore:
    """One layer's adapters of all slots, and room for its vector, laid out for few products.

    Part i of n (q, k and v of one layer) owns a block of K = S R + P rows in `a` (n, K, D_in) and
    `b[i]` (K, width_i): every slot's R rows, then P for the vector. P is there, as zeros, without a
    vector too: the products then have the same shapes, and so the same rounding, with and without.
    The host goes on writing through its own names: they become views of this storage.
    """

    def __init__(self, layer: Any) -> None:
        stacked_a, stacked_b = layer.lora_a_stacked, layer.lora_b_stacked
        self.layer = layer
        self.slots, _, self.rank, self.d_in = stacked_a[0].shape
        self.dtype = stacked_a[0].dtype
        self.widths = [b.shape[2] for b in stacked_b]
        self._allocate(RESERVED)

    def _allocate(self, reserved: int) -> None:
        rows = self.slots * self.rank
        self.a = torch.zeros(len(self.widths), rows + reserved, self.d_in, dtype=self.dtype)
        self.b = [torch.zeros(rows + reserved, w, dtype=self.dtype) for w in self.widths]
        shape = (self.slots, 1, self.rank, -1)
        self.layer.lora_a_stacked = tuple(part[:rows].view(shape) for part in self.a)
        self.layer.lora_b_stacked = tuple(part[:rows].view(shape).mT for part in self.b)

    def set_safety(self, parts: Sequence[Pair | None]) -> None:
        """Put the vector behind the slots; before any adapter has been written."""
        rank = max(p.rank for p in parts if p is not None)
        if rank > RESERVED:
            self._allocate(rank)
        rows = self.slots * self.rank
        for i, pair in enumerate(parts):
            if pair is not None:
                self.a[i, rows : rows + pair.rank] = pair.a
                self.b[i][rows : rows + pair.rank] = pair.b.t()


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    others: torch.Tensor,
    order: torch.Tensor,
    groups: torch.Tensor,
    safety: list[torch.Tensor],
) -> None:
    """Add every token's own adapter, then the safety product, to a layer's output, in place.

    Semantics: for each part i: y[t, part i] += (x[t] A[s]_iᵀ) B[s]_iᵀ with s the slot of t, nothing
    for a token without one; and what gain.add_safety adds.
    Shapes: y (T, sum widths), x (T, D_in); a (n, K, D_in) and b n times (K, width) as in SlotStore;
    others, order and groups as in StepPlan; safety is empty for a layer without a vector, else its
    stacked A (R_s, D_in) and Bᵀ (R_s, sum widths), gain (T_max, 1) and active () bool.
    A row of y depends on its own row of x, its own slot and its own gain alone.
    """
    count, tokens, _, _ = groups[0].tolist()
    if count and x.shape[0] <= min(tokens, DENSE_TOKENS) and a.shape[1] <= DENSE_ROWS:
        _dense(y, x, a, b, rank, others[: x.shape[0]], safety)
        return
    tokens = min(tokens, x.shape[0])
    if count and tokens:
        for slot, offset, size, first in groups[1 : count + 1].tolist():
            own = slice(slot * rank, (slot + 1) * rank)
            pair = a[:, own].flatten(0, 1), [w[own] for w in b]
            _group(y, x, *pair, order, offset, size, first, tokens)
    if safety and safety[3].item():
        add_safety(y, x, safety[0], safety[1], safety[2])


def _group(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    order: torch.Tensor,
    offset: int,
    size: int,
    first: int,
    tokens: int,
) -> None:
    """One adapter's tokens: two products on slices when contiguous, on gathered rows otherwise."""
    if first >= 0:
        rows = slice(first, min(first + size, tokens))
        _expand(y[rows], torch.nn.functional.linear(x[rows], a), b)
        return
    index = order[offset : offset + size]
    index = index[index < tokens]
    part = y.index_select(0, index)
    _expand(part, torch.nn.functional.linear(x.index_select(0, index), a), b)
    y.index_copy_(0, index, part)


def _dense(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    others: torch.Tensor,
    safety: list[torch.Tensor],
) -> None:
    """Few tokens: every slot and the vector at once, then only what is each token's own.

    Other slots' columns are set to zero, not multiplied: an overflow there must not become NaN
    here. All slots, not those in use: the products' shapes, and so their rounding, must not depend
    on neighbours.
    """
    tokens, slots = x.shape[0], others.shape[1]
    n, block, _ = a.shape
    rows = slots * rank
    hidden = torch.nn.functional.linear(x, a.flatten(0, 1)).view(tokens, n, block)
    hidden[:, :, :rows].view(tokens, n, slots, rank).masked_fill_(others.unsqueeze(1), 0.0)
    if safety:
        hidden[:, :, rows:].mul_(safety[2][:tokens].unsqueeze(1))
    start = 0
    for i, weight in enumerate(b):
        width = weight.shape[1]
        part = y if n == 1 else y[:, start : start + width]
        part.addmm_(hidden[:, i], weight)
        start += width


def _expand(y: torch.Tensor, hidden: torch.Tensor, b: list[torch.Tensor]) -> None:
    """y (T, sum widths) += hidden (T, n R), part by part, with B_i (R, width_i); in place."""
    start, rank = 0, b[0].shape[0]
    for i, weight in enumerate(b):
        width = weight.shape[1]
        y[:, start : start + width].addmm_(hidden[:, i * rank : (i + 1) * rank], weight)
        start += width


_LIBRARY = torch.library.Library("safegene", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor(a!) y, Tensor x, Tensor a, Tensor[] b, int rank, Tensor others, "
    "Tensor order, Tensor groups, Tensor[] safety) -> ()"
)
_LIBRARY.impl("lora_linear", lora_linear, "CPU")
_LIBRARY.impl("lora_linear", lambda *args: None, "Meta")


class SegmentPunica:
    """A layer's punica wrapper on CPU: our LoRA product, with the safety product in the same call.

    The product is one opaque operator, so that a compiled graph never bakes in which tokens belong
    to whom. `add_lora_embedding` and `add_lora_logits` do nothing: see the module's docstring.
    """

    def __init__(self, inner: Any, plan: StepPlan, layer: Any | None = None) -> None:
        self.inner = inner
        self.plan = plan
        self.store = None if layer is None else SlotStore(layer)
        self.safety: list[torch.Tensor] = []

    def place(
        self,
        parts: Sequence[Pair | None],
        a: torch.Tensor,
        bt: torch.Tensor,
        gain: torch.Tensor,
        active: torch.Tensor,
    ) -> None:
        """Give the layer its share of the vector: by part, and stacked (sites.stack_parts)."""
        assert self.store is not None
        self.store.set_safety(parts)
        self.safety = [a, bt, gain, active]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        **kwargs: Any,
    ) -> None:
        """The host's contract: y (T, D_out) is changed in place."""
        assert self.store is not None
        torch.ops.safegene.lora_linear(
            y,
            x,
            self.store.a,
            self.store.b,
            self.store.rank,
            self.plan.others,
            self.plan.order,
            self.plan.groups,
            self.safety,
        )

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        return None

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
