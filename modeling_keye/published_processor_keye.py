"""What the files of a published checkpoint say about preprocessing: tokenizer, image limits, chat template.

Only files are read. The processing code that published checkpoints bring along is never run.
"""

import json
import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, extract_commit_hash

from .layouts_keye import Layout, detect_layout

# Where a checkpoint is looked for; everything else that `from_pretrained` is given are settings.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

_IMAGE_SETTINGS = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "rescale_factor",
    "image_mean",
    "image_std",
    "resample",
    "min_pixels",
    "max_pixels",
    "patch_size",
    "merge_size",
)


def published_source(folder_or_repo: str | os.PathLike, hub: dict) -> tuple[Layout, dict, dict] | None:
    """(layout, `config.json`, `hub` at the commit it came from) of a published checkpoint, else None.

    Raises `ValueError` for the files of another model, unless a processor of ours was saved among them.
    """
    if os.path.isfile(folder_or_repo):
        return None
    raw = _read_json(folder_or_repo, "config.json", hub)
    if raw is None:
        return None
    try:
        layout = detect_layout(raw)
    except ValueError:
        if _file(folder_or_repo, "processor_config.json", hub) is not None:
            return None
        raise
    if layout is None:
        return None
    commit = extract_commit_hash(_file(folder_or_repo, "config.json", hub), None)
    return layout, raw, hub if commit is None else {**hub, "revision": commit}


def lacks_processor(folder_or_repo: str | os.PathLike, hub: dict) -> bool:
    """Whether there is a model but no processor of ours."""
    if os.path.isfile(folder_or_repo) or _file(folder_or_repo, "processor_config.json", hub) is not None:
        return False
    return _file(folder_or_repo, "config.json", hub) is not None


def load_tokenizer(folder_or_repo: str | os.PathLike, layout: Layout, hub: dict, settings: dict):
    """The tokenizer of a published checkpoint, made by the library's own classes."""
    if "auto_map" in get_tokenizer_config(folder_or_repo, **hub):
        return PreTrainedTokenizerFast.from_pretrained(folder_or_repo, **hub, **settings)
    # Without a configuration the library would read the checkpoint's, and ask for its code.
    config = AutoConfig.for_model("deepseek_v3" if layout.latent_attention else "qwen3")
    return AutoTokenizer.from_pretrained(folder_or_repo, config=config, trust_remote_code=False, **hub, **settings)


def read_chat_templates(folder_or_repo: str | os.PathLike, hub: dict) -> list[str]:
    """The templates of the processor's own files; the older name comes first, the other may be the tokenizer's."""
    found = (_read_json(folder_or_repo, "chat_template.json", hub) or {}).get("chat_template")
    templates = [found] if isinstance(found, str) else []
    path = _file(folder_or_repo, "chat_template.jinja", hub)
    if path is not None:
        with open(path, encoding="utf-8") as file:
            templates.append(file.read())
    return templates


def read_image_settings(folder_or_repo: str | os.PathLike, raw: dict, hub: dict) -> dict[str, Any]:
    """Arguments of `KeyeImageProcessor` from `preprocessor_config.json`; what it leaves open stays the family's.

    Raises `ValueError` where it asks for something else than whole frames cut into the patches of `config.json`.
    """
    given = _read_json(folder_or_repo, "preprocessor_config.json", hub) or {}
    settings = {name: given[name] for name in _IMAGE_SETTINGS if given.get(name) is not None}
    size = dict(given.get("size") or {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = size.pop(edge, size.pop(name, None))
        if limit is not None:
            settings.setdefault(name, limit)
    if size:
        raise ValueError(
            f"preprocessor_config.json has `size` {given['size']!r}; Keye limits the area of an image: write "
            "`min_pixels` and `max_pixels` instead."
        )
    if given.get("temporal_patch_size", 1) != 1:
        raise ValueError(
            f"preprocessor_config.json has `temporal_patch_size` {given['temporal_patch_size']!r}; every frame is "
            "encoded by itself, so it must be 1."
        )
    vision = raw.get("vision_config") or {}
    for name, there in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        if there in vision and settings.setdefault(name, vision[there]) != vision[there]:
            raise ValueError(
                f"preprocessor_config.json has `{name}` {settings[name]!r}, but `{there}` of the model's vision_config "
                f"is {vision[there]!r}; take both files from the same checkpoint."
            )
    return settings


def _file(folder_or_repo: str | os.PathLike, name: str, hub: dict) -> str | None:
    return cached_file(
        folder_or_repo,
        name,
        **hub,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _read_json(folder_or_repo: str | os.PathLike, name: str, hub: dict) -> dict | None:
    path = _file(folder_or_repo, name, hub)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
