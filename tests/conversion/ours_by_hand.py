"""Our form of the tiny published checkpoints, made tensor by tensor without the code that loads or converts."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from conversion.folder import expected_shapes, meta_model
from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.published_config_keye import our_config
from tests.conversion.published import VISION_LAYOUTS, dequantised, published_checkpoint

NEW = ("model.visual.", "model.projector.")
NEW_TOWER = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 70,
}


def our_tensors(layout: str, tensors: dict[str, torch.Tensor], layers: int = 3) -> dict[str, torch.Tensor]:
    """Published tensors under our names: prefixes, experts stacked as [E, gate then up, in], ignorable ones gone."""
    ours, experts = {}, {}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if "vision_model.head." in name or "packing_position" in name or "inv_freq" in name:
            continue
        if layer and int(layer[1]) >= layers:
            continue
        for prefix, replacement in (
            ("visual.", "model.visual."),
            ("mlp_AR.", "model.projector."),
            ("model.", "model.language_model."),
        ):
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
                break
        name = name.replace("sa_indexer", "indexer")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
        elif re.fullmatch(r".*\.experts\.\w+", name):
            ours[name] = tensor.transpose(1, 2).contiguous()
        else:
            ours[name] = tensor
    for prefix, parts in experts.items():
        stacked = {part: torch.stack([members[e] for e in range(len(members))]) for part, members in parts.items()}
        ours[f"{prefix}.gate_up_proj"] = torch.cat([stacked["gate_proj"], stacked["up_proj"]], dim=1).contiguous()
        ours[f"{prefix}.down_proj"] = stacked["down_proj"]
    return ours


def write_ours(folder: Path, layout: str, *, cast: torch.dtype | None = None, **options) -> Path:
    """Our form of `write_published(..., layout, **options)`, with the scales of an fp8 one beside it."""
    folder.mkdir(parents=True)
    raw, tensors = published_checkpoint(layout, **options)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale_inv")}
    if scales:
        block = tuple(raw["quantization_config"]["weight_block_size"])
        meant = dequantised(tensors, block)
        tensors = {
            name: meant[name].to(cast or torch.bfloat16) if tensor.dtype == torch.float8_e4m3fn else tensor
            for name, tensor in tensors.items()
            if name not in scales
        }
        kept = {name: scale for name, scale in scales.items() if not name.startswith("model.layers.3.")}
        save_file(kept, folder / "fp8_scales.safetensors")
    if cast is not None:
        tensors = {n: t if n.endswith("e_score_correction_bias") else t.to(cast) for n, t in tensors.items()}
    ours = our_tensors(layout, tensors)
    settings = our_config(raw)
    if layout not in VISION_LAYOUTS:
        # What a text checkpoint gets in ours is new.
        settings["vision_config"] = dict(NEW_TOWER)
        new = expected_shapes(meta_model(KeyeConfig(**settings)))
        ours.update({name: torch.ones(new[name]) for name in new if name.startswith(NEW)})
    save_file(ours, folder / "model.safetensors", metadata={"format": "pt"})
    KeyeConfig(**settings).save_pretrained(folder)
    return folder
