"""Which held-out long clips an evaluation draws, and which questions it asks about them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .long_videos import LONG_KINDS, MAX_FRAMES, LongQuestions, make_long_clip
from .synthetic_videos import FRAME_SIZE, Clip, Question

# Mixed into every seed, so that neither training nor the evaluation of short clips draws the same clips.
HELD_OUT_LONG = 77_002
# Kinds whose questions compare two shapes, which can be asked for at a wanted number of frames apart.
COMPARING = ("identity", "change")
# How often a question is drawn again when its subject came up already, then when its very words did.
TRIES = 20


class OptionError(ValueError):
    """An option of an evaluation asks for what cannot be done. The message names it, in one sentence."""


def checked_kinds(named: list[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of questions that an option names; raises `OptionError` for one that is not asked."""
    unknown = [kind for kind in named or () if kind not in allowed]
    if unknown:
        raise OptionError(f"--kinds {' '.join(unknown)}: choose among {', '.join(allowed)}.")
    return tuple(named or ())


@dataclass(frozen=True)
class LongPlan:
    """What is asked: `clips` clips of each length in `frames`, each with `shown` shapes.

    Over all clips of a length, the kinds that compare get `questions` questions per distance, taking turns, and every
    other kind gets `questions`. Without `distances` shapes stand at random and each kind gets `questions`.
    """

    frames: tuple[int, ...] = (10_000,)
    clips: int = 4
    shown: int = 60
    distances: tuple[int, ...] = ()
    questions: int = 50
    kinds: tuple[str, ...] = LONG_KINDS
    seed: int = 0
    size: int = FRAME_SIZE

    def check(self) -> None:
        """Raise `OptionError` where clips cannot be drawn like this."""
        for frames in self.frames:
            if not 2 <= frames <= MAX_FRAMES:
                raise OptionError(f"--frames {frames} is no length of a clip; name one between 2 and {MAX_FRAMES}.")
            if not 2 <= self.shown <= frames:
                raise OptionError(
                    f"--shown {self.shown} shapes do not fit into --frames {frames}; from 2 to all of them "
                    "show a shape."
                )
            if self.distances and not self.distances_in(frames):
                raise OptionError(
                    f"None of --distances {' '.join(map(str, self.distances))} fits into --frames {frames}; name one "
                    f"between 1 and {frames - 1}."
                )
        if self.clips < 1 or self.questions < 1:
            raise OptionError(f"--clips {self.clips} and --questions {self.questions} must be at least 1.")

    def distances_in(self, frames: int) -> tuple[int, ...]:
        """The distances that a clip of so many frames has room for."""
        return tuple(distance for distance in self.distances if 0 < distance < frames)

    def group(self, question: Question) -> str:
        """The distance of a question as tables show it: exact where it was asked for, else an octave."""
        if self.distances and question.kind in COMPARING:
            return f"{question.distance:,}"
        low = 1 << max(question.distance, 1).bit_length() - 1
        return "0–1" if low == 1 else f"{low:,}–{2 * low - 1:,}"


def held_out_long(plan: LongPlan, frames: int) -> Iterator[tuple[Clip, list[Question]]]:
    """The clips of one length with their questions; clip k is a function of the plan and of k."""
    distances = plan.distances_in(frames)
    comparing = [kind for kind in plan.kinds if kind in COMPARING] if distances else []
    others = [kind for kind in plan.kinds if kind not in comparing]
    for number in range(plan.clips):
        rng = np.random.default_rng([HELD_OUT_LONG, plan.seed, frames, number])
        clip = make_long_clip(rng, frames, plan.shown, distances)
        # The part of the questions that this clip gets.
        turns = range(plan.questions * number // plan.clips, plan.questions * (number + 1) // plan.clips)
        wanted = [(kind, None) for kind in others for _ in turns]
        if comparing:
            wanted += [(comparing[turn % len(comparing)], distance) for distance in distances for turn in turns]
        source, questions, subjects = LongQuestions(clip, rng), {}, set()
        for kind, distance in wanted:
            for attempt in range(2 * TRIES):
                question = source.ask(kind, distance)
                if question is None or question.text in questions:
                    continue
                if attempt >= TRIES or (kind, question.about) not in subjects:
                    questions[question.text] = question
                    subjects.add((kind, question.about))
                    break
        yield clip, list(questions.values())
