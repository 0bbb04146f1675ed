"""Copies the Triton kernels into a folder that the `kernels` library loads, ready to be pushed as a Hub kernel.

    python -m examples.export_kernels FOLDER

The kernels need PyTorch and Triton and nothing else of this repository, so the export is a copy of flat files, with an
`__init__.py` that names what is public and a `metadata.json`. The id in there is made of the files' content: several
versions can be loaded into one process, each with operators of its own (`modeling_keye/ops_keye.py`).
"""

import argparse
import ast
import json
import shutil
from hashlib import blake2b
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "modeling_keye"
NAME = "keye-sparse-attention"
# What is public, by the file that holds it; the files these import follow.
PUBLIC = {
    "ops_keye": ["dense_kl", "select_tokens", "sparse_gqa", "sparse_kl", "sparse_mla"],
    "warm_up_keye": ["warm_up"],
}
# Layout: huggingface.co/docs/kernels, kernel requirements. Pure Triton runs with any CUDA build of PyTorch.
VARIANT = "torch-cuda"

INIT = '''"""Sparse attention over selected keys: indexer selection, latent and grouped-query attention, KL losses.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head size, W width of a latent cache row, C its
first columns, which are the values, K selected keys, Hi and Di heads and head size of the indexer.

select_tokens(q [B, S, Hi, Di], k [B, T, Di], weights [B, S, Hi], *, topk, local_window, anchor_stride, batch_size,
    num_queries, query_offset, key_mask, width, device, slot=None) -> int32 [B, S, width]: the `topk` keys of the
    largest sum_j weights_j relu(q_j . k) among those that query `query_offset + i` sees, beside its window and anchors
    (None: off); ascending, unique, ties to the lowest position, -1 at the end. With `slot`, int64 [] on the device,
    query i stands at `slot + i`, at most at `query_offset + i`.
sparse_mla(q [B, S, H, W], kv [B, T, W], indices, scaling, value_dim) -> out [B, S, H, C], lse [B, S, H]
sparse_gqa(q [B, S, H, D], k [B, G, T, D], v [B, G, T, E], indices, scaling) -> out [B, S, H, E], lse [B, S, H]
    A query without keys gives 0 and -inf. Gradients reach everything but indices. Lists hold no duplicates.
dense_kl, sparse_kl: KL losses of the indexer with their gradients; warm_up(config, device, dtype): compiles everything.
"""

{imports}

__all__ = {names}
'''

# Older releases of `kernels` look for a package of the kernel's name inside the variant.
OLDER = '''"""The same names as in the folder above, for older releases of `kernels`."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).resolve().parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{identity}", _file)
_module = importlib.util.module_from_spec(_spec)
sys.modules["{identity}"] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, triton, sparse-attention]
---

# {name}

Sparse attention of DeepSeek-V3.2 and Keye-VL-2.0 in Triton, forward, decode and backward, for CUDA devices from compute
capability 8.0. What each function takes and returns stands in `build/{variant}/__init__.py`.

```python
from kernels import get_kernel

kernel = get_kernel("OWNER/{name}", version=1, trust_remote_code=True)
out, lse = kernel.sparse_mla(q, kv, indices, scaling, value_dim)
```
"""


def needed_files(entries: list[str]) -> list[Path]:
    """The entry files and all that they import from their own folder."""
    found: dict[str, Path] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = SOURCE / f"{name}.py"
        tree = ast.parse(found[name].read_text())
        waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return [found[name] for name in sorted(found)]


def export(folder: Path) -> Path:
    """Writes the kernel repository into `folder`, which must not hold one yet; returns the variant's folder.

    Raises `FileExistsError` when there is a `build` folder already.
    """
    variant = folder / "build" / VARIANT
    if (folder / "build").exists():
        raise FileExistsError(f"{folder / 'build'} exists; choose another folder or delete it first.")
    files = needed_files(list(PUBLIC))
    digest = blake2b(b"".join(path.read_bytes() for path in files), digest_size=4).hexdigest()
    module = NAME.replace("-", "_")
    identity = f"_{module}_cuda_{digest}"
    metadata = {
        "name": NAME,
        "id": identity,
        "version": 1,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / module).mkdir(parents=True)
    for path in files:
        shutil.copy(path, variant)
    imports = "\n".join(f"from .{name} import {', '.join(names)}" for name, names in PUBLIC.items())
    names = json.dumps(sorted(name for names in PUBLIC.values() for name in names))
    (variant / "__init__.py").write_text(INIT.format(imports=imports, names=names))
    (variant / module / "__init__.py").write_text(OLDER.format(identity=identity))
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / "README.md").write_text(CARD.format(name=NAME, variant=VARIANT))
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy the Triton kernels into a folder that `kernels` loads.")
    parser.add_argument("folder", type=Path, help="where to write the kernel repository")
    folder = parser.parse_args().folder
    try:
        print(export(folder))
    except OSError as error:
        parser.error(f"nothing was exported to {folder}: {error}")


if __name__ == "__main__":
    main()
