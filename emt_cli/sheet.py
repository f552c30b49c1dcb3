"""A picture of results below their references, for a page that cannot play them side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt_cli.jobs import printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_JOBS = 12
_SIDE = 160  # pixels, of a clip's longer side at most
_COLUMNS, _STRIPS, _FRAMES = 6, 2, 8  # clips beside each other that move; strips beside each other, and frames of one
_GAP, _MARGIN, _LINE = 8, 66, 17
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Shown:
    """A job on the sheet: what its result shows; uint8 (frames, height, width, 3) of reference and result; its rate."""

    prompt: str
    reference: np.ndarray
    result: np.ndarray
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

    from emt.video import write_clip

    finished = [job for job in jobs if job["state"] == "done"][:_JOBS]
    if not finished:
        raise EmtError(f"{out} has no finished clips to show.")
    moving = path.suffix.lower() not in _PICTURES
    shown = [_read(job, out, None if moving else _FRAMES) for job in finished]
    if moving:
        length = min(len(one.result) for one in shown)
        pages = [_moving(shown, index) for index in range(length)]
        even = np.stack([np.asarray(page)[: page.height // 2 * 2, : page.width // 2 * 2] for page in pages])
        write_clip(path, even, min(shown[0].fps, 50.0))
        return len(shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _strips(shown).save(path)
    except OSError as error:
        raise EmtError(f"{path} cannot be written: {error.strerror}.") from None
    return len(shown)


def _read(job: dict[str, Any], out: Path, frames: int | None) -> Shown:
    from emt.video import probe, read_clip
    from emt_cli.report import view_of

    view, result = view_of(job), out / job["output"]
    info = probe(result)
    scale = min(1.0, _SIDE / max(view["width"], view["height"]))
    size = (round(view.pop("width") * scale), round(view.pop("height") * scale))
    reference = read_clip(out / job["reference"], size=size, **view).frames
    own = read_clip(result, frames=info.frames, size=size).frames
    if frames is not None:
        import numpy as np

        reference, own = (clip[np.linspace(0, len(clip) - 1, frames).round().astype(int)] for clip in (reference, own))
    return Shown(printable(job["prompt"]), reference, own, info.fps)


def _moving(shown: Sequence[Shown], index: int) -> Image.Image:
    """One frame of all: columns of a reference, its result and its prompt."""
    height, width = _cell(shown)
    columns = min(_COLUMNS, len(shown))
    cell = 2 * height + 2 * _LINE + 2 * _GAP
    page, draw = _page(_MARGIN + columns * (width + _GAP), -(-len(shown) // columns) * cell)
    for number, one in enumerate(shown):
        left, top = _MARGIN + number % columns * (width + _GAP), number // columns * cell
        if not number % columns:
            _write(draw, 0, top + height // 2, "reference")
            _write(draw, 0, top + height + height // 2, "result")
        for row, clip in enumerate((one.reference, one.result)):
            _paste(page, clip[min(index, len(clip) - 1)], left, top + row * height)
        for row, text in enumerate(textwrap.wrap(one.prompt, width // 7, max_lines=2, placeholder="…")):
            _write(draw, left, top + 2 * height + row * _LINE, text)
    return page


def _strips(shown: Sequence[Shown]) -> Image.Image:
    """Frames from left to right: rows of a reference and its result, with the prompt above."""
    height, width = _cell(shown)
    columns = min(_STRIPS, len(shown))
    cell, strip = 2 * height + _LINE + _GAP, _FRAMES * width + 2 * _GAP
    page, draw = _page(columns * strip, -(-len(shown) // columns) * cell)
    for number, one in enumerate(shown):
        left, top = number % columns * strip, number // columns * cell
        _write(draw, left, top, textwrap.shorten(one.prompt, strip // 7, placeholder="…"))
        for row, clip in enumerate((one.reference, one.result)):
            for place, frame in enumerate(clip):
                _paste(page, frame, left + place * width, top + _LINE + row * height)
    return page


def _cell(shown: Sequence[Shown]) -> tuple[int, int]:
    """Height and width that every frame fits in."""
    return max(one.result.shape[1] for one in shown), max(one.result.shape[2] for one in shown)


def _page(width: int, height: int) -> tuple[Image.Image, Any]:
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), "white")
    return page, ImageDraw.Draw(page)


def _paste(page: Image.Image, frame: np.ndarray, left: int, top: int) -> None:
    from PIL import Image

    page.paste(Image.fromarray(frame), (left, top))


def _write(draw: Any, left: int, top: int, text: str) -> None:
    from PIL import ImageFont

    draw.text((left, top), text, "black", ImageFont.load_default(12))
