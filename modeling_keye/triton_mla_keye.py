"""Sparse multi-head latent attention in Triton: prefill and split decode, and the entry point with gradients.

The contract is that of `sparse_attention_keye.sparse_mla`; `sparse_reference_keye.sparse_mla` is the judge. All heads
of a query share its rows of the cache (DeepSeek-V2 report, section 2.1, absorbed form): a program takes one query and a
block of heads, gathers tiles of selected rows once, and uses the latent columns of a tile as keys and as values. With
too few queries to fill the device, each list is cut into parts that `combine` joins by their log-sum-exp.

Sizes: B batch, S queries, T cache rows, H query heads, C latent size, R rotary size, W = C + R, K places of a list.
Prefixes as in `triton_gather_keye.py`. Logarithms in the kernels have base 2; `lse` outside is natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_common_keye import (
    jit,
    multiprocessors,
    on_device,
    operand_dtype,
    shared_memory,
    tl,
    triton,
    within_32_bits,
)
from .triton_gather_keye import (
    HOPPER_SHARED,
    LOG2_E,
    add_weighted,
    combine,
    first_fitting,
    load_rows,
    num_splits,
    scores_apart,
    scores_of,
    used_places,
)
from .triton_mla_backward_keye import backward, padded_sizes, score_tiles
from .triton_tuning_keye import tunable

MAX_HEADS = 128
# Output elements that the registers of one program hold in float32: 64 heads x 512.
_MAX_OUTPUT = 64 * 512


@dataclass(frozen=True)
class Tiles:
    """Heads and places per program (powers of two), heads as columns of the products or as rows, launch options.

    With `ahead`, which is for heads as rows, the next tile is gathered before this one is multiplied.
    """

    heads: int
    places: int
    swapped: bool
    num_warps: int
    num_stages: int
    ahead: bool


@tunable(
    "mla_forward",
    ahead=(False, True),
    heads=(16, 32, 64),
    swapped=(False, True),
    places=(32, 64),
    num_warps=(4, 8),
    num_stages=(1, 2, 3),
)
def forward_tiles(heads: int, latent: int, width: int, element_size: int, shared: int) -> Tiles:
    """Blocks for `heads` heads, padded sizes `latent` and `width`, that fit `shared` bytes; no length enters.

    Chosen so that nothing spills when compiled (tests/kernels/test_aot_mla.py); tiles of 64 places keep Hopper's
    products from being bound by the shared memory that feeds them.
    """
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(heads: int, places: int) -> int:
        # Hopper reads a tile from shared memory while the next one arrives; older devices hold it in registers.
        buffers = 2 if hopper else 1
        return ((heads + buffers * places) * width + heads * places) * element_size

    if element_size > 2:  # multiply-adds, whose operands live in registers: no matrix instruction keeps float32
        blocks = [(16, 16)]
    else:
        most = 64 if hopper else 32
        blocks = [(64, 64), (64, 32), (32, 64), (32, 32), (32, 16), (16, 64), (16, 32), (16, 16)]
        blocks = [(block, places) for block, places in blocks if block <= most and block < 2 * max(16, heads)]
        blocks = [(block, places) for block, places in blocks if block * latent <= _MAX_OUTPUT] or [(16, 16)]
    block, places = first_fitting(blocks, size, shared)
    return Tiles(block, places, hopper and block < 64 <= places, 8, 2, hopper and block == places == 64)


@jit(do_not_specialize=["num_queries", "num_keys", "num_places", "num_heads"])
def _forward_kernel(
    q_ptr,  # [B, S, H, W]
    kv_ptr,  # [B, T, W]
    indices_ptr,  # int32 [B, S, K], K >= BLOCK_K
    used_ptr,  # int32 [B * S], or None when all places are read
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
    AHEAD: tl.constexpr,  # stages of a loop that gathers a tile before it multiplies the one before, or None
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
    b_q = load_rows(q_rows, m_head, stride_qw, 0, C, BLOCK_C, DOT)
    b_q_rope = b_q
    if R > 0:
        b_q_rope = load_rows(q_rows, m_head, stride_qw, C, R, BLOCK_R, DOT)
    indices_ptr += i_b * stride_ib + i_s * stride_is
    kv_ptr += i_b * stride_kb

    used = num_places if used_ptr is None else tl.load(used_ptr + i_query)
    span = tl.cdiv(tl.cdiv(used, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, used)
    b_max = tl.full([BLOCK_H], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_H], ACC)
    b_out = tl.zeros([BLOCK_C, BLOCK_H] if SWAPPED else [BLOCK_H, BLOCK_C], ACC)
    for start in tl.range(first, last, BLOCK_K, num_stages=AHEAD):
        # A tile that would run over the end of the list begins earlier: unmasked reads of indices save registers.
        begin = tl.minimum(start, num_places - BLOCK_K)
        o_tile = tl.arange(0, BLOCK_K)
        b_index = tl.load(indices_ptr + (begin + o_tile) * stride_ik)
        m_place = (b_index >= 0) & (b_index < num_keys) & (o_tile >= start - begin)
        kv_rows = kv_ptr + b_index.to(tl.int64) * stride_kt
        b_kv = load_rows(kv_rows, m_place, stride_kw, 0, C, BLOCK_C, DOT)
        b_rope = b_kv
        if R > 0:
            b_rope = load_rows(kv_rows, m_place, stride_kw, C, R, BLOCK_R, DOT)
        if AHEAD is None or begin >= 0:  # always; Triton's pipeline puts a branch behind the loads of the next tile
            if AHEAD is None:
                b_scores = scores_of(b_q, b_kv, SWAPPED, ACC)
                if R > 0:
                    b_scores += scores_of(b_q_rope, b_rope, SWAPPED, ACC)
            else:
                b_scores = scores_apart(b_q, b_q_rope, b_kv, b_rope, start, last, False, ACC)
            b_scores = tl.where(tl.expand_dims(m_place, HEAD_AXIS), b_scores * scale_log2, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_scores, PLACE_AXIS))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_probs = tl.exp2(b_scores - tl.expand_dims(b_safe, PLACE_AXIS))
            b_decay = tl.exp2(b_max - b_safe)
            b_sum = b_sum * b_decay + tl.sum(b_probs, PLACE_AXIS)
            b_out = add_weighted(b_out * tl.expand_dims(b_decay, PLACE_AXIS), b_probs.to(DOT), b_kv, SWAPPED, ACC)
            b_max = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # without keys the maximum is -inf, and so becomes the log-sum-exp
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


def unsupported(q: torch.Tensor, kv: torch.Tensor, value_dim: int) -> str | None:
    """None when the kernels take heads and head sizes of these inputs, else one sentence that says why not."""
    heads, width = q.shape[2:]
    if heads > MAX_HEADS:
        return f'The Triton kernels take up to {MAX_HEADS} heads, not {heads}; choose the backend "torch".'
    latent, _, padded_width = padded_sizes(value_dim, width)
    element_size = torch.promote_types(q.dtype, kv.dtype).itemsize
    try:
        for tiles in (forward_tiles, score_tiles):
            tiles(heads, latent, padded_width, element_size, shared_memory(q.device))
    except ValueError as error:
        return str(error)
    return None


def _forward(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q = within_32_bits(q)
    batch, num_queries, heads, width = q.shape
    rotary = width - value_dim
    dtype = torch.promote_types(q.dtype, kv.dtype)
    statistics = torch.promote_types(dtype, torch.float32)
    out = q.new_empty(batch, num_queries, heads, value_dim)
    lse = torch.empty(batch, num_queries, heads, dtype=statistics, device=q.device)
    if lse.numel() == 0:
        return out, lse
    block_c, block_r, padded_width = padded_sizes(value_dim, width)
    tiles = forward_tiles(heads, block_c, padded_width, dtype.itemsize, shared_memory(q.device))
    if indices.shape[2] < tiles.places:
        indices = torch.nn.functional.pad(indices, (0, tiles.places - indices.shape[2]), value=-1)
    programs = batch * num_queries * triton.cdiv(heads, tiles.heads)
    splits = num_splits(programs, indices.shape[2], tiles.places, multiprocessors(q.device))
    if splits == 1:
        part, part_lse, used = out, lse, used_places(indices, kv.shape[1])
    else:  # few queries: another launch would cost more than the places it saves
        part = torch.empty(splits, *out.shape, dtype=statistics, device=q.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=statistics, device=q.device)
        used = None
    with on_device(q.device):
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
            C=value_dim,
            R=rotary,
            BLOCK_C=block_c,
            BLOCK_R=block_r,
            BLOCK_H=tiles.heads,
            BLOCK_K=tiles.places,
            SWAPPED=tiles.swapped,
            AHEAD=tiles.num_stages if tiles.ahead and rotary and not tiles.swapped else None,
            DOT=operand_dtype(dtype),
            ACC=tl.float64 if statistics == torch.float64 else tl.float32,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    if splits > 1:
        combine(part, part_lse, out, lse)
    return out, lse


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, indices, scaling, value_dim):
        out, lse = _forward(q, kv, indices, scaling, value_dim)
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        grad_q, grad_kv = backward(*ctx.saved_tensors, grad_out, ctx.scaling)
        return grad_q, grad_kv, None, None, None


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_mla`.

    Beyond its contract: indices at or past the number of cache rows count as unused, places may repeat a row (each
    counts), and q and kv may differ in dtype (products are made in the wider one). The backward pass adds gradients of
    cache rows atomically, hence in no fixed order, unless `torch.use_deterministic_algorithms` is on. Raises
    `ValueError` where `unsupported` has something to say.
    """
    problem = unsupported(q, kv, value_dim)
    if problem is not None:
        raise ValueError(problem)
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        return _SparseMLA.apply(q, kv, indices, scaling, value_dim)
    return _forward(q, kv, indices, scaling, value_dim)
