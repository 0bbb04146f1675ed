"""The tokenizer of keye-tiny: one token per word and one per time stamp, small enough to be learned in an hour."""

import re

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from .long_videos import BECAME, LONG_TEMPLATES, NO, YES
from .synthetic_videos import COLOURS, MAX_COUNT, NOTHING, PLURALS, SHAPES, TEMPLATES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
    "<|fast_start|>",
    "<|fast_end|>",
)
UNKNOWN = "<unk>"
# Time stamps of the first 100 seconds, as the processor prints them.
TIME_STAMPS = tuple(f"{k / 10:.1f}" for k in range(1000))
# From then on a time takes two tokens, hundreds of seconds and the rest: "1204.5" is "12¦", "04.5".
HUNDREDS = tuple(f"{k}¦" for k in range(1, 200))
PADDED_STAMPS = tuple(f"{k / 10:04.1f}" for k in range(100))

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}{{- part.get('text', '') -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


SPACE = r"\s"
PREPOSITIONS = (r"\bat ", r"\bsecond ")


def _wholes(*before: str) -> str:
    """One to five digits behind one of `before`, as alternatives of fixed length for a look behind."""
    return "|".join(start + r"\d" * digits for start in before for digits in range(1, 6))


def _normalizer() -> Sequence:
    """Lower case, one spelling of "color", no punctuation, and "3 seconds" or "at 3" written as the stamp "3.0"."""
    return Sequence(
        [
            Lowercase(),
            Replace(Regex(r"[?!,;:\"'()=]|\.(?!\d)"), " "),
            Replace("colour", "color"),
            Replace("grey", "gray"),
            # A unit glued to its number becomes a word of its own.
            Replace(Regex(r"(?<=\d)(?=s\b|sec\b|secs\b|second\b|seconds\b)"), " "),
            # Whole seconds, recognised by the unit behind or the preposition before, become time stamps.
            Replace(Regex(f"(?<={_wholes('^', SPACE)})" + r"(?=\s+(?:s|secs?|seconds?)\b)"), ".0"),
            Replace(Regex(f"(?<={_wholes(*PREPOSITIONS)})" + r"(?![\d.])"), ".0"),
            Replace(Regex(r"(?<=\d)(?=\d\d\.\d(?!\d))"), "¦ "),
        ]
    )


def vocabulary() -> list[str]:
    """Every token in id order: special tokens, time stamps, then the words of questions and answers."""
    normalizer = _normalizer()
    words = {"system", "user", "assistant", NOTHING, "shape", "shapes", "a", "an", "the", "s", "sec", "secs"}
    words.update(COLOURS, SHAPES, PLURALS.values(), (str(n) for n in range(MAX_COUNT + 1)))
    for texts in TEMPLATES.values():
        for text in texts:
            words.update(normalizer.normalize_str(re.sub(r"\{\w+\}", " ", text)).split())
    tokens = [*SPECIAL_TOKENS, UNKNOWN, *TIME_STAMPS, *sorted(words)]
    # The words of long clips stand behind all others: the model learns the short ones first, without them.
    more = {YES, NO, BECAME}
    for texts in LONG_TEMPLATES.values():
        for text in texts:
            more.update(normalizer.normalize_str(re.sub(r"\{\w+\}", " ", text)).split())
    return [*tokens, *HUNDREDS, *PADDED_STAMPS, *sorted(more.difference(tokens))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; equal on every machine."""
    tokens = vocabulary()
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # Words with spaces between them, then the two parts of a time joined.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace("¦ ", "")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=262144,
    )
