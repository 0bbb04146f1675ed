"""The `keye` command: ask a question about a video file, or print a report about this environment.

    keye ask clip.mp4 "What is shown at 3.0 seconds?"
    keye info

Exit codes: 0 done, 2 the input cannot be used (one sentence on stderr says why and what to do), 130 interrupted, 141
nobody reads the output any more. The answer and the times of the frames that were looked at go to stdout, progress to
stderr.

Even `--help` takes seconds: this file belongs to a package whose import registers the Auto classes, and with them come
torch and transformers.
"""

import argparse
import json
import os
import platform
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from av.error import FFmpegError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import OutOfMemoryError
from tqdm import tqdm
from transformers.utils import is_torch_mps_available, logging

from .configuration_keye import KeyeConfig
from .layouts_keye import detect_layout
from .messages_keye import CONTROL_TOKEN
from .modeling_keye import KeyeForVideoQA
from .processing_keye import KeyeProcessor
from .sparse_attention_keye import BACKENDS, resolve_backend
from .video_download_keye import is_address, local_path

BAD_INPUT = 2
INTERRUPTED = 130
# What a shell reports of a program that SIGPIPE ended.
BROKEN_PIPE = 141

# The embedded checkpoint lies beside the package in a checkout; an installed wheel does not carry it.
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "keye-tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Longest answer where neither the option nor the context says less.
MAX_NEW_TOKENS = 256

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

REPORTED_PACKAGES = (
    "transformers",
    "accelerate",
    "huggingface-hub",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "av",
)
OPTIONAL_PACKAGES = ("triton", "torchcodec", "datasets", "peft", "torchvision", "flash-attn")


class InputError(Exception):
    """What the caller gave cannot be used. The message is one sentence that says why and what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own) and return its exit code."""
    if sys.stdout is None:
        print("keye: standard output is closed; there is nowhere to write to.", file=sys.stderr)
        return BAD_INPUT
    for stream in (sys.stdout, sys.stderr):
        if not _writes_unicode(stream):  # an answer that cost minutes is written, whatever the terminal can show
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            # Behind this function nobody could catch that what stdout still holds cannot be written.
            _write()
    except BrokenPipeError:
        _forget_output()
        return BROKEN_PIPE
    except _Unwritten as error:
        _forget_output()
        print(f"keye: the output cannot be written: {error}.", file=sys.stderr)
        return BAD_INPUT


class _Unwritten(Exception):
    """Standard output takes no more, of a full disk for example."""


def _write(line: str | None = None) -> None:
    """A line, or nothing more, to standard output."""
    try:
        sys.stdout.write("" if line is None else line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritten(error.strerror) from error


def _forget_output() -> None:
    # What stdout still holds is written when the process ends, and must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _writes_unicode(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _run(argv: Sequence[str] | None) -> int:
    try:
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args.command(args)
    except InputError as error:
        # One line, whatever a library put into its message.
        sentence = " ".join(str(error).split()).rstrip(".")
        print(f"keye: {sentence}.", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("keye: interrupted.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="keye", description="Questions about videos, answered on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer a question about a video file")
    ask.set_defaults(command=_ask, parser=ask)
    ask.add_argument("video", metavar="VIDEO", help="a video file")
    ask.add_argument("question", metavar="QUESTION", help="the question, in quotation marks")
    ask.add_argument(
        "--model",
        default=os.environ.get("KEYE_MODEL") or str(DEFAULT_MODEL),
        help="checkpoint folder or Hub repository, ours or a published Keye (default: KEYE_MODEL, else keye-tiny)",
    )
    sampling = ask.add_mutually_exclusive_group()
    sampling.add_argument("--fps", type=_positive(float), metavar="N", help="look at N frames per second of video")
    sampling.add_argument("--num-frames", type=_positive(int), metavar="N", help="look at N frames, evenly spread")
    ask.add_argument("--max-new-tokens", type=_positive(int), metavar="N", help="longest answer, in tokens")
    ask.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    ask.add_argument("--dtype", default="auto", metavar="|".join(DTYPES), help="default: as the checkpoint says")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    ask.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr.isatty(),
        help="show progress on stderr (default: only in a terminal)",
    )

    info = commands.add_parser("info", help="report versions and devices, to paste into an issue")
    info.set_defaults(command=_info, parser=info)
    return parser


def _positive(number: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            kind = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {kind} above 0, got {text!r}")
        return value

    return parse


# ---- keye ask ----


def _ask(args: argparse.Namespace) -> int:
    question = _check_question(args.question)
    _check_video_path(args.video)
    if args.dtype not in DTYPES:
        raise InputError(f"--dtype {args.dtype} is not supported; choose one of {', '.join(DTYPES)}")
    folder = _find_checkpoint(args.model)
    with _quiet_libraries():
        device = _check_device(args.device)
        answer = _answer(args, folder, question, device)
    if args.json:
        _write(json.dumps(answer, ensure_ascii=not _writes_unicode(sys.stdout)))
    else:
        _write(answer["answer"])
        times = ", ".join(f"{frame['time']:.1f}" for frame in answer["frames"])
        _write(textwrap.fill(f"frames at (seconds): {times}", width=100, subsequent_indent="  "))
    return 0


def _answer(args: argparse.Namespace, folder: Path, question: str, device: str) -> dict:
    seconds: dict[str, float] = {}
    # The video is read before the weights, so that a file which is no video is refused at once.
    with _stage("reading frames", args.progress, seconds) as bar:
        with _refusals(f"the processor in {folder} cannot be loaded", also=_LOADING_ERRORS):
            processor = KeyeProcessor.from_pretrained(folder)
        with _refusals():
            inputs = _read_video(processor, args, question, bar)
    metadata = inputs.pop("video_metadata")[0]
    frames = [{"index": i, "time": t} for i, t in zip(metadata.frames_indices, metadata.frame_times)]
    prompt_tokens = inputs["input_ids"].shape[-1]

    with _stage("loading the model", args.progress, seconds), _out_of_memory():
        with _refusals(f"the checkpoint in {folder} cannot be loaded", also=_LOADING_ERRORS):
            config = KeyeConfig.from_pretrained(folder)
        max_new_tokens = _room_for_answer(config, prompt_tokens, len(frames), args.max_new_tokens)
        with _refusals(f"the checkpoint in {folder} cannot be loaded", also=_LOADING_ERRORS):
            model, report = KeyeForVideoQA.from_pretrained(
                folder, config=config, dtype=args.dtype, device_map=device, output_loading_info=True
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise InputError(
                f"the checkpoint in {folder} lacks {len(missing)} weights of the model (the first is {missing[0]}); "
                "copy or download it again"
            )

    with _stage("answering", args.progress, seconds, total=max_new_tokens) as bar, _out_of_memory(), _refusals():
        output = model.generate(
            **inputs.to(model.device, dtype=model.dtype),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_TokenCounter(bar.update),
        )
    new_tokens = output[0, prompt_tokens:].cpu()
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends).flatten()
    return {
        "answer": processor.decode(new_tokens, skip_special_tokens=True).strip(),
        "complete": bool(torch.isin(new_tokens[-1], ends)),
        "question": question,
        "video": args.video,
        "frames": frames,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new_tokens),
        "model": args.model,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": seconds,
    }


def _read_video(processor: Any, args: argparse.Namespace, question: str, bar: Any) -> Any:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    content = [{"type": "video", "path": args.video}, {"type": "text", "text": question}]
    options = {"fps": args.fps, "num_frames": args.num_frames}
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={
            "return_metadata": True,
            "progress": progress,
            **{name: value for name, value in options.items() if value is not None},
        },
    )


def _check_question(question: str) -> str:
    question = question.strip()
    if not question:
        raise InputError("the question is empty; write what you want to know about the video")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError("the question is not UTF-8 text; check the terminal's or the script's encoding") from error
    control = CONTROL_TOKEN.search(question)
    if control:
        raise InputError(
            f"the question contains {control.group()}, a control token that stands for media or turns of a chat; "
            "remove it from the question"
        )
    return question


def _check_video_path(path: str) -> None:
    """Only what needs no decoder; the reader says the rest."""
    if is_address(path):
        return
    path = local_path(path)
    if not os.path.exists(path):
        raise InputError(f"there is no video file at {path}; check the path")
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file; give the path of one video file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; check its permissions")


def _find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint, downloaded if `name` is a Hub repository, with everything checked that is cheap."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if folder == DEFAULT_MODEL or not HUB_ID.fullmatch(name):
            raise InputError(f"there is no checkpoint folder at {name}; set --model or KEYE_MODEL to one")
        folder = _download_checkpoint(name)
    if not folder.is_dir():
        raise InputError(f"{name} is not a folder; --model takes the folder that holds config.json and *.safetensors")
    raw = _read_json(folder / "config.json", "the configuration")
    with _refusals(str(folder)):
        layout = detect_layout(raw)
    if layout is None and raw.get("model_type") != KeyeConfig.model_type:
        raise InputError(
            f"{folder} holds a model of type {raw.get('model_type')!r}, a part of Keye; give the folder of a whole "
            f"model, type {KeyeConfig.model_type!r}"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when loaded; convert them to "
                "safetensors first"
            )
        raise InputError(f"{folder} holds no weights (*.safetensors); copy or download the checkpoint again")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = {folder / shard for shard in _read_json(index, "the index of weights").get("weight_map", {}).values()}
        absent = sorted(path.name for path in shards if not path.exists())
        if absent:
            raise InputError(f"{folder} lacks {absent[0]}, which its index of weights names; copy or download it again")
    for path in weights:
        _check_safetensors(path)
    return folder


def _download_checkpoint(name: str) -> Path:
    with _refusals(f"{name} is neither a folder nor a Hub repository that can be reached"):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]))


def _read_json(path: Path, what: str) -> dict:
    if not path.exists():
        raise InputError(f"{path.parent} has no {path.name}, so it is not a checkpoint folder; set --model to one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} {path} holds no JSON object; copy or download it again")
    return content


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"the weights {path} are damaged ({error}); copy or download them again") from error


def _check_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is unknown; use cpu, cuda, cuda:1 and so on") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name} needs a CUDA device, but torch {torch.__version__} finds none; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} does not exist; this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(f"--device {name} cannot be used here; use --device cpu") from error
    return name


def _room_for_answer(config: Any, prompt_tokens: int, frames: int, asked: int | None) -> int:
    limit = config.get_text_config().max_position_embeddings
    room = limit - prompt_tokens
    if room < (asked or 1):
        raise InputError(
            f"the prompt has {prompt_tokens} tokens ({frames} frames) and the answer may have {asked or 1} more, but "
            f"the context of this model is {limit} tokens; lower --num-frames or --fps"
            + (" or --max-new-tokens" if asked else "")
        )
    return asked or min(room, MAX_NEW_TOKENS)


# What libraries raise for a damaged or foreign checkpoint, besides the errors of `_refusals`.
_LOADING_ERRORS = (TypeError, KeyError, AttributeError, RuntimeError)


@contextmanager
def _refusals(prefix: str = "", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the errors by which our own files and the libraries refuse a file or a value into one sentence."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except (ValueError, OSError, FFmpegError, HfHubHTTPError, SafetensorError, StrictDataclassError, *also) as error:
        raise InputError(f"{prefix}: {error}" if prefix else str(error)) from error


@contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except OutOfMemoryError as error:
        raise InputError(
            "the device ran out of memory; lower --num-frames or --fps, or use --dtype bfloat16 or --device cpu"
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep stderr for our own progress and our own sentence."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _stage(name: str, shown: bool, seconds: dict[str, float], total: int | None = None) -> Iterator[Any]:
    """A tqdm line on stderr that is gone when the stage is done; its duration goes into `seconds`."""
    start = time.perf_counter()
    with tqdm(total=total, desc=name, file=sys.stderr, disable=not shown, leave=False) as bar:
        yield bar
    seconds[name] = round(time.perf_counter() - start, 3)


class _TokenCounter:
    """A streamer for `generate` that only counts: the first call brings the prompt."""

    def __init__(self, step: Callable[[int], None]):
        self.step = step
        self.prompt_seen = False

    def put(self, tokens: Any) -> None:
        if self.prompt_seen:
            self.step(tokens.numel())
        self.prompt_seen = True

    def end(self) -> None:
        return None


# ---- keye info ----


def _info(args: argparse.Namespace) -> int:
    """Print what a reader of an issue has to know about the environment."""
    devices = [torch.device("cpu")]
    lines = [
        ("keye-video-qa", _version("keye-video-qa") or "not installed, run from a checkout"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'no'}, {torch.get_num_threads()} CPU threads)"),
    ]
    lines += [(name, _version(name) or "MISSING") for name in REPORTED_PACKAGES]
    lines += [(name, _version(name) or "not installed (optional)") for name in OPTIONAL_PACKAGES]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        lines.append((f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB, capability {capability}"))
        devices.append(torch.device("cuda", index))
    if is_torch_mps_available():
        lines.append(("mps", "available"))
    for device in devices:
        lines.append((f"attention on {device}", f"{resolve_backend('auto', device)} (of {', '.join(BACKENDS[1:])})"))
    lines.append(("default model", f"{DEFAULT_MODEL} ({'found' if DEFAULT_MODEL.is_dir() else 'not found'})"))
    width = max(len(name) for name, _ in lines)
    _write("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
