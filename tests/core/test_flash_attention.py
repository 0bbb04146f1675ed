"""Dense layers and the vision tower take FlashAttention where it is installed; here a stand-in with its signature."""

import sys
import types

import pytest
import torch

from modeling_keye import flash_attention_keye, sparse_attention_keye, vision_keye
from modeling_keye.configuration_keye import KeyeVisionConfig
from modeling_keye.vision_keye import KeyeVisionTransformer

calls = []


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    """Signature of flash-attn: [B, S, heads, D], last query at the last key."""
    calls.append("dense")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


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
    cute = types.ModuleType("flash_attn.cute")
    for module in (types.ModuleType("flash_attn"), cute):
        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, module.__name__, module)
    flash_attention_keye._installed.cache_clear()
    calls.clear()
    yield
    flash_attention_keye._installed.cache_clear()


def device(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda")


@pytest.mark.usefixtures("installed")
def test_version_by_device_dtype_and_head_size(monkeypatch):
    hopper = device(monkeypatch, (9, 0))
    version = flash_attention_keye.flash_version
    assert version(hopper, torch.bfloat16, 72) == 4
    assert version(hopper, torch.float32, 72) is None
    assert version(hopper, torch.float16, 70) is None and version(hopper, torch.float16, 264) is None
    assert version(torch.device("cpu"), torch.bfloat16, 72) is None
    assert version(device(monkeypatch, (8, 0)), torch.bfloat16, 72) == 2
    assert version(device(monkeypatch, (7, 5)), torch.float16, 64) is None
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    flash_attention_keye._installed.cache_clear()
    assert version(device(monkeypatch, (9, 0)), torch.bfloat16, 72) == 2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash_attention_keye._installed.cache_clear()
    assert version(hopper, torch.bfloat16, 72) is None


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
