"""Motion fidelity: how much alike the points of two clips move, whatever the clips show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emt.errors import EmtError
from emt.evaluate.camera import scene_velocity
from emt.evaluate.tracks import REST_SPEED, Tracklets, check_frames, track

_GROUP = 8  # tracklets that must move alike before they count as something that moves


@dataclass(frozen=True)
class Paths:
    """The tracklets of a clip that move.

    Attributes:
        velocity: (tracks, steps, 3) unit vectors; the third component stands for rest.
        steps: (tracks, steps) 1.0 where the track is seen in both frames of the step.
        own: (tracks,) bool: moves otherwise than the camera.
        speed: (tracks,) mean speed in pixels of `TRACK_SIZE` per frame.
        changes: As `Tracklets.changes`.
    """

    velocity: np.ndarray
    steps: np.ndarray
    own: np.ndarray
    speed: np.ndarray
    changes: bool

    @property
    def groups(self) -> list[np.ndarray]:
        """The tracklets that move with the camera and those that do not, (tracks,) bool, where they are enough."""
        return [group for group in (self.own, ~self.own) if group.sum() >= _GROUP]


def motion_fidelity(reference: np.ndarray, result: np.ndarray) -> float:
    """Motion fidelity score of two clips with the same number of frames.

    Args:
        reference, result: uint8 (frames, height, width, 3); the sizes may differ.

    Returns:
        1 for the same motion, about 0 for unrelated motion or a result at rest, −1 for opposite motion; see
        `tracklet_fidelity`.

    Raises:
        EmtError: The clips differ in length, are not clips, or OpenCV is not installed.
    """
    check_frames(reference, "the reference")
    check_frames(result, "the result")
    _check_lengths(len(reference), len(result))
    return tracklet_fidelity(track(reference), track(result))


def tracklet_fidelity(reference: Tracklets, result: Tracklets) -> float:
    """Motion fidelity of two sets of tracklets, in [−1, 1].

    The score of Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (section 5):
    a tracklet's correlation with another is the mean over the steps of the cosine of their displacements; each
    tracklet takes the best correlation it finds in the other clip; the score is the mean over each clip's tracklets,
    averaged over both directions. It differs in four ways, all of which concern points at rest, for which a
    direction is noise:

    - A displacement gets a third component of `REST_SPEED` (0.2% of the frame's longer side per frame) before
      it is normalised. So two points at rest agree (1), a point at rest and a fast one do not (0), and for points
      that move the value tends to the published one.
    - Only tracklets that move (mean speed over `REST_SPEED`, and in most steps in which anything does) are
      averaged and offered as partners: a resting background would agree with any other and outnumber every subject.
      Where one clip has none that move, its side of the average is 0 and the other's tracklets are compared with rest;
      where neither has, the score is 1, or 0 if pictures change all the same: what is faster than points can be
      followed, or comes and goes as noise does, is not known to be alike.
    - Where the camera moves and a subject moves otherwise, the two groups of tracklets count half each, whatever
      their number.
    - Tracklets may be lost or begin late: steps seen in both are compared, at least half of the scored tracklet's.

    As published, a tracklet may find its partner anywhere in the frame. So zooming in and out, or rolling either way,
    look alike to the score: every direction occurs somewhere. `emt.evaluate.camera` distinguishes them.
    """
    return path_fidelity(moving(reference), moving(result))


def path_fidelity(reference: Paths, result: Paths) -> float:
    """`tracklet_fidelity` of tracklets that move."""
    _check_lengths(reference.steps.shape[1] + 1, result.steps.shape[1] + 1)
    if not len(reference.own) and not len(result.own):
        return 0.0 if reference.changes or result.changes else 1.0
    return 0.5 * (_direction(reference, result) + _direction(result, reference))


def path_gain(reference: Paths, result: Paths) -> float | None:
    """Distance that a result's moving points go, as a share of the reference's; None where that rests.

    Where the camera moves and a subject moves otherwise, the two groups count half each, as in `tracklet_fidelity`.
    """

    def speed(paths: Paths) -> float:
        if not len(paths.own):
            return 0.0
        return float(np.mean([paths.speed[group].mean() for group in paths.groups] or [paths.speed.mean()]))

    return speed(result) / speed(reference) if len(reference.own) else None


def dynamic_degree(tracklets: Tracklets) -> float:
    """1 if much moves in a clip, else 0: VBench's dynamic degree, by tracked points instead of dense flow.

    Much moves in a step if the fastest twentieth of the points goes more than 6/256 of the frame's shorter side on
    average, and in a clip if it does in a quarter of the steps.
    """
    speed = np.linalg.norm(tracklets.velocity, axis=2)
    limit = 6 / 256 * min(tracklets.height, tracklets.width)
    fast = 0
    for step in range(speed.shape[1]):
        seen = np.sort(speed[tracklets.steps[:, step], step])
        fast += bool(len(seen)) and seen[-max(1, len(seen) // 20) :].mean() > limit
    return float(fast >= max(1, round(speed.shape[1] / 4)))


def _check_lengths(reference: int, result: int) -> None:
    if reference != result:
        raise EmtError(
            f"The reference has {reference} frames and the result {result}.",
            "Sample both clips with the same number of frames.",
        )


def moving(tracklets: Tracklets) -> Paths:
    """The tracklets that move, with unit displacements; none if too few move to be more than stray points."""
    velocity, seen = tracklets.velocity, tracklets.steps
    count = np.maximum(seen.sum(1), 1)
    speed = np.linalg.norm(velocity, axis=2)
    moves = speed.sum(1) / count > REST_SPEED
    # A point of the scene that a passing subject dragged along for a step or two does not move in most of the steps
    # in which something moves.
    fast = speed > REST_SPEED
    movers = fast[moves].sum(0)
    active = movers >= 0.25 * movers.max(initial=0)
    moves &= fast[:, active].sum(1) >= 0.4 * np.maximum(seen[:, active].sum(1), 1)
    if moves.sum() < _GROUP:
        moves[:] = False
    expected = scene_velocity(tracklets)
    relative = np.linalg.norm(np.where(seen[..., None], velocity - expected, 0), axis=2).sum(1) / count
    rest = np.full((*velocity.shape[:2], 1), REST_SPEED, np.float32)
    unit = np.concatenate([velocity, rest], axis=2)
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    mean = speed.sum(1) / count
    own = relative > REST_SPEED
    return Paths(unit[moves], seen[moves].astype(np.float32), own[moves], mean[moves], tracklets.changes)


def _direction(scored: Paths, other: Paths) -> float:
    """Mean over one clip's moving tracklets of the best correlation with the other's."""
    if not len(scored.own):
        return 0.0
    velocity, steps = scored.velocity, scored.steps
    if len(other.own):
        masked = velocity * steps[..., None]
        correlation = (
            masked.reshape(len(velocity), -1) @ (other.velocity * other.steps[..., None]).reshape(len(other.own), -1).T
        )
        common = steps @ other.steps.T
        correlation = np.where(common >= 0.5 * steps.sum(1, keepdims=True), correlation / np.maximum(common, 1), -1)
        best = correlation.max(1)
    else:
        best = (velocity[..., 2] * steps).sum(1) / steps.sum(1)
    return float(np.mean([best[group].mean() for group in scored.groups] or [best.mean()]))
