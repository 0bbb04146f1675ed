"""The reader's frames and times against a plain decode of the whole file, and its errors."""

import os
import re
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from modeling_keye.video_reader_keye import (
    EmptyVideoError,
    NotAVideoError,
    NoVideoStreamError,
    TruncatedVideoError,
    VideoDecoder,
    VideoNotFoundError,
    VideoReader,
    VideoReadError,
)

from .conftest import decode_all, picture

CODECS = {
    "h264": ("clip.mp4", "libx264", {"bf": "3", "g": "12"}),
    "h264_open_gop": (
        "clip.mkv",
        "libx264",
        {"x264-params": "open-gop=1:keyint=12:bframes=3:min-keyint=12:scenecut=0"},
    ),
    "h264_gradual_refresh": ("clip.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "h264_transport_stream": ("clip.ts", "libx264", {"bf": "2", "g": "12"}),
    "h264_raw": ("clip.h264", "libx264", {"bf": "2", "g": "12"}),
    "h265": ("clip.mp4", "libx265", {"x265-params": "log-level=none:keyint=12:bframes=3:pools=1"}),
    "h265_open_gop": ("clip.mkv", "libx265", {"x265-params": "log-level=none:keyint=12:open-gop=1:pools=1"}),
    "vp8": ("clip.webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
    "vp9": ("clip.webm", "libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
    "av1": ("clip.mp4", "libsvtav1", {"preset": "12", "g": "12", "svtav1-params": "lp=1"}),
    "mpeg4": ("clip.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg4_mp4": ("clip.mp4", "mpeg4", {"bf": "2", "g": "12"}),
    "fragmented": ("clip.mp4", "libx264", {"g": "12"}),
}


def check_against_full_decode(path: Path | str, indices: list[int] | None = None) -> VideoReader:
    frames = decode_all(path)
    with VideoReader(path) as reader:
        assert reader.total_num_frames == len(frames)
        last = len(frames) - 1
        indices = indices or [0, last, last // 2, 3, 3, last // 3, last - 1]
        for index, frame in zip(indices, reader.read(indices), strict=True):
            assert frame.dtype == torch.uint8
            np.testing.assert_array_equal(frame.permute(1, 2, 0).numpy(), frames[index], err_msg=f"frame {index}")
        for index in (last, last // 2, 1):
            np.testing.assert_array_equal(reader.read([index])[0].permute(1, 2, 0).numpy(), frames[index])
    return reader


@pytest.mark.parametrize("name", CODECS)
def test_frames_equal_a_full_decode(clip, name):
    file, codec, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    movflags = {"movflags": "frag_keyframe+empty_moov"} if name == "fragmented" else None
    size = (72, 88) if codec == "libsvtav1" else (64, 80)
    path = clip(file, codec=codec, count=60, size=size, options=options, container_options=movflags)
    check_against_full_decode(path)


@pytest.mark.parametrize("name", ["clip.avi", "clip.asf", "clip.mxf"])
def test_containers_that_store_the_order_of_decoding_alone(clip, name):
    path = clip(name, count=60, fps=25, options={"bf": "2", "g": "20"})
    reader = check_against_full_decode(path, list(range(0, 60, 7)))
    np.testing.assert_allclose(reader.times, np.arange(60) / 25, atol=1e-6)


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.flv", "clip.ts"])
def test_containers_with_times_of_their_own_are_listed_without_decoding(clip, monkeypatch, name, b_frames):
    path = clip(name, options={"bf": b_frames, "g": "20"})
    monkeypatch.setattr(VideoReader, "_scan_frames", lambda self: pytest.fail("decoded the whole file"))
    with VideoReader(path) as reader:
        assert reader.total_num_frames == 40 and reader._keys


def h264_of_two_fields(path: Path, count: int) -> Path:
    """Uncompressed H.264 of 16 x 32 pixels; each of a frame's two fields, of one macroblock, is a packet of its own."""

    def number(value: int) -> str:
        return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"

    def unit(kind: int, bits: str) -> bytes:
        bits += "1"
        bits += "0" * (-len(bits) % 8)
        return b"\0\0\0\1" + bytes([kind]) + int(bits, 2).to_bytes(len(bits) // 8, "big")

    sequence = f"{77:08b}{0:08b}{10:08b}" + "".join(map(number, (0, 0, 2, 1))) + "0" + number(0) * 2 + "00100"
    data = unit(0x67, sequence) + unit(0x68, "11001110001110000")
    for index in range(2 * count):
        bits = number(0) + number(7) + number(0) + f"{index // 2 % 16:04b}1{index % 2}"
        bits += number(0) + "00" if index == 0 else "0"
        bits += "1" + number(25)
        bits += "0" * (-len(bits) % 8) + f"{16 + index // 2 * 4:08b}" * 256 + f"{128:08b}" * 128
        data += unit(0x65 if index == 0 else 0x61, bits)
    raw = path.with_suffix(".h264")
    raw.write_bytes(data)
    with av.open(str(raw)) as reading, av.open(str(path), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for index, packet in enumerate(packet for packet in reading.demux(video=0) if packet.size):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 50), index, index
            packet.duration = 1
            writing.mux(packet)
    return path


@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv", "clip.mp4"])
def test_two_packets_of_fields_are_one_frame(tmp_path, name):
    reader = check_against_full_decode(h264_of_two_fields(tmp_path / name, 40))
    assert reader.total_num_frames == 40
    np.testing.assert_allclose(reader.times, np.arange(40) / 25, atol=2e-3)
    assert reader.fps == pytest.approx(25, rel=0.05) and reader.duration == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize("name", ["bikes", "carphone_pristine", "bigbuckbunny"])
def test_real_recordings(real_clip, name):
    reader = check_against_full_decode(real_clip(name))
    assert reader.codec == "h264"


def test_every_frame_of_a_clip_with_b_frames_in_one_call(clip):
    path = clip(options={"bf": "3", "g": "8"})
    check_against_full_decode(path, list(range(40)))


def test_jumps_are_taken_and_give_the_same_frames(real_clip, monkeypatch):
    path = real_clip("bikes")
    seeks = []
    monkeypatch.setattr("modeling_keye.video_reader_keye.VideoDecoder", None)
    real = VideoReader._keyframe_before
    monkeypatch.setattr(VideoReader, "_keyframe_before", lambda *args: seeks.append(real(*args)) or seeks[-1])
    check_against_full_decode(path, [249])
    assert seeks[0][0] > 12


def test_a_wrong_index_is_noticed_and_decoded_in_line(clip):
    path = clip(options={"g": "10", "bf": "0"})
    frames = decode_all(path)
    with VideoReader(path, backend="pyav") as reader:
        # Every seek now lands a group of pictures too late.
        reader._keys = [(pts, dts + 11 * 1280) for pts, dts in reader._keys]
        got = reader.read([15, 35])
    for index, frame in zip([15, 35], got, strict=True):
        np.testing.assert_array_equal(frame.permute(1, 2, 0).numpy(), frames[index])


def test_times_of_a_constant_rate(clip):
    with VideoReader(clip(fps=10)) as reader:
        np.testing.assert_allclose(reader.times, np.arange(40) / 10, atol=1e-6)
        assert reader.fps == 10 and reader.duration == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_times_of_a_variable_rate(clip, name):
    pts = np.cumsum([0, *([40] * 10), *([500] * 10), *([100] * 19)])
    path = clip(name, pts=pts.tolist())
    reader = check_against_full_decode(path)
    np.testing.assert_allclose(reader.times, pts / 1000, atol=2e-3)
    assert reader.fps == pytest.approx(39 / (pts[-1] / 1000), rel=0.03)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_a_late_start_counts_from_the_first_frame(clip, name):
    path = clip(name, pts=[5000 + 100 * index for index in range(40)])
    reader = check_against_full_decode(path)
    np.testing.assert_allclose(reader.times, np.arange(40) / 10, atol=2e-3)


def test_an_edit_list_that_hides_the_first_frames(clip, tmp_path):
    source, cut = clip(options={"g": "40", "bf": "0"}), tmp_path / "cut.mp4"
    with av.open(str(source)) as reading, av.open(str(cut), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        shift = round(1.0 / reading.streams.video[0].time_base)
        for packet in reading.demux(reading.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writing.mux(packet)
    reader = check_against_full_decode(cut)
    assert reader.total_num_frames == 30 and reader.times[0] == 0.0


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotated_streams_come_upright(clip, rotation):
    path = clip(rotation=rotation)
    plain = decode_all(path)
    with VideoReader(path) as reader:
        assert (reader.height, reader.width) == ((80, 64) if rotation != 180 else (64, 80))
        # The display matrix turns counter-clockwise, as np.rot90 does.
        upright = np.rot90(plain[7], rotation // 90)
        np.testing.assert_array_equal(reader.read([7])[0].permute(1, 2, 0).numpy(), upright)


# The four numbers a, b, c, d of a display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y).
MATRICES = {
    "horizontal flip": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "vertical flip": ((1, 0, 0, -1), lambda frame: frame[::-1]),
    "transpose": ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    "other diagonal": ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
    "quarter turn clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "half turn": ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
    "45 degrees": ((0.70711, 0.70711, -0.70711, 0.70711), lambda frame: frame),
    "60 degrees": ((0.5, 0.86603, -0.86603, 0.5), lambda frame: np.rot90(frame, -1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_mirrored_and_slanted_display_matrices(clip, name):
    (a, b, c, d), shown = MATRICES[name]
    path = clip()
    data = bytearray(path.read_bytes())
    # Version 0 of the box: the matrix of nine numbers, 16 bits after the point, lies 40 bytes behind its name.
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", *(round(x * 65536) for x in (a, b, 0, c, d, 0)), 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = shown(decode_all(path)[7])
    with VideoReader(path) as reader:
        assert (reader.height, reader.width) == expected.shape[:2]
        np.testing.assert_array_equal(reader.read([7])[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_a_forked_worker_does_not_wait_for_the_threads_of_its_parent(clip):
    """What the parent left uncollected has threads that the child does not have."""
    code = f"""
import gc, os
import av
from modeling_keye.video_reader_keye import VideoReader

gc.disable()
with av.open({str(clip())!r}) as container:
    frame = next(container.decode(video=0))
    frame.to_ndarray(format="rgb24", width=1920, height=1080)
    left = [frame]
    left.append(left)
    del frame, left
child = os.fork()
if child == 0:
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_transform_runs_in_order_once_per_frame_and_progress_counts(clip):
    seen, steps = [], []
    with VideoReader(clip()) as reader:
        got = reader.read(
            [30, 2, 2, 17],
            lambda frame: seen.append(len(seen)) or seen[-1],
            progress=lambda done, total: steps.append((done, total)),
        )
    assert got == [2, 0, 0, 1]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_pictures_survive_the_codec(clip):
    with VideoReader(clip(options={"crf": "1"})) as reader:
        got = reader.read([21])[0].permute(1, 2, 0).numpy().astype(int)
    bits = [got[:8, bit * 8 : bit * 8 + 8].mean() > 127 for bit in range(8)]
    assert sum(int(on) << bit for bit, on in enumerate(bits)) == 21
    assert np.abs(got[16:] - picture(21, 64, 80)[16:]).mean() < 40


def test_the_backend_can_be_chosen(clip):
    with VideoReader(clip(), backend="pyav") as reader:
        assert reader.backend == "pyav"
    with pytest.raises(ValueError, match="backend='opencv' must be"):
        VideoReader(clip(), backend="opencv")
    if VideoDecoder is None:
        with pytest.raises(ImportError, match="torchcodec is not installed or does not load"):
            VideoReader(clip(), backend="torchcodec")


@pytest.mark.skipif(VideoDecoder is None, reason="torchcodec is not installed or does not load")
def test_torchcodec_and_pyav_give_the_same_frames(clip, real_clip):
    for path in (clip(options={"bf": "3", "g": "12"}), real_clip("carphone_pristine")):
        with VideoReader(path) as first, VideoReader(path, backend="pyav") as second:
            indices = [0, 39, 20, 20, 7]
            for left, right in zip(first.read(indices), second.read(indices)):
                assert torch.equal(left, right)
            assert (first.backend, second.backend) == ("torchcodec", "pyav")


def test_frame_numbers_outside_the_video_are_refused(clip):
    with VideoReader(clip()) as reader, pytest.raises(IndexError, match="has frames 0 to 39"):
        reader.read([40])


def test_a_video_behind_an_address(clip, tmp_path):
    path = clip()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with VideoReader(f"{address}/clip.mp4") as reader:
            downloaded = Path(reader._path)
            assert torch.equal(reader.read([5])[0], VideoReader(path).read([5])[0])
        assert not downloaded.exists()
        with pytest.raises(VideoNotFoundError, match="cannot download"):
            VideoReader(f"{address}/nothing.mp4")
    finally:
        server.shutdown()


def one_sentence(error: pytest.ExceptionInfo) -> None:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500


def test_missing_file(tmp_path):
    with pytest.raises(VideoNotFoundError, match="no video file at") as error:
        VideoReader(tmp_path / "nothing.mp4")
    one_sentence(error)
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "name, content",
    [("notes.txt", b"hello world\n" * 50), ("junk.mp4", bytes(range(7, 256)) * 20), ("empty.mp4", b"")],
)
def test_not_a_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotAVideoError, match="not a video") as error:
        VideoReader(tmp_path / name)
    one_sentence(error)


def test_a_folder_and_a_still_image_are_no_videos(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "still.png")
    for path in (tmp_path, tmp_path / "still.png"):
        with pytest.raises(NotAVideoError) as error:
            VideoReader(path)
        one_sentence(error)


def test_a_video_written_out_is_not_repeated():
    with pytest.raises(NotAVideoError, match="cannot be given as a data: URI .*; save it to a file") as error:
        VideoReader("data:video/mp4;base64," + "A" * 300_000)
    one_sentence(error)
    with pytest.raises(VideoNotFoundError, match="there is no video file at AAA.*; check the path") as error:
        VideoReader("A" * 300_000)
    assert len(str(error.value)) < 1100


def test_sound_only(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(NoVideoStreamError, match="no video stream; it holds audio") as error:
        VideoReader(path)
    one_sentence(error)


@pytest.mark.parametrize("name", ["empty.mkv", "empty.mp4", "empty.avi"])
def test_zero_frames(tmp_path, name):
    path = tmp_path / name
    options = {"movflags": "frag_keyframe+empty_moov"} if name.endswith("mp4") else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    with pytest.raises(EmptyVideoError, match="without a single frame|before its first frame") as error:
        VideoReader(path)
    one_sentence(error)


def test_truncated_with_its_index_in_front(clip, tmp_path):
    data = clip("fast.mp4", count=60, container_options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(TruncatedVideoError, match=r"only \d+ of 60 frames \(\d+\.\d s\) could be read") as error:
        VideoReader(tmp_path / "half.mp4")
    one_sentence(error)
    assert 0 < error.value.frames < 60 and error.value.seconds == pytest.approx(error.value.frames / 10, abs=0.5)


def test_truncated_with_its_index_lost(clip, tmp_path):
    data = clip().read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedVideoError, match=r"0 frames \(0.0 s\) could be read") as error:
        VideoReader(tmp_path / "half.mp4")
    one_sentence(error)


def test_truncated_matroska(clip, tmp_path):
    data = clip("whole.mkv", count=60).read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedVideoError, match=r"only \d+ (of \d+ )?frames \(\d\.\d s of 6.0 s\)") as error:
        VideoReader(tmp_path / "half.mkv")
    one_sentence(error)


@pytest.mark.parametrize(("name", "codec"), [("whole.avi", "mpeg4"), ("whole.flv", "flv")])
def test_a_cut_packet_is_not_counted_as_read(clip, name, codec):
    whole = clip(name, codec=codec, count=20)
    with av.open(str(whole)) as container:
        place = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size][14]
    path = whole.with_stem("cut")
    path.write_bytes(whole.read_bytes()[:place])
    with pytest.raises(TruncatedVideoError, match=r"damaged: 1 of \d+ packets could not be used") as error:
        VideoReader(path)
    one_sentence(error)
    found, read = map(
        int, re.search(r"1 of (\d+) packets could not be used, and (\d+) frames", str(error.value)).groups()
    )
    assert read == found - 1 == error.value.frames and error.value.seconds == pytest.approx(read / 10)


def test_joined_transport_streams_say_what_is_wrong(clip, tmp_path):
    data = clip("whole.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(data + data)
    with pytest.raises(TruncatedVideoError, match=r"damaged: 1 of 80 packets could not be used, and 79 fr") as error:
        VideoReader(tmp_path / "joined.ts")
    one_sentence(error)


def test_a_packet_that_fails_on_the_way_is_damage(clip, tmp_path):
    path = clip("whole.webm", codec="libvpx", options={"deadline": "realtime", "auto-alt-ref": "0"})
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    # The first three bytes of a VP8 frame say how long its first part is.
    (tmp_path / "damaged.webm").write_bytes(data.replace(packets[20], b"\xff\xff\xff" + packets[20][3:]))
    with pytest.raises(TruncatedVideoError, match=r"damaged: 1 of 40 packets could not be used, and 39 fr") as error:
        VideoReader(tmp_path / "damaged.webm")
    one_sentence(error)


def test_a_gif_must_have_its_end_mark(tmp_path):
    from PIL import Image

    frames = [Image.fromarray(picture(index, 64, 80)) for index in range(10)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:], duration=100)
    data = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "longer.gif").write_bytes(data + b"\0\0\0")
    (tmp_path / "cut.gif").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "unmarked.gif").write_bytes(data[:-1])
    for name in ("whole.gif", "longer.gif"):
        with VideoReader(tmp_path / name) as reader:
            assert reader.total_num_frames == 10
    for name in ("cut.gif", "unmarked.gif"):
        with pytest.raises(TruncatedVideoError, match=r"truncated: only \d+ frames \(\d\.\d s\)") as error:
            VideoReader(tmp_path / name)
        one_sentence(error)


def test_a_damaged_middle_names_the_frame(clip, tmp_path):
    path = clip("whole.mp4", count=60, options={"g": "60", "bf": "0"}, container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    start, size = packets[30]
    data[start : start + size] = bytes([255]) * size
    (tmp_path / "damaged.mp4").write_bytes(data)
    with VideoReader(tmp_path / "damaged.mp4") as reader, pytest.raises(TruncatedVideoError, match="frame 30") as error:
        reader.read([10, 30])
    one_sentence(error)
    assert error.value.frames == 30


def test_all_errors_are_value_errors():
    for kind in (EmptyVideoError, NotAVideoError, NoVideoStreamError, TruncatedVideoError, VideoNotFoundError):
        assert issubclass(kind, VideoReadError) and issubclass(kind, ValueError)


LONG_FILE = """
import resource, sys
sys.path.insert(0, {root!r})
from modeling_keye.video_processing_keye import KeyeVideoProcessor
processor = KeyeVideoProcessor()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
out = processor({path!r}, max_video_tokens=16384, return_metadata=True)
whole = peak() - before
frames, metadata = processor._load_file({path!r}, processor._options({{}}))
print(len(out["pixel_values_videos"]), len(frames), metadata.duration, whole, peak() - before)
"""


def test_two_hours_are_sampled_in_bounded_memory(tmp_path):
    path = tmp_path / "long.mp4"
    seconds = 2 * 60 * 60
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=3, options={"preset": "ultrafast", "g": "30"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        pictures = [av.VideoFrame.from_ndarray(picture(index, 64, 64), format="rgb24") for index in range(50)]
        for index in range(seconds * 3):
            frame = pictures[index % 50]
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LONG_FILE.format(root=root, path=str(path))], capture_output=True, text=True, check=True
    )
    patches, frames, duration, whole, reading = map(float, done.stdout.split())
    assert frames == 2880 and duration == pytest.approx(seconds)
    # 16,384 tokens of pixels included; then the 2,880 frames of the default budget, before they become pixels.
    assert patches == 4 * 16384 and whole < 300, f"{whole} MiB above the start"
    assert reading < 300, f"{reading} MiB above the start"
