"""The LoRA product on CPU: long runs of an adapter's tokens each, all slots at once for few.

For replacing the host's CPU product, which gathers a copy of the weights per token and lets a token
without an adapter (-1) use the last slot's. Not used on other devices, and not for embedding or
lm_head adapters, which are refused before they get here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.punica_proxy import PunicaProxy

DENSE_TOKENS = 32
DENSE_ROWS = 1056
"""Up to so many tokens, and rows per part, all slots at once cost less than one product each."""
RUN_TOKENS = 16
"""From so many neighbouring tokens of one adapter on, they have a product of their own."""
RESERVED = 32
"""Rows per part kept for a vector, there or not: more for one of more than half that rank."""


class CpuBatchMetadata:
    """Which tokens belong to which slot in the running step; preallocated, updated in place.

    A prompt is a run of neighbouring tokens of one adapter; what decodes beside it is scattered.

    `order` (T_max,) int64: numbers of the tokens with an adapter and in no long run, by slot, then
    of those without an adapter.
    `groups` (G, 3) int64: a row (slot, first token, tokens) per long run, then one (slot, offset
    into order, tokens) per group of scattered tokens.
    `counts` (6,) int64: tokens, long runs, scattered tokens, their groups, tokens without an
    adapter, and tokens that share one product over all slots: all of a short step, or the scattered
    ones if they are few, or none.

    For the tokens that share one product, over the K = S R + P rows of a StackedLoRAWeights:
    `others` (DENSE_TOKENS, 1, K) bool: True in the columns of other slots than a token's own.
    `silent` (L, DENSE_TOKENS, 1, K) bool: the same, for layers with a vector, and True in its
    columns where the gain is 0.
    `scales` (L, DENSE_TOKENS, 1, K) of the adapters' dtype: 1 in the slots' columns, in the
    vector's what each layer's float32 gain is in this dtype, and then what is left of it. For
    float16, which has not the range of a gain, it is float32. `vector` is the largest rank of one,
    `table` has its gains.
    """

    def __init__(
        self,
        slots: int,
        rank: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        vector: int = 0,
        table: GainTable | None = None,
    ) -> None:
        self.reserved = max(RESERVED, 2 * vector)
        self._table = table
        self._rows = slots * rank
        rows = self._rows + self.reserved
        layers = 0 if table is None else table.token_gains.shape[0]
        self.most_shared = DENSE_TOKENS if rows <= DENSE_ROWS else 0
        columns = rows if self.most_shared else 0
        self.others = torch.zeros(self.most_shared, 1, columns, dtype=torch.bool)
        scale = torch.float32 if dtype == torch.float16 else dtype
        self.scales = torch.ones(layers, self.most_shared, 1, columns, dtype=scale)
        self.silent = torch.zeros_like(self.scales, dtype=torch.bool)
        self._shared = torch.zeros(0, dtype=torch.long)
        if table is not None:
            table.followers.append(self.spread)
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        self.groups = torch.zeros(max_tokens // RUN_TOKENS + slots, 3, dtype=torch.long)
        self.counts = torch.zeros(6, dtype=torch.long)
        self._columns = torch.arange(slots).repeat_interleave(rank)

    def set_tokens(self, slots: torch.Tensor) -> None:
        """In place: slots (T,) int64 of the step's tokens."""
        count = slots.shape[0]
        values, sizes = torch.unique_consecutive(slots, return_counts=True)
        short = (sizes < RUN_TOKENS) & (values >= 0)
        scattered = torch.repeat_interleave(short, sizes).nonzero().squeeze(1)
        order = scattered[torch.argsort(slots[scattered], stable=True)]
        free = (slots < 0).nonzero().squeeze(1)
        self.order[: len(order) + len(free)].copy_(torch.cat([order, free]))
        runs = _rows(values, sizes, RUN_TOKENS)
        ordered = slots[order]
        values, sizes = torch.unique_consecutive(ordered, return_counts=True)
        groups = _rows(values, sizes, 1)
        rows = torch.tensor([*runs, *groups], dtype=torch.long).view(-1, 3)
        self.groups[: len(rows)].copy_(rows)
        shared = slots if count <= self.most_shared and len(rows) else ordered
        self._shared = shared if len(shared) <= self.most_shared else shared[:0]
        found = (count, len(runs), len(order), len(groups), len(free), len(self._shared))
        self.counts.copy_(torch.tensor(found))
        if count := len(self._shared):
            here = self._shared.unsqueeze(1) != self._columns
            self.others[:count, 0, : self._rows] = here
            self.silent[:, :count, 0, : self._rows] = here

    def spread(self) -> None:
        """In place: the gains of the shared product's tokens, as the table has them now."""
        count = len(self._shared)
        if self._table is None or not count:
            return
        gains = self._table.rows.index_select(0, self._shared + 1).t().unsqueeze(2)
        high = gains.to(self.scales.dtype)
        vector = self.scales[:, :count, 0, self._rows :]
        half = self.reserved // 2
        vector[:, :, :half] = high
        vector[:, :, half:] = (gains - high.float()).to(self.scales.dtype)
        torch.eq(vector, 0.0, out=self.silent[:, :count, 0, self._rows :])


def _rows(values: torch.Tensor, sizes: torch.Tensor, least: int) -> list[tuple[int, ...]]:
    """(slot, where it begins, size) of every stretch of an adapter with `least` tokens."""
    found: list[tuple[int, ...]] = []
    begin = 0
    for slot, size in zip(values.tolist(), sizes.tolist(), strict=True):
        if slot >= 0 and size >= least:
            found.append((slot, begin, size))
        begin += size
    return found


class StackedLoRAWeights:
    """One layer's adapters of all slots, and room for its vector, laid out for few products.

    Part i of n (q, k and v of one layer) owns a block of K = S R + P rows in `a` (n K, D_in) and
    `b[i]` (K, width_i): every slot's R rows, then P for the vector. P is there, as zeros, without a
    vector too: the products then have the same shapes, and so the same rounding, with and without.
    The vector lies there twice, P / 2 rows apart: what a bfloat16 cannot hold of its gain scales
    its second copy. The host goes on writing through its own names: they become views of this
    storage.

    `picks` (S, n, R + V) int64: for each slot the rows of `a` that are its own, then the vector's;
    V is the vector's rank here, 0 without one.
    """

    def __init__(self, layer: Any, reserved: int = RESERVED) -> None:
        stacked_a, stacked_b = layer.lora_a_stacked, layer.lora_b_stacked
        self.layer = layer
        self.slots, _, self.rank, self.d_in = stacked_a[0].shape
        self.dtype = stacked_a[0].dtype
        self.widths = [b.shape[2] for b in stacked_b]
        self.reserved = reserved
        self.picks = self._picks(0)
        rows, parts = self.slots * self.rank, len(self.widths)
        self.a = torch.zeros(parts * (rows + reserved), self.d_in, dtype=self.dtype)
        self.b = [torch.zeros(rows + reserved, w, dtype=self.dtype) for w in self.widths]
        shape = (self.slots, 1, self.rank, -1)
        blocks = self.a.view(parts, rows + reserved, self.d_in)
        self.layer.lora_a_stacked = tuple(part[:rows].view(shape) for part in blocks)
        self.layer.lora_b_stacked = tuple(part[:rows].view(shape).mT for part in self.b)

    def _picks(self, vector: int) -> torch.Tensor:
        own = torch.arange(self.slots * self.rank).view(self.slots, self.rank)
        behind = own.numel() + torch.arange(vector).expand(self.slots, vector)
        block = torch.arange(len(self.widths)).view(-1, 1) * (own.numel() + self.reserved)
        return torch.cat([own, behind], dim=1).unsqueeze(1) + block

    def set_safety(self, parts: Sequence[LoRAWeights | None]) -> int:
        """Put the vector behind the slots; the bytes of one copy."""
        vector = max(p.rank for p in parts if p is not None)
        assert 2 * vector <= self.reserved
        self.picks = self._picks(vector)
        for rows, b, lora in zip(self.vector_rows(), self.b, parts, strict=True):
            if lora is None:
                continue
            for begin in (0, self.reserved // 2):
                rows[begin:][: lora.rank] = lora.a
                b[self.slots * self.rank + begin :][: lora.rank] = lora.b.t()
        return vector * (len(parts) * self.d_in + sum(self.widths)) * self.a.itemsize

    def vector_rows(self) -> torch.Tensor:
        """The vector's share of `a`, as a view (n, P, D_in)."""
        return self.a.view(len(self.widths), -1, self.d_in)[:, self.slots * self.rank :]


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    picks: torch.Tensor,
    others: torch.Tensor,
    order: torch.Tensor,
    groups: torch.Tensor,
    counts: torch.Tensor,
    gain: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """Add every token's own adapter, and the vector by its gain, to a layer's output, in place.

    Semantics: for each part i: y[t, part i] += (x[t] A[s]_iᵀ) B[s]_iᵀ with s the slot of t, nothing
    for a token without one; and y[t, part i] += gain[t] (x[t] A_iᵀ) B_iᵀ with the vector's pair.
    Shapes: y (T, sum widths), x (T, D_in); a, b and picks as in StackedLoRAWeights with `rank` rows for each
    slot; others, order, groups and counts as in CpuBatchMetadata; gain (T_max, 1) float32 and the layer's
    share of CpuBatchMetadata.scales, with its share of CpuBatchMetadata.silent for others; or None, and others, for
    a layer without a vector.
    A row of y depends on its own row of x, its own slot and its own gain alone.
    """
    tokens, runs, scattered, stretches, free, shared = counts.tolist()
    if x.shape[0] != tokens:
        step = (a, b, rank, picks, others, order, groups, counts, gain, scale)
        _other_count(y, x, tokens, *step)
        return
    if shared and shared == tokens:
        _dense(y, x, a, b, others, scale)
        return
    rows = groups[: runs + stretches].tolist()
    for slot, first, size in rows[:runs]:
        run = slice(first, first + size)
        _own(y[run], x[run], a, b, rank, picks[slot], _gain_of(gain, first))
    if shared:
        index = order[:shared]
        part = y.index_select(0, index)
        _dense(part, x.index_select(0, index), a, b, others, scale)
        y.index_copy_(0, index, part)
    else:
        for slot, offset, size in rows[runs:]:
            index = order[offset : offset + size]
            part = y.index_select(0, index)
            own = _gain_of(gain, int(index[0]))
            _own(part, x.index_select(0, index), a, b, rank, picks[slot], own)
            y.index_copy_(0, index, part)
    if free and (base := _gain_of(gain, int(order[scattered]))):
        index = order[scattered : scattered + free]
        part = y.index_select(0, index)
        _picked(part, x.index_select(0, index), a, b, picks[0, :, rank:], 0, base)
        y.index_copy_(0, index, part)


def _other_count(y: torch.Tensor, x: torch.Tensor, tokens: int, *step: Any) -> None:
    """A padded pass computes more tokens than the step has, and a warm-up may compute fewer."""
    if x.shape[0] > tokens:
        lora_linear(y[:tokens], x[:tokens], *step)
        return
    whole_y, whole_x = y.new_zeros(tokens, y.shape[1]), x.new_zeros(tokens, x.shape[1])
    whole_y[: len(y)], whole_x[: len(x)] = y, x
    lora_linear(whole_y, whole_x, *step)
    y.copy_(whole_y[: len(y)])


def _gain_of(gain: torch.Tensor | None, token: int) -> float:
    """All tokens of a slot have one gain, and so have those without an adapter."""
    return 0.0 if gain is None else gain[token].item()


def _own(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    rank: int,
    picks: torch.Tensor,
    gain: float,
) -> None:
    """Tokens of one slot: y (T, sum widths) += x (T, D_in) through its rows, in place.

    With a gain the vector's rows stand beside the adapter's, so that y is written once for both;
    copying them together costs less. Without one, nothing of the vector is touched.
    """
    if gain:
        _picked(y, x, a, b, picks, rank, gain)
    elif len(b) == 1:
        begin = int(picks[0, 0])
        own = slice(begin, begin + rank)
        _expand(y, torch.nn.functional.linear(x, a[own]).unsqueeze(1), [b[0][own]])
    else:
        _picked(y, x, a, b, picks[:, :rank], rank, 0.0)


def _picked(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    picks: torch.Tensor,
    rank: int,
    gain: float,
) -> None:
    """The product with these rows (n, R) of the store alone; from `rank` on they are scaled."""
    n, width = picks.shape
    hidden = torch.nn.functional.linear(x, a.index_select(0, picks.flatten()))
    hidden = hidden.view(-1, n, width)
    if width > rank:
        hidden.narrow(2, rank, width - rank).mul_(gain)  # in float32, rounded once
    _expand(y, hidden, [weight.index_select(0, picks[0]) for weight in b])


def _dense(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    others: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """Few tokens: every slot and the vector at once, then only what is each token's own.

    Other slots' columns, and the vector's at gain 0, are set to zero, not multiplied: an overflow
    there must not become NaN here. All slots, not those in use: the products' shapes, and so their
    rounding, must not depend on neighbours.
    """
    tokens = x.shape[0]
    hidden = torch.nn.functional.linear(x, a).view(tokens, len(b), -1)
    hidden.masked_fill_(others.narrow(0, 0, tokens), 0.0)
    if scale is not None:
        hidden.mul_(scale.narrow(0, 0, tokens))
    _expand(y, hidden, b)


def _expand(y: torch.Tensor, hidden: torch.Tensor, b: list[torch.Tensor]) -> None:
    """y (T, sum widths) += hidden (T, n, K), part by part, with B_i (K, width_i); in place."""
    start = 0
    for i, weight in enumerate(b):
        width = weight.shape[1]
        part = y if len(b) == 1 else y[:, start : start + width]
        part.addmm_(hidden[:, i], weight)
        start += width


_LIBRARY = torch.library.Library("safegene", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor(a!) y, Tensor x, Tensor a, Tensor[] b, int rank, Tensor picks, "
    "Tensor others, Tensor order, Tensor groups, Tensor counts, Tensor? gain, Tensor? scale) -> ()"
)
_LIBRARY.impl("lora_linear", lora_linear, "CPU")
_LIBRARY.impl("lora_linear", lambda *args: None, "Meta")


class CpuPunica(PunicaProxy):
    """A layer's punica wrapper on CPU: our LoRA product, with the safety product in the same call.

    In a compiled graph the product is one opaque operator, so that the graph never bakes in which
    tokens belong to whom. `add_lora_embedding` and `add_lora_logits` do nothing: see the module's
    docstring.
    """

    def __init__(self, inner: Any, plan: CpuBatchMetadata, layer: Any | None = None) -> None:
        super().__init__(inner)
        self.plan = plan
        self.store = None if layer is None else StackedLoRAWeights(layer, plan.reserved)
        self.gain: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self.others = plan.others

    def place(self, parts: Sequence[LoRAWeights | None], table: GainTable, number: int) -> int:
        """Give a layer of this number its share of the vector, by part; the share's bytes."""
        assert self.store is not None
        self.gain = table.token_gains[number]
        self.scale = self.plan.scales[number]
        self.others = self.plan.silent[number]
        return self.store.set_safety(parts)

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
        store, plan = self.store, self.plan
        assert store is not None
        compiling = torch.compiler.is_compiling()
        product = torch.ops.safegene.lora_linear if compiling else lora_linear
        product(
            y,
            x,
            store.a,
            store.b,
            store.rank,
            store.picks,
            self.others,
            plan.order,
            plan.groups,
            plan.counts,
            self.gain,
            self.scale,
        )

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        return None

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        return None
