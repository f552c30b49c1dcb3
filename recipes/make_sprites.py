"""Render the emoji of the rendered world into its sprite atlas.

    apt-get install fonts-noto-color-emoji
    python recipes/make_sprites.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Each glyph is scaled and centred by `emt.synthetic.sprites.fit_cell`. Specks apart from a glyph (the stars around the
rocket) are removed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emt.synthetic.sprites import COLUMNS, GLYPHS, SIDE, fit_cell

ATLAS = Path(__file__).parents[1] / "emt" / "synthetic" / "assets" / "sprites.png"
BITMAP = 109
"""The one size in which the font holds its bitmaps, in pixels per em."""
SPECK = 0.04
"""Parts smaller than this share of the glyph's area are specks."""


def parts(inside: np.ndarray) -> np.ndarray:
    """Label the 4-connected parts of a mask: 0 outside, 1, 2, … inside."""
    labels = np.zeros(inside.shape, int)
    for start in zip(*np.nonzero(inside)):
        if labels[start]:
            continue
        label, stack = labels.max() + 1, [start]
        while stack:
            y, x = stack.pop()
            if 0 <= y < inside.shape[0] and 0 <= x < inside.shape[1] and inside[y, x] and not labels[y, x]:
                labels[y, x] = label
                stack += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return labels


def glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One emoji as an RGBA cut-out without specks."""
    board = Image.new("RGBA", (2 * BITMAP, 2 * BITMAP))
    ImageDraw.Draw(board).text((BITMAP // 4, BITMAP // 4), character, font=font, embedded_color=True)
    pixels = np.array(board)
    if not pixels[..., 3].any():
        raise SystemExit(f"the font has no bitmap for {character!r}")
    labels = parts(pixels[..., 3] > 0)
    for label in range(1, labels.max() + 1):
        if (labels == label).sum() < SPECK * (labels > 0).sum():
            pixels[labels == label] = 0
    image = Image.fromarray(pixels, "RGBA")
    return image.crop(image.getbbox())


def main() -> None:
    """Write the atlas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf")
    arguments = parser.parse_args()
    font = ImageFont.truetype(str(arguments.font), BITMAP)
    rows = -(-len(GLYPHS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
    for i, character in enumerate(GLYPHS.values()):
        atlas.paste(fit_cell(glyph(font, character)), (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    ATLAS.parent.mkdir(parents=True, exist_ok=True)
    atlas.save(ATLAS, optimize=True)
    print(f"{ATLAS}: {len(GLYPHS)} sprites, {ATLAS.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
