"""Videos to patches: which frames at which times and sizes, from files and from frames already decoded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_keye.frame_budget_keye import BICUBIC, BILINEAR, FAST, resize_pixels
from modeling_keye.video_processing_keye import KeyeVideoProcessor

from .conftest import decode_all, picture

FRAMES = np.stack([picture(index, 56, 84) for index in range(12)])


@pytest.fixture
def video_processor() -> KeyeVideoProcessor:
    return KeyeVideoProcessor()


def small(**kwargs) -> KeyeVideoProcessor:
    """Four to sixteen tokens per frame."""
    return KeyeVideoProcessor(min_pixels=4 * 784, max_pixels=16 * 784, **kwargs)


def expected_pixels(frames: list[np.ndarray], size: tuple[int, int], resample: int = BILINEAR) -> torch.Tensor:
    """Straight from the definition: resize, scale to [-1, 1], cut into squares row by row."""
    squares = []
    for frame in frames:
        resized = resize_pixels(torch.from_numpy(frame).permute(2, 0, 1)[None], size, resample)[0].float() / 127.5 - 1
        squares += [square for band in resized.split(14, dim=1) for square in band.split(14, dim=2)]
    return torch.stack(squares)


def test_a_file_by_rate(video_processor, real_clip):
    out = video_processor(real_clip("bikes"), fps=1.0, return_metadata=True)
    metadata = out["video_metadata"][0]
    indices = [0, 28, 55, 83, 111, 138, 166, 194, 221, 249]
    assert metadata.frames_indices == indices
    assert metadata.timestamps == pytest.approx([index / 25 for index in indices])
    assert (metadata.height, metadata.width, metadata.fps, metadata.total_num_frames) == (272, 640, 25.0, 250)
    assert out["video_grid_thw"].tolist() == [[10, 20, 46]] and out["video_grid_thw"].dtype == torch.int64
    frames = decode_all(real_clip("bikes"))
    torch.testing.assert_close(
        out["pixel_values_videos"], expected_pixels([frames[index] for index in indices], (280, 644))
    )


def test_a_file_by_number_and_by_default(video_processor, real_clip):
    assert video_processor(real_clip(), num_frames=3, return_metadata=True)["video_metadata"][0].frames_indices == [
        0,
        124,
        249,
    ]
    # Two frames per second, ten seconds.
    assert video_processor(real_clip())["video_grid_thw"].tolist() == [[20, 20, 46]]
    with pytest.raises(ValueError, match="mutually exclusive"):
        video_processor(real_clip(), num_frames=3, fps=1.0)
    # A rate given in the call replaces a number set before.
    assert KeyeVideoProcessor(num_frames=3)(real_clip(), fps=0.5)["video_grid_thw"][0, 0] == 5


def test_a_file_by_token_budget(real_clip):
    out = KeyeVideoProcessor()(real_clip(), max_video_tokens=640, return_metadata=True)
    assert len(out["video_metadata"][0].frames_indices) == 10
    assert len(out["pixel_values_videos"]) // 4 <= 640 + 10
    out = KeyeVideoProcessor()(real_clip(), max_video_tokens=640, min_pixels=4 * 784)
    assert out["video_grid_thw"][0, 0] == 20 and len(out["pixel_values_videos"]) // 4 <= 640 + 20
    with pytest.raises(ValueError, match="num_frames=20 needs at least 1280 tokens"):
        KeyeVideoProcessor()(real_clip(), max_video_tokens=640, num_frames=20)


def test_small_files_are_enlarged_from_what_was_decoded(video_processor, clip):
    path = clip(size=(56, 84))
    out = video_processor(path, num_frames=2)
    height, width = out["video_grid_thw"][0, 1:].tolist()
    assert height * width // 4 >= 64
    frames = decode_all(path)
    torch.testing.assert_close(
        out["pixel_values_videos"], expected_pixels([frames[0], frames[39]], (height * 14, width * 14))
    )


def test_slow_and_fast_frames_of_a_file(real_clip):
    out = KeyeVideoProcessor(family="keye_vl_1_5")(real_clip("bikes"), return_metadata=True, max_video_tokens=2000)
    metadata = out["video_metadata"][0]
    assert metadata.frame_types[0] == 0 and FAST in metadata.frame_types
    grids = {kind: {g for g, k in zip(metadata.frame_grids, metadata.frame_types) if k == kind} for kind in (0, 1)}
    assert len(grids[0]) == len(grids[1]) == 1
    (slow,), (fast,) = grids[0], grids[1]
    assert slow[0] * slow[1] > fast[0] * fast[1]
    # Neighbours of equal size share a row; the patches stay in order of time.
    rows = out["video_grid_thw"].tolist()
    assert [tuple(row[1:]) for row in rows for _ in range(row[0])] == metadata.frame_grids
    assert all(first[1:] != second[1:] for first, second in zip(rows, rows[1:]))
    frames = decode_all(real_clip("bikes"))
    expected = [
        expected_pixels([frames[index]], (grid[0] * 14, grid[1] * 14))
        for index, grid in zip(metadata.frames_indices, metadata.frame_grids)
    ]
    torch.testing.assert_close(out["pixel_values_videos"], torch.cat(expected))
    decoded = KeyeVideoProcessor(family="keye_vl_1_5")(
        [frames[index] for index in metadata.frames_indices],
        timestamps=metadata.timestamps,
        max_video_tokens=2000,
        return_metadata=True,
    )
    assert decoded["video_metadata"][0].frame_types == metadata.frame_types
    torch.testing.assert_close(decoded["pixel_values_videos"], out["pixel_values_videos"])


def test_the_preview_family(real_clip):
    out = KeyeVideoProcessor(family="keye_vl_preview")(real_clip("bikes"), num_frames=4, return_metadata=True)
    frames = decode_all(real_clip("bikes"))
    assert out["video_grid_thw"].tolist() == [[4, 20, 46]]
    chosen = [frames[index] for index in out["video_metadata"][0].frames_indices]
    torch.testing.assert_close(out["pixel_values_videos"], expected_pixels(chosen, (280, 644), BICUBIC))
    # Four frames of ten seconds.
    assert out["second_per_grid_ts"].tolist() == pytest.approx([2.5])
    assert "second_per_grid_ts" not in KeyeVideoProcessor()(real_clip("bikes"), num_frames=4)


def test_families_differ_as_their_constants_do(real_clip):
    path = real_clip("bigbuckbunny")
    grids = {
        family: KeyeVideoProcessor(family=family)(path, num_frames=10, slow_fast=False)["video_grid_thw"].tolist()
        for family in ("keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "keye_vl_2")
    }
    assert grids == {
        "keye_vl_preview": [[10, 40, 72]],
        "keye_vl_1_5": [[10, 40, 72]],
        "keye_vl_671b": [[10, 40, 72]],
        "keye_vl_2": [[10, 24, 42]],
    }


def test_adaptive_budget_and_sharing(real_clip):
    path = real_clip("bikes")
    options = {"min_pixels": 784, "max_video_tokens": 4000}
    full = len(KeyeVideoProcessor()(path, **options)["pixel_values_videos"]) / 4
    adaptive = len(KeyeVideoProcessor()(path, adaptive=True, **options)["pixel_values_videos"]) / 4
    shared = KeyeVideoProcessor()([path, path], videos_per_prompt=[2, 2], adaptive=True, **options)
    assert 0.75 * 4000 < full <= 4020 and 0.6 * 360 < adaptive <= 380
    assert 0.75 * 2000 < len(shared["pixel_values_videos"]) / 8 <= 2020


@pytest.mark.parametrize(
    "form", ["numpy", "numpy_first", "torch", "pil", "list_numpy", "list_torch", "float", "nested"]
)
def test_every_form_of_one_video_gives_the_same(form):
    tensor = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
    video = {
        "numpy": FRAMES,
        "numpy_first": FRAMES.transpose(0, 3, 1, 2),
        "torch": tensor,
        "pil": [Image.fromarray(frame) for frame in FRAMES],
        "list_numpy": list(FRAMES),
        "list_torch": list(tensor),
        "float": tensor.float() / 255,
        "nested": [[FRAMES]],
    }[form]
    out = small()(video, return_tensors="pt")
    assert out["video_grid_thw"].tolist() == [[12, 4, 6]]
    torch.testing.assert_close(out["pixel_values_videos"], expected_pixels(list(FRAMES), (56, 84)))


def test_four_channels_and_grey():
    with_alpha = np.concatenate([FRAMES, np.zeros_like(FRAMES[..., :1])], -1)
    expected = small()(FRAMES)["pixel_values_videos"]
    assert torch.equal(small()(with_alpha)["pixel_values_videos"], expected)
    assert torch.equal(small()([Image.fromarray(frame) for frame in with_alpha])["pixel_values_videos"], expected)
    grey = small()(list(FRAMES[..., 0]))["pixel_values_videos"]
    assert torch.equal(grey[:, 0], grey[:, 2])


INTEGERS = "the integers of a frame must lie within 0 to 255, but this one"
FLOATS = "the floats of a frame must lie within 0 to 1 or 0 to 255, but this one holds"


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda f: f.astype(np.uint16) * 256,
            rf"{INTEGERS} \(torch.uint16\) holds 0 to 65280; scale it to uint8 first",
        ),
        (lambda f: f.astype(np.int16) - 1, rf"{INTEGERS} \(torch.int16\) holds -1 to 254"),
        (lambda f: f.astype(np.int64) + 1, rf"{INTEGERS} \(torch.int64\) holds 1 to 256"),
        (lambda f: (f / 127.5 - 1).astype(np.float32), f"{FLOATS} -1 to 1; scale or clip it first"),
        (lambda f: f * 257.0, f"{FLOATS} 0 to 65535"),
        (lambda f: np.where(f == 255, np.nan, f / 255), "floats of a frame must be finite, .* are nan and nan"),
        (lambda f: np.where(f == 255, np.inf, f / 255), "floats of a frame must be finite, .* are 0.0 and inf"),
    ],
)
def test_values_of_another_range_are_refused(change, sentence, tensor):
    frames = change(np.where(FRAMES == 0, 0, np.maximum(FRAMES, 1)).astype(np.uint8)[:2])
    frames[0, 20, 20] = change(np.array([0, 255, 255], np.uint8))
    with pytest.raises(ValueError, match=sentence):
        small()(torch.from_numpy(frames) if tensor else frames)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "int32", "int64", "float16", "float32"])
def test_values_up_to_255_of_other_dtypes_are_taken(dtype):
    frames = FRAMES // 2
    torch.testing.assert_close(
        small()(frames.astype(dtype))["pixel_values_videos"], small()(frames)["pixel_values_videos"]
    )


def test_false_is_black_and_true_is_white():
    expected = small()((FRAMES > 128).astype(np.uint8) * 255)["pixel_values_videos"]
    assert torch.equal(small()(FRAMES > 128)["pixel_values_videos"], expected)


def test_unscaled_floats_may_have_any_range_but_no_nan():
    options = {"do_rescale": False, "do_normalize": False}
    out = small()((FRAMES / 127.5 - 1).astype(np.float32), **options)["pixel_values_videos"]
    torch.testing.assert_close(out, expected_pixels(list(FRAMES), (56, 84)))
    with pytest.raises(ValueError, match="must be finite"):
        small()(np.full((1, 56, 84, 3), np.nan, np.float32), **options)


@pytest.mark.parametrize("dtype, mode", [("<u2", "I;16"), (">u2", "I;16B")])
def test_pil_images_of_16_bits_are_scaled(dtype, mode):
    grey = FRAMES[..., 1]
    images = [Image.frombytes(mode, (84, 56), (frame.astype(dtype) * 257).astype(dtype).tobytes()) for frame in grey]
    expected = small()(list(grey))["pixel_values_videos"]
    assert torch.equal(small()(images)["pixel_values_videos"], expected)


def test_pil_images_without_a_known_white_are_checked():
    grey = FRAMES[..., 1]
    expected = small()(list(grey))["pixel_values_videos"]
    for values in (grey.astype(np.int32), grey.astype(np.float32), grey.astype(np.float32) / 255):
        assert torch.equal(small()([Image.fromarray(frame) for frame in values])["pixel_values_videos"], expected)
    with pytest.raises(ValueError, match=rf"{INTEGERS} \(torch.int32\) holds .* to 65\d+; scale it to uint8 first"):
        small()([Image.fromarray(frame.astype(np.int32) * 257) for frame in grey])
    with pytest.raises(ValueError, match=f"{FLOATS} .* to 510"):
        small()([Image.fromarray(frame.astype(np.float32) * 2) for frame in grey])


def test_a_frame_without_pixels_is_refused():
    with pytest.raises(ValueError, match=r"at least one pixel, got shape \(3, 0, 84\)"):
        small()(FRAMES[:, :0])


def test_times_of_decoded_frames():
    def times(**kwargs):
        metadata = small()(FRAMES, return_metadata=True, **kwargs)["video_metadata"][0]
        return metadata.frames_indices, metadata.timestamps

    everything = list(range(12))
    assert times() == (everything, None)
    # The rate of the frames themselves, as nothing else is known.
    assert times(fps=4.0) == (everything, [index / 4 for index in everything])
    seconds = [index * 1.5 for index in everything]
    assert times(timestamps=seconds) == (everything, seconds)
    assert times(timestamps=[seconds], fps=1.0) == (everything, seconds)
    known = {"fps": 4.0, "total_num_frames": 12}
    assert times(video_metadata=[known]) == ([0, 2, 4, 7, 9, 11], [0.0, 0.5, 1.0, 1.75, 2.25, 2.75])
    assert times(video_metadata=known, fps=1.0)[0] == [0, 6, 11]
    already = {"fps": 10.0, "total_num_frames": 1200, "frames_indices": [100 * index for index in everything]}
    assert times(video_metadata=[already])[1] == [10.0 * index for index in everything]
    assert times(num_frames=3, timestamps=seconds) == ([0, 6, 11], [0.0, 9.0, 16.5])
    assert times(video_metadata=[known], do_sample_frames=False)[0] == everything
    # More frames than the budget can hold are thinned out, and the times say which stayed.
    assert times(timestamps=seconds, max_video_tokens=12) == ([0, 6, 11], [0.0, 9.0, 16.5])


@pytest.mark.parametrize(
    "form", [list, tuple, np.asarray, torch.tensor, lambda times: [torch.tensor(t) for t in times]]
)
def test_times_in_every_form(form):
    seconds = [index * 0.5 for index in range(12)]
    for given in (form(seconds), [form(seconds)]):
        metadata = small()(FRAMES, timestamps=given, return_metadata=True)["video_metadata"][0]
        assert metadata.timestamps == seconds
    both = small()([FRAMES, FRAMES], timestamps=[form(seconds), None], return_metadata=True)["video_metadata"]
    assert [metadata.timestamps for metadata in both] == [seconds, None]


ORDER = "must be .* or more: none may be negative or lower than the one before"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"timestamps": [float("nan")] * 12}, "timestamps holds nan for frame 0, which must be a finite number"),
        ({"timestamps": [*range(11), float("inf")]}, "timestamps holds inf for frame 11"),
        ({"timestamps": ["0"] * 12}, "timestamps holds '0' for frame 0"),
        ({"timestamps": range(-3, 9)}, f"timestamps holds -3 for frame 0, which {ORDER}"),
        ({"timestamps": range(12, 0, -1)}, f"timestamps holds 11 for frame 1, which {ORDER}"),
        ({"timestamps": 3.0}, "timestamps=3.0 must be a list with one number per frame"),
        ({"video_metadata": {"frame_times": [*range(11), 2]}}, "timestamps holds 2 for frame 11"),
        ({"video_metadata": {"fps": -1}}, "video_metadata fps=-1 must be a positive number of frames per second"),
        ({"video_metadata": {"fps": 0}}, "video_metadata fps=0 must"),
        ({"video_metadata": {"fps": "1"}}, "video_metadata fps='1' must"),
        (
            {"video_metadata": {"fps": 1, "frames_indices": range(-1, 11)}},
            f"frames_indices holds -1 for frame 0.* {ORDER}",
        ),
        (
            {"video_metadata": {"fps": 1, "frames_indices": [*range(11), 3]}},
            f"frames_indices holds 3 for frame 11.* {ORDER}",
        ),
        ({"video_metadata": {"fps": 1, "frames_indices": [0.5] * 12}}, "frames_indices holds 0.5 .* a whole number"),
        ({"video_metadata": {"fps": 1, "frames_indices": 3}}, "frames_indices=3 must be a list"),
        ({"fps": "1"}, "fps='1' must be a positive number of frames per second"),
        ({"fps": float("nan")}, "fps=nan must"),
        ({"fps": float("inf")}, "fps=inf must"),
        ({"num_frames": "3"}, "num_frames='3' must be a positive whole number of frames"),
        ({"num_frames": 2.5}, "num_frames=2.5 must be a positive whole number of frames"),
        ({"fps": 2.0, "max_frames": 2.5}, "max_frames=2.5 must be a positive whole number of frames"),
        ({"min_pixels": -1}, "min_pixels=-1 must be a positive number of pixels"),
        ({"max_pixels": 0}, "max_pixels=0 must be a positive number of pixels"),
    ],
)
def test_wrong_times_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        small()(FRAMES, **options)


def test_times_tell_the_rate():
    def rate_and_duration(**options):
        metadata = small()(FRAMES, return_metadata=True, **options)["video_metadata"][0]
        return metadata.fps, metadata.duration

    seconds = list(range(12))
    assert rate_and_duration(timestamps=seconds, fps=0.5) == rate_and_duration(timestamps=seconds) == (1.0, 12.0)
    assert rate_and_duration(timestamps=[0] * 12, fps=0.5) == (None, None)
    numbered = {"frames_indices": [10 * index for index in range(12)], "total_num_frames": 120}
    assert rate_and_duration(timestamps=seconds, video_metadata=[numbered]) == (10.0, 12.0)
    # Which of the 120 frames these are is not known.
    assert rate_and_duration(timestamps=seconds, fps=0.5, video_metadata=[{"total_num_frames": 120}]) == (None, None)


def test_every_frame_of_a_file_leaves_nothing_for_a_rate(clip):
    path = clip(size=(56, 84))
    for fps in (1.0, [1.0]):
        with pytest.raises(ValueError, match="do_sample_frames=False looks at every frame of .*clip.mp4, .* fps=1.0"):
            small()([path], do_sample_frames=False, fps=fps)
    # A rate that the processor was saved with is only a default.
    assert small(fps=1.0)(path, do_sample_frames=False)["video_grid_thw"][:, 0].sum() == 40
    assert small()(FRAMES, do_sample_frames=False, fps=1.0)["video_grid_thw"][:, 0].sum() == 12


@pytest.mark.parametrize("options", [{"timestamps": [0.0, 1.0]}, {"video_metadata": {"fps": 4.0}}])
def test_a_file_says_its_times_itself(clip, options):
    path, name = clip(size=(56, 84)), next(iter(options))
    with pytest.raises(ValueError, match=f"{name} was given for .*clip.mp4, but a file says its times itself; leave"):
        small()(path, **options)
    seconds = [0.5 * index for index in range(12)]
    mixed = {"timestamps": [seconds, None]} if name == "timestamps" else {"video_metadata": [{"fps": 2.0}, None]}
    metadata = small()([FRAMES, path], return_metadata=True, **mixed)["video_metadata"]
    assert metadata[0].timestamps == seconds and metadata[1].fps == 10.0


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="12 frames were given, but timestamps has 3 entries"):
        small()(FRAMES, timestamps=[0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="1 videos were given, but video_metadata has 2 entries"):
        small()(FRAMES, video_metadata=[{"fps": 1.0}, {"fps": 1.0}])
    with pytest.raises(ValueError, match="2 videos were given, but fps has 1 entries"):
        small()([FRAMES, FRAMES], fps=[1.0])


def test_bad_videos_are_refused():
    with pytest.raises(ValueError, match="a video of type dict is not understood"):
        small()({"frames": 3})
    with pytest.raises(ValueError, match="the list of videos is empty"):
        small()([])
    with pytest.raises(ValueError, match="3 or 4 channels|1, 3 or 4 channels"):
        small()(np.zeros((2, 30, 30, 7), np.uint8))
    with pytest.raises(ValueError, match="frame 0 has 56 x 84 pixels and frame 1 84 x 56; crop or resize them first"):
        small()([FRAMES[0], FRAMES[1].transpose(1, 0, 2)])
    with pytest.raises(ValueError, match="fps=-1"):
        small()(FRAMES, fps=-1)
    with pytest.raises(ValueError, match="pixel_dtype='int8'"):
        small(pixel_dtype="int8")(FRAMES)
    with pytest.raises(ValueError, match="size is not supported; limit the area with min_pixels"):
        small()(FRAMES, size={"height": 56, "width": 56})
    with pytest.raises(ValueError, match="multiples of 28, got 30 x 30"):
        small()(np.zeros((2, 30, 30, 3), np.uint8), do_resize=False)


def test_several_videos_never_share_a_row(clip):
    out = small()([FRAMES, FRAMES[:3], clip(size=(56, 84))], num_frames=3, return_metadata=True)
    assert out["video_grid_thw"].tolist() == [[3, 4, 6]] * 3
    assert [metadata.source is None for metadata in out["video_metadata"]] == [True, True, False]
    single = [small()(video, num_frames=3)["pixel_values_videos"] for video in (FRAMES, FRAMES[:3])]
    torch.testing.assert_close(out["pixel_values_videos"][:144], torch.cat(single))


def test_a_rate_per_video(clip):
    out = small()([clip(), clip("other.mp4")], fps=[1.0, 2.0])
    assert out["video_grid_thw"][:, 0].tolist() == [4, 8]


def test_progress_and_metadata_are_plain(clip):
    steps = []
    out = small()(clip(), num_frames=4, progress=lambda done, total: steps.append((done, total)), return_metadata=True)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert json.loads(json.dumps(dict(out["video_metadata"][0])))["frames_indices"] == [0, 13, 26, 39]
    assert out["video_metadata"][0]["timestamps"] == pytest.approx([0.0, 1.3, 2.6, 3.9])


def test_helpers_agree_with_the_call(video_processor):
    for shape in ((3, 100, 200), (12, 56, 84)):
        out = video_processor(np.zeros((*shape, 3), np.uint8))
        assert video_processor.get_num_of_video_patches(*shape) == len(out["pixel_values_videos"])
    assert video_processor.get_num_of_video_patches(3, 300, 600, {"max_pixels": 72 * 784}) == 3 * 12 * 24
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=30, fps=10.0)
    assert video_processor.sample_frames(metadata).tolist() == [0, 6, 12, 17, 23, 29]
    assert video_processor.sample_frames(metadata, num_frames=2).tolist() == [0, 29]


def test_dtype_and_tensors():
    assert small(pixel_dtype="bfloat16")(FRAMES)["pixel_values_videos"].dtype == torch.bfloat16
    assert isinstance(small()(FRAMES, return_tensors="np")["pixel_values_videos"], np.ndarray)
    assert small()(FRAMES, device="cpu")["pixel_values_videos"].device.type == "cpu"
    assert small()(FRAMES).to(torch.float16)["pixel_values_videos"].dtype == torch.float16


def test_save_and_load(tmp_path):
    before = small(family="keye_vl_1_5", fps=1.0, max_video_tokens=5000, adaptive=True)
    before.save_pretrained(tmp_path)
    after = KeyeVideoProcessor.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict()
    assert (after.family, after.fps, after.max_video_tokens, after.adaptive) == ("keye_vl_1_5", 1.0, 5000, True)
    assert after.to_dict()["video_processor_type"] == "KeyeVideoProcessor"
    assert KeyeVideoProcessor.from_dict(before.to_dict(), fps=3.0).fps == 3.0
    assert KeyeVideoProcessor().fps is None and KeyeVideoProcessor().family == "keye_vl_2"
    assert KeyeVideoProcessor.model_input_names == ["pixel_values_videos", "video_grid_thw"]


def test_defaults_are_not_shared():
    first, second = KeyeVideoProcessor(), KeyeVideoProcessor()
    assert isinstance(first.image_mean, tuple) or first.image_mean is not second.image_mean
    first.family = "keye_vl_1_5"
    assert second.family == KeyeVideoProcessor.family == "keye_vl_2"
