"""Packed rows: several sequences behind one another in one row, so that a training batch needs no padding.

The bounds of a packed row are the numbers of the tokens at which its sequences begin, and the length of the row behind
them: (0, 3, 7) for sequences of three and of four tokens.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


def packed_bounds(
    cu_seq_lens: torch.Tensor | Sequence[int] | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    past_key_values,
    batch: int,
    num_tokens: int,
) -> tuple[int, ...] | None:
    """Bounds of the sequences in a row of `num_tokens` tokens, None where each row is one sequence.

    Args:
        cu_seq_lens: integers [n + 1], the bounds themselves (`cu_seq_lens_q` of the library's
            `DataCollatorWithFlattening`), or None to look at the positions.
        position_ids: [B, S], or with leading axes. A sequence begins where the position does not rise, as in
            `transformers.masking_utils.find_packed_sequence_indices`, except that a jump ahead begins none; of four
            axes the first, that of the text, tells. Time, height and width alone do not rise within a picture, so
            there only the position 0 on all three begins a sequence. Looked at without a mask and a cache only.

    Raises `ValueError` for bounds that do not divide the row, and for packing in several rows or behind a cache.
    """
    if cu_seq_lens is not None:
        bounds = _checked(cu_seq_lens, num_tokens)
    elif position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    else:
        bounds = (0, *_later_begins(position_ids, num_tokens), num_tokens)
    if len(bounds) == 2:
        return None
    if batch != 1:
        raise ValueError(
            f"A sequence begins at token {bounds[1]} of a row, but the batch has {batch} rows. Sequences are packed "
            "into a single row: put all of them into one, or pass `attention_mask` if the rows are padded."
        )
    if past_key_values is not None:
        raise ValueError(
            f"A row of {len(bounds) - 1} packed sequences cannot go on from a cache, which belongs to one sequence per "
            "row. Leave out `past_key_values`, or pass padded rows with an `attention_mask`."
        )
    return bounds


def restart_positions(position_ids: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
    """Positions [..., S] that count through a packed row, counted from the first token of each sequence instead."""
    begins = torch.tensor(bounds, device=position_ids.device)
    lengths = begins.diff()
    first = position_ids[..., begins[:-1]].repeat_interleave(lengths, dim=-1, output_size=bounds[-1])
    return position_ids - first


def sequence_lengths(bounds: tuple[int, ...]) -> list[int]:
    """Number of tokens of each sequence."""
    return [end - begin for begin, end in pairwise(bounds)]


def attend_each(
    attend: Callable,
    bounds: tuple[int, ...],
    queries: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    index: tuple[torch.Tensor, ...] | None,
    learned: tuple[torch.Tensor, ...] | None,
    *options,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`attend` for each sequence of a packed row by itself, on views of the tensors.

    Args:
        attend: called with one sequence's queries [1, n, H, D], states [1, G, n, D], index and learned [1, n, ...],
            and the options; returns output [1, n, H, D], selected slots [1, n, K] or None, and objective [2] or None.

    Returns:
        The same for the row: slots of the row, and the mean of the objectives over all its tokens.
    """
    lengths = sequence_lengths(bounds)
    parts = zip(
        bounds[:-1],
        lengths,
        _split((queries,), lengths, dim=1),
        _split(states, lengths, dim=2),
        _split(index, lengths, dim=1),
        _split(learned, lengths, dim=1),
        strict=True,
    )
    outputs, selections, objectives = [], [], []
    for begin, length, part, *tensors in parts:
        output, selected, objective = attend(*part, *tensors, *options)
        outputs.append(output)
        if selected is not None:
            selections.append(torch.where(selected < 0, selected, selected + begin))
        if objective is not None:
            objectives.append(objective * (length / bounds[-1]))
    return (
        torch.cat(outputs, dim=1),
        join_selections(selections) if selections else None,
        torch.stack(objectives).sum(dim=0) if objectives else None,
    )


def join_selections(selections: list[torch.Tensor]) -> torch.Tensor:
    """Selections [B, n, K] of runs of queries, one run behind the other, with -1 up to the widest."""
    width = max(part.shape[-1] for part in selections)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[-1]), value=-1) for part in selections], dim=1)


def _split(tensors: tuple[torch.Tensor, ...] | None, lengths: list[int], dim: int) -> list:
    """The tensors of each sequence. The gradients of one split are joined once; each slice would fill the row anew."""
    if tensors is None:
        return [None] * len(lengths)
    return list(zip(*(tensor.split(lengths, dim=dim) for tensor in tensors), strict=True))


def _checked(cu_seq_lens: torch.Tensor | Sequence[int], num_tokens: int) -> tuple[int, ...]:
    bounds = cu_seq_lens.tolist() if isinstance(cu_seq_lens, torch.Tensor) else list(cu_seq_lens)
    expected = f"It must be one list of integers that rises from 0 to the {num_tokens} tokens of the row."
    if not isinstance(bounds, list) or len(bounds) < 2 or not all(isinstance(bound, int) for bound in bounds):
        raise ValueError(f"`cu_seq_lens_q` is {bounds}. {expected}")
    if bounds[0] != 0:
        raise ValueError(f"`cu_seq_lens_q` starts at {bounds[0]}. {expected}")
    for place, (begin, end) in enumerate(pairwise(bounds)):
        if end <= begin:
            raise ValueError(f"`cu_seq_lens_q` does not rise from {begin} to {end} (entry {place + 1}). {expected}")
    if bounds[-1] != num_tokens:
        raise ValueError(f"`cu_seq_lens_q` ends at {bounds[-1]}. {expected}")
    return tuple(bounds)


def _later_begins(position_ids: torch.Tensor, num_tokens: int) -> list[int]:
    """The tokens, the first of a row aside, at which a sequence begins in any row."""
    if position_ids.shape[-1] != num_tokens:
        return []  # refused by whoever reads the positions
    if position_ids.dim() == 3 and position_ids.shape[0] == 3:
        begins = (position_ids[..., 1:] == 0).all(dim=0)
    else:
        text = position_ids[0] if position_ids.dim() == 3 else position_ids
        begins = text.diff(dim=-1) <= 0
    return (begins.any(dim=0).nonzero().squeeze(-1) + 1).tolist()
