"""Names of the published layouts, and the tokenizer files of each with one token per byte."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

LAYOUT_NAMES = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "keye_vl_2", "deepseek_v3", "deepseek_v32")
GQA_LAYOUTS = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_2")
VISION_LAYOUTS = (*GQA_LAYOUTS, "keye_vl_671b")

# Tokens of the Qwen-based members, in the order of their ids (151643 and up in the published tokenizer).
_QWEN_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>
<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>
<think> </think> <|point_start|> <|point_end|> <|ocr_text_start|> <|ocr_text_end|> <|clip_time_start|>
<|clip_time_end|>
""".split()
_QWEN_SPECIAL = {*_QWEN_TOKENS[:3], *_QWEN_TOKENS[9:14]}
_FRAME_TOKENS = ["<|frame|>", "<|fast_start|>", "<|fast_end|>"]
_DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
_VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# The published `chat_template.json`: the only one with a branch for images and videos.
VISUAL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What `tokenizer_config.json` holds instead: text only, visual parts are lost.
_TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(layout: str) -> list[str]:
    """Every token of the layout's tokenizer in the order of its ids: 256 bytes and the added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if layout in GQA_LAYOUTS:
        return [*letters, *_QWEN_TOKENS, *([] if layout == "keye_vl_preview" else _FRAME_TOKENS)]
    visual = [*_VISION_TOKENS, *_FRAME_TOKENS] if layout == "keye_vl_671b" else []
    return [*_DEEPSEEK_TOKENS, *letters, *visual]


def vocabulary_size(layout: str) -> int:
    """Rows of the embedding table: a few more than tokens, as published."""
    return len(vocabulary(layout)) + (17 if layout in GQA_LAYOUTS else 13)


def write_tokenizer(folder: Path, layout: str) -> None:
    """Byte-level tokenizer files: a token per byte, and the layout's added tokens under the ids of `vocabulary`."""
    tokens = vocabulary(layout)
    added = [token for token in tokens if len(token) > 2]
    letters = {token: number for number, token in enumerate(tokens) if token not in added}
    qwen = layout in GQA_LAYOUTS
    special = _QWEN_SPECIAL if qwen else {*_DEEPSEEK_TOKENS, *_VISION_TOKENS}
    # In the DeepSeek tokenizer the first ids are added tokens, and the model knows them as well.
    known = letters if qwen else {token: number for number, token in enumerate(tokens) if token not in added[3:]}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in added])
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {token: number for number, token in enumerate(tokens)}
    config = {
        "added_tokens_decoder": {
            str(numbers[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in special,
            }
            for token in added
        },
        "bos_token": None if qwen else _DEEPSEEK_TOKENS[0],
        "chat_template": _TEXT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if qwen else _DEEPSEEK_TOKENS[1],
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>" if qwen else _DEEPSEEK_TOKENS[1],
        "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
    }
    if qwen:
        config.update(add_bos_token=False, add_prefix_space=False, errors="replace", split_special_tokens=False)
        config["unk_token"] = None
        (folder / "vocab.json").write_text(json.dumps(letters, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        (folder / "added_tokens.json").write_text(json.dumps({token: numbers[token] for token in added}))
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
