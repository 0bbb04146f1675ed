"""Vision tower and projector: patches of images and video frames become tokens of the decoder.

The tower is a SigLIP encoder whose position table is resized to the grid of each frame, with 2-D rotary embeddings.
Frames run in chunks, and `encode_media` projects each chunk at once, so memory does not grow with the tower's width
times the length of the video.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .autocast_keye import autocast_dtype
from .configuration_keye import KeyeVisionConfig
from .flash_attention_keye import flash_segments, flash_version

GridRow = tuple[int, int, int]


def grid_rows(grid_thw: torch.Tensor, merge_size: int) -> list[GridRow]:
    """Rows (frames, height, width) of a grid in patches, checked.

    Raises `ValueError` when the grid is not `[n, 3]` of positive integers or a side is no multiple of `merge_size`.
    """
    grid_thw = torch.as_tensor(grid_thw)
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
        raise ValueError(
            f"The grid has shape {list(grid_thw.shape)}; expected [n, 3] with one row (frames, height, width in "
            "patches) per image or run of equal frames, as the processor returns it."
        )
    if grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        raise ValueError(f"The grid has dtype {grid_thw.dtype}; expected integers, as the processor returns them.")
    rows = [tuple(row) for row in grid_thw.tolist()]
    for i, (t, h, w) in enumerate(rows):
        if min(t, h, w) < 1:
            raise ValueError(f"Grid row {i} is ({t}, {h}, {w}); frames, height and width must be at least 1.")
        if h % merge_size or w % merge_size:
            raise ValueError(
                f"Grid row {i} is ({t}, {h}, {w}); height and width must be multiples of `spatial_merge_size` "
                f"{merge_size}. Resize frames so that each side is a multiple of patch size x {merge_size} pixels."
            )
    return rows


def check_media(config: KeyeVisionConfig, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[GridRow]:
    """Rows of `grid_thw`, after checking that `pixel_values` holds exactly their patches.

    Raises `ValueError` when the patches have another shape than the tower reads, or another number than the grid says.
    """
    rows = grid_rows(grid_thw, config.spatial_merge_size)
    patch = (config.num_channels, config.patch_size, config.patch_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != patch:
        raise ValueError(
            f"Pixel values have shape {list(pixel_values.shape)}; expected [patches, {patch[0]}, {patch[1]}, "
            f"{patch[2]}]. Use the processor of this checkpoint."
        )
    patches = sum(t * h * w for t, h, w in rows)
    if pixel_values.shape[0] != patches:
        raise ValueError(
            f"Pixel values hold {pixel_values.shape[0]} patches, but the grid describes {patches}. Pass both exactly "
            "as one processor call returned them."
        )
    return rows


def attends_per_frame(config: KeyeVisionConfig, video: bool) -> bool:
    """Whether each frame attends only to itself (images always do)."""
    return not (video and config.video_attention == "clip")


def _chunks(rows: list[GridRow], per_frame: bool, limit: int) -> Iterator[list[GridRow]]:
    """Cut grid rows into chunks of about `limit` patches, never inside an attention segment."""
    chunk: list[GridRow] = []
    size = 0
    for t, h, w in rows:
        step = 1 if per_frame else t
        for _ in range(t // step):
            patches = step * h * w
            if chunk and size + patches > limit:
                yield chunk
                chunk, size = [], 0
            if per_frame and chunk and chunk[-1][1:] == (h, w):
                chunk[-1] = (chunk[-1][0] + 1, h, w)
            else:
                chunk.append((step, h, w))
            size += patches
    yield chunk


class _Segments(NamedTuple):
    """Attention segments of a chunk, grouped by length so that equal ones form a batch."""

    lengths: list[int]
    groups: list[tuple[int, list[int], torch.Tensor | None]]  # length, segments, their patches (None: all, in order)
    restore: torch.Tensor | None  # from group order back to patch order
    cu_seqlens: torch.Tensor | None  # for flash attention only
    flash_version: int | None = None  # FlashAttention in the place of SDPA

    @classmethod
    def build(
        cls, lengths: list[int], device: torch.device, flash: bool, flash_version: int | None = None
    ) -> "_Segments":
        if flash or flash_version is not None:
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            return cls(lengths, [], None, ends.to(device), flash_version)
        by_length: dict[int, list[int]] = {}
        for segment, length in enumerate(lengths):
            by_length.setdefault(length, []).append(segment)
        if len(by_length) == 1:
            return cls(lengths, [(lengths[0], list(range(len(lengths))), None)], None, None)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        groups = []
        for length, segments in by_length.items():
            index = (starts[segments][:, None] + torch.arange(length)).flatten()
            groups.append((length, segments, index.to(device)))
        restore = torch.argsort(torch.cat([index for _, _, index in groups]))
        return cls(lengths, groups, restore, None)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention that also returns its weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    work_dtype = torch.promote_types(query.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=work_dtype).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    dtype = states.dtype
    states = states.to(cos.dtype)
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype)


class KeyePatchEmbedding(nn.Conv2d):
    """Linear map of flattened patches; the weight keeps the published convolution shape."""

    def __init__(self, config: KeyeVisionConfig):
        size = config.patch_size
        super().__init__(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"Pixel values have dtype {pixel_values.dtype}; expected normalised floating point values. Use the "
                "processor of this checkpoint."
            )
        if pixel_values.device != self.weight.device:
            raise ValueError(
                f"Pixel values are on {pixel_values.device}, but the vision tower is on {self.weight.device}. Move the "
                "processor's output to the model's device with `.to(model.device)`."
            )
        # A convolution over one patch is this product, which runs several times faster.
        return F.linear(pixel_values.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class KeyeVisionEmbeddings(nn.Module):
    """Patch embedding plus the learned position table, resized to the grid of each frame."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.grid_side = config.image_size // config.patch_size
        self.patch_embedding = KeyePatchEmbedding(config)
        self.position_embedding = nn.Embedding(self.grid_side**2, config.hidden_size)

    def positions(self, sizes: set[tuple[int, int]], device: torch.device) -> dict[tuple[int, int], torch.Tensor]:
        """Position vectors `[h * w, hidden]` of each frame size in patches."""
        # Through the module's call, not `.weight`: offloading and sharding hooks must see it.
        table = self.position_embedding(torch.arange(self.grid_side**2, device=device))
        dtype = table.dtype
        table = table.to(torch.promote_types(dtype, torch.float32))
        table = table.view(1, self.grid_side, self.grid_side, -1).permute(0, 3, 1, 2)
        resized = {}
        for size in sizes:
            grid = F.interpolate(table, size=size, mode="bilinear", align_corners=False)
            resized[size] = grid[0].flatten(1).T.to(dtype)
        return resized

    def forward(
        self, pixel_values: torch.Tensor, rows: list[GridRow], known: dict[tuple[int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Embed the patches of `rows`; `known` keeps resized position tables between the chunks of one call."""
        patches = self.patch_embedding(pixel_values)
        if missing := {row[1:] for row in rows} - known.keys():
            known.update(self.positions(missing, patches.device))
        parts = patches.split([t * h * w for t, h, w in rows])
        return torch.cat(
            [(part.view(t, h * w, -1) + known[h, w]).flatten(0, 1) for part, (t, h, w) in zip(parts, rows, strict=True)]
        )


class KeyeVisionAttention(nn.Module):
    """Bidirectional attention inside each segment, none across."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = 1
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: _Segments,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Return the output `[patches, hidden]` and, with eager attention, `[1, heads, n, n]` weights per segment."""
        shape = (hidden_states.shape[0], self.num_heads, self.head_dim)
        query = _rotate(self.q_proj(hidden_states).view(shape), *position_embeddings)
        key = _rotate(self.k_proj(hidden_states).view(shape), *position_embeddings)
        value = self.v_proj(hidden_states).view(shape)

        if segments.flash_version is not None:
            version, longest = segments.flash_version, max(segments.lengths)
            output = flash_segments(version, query, key, value, segments.cu_seqlens, longest, self.scaling)
            return self.out_proj(output.reshape(shape[0], -1)), None

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {
            "attention_mask": None,
            "scaling": self.scaling,
            "dropout": self.attention_dropout if self.training else 0.0,
            "is_causal": False,
        }
        if segments.cu_seqlens is not None:
            longest = max(segments.lengths)
            output, _ = attend(
                self,
                *(states.transpose(0, 1).unsqueeze(0) for states in (query, key, value)),
                cu_seq_lens_q=segments.cu_seqlens,
                cu_seq_lens_k=segments.cu_seqlens,
                max_length_q=longest,
                max_length_k=longest,
                **options,
            )
            return self.out_proj(output.reshape(shape[0], -1)), None

        outputs = []
        weights: list[torch.Tensor | None] = [None] * len(segments.lengths)
        for length, members, index in segments.groups:
            batch = (query, key, value) if index is None else (query[index], key[index], value[index])
            batch = (states.view(len(members), length, *shape[1:]).transpose(1, 2) for states in batch)
            output, group_weights = attend(self, *batch, **options)
            outputs.append(output.reshape(len(members) * length, -1))
            if group_weights is not None:
                for member, weight in zip(members, group_weights.split(1), strict=True):
                    weights[member] = weight
        output = outputs[0] if segments.restore is None else torch.cat(outputs)[segments.restore]
        return self.out_proj(output), tuple(weights) if weights[0] is not None else None


class KeyeVisionMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class KeyeVisionLayer(GradientCheckpointingLayer):
    """Pre-norm block of the tower."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = KeyeVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = KeyeVisionMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: _Segments,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), segments, position_embeddings)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class KeyeVisionEncoder(nn.Module):
    """The blocks of the tower, and the rotary angles they share."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([KeyeVisionLayer(config) for _ in range(config.num_hidden_layers)])

    def rotary(self, rows: list[GridRow], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine `[patches, 1, head_dim]`: row angles, then column angles, both halves alike."""
        # From the configuration at every call: a buffer made in `__init__` is not restored by `from_pretrained`.
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        options = {"dtype": torch.promote_types(states.dtype, torch.float32), "device": states.device}
        frequencies = self.config.rope_theta ** -(torch.arange(0, half, 2, **options) / half)
        per_size = {}
        for h, w in {row[1:] for row in rows}:
            by_row = (torch.arange(h, **options)[:, None] * frequencies)[:, None].expand(h, w, -1)
            by_column = (torch.arange(w, **options)[:, None] * frequencies)[None].expand(h, w, -1)
            per_size[h, w] = torch.cat((by_row, by_column, by_row, by_column), dim=-1).flatten(0, 1)
        angles = torch.cat([per_size[h, w].repeat(t, 1) for t, h, w in rows])[:, None]
        return angles.cos(), angles.sin()

    def _flash_version(self, hidden_states: torch.Tensor) -> int | None:
        """Under "sdpa", the installed FlashAttention that can take its place: it runs segments of all lengths at once,
        where SDPA needs one call for each length."""
        if self.config._attn_implementation != "sdpa" or (self.training and self.config.attention_dropout):
            return None
        head_size = self.config.hidden_size // self.config.num_attention_heads
        return flash_version(hidden_states.device, autocast_dtype(hidden_states), head_size, head_size)

    def forward(self, hidden_states: torch.Tensor, rows: list[GridRow], per_frame: bool) -> torch.Tensor:
        lengths = []
        for t, h, w in rows:
            lengths += [h * w] * t if per_frame else [t * h * w]
        segments = _Segments.build(
            lengths, hidden_states.device, is_flash_attention_requested(self.config), self._flash_version(hidden_states)
        )
        position_embeddings = self.rotary(rows, hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, segments=segments, position_embeddings=position_embeddings)
        return hidden_states


class KeyeVisionTransformer(nn.Module):
    """The vision tower: patches in raster order in, one vector per patch out."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = KeyeVisionEmbeddings(config)
        self.encoder = KeyeVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor,
        video: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> torch.Tensor:
        """Encode patches `[N, channels, patch, patch]` to `[N, hidden]`.

        `video` says that rows of `grid_thw` are runs of video frames, which attend to each other when the
        configuration's `video_attention` is "clip". The two `output_` switches only keep the call in one chunk, so
        that the library's recording hooks see each layer once.

        Raises `ValueError` when patches and grid disagree, and for `output_attentions` without eager attention.
        """
        if output_attentions and self.config._attn_implementation not in (None, "eager"):
            raise ValueError(
                f"`output_attentions=True` needs eager attention in the vision tower, which uses "
                f"{self.config._attn_implementation!r}. Load the model with `attn_implementation='eager'`."
            )
        rows = check_media(self.config, pixel_values, grid_thw)
        per_frame = attends_per_frame(self.config, video)
        positions: dict[tuple[int, int], torch.Tensor] = {}
        whole = output_attentions or output_hidden_states
        limit = pixel_values.shape[0] if whole else self.config.encode_chunk_patches
        outputs = []
        start = 0
        for chunk in _chunks(rows, per_frame, limit):
            end = start + sum(t * h * w for t, h, w in chunk)
            hidden_states = self.embeddings(pixel_values[start:end], chunk, positions)
            outputs.append(self.post_layernorm(self.encoder(hidden_states, chunk, per_frame)))
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class KeyeProjector(nn.Module):
    """Merges neighbouring patches (2x2 in every published model) and maps them to the width of the decoder."""

    def __init__(self, config: KeyeVisionConfig, text_hidden_size: int):
        super().__init__()
        self.config = config
        merged_size = config.hidden_size * config.spatial_merge_size**2
        self.pre_merge = config.projector_norm == "pre_merge"
        # Not the tower's epsilon, and not its activation: the projector uses the exact GELU.
        self.pre_norm = nn.LayerNorm(config.hidden_size if self.pre_merge else merged_size, eps=1e-5)
        self.linear_1 = nn.Linear(merged_size, merged_size)
        self.linear_2 = nn.Linear(merged_size, text_hidden_size)

    def _merge(self, features: torch.Tensor, rows: list[GridRow]) -> torch.Tensor:
        merge = self.config.spatial_merge_size
        runs: list[GridRow] = []
        for t, h, w in rows:
            if runs and runs[-1][1:] == (h, w):
                runs[-1] = (runs[-1][0] + t, h, w)
            else:
                runs.append((t, h, w))
        merged = []
        for part, (t, h, w) in zip(features.split([t * h * w for t, h, w in runs]), runs, strict=True):
            blocks = part.view(t, h // merge, merge, w // merge, merge, -1).transpose(2, 3)
            merged.append(blocks.reshape(t * h * w // merge**2, -1))
        return torch.cat(merged)

    def forward(self, features: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Project features `[patches, hidden]` of the grid rows to `[tokens, text_hidden]`.

        Raises `ValueError` when the number of features is not what the grid describes.
        """
        rows = grid_rows(grid_thw, self.config.spatial_merge_size)
        patches = sum(t * h * w for t, h, w in rows)
        if features.shape[0] != patches:
            raise ValueError(f"There are {features.shape[0]} patch features, but the grid describes {patches}.")
        if self.pre_merge:
            features = self._merge(self.pre_norm(features), rows)
        else:
            features = self.pre_norm(self._merge(features, rows))
        return self.linear_2(F.gelu(self.linear_1(features)))


def encode_media(
    tower: Callable[..., torch.Tensor],
    projector: KeyeProjector,
    pixel_values: torch.Tensor,
    grid_thw: torch.Tensor,
    video: bool = False,
) -> list[torch.Tensor]:
    """Tokens `[tokens, text_hidden]` of each grid row, encoded chunk by chunk.

    Args:
        tower: called as `tower(pixel_values=..., grid_thw=..., video=...)`; returns the features `[patches, hidden]`,
            or an output whose first element they are.
        projector: applied to each chunk, so that only tokens outlive it.
        pixel_values: all patches `[patches, channels, patch, patch]`, in raster order inside each frame.
        grid_thw: rows (frames, height, width) in patches.
        video: whether the rows are runs of video frames.

    Raises `ValueError` when patches and grid disagree.
    """
    config = projector.config
    rows = check_media(config, pixel_values, grid_thw)
    tokens = []
    start = 0
    for chunk in _chunks(rows, attends_per_frame(config, video), config.encode_chunk_patches):
        end = start + sum(t * h * w for t, h, w in chunk)
        chunk_grid = torch.tensor(chunk)
        features = tower(pixel_values=pixel_values[start:end], grid_thw=chunk_grid, video=video)
        if not isinstance(features, torch.Tensor):
            features = features[0]
        tokens.append(projector(features, chunk_grid))
        start = end
    merged = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
    return list(merged.split([t * h * w // config.spatial_merge_size**2 for t, h, w in rows]))


__all__ = ["KeyeProjector", "KeyeVisionLayer", "KeyeVisionAttention", "KeyeVisionTransformer", "encode_media"]
