"""Kinds of files: which are clips, which are frames of one, and which are left unread, and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from emt.errors import EmtError, count
from emt.video.names import natural_key, show, unusable
from emt.video.pictures import IMAGE_SUFFIXES, is_animation, is_image_name

VIDEO_SUFFIXES: frozenset[str] = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".mk3d", ".webm", ".avi", ".divx",
    ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".trp", ".flv",
    ".wmv", ".asf", ".ogv", ".ogm", ".mxf", ".gxf", ".dv", ".nut", ".y4m", ".ivf", ".obu", ".h264", ".264", ".avc",
    ".h265", ".265", ".hevc", ".rm", ".rmvb", ".wtv", ".gif", ".apng",
})  # fmt: skip
"""Suffixes of video files that are read; what is inside may be of another kind than the name says."""
UNREAD_VIDEO_SUFFIXES: frozenset[str] = frozenset({
    ".swf", ".bik", ".bk2", ".roq", ".amv", ".r3d", ".braw", ".mjpg", ".mjpeg", ".mj2", ".dav", ".evo", ".nsv",
    ".viv", ".fli", ".flc", ".m3u8", ".mpd", ".ismv",
})  # fmt: skip
"""Suffixes of video that is not read. A folder that holds such files holds clips, not the frames of one."""
ANIMATED_SUFFIXES: frozenset[str] = frozenset({".png", ".webp"})
"""Suffixes of pictures that may be animations, which are clips."""

READABLE = (
    "Read are videos (.mp4 .mov .mkv .webm .avi .mpg .ts .mts .flv .wmv .ogv .gif and more), animated .webp and .png,"
    f" and folders of {' '.join(sorted(IMAGE_SUFFIXES))} images."
)
CONVERT = "convert it with: ffmpeg -i INPUT -c:v libx264 -pix_fmt yuv420p OUTPUT.mp4"

_OF_THE_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})


def is_clip(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is taken for one clip: a video file, an animated picture, or a folder of one clip's frames.

    A folder that holds a video of any kind is a folder of clips, whatever pictures (thumbnails, covers) are beside.
    Nothing is decoded: a file that only has the name of a video is called a clip, and refused when it is read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _holds_frames(path)
        suffix = path.suffix.lower()
        return path.is_file() and (suffix in VIDEO_SUFFIXES or (suffix in ANIMATED_SUFFIXES and is_animation(path)))
    except (OSError, ValueError):
        return False


def _holds_frames(folder: Path) -> bool:
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                continue
            if suffix in VIDEO_SUFFIXES | UNREAD_VIDEO_SUFFIXES and not entry.is_dir():
                return False
            if suffix in IMAGE_SUFFIXES:
                images.append(entry.name)
    return bool(images) and not is_animation(folder / min(images, key=natural_key))


def unread_files(folder: str | os.PathLike[str], known: Collection[str] = ()) -> dict[str, str]:
    """Files of a folder that are no clip, no frame and nothing that belongs to one, in natural order, and why.

    Hidden files, folders, prompts beside a clip (`clip.txt`) and records of results (`clip.mp4.json`) are left out.

    Args:
        folder: A folder of clips, or of the frames of one.
        known: Names of further files that are left out.

    Returns:
        For each name a reason such as ".swf is not read" or "a link that leads nowhere".

    Raises:
        EmtError: The folder cannot be read.
    """
    folder = Path(folder)
    try:
        names = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural_key)
    except OSError as error:
        raise unusable(folder, error, "read", READABLE) from error
    frames = is_clip(folder)
    companions = {Path(name).stem for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES}
    unread = {}
    for name in names:
        path, suffix = folder / name, Path(name).suffix.lower()
        if path.is_dir() or name in known or name.lower() in _OF_THE_SYSTEM:
            continue
        if (suffix == ".txt" and path.stem in companions) or (suffix == ".json" and path.stem in names):
            continue
        if not path.is_file():
            unread[name] = "a link that leads nowhere" if path.is_symlink() else "no file but a pipe, socket or device"
        elif is_image_name(name):
            if not frames and not is_clip(path):
                unread[name] = "a picture beside clips"
        elif suffix not in VIDEO_SUFFIXES:
            unread[name] = f"{suffix} is not read" if suffix else "no suffix"
    return unread


def describe_unread(folder: str | os.PathLike[str], names: int = 4, known: Collection[str] = ()) -> str:
    """One line about the files of a folder that are not read; empty if there are none.

    Args:
        folder: A folder of clips, or of the frames of one.
        names: Most files to name, one for each reason first.
        known: Names of files that the line leaves out.

    Raises:
        EmtError: The folder cannot be read.
    """
    unread = unread_files(folder, known)
    groups: dict[str, list[str]] = {}
    for name, reason in unread.items():
        groups.setdefault(reason, []).append(name)
    parts = []
    for reason, group in list(groups.items())[:names]:
        more = f" and {len(group) - 1:,} more" if len(group) > 1 else ""
        parts.append(f"{show(Path(group[0]))}{more} ({reason})")
    if len(groups) > names:
        parts.append("others")
    return f"ignored {count(len(unread), 'file')} in {show(Path(folder))}: {', '.join(parts)}" if unread else ""


def check_readable(path: Path) -> None:
    """Raise EmtError if `path` is missing or no regular file or folder, before anything could block on it."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return
        if not stat.S_ISREG(status.st_mode):
            raise EmtError(f"{show(path)} is neither a file nor a folder (a pipe, socket or device).", READABLE)
        suffix = path.suffix.lower()
        if suffix not in VIDEO_SUFFIXES | ANIMATED_SUFFIXES:
            if suffix in IMAGE_SUFFIXES:
                raise not_video(path, "it is one picture")
            named = f"has the suffix {path.suffix!r}, which is not read" if suffix else "has no suffix"
            raise EmtError(f"{show(path)} {named}.", f"{READABLE}\nIf it plays elsewhere, {CONVERT}")
        if not status.st_size:
            raise EmtError(f"{show(path)} is empty (0 bytes).", "Copy or download it again.")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        raise unusable(path, error, "read", READABLE) from error


def not_video(path: Path, reason: str) -> EmtError:
    """Error for a file that cannot be read as a video."""
    return EmtError(
        f"{show(path)} cannot be read as a video: {reason}.", f"{READABLE}\nIf it plays elsewhere, {CONVERT}"
    )
