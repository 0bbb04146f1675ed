"""`conversion.compose`: a DeepSeek decoder under a Keye tower. The values are both sources', bit for bit; the result
computes what Transformers' own decoder computes, loads as remote code and answers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

import conversion.job
import conversion.shard_writer
from conversion.compose import compose, main
from conversion.verify import verify
from modeling_keye import KeyeForVideoQA, KeyeProcessor
from tests.conversion.ours_by_hand import our_tensors, write_ours
from tests.conversion.published import (
    VISION_LAYOUTS,
    dequantised,
    published_checkpoint,
    vocabulary,
    write_published,
)
from tests.hub.conftest import clip, probe  # noqa: F401 fixtures
from tests.model.test_oracles import (
    DEEPSEEK_FIELDS,
    TOLERANCE,
    TOPK,
    SelectionSwap,
    largest_difference,
    peer_of,
    run_steps,
)

BLOCK = (16, 16)
FREE = len(vocabulary("deepseek_v32"))  # the first id behind TEXT's tokens
ADDED = [
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
    "<|fast_start|>",
    "<|fast_end|>",
    "<|im_start|>",
    "<|im_end|>",
]
TOWER, PROJECTOR = "model.visual.", "model.projector."


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def composed(text: Path, vision: Path, dst: Path, **options) -> Path:
    compose(text, vision, dst, progress=False, **options)
    return dst


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("text") / "v32", "deepseek_v32", mtp=True, shards=2)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("vision") / "keye2", "keye_vl_2", shards=2)


@pytest.fixture(scope="module")
def flagship(text, vision, tmp_path_factory) -> Path:
    return composed(text, vision, tmp_path_factory.mktemp("dst") / "flagship", max_shard_size="1MB")


@pytest.mark.parametrize("fp8", [False, BLOCK], ids=["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["deepseek_v3", "deepseek_v32"])
def test_text_values_are_those_of_deepseek(layout, fp8, vision, tmp_path):
    text = write_published(tmp_path / "text", layout, fp8=fp8, mtp=True)
    found = weights(composed(text, vision, tmp_path / "dst"))
    _, tensors = published_checkpoint(layout, fp8=fp8, mtp=True)
    if fp8:
        meant = dequantised(tensors, BLOCK)
        tensors = {n: meant[n].bfloat16() if tensors[n].dtype == torch.float8_e4m3fn else tensors[n] for n in meant}
    expected = our_tensors(layout, tensors)
    assert {name for name in found if not name.startswith((TOWER, PROJECTOR))} == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    # The other tool says so, too.
    report = verify(text, tmp_path / "dst")
    assert report.equal and any("text checkpoint" in warning for warning in report.warnings), report.verdict
    assert "warning" in report.verdict


@pytest.mark.parametrize("layout", [*VISION_LAYOUTS, "ours"])
def test_tower_values_are_those_of_keye(layout, text, tmp_path):
    source = "keye_vl_1_5" if layout == "ours" else layout
    if layout == "ours":
        vision = write_ours(tmp_path / "vision", source, seed=3)
    else:
        options = {"fp8": BLOCK} if layout == "keye_vl_671b" else {}
        vision = write_published(tmp_path / "vision", layout, seed=3, nested_weights=layout == "keye_vl_1_5", **options)
    dst = composed(text, vision, tmp_path / "dst")
    found = weights(dst)
    _, tensors = published_checkpoint(source, seed=3)
    expected = {name: tensor for name, tensor in our_tensors(source, tensors).items() if name.startswith(TOWER)}
    assert {name for name in found if name.startswith(TOWER)} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((dst / "config.json").read_text())
    assert config["vision_config"]["projector_norm"] == "post_merge"
    assert config["vision_config"]["video_attention"] == config["video_position_ids"] == "frame"
    assert found[f"{PROJECTOR}pre_norm.weight"].shape == (4 * 36,)
    assert found[f"{PROJECTOR}linear_2.weight"].shape == (152, 4 * 36)


def test_projector_is_new_and_follows_the_seed(text, vision, flagship, tmp_path):
    found = {name.removeprefix(PROJECTOR): t for name, t in weights(flagship).items() if name.startswith(PROJECTOR)}
    assert set(found) == {
        f"{part}.{kind}" for part in ("pre_norm", "linear_1", "linear_2") for kind in ("weight", "bias")
    }
    assert bool((found["pre_norm.weight"] == 1).all())
    for name in ("pre_norm.bias", "linear_1.bias", "linear_2.bias"):
        assert not found[name].any()
    for name in ("linear_1.weight", "linear_2.weight"):
        drawn = found[name].double()
        assert drawn.std().item() == pytest.approx(0.02, rel=0.03) and abs(drawn.mean().item()) < 0.001
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}

    again = composed(text, vision, tmp_path / "again", max_shard_size="1MB")
    assert digests(again) == digests(flagship)
    other = weights(composed(text, vision, tmp_path / "other", seed=1))
    changed = [name for name, tensor in weights(flagship).items() if not torch.equal(tensor, other[name])]
    assert sorted(changed) == [f"{PROJECTOR}linear_1.weight", f"{PROJECTOR}linear_2.weight"]


def test_configuration_and_record(flagship, text):
    config = json.loads((flagship / "config.json").read_text())
    decoder = config["text_config"]
    assert (decoder["attention_type"], decoder["indexer_type"], decoder["index_topk"]) == ("mla", "deepseek_v32", 16)
    assert decoder["local_window"] is None and decoder["anchor_stride"] is None
    assert "mrope_section" not in decoder["rope_parameters"] and decoder["rope_parameters"]["rope_type"] == "yarn"
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["KeyeForVideoQA"]
    ids = {f"{name}_token_id": FREE + place for place, name in ((0, "vision_start"), (1, "vision_end"))}
    ids |= {"image_token_id": FREE + 3, "video_token_id": FREE + 4}
    assert {name: config[name] for name in ids} == ids
    generation = json.loads((flagship / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [FREE + 3, FREE + 4]
    assert generation["eos_token_id"] == [FREE + 9, 1] and generation["pad_token_id"] == 1
    record = json.loads((flagship / "conversion.json").read_text())
    assert record["format"] == "composed" and record["seed"] == 0
    assert record["text"] == {"name": "v32", "revision": None, "layout": "deepseek_v32"}
    assert record["vision"]["layout"] == "keye_vl_2"
    assert len(record["initialised"]) == 6 and str(text.parent) not in json.dumps(record)


def test_window_and_anchors_are_asked_for(text, vision, tmp_path):
    dense = write_published(tmp_path / "text", "deepseek_v3")
    plain = json.loads((composed(dense, vision, tmp_path / "plain") / "config.json").read_text())["text_config"]
    assert set(plain["layer_types"]) == {"full_attention"}
    chosen = composed(dense, vision, tmp_path / "chosen", local_window=7, anchor_stride=5)
    chosen = json.loads((chosen / "config.json").read_text())["text_config"]
    assert (chosen["local_window"], chosen["anchor_stride"], chosen["indexer_type"]) == (7, 5, None)
    assert "full_attention" not in chosen["layer_types"]


def test_dtype(text, vision, tmp_path):
    found = weights(composed(text, vision, tmp_path / "dst", dtype="float32"))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    half = weights(composed(text, vision, tmp_path / "half", dtype="float16"))
    kept = {name for name, tensor in half.items() if tensor.dtype != torch.float16}
    assert kept == {name for name in half if name.endswith("e_score_correction_bias")}
    assert verify(text, tmp_path / "dst", allow_dtype=True).equal


class TestTokenizer:
    def test_tokens_are_added_behind_those_of_the_text(self, flagship, text):
        processor = KeyeProcessor.from_pretrained(flagship)
        tokenizer = processor.tokenizer
        assert tokenizer.convert_tokens_to_ids(ADDED) == list(range(FREE, FREE + len(ADDED)))
        before = Tokenizer.from_file(str(text / "tokenizer.json"))
        assert before.get_vocab_size() == FREE
        words = "A red ball, 12.5 seconds!\n好"
        assert (
            tokenizer(words, add_special_tokens=False).input_ids == before.encode(words, add_special_tokens=False).ids
        )
        marked = tokenizer("a<|frame|>b<|video_pad|>", add_special_tokens=False).input_ids
        assert tokenizer.decode(marked, skip_special_tokens=True) == "ab"
        assert (processor.video_processor.family, processor.image_processor.family) == ("keye_vl_2", "keye_vl_2")

    def test_too_few_rows(self, vision, tmp_path, capsys):
        rows = FREE + len(ADDED) - 1
        text = write_published(tmp_path / "text", "deepseek_v32", vocab_size=rows)
        assert main(["--text", str(text), "--vision", str(vision), str(tmp_path / "dst")]) == 1
        error = capsys.readouterr().err
        assert (
            f"has {rows} embedding rows for {FREE} tokens, but {len(ADDED)} more are needed: <|vision_start|>" in error
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
        exact = write_published(tmp_path / "exact", "deepseek_v32", vocab_size=rows + 1)
        composed(exact, vision, tmp_path / "dst")

    def test_tokens_that_are_there_are_used(self, vision, tmp_path):
        text = write_published(tmp_path / "text", "deepseek_v32")
        tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|video_pad|>", "<|frame|>")])
        tokenizer.save(str(text / "tokenizer.json"))
        config = json.loads((composed(text, vision, tmp_path / "dst") / "config.json").read_text())
        assert config["video_token_id"] == FREE and config["vision_start_token_id"] == FREE + 2
        assert config["image_token_id"] == FREE + 5

    def test_without_tokenizer_the_ids_are_assumed(self, vision, tmp_path, capsys):
        text = write_published(tmp_path / "text", "deepseek_v32", tokenizer=False)
        dst = composed(text, vision, tmp_path / "dst")
        assert "TEXT has no tokenizer.json, so the result has no tokenizer" in capsys.readouterr().err
        config = json.loads((dst / "config.json").read_text())
        rows = config["text_config"]["vocab_size"]
        assert [config[name] for name in ("vision_start_token_id", "image_token_id", "video_token_id")] == [
            rows - 5,
            rows - 3,
            rows - 2,
        ]
        assert not (dst / "tokenizer.json").exists() and not (dst / "processor_config.json").exists()
        assert json.loads((dst / "generation_config.json").read_text())["eos_token_id"] == 1
        KeyeForVideoQA.from_pretrained(dst)

    @pytest.mark.parametrize("thinks", [False, True])
    def test_own_turns_of_deepseek(self, thinks, vision, tmp_path):
        text = write_published(tmp_path / "text", "deepseek_v32")
        turns = ["<｜User｜>", "<｜Assistant｜>", *(["<think>", "</think>"] if thinks else [])]
        tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in turns])
        tokenizer.save(str(text / "tokenizer.json"))
        dst = composed(text, vision, tmp_path / "dst")
        processor = KeyeProcessor.from_pretrained(dst)
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "video", "path": "x.mp4"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]},
            {"role": "user", "content": [{"type": "image", "path": "x.png"}, {"type": "text", "text": "And here?"}]},
        ]
        closed = "</think>" if thinks else ""
        begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
        media = [f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image")]
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
            f"{begin}Be brief.<｜User｜>{media[0]}What?<｜Assistant｜>{closed}A ball.{end}"
            f"<｜User｜>{media[1]}And here?<｜Assistant｜>{closed}"
        )
        if thinks:
            prompt = processor.apply_chat_template(messages[-1:], add_generation_prompt=True, thinking=True)
            assert prompt.endswith("<｜Assistant｜><think>")
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
        assert ids[0] == 0 and ids.count(0) == 1
        assert processor.decode([i for i, kept in zip(ids, mask, strict=True) if kept]) == f"Yes{end}"
        generation = json.loads((dst / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 1
        assert "<|im_start|>" not in processor.tokenizer.get_vocab()


def fp32_pair(tmp_path: Path, layout: str, **overrides) -> tuple[KeyeForVideoQA, dict[str, torch.Tensor]]:
    """The composed model in float32, and the text's tensors under the names of Transformers' decoder, made by hand."""
    options = {"dtype": torch.float32, "mtp": True, **overrides}
    text = write_published(tmp_path / "text", layout, **options)
    vision = write_published(tmp_path / "vision", "keye_vl_preview", dtype=torch.float32)
    model = KeyeForVideoQA.from_pretrained(composed(text, vision, tmp_path / "dst")).eval()
    _, tensors = published_checkpoint(layout, **options)
    tensors = our_tensors(layout, tensors)
    return model, {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}


@pytest.mark.compat
def test_logits_of_deepseek_v32_where_the_indexer_chooses(tmp_path, monkeypatch):
    model, tensors = fp32_pair(tmp_path, "deepseek_v32", index_topk=TOPK)
    index = {
        name: getattr(model.config.text_config, name) for name in ("index_topk", "index_n_heads", "index_head_dim")
    }
    peer = peer_of(model, DeepseekV32Config, DeepseekV32ForCausalLM, DEEPSEEK_FIELDS, **index)
    peer.load_state_dict(tensors)
    swap = SelectionSwap(model, peer, monkeypatch)
    prompt, steps = 320, 8
    ids = torch.randint(3, FREE, (1, prompt + steps), generator=torch.Generator().manual_seed(0))
    worst, size = 0.0, 0.0
    peer_steps = run_steps(peer, ids, prompt)
    for begin, output in run_steps(model, ids, prompt, output_indexer_selections=True):
        swap.first_slot, swap.ours = begin, output.indexer_selections
        _, theirs = next(peer_steps)
        worst = max(worst, largest_difference(output.logits, theirs.logits))
        size = max(size, float(theirs.logits.abs().max()))
    print(
        f"composed, deepseek_v32: largest logit difference {worst:.1e} of {size:.1f}; {swap.ties} ties in {swap.rows}"
    )
    assert swap.rows == (prompt + steps) * 3
    assert worst <= TOLERANCE and size > 1
    assert {entry["ran"] for entry in model.attention_backend_report()} == {"torch"}


@pytest.mark.compat
def test_logits_of_deepseek_v3(tmp_path):
    model, tensors = fp32_pair(tmp_path, "deepseek_v3", fp8=False)
    peer = peer_of(model, DeepseekV3Config, DeepseekV3ForCausalLM, (*DEEPSEEK_FIELDS, "rope_interleave"))
    peer.load_state_dict(tensors)
    ids = torch.randint(3, FREE, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, peer(ids).logits
    assert largest_difference(ours, theirs) <= TOLERANCE and float(theirs.abs().max()) > 1


def test_loads_as_remote_code_and_answers(flagship, clip, probe):  # noqa: F811
    from tests.model.checkpoints import encode

    model = KeyeForVideoQA.from_pretrained(flagship).eval()
    inputs = encode(KeyeProcessor.from_pretrained(flagship), clip)
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) > 16
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    (loaded,) = probe(("load", {"folder": flagship, "clip": clip}))
    assert loaded["tokens"] == output[0, inputs["input_ids"].shape[1] :].tolist()
    # Random weights may end the answer early, on some processors and not on others.
    ends = torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist()
    assert len(loaded["tokens"]) == 8 or loaded["tokens"][-1] in ends
    assert set(loaded["classes"].values()) == {"transformers_modules"}
    # Pictures reach the decoder, if only through an untrained projector.
    with torch.no_grad():
        seen = model(**inputs).logits
        blank = model(**{**inputs, "pixel_values_videos": torch.zeros_like(inputs["pixel_values_videos"])}).logits
    assert largest_difference(seen, blank) > 0


class TestRefusals:
    def refused(self, capsys, tmp_path, text, vision, *options) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        code = main(["--text", str(text), "--vision", str(vision), str(tmp_path / "dst"), *options])
        captured = capsys.readouterr()
        assert code == 1 and captured.out == ""
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return captured.err

    def test_text_that_is_no_deepseek(self, vision, tmp_path, capsys):
        error = self.refused(capsys, tmp_path, vision, vision)
        assert "has the layout 'keye_vl_2'; it must be a DeepSeek-V3 or V3.2 checkpoint" in error
        ours = write_ours(tmp_path / "ours", "keye_vl_1_5")
        assert "has the layout 'ours'" in self.refused(capsys, tmp_path, ours, vision)

    def test_vision_without_tower(self, text, tmp_path, capsys):
        error = self.refused(capsys, tmp_path, text, text)
        assert "has the layout 'deepseek_v32', which holds no vision tower" in error

    def test_folders_that_are_no_checkpoints(self, text, vision, tmp_path, capsys):
        error = self.refused(capsys, tmp_path, tmp_path / "none", vision)
        assert f"{tmp_path / 'none'} is no folder" in error
        (tmp_path / "empty").mkdir()
        error = self.refused(capsys, tmp_path, text, tmp_path / "empty")
        assert f"VISION ({tmp_path / 'empty'}) cannot be read: it holds no config.json" in error

    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.indexer.wk.weight", "lm_head.weight"])
    def test_missing_tensor(self, name, vision, tmp_path, capsys):
        text = write_published(tmp_path / "text", "deepseek_v32")
        tensors = load_file(text / "model.safetensors")
        del tensors[name]
        save_file(tensors, text / "model.safetensors")
        error = self.refused(capsys, tmp_path, text, vision)
        assert "TEXT (" in error and name.removeprefix("model.") in error

    def test_unknown_and_misshapen_tensors(self, text, tmp_path, capsys):
        vision = write_published(tmp_path / "vision", "keye_vl_1_5")
        tensors = load_file(vision / "model.safetensors")
        tensors["visual.vision_model.post_layernorm.gain"] = torch.ones(3)
        name = "visual.vision_model.encoder.layers.1.mlp.fc1.bias"
        tensors[name] = tensors[name][1:].clone()
        save_file(tensors, vision / "model.safetensors")
        error = self.refused(capsys, tmp_path, text, vision)
        assert "VISION (" in error and "post_layernorm.gain" in error and name in error

    def test_scale_that_is_no_number(self, vision, tmp_path, capsys):
        text = write_published(tmp_path / "text", "deepseek_v3", fp8=BLOCK)
        tensors = load_file(text / "model.safetensors")
        name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
        tensors[name][1, 1] = float("inf")
        save_file(tensors, text / "model.safetensors")
        assert name in self.refused(capsys, tmp_path, text, vision)

    def test_occupied_destination(self, text, vision, tmp_path, capsys):
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "note.txt").write_text("mine")
        assert "is not an empty folder" in self.refused(capsys, tmp_path, text, vision)
        assert (tmp_path / "dst" / "note.txt").read_text() == "mine"

    def test_options(self, text, vision, tmp_path, capsys):
        assert "no size of a file" in self.refused(capsys, tmp_path, text, vision, "--max-shard-size", "many")
        assert "`anchor_stride` is 0" in self.refused(capsys, tmp_path, text, vision, "--anchor-stride", "0")
        with pytest.raises(ValueError, match="`dtype` is 'int8'; it must be one of 'bfloat16'"):
            compose(text, vision, tmp_path / "dst", dtype="int8")


def test_dry_run_writes_nothing(text, vision, tmp_path, capsys):
    assert main(["--text", str(text), "--vision", str(vision), str(tmp_path / "dst"), "--dry-run"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["dry_run"] is True and summary["tensors"] > 60
    for fact in (
        "text: deepseek_v32, ",
        "vision: keye_vl_2, ",
        "new: projector 144 -> 152, 6 tensors in bfloat16, not trained",
        "attention: indexer deepseek_v32, local window None, anchor stride None",
        f"<|video_pad|> {FREE + 4}",
    ):
        assert fact in captured.err
    assert list(tmp_path.iterdir()) == []


def test_proof_is_printed(text, vision, tmp_path, capsys):
    assert main(["--text", str(text), "--vision", str(vision), str(tmp_path / "dst")]) == 0
    captured = capsys.readouterr()
    found = weights(tmp_path / "dst")
    decoder = {name: t for name, t in found.items() if not name.startswith((TOWER, PROJECTOR))}
    values = sum(tensor.numel() for tensor in decoder.values())
    line = f"verified: text, {len(decoder)} tensors, {values:,} values, bit for bit equal to {text}"
    assert line in captured.err
    total = sum(tensor.numel() for tensor in found.values())
    assert f"parameters: {total:,} stored = " in captured.err and " projector + " in captured.err
    summary = json.loads(captured.out)
    assert (summary["tensors"], summary["parameters"]) == (len(found), total)


def test_stopped_run_goes_on_to_the_same_bytes(text, vision, flagship, tmp_path, monkeypatch, capsys):
    arguments = ["--text", str(text), "--vision", str(vision), str(tmp_path / "dst"), "--max-shard-size", "1MB"]
    write = conversion.shard_writer._write_tensor
    calls = []

    def stopping(descriptor, stream, progress):
        calls.append(stream.name)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return write(descriptor, stream, progress)

    with monkeypatch.context() as patched:
        patched.setattr(conversion.shard_writer, "_write_tensor", stopping)
        assert main(arguments) == 130
    assert not (tmp_path / "dst").exists()
    # Another seed would be another model.
    capsys.readouterr()
    assert main([*arguments, "--seed", "5"]) == 1
    assert "--seed: was 0, is 5" in capsys.readouterr().err
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["resumed_tensors"] == 39
    assert digests(tmp_path / "dst") == digests(flagship)


def test_damage_between_writing_and_proof_is_found(text, vision, tmp_path, monkeypatch, capsys):
    write = conversion.job.write_shards

    def damaging(staging, shards, progress):
        written = write(staging, shards, progress)
        with open(staging.output / shards[0].file, "r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        return written

    monkeypatch.setattr(conversion.job, "write_shards", damaging)
    assert main(["--text", str(text), "--vision", str(vision), str(tmp_path / "dst")]) == 1
    error = capsys.readouterr().err
    assert "what was written (B) is not what its source holds (A): " in error and "1 element differs" in error
    assert not (tmp_path / "dst").exists()
