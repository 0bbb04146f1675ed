"""Loading published folders in tests."""

import json
from pathlib import Path

import torch

from modeling_keye.checkpoint_keye import Checkpoint
from modeling_keye.configuration_keye import KeyeConfig, KeyeVisionConfig
from modeling_keye.modeling_keye import KeyeForVideoQA

SMALL_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}


def load_published(folder: Path, **options):
    """The model of a published folder; a text checkpoint gets a small tower in place of the full-size default."""
    config = options.pop("config", None) or KeyeConfig.from_pretrained(folder)
    if json.loads((folder / "config.json").read_text())["architectures"][0].startswith("Deepseek"):
        config.vision_config = KeyeVisionConfig(**SMALL_TOWER)
    return KeyeForVideoQA.from_pretrained(folder, config=config, **options)


def state_of(folder: Path, **options) -> dict[str, torch.Tensor]:
    return load_published(folder, **options).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def logits(model: KeyeForVideoQA, length: int = 90) -> torch.Tensor:
    ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits


def recorded_reads(monkeypatch) -> list[str]:
    """Names of the tensors that any `Checkpoint` reads from now on."""
    names = []
    original = Checkpoint.read

    def read(self, name, *args, **kwargs):
        names.append(name)
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", read)
    return names
