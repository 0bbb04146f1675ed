"""Sparse multi-head latent attention in Triton: prefill, split decode, and the backward pass in two kernels.

The contract is that of `sparse_attention_keye.sparse_mla`; `sparse_reference_keye.sparse_mla` is the judge. All heads of
a query share its rows of the cache (DeepSeek-V2 report, section 2.1, absorbed form), so a program takes one query and a
block of heads, gathers tiles of selected rows once, and uses the latent columns of a tile as keys and as values.

Sizes: B batch, S queries, T cache rows, H query heads, C latent size, R rotary size, W = C + R, K places in a list of
indices. Compile-time constants come from head sizes, types and shared memory only. Prefixes: i_ index, o_ offsets,
m_ mask, b_ block. Logarithms inside kernels have base 2, `lse` outside is natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .triton_common_keye import jit, multiprocessors, on_device, operand_dtype, shared_memory, tl, triton

LOG2_E = math.log2(math.e)
MAX_HEADS = 128
# Partial results of a split query that one combining program looks at.
MAX_SPLITS = 64
# Scratch of the backward pass. Probabilities and score gradients of 128 heads x 2048 places take 1 MiB per query.
WORKSPACE_BYTES = 256 * 2**20
USED_BLOCK = 1024


@dataclass(frozen=True)
class Tiles:
    """Blocks of a kernel: heads and places (powers of two), whether the heads are the columns of the products."""

    heads: int
    places: int
    swapped: bool
    num_warps: int
    num_stages: int


def forward_tiles(heads: int, width: int, element_size: int, shared: int) -> Tiles:
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    return Tiles(block, 64, block < 64, 8, 2)


@jit(do_not_specialize=["num_queries", "num_keys", "num_places"])
def _used_kernel(
    indices_ptr,  # int32 [B, S, K]
    used_ptr,  # int32 [B * S]
    stride_ib,
    stride_is,
    stride_ik,
    num_queries,
    num_keys,
    num_places,
    BLOCK: tl.constexpr,
):
    """One more than the last place of each list that names a row: what follows need not be read."""
    i_query = tl.program_id(0).to(tl.int64)
    indices_ptr += (i_query // num_queries) * stride_ib + (i_query % num_queries) * stride_is
    used = 0
    for start in range(0, num_places, BLOCK):
        o_place = start + tl.arange(0, BLOCK)
        b_index = tl.load(indices_ptr + o_place * stride_ik, mask=o_place < num_places, other=-1)
        used = tl.maximum(used, tl.max(tl.where((b_index >= 0) & (b_index < num_keys), o_place + 1, 0)))
    tl.store(used_ptr + i_query, used)


@jit
def _load_rows(ptr, m_row, stride, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Columns FIRST.. of the rows that `ptr` points at: [rows, BLOCK], zero where masked and past SIZE columns."""
    o_column = tl.arange(0, BLOCK)
    pointers = ptr[:, None] + (FIRST + o_column)[None, :] * stride
    mask = m_row[:, None] if SIZE == BLOCK else m_row[:, None] & (o_column < SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT)


@jit
def _product(b_heads, b_places, SWAPPED: tl.constexpr, ACC: tl.constexpr):
    """heads [BH, D] x places [BK, D] -> [BH, BK], or [BK, BH] when swapped."""
    if SWAPPED:
        b_product = tl.dot(b_places, tl.trans(b_heads), input_precision="ieee", out_dtype=ACC)
    else:
        b_product = tl.dot(b_heads, tl.trans(b_places), input_precision="ieee", out_dtype=ACC)
    return b_product


@jit
def _weighted(b_acc, b_weights, b_places, SWAPPED: tl.constexpr, ACC: tl.constexpr):
    """acc + weights [BH, BK] x places [BK, D] -> [BH, D]; weights and result are transposed when swapped."""
    if SWAPPED:
        b_acc = tl.dot(tl.trans(b_places), b_weights, b_acc, input_precision="ieee", out_dtype=ACC)
    else:
        b_acc = tl.dot(b_weights, b_places, b_acc, input_precision="ieee", out_dtype=ACC)
    return b_acc


@jit(do_not_specialize=["num_queries", "num_keys", "num_places", "num_heads", "scale_log2"])
def _forward_kernel(
    q_ptr,  # [B, S, H, W]
    kv_ptr,  # [B, T, W]
    indices_ptr,  # int32 [B, S, K], K >= BLOCK_K
    used_ptr,  # int32 [B * S] or None
    out_ptr,  # [splits, B, S, H, C]
    lse_ptr,  # [splits, B, S, H]
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qw,
    stride_kb,
    stride_kt,
    stride_kw,
    stride_ib,
    stride_is,
    stride_ik,
    num_queries,
    num_keys,
    num_places,
    num_heads,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    HEAD_AXIS: tl.constexpr = 1 if SWAPPED else 0
    PLACE_AXIS: tl.constexpr = 0 if SWAPPED else 1
    # The blocks of heads of one query are neighbours: they gather the same rows at about the same time.
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    i_query = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_b, i_s = i_query // num_queries, i_query % num_queries
    o_head = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_head = o_head < num_heads
    q_rows = q_ptr + i_b * stride_qb + i_s * stride_qs + o_head * stride_qh
    b_q = _load_rows(q_rows, m_head, stride_qw, 0, C, BLOCK_C, DOT)
    if R > 0:
        b_q_rope = _load_rows(q_rows, m_head, stride_qw, C, R, BLOCK_R, DOT)
    indices_ptr += i_b * stride_ib + i_s * stride_is
    kv_ptr += i_b * stride_kb

    # The bound is a scalar from memory: a reduction here would make the loop look divergent to ptxas, which then keeps
    # the operand descriptors in ordinary registers and spills.
    used = num_places if used_ptr is None else tl.load(used_ptr + i_query)
    span = tl.cdiv(tl.cdiv(used, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, used)
    b_max = tl.full([BLOCK_H], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_H], ACC)
    b_out = tl.zeros([BLOCK_C, BLOCK_H] if SWAPPED else [BLOCK_H, BLOCK_C], ACC)
    for start in range(first, last, BLOCK_K):
        # A tile that would run over the end starts earlier, so that indices are read without a mask.
        begin = tl.minimum(start, num_places - BLOCK_K)
        o_tile = tl.arange(0, BLOCK_K)
        b_index = tl.load(indices_ptr + (begin + o_tile) * stride_ik)
        m_place = (b_index >= 0) & (b_index < num_keys) & (o_tile >= start - begin)
        kv_rows = kv_ptr + b_index.to(tl.int64) * stride_kt
        b_kv = _load_rows(kv_rows, m_place, stride_kw, 0, C, BLOCK_C, DOT)
        b_scores = _product(b_q, b_kv, SWAPPED, ACC)
        if R > 0:
            b_scores += _product(b_q_rope, _load_rows(kv_rows, m_place, stride_kw, C, R, BLOCK_R, DOT), SWAPPED, ACC)
        b_scores = tl.where(tl.expand_dims(m_place, HEAD_AXIS), b_scores * scale_log2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, PLACE_AXIS))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_probs = tl.exp2(b_scores - tl.expand_dims(b_safe, PLACE_AXIS))
        b_decay = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_decay + tl.sum(b_probs, PLACE_AXIS)
        b_out = _weighted(b_out * tl.expand_dims(b_decay, PLACE_AXIS), b_probs.to(DOT), b_kv, SWAPPED, ACC)
        b_max = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # no key: the maximum is -inf and so is the log-sum-exp
    b_out = b_out / tl.expand_dims(b_sum, PLACE_AXIS)
    if SWAPPED:
        b_out = tl.trans(b_out)
    o_row = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // head_blocks) + i_query) * num_heads + o_head
    o_column = tl.arange(0, BLOCK_C)
    tl.store(
        out_ptr + o_row[:, None] * C + o_column[None, :],
        b_out.to(out_ptr.dtype.element_ty),
        mask=m_head[:, None] & (o_column < C)[None, :],
    )
    tl.store(lse_ptr + o_row, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_head)


@jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_kernel(
    partial_ptr,  # [splits, rows, C]
    partial_lse_ptr,  # [splits, rows]
    out_ptr,  # [rows, C]
    lse_ptr,  # [rows]
    num_rows,
    num_splits,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Parts of one head of one query, each normalised by its own sum, in a fixed order; a part without keys counts 0."""
    i_row = tl.program_id(0).to(tl.int64)
    o_split = tl.arange(0, MAX_SPLITS)
    b_lse = tl.load(partial_lse_ptr + o_split * num_rows + i_row, mask=o_split < num_splits, other=float("-inf"))
    top = tl.max(b_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(b_lse - safe))
    total = tl.where(total == 0.0, 1.0, total)
    o_column = tl.arange(0, BLOCK_C)
    m_column = o_column < C
    b_out = tl.zeros([BLOCK_C], b_lse.dtype)
    partial_ptr += i_row * C
    for i_split in range(num_splits):
        weight = tl.exp(tl.load(partial_lse_ptr + i_split * num_rows + i_row) - safe) / total
        b_out += weight * tl.load(partial_ptr + o_column, mask=m_column, other=0.0)
        partial_ptr += tl.cast(num_rows, tl.int64) * C
    tl.store(out_ptr + i_row * C + o_column, b_out.to(out_ptr.dtype.element_ty), mask=m_column)
    tl.store(lse_ptr + i_row, top + tl.log(total))


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _sizes(q: torch.Tensor, kv: torch.Tensor, value_dim: int) -> dict:
    """Compile-time constants that the kernels share."""
    rotary = q.shape[-1] - value_dim
    dtype = torch.promote_types(q.dtype, kv.dtype)
    return {
        "C": value_dim,
        "R": rotary,
        "BLOCK_C": _block(value_dim),
        "BLOCK_R": _block(rotary),
        "DOT": operand_dtype(dtype),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def num_splits(programs: int, num_places: int, tile: int, processors: int) -> int:
    """Into how many parts the list of each query is cut so that `programs` occupy the device: two tiles at least each."""
    return max(1, min(processors // max(1, programs), num_places // (2 * tile), MAX_SPLITS))


def _used(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    used = torch.empty(indices.shape[0] * indices.shape[1], dtype=torch.int32, device=indices.device)
    _used_kernel[(used.shape[0],)](
        indices, used, *indices.stride(), indices.shape[1], num_keys, indices.shape[2], BLOCK=USED_BLOCK, num_warps=4
    )
    return used


def _forward(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int, splits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out, lse and, when the queries were not split, how many places of each list are used."""
    batch, num_queries, heads, width = q.shape
    sizes = _sizes(q, kv, value_dim)
    statistics = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, num_queries, heads, value_dim)
    lse = torch.empty(batch, num_queries, heads, dtype=statistics, device=q.device)
    if lse.numel() == 0:
        return out, lse, None
    element_size = torch.promote_types(q.dtype, kv.dtype).itemsize
    tiles = forward_tiles(heads, width, element_size, shared_memory(q.device))
    if indices.shape[-1] < tiles.places:
        indices = torch.nn.functional.pad(indices, (0, tiles.places - indices.shape[-1]), value=-1)
    programs = batch * num_queries * triton.cdiv(heads, tiles.heads)
    if splits is None:
        splits = num_splits(programs, indices.shape[-1], tiles.places, multiprocessors(q.device))
    part, part_lse, used = out, lse, None
    with on_device(q.device):
        if splits == 1:
            used = _used(indices, kv.shape[1])
        else:
            part = torch.empty(splits, *out.shape, dtype=statistics, device=q.device)
            part_lse = torch.empty(splits, *lse.shape, dtype=statistics, device=q.device)
        _forward_kernel[(programs, splits)](
            q,
            kv,
            indices,
            used,
            part,
            part_lse,
            scaling * LOG2_E,
            *q.stride(),
            *kv.stride(),
            *indices.stride(),
            num_queries,
            kv.shape[1],
            indices.shape[2],
            heads,
            BLOCK_H=tiles.heads,
            BLOCK_K=tiles.places,
            SWAPPED=tiles.swapped,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **sizes,
        )
        if splits > 1:
            rows = lse.numel()
            _combine_kernel[(rows,)](
                part,
                part_lse,
                out,
                lse,
                rows,
                splits,
                C=value_dim,
                BLOCK_C=sizes["BLOCK_C"],
                MAX_SPLITS=MAX_SPLITS,
                num_warps=4,
            )
    return out, lse, used


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_mla`."""
    out, lse, _ = _forward(q, kv, indices, scaling, value_dim)
    return out, lse
