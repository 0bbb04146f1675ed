"""Chat messages before a template writes them: only parts it knows, and no text that would become a placeholder."""

import re
from os import PathLike
from typing import Any

from .video_download_keye import FramePaths

# What tokenizers of chat models reserve: <|video_pad|>, <|frame|>, <|im_end|>, and DeepSeek's spelling with wide bars.
CONTROL_TOKEN = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
# What other models' tools read in a part (qwen-vl-utils and its kin).
_OPTIONS = {
    *("fps", "num_frames", "nframes", "min_frames", "max_frames", "video_start", "video_end"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
}
# A tokenizer that lower-cases makes a placeholder of capitals too, and no user means anything else by them.
_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}", re.IGNORECASE)


def checked_messages(conversation: Any, tokenizer: Any, sanitize: bool = False, loads: bool = True) -> Any:
    """A copy of a conversation, or of a list of them, whose parts have the type text, image or video.

    Parts of type `image_url` and `video_url` are written as image and video. With `sanitize` the library will make
    plain text of control tokens as the tokenizer spells them; other spellings that give the same tokens are refused.

    With `loads` the library will load the media, so each part must say where its own lies, and nothing else; without,
    they are given apart from the messages.

    Raises `ValueError` for all other parts and for text that holds a placeholder.
    """
    if not isinstance(conversation, (list, tuple)):
        return conversation
    return [
        _checked_message(item, tokenizer, sanitize, loads)
        if isinstance(item, dict)
        else checked_messages(item, tokenizer, sanitize, loads)
        for item in conversation
    ]


def _checked_message(message: dict, tokenizer: Any, sanitize: bool, loads: bool) -> dict:
    role, content = message.get("role"), message.get("content")
    if content is None:
        return message
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(
            f"the content of a {role} message must be text or a list of parts, got {type(content).__name__}."
        )
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:
        parts = [_part(part, role, loads) for part in content]
    for part in parts:
        if part["type"] == "text":
            _check_text(part["text"], role, tokenizer, sanitize)
    return message if isinstance(content, str) else {**message, "content": parts}


def _part(part: Any, role: Any, loads: bool) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "video"):
        if loads:
            _check_source(part, kind, role)
        return _with_frame_paths(part) if kind == "video" else part
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"a {role} message holds a text part whose text is {str(part.get('text'))[:60]!r} "
                f'({type(part.get("text")).__name__}); write it as {{"type": "text", "text": "..."}}.'
            )
        return part
    if kind in ("image_url", "video_url"):
        address = part.get(kind)
        address = address.get("url") if isinstance(address, dict) else address
        if not address:
            raise ValueError(
                f"a {role} message holds a part of type {kind} without an address; write it as "
                f'{{"type": "{kind}", "{kind}": {{"url": "..."}}}}.'
            )
        if loads:
            _check_source({**part, "url": address}, kind.removesuffix("_url"), role)
        return {"type": kind.removesuffix("_url"), "url": address}
    shown = f"a part of type {kind!r}" if isinstance(part, dict) else f"{str(part)[:60]!r}, which is no part"
    raise ValueError(
        f"a {role} message holds {shown}; give parts of type text, image or video (or image_url and video_url), like "
        '{"type": "video", "path": ...}.'
    )


def _with_frame_paths(part: dict) -> dict:
    """The part, in which a list of paths is one video."""
    lists = {
        name: FramePaths(value)
        for name, value in part.items()
        if name in ("video", "path", "url")
        and isinstance(value, (list, tuple))
        and value
        and all(isinstance(item, (str, PathLike)) for item in value)
    }
    return {**part, **lists}


def _check_source(part: dict, kind: str, role: Any) -> None:
    """Raises `ValueError` for a part without one source, and for one that says how to sample, which nobody would do."""
    if kind == "video" and "base64" in part:
        raise ValueError(
            f"a {role} message holds a part of type video with base64, which only images may have; save the video to a "
            'file and write the part as {"type": "video", "path": ...}.'
        )
    sources = [name for name in (kind, "path", "url", *["base64"] * (kind == "image")) if part.get(name) is not None]
    if len(sources) != 1:
        raise ValueError(
            f"a {role} message holds a part of type {kind} with {', '.join(sources) or 'nothing'} to load; say where "
            f'the {kind} lies once, like {{"type": "{kind}", "path": ...}}.'
        )
    options = sorted(_OPTIONS & part.keys())
    if options:
        raise ValueError(
            f"a {role} message holds a part of type {kind} with {', '.join(options)}, which is not read there. Options "
            'hold for all media: give them to apply_chat_template, as processor_kwargs={"fps": 2.0}.'
        )


def _check_text(text: str, role: Any, tokenizer: Any, sanitize: bool) -> None:
    if sanitize:
        _check_spellings(text, role, tokenizer)
        return
    found = _PLACEHOLDER.search(text)
    if found is not None:
        kind = "image" if found.group().lower() == IMAGE_PAD else "video"
        raise ValueError(
            f"the text of a {role} message holds {found.group()}, which only the processor writes; "
            f'remove it and give the {kind} as {{"type": "{kind}", "path": ...}} instead.'
        )


def _check_spellings(text: str, role: Any, tokenizer: Any) -> None:
    tokens = {token.lower(): token for token in tokenizer.added_tokens_encoder}
    for found in re.finditer("|".join(map(re.escape, tokens)) or "(?!)", text, re.IGNORECASE):
        token = tokens.get(found.group().lower())
        if token is None or token == found.group():
            continue
        ids = tokenizer.encode(found.group(), add_special_tokens=False)
        if tokenizer.convert_tokens_to_ids(token) in ids:
            raise ValueError(
                f"the text of a {role} message holds {found.group()}, which this tokenizer reads as {token} and "
                "sanitize_control_tokens does not find in this spelling; remove it."
            )
