"""Contact sheets: every frame is where it belongs, below its caption."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emt.contact_sheet import contact_sheet

LINE, GAP, MARGIN = 17, 8, 7 * len("reference") + 8


def clip(frames: int, height: int, width: int, blue: int = 0) -> np.ndarray:
    """Frame t is of one colour, whose red is t."""
    frames_of = np.zeros((frames, height, width, 3), np.uint8)
    frames_of[..., 0] = np.arange(frames)[:, None, None]
    frames_of[..., 2] = blue
    return frames_of


def ink(sheet: Image.Image, left: int, top: int, width: int, height: int) -> int:
    """Dark pixels of a part that has nothing but text."""
    return int((np.asarray(sheet.crop((left, top, left + width, top + height))).max(-1) < 128).sum())


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 20), st.integers(1, 10), st.integers(0, 2), st.integers(1, 2)
)
def test_frames_run_from_left_to_right_and_blocks_fill_columns(blocks, columns, length, frames, lines, rows):
    height, width = 5, 7
    clips = [[clip(length, height, width, 50 * number + row) for row in range(rows)] for number in range(blocks)]
    sheet = contact_sheet([("", own) for own in clips], columns=columns, frames=frames, lines=lines)
    count, beside = min(frames, length), min(columns, blocks)
    across, down = count * width + GAP, lines * LINE + rows * height + GAP
    assert sheet.size == (beside * across, -(-blocks // beside) * down)
    for number in range(blocks):
        left, top = number % beside * across, number // beside * down + lines * LINE
        for row in range(rows):
            y = top + row * height + height // 2
            shown = [sheet.getpixel((left + place * width + width // 2, y)) for place in range(count)]
            assert shown[0] == (0, 0, 50 * number + row)
            assert count == 1 or shown[-1] == (length - 1, 0, 50 * number + row)
            assert shown == sorted(shown)


def test_sizes_and_lengths_may_differ():
    sheet = contact_sheet([("", [clip(16, 30, 40), clip(3, 20, 10, blue=9)])], frames=4)
    assert sheet.size == (4 * 40 + GAP, LINE + 2 * 30 + GAP)
    assert [sheet.getpixel((40 * place, LINE + 30)) for place in range(4)] == [(t, 0, 9) for t in (0, 1, 1, 2)]
    assert sheet.getpixel((15, LINE + 30)) == (255, 255, 255)


def test_captions_stand_above_their_clips():
    clips = [clip(4, 30, 40)]
    sheet = contact_sheet([("a red cat", clips), ("", clips)])
    assert ink(sheet, 0, 0, 168, LINE) > 50
    assert ink(sheet, 0, LINE + 30 + GAP, 168, LINE) == 0


@pytest.mark.parametrize("caption", ["a red cat over the sea " * 9, "W" * 200, "две кошки\nна крыше " * 20])
def test_a_long_caption_keeps_to_its_lines_and_its_column(caption):
    clips = [clip(4, 30, 60)]
    sheet = contact_sheet([(caption, clips), ("", clips)], columns=2, lines=2)
    alone = contact_sheet([("", clips), ("", clips)], columns=2, lines=2)
    difference = np.argwhere(np.asarray(sheet) != np.asarray(alone))
    assert (difference.max(0)[:2] < (2 * LINE, 248)).all()
    assert ink(sheet, 0, 0, 240, LINE) > 50


def test_labels_say_at_the_left_edge_what_rows_are():
    pair = [clip(4, 30, 40), clip(4, 30, 40)]
    sheet = contact_sheet([("", pair)] * 3, columns=2, labels=("reference", "result"))
    across, down = 4 * 40 + GAP, LINE + 60 + GAP
    assert sheet.size == (MARGIN + 2 * across, 2 * down)
    for top in (LINE, LINE + 30, down + LINE, down + LINE + 30):
        assert ink(sheet, 0, top, MARGIN, 30) > 30
        assert sheet.getpixel((MARGIN, top)) == (0, 0, 0)
