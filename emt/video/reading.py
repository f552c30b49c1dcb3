"""Read clips: probe one, sample frames of one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from emt.errors import EmtError, count
from emt.scratch import scratch_array
from emt.signatures import picture_format
from emt.video.clip import (
    FITS,
    MAX_FRAMES,
    MAX_PIXELS,
    SPARSE_SECONDS,
    Clip,
    ClipInfo,
    Fit,
    FramesMissing,
    Sound,
    Source,
    half_gap,
)
from emt.video.kinds import ANIMATED_SUFFIXES, check_readable, not_video
from emt.video.names import describe_part, show
from emt.video.pictures import Animation, Images
from emt.video.stream import Video

_GOOD_RATE = 8  # sampled frames a second that a hint suggests: movement of people and cameras shows in them


def probe(path: str | os.PathLike[str]) -> ClipInfo:
    """Facts of a clip. Reads a video file once and decodes one frame of it.

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
        path: A video file, an animated picture or a folder of images, taken in natural order (`2.png` before `10.png`).
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
    width, height = size or (source.info.width, source.info.height)
    out = scratch_array((frames, height, width, 3))
    picked = _sample(source, frames, start, duration, stride)
    try:
        said = source.read(picked, out, fit)
    except FramesMissing:
        # Some packets are no frames (cut by an edit list, damaged), or the container's index misled the seek.
        # Decoding everything once gives the times of the frames that really come out.
        source = source.counted()
        picked = _sample(source, frames, start, duration, stride)
        try:
            said = source.read(picked, out, fit)
        except FramesMissing as error:
            raise not_video(source.info.path, str(error)) from error
    info = source.info
    times = source.times[picked] - source.times[0]
    fps = (frames - 1) / float(times[-1] - times[0]) if frames > 1 else info.fps
    warnings = (*info.warnings, *said, *_sparse(info, picked, times))
    sound = source.sound(float(times[0]), frames / fps) if isinstance(source, Video) else None
    return Clip(out, round(fps, 9), info, tuple(times.round(9).tolist()), warnings, sound)


def count_frames(
    path: str | os.PathLike[str], *, start: float = 0.0, duration: float | None = None, stride: int | None = None
) -> int:
    """Most frames that `read_clip` samples with the same arguments without taking any twice; decodes one of them.

    Raises:
        EmtError: As `read_clip`.
    """
    _check_request(1, None, "crop", start, duration, stride)
    source = _open(Path(path))
    first, last = _part(source.times - source.times[0], start, duration)
    return (last - first - 1) // (stride or 1) + 1 if last > first else 0


def sampled_sound(
    path: str | os.PathLike[str],
    *,
    frames: int = 16,
    start: float = 0.0,
    duration: float | None = None,
    stride: int | None = None,
) -> Sound | None:
    """The sound of the time that `read_clip` samples with the same arguments; None if there is none.

    Raises:
        EmtError: As `read_clip`.
    """
    source = _open(Path(path))
    if not isinstance(source, Video):
        return None
    times = source.times[_sample(source, frames, start, duration, stride)] - source.times[0]
    fps = (frames - 1) / float(times[-1] - times[0]) if frames > 1 else source.info.fps
    return source.sound(float(times[0]), frames / fps)


def _sparse(info: ClipInfo, picked: np.ndarray, times: np.ndarray) -> tuple[str, ...]:
    """A warning if frames are so far apart that movement between them is lost."""
    frames = len(times)
    apart = float(times[-1] - times[0]) / max(frames - 1, 1)
    if apart <= SPARSE_SECONDS or int(picked[-1] - picked[0]) < 2 * (frames - 1):  # a slow clip of which all is taken
        return ()
    stride = max(1, round(info.fps / _GOOD_RATE))
    return (
        f"{show(info.path)}: {count(frames, 'frame')} of {info.duration:,.0f} s are {apart:,.1f} s apart, so that"
        f" movement between them is lost. Sample a part of it: --duration {frames / min(info.fps, _GOOD_RATE):g} or"
        f" --stride {stride}, from --start SECONDS on; or make a longer clip: --frames all --stride {stride}.",
    )


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


def _sample(source: Source, frames: int, start: float, duration: float | None, stride: int | None) -> np.ndarray:
    """Indices, not decreasing, of the frames to take."""
    times = source.times - source.times[0]
    first, last = _part(times, start, duration)
    count, info = last - first, source.info
    needed = (frames - 1) * (stride or 1) + 1
    if count < needed:
        part = describe_part(start, duration) if start or duration is not None else ""
        taken = f" ({frames} at a stride of {stride})" if stride else ""
        ways = [f"--frames {(count - 1) // (stride or 1) + 1}"] if count else []
        ways += ["a smaller --stride"] if stride and stride > 1 else []
        ways += ["an earlier --start"] if start else []
        ways += ["a longer --duration"] if duration is not None else []
        raise EmtError(
            f"{show(info.path)} has {count} frame{'s' if count != 1 else ''}{part}, but"
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


def _part(times: np.ndarray, start: float, duration: float | None) -> tuple[int, int]:
    """Numbers of the first frame of a subclip and of the one after its last, by the times of all frames."""
    slack = half_gap(times)  # a frame presented at `start`, up to rounding of the container's clock, belongs to it
    first = int(np.searchsorted(times, start - slack))
    return first, int(np.searchsorted(times, start + duration - slack)) if duration is not None else len(times)


def _open(path: Path) -> Source:
    check_readable(path)
    if path.is_dir():
        return Images.open(path)
    kind, suffix = picture_format(path), path.suffix.lower()
    if kind in ("PNG", "WebP"):
        animation = Animation.open(path)
        if animation.info.frames == 1 and suffix not in (".gif", ".apng"):
            raise not_video(path, f"it is one {kind} picture")
        return animation
    if kind or suffix in ANIMATED_SUFFIXES:
        raise not_video(path, f"it is one {kind} picture" if kind else f"it is no {suffix[1:].upper()} picture")
    return Video.open(path)
