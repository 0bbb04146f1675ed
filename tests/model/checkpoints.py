"""A whole checkpoint folder of a tiny random model: weights, configuration, tokenizer, processor and code."""

from pathlib import Path

import torch

from modeling_keye.modeling_keye import KeyeForVideoQA
from modeling_keye.processing_keye import KeyeProcessor
from modeling_keye.video_processing_keye import KeyeVideoProcessor
from tests.model.factories import model_of, tiny_config
from tests.processing.conftest import make_tokenizer

PIXELS = 56 * 56
# Settings of a decoder that answers quickly; the vocabulary comes from the tokenizer.
SMALL = {"num_hidden_layers": 2, "intermediate_size": 40, "moe_intermediate_size": 24}


def small_model(kind: str = "mla", seed: int = 0, **text_overrides) -> KeyeForVideoQA:
    """A model of `factories.tiny_config` whose vocabulary and placeholders are those of the test tokenizer."""
    tokenizer = make_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), **text_overrides}
    text = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **text}
    config = tiny_config(kind, **text)
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    model = model_of(config, seed=seed)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def small_processor() -> KeyeProcessor:
    """Frames of 56 x 56 pixels, 4 tokens each."""
    videos = KeyeVideoProcessor(min_pixels=PIXELS, max_pixels=PIXELS, max_video_tokens=4096)
    processor = KeyeProcessor(make_tokenizer(), video_processor=videos)
    processor.image_processor.min_pixels = processor.image_processor.max_pixels = PIXELS
    return processor


def save_checkpoint(folder: Path, kind: str = "mla", seed: int = 0) -> Path:
    """Model and processor saved through the package."""
    small_model(kind, seed).save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


def question(video: str | Path, text: str = "what is it?") -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "video", "path": str(video)}, {"type": "text", "text": text}]},
    ]


def encode(processor, video: str | Path, **kwargs) -> dict[str, torch.Tensor]:
    """Model inputs for a question about `video`, four frames of it."""
    return processor.apply_chat_template(
        question(video),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 4, **kwargs},
    )
