"""What a folder must be before it is published. Nothing here reaches the network.

`check_folder` finds everything that is wrong in one pass. The last check runs the folder's own code in a process of its
own; it is skipped while something before it is wrong, and while that code is not this package's (see `trust_code`).
"""

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_imports

import modeling_keye
from modeling_keye.checkpoint_keye import INDEX_NAME, Checkpoint, CheckpointError
from modeling_keye.configuration_keye import AUTO_MAP, KeyeConfig

from .folder import SCALES_FILE

PACKAGE = Path(modeling_keye.__file__).parent
OUR_PACKAGES = ("modeling_keye", "conversion", "training", "benchmarks", "examples", "tests")
PROBE = Path(__file__).with_name("publish_probe.py")
PROBE_SECONDS = 3600
# Where the library would find other caches, or our token; and what would keep it from the network when it needs it.
HIDDEN_SETTINGS = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE", "HF_XET_CACHE",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip

WEIGHTS = re.compile(
    rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json|{re.escape(SCALES_FILE)}"
)
# What the library reads by name, and where a conversion notes its source and a training how it went.
SETTINGS = {
    "config.json", "generation_config.json", "conversion.json", "training.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
}  # fmt: skip
# What training with adapters leaves beside the weights that they are merged into.
ADAPTER = "adapter"
DOCUMENTS = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
PICKLE_START = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
SECRET_NAMES = (
    ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", "_netrc", ".git-credentials",
    ".npmrc", ".pypirc", "token", "*token.txt", "stored_tokens", "*secret*", "*credential*", "*password*",
)  # fmt: skip
SECRET_TEXTS = {
    "a Hub token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a cloud access key": rb"\bA(?:KIA|SIA)[0-9A-Z]{16}\b",
    "a code host's token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,}|glpat-[\w-]{20})\b",
    "an API key": rb"\bsk-(?:[a-z]+-)*[A-Za-z0-9]{32,}\b",
}
WRITE_CARD = "python -m conversion.card FOLDER --write --license LICENSE"
CARD_FIELDS = ("library_name", "pipeline_tag", "license", "tags")
PLACEHOLDER = re.compile(
    r"more information needed|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b|lorem ipsum|proofread and complete|\{\{.*?\}\}",
    re.IGNORECASE,
)

# Loading needs the weights once, and a little for the prompt.
_MEMORY_FACTOR = 1.2
_MEMORY_SPARE = 2**30


@dataclass(frozen=True)
class Check:
    """A finding. `ok` is True, False, or None where it was not checked; `text` says what was found and what to do."""

    name: str
    ok: bool | None
    text: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "WRONG", None: "not checked"}[self.ok]
        return f"{mark:<12}{self.name}: {self.text}"


def check_folder(
    folder: Path, allow: Iterable[str] = (), trust_code: bool = False, output: Path | None = None
) -> tuple[list[Check], dict | None]:
    """Every check of a folder, and what the probe found (None where it did not run).

    Args:
        allow: patterns of further file names that may be published; pickles and secrets never may.
        trust_code: run and publish code that differs from this package's.
        output: where the probe puts its logits (safetensors).

    Raises `NotADirectoryError` when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}; give the folder of a converted or saved checkpoint")
    names = list_files(folder)
    code, code_checks = check_code(folder, trust_code)
    weights, stored = check_weights(folder)
    checks = [check_config(folder), weights, *code_checks]
    loadable = all(check.ok for check in checks)
    checks += check_names(folder, names, code, allow)
    checks += [check_secrets(folder, names), check_card(folder)]
    if not loadable:
        return [*checks, Check("loading", None, "not tried until config, weights and code are right")], None
    loading, found = check_loading(folder, stored, output)
    return [*checks, loading], found


def list_files(folder: Path) -> list[str]:
    """Relative names of all files but a merged adapter's, links included, folders of links not entered."""
    found = []
    for place, folders, files in os.walk(folder):
        if Path(place) == folder and has_merged_adapter(folder):
            folders.remove(ADAPTER)
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *linked)]
    return sorted(found)


def has_merged_adapter(folder: Path) -> bool:
    """Whether `python -m training.train` put an adapter beside weights that hold it already."""
    adapter = folder / ADAPTER
    return (adapter / "adapter_config.json").is_file() and not adapter.is_symlink()


def is_read_by_name(name: str) -> bool:
    """Whether loading a repository reads a file of this name: weights, settings, or our code."""
    return bool(WEIGHTS.fullmatch(name)) or name in SETTINGS or ("/" not in name and name.endswith("_keye.py"))


def check_config(folder: Path) -> Check:
    try:
        config = _read_json(folder / "config.json")
    except ValueError as error:
        return Check("config", False, str(error))
    if config.get("model_type") != KeyeConfig.model_type:
        return Check(
            "config",
            False,
            f"config.json has model_type {config.get('model_type')!r}, expected {KeyeConfig.model_type!r}; convert a "
            "published checkpoint first: python -m conversion.convert SRC DST",
        )
    auto_map = config.get("auto_map") or {}
    wanted = {name: entry for name, entry in AUTO_MAP.items() if name != "AutoProcessor" or _has_processor(folder)}
    wrong = [name for name, entry in wanted.items() if auto_map.get(name) != entry]
    if wrong:
        return Check(
            "config",
            False,
            f"auto_map of config.json lacks {', '.join(f'{name} -> {wanted[name]}' for name in wrong)}; save the model "
            "with save_pretrained of this package",
        )
    return Check("config", True, f"model_type {KeyeConfig.model_type}, {len(auto_map)} Auto classes")


def check_weights(folder: Path) -> tuple[Check, Checkpoint | None]:
    try:
        stored = Checkpoint.open(folder)
    except CheckpointError as error:
        return Check("weights", False, str(error)), None
    if (folder / SCALES_FILE).exists():
        try:
            Checkpoint.open(folder / SCALES_FILE)
        except CheckpointError as error:
            return Check("weights", False, str(error)), None
    size = sum(tensor.nbytes for tensor in stored.values())
    return Check("weights", True, f"{len(stored)} tensors, {len(stored.files)} file(s), {human(size)}"), stored


def check_code(folder: Path, trust_code: bool) -> tuple[set[str], list[Check]]:
    """Names of the code files that loading needs, and what is wrong with them."""
    entries, wrong = set(), []
    for name in ("config.json", *PROCESSOR_FILES, "tokenizer_config.json"):
        try:
            content = _read_json(folder / name) if (folder / name).exists() else {}
        except ValueError as error:
            wrong.append(str(error))
            continue
        for key, value in _auto_maps(content):
            if not re.fullmatch(r"\w+\.\w+", value):
                wrong.append(f"{name} maps {key} to {value!r}, expected FILE.CLASS of a file in this folder")
            else:
                entries.add(value)
    files: set[str] = set()
    for entry in sorted(entries):
        module, _, class_name = entry.partition(".")
        absent = _closure(folder, f"{module}.py", files)
        wrong += [f"{missing} is missing, which {asker} needs" for missing, asker in absent]
        if not absent and class_name not in _classes(folder / f"{module}.py"):
            wrong.append(f"{module}.py has no class {class_name}")
    if wrong:
        advice = "; save model and processor with save_pretrained of this package, which copies the code"
        return files, [Check("code", False, "; ".join(dict.fromkeys(wrong)) + advice)]
    other = sorted(name for name in files if not _is_ours(folder / name))
    if not other:
        version = modeling_keye.__version__
        return files, [Check("code", True, f"{len(files)} files, the same as in this package ({version})")]
    differ = f"{', '.join(other)} {'differs' if len(other) == 1 else 'differ'} from this package's"
    if trust_code:
        return files, [Check("code", True, f"{len(files)} files; {differ}")]
    text = (
        f"{differ}; save the model again to get the present code, or pass "
        "--trust-code to run and publish the folder's own"
    )
    return files, [Check("code", False, text)]


def check_names(folder: Path, names: list[str], code: set[str], allow: Iterable[str] = ()) -> list[Check]:
    """No pickles, no links out of the folder, nothing that is neither known nor allowed."""
    root = folder.resolve()
    leaving = [name for name in names if not (folder / name).resolve().is_relative_to(root)]
    broken = [name for name in names if name not in leaving and not (folder / name).is_file()]
    pickles = [name for name in names if name not in (*leaving, *broken) and _is_pickle(folder / name)]
    shards = _indexed(folder)
    known = SETTINGS | DOCUMENTS | code
    stray = [
        name
        for name in names
        if name not in pickles
        and not (name in known or (WEIGHTS.fullmatch(name) and (shards is None or name in shards)))
        and not any(fnmatch.fnmatch(name, pattern) for pattern in allow)
    ]
    checks = []
    if leaving or broken:
        text = f"{', '.join([*leaving, *broken])}: links to other places or to nothing; copy the files here (cp -L)"
        checks.append(Check("links", False, text))
    if pickles:
        text = f"{', '.join(pickles)}: may run code when opened, and nobody needs them to load this model; remove them"
        checks.append(Check("pickles", False, text))
    if stray:
        text = f"{', '.join(stray)}: no part of a checkpoint; remove them, or pass --allow PATTERN"
        checks.append(Check("stray files", False, text))
    text = f"{len(names)} files, all of them known, no pickles, no links out"
    if has_merged_adapter(folder):
        text += f"; {ADAPTER}/ is left out, because the weights hold it already"
    return checks or [Check("files", True, text)]


def check_secrets(folder: Path, names: list[str]) -> Check:
    found = []
    for name in names:
        path = folder / name
        base = path.name.lower()
        if name not in SETTINGS and any(fnmatch.fnmatch(base, pattern) for pattern in SECRET_NAMES):
            found.append(f"{name} by its name")
        elif path.is_file() and path.suffix != ".safetensors":
            data = path.read_bytes()
            found += [f"{name} holds {what}" for what, pattern in SECRET_TEXTS.items() if re.search(pattern, data)]
    if found:
        return Check("secrets", False, f"{'; '.join(found)}; remove them, and revoke what was ever shared")
    return Check("secrets", True, "no names or texts that look like keys or tokens")


def check_card(folder: Path) -> Check:
    path = folder / "README.md"
    if not path.exists():
        return Check("card", False, f"README.md is missing; write one: {WRITE_CARD}")
    text = path.read_text(encoding="utf-8")
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        return Check("card", False, f"the metadata of README.md cannot be read ({' '.join(str(error).split())})")
    wrong = [f"has no {name}" for name in CARD_FIELDS if not getattr(card.data, name, None)]
    if card.data.library_name and card.data.library_name != "transformers":
        wrong.append(f"has library_name {card.data.library_name!r}, expected 'transformers'")
    wrong += [f"still says {match!r}" for match in dict.fromkeys(PLACEHOLDER.findall(text))]
    if not re.search(r"^#+ ", card.text, re.MULTILINE):
        wrong.append("has no heading, so it describes nothing")
    if wrong:
        advice = WRITE_CARD if "has no license" in wrong else "python -m conversion.card --help"
        return Check("card", False, f"README.md {', '.join(wrong)}; see {advice}")
    return Check("card", True, f"license {card.data.license}, {card.data.pipeline_tag}")


def check_loading(folder: Path, stored: Checkpoint, output: Path | None = None) -> tuple[Check, dict | None]:
    """The folder loads by the Auto classes in a clean process and generates.

    Where the memory is too small for the weights, names and shapes are compared with the headers instead.
    """
    size = sum(tensor.nbytes for tensor in stored.values())
    free = available_memory()
    fits = free is None or size * _MEMORY_FACTOR + _MEMORY_SPARE < free
    try:
        found = run_probe(str(folder.resolve()), None, _has_processor(folder), fits, output, offline=True)
    except ProbeError as error:
        return Check("loading", False, f"AutoModel or AutoProcessor fails in a clean process: {error}"), None
    if found["module"] != "transformers_modules":
        return Check("loading", False, f"the class comes from {found['module']}, not from the folder's code"), found
    if not fits:
        wrong = compare_shapes(found, stored)
        text = (
            f"names and shapes of {len(stored)} tensors are those of {found['class']}; nothing was generated, because "
            f"the weights take {human(size)} and {human(free)} of memory are free"
        )
        return (Check("loading", False, wrong) if wrong else Check("loading", True, text)), found
    for kind in ("missing", "unexpected", "mismatched"):
        if found[kind]:
            listed = ", ".join(found[kind][:5]) + (", ..." if len(found[kind]) > 5 else "")
            return Check("loading", False, f"{kind} tensors: {listed}; convert or save again"), found
    return Check("loading", True, describe_probe(found)), found


def describe_probe(found: dict) -> str:
    prompts = " and ".join({"text": "a text", "video": "a video"}[name] for name in found["tokens"])
    count = len(found["tokens"]["text"])
    return (
        f"AutoModel gives {found['class']} ({found['parameters']:,} parameters, {found['dtype']}) in a clean process, "
        f"which generated {count} tokens from {prompts} (transformers {found['transformers']}, {found['device']})"
    )


def compare_shapes(found: dict, stored: Checkpoint) -> str:
    """A sentence about names and shapes that differ, or an empty one."""
    expected = {name: tuple(shape) for name, shape in found["shapes"].items()}
    missing = sorted(set(expected) - set(stored) - set(found["tied"]))
    unexpected = sorted(set(stored) - set(expected))
    other = [name for name in expected if name in stored and tuple(stored[name].shape) != expected[name]]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    parts = [f"{len(names)} {kind} ({', '.join(names[:5])})" for kind, names in kinds.items() if names]
    return f"the configuration and the weights disagree: {'; '.join(parts)}" if parts else ""


class ProbeError(RuntimeError):
    """The process that loads a checkpoint failed; the message is its last words."""


def run_probe(
    source: str,
    revision: str | None,
    processor: bool,
    weights: bool,
    output: Path | None,
    offline: bool,
    home: Path | None = None,
    environment: dict[str, str] | None = None,
) -> dict:
    """Run `publish_probe.py` with empty caches (or `home` as its HF_HOME) and return what it found."""
    with _folder(home) as place:
        request = {"source": source, "revision": revision, "processor": processor, "weights": weights}
        request |= {"absent": OUR_PACKAGES, "output": str(output or place / "logits.safetensors")}
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # Beside its own folder, the modules of `conversion` could be imported by their short names.
        script = shutil.copy(PROBE, place)
        settings = {name: value for name, value in os.environ.items() if name not in HIDDEN_SETTINGS}
        settings |= {"HF_HOME": str(place), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        settings |= environment or {}
        try:
            done = subprocess.run(
                [sys.executable, script, place / "request.json"],
                cwd=place,
                env=settings,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(f"it took longer than {PROBE_SECONDS} seconds") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode} without a word"]
        raise ProbeError(" ".join(words[-1].split()))
    return json.loads(lines[-1])


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found.group(1)) * 1024 if found else None
    except OSError:
        return None


def human(size: float) -> str:
    """12_345_678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextmanager
def _folder(home: Path | None) -> Iterator[Path]:
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="keye-publish-") as temporary:
        yield Path(temporary)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _auto_maps(content: dict) -> Iterator[tuple[str, str]]:
    """Entries of every auto_map in a settings file, nested ones included."""
    for name, value in content.items():
        if name == "auto_map" and isinstance(value, dict):
            for key, entry in value.items():
                yield from ((key, str(item)) for item in (entry if isinstance(entry, list) else [entry]) if item)
        elif isinstance(value, dict):
            yield from _auto_maps(value)


def _closure(folder: Path, name: str, files: set[str], asker: str = "auto_map") -> list[tuple[str, str]]:
    """Add `name` and what it imports to `files`; returns the missing ones with who asked for them."""
    if name in files:
        return []
    if not (folder / name).is_file():
        return [(name, asker)]
    files.add(name)
    missing = []
    for module in get_relative_imports(folder / name):
        missing += _closure(folder, f"{module}.py", files, name)
    return missing


def _classes(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _is_ours(path: Path) -> bool:
    own = PACKAGE / path.name
    return own.is_file() and own.read_bytes() == path.read_bytes()


def _has_processor(folder: Path) -> bool:
    return any((folder / name).exists() for name in PROCESSOR_FILES)


def _indexed(folder: Path) -> set[str] | None:
    """Weight files that the index names, with itself and the scales; None where there is no index."""
    try:
        index = _read_json(folder / INDEX_NAME)
    except ValueError:
        return None
    return {INDEX_NAME, SCALES_FILE, *map(str, (index.get("weight_map") or {}).values())}


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    if path.suffix == ".safetensors":
        return False
    with open(path, "rb") as file:
        return PICKLE_START.match(file.read(4)) is not None
