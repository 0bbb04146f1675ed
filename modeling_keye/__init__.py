"""Keye video question answering for Transformers: importing this package registers the Auto classes.

The other files of this folder are also the remote code of a checkpoint; this one is never shipped.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

# The top-level name is a placeholder where torchvision is missing.
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .configuration_keye import KeyeConfig, KeyeTextConfig, KeyeVisionConfig
from .image_processing_keye import KeyeImageProcessor
from .modeling_keye import KeyeForVideoQA, KeyeModel, KeyeTextModel, KeyeVisionModel
from .processing_keye import KeyeProcessor
from .sparse_attention_keye import Selection, select_tokens, sparse_attention_mask, sparse_gqa, sparse_mla
from .video_processing_keye import KeyeVideoProcessor

__version__ = "0.1.0"

AutoConfig.register(KeyeConfig.model_type, KeyeConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(KeyeConfig, KeyeForVideoQA, exist_ok=True)
AutoProcessor.register(KeyeConfig, KeyeProcessor, exist_ok=True)
# Without these, `KeyeProcessor.from_pretrained` would ask whether to trust the folder's copy of our own code.
AutoImageProcessor.register(
    KeyeConfig, image_processor_classes={"pil": KeyeImageProcessor, "torchvision": KeyeImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(KeyeConfig, KeyeVideoProcessor, exist_ok=True)

# A model saved through the package must carry its code, or the folder loads nowhere else.
KeyeConfig.register_for_auto_class()
KeyeForVideoQA.register_for_auto_class("AutoModel")
KeyeProcessor.register_for_auto_class()
KeyeVideoProcessor.register_for_auto_class("AutoVideoProcessor")
KeyeImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "KeyeConfig",
    "KeyeForVideoQA",
    "KeyeImageProcessor",
    "KeyeModel",
    "KeyeProcessor",
    "KeyeTextConfig",
    "KeyeTextModel",
    "KeyeVideoProcessor",
    "KeyeVisionConfig",
    "KeyeVisionModel",
    "Selection",
    "select_tokens",
    "sparse_attention_mask",
    "sparse_gqa",
    "sparse_mla",
]
