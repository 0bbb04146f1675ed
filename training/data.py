"""Training batches for keye-tiny: clips and questions in the token and pixel layout that `KeyeProcessor` produces.

A conversation is one clip followed by several questions as turns; only answers (with their `<|im_end|>`) carry
labels. A clip is shown either as pixels or, in `words` mode, as a transcript: the four tokens of a frame are then
the words for what it shows ("red circle red circle"), so that the decoder can learn retrieval before it can see.

A long clip is shown condensed: most of its empty frames are left out, and the tokens of the others keep the times and
the positions that they have in the whole clip. So a short prompt teaches distances of a hundred thousand tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from .long_videos import LONG_KINDS, draw_clip, log_uniform, make_long_questions
from .synthetic_videos import FRAME_SIZE, KINDS, NOTHING, Clip, Question, Thing, make_clip, make_questions, render

PATCH_SIZE = 14
MERGE_SIZE = 2
GRID = FRAME_SIZE // PATCH_SIZE
TOKENS_PER_FRAME = (GRID // MERGE_SIZE) ** 2
IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A clip and its questions; shown in words or in pixels; asked as chat turns or as terse drills in a row.

    `kept` are the frames of a condensed clip, ascending; None shows all.
    """

    clip: Clip
    questions: list[Question]
    words: bool = False
    drill: bool = False
    kept: tuple[int, ...] | None = None

    @property
    def seen(self) -> Clip:
        """The clip with nothing but the frames that are shown (at times that are not theirs)."""
        if self.kept is None:
            return self.clip
        return replace(self.clip, things=tuple(self.clip.things[index] for index in self.kept))


@dataclass(frozen=True)
class LongMixture:
    """What the condensed long clips of a stage look like.

    Clips of `frames` frames with `shown` shapes in them, of whose other frames `empty` are kept. Shares of the clips:
    `words` are shown in words, of `even` the number of frames is drawn evenly, not by octaves, and in `alike` the
    shapes are a multiple of a hundred seconds apart (`make_alike_clip`), where there is room for them, in `ends` half
    of them stand at both ends of the clip (`draw_clip`). Up to `beside` of the frames before a shape are kept, too, and
    as many behind it: in a whole clip these fill its window, and their times differ from its own in a digit or two.
    With `apart`, no two questions about a clip name the same time, so that no answer can be copied from an earlier one.
    """

    clips: int
    frames: tuple[int, int]
    shown: tuple[int, int]
    empty: tuple[int, int]
    kinds: tuple[str, ...] = LONG_KINDS
    questions: int = 8
    words: float = 0.0
    even: float = 0.0
    alike: float = 0.0
    ends: float = 0.0
    beside: int = 0
    apart: bool = False


@dataclass(frozen=True)
class Mixture:
    """What the clips of a stage look like; `words` and `drills` are shares of the examples."""

    clips: int
    frames: tuple[int, int]
    kinds: tuple[str, ...] = KINDS
    questions: int = 8
    words: float = 0.0
    drills: float = 0.0


def kept_frames(rng: np.random.Generator, clip: Clip, empty: int, beside: int = 0) -> tuple[int, ...]:
    """The frames of a condensed clip: all that show a shape, 0 to `beside` on either side of each, and up to `empty`
    others."""
    shapes = [index for index, thing in enumerate(clip.things) if thing]
    kept = set(shapes)
    kept.update(int(index) for index in rng.integers(0, len(clip.things), empty))
    if beside:
        for index, (before, behind) in zip(shapes, rng.integers(0, beside + 1, (len(shapes), 2)).tolist()):
            kept.update(range(max(0, index - before), min(len(clip.things), index + behind + 1)))
    return tuple(sorted(kept))


def transcript(thing: Thing | None) -> list[str]:
    """The words that stand for the tokens of one frame in `words` mode."""
    words = [thing.colour, thing.shape] if thing else [NOTHING, NOTHING]
    return words * (TOKENS_PER_FRAME // 2)


def patches(frames: np.ndarray) -> torch.Tensor:
    """Normalised patches in raster order, float32 [n * 16, 3, 14, 14], of uint8 frames [n, 56, 56, 3]."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    pixels = pixels.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)  # [n, 3, 4, 4, 14, 14]
    return pixels.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH_SIZE, PATCH_SIZE)


class ConversationEncoder:
    """Writes a clip and its questions as token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; repeated texts are tokenized once."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def video(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids that a clip expands to, with its vision marks, and their positions from the first of them on."""
        clip = example.clip
        tokens, positions = list(self.ids("<|vision_start|>")), [0]
        for index in range(len(clip.things)) if example.kept is None else example.kept:
            start = 1 + self.length(clip, index)
            frame = self.ids("<|frame|>") + self.ids(clip.time(index))
            if example.words:
                for word in transcript(clip.things[index]):
                    frame += self.ids(word)
            else:
                frame += [self.video_token_id] * TOKENS_PER_FRAME
            tokens += frame
            positions += range(start, start + len(frame))
        positions.append(1 + self.length(clip, len(clip.things)))
        return tokens + self.ids("<|vision_end|>"), positions

    def length(self, clip: Clip, frames: int) -> int:
        """Number of tokens of the first `frames` frames of a clip, all of them shown."""
        # From 100 seconds on a time takes two tokens.
        short = min(frames, math.ceil(100 * clip.fps))
        return frames * (3 + TOKENS_PER_FRAME) - short

    def answer(self, question: Question, drill: bool = False) -> list[int]:
        """Token ids that carry labels."""
        return self.ids(question.answer) + ([] if drill else self.ids("<|im_end|>"))

    def conversation(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        """Token ids, labels and positions of a clip with all its questions and answers."""
        start, turn, end = self.ids("<|im_start|>user\n"), [], []
        if not example.drill:
            turn, end = start, self.ids("<|im_end|>\n<|im_start|>assistant\n")
        video, places = self.video(example)
        tokens = start + video
        positions = [*range(len(start)), *(len(start) + place for place in places)]
        labels = [IGNORE] * len(tokens)
        if example.words and example.drill:
            # The second half of a frame repeats the first: learning that makes the heads that look a token or two back.
            frame = [IGNORE] * (2 + TOKENS_PER_FRAME // 2) + [1] * (TOKENS_PER_FRAME // 2)
            repeats = [IGNORE, *frame * len(example.clip.things), IGNORE]
            labels[len(start) :] = [token if repeat == 1 else IGNORE for token, repeat in zip(video, repeats)]
        for number, question in enumerate(example.questions):
            prompt = (turn if number else []) + self.ids(question.text) + end
            answer = self.answer(question, example.drill)
            tokens += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
        positions += range(positions[-1] + 1, positions[-1] + 1 + len(tokens) - len(positions))
        return tokens, labels, positions

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Pad conversations on the right and render the clips that are shown as pixels."""
        rows = [self.conversation(example) for example in examples]
        length = max(len(tokens) for tokens, _, _ in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        position_ids = torch.zeros((len(rows), length), dtype=torch.long)
        for index, (tokens, targets, positions) in enumerate(rows):
            input_ids[index, : len(tokens)] = torch.tensor(tokens)
            labels[index, : len(targets)] = torch.tensor(targets)
            attention_mask[index, : len(tokens)] = 1
            position_ids[index, : len(tokens)] = torch.tensor(positions)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == self.video_token_id).long() * 2,
            "labels": labels,
        }
        if any(example.kept is not None for example in examples):
            batch["position_ids"] = position_ids
        seen = [example.seen for example in examples if not example.words]
        if seen:
            batch["pixel_values_videos"] = patches(np.concatenate([render(clip) for clip in seen]))
            batch["video_grid_thw"] = torch.tensor([[len(clip.things), GRID, GRID] for clip in seen])
        return batch


class ClipBatches(IterableDataset):
    """Endless groups of examples, a function of the seed. One item is the content of one batch.

    The clips of a group have similar lengths (drawn per group), which keeps padding small.
    """

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture = mixture
        self.seed = seed

    def __iter__(self) -> Iterator[list[Example]]:
        mixture = self.mixture
        rng = np.random.default_rng([self.seed, 1])
        shortest, longest = mixture.frames
        while True:
            centre = int(rng.integers(shortest, longest + 1))
            frames = (max(shortest, centre - 1), min(longest, centre + 1))
            # Equal work per step: short clips come in larger groups.
            size = round(mixture.clips * ((shortest + longest) / 2 / centre) ** 0.5)
            examples = []
            for _ in range(size):
                clip = make_clip(rng, frames)
                words, drill = rng.random() < mixture.words, rng.random() < mixture.drills
                number = 2 * mixture.questions if drill else mixture.questions
                questions = make_questions(clip, rng, number, mixture.kinds, drill)
                examples.append(Example(clip, questions, words, drill))
            yield examples


class LongBatches(IterableDataset):
    """Endless groups of examples of condensed long clips, a function of the seed. One item is one batch."""

    def __init__(self, mixture: LongMixture, seed: int):
        self.mixture = mixture
        self.seed = seed

    def __iter__(self) -> Iterator[list[Example]]:
        mixture = self.mixture
        rng = np.random.default_rng([self.seed, 3])
        while True:
            # Groups of one size, so that padding stays small.
            shown = log_uniform(rng, *mixture.shown)
            empty = log_uniform(rng, *mixture.empty)
            frames = shown * (1 + mixture.beside) + empty / 2
            size = max(1, round(mixture.clips * (mixture.shown[0] * mixture.shown[1]) ** 0.5 / frames))
            yield [self._example(rng, shown, empty) for _ in range(min(size, 2 * mixture.clips))]

    def _example(self, rng: np.random.Generator, shown: int, empty: int) -> Example:
        mixture = self.mixture
        fewest, most = max(shown + empty, mixture.frames[0]), mixture.frames[1]
        if mixture.even and rng.random() < mixture.even:
            frames = int(rng.integers(fewest, most + 1))
        else:
            frames = log_uniform(rng, fewest, most)
        clip = draw_clip(rng, frames, shown, mixture.alike, mixture.ends)
        kept = kept_frames(rng, clip, empty, mixture.beside)
        questions = make_long_questions(clip, rng, mixture.questions, mixture.kinds, mixture.apart)
        return Example(clip, questions, bool(rng.random() < mixture.words), kept=kept)


class Turns(IterableDataset):
    """Batches of several mixtures in turn; a function of the seed."""

    def __init__(self, mixtures: tuple[Mixture | LongMixture, ...], seed: int):
        self.parts = [
            LongBatches(mixture, seed) if isinstance(mixture, LongMixture) else ClipBatches(mixture, seed)
            for mixture in mixtures
        ]

    def __iter__(self) -> Iterator[list[Example]]:
        return chain.from_iterable(zip(*self.parts))


class FrameBatches(IterableDataset):
    """Endless batches of clips for the vision tower alone; a function of the seed. One item is one batch.

    With `empty`, that share of the frames shows nothing, and of as many clips the background is footage.
    """

    def __init__(self, clips: int, seed: int, empty: float | None = None):
        self.clips = clips
        self.seed = seed
        self.empty = empty

    def __iter__(self) -> Iterator[list[Clip]]:
        rng = np.random.default_rng([self.seed, 2])
        while True:
            yield [self._clip(rng) for _ in range(self.clips)]

    def _clip(self, rng: np.random.Generator) -> Clip:
        clip = make_clip(rng, (8, 8))
        if self.empty is None:
            return clip
        things = tuple(None if rng.random() < self.empty else thing for thing in clip.things)
        background = "footage" if rng.random() < self.empty else clip.background
        return replace(clip, things=things, background=background)
