"""The two Triton programs: shrink (x to the hidden values) and expand (hidden values into y).

For product.py, which launches them and says what each argument is. What is computed is written in
reference.py. Which tile is whose is read on the device, so that grids depend on shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hidden(
    out,
    x,
    w,
    live,
    low,
    high,
    d_in,
    scale,
    first,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (rows, first..) = scale · x (rows, low..high) times w (RANK, low..high) transposed.

    out and x are one pointer per row; the sum is in float32.
    """
    columns = first + tl.arange(0, BLOCK_N)
    wanted = columns < RANK
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(low, high, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < high
        left = tl.load(x[:, None] + k[None, :], live[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            w + columns[None, :] * d_in + k[:, None], wanted[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out[:, None] + columns[None, :], total * scale, live[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["tokens", "layer", "layers"])
def shrink(
    hidden,
    x,
    a0,
    a1,
    a2,
    safety_a,
    gains,
    order,
    tiles,
    tokens,
    layer,
    layers,
    d_in,
    x_stride,
    scale,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    SAFETY_RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One share of D_in, for one tile of tokens and one block of hidden columns.

    hidden (T, SPLIT, PARTS (RANK + SAFETY_RANK)) float32: shares are added up by expand, in order,
    so nothing has to be zeroed first and sums do not depend on timing.
    """
    own_blocks: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    safety_blocks: tl.constexpr = (PARTS * SAFETY_RANK + BLOCK_S - 1) // BLOCK_S
    all_blocks: tl.constexpr = PARTS * own_blocks + safety_blocks
    width: tl.constexpr = PARTS * (RANK + SAFETY_RANK)
    program = tl.program_id(0)
    block = program % all_blocks
    share = (program // all_blocks) % SPLIT
    tile = tiles + program // (all_blocks * SPLIT) * 3
    count = tl.load(tile + 2)
    if count == 0:
        return
    slot = tl.load(tile)
    place = tl.arange(0, BLOCK_M)
    token = tl.load(order + tl.load(tile + 1) + place, place < count, other=0).to(tl.int64)
    live = (place < count) & (token < tokens)
    length = tl.cdiv(tl.cdiv(d_in, SPLIT), BLOCK_K) * BLOCK_K
    low = share * length
    high = tl.minimum(low + length, d_in)
    out = hidden + (token * SPLIT + share) * width
    rows = x + token * x_stride
    if block < PARTS * own_blocks:
        if slot >= 0:
            part = block // own_blocks
            a = a0
            if PARTS > 1:
                if part == 1:
                    a = a1
            if PARTS > 2:
                if part == 2:
                    a = a2
            _hidden(
                out + part * RANK,
                rows,
                a + slot.to(tl.int64) * RANK * d_in,
                live,
                low,
                high,
                d_in,
                scale,
                (block % own_blocks) * BLOCK_N,
                RANK,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    elif tl.load(gains + (slot + 1) * layers + layer) != 0.0:
        _hidden(
            out + PARTS * RANK,
            rows,
            safety_a,
            live,
            low,
            high,
            d_in,
            1.0,
            (block - PARTS * own_blocks) * BLOCK_S,
            PARTS * SAFETY_RANK,
            BLOCK_M,
            BLOCK_S,
            BLOCK_K,
        )


@triton.jit
def _output(
    total,
    hidden,
    w,
    factor,
    live,
    columns,
    wanted,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """total + factor · (sum of the shares of hidden) times w (columns, RANK) transposed."""
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = r < RANK
        at = hidden[:, None] + r[None, :]
        left = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for share in tl.static_range(SPLIT):
            left += tl.load(at + share * WIDTH, live[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            w + columns[None, :] * RANK + r[:, None], inside[:, None] & wanted[None, :], other=0.0
        )
        left = (left * factor).to(w.dtype.element_ty)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["tokens", "layer", "layers", "width0", "width1", "width2"])
def expand(
    y,
    hidden,
    b0,
    b1,
    b2,
    safety_b,
    gains,
    order,
    tiles,
    tokens,
    layer,
    layers,
    width0,
    width1,
    width2,
    y_stride,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    SAFETY_RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Adds both products to one tile of tokens and one block of output columns of one part.

    ALIGNED divides every width and row of y. The gain is applied here, to the summed shares: all
    tokens of a tile have the same one.
    """
    own: tl.constexpr = PARTS * RANK
    line: tl.constexpr = PARTS * (RANK + SAFETY_RANK)
    blocks0 = tl.cdiv(width0, BLOCK_N)
    blocks = blocks0
    if PARTS > 1:
        blocks += tl.cdiv(width1, BLOCK_N)
    before2 = blocks
    if PARTS > 2:
        blocks += tl.cdiv(width2, BLOCK_N)
    program = tl.program_id(0)
    tile = tiles + program // blocks * 3
    count = tl.load(tile + 2)
    if count == 0:
        return
    slot = tl.load(tile)
    gain = tl.load(gains + (slot + 1) * layers + layer)
    if (slot < 0) & (gain == 0.0):
        return
    place = tl.arange(0, BLOCK_M)
    token = tl.load(order + tl.load(tile + 1) + place, place < count, other=0).to(tl.int64)
    live = (place < count) & (token < tokens)
    block = program % blocks
    part = 0
    offset = 0
    width = width0
    b = b0
    if PARTS > 1:
        if block >= blocks0:
            part = 1
            offset = width0
            width = width1
            b = b1
    if PARTS > 2:
        if block >= before2:
            part = 2
            offset = width0 + width1
            width = width2
            b = b2
    if PARTS > 1:
        if part == 1:
            block -= blocks0
    if PARTS > 2:
        if part == 2:
            block -= before2
    # Said by arithmetic: a hint on the result of a branch is lost, and with it wide loads.
    offset = offset // ALIGNED * ALIGNED
    width = width // ALIGNED * ALIGNED
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = columns < width
    stored = hidden + token * (SPLIT * line)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if slot >= 0:
        total = _output(
            total,
            stored + part * RANK,
            b + slot.to(tl.int64) * width * RANK,
            1.0,
            live,
            columns,
            wanted,
            line,
            RANK,
            SPLIT,
            BLOCK_M,
            BLOCK_R,
        )
    if gain != 0.0:
        total = _output(
            total,
            stored + own + part * SAFETY_RANK,
            safety_b,
            gain,
            live,
            offset + columns,
            wanted,
            line,
            SAFETY_RANK,
            SPLIT,
            BLOCK_M,
            BLOCK_S,
        )
    at = y + token[:, None] * y_stride + offset + columns[None, :]
    inside = live[:, None] & wanted[None, :]
    kept = tl.load(at, inside, other=0.0).to(tl.float32)
    tl.store(at, (kept + total).to(y.dtype.element_ty), inside)
