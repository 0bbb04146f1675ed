"""`from_pretrained` on published folders: forms that mean the same, number types, places, saving, new parts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from transformers.utils import logging

from conversion.convert import convert
from modeling_keye import KeyeProcessor
from modeling_keye.checkpoint_keye import CheckpointError
from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.modeling_keye import KeyeForVideoQA, KeyeModel, KeyeTextModel, KeyeVisionModel
from tests.conversion.loading import load_published as load
from tests.conversion.loading import logits, recorded_reads, same, state_of
from tests.conversion.published import (
    LAYOUT_NAMES,
    VISION_LAYOUTS,
    dequantised,
    published_checkpoint,
    write_published,
)
from tests.model.factories import tiny_model

pytestmark = pytest.mark.compat

TEXT_ONLY = ("deepseek_v3", "deepseek_v32")


@pytest.fixture
def library_messages(caplog):
    """What the library would have printed."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    return recorded_reads(monkeypatch)


# What may be left out, and forms that mean the same.

IGNORABLE = [
    ("keye_vl_preview", {"inv_freq": True}, {"head": False, "packing": False}),
    ("keye_vl_1_5", {"inv_freq": True}, {"head": False, "packing": False}),
    ("keye_vl_671b", {"mtp": True, "inv_freq": True}, {"head": False, "packing": False}),
    ("keye_vl_671b", {"mtp": True, "fp8": True}, {"head": False, "fp8": True}),
    ("keye_vl_2", {"inv_freq": True}, {"packing": False}),
    ("deepseek_v3", {"mtp": True, "inv_freq": True}, {}),
    ("deepseek_v32", {"mtp": True}, {}),
]


@pytest.mark.parametrize("layout, more, less", IGNORABLE)
def test_ignorable_tensors_change_nothing(layout, more, less, tmp_path, library_messages):
    states = []
    for number, options in enumerate((more, less)):
        folder = write_published(tmp_path / str(number), layout, tokenizer=False, **options)
        torch.manual_seed(0)  # for the new tower of a text checkpoint
        model, info = load(folder, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
        assert layout in TEXT_ONLY or not info["missing_keys"]
        states.append(model.state_dict())
    assert same(*states)
    if layout not in TEXT_ONLY:
        assert library_messages.text == ""


FORMS = {
    "three files": {"shards": 3},
    "nested config": {"nested_config": True},
    "saved again": {"resaved": True},
    "saved again, nested": {"resaved": True, "nested_config": True},
    "saved by version 5": {"resaved": "rope_parameters"},
    "saved by version 5, nested": {"resaved": "rope_parameters", "nested_config": True},
    "nested names": {"nested_weights": True},
    "nested names, projector": {"nested_weights": "projector", "nested_config": True, "shards": 2},
}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_form_of_a_checkpoint_loads_alike(layout, tmp_path):
    def made(name: str, **options):
        torch.manual_seed(0)
        return load(write_published(tmp_path / name.replace(" ", "-"), layout, tokenizer=False, **options))

    plain = made("plain")
    expected = plain.config.to_dict()
    for form, options in FORMS.items():
        if layout in TEXT_ONLY and ("nested_weights" in options or "nested_config" in options):
            continue  # a text model has nothing to nest
        model = made(form, **options)
        assert same(model.state_dict(), plain.state_dict()), form
        assert {**model.config.to_dict(), "_name_or_path": None} == {**expected, "_name_or_path": None}, form


def test_experts_fused_or_not(tmp_path):
    fused = state_of(write_published(tmp_path / "fused", "keye_vl_2"))
    unfused = state_of(write_published(tmp_path / "unfused", "keye_vl_2", experts="unfused", shards=3))
    assert same(fused, unfused)
    _, tensors = published_checkpoint("keye_vl_2", experts="unfused")
    gate_up = fused["model.language_model.layers.2.mlp.experts.gate_up_proj"]
    down = fused["model.language_model.layers.2.mlp.experts.down_proj"]
    for e in range(9):
        single = [tensors[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        assert torch.equal(gate_up[e], torch.cat(single[:2])) and torch.equal(down[e], single[2])


@pytest.mark.parametrize("square, name", [(True, "gate_up_proj"), ("down", "down_proj")])
def test_square_experts_are_turned_by_the_family(square, name, tmp_path):
    """Both orientations have this shape, so only the layout can say which one the file holds."""
    _, tensors = published_checkpoint("keye_vl_2", square=square)
    stored = tensors[f"model.layers.1.mlp.experts.{name}"]
    assert stored.shape[1] == stored.shape[2]
    fused = load(write_published(tmp_path / "fused", "keye_vl_2", square=square))
    assert torch.equal(fused.state_dict()[f"model.language_model.layers.1.mlp.experts.{name}"], stored.transpose(1, 2))
    unfused = state_of(write_published(tmp_path / "unfused", "keye_vl_2", square=square, experts="unfused"))
    assert same(fused.state_dict(), unfused)
    fused.save_pretrained(tmp_path / "ours")  # in which the same shape is not turned
    assert same(KeyeForVideoQA.from_pretrained(tmp_path / "ours").state_dict(), fused.state_dict())


@pytest.mark.parametrize("keep_config", [False, True])
def test_weights_without_indexer_attend_densely(keep_config, tmp_path):
    with_indexer = load(write_published(tmp_path / "with", "keye_vl_2"), dtype=torch.float32)
    folder = write_published(tmp_path / "without", "keye_vl_2", indexer=False, shards=2)
    if keep_config:  # the weights decide
        (folder / "config.json").write_text((tmp_path / "with" / "config.json").read_text())
    dense = load(folder, dtype=torch.float32)
    assert dense.config.text_config.indexer_type is None
    assert set(with_indexer.state_dict()) - set(dense.state_dict()) == {
        name for name in with_indexer.state_dict() if ".indexer." in name
    }
    assert (logits(with_indexer) - logits(dense)).abs().max() > 0.1
    within_budget = with_indexer.config.text_config.index_topk
    assert (logits(with_indexer, within_budget) - logits(dense, within_budget)).abs().max() < 2e-5


def test_indexer_sizes_that_the_file_leaves_out(tmp_path):
    folder = write_published(
        tmp_path, "keye_vl_2", sa_config={"indexer_num_heads": None, "indexer_head_dim": None, "topk": None}
    )
    model = load(folder)
    text = model.config.text_config
    assert (text.index_n_heads, text.index_head_dim, text.index_topk) == (4, 128, 2048)
    assert model.model.language_model.layers[0].self_attn.indexer.q_proj.weight.shape == (4 * 128 + 4, 56)


def test_links_into_another_folder(tmp_path):
    """As the Hub's cache keeps them: files under their hashes, links under their names."""
    folder = write_published(tmp_path / "plain", "keye_vl_2", shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / f"{number:04x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:04x}")
    assert same(state_of(snapshot), state_of(folder))


def test_subfolder(tmp_path):
    folder = write_published(tmp_path / "parts" / "model", "keye_vl_2", shards=2)
    model = KeyeForVideoQA.from_pretrained(tmp_path / "parts", subfolder="model")
    assert same(model.state_dict(), state_of(folder))


def test_parts_of_a_published_model(tmp_path):
    folder = write_published(tmp_path, "keye_vl_2", shards=2)
    whole = load(folder).state_dict()
    for part, prefix in (
        (KeyeModel, "model."),
        (KeyeTextModel, "model.language_model."),
        (KeyeVisionModel, "model.visual."),
    ):
        model = part.from_pretrained(folder)
        expected = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
        assert same(model.state_dict(), expected)


# Number types and places.

KEPT_IN_FLOAT32 = ("e_score_correction_bias", "indexer.weights_proj.weight")


@pytest.mark.parametrize("layout", ["keye_vl_2", "deepseek_v32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_number_types(layout, stored, tmp_path):
    folder = write_published(tmp_path, layout, dtype=stored, tokenizer=False)
    _, tensors = published_checkpoint(layout, dtype=stored)
    name = "model.layers.1.self_attn.o_proj.weight"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, "auto", "float32", None):
        options = {} if dtype is None else {"dtype": dtype}
        model = load(folder, **options)
        expected = {"auto": stored, None: stored, "float32": torch.float32}.get(dtype, dtype)
        assert model.dtype == expected
        for key, tensor in model.state_dict().items():
            exact = key.endswith(KEPT_IN_FLOAT32)
            assert tensor.dtype == (torch.float32 if exact else expected), f"{key} with {dtype}"
        state = model.state_dict()
        ours = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(state[ours], tensors[name].to(expected))
        if layout == "deepseek_v32":
            bias = "model.layers.1.mlp.gate.e_score_correction_bias"
            assert torch.equal(state[bias.replace("model.", "model.language_model.", 1)], tensors[bias])


@pytest.mark.parametrize("layout", ["keye_vl_2", "keye_vl_671b"])
def test_device_maps(layout, tmp_path):
    folder = write_published(tmp_path, layout, tokenizer=False, shards=2, fp8=layout == "keye_vl_671b")
    expected = state_of(folder)
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        model = load(folder, **options)
        assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
        assert same(model.state_dict(), expected)
    assert same(state_of(folder, low_cpu_mem_usage=True), expected)
    with torch.device("cpu"):
        assert same(state_of(folder), expected)


@pytest.mark.parametrize("limit", ["100KB", "600KB"])
def test_weights_on_disk(limit, tmp_path):
    folder = write_published(tmp_path / "model", "keye_vl_2", tokenizer=False, shards=2)
    whole = load(folder)
    model = load(folder, device_map="auto", max_memory={"cpu": limit}, offload_folder=tmp_path / "disk")
    places = set(model.hf_device_map.values())
    assert "disk" in places and (limit == "100KB" or "cpu" in places)
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(ValueError, match="offload_folder"):
        load(folder, device_map="auto", max_memory={"cpu": limit})


# fp8.


@pytest.mark.parametrize("layout", ["keye_vl_671b", "deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize("block", [(128, 128), (16, 48)])
def test_fp8_blocks_are_multiplied_out_exactly(layout, block, tmp_path):
    options = {"fp8": block, "fp8_projector": layout == "keye_vl_671b", "tokenizer": False}
    folder = write_published(tmp_path, layout, shards=2, **options)
    _, tensors = published_checkpoint(layout, fp8=block, fp8_projector=layout == "keye_vl_671b")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape[0] % block[0] and tensors[name].dtype == torch.float8_e4m3fn
    meaning = dequantised(tensors, block)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(folder, dtype=dtype)
        state = model.state_dict()
        compared = 0
        for published, value in meaning.items():
            if f"{published}_scale_inv" not in tensors:
                continue
            ours = published.replace("mlp_AR.", "model.projector.")
            ours = ours.replace("model.layers.", "model.language_model.layers.")
            if ".mlp.experts." in ours:
                prefix, number, part, _ = ours.rsplit(".", 3)
                if part == "down_proj":
                    got = state[f"{prefix}.down_proj"][int(number)]
                else:
                    got = state[f"{prefix}.gate_up_proj"][int(number)].chunk(2)[part == "up_proj"]
            else:
                got = state[ours]
            assert torch.equal(got, value.to(got.dtype)), published
            compared += 1
        assert compared == sum(name.endswith("_scale_inv") for name in tensors)
        assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "ours")
    assert "quantization_config" not in (tmp_path / "ours" / "config.json").read_text()
    assert same(KeyeForVideoQA.from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())


# Saving.


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_saved_again_it_is_ours(layout, tmp_path):
    options = {"fp8": True, "mtp": True} if layout == "keye_vl_671b" else {}
    model = load(write_published(tmp_path / "published", layout, shards=2, **options))
    ours = tmp_path / "ours"
    model.save_pretrained(ours, max_shard_size="400KB")
    config = json.loads((ours / "config.json").read_text())
    assert config["architectures"] == ["KeyeForVideoQA"] and config["model_type"] == "keye"
    assert config["auto_map"]["AutoModel"] == "modeling_keye.KeyeForVideoQA"
    assert not {"rope_scaling", "rope_theta", "sa_config", "torch_dtype", "quantization_config"} & set(config)
    names = json.loads((ours / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(model.state_dict())
    again = KeyeForVideoQA.from_pretrained(ours)
    assert same(again.state_dict(), model.state_dict())
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(ours)} or (
        again.config.to_diff_dict() == model.config.to_diff_dict()
    )
    assert torch.equal(logits(again), logits(model))
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_saved_again_it_loads_as_remote_code(tmp_path):
    model = load(write_published(tmp_path / "published", "keye_vl_2"))
    model.save_pretrained(tmp_path / "ours")
    remote = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert same(remote.state_dict(), model.state_dict())
    assert torch.equal(logits(remote), logits(model))


@pytest.mark.parametrize("layout", ["keye_vl_1_5", "keye_vl_2"])
def test_a_batch_answers_as_each_prompt_alone(layout, tmp_path):
    """Prompts of different length, by the published tokenizer and by the one that a conversion saves."""
    published, ours = write_published(tmp_path / "published", layout), tmp_path / "ours"
    convert(published, ours, progress=False)
    questions = ("Why?", "What is to be seen in the last second of the video, and where?")
    prompts = [[{"role": "user", "content": question}] for question in questions]
    for folder in (published, ours):
        batch = answers(folder, prompts)
        assert not torch.equal(batch[0], batch[1])
        assert all(torch.equal(batch[place], answers(folder, [prompt])[0]) for place, prompt in enumerate(prompts))


def answers(folder: Path, conversations: list[list[dict]]) -> torch.Tensor:
    """Eight tokens for each conversation, [B, 8]."""
    inputs = KeyeProcessor.from_pretrained(folder).apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    made = load(folder).generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    return made[:, inputs["input_ids"].shape[1] :]


def test_generation_settings_of_the_checkpoint(tmp_path):
    model = load(write_published(tmp_path, "keye_vl_2"))
    published = json.loads((tmp_path / "generation_config.json").read_text())
    settings = model.generation_config
    assert settings.eos_token_id == published["eos_token_id"] and len(settings.eos_token_id) == 2
    assert (settings.temperature, settings.top_k, settings.top_p) == (0.6, 20, 0.95)
    # No placeholder is ever written, whose pixels nobody gave.
    assert settings.suppress_tokens == [model.config.image_token_id, model.config.video_token_id]
    torch.manual_seed(0)
    tokens = model.generate(torch.tensor([[72, 73, 74]]), max_new_tokens=40, do_sample=True, temperature=50.0, top_k=0)
    assert not set(settings.suppress_tokens) & set(tokens[0].tolist())


# New parts.


@pytest.mark.parametrize("layout", ["keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "deepseek_v3"])
def test_dense_checkpoint_with_a_new_indexer(layout, tmp_path):
    folder = write_published(tmp_path, layout, tokenizer=False)
    dense = load(folder, dtype=torch.float32)
    sizes = {"index_n_heads": 3, "index_head_dim": 16}
    config = KeyeConfig.from_pretrained(folder).with_indexer(**sizes)
    text = config.text_config
    assert text.indexer_type == (
        "keye_vl_2" if layout.startswith("keye_vl_") and "671b" not in layout else "deepseek_v32"
    )
    assert text.index_topk == text.max_position_embeddings
    torch.manual_seed(3)
    model, info = load(folder, config=config, dtype=torch.float32, output_loading_info=True)
    new = {name for name in model.state_dict() if ".indexer." in name}
    assert new == {name for name in info["missing_keys"] if "visual" not in name and "projector" not in name}
    state = model.state_dict()
    for name in new:
        if "norm" in name:
            assert torch.equal(state[name], torch.full_like(state[name], float(name.endswith("weight")))), name
        else:
            assert 0.5 < float(state[name].std()) / text.initializer_range < 1.5, name
    stored = [name for name in dense.state_dict() if not name.startswith(("model.visual.", "model.projector."))]
    assert all(torch.equal(state[name], dense.state_dict()[name]) for name in stored)
    # Dense until the budget is lowered.
    assert (logits(model) - logits(dense)).abs().max() < 2e-5
    torch.manual_seed(3)
    assert same(state_of(folder, config=config, dtype=torch.float32), state)
    lowered = KeyeConfig.from_pretrained(folder).with_indexer(**sizes, index_topk=20)
    with pytest.raises(CheckpointError, match="no indexer weights.*with_indexer"):
        load(folder, config=lowered)
    model.save_pretrained(tmp_path / "ours")
    trained = KeyeForVideoQA.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(trained), logits(model))
    config = KeyeConfig.from_pretrained(tmp_path / "ours")
    config.text_config.index_topk = 20
    lowered = KeyeForVideoQA.from_pretrained(tmp_path / "ours", config=config)
    assert (logits(lowered) - logits(dense)).abs().max() > 0.1


def test_an_indexer_twice_is_refused(tmp_path):
    folder = write_published(tmp_path, "keye_vl_2", tokenizer=False)
    with pytest.raises(ValueError, match="keye_vl_2.*already"):
        KeyeConfig.from_pretrained(folder).with_indexer()


@pytest.mark.parametrize("layout", TEXT_ONLY)
def test_text_checkpoint_gets_a_new_vision_part(layout, tmp_path, library_messages):
    folder = write_published(tmp_path, layout, tokenizer=False, shards=2)
    torch.manual_seed(1)
    model, info = load(folder, output_loading_info=True)
    vision = {name for name in model.state_dict() if name.startswith(("model.visual.", "model.projector."))}
    assert set(info["missing_keys"]) == vision and not info["unexpected_keys"]
    assert "newly initialized" in library_messages.text or "MISSING" in library_messages.text
    state = model.state_dict()
    for name in vision:
        assert state[name].isfinite().all()
        if name.endswith("weight") and "norm" not in name:
            assert 0 < float(state[name].float().std()) < 0.2, name
    torch.manual_seed(1)
    assert same(state_of(folder), state)
    torch.manual_seed(2)
    other = state_of(folder)
    assert all(torch.equal(other[name], state[name]) for name in state if name not in vision)
    assert not torch.equal(other["model.projector.linear_1.weight"], state["model.projector.linear_1.weight"])
    config = model.config
    vocabulary = config.text_config.vocab_size
    ids = (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id)
    assert ids == tuple(vocabulary - 5 + number for number in range(4))
    prompt = [5, config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id, 7]
    with torch.no_grad():
        output = model(
            torch.tensor([prompt]), pixel_values=torch.randn(24, 3, 14, 14), image_grid_thw=torch.tensor([[1, 4, 6]])
        )
    assert output.logits.isfinite().all()


# What stays as it was.


def test_given_state_dict_is_used_as_it_is(tmp_path):
    folder = write_published(tmp_path, "keye_vl_2")
    model = load(folder)
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    assert same(KeyeForVideoQA.from_pretrained(None, config=model.config, state_dict=state).state_dict(), state)
    with pytest.raises(ValueError, match="state_dict"):
        KeyeForVideoQA.from_pretrained(folder, config=model.config, state_dict=state)


def test_our_own_folders_load_as_the_library_does(tmp_path, reads):
    model = tiny_model("gqa")
    model.save_pretrained(tmp_path / "ours")
    again, info = KeyeForVideoQA.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert same(again.state_dict(), model.state_dict()) and not any(info.values())
    state = {**model.state_dict(), "model.extra": torch.ones(2)}
    del state["lm_head.weight"]
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    _, info = KeyeForVideoQA.from_pretrained(tmp_path / "lacking", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and set(info["unexpected_keys"]) == {"model.extra"}
    assert reads == []


def test_reading_a_published_folder_reads_each_tensor_once(tmp_path, reads):
    for layout in VISION_LAYOUTS:
        reads.clear()
        load(write_published(tmp_path / layout, layout, tokenizer=False, shards=2))
        _, tensors = published_checkpoint(layout)
        unused = {name for name in tensors if ".head." in name or "packing_position" in name}
        assert set(reads) == set(tensors) - unused
        if layout != "keye_vl_2":  # whose fused experts are read one expert at a time
            assert len(reads) == len(set(reads))
