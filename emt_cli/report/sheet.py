"""A picture of results below their references, for a page that cannot play them side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex, default_dir
from emt.errors import EmtError
from emt_cli.batch.results import reference_of
from emt_cli.report.gallery import is_inside, read_shown, reason, sampling_of
from emt_cli.text import printable

if TYPE_CHECKING:
    import numpy as np

_JOBS = 12
_SIDE = 160  # pixels, of a clip's longer side at most
_COLUMNS, _STRIPS = 6, 2  # beside each other: clips that move, strips of their frames
_LABELS = ("reference", "result")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Shown:
    """A job on the sheet: what its result shows; reference and result, uint8 (frames, height, width, 3); their rate."""

    prompt: str
    clips: tuple[np.ndarray, np.ndarray]
    fps: float


def check_sheet(path: Path) -> None:
    """Raise EmtError unless a sheet can be written in the format of a name."""
    from emt.video import VIDEO_SUFFIXES

    if path.suffix.lower() not in (*_PICTURES, *VIDEO_SUFFIXES):
        raise EmtError(f"{path} names no format of a sheet.", "Name a .gif or .mp4, which move, or a .png or .jpg.")


def write_sheet(
    path: Path, jobs: Iterable[dict[str, Any]], out: Path, say: Callable[[str], None] = lambda text: None
) -> int:
    """Write finished jobs of an output folder, the first dozen: each reference with its result below.

    Args:
        path: A video or .gif, in which all play at once, or a picture with some of their frames.
        jobs: The jobs' lines in the journal.
        out: The output folder.
        say: Called with a line for each job that cannot be shown.

    Returns:
        How many jobs it shows.

    Raises:
        EmtError: none is finished and can be read, or the sheet cannot be written, or would replace one of the clips.
    """
    import numpy as np

    from emt.contact_sheet import contact_sheet
    from emt.video import write_clip

    jobs = list(jobs)
    clips = {reference_of(out, job["reference"]) for job in jobs if job.get("reference")}
    clips |= {out / job["output"] for job in jobs if "output" in job}
    if any(_is_same(path, clip) for clip in clips):
        raise EmtError(f"{path} is one of the clips that the sheet shows", "Name another file with --sheet.")
    shown: list[Shown] = []
    index = ContentIndex(default_dir())
    for job in jobs:
        if job["state"] != "done" or len(shown) == _JOBS:
            continue
        try:
            shown.append(_read(job, out, index))
        except Exception as error:  # whatever is wrong with one clip, the others are shown
            say(f"left out: {job['output']:.200}: {reason(error)}")
    if not shown:
        raise EmtError(f"{out} has no finished clips to show.")
    if path.suffix.lower() not in _PICTURES:
        pages = []
        for frame in range(min(len(clip) for one in shown for clip in one.clips)):
            blocks = [(one.prompt, [clip[[frame]] for clip in one.clips]) for one in shown]
            page = contact_sheet(blocks, columns=_COLUMNS, lines=2, labels=_LABELS)
            pages.append(np.asarray(page)[: page.height // 2 * 2, : page.width // 2 * 2])
        write_clip(path, np.stack(pages), min(shown[0].fps, 50.0))
        return len(shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet([(one.prompt, one.clips) for one in shown], columns=_STRIPS, labels=_LABELS).save(path)
    except OSError as error:
        raise EmtError(f"{path} cannot be written: {error.strerror}.") from None
    return len(shown)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or cannot be
        return False


def _read(job: dict[str, Any], out: Path, index: ContentIndex) -> Shown:
    from emt.video import probe, read_clip

    result = out / job["output"]
    if not is_inside(out, result) or not job.get("reference"):
        raise EmtError("It is not a result of this folder.")
    info = probe(result)

    def small(width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, _SIDE / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    reference = read_shown(out, job, index, small).frames
    sampling = sampling_of(job)
    own = read_clip(result, frames=info.frames, size=small(sampling["width"], sampling["height"])).frames
    return Shown(printable(job.get("prompt", "")), (reference, own), info.fps)
