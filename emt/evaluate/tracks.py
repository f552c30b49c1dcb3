"""Tracklets: the paths of many points through a clip, by OpenCV."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from emt.errors import EmtError

TRACK_SIZE = 256  # pixels of the longer side at which clips are tracked; every displacement is in these pixels
REST_SPEED = 0.5  # pixels per frame at TRACK_SIZE below which a point counts as at rest: 0.2% of the frame
_CELLS = 26  # seeds per side: one point in each cell that has texture, so a small subject gets its share
_CORNER = 2.0  # smaller eigenvalue of the structure tensor (8-bit grey levels squared, times 4) a seed needs
_SEARCH = 10  # block matching reaches this many pixels of TRACK_SIZE / 4: 16% of the frame in one step
_ALIKE = 0.3  # how much of its contrast a point's surroundings may change in one step
_OTHER = 32  # grey levels by which a pixel that shows something else differs
_MANY = 0.005  # of a frame's pixels: a subject of a tenth of its side
_AGREE = 1.0  # pixels by which a point tracked forward and back may miss its start


def opencv() -> Any:
    """Import OpenCV.

    Raises:
        EmtError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise EmtError(
            "OpenCV is needed to measure motion and is not installed.", "pip install 'emt-cli[evaluate]'"
        ) from error
    return cv2


def check_frames(frames: np.ndarray, name: str = "frames") -> np.ndarray:
    """The frames, if they are a clip: uint8 (frames ≥ 2, height, width, 3).

    Raises:
        EmtError: They are not.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise EmtError(
            f"{name} has shape {frames.shape} and type {frames.dtype}.",
            "A clip is an array of uint8 RGB frames: (frames, height, width, 3).",
        )
    if len(frames) < 2:
        raise EmtError(f"{name} has {len(frames)} frame(s).", "Motion needs at least 2 frames.")
    return frames


@dataclass(frozen=True)
class Tracklets:
    """Paths of points through a clip.

    Attributes:
        points: (tracks, frames, 2) float32, x and y in pixels of a frame whose longer side is `TRACK_SIZE`,
            the origin in the frame's centre. Meaningless where not visible.
        visible: (tracks, frames) bool.
        height, width: Size of the frame in the same pixels.
        changes: Whether the pictures change from frame to frame, be it in a way that no point could be tracked by.
    """

    points: np.ndarray
    visible: np.ndarray
    height: float
    width: float
    changes: bool = False

    @property
    def velocity(self) -> np.ndarray:
        """(tracks, frames - 1, 2) displacement from frame to frame, zero where a point is not seen in both."""
        return np.where(self.steps[..., None], np.diff(self.points, axis=1), 0).astype(np.float32)

    @property
    def steps(self) -> np.ndarray:
        """(tracks, frames - 1) bool: the point is seen in both frames of the step."""
        return self.visible[:, 1:] & self.visible[:, :-1]


def track(frames: np.ndarray) -> Tracklets:
    """Tracklets of a clip.

    Args:
        frames: uint8 (frames, height, width, 3).

    Raises:
        EmtError: OpenCV is not installed, or the frames are not a clip.
    """
    check_frames(frames)
    return replace(_track(frames), changes=_changes(frames))


def _changes(frames: np.ndarray) -> bool:
    """Return whether more than a few pixels become others in a usual step: more than by noise and compression."""
    steps = itertools.pairwise(frames)
    shares = [(np.abs(b.astype(np.int16) - a).max(-1) > _OTHER).mean() for a, b in steps]
    return bool(np.median(shares) > _MANY)


def track_scale(height: int, width: int) -> float:
    """Pixels of the tracking size per pixel of a frame of this size."""
    return TRACK_SIZE / max(height, width)


def _track(frames: np.ndarray) -> Tracklets:
    """Corners of a regular grid, tracked both ways from the first, middle and last frame.

    Lucas-Kanade alone loses a small subject that moves by a good part of its size in one frame, and a coarse-to-fine
    flow follows the background there. So each step starts from three guesses (block matching in colour, which knows
    no smoothness; the point's velocity a step ago; rest), refines each, and keeps the one that looks most alike
    among those that return to their start when tracked back.
    """
    cv2 = opencv()
    scale = track_scale(*frames.shape[1:3])
    width, height = (max(16, round(side * scale)) for side in (frames.shape[2], frames.shape[1]))
    resample = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    colour = [cv2.resize(frame, (width, height), interpolation=resample) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in colour]
    small = [
        cv2.resize(frame, (max(4, width // 4), max(4, height // 4)), interpolation=cv2.INTER_AREA).astype(np.float32)
        for frame in colour
    ]
    count = len(frames)

    @cache
    def matched(start: int, end: int) -> np.ndarray:
        return _match_blocks(small[start], small[end])

    paths, seen = [], []
    for seed in sorted({0, count // 2, count - 1}):
        corners = _corners(grey[seed])
        points = np.zeros((len(corners), count, 2), np.float32)
        visible = np.zeros((len(corners), count), bool)
        points[:, seed], visible[:, seed] = corners, True
        for direction in (1, -1):
            alive, velocity = visible[:, seed].copy(), np.zeros_like(corners)
            frame = seed
            while 0 <= frame + direction < count and alive.any():
                following = frame + direction
                end, found = _step(
                    grey[frame], grey[following], points[alive, frame], velocity[alive], matched(frame, following)
                )
                index = np.flatnonzero(alive)
                points[index, following] = end
                visible[index[found], following] = True
                velocity[index] = end - points[index, frame]
                alive[index[~found]] = False
                frame = following
        paths.append(points)
        seen.append(visible)
    points, visible = np.concatenate(paths), np.concatenate(seen)
    # A point that was lost early says little about a path.
    kept = visible.sum(1) - 1 >= max(1, (count - 1) / 2)
    centre = np.array([width, height], np.float32) / 2
    return Tracklets(points[kept] - centre, visible[kept], height, width)


def _corners(grey: np.ndarray) -> np.ndarray:
    """The best corner of each grid cell that has one: (points, 2) x, y float32."""
    cv2 = opencv()
    strength = cv2.cornerMinEigenVal(grey.astype(np.float32), blockSize=13, ksize=3)
    margin = 4
    strength[:margin] = strength[-margin:] = 0
    strength[:, :margin] = strength[:, -margin:] = 0
    height, width = grey.shape
    cell = max(height, width) / _CELLS
    found = []
    for top in np.arange(0, height, cell):
        for left in np.arange(0, width, cell):
            rows, columns = slice(int(top), int(top + cell)), slice(int(left), int(left + cell))
            part = strength[rows, columns]
            if not part.size:
                continue
            y, x = np.unravel_index(part.argmax(), part.shape)
            if part[y, x] > _CORNER:
                found.append((int(left) + x, int(top) + y))
    return np.array(found, np.float32).reshape(-1, 2)


def _match_blocks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense displacement by exhaustive block matching: (height, width, 2) whole pixels of the given frames.

    Block differences are compared with a slight preference for small displacements, which settles ties on flat and
    periodic texture. Every second displacement is tried: Lucas-Kanade makes up the difference.
    """
    cv2 = opencv()
    height, width = first.shape[:2]
    padded = cv2.copyMakeBorder(second, _SEARCH, _SEARCH, _SEARCH, _SEARCH, cv2.BORDER_REPLICATE)
    best = np.full((height, width), np.inf, np.float32)
    flow = np.zeros((height, width, 2), np.float32)
    for dy in range(-_SEARCH, _SEARCH + 1, 2):
        for dx in range(-_SEARCH, _SEARCH + 1, 2):
            moved = padded[_SEARCH + dy : _SEARCH + dy + height, _SEARCH + dx : _SEARCH + dx + width]
            cost = cv2.blur(cv2.absdiff(first, moved), (5, 5)).sum(2) + 0.3 * np.hypot(dx, dy)
            better = cost < best
            best[better] = cost[better]
            flow[better] = dx, dy
    return flow


def _step(
    first: np.ndarray, second: np.ndarray, points: np.ndarray, velocity: np.ndarray, matched: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One step of all points: where they are in the second frame (points, 2), and which of them were found."""
    cv2 = opencv()
    rows = (points[:, 1] / 4).astype(int).clip(0, matched.shape[0] - 1)
    columns = (points[:, 0] / 4).astype(int).clip(0, matched.shape[1] - 1)
    options: dict[str, Any] = {
        "winSize": (13, 13),
        "maxLevel": 1,
        "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
        "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.02),
    }
    best = points.copy()
    least = np.full(len(points), np.inf)
    limits = np.array([first.shape[1] - 1, first.shape[0] - 1])
    for guess in (4 * matched[rows, columns], velocity, np.zeros_like(velocity)):
        end, found, error = cv2.calcOpticalFlowPyrLK(
            first, second, points, (points + guess).astype(np.float32), **options
        )
        back, returned, _ = cv2.calcOpticalFlowPyrLK(second, first, end, (end - guess).astype(np.float32), **options)
        good = (
            (found[:, 0] == 1)
            & (returned[:, 0] == 1)
            & (np.linalg.norm(back - points, axis=1) < _AGREE)
            & ((end >= 0) & (end <= limits)).all(1)
        )
        error[~good] = np.inf  # OpenCV leaves there what was in memory, which may not be a number
        better = error[:, 0] < least
        best[better], least[better] = end[better], error[better, 0]
    mean, square = (cv2.blur(power.astype(np.float32), (13, 13)) for power in (first, first.astype(np.float32) ** 2))
    contrast = np.sqrt(np.maximum(square - mean * mean, 1))[points[:, 1].astype(int), points[:, 0].astype(int)]
    return best, least < _ALIKE * contrast + 2
