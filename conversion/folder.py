"""The files of a checkpoint folder that are no weights: configuration, tokenizer, processor, code, and our record.

Nothing here runs code out of a folder: classes and the remote code that is written come from this package.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeProcessor
from modeling_keye.layouts_keye import LAYOUTS

RECORD = "conversion.json"
# Of our folders whose source was fp8: the scales, under their published names.
SCALES_FILE = "fp8_scales.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
# Published files that ours replace.
_KEPT_FILES = (*PROCESSOR_FILES, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_DATA_SUFFIXES = (".json", ".jinja", ".txt", ".model")
# Only with one of these is there a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_RECORDED = {
    "layout": str,
    "unfused_experts": bool,
    "fp8_block": list | None,
    "dtype": str | None,
    "dropped": list,
    "published_config": dict,
    "published_generation_config": dict | None,
    "published_files": dict,
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def resolve(src: str | Path) -> Path:
    """The folder `src`, or that of the Hub repository `src` in the cache, fetched without its code and pickles.

    Raises `ValueError` when it is neither a folder nor the name of a repository.
    """
    if not str(src):
        raise ValueError("the name of a source is empty; give a folder, or OWNER/NAME on the Hub.")
    folder = Path(src)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(src)):
        raise ValueError(f"{src} is no folder, and no repository of the Hub has such a name (it would be OWNER/NAME).")
    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in _DATA_SUFFIXES)]
    try:
        return Path(snapshot_download(str(src), allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no folder {src}, and the Hub says: {error}") from error


def source_name(src: str | Path, folder: Path) -> dict[str, str | None]:
    """Name of a source and, for a repository of the Hub, the commit: facts for the record, free of local paths."""
    if Path(src).is_dir():
        return {"name": folder.resolve().name, "revision": None}
    return {"name": str(src), "revision": folder.name}


def data_files(folder: Path) -> list[Path]:
    """Its small files, which a result may depend on besides the weights."""
    return sorted(path for path in folder.iterdir() if path.suffix in _DATA_SUFFIXES and path.is_file())


def read_json(file: Path) -> dict | None:
    """The object in a JSON file, None when there is no such file. Raises `ValueError` for anything else."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} instead of an object.")
    return content


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_processor(folder: Path) -> KeyeProcessor | None:
    """The processor of a folder in any layout, None when it holds no tokenizer.

    Raises `ValueError` for files that are damaged or do not belong together.
    """
    if not has_tokenizer(folder):
        return None
    with blaming_tokenizer(folder):
        return KeyeProcessor.from_pretrained(folder)


@contextmanager
def blaming_tokenizer(folder: Path) -> Iterator[None]:
    """Loads tokenizer files: errors become a `ValueError` that names the folder and, where it is no JSON, the file."""
    read_json(folder / "tokenizer.json")
    try:
        yield
    except Exception as error:  # the tokenizer's own library raises nothing more special
        raise ValueError(f"the tokenizer and processor files of {folder} cannot be used: {error}") from error


def meta_model(config: KeyeConfig) -> KeyeForVideoQA:
    """The model of a configuration on the meta device: names, shapes and code, no memory."""
    with torch.device("meta"):
        return KeyeForVideoQA(copy.deepcopy(config))


def expected_shapes(model: KeyeForVideoQA) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of the model stores: names and shapes, without tensors that are tied to another."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def our_generation_config(config: KeyeConfig, raw: dict | None) -> GenerationConfig:
    """The published settings, or the end of text alone where there are none; placeholders are never generated."""
    settings = {k: v for k, v in (raw or {}).items() if not k.startswith("_") and k != "transformers_version"}
    if not settings.get("do_sample", False):
        # Greedy decoding ignores them, and the library refuses to save them together.
        settings = {name: value for name, value in settings.items() if name not in _SAMPLING}
    text = config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(name, getattr(text, name))
    placeholders = {config.image_token_id, config.video_token_id}
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *placeholders})
    try:
        generation = GenerationConfig(**settings)
        generation.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"generation_config.json contradicts itself, correct it first: {error}") from error
    return generation


def write_our_files(
    output: Path,
    config: KeyeConfig,
    processor: KeyeProcessor | None,
    generation: GenerationConfig,
    record: dict | None = None,
    tokenizer_from: Path | None = None,
) -> None:
    """Everything of a folder in our layout but the weights; config.json comes last.

    Args:
        processor: written with its tokenizer; None leaves it out.
        tokenizer_from: without a processor, the folder whose tokenizer files are copied.
        record: the content of conversion.json, None for no such file.
    """
    if processor is not None:
        processor.save_pretrained(output)
    elif tokenizer_from is not None:
        _copy_tokenizer(tokenizer_from, output)
    for part in (KeyeForVideoQA, KeyeProcessor):  # with all that they import
        custom_object_save(part, output)
    generation.save_pretrained(output)
    if record is not None:
        write_json(output / RECORD, record)
    config.architectures = [KeyeForVideoQA.__name__]
    config.save_pretrained(output)


def _copy_tokenizer(source: Path, output: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def read_record(folder: Path) -> dict | None:
    """conversion.json of a folder, None when there is none. Raises `ValueError` for one of another make."""
    record = read_json(folder / RECORD)
    if record is None:
        return None
    problem = None
    if record.get("format") != 1:
        problem = f"format {record.get('format')!r}"
    elif missing := sorted(set(_RECORDED) - set(record)):
        problem = f"no {', '.join(missing)}"
    elif wrong := [name for name, kind in _RECORDED.items() if not isinstance(record[name], kind)]:
        problem = f"{wrong[0]} {str(record[wrong[0]])[:60]!r}"
    elif record["layout"] not in LAYOUTS:
        problem = f"layout {record['layout']!r}"
    elif not all(isinstance(name, str) for name in record["dropped"]):
        problem = "something else than names of tensors in dropped"
    elif foreign := [name for name in record["published_files"] if name not in _KEPT_FILES]:
        problem = f"{foreign[0]!r} in published_files"
    elif not all(isinstance(text, str) for text in record["published_files"].values()):
        problem = "something else than texts in published_files"
    if problem is not None:
        raise ValueError(
            f"{folder / RECORD} has {problem}; the way back needs what a conversion keeps there (format 1). Give "
            "--layout to write that layout without it."
        )
    return record


def kept_files(folder: Path) -> dict[str, str]:
    """Texts of the published files that ours replace, for the way back. Raises `ValueError` for what is no UTF-8."""
    texts = {}
    for name in _KEPT_FILES:
        if (folder / name).is_file():
            try:
                texts[name] = (folder / name).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / name} is no UTF-8 text ({error}); fetch it again.") from error
    return texts


def write_published_files(
    output: Path, source: Path, config: dict, generation: dict | None, kept: dict[str, str]
) -> None:
    """The files of a published folder: tokenizer out of `source`, the rest as given; config.json comes last.

    Args:
        kept: texts by file name, as `kept_files` gives them.
    """
    _copy_tokenizer(source, output)
    for name, text in kept.items():
        if name in (*PROCESSOR_FILES, *TOKENIZER_FILES):
            (output / name).write_bytes(text.encode("utf-8"))
    if generation is not None:
        write_json(output / "generation_config.json", generation)
    write_json(output / "config.json", config)


def config_dict(config: PreTrainedConfig) -> dict:
    """A configuration as it would stand in its file."""
    return json.loads(config.to_json_string(use_diff=False))
