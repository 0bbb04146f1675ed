"""Where a video or image lies: file:// URIs, and downloads that fail in one sentence and leave nothing behind."""

import io
import os
import re
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import PIL.Image
import pytest

from modeling_keye.pixels_keye import load_picture
from modeling_keye.video_download_keye import TIMEOUT_SECONDS, local_path
from modeling_keye.video_reader_keye import VideoNotFoundError, VideoReader


@pytest.fixture
def server(clip, tmp_path) -> Iterator[Callable[[str], str]]:
    """The address of a path on a server that has one clip, one picture and ways to go wrong."""
    video, image = clip().read_bytes(), io.BytesIO()
    PIL.Image.new("RGB", (60, 30), "red").save(image, "png")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            if self.path.startswith("/garbage"):
                self.wfile.write(b"this is no status line\r\n\r\n")
            elif self.path.startswith("/chunked"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nnot so many")
            elif self.path.startswith("/missing"):
                self.send_error(404)
            else:
                content = image.getvalue() if self.path.startswith("/picture") else video
                self.send_response(200)
                self.send_header("Content-Length", str(len(content) + 1000 * self.path.startswith("/cut")))
                self.end_headers()
                self.wfile.write(content)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield lambda path: f"http://127.0.0.1:{running.server_port}{path}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def refusal(address: str) -> str:
    with pytest.raises(VideoNotFoundError) as error:
        VideoReader(address)
    text = str(error.value)
    assert re.fullmatch(r"cannot download the video [^\n]{10,400}[^.]\.", text), text
    return text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing.mp4", "404"),
        ("/garbage.mp4", "no status line"),
        ("/cut.mp4", r"ended after \d+ of \d+ bytes"),
        ("/chunked.ts", "IncompleteRead"),
    ],
)
def test_a_server_that_fails_leaves_nothing_behind(server, temporary, path, reason):
    assert re.search(reason, refusal(server(path)))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1/my clip.mp4", "control characters"),
        ("http://127.0.0.1:port/clip.mp4", "port"),
        ("http://127.0.0.1/\u00fc.mp4", "percent-encode"),
        ("http://[::1/clip.mp4", "IPv6"),
        ("http://", "no host given"),
    ],
)
def test_addresses_that_are_none(temporary, address, reason):
    assert reason in refusal(address)
    assert not list(temporary.iterdir())


def test_a_server_that_is_away(temporary):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/clip.mp4"
        refusal(address)
        assert not list(temporary.iterdir())
        if os.path.isdir("/proc/self/fd"):
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                refusal(address)
            assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupted_download_leaves_nothing_behind(server, temporary, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        VideoReader(server("/clip.mp4"))
    assert not list(temporary.iterdir())


def test_a_silent_server_is_not_waited_for_without_end(monkeypatch):
    def answer(address: str, timeout: float) -> None:
        raise TimeoutError(f"timed out after {timeout}")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert f"timed out after {TIMEOUT_SECONDS}" in refusal("http://127.0.0.1/clip.mp4")


def test_capitals_and_long_suffixes(server):
    address = server("/clip." + "x" * 300).replace("http", "HTTP")
    with VideoReader(address) as reader:
        assert reader.total_num_frames == 40


@pytest.mark.parametrize("name", ["my clip.mp4", "50%.mp4", "a%20b.mp4", "who?#1.mp4"])
def test_file_uris(clip, name):
    path = clip(name)
    for source in (path.as_uri(), f"file://{path}", path.as_uri().replace("file://", "FILE://localhost")):
        with VideoReader(source) as reader:
            assert reader.total_num_frames == 40
    assert local_path(str(path)) == str(path)


def test_a_file_uri_of_nothing_names_the_path(tmp_path):
    with pytest.raises(VideoNotFoundError, match="no video file at .*my clip.mp4; check"):
        VideoReader((tmp_path / "my clip.mp4").as_uri())


@pytest.mark.parametrize(
    ("path", "kind", "sentence"),
    [
        ("/missing.png", FileNotFoundError, "cannot download the image {}: HTTP Error 404: Not Found."),
        ("/page.html", PIL.UnidentifiedImageError, "{} holds no image that can be read; check what it is."),
    ],
)
def test_an_image_that_cannot_be_had_is_named(server, temporary, path, kind, sentence):
    address = server(path)
    with pytest.raises(kind, match=re.escape(sentence.format(address))):
        load_picture(address)
    assert not list(temporary.iterdir())


def test_an_image_of_a_server_that_is_away():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/picture.png"
        with pytest.raises(FileNotFoundError, match=f"cannot download the image {address}: .*refused"):
            load_picture(address)


def test_an_image_behind_an_address_in_capitals(server, temporary):
    assert load_picture(server("/picture.png").replace("http", "HTTP")).getpixel((0, 0)) == (255, 0, 0)
    assert not list(temporary.iterdir())
