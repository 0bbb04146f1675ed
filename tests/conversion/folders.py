"""What stands in a folder, by name for comparisons; and what the converter says when it refuses."""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from conversion.convert import main
from conversion.staging import partial_folder


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file by its path, to compare folders byte for byte."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path, pattern: str = "model*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the format's own library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, "pt") as shard:
            names = set(shard.keys())
            assert not names & set(tensors), file
            tensors.update({name: shard.get_tensor(name) for name in names})
    return tensors


def bits(tensor: torch.Tensor) -> tuple:
    """Dtype, shape and bytes: equal for equal bits only."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that are in one of two sets of tensors only, or whose bits differ."""
    return sorted(name for name in {*a, *b} if name not in a or name not in b or bits(a[name]) != bits(b[name]))


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def refusal(capsys, *arguments) -> str:
    """What the command says when it refuses."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err[printed.err.index("error: ") :]


def assert_nothing_written(dst: Path) -> None:
    assert not dst.exists() and not partial_folder(dst).exists()
