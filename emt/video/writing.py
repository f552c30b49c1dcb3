"""Write clips, whole or not at all, with metadata inside; and read the metadata."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from emt.errors import EmtError
from emt.signatures import picture_format
from emt.storage import partial_file, replace_folder, sync, unwritable
from emt.video.clip import Sound
from emt.video.ffmpeg import Ffmpeg, open_file
from emt.video.kinds import check_readable, not_video
from emt.video.names import show, unusable
from emt.video.pictures import Images, is_animation, picture

MAX_METADATA = 100_000
"""Most bytes of metadata, as ASCII JSON, that `write_clip` embeds."""

# Players guess a tag that is missing. As options of the encoder, new ffmpegs take only one of the three.
_YUV = (
    "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
_ENCODERS = {
    ".mp4": f"{_YUV} -c:v libx264 -crf 17 -movflags +faststart -f mp4",
    ".webm": f"{_YUV} -c:v libvpx-vp9 -crf 22 -b:v 0 -cpu-used 3 -row-mt 1 -f webm",
    ".gif": "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=sierra2_4a -loop 0 -f gif",
}

_SOUND_ENCODERS = {".mp4": "-c:a aac -b:a 192k", ".webm": "-c:a libopus -b:a 128k"}


def write_clip(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    fps: float,
    *,
    metadata: Mapping[str, str] | None = None,
    sound: Sound | None = None,
) -> Path:
    """Write frames as a clip, whole or not at all.

    The clip is written beside its place under a hidden temporary name, synced to disk and renamed, so that a crash
    leaves what stood there before; `emt.storage.remove_partials` clears away what a killed process left.

    Args:
        path: `.mp4` (H.264, even sizes only), `.webm` (VP9), `.gif` (at most 50 frames a second; endless), or, for PNG
            frames, a folder (no suffix: `0000.png` and so on) or a pattern in a folder (`out/frame-%04d.png`).
            Missing parent folders are made. A file of that name is replaced, and so is a folder that holds
            nothing but frames of an earlier `write_clip`.
        frames: uint8, (frames, height, width, 3), RGB.
        fps: Frames a second, from 0.01 to 1000; a fraction of integers (30000/1001) is met exactly.
        metadata: Any strings, embedded as one JSON object: the `comment` tag of mp4 and webm, the comment of gif,
            the `Comment` text of each PNG. `read_metadata` returns it.
        sound: Part of another clip's sound to take along, as `read_clip` names it; mp4 and webm only. It is played as
            fast as the frames, at its own pitch, and is silent where that clip is.

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
    if sound and suffix not in _SOUND_ENCODERS:
        raise EmtError(
            f"{show(path)}: there is no sound in such clips.", "Write .mp4 or .webm, or leave the sound out."
        )
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError("metadata must map strings to strings")
    comment = json.dumps(dict(metadata or {}))
    if len(comment) > MAX_METADATA:
        raise EmtError(f"{len(comment)} bytes of metadata are too many for {show(path)}.", f"{MAX_METADATA} fit.")
    target = path.parent if suffix == ".png" else path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix not in _ENCODERS:
            _check_replaceable(target)
        elif target.is_dir():
            raise EmtError(f"{show(target)} is a folder.", "Pass another name with -o, or remove it.")
        with partial_file(target, folder=suffix not in _ENCODERS) as partial:
            if suffix in _ENCODERS:
                _encode(partial, target, frames, fps, comment, sound)
            else:
                _write_png_frames(partial, path.name if suffix else "%04d.png", frames, fps, comment)
            if target.is_dir():  # one with something in it cannot be replaced in one step
                replace_folder(partial, target)
            else:
                partial.replace(target)
        sync(target.parent)
    except (OSError, ValueError) as error:
        raise unusable(target, error, "write") from error
    return target


def check_place(path: Path) -> None:
    """Raise an EmtError if no clip can be written under a path, before it takes minutes to make one."""
    suffix = path.suffix.lower()
    _check_name(path, suffix)
    if reason := unwritable((path.parent if suffix == ".png" else path).parent):
        raise EmtError(f"{show(path)} cannot be written: {reason}.", "Pass another name with -o.")


def _check_format(path: Path, suffix: str, frames: np.ndarray, fps: float) -> None:
    height, width = frames.shape[1:3]
    _check_name(path, suffix)
    if suffix == ".mp4" and (width % 2 or height % 2):
        raise EmtError(
            f"{show(path)}: H.264 in yuv420p needs an even width and height, not {width}x{height}.",
            "Write .webm, .gif or PNG frames, or choose another --size.",
        )
    if suffix in _ENCODERS and max(width, height) > 16384:
        raise EmtError(f"{show(path)}: {width}x{height} is too large for {suffix}.", "Write PNG frames to a folder.")
    fastest = 50 if suffix == ".gif" else 1000  # gif counts in 1/100 s, and viewers slow down 1/100
    if not 0.01 <= fps <= fastest:
        raise EmtError(f"{show(path)} cannot play at {fps:g} frames a second.", f"Pass --fps with 0.01 to {fastest}.")


def _check_name(path: Path, suffix: str) -> None:
    if suffix not in (*_ENCODERS, ".png", "") or not path.name:
        raise EmtError(
            f"{show(path)}: clips are not written under such a name.",
            "Pass -o with a name ending in .mp4, .webm or .gif, or a folder for PNG frames.",
        )
    if suffix == ".png" and not re.fullmatch(r"[^%]*%(0\d)?d[^%]*", path.name, re.DOTALL):
        raise EmtError(f"{show(path)} names one image, but a clip is several.", "Pass a folder, or FOLDER/%04d.png.")


def _encode(
    partial: Path, target: Path, frames: np.ndarray, fps: float, comment: str, sound: Sound | None = None
) -> None:
    count, height, width = frames.shape[:3]
    rate = Fraction(float(fps)).limit_denominator(1001)
    suffix = target.suffix.lower()
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {rate} -i pipe:0".split()
    streams = []
    if sound:
        source += _opened_sound(sound)
        streams = f"-map 0:v -map 1:a:0 -map_metadata -1 -map_chapters -1 {_SOUND_ENCODERS[suffix]}".split()
        streams += ["-af", _sound_filters(sound, float(count / rate))]
    tag = [] if suffix == ".gif" else ["-metadata", f"comment={comment}"]
    arguments = [*source, *streams, *_ENCODERS[suffix].split(), *tag, "-y", f"file:{partial}"]
    with Ffmpeg(target, arguments, seconds=120 + count * (1 + width * height * 2e-5), feed=True) as ffmpeg:
        assert ffmpeg.stdin is not None
        with suppress(BrokenPipeError):  # its exit status and log say why
            for frame in frames:
                ffmpeg.stdin.write(np.ascontiguousarray(frame).data)
        status = ffmpeg.finish()
    if status:
        if "No space left" in ffmpeg.log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sound and not _is_readable(sound):
            raise EmtError(f"The sound of {show(sound.path)} cannot be read.", "Leave it out, or replace the clip.")
        raise EmtError(f"Cannot write {show(target)}: {ffmpeg.reason}.", "Try another name or format with -o.")
    if suffix == ".gif":
        _insert_gif_comment(partial, comment.encode("ascii"))
    sync(partial)


def _opened_sound(sound: Sound) -> list[str]:
    part = ["-vn", "-seek_timestamp", "1", "-ss", f"{sound.start:.6f}", "-t", f"{sound.duration:.6f}"]
    return open_file(sound.path, *part, keep_times=False)


def _is_readable(sound: Sound) -> bool:
    """Return whether a clip's sound can be decoded."""
    with Ffmpeg(sound.path, [*_opened_sound(sound), "-map", "0:a:0", "-f", "null", "-"], seconds=120) as ffmpeg:
        return ffmpeg.finish() == 0


def _sound_filters(sound: Sound, seconds: float) -> str:
    """Filters that bring a sound to exactly the seconds of a clip."""
    filters = ["aresample=async=1:first_pts=0", "aformat=channel_layouts=mono|stereo"]
    speed = sound.duration / seconds
    if abs(speed - 1) > 1e-3:
        steps = max(1, math.ceil(abs(math.log2(speed))))  # ffmpeg's filter is good from half to twice as fast
        filters += [f"atempo={speed ** (1 / steps):.9f}"] * steps
    return ",".join([*filters, f"apad=whole_dur={seconds:.6f}", f"atrim=end={seconds:.6f}"])


def _insert_gif_comment(path: Path, comment: bytes) -> None:
    """Puts a comment extension after the header and global palette; ffmpeg's GIF muxer drops comments."""
    data = path.read_bytes()
    head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    path.write_bytes(data[:head] + b"\x21\xfe" + blocks + b"\0" + data[head:])


def _write_png_frames(folder: Path, pattern: str, frames: np.ndarray, fps: float, comment: str) -> None:
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
        raise EmtError(f"{show(folder)} exists and is no folder.", "Pass another name with -o, or remove it.")
    for file in folder.iterdir():
        software = None
        if file.suffix == ".png" and file.is_file():
            with picture(file) as image:
                software = image.info.get("Software")
        if software != "emt":
            raise EmtError(
                f"The folder {show(folder)} holds {show(Path(file.name))}, which is no frame of a clip written here.",
                "PNG frames go to a folder of their own: pass another one with -o.",
            )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata that `write_clip` embedded in a clip; empty if it embedded nothing, or another program wrote the clip.

    Raises:
        EmtError: The clip cannot be read.
    """
    path = Path(path)
    check_readable(path)
    if path.is_dir():
        with picture(Images.open(path).files[0]) as image:
            comment = image.info.get("Comment", "")
    elif kind := picture_format(path):
        if not is_animation(path):
            raise not_video(path, f"it is one {kind} picture")
        comment = ""  # no format that is written here
    elif path.suffix.lower() == ".gif":
        try:
            with picture(path, ("GIF",)) as image:
                comment = image.info.get("comment", b"").decode(errors="replace")
        except EmtError as error:
            raise not_video(path, "it is no whole GIF") from error
    else:
        with Ffmpeg(path, [*open_file(path), "-f", "ffmetadata", "pipe:1"], seconds=60) as ffmpeg:
            text = ffmpeg.stdout.read().decode(errors="replace")
            if ffmpeg.finish():
                raise not_video(path, ffmpeg.reason)
        escaped = re.search(r"^comment=((?:\\.|[^\\\n])*)$", text, re.MULTILINE | re.IGNORECASE | re.DOTALL)
        comment = re.sub(r"\\(.)", r"\1", escaped[1], flags=re.DOTALL) if escaped else ""
    try:
        metadata = json.loads(comment)
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()) else {}
