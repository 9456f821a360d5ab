"""The LoRA product on CPU: long runs of an adapter's tokens each, all slots at once for few.

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
RUN_TOKENS = 16
"""From so many neighbouring tokens of one adapter on, they have a product of their own."""
RESERVED = 32
"""Rows per part kept for a vector, there or not (see SlotStore)."""


class StepPlan:
    """Which tokens belong to which slot in the running step; preallocated, updated in place.

    A prompt is a run of neighbouring tokens of one adapter; what decodes beside it is scattered.

    `others` (T_max, S, 1) bool: False at each token's own slot, True elsewhere.
    `order` (T_max,) int64: numbers of the tokens with an adapter and in no long run, by slot, then
    of those without an adapter.
    `groups` (G, 5) int64: row 0 is (tokens, long runs, scattered tokens, their groups, tokens
    without an adapter); then a row (slot, first token, tokens, 0, 0) per long run and one (slot,
    offset into order, tokens, 0, 0) per group of scattered tokens.
    """

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.others = torch.ones(max_tokens, slots, 1, dtype=torch.bool)
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        most = 1 + max_tokens // RUN_TOKENS + slots
        self.groups = torch.zeros(most, 5, dtype=torch.long)
        self._tokens = 0

    def set_tokens(self, slots: torch.Tensor) -> None:
        """In place: slots (T,) int64 of the step's tokens."""
        count = slots.shape[0]
        self.others[count : self._tokens] = True
        self._tokens = count
        numbers = torch.arange(self.others.shape[1])
        torch.ne(slots.unsqueeze(1), numbers, out=self.others[:count].squeeze(2))
        values, sizes = torch.unique_consecutive(slots, return_counts=True)
        short = (sizes < RUN_TOKENS) & (values >= 0)
        scattered = torch.repeat_interleave(short, sizes).nonzero().squeeze(1)
        order = scattered[torch.argsort(slots[scattered], stable=True)]
        free = (slots < 0).nonzero().squeeze(1)
        self.order[: len(order) + len(free)].copy_(torch.cat([order, free]))
        runs = _rows(values, sizes, RUN_TOKENS)
        values, sizes = torch.unique_consecutive(slots[order], return_counts=True)
        groups = _rows(values, sizes, 1)
        head = (count, len(runs), len(order), len(groups), len(free))
        rows = torch.tensor([head, *runs, *groups], dtype=torch.long)
        self.groups[: len(rows)].copy_(rows)


def _rows(values: torch.Tensor, sizes: torch.Tensor, least: int) -> list[tuple[int, ...]]:
    """(slot, where it begins, size, 0, 0) of every stretch of an adapter with `least` tokens."""
    found: list[tuple[int, ...]] = []
    begin = 0
    for slot, size in zip(values.tolist(), sizes.tolist(), strict=True):
        if slot >= 0 and size >= least:
            found.append((slot, begin, size, 0, 0))
        begin += size
    return found


class SlotStore:
    """One layer's adapters of all slots, and room for its vector, laid out for few products.

    Part i of n (q, k and v of one layer) owns a block of K = S R + P rows in `a` (n, K, D_in) and
    `b[i]` (K, width_i): every slot's R rows, then P for the vector. P is there, as zeros, without a
    vector too: the products then have the same shapes, and so the same rounding, with and without.
    The host goes on writing through its own names: they become views of this storage. `vector` is
    the vector's rank here, 0 without one.
    """

    def __init__(self, layer: Any) -> None:
        stacked_a, stacked_b = layer.lora_a_stacked, layer.lora_b_stacked
        self.layer = layer
        self.slots, _, self.rank, self.d_in = stacked_a[0].shape
        self.dtype = stacked_a[0].dtype
        self.widths = [b.shape[2] for b in stacked_b]
        self.vector = 0
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
        self.vector = max(p.rank for p in parts if p is not None)
        if self.vector > RESERVED:
            self._allocate(self.vector)
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
    vector: int,
    others: torch.Tensor,
    order: torch.Tensor,
    groups: torch.Tensor,
    safety: list[torch.Tensor],
) -> None:
    """Add every token's own adapter, and the vector by its gain, to a layer's output, in place.

    Semantics: for each part i: y[t, part i] += (x[t] A[s]_iᵀ) B[s]_iᵀ with s the slot of t, nothing
    for a token without one; and what gain.add_safety adds.
    Shapes: y (T, sum widths), x (T, D_in); a (n, K, D_in) and b n times (K, width) as in SlotStore,
    `rank` rows for each slot, then `vector` of the vector; others, order and groups as in StepPlan;
    safety is empty for a layer without a vector, else its stacked A (R_s, D_in) and Bᵀ (R_s, sum
    widths), gain (T_max, 1) and active () bool.
    A row of y depends on its own row of x, its own slot and its own gain alone.
    """
    tokens, runs, scattered, stretches, free = groups[0].tolist()
    few = a.shape[1] <= DENSE_ROWS
    if (runs or scattered) and x.shape[0] <= min(tokens, DENSE_TOKENS) and few:
        _dense(y, x, a, b, rank, others[: x.shape[0]], safety[2] if safety else None)
        return
    tokens = min(tokens, x.shape[0])
    gain = safety[2] if safety and safety[3].item() else None
    rows = groups[1 : 1 + runs + stretches].tolist() if tokens else []
    for slot, first, size, _, _ in rows[:runs]:
        run = slice(first, min(first + size, tokens))
        _own(y[run], x[run], a, b, rank, vector, others, slot, _gain_of(gain, first))
    index = _below(order[:scattered], tokens)
    if len(index) and few and scattered <= DENSE_TOKENS:
        part = y.index_select(0, index)
        theirs = safety[2].index_select(0, index) if safety else None
        _dense(part, x.index_select(0, index), a, b, rank, others.index_select(0, index), theirs)
        y.index_copy_(0, index, part)
    else:
        for slot, offset, size, _, _ in rows[runs:]:
            index = _below(order[offset : offset + size], tokens)
            part, theirs = y.index_select(0, index), x.index_select(0, index)
            own = _gain_of(gain, int(order[offset]))
            _own(part, theirs, a, b, rank, vector, others, slot, own)
            y.index_copy_(0, index, part)
    if gain is not None and free:
        _add_free(y, x, _below(order[scattered : scattered + free], tokens), safety)


def _below(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """The token numbers that are computed here."""
    return index[index < tokens]


def _gain_of(gain: torch.Tensor | None, token: int) -> float:
    """All tokens of a slot have one gain."""
    return 0.0 if gain is None else float(gain[token, 0])


def _own(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    vector: int,
    others: torch.Tensor,
    slot: int,
    gain: float,
) -> None:
    """Tokens of one slot: y (T, sum widths) += x (T, D_in) through its rows, in place.

    With a gain the vector's rows stand beside the adapter's, so that y is written once for both;
    copying them together costs less. Without one, nothing of the vector is touched.
    """
    own, n = slice(slot * rank, (slot + 1) * rank), a.shape[0]
    a_own, b_own = a[:, own], [weight[own] for weight in b]
    if gain:
        begin = others.shape[1] * rank
        rest = slice(begin, begin + vector)
        a_own = torch.cat([a_own, a[:, rest]], dim=1)
        b_own = [torch.cat([w, weight[rest]]) for w, weight in zip(b_own, b, strict=True)]
    hidden = torch.nn.functional.linear(x, a_own.flatten(0, 1)).view(x.shape[0], n, a_own.shape[1])
    if gain:
        hidden[:, :, rank:].mul_(gain)  # in float32, rounded once
    _expand(y, hidden, b_own)


def _dense(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    others: torch.Tensor,
    gain: torch.Tensor | None,
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
    if gain is not None:
        hidden[:, :, rows:].mul_(gain[:tokens].unsqueeze(1))
    _expand(y, hidden, b)


def _expand(y: torch.Tensor, hidden: torch.Tensor, b: list[torch.Tensor]) -> None:
    """y (T, sum widths) += hidden (T, n, K), part by part, with B_i (K, width_i); in place."""
    start = 0
    for i, weight in enumerate(b):
        width = weight.shape[1]
        part = y if len(b) == 1 else y[:, start : start + width]
        part.addmm_(hidden[:, i], weight)
        start += width


def _add_free(
    y: torch.Tensor, x: torch.Tensor, index: torch.Tensor, safety: list[torch.Tensor]
) -> None:
    """The vector alone, for tokens without an adapter."""
    a, bt, gain = safety[:3]
    if not len(index) or not gain[index[0], 0]:
        return
    if len(index) == len(x):
        add_safety(y, x, a, bt, gain)
        return
    part = y.index_select(0, index)
    add_safety(part, x.index_select(0, index), a, bt, gain.index_select(0, index))
    y.index_copy_(0, index, part)


_LIBRARY = torch.library.Library("safegene", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor(a!) y, Tensor x, Tensor a, Tensor[] b, int rank, int vector, "
    "Tensor others, Tensor order, Tensor groups, Tensor[] safety) -> ()"
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
            self.store.vector,
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
