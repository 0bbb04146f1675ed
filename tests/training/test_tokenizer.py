"""The tokenizer of keye-tiny."""

import numpy as np
import pytest

from training.synthetic_videos import KINDS, TEMPLATES, TWO_WORD_KINDS, make_clip, make_questions
from training.tokenizer import SPECIAL_TOKENS, TIME_STAMPS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_special_tokens_and_time_stamps_are_single_tokens(tokenizer):
    assert len(tokenizer) < 2500
    for token in (*SPECIAL_TOKENS, *TIME_STAMPS):
        assert len(tokenizer(token).input_ids) == 1 and tokenizer.unk_token_id not in tokenizer(token).input_ids
    assert tokenizer.tokenize("<|frame|>12.5<|video_pad|><|video_pad|>") == [
        "<|frame|>",
        "12.5",
        "<|video_pad|>",
        "<|video_pad|>",
    ]


def test_every_question_and_answer_is_in_the_vocabulary(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(100):
        for question in make_questions(make_clip(rng, (4, 16)), rng, 10, (*KINDS, *TWO_WORD_KINDS)):
            ids = tokenizer([question.text, question.answer]).input_ids
            assert tokenizer.unk_token_id not in ids[0] + ids[1], question
            assert tokenizer.decode(ids[1]) == question.answer
    assert len({len(texts) for texts in TEMPLATES.values()}) > 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What COLOUR is the shape at 3.0 seconds?", "what color is the shape at 3.0 seconds"),
        ("What is shown at 3 seconds?", "What is shown at 3.0 seconds"),
        ("What is shown at 12s?", "What is shown at 12.0 s"),
        ("What color at 7?", "what color at 7.0"),
        ("When does the red circle appear?", "when does the red circle appear."),
    ],
)
def test_ways_of_writing_the_same_question_are_the_same_tokens(tokenizer, one, other):
    assert tokenizer(one).input_ids == tokenizer(other).input_ids


def test_counts_stay_counts_and_unknown_words_become_unk(tokenizer):
    assert tokenizer.tokenize("2") == ["2"]
    assert tokenizer.tokenize("at 2.5 seconds") == ["at", "2.5", "seconds"]
    assert tokenizer("zeppelin").input_ids == [tokenizer.unk_token_id]


def test_the_chat_template_marks_answers(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What color at 3.0?"}]},
        {"role": "assistant", "content": "red"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert [token for token, mark in zip(tokens, encoded["assistant_masks"]) if mark] == ["red", "<|im_end|>"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt
