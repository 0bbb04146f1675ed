"""Sampling, resizing and budgets against numbers worked out from the published rules."""

import colorsys

import numpy as np
import pytest
import torch

from modeling_keye.frame_budget_keye import (
    BICUBIC,
    BILINEAR,
    FAMILIES,
    FAST,
    SLOW,
    SlowFastSorter,
    adaptive_total_tokens,
    choose_frame_count,
    family_budget,
    frame_sizes,
    resize_pixels,
    rgb_to_hsv,
    smart_resize,
    spread_indices,
)

TOKEN = 28 * 28


@pytest.mark.parametrize(
    "size, expected",
    [((480, 640), (476, 644)), ((1080, 1920), (728, 1316)), ((20, 100), (28, 140)), ((42, 42), (56, 56))],
)
def test_smart_resize_of_the_preview_processor(size, expected):
    assert smart_resize(*size, 3136, 1_003_520, rule="processor") == expected


def test_smart_resize_enlarges_to_the_minimum():
    assert smart_resize(100, 100, 102400, 1_003_520, rule="processor") == (336, 336)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (476, 644)),
        ((1080, 1920), (1092, 1932)),
        ((20, 100), (28, 112)),
        ((42, 42), (56, 56)),
        ((4000, 6000), (3248, 4900)),
        ((70, 70), (56, 56)),
    ],
)
def test_smart_resize_of_the_utils(size, expected):
    assert smart_resize(*size, 4 * TOKEN, 20480 * TOKEN) == expected


@pytest.mark.parametrize("rule", ["processor", "utils"])
def test_smart_resize_limits_hold_and_bad_shapes_are_refused(rule):
    for height, width in ((7, 1000), (1, 150), (333, 77), (5000, 30)):
        new_height, new_width = smart_resize(height, width, 4 * TOKEN, 64 * TOKEN, rule=rule)
        assert new_height % 28 == new_width % 28 == 0 and new_height > 0 and new_width > 0
    with pytest.raises(ValueError, match="too elongated"):
        smart_resize(28, 28 * 201, 4 * TOKEN, 64 * TOKEN, rule=rule)
    with pytest.raises(ValueError, match="must be positive"):
        smart_resize(0, 10, 4 * TOKEN, 64 * TOKEN, rule=rule)


@pytest.mark.parametrize(
    "slow, fast, expected", [(10, 20, ((560, 1008), (308, 532))), (200, 200, ((308, 588), (168, 308)))]
)
def test_sizes_of_slow_and_fast_frames(slow, fast, expected):
    assert frame_sizes(family_budget("keye_vl_1_5"), 720, 1280, 65536, slow, fast) == expected
    assert FAMILIES["keye_vl_671b"] == FAMILIES["keye_vl_1_5"]


@pytest.mark.parametrize(
    "frames, expected",
    [(20, (336, 588)), (720, (336, 588)), (721, (336, 588)), (1000, (280, 504)), (2880, (168, 280))],
)
def test_sizes_of_keye_2(frames, expected):
    assert frame_sizes(family_budget("keye_vl_2"), 720, 1280, 184320, frames)[0] == expected


@pytest.mark.parametrize("seconds, frames, expected", [(60, 120, (224, 420)), (300, 518, (168, 280))])
def test_adaptive_budget(seconds, frames, expected):
    budget = family_budget("keye_vl_2")
    total = adaptive_total_tokens(budget.total_tokens, seconds)
    count = choose_frame_count(budget, seconds * 25, 25.0, total)
    assert count == frames
    assert frame_sizes(budget, 720, 1280, total, count)[0] == expected


@pytest.mark.parametrize("side", [110, 123, 300, 1080])
def test_limits_that_leave_one_size_give_that_size(side):
    assert smart_resize(side, side, 4 * TOKEN, 4 * TOKEN) == (56, 56)


def test_adaptive_shares():
    shares = [adaptive_total_tokens(100, seconds) for seconds in (259, 260, 519, 1037, 2017)]
    assert shares == pytest.approx([9, 18, 36, 70, 100])


def test_sizes_of_the_preview_model():
    budget = family_budget("keye_vl_preview")
    # Few frames: the largest frame. Many: 115200 tokens / 768 frames * 2 = 300 tokens each.
    assert frame_sizes(budget, 720, 1280, 115200, 16)[0] == smart_resize(720, 1280, 128 * TOKEN, 768 * TOKEN)
    assert frame_sizes(budget, 720, 1280, 115200, 768)[0] == smart_resize(720, 1280, 128 * TOKEN, 300 * TOKEN)


def test_frame_indices():
    assert spread_indices(30, 6) == [0, 6, 12, 17, 23, 29]
    assert spread_indices(300, 7) == [0, 50, 100, 150, 199, 249, 299]
    assert spread_indices(5, 1) == [0]


@pytest.mark.parametrize(
    "family, total, fps, expected",
    [
        ("keye_vl_2", 250, 25.0, 20),
        ("keye_vl_2", 5, 25.0, 2),
        ("keye_vl_2", 1, 25.0, 1),
        ("keye_vl_2", 10, 1.0, 10),
        ("keye_vl_2", 10**6, 25.0, 2880),
        ("keye_vl_2", 7, None, 7),
        ("keye_vl_1_5", 250, 25.0, 20),
        ("keye_vl_1_5", 5, 25.0, 1),
        ("keye_vl_1_5", 10**6, 25.0, 1365),
        ("keye_vl_preview", 270, 25.0, 20),
        ("keye_vl_preview", 20, 25.0, 4),
        ("keye_vl_preview", 3, 25.0, 2),
        ("keye_vl_preview", 1, 25.0, 1),
        ("keye_vl_preview", 10**6, 25.0, 768),
    ],
)
def test_number_of_frames(family, total, fps, expected):
    budget = family_budget(family)
    assert choose_frame_count(budget, total, fps, budget.total_tokens) == expected


def test_number_of_frames_by_hand():
    assert choose_frame_count(family_budget("keye_vl_2"), 250, 25.0, 184320, num_frames=9) == 9
    assert choose_frame_count(family_budget("keye_vl_2"), 5, 25.0, 184320, num_frames=9) == 5
    assert choose_frame_count(family_budget("keye_vl_preview"), 250, 25.0, 115200, num_frames=9) == 8
    with pytest.raises(ValueError, match="num_frames=5000 needs at least 320000 tokens"):
        choose_frame_count(family_budget("keye_vl_2"), 10**6, 25.0, 184320, num_frames=5000)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="family='keye_vl_9' is unknown; choose one of keye_vl_preview"):
        family_budget("keye_vl_9")
    with pytest.raises(ValueError, match="min_pixels and max_pixels"):
        family_budget("keye_vl_2", frame_min_tokens=300)
    with pytest.raises(ValueError, match="max_video_tokens=10 is less"):
        family_budget("keye_vl_2", total_tokens=10)


def test_hsv_in_opencv_ranges():
    frame = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8)
    frame[:, 0, 0] = 0
    frame[:, 0, 1] = 200
    hue, saturation, value = rgb_to_hsv(frame).permute(0, 2, 1).reshape(3, -1)
    pixels = frame.permute(2, 1, 0).reshape(-1, 3).numpy() / 255
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels])
    difference = np.abs(hue.numpy() - expected[:, 0] * 180)
    assert np.minimum(difference, 180 - difference).max() <= 0.51 and hue.max() < 180
    np.testing.assert_allclose(saturation.numpy(), expected[:, 1] * 255, atol=0.51)
    np.testing.assert_allclose(value.numpy(), expected[:, 2] * 255, atol=1e-3)


def test_slow_and_fast_frames():
    scene = torch.zeros(3, 224, 224, dtype=torch.uint8)
    scene[:, ::2] = 200
    other = 200 - scene
    sort = SlowFastSorter(0.9)
    nearly = (scene.int() + 2).clamp(0, 255).to(torch.uint8)
    assert [sort(frame) for frame in (scene, nearly, scene, other, other, scene)] == [
        SLOW,
        FAST,
        FAST,
        SLOW,
        FAST,
        SLOW,
    ]
    black = torch.zeros(3, 224, 224, dtype=torch.uint8)
    sort = SlowFastSorter(0.9)
    assert [sort(frame) for frame in (black, black, scene)] == [SLOW, FAST, SLOW]


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
def test_resizing_follows_pillow(resample):
    from PIL import Image

    rows, columns = np.mgrid[0:90, 0:120]
    frame = np.stack([rows * 2, columns * 2, (rows + columns) % 256], -1).astype(np.uint8)
    got = resize_pixels(torch.from_numpy(frame).permute(2, 0, 1)[None], (56, 84), resample)[0].permute(1, 2, 0)
    expected = np.array(Image.fromarray(frame).resize((84, 56), resample))
    assert got.dtype == torch.uint8
    assert np.abs(got.numpy().astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="resample=1 is not supported"):
        resize_pixels(torch.zeros(1, 3, 4, 4), (2, 2), 1)
