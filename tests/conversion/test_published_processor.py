"""`KeyeProcessor.from_pretrained` on the files of a published checkpoint: prompts, sizes, positions, refusals."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import cached_file

from modeling_keye import KeyeConfig, KeyeProcessor, published_processor_keye
from modeling_keye.positions_keye import rope_index
from modeling_keye.processing_keye import KEYE_CHAT_TEMPLATE
from tests.conversion.published import VISION_LAYOUTS, vocabulary, write_tokenizer
from tests.conversion.published import generation_config as tiny_generation_config
from tests.conversion.published import preprocessor_config as tiny_preprocessor_config
from tests.conversion.published import published_config as tiny_config

MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
)
# Marks a template as the one of a file.
MARKED = "{{ 'marked' }}" + KEYE_CHAT_TEMPLATE
TEXT_ONLY = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
RUNS = r"(<\|(?:video|image)_pad\|>)+"


def write(folder: Path, layout: str, preprocessor: dict | None = None, template: str | None = MARKED, **keys) -> Path:
    """The files of a published checkpoint without its weights; `preprocessor` replaces keys, None removes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(layout, **keys)))
    (folder / "generation_config.json").write_text(json.dumps(tiny_generation_config(layout)))
    settings = {**tiny_preprocessor_config(layout), **(preprocessor or {})}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    write_tokenizer(folder, layout)
    return folder


def shown(processor: KeyeProcessor, ids) -> str:
    """The prompt with runs of placeholders written short."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    return re.sub(RUNS, lambda run: f"[{run[0].count('_pad')}]", text)


@pytest.mark.compat
@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_the_family_follows_the_checkpoint(layout, tmp_path):
    processor = KeyeProcessor.from_pretrained(write(tmp_path / "Keye.VL-x", layout))
    config = KeyeConfig.from_pretrained(tmp_path / "Keye.VL-x")
    assert processor.image_processor.family == processor.video_processor.family == layout
    assert (processor.image_token_id, processor.video_token_id) == (config.image_token_id, config.video_token_id)
    assert processor.apply_chat_template(MESSAGES, add_generation_prompt=True) == "marked" + PROMPT
    # Saved, it is one of ours and the same.
    processor.save_pretrained(tmp_path / "ours")
    again = KeyeProcessor.from_pretrained(tmp_path / "ours")
    aside = ("auto_map", "processor_class")
    first, second = ({k: v for k, v in p.to_dict().items() if k not in aside} for p in (processor, again))
    assert first == second and again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.compat
@pytest.mark.parametrize("as_hub", [False, True], ids=["subfolder", "hub"])
def test_hub_names_and_subfolders(as_hub, tmp_path, monkeypatch):
    read = []

    def recorded(repo, name, **options):
        read.append((name, options.get("revision")))
        return cached_file(repo, name, **options)

    monkeypatch.setattr(published_processor_keye, "cached_file", recorded)
    folder = write(tmp_path / "folder" / "inner", "keye_vl_2", {"min_pixels": 7840})
    if as_hub:
        base = tmp_path / "cache" / "models--someone--Keye-VL-2.0"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text("89" * 20)
        (base / "snapshots").mkdir()
        folder.rename(base / "snapshots" / ("89" * 20))
        source = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        processor = KeyeProcessor.from_pretrained("someone/Keye-VL-2.0", **source)
        # All other files come from the commit of the first one, even if the branch moves on meanwhile.
        assert {revision for name, revision in read if name != "config.json"} == {"89" * 20}
    else:
        processor = KeyeProcessor.from_pretrained(tmp_path / "folder", subfolder="inner")
    assert processor.image_processor.min_pixels == 7840
    assert processor.video_processor.family == "keye_vl_2"
    assert processor.apply_chat_template(MESSAGES, add_generation_prompt=True) == "marked" + PROMPT


@pytest.mark.compat
@pytest.mark.parametrize("layout", ["keye_vl_preview", "keye_vl_671b"])
def test_code_in_the_folder_never_runs(layout, tmp_path):
    folder = write(tmp_path / "folder", layout)
    bomb = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("processing_keye", "image_processing_keye", "configuration_keye", "tokenization_keye"):
        (folder / f"{name}.py").write_text(bomb)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    for number, changes in enumerate(({}, {"tokenizer_class": "KeyeTokenizer"}, {"tokenizer_class": None})):
        auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_keye.KeyeTokenizer", None]}} if number else {}
        (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer_config, **auto_map, **changes}))
        for trust in ({}, {"trust_remote_code": True}):
            processor = KeyeProcessor.from_pretrained(folder, **trust)
            text = "<|vision_start|>What?\n 12"
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert processor.tokenizer.decode(ids) == text and ids[0] == vocabulary(layout).index(text[:16])
    assert not (tmp_path / "ran").exists()


# Chat templates.


def test_the_template_of_the_tokenizer_is_not_for_media(tmp_path):
    folder = write(tmp_path, "keye_vl_1_5", template=None)
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    processor = KeyeProcessor.from_pretrained(folder)
    assert processor.chat_template == KEYE_CHAT_TEMPLATE
    # Saving a tokenizer writes its template under the newer name; it is for text all the same.
    (folder / "chat_template.jinja").write_text(TEXT_ONLY)
    assert KeyeProcessor.from_pretrained(folder).chat_template == KEYE_CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(MARKED)
    assert KeyeProcessor.from_pretrained(folder).chat_template == MARKED
    (folder / "chat_template.jinja").write_text(TEXT_ONLY)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": MARKED}))
    assert KeyeProcessor.from_pretrained(folder).chat_template == MARKED
    assert KeyeProcessor.from_pretrained(folder, chat_template=TEXT_ONLY).chat_template == TEXT_ONLY


def test_a_template_for_strings_gets_strings(tmp_path):
    folder = write(tmp_path, "keye_vl_671b", template=TEXT_ONLY)
    processor = KeyeProcessor.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, *copy.deepcopy(MESSAGES)]
    messages[1]["content"].insert(1, {"type": "image"})
    assert processor.apply_chat_template(messages) == (
        "[system]Be brief.[user]<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "What?"
    )
    # Without a file it is the tokenizer's own; without that there is nothing to write prompts with.
    (folder / "chat_template.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEXT_ONLY}))
    assert KeyeProcessor.from_pretrained(folder).chat_template == processor.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(ValueError, match="chat_template="):
        KeyeProcessor.from_pretrained(folder)
    assert KeyeProcessor.from_pretrained(folder, chat_template=TEXT_ONLY).chat_template == TEXT_ONLY


# Sizes.


def image_size(processor: KeyeProcessor, height: int, width: int) -> tuple[int, int]:
    grid = processor(text="<|image_pad|>", images=[Image.new("RGB", (width, height))])["image_grid_thw"]
    return int(grid[0][1]) * 14, int(grid[0][2]) * 14


def test_image_limits_of_the_folder(tmp_path):
    small = KeyeProcessor.from_pretrained(write(tmp_path / "a", "keye_vl_preview", {"min_pixels": 3136}))
    large = KeyeProcessor.from_pretrained(write(tmp_path / "b", "keye_vl_preview", {"min_pixels": 102400}))
    assert image_size(small, 480, 640) == (476, 644)
    assert image_size(small, 1080, 1920) == (728, 1316)
    assert image_size(small, 20, 100) == (28, 140)
    assert image_size(small, 42, 42) == (56, 56)
    assert image_size(small, 100, 100) == (112, 112)
    assert image_size(large, 100, 100) == (336, 336)
    # Given here, they win; left out of the file, the family's hold.
    given = KeyeProcessor.from_pretrained(tmp_path / "b", min_pixels=3136)
    assert image_size(given, 100, 100) == (112, 112)
    open_ended = {"min_pixels": None, "max_pixels": None}
    for layout, size in (("keye_vl_preview", (728, 1316)), ("keye_vl_1_5", (1092, 1932))):
        processor = KeyeProcessor.from_pretrained(write(tmp_path / layout, layout, open_ended))
        assert image_size(processor, 1080, 1920) == size
    # Other names that releases of the library have for the same limits.
    renamed = {**open_ended, "size": {"shortest_edge": 102400, "longest_edge": 1003520}}
    processor = KeyeProcessor.from_pretrained(write(tmp_path / "c", "keye_vl_preview", renamed))
    assert image_size(processor, 100, 100) == (336, 336) and image_size(processor, 1080, 1920) == (728, 1316)


def frame_size(processor: KeyeProcessor, frames: int, height: int, width: int) -> tuple[int, int]:
    return processor.video_processor.frame_size(frames, height, width)


def test_frame_sizes_are_those_of_the_family_not_of_the_image_limits(tmp_path):
    limits = {"min_pixels": 102400, "max_pixels": 200704}
    processor = KeyeProcessor.from_pretrained(write(tmp_path / "2", "keye_vl_2", limits))
    sizes = [(20, (336, 588)), (720, (336, 588)), (721, (336, 588)), (1000, (280, 504)), (2880, (168, 280))]
    assert [(count, frame_size(processor, count, 720, 1280)) for count, _ in sizes] == sizes
    processor = KeyeProcessor.from_pretrained(write(tmp_path / "15", "keye_vl_1_5", {**limits, "resample": 3}))
    assert frame_size(processor, 10, 720, 1280) == (560, 1008)
    bilinear, bicubic = 2, 3
    assert processor.video_processor.budget().video_resample == bilinear
    assert processor.image_processor.resample == bicubic


def test_preview_sizes_frames_twice(tmp_path):
    # 280 x 364 is what the reader makes of 270 x 360: 130 tokens, 101920 pixels, more than its 100352 and less than
    # the 102400 that the processor asks for. It enlarges by (102400 / 101920) ** 0.5 and rounds up.
    sizes = {}
    for minimum in (3136, 102400):
        folder = write(tmp_path / str(minimum), "keye_vl_preview", {"min_pixels": minimum})
        processor = KeyeProcessor.from_pretrained(folder)
        sizes[minimum] = frame_size(processor, 4, 270, 360)
        clip = np.zeros((4, 270, 360, 3), np.uint8)
        out = processor(text="<|video_pad|>", videos=[clip], fps=2.0, return_tensors="pt")
        assert out["video_grid_thw"].tolist() == [[4, *(side // 14 for side in sizes[minimum])]]
        assert frame_size(processor, 4, 720, 1280) == (560, 1008)
    assert sizes == {3136: (280, 364), 102400: (308, 392)}


def test_pixel_settings_of_the_folder(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    clip = np.array(picture)[None].repeat(2, 0)

    def pixels(**preprocessor):
        folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), "keye_vl_2", preprocessor)
        processor = KeyeProcessor.from_pretrained(folder)
        limits = {"min_pixels": 3136, "max_pixels": 8 * 784}
        text = "<|image_pad|><|video_pad|>"
        out = processor(text=text, images=[picture], videos=[clip], fps=2.0, videos_kwargs=limits, return_tensors="pt")
        return torch.stack([out["pixel_values"], *out["pixel_values_videos"].chunk(2)])

    raw = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    patches = raw.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(-1, 3, 14, 14)
    plain = pixels()
    assert (plain - (patches * 2 - 1)).abs().max() <= 1e-6
    assert torch.equal(pixels(image_mean=None, image_std=None), plain)
    clip_norm = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.5]}
    mean, std = (torch.tensor(clip_norm[name])[:, None, None] for name in ("image_mean", "image_std"))
    assert (pixels(**clip_norm) - (patches - mean) / std).abs().max() <= 1e-6
    assert not torch.equal(_resized(tmp_path / "x", 3), _resized(tmp_path / "y", 2))
    assert torch.equal(_resized(tmp_path / "z", None), _resized(tmp_path / "x", 3))


def _resized(folder: Path, resample: int | None) -> torch.Tensor:
    processor = KeyeProcessor.from_pretrained(write(folder, "keye_vl_preview", {"resample": resample}))
    noise = np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    return processor(text="<|image_pad|>", images=[Image.fromarray(noise)], return_tensors="pt")["pixel_values"]


# Prompts and positions (the golden numbers).

# White, then dark blue: too different for a fast frame.
FRAMES = np.stack([np.full((56, 56, 3), 255, np.uint8), np.full((56, 56, 3), (0, 0, 30), np.uint8)])
TINY = {"min_pixels": 3136, "max_pixels": 3136}


def test_preview_prompt_and_positions(tmp_path):
    processor = KeyeProcessor.from_pretrained(write(tmp_path, "keye_vl_preview"))
    config = KeyeConfig.from_pretrained(tmp_path)
    text = "ab<|vision_start|><|video_pad|><|vision_end|>c"
    out = processor(text=text, videos=[FRAMES], fps=2.0, videos_kwargs=TINY, return_tensors="pt")
    assert shown(processor, out["input_ids"][0]) == "ab<|vision_start|>[8]<|vision_end|>c"
    assert out["video_grid_thw"].tolist() == [[2, 4, 4]] and out["second_per_grid_ts"].tolist() == [0.5]
    positions, delta = rope_index(
        config,
        out["input_ids"],
        video_grid_thw=out["video_grid_thw"],
        attention_mask=out["attention_mask"],
        second_per_grid_ts=out["second_per_grid_ts"],
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6],
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 5, 6],
    ]
    assert delta.tolist() == [[-6]]


@pytest.mark.parametrize("layout", ["keye_vl_1_5", "keye_vl_2"])
def test_frame_prompt_and_positions(layout, tmp_path):
    processor = KeyeProcessor.from_pretrained(write(tmp_path, layout))
    config = KeyeConfig.from_pretrained(tmp_path)
    text = "ab<|vision_start|><|video_pad|><|vision_end|>c"
    out = processor(text=text, videos=[FRAMES], fps=2.0, videos_kwargs=TINY, return_tensors="pt")
    expected = "ab<|vision_start|><|frame|>0.0[4]<|frame|>0.5[4]<|vision_end|>c"
    assert shown(processor, out["input_ids"][0]) == expected
    positions, _ = rope_index(config, out["input_ids"], video_grid_thw=out["video_grid_thw"])
    lead, middle, end = list(range(7)), [9, 10, 11, 12], [15, 16]
    assert positions[:, 0].tolist() == [
        [*lead, 7, 7, 7, 7, *middle, 13, 13, 13, 13, *end],
        [*lead, 7, 7, 8, 8, *middle, 13, 13, 14, 14, *end],
        [*lead, 7, 8, 7, 8, *middle, 13, 14, 13, 14, *end],
    ]


def test_latent_attention_counts_visual_tokens_like_text(tmp_path):
    processor = KeyeProcessor.from_pretrained(write(tmp_path, "keye_vl_671b"))
    config = KeyeConfig.from_pretrained(tmp_path)
    # The second frame repeats the first, so it is a fast one.
    out = processor(
        text="<|vision_start|><|video_pad|><|vision_end|>", videos=[FRAMES[[0, 0]]], fps=2.0, videos_kwargs=TINY
    )
    assert shown(processor, out["input_ids"][0]) == (
        "<|vision_start|><|frame|>0.0[4]<|frame|>0.5<|fast_start|>[4]<|fast_end|><|vision_end|>"
    )
    assert config.text_config.mrope_section is None


# Refusals.


def test_ids_must_agree(tmp_path):
    folder = write(tmp_path, "keye_vl_1_5")
    raw = json.loads((folder / "config.json").read_text())
    raw["image_token_id"] += 5
    (folder / "config.json").write_text(json.dumps(raw))
    right = vocabulary("keye_vl_1_5").index("<|image_pad|>")
    with pytest.raises(ValueError, match=rf"`image_token_id` {right + 5}.*<\|image_pad\|> the id {right}"):
        KeyeProcessor.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["deepseek_v3", "deepseek_v32"])
def test_a_text_checkpoint_has_no_processor(layout, tmp_path):
    with pytest.raises(ValueError, match=rf"{layout}.*<\|video_pad\|>.*conversion.compose"):
        KeyeProcessor.from_pretrained(write(tmp_path, layout))


def test_a_tokenizer_of_another_model(tmp_path):
    write(tmp_path, "keye_vl_2")
    for file in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / file).unlink()
    write_tokenizer(tmp_path, "deepseek_v3")
    with pytest.raises(ValueError, match=r"the tokenizer of .* lacks <\|vision_start\|>"):
        KeyeProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("preprocessor", "named"),
    [
        ({"temporal_patch_size": 2}, "temporal_patch_size"),
        ({"patch_size": 16}, "patch_size"),
        ({"merge_size": 4}, "merge_size"),
        ({"size": {"height": 384, "width": 384}}, "size"),
    ],
)
def test_preprocessing_that_the_model_cannot_follow(preprocessor, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        KeyeProcessor.from_pretrained(write(tmp_path, "keye_vl_2", preprocessor))


def test_a_damaged_file_is_named(tmp_path):
    folder = write(tmp_path, "keye_vl_2")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="preprocessor_config.json is not valid JSON"):
        KeyeProcessor.from_pretrained(folder)


def test_another_model_is_refused(tmp_path):
    folder = write(tmp_path, "keye_vl_2", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        KeyeProcessor.from_pretrained(folder)


def test_our_processor_in_the_folder_of_another_model(tmp_path):
    processor = KeyeProcessor.from_pretrained(write(tmp_path / "a", "keye_vl_2"))
    processor.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"architectures": ["Other"], "model_type": "qwen3"}))
    assert KeyeProcessor.from_pretrained(tmp_path / "b").image_token_id == processor.image_token_id
