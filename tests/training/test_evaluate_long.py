"""Long held-out clips: read once, asked in several modes, scored by distance."""

import importlib.util
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_keye import KeyeConfig, KeyeForVideoQA, Selection
from training import evaluate, evaluate_long, score_plot, video_memory
from training.evaluate_long import scores, tables
from training.long_plan import LongPlan, held_out_long
from training.long_videos import LongQuestions, make_long_clip, make_long_questions
from training.score_tables import interval
from training.ship_keye_tiny import build_processor, generation_config
from training.synthetic_videos import write_video
from training.video_memory import VideoMemory, attention_mode, check_times, prefill_share, question_ids, read_video

PLAN = LongPlan(frames=(16,), clips=2, shown=8, distances=(4, 12), questions=3, kinds=("identity", "what"), seed=1)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    """Random weights and a budget that even a short clip is too long for."""
    config = KeyeConfig.from_preset("keye-tiny")
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.index_topk, config.text_config.local_window, config.text_config.anchor_stride = 8, 8, 16
    torch.manual_seed(0)
    model = KeyeForVideoQA(config).eval()
    model.generation_config = generation_config(config)
    return model


@pytest.fixture(scope="module")
def clip():
    return make_long_clip(np.random.default_rng(2), 20, 9)


@pytest.fixture(scope="module")
def file(clip, tmp_path_factory):
    return write_video(clip, tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def video(model, processor, clip, file):
    return read_video(model, processor, file, clip.times)


def test_a_question_to_the_cache_is_answered_as_one_with_a_fresh_prompt(model, processor, clip, file, video):
    memory = VideoMemory(model, video)
    questions = [question.text for question in make_long_questions(clip, np.random.default_rng(0), 3)]
    replies = [memory.ask(question_ids(processor, text)).ids for text in (*questions, *questions)]
    assert replies[:3] == replies[3:] and len({tuple(ids) for ids in replies}) > 1
    for text, ids in zip(questions, replies):
        content = [{"type": "video", "path": str(file)}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": 20},
        )
        prompt = inputs["input_ids"]
        assert prompt[0].tolist() == video.input_ids[0].tolist() + question_ids(processor, text)
        answer = model.generate(**inputs)[0, prompt.shape[1] :].tolist()
        assert ids == [token for token in answer if token != model.generation_config.eos_token_id]


def test_shares_are_those_of_the_selection_rule(model, processor, video):
    ids = question_ids(processor, "What shape at 3.0?")
    with attention_mode(model, "sparse", topk=4):
        memory = VideoMemory(model, video)
        rule = video_memory.decoder_layers(model)[0].selection
        reply = memory.ask(ids)
        # The last token of an answer that was cut short is not read any more.
        read = len(ids) + len(reply.ids) - (len(reply.ids) == model.generation_config.max_new_tokens)
        shares = [rule.width(visible) / visible for visible in range(memory.length + 1, memory.length + read + 1)]
        assert rule.topk == 4 and reply.attended_most == pytest.approx(max(shares))
        assert reply.attended == pytest.approx(sum(shares) / len(shares))
        with torch.no_grad():
            output = model(input_ids=video.input_ids, **video.media, output_indexer_selections=True)
        kept = sum(int((selected >= 0).sum()) for selected in output.indexer_selections)
        pairs = len(output.indexer_selections) * memory.length * (memory.length + 1) / 2
        assert prefill_share(model, memory.length) == pytest.approx(kept / pairs)
    with attention_mode(model, "dense"):
        reply = VideoMemory(model, video).ask(ids)
        assert reply.attended == reply.attended_most == prefill_share(model, 100) == 1
    assert video_memory.decoder_layers(model)[0].selection.topk == 8


def test_dense_attends_to_every_token(model, processor, video):
    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=video.input_ids, **video.media, logits_to_keep=1).logits

    with attention_mode(model, "sparse", topk=10_000):
        everything = logits()
    with attention_mode(model, "dense"):
        assert torch.allclose(logits(), everything, atol=1e-4)
    assert not torch.allclose(logits(), everything, atol=1e-2)


def test_untrained_changes_the_indexer_and_nothing_else_for_a_while(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        with attention_mode(model, "untrained"):
            found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name in before if not torch.equal(before[name], found[0][name])}
    assert changed == {name for name in before if "indexer" in name and "proj" in name}
    assert all(torch.equal(found[0][name], found[1][name]) for name in before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    std = model.config.text_config.initializer_range
    assert all(abs(found[0][name].std() / std - 1) < 0.1 for name in changed)


def test_a_mode_that_the_model_lacks_is_refused(model, monkeypatch):
    with pytest.raises(ValueError, match="no mode 'sharp'; choose among sparse, dense, untrained"):
        with attention_mode(model, "sharp"):
            pass
    for layer in video_memory.decoder_layers(model):
        monkeypatch.setitem(layer._modules, "indexer", None)
    for mode, topk, named in (("untrained", None, "mode 'untrained'"), ("sparse", 4, "topk=4")):
        with pytest.raises(ValueError, match=f"no indexer, which .*{named} needs"):
            with attention_mode(model, mode, topk):
                pass


def test_a_prompt_with_other_frames_or_times_is_refused(processor, clip, video):
    ids = video.input_ids[0].tolist()
    with pytest.raises(ValueError, match="shows 20 frames, but the clip has 19"):
        check_times(processor, ids, clip.times[:-1])
    shifted = [*clip.times[:7], "99.9", *clip.times[8:]]
    with pytest.raises(ValueError, match=f"Frame 7 stands at 99.9 seconds, but the prompt shows '{clip.times[7]}'"):
        check_times(processor, ids, shifted)


def test_clips_are_fixed_and_questions_stand_at_the_asked_distances():
    plan = LongPlan(frames=(2000,), clips=3, shown=41, distances=(50, 1900), questions=16, seed=4)
    clips = list(held_out_long(plan, 2000))
    assert clips == list(held_out_long(plan, 2000))
    asked = [question for _, questions in clips for question in questions]
    comparing = Counter((q.kind, q.distance) for q in asked if q.kind in ("identity", "change"))
    assert comparing == {(kind, distance): 8 for kind in ("identity", "change") for distance in (50, 1900)}
    others = Counter(question.kind for question in asked if question.kind not in ("identity", "change"))
    assert set(others) == set(plan.kinds) - {"identity", "change"} and max(others.values()) == 16
    assert all(len({question.text for question in questions}) == len(questions) for _, questions in clips)
    assert {plan.group(question) for question in asked if question.kind == "identity"} == {"50", "1,900"}
    assert plan.group(SimpleNamespace(kind="what", distance=1500)) == "1,024–2,047"
    assert plan.group(SimpleNamespace(kind="what", distance=0)) == "0–1"


def test_no_pair_is_asked_about_twice_before_all_were_asked_about():
    plan = LongPlan(frames=(2000,), clips=1, shown=13, distances=(1900,), questions=9, kinds=("identity",), seed=4)
    ((clip, questions),) = held_out_long(plan, 2000)
    pairs = LongQuestions(clip, np.random.default_rng(0)).pairs(1900)
    assert len(pairs) == 6 and len(questions) == 9
    assert len({question.about for question in questions}) == 6
    assert len({question.about for question in questions[:6]}) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": (16,), "shown": 17}, "--shown 17 shapes do not fit into --frames 16"),
        ({"frames": (20_001,)}, "--frames 20001 is no length of a clip; name one between 2 and 20000"),
        ({"frames": (1,), "shown": 1}, "--frames 1 is no length of a clip"),
        ({"frames": (500, 100), "distances": (100, 300)}, "None of --distances 100 300 fits into --frames 100"),
        ({"clips": 0}, "--clips 0 and --questions 50 must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LongPlan(**settings).check()


def test_intervals_are_wilsons():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    assert interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert interval(0, 20) == pytest.approx((0, 16.11), abs=0.01)


def _answer(mode: str, expected: str, answer: str, distance: int) -> dict:
    about = {"frames": 16, "clip": 0, "mode": mode, "kind": "identity", "distance": distance, "group": f"{distance}"}
    return {**about, "expected": expected, "answer": answer, "right": expected == answer, **ATTENDED}


ATTENDED = {"attended": 0.25, "attended_most": 0.5}


def test_scores_and_tables_by_distance_kind_and_mode():
    answers = [
        _answer("sparse", "red star yes", "red star yes", 4),
        _answer("sparse", "red star no", "red cross no", 12),
        _answer("dense", "red star yes", "red star yes", 4),
        _answer("dense", "red star no", "red star yes", 12),
    ]
    seconds = {"seconds_reading": 2.0, "seconds_asking": 1.0}
    readings = [
        {"frames": 16, "clip": 0, "mode": mode, "tokens": 100, "attended": 0.5, **seconds}
        for mode in ("sparse", "dense")
    ]
    found = scores({"answers": answers, "readings": readings})
    by_row = {(row["kind"], row["distance"]): row["modes"] for row in found["accuracy"]}
    assert list(by_row) == [("all", "all"), ("identity", "all"), ("identity", "4"), ("identity", "12")]
    assert by_row["identity", "all"]["sparse"]["percent"] == 50.0 and by_row["identity", "12"]["dense"]["right"] == 0
    sparse, dense = found["verdicts"]
    assert (sparse["right"], sparse["expected_yes"], sparse["answered_yes"]) == (100.0, 50.0, 50.0)
    assert (dense["right"], dense["expected_yes"], dense["answered_yes"]) == (50.0, 50.0, 100.0)
    text = tables(found)
    assert "| 16 | identity | 4 | 1 | 100.0 (21–100) | 100.0 (21–100) |" in text
    assert "| 16 | sparse | 100 | 25.00 | 50.00 | 50.00 | 2.0 | 0.5 |" in text


def _run(monkeypatch, capsys, model, processor, *options: str) -> tuple[str, dict]:
    monkeypatch.setattr(evaluate, "load", lambda name: (model, processor))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "DIR", *options])
    evaluate.main()
    output = capsys.readouterr().out
    return output, json.loads(output.splitlines()[-1])


def _refused(monkeypatch, capsys, model, processor, *options: str) -> str:
    """What the command says when it cannot be done."""
    with pytest.raises(SystemExit) as stopped:
        _run(monkeypatch, capsys, model, processor, *options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


LONG = "--long --frames 16 --clips 2 --shown 8 --distances 4 12 --questions 3 --kinds identity what --seed 1".split()


def test_the_command_prints_tables_and_goes_on_where_it_was(monkeypatch, capsys, tmp_path, model, processor):
    record = tmp_path / "scores.json"
    output, document = _run(monkeypatch, capsys, model, processor, *LONG, "--modes", "sparse", "--json", str(record))
    assert "| frames | kind | distance in frames | questions | sparse |" in output
    assert document["settings"]["distances"] == [4, 12] and document["command"].endswith("--json " + str(record))
    saved = json.loads(record.read_text())
    assert len(saved["answers"]) == sum(len(questions) for _, questions in held_out_long(PLAN, 16)) == 9
    assert {answer["group"] for answer in saved["answers"] if answer["kind"] == "identity"} == {"4", "12"}

    asked = []
    ask_all = evaluate_long.ask_all

    def noted(*arguments):
        asked.append((arguments[-1]["clip"], arguments[-1]["mode"]))
        return ask_all(*arguments)

    monkeypatch.setattr(evaluate_long, "ask_all", noted)
    # As if the run had been stopped before its second clip.
    partial = {name: saved[name] for name in ("settings", "answers", "readings")}
    for name in ("answers", "readings"):
        partial[name] = [entry for entry in partial[name] if entry["clip"] == 0]
    record.write_text(json.dumps(partial))
    output, document = _run(
        monkeypatch, capsys, model, processor, *LONG, "--modes", "sparse", "dense", "--json", str(record)
    )
    assert asked == [(0, "dense"), (1, "sparse"), (1, "dense")]
    again = json.loads(record.read_text())
    sparse = [answer for answer in again["answers"] if answer["mode"] == "sparse"]
    assert [answer["question"] for answer in sparse] == [answer["question"] for answer in saved["answers"]]
    # What was asked before is kept to the letter.
    assert [a for a in sparse if a["clip"] == 0] == partial["answers"]
    assert {row["mode"]: row["mean"] for row in document["attended"]}["dense"] == 1

    other = [*LONG[:-1], "7", "--json", str(record)]
    error = _refused(monkeypatch, capsys, model, processor, *other)
    assert "holds the answers of a run with seed = 1, this one has 7. Name another file" in error
    record.write_text("[]")
    assert "holds no record of an evaluation" in _refused(monkeypatch, capsys, model, processor, *other)


def test_a_model_without_indexer_is_asked_in_the_modes_that_it_has(monkeypatch, capsys, model, processor):
    for layer in video_memory.decoder_layers(model):
        monkeypatch.setitem(layer._modules, "indexer", None)
        monkeypatch.setattr(layer, "other_selection", Selection(local_window=8))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "DIR", *LONG])
    monkeypatch.setattr(evaluate, "load", lambda name: (model, processor))
    evaluate.main()
    output, error = capsys.readouterr()
    assert "| questions | sparse | dense |" in output
    assert "This model has no indexer: the mode untrained is left out." in error
    assert "which the mode 'untrained' needs" in _refused(
        monkeypatch, capsys, model, processor, *LONG, "--modes", "untrained"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "4"], "--frames 4: give the shortest and the longest clip"),
        (["--kinds", "identity"], "--kinds identity: choose among what, colour"),
        (["--long", "--kinds", "when"], "--kinds when: choose among identity"),
        (["--long", "--frames", "50"], "--shown 60 shapes do not fit into --frames 50"),
        (["--questions", "0"], "--questions 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--size", "60"], "--size 60 must be a multiple of 56"),
        (["--json", "a.json", "--topk", "4"], "--topk, --json: only for long clips; add --long"),
        (["--clips", "4", "--modes", "dense", "--plot", "a.svg"], "--clips, --modes, --plot: only for long clips"),
        (["--long", "--topk", "0"], "--topk 0 must be at least 1"),
        (["--long", "--json", "absent/a.json"], "--json absent/a.json cannot be written, because there is no folder"),
        (["--long", "--plot", "a.doc"], "--plot: a.doc cannot be drawn; name a file that ends in ."),
    ],
)
def test_options_that_do_not_fit_end_before_the_model_is_loaded(monkeypatch, capsys, options, message):
    if "--plot" in options:
        pytest.importorskip("matplotlib", reason="plots need the extra `train`")
    assert message in _refused(monkeypatch, capsys, None, None, *options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "--model nope cannot be read: 'nope' is no folder, and no repository of the Hub has such a name"),
        ("FOLDER/config.json", "config.json' is no folder"),
        ("nobody/nothing", "--model nobody/nothing cannot be read: "),
        ("FOLDER", "is no checkpoint that Keye can load"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(monkeypatch, capsys, tmp_path, name, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", name.replace("FOLDER", str(tmp_path))])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"^evaluate: [^\n]*{message}[^\n]*\.\n\Z", said, re.MULTILINE)
    assert ("asking the Hub" in said) == ("nobody" in name) and "Traceback" not in said


def _points() -> dict:
    score = {"questions": 20, "right": 18, "percent": 90.0, "low": 69.9, "high": 97.2}
    rows = [
        {"frames": 16, "kind": kind, "distance": distance, "modes": {"sparse": score, "dense": score}}
        for kind in ("identity", "what")
        for distance in ("all", "4", "1,024–2,047")
    ]
    return {"accuracy": rows}


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_a_plot_is_written_from_the_json_file(monkeypatch, tmp_path, name, start):
    pytest.importorskip("matplotlib", reason="plots need the extra `train`")
    (tmp_path / "scores.json").write_text(json.dumps(_points()))
    monkeypatch.setattr(sys, "argv", ["score_plot", str(tmp_path / "scores.json"), str(tmp_path / name)])
    score_plot.main()
    assert (tmp_path / name).read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "scores.json"]


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = _refused(monkeypatch, capsys, None, None, *LONG, "--plot", "a.svg")
    assert "The plot needs matplotlib: `pip install matplotlib`" in error
