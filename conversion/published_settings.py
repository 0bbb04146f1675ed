"""Preprocessing, chat template and generation settings of a folder of ours, as files of a published layout."""

import json
import tempfile
from pathlib import Path

from modeling_keye import KeyeConfig, KeyeProcessor
from modeling_keye.layouts_keye import Layout

from .folder import our_generation_config, read_json, write_published_files

_IMAGE_SETTINGS = (
    "do_resize", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std", "resample",
    "min_pixels", "max_pixels", "patch_size", "merge_size",
)  # fmt: skip


def processor_texts(processor: KeyeProcessor, layout: Layout) -> dict[str, str]:
    """preprocessor_config.json and chat_template.json of a published folder, by name.

    Raises `ValueError` for a processor of another family, whose prompts and frame sizes the layout does not have.
    """
    family = processor.video_processor.family
    if family != layout.family:
        raise ValueError(
            f"the processor prepares videos for the family {family!r}, but {layout.name} is of the family "
            f"{layout.family!r}; name a layout of the processor's family, or save a KeyeProcessor of the "
            "other one first."
        )
    settings = processor.image_processor.to_dict()
    content = {name: settings[name] for name in _IMAGE_SETTINGS if settings.get(name) is not None}
    files = {
        "preprocessor_config.json": {**content, "temporal_patch_size": 1},
        "chat_template.json": {"chat_template": processor.chat_template},
    }
    return {name: json.dumps(file, indent=2, ensure_ascii=False) + "\n" for name, file in files.items()}


def lost_settings(folder: Path, processor: KeyeProcessor, config: dict, texts: dict[str, str]) -> list[str]:
    """Settings of the processor in `folder` that the published files `config` and `texts` do not give back."""
    with tempfile.TemporaryDirectory() as place:
        write_published_files(Path(place), folder, config, None, texts)
        there = KeyeProcessor.from_pretrained(place)
    lost = ["chat_template"] if there.chat_template != processor.chat_template else []
    for part in ("image_processor", "video_processor"):
        now, then = (json.loads(getattr(p, part).to_json_string()) for p in (processor, there))
        names = {*now, *then} - {"auto_map", "processor_class"}  # of saved folders, no settings
        lost += [f"{part}.{name}" for name in sorted(names) if now.get(name) != then.get(name)]
    return lost


def changed_generation(folder: Path, config: KeyeConfig, published: dict | None) -> list[str]:
    """Settings of generation_config.json in `folder` that differ from those it was converted with."""
    raw = read_json(folder / "generation_config.json")
    if raw is None:
        return []
    now = our_generation_config(config, raw).to_dict()
    then = our_generation_config(config, published).to_dict()
    return [f"generation.{name}" for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
