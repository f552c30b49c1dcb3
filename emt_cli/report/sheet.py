"""A picture of results below their references, for a page that cannot play them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
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
    """Say whether a sheet can be written in the format of a name.

    Raises:
        EmtError: it cannot.
    """
    from emt.video import VIDEO_SUFFIXES

    if path.suffix.lower() not in (*_PICTURES, *VIDEO_SUFFIXES):
        raise EmtError(f"{path} names no format of a sheet.", "Name a .gif or .mp4, which move, or a .png or .jpg.")


def write_sheet(path: Path, jobs: Sequence[dict[str, Any]], out: Path) -> int:
    """Write finished jobs of an output folder, the first dozen: each reference with its result below.

    Args:
        path: A video or .gif, in which all play at once, or a picture with some of their frames.
        jobs: The jobs' lines in the journal.
        out: The output folder.

    Returns:
        How many jobs it shows.

    Raises:
        EmtError: none is finished, a clip cannot be read, or the sheet cannot be written.
    """
    import numpy as np

    from emt.contact_sheet import contact_sheet
    from emt.video import write_clip

    finished = [job for job in jobs if job["state"] == "done"][:_JOBS]
    if not finished:
        raise EmtError(f"{out} has no finished clips to show.")
    shown = [_read(job, out) for job in finished]
    if path.suffix.lower() not in _PICTURES:
        pages = []
        for index in range(min(len(clip) for one in shown for clip in one.clips)):
            blocks = [(one.prompt, [clip[[index]] for clip in one.clips]) for one in shown]
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


def _read(job: dict[str, Any], out: Path) -> Shown:
    from emt.video import probe, read_clip
    from emt_cli.report.page import view_of

    view, result = view_of(job), out / job["output"]
    info = probe(result)
    scale = min(1.0, _SIDE / max(view["width"], view["height"]))
    size = (round(view.pop("width") * scale), round(view.pop("height") * scale))
    reference = read_clip(out / job["reference"], size=size, **view).frames
    own = read_clip(result, frames=info.frames, size=size).frames
    return Shown(printable(job["prompt"]), (reference, own), info.fps)
