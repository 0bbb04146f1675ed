"""Reads chosen frames of a video file: exact frame numbers, true times, memory independent of the length.

Frame k is the k-th frame that a decode of the whole file puts out, whatever the file's timestamps look like. The reader
first lists the timestamps of all frames (from the packets, without decoding, where each packet is one frame), then
decodes forward and jumps to a later keyframe when that skips enough frames. PyAV does both; where torchcodec is
installed and loads, it decodes instead, and PyAV takes over as soon as a frame's timestamp is not the listed one.
"""

import gc
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import torch

from .video_download_keye import DownloadError, download, is_address, local_path

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError):  # absent, FFmpeg's libraries not found, or built for another torch
    VideoDecoder = None

# Codecs in which every packet yields exactly one picture. For others (hidden VP8 frames, packed MPEG-4 frames) the
# timestamps come from decoding once, as for interlaced H.264, where a packet may hold one of a frame's two fields.
ONE_FRAME_PER_PACKET = {"h264", "hevc", "vvc", "vp9", "av1", "mjpeg", "ffv1", "prores"}

# Text and still images that FFmpeg would open as one-frame videos.
NOT_VIDEO_FORMATS = {"tty", "bin", "xbin", "adf", "idf", "image2"}

# A jump flushes the decoder and its threads; it pays when it skips at least so many frames.
SEEK_MIN_FRAMES = 12

# Decoders and colour conversion have threads, which a forked process (a worker of a data loader) does not inherit. If
# it collected what its parent left of them, it would wait for these threads for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)

# Each decoding thread holds whole frames, so this bounds memory for large pictures.
MAX_DECODING_THREADS = 4


class VideoReadError(ValueError):
    """A file that cannot be used as a video."""


class VideoNotFoundError(VideoReadError, FileNotFoundError):
    """The path does not exist, or the address cannot be downloaded."""


class NotAVideoError(VideoReadError):
    """The file is in no video format."""


class NoVideoStreamError(VideoReadError):
    """The file holds sound or subtitles, but no moving picture."""


class EmptyVideoError(VideoReadError):
    """The video stream holds no frame."""


class TruncatedVideoError(VideoReadError):
    """The file ends early or is damaged. `frames` and `seconds` say how much could be read."""

    def __init__(self, message: str, frames: int, seconds: float):
        super().__init__(message)
        self.frames = frames
        self.seconds = seconds


@dataclass
class Packets:
    """What a pass over a file's packets finds.

    `shown`: the frames' timestamps, sorted, or None where the packets do not tell; `keys`: (pts, seek timestamp) of
    keyframes; `expected`: packets that the file promises; `found`: packets it has; `corrupt`: those marked so;
    `failed`: those not decoded, where all were tried; `stopped`: whether the file ends where it must not.
    """

    shown: array | None = None
    keys: list[tuple[int, int]] = field(default_factory=list)
    expected: int = 0
    found: int = 0
    corrupt: int = 0
    failed: int = 0
    last_duration: int = 0
    stopped: bool = False


class VideoReader:
    """A video file opened for reading by frame number.

    Attributes: `total_num_frames`, `fps` (average), `duration` (seconds), `height` and `width` (upright, as shown),
    `times` (start of every frame in seconds, the first is 0.0), `codec`, `backend` (what decodes).
    """

    def __init__(self, source: str | os.PathLike, backend: str | None = None):
        if backend not in (None, "pyav", "torchcodec"):
            raise ValueError(f"backend={backend!r} must be 'pyav', 'torchcodec' or None (torchcodec if it loads).")
        if backend == "torchcodec" and VideoDecoder is None:
            raise ImportError("torchcodec is not installed or does not load; install it, or use backend='pyav'.")
        self.source = os.fspath(source)
        self.backend = backend or ("pyav" if VideoDecoder is None else "torchcodec")
        self._download: str | None = None
        self._path = self._local_path(self.source)
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._download is not None and os.path.exists(self._download):
            os.remove(self._download)
        self._download = None

    def read(
        self,
        indices: Sequence[int],
        transform: Callable[[torch.Tensor], Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """The frames at `indices`, in that order, repeats included, each a uint8 tensor [3, H, W] (RGB, upright).

        `transform` is applied to every distinct frame as it is decoded, in ascending order; only its result is kept.
        `progress(done, total)` is called after every distinct frame.
        """
        targets = sorted({int(index) for index in indices})
        if targets and not 0 <= targets[0] <= targets[-1] < self.total_num_frames:
            raise IndexError(
                f"frame numbers {targets[0]} to {targets[-1]} were asked for, but {self.source} has frames 0 to "
                f"{self.total_num_frames - 1}."
            )
        kept: dict[int, Any] = {}
        while len(kept) < len(targets):
            # A jump that lands wrongly (broken index, gradual refresh) is noticed, and the rest is decoded in line.
            rest = targets[len(kept) :]
            with_torchcodec = self.backend == "torchcodec"
            for target, picture in self._torchcodec(rest) if with_torchcodec else self._pyav(rest):
                kept[target] = picture if transform is None else transform(picture)
                if progress is not None:
                    progress(len(kept), len(targets))
            if len(kept) < len(targets):
                if with_torchcodec:
                    self.backend = "pyav"
                    continue
                if self._linear:
                    raise self._damaged(targets[len(kept)])
                self._linear = True
        return [kept[int(index)] for index in indices]

    def _local_path(self, source: str) -> str:
        if is_address(source):
            try:
                self._download = download(source)
            except DownloadError as error:
                raise VideoNotFoundError(f"cannot download the video {source[:200]}: {error}.") from error
            return self._download
        if source[:5].lower() == "data:":
            raise NotAVideoError(
                f"a video cannot be given as a data: URI ({source[:60]}...); save it to a file and give the path."
            )
        path = local_path(source)
        if os.path.isdir(path):
            raise NotAVideoError(f"{path} is a folder; give the path of one video file.")
        if not os.path.isfile(path):
            # Longer than that is no path but, for example, the video itself.
            raise VideoNotFoundError(f"there is no video file at {path[:1000]}; check the path.")
        if os.path.getsize(path) == 0:
            raise NotAVideoError(f"{path} is empty (0 bytes), so it is not a video.")
        return path

    def _open(self) -> tuple[Any, Any]:
        try:
            container = av.open(self._path, metadata_errors="ignore")
        except PermissionError as error:
            raise VideoReadError(f"{self.source} cannot be opened: {error.strerror}.") from error
        except av.error.EOFError as error:
            raise EmptyVideoError(f"{self.source} ends before its first frame; copy or download it again.") from error
        except (av.FFmpegError, OSError) as error:
            if _looks_like_mp4(self._path):
                raise TruncatedVideoError(
                    f"{self.source} is truncated: its index is missing, so 0 frames (0.0 s) could be read; copy or "
                    "download it again.",
                    frames=0,
                    seconds=0.0,
                ) from error
            raise NotAVideoError(f"{self.source} is not a video file that can be read ({error.strerror}).") from error
        names = set(container.format.name.split(","))
        if names & NOT_VIDEO_FORMATS or any(name.endswith("_pipe") for name in names):
            container.close()
            raise NotAVideoError(f"{self.source} is not a video file (it reads as {container.format.name}).")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            kinds = sorted({s.type for s in container.streams}) or ["nothing"]
            container.close()
            raise NoVideoStreamError(f"{self.source} has no video stream; it holds {', '.join(kinds)}.")
        stream = streams[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _threads()
        return container, stream

    def _scan(self) -> None:
        """List every frame's timestamp and every keyframe, and check that the file is whole."""
        container, stream = self._open()
        with container:
            self.codec = stream.codec_context.name
            self._stream_index = stream.index
            self._time_base = float(stream.time_base)
            packets = self._scan_packets(container, stream)
            header_fps = float(stream.average_rate or stream.guessed_rate or 0)
            declared = _declared_seconds(container, stream)
            self._seek_by_pts = "matroska" in container.format.name
            packets.stopped |= container.format.name == "gif" and not _gif_is_whole(self._path)
        first = next(self._decode_all(), None)
        in_fields = self.codec == "h264" and first is not None and first.interlaced_frame
        self._pts, self._keys = packets.shown, packets.keys
        if self._pts is not None and self.codec in ONE_FRAME_PER_PACKET and not in_fields:
            self.total_num_frames = len(self._pts)
        else:
            self.total_num_frames, self._pts, packets.failed = self._scan_frames()
            # Second fields are no frames to jump to.
            self._keys = [] if self._pts is None else [key for key in self._keys if self._index_of(key[0]) is not None]
        self._linear = self._pts is None
        if self.total_num_frames == 0:
            promised = max(packets.found, packets.expected)
            if promised:
                raise TruncatedVideoError(
                    f"{self.source} is truncated or damaged: 0 of {promised} frames (0.0 s) could be read.",
                    frames=0,
                    seconds=0.0,
                )
            raise EmptyVideoError(f"{self.source} has a video stream without a single frame.")
        self._set_times(header_fps, 0 if in_fields else packets.last_duration)
        self._refuse_incomplete(packets, declared)
        self._measure_first_frame(first)

    def _refuse_incomplete(self, packets: Packets, declared: float) -> None:
        # A packet that fails to decode where no frame is missing held no picture.
        failed = packets.failed if packets.found > self.total_num_frames else 0
        unusable = max(packets.corrupt, failed)
        frames = min(self.total_num_frames, packets.found - unusable)
        seconds = self.times[frames] if frames < self.total_num_frames else self.duration
        missing = packets.expected > packets.found - packets.corrupt
        if missing or packets.stopped or declared - self._end > max(1.0, 0.02 * declared):
            of_frames = f" of {packets.expected}" if missing else ""
            of_seconds = f" of {declared:.1f} s" if declared else ""
            state = f"truncated: only {frames}{of_frames} frames ({seconds:.1f} s{of_seconds}) could be read"
        elif unusable:
            state = (
                f"damaged: {unusable} of {packets.found} packets could not be used, and {frames} frames "
                f"({seconds:.1f} s) could be read"
            )
        else:
            return
        raise TruncatedVideoError(
            f"{self.source} is {state}; copy or download it again.", frames=frames, seconds=seconds
        )

    def _scan_packets(self, container: Any, stream: Any) -> Packets:
        shown, keys = array("q"), []
        packets = Packets()
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                packets.found += 1
                if packet.is_corrupt:
                    packets.corrupt += 1
                    continue
                if packet.pts is None:
                    shown = None
                if shown is None:
                    continue
                if packet.is_keyframe:
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                if not packet.is_discard:
                    shown.append(packet.pts)
                    packets.last_duration = packet.duration or packets.last_duration
        except av.FFmpegError:
            packets.stopped = True
        # An MP4 file lists all its packets up front; other formats do not say.
        if "mp4" in container.format.name:
            packets.expected = len(stream.index_entries)
        # Some containers (AVI, ASF, MXF) store the order of decoding alone. The timestamps that FFmpeg makes up for
        # them never go back, although frames change places, so neither they nor those of keyframes are of use.
        if shown is not None and not (stream.codec_context.has_b_frames and _ascending(shown)):
            keys.sort()
            # Leading pictures before the first keyframe cannot be decoded and never appear.
            first = keys[0][0] if keys else 0
            shown = array("q", sorted(pts for pts in shown if pts >= first))
            packets.keys = keys
            packets.shown = shown if _ascending(shown) else None
        return packets

    def _scan_frames(self) -> tuple[int, array | None, int]:
        """By decoding once: the number of frames, their timestamps (None if they do not ascend), failed packets."""
        count, shown = 0, array("q")
        failures: list[int | None] = []
        for frame in self._decode_all(failures):
            if count == 0:
                # A stream that was cut out of a longer one begins with pictures that refer to what is not there.
                failures.clear()
            count += 1
            if shown is not None and frame.pts is not None and (not shown or frame.pts > shown[-1]):
                shown.append(frame.pts)
            else:
                shown = None
        return count, shown, len(failures)

    def _set_times(self, header_fps: float, last_duration: int) -> None:
        count = self.total_num_frames
        if self._pts is None:
            self.fps = header_fps or 25.0
            self.times: Sequence[float] = [index / self.fps for index in range(count)]
            self.duration = self._end = count / self.fps
            return
        start = self._pts[0]
        self.times = array("d", ((pts - start) * self._time_base for pts in self._pts))
        measured = (count - 1) / self.times[-1] if count > 1 else 0.0
        # The header's average is exact for a constant rate and often wrong for a variable one.
        trusted = header_fps and (not measured or abs(header_fps - measured) <= 0.02 * measured)
        self.fps = header_fps if trusted else (measured or 25.0)
        self.duration = self.times[-1] + (last_duration * self._time_base or 1 / self.fps)
        self._end = start * self._time_base + self.duration

    def _measure_first_frame(self, frame: Any) -> None:
        if frame is None:
            raise TruncatedVideoError(
                f"{self.source} is damaged: 0 of {self.total_num_frames} frames (0.0 s) could be decoded.",
                frames=0,
                seconds=0.0,
            )
        turns, mirrored = _orientation(frame)
        if self._pts is None or frame.rotation or mirrored:
            self.backend = "pyav"
        self.height, self.width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)

    def _decode_all(self, failures: list[int | None] | None = None) -> Iterator[Any]:
        container, stream = self._open()
        with container:
            yield from _decode(container, stream, from_keyframe=False, failures=failures)

    def _torchcodec(self, targets: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, picture) for ascending targets; stops early where torchcodec and the list of frames differ."""
        try:
            decoder = VideoDecoder(self._path, stream_index=self._stream_index, num_ffmpeg_threads=_threads())
            if decoder.metadata.num_frames != self.total_num_frames:
                return
            for target in targets:
                frame = decoder.get_frame_at(target)
                if abs(frame.pts_seconds - self._pts[target] * self._time_base) > 1e-3:
                    return
                yield target, frame.data
        except (RuntimeError, ValueError, IndexError):
            return

    def _pyav(self, targets: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, picture) for ascending targets; stops early at the first one that does not appear."""
        frames = enumerate(self._decode_all()) if self._pts is None else self._decode_targets(targets)
        wanted = set(targets)
        for index, frame in frames:
            if index in wanted:
                yield index, _upright_rgb(frame)
            if index >= targets[-1]:
                return

    def _decode_targets(self, targets: list[int]) -> Iterator[tuple[int, Any]]:
        """(index, frame) for ascending targets by timestamp, with jumps unless one went wrong before."""
        container, stream = self._open()
        with container:
            frames = _decode(container, stream, from_keyframe=False)
            position = 0
            jumped = False
            for target in targets:
                key = self._keyframe_before(target)
                if not self._linear and key is not None and key[0] - position >= SEEK_MIN_FRAMES:
                    container.seek(key[1], stream=stream)
                    frames = _decode(container, stream, from_keyframe=True)
                    jumped = True
                for frame in frames:
                    index = self._index_of(frame.pts)
                    if index is None:
                        continue
                    position = index + 1
                    if index >= target:
                        break
                else:
                    return
                if index != target or (jumped and frame.is_corrupt):
                    return
                yield target, frame

    def _index_of(self, pts: int | None) -> int | None:
        if pts is None:
            return None
        index = bisect_left(self._pts, pts)
        return index if index < len(self._pts) and self._pts[index] == pts else None

    def _keyframe_before(self, target: int) -> tuple[int, int] | None:
        """(frame index, seek timestamp) of the last keyframe at or before frame `target`."""
        place = bisect_right(self._keys, (self._pts[target], float("inf"))) - 1
        if place < 0:
            return None
        pts, dts = self._keys[place]
        return bisect_left(self._pts, pts), pts if self._seek_by_pts else dts

    def _damaged(self, target: int) -> TruncatedVideoError:
        return TruncatedVideoError(
            f"{self.source} is damaged: frame {target} at {self.times[target]:.1f} s cannot be decoded; {target} of "
            f"{self.total_num_frames} frames ({self.times[target]:.1f} s) could be read before it.",
            frames=target,
            seconds=self.times[target],
        )


def _ascending(values: Sequence[int]) -> bool:
    return all(left < right for left, right in zip(values, values[1:], strict=False))


def _decode(
    container: Any, stream: Any, from_keyframe: bool, failures: list[int | None] | None = None
) -> Iterator[Any]:
    """All frames from the present place on; packets that fail are passed over, and added to `failures`."""
    waiting = from_keyframe
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None:
            return
        if waiting and packet.size and not packet.is_keyframe:
            continue
        waiting = False
        try:
            yield from packet.decode()
        except av.FFmpegError:
            if failures is not None:
                failures.append(packet.pts)


def _threads() -> int:
    return min(MAX_DECODING_THREADS, os.cpu_count() or 1)


def _orientation(frame: Any) -> tuple[int, bool]:
    """Quarter turns counter-clockwise that show a frame upright, and whether it is flipped top to bottom before."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    mirrored = False
    if matrix is not None:
        right_x, right_y, _, down_x, down_y, *_ = struct.unpack("=9i", bytes(matrix))
        mirrored = right_x * down_y < right_y * down_x
    # The angle is that of the matrix's first row, which a flip from top to bottom leaves as it is.
    return round(frame.rotation / 90) % 4, mirrored


def _upright_rgb(frame: Any) -> torch.Tensor:
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    turns, mirrored = _orientation(frame)
    return torch.rot90(picture.flip(1) if mirrored else picture, turns, dims=(1, 2))


def _declared_seconds(container: Any, stream: Any) -> float:
    """The length that a Matroska file's own header gives its video stream; 0.0 where nothing reliable is said."""
    if "matroska" not in container.format.name:
        return 0.0
    text = next((value for name, value in stream.metadata.items() if name.upper().startswith("DURATION")), "")
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        alone = len(container.streams) == 1 and container.duration
        return container.duration / 1e6 if alone else 0.0


def _looks_like_mp4(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(12)[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide")


def _gif_is_whole(path: str) -> bool:
    """Whether the blocks of a GIF lead to its end mark; what follows the mark does not matter."""
    with open(path, "rb") as file:

        def skip_colours(flags: bytes) -> None:
            if flags and flags[0] & 0x80:
                file.seek(3 * 2 ** ((flags[0] & 7) + 1), os.SEEK_CUR)

        skip_colours(file.read(13)[10:11])
        while kind := file.read(1):
            if kind == b"\x3b":
                return True
            if kind == b"\x2c":
                skip_colours(file.read(9)[8:])
                file.seek(1, os.SEEK_CUR)
            elif kind == b"\x21":
                file.seek(1, os.SEEK_CUR)
            else:
                continue
            while (size := file.read(1)) and size != b"\0":
                file.seek(size[0], os.SEEK_CUR)
    return False
