"""`from_pretrained` on a published folder: its tensors under our names, made when the library's loader wants them."""

import json
from pathlib import Path

import torch

from .checkpoint_keye import INDEX_NAME, Checkpoint, CheckpointError
from .layouts_keye import detect_layout, fp8_block
from .weights_keye import Recipe, Source, check_scales, is_vision, plan_loading


class LazyTensor:
    """A recipe in the place of a stored tensor; has what the loader uses of a safetensors slice."""

    def __init__(self, recipe: Recipe, source: Source):
        self._recipe, self._source = recipe, source
        self.shape, self.dtype = torch.Size(recipe.shape), recipe.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return str(self.dtype)

    def __getitem__(self, index) -> torch.Tensor:
        return self._recipe.build(self._source)[index]


def published_state_dict(
    model, folder: Path, checkpoint_files: list[str], dtype: torch.dtype | None
) -> dict[str, LazyTensor] | None:
    """The weights of a published `folder` for `model`; None for a folder of ours.

    Its `config.json` decides, never the shape or the name of a tensor. Raises `CheckpointError` when a tensor is
    missing, unknown, damaged or of another shape; nothing has been read by then. fp8 blocks become `dtype`.
    """
    config_file = folder / "config.json"
    raw = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    layout = detect_layout(raw) if raw else None
    if layout is None:
        return None
    checkpoint = _opened(folder, sorted(Path(file) for file in checkpoint_files))
    check_scales(checkpoint)
    text_config = model.config.get_text_config()
    new_indexer = getattr(text_config, "indexer_type", None) is not None and not any(
        "indexer." in name for name in checkpoint
    )
    if new_indexer and text_config.index_topk < text_config.max_position_embeddings:
        raise CheckpointError(
            f"{folder} holds no indexer weights, and an untrained indexer would choose {text_config.index_topk} tokens "
            "at random. Load it with the configuration `KeyeConfig.from_pretrained(...).with_indexer()`, which keeps "
            "every token until the indexer is trained, or with `indexer_type=None`."
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    def optional(name: str) -> bool:
        new_vision = is_vision(name) and not layout.has_vision
        return name in tied or new_vision or (new_indexer and ".indexer." in name)

    recipes = plan_loading(
        layout,
        checkpoint,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        num_hidden_layers=getattr(text_config, "num_hidden_layers", 0),
        part=model.checkpoint_part,
        optional=optional,
        block=fp8_block(raw),
        fp8_dtype=dtype or torch.bfloat16,
    )
    return {name: LazyTensor(recipe, checkpoint) for name, recipe in recipes.items()}


def _opened(folder: Path, files: list[Path]) -> Checkpoint:
    if (folder / INDEX_NAME).is_file():
        # The library follows any path that an index names; opened as a folder, the index is checked.
        checkpoint = Checkpoint.open(folder)
        if checkpoint.files == files:
            return checkpoint
    # One file, or with `variant` others than the folder's own.
    return Checkpoint.from_files(files)
