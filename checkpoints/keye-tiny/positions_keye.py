"""Three-axis position ids (time, height, width) of prompts with images and videos."""

from collections.abc import Iterable, Iterator

import torch


def rope_index(
    config,
    input_ids: torch.LongTensor,
    *,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    second_per_grid_ts: Iterable[float] | None = None,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Positions [3, B, S] of `input_ids` [B, S] and what a later token's position adds to its slot, [B, 1].

    Text counts up on all axes; a block of visual tokens starts at the next position and spreads over time, height and
    width; text goes on after the largest of them (`get_rope_index` of the published models). A block is an image, a
    frame, or with `video_position_ids="clip"` a whole video whose time axis is scaled by `second_per_grid_ts` (seconds
    between frames, one number per video). Padding (0 in `attention_mask`) gets position 1.

    Raises `ValueError` when placeholders and grids disagree.
    """
    clip = config.video_position_ids == "clip"
    blocks = {
        config.image_token_id: _blocks(config.vision_config, image_grid_thw, clip=False),
        config.video_token_id: _blocks(config.vision_config, video_grid_thw, clip, second_per_grid_ts),
    }
    positions = torch.ones(3, *input_ids.shape, dtype=torch.long)
    deltas = []
    mask = None if attention_mask is None else attention_mask[:, : input_ids.shape[1]].bool().cpu()
    for b, row in enumerate(input_ids.cpu()):
        real = torch.arange(row.shape[0]) if mask is None else mask[b].nonzero().squeeze(-1)
        axes, following = _row_positions(row[real].tolist(), blocks, b)
        if axes:
            positions[:, b, real] = torch.cat(axes, dim=1)
        deltas.append(following - row.shape[0])
    device = input_ids.device
    return positions.to(device), torch.tensor(deltas, dtype=torch.long, device=device).unsqueeze(1)


def _row_positions(
    ids: list[int], blocks: dict[int, Iterator[torch.Tensor]], row: int
) -> tuple[list[torch.Tensor], int]:
    """Positions of one sequence as parts [3, n], and the position after its last token."""
    axes: list[torch.Tensor] = []
    following = i = 0
    while i < len(ids):
        if ids[i] not in blocks:
            end = i
            while end < len(ids) and ids[end] not in blocks:
                end += 1
            axes.append(torch.arange(following, following + end - i).expand(3, -1))
            following += end - i
        else:
            block = next(blocks[ids[i]], None)
            end = i + (0 if block is None else block.shape[1])
            if block is None or ids[i:end] != [ids[i]] * block.shape[1]:
                raise ValueError(
                    f"Sequence {row} holds a run of placeholders {ids[i]} at token {i} that does not fit the image and "
                    "video grids. Build the inputs with `KeyeProcessor`."
                )
            axes.append(block + following)
            following = int(axes[-1].max()) + 1
        i = end
    return axes, following


def _blocks(
    vision_config, grid_thw: torch.Tensor | None, clip: bool, second_per_grid_ts: Iterable[float] | None = None
) -> Iterator[torch.Tensor]:
    """Relative positions [3, tokens] of each visual block that the rows of `grid_thw` describe."""
    merge = vision_config.spatial_merge_size
    seconds = None if second_per_grid_ts is None else list(second_per_grid_ts)
    for row, (frames, height, width) in enumerate([] if grid_thw is None else grid_thw.tolist()):
        if clip and seconds is not None and row >= len(seconds):
            raise ValueError(
                f"`second_per_grid_ts` holds {len(seconds)} numbers for {grid_thw.shape[0]} grid rows; pass one each."
            )
        spacing = 1.0 if seconds is None or not clip else float(seconds[row])
        scale = spacing * vision_config.tokens_per_second
        times = [int(frame * scale) for frame in range(frames)] if clip else [0]
        axes = (torch.tensor(times), torch.arange(height // merge), torch.arange(width // merge))
        block = torch.cartesian_prod(*axes).view(-1, 3).T
        for _ in range(1 if clip else frames):
            yield block
