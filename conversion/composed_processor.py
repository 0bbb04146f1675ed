"""The processor of a composed model: the text checkpoint's tokenizer with the tokens that images and videos need."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.image_processing_keye import KeyeImageProcessor
from modeling_keye.layouts_keye import Layout
from modeling_keye.processing_keye import (
    FAST_END,
    FAST_START,
    FRAME,
    IMAGE_PAD,
    KEYE_CHAT_TEMPLATE,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    KeyeProcessor,
)
from modeling_keye.published_processor_keye import load_tokenizer
from modeling_keye.video_processing_keye import KeyeVideoProcessor

from .folder import blaming_tokenizer

TOKENS_BY_FIELD = {
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
}
# What any family's processor may write into a prompt.
VISION_TOKENS = (
    VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD, FRAME, FAST_START, FAST_END,
)  # fmt: skip
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
DEEPSEEK_TURNS = ("<｜User｜>", "<｜Assistant｜>")

# The turns that a DeepSeek decoder was trained with; media stand where Keye's own template puts them. Decoders that
# think (V3.1 and later) are asked for an answer at once unless `thinking` is set, as in their own template.
_DEEPSEEK_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- BOS -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' ~ render(message['content']) -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>ANSWER' -}}
{%- generation -%}
{{- render(message['content']) ~ EOS -}}
{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜>' ~ BEGIN -}}
{%- endif -%}
"""


def composed_processor(folder: Path, layout: Layout, config: KeyeConfig, notes: list[str]) -> KeyeProcessor | None:
    """The processor for the tokenizer of the text checkpoint in `folder`, None where that has no tokenizer.json.

    Missing tokens get the ids behind the tokenizer's own, which are rows of the embedding that no token used; `config`
    gets the ids of the placeholders, and `notes` a sentence about each decision. Images and videos are treated as for
    Keye-VL-2.0, whatever the tower comes from.

    Raises `ValueError` when the embedding has too few rows left.
    """
    if not (folder / "tokenizer.json").is_file():
        notes.append(
            "TEXT has no tokenizer.json, so the result has no tokenizer and no processor, and the ids of the vision "
            "tokens are assumptions."
        )
        return None
    with blaming_tokenizer(folder):
        tokenizer = load_tokenizer(folder, layout, {}, {})
    known = tokenizer.get_vocab()
    own_turns = all(token in known for token in DEEPSEEK_TURNS)
    missing = [token for token in (*VISION_TOKENS, *(() if own_turns else CHAT_TOKENS)) if token not in known]
    rows, used = config.text_config.vocab_size, max(known.values()) + 1
    if used + len(missing) > rows:
        raise ValueError(
            f"TEXT ({folder}) has {rows} embedding rows for {used} tokens, but {len(missing)} more are needed: "
            f"{' '.join(missing)}. Resize the embedding and the head of the text checkpoint first."
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    for name, token in TOKENS_BY_FIELD.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    if missing:
        ids = tokenizer.convert_tokens_to_ids(missing)
        notes.append(f"New tokens {min(ids)} to {max(ids)}, of {rows} embedding rows: {' '.join(missing)}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    sizes = {"patch_size": config.vision_config.patch_size, "merge_size": config.vision_config.spatial_merge_size}
    template = _own_template(tokenizer, "</think>" in known) if own_turns else KEYE_CHAT_TEMPLATE
    turns = "its own" if own_turns else "those of Keye, because the tokenizer has none of DeepSeek's"
    notes.append(f"Chat turns are {turns}; images and videos are prepared as for Keye-VL-2.0.")
    return KeyeProcessor(tokenizer, KeyeImageProcessor(**sizes), KeyeVideoProcessor(**sizes), chat_template=template)


def _own_template(tokenizer: Any, thinks: bool) -> str:
    words = {
        "BOS": repr(tokenizer.bos_token or ""),
        "EOS": repr(tokenizer.eos_token or ""),
        "ANSWER": "</think>" if thinks else "",
        "BEGIN": "('<think>' if thinking else '</think>')" if thinks else "''",
    }
    template = _DEEPSEEK_TEMPLATE
    for word, value in words.items():
        template = template.replace(word, value)
    return template
