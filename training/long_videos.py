"""Long synthetic clips, 16 to 20,000 frames, and questions whose answers lie far apart.

A long clip is a `Clip` of empty frames with single shapes far between them (needles and distractors alike: which one
a question needs is not known when the video is read). Questions are drawn, not enumerated, because pairs of shapes are
too many. `Question.distance` counts the frames between the two shapes that a question compares, or between the shape
that it asks for and the end of the clip.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np

from .synthetic_videos import (
    BACKGROUNDS,
    COLOURS,
    FRAME_RATES,
    MAX_COUNT,
    PLURALS,
    SHAPES,
    TEMPLATES,
    Clip,
    Question,
    Thing,
)

MAX_FRAMES = 20_000
# How often a question is drawn again when it names what another one names already.
APART_TRIES = 8
# identity: is it the same one? The answer names the earlier shape and the later one, then says yes or no: "red star
# blue star no". change: what was it, what did it become? check: is it this one? first, last: when? earlier: which?
LONG_KINDS = ("identity", "change", "check", "first", "last", "earlier", "count", "what", "colour")
YES, NO = "yes", "no"

LONG_TEMPLATES: dict[str, tuple[str, ...]] = {
    # In the order of time, as the answer is: the other way round, one in six later shapes was looked up by color alone.
    "identity": (
        "Is the shape at {early} seconds the one at {late} seconds?",
        "Is the shape at {early} seconds the same as at {late} seconds?",
        "Same shape at {early} as at {late}?",
    ),
    "end": (
        "Is the shape at the end the one at {early} seconds?",
        "Is the last shape the one at {early} seconds?",
    ),
    "change": (
        "How did the shape change from {early} seconds to {late} seconds?",
        "What was the shape at {early} seconds and at {late} seconds?",
        "Change from {early} to {late}?",
    ),
    "check": (
        "Is the shape at {time} seconds a {thing}?",
        "Is a {thing} shown at {time} seconds?",
        "Is the shape at {time} the {thing}?",
    ),
    "first": ("When does the {thing} first appear?", "When is the {thing} first shown?"),
    "last": ("When does the {thing} last appear?", "When is the {thing} last shown?"),
    "earlier": ("Which appears first, the {thing} or the {other}?", "Which is first, the {thing} or the {other}?"),
}
BECAME = "to"


def draw_thing(rng: np.random.Generator, colour: str | None = None, shape: str | None = None) -> Thing:
    """A shape at a random place; colour and shape are drawn unless given."""
    size = rng.uniform(24, 44) / 56
    x, y = rng.uniform(size / 2, 1 - size / 2, 2)
    colour = str(rng.choice(list(COLOURS))) if colour is None else colour
    shape = str(rng.choice(SHAPES)) if shape is None else shape
    return Thing(colour, shape, float(x), float(y), float(size), float(rng.uniform(0.85, 1.0)))


def resembling(rng: np.random.Generator, thing: Thing) -> Thing:
    """Half of the time the same colour and shape; else another one, which mostly shares one of the two."""
    change = rng.choice(["nothing", "color", "shape", "both"], p=[0.5, 0.2, 0.2, 0.1])
    colour = str(rng.choice([c for c in COLOURS if c != thing.colour])) if change in ("color", "both") else thing.colour
    shape = str(rng.choice([s for s in SHAPES if s != thing.shape])) if change in ("shape", "both") else thing.shape
    return draw_thing(rng, colour, shape)


def make_long_clip(
    rng: np.random.Generator,
    frames: int,
    shown: int,
    distances: tuple[int, ...] = (),
    fps: Fraction | None = None,
) -> Clip:
    """Draw the plan of a clip of `frames` frames, of which `shown` show a shape; the last one always does.

    Shapes come in pairs that resemble each other (`resembling`), so that asking whether two are the same is not
    answered by how common shapes are. `distances` are the frames between the two of a pair, in turn; without it they
    are drawn.
    Raises `ValueError` when the clip is too short.
    """
    if not 2 <= shown <= frames <= MAX_FRAMES or any(distance >= frames for distance in distances):
        raise ValueError(
            f"{shown} shapes at distances {distances or 'of any length'} do not fit into {frames} frames; a clip has 2 "
            f"to {MAX_FRAMES} frames."
        )
    places: dict[int, Thing] = {}
    last = frames - 1
    pending = list(distances) or [0]
    for number in range(10 * shown):
        if len(places) >= shown - 1:
            break
        distance = pending[number % len(pending)] or int(rng.integers(1, frames))
        # The first pair ends with the clip, for the questions about its end.
        early = last - distance if number == 0 else int(rng.integers(0, frames - distance))
        late = early + distance
        if early in places or late in places:
            continue
        places[early] = draw_thing(rng)
        places[late] = resembling(rng, places[early])
    places.setdefault(last, draw_thing(rng))
    if fps is None:
        rates = [rate for rate in FRAME_RATES if frames / rate <= MAX_FRAMES]
        fps = rates[rng.integers(len(rates))]
    background = str(rng.choice(BACKGROUNDS, p=[0.4, 0.35, 0.25]))
    things = tuple(places.get(index) for index in range(frames))
    return Clip(things, fps, background, int(rng.integers(2**31)))


def make_alike_clip(rng: np.random.Generator, frames: int, shown: int) -> Clip:
    """A clip of at most `frames` frames whose shapes all stand a multiple of a hundred seconds apart.

    The second tokens of their times are the same ("12¦ 04.5", "97¦ 04.5"): what tells them apart is the hundreds alone.
    Raises `ValueError` when there is no room for that.
    """
    rates = [rate for rate in FRAME_RATES if shown <= frames // (100 * rate) and frames / rate <= MAX_FRAMES]
    if not rates:
        raise ValueError(f"{frames} frames hold no {shown} shapes a hundred seconds apart.")
    fps = rates[rng.integers(len(rates))]
    step = int(100 * fps)
    clip = make_long_clip(rng, frames // step, shown, fps=fps)
    # Empty frames before the first and between all; the last one still shows a shape.
    things = [None] * int(rng.integers(step))
    for thing in clip.things:
        things += [thing, *[None] * (step - 1)]
    return replace(clip, things=tuple(things[: 1 - step]))


def draw_clip(rng: np.random.Generator, frames: int, shown: int, alike: float = 0.0, ends: float = 0.0) -> Clip:
    """A clip of shapes at random places or, in a share of `alike` where there is room, of `make_alike_clip`.

    In a share of `ends` half of the pairs span the clip, one shape in its first hundred frames and one in its last
    hundred, and half a tenth of it.
    """
    if alike and shown <= frames // 200 and rng.random() < alike:
        return make_alike_clip(rng, frames, shown)
    if ends and shown <= frames // 10 and rng.random() < ends:
        return make_long_clip(rng, frames, shown, (frames - min(100, frames // 2), frames // 10))
    return make_long_clip(rng, frames, shown)


class LongQuestions:
    """Draws questions about one clip."""

    def __init__(self, clip: Clip, rng: np.random.Generator):
        self.rng = rng
        self.times = clip.times
        self.end = len(clip.things) - 1
        self.shown = [(index, thing) for index, thing in enumerate(clip.things) if thing]
        self.names = Counter(thing.name for _, thing in self.shown)
        self.counts = Counter(thing.colour for _, thing in self.shown)
        self.counts.update(thing.shape for _, thing in self.shown)

    def ask(self, kind: str, distance: int | None = None) -> Question | None:
        """One question of a kind, None when the clip has none; `distance` is wanted of the kinds that compare."""
        drawn = getattr(self, f"_{kind}")(*(() if distance is None else (distance,)))
        if drawn is None:
            return None
        template, fields, answer, distance = drawn
        texts = LONG_TEMPLATES.get(template) or TEMPLATES[template]
        text = texts[self.rng.integers(len(texts))].format(**fields)
        return Question(kind, text, answer, distance, tuple(fields.values()))

    def pairs(self, distance: int | None = None) -> list[tuple[int, int]]:
        """Places in `shown` of two shapes, `distance` frames apart when given."""
        indices = [index for index, _ in self.shown]
        if distance is not None:
            found = []
            for place, index in enumerate(indices):
                other = bisect_left(indices, index + distance)
                if other < len(indices) and indices[other] == index + distance:
                    found.append((place, other))
            return found
        first, second = sorted(int(place) for place in self.rng.choice(len(indices), 2, replace=False))
        return [(first, second)]

    def _pair(self, distance: int | None, balanced: bool):
        if len(self.shown) < 2:
            return None
        # Two shapes at random are seldom the same: take pairs until the drawn answer comes up.
        wanted = bool(self.rng.integers(2))
        pairs = self.pairs(distance) if distance is not None else [self.pairs()[0] for _ in range(40)]
        pairs = [pairs[place] for place in self.rng.permutation(len(pairs))]
        for first, second in pairs:
            same = self.shown[first][1].name == self.shown[second][1].name
            if not balanced or same == wanted:
                return self.shown[first], self.shown[second]
        return None if not pairs else (self.shown[pairs[0][0]], self.shown[pairs[0][1]])

    def _identity(self, distance: int | None = None):
        pair = self._pair(distance, balanced=True)
        if pair is None:
            return None
        (early, one), (late, other) = pair
        template = "end" if late == self.end and self.rng.random() < 0.5 else "identity"
        fields = {"early": self.times[early], "late": self.times[late]}
        return template, fields, f"{one.name} {other.name} {YES if one.name == other.name else NO}", late - early

    def _change(self, distance: int | None = None):
        pair = self._pair(distance, balanced=True)
        if pair is None:
            return None
        (early, one), (late, other) = pair
        answer = f"{one.name} {BECAME} {other.name}"
        return "change", {"early": self.times[early], "late": self.times[late]}, answer, late - early

    def _check(self):
        index, thing = self.shown[self.rng.integers(len(self.shown))]
        name = resembling(self.rng, thing).name
        return "check", {"time": self.times[index], "thing": name}, YES if name == thing.name else NO, self.end - index

    def _first(self):
        index, thing = self.shown[self.rng.integers(len(self.shown))]
        index = next(place for place, other in self.shown if other.name == thing.name)
        return "first", {"thing": thing.name}, self.times[index], self.end - index

    def _last(self):
        index, thing = self.shown[self.rng.integers(len(self.shown))]
        index = next(place for place, other in reversed(self.shown) if other.name == thing.name)
        return "last", {"thing": thing.name}, self.times[index], self.end - index

    def _earlier(self):
        once = [(index, thing) for index, thing in self.shown if self.names[thing.name] == 1]
        if len(once) < 2:
            return None
        places = self.rng.choice(len(once), 2, replace=False)
        (index, thing), (later, other) = (once[place] for place in places)
        early = min(index, later)
        answer = thing if index < later else other
        return "earlier", {"thing": thing.name, "other": other.name}, answer.name, self.end - early

    def _count(self):
        pool = [(f"{colour} shapes", self.counts[colour]) for colour in COLOURS]
        pool += [(PLURALS[shape], self.counts[shape]) for shape in SHAPES]
        pool = [(things, count) for things, count in pool if count <= MAX_COUNT]
        if not pool:
            return None
        value = self.rng.choice(sorted({count for _, count in pool}))
        pool = [things for things, count in pool if count == value]
        return "count", {"things": pool[self.rng.integers(len(pool))]}, str(value), self.end - self.shown[0][0]

    def _what(self):
        index, thing = self.shown[self.rng.integers(len(self.shown))]
        return "what", {"time": self.times[index]}, thing.shape, self.end - index

    def _colour(self):
        index, thing = self.shown[self.rng.integers(len(self.shown))]
        return "colour", {"time": self.times[index]}, thing.colour, self.end - index


def make_long_questions(
    clip: Clip,
    rng: np.random.Generator,
    number: int,
    kinds: tuple[str, ...] = LONG_KINDS,
    apart: bool = False,
) -> list[Question]:
    """Up to `number` questions, kinds in the shares of `kinds` as far as the clip allows.

    With `apart`, no two of them name the same time or the same thing.
    """
    ask = LongQuestions(clip, rng)
    questions: list[Question] = []
    named: set[str] = set()
    for kind in _shares(rng, number, kinds):
        for _ in range(APART_TRIES if apart else 1):
            question = ask.ask(kind)
            if question is None or question in questions or not named.isdisjoint(question.about):
                continue
            questions.append(question)
            if apart:
                named.update(question.about)
            break
    return questions


def _shares(rng: np.random.Generator, number: int, kinds: tuple[str, ...]) -> Iterator[str]:
    for start in range(0, number, len(kinds)):
        yield from (str(kind) for kind in rng.permutation(kinds)[: number - start])


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer in [low, high], every octave as likely as another."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
