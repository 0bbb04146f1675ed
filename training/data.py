"""Training batches for keye-tiny: clips and questions in the token and pixel layout that `KeyeProcessor` produces.

A conversation is one clip followed by several questions as turns; only answers (with their `<|im_end|>`) carry
labels. A clip is shown either as pixels or, in `words` mode, as a transcript: the four tokens of a frame are then
the words for what it shows ("red circle red circle"), so that the decoder can learn retrieval before it can see.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from .synthetic_videos import FRAME_SIZE, KINDS, NOTHING, Clip, Question, Thing, make_clip, make_questions, render

PATCH_SIZE = 14
MERGE_SIZE = 2
GRID = FRAME_SIZE // PATCH_SIZE
TOKENS_PER_FRAME = (GRID // MERGE_SIZE) ** 2
IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A clip and its questions; shown in words or in pixels; asked as chat turns or as terse drills in a row."""

    clip: Clip
    questions: list[Question]
    words: bool = False
    drill: bool = False


@dataclass(frozen=True)
class Mixture:
    """What the clips of a stage look like; `words` and `drills` are shares of the examples."""

    clips: int
    frames: tuple[int, int]
    kinds: tuple[str, ...] = KINDS
    questions: int = 8
    words: float = 0.0
    drills: float = 0.0


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

    def video(self, clip: Clip, words: bool = False) -> list[int]:
        """Token ids that a clip expands to, with its vision marks."""
        tokens = list(self.ids("<|vision_start|>"))
        for time, thing in zip(clip.times, clip.things, strict=True):
            tokens += self.ids("<|frame|>") + self.ids(time)
            if words:
                for word in transcript(thing):
                    tokens += self.ids(word)
            else:
                tokens += [self.video_token_id] * TOKENS_PER_FRAME
        return tokens + self.ids("<|vision_end|>")

    def answer(self, question: Question, drill: bool = False) -> list[int]:
        """Token ids that carry labels."""
        return self.ids(question.answer) + ([] if drill else self.ids("<|im_end|>"))

    def conversation(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids and labels of a clip with all its questions and answers."""
        start, turn, end = self.ids("<|im_start|>user\n"), [], []
        if not example.drill:
            turn, end = start, self.ids("<|im_end|>\n<|im_start|>assistant\n")
        video = self.video(example.clip, example.words)
        tokens = start + video
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
        return tokens, labels

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Pad conversations on the right and render the clips that are shown as pixels."""
        rows = [self.conversation(example) for example in examples]
        length = max(len(tokens) for tokens, _ in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, (tokens, targets) in enumerate(rows):
            input_ids[index, : len(tokens)] = torch.tensor(tokens)
            labels[index, : len(targets)] = torch.tensor(targets)
            attention_mask[index, : len(tokens)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == self.video_token_id).long() * 2,
            "labels": labels,
        }
        seen = [example.clip for example in examples if not example.words]
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


class FrameBatches(IterableDataset):
    """Endless batches of clips for the vision tower alone; a function of the seed. One item is one batch."""

    def __init__(self, clips: int, seed: int):
        self.clips = clips
        self.seed = seed

    def __iter__(self) -> Iterator[list[Clip]]:
        rng = np.random.default_rng([self.seed, 2])
        while True:
            yield [make_clip(rng, (8, 8)) for _ in range(self.clips)]
