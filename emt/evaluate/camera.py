"""Global camera motion: pan, zoom and roll curves by robust fits to tracklets, and how well two clips' curves agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emt.evaluate.tracks import TRACK_SIZE, Tracklets, opencv, track

CURVES = ("pan_x", "pan_y", "zoom", "roll")
_REST = np.array([0.02, 0.02, 0.03, 0.03])  # a curve that spans less is at rest: 2% of the frame, 3%, 1.7 degrees
REACH = 0.4
"""Root mean square distance of a square frame's points from its centre, as a fraction of its side."""


@dataclass(frozen=True)
class CameraMotion:
    """Global motion of the scene on the screen.

    Attributes:
        curves: (frames, 4): pan x, pan y (fractions of the frame's longer side), log zoom, roll (radians, clockwise),
            each relative to frame 0: a scene point seen at `p` in frame 0 is seen at `pan + exp(zoom) R(roll) p`, with
            the origin in the frame's centre.
        observed: (frames - 1,) bool: whether the step had enough texture, spread over the frame, to fit it. A step
            that was not observed counts as no motion.
    """

    curves: np.ndarray
    observed: np.ndarray

    @property
    def span(self) -> np.ndarray:
        """(4,) largest minus smallest value of each curve."""
        return np.ptp(self.curves, axis=0)


def camera_motion(frames: np.ndarray) -> CameraMotion:
    """Camera motion of a clip, uint8 (frames, height, width, 3).

    Raises:
        EmtError: The frames are not a clip, or OpenCV is not installed.
    """
    return camera_from_tracklets(track(frames))


def step_fits(tracklets: Tracklets) -> tuple[np.ndarray, np.ndarray]:
    """The similarity transform that most points follow, for each step, by RANSAC.

    Returns:
        (frames - 1, 2, 3) transforms, the identity where the step was not observed, and (frames - 1,) bool observed.
    """
    cv2 = opencv()
    cv2.setRNGSeed(0)
    steps = tracklets.points.shape[1] - 1
    fits = np.tile(np.eye(2, 3), (steps, 1, 1))
    observed = np.zeros(steps, bool)
    for step in range(steps):
        seen = tracklets.steps[:, step]
        start, end = tracklets.points[seen, step], tracklets.points[seen, step + 1]
        if len(start) < 8:
            continue
        # A scene with depth is no similarity to the pixel: what no tight fit explains may have a loose one.
        for tolerance in (1.0, 3.0):
            fit, inliers = cv2.estimateAffinePartial2D(
                start, end, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=2000, confidence=0.999
            )
            if fit is not None and _spread(start[inliers[:, 0] == 1], tracklets):
                fits[step], observed[step] = fit, True
                break
    return fits, observed


def scene_velocity(tracklets: Tracklets) -> np.ndarray:
    """Motion of the tracklets' points if they all belonged to the scene: (tracks, frames - 1, 2)."""
    fits, _ = step_fits(tracklets)
    start = tracklets.points[:, :-1]
    return np.einsum("sij,nsj->nsi", fits[:, :, :2], start) + fits[None, :, :, 2] - start


def camera_share(tracklets: Tracklets) -> float:
    """Part of all tracked motion that the camera explains.

    1 where only the camera moves and the scene is flat; parallax takes away about half, subjects before a camera at
    rest all but nothing. 0 where nothing moves.
    """
    moved = np.linalg.norm(tracklets.velocity, axis=2).sum()
    left = np.linalg.norm(tracklets.velocity - scene_velocity(tracklets), axis=2)[tracklets.steps].sum()
    return float(np.clip(1 - left / moved, 0, 1)) if moved > 0 else 0.0


def _spread(points: np.ndarray, tracklets: Tracklets) -> bool:
    """Return whether points cover the frame as a scene does, and not just a subject before a flat scene."""
    if len(points) < 8:
        return False
    size = np.array([tracklets.width, tracklets.height])
    cells = ((points / size + 0.5) * 4).astype(int).clip(0, 3)
    return len(np.unique(cells @ [1, 4])) >= 5 and bool((np.ptp(points, axis=0) > 0.5 * size).all())


def camera_from_tracklets(tracklets: Tracklets) -> CameraMotion:
    """Camera motion from tracklets: the steps' similarity transforms, multiplied up."""
    fits, observed = step_fits(tracklets)
    total = np.eye(3)
    curves = [np.zeros(4)]
    turns = 0.0
    for fit in fits:
        total = np.vstack([fit, [0, 0, 1]]) @ total
        # The angle is summed from step to step, so that it does not wrap.
        turns += np.arctan2(fit[1, 0], fit[0, 0])
        zoom = 0.5 * np.log(max(np.linalg.det(total[:2, :2]), 1e-6))
        curves.append(np.array([total[0, 2] / TRACK_SIZE, total[1, 2] / TRACK_SIZE, zoom, turns]))
    return CameraMotion(np.array(curves), observed)


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two equally long sequences; 0 where either does not vary."""
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second / scale) if scale > 1e-12 else 0.0


def camera_agreement(reference: CameraMotion, result: CameraMotion) -> dict[str, float | None]:
    """Agreement of a result's camera with its reference's.

    Returns:
        For each of `pan_x`, `pan_y`, `zoom`, `roll`: the Pearson correlation over time of the two clips' cumulative
        curves, `None` where the reference's curve is at rest (there is nothing to follow) and 0 where only the
        result's is; with `_reference` and `_result` appended, the span of the curve in each clip. `camera` is the
        correlation of all four curves together, in equal units (how far a typical point of the frame moves), and
        `None` where the reference's camera does not move. With `_gain` appended, the result's span as a share of the
        reference's, `None` where that is at rest.
    """
    values: dict[str, float | None] = {}
    for index, name in enumerate(CURVES):
        moves = reference.span[index] > _REST[index]
        follows = result.span[index] > _REST[index]
        agreement = pearson(reference.curves[:, index], result.curves[:, index]) if follows else 0.0
        values[name] = agreement if moves else None
        values[f"{name}_reference"] = float(reference.span[index])
        values[f"{name}_result"] = float(result.span[index])
        values[f"{name}_gain"] = float(result.span[index] / reference.span[index]) if moves else None
    units = np.array([1, 1, REACH, REACH])
    moves = (reference.span > _REST).any()
    follows = (result.span > _REST).any()
    joint = pearson((reference.curves * units).ravel(), (result.curves * units).ravel()) if follows else 0.0
    values["camera"] = joint if moves else None
    return values
