"""The name of a model: a folder, or a repository of the Hub."""

import re
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# By which the libraries and our own files refuse a checkpoint.
LOADING_ERRORS = (OSError, ValueError, SafetensorError, StrictDataclassError)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_source(name: str) -> None:
    """Raise `ValueError` for what is neither a folder nor formed like OWNER/NAME, and say when the Hub will be asked.

    A misspelt path often has that form, and without a network the Hub is asked for minutes.
    """
    if Path(name).is_dir():
        return
    if Path(name).exists() or not _REPOSITORY.fullmatch(name):
        raise ValueError(
            f"{name!r} is no folder, and no repository of the Hub has such a name (it would be OWNER/NAME)."
        )
    print(f"There is no folder {name}; asking the Hub for a repository of that name.", file=sys.stderr)
