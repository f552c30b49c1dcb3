"""Clips in and out: sampled frames as arrays, through the ffmpeg that imageio-ffmpeg brings along.

Reading takes two short ffmpeg processes. The first demuxes the whole clip without decoding it, which
tells when every frame is presented (containers lie about counts, and rates vary), and decodes one frame for
its real size. The second decodes, and selects, crops and scales inside ffmpeg, so that this process only ever
holds the frames that were asked for, at the size that was asked for.

Transparent pixels are composited over white. `fit="pad"` adds black bars. Sound is ignored.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Literal

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from emt.errors import EmtError
from emt.storage import PARTIAL, partial_beside, sync

Fit = Literal["crop", "pad", "stretch"]

VIDEO_SUFFIXES: frozenset[str] = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"})
IMAGE_SUFFIXES: frozenset[str] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
FITS: tuple[Fit, ...] = ("crop", "pad", "stretch")

FOLDER_FPS = 24.0
"""Frame rate of a folder of images that does not say its own (`write_clip` records one in the PNG files)."""
MAX_PIXELS = 1 << 27
"""Largest frame that is decoded, about four times 8K; a damaged or hostile header can claim any size."""
MAX_FRAMES = 2048
"""Most frames that one `read_clip` samples."""
MAX_METADATA = 100_000
"""Most bytes of metadata, as ASCII JSON, that `write_clip` embeds."""

_READABLE = (
    f"Allowed are {' '.join(sorted(VIDEO_SUFFIXES))} files, and folders of {' '.join(sorted(IMAGE_SUFFIXES))} images."
)


@dataclass(frozen=True)
class ClipInfo:
    """What a clip holds, found without decoding it.

    Attributes:
        path: The file or folder.
        width: Pixels, after the rotation flag and with non-square pixels made square.
        height: Pixels, likewise.
        fps: Frames a second, averaged over the clip.
        frames: Counted, not taken from the header.
        duration: Seconds from the first frame's appearance to the last one's end.
    """

    path: Path
    width: int
    height: int
    fps: float
    frames: int
    duration: float


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a clip.

    Attributes:
        frames: uint8, (frames, height, width, 3), RGB.
        fps: The rate at which the sampled frames span the sampled time, `(n - 1) / (times[-1] - times[0])`: played
            at it, they move as fast as the source. The source's own rate if there is one frame only.
        info: The clip they come from.
        times: When each frame is presented, in seconds after the clip's first frame. Not decreasing.
    """

    frames: np.ndarray
    fps: float
    info: ClipInfo
    times: tuple[float, ...]


@dataclass(frozen=True)
class _Source:
    """An opened clip: a video file, or a folder (`images`)."""

    info: ClipInfo
    times: np.ndarray  # seconds on the container's clock, increasing, one for each frame
    counted: bool = True  # `times` are those of decoded frames, not of packets
    alpha: bool = False
    decoder: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()


def is_clip(path: str | os.PathLike[str]) -> bool:
    """Whether `path` looks like a clip: a file with a video suffix, or a folder that holds images."""
    path = Path(path)
    try:
        if path.is_dir():
            return any(_is_image(name) for name in os.listdir(path))
        return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    except (OSError, ValueError):
        return False


def probe(path: str | os.PathLike[str]) -> ClipInfo:
    """Says what a clip holds. Reads a video file once and decodes one frame of it.

    Raises:
        EmtError: The clip is missing, unreadable, damaged, or of a kind that is not read.
    """
    return _open(Path(path)).info


def read_clip(
    path: str | os.PathLike[str],
    *,
    frames: int = 16,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    start: float = 0.0,
    duration: float | None = None,
    stride: int | None = None,
) -> Clip:
    """Samples frames from a clip.

    The frames are spread evenly from the first to the last of the (sub)clip. At a constant frame rate these are the
    frames `numpy.linspace(0, count - 1, frames, dtype=int)`, as in the published EfficientMT preprocessing; at a
    variable one, the frames on show at evenly spaced times, so that one shown for long can be taken more than once.

    Args:
        path: A video file or a folder of images, taken in natural order (`2.png` before `10.png`).
        frames: How many frames to sample.
        size: (width, height) in pixels; the clip's own if None.
        fit: How to reach `size`: "crop" covers it and cuts what hangs over, evenly from both sides (EfficientMT's
            own preprocessing stretches), "pad" fits inside and adds black bars, "stretch" ignores the aspect ratio.
        start: Seconds after the clip's first frame at which the subclip starts, to the nearest frame.
        duration: Seconds that the subclip lasts; to the end if None.
        stride: Take every `stride`-th frame from `start` on instead of spreading evenly.

    Raises:
        EmtError: The clip cannot be read, has too few frames, or an argument is out of range.
    """
    _check_request(frames, size, fit, start, duration, stride)
    source = _open(Path(path))
    info = source.info
    picked = _sample(source, frames, start, duration, stride)
    width, height = size or (info.width, info.height)
    out = np.empty((frames, height, width, 3), np.uint8)
    if source.images:
        _read_images(source, picked, out, fit)
    elif _decode(source, picked, out, fit):
        # Some packets are no frames (cut by an edit list, damaged), or the container's index misled the seek.
        # Decoding everything once gives the times of the frames that really come out.
        source = _count_decoded(source)
        picked = _sample(source, frames, start, duration, stride)
        if reason := _decode(source, picked, out, fit):
            raise _damaged(info.path, reason)
    times = source.times[picked] - source.times[0]
    fps = (frames - 1) / float(times[-1] - times[0]) if frames > 1 else source.info.fps
    return Clip(out, round(fps, 9), source.info, tuple(times.round(9).tolist()))


def _check_request(
    frames: int, size: tuple[int, int] | None, fit: str, start: float, duration: float | None, stride: int | None
) -> None:
    if not 1 <= frames <= MAX_FRAMES:
        raise EmtError(f"{frames} frames cannot be sampled.", f"Pass --frames with 1 to {MAX_FRAMES}.")
    if size is not None and not (min(size) >= 1 and size[0] * size[1] <= MAX_PIXELS):
        raise EmtError(f"A size of {size[0]}x{size[1]} is not possible.", "Pass --size WIDTHxHEIGHT, such as 512x512.")
    if fit not in FITS:
        raise EmtError(f"There is no fit {fit!r}.", f"Pass --fit with one of {', '.join(FITS)}.")
    if not (start >= 0 and math.isfinite(start)):
        raise EmtError(f"A clip cannot start at {start} s.", "Pass --start with 0 or more seconds.")
    if duration is not None and not duration > 0:
        raise EmtError(
            f"A clip cannot last {duration} s.", "Pass --duration with more than 0 seconds, or leave it out."
        )
    if stride is not None and stride < 1:
        raise EmtError(f"A stride of {stride} is not possible.", "Pass --stride with 1 or more, or leave it out.")


def _sample(source: _Source, frames: int, start: float, duration: float | None, stride: int | None) -> np.ndarray:
    """Indices, not decreasing, of the frames to take."""
    times = source.times - source.times[0]
    slack = _half_gap(times)  # a frame presented at `start`, up to rounding of the container's clock, belongs to it
    first = int(np.searchsorted(times, start - slack))
    last = int(np.searchsorted(times, start + duration - slack)) if duration is not None else len(times)
    count, info = last - first, source.info
    needed = (frames - 1) * (stride or 1) + 1
    if count < needed:
        part = f" in the part from {start:g} s" + (" on" if duration is None else f" lasting {duration:g} s")
        taken = f" ({frames} at a stride of {stride})" if stride else ""
        ways = [f"--frames {(count - 1) // (stride or 1) + 1}"] if count else []
        ways += ["a smaller --stride"] if stride and stride > 1 else []
        ways += ["an earlier --start"] if start else []
        ways += ["a longer --duration"] if duration is not None else []
        raise EmtError(
            f"{_show(info.path)} has {count} frame{'s' if count != 1 else ''}{part if start or duration else ''}, but"
            f" {needed} are needed{taken}. The whole clip: {info.frames} in {info.duration:.2f} s.",
            f"Pass {' or '.join(ways)}, or take a longer clip.",
        )
    if stride:
        return first + stride * np.arange(frames)
    times = times[first:last]
    even = np.linspace(times[0], times[-1], count)
    if count < 2 or np.abs(times - even).max() <= even[1] - even[0]:  # constant rate, to within one frame
        return first + np.linspace(0, count - 1, frames, dtype=int)
    wanted = np.linspace(times[0], times[-1], frames) + np.median(np.diff(times)) / 4
    return first + np.searchsorted(times, wanted, side="right") - 1


def _half_gap(times: np.ndarray) -> float:
    return float(np.diff(times).min()) / 2 if len(times) > 1 else 1e-3


def _open(path: Path) -> _Source:
    _check_readable(path)
    return _open_folder(path) if path.is_dir() else _open_video(path)


def _check_readable(path: Path) -> None:
    """Refuses what is no regular file or folder before anything could block on it."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return
        if not stat.S_ISREG(status.st_mode):
            raise EmtError(f"{_show(path)} is neither a file nor a folder (a pipe, socket or device).", _READABLE)
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            raise EmtError(f"{_show(path)} has the suffix {path.suffix!r}, which is no video's.", _READABLE)
        if not status.st_size:
            raise EmtError(f"{_show(path)} is empty (0 bytes).", "Copy or download it again.")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        raise _unusable(path, error, "read") from error


def _unusable(path: Path, error: Exception, verb: str) -> EmtError:
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT:
        return EmtError(f"{_show(path)} does not exist.", f"See what there is: ls {_quote(path.parent)}")
    if code in (errno.EACCES, errno.EPERM):
        return EmtError(f"No permission to {verb} {_show(path)}.", f"See who may: ls -ld {_quote(path)}")
    if code in (errno.ENOSPC, errno.EDQUOT):
        return EmtError(
            f"No space left on the disk to {verb} {_show(path)}.",
            f"Free some (df -h {_quote(path.parent)}), or write to another disk with -o.",
        )
    return EmtError(f"Cannot {verb} {_show(path)}: {reason}.", _READABLE if verb == "read" else "")


def _damaged(path: Path, reason: str) -> EmtError:
    return EmtError(
        f"{_show(path)} cannot be read as a video: {reason}.",
        f"If it plays elsewhere, convert it with: ffmpeg -i INPUT -c:v libx264 OUTPUT.mp4\n{_READABLE}",
    )


def _show(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def _quote(path: Path) -> str:
    return shlex.quote(str(path)) if str(path).isprintable() else repr(str(path))


# ---------------------------------------------------------------------------------------------- ffmpeg


class _Ffmpeg:
    """One ffmpeg process, killed when it overstays and always reaped. Use as a context manager.

    Attributes:
        stdout: What it writes.
        stdin: What it reads, if `feed`.
        log: What it said, after `finish`.
    """

    def __init__(self, path: Path, arguments: Iterable[str], *, seconds: float, feed: bool = False) -> None:
        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            hint = "Install one and set IMAGEIO_FFMPEG_EXE to its path."
            raise EmtError("There is no ffmpeg for this machine.", hint) from error
        self._path, self._seconds, self._late, self.log = path, seconds, False, ""
        self._process = subprocess.Popen(
            [program, "-hide_banner", *([] if feed else ["-nostdin"]), "-loglevel", "level+info", *arguments],
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
            start_new_session=True,  # Ctrl-C is for the program, which may want to finish this clip first
        )
        assert self._process.stdout is not None
        self.stdout, self.stdin = self._process.stdout, self._process.stdin
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._watchdog = threading.Timer(seconds, self._stop)
        self._watchdog.daemon = True
        self._reader.start()
        self._watchdog.start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            self.log = stream.read(1 << 18).decode(errors="replace")
            while stream.read(1 << 16):  # a full pipe would block ffmpeg
                pass

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def finish(self) -> int:
        """Waits for the end; the exit status. Raises `EmtError` if the process had to be killed."""
        self._reap()
        if self._late:
            raise EmtError(
                f"{_show(self._path)}: ffmpeg did not finish in {self._seconds:.0f} s and was stopped.",
                "Copy the clip to a local disk, or use a shorter or smaller one.",
            )
        return self._process.returncode

    def _reap(self) -> None:
        if self.stdin is not None:
            with suppress(OSError):
                self.stdin.close()
        self._process.wait()
        self._reader.join()

    @property
    def reason(self) -> str:
        """Why it failed, after `finish`, in one line."""
        errors = re.findall(r"^(?:\[[^\]]*\] )*\[(?:error|fatal|panic)\] (.+)", self.log, re.MULTILINE)
        return errors[0].strip().rstrip(".") if errors else "frames are missing when it is decoded"

    def __enter__(self) -> _Ffmpeg:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.cancel()
        self._process.kill()  # does nothing to one that has ended
        self.stdout.close()
        self._reap()


def _input(path: Path, *options: str) -> list[str]:
    """ffmpeg's arguments to open exactly this file.

    The name is never taken for a protocol, pattern or option, and what the file holds (a playlist, a reference to
    other data) cannot make ffmpeg open anything else.
    """
    threads = min(8, os.cpu_count() or 1)  # each holds a few decoded frames
    limits = f"-protocol_whitelist file -format_whitelist mov,matroska,avi,gif -max_pixels {MAX_PIXELS}"
    return [*f"{limits} -threads {threads} -copyts".split(), *options, "-i", f"file:{path}"]


_SHOWN = re.compile(r"^\[Parsed_showinfo.*?\] \[info\] n: .* fmt:(\S+) .*\bsar:(\d+)/(\d+) s:(\d+)x(\d+)", re.MULTILINE)
_ALPHA = re.compile(r"yuva|ayuv|vuya|gbrap|rgba|bgra|argb|abgr|ya\d|pal8")


def _open_video(path: Path) -> _Source:
    # One process, two outputs: the packets' times, and what the first decoded frame looks like after rotation.
    packets = ["-map", "0:V:0", "-c", "copy", "-copyinkf", "-f", "framecrc", "pipe:1"]
    picture = ["-map", "0:V:0", "-frames:v", "1", "-vf", "showinfo", "-f", "null", "-"]
    patience = min(60 + path.stat().st_size / 5e6, 3600)
    with _Ffmpeg(path, [*_input(path), *packets, *picture], seconds=patience) as ffmpeg:
        times, last, timed = _presentation_times(ffmpeg.stdout)
        ffmpeg.finish()
    if "matches no streams" in ffmpeg.log:
        raise EmtError(f"{_show(path)} has no video in it.", _READABLE)
    shown = _SHOWN.search(ffmpeg.log)
    if not shown:
        raise _damaged(path, ffmpeg.reason)
    width, height = int(shown[4]), int(shown[5])
    if int(shown[2]) and int(shown[3]):
        width = max(1, round(width * int(shown[2]) / int(shown[3])))
    if width * height > MAX_PIXELS:
        raise EmtError(f"{_show(path)} is {width}x{height}, too large.", f"Frames up to {MAX_PIXELS} pixels are read.")
    source = _Source(ClipInfo(path, width, height, 0.0, 0, 0.0), times, False, bool(_ALPHA.match(shown[1])))
    # ffmpeg's own VP8 and VP9 decoders drop the alpha plane; libvpx keeps it.
    codec = re.search(r"Video: vp([89])\b", ffmpeg.log)
    if codec and re.search(r"^(?:\[info\])? *alpha_mode *: 1", ffmpeg.log, re.MULTILINE | re.IGNORECASE):
        source = replace(source, alpha=True, decoder=("-c:v", "libvpx-vp9" if codec[1] == "9" else "libvpx"))
    return _with_times(source, times, last) if timed else _count_decoded(source)


def _with_times(source: _Source, times: np.ndarray, last: float) -> _Source:
    """`source` with these presentation times; `last` is how long the last frame shows, 0 if unknown."""
    span, count = float(times[-1] - times[0]), len(times)
    interval = span / (count - 1) if count > 1 else last or 1 / FOLDER_FPS
    info = replace(source.info, fps=round(1 / interval, 9), frames=count, duration=round(span + (last or interval), 9))
    return replace(source, info=info, times=times)


def _presentation_times(lines: Iterable[bytes]) -> tuple[np.ndarray, float, bool]:
    """Reads ffmpeg's framecrc listing.

    Returns:
        When frames are presented, in seconds, increasing and distinct; for how long the last one is; and whether all of
        them tell (AVI does not say it of frames that are stored out of order).
    """
    ticks: dict[int, int] = {}
    base, timed = Fraction(1), True
    for line in lines:
        if line.startswith(b"#tb 0:"):
            base = Fraction(line[6:].strip().decode())
        if line.startswith(b"#"):
            continue
        _, _, shown, length, *rest = (field.strip() for field in line.split(b","))
        flags = next((int(field[2:], 16) for field in rest if field.startswith(b"F=")), 0)
        if int(shown) == -(1 << 63):
            timed = False
        elif not flags & 4:  # 4: only a base for other frames, itself cut by an edit list
            ticks[int(shown)] = int(length)
    order = sorted(ticks)
    last = float(ticks[order[-1]] * base) if order else 0.0
    return np.array([float(tick * base) for tick in order]), last, timed and bool(order)


def _decoding_seconds(source: _Source) -> float:
    """Time enough for decoding on a slow machine; packets are counted, so a header cannot stretch it."""
    return 120 + len(source.times) * (0.1 + source.info.width * source.info.height * 1e-6)


def _count_decoded(source: _Source) -> _Source:
    output = "-map 0:V:0 -vf scale=2:2 -fps_mode passthrough -enc_time_base demux -c:v rawvideo -f framecrc pipe:1"
    arguments = [*_input(source.info.path, *source.decoder), *output.split()]
    with _Ffmpeg(source.info.path, arguments, seconds=_decoding_seconds(source)) as ffmpeg:
        times, last, _ = _presentation_times(ffmpeg.stdout)
        ffmpeg.finish()
    if not len(times):
        raise _damaged(source.info.path, ffmpeg.reason)
    return replace(_with_times(source, times, last), counted=True)


def _decode(source: _Source, picked: np.ndarray, out: np.ndarray, fit: Fit) -> str:
    """Decodes the picked frames into `out`; why fewer came than were picked, or ""."""
    gap, times = _half_gap(source.times) / 2, source.times[np.unique(picked)]
    height, width = out.shape[1:3]
    pixels = "rgba" if source.alpha else "rgb24"
    filters = [f"select='{'+'.join(f'between(t,{t - gap:.9f},{t + gap:.9f})' for t in times.tolist())}'"]
    if source.alpha:  # colour under full transparency is arbitrary; scaled as it is, it would bleed into the edges
        filters += ["format=gbrap", "premultiply=inplace=1"]
    scaled = f"{width}:{height}"
    if fit == "crop":  # before scaling: covering with a 16384x2 frame would make a picture of gigabytes
        cut = f"w='max(1,min(iw,ih*{width}/{height}/sar))':h='max(1,min(ih,iw*sar*{height}/{width}))'"
        filters += [f"crop={cut}:exact=1"]
    elif fit == "pad":
        scaled = f"w='max(1,min({width},round({height}*dar)))':h='max(1,min({height},round({width}/dar)))'"
    filters += [f"scale={scaled}:flags=bilinear+accurate_rnd+full_chroma_int", f"format={pixels}"]
    if fit == "pad":
        filters += [f"pad={width}:{height}:(ow-iw)/2:(oh-ih)/2:color=black"]
    # Times of packets may be those after a seek; where they were counted by decoding, only decoding finds them.
    early = float(times[0]) - 1
    seek = [] if source.counted or early < source.times[0] + 1 else ["-noaccurate_seek", "-seek_timestamp", "1"]
    seek += ["-ss", f"{early:.6f}"] if seek else []
    output = f"-fps_mode passthrough -frames:v {len(times)} -f rawvideo -pix_fmt {pixels} pipe:1".split()
    opened = _input(source.info.path, *source.decoder, *seek)
    arguments = [*opened, "-map", "0:V:0", "-vf", ",".join(filters), *output]
    with _Ffmpeg(source.info.path, arguments, seconds=_decoding_seconds(source)) as ffmpeg:
        buffer = np.empty((height, width, 4), np.uint8) if source.alpha else None
        for i, frame in enumerate(out):
            if i and picked[i] == picked[i - 1]:
                frame[:] = out[i - 1]
            elif not _fill(ffmpeg.stdout, frame if buffer is None else buffer):
                ffmpeg.finish()
                return ffmpeg.reason
            elif buffer is not None:
                # Premultiplied, so over white it is colour + (1 - alpha), up to rounding.
                over_white = buffer[..., :3].astype(np.uint16) + (255 - buffer[..., 3:])
                frame[:] = np.minimum(over_white, 255)
    return ""


def _fill(stream: IO[bytes], array: np.ndarray) -> bool:
    view = array.data.cast("B")
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return False
        view = view[count:]
    return True


# ---------------------------------------------------------------------------------------------- folders of images


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", name)]


def _open_folder(path: Path) -> _Source:
    try:
        names = [name for name in os.listdir(path) if _is_image(name)]
    except OSError as error:
        raise _unusable(path, error, "read") from error
    if not names:
        raise EmtError(f"The folder {_show(path)} holds no images.", _READABLE)
    images = tuple(path / name for name in sorted(names, key=lambda name: (_natural(name), name)))
    with _image(images[0]) as image:
        width, height = _upright_size(image)
        try:
            fps = float(image.info["fps"])
        except (KeyError, TypeError, ValueError):
            fps = FOLDER_FPS
    fps = fps if 0.01 <= fps <= 1000 else FOLDER_FPS
    count = len(images)
    info = ClipInfo(path, width, height, fps, count, count / fps)
    return _Source(info, np.arange(count) / fps, images=images)


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    try:
        if not path.is_file():
            raise OSError("it is no file (a broken link, a folder or a pipe)")
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is too large")
            yield image
    except Image.UnidentifiedImageError as error:
        raise EmtError(f"{_show(path)} is no image, whatever its name says.", "Remove it from the folder.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EmtError(f"{_show(path)} cannot be read as an image: {error}.", "Replace it, or remove it.") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def _read_images(source: _Source, picked: np.ndarray, out: np.ndarray, fit: Fit) -> None:
    height, width = out.shape[1:3]
    for i, frame in enumerate(out):
        path = source.images[picked[i]]
        with _image(path) as image:
            w, h = _upright_size(image)
            if (w, h) != (source.info.width, source.info.height):
                raise EmtError(
                    f"{_show(path)} is {w}x{h}, but {source.images[0].name} in the same folder is"
                    f" {source.info.width}x{source.info.height}.",
                    "All images of a clip must have one size: resize them, or put other clips into other folders.",
                )
            image.draft("RGB", (2 * max(width, height),) * 2)  # JPEG: decode at a fraction of the size
            picture = _composited(ImageOps.exif_transpose(image))
            w, h = picture.size
            target, box = (width, height), (0.0, 0.0, float(w), float(h))
            if fit == "crop":
                cut_w, cut_h = min(w, h * width / height), min(h, w * height / width)
                box = ((w - cut_w) / 2, (h - cut_h) / 2, (w + cut_w) / 2, (h + cut_h) / 2)
            elif fit == "pad":
                target = (max(1, min(width, round(height * w / h))), max(1, min(height, round(width * h / w))))
            x, y = (width - target[0]) // 2, (height - target[1]) // 2
            frame[:] = 0
            frame[y : y + target[1], x : x + target[0]] = np.asarray(
                picture if target == picture.size else picture.resize(target, Image.Resampling.BILINEAR, box)
            )


def _composited(image: Image.Image) -> Image.Image:
    """RGB, over white where transparent."""
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---------------------------------------------------------------------------------------------- writing

_YUV = "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
_TAGS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
_ENCODERS = {
    ".mp4": f"{_YUV} -c:v libx264 -crf 17 {_TAGS} -movflags +faststart -f mp4",
    ".webm": f"{_YUV} -c:v libvpx-vp9 -crf 22 -b:v 0 -cpu-used 3 -row-mt 1 {_TAGS} -f webm",
    ".gif": "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=sierra2_4a -loop 0 -f gif",
}


def write_clip(
    path: str | os.PathLike[str], frames: np.ndarray, fps: float, *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes frames as a clip, whole or not at all.

    The clip is written beside its place under a hidden temporary name, synced to disk and renamed, so that a crash
    leaves what stood there before; `remove_partials` clears away what a killed process left. (Replacing a folder of
    PNG frames takes two renames: between them there is none.)

    Args:
        path: `.mp4` (H.264, even sizes only), `.webm` (VP9), `.gif` (at most 50 frames a second; endless), or, for PNG
            frames, a folder (no suffix: `0000.png` and so on) or a pattern in a folder (`out/frame-%04d.png`).
            Missing parent folders are made. A file of that name is replaced, and so is a folder that holds
            nothing but frames of an earlier `write_clip`.
        frames: uint8, (frames, height, width, 3), RGB.
        fps: Frames a second, from 0.01 to 1000; a fraction of integers (30000/1001) is met exactly.
        metadata: Any strings, embedded as one JSON object: the `comment` tag of mp4 and webm, the comment of gif,
            the `Comment` text of each PNG. `read_metadata` returns it.

    Returns:
        The file, or the folder of the PNG frames.

    Raises:
        ValueError: `frames` has another type or shape.
        EmtError: The format, size or rate is not possible, the place cannot be written to, or the disk is full.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 of shape (frames, height, width, 3), not {frames.dtype} {frames.shape}")
    suffix = path.suffix.lower()
    _check_format(path, suffix, frames, fps)
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError("metadata must map strings to strings")
    comment = json.dumps(dict(metadata or {}))
    if len(comment) > MAX_METADATA:
        raise EmtError(f"{len(comment)} bytes of metadata are too many for {_show(path)}.", f"{MAX_METADATA} fit.")
    target = path.parent if suffix == ".png" else path
    partial = partial_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix in _ENCODERS:
            if target.is_dir():
                raise EmtError(f"{_show(target)} is a folder.", "Pass another name with -o, or remove it.")
            _encode(partial, target, frames, fps, comment)
        else:
            _check_replaceable(target)
            _write_png_frames(partial, path.name if suffix else "%04d.png", frames, fps, comment)
        if target.is_dir():  # one with something in it cannot be replaced in one step
            old = partial.with_suffix(".old")
            target.rename(old)
            try:
                partial.rename(target)
            except OSError:
                old.rename(target)
                raise
            _remove(old)
        else:
            partial.replace(target)
        sync(target.parent)
    except (OSError, ValueError) as error:
        raise _unusable(target, error, "write") from error
    finally:
        _remove(partial)
    return target


def _check_format(path: Path, suffix: str, frames: np.ndarray, fps: float) -> None:
    height, width = frames.shape[1:3]
    if suffix not in (*_ENCODERS, ".png", "") or not path.name:
        raise EmtError(
            f"{_show(path)}: clips are not written under such a name.",
            "Pass -o with a name ending in .mp4, .webm or .gif, or a folder for PNG frames.",
        )
    if suffix == ".png" and not re.fullmatch(r"[^%]*%(0\d)?d[^%]*", path.name, re.DOTALL):
        raise EmtError(f"{_show(path)} names one image, but a clip is several.", "Pass a folder, or FOLDER/%04d.png.")
    if suffix == ".mp4" and (width % 2 or height % 2):
        raise EmtError(
            f"{_show(path)}: H.264 in yuv420p needs an even width and height, not {width}x{height}.",
            "Write .webm, .gif or PNG frames, or choose another --size.",
        )
    if suffix in _ENCODERS and max(width, height) > 16384:
        raise EmtError(f"{_show(path)}: {width}x{height} is too large for {suffix}.", "Write PNG frames to a folder.")
    fastest = 50 if suffix == ".gif" else 1000  # gif counts in 1/100 s, and viewers slow down 1/100
    if not 0.01 <= fps <= fastest:
        raise EmtError(f"{_show(path)} cannot play at {fps:g} frames a second.", f"Pass --fps with 0.01 to {fastest}.")


def _encode(partial: Path, target: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    count, height, width = frames.shape[:3]
    rate = Fraction(float(fps)).limit_denominator(1001)
    suffix = target.suffix.lower()
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {rate} -i pipe:0".split()
    tag = [] if suffix == ".gif" else ["-metadata", f"comment={comment}"]
    arguments = [*source, *_ENCODERS[suffix].split(), *tag, "-y", f"file:{partial}"]
    partial.touch(exist_ok=False)  # what the system has against it, said better than by ffmpeg
    with _Ffmpeg(target, arguments, seconds=120 + count * (1 + width * height * 2e-5), feed=True) as ffmpeg:
        assert ffmpeg.stdin is not None
        with suppress(BrokenPipeError):  # its exit status and log say why
            for frame in frames:
                ffmpeg.stdin.write(np.ascontiguousarray(frame).data)
        status = ffmpeg.finish()
    if status:
        if "No space left" in ffmpeg.log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise EmtError(f"Cannot write {_show(target)}: {ffmpeg.reason}.", "Try another name or format with -o.")
    if suffix == ".gif":
        _insert_gif_comment(partial, comment.encode("ascii"))
    sync(partial)


def _insert_gif_comment(path: Path, comment: bytes) -> None:
    """Puts a comment extension after the header and global palette; ffmpeg's GIF muxer drops comments."""
    data = path.read_bytes()
    head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    path.write_bytes(data[:head] + b"\x21\xfe" + blocks + b"\0" + data[head:])


def _write_png_frames(folder: Path, pattern: str, frames: np.ndarray, fps: float, comment: str) -> None:
    folder.mkdir()
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "emt")
    text.add_text("fps", repr(float(fps)))
    text.add_text("Comment", comment)
    for i, frame in enumerate(frames):
        file = folder / (pattern % i)
        Image.fromarray(frame).save(file, pnginfo=text)
        sync(file)
    sync(folder)


def _check_replaceable(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise EmtError(f"{_show(folder)} exists and is no folder.", "Pass another name with -o, or remove it.")
    for file in folder.iterdir():
        software = None
        if file.suffix == ".png" and file.is_file():
            with _image(file) as image:
                software = image.info.get("Software")
        if software != "emt":
            raise EmtError(
                f"The folder {_show(folder)} holds {_show(Path(file.name))}, which is no frame of a clip written here.",
                "PNG frames go to a folder of their own: pass another one with -o.",
            )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_partials(folder: str | os.PathLike[str], *, older_than: float = 3600.0) -> list[Path]:
    """Removes what killed processes left of their `write_clip` in a folder.

    Args:
        folder: Where clips are written; its subfolders are not searched.
        older_than: Seconds since last written; younger ones may belong to a process that is still at work.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{PARTIAL}*")):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime >= older_than:
                _remove(path)
                removed.append(path)
    return removed


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `write_clip` embedded in a clip; empty if it embedded nothing, or another program wrote the clip.

    Raises:
        EmtError: The clip cannot be read.
    """
    path = Path(path)
    _check_readable(path)
    if path.is_dir():
        with _image(_open_folder(path).images[0]) as image:
            comment = image.info.get("Comment", "")
    elif path.suffix.lower() == ".gif":
        try:
            with Image.open(path, formats=("GIF",)) as image:
                comment = image.info.get("comment", b"").decode(errors="replace")
        except (OSError, ValueError, SyntaxError) as error:
            raise _damaged(path, str(error)) from error
    else:
        with _Ffmpeg(path, [*_input(path), "-f", "ffmetadata", "pipe:1"], seconds=60) as ffmpeg:
            text = ffmpeg.stdout.read().decode(errors="replace")
            if ffmpeg.finish():
                raise _damaged(path, ffmpeg.reason)
        escaped = re.search(r"^comment=((?:\\.|[^\\\n])*)$", text, re.MULTILINE | re.IGNORECASE | re.DOTALL)
        comment = re.sub(r"\\(.)", r"\1", escaped[1], flags=re.DOTALL) if escaped else ""
    try:
        metadata = json.loads(comment)
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()) else {}
