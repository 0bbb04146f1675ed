"""Examples out of rows: labels on answers alone, bad videos in a sentence or passed over, workers, the frame cache."""

import gc
import json
import os
import weakref
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import modeling_keye.video_processing_keye as video_processing
from modeling_keye.processing_keye import KEYE_CHAT_TEMPLATE
from tests.model.checkpoints import small_processor
from tests.processing.conftest import write_clip
from training import video_dataset
from training.collator import VideoQACollator
from training.data_errors import sentence
from training.rows import DataError, MediaError, TooLongError, load_rows
from training.video_dataset import VideoQADataset

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three clips that can be read, and what users have besides."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", count=6 + 4 * number, size=(56, 56))
    whole = (folder / "2.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "no_frames.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    write_clip(folder / "odd.mp4", count=4, size=(60, 64))
    Image.new("RGB", (70, 60), "red").save(folder / "red.png")
    whole = (folder / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no image")
    return folder


def record(video: str | list[str], answer: str = "red", **more) -> dict:
    return {"video": video, "question": "which colour?", "answer": answer, **more}


def make(folder: Path, records: list[dict], processor=None, **options) -> VideoQADataset:
    options = {"max_length": None, "video_options": {"num_frames": 3}, **options}
    return VideoQADataset(load_rows(records, media_root=folder), processor or small_processor(), **options)


def answers(dataset: VideoQADataset, example: dict) -> str:
    return dataset.processor.decode(example["labels"][example["labels"] != -100])


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_are_every_answer_with_its_end_and_nothing_else(folder):
    conversation = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "colour?"}, {"type": "image"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "blue"},
    ]
    dataset = make(folder, [{"video": "0.mp4", "image": "red.png", "messages": conversation}])
    example = dataset[0]
    assert answers(dataset, example) == "red<|im_end|>blue<|im_end|>"
    ids, labels = example["input_ids"], example["labels"]
    assert ids.shape == labels.shape == example["mm_token_type_ids"].shape and ids.dim() == 1
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (ids == dataset.processor.video_token_id).sum() == 3 * 4
    assert (ids == dataset.processor.image_token_id).sum() == 4
    assert example["video_grid_thw"].tolist() == [[3, 4, 4]] and example["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert len(example["pixel_values_videos"]) == 48 and len(example["pixel_values"]) == 16


def test_inputs_are_those_of_the_processor(folder):
    dataset = make(folder, [record(["0.mp4", "1.mp4"])])
    expected = dataset.processor.apply_chat_template(
        dataset.rows[0].messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 3},
    )
    example = dataset[0]
    for name in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(example[name], expected[name][0])
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(example[name], expected[name])


def test_text_alone_has_no_pixels(folder):
    example = make(folder, [{"question": "2 + 2?", "answer": "4"}])[0]
    assert set(example) == {"input_ids", "labels", "mm_token_type_ids"}


def test_an_answer_is_never_cut(folder):
    dataset = make(folder, [record("0.mp4")])
    whole = dataset[0]
    needed = int((whole["labels"] != -100).nonzero()[-1]) + 1
    # Behind the last answer stands a line break that nobody needs.
    assert needed == len(whole["input_ids"]) - 1
    short = make(folder, [record("0.mp4")], max_length=needed)[0]
    assert torch.equal(short["input_ids"], whole["input_ids"][:needed])
    assert torch.equal(short["labels"], whole["labels"][:needed])
    with pytest.raises(TooLongError) as raised:
        make(folder, [record("0.mp4")], max_length=needed - 1)[0]
    assert str(raised.value) == (
        f"the list of rows, row 1: max_length={needed - 1} would cut an answer, which ends at token {needed} (12 "
        "tokens are of videos and images); raise max_length, or look at fewer or smaller frames (video_options "
        "max_frames, max_pixels)."
    )
    rows = [record("0.mp4", "much too long an answer"), record("1.mp4", "red")]
    skipping = make(folder, rows, max_length=needed, on_bad_video="skip")
    assert answers(skipping, skipping[0]) == "red<|im_end|>"


BAD_FILES = {
    "cut.mp4": "is truncated: its index is missing",
    "text.mp4": "is not a video file",
    "empty.mp4": r"is empty \(0 bytes\)",
    "no_frames.mkv": "without a single frame|before its first frame",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_unreadable_video_names_row_and_file(folder, name):
    dataset = make(folder, [record("0.mp4"), record(["1.mp4", name])])
    dataset[0]
    with pytest.raises(MediaError, match=f"^the list of rows, row 2: .*{name}.*({BAD_FILES[name]})") as raised:
        dataset[1]
    assert raised.value.path == str(folder / name)
    assert str(raised.value).endswith("or pass over such rows with on_bad_video='skip'.")


@pytest.mark.parametrize("name", ["cut.png", "text.png"])
def test_an_unreadable_image_names_row_and_file(folder, name):
    rows = [{"image": ["red.png", name], "question": "?", "answer": "red"}]
    with pytest.raises(MediaError, match=f"^the list of rows, row 1: .*{name}"):
        make(folder, rows)[0]


def test_a_missing_video_ends_a_run_before_it_begins(folder):
    with pytest.raises(MediaError, match="^the list of rows, row 2: there is no video file at .*gone.mp4"):
        make(folder, [record("0.mp4"), record("gone.mp4")])
    late = make(folder, [record("0.mp4"), record("gone.mp4")], check_rows=False)
    with pytest.raises(MediaError, match="row 2: there is no video file"):
        late[1]


def test_skipped_rows_are_replaced_by_the_next_and_reported_once(folder, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(video_dataset.logger, "warning", warned.append)
    names = ["0.mp4", "cut.mp4", "gone.mp4", "1.mp4", "text.mp4", "cut.mp4"]
    rows = [record(name, f"answer {number}") for number, name in enumerate(names)]
    for _ in range(2):
        dataset = make(folder, rows, on_bad_video="skip", skipped_file=tmp_path / "run" / "skipped.jsonl")
        for _ in range(2):
            found = [answers(dataset, dataset[number])[7] for number in range(len(dataset))]
            assert found == ["0", "3", "3", "3", "0", "0"]
        assert answers(dataset, dataset[-1])[7] == "0"
    reported = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [Path(entry["file"]).name for entry in reported] == ["gone.mp4", "cut.mp4", "text.mp4"]
    assert "row 2: " in reported[1]["reason"] and "on_bad_video" not in reported[1]["reason"]
    assert warned == [f"skipped: {entry['reason']}" for entry in reported]


def test_skipping_everything_is_an_error(folder):
    dataset = make(folder, [record("cut.mp4"), record("gone.mp4")], on_bad_video="skip")
    with pytest.raises(DataError, match="none of the 2 rows can be used"):
        dataset[0]


def test_bad_rows_are_not_skipped(folder):
    with pytest.raises(DataError, match="row 2: the answer in message 2 is empty"):
        make(folder, [record("0.mp4"), record("0.mp4", "")], on_bad_video="skip")


def test_a_bad_option_is_no_bad_video(folder):
    rows = [record("odd.mp4"), record("0.mp4")]
    dataset = make(folder, rows, on_bad_video="skip", video_options={"num_frames": 3, "do_resize": False})
    with pytest.raises(DataError, match="^the list of rows, row 1: do_resize=False needs frames whose sides"):
        dataset[0]


def test_arguments_are_checked(folder):
    rows = [record("0.mp4")]
    for options, message in (
        ({"video_options": {"max_frame": 3}}, "video_options has no 'max_frame'; did you mean 'max_frames'"),
        ({"video_options": {"num_frames": 0}}, "video_options: num_frames=0 must be a positive whole number of frames"),
        ({"video_options": {"max_frames": 0}}, "video_options: max_frames=0 must be a positive whole number of frames"),
        ({"video_options": {"fps": 1, "num_frames": 3}}, "video_options: fps and num_frames are mutually exclusive"),
        ({"video_options": {"fps": -1}}, "video_options: fps=-1 must be a positive number"),
        ({"on_bad_video": "ignore"}, "on_bad_video='ignore' must be 'raise' or 'skip'"),
        ({"max_length": 0}, "max_length=0 must be a positive number of tokens, or None"),
    ):
        with pytest.raises(DataError, match=message):
            make(folder, rows, **options)
    with pytest.raises(DataError, match="there are no rows"):
        VideoQADataset([], small_processor(), max_length=None)
    with pytest.raises(IndexError):
        make(folder, rows)[1]


def test_a_template_without_marks_is_refused(folder):
    processor = small_processor()
    processor.chat_template = KEYE_CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(DataError, match=r"does not mark what the assistant says.*mark_answers"):
        make(folder, [record("0.mp4")], processor)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_the_process_itself_gives(folder, tmp_path, start):
    dataset = make(folder, [record(f"{i % 3}.mp4", f"answer {i}") for i in range(4)], frame_cache=tmp_path / "frames")
    collate = VideoQACollator(dataset.processor)
    options = {"batch_size": 2, "collate_fn": collate, "num_workers": 1, "multiprocessing_context": start}
    batches = list(DataLoader(dataset, **options))
    for number, batch in enumerate(batches):
        assert_equal(batch, collate([dataset[2 * number], dataset[2 * number + 1]]))
    assert len(batches) == 2


def test_an_error_in_a_worker_keeps_its_sentence(folder):
    dataset = make(folder, [record("cut.mp4")])
    said = []
    for workers in (0, 1):
        with pytest.raises(DataError, match="the list of rows, row 1: .*cut.mp4 is truncated") as caught:
            list(DataLoader(dataset, batch_size=None, num_workers=workers))
        said.append(sentence(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]


@pytest.mark.parametrize("cached", [False, True])
def test_pixels_live_no_longer_than_their_example(folder, tmp_path, cached):
    dataset = make(folder, [record("0.mp4")], frame_cache=tmp_path if cached else None)
    example = dataset[0]
    pixels = weakref.ref(example["pixel_values_videos"])
    del example
    gc.collect()
    assert pixels() is None


class NoReader:
    def __init__(self, source):
        raise AssertionError(f"{source} was decoded again")


@pytest.mark.parametrize(
    "options", [{"num_frames": 3}, {"fps": 5.0, "slow_fast": True}, {"min_pixels": 28 * 28, "max_pixels": 28 * 28}]
)
def test_cached_frames_are_the_decoded_ones(folder, tmp_path, monkeypatch, options):
    rows = [record(["0.mp4", "1.mp4"]), record("2.mp4")]
    plain = make(folder, rows, video_options=options)
    cached = make(folder, rows, video_options=options, frame_cache=tmp_path)
    for number in range(2):
        assert_equal(cached[number], plain[number])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(video_processing, "VideoReader", NoReader)
    again = make(folder, rows, video_options=options, frame_cache=tmp_path)
    expected = [cached[0], cached[1]]
    for number in range(2):
        assert_equal(again[number], expected[number])
    with pytest.raises(AssertionError, match="decoded again"):
        plain[0]


def test_a_changed_file_or_option_is_decoded_again(tmp_path):
    clip = write_clip(tmp_path / "x.mp4", count=8, size=(56, 56))
    old = make(tmp_path, [record("x.mp4")], frame_cache=tmp_path / "frames")[0]
    more = make(tmp_path, [record("x.mp4")], frame_cache=tmp_path / "frames", video_options={"num_frames": 4})[0]
    assert len(more["pixel_values_videos"]) == 64
    os.utime(clip, ns=(1, 1))
    same = make(tmp_path, [record("x.mp4")], frame_cache=tmp_path / "frames")[0]
    assert_equal(same, old)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    half = make(tmp_path, [record("x.mp4")], frame_cache=tmp_path / "frames", video_options=_HALF)[0]
    assert half["pixel_values_videos"].dtype == torch.bfloat16
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


# How pixels are stored says nothing about frames, so the entry serves both.
_HALF = {"num_frames": 3, "pixel_dtype": "bfloat16"}


def test_a_damaged_entry_is_made_anew(folder, tmp_path):
    dataset = make(folder, [record("0.mp4")], frame_cache=tmp_path)
    expected = dataset[0]
    (entry,) = tmp_path.rglob("*.safetensors")
    content = entry.read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        entry.unlink()
        entry.write_bytes(damaged)
        assert_equal(dataset[0], expected)
        assert entry.read_bytes() == content


def test_bad_videos_are_not_cached(folder, tmp_path):
    dataset = make(folder, [record("cut.mp4")], frame_cache=tmp_path)
    for _ in range(2):
        with pytest.raises(MediaError, match="cut.mp4 is truncated"):
            dataset[0]
    assert not list(tmp_path.rglob("*.safetensors"))
