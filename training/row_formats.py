"""The usual formats of video questions, each mapped to this repository's columns by one function.

A mapping takes one record as the source holds it and returns one with this repository's columns (`COLUMNS`; either
messages, or question and answer). It may leave the markers `<video>` and `<image>` in the text, one per file in order;
`row_messages.messages_of` puts the files there and checks everything else. A user's own mapping does the same.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .data_errors import DataError, suggestion

COLUMNS = ("id", "kind", "video", "image", "messages", "question", "answer")
ROLES = {"human": "user", "gpt": "assistant"}


def from_rows(record: dict) -> dict:
    """This repository's own columns."""
    return record


def from_llava(record: dict) -> dict:
    """LLaVA-Video: {video, conversations: [{from: human | gpt, value: "<image>\\n..."}]}.

    LLaVA writes `<image>` for a video as well.
    """
    messages = _turns(record.get("conversations"))
    if record.get("video") is not None and record.get("image") is None and isinstance(messages, list):
        for message in messages:
            if isinstance(message, dict) and isinstance(message["content"], str):
                message["content"] = message["content"].replace("<image>", "<video>")
    return {**{name: record[name] for name in ("id", "video", "image") if name in record}, "messages": messages}


def from_sharegpt(record: dict) -> dict:
    """ShareGPT-style: {messages or conversations, videos: [...], images: [...], system}, roles in either spelling."""
    turns = record.get("messages")
    messages = _turns(record.get("conversations") if turns is None else turns)
    if record.get("system") and isinstance(messages, list):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    mapped = {"messages": messages}
    for theirs, ours in (
        ("id", "id"),
        ("videos", "video"),
        ("images", "image"),
        ("video", "video"),
        ("image", "image"),
    ):
        if record.get(theirs) is not None or (theirs in record and ours not in mapped):
            mapped[ours] = record[theirs]
    return mapped


def _turns(turns: Any) -> Any:
    """Turns with the keys `role` and `content`; what is no list of objects stays, and is refused later."""
    if not isinstance(turns, list):
        return turns
    return [_turn(turn) if isinstance(turn, dict) else turn for turn in turns]


def _turn(turn: dict) -> dict:
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


@dataclass(frozen=True)
class RowFormat:
    """A mapping, and the columns it knows; in a `strict` format any other column is refused."""

    name: str
    to_row: Callable[[dict], dict]
    columns: tuple[str, ...] = ()
    strict: bool = False

    def check_columns(self, columns: Iterable[Any], where: str) -> None:
        """Raises `DataError` for a column that is unknown, or whose name is nearly that of one that is not there."""
        names = set(columns)
        missing = [name for name in self.columns if name not in names]
        for name in sorted(names - set(self.columns), key=str):
            near = suggestion(name, missing)
            if self.strict or (near and self.columns):
                raise DataError(
                    f"{where}: unknown column {name!r}{near or ';'} the {self.name} format has the columns "
                    f"{', '.join(self.columns)}, so rename or drop it, or map it with format='module:function'."
                )


FORMATS = {
    "rows": RowFormat("rows", from_rows, COLUMNS, strict=True),
    # Published files carry further columns (source, duration, ...), which do no harm.
    "llava": RowFormat("llava", from_llava, ("id", "video", "image", "conversations")),
    "sharegpt": RowFormat("sharegpt", from_sharegpt, ("id", "videos", "images", "messages", "conversations", "system")),
}


def format_of(columns: Iterable[Any]) -> RowFormat:
    """The format whose columns these are."""
    names = set(columns)
    plural = bool(names & {"videos", "images"})
    if "conversations" in names:
        return FORMATS["sharegpt" if plural else "llava"]
    return FORMATS["sharegpt" if plural and "messages" in names else "rows"]


def load_format(name: str) -> RowFormat | None:
    """The format called `name`; None for "auto"; the function itself for "module:function".

    Raises `DataError` when there is no such format, module or function.
    """
    if name == "auto":
        return None
    if name in FORMATS:
        return FORMATS[name]
    known = ("auto", *FORMATS)
    if not isinstance(name, str) or ":" not in name:
        raise DataError(
            f"format={name!r} is not known{suggestion(name, known) or ';'} use one of {', '.join(known)}, or "
            "'module:function' for a mapping of your own."
        )
    module, _, function = name.partition(":")
    try:
        to_row = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"format={name!r} cannot be loaded: {error}; it must name a function in a module that Python can import "
            "from the folder the command runs in."
        ) from error
    if not callable(to_row):
        raise DataError(f"format={name!r} is a {type(to_row).__name__}; it must name a function of one record.")
    return RowFormat(name, to_row)
