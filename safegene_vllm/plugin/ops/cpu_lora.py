"""LoRA product on CPU: one product per long run of an adapter's tokens, one for all short ones.

Replaces vLLM's CPU product, which copies the weights once per token. In vLLM 0.32 and earlier that
product also applies the last slot's adapter to tokens without one (index -1). Other devices do not
use this module; adapters on embeddings and lm_head are rejected before they get here.
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
"""Up to this many tokens, and rows per part, one product over all slots costs less than several."""
RUN_TOKENS = 16
"""Minimum number of consecutive tokens of one adapter that get a product of their own."""
RESERVED_ROWS = 32
"""Minimum rows per part reserved for a vector, with or without one; twice the rank if larger."""


class CpuBatchMetadata:
    """Tokens of the running step by LoRA slot; preallocated, updated in place.

    A prompt is a run of consecutive tokens of one adapter; decoding sequences are scattered tokens.

    `order` (T_max,) int64: indices of the scattered tokens by slot, then of the tokens without an
    adapter.
    `groups` (G, 3) int64: one row (slot, first token, tokens) per long run, then one row (slot,
    offset into order, tokens) per group of scattered tokens.
    `counts` (6,) int64: tokens, long runs, scattered tokens, their groups, tokens without an
    adapter, and tokens that share one product over all slots (all tokens of a short step, or the
    scattered ones if they are few, or none).

    For the tokens of the shared product, over the K = S R + P rows of StackedLoRAWeights:
    `others` (DENSE_TOKENS, 1, K) bool: True in the columns of slots other than the token's own.
    `silent` (L, DENSE_TOKENS, 1, K) bool: the same, for layers with a vector, and True in the
    vector's columns where the gain is 0.
    `scales` (L, DENSE_TOKENS, 1, K): 1 in the slots' columns; in the vector's columns the gain
    rounded to the adapters' dtype, and for the vector's second copy the rounding error. float32 if
    the adapters are float16, whose range is too small for a gain.

    `vector_rank` is the largest rank of the vector, `layers` the number of layers in the gain table
    (0 without one).
    """

    def __init__(
        self,
        slots: int,
        rank: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        vector_rank: int = 0,
        layers: int = 0,
    ) -> None:
        self.reserved = max(RESERVED_ROWS, 2 * vector_rank)
        self._rows = slots * rank
        rows = self._rows + self.reserved
        self.max_shared = DENSE_TOKENS if rows <= DENSE_ROWS else 0
        columns = rows if self.max_shared else 0
        self.others = torch.zeros(self.max_shared, 1, columns, dtype=torch.bool)
        scale = torch.float32 if dtype == torch.float16 else dtype
        self.scales = torch.ones(layers, self.max_shared, 1, columns, dtype=scale)
        self.silent = torch.zeros_like(self.scales, dtype=torch.bool)
        self._shared = torch.zeros(0, dtype=torch.long)
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        self.groups = torch.zeros(max_tokens // RUN_TOKENS + slots, 3, dtype=torch.long)
        self.counts = torch.zeros(6, dtype=torch.long)
        self._columns = torch.arange(slots).repeat_interleave(rank)

    def set_tokens(self, slots: torch.Tensor) -> None:
        """Set the step's slots in place: (T,) int64, -1 for no adapter. Call set_gains after it."""
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
        shared = slots if count <= self.max_shared and len(rows) else ordered
        self._shared = shared if len(shared) <= self.max_shared else shared[:0]
        counts = (count, len(runs), len(order), len(groups), len(free), len(self._shared))
        self.counts.copy_(torch.tensor(counts))
        if count := len(self._shared):
            other_slots = self._shared.unsqueeze(1) != self._columns
            self.others[:count, 0, : self._rows] = other_slots
            self.silent[:, :count, 0, : self._rows] = other_slots

    def set_gains(self, rows: torch.Tensor) -> None:
        """Lay out the gains of the shared product's tokens in place; rows as in GainTable."""
        count = len(self._shared)
        if not count:
            return
        gains = rows.index_select(0, self._shared + 1).t().unsqueeze(2)
        rounded = gains.to(self.scales.dtype)
        vector = self.scales[:, :count, 0, self._rows :]
        half = self.reserved // 2
        vector[:, :, :half] = rounded
        vector[:, :, half:] = (gains - rounded.float()).to(self.scales.dtype)
        torch.eq(vector, 0.0, out=self.silent[:, :count, 0, self._rows :])


def _rows(values: torch.Tensor, sizes: torch.Tensor, min_size: int) -> list[tuple[int, ...]]:
    """Return (slot, begin, size) of every stretch of an adapter of at least `min_size` tokens."""
    rows: list[tuple[int, ...]] = []
    begin = 0
    for slot, size in zip(values.tolist(), sizes.tolist(), strict=True):
        if slot >= 0 and size >= min_size:
            rows.append((slot, begin, size))
        begin += size
    return rows


class StackedLoRAWeights:
    """One layer's adapters of all slots and its vector, laid out for few matrix products.

    Part i of n (q, k and v of one layer) owns K = S R + P rows of `a` (n K, D_in) and of `b[i]`
    (K, width_i): R rows per slot, then P for the vector. The P rows exist (as zeros) without a
    vector too, so that the products have the same shapes, and the same rounding, with and without.
    The vector is stored twice, P / 2 rows apart: the second copy is scaled by the part of the gain
    that a bfloat16 cannot hold. vLLM's own stacked tensors become views of this storage.

    `picks` (S, n, R + V) int64: for each slot the rows of `a` that are its own, then the vector's;
    V is the vector's rank here, 0 without one.
    """

    def __init__(self, layer: Any, reserved: int = RESERVED_ROWS) -> None:
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

    def _picks(self, vector_rank: int) -> torch.Tensor:
        own = torch.arange(self.slots * self.rank).view(self.slots, self.rank)
        vector = own.numel() + torch.arange(vector_rank).expand(self.slots, vector_rank)
        block = torch.arange(len(self.widths)).view(-1, 1) * (own.numel() + self.reserved)
        return torch.cat([own, vector], dim=1).unsqueeze(1) + block

    def set_vector(self, parts: Sequence[LoRAWeights | None]) -> int:
        """Store the vector after the slots; return the bytes of one copy."""
        rank = max(p.rank for p in parts if p is not None)
        assert 2 * rank <= self.reserved
        self.picks = self._picks(rank)
        for rows, b, lora in zip(self.vector_rows(), self.b, parts, strict=True):
            if lora is None:
                continue
            for begin in (0, self.reserved // 2):
                rows[begin:][: lora.rank] = lora.a
                b[self.slots * self.rank + begin :][: lora.rank] = lora.b.t()
        return rank * (len(parts) * self.d_in + sum(self.widths)) * self.a.itemsize

    def vector_rows(self) -> torch.Tensor:
        """Return the vector's rows of `a` as a view (n, P, D_in)."""
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
    """Add every token's own adapter and its share of the vector to a layer's output, in place.

    Semantics: for each part i: y[t, part i] += (x[t] A[s]_iᵀ) B[s]_iᵀ with s the slot of t (nothing
    for a token without one), and y[t, part i] += gain[t] (x[t] A_iᵀ) B_iᵀ with the vector's A, B.
    Shapes: y (T, sum widths), x (T, D_in); a, b, picks: see StackedLoRAWeights, `rank` rows per
    slot; order, groups, counts: see CpuBatchMetadata. For a layer with a vector, gain (T_max, 1)
    float32, and others and scale are its layer of CpuBatchMetadata.silent and .scales; for one
    without, gain and scale are None and others is CpuBatchMetadata.others.
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
    """Handle a padded pass (more tokens than the step has) and a warm-up pass (fewer)."""
    if x.shape[0] > tokens:
        lora_linear(y[:tokens], x[:tokens], *step)
        return
    whole_y, whole_x = y.new_zeros(tokens, y.shape[1]), x.new_zeros(tokens, x.shape[1])
    whole_y[: len(y)], whole_x[: len(x)] = y, x
    lora_linear(whole_y, whole_x, *step)
    y.copy_(whole_y[: len(y)])


def _gain_of(gain: torch.Tensor | None, token: int) -> float:
    # All tokens of a slot have the same gain, and so have those without an adapter.
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
    """Add the product of one slot's tokens: y (T, sum widths) += x (T, D_in) through its rows.

    With a gain, the vector's rows are copied next to the adapter's so that y is written once for
    both. Without one, the vector is not read.
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
    """Add the product with the given rows (n, R) of a and b; those from `rank` on are scaled."""
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
    """Add the product of few tokens: all slots and the vector at once, masked to each token's own.

    All slots, not those in use: the shapes of the products, and so their rounding, must not depend
    on the neighbors in the batch.
    """
    tokens = x.shape[0]
    hidden = torch.nn.functional.linear(x, a).view(tokens, len(b), -1)
    # Set to zero, not multiplied by it: an overflow in another slot must not become NaN here.
    hidden.masked_fill_(others.narrow(0, 0, tokens), 0.0)
    if scale is not None:
        hidden.mul_(scale.narrow(0, 0, tokens))
    _expand(y, hidden, b)


def _expand(y: torch.Tensor, hidden: torch.Tensor, b: list[torch.Tensor]) -> None:
    """Add hidden (T, n, K) times B_i (K, width_i) to y (T, sum widths), part by part, in place."""
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
    """Punica wrapper of one layer on CPU: our LoRA product and the safety product in one call.

    In a compiled graph the product is one opaque operator, so that the graph does not bake in which
    tokens belong to which slot.
    """

    def __init__(self, inner: Any, batch: CpuBatchMetadata, layer: Any | None = None) -> None:
        super().__init__(inner)
        self.batch = batch
        self.weights = None if layer is None else StackedLoRAWeights(layer, batch.reserved)
        self.gain: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self.others = batch.others

    def set_vector(self, parts: Sequence[LoRAWeights | None], table: GainTable, layer: int) -> int:
        """Store this layer's part of the vector; return its bytes."""
        assert self.weights is not None
        self.gain = table.token_gains[layer]
        self.scale = self.batch.scales[layer]
        self.others = self.batch.silent[layer]
        return self.weights.set_vector(parts)

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
        """Update y (T, D_out) in place, as vLLM's wrapper does."""
        weights, batch = self.weights, self.batch
        assert weights is not None
        compiling = torch.compiler.is_compiling()
        product = torch.ops.safegene.lora_linear if compiling else lora_linear
        product(
            y,
            x,
            weights.a,
            weights.b,
            weights.rank,
            weights.picks,
            self.others,
            batch.order,
            batch.groups,
            batch.counts,
            self.gain,
            self.scale,
        )

    # Adapters on embeddings and lm_head are rejected, and vLLM's CPU product is not exact for -1.

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no adapter has embedding weights."""

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no adapter has lm_head weights."""
