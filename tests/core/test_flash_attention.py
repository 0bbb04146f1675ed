"""Dense layers and the vision tower take FlashAttention where it is installed; here a stand-in with its signature."""

import inspect
import sys
import types

import pytest
import torch

from modeling_keye import flash_attention_keye, sparse_attention_keye, vision_keye
from modeling_keye.configuration_keye import KeyeVisionConfig
from modeling_keye.vision_keye import KeyeVisionTransformer

calls = []


def attend(q, k, v, scale, causal=False):
    """[B, heads, S, D], the last query at the last key: what is attended to, and the log-sum-exp [B, heads, S]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if causal:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    """Signature that versions 2 and 4 share, heads behind tokens."""
    calls.append("dense")
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal)[0].transpose(1, 2)


def flash_attn_func_2(q, k, v, softmax_scale=None, causal=False, deterministic=False, return_attn_probs=False):
    """Of version 2: three results when asked, of which the probabilities are none without dropout."""
    calls.append("dense")
    out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal)
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def flash_attn_func_4(q, k, v, softmax_scale=None, causal=False, deterministic=False, return_lse=False):
    """Of version 4: always two results."""
    calls.append("dense")
    out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal)
    return out.transpose(1, 2), lse if return_lse else None


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    deterministic=False,
):
    calls.append("segments")
    assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == int(cu_seqlens_q.diff().max())
    bounds = cu_seqlens_q.tolist()
    parts = [
        flash_attn_func(*(x[None, a:b] for x in (q, k, v)), softmax_scale, causal) for a, b in zip(bounds, bounds[1:])
    ]
    return torch.cat(parts, dim=1)[0], None  # version 4 returns the log-sum-exp too


@pytest.fixture
def installed(monkeypatch):
    """Both versions can be imported, and the CPU counts as a device that they run on."""
    for name, dense in (("flash_attn", flash_attn_func_2), ("flash_attn.cute", flash_attn_func_4)):
        module = types.ModuleType(name)
        module.flash_attn_func, module.flash_attn_varlen_func = dense, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_attention_keye, "_functions", {})
    assert flash_attention_keye._installed(4) and flash_attention_keye._installed(2)
    calls.clear()


def device(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda")


@pytest.mark.usefixtures("installed")
def test_version_by_device_dtype_and_head_size(monkeypatch):
    hopper = device(monkeypatch, (9, 0))
    half, version = torch.float16, flash_attention_keye.flash_version
    assert version(hopper, torch.bfloat16, 72, 72) == 4
    assert version(hopper, torch.float32, 72, 72) is None
    assert version(hopper, half, 70, 70) is None and version(hopper, half, 264, 264) is None
    assert version(hopper, half, 64, 128) is None
    assert version(torch.device("cpu"), torch.bfloat16, 72, 72) is None
    assert version(device(monkeypatch, (8, 0)), torch.bfloat16, 72, 72) == 2
    assert version(device(monkeypatch, (7, 5)), half, 64, 64) is None
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    flash_attention_keye._functions.clear()
    assert version(device(monkeypatch, (9, 0)), torch.bfloat16, 72, 72) == 2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash_attention_keye._functions.clear()
    assert version(hopper, torch.bfloat16, 72, 72) is None


@pytest.mark.usefixtures("installed")
def test_version_4_takes_fewer_sizes_on_newer_devices(monkeypatch):
    """`_validate_head_dims` of flash-attn-4 (4.0.0b36)."""
    sizes = [(72, 72), (128, 64), (160, 160), (192, 128), (192, 192), (192, 96), (256, 256), (256, 128)]
    expected = {(9, 0): [4] * 8, (10, 0): [4, 4, 2, 4, 2, 2, 4, 4], (11, 0): [4, 4, 2, 4, 2, 2, 4, 4], (12, 0): [2] * 8}
    for capability, versions in expected.items():
        gpu = device(monkeypatch, capability)
        assert [flash_attention_keye.flash_version(gpu, torch.float16, *pair) for pair in sizes] == versions, capability


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("version", [4, 2])
@pytest.mark.parametrize("value_dim", [192, 128, 64])
def test_values_are_widened_only_where_they_must_be(version, value_dim, monkeypatch):
    q, k, v = torch.randn(1, 2, 3, 192), torch.randn(1, 2, 3, 192), torch.randn(1, 2, 3, value_dim)
    taken, name = [], "flash_attn.cute" if version == 4 else "flash_attn"
    kernel = sys.modules[name].flash_attn_func

    def watched(q, k, v, **options):
        taken.append(v)
        return kernel(q, k, v, **options)

    watched.__signature__ = inspect.signature(kernel)
    monkeypatch.setattr(sys.modules[name], "flash_attn_func", watched)
    monkeypatch.setattr(flash_attention_keye, "_functions", {version: flash_attention_keye._imported(version)})
    out, _ = flash_attention_keye.flash_causal(version, q, k, v, 0.3)
    torch.testing.assert_close(out, attend(q, k, v, 0.3, causal=True)[0].transpose(1, 2))
    as_they_are = value_dim == 192 or (version, value_dim) == (4, 128)
    assert taken[0].shape[-1] == (value_dim if as_they_are else 192)
    assert (taken[0].data_ptr() == v.data_ptr()) == as_they_are


@pytest.mark.parametrize("version", [None, 4, 2])
@pytest.mark.parametrize("with_lse", [False, True])
def test_one_graph_with_and_without_flash_attention(version, with_lse, installed, monkeypatch):
    """The compiler asks what is installed once, and does not try to trace it."""
    monkeypatch.setattr(flash_attention_keye, "_DEVICE_TYPE", "cpu")
    device(monkeypatch, (9, 0))
    for number, name in ((4, "flash_attn.cute"), (2, "flash_attn")):
        if number != version:
            monkeypatch.setitem(sys.modules, name, None)
    flash_attention_keye._functions.clear()
    dense = sparse_attention_keye.dense_attention_with_lse if with_lse else sparse_attention_keye.dense_attention
    q, k, v = (torch.randn(1, heads, 5, 24, dtype=torch.float16) for heads in (4, 2, 2))
    torch.compiler.reset()
    found = torch.compile(dense, backend="eager", fullgraph=True)(q, k, v, scaling=0.3)
    torch.compiler.reset()
    assert calls == ([] if version is None else ["dense"])
    torch.testing.assert_close(found, dense(q, k, v, scaling=0.3))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("version", [4, 2])
@pytest.mark.parametrize(("num_queries", "offset"), [(7, 0), (3, 9), (1, 20)])
def test_dense_attention_is_the_same(version, num_queries, offset, monkeypatch):
    q = torch.randn(2, 4, num_queries, 24)
    k, v = torch.randn(2, 2, offset + num_queries + 3, 24), torch.randn(2, 2, offset + num_queries + 3, 16)
    place = {"scaling": 0.3, "query_offset": offset}
    expected = sparse_attention_keye.dense_attention(q, k, v, **place)
    assert calls == []
    monkeypatch.setattr(sparse_attention_keye, "flash_version", lambda *arguments: version)
    torch.testing.assert_close(sparse_attention_keye.dense_attention(q, k, v, **place), expected)
    assert calls == ["dense"]
    # A padding mask is not for it.
    mask = torch.ones(2, offset + num_queries, dtype=torch.bool)
    masked = sparse_attention_keye.dense_attention(q, k, v, **place, key_mask=mask)
    torch.testing.assert_close(masked, expected)
    assert calls == ["dense"]
    assert sparse_attention_keye.dense_attention_with_lse(q, k, v, **place, key_mask=mask)[1] is None


def flash_of_pytorch(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    calls.append("flash")
    assert q.shape[-1] == v.shape[-1]  # the kernel takes one width
    return *attend(q, k, v, scale, is_causal), None, None, 0, 0, None, None, None


def cudnn_of_pytorch(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *rest, scale=None):
    calls.append("cudnn")
    assert attn_bias is None and compute_log_sumexp and q.shape[2] == k.shape[2]  # its causal is that of a square
    out, lse = attend(q, k, v, scale, is_causal)
    return out, lse.unsqueeze(-1), None, None, 0, 0, None, None, None


class Pretended(torch.Tensor):
    """Says that it is on a CUDA device."""

    is_cuda = True


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["version 4", "version 2", "cudnn", "flash"])
@pytest.mark.parametrize(("num_queries", "offset"), [(7, 0), (3, 9), (1, 20)])
def test_log_sum_exp_beside_the_attention(kind, num_queries, offset, monkeypatch):
    """Of the scores that the queries see, without gradient; the attention keeps its own."""
    q = torch.randn(2, 4, num_queries, 24, requires_grad=True)
    keys = offset + num_queries
    k, v = torch.randn(2, 2, keys + 3, 24), torch.randn(2, 2, keys + 3, 16)
    place = {"scaling": 0.3, "query_offset": offset}
    expected = sparse_attention_keye.dense_attention(q, k, v, **place)
    assert sparse_attention_keye.dense_attention_with_lse(q, k, v, **place)[1] is None
    if kind.startswith("version"):
        monkeypatch.setattr(sparse_attention_keye, "flash_version", lambda *arguments: int(kind[-1]))
    else:
        capability = (9, 0) if kind == "cudnn" else (8, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name in ("can_use_cudnn_attention", "can_use_flash_attention"):
            monkeypatch.setattr(flash_attention_keye, name, lambda parameters: True)
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash_of_pytorch)
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn_of_pytorch)
    called = q if kind.startswith("version") else q.as_subclass(Pretended)
    out, lse = (
        x.as_subclass(torch.Tensor) for x in sparse_attention_keye.dense_attention_with_lse(called, k, v, **place)
    )
    wanted = "flash" if kind == "cudnn" and offset else kind
    assert calls == ["dense" if kind.startswith("version") else wanted]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected)))
    scores = torch.einsum("bhsd,bhtd->bsht", q, k[:, :, :keys].repeat_interleave(2, dim=1)) * 0.3
    future = torch.arange(keys) > torch.arange(offset, keys)[:, None]
    torch.testing.assert_close(lse, scores.masked_fill(future[:, None], -torch.inf).logsumexp(dim=-1).detach())
    assert not lse.requires_grad


@pytest.mark.usefixtures("installed")
def test_a_release_that_gives_no_log_sum_exp(monkeypatch):
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(flash_attention_keye, "_functions", {2: flash_attention_keye._imported(2)})
    monkeypatch.setattr(sparse_attention_keye, "flash_version", lambda *arguments: 2)
    q, k, v = torch.randn(1, 4, 5, 24), torch.randn(1, 2, 5, 24), torch.randn(1, 2, 5, 16)
    out, lse = sparse_attention_keye.dense_attention_with_lse(q, k, v, scaling=0.3)
    assert lse is None and calls == ["dense"]
    torch.testing.assert_close(out, attend(q, k, v, 0.3, causal=True)[0].transpose(1, 2))


@pytest.mark.usefixtures("installed")
def test_vision_tower_is_the_same(monkeypatch):
    """Frames of three sizes: one call per layer instead of one per size and layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = KeyeVisionConfig(**sizes, image_size=56, patch_size=14)
    config._attn_implementation = "sdpa"
    tower = KeyeVisionTransformer(config).eval()
    grid = torch.tensor([[2, 2, 4], [1, 4, 4], [1, 2, 2]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3, 14, 14)
    with torch.no_grad():
        expected = tower(pixels, grid)
        assert calls == []
        monkeypatch.setattr(vision_keye, "flash_version", lambda *arguments: 4)
        torch.testing.assert_close(tower(pixels, grid), expected)
    assert calls.count("segments") == 2
    calls.clear()
    config._attn_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels, grid), expected)
    assert calls == []


def test_vision_tower_asks_for_what_autocast_multiplies(monkeypatch):
    """Weights in float32 and mixed precision: FlashAttention gets bfloat16."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = KeyeVisionConfig(**sizes, image_size=56, patch_size=14)
    config._attn_implementation = "sdpa"
    tower, asked = KeyeVisionTransformer(config).eval(), []
    monkeypatch.setattr(vision_keye, "flash_version", lambda device, dtype, *sizes: asked.append(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tower(torch.randn(8, 3, 14, 14), torch.tensor([[1, 2, 4]]))
    tower(torch.randn(8, 3, 14, 14), torch.tensor([[1, 2, 4]]))
    assert asked == [torch.bfloat16, torch.float32]
