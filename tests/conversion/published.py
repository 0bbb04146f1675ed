"""Tiny random checkpoints in the published layouts: what `config.json`, weight files and tokenizer look like on disk.

Written from the description of the published files alone, without a line of the loading or converting code, so that
a test which compares the two compares two readings of that description. Sizes are small and pairwise different where
the layout lets them be; tensors are drawn per name, so the same seed gives the same values in every storage form.
"""

from pathlib import Path

import torch

from tests.conversion.published_config import (
    generation_config,
    nested_config_of,
    preprocessor_config,
    published_config,
    resaved_config,
    rope_parameters_config,
)
from tests.conversion.published_tensors import (
    block_scales,
    dequantised,
    nested_names,
    published_tensors,
    quantised_names,
    write_weights,
)
from tests.conversion.published_tokenizer import (
    GQA_LAYOUTS,
    LAYOUT_NAMES,
    VISION_LAYOUTS,
    VISUAL_TEMPLATE,
    vocabulary,
    write_json,
    write_tokenizer,
)

__all__ = [
    "GQA_LAYOUTS",
    "LAYOUT_NAMES",
    "VISION_LAYOUTS",
    "block_scales",
    "dequantised",
    "generation_config",
    "preprocessor_config",
    "published_checkpoint",
    "published_config",
    "quantised_names",
    "vocabulary",
    "write_published",
    "write_tokenizer",
    "write_weights",
]


def published_checkpoint(
    layout: str,
    *,
    seed: int = 0,
    experts: str = "fused",
    fp8: bool | tuple[int, int] = False,
    indexer: bool = True,
    head: bool | None = None,
    packing: bool = True,
    mtp: bool = False,
    inv_freq: bool = False,
    fp8_projector: bool = False,
    square: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
    **config_overrides,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Raw `config.json` (flat, as published) and raw tensors under their published names.

    `indexer=False` leaves out the indexer's weights and `sa_config`; `square` makes 2I == H (True or "gate_up") or
    I == H ("down") in 2.0; `fp8` is True (blocks of 128 x 128) or the block size.
    """
    config_overrides.setdefault("torch_dtype", str(dtype).removeprefix("torch."))
    config = published_config(layout, indexer=indexer, square=square, fp8=fp8, **config_overrides)
    tensors = published_tensors(
        config,
        layout=layout,
        seed=seed,
        experts=experts,
        head=head,
        packing=packing,
        mtp=mtp,
        inv_freq=inv_freq,
        fp8_projector=fp8_projector,
        dtype=dtype,
    )
    return config, tensors


def write_published(
    folder: str | Path,
    layout: str,
    *,
    seed: int = 0,
    shards: int = 1,
    experts: str = "fused",
    fp8: bool | tuple[int, int] = False,
    indexer: bool = True,
    head: bool | None = None,
    packing: bool = True,
    mtp: bool = False,
    inv_freq: bool = False,
    fp8_projector: bool = False,
    square: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
    nested_config: bool = False,
    nested_weights: bool | str = False,
    resaved: bool | str = False,
    tokenizer: bool = True,
    **config_overrides,
) -> Path:
    """Write a checkpoint folder of `layout` (one of `LAYOUT_NAMES`) as it is published; returns the folder.

    The options of `published_checkpoint`, and:
        shards: number of weight files; more than one come with an index.
        nested_config: text keys inside `text_config`. nested_weights: names of a nested module tree, with
            `model.mm_projector` (True) or the given name for the projector.
        resaved: True for a fine-tuner's config.json, "rope_parameters" for one written by version 5 of the library.
        config_overrides: keys of the flat config.json; `vision_config` and `sa_config` are merged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = published_checkpoint(
        layout,
        seed=seed,
        experts=experts,
        fp8=fp8,
        indexer=indexer,
        head=head,
        packing=packing,
        mtp=mtp,
        inv_freq=inv_freq,
        fp8_projector=fp8_projector,
        square=square,
        dtype=dtype,
        **config_overrides,
    )
    if resaved:
        config = rope_parameters_config(config) if resaved == "rope_parameters" else resaved_config(config)
    if nested_config:
        config = nested_config_of(config)
    if nested_weights:
        tensors = nested_names(tensors, "mm_projector" if nested_weights is True else nested_weights)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(layout))
    write_weights(folder, tensors, shards)
    if layout in VISION_LAYOUTS:
        write_json(folder / "preprocessor_config.json", preprocessor_config(layout))
        write_json(folder / "chat_template.json", {"chat_template": VISUAL_TEMPLATE})
    if tokenizer:
        write_tokenizer(folder, layout)
    return folder
