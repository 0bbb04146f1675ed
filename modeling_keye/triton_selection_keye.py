"""Indexer selection in Triton: scores by tiles into a slab that stays in the L2 cache, then an exact top-k per row.

The contract is that of `sparse_attention_keye.select_tokens`; `sparse_reference_keye.select_tokens` is the judge.
Scores follow eq. 1 of the DeepSeek-V3.2-Exp report. A chunk of queries takes two launches:

1. `_score_kernel` multiplies tiles of keys with (queries x heads), sums the heads in registers and stores one float32
   per (query, key), and the peak of every GROUP neighbouring keys. -inf marks what the indexer must not choose:
   future, padding, window, anchors.
2. `_select_kernel`, one program per query, finds a number that at least k peaks reach, and few more. Everything below
   is out, and only groups that reach it are read again: for unrelated scores of 128K keys a quarter of the row. A radix
   select among the survivors gives an interval: what lies above it is kept, and the first of what lies inside. A last
   pass emits slots in ascending order. Nothing is sorted, no atomics, so repeats are bit-equal.

Where a query keeps everything it sees, and without an indexer, `_enumerate_kernel` writes the slots and nothing is
scored. In a static cache the kernels may read the slot of the first query from the device: grids and workspace are then
those of the whole cache, and programs behind the last query have nothing to do. The arithmetic of a score depends on
head sizes and dtype only, so chunks, batches and single tokens select alike. B batch, S queries, T keys, K selected
keys; prefixes: i_ index, o_ offsets, b_ block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .sparse_reference_keye import forced_count
from .triton_common_keye import (
    Launches,
    jit,
    multiprocessors,
    on_device,
    operand_dtype,
    ordered_bits,
    shared_memory,
    tl,
    triton,
    within_32_bits,
)
from .triton_gather_keye import SLACK
from .triton_tuning_keye import tunable

# Scores of one chunk: 28 MiB, so that they stay in an H100's L2. The list of survivors is as long, and peaks and groups
# are an eighth: the workspace is 60 MiB at any length (as long as one row fits, 7 M keys).
SLAB_ELEMENTS = 7 * 2**20
GROUP = 16
# Columns (queries x heads) of a scoring tile. With fewer, a key feeds too few products for the bandwidth of the L2.
SCORE_COLUMNS = 128
# Keys that one scoring program walks through: at 128K keys a single query still fills the device.
SCORE_SPAN = 1024
# Rows of the slab are whole tiles of keys, so that stores need no mask: the largest `ScoreTiles.keys`.
ROW_MULTIPLE = 64
# Bits per pass of the radix select: a histogram costs a ballot per bit and a count per 32 bins, a pass its barriers.
DIGIT = 6
ENUMERATE_TILE = 1024
# What changes from call to call must not compile a kernel anew: these numbers, and the alignment of these slices.
_VARYING = [
    *("first_batch", "first_query", "num_queries", "num_blocks", "num_spans", "first_slot"),
    *("topk", "local_window", "anchor_stride", "width"),
    *("w_stride_b", "mask_stride_b", "out_stride_b", "out_stride_s"),
]
_SLICES = ["weights_ptr", "mask_ptr", "start_ptr", "slot_ptr", "out_ptr"]


@dataclass(frozen=True)
class ScoreTiles:
    """Blocks of the scoring kernel: queries, heads and head size (powers of two), keys, and keys that a program walks
    through; launch options."""

    queries: int
    heads: int
    dim: int
    keys: int
    span: int
    num_warps: int
    num_stages: int


# Other tiles of keys or other warps would add in another order and could select otherwise.
@tunable("selection_scores", span=(512, 1024, 2048), num_stages=(2, 3, 4))
def score_tiles(heads: int, dim: int, dtype: torch.dtype, shared: int) -> ScoreTiles:
    """Blocks for an indexer of `heads` x `dim` in `shared` bytes of shared memory; no sequence length enters.

    Raises `ValueError` when the queries of one block do not fit.
    """
    heads_block, dim_block = triton.next_power_of_2(heads), max(16, triton.next_power_of_2(dim))
    # float32 multiplies without tensor cores and needs the registers for its operands.
    columns, keys = (SCORE_COLUMNS, ROW_MULTIPLE) if dtype.itemsize == 2 else (32, 32)
    columns = max(columns, heads_block)
    num_stages = 3

    def need() -> int:
        return (columns + num_stages * keys) * dim_block * dtype.itemsize

    # Three programs share a multiprocessor: while one waits for the tensor cores, others reduce. With two stages each
    # waits for keys as soon as it has asked for them, but that is better than one program less.
    if 3 * (need() + SLACK) > shared:
        num_stages = 2
    available = shared - 8 * 1024  # layout changes of the epilogue take up to 8 KiB
    while need() > available and keys > GROUP:
        keys //= 2
    if need() > available:
        raise ValueError(
            f"An indexer of {heads} heads of {dim} in {dtype} does not fit the device's {shared // 1024} KiB of shared "
            'memory; choose the backend "torch".'
        )
    queries = columns // heads_block
    return ScoreTiles(queries, heads_block, dim_block, keys, SCORE_SPAN, num_warps=4, num_stages=num_stages)


def select_tile(rows: int, processors: int) -> tuple[int, int]:
    """(entries per tile, warps) of the row kernel for so many rows.

    With one row for each multiprocessor at most, as in decoding and for long prompts (the slab holds 56 rows of 128K),
    all warps that a program can have work on it. Else two programs of eight warps share a multiprocessor, and one works
    while the other waits.
    """
    return (4096, 32) if rows <= processors else (2048, 8)


@jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def _score_kernel(
    q_ptr,  # [B, S, HEADS, DIM]
    k_ptr,  # [B, T, DIM]
    weights_ptr,  # [B, S, HEADS]
    mask_ptr,  # uint8 [B, T], 1 at real tokens
    start_ptr,  # int32 [B], the first real token
    slot_ptr,  # int64 [], with HAS_SLOT what is added to `first_slot`
    scores_ptr,  # float32 [sequences * num_queries, row_stride]
    peaks_ptr,  # float32 [sequences * num_queries, row_stride // GROUP]
    first_batch,
    first_query,
    num_queries,
    num_blocks,
    num_spans,
    first_slot,
    local_window,
    anchor_stride,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_d,
    w_stride_b,
    w_stride_s,
    w_stride_h,
    mask_stride_b,
    row_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    DOT: tl.constexpr,
):
    """One block of queries against one span of keys."""
    # Programs that share a span of keys are neighbours, so that its keys come from the L2 cache.
    i_block = tl.program_id(0) % num_blocks
    i_span = (tl.program_id(0) // num_blocks) % num_spans
    i_local = (tl.program_id(0) // num_blocks // num_spans).to(tl.int64)
    i_batch = first_batch + i_local
    if HAS_SLOT:
        first_slot += tl.load(slot_ptr).to(tl.int32)
    last_slot = first_slot + tl.minimum((i_block + 1) * BLOCK_QUERIES, num_queries) - 1
    begin = i_span * SPAN
    end = tl.minimum(begin + SPAN, last_slot + 1)
    start = 0
    if HAS_MASK:
        start = tl.load(start_ptr + i_batch)
        begin = tl.maximum(begin, start // BLOCK_KEYS * BLOCK_KEYS)

    o_columns = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    # A thread of a matrix product holds two neighbouring columns of every eight. With the queries innermost, and at
    # least eight of them, these are all heads of two queries, and their sum needs no other thread.
    column_queries = i_block * BLOCK_QUERIES + o_columns % BLOCK_QUERIES
    column_heads = o_columns // BLOCK_QUERIES
    column_used = (column_queries < num_queries) & (column_heads < HEADS)
    o_dim = tl.arange(0, BLOCK_DIM)
    o_wide = (first_query + column_queries).to(tl.int64)
    q_rows = i_batch * q_stride_b + o_wide * q_stride_s + column_heads * q_stride_h
    b_q = tl.load(
        q_ptr + q_rows[:, None] + o_dim[None, :] * q_stride_d,
        mask=column_used[:, None] & (o_dim[None, :] < DIM),
        other=0.0,
    ).to(DOT)  # [columns, BLOCK_DIM]
    w_rows = i_batch * w_stride_b + o_wide * w_stride_s + column_heads * w_stride_h
    b_w = tl.load(weights_ptr + w_rows, mask=column_used, other=0.0).to(tl.float32)

    o_queries = i_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    slots = first_slot + o_queries
    used = (o_queries < num_queries)[None, :]
    rows = ((i_local * num_queries + o_queries) * row_stride)[None, :]
    oldest_in_window = first_slot + i_block * BLOCK_QUERIES - local_window
    for first in range(begin, end, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        in_range = keys <= last_slot
        b_k = tl.load(
            k_ptr + i_batch * k_stride_b + keys.to(tl.int64)[:, None] * k_stride_t + o_dim[None, :] * k_stride_d,
            mask=in_range[:, None] & (o_dim[None, :] < DIM),
            other=0.0,
        ).to(DOT)  # [BLOCK_KEYS, BLOCK_DIM]
        products = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        # By default a maximum turns NaN into 0, a good score where gates are negative.
        products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * b_w[None, :]
        if HEADS != BLOCK_HEADS:
            products = tl.where((column_heads < HEADS)[None, :], products, 0.0)
        products = tl.reshape(products, (BLOCK_KEYS, BLOCK_HEADS, BLOCK_QUERIES))
        # As in the PyTorch backend NaN and -inf become the lowest finite number and inf the greatest, so that -inf is
        # free to mark what is no candidate; a sum with 0 turns -0 into 0.
        scores = tl.maximum(tl.sum(products, axis=1), -3.4028234663852886e38)
        scores = tl.minimum(scores, 3.4028234663852886e38) + 0.0  # [BLOCK_KEYS, BLOCK_QUERIES]
        if HAS_MASK or HAS_ANCHORS:
            candidate = in_range
            if HAS_MASK:
                candidate = tl.load(mask_ptr + i_batch * mask_stride_b + keys, mask=in_range, other=0) != 0
            if HAS_ANCHORS:
                candidate = candidate & ((keys - start) % anchor_stride != 0)
            scores = tl.where(candidate[:, None], scores, float("-inf"))
        if first + BLOCK_KEYS > oldest_in_window:
            scores = tl.where(slots[None, :] - keys[:, None] > local_window, scores, float("-inf"))
        tl.store(scores_ptr + rows + keys[:, None], scores, mask=used)
        peaks = tl.max(tl.reshape(scores, (BLOCK_KEYS // GROUP, GROUP, BLOCK_QUERIES)), axis=1)
        groups = first // GROUP + tl.arange(0, BLOCK_KEYS // GROUP)
        tl.store(peaks_ptr + rows // GROUP + groups[:, None], peaks, mask=used)


@jit
def _tile_of(first, TILE: tl.constexpr):
    """first, first + 1, ... as rows of 16: a thread then holds neighbours, whose order costs it no exchange."""
    return first + tl.arange(0, TILE // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@jit
def _append(out_ptr, count, values, take):
    """Writes those of `values` [rows, columns], row by row, that `take` marks behind the first `count` entries; returns
    the new count."""
    ones = take.to(tl.int32)
    in_row = tl.sum(ones, axis=1)
    before = count + tl.cumsum(in_row, axis=0) - in_row
    tl.store(out_ptr + before[:, None] + tl.cumsum(ones, axis=1) - 1, values, mask=take)
    return count + tl.sum(in_row, axis=0)


@jit
def _score_bits(scores_ptr, places, mask):
    """`ordered_bits` of the scores at `places`, 0 where they are marked as no candidates or masked."""
    return ordered_bits(tl.load(scores_ptr + places, mask=mask, other=float("-inf")))


@jit
def _kth_largest(
    scores_ptr, places_ptr, count, k, slack, INDIRECT: tl.constexpr, TILE: tl.constexpr, DIGIT: tl.constexpr
):
    """Radix select among the candidates of `count` scores: (lowest, highest, room), an interval of bits.

    The k largest are those above the interval and the first `room` of those inside, which are up to `slack` more or all
    equal. With fewer than k candidates, room is k and all lie inside.

    The entries are scores[0], scores[1], ..., or with INDIRECT scores[places[0]], scores[places[1]], ...
    """
    PASSES: tl.constexpr = (32 + DIGIT - 1) // DIGIT
    o_bins = tl.arange(0, 2**DIGIT)
    one = tl.full((), 1, tl.uint32)
    lowest = tl.full((), 0, tl.uint32)
    highest = tl.full((), 0xFFFFFFFF, tl.uint32)
    room = k
    several = True
    for i_pass in tl.static_range(PASSES):
        shift = (PASSES - 1 - i_pass) * DIGIT
        if several:
            histogram = tl.zeros((2**DIGIT,), tl.int32)
            for first in range(0, count, TILE):
                entries = first + tl.arange(0, TILE)
                inside = entries < count
                if INDIRECT:
                    entries = tl.load(places_ptr + entries, mask=inside, other=0)
                bits = _score_bits(scores_ptr, entries, inside)
                matches = (bits != 0) & (bits >= lowest) & (bits <= highest)
                digits = ((bits >> shift) & (2**DIGIT - 1)).to(tl.int32)
                histogram += tl.histogram(digits, 2**DIGIT, mask=matches)
            above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)
            # One bin at most: that in which the room-th largest entry lies.
            here = (above < room) & (room <= above + histogram)
            lowest |= tl.sum(tl.where(here, o_bins, 0), axis=0).to(tl.uint32) << shift
            found = tl.sum(here.to(tl.int32), axis=0) > 0
            highest = tl.where(found, lowest | ((one << shift) - one), highest)
            room -= tl.sum(tl.where(here, above, 0), axis=0)
            several = tl.sum(tl.where(here, histogram, 0), axis=0) > room + slack
    return lowest, highest, room


@jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def _select_kernel(
    scores_ptr,  # float32 [sequences * num_queries, row_stride]
    peaks_ptr,  # float32 [sequences * num_queries, row_stride // GROUP]
    groups_ptr,  # int32, scratch of the shape of peaks
    places_ptr,  # int32, scratch of the shape of scores
    mask_ptr,  # uint8 [B, T], 1 at real tokens
    start_ptr,  # int32 [B], the first real token
    slot_ptr,  # int64 [], with HAS_SLOT what is added to `first_slot`
    out_ptr,  # int32 [B, S, width]
    first_batch,
    first_query,
    num_queries,
    first_slot,
    topk,
    local_window,
    anchor_stride,
    width,
    mask_stride_b,
    row_stride,
    out_stride_b,
    out_stride_s,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIGIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
):
    """The slots that one query keeps, out of its row of scores."""
    row = tl.program_id(0).to(tl.int64)
    i_batch = first_batch + row // num_queries
    i_query = row % num_queries
    slot = first_slot + i_query.to(tl.int32)
    if HAS_SLOT:
        slot += tl.load(slot_ptr).to(tl.int32)
    start = 0
    if HAS_MASK:
        start = tl.load(start_ptr + i_batch)
        mask_ptr += i_batch * mask_stride_b
    scores_ptr += row * row_stride
    places_ptr += row * row_stride
    peaks_ptr += row * (row_stride // GROUP)
    groups_ptr += row * (row_stride // GROUP)
    out_ptr += i_batch * out_stride_b + (first_query + i_query) * out_stride_s

    first_group = start // GROUP  # padding before it was not scored
    num_groups = slot // GROUP + 1 - first_group
    peaks_ptr += first_group
    # Any number that k groups reach will do: an eighth more of them is less work than another digit.
    bound, _, _ = _kth_largest(peaks_ptr, peaks_ptr, num_groups, topk, topk // 8, False, TILE, DIGIT)
    bound = tl.maximum(bound, tl.full((), 1, tl.uint32))
    num_kept = 0
    for first in range(0, num_groups, TILE):
        entries = _tile_of(first, TILE)
        inside = entries < num_groups
        groups = first_group + entries
        kept = _score_bits(peaks_ptr, entries, inside) >= bound
        kept = kept | (slot - groups * GROUP < local_window + GROUP)
        if HAS_ANCHORS:
            # The first anchor at or after the group's first slot lies in the group.
            since = tl.maximum(groups * GROUP - start, 0)
            kept = kept | ((since + anchor_stride - 1) // anchor_stride * anchor_stride < since + GROUP)
        num_kept = _append(groups_ptr, num_kept, groups, kept & inside)
    tl.debug_barrier()  # other threads read what this one wrote

    num_places = 0
    for first in range(0, num_kept, TILE // GROUP):
        entries = first + tl.arange(0, TILE // GROUP)
        groups = tl.load(groups_ptr + entries, mask=entries < num_kept, other=0)
        places = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (entries < num_kept)[:, None]  # one mask for a row, so that four scores are loaded at once
        visible = inside & (places <= slot) & (places >= start)
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + places, mask=visible, other=0) != 0)
        forced = slot - places <= local_window
        if HAS_ANCHORS:
            forced = forced | ((places - start) % anchor_stride == 0)
        taken = visible & (forced | (_score_bits(scores_ptr, places, inside) >= bound))
        num_places = _append(places_ptr, num_places, places, taken)
    tl.debug_barrier()

    # From here on, a place without candidate's bits is forced.
    lowest, highest, room = _kth_largest(scores_ptr, places_ptr, num_places, topk, 0, True, TILE, DIGIT)
    count = 0
    num_ranked = 0
    for first in range(0, num_places, TILE):
        entries = _tile_of(first, TILE)
        inside = entries < num_places
        places = tl.load(places_ptr + entries, mask=inside, other=0)
        bits = _score_bits(scores_ptr, places, inside)
        ranked = inside & (bits != 0) & (bits >= lowest) & (bits <= highest)
        ones = ranked.to(tl.int32)
        in_row = tl.sum(ones, axis=1)
        rank = num_ranked + (tl.cumsum(in_row, axis=0) - in_row)[:, None] + tl.cumsum(ones, axis=1)
        num_ranked += tl.sum(in_row, axis=0)
        kept = (bits == 0) | (bits > highest) | (ranked & (rank <= room))
        count = _append(out_ptr, count, places, kept & inside)
    for first in range(count, width, TILE):
        o_rest = first + tl.arange(0, TILE)
        tl.store(out_ptr + o_rest, -1, mask=o_rest < width)


@jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def _enumerate_kernel(
    mask_ptr,  # uint8 [batch, T], 1 at real tokens
    start_ptr,  # int32 [batch]
    slot_ptr,  # int64 [], with HAS_SLOT what is added to `first_slot`
    out_ptr,  # int32 [batch, S, width]
    num_queries,
    first_slot,
    local_window,
    anchor_stride,
    width,
    mask_stride_b,
    out_stride_b,
    out_stride_s,
    TILE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
):
    """Anchors, then window of one query: ascending without any sorting. `local_window` -1 means no window."""
    row = tl.program_id(0).to(tl.int64)
    i_batch = row // num_queries
    i_query = row % num_queries
    slot = first_slot + i_query.to(tl.int32)
    if HAS_SLOT:
        slot += tl.load(slot_ptr).to(tl.int32)
    out_ptr += i_batch * out_stride_b + i_query * out_stride_s
    start = 0
    if HAS_MASK:
        start = tl.load(start_ptr + i_batch)
    oldest_in_window = tl.maximum(slot - local_window, start)
    num_anchors = 0
    if HAS_ANCHORS:
        before = tl.minimum(oldest_in_window, slot + 1) - start
        num_anchors = tl.maximum(before + anchor_stride - 1, 0) // anchor_stride
    num_slots = num_anchors + tl.maximum(slot + 1 - oldest_in_window, 0)

    count = 0
    for first in range(0, num_slots, TILE):
        entries = _tile_of(first, TILE)
        slots = tl.where(
            entries < num_anchors, start + entries * anchor_stride, oldest_in_window + entries - num_anchors
        )
        take = entries < num_slots
        if HAS_MASK:
            take = tl.load(mask_ptr + i_batch * mask_stride_b + slots, mask=take, other=0) != 0
        count = _append(out_ptr, count, slots, take)
    for first in range(count, width, TILE):
        o_rest = first + tl.arange(0, TILE)
        tl.store(out_ptr + o_rest, -1, mask=o_rest < width)


def _kept_whole(num_keys: int, topk: int, local_window: int | None, anchor_stride: int | None) -> int:
    """Largest n <= `num_keys` such that queries that see up to n tokens keep them all."""
    low, high = 0, num_keys
    while low < high:
        middle = (low + high + 1) // 2
        fits = middle - forced_count(middle, local_window, anchor_stride) <= topk
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _row_stride(num_keys: int) -> int:
    return -(-num_keys // ROW_MULTIPLE) * ROW_MULTIPLE


def _chunks(batch: int, first_query: int, num_queries: int, offset: int) -> Iterator[tuple[int, ...]]:
    """(first sequence, sequences, first query, queries) whose rows fit the slab; early queries have short rows."""
    count_all = num_queries - first_query
    row = _row_stride(offset + num_queries)
    together = SLAB_ELEMENTS // (count_all * row)
    if together:
        for b in range(0, batch, together):
            yield b, min(together, batch - b), first_query, count_all
        return
    for b in range(batch):
        begin = first_query
        while begin < num_queries:
            shortest = _row_stride(offset + begin) + ROW_MULTIPLE
            # Each query lengthens the rows by one: the largest n with n * (shortest + n) <= SLAB_ELEMENTS.
            count = int((math.sqrt(shortest**2 + 4 * SLAB_ELEMENTS) - shortest) / 2)
            count = min(max(1, count), num_queries - begin)
            yield b, 1, begin, count
            begin += count


@torch.no_grad()
def select_tokens(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    topk: int | None,
    local_window: int | None,
    anchor_stride: int | None,
    batch_size: int,
    num_queries: int,
    query_offset: int,
    key_mask: torch.Tensor | None,
    width: int,
    device: torch.device,
    slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `sparse_attention_keye.select_tokens`. Never waits for the device; workspace as `SLAB_ELEMENTS` says.

    `slot`, int64 [] on the device, is the slot of the first query where the host does not know it. `query_offset` is
    then the greatest that it can be, the length of the cache less the queries.
    """
    out = torch.empty(batch_size, num_queries, width, dtype=torch.int32, device=device)
    if out.numel() == 0:
        return out
    num_keys = query_offset + num_queries
    mask, start = _padding(key_mask, device)
    if topk is None:
        whole = num_queries
        window, stride = local_window, anchor_stride
    else:
        whole = _kept_whole(num_keys, topk, local_window, anchor_stride) - query_offset
        whole = min(max(whole, 0), num_queries)
        if slot is not None and whole < num_queries:
            whole = 0  # at lower slots more queries keep everything; their few scores are made all the same
        window, stride = num_keys, None
    with on_device(device):
        if whole:
            _enumerate(out[:, :whole], mask, start, slot, window, stride, query_offset)
        if whole < num_queries:
            _select(out, q, k, weights, mask, start, slot, topk, local_window, anchor_stride, query_offset, whole)
    return out


def _padding(key_mask: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask as uint8 [B, T] and the first real token of each sequence, int32 [B]."""
    if key_mask is None:
        return None, None
    mask = key_mask.to(device=device, dtype=torch.bool).to(torch.uint8)
    return mask, mask.argmax(dim=1).to(torch.int32)


def _enumerate(out, mask, start, slot, local_window, anchor_stride, query_offset) -> None:
    batch, num_queries, width = out.shape
    _enumerate_kernel[(batch * num_queries,)](
        mask,
        start,
        slot,
        out,
        num_queries,
        query_offset if slot is None else 0,
        -1 if local_window is None else local_window,
        anchor_stride or 1,
        width,
        0 if mask is None else mask.stride(0),
        out.stride(0),
        out.stride(1),
        TILE=ENUMERATE_TILE,
        HAS_MASK=mask is not None,
        HAS_ANCHORS=anchor_stride is not None,
        HAS_SLOT=slot is not None,
        num_warps=4,
    )


def _select(
    out, q, k, weights, mask, start, slot, topk, local_window, anchor_stride, query_offset, first_query
) -> None:
    """Scores and selects the queries from `first_query` on."""
    batch, num_queries, width = out.shape
    heads, dim = q.shape[2:]
    dtype = torch.promote_types(q.dtype, k.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype  # scores are float32 in every backend
    q, k = within_32_bits(q.to(dtype)), k.to(dtype)
    tiles = score_tiles(heads, dim, dtype, shared_memory(q.device))
    chunks = list(_chunks(batch, first_query, num_queries, query_offset))
    size = max(sequences * count * _row_stride(query_offset + begin + count) for _, sequences, begin, count in chunks)
    scores = torch.empty(size, dtype=torch.float32, device=q.device)
    peaks = torch.empty(size // GROUP, dtype=torch.float32, device=q.device)
    places = torch.empty(size, dtype=torch.int32, device=q.device)
    groups = torch.empty(size // GROUP, dtype=torch.int32, device=q.device)
    mask_stride = 0 if mask is None else mask.stride(0)
    rule = (-1 if local_window is None else local_window, anchor_stride or 1)
    switches = {"HAS_MASK": mask is not None, "HAS_ANCHORS": anchor_stride is not None, "HAS_SLOT": slot is not None}
    score = Launches(
        _score_kernel,
        {
            "HEADS": heads,
            "DIM": dim,
            "BLOCK_QUERIES": tiles.queries,
            "BLOCK_HEADS": tiles.heads,
            "BLOCK_DIM": tiles.dim,
            "BLOCK_KEYS": tiles.keys,
            "SPAN": tiles.span,
            "GROUP": GROUP,
            **switches,
            "DOT": operand_dtype(dtype),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    select = {}
    tensors, strides = (q, k, weights, mask, start, slot), (*q.stride(), *k.stride(), *weights.stride(), mask_stride)
    processors, (out_stride_b, out_stride_s) = multiprocessors(q.device), out.stride()[:2]
    for b, sequences, begin, count in chunks:
        num_keys = query_offset + begin + count
        place = (b, begin, count)
        first_slot = begin if slot is not None else query_offset + begin
        row_stride = _row_stride(num_keys)
        num_blocks, num_spans = -(-count // tiles.queries), -(-num_keys // tiles.span)
        score(
            num_blocks * num_spans * sequences,
            *tensors,
            scores,
            peaks,
            *place,
            num_blocks,
            num_spans,
            first_slot,
            *rule,
            *strides,
            row_stride,
        )
        shape = select_tile(sequences * count, processors)
        if shape not in select:
            tile, num_warps = shape
            constants = {"GROUP": GROUP, "TILE": tile, "DIGIT": DIGIT, **switches}
            select[shape] = Launches(_select_kernel, constants, num_warps=num_warps)
        select[shape](
            sequences * count,
            scores,
            peaks,
            groups,
            places,
            mask,
            start,
            slot,
            out,
            *place,
            first_slot,
            topk,
            *rule,
            width,
            mask_stride,
            row_stride,
            out_stride_b,
            out_stride_s,
        )
