"""Where a video or image lies: a path, a file:// URI, or an address to download to a temporary file."""

import http.client
import os
import shutil
import tempfile
import urllib.parse
import urllib.request

# Longest wait for a server that neither answers nor sends.
TIMEOUT_SECONDS = 60

# The suffix only hints at the format; file systems limit the length of a name.
MAX_SUFFIX = 16


class DownloadError(OSError):
    """An address that cannot be downloaded; the text is the reason."""


class FramePaths(list):
    """Pictures that are the frames of one video, where a plain list of paths would mean as many videos."""


def is_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def local_path(source: str) -> str:
    """The path that a file:// URI stands for; anything else stays as it is."""
    if not source.lower().startswith("file://"):
        return source
    written = source[len("file://") :]
    if written.startswith("localhost/"):
        written = written[len("localhost") :]
    path = urllib.request.url2pathname(written)
    # A path that was only put behind "file://" may hold a % of its own.
    return written if os.path.exists(written) and not os.path.exists(path) else path


def download(address: str) -> str:
    """The path of a temporary copy, which the caller removes; no file is left where this raises."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
            suffix = os.path.splitext(urllib.parse.urlsplit(address).path)[1][:MAX_SUFFIX]
            handle, path = tempfile.mkstemp(suffix=suffix)
            try:
                with os.fdopen(handle, "wb") as target:
                    shutil.copyfileobj(response, target)
                    received = target.tell()
                promised = response.headers.get("Content-Length", "")
                if promised.isdecimal() and received != int(promised):
                    raise DownloadError(f"the connection ended after {received} of {promised} bytes")
            except BaseException:
                os.remove(path)
                raise
            return path
    except UnicodeError as error:
        raise DownloadError("an address may hold only ASCII characters; percent-encode the others") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DownloadError(reason or type(error).__name__) from error
