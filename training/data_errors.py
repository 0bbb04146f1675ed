"""What goes wrong with training data, said in one sentence that names the row."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """A row, or a source of rows, that cannot be trained on; the message names it ("clips.jsonl, row 7: ...")."""


class SkippableError(DataError):
    """A row that `on_bad_video="skip"` passes over. `path` is the file at fault, "" where no single file is."""

    # Workers hand exceptions over by their message alone, so the path needs a default.
    def __init__(self, message: str, path: str = ""):
        super().__init__(message)
        self.path = path


class MediaError(SkippableError):
    """A video or image that is missing or cannot be read."""


class TooLongError(SkippableError):
    """An example whose answer `max_length` would cut."""


def sentence(error: DataError) -> str:
    """The message of `error` alone: a worker of `DataLoader` puts its own traceback before it."""
    message = str(error)
    before, name, own = message.rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
    return own.strip() if name and before.startswith("Caught ") else message


def suggestion(name: object, known: Iterable[str]) -> str:
    """ "; did you mean 'video'?" for a name close to a known one, "" otherwise."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""
