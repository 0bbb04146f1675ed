"""Vision tower and projector, against transformers' `paddleocr_vl` and against dense float64 maths."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers.models.paddleocr_vl import configuration_paddleocr_vl as paddle_config
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle

from modeling_keye import vision_keye
from modeling_keye.configuration_keye import KeyeVisionConfig
from modeling_keye.vision_keye import KeyeProjector, KeyeVisionTransformer, encode_media, grid_rows

PATCH = 6
TEXT_HIDDEN = 56
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 27 * PATCH,
    "patch_size": PATCH,
}
# Three sizes, one of them the transposition of another, one coming back later, and runs of several frames.
GRID = torch.tensor([[1, 4, 6], [3, 6, 4], [2, 4, 6], [2, 8, 10]])


def vision_config(attention: str = "sdpa", **changes) -> KeyeVisionConfig:
    config = KeyeVisionConfig(**{**SIZES, **changes})
    config._attn_implementation = attention
    return config


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights far from their initial values, so that every norm, bias and position matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_norm else 0.2 * noise)
    return module.eval()


def tower(config: KeyeVisionConfig) -> KeyeVisionTransformer:
    return randomise(KeyeVisionTransformer(config))


def pixels(grid: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid.prod(-1).sum()), 3, PATCH, PATCH, generator=generator)


def paddle_settings() -> tuple:
    vision = paddle_config.PaddleOCRVisionConfig(**SIZES, rope_parameters={"rope_type": "axial", "rope_theta": 10000.0})
    vision._attn_implementation = "eager"
    text = paddle_config.PaddleOCRTextConfig(
        vocab_size=64,
        hidden_size=TEXT_HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 5, 5]},
    )
    return vision, paddle_config.PaddleOCRVLConfig(vision_config=vision.to_dict(), text_config=text.to_dict())


def dense_encode(model: KeyeVisionTransformer, pixel_values: torch.Tensor, grid: torch.Tensor, clip: bool):
    """The tower in float64 from its weights alone: loops over patches, one block-diagonal mask over all patches."""
    config = model.config
    w = {name: value.double() for name, value in model.state_dict().items()}
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    quarter = dim // 4
    side = config.image_size // config.patch_size
    table = w["embeddings.position_embedding.weight"].view(side, side, -1)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def taps(i, size):
        place = min(max((i + 0.5) * side / size - 0.5, 0.0), side - 1.0)
        low = int(place)
        return low, min(low + 1, side - 1), place - low

    positions, angles, segment = [], [], []
    for row, (t, height, width) in enumerate(grid.tolist()):
        for frame in range(t):
            for y in range(height):
                for x in range(width):
                    y0, y1, fy = taps(y, height)
                    x0, x1, fx = taps(x, width)
                    above = table[y0, x0] * (1 - fx) + table[y0, x1] * fx
                    below = table[y1, x0] * (1 - fx) + table[y1, x1] * fx
                    positions.append(above * (1 - fy) + below * fy)
                    frequency = [10000.0 ** (-2 * j / (dim / 2)) for j in range(quarter)]
                    angles.append([y * f for f in frequency] + [x * f for f in frequency])
                    segment.append((row, 0 if clip else frame))
    allowed = torch.tensor([[a == b for b in segment] for a in segment])
    angles = torch.tensor(angles, dtype=torch.float64)[:, None]

    def rotate(x):
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    kernel, bias = w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"]
    x = torch.einsum("ncyx,ocyx->no", pixel_values.double(), kernel) + bias + torch.stack(positions)
    for i in range(config.num_hidden_layers):
        name = f"encoder.layers.{i}"
        y = norm(x, f"{name}.layer_norm1")
        q, k, v = (linear(y, f"{name}.self_attn.{p}_proj").view(-1, heads, dim) for p in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / dim**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + linear(torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1), f"{name}.self_attn.out_proj")
        y = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{name}.mlp.fc2")
    return norm(x, "post_layernorm")


def dense_project(projector: KeyeProjector, features: torch.Tensor, grid: torch.Tensor, pre_merge: bool):
    """The projector in float64, one token at a time."""
    w = {name: value.double() for name, value in projector.state_dict().items()}

    def norm(x):
        centred = x - x.mean()
        return centred / (centred.pow(2).mean() + 1e-5).sqrt() * w["pre_norm.weight"] + w["pre_norm.bias"]

    tokens, start = [], 0
    for t, height, width in grid.tolist():
        frames = features[start : start + t * height * width].double().view(t, height, width, -1)
        start += t * height * width
        for frame in frames:
            for y in range(0, height, 2):
                for x in range(0, width, 2):
                    four = [frame[y, x], frame[y, x + 1], frame[y + 1, x], frame[y + 1, x + 1]]
                    merged = torch.cat([norm(p) for p in four]) if pre_merge else norm(torch.cat(four))
                    hidden = w["linear_1.weight"] @ merged + w["linear_1.bias"]
                    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
                    tokens.append(w["linear_2.weight"] @ hidden + w["linear_2.bias"])
    return torch.stack(tokens)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


@pytest.fixture(params=["sdpa", "eager"])
def attention(request) -> str:
    return request.param


def test_parameter_names_and_shapes_are_the_published_ones():
    config = KeyeVisionConfig()  # the defaults are the published sizes
    with torch.device("meta"):
        model = KeyeVisionTransformer(config)
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        projectors = {
            norm: KeyeProjector(vision_config(projector_norm=norm), 7) for norm in ("pre_merge", "post_merge")
        }
    assert shapes["embeddings.patch_embedding.weight"] == [1152, 3, 14, 14]
    assert shapes["embeddings.position_embedding.weight"] == [729, 1152]
    assert shapes["encoder.layers.26.mlp.fc1.weight"] == [4304, 1152]
    assert sum(value.numel() for value in model.parameters()) == 412_987_248
    assert not list(model.buffers()), "buffers made in __init__ are lost by from_pretrained"
    assert {name.split(".", 3)[-1] for name in shapes if name.startswith("encoder.layers.0.")} == {
        f"{part}.{kind}"
        for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        + tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
        for kind in ("weight", "bias")
    }
    for projector in projectors.values():
        assert sorted({name.split(".")[0] for name in projector.state_dict()}) == ["linear_1", "linear_2", "pre_norm"]
    assert projectors["pre_merge"].pre_norm.weight.shape == (48,)
    assert projectors["post_merge"].pre_norm.weight.shape == (192,)


@pytest.mark.compat
def test_tower_equals_paddleocr_vl(attention):
    model = tower(vision_config(attention))
    oracle = paddle.PaddleOCRVisionModel(paddle_settings()[0]).eval()
    missing = oracle.vision_model.load_state_dict(model.state_dict(), strict=True)
    assert not missing.missing_keys
    # Transformers 5.17 resizes the table with aligned corners, which the published tower does not do.
    oracle.vision_model.embeddings.interpolation_align_corners = False
    frames = torch.cat([torch.tensor([[1, h, w]]).repeat(t, 1) for t, h, w in GRID.tolist()])
    with torch.no_grad():
        expected = oracle(pixels(GRID)[None], grid_thw=frames).last_hidden_state
        got = model(pixels(GRID), GRID, video=True)
    assert difference(got, expected) < 1e-5


@pytest.mark.compat
def test_pre_merge_projector_equals_paddleocr_vl():
    projector = randomise(KeyeProjector(vision_config(projector_norm="pre_merge"), TEXT_HIDDEN))
    oracle = paddle.PaddleOCRProjector(paddle_settings()[1]).eval()
    oracle.load_state_dict(projector.state_dict(), strict=True)
    features = torch.randn(int(GRID.prod(-1).sum()), 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert difference(projector(features, GRID), oracle(features, GRID)) < 1e-5


@pytest.mark.parametrize("norm", ["pre_merge", "post_merge"])
def test_projector_equals_float64_maths(norm):
    projector = randomise(KeyeProjector(vision_config(projector_norm=norm), TEXT_HIDDEN)).double()
    features = torch.randn(int(GRID.prod(-1).sum()), 48, generator=torch.Generator().manual_seed(3)).double()
    features *= 0.01  # small enough for the norm's epsilon to show
    with torch.no_grad():
        got = projector(features, GRID)
    assert difference(got, dense_project(projector, features, GRID, norm == "pre_merge")) < 1e-10


@pytest.mark.parametrize("segment", ["frame", "clip"])
def test_tower_equals_dense_block_diagonal_attention(segment, attention):
    model = tower(vision_config(attention, video_attention=segment))
    grid = torch.tensor([[3, 4, 6], [1, 6, 4], [2, 8, 2], [3, 4, 6]])
    with torch.no_grad():
        expected = dense_encode(model, pixels(grid), grid, clip=segment == "clip")
        single = model(pixels(grid), grid, video=True)
        double = model.double()(pixels(grid).double(), grid, video=True)
    assert difference(single, expected) < 1e-5
    assert difference(double, expected) < 1e-10


def test_clip_attention_is_for_videos_only_and_changes_them():
    grid = torch.tensor([[2, 4, 6]])
    clip, frame = (tower(vision_config(video_attention=segment)) for segment in ("clip", "frame"))
    with torch.no_grad():
        assert torch.equal(clip(pixels(grid), grid), frame(pixels(grid), grid))
        assert difference(clip(pixels(grid), grid, video=True), frame(pixels(grid), grid, video=True)) > 1e-2


def test_resizing_to_the_trained_grid_is_the_identity():
    embeddings = tower(vision_config()).embeddings
    table = embeddings.position_embedding.weight
    assert torch.equal(embeddings.positions({(27, 27)}, table.device)[27, 27], table)


@pytest.mark.parametrize("size", [(4, 6), (26, 30), (54, 2)])
def test_resized_positions_are_bilinear_without_aligned_corners(size):
    embeddings = tower(vision_config()).embeddings
    table = embeddings.position_embedding.weight.detach().double().view(27, 27, -1)

    def matrix(length):  # [length, 27] of bilinear weights
        place = ((torch.arange(length, dtype=torch.float64) + 0.5) * 27 / length - 0.5).clamp(0, 26)
        return (1 - (place[:, None] - torch.arange(27)).abs()).clamp(min=0)

    expected = torch.einsum("ya,xb,abd->yxd", matrix(size[0]), matrix(size[1]), table).flatten(0, 1)
    assert difference(embeddings.positions({size}, table.device)[size], expected) < 1e-5


def test_positions_follow_the_weights():
    model = tower(vision_config())
    grid = torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        before = model(pixels(grid), grid)
        model.embeddings.position_embedding.weight.mul_(-1)
        assert difference(model(pixels(grid), grid), before) > 1e-2
        model.embeddings.position_embedding.weight.mul_(-1)
        assert torch.equal(model(pixels(grid), grid), before)
        half = model.to(torch.bfloat16)(pixels(grid), grid)
    assert half.dtype == torch.bfloat16
    assert difference(half, before) < 0.3


def test_interpolation_runs_once_per_size(monkeypatch):
    calls = []
    resize = F.interpolate
    monkeypatch.setattr(vision_keye.F, "interpolate", lambda *a, **k: calls.append(k["size"]) or resize(*a, **k))
    model = tower(vision_config(encode_chunk_patches=50))
    with torch.no_grad():
        model(pixels(GRID), GRID, video=True)
    assert sorted(calls) == [(4, 6), (6, 4), (8, 10)]


def test_rows_of_mixed_size_equal_each_row_alone(attention):
    model = tower(vision_config(attention))
    with torch.no_grad():
        together = model(pixels(GRID), GRID, video=True).split(GRID.prod(-1).tolist())
        patches = pixels(GRID).split(GRID.prod(-1).tolist())
        for i in range(len(GRID)):
            assert difference(together[i], model(patches[i], GRID[i : i + 1], video=True)) < 1e-5


@pytest.mark.parametrize("limit", [1, 24, 50, 100, 8192])
@pytest.mark.parametrize("segment", ["frame", "clip"])
def test_result_does_not_depend_on_chunks(segment, limit):
    seen = []
    model = tower(vision_config(video_attention=segment))
    projector = randomise(KeyeProjector(model.config, TEXT_HIDDEN))
    model.encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.config.encode_chunk_patches = 10**6
    with torch.no_grad():
        expected = model(pixels(GRID), GRID, video=True)
        tokens = projector(expected, GRID).split((GRID.prod(-1) // 4).tolist())
        model.config.encode_chunk_patches = limit
        seen.clear()
        got = model(pixels(GRID), GRID, video=True)
        largest = int((GRID[:, 1:].prod(-1) if segment == "frame" else GRID.prod(-1)).max())
        assert max(seen) <= max(limit, largest)
        seen.clear()
        rows = encode_media(model, projector, pixels(GRID), GRID, video=True)
        assert max(seen) <= max(limit, largest)
    assert difference(got, expected) < 1e-5
    assert [row.shape for row in rows] == [row.shape for row in tokens]
    for row, token in zip(rows, tokens, strict=True):
        assert difference(row, token) < 1e-4


def test_chunks_are_equal_in_float64():
    model = tower(vision_config()).double()
    projector = randomise(KeyeProjector(model.config, TEXT_HIDDEN)).double()
    patches = pixels(GRID).double()
    with torch.no_grad():
        expected = encode_media(model, projector, patches, GRID, video=True)
        model.config.encode_chunk_patches = 30
        got = encode_media(model, projector, patches, GRID, video=True)
    assert difference(torch.cat(got), torch.cat(expected)) < 1e-12


def test_encode_media_keeps_one_chunk_of_features_at_a_time():
    model = tower(vision_config(encode_chunk_patches=48))
    projector = randomise(KeyeProjector(model.config, TEXT_HIDDEN))
    calls = []

    def wrapped(pixel_values, grid_thw, video):
        calls.append(grid_thw.tolist())
        return (model(pixel_values, grid_thw, video),)

    with torch.no_grad():
        encode_media(wrapped, projector, pixels(GRID), GRID, video=True)
    assert calls == [[[1, 4, 6], [1, 6, 4]], [[2, 6, 4]], [[2, 4, 6]], [[1, 8, 10]], [[1, 8, 10]]]


def test_gradients_reach_every_parameter_and_survive_chunking(attention):
    gradients = []
    for limit in (8192, 30):
        model = tower(vision_config(attention, encode_chunk_patches=limit)).double()
        projector = randomise(KeyeProjector(model.config, TEXT_HIDDEN)).double()
        rows = encode_media(model, projector, pixels(GRID).double(), GRID, video=True)
        torch.cat(rows).square().mean().backward()
        named = [*model.named_parameters(), *projector.named_parameters()]
        gradients.append({name: value.grad for name, value in named})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert difference(gradients[1][name], gradient) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tower(vision_config()).train()
        for layer in model.encoder.layers:
            layer.gradient_checkpointing = checkpointing
            layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=reentrant
            )
        model(pixels(GRID), GRID, video=True).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])


def test_attention_weights_come_per_segment_with_eager_only():
    model = tower(vision_config("eager", encode_chunk_patches=30))
    recorded = []
    for layer in model.encoder.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: recorded.append(output[1]))
    with torch.no_grad():
        model(pixels(GRID), GRID, video=True, output_attentions=True)
    assert len(recorded) == 2  # one call per layer, not per chunk
    lengths = [24] * 6 + [80] * 2
    for weights in recorded:
        assert [tuple(w.shape) for w in weights] == [(1, 3, n, n) for n in lengths]
        assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in weights)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="needs eager attention in the vision tower, which uses 'sdpa'"):
        model(pixels(GRID), GRID, output_attentions=True)


def test_sdpa_sees_equal_frames_as_a_batch(monkeypatch):
    shapes = []
    attend = F.scaled_dot_product_attention

    def recording(query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    with torch.no_grad():
        tower(vision_config(num_hidden_layers=1))(pixels(GRID), GRID, video=True)
    assert sorted(shapes) == [(2, 3, 80, 16), (6, 3, 24, 16)]


@pytest.mark.compat
def test_flash_attention_gets_cumulative_lengths(monkeypatch):
    """The variable-length call of flash attention, replaced by the dense attention that it must mean."""

    def flash(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs):
        ends = kwargs["cu_seq_lens_q"]
        assert ends.dtype == torch.int32 and torch.equal(ends, kwargs["cu_seq_lens_k"])
        lengths = (ends[1:] - ends[:-1]).tolist()
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
        assert not is_causal and attention_mask is None and query.shape[0] == 1
        parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    monkeypatch.setitem(vision_keye.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    for segment in ("frame", "clip"):
        model = tower(vision_config(video_attention=segment))
        flashed = tower(vision_config("flash_attention_2", video_attention=segment))
        with torch.no_grad():
            assert difference(flashed(pixels(GRID), GRID, True), model(pixels(GRID), GRID, True)) < 1e-5


def test_bad_input_is_refused_with_both_numbers():
    model = tower(vision_config())
    projector = KeyeProjector(model.config, TEXT_HIDDEN)
    patches = pixels(GRID)
    with pytest.raises(ValueError, match="hold 303 patches, but the grid describes 304"):
        model(patches[:-1], GRID)
    with pytest.raises(ValueError, match="hold 303 patches, but the grid describes 304"):
        encode_media(model, projector, patches[:-1], GRID)
    with pytest.raises(ValueError, match="There are 3 patch features, but the grid describes 304"):
        projector(torch.zeros(3, 48), GRID)
    with pytest.raises(ValueError, match=r"row 1 is \(1, 4, 3\).*multiples of `spatial_merge_size` 2"):
        model(pixels(torch.tensor([[1, 4, 9]])), torch.tensor([[1, 4, 6], [1, 4, 3]]))
    with pytest.raises(ValueError, match=r"have shape \[304, 3, 5, 6\]; expected \[patches, 3, 6, 6\]"):
        model(patches[:, :, 1:], GRID)
    with pytest.raises(ValueError, match=r"have shape \[304, 108\]"):
        model(patches.flatten(1), GRID)
    with pytest.raises(ValueError, match="dtype torch.uint8"):
        model(patches.to(torch.uint8), GRID)
    with pytest.raises(ValueError, match="are on cpu, but the vision tower is on meta"):
        copy.deepcopy(model).to("meta")(patches, GRID)
    for grid, words in [
        (torch.tensor([1, 4, 6]), r"shape \[3\]"),
        (torch.zeros(0, 3, dtype=torch.long), r"shape \[0, 3\]"),
        (torch.tensor([[1.0, 4.0, 6.0]]), "dtype torch.float32"),
        (torch.tensor([[0, 4, 6]]), "must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            grid_rows(grid, 2)
