"""Contact sheets: frames of clips from left to right, below their captions, in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE = 8, 17  # pixels between blocks, and of a line of text
_CHARACTER = 7  # pixels, more than most are wide

Block = tuple[str, Sequence[np.ndarray]]
"""A caption and the clips below it, uint8 (frames, height, width, 3) each."""


def contact_sheet(
    blocks: Sequence[Block], *, columns: int = 1, frames: int = 8, lines: int = 1, labels: Sequence[str] = ()
) -> Image.Image:
    """Blocks beside and below each other, each with its caption and a row for each of its clips.

    Args:
        blocks: At least one; sizes and lengths of their clips may differ.
        columns: Blocks beside each other at most.
        frames: Frames of a clip at most, from its first to its last.
        lines: Lines of a caption at most; what they cannot hold is left out.
        labels: Names of the rows of every block, written at the left edge.
    """
    clips = [clip for _, own in blocks for clip in own]
    count = min(frames, max(map(len, clips)))
    height, width = (max(clip.shape[side] for clip in clips) for side in (1, 2))
    columns = min(columns, len(blocks))
    margin = max((_CHARACTER * len(label) + _GAP for label in labels), default=0)
    across = count * width + _GAP
    down = lines * _LINE + max(len(own) for _, own in blocks) * height + _GAP
    sheet = Image.new("RGB", (margin + columns * across, -(-len(blocks) // columns) * down), "white")
    for number, (caption, own) in enumerate(blocks):
        left, top = margin + number % columns * across, number // columns * down
        sheet.paste(_text(caption, across, lines), (left, top))
        top += lines * _LINE
        if left == margin:
            for row, label in enumerate(labels):
                sheet.paste(_text(label, margin), (0, top + row * height + (height - _LINE) // 2))
        for row, clip in enumerate(own):
            for place, index in enumerate(np.linspace(0, len(clip) - 1, count).round().astype(int)):
                sheet.paste(Image.fromarray(clip[index]), (left + place * width, top + row * height))
    return sheet


def _text(text: str, width: int, lines: int = 1) -> Image.Image:
    """Text in lines that keep to a width; what they cannot hold is left out."""
    picture = Image.new("RGB", (width, lines * _LINE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for line, part in enumerate(textwrap.wrap(text, width // _CHARACTER, max_lines=lines, placeholder="…")):
        draw.text((0, line * _LINE), part, "black", font)
    return picture
