"""Plans of long clips and the questions about them."""

import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from training.long_videos import (
    LONG_KINDS,
    LongQuestions,
    log_uniform,
    make_long_clip,
    make_long_questions,
)
from training.synthetic_videos import COLOURS, PLURALS, SHAPES, Clip


def _named(words: list[str]) -> list[str]:
    """The "colour shape" names in a question, in order."""
    return [f"{a} {b}" for a, b in zip(words, words[1:]) if a in COLOURS and b in SHAPES]


def _answer(clip: Clip, text: str) -> tuple[str, int]:
    """Answer and distance, found from the words of the question alone and by looking at every frame."""
    words = re.sub(r"[?,]", "", text.lower().replace("colour", "color")).split()
    frames = [(index, f"{float(index / clip.fps):.1f}", thing) for index, thing in enumerate(clip.things) if thing]
    at = {time: (index, thing) for index, time, thing in frames}
    end = len(clip.things) - 1
    stamps = [word for word in words if re.fullmatch(r"\d+\.\d", word)]
    names = _named(words)
    if words[:2] == ["how", "many"]:
        counted = sum(words[2] in (thing.colour, PLURALS[thing.shape]) for *_, thing in frames)
        return str(counted), end - frames[0][0]
    if stamps and names:
        index, thing = at[stamps[0]]
        return ("yes" if thing.name == names[0] else "no"), end - index
    if len(stamps) == 2 or "end" in words or "last shape" in text:
        (one, first), (other, second) = sorted([at[stamp] for stamp in stamps] + [frames[-1][::2]] * (2 - len(stamps)))
        if "change" in words or "was" in words:
            return f"{first.name} to {second.name}", other - one
        return f"{first.name} {second.name} {'yes' if first.name == second.name else 'no'}", other - one
    if stamps:
        index, thing = at[stamps[0]]
        return (thing.colour if "color" in words else thing.shape), end - index
    places = [[place for place, _, thing in frames if thing.name == name] for name in names]
    if len(names) == 2:
        assert len(places[0]) == len(places[1]) == 1
        return names[places[0] > places[1]], end - min(*places[0], *places[1])
    index = places[0][-1 if "last" in words else 0]
    return clip.time(index), end - index


def test_every_answer_and_distance_equals_a_recount_of_the_frames():
    rng = np.random.default_rng(5)
    kinds = Counter()
    for _ in range(60):
        frames = log_uniform(rng, 16, 20_000)
        clip = make_long_clip(rng, frames, int(rng.integers(2, min(frames, 60))))
        for question in make_long_questions(clip, rng, 27):
            assert _answer(clip, question.text) == (question.answer, question.distance), (question, frames)
            kinds[question.kind] += 1
    assert set(kinds) == set(LONG_KINDS) and min(kinds.values()) > 60


def test_pairs_stand_at_the_wanted_distances_and_the_first_ends_the_clip():
    distances = (9_900, 100, 5_000)
    clip = make_long_clip(np.random.default_rng(1), 10_000, 61, distances)
    assert len(clip.things) == 10_000 and clip.things[-1] and clip.things[-1 - 9_900]
    assert sum(thing is not None for thing in clip.things) in (60, 61)
    questions = LongQuestions(clip, np.random.default_rng(2))
    for distance in distances:
        assert len(questions.pairs(distance)) >= 9
        for kind in ("identity", "change"):
            asked = [questions.ask(kind, distance) for _ in range(20)]
            assert {question.distance for question in asked} == {distance}


@pytest.mark.parametrize("distance", [None, 40])
def test_neither_yes_nor_no_is_the_better_guess(distance):
    rng = np.random.default_rng(3)
    expected = Counter()
    for _ in range(40):
        clip = make_long_clip(rng, 400, 20, (40,))
        questions = LongQuestions(clip, rng)
        expected.update(questions.ask("identity", distance).answer.split()[-1] for _ in range(10))
    assert 0.42 < expected["yes"] / 400 < 0.58 and expected["yes"] + expected["no"] == 400


def test_kinds_that_a_clip_has_no_question_for_are_left_out():
    clip = make_long_clip(np.random.default_rng(4), 2, 2, fps=Fraction(1))
    questions = LongQuestions(clip, np.random.default_rng(0))
    assert questions.ask("identity", 7) is None and questions.ask("identity", 1).distance == 1
    asked = make_long_questions(clip, np.random.default_rng(0), 40)
    assert len(asked) == len(set(asked)) < 40


def test_questions_apart_name_no_time_twice():
    clip = make_long_clip(np.random.default_rng(2), 2_000, 16)
    kinds = ("identity", "change", "check", "what")

    def named(apart: bool) -> tuple[int, list[str]]:
        found = make_long_questions(clip, np.random.default_rng(0), 8, kinds, apart)
        return len(found), [time for question in found for time in question.about if time[0].isdigit()]

    number, times = named(True)
    assert number >= 6 and len(times) == len(set(times))
    number, times = named(False)
    assert number == 8 and len(times) > len(set(times))


def test_plans_and_questions_are_functions_of_the_seed():
    first, again = (make_long_clip(np.random.default_rng(9), 500, 12) for _ in range(2))
    assert first == again != make_long_clip(np.random.default_rng(10), 500, 12)
    questions, same = (make_long_questions(first, np.random.default_rng(1), 12) for _ in range(2))
    assert questions == same


@pytest.mark.parametrize(
    ("frames", "shown", "distances"), [(1, 2, ()), (10, 11, ()), (20_001, 5, ()), (50, 1, ()), (50, 4, (50,))]
)
def test_a_clip_that_is_too_short_is_refused(frames, shown, distances):
    with pytest.raises(ValueError, match=f"{shown} shapes at distances .* do not fit into {frames} frames"):
        make_long_clip(np.random.default_rng(0), frames, shown, distances)


def test_no_clip_outlasts_the_times_that_the_tokenizer_knows():
    rng = np.random.default_rng(6)
    rates = {make_long_clip(rng, 20_000, 2).fps for _ in range(20)}
    assert all(19_999 / rate < 20_000 for rate in rates) and len(rates) == 2
