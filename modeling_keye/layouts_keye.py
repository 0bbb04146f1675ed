"""The layouts of published Keye and DeepSeek checkpoints, and which of them a `config.json` describes."""

import re
from dataclasses import dataclass

from .published_keys_keye import Keys

# The classes of this project; their configurations need no translation.
OUR_MODEL_TYPES = ("keye", "keye_text", "keye_vision")

_HEAD = r"visual\.vision_model\.head\..+"
_PACKING = r"visual\.vision_model\.embeddings\.packing_position_embedding\.weight"
_ROTARY = r".+\.rotary_emb\.inv_freq"

# DeepSeek-V3's, where the file does not say how many rows and columns share a scale.
FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class Layout:
    """How a family of published checkpoints names itself and stores its tensors.

    architectures, model_types: what its `config.json` holds. family: its preprocessing (`frame_budget_keye.FAMILIES`).
    experts: "input_major" (one tensor per layer, [experts, in, out]), "per_expert" (one matrix per expert, [out, in]),
        or None for a dense decoder.
    ignorable: patterns of published tensor names that the model does not use.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    family: str
    has_vision: bool
    latent_attention: bool
    experts: str | None
    ignorable: tuple[str, ...]

    def is_ignorable(self, name: str, num_hidden_layers: int) -> bool:
        """Whether the tensor of this (published, flat) name may be left out.

        Decoders with latent attention may be followed by layers for multi-token prediction, which are not run.
        """
        if any(re.fullmatch(pattern, name) for pattern in self.ignorable):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", name) if self.latent_attention else None
        return layer is not None and int(layer[1]) >= num_hidden_layers


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="keye_vl_preview",
            architectures=("KeyeForConditionalGeneration",),
            model_types=("Keye",),
            family="keye_vl_preview",
            has_vision=True,
            latent_attention=False,
            experts=None,
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_1_5",
            architectures=("KeyeVL1_5ForConditionalGeneration",),
            model_types=("KeyeVL1_5",),
            family="keye_vl_1_5",
            has_vision=True,
            latent_attention=False,
            experts=None,
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_671b",
            architectures=("KeyeVLMoeForConditionalGeneration",),
            model_types=(),
            family="keye_vl_671b",
            has_vision=True,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_2",
            architectures=("KeyeVL2MoeForConditionalGeneration", "KeyeVL2ForConditionalGeneration"),
            model_types=("KeyeVL2",),
            family="keye_vl_2",
            has_vision=True,
            latent_attention=False,
            experts="input_major",
            ignorable=(_PACKING, _ROTARY),
        ),
        Layout(
            name="deepseek_v3",
            architectures=("DeepseekV3ForCausalLM",),
            model_types=("deepseek_v3",),
            family="keye_vl_2",
            has_vision=False,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_ROTARY,),
        ),
        Layout(
            name="deepseek_v32",
            architectures=("DeepseekV32ForCausalLM",),
            model_types=("deepseek_v32",),
            family="keye_vl_2",
            has_vision=False,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_ROTARY,),
        ),
    )
}


def detect_layout(raw: dict) -> Layout | None:
    """The layout that a `config.json` describes, None for a configuration of this project.

    `architectures[0]` decides, then `model_type`. Raises `ValueError` for any other model.
    """
    architecture = Keys({"architectures": raw.get("architectures")}).architecture()
    model_type = raw.get("model_type")
    for layout in LAYOUTS.values():
        if architecture in layout.architectures:
            return layout
    if model_type in OUR_MODEL_TYPES:
        return None
    for layout in LAYOUTS.values():
        if model_type in layout.model_types:
            return layout
    known = [name for layout in LAYOUTS.values() for name in layout.architectures]
    raise ValueError(
        f"config.json describes architectures[0] {architecture!r} with model_type {model_type!r}, which is no "
        f"checkpoint that Keye can load. Known are {', '.join(known)}, and models saved by KeyeForVideoQA."
    )


def fp8_block(raw: dict) -> tuple[int, int]:
    """Rows and columns of a weight that share one fp8 scale, by a `config.json`; 128 x 128 where it is silent.

    Raises `ValueError` when `weight_block_size` is anything but two whole numbers from 1 up.
    """
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            settings = Keys(Keys(part).need("quantization_config"), "quantization_config")
            return tuple(settings.get("weight_block_size", FP8_BLOCK))
    return FP8_BLOCK


__all__ = ["LAYOUTS", "Layout", "detect_layout", "fp8_block"]
