"""The checklist that Transformers runs over its own models, under the same names; (v) cases run per modality.

Not here: what `test_configuration.py`, `test_equalities.py`, `test_generation_common.py` and `tests/training` hold.
"""

import copy
import inspect

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import OutputRecorder

from modeling_keye.modeling_keye import KeyeForVideoQA, KeyeModel, KeyeTextModel, KeyeVisionModel
from modeling_keye.sparse_attention_keye import ATTENTION_NAME
from tests.model.conftest import KINDS, fresh_model, media_inputs, media_of, without_padding
from tests.model.factories import tiny_config

pytestmark = pytest.mark.compat


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def assert_close(left, right) -> None:
    """Equal up to the order of additions, which changes with the alignment of memory."""
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def real_rows(tensor: torch.Tensor, inputs) -> torch.Tensor:
    return tensor[inputs["attention_mask"].bool()]


# The grouped matrix product of the experts wants rows of 16 bytes, in half precision 8 numbers.
HALF_SIZES = {"mla": {"moe_intermediate_size": 40}, "gqa": {"moe_intermediate_size": 40, "hidden_size": 48}}


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


# Loading and saving


def test_save_load(model, modality, tmp_path):
    inputs = media_inputs(model.config, modality, batch=2)
    model.save_pretrained(tmp_path)
    loaded = KeyeForVideoQA.from_pretrained(tmp_path)
    assert not loaded.training
    assert_close(logits_of(loaded, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("part", ["model", "model.language_model", "model.visual"])
def test_parts_save_and_load_alone(model, part, tmp_path):
    piece = model.get_submodule(part)
    piece.save_pretrained(tmp_path)
    assert_same_weights(type(piece).from_pretrained(tmp_path), piece)


def test_base_model_loads_from_the_whole_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    base, info = KeyeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_weights(base, model.model)


def test_from_pretrained_no_checkpoint(model):
    loaded = KeyeForVideoQA.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_weights(loaded, model)


def test_keep_in_fp32_modules(kind, tmp_path):
    model = fresh_model(kind, **HALF_SIZES[kind])
    model.save_pretrained(tmp_path)
    loaded = KeyeForVideoQA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert {tensor.dtype for tensor in loaded.state_dict().values()} <= {torch.float32, torch.bfloat16}
    expected = {"mla": ("e_score_correction_bias", "indexer.weights_proj.weight"), "gqa": ()}[kind]
    assert kept == {name for name in loaded.state_dict() if name.endswith(expected)}
    assert logits_of(loaded, media_inputs(model.config, "both")).dtype == torch.bfloat16


def test_keep_in_fp32_modules_exist():
    names = [name for name, _ in fresh_model("mla").named_parameters()]
    names += [name for name, _ in fresh_model("mla").named_buffers()]
    for kept in KeyeForVideoQA._keep_in_fp32_modules_strict:
        assert any(kept in name for name in names), kept


def test_save_load_keys_to_ignore_on_save(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_load_contiguous_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name, tensor in KeyeForVideoQA.from_pretrained(tmp_path).state_dict().items():
        assert tensor.is_contiguous(), name


def test_can_init_all_missing_weights(model):
    """From an empty checkpoint every weight gets the values that a new model has, not what memory held."""
    torch.manual_seed(0)
    new = KeyeForVideoQA(model.config)
    torch.manual_seed(0)
    loaded, info = KeyeForVideoQA.from_pretrained(None, config=model.config, state_dict={}, output_loading_info=True)
    assert set(info["missing_keys"]) == set(new.state_dict())
    new, loaded = new.requires_grad_(False), loaded.requires_grad_(False)
    for (name, left), right in zip(new.named_parameters(), loaded.parameters(), strict=True):
        spread = left.std() if left.numel() > 1 else left.abs().mean()
        assert right.isfinite().all(), name
        assert abs(right.mean() - left.mean()) <= 0.3 * (spread + left.mean().abs()) + 1e-6, name
        if left.numel() > 200:
            torch.testing.assert_close(right.std(), left.std(), rtol=0.3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mla", "gqa", "gqa_dense", "mla_dense"])
def test_init_weights_can_init_buffers(kind, tmp_path):
    model = fresh_model(kind)
    expected = dict(model.named_buffers())
    assert any(name.endswith("inv_freq") for name in expected)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        loaded = dict(KeyeForVideoQA.from_pretrained(tmp_path).named_buffers())
        assert loaded.keys() == expected.keys()
        for name, buffer in expected.items():
            torch.testing.assert_close(loaded[name], buffer, rtol=0, atol=0, msg=name)


def test_yarn_buffers_are_restored(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    model = fresh_model("mla", rope_parameters={**yarn, "beta_fast": 32.0, "beta_slow": 1.0})
    model.save_pretrained(tmp_path)
    loaded = KeyeForVideoQA.from_pretrained(tmp_path)
    rotary, fresh = (each.model.language_model.rotary_emb for each in (loaded, model))
    torch.testing.assert_close(rotary.inv_freq, fresh.inv_freq, rtol=0, atol=0)
    assert rotary.attention_scaling == fresh.attention_scaling


def test_all_tensors_are_parameter_or_buffer(model):
    logits_of(model, media_inputs(model.config, "both"))
    for name, module in model.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert set(plain) <= {"rope_deltas"}, (name, plain)


def test_correct_missing_keys(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = {
        "lm_head.weight",
        "model.projector.linear_1.bias",
        "model.language_model.layers.0.input_layernorm.weight",
    }
    rest = {name: tensor for name, tensor in weights.items() if name not in dropped}
    save_file({**rest, "model.stranger": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = KeyeForVideoQA.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == dropped
    assert set(info["unexpected_keys"]) == {"model.stranger"}


def test_can_use_safetensors(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded, info = KeyeForVideoQA.from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(loaded, model)


def test_sharded_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(KeyeForVideoQA.from_pretrained(tmp_path), model)


@pytest.fixture
def tied(kind) -> KeyeForVideoQA:
    config = tiny_config(kind)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return KeyeForVideoQA(config).eval()


def test_tied_weights_keys(tied, model):
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    names = dict(tied.named_parameters(remove_duplicate=False))
    for target, source in KeyeForVideoQA._tied_weights_keys.items():
        assert names[target] is names[source]


def test_load_save_without_tied_weights(tied, tmp_path):
    """Untied afterwards, the head is stored and loaded as a weight of its own."""
    tied.config.tie_word_embeddings = False
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight + 1)
    tied.save_pretrained(tmp_path)
    loaded, info = KeyeForVideoQA.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_weights(loaded, tied)


def test_model_weights_reload_no_missing_tied_weights(tied, tmp_path):
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = KeyeForVideoQA.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, tied)


def test_load_with_mismatched_shapes(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = KeyeForVideoQA.config_class.from_pretrained(tmp_path)
    config.text_config.vocab_size = 120
    with pytest.raises(RuntimeError, match="mismatch"):
        KeyeForVideoQA.from_pretrained(tmp_path, config=config)


def test_can_load_ignoring_mismatched_shapes(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = KeyeForVideoQA.config_class.from_pretrained(tmp_path)
    config.text_config.vocab_size = 120
    loaded, info = KeyeForVideoQA.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 2
    assert loaded.lm_head.weight.shape[0] == 120 and loaded.lm_head.weight.isfinite().all()
    torch.testing.assert_close(loaded.model.projector.linear_1.weight, model.model.projector.linear_1.weight)


def test_can_be_initialized_on_meta(kind):
    with torch.device("meta"):
        model = KeyeForVideoQA(tiny_config(kind))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_can_load_with_device_context_manager(model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        loaded = KeyeForVideoQA.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)


def test_can_load_with_global_device_set(model, tmp_path):
    model.save_pretrained(tmp_path)
    try:
        torch.set_default_device("cpu")
        loaded = KeyeForVideoQA.from_pretrained(tmp_path)
    finally:
        torch.set_default_device(None)  # naming the device again would leave a mode behind for the next tests
    assert_same_weights(loaded, model)


def test_cannot_load_with_meta_device_context_manager(model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        KeyeForVideoQA.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bc_torch_dtype(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    for keyword, value in (("torch_dtype", dtype), ("dtype", dtype), ("dtype", str(dtype).removeprefix("torch."))):
        loaded = KeyeForVideoQA.from_pretrained(tmp_path, **{keyword: value})
        assert loaded.lm_head.weight.dtype == loaded.model.visual.dtype == dtype
    model.to(dtype).save_pretrained(tmp_path)
    assert KeyeForVideoQA.from_pretrained(tmp_path, dtype="auto").dtype == dtype


def test_saved_keys_are_the_names_of_the_peers(model, kind, tmp_path):
    """Reverse loading has nothing to rename yet: what is stored is what the modules are called."""
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    text = "model.language_model.layers.1"
    expected = {"mla": ("self_attn.kv_a_proj_with_mqa", "self_attn.indexer.wq_b", "mlp.shared_experts.up_proj")}
    expected["gqa"] = ("self_attn.q_norm", "self_attn.indexer.q_proj", "self_attn.v_proj")
    assert {f"{text}.{name}.weight" for name in expected[kind]} <= keys
    assert {f"{text}.mlp.experts.gate_up_proj", f"{text}.mlp.gate.weight", "model.projector.linear_1.weight"} <= keys


def test_can_load_from_already_mapped_keys(model):
    loaded, info = KeyeForVideoQA.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(loaded, model)


def test_tp_plan_matches_params():
    """Every rule names parameters of the MLA or of the GQA decoder; a rule for a module stands for its weights."""
    names = [name for kind in KINDS for name, _ in fresh_model(kind).model.language_model.named_parameters()]
    names += [name for name, _ in fresh_model("gqa_dense").model.language_model.named_parameters()]
    generic = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    for rule in KeyeTextModel.config_class.base_model_tp_plan:
        assert any(name == rule or name.startswith(f"{rule}.") for name in generic), rule
    assert {f"{rule}.weight" for rule in KeyeForVideoQA._tp_plan} <= set(fresh_model().state_dict())


def test_a_share_of_the_heads_gives_a_share_of_the_output(kind):
    """What the tensor-parallel plan does to an attention layer: rows of heads here, and the outputs are added up."""
    sizes = {"mla": {"num_attention_heads": 4, "num_key_value_heads": 4}, "gqa": {}}[kind]
    model = fresh_model(kind, **sizes)
    inputs = media_inputs(model.config, "text", batch=2)
    layer = model.model.language_model.layers[0].self_attn
    seen = []
    handle = layer.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    logits_of(model, inputs)
    handle.remove()
    _, arguments, options, (expected, *_) = seen[0]
    plan = model.config.text_config.base_model_tp_plan
    total = torch.zeros_like(expected)
    for share in range(2):
        part = copy.deepcopy(layer)
        for name, module in part.named_children():
            style = plan.get(f"layers.*.self_attn.{name}")
            if style in ("colwise", "rowwise"):
                dim = 0 if style == "colwise" else 1
                module.weight = nn.Parameter(module.weight.chunk(2, dim=dim)[share].clone())
        with torch.no_grad():
            total += part(*arguments, **{**options, "past_key_values": None})[0]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload(model, offload, tmp_path):
    inputs = media_inputs(model.config, "both", batch=2)
    expected = logits_of(model, inputs)
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert_close(logits_of(model, inputs), expected)


def test_disk_offload_safetensors(model, tmp_path):
    inputs = media_inputs(model.config, "both", batch=2)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    device_map = {"model.visual": "cpu", "model.projector": "cpu", "lm_head": "cpu"}
    for name, _ in model.model.language_model.named_children():
        device_map[f"model.language_model.{name}"] = "cpu"
    del device_map["model.language_model.layers"]
    device_map |= {f"model.language_model.layers.{i}": ("cpu", "disk", "disk")[i] for i in range(3)}
    loaded = KeyeForVideoQA.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert_close(logits_of(loaded, inputs), expected)


def test_model_is_small(model):
    assert model.num_parameters() < 1_000_000


# Structure


@pytest.mark.parametrize("model_class", [KeyeForVideoQA, KeyeModel])
def test_forward_signature(model_class):
    names = list(inspect.signature(model_class.forward).parameters)
    assert names[:2] == ["self", "input_ids"]
    media = {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids"}
    text = {"attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "kwargs"}
    assert media | text | {"mm_encoder_outputs"} <= set(names)
    assert "cache_position" not in names


@pytest.mark.parametrize(
    ("model_class", "name"),
    [
        (KeyeForVideoQA, "input_ids"),
        (KeyeModel, "input_ids"),
        (KeyeTextModel, "input_ids"),
        (KeyeVisionModel, "pixel_values"),
    ],
)
def test_model_main_input_name(model_class, name):
    assert model_class.main_input_name == name
    assert list(inspect.signature(model_class.forward).parameters)[1] == name


def test_model_base_model_prefix(model):
    assert isinstance(model.base_model, KeyeModel)
    assert model.base_model is getattr(model, model.base_model_prefix)


def test_model_get_set_embeddings(model):
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    new = nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is new
    head = nn.Linear(1, 1)
    model.set_output_embeddings(head)
    assert model.lm_head is head


@pytest.mark.parametrize("size", [10, -4, 0])
def test_resize_tokens_embeddings(model, size):
    before = model.config.text_config.vocab_size
    rows = min(before, before + size)
    expected = model.get_input_embeddings().weight[:rows].clone()
    model.resize_token_embeddings(before + size)
    assert model.config.text_config.vocab_size == before + size
    assert (
        model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == before + size
    )
    torch.testing.assert_close(model.get_input_embeddings().weight[:rows], expected, rtol=0, atol=0)
    inputs = media_inputs(model.config, "both")
    assert model(**inputs, labels=inputs["input_ids"]).logits.shape[-1] == before + size


def test_resize_embeddings_untied(model, tmp_path):
    model.resize_token_embeddings(130)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert_same_weights(KeyeForVideoQA.from_pretrained(tmp_path), model)


def test_resize_embeddings_tied(tied):
    tied.resize_token_embeddings(130)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def test_config_attn_implementation_setter(kind):
    config = tiny_config(kind)
    config._attn_implementation = "eager"
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    config._attn_implementation = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
    assert config.text_config._attn_implementation == ATTENTION_NAME
    assert config.vision_config._attn_implementation == "sdpa"


def test_internal_model_config_and_subconfig_are_same(model):
    assert model.model.config is model.config
    assert model.model.language_model.config is model.config.text_config
    assert model.model.visual.config is model.config.vision_config
    assert model.model.projector.config is model.config.vision_config


def implementations(model) -> tuple[str, str]:
    language, visual = model.model.language_model, model.model.visual
    layer = language.layers[0].self_attn
    assert layer.config._attn_implementation == language.config._attn_implementation
    return language.config._attn_implementation, visual.config._attn_implementation


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (None, (ATTENTION_NAME, "sdpa")),
        ("sdpa", (ATTENTION_NAME, "sdpa")),
        ("eager", ("eager", "eager")),
        (ATTENTION_NAME, (ATTENTION_NAME, "sdpa")),
        ({"text_config": ATTENTION_NAME, "vision_config": "eager"}, (ATTENTION_NAME, "eager")),
        ({"text_config": "eager", "vision_config": "sdpa"}, ("eager", "sdpa")),
    ],
)
def test_attn_implementation_composite_models(kind, requested, expected, tmp_path):
    model = fresh_model(kind)
    model.save_pretrained(tmp_path)
    loaded = KeyeForVideoQA.from_pretrained(tmp_path, attn_implementation=requested)
    assert implementations(loaded) == expected
    inputs = media_inputs(model.config, "video")
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-4)


def test_sdpa_can_dispatch_composite_models(model):
    """SDPA knows no selection: the decoder takes its own sparse attention and only the tower takes SDPA."""
    assert implementations(model) == (ATTENTION_NAME, "sdpa")
    assert {entry["implementation"] for entry in model.attention_backend_report()} == {ATTENTION_NAME}


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_attention_that_cannot_run_is_refused(kind, name):
    config = tiny_config(kind)
    config._attn_implementation = name
    with pytest.raises(ValueError, match=f"(not|{name})"):
        KeyeForVideoQA(config)


def test_can_set_attention_dynamically(model):
    inputs = media_inputs(model.config, "video", batch=2)
    before = logits_of(model, inputs)
    model.set_attn_implementation("eager")
    assert implementations(model) == ("eager", "eager")
    assert model(**inputs, output_attentions=True).attentions is not None
    torch.testing.assert_close(
        real_rows(logits_of(model, inputs), inputs), real_rows(before, inputs), rtol=1e-4, atol=1e-4
    )
    model.set_attn_implementation(ATTENTION_NAME)
    assert implementations(model) == (ATTENTION_NAME, "sdpa")
    assert_close(logits_of(model, inputs), before)


def test_can_set_attention_dynamically_composite_model(model):
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    assert implementations(model) == ("eager", "sdpa")
    model.set_attn_implementation({"text_config": ATTENTION_NAME, "vision_config": "eager"})
    assert implementations(model) == (ATTENTION_NAME, "eager")


def test_experts_run_grouped_unless_asked_otherwise(model):
    inputs = media_inputs(model.config, "video")
    expected = logits_of(model, inputs)
    assert model.model.language_model.config._experts_implementation == "grouped_mm"
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.model.language_model.config._experts_implementation == name
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_generation_tester_mixin_inheritance():
    assert issubclass(KeyeForVideoQA, GenerationMixin) and KeyeForVideoQA.can_generate()
    assert not any(issubclass(other, GenerationMixin) for other in (KeyeModel, KeyeTextModel, KeyeVisionModel))


@pytest.mark.parametrize("model_class", [KeyeTextModel, KeyeVisionModel])
def test_format_of_can_record_outputs(model_class, model):
    assert model_class._can_record_outputs
    part = next(module for module in model.modules() if isinstance(module, model_class))
    for name, target in model_class._can_record_outputs.items():
        wanted = target.target_class if isinstance(target, OutputRecorder) else target
        modules = [module for module in part.modules() if isinstance(module, wanted)]
        assert modules, f"{name} is recorded from {wanted.__name__}, of which there is none"


def test_can_capture_specific_layers_hidden_states(model):
    """What is captured for layer i is what layer i was given."""
    seen = {}
    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, arguments, i=i: seen.update({i: arguments[0].detach()}))
    with torch.no_grad():
        states = model(**media_inputs(model.config, "video"), output_hidden_states=True).hidden_states
    for i in range(len(layers)):
        assert_close(states[i], seen[i])


# Numerics


def test_determinism(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    assert_close(logits_of(model, inputs), logits_of(model, inputs))


def test_model_outputs_equivalence(model, modality):
    inputs = media_inputs(model.config, modality)
    inputs["labels"] = inputs["input_ids"]
    for extra in ({}, {"output_hidden_states": True, "output_router_logits": True, "output_indexer_selections": True}):
        with torch.no_grad():
            named, plain = model(**inputs, **extra), model(**inputs, **extra, return_dict=False)
        assert isinstance(plain, tuple)
        left = [value for name, value in named.items() if name != "past_key_values"]
        right = [value for value in plain if isinstance(value, (torch.Tensor, tuple))]
        assert_close(left, right)


def test_batching_equivalence(model, modality):
    inputs = media_inputs(model.config, modality, batch=3)
    with torch.no_grad():
        together = model(**inputs, output_hidden_states=True)
        for row in range(3):
            alone = model(**without_padding(inputs, row, media_of(inputs, row)), output_hidden_states=True)
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together.logits[row, real], alone.logits[0], rtol=1e-4, atol=1e-4)
            for both, one in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(both[row, real], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["argument", "configuration"])
def test_hidden_states_output(model, modality, source):
    inputs = media_inputs(model.config, modality)
    if source == "configuration":
        model.config.text_config.output_hidden_states = True
    outputs = model(**inputs, **({"output_hidden_states": True} if source == "argument" else {}))
    text = model.config.text_config
    assert len(outputs.hidden_states) == text.num_hidden_layers + 1
    shape = (*inputs["input_ids"].shape, text.hidden_size)
    assert all(state.shape == shape for state in outputs.hidden_states)
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


def test_attention_outputs(kind, modality):
    model = fresh_model(kind, "eager")
    inputs = media_inputs(model.config, modality, batch=2)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    text, length = model.config.text_config, inputs["input_ids"].shape[1]
    assert len(attentions) == text.num_hidden_layers
    real = inputs["attention_mask"].bool()
    for weights in attentions:
        assert weights.shape == (2, text.num_attention_heads, length, length)
        sums = weights.sum(dim=-1).transpose(1, 2)[real]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert not weights.triu(1).any()
        kept = (weights > 0).any(dim=1).sum(dim=-1)
        assert kept.max() <= text.index_topk + text.local_window + 1 + length // text.anchor_stride + 1


def test_auxiliary_outputs(model, kind):
    inputs = media_inputs(model.config, "video", batch=2)
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True, output_indexer_selections=True)
    text = model.config.text_config
    routed = text.mlp_layer_types.count("sparse")
    assert len(outputs.router_logits) == routed
    assert all(logits.shape == (inputs["input_ids"].numel(), text.n_routed_experts) for logits in outputs.router_logits)
    assert len(outputs.indexer_selections) == text.num_hidden_layers
    slots = torch.arange(inputs["input_ids"].shape[1])[None, :, None]
    first = inputs["attention_mask"].argmax(dim=-1)[:, None, None]
    for selection in outputs.indexer_selections:
        assert selection.dtype == torch.int32 and selection.shape[:2] == inputs["input_ids"].shape
        used = selection >= 0
        assert (selection <= slots)[used].all() and (selection >= first)[used].all()
        assert used[inputs["attention_mask"].bool()].any(dim=-1).all()
    if kind == "gqa":
        assert outputs.rope_deltas.shape == (2, 1)


@pytest.mark.parametrize("implementation", [ATTENTION_NAME, "eager"])
def test_retain_grad_hidden_states_attentions(kind, implementation):
    model = fresh_model(kind, implementation)
    inputs = media_inputs(model.config, "video")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=implementation == "eager")
    kept = [outputs.hidden_states[0], *([outputs.attentions[0]] if implementation == "eager" else [])]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)


def test_inputs_embeds(model):
    inputs = media_inputs(model.config, "text", batch=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        outputs = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert_close(outputs.logits, logits_of(model, inputs))


def test_inputs_embeds_matches_input_ids(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    expected = real_rows(logits_of(model, inputs), inputs)
    ids = inputs.pop("input_ids")
    positions = None
    if model.config.text_config.mrope_section is not None:
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions, _ = model.model.get_rope_index(ids, **grids, attention_mask=inputs["attention_mask"])
    with torch.no_grad():
        outputs = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions)
    torch.testing.assert_close(real_rows(outputs.logits, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["neither", "both"])
def test_exactly_one_of_ids_and_embeddings(model, given):
    ids = media_inputs(model.config, "text")["input_ids"]
    inputs = {} if given == "neither" else {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**inputs)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_matches_sparse_inference(kind, dtype, padding):
    """Upstream compares eager with SDPA; here both decoders compute the same selection."""
    eager, sparse = (fresh_model(kind, name, **HALF_SIZES[kind]).to(dtype) for name in ("eager", ATTENTION_NAME))
    inputs = media_inputs(eager.config, "text", batch=3)
    if padding == "right":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    if padding == "none":
        inputs["attention_mask"] = None
    with torch.no_grad():
        left, right = (model(**inputs, output_hidden_states=True).hidden_states[1] for model in (eager, sparse))
    if padding != "none":
        left, right = real_rows(left, inputs), real_rows(right, inputs)
    # One layer: in half precision later layers may choose other tokens and experts where scores are close.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_eager_matches_sparse_generate(kind, modality):
    eager, sparse = (fresh_model(kind, name) for name in ("eager", ATTENTION_NAME))
    inputs = media_inputs(eager.config, modality, batch=2)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(eager.generate(**inputs, **options), sparse.generate(**inputs, **options))


@pytest.mark.parametrize("additive", [False, True])
def test_custom_4d_attention_mask(kind, additive):
    model = fresh_model(kind, "eager")
    inputs = media_inputs(model.config, "text", batch=2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :]
    if additive:
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    # The row without padding: anchors count from the first slot, which a 4-D mask cannot tell from masked text.
    expected = logits_of(model, inputs)[1]
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=allowed, position_ids=positions)
    torch.testing.assert_close(outputs.logits[1], expected, rtol=1e-5, atol=1e-5)


def test_a_4d_mask_is_refused_by_sparse_attention(model):
    ids = media_inputs(model.config, "text")["input_ids"]
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="4-D attention mask .* needs `attn_implementation='eager'`"):
        model(input_ids=ids, attention_mask=mask)


def test_a_short_attention_mask_is_refused(model):
    inputs = media_inputs(model.config, "text", batch=2)
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(ValueError, match="must cover all"):
        model(**inputs)


@pytest.mark.parametrize("change", ["one image or video fewer", "one placeholder fewer", "no placeholder"])
@pytest.mark.parametrize("modality", ["image", "video"])
def test_mismatching_num_image_tokens(model, modality, change):
    inputs = media_inputs(model.config, modality, batch=2)
    placeholder = model.config.image_token_id if modality == "image" else model.config.video_token_id
    if change == "one image or video fewer":
        inputs |= media_of(inputs, 0)
    else:
        places = (inputs["input_ids"] == placeholder).nonzero()
        places = places[:1] if change == "one placeholder fewer" else places
        inputs["input_ids"][places[:, 0], places[:, 1]] = 7
    with pytest.raises(ValueError, match="placeholders"):
        model(**inputs)
    with pytest.raises(ValueError, match="placeholders"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("return_dict", [True, False, None])
@pytest.mark.parametrize("media", ["image", "video"])
def test_get_features_return_dict(model, media, return_dict):
    inputs = media_of(media_inputs(model.config, media, batch=2), 1)
    with torch.no_grad():
        output = getattr(model, f"get_{media}_features")(*inputs.values(), return_dict=return_dict)
    if return_dict is False:
        assert isinstance(output, tuple)
        features = output[0]
    else:
        assert isinstance(output, BaseModelOutputWithPooling)
        features = output.pooler_output
    grid = next(value for name, value in inputs.items() if name.endswith("grid_thw"))
    assert [part.shape[0] for part in features] == (grid.prod(-1) // 4).tolist()
    assert all(part.shape[1] == model.config.text_config.hidden_size for part in features)


@pytest.mark.parametrize("media", ["image", "video"])
def test_get_features_hidden_states_and_attentions(kind, media):
    model = fresh_model(kind, "eager")
    inputs = media_of(media_inputs(model.config, media, batch=2), 1)
    get_features = getattr(model, f"get_{media}_features")
    with torch.no_grad():
        plain = get_features(**inputs).pooler_output
        full = get_features(**inputs, output_hidden_states=True, output_attentions=True)
    vision = model.config.vision_config
    patches = sum(pixels.shape[0] for name, pixels in inputs.items() if name.startswith("pixel"))
    assert full.last_hidden_state.shape == (patches, vision.hidden_size)
    assert len(full.hidden_states) == vision.num_hidden_layers + 1
    assert all(state.shape == (patches, vision.hidden_size) for state in full.hidden_states)
    assert len(full.attentions) == vision.num_hidden_layers
    torch.testing.assert_close(list(full.pooler_output), list(plain), rtol=1e-5, atol=1e-5)


def test_features_given_in_place_of_pixels(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    expected = logits_of(model, inputs)
    encoded = {}
    with torch.no_grad():
        for name, suffix in (("image", ""), ("video", "_videos")):
            if f"pixel_values{suffix}" in inputs:
                pixels = inputs.pop(f"pixel_values{suffix}")
                encoded[name] = getattr(model, f"get_{name}_features")(pixels, inputs[f"{name}_grid_thw"])
    assert_close(logits_of(model, {**inputs, "mm_encoder_outputs": encoded}), expected)


# Training: the loops with Trainer and adapters are in tests/training


def train_step(model, inputs) -> dict[str, torch.Tensor | None]:
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[(labels == model.config.image_token_id) | (labels == model.config.video_token_id)] = -100
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_training(model, modality):
    gradients = train_step(model, media_inputs(model.config, modality, batch=2))
    missing = {name for name, gradient in gradients.items() if gradient is None}
    # The language-model loss never reaches the indexer.
    assert missing == {name for name in gradients if ".indexer." in name}
    still = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert still == set()
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


def checkpoint(model, use_reentrant: bool | None) -> None:
    options = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    model.gradient_checkpointing_enable(**options)


@pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["default", "use_reentrant_false", "use_reentrant_true"]
)
def test_training_gradient_checkpointing(model, kind, modality, use_reentrant):
    inputs = media_inputs(model.config, modality, batch=2)
    expected = train_step(model, inputs)
    other = fresh_model(kind)
    checkpoint(other, use_reentrant)
    assert other.is_gradient_checkpointing
    if use_reentrant:
        other.enable_input_require_grads()
    gradients = train_step(other, inputs)
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_can_be_switched_off(model):
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_enable_input_require_grads(model):
    model.enable_input_require_grads()
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: seen.append(output.requires_grad)
    )
    model.requires_grad_(False)
    model(**media_inputs(model.config, "video"))
    assert seen == [True]
    model.disable_input_require_grads()


def test_gradients_flow_to_pixels_and_embeddings(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    pixels = [inputs[name].requires_grad_() for name in ("pixel_values", "pixel_values_videos") if name in inputs]
    train_step(model, inputs)
    for tensor in pixels:
        assert (tensor.grad.flatten(1).abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("chunk", [1, 40])
def test_training_does_not_depend_on_the_encoding_chunk(kind, chunk):
    inputs = media_inputs(tiny_config(kind), "video", batch=2)
    expected = train_step(fresh_model(kind), inputs)
    model = fresh_model(kind)
    model.config.vision_config.encode_chunk_patches = chunk
    gradients = train_step(model, inputs)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["mla", pytest.param("gqa", marks=pytest.mark.slow)])
def test_torch_compile_for_training(kind):
    """Compiled in pieces (the media and the selection need values on the host), with the same loss and gradients."""
    model = fresh_model(kind, num_hidden_layers=1)
    inputs = media_inputs(model.config, "video", batch=2)
    expected = train_step(model, inputs)
    compiled = fresh_model(kind, num_hidden_layers=1)
    compiled.compile(backend="eager")
    try:
        gradients = train_step(compiled, inputs)
    finally:
        torch.compiler.reset()
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_whole_graph_is_promised():
    """`generate` compiles the forward pass of models that set this; ours reads lengths and grids on the host."""
    assert not KeyeForVideoQA._can_compile_fullgraph
