"""The chat template that training learns from: it must mark what the assistant says with `{% generation %}`."""

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from modeling_keye.processing_keye import KEYE_CHAT_TEMPLATE

from .data_errors import DataError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_VIDEO, _IMAGE = {"type": "video", "path": "a.mp4"}, {"type": "image", "path": "a.png"}
# Conversations of every form that rows have, to tell whether two templates write the same.
_PROBES = (
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [_VIDEO, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": " Which of them?\n"}, _IMAGE, _IMAGE, _VIDEO]},
        {"role": "assistant", "content": [{"type": "text", "text": "The first. "}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>\n\n</think>\n\nIt is <b>red</b>."}]},
    ],
)


def marks_answers(template: Any) -> bool:
    """Whether a processor's `chat_template` tells which tokens are answers."""
    if isinstance(template, dict):
        template = template.get("default")
    return isinstance(template, str) and _MARK.search(template) is not None


def mark_answers(processor: Any, file: str | Path | None = None) -> None:
    """Give `processor` a chat template that marks the answers, if its own does not.

    That is the Jinja template in `file`, or Keye's own with the marks where both write the same prompts, as with the
    published Keye-VL checkpoints. Raises `DataError` when there is neither.
    """
    if file is not None:
        try:
            template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the chat template {str(file)!r} cannot be read: {error}") from error
        if not marks_answers(template):
            raise DataError(
                f"the chat template {str(file)!r} has no {{% generation %}} around what the assistant says."
            )
        processor.chat_template = template
    elif not marks_answers(processor.chat_template):
        if not _writes_as_keye(processor):
            raise DataError(
                "the processor's chat template does not mark what the assistant says, so nobody knows which tokens to "
                "learn, and it writes other prompts than Keye's; put {% generation %} ... {% endgeneration %} around "
                "it in a copy, and name that in `data.chat_template` of the recipe."
            )
        processor.chat_template = KEYE_CHAT_TEMPLATE


def _writes_as_keye(processor: Any) -> bool:
    def written(template: str) -> list[str]:
        return [
            processor.apply_chat_template(probe, chat_template=template, tokenize=False, add_generation_prompt=asks)
            for probe in _PROBES
            for asks in (False, True)
        ]

    try:
        return written(processor.chat_template) == written(KEYE_CHAT_TEMPLATE)
    except (TemplateError, TypeError):  # made for other messages than ours
        return False
