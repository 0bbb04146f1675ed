"""One record in this repository's columns -> checked chat messages with their media in place."""

from collections.abc import Callable
from os import PathLike
from typing import Any

from modeling_keye.messages_keye import CONTROL_TOKEN

from .data_errors import DataError, suggestion

KINDS = ("video", "image")
MARKERS = {"video": "<video>", "image": "<image>"}
ROLES = ("system", "user", "assistant")


def messages_of(record: dict, where: str, find_media: Callable[[str, Any], str]) -> list[dict]:
    """Messages [{"role", "content": [{"type": "video" | "image", "path"} | {"type": "text", "text"}]}] of a record.

    Every file gets one place: where the conversation has parts of its kind or markers (`<video>`, `<image>`), there;
    otherwise the files come first in the first user message. `find_media(kind, value)` gives a file's path.

    Raises `DataError` beginning with `where`.
    """
    messages = [_message(message, number, where) for number, message in enumerate(_turns(record, where), start=1)]
    _check_order(messages, where)
    for kind in KINDS:
        _place(messages, kind, _files(record, kind, where), where)
    _check_texts(messages, where)
    parts = [part for message in messages for part in message["content"]]
    if any(kind in record for kind in KINDS) and all(part["type"] == "text" for part in parts):
        columns = " and ".join(repr(kind) for kind in KINDS if kind in record)
        raise DataError(
            f"{where}: {columns} is empty; give a file, or leave the column out of rows that are text only."
        )
    for part in parts:
        if part["type"] != "text":
            part["path"] = find_media(part["type"], part["path"])
    return messages


def _turns(record: dict, where: str) -> list:
    """The messages as given, or question and answer as messages."""
    given = {name for name in ("messages", "question", "answer") if record.get(name) is not None}
    if "messages" in given:
        if len(given) > 1:
            other = "question" if "question" in given else "answer"
            raise DataError(f"{where}: has both 'messages' and {other!r}; give messages, or question and answer.")
        messages = record["messages"]
        if not isinstance(messages, (list, tuple)):
            raise DataError(
                f"{where}: 'messages' must be a list of messages, got {_shown(messages)}; write "
                '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
            )
        if not messages:
            raise DataError(f"{where}: 'messages' is empty; give a user message and its answer, or drop the row.")
        return list(messages)
    for name, missing in (("question", "no question"), ("answer", "no answer")):
        if name not in given:
            raise DataError(
                f"{where}: has {missing}; fill the column {name!r} (or give the conversation in 'messages'), or drop "
                "the row."
            )
        if not isinstance(record[name], str):
            raise DataError(f"{where}: {name!r} must be text, got {_shown(record[name])}; write it in quotes.")
    return [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]


def _message(message: Any, number: int, where: str) -> dict:
    """One message with its content as a list of parts."""
    where = f"{where}: message {number}"
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content, got {_shown(message)}.")
    message = {key: value for key, value in message.items() if value is not None}
    _refuse_keys(message, ("role", "content"), where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(
            f"{where} has the role {role!r}{suggestion(role, ROLES) or ';'} the roles are {', '.join(ROLES)}."
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where} ({role}) must have text or a list of parts as content, got {_shown(content)}.")
    return {"role": role, "content": [_part(part, f"{where} ({role})", role) for part in content]}


def _part(part: Any, where: str, role: str) -> dict:
    if not isinstance(part, dict):
        raise DataError(f'{where} holds the part {_shown(part)}; a part is an object like {{"type": "text", ...}}.')
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        _refuse_keys(part, ("type", "text"), where)
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where} holds a text part whose text is {_shown(part.get('text'))}; it must be text.")
        return {"type": "text", "text": part["text"]}
    if kind not in KINDS:
        known = ("text", *KINDS)
        raise DataError(
            f"{where} holds a part of type {kind!r}{suggestion(kind, known) or ';'} use {', '.join(known)}."
        )
    if role != "user":
        raise DataError(f"{where} holds a {kind}; only user messages may show one, so move it to the question.")
    _refuse_keys(part, ("type", "path", kind), where)
    if "path" in part and kind in part:
        raise DataError(f"{where} holds a {kind} part with both 'path' and {kind!r}; give its file once.")
    return {"type": kind, "path": part.get("path", part.get(kind))}


def _refuse_keys(given: dict, known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise DataError(f"{where} has the key {key!r}{suggestion(key, known) or ';'} use {', '.join(known)}.")


def _check_order(messages: list[dict], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: has no answer; the conversation needs an assistant message, or drop the row.")
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    wrong = next((place for place, role in enumerate(turns) if role != expected[place]), None)
    if wrong is not None:
        raise DataError(
            f"{where}: the roles are out of order: {', '.join(roles)}; after an optional system message, user and "
            f"assistant take turns, so message {wrong + 1 + len(roles) - len(turns)} must be by the {expected[wrong]}."
        )
    if turns[-1] != "assistant":
        raise DataError(f"{where}: the last question has no answer; add the assistant's message or drop the question.")


def _files(record: dict, kind: str, where: str) -> list:
    """The files in the column of a kind; a list of its own for each call."""
    value = record.get(kind)
    if value is None:
        return []
    files = list(value) if isinstance(value, (list, tuple)) else [value]
    for file in files:
        if not isinstance(file, (str, PathLike, dict)) or file == "":
            raise DataError(f"{where}: {kind!r} must be the path of a file or a list of paths, got {_shown(value)}.")
    return files


def _place(messages: list[dict], kind: str, files: list, where: str) -> None:
    """Give every file of a kind its part."""
    users = [message for message in messages if message["role"] == "user"]
    parts = [part for message in users for part in message["content"] if part["type"] == kind]
    if parts:
        empty = [part for part in parts if part["path"] is None]
        if len(empty) != len(files):
            raise DataError(
                f"{where}: {len(empty)} {kind} part(s) of the messages name no file, but the column {kind!r} has "
                f"{len(files)}; name each file once, in its part or in the column."
            )
        for part, file in zip(empty, files, strict=True):
            part["path"] = file
        return
    marker = MARKERS[kind]
    found = sum(
        part["text"].count(marker) for message in users for part in message["content"] if part["type"] == "text"
    )
    if found == 0:
        users[0]["content"][:0] = [{"type": kind, "path": file} for file in files]
        return
    if found != len(files):
        raise DataError(
            f"{where}: the text holds {found} {marker} marker(s), but the row has {len(files)} {kind}(s); write one "
            f"{marker} per {kind}, or none at all to show them before the first question."
        )
    waiting = iter(files)
    for message in users:
        message["content"] = [piece for part in message["content"] for piece in _split(part, kind, waiting)]


def _split(part: dict, kind: str, waiting) -> list[dict]:
    """A text part taken apart at its markers; line breaks beside a marker belong to the marker."""
    if part["type"] != "text" or MARKERS[kind] not in part["text"]:
        return [part]
    pieces = []
    for number, text in enumerate(part["text"].split(MARKERS[kind])):
        if number:
            pieces.append({"type": kind, "path": next(waiting)})
        if text.strip("\n"):
            pieces.append({"type": "text", "text": text.strip("\n")})
    return pieces


def _check_texts(messages: list[dict], where: str) -> None:
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        for text in texts:
            found = CONTROL_TOKEN.search(text)
            token = found.group() if found else next((m for m in MARKERS.values() if m in text), None)
            if token is not None:
                raise DataError(
                    f"{where}: the text of message {number} ({role}) holds the placeholder {token}, which stands for "
                    "something else than text; remove it, and name videos and images in their columns."
                )
        if "".join(texts).strip():
            continue
        if role == "assistant":
            raise DataError(f"{where}: the answer in message {number} is empty; write one or drop the row.")
        if len(texts) == len(message["content"]):
            raise DataError(f"{where}: message {number} ({role}) is empty; write its text or drop the row.")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
