"""Batches, stages and scores of keye-tiny's training."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch

from modeling_keye import KeyeConfig, KeyeForVideoQA
from tests.training.small_runs import KEYE_TINY
from training.data import (
    ClipBatches,
    ConversationEncoder,
    Example,
    FrameBatches,
    LongBatches,
    LongMixture,
    Mixture,
    kept_frames,
)
from training.evaluate import evaluate, held_out, is_right, score
from training.learning_curves import curves, plot_curves, stage_log
from training.long_videos import make_long_clip
from training.ship_keye_tiny import CARD, build_processor, write_card, write_checkpoint
from training.synthetic_videos import (
    KINDS,
    TWO_WORD_KINDS,
    Clip,
    Question,
    Thing,
    make_clip,
    make_questions,
    write_video,
)
from training.tokenizer import build_tokenizer
from training.train_keye_tiny import STAGES, answer_collator, load_grown, train_stage


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def encoder(processor):
    return ConversationEncoder(processor.tokenizer)


def _messages(path, questions):
    content = [{"type": "video", "path": str(path)}]
    for question in questions:
        yield {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}
        yield {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        content = []


def test_batches_are_what_the_processor_makes_of_the_same_file(tmp_path, processor, encoder):
    rng = np.random.default_rng(4)
    for fps in (Fraction(1), Fraction(2), Fraction(1, 2)):
        clip = make_clip(rng, (4, 12), fps)
        questions = make_questions(clip, rng, 3)
        path = write_video(clip, tmp_path / "clip.mp4")
        expected = processor.apply_chat_template(
            list(_messages(path, questions)),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        batch = encoder.batch([Example(clip, questions)])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw"):
            assert torch.equal(batch[name], expected[name]), name
        assert torch.equal(batch["labels"] >= 0, torch.as_tensor(expected["assistant_masks"]).bool())
        difference = (batch["pixel_values_videos"] - expected["pixel_values_videos"]).abs().mean()
        assert difference < 0.04  # H.264, on a scale from -1 to 1


def test_labels_are_answers_and_padding_has_none(encoder):
    things = (Thing("red", "circle", 0.5, 0.5, 0.5, 1.0), None)
    clip = Clip(things, Fraction(1), "plain", 0)
    short = Example(clip, [Question("what", "What shape at 0.0?", "circle")], words=True)
    long = Example(clip, [*short.questions, Question("colour", "What color at 1.0?", "nothing")], words=True)
    batch = encoder.batch([short, long])
    words = encoder.tokenizer.convert_ids_to_tokens(batch["labels"][1][batch["labels"][1] >= 0])
    assert words == ["circle", "<|im_end|>", "nothing", "<|im_end|>"]
    end = int(batch["attention_mask"][0].sum())
    assert (batch["labels"][0, end:] == -100).all() and "pixel_values_videos" not in batch
    text = encoder.tokenizer.decode(batch["input_ids"][0, :end])
    assert "0.0 red circle red circle <|frame|> 1.0 nothing nothing nothing nothing" in text


def test_groups_are_functions_of_the_seed(encoder):
    mixture = Mixture(clips=4, frames=(2, 6), questions=3, words=0.5, drills=0.5)
    first, again, other = (list(islice(ClipBatches(mixture, seed), 3)) for seed in (1, 1, 2))
    assert first == again and first != other
    collated = answer_collator(encoder)(first[:1])
    owned = collated["owner"][collated["owner"] >= 0]
    assert sorted(set(owned.tolist())) == list(range(len(collated["groups"])))


def test_frames_of_the_tower_can_be_mostly_empty_footage():
    usual, empty = (next(iter(FrameBatches(200, 0, share))) for share in (None, 0.6))
    for clips, nothing, footage in ((usual, 0.12, 0.25), (empty, 0.65, 0.7)):
        shown = [thing for clip in clips for thing in clip.things]
        assert sum(thing is None for thing in shown) / len(shown) == pytest.approx(nothing, abs=0.05)
        assert sum(clip.background == "footage" for clip in clips) / len(clips) == pytest.approx(footage, abs=0.1)


def test_condensed_clips_keep_the_frames_beside_their_shapes():
    clip = make_long_clip(np.random.default_rng(0), 400, 6)
    shapes = [index for index, thing in enumerate(clip.things) if thing]
    alone, beside = (kept_frames(np.random.default_rng(0), clip, 0, most) for most in (0, 5))
    assert alone == tuple(shapes) and set(shapes) < set(beside) and beside == tuple(sorted(set(beside)))
    assert all(min(abs(index - shape) for shape in shapes) <= 5 for index in beside)
    # All of them up to the farthest, on both sides.
    for index in set(beside) - set(shapes):
        assert any(abs(index - other) == 1 for other in beside)
    assert any(index + 1 in shapes for index in beside) and any(index - 1 in shapes for index in beside)


def test_batches_with_frames_beside_shapes_have_fewer_clips():
    mixture = LongMixture(32, (400, 500), (6, 6), (4, 4))
    usual, wide = (next(iter(LongBatches(replace(mixture, beside=most), 0))) for most in (0, 9))
    sizes = [sum(len(example.kept) for example in batch) for batch in (usual, wide)]
    assert len(wide) < len(usual) / 4 and sizes[1] == pytest.approx(sizes[0], rel=0.3)


def _smaller(stage):
    def smaller(mixture):
        if isinstance(mixture, LongMixture):
            return replace(mixture, clips=2, frames=(64, 20_000), shown=(3, 4), empty=(36, 40), questions=2)
        return replace(mixture, clips=2, frames=(2, 3), questions=2)

    crowd = stage.crowd and replace(stage.crowd, clips=2, frames=(64, 80), shown=(3, 4), questions=2)
    return replace(stage, steps=2, mixtures=tuple(smaller(mixture) for mixture in stage.mixtures), crowd=crowd)


def test_every_stage_runs_resumes_and_trains_its_part_only(tmp_path, encoder):
    model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    for stage in map(_smaller, STAGES):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        record = train_stage(model, encoder, stage, tmp_path, seed=0)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and all(name.startswith(stage.part) for name in changed)
        indexer = {name for name in changed if ".indexer." in name}
        learns_alone = stage.indexer == "warmup" or stage.crowd is not None
        learns = learns_alone or stage.indexer is not None
        assert indexer == changed if learns_alone else indexer < changed and bool(indexer) == learns
        log = json.loads((tmp_path / stage.name / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        assert ("indexer_loss" in log[0]) == learns
        # A finished stage is read back, not run again.
        fresh = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
        assert train_stage(fresh, encoder, stage, tmp_path, seed=0) == record
        now, trained = fresh.state_dict(), model.state_dict()
        assert all(torch.equal(now[name], trained[name]) for name in changed)
    found = curves(stage_log(tmp_path / "sparse"))
    assert found["indexer: KL"][0] == [2] and found["indexer: KL"][1][0] > 0
    plot_curves(tmp_path, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(FileNotFoundError, match="holds none of the stages long, far"):
        plot_curves(tmp_path / "nowhere", tmp_path / "none.svg")
    with pytest.raises(FileNotFoundError, match="nowhere holds no checkpoint"):
        stage_log(tmp_path / "nowhere")


def test_earlier_weights_with_a_shorter_vocabulary_are_taken_up():
    model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    earlier = {name: value + 1 for name, value in before.items()}
    earlier |= {name: earlier[name][:1073] for name in names}
    for with_indexer in (False, True):
        load_grown(model, dict(earlier), with_indexer)
        for name, value in model.state_dict().items():
            if name in names:
                assert torch.equal(value, torch.cat([earlier[name], before[name][1073:]]))
            else:
                left = ".indexer." in name and not with_indexer
                assert torch.equal(value, before[name] if left else earlier[name]), name


def test_a_condensed_clip_keeps_the_times_and_positions_of_the_whole(encoder):
    clip = make_long_clip(np.random.default_rng(3), 260, 6, fps=Fraction(2))
    question = Question("what", "What shape at 3.0?", "star")
    whole = encoder.batch([Example(clip, [question])])
    kept = tuple(index for index, thing in enumerate(clip.things) if thing)
    condensed = encoder.batch([Example(clip, [question], kept=kept)])
    assert "position_ids" not in whole and condensed["video_grid_thw"].tolist() == [[6, 4, 4]]
    ids, places = condensed["input_ids"][0], condensed["position_ids"][0]
    assert torch.equal(whole["input_ids"][0, places], ids) and len(ids) < whole["input_ids"].shape[1] / 10
    rows = [slice(16 * index, 16 * index + 16) for index in kept]
    seen = torch.cat([whole["pixel_values_videos"][row] for row in rows])
    assert condensed["pixel_values_videos"].shape == seen.shape


def test_held_out_clips_are_fixed_and_cover_all_kinds():
    first, again = (list(held_out(10, seed=3)) for _ in range(2))
    assert first == again
    assert [question.kind for _, question in first[:5]] == list(KINDS)


def test_scores_count_exact_matches():
    assert is_right(" Red Circle", "red circle") and not is_right("red", "red circle")
    clip = Clip((None,) * 4, Fraction(1), "plain", 0)
    results = [(clip, Question("what", "", "circle"), answer) for answer in ("circle", "star")]
    results.append((clip, Question("when", "", "1.0"), "1.0"))
    scores = score(results)
    assert scores["exact_match"] == 66.7 and scores["by_kind"] == {"what": 50.0, "when": 100.0}
    assert scores["by_frames"] == {"04": 66.7} and scores["questions"] == 3


def test_a_checkpoint_is_written_evaluated_and_described(tmp_path):
    folder = tmp_path / "keye-tiny"
    model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    write_checkpoint(model, folder)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "modeling_keye.py"} <= names
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == [model.config.image_token_id, model.config.video_token_id]

    scores, results = evaluate(model.eval(), build_processor(), questions=5, seed=0)
    assert scores["questions"] == 5 and all(isinstance(answer, str) for _, _, answer in results)
    stages = [{"name": "frames", "steps": 1200, "seconds": 90, "threads": 2}]
    run = {"seed": 5, "scale": 0.5, "stages": stages, "torch": "2", "transformers": "5"}
    two_words, _ = evaluate(model, build_processor(), questions=2, seed=0, kinds=TWO_WORD_KINDS)
    write_card(folder, model, run, 0, scores, two_words, longer_scores=two_words)
    card = (folder / "README.md").read_text()
    assert "--seed 5 --scale 0.5" in card and "| frames | 1,200 | 2 | 2 |" in card
    assert f"| all | {scores['exact_match']:.1f} |" in card


def test_the_sample_of_the_shipped_card_runs(tmp_path):
    shipped = (KEYE_TINY / "README.md").read_text()
    sample = re.search(r"```python\n(.*?)```", shipped, flags=re.DOTALL)[1]
    assert sample in CARD.replace("{{", "{").replace("}}", "}")
    clip = make_clip(np.random.default_rng(0), (8, 8))
    write_video(clip, tmp_path / "clip.mp4")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "keye-tiny").symlink_to(KEYE_TINY)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", sample], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_preset_and_the_tokenizer_agree():
    config, tokenizer = KeyeConfig.from_preset("keye-tiny"), build_tokenizer()
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        assert getattr(config, name) == tokenizer.convert_tokens_to_ids(token)
