"""The processor as a whole: prompt expansion, chat template, batches, checks, saving and loading."""

import copy
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from modeling_keye.image_processing_keye import KeyeImageProcessor
from modeling_keye.processing_keye import KEYE_CHAT_TEMPLATE, KeyeProcessor
from modeling_keye.video_processing_keye import KeyeVideoProcessor

from .conftest import make_tokenizer, picture

FRAMES = np.stack([picture(index, 56, 84) for index in range(4)])
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "keye-tiny"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture
def small() -> KeyeProcessor:
    """Six tokens for each 56 x 84 frame or image."""
    limits = {"min_pixels": 4 * 784, "max_pixels": 16 * 784}
    return KeyeProcessor(make_tokenizer(), KeyeImageProcessor(**limits), KeyeVideoProcessor(**limits))


def text_of(processor: KeyeProcessor, ids) -> str:
    """The prompt with runs of placeholders written short."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    return re.sub(r"(<\|(?:video|image)_pad\|>)+", lambda run: f"[{run[0].count('_pad')}]", text)


def video_message(video, question: str = "What?", key: str = "video") -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", key: video}, {"type": "text", "text": question}]}]


def test_frames_with_times(small):
    out = small(text=f"{VIDEO}What?", videos=FRAMES, timestamps=[0.0, 0.25, 0.75, 12.5], return_tensors="pt")
    assert text_of(small, out["input_ids"][0]) == (
        "<|vision_start|><|frame|>0.0[6]<|frame|>0.2[6]<|frame|>0.8[6]<|frame|>12.5[6]<|vision_end|>What?"
    )
    assert set(out) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values_videos",
        "video_grid_thw",
    }
    assert torch.equal(out["mm_token_type_ids"] == 2, out["input_ids"] == small.video_token_id)
    assert (out["mm_token_type_ids"] == 2).sum() == len(out["pixel_values_videos"]) // 4


def test_frames_without_times(small):
    out = small(text=VIDEO, videos=FRAMES[:2])
    assert text_of(small, out["input_ids"][0]) == "<|vision_start|><|frame|>[6]<|frame|>[6]<|vision_end|>"


def test_slow_and_fast_frames(small):
    frames = [np.zeros((56, 84, 3), np.uint8), np.zeros((56, 84, 3), np.uint8), FRAMES[3]]
    out = small(text=VIDEO, videos=[frames], fps=1.0, family="keye_vl_1_5", max_pixels=64 * 784, max_video_tokens=30)
    text = text_of(small, out["input_ids"][0])
    assert re.fullmatch(
        r"<\|vision_start\|><\|frame\|>0\.0\[(\d+)\]<\|frame\|>1\.0<\|fast_start\|>\[(\d+)\]<\|fast_end\|>"
        r"<\|frame\|>2\.0\[\1\]<\|vision_end\|>",
        text,
    )
    sizes = [int(size) for size in re.findall(r"\[(\d+)\]", text)]
    assert sizes[1] < sizes[0]
    grid = out["video_grid_thw"]
    assert sum(sizes) == grid.prod(-1).sum() // 4 == len(out["pixel_values_videos"]) // 4


def test_the_preview_family_writes_one_run(tokenizer):
    processor = KeyeProcessor(tokenizer, video_processor=KeyeVideoProcessor(family="keye_vl_preview"))
    assert processor.image_processor.family == "keye_vl_preview"
    out = processor(text=VIDEO, videos=FRAMES, fps=2.0, return_tensors="pt")
    tokens = int(out["video_grid_thw"].prod()) // 4
    assert text_of(processor, out["input_ids"][0]) == f"<|vision_start|>[{tokens}]<|vision_end|>"
    assert out["second_per_grid_ts"].tolist() == [0.5]


def test_images_and_text_only(small):
    picture_, wide = Image.fromarray(FRAMES[0]), Image.new("RGB", (112, 28))
    out = small(text=f"{IMAGE}and{IMAGE}", images=[picture_, wide], return_tensors="pt")
    assert (
        text_of(small, out["input_ids"][0]) == "<|vision_start|>[6]<|vision_end|>and<|vision_start|>[4]<|vision_end|>"
    )
    assert torch.equal(out["mm_token_type_ids"] == 1, out["input_ids"] == small.image_token_id)
    assert out["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 8]]
    only = small(text="What?")
    assert set(only) == {"input_ids", "attention_mask", "mm_token_type_ids"} and len(only["input_ids"][0]) == 5


def test_a_batch_with_several_videos(small):
    out = small(
        text=[f"{VIDEO}{VIDEO}Which?", f"{VIDEO}What is this?", "Nothing"],
        videos=[[FRAMES, FRAMES[:1]], [FRAMES[:2]], []],
        images=None,
        fps=1.0,
        padding=True,
        return_tensors="pt",
    )
    texts = [text_of(small, row[mask.bool()]) for row, mask in zip(out["input_ids"], out["attention_mask"])]
    assert [text.count("<|frame|>") for text in texts] == [5, 2, 0]
    assert out["video_grid_thw"].tolist() == [[4, 4, 6], [1, 4, 6], [2, 4, 6]]
    # The tokenizer was made with padding on the left.
    assert out["attention_mask"][2, 0] == 0 and out["attention_mask"][:, -1].all()
    assert (
        small(text=["a", "bcd"], padding=True, padding_side="right", return_tensors="pt")["attention_mask"][0, 0] == 1
    )


def test_videos_of_one_prompt_share_the_budget(tokenizer):
    processor = KeyeProcessor(tokenizer, video_processor=KeyeVideoProcessor(min_pixels=784, max_video_tokens=400))
    alone, both = (
        (np.array(processor(text=VIDEO * count, videos=[[np.zeros((4, 400, 600, 3), np.uint8)] * count])["input_ids"]))
        for count in (1, 2)
    )
    count = [(ids == processor.video_token_id).sum() for ids in (alone, both)]
    assert 300 < count[0] <= 404 and 300 < count[1] <= 408
    # Two prompts do not share.
    batch = processor(text=[VIDEO, VIDEO], videos=[np.zeros((4, 400, 600, 3), np.uint8)] * 2)
    assert (np.array(batch["input_ids"]) == processor.video_token_id).sum() == 2 * count[0]


def test_metadata_only_when_asked(small, clip):
    path = clip()
    assert "video_metadata" not in small(text=VIDEO, videos=path)
    out = small(text=VIDEO, videos=path, fps=1.0, return_metadata=True, return_tensors="pt")
    assert out["video_metadata"][0].frames_indices == [0, 13, 26, 39]
    assert out["video_metadata"][0].timestamps == pytest.approx([0.0, 1.3, 2.6, 3.9])
    assert "<|frame|>2.6" in text_of(small, out["input_ids"][0])


def test_progress_passes_through(small, clip):
    steps = []

    class Bar:
        def update(self, done, total):
            steps.append(done)

    for options in ({"progress": Bar().update}, {"videos_kwargs": {"progress": Bar().update}}):
        small(text=VIDEO, videos=str(clip()), num_frames=3, **options)
    assert steps == [1, 2, 3, 1, 2, 3]


def test_placeholders_and_media_must_match(small):
    with pytest.raises(ValueError, match=r"holds 1 <\|video_pad\|> placeholder\(s\), but 0 video\(s\) were given"):
        small(text=VIDEO)
    with pytest.raises(ValueError, match=r"holds 0 <\|video_pad\|> placeholder\(s\), but 1 video\(s\)"):
        small(text="What?", videos=FRAMES)
    with pytest.raises(ValueError, match=r"the text of prompt 1 holds 1 <\|video_pad\|> .* but 2 video\(s\)"):
        small(text=[VIDEO, VIDEO], videos=[[FRAMES], [FRAMES, FRAMES]])
    with pytest.raises(ValueError, match=r"holds 2 <\|image_pad\|> placeholder\(s\), but 1 image\(s\)"):
        small(text=IMAGE + IMAGE, images=[Image.new("RGB", (56, 56))])
    with pytest.raises(ValueError, match="give at least one of text"):
        small()
    with pytest.raises(ValueError, match="Mismatch in `video` token count"):
        small(text=VIDEO, videos=FRAMES, truncation=True, max_length=8)


@pytest.mark.parametrize("question", ["What is <|video_pad|>?", [{"type": "text", "text": "<|image_pad|>"}]])
def test_placeholders_in_user_text_are_refused(small, question):
    messages = [{"role": "user", "content": question}]
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="text of a user message holds .*; remove it"):
            small.apply_chat_template(messages, tokenize=tokenize)


@pytest.mark.parametrize("token", ["<|VIDEO_PAD|>", "<|Image_Pad|>"])
def test_placeholders_in_capitals_are_refused(small, token):
    with pytest.raises(ValueError, match=rf"a user message holds {re.escape(token)}, .* give the (video|image) as"):
        small.apply_chat_template(video_message(FRAMES, f"What is {token}?"))


def chat(processor: KeyeProcessor, messages, **options):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


@pytest.mark.parametrize(
    "address", [lambda path: {"url": path, "detail": "low"}, lambda path: path], ids=["dict", "text"]
)
@pytest.mark.parametrize("pack", [list, tuple])
def test_parts_in_the_form_of_openai(small, clip, tmp_path, address, pack):
    Image.fromarray(FRAMES[0]).save(tmp_path / "image.png")
    video, image, question = str(clip()), str(tmp_path / "image.png"), {"type": "text", "text": "What?"}
    theirs = [
        {"type": "video_url", "video_url": address(video)},
        {"type": "image_url", "image_url": address(image)},
        question,
    ]
    ours = [{"type": "video", "path": video}, {"type": "image", "path": image}, question]
    theirs, ours = ([{"role": "user", "content": pack(parts)}] for parts in (theirs, ours))
    before = copy.deepcopy(theirs)
    options = {"processor_kwargs": {"num_frames": 2, "padding": True}}
    for messages, expected in ((theirs, ours), ([theirs, ours], [ours, ours])):
        out = chat(small, messages, **options)
        for name, value in chat(small, expected, **options).items():
            assert torch.equal(out[name], value)
    assert small.apply_chat_template(theirs) == small.apply_chat_template(ours)
    assert theirs == before


def test_masks_with_parts_in_the_form_of_openai(small, clip):
    messages = [
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": str(clip())}}]},
        {"role": "assistant", "content": "A red ball."},
    ]
    out = chat(small, messages, return_assistant_tokens_mask=True, processor_kwargs={"num_frames": 2})
    assert out["video_grid_thw"][:, 0].sum() == 2
    spoken = out["input_ids"][0][torch.as_tensor(out["assistant_masks"])[0] == 1]
    assert text_of(small, spoken) == "A red ball.<|im_end|>"


@pytest.mark.parametrize(
    "part, sentence",
    [
        (
            {"type": "input_video", "video": "clip.mp4"},
            "a user message holds a part of type 'input_video'; give parts of",
        ),
        ({"type": "Video", "path": "clip.mp4"}, "part of type 'Video'; give parts of type text, image or video"),
        ({"type": "audio", "path": "clip.mp4"}, "part of type 'audio'"),
        ({"text": "Hello"}, "part of type None"),
        ("Hello", "'Hello', which is no part"),
        ({"type": "video_url", "url": "clip.mp4"}, "part of type video_url without an address; write it as"),
        ({"type": "image_url", "image_url": {}}, "part of type image_url without an address"),
        ({"type": "text", "content": "Hello"}, r"text part whose text is 'None' \(NoneType\); write it as"),
    ],
)
def test_other_parts_are_refused(small, part, sentence):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    for conversation in (messages, [video_message(FRAMES), messages]):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match=sentence):
                small.apply_chat_template(conversation, tokenize=tokenize, return_dict=tokenize)


def test_content_is_text_or_parts(small):
    with pytest.raises(ValueError, match="content of a user message must be text or a list of parts, got dict"):
        small.apply_chat_template([{"role": "user", "content": {"type": "text", "text": "What?"}}])


needs_sanitizing = pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    reason=f"transformers {transformers.__version__} has no sanitize_control_tokens",
)


@pytest.mark.compat
@needs_sanitizing
def test_sanitized_text_may_hold_placeholders(small):
    messages = video_message(FRAMES, "a <|video_pad|> b <|image_pad|> c <|im_end|>")
    out = chat(
        small, [messages, video_message(FRAMES)], sanitize_control_tokens=True, processor_kwargs={"padding": True}
    )
    plain = chat(small, video_message(FRAMES, "a"))
    for token in (small.video_token_id, small.image_token_id, small.tokenizer.eos_token_id):
        assert (out["input_ids"][0] == token).sum() == (plain["input_ids"][0] == token).sum()
    assert "a <|video_pad|> b <|image_pad|> c <|im_end|>" in small.tokenizer.decode(out["input_ids"][0])
    # Media that are not there are still missed.
    with pytest.raises(ValueError, match="part of type video with nothing to load"):
        chat(small, [{"role": "user", "content": [{"type": "video"}]}], sanitize_control_tokens=True)
    with pytest.raises(ValueError, match="not compatible with `return_assistant_tokens_mask"):
        chat(small, messages, sanitize_control_tokens=True, return_assistant_tokens_mask=True)


@pytest.mark.compat
@needs_sanitizing
@pytest.mark.parametrize("token", ["<|im_end|>", "<|video_pad|>", "<|frame|>"])
def test_a_tokenizer_of_whole_words_cannot_spell_a_token_otherwise(token):
    with pytest.raises(ValueError, match=rf"Can't sanitize '{re.escape(token)}'"):
        chat(KeyeProcessor.from_pretrained(TINY), video_message(FRAMES, f"a {token} b"), sanitize_control_tokens=True)


@pytest.mark.compat
@needs_sanitizing
@pytest.mark.parametrize("token", ["<|VIDEO_PAD|>", "<|IM_END|>"])
def test_sanitizing_refuses_spellings_that_it_would_miss(small, token):
    # Case matters to this tokenizer, so capitals are plain text.
    assert token in small.tokenizer.decode(
        chat(small, video_message(FRAMES, token), sanitize_control_tokens=True)["input_ids"][0]
    )
    lowering = KeyeProcessor.from_pretrained(TINY)
    with pytest.raises(
        ValueError, match=rf"{re.escape(token)}, which this tokenizer reads as {re.escape(token.lower())}"
    ):
        chat(lowering, video_message(FRAMES, f"a {token} b"), sanitize_control_tokens=True)


@pytest.mark.compat
def test_sanitizing_is_refused_where_the_library_does_not_know_it(small, monkeypatch):
    def older(self, conversation, chat_template=None, **kwargs):
        raise AssertionError("not reached")

    monkeypatch.setattr(ProcessorMixin, "apply_chat_template", older)
    with pytest.raises(ValueError, match="does not know sanitize_control_tokens; install 5.23, or take"):
        small.apply_chat_template(video_message(FRAMES, "<|video_pad|>"), tokenize=True, sanitize_control_tokens=True)


def test_parts_are_checked():
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|frame\|>, which family='keye_vl_2'"):
        tokenizer = make_tokenizer()
        tokenizer.get_vocab = lambda: {
            "<|vision_start|>": 0,
            "<|vision_end|>": 1,
            "<|image_pad|>": 2,
            "<|video_pad|>": 3,
        }
        KeyeProcessor(tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        KeyeProcessor()
    with pytest.raises(TypeError, match="video_processor must be a KeyeVideoProcessor, got KeyeImageProcessor"):
        KeyeProcessor(make_tokenizer(), KeyeImageProcessor(), KeyeImageProcessor())


def test_chat_template(processor):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "One"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Three"}]},
    ]
    render = processor.apply_chat_template
    assert render(messages) == (
        f"{SYSTEM}<|im_start|>user\n{IMAGE}{VIDEO}One{IMAGE}<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
        f"<|im_start|>user\n{VIDEO}Three<|im_end|>\n"
    )
    assert render(messages, add_vision_id=True, add_generation_prompt=True) == (
        f"{SYSTEM}<|im_start|>user\nPicture 1: {IMAGE}Video 1: {VIDEO}OnePicture 2: {IMAGE}<|im_end|>\n"
        f"<|im_start|>assistant\nTwo<|im_end|>\n<|im_start|>user\nVideo 2: {VIDEO}Three<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}]
    assert render(own) == "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
    started = [*messages, {"role": "assistant", "content": "Fo"}]
    assert render(started, continue_final_message=True).endswith("<|im_start|>assistant\nFo")


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_chat_with_a_video_file(processor, clip, key):
    path = str(clip())
    messages = video_message(path, key=key)
    before = copy.deepcopy(messages)
    out = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 3, "return_metadata": True},
    )
    assert messages == before
    assert out["video_metadata"][0].frames_indices == [0, 20, 39]
    text = text_of(processor, out["input_ids"][0])
    assert text.startswith(SYSTEM + "<|im_start|>user\n<|vision_start|><|frame|>0.0[")
    assert text.endswith("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")


def test_chat_frame_sampling(processor, clip):
    path = clip()

    def frames(**options):
        out = processor.apply_chat_template(
            video_message(path), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        return int(out["video_grid_thw"][:, 0].sum())

    assert frames() == 8
    assert frames(fps=1) == 4
    assert frames(num_frames=5) == 5
    assert frames(max_video_tokens=64 * 3) == 3
    assert frames(videos_kwargs={"fps": 1.0}) == 4
    assert frames(fps=1, do_sample_frames=True) == 4


def test_chat_with_decoded_frames(small):
    for video in (FRAMES, [Image.fromarray(frame) for frame in FRAMES], torch.from_numpy(FRAMES).permute(0, 3, 1, 2)):
        out = small.apply_chat_template(
            video_message(video),
            tokenize=True,
            return_dict=True,
            processor_kwargs={"timestamps": [[0.0, 1.0, 2.0, 3.0]]},
        )
        assert "<|frame|>3.0[6]" in text_of(small, out["input_ids"][0])
    image = Image.fromarray(FRAMES[0])
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    out = small.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_chat_batch(small):
    out = small.apply_chat_template(
        [video_message(FRAMES), video_message(FRAMES[:2], "And what is this?"), [{"role": "user", "content": "Hi"}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "fps": 1.0},
    )
    assert out["video_grid_thw"].tolist() == [[4, 4, 6], [2, 4, 6]]
    assert out["attention_mask"][:, -1].all() and not out["attention_mask"][:, 0].all()


def test_assistant_masks(small):
    messages = [
        *video_message(FRAMES),
        {"role": "assistant", "content": "A red ball."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": [{"type": "text", "text": "At 2."}]},
    ]
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for return_tensors in ("pt", None):
        out = small.apply_chat_template(
            [messages, short],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=return_tensors,
            processor_kwargs={"padding": True, "fps": 1.0},
        )
        assert not {"offset_mapping", "text_replacement_offsets"} & set(out)
        ids, masks = (np.asarray(torch.as_tensor(out[key])) for key in ("input_ids", "assistant_masks"))
        assert ids.shape == masks.shape
        assert text_of(small, ids[0][masks[0] == 1]) == "A red ball.<|im_end|>At 2.<|im_end|>"
        assert text_of(small, ids[1][masks[1] == 1]) == "Ho<|im_end|>"
    single = small.apply_chat_template(short, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(single["assistant_masks"][0]) == 3


def test_model_input_names(small):
    out = small(text=VIDEO + IMAGE, videos=FRAMES, images=Image.fromarray(FRAMES[0]))
    assert set(out) <= set(small.model_input_names)
    assert {"mm_token_type_ids", "image_grid_thw", "video_grid_thw"} <= set(small.model_input_names)


def test_defaults_and_structured_kwargs(small):
    frame = np.zeros((300, 600, 3), np.uint8)
    limited = small(text=IMAGE, images=frame, images_kwargs={"max_pixels": 72 * 784})
    assert limited["image_grid_thw"].tolist() == [[1, 12, 24]]
    padded = small(text=["a"], text_kwargs={"padding": "max_length", "max_length": 7})
    assert len(padded["input_ids"][0]) == 7
    with pytest.raises(ValueError, match="passed two times"):
        small(text=VIDEO, videos=FRAMES, num_frames=2, videos_kwargs={"num_frames": 3})
    assert "mm_token_type_ids" not in small(text="a", return_mm_token_type_ids=False)


def test_num_multimodal_tokens_match_the_call(small):
    sizes = [(60, 100), (300, 90), (28, 28)]
    helper = small._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=[(3, 300, 600)])
    called = [
        int(np.sum(small(text=IMAGE, images=np.zeros((*size, 3), np.uint8))["mm_token_type_ids"])) for size in sizes
    ]
    assert helper["num_image_tokens"] == called
    video = small(text=VIDEO, videos=np.zeros((3, 300, 600, 3), np.uint8))
    assert helper["num_video_tokens"] == [int(np.sum(video["mm_token_type_ids"])) // 2]
    assert small._get_num_multimodal_tokens(image_sizes=sizes, max_pixels=4 * 784)["num_image_tokens"][0] <= 4


def test_save_and_load(small, tmp_path):
    small.video_processor.fps = 1.0
    small.save_pretrained(tmp_path)
    files = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files <= set(os.listdir(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = KeyeProcessor(
        tokenizer, KeyeImageProcessor.from_pretrained(tmp_path), KeyeVideoProcessor.from_pretrained(tmp_path)
    )
    assert loaded.tokenizer.padding_side == "left" and loaded.chat_template == KEYE_CHAT_TEMPLATE
    assert loaded.video_processor.fps == 1.0
    for before, after in (
        (small.image_processor, loaded.image_processor),
        (small.video_processor, loaded.video_processor),
    ):
        # Saving adds the names of the classes, for loading as remote code.
        assert {**after.to_dict(), "auto_map": None} == {**before.to_dict(), "auto_map": None}
    first, second = (
        processor(text=[f"{VIDEO}What?", "a"], videos=FRAMES, padding=True, return_tensors="pt")
        for processor in (small, loaded)
    )
    for key in first:
        assert torch.equal(first[key], second[key])


REMOTE = """
import sys
import numpy as np
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
text = "<|vision_start|><|video_pad|><|vision_end|>What?"
for source, target in zip(sys.argv[1:], sys.argv[2:]):
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    assert "modeling_keye" not in sys.modules and "torchvision" not in sys.modules
    assert type(processor.video_processor).__name__ == "KeyeVideoProcessor", type(processor.video_processor)
    assert type(processor.image_processor).__name__ == "KeyeImageProcessor", type(processor.image_processor)
    assert AutoVideoProcessor.from_pretrained(source, trust_remote_code=True).max_pixels == 16 * 784
    assert AutoImageProcessor.from_pretrained(source, trust_remote_code=True).max_pixels == 16 * 784
    print(len(processor(text=text, videos=np.zeros((4, 56, 84, 3), np.uint8), fps=1.0)["input_ids"][0]))
    processor.save_pretrained(target)
"""


def test_a_bare_folder_loads_as_remote_code(small, tmp_path):
    for name, auto in (("image_processor", "AutoImageProcessor"), ("video_processor", "AutoVideoProcessor")):
        type(getattr(small, name)).register_for_auto_class(auto)
    KeyeProcessor.register_for_auto_class()
    folders = [str(tmp_path / name) for name in ("saved", "again", "third")]
    small.save_pretrained(folders[0])
    command = [sys.executable, "-c", REMOTE, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = len(small(text=f"{VIDEO}What?", videos=FRAMES, fps=1.0)["input_ids"][0])
    assert done.stdout.split() == [str(expected)] * 2


def test_another_chat_template_is_kept(tokenizer, tmp_path):
    processor = KeyeProcessor(tokenizer, chat_template="{{ messages[0]['content'] }}")
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_decoding(small):
    ids = small(text="Hello")["input_ids"]
    assert small.post_process_image_text_to_text(ids) == ["Hello"]
    assert small.batch_decode(ids, skip_special_tokens=True) == ["Hello"]


def test_a_dark_frame_of_a_float_video_stays_dark(small):
    """Whether white is 1 or 255 is asked of the whole video."""
    video = np.full((3, 64, 64, 3), 200.0, np.float32)
    video[1] = 1.0
    as_floats, as_bytes = (small.video_processor([x])["pixel_values_videos"] for x in (video, video.astype(np.uint8)))
    torch.testing.assert_close(as_floats, as_bytes)


def test_a_picture_is_turned_as_its_file_says(small, tmp_path):
    picture = Image.new("RGB", (60, 120))
    exif = picture.getexif()
    exif[0x0112] = 6  # stands on its side
    picture.save(tmp_path / "p.jpg", exif=exif)
    with Image.open(tmp_path / "p.jpg") as opened:
        grids = [small.image_processor([x])["image_grid_thw"].tolist() for x in (opened, str(tmp_path / "p.jpg"))]
    assert grids[0] == grids[1] and grids[0][0][1] < grids[0][0][2]


@pytest.mark.parametrize("kind", ["video", "video_url"])
def test_options_in_a_part_are_not_ignored(small, kind):
    part = {"type": kind, kind: "clip.mp4", "fps": 0.5, "nframes": 3}
    with pytest.raises(
        ValueError, match=r"part of type video with fps, nframes, which is not read there.*processor_kwargs"
    ):
        chat(small, [{"role": "user", "content": [part]}])
    # As text alone, messages may go on to tools that read such options.
    assert "<|video_pad|>" in small.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)


@pytest.mark.parametrize("key", ["video", "path"])
def test_a_list_of_paths_is_one_video(small, tmp_path, key):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, frame in zip(paths, FRAMES, strict=True):
        Image.fromarray(frame).save(path)
    options = {"processor_kwargs": {"fps": 2.0, "padding": True}}
    messages = video_message([str(paths[0]), *paths[1:]], key=key)
    for given, expected in (
        (messages, video_message(FRAMES)),
        ([messages, messages], [video_message(FRAMES), video_message(FRAMES)]),
    ):
        out = chat(small, given, **options)
        for name, value in chat(small, expected, **options).items():
            assert torch.equal(out[name], value)
    assert type(messages[0]["content"][0][key]) is list
    with pytest.raises(FileNotFoundError, match="there is no image at .*none.png; check the path"):
        chat(small, video_message([str(paths[0]), str(tmp_path / "none.png")]))


def test_a_video_in_base64_is_refused(small):
    with pytest.raises(ValueError, match="type video with base64, which only images may have; save the video"):
        chat(small, video_message("AAAA", key="base64"))


@pytest.mark.parametrize("part", [{"type": "video"}, {"type": "image"}, {"type": "video", "video": None}])
def test_a_part_without_its_media_is_refused(small, part):
    with pytest.raises(ValueError, match="with nothing to load; say where the (video|image) lies once"):
        chat(small, [{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="of type video with video, path to load; say where the video lies once"):
        chat(small, [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "path": "a.mp4"}]}])
