"""Kernels of others on the same device, each as a function or a reason why it is missing. None is part of this project.

Installed packages are taken where they are. Else a folder given by `--peers` may hold wheels (`*.whl`, any subset of
their files): `attn_gym` runs as it is, and of vLLM's wheel the libraries `vllm/_flashmla_C.abi3.so` (FlashMLA),
`vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so` (FlashAttention-3) and `vllm/_C_stable_libtorch.abi3.so` (top-k) are loaded
by themselves. `python -m benchmarks.gpu.peers VLLM.whl FOLDER` cuts such a subset out of a downloaded wheel.
"""

import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

_LIBRARIES = {
    "_flashmla_C": "vllm/_flashmla_C.abi3.so",
    "_vllm_fa3_C": "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "_C": "vllm/_C_stable_libtorch.abi3.so",
}


@lru_cache(maxsize=1)
def _unpacked(folder: Path | None) -> Path | None:
    """The folder's wheels, unpacked where this process can import from."""
    if folder is None or not folder.is_dir():
        return None
    place = Path(tempfile.mkdtemp(prefix="peers-"))
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    sys.path.append(str(place))
    return place


def _operators(name: str, folder: Path | None):
    """`torch.ops.NAME` of vLLM, installed or unpacked. Raises `ImportError` or `OSError` with the reason."""
    place = _unpacked(folder)
    path = None if place is None else place / _LIBRARIES[name]
    if path is not None and path.exists():
        torch.ops.load_library(str(path))
    else:
        import vllm  # noqa: F401 registers its operators

    return getattr(torch.ops, name)


def flash_mla(folder: Path | None) -> Callable:
    """(q [S, H, 576], kv [T, 576], indices [S, K], scaling) -> (out, lse); H 64 or 128, K a multiple of 128."""
    operators = _operators("_flashmla_C", folder)

    def attend(q, kv, indices, scaling):
        out, _, lse = operators.sparse_prefill_fwd(
            q, kv.unsqueeze(1), indices.unsqueeze(1), scaling, 512, None, None, None
        )
        return out, lse

    return attend


def flash_attention_3(folder: Path | None) -> Callable:
    """(q [B, S, H, D], k [B, T, G, D], v [B, T, G, E], scaling, causal) -> out [B, S, H, E], forward only."""
    try:
        from flash_attn_interface import flash_attn_func

        return lambda q, k, v, scaling, causal: flash_attn_func(q, k, v, softmax_scale=scaling, causal=causal)
    except ImportError:
        forward = _operators("_vllm_fa3_C", folder).fwd

    def attend(q, k, v, scaling, causal):
        # The schema's order; what is None belongs to caches, packing, fp8 and sinks.
        inputs, scales, window = (q, k, v, *[None] * 17), [None] * 3, (-1, -1)
        return forward(*inputs, *scales, scaling, causal, *window, 0.0, True, None, 0, None, 0, None, 1, 0, None)[0]

    return attend


def top_k_rows(folder: Path | None) -> Callable:
    """(logits float32 [n, T], ends int32 [n], k) -> int32 [n, k] in no fixed order."""
    select = _operators("_C", folder).top_k_per_row_prefill

    def top(logits, ends, k):
        found = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
        select(logits, torch.zeros_like(ends), ends, found, logits.shape[0], *logits.stride(), k)
        return found

    return top


def attention_gym_indexer(folder: Path | None) -> Callable:
    """(q [B, S, Hi, Di], k [B, T, Di], gates [B, S, Hi], k) -> what its streaming top-k returns, causal, S = T."""
    _unpacked(folder)
    from attn_gym.sparse.indexer import lightning_indexer

    return lambda q, k, gates, topk: lightning_indexer(q, k, gates.to(q.dtype), topk=topk, causal=True)


def main() -> None:
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = [name for key, name in _LIBRARIES.items() if key != "_C"]  # top-k alone would fill a transfer
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"subset-{wheel.name}"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as cut:
        for name in wanted:
            cut.writestr(name, source.read(name))
    print(target, f"{target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
