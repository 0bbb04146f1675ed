"""A clip, files that are no clips, and a checkpoint of a random tiny model for the `keye` command."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from training.synthetic_videos import Clip, Thing, write_video
from training.tokenizer import build_tokenizer

CONTEXT = 512


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Eight frames of 56 x 56 pixels at 2 frames per second."""
    things = tuple(Thing(colour, "circle", 0.5, 0.5, 0.7, 1.0) for colour in ("red", "blue", "green", "white") * 2)
    return write_video(Clip(things, Fraction(2), "plain", seed=0), tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture
def sound_only(tmp_path) -> Path:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path


@pytest.fixture
def no_frames(tmp_path) -> Path:
    """A container that announces a video stream and holds no packet."""
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    from modeling_keye.configuration_keye import KeyeConfig
    from modeling_keye.modeling_keye import KeyeForVideoQA
    from modeling_keye.processing_keye import KeyeProcessor
    from modeling_keye.video_processing_keye import KeyeVideoProcessor

    tokenizer = build_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 16,
        "local_window": 8,
        "anchor_stride": 16,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": ids["im_end"],
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = KeyeConfig(
        text_config=text,
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    torch.manual_seed(0)
    KeyeForVideoQA(config).save_pretrained(folder)
    videos = KeyeVideoProcessor(min_pixels=56 * 56, max_pixels=56 * 56, max_video_tokens=4096)
    KeyeProcessor(tokenizer, video_processor=videos).save_pretrained(folder)
    return folder
