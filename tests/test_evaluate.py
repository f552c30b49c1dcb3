"""Measures on clips whose answer is known: synthetic textures and discs moved by known paths."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emt.errors import EmtError
from emt.evaluate import leakage, motion, statistics
from emt.evaluate.camera import CameraMotion, camera_agreement, camera_from_tracklets, camera_motion, camera_share
from emt.evaluate.consistency import temporal_consistency
from emt.evaluate.motion import motion_fidelity, tracklet_fidelity
from emt.evaluate.tracks import TRACK_SIZE, Tracklets, track
from emt.video import read_clip

cv2 = pytest.importorskip("cv2")

EXAMPLES = Path(__file__).parents[1] / "examples" / "references"
SIZE, FRAMES = 128, 8
TIME = np.linspace(0, 1, FRAMES)


def texture(rng: np.random.Generator, side: int, cell: int) -> np.ndarray:
    coarse = rng.random((side // cell + 2, side // cell + 2, 3)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def render(
    *,
    path: np.ndarray | None = None,
    camera: np.ndarray | None = None,
    seed: int = 0,
    flat: bool = False,
    size: int = SIZE,
    side: int = 30,
) -> np.ndarray:
    """A textured disc on `path` (frames, 2) before a scene moved by `camera` (frames, 4): pan x, pan y, zoom, roll."""
    rng = np.random.default_rng(seed)
    scale = size / SIZE
    scene = np.full((3 * size, 3 * size, 3), 0.4, np.float32) if flat else texture(rng, 3 * size, round(7 * scale))
    disc = texture(rng, 128, 18)
    y, x = np.mgrid[:128, :128] - 63.5
    mask = (np.hypot(x, y) < 62).astype(np.float32)
    frames = []
    for t in range(FRAMES):
        pan_x, pan_y, zoom, roll = np.zeros(4) if camera is None else camera[t]
        turn = np.exp(zoom) * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        shift = (size - 1) / 2 + scale * np.array([pan_x, pan_y]) - turn @ np.full(2, (3 * size - 1) / 2)
        frame = cv2.warpAffine(scene, np.column_stack([turn, shift]), (size, size), borderMode=cv2.BORDER_REFLECT)
        if path is not None:
            k = side * scale / 128
            place = np.array([[k, 0, 0], [0, k, 0]]) + np.outer(scale * path[t] - side * scale / 2, [0, 0, 1])
            alpha = cv2.warpAffine(mask, place, (size, size), flags=cv2.INTER_AREA)[..., None]
            frame = frame * (1 - alpha) + alpha * cv2.warpAffine(disc, place, (size, size), flags=cv2.INTER_AREA)
        frames.append((frame * 255).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


LINE = np.column_stack([25 + 70 * TIME, 90 - 40 * TIME])
OTHER_LINE = np.column_stack([100 - 20 * TIME, 30 + 75 * TIME])
PAN = np.column_stack([24 * TIME, -12 * TIME, 0 * TIME, 0 * TIME])
ZOOM_ROLL = np.column_stack([0 * TIME, 0 * TIME, 0.3 * TIME, -0.4 * TIME])


@cache
def tracklets(name: str, seed: int = 0) -> Tracklets:
    return track(clip(name, seed))


@cache
def clip(name: str, seed: int = 0) -> np.ndarray:
    return {
        "line": lambda: render(path=LINE, seed=seed),
        "other line": lambda: render(path=OTHER_LINE, seed=seed),
        "line, flat": lambda: render(path=LINE, seed=seed, flat=True),
        "line reversed": lambda: clip("line", seed)[::-1],
        "line shuffled": lambda: clip("line", seed)[[3, 0, 6, 1, 7, 4, 2, 5]],
        "still": lambda: np.repeat(clip("line", seed)[:1], FRAMES, 0),
        "pan": lambda: render(camera=PAN, seed=seed),
        "pan back": lambda: render(camera=-PAN, seed=seed),
        "pan, line": lambda: render(path=OTHER_LINE, camera=PAN, seed=seed),
        "zoom and roll": lambda: render(camera=ZOOM_ROLL, seed=seed),
        "large": lambda: render(path=LINE, seed=seed, size=512),
        "grey": lambda: np.full((FRAMES, SIZE, SIZE, 3), 127, np.uint8),
    }[name]()


def fidelity(reference: str, result: str, seed: int = 1) -> float:
    """Of two clips that look different: they are drawn from different seeds."""
    return tracklet_fidelity(tracklets(reference), tracklets(result, seed))


# Motion fidelity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["line", "line, flat", "pan", "zoom and roll", "grey"])
def test_a_clip_follows_itself(name):
    assert motion_fidelity(clip(name), clip(name)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["line", "line, flat", "pan", "pan, line", "zoom and roll"])
def test_the_same_motion_in_another_look_scores_near_one(name):
    assert fidelity(name, name) > 0.93


def test_size_does_not_matter():
    assert fidelity("line", "large") > 0.93


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.mp4")), ids=lambda path: path.stem)
def test_the_examples_move_so_that_points_can_be_followed(path):
    """A reference that leaps too far scores 0 with whatever follows it, itself at another size included."""
    small, large = (read_clip(path, frames=16, size=(side, side)).frames for side in (128, 192))
    assert motion_fidelity(small, large) > 0.95


def test_opposite_motion_scores_near_minus_one():
    assert fidelity("pan", "pan back") < -0.8
    # A disc that moves straight and evenly, played backwards, has the opposite displacement in every step.
    assert fidelity("line", "line reversed") < -0.95


def test_a_still_result_scores_near_zero():
    # Its own side of the average is 0; the reference's tracklets are compared with rest, whose cosine is
    # REST_SPEED / speed = 0.5 / 23 here.
    assert 0 <= fidelity("line", "still") < 0.05
    assert 0 <= fidelity("pan", "grey") < 0.1


def test_two_still_clips_agree():
    assert fidelity("still", "grey") == 1


def test_what_cannot_be_followed_agrees_with_nothing():
    """Noise, and a subject that is elsewhere in each frame: no point can be tracked, and yet they are not at rest."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
    leaping = clip("still").copy()
    for i, frame in enumerate(leaping):
        top, left = divmod(i * 53 % (SIZE - 32) ** 2, SIZE - 32)
        frame[top : top + 32, left : left + 32] = rng.integers(0, 256, (32, 32, 3))
    for frames in (noise, leaping):
        assert track(frames).changes
        assert motion_fidelity(clip("still"), frames) == 0
    assert not tracklets("still").changes


def test_shuffled_frames_and_another_path_score_low():
    assert abs(fidelity("line", "line shuffled")) < 0.3
    # The directions (70, -40) and (-20, 75) have a cosine of -0.70.
    assert fidelity("line", "other line") == pytest.approx(-0.70, abs=0.05)


def test_the_subject_counts_as_much_as_the_scene_when_the_camera_moves():
    # The scene moves as it should and the subject is missing: its half finds the pan, at a cosine of 0.1.
    only_camera = fidelity("pan, line", "pan")
    assert 0.4 < only_camera < 0.9 < fidelity("pan, line", "pan, line")


def test_fidelity_falls_as_the_path_bends_away():
    scores = [
        tracklet_fidelity(tracklets("line"), track(render(path=LINE * (1 - mix) + OTHER_LINE * mix, seed=3)))
        for mix in (0, 0.5, 1)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 1


def straight(velocity: tuple[float, float], count: int = 20, steps: int = 7) -> Tracklets:
    start = np.stack(np.meshgrid(np.linspace(-90, 90, 5), np.linspace(-90, 90, 4)), -1).reshape(-1, 1, 2)[:count]
    points = (start + np.arange(steps + 1)[None, :, None] * np.array(velocity)).astype(np.float32)
    return Tracklets(points, np.ones(points.shape[:2], bool), TRACK_SIZE, TRACK_SIZE)


@given(angle=st.floats(0, 2 * np.pi), first=st.floats(5, 20), second=st.floats(5, 20))
@settings(max_examples=40, deadline=None)
def test_fidelity_of_straight_paths_is_the_cosine_of_their_directions(angle, first, second):
    score = tracklet_fidelity(straight((first, 0)), straight((second * np.cos(angle), second * np.sin(angle))))
    assert score == pytest.approx(np.cos(angle), abs=0.03)


def test_clips_of_different_length_are_refused():
    with pytest.raises(EmtError, match="8 frames and the result 5"):
        motion_fidelity(clip("line"), clip("line")[:5])


@pytest.mark.parametrize(
    "frames", [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8), np.uint8)]
)
def test_what_is_not_a_clip_is_refused(frames):
    with pytest.raises(EmtError):
        motion_fidelity(frames, frames)


# Camera -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "truth"), [("pan", PAN), ("zoom and roll", ZOOM_ROLL), ("pan, line", PAN)])
def test_pans_zooms_and_rolls_are_recovered(name, truth):
    found = camera_from_tracklets(tracklets(name))
    assert found.observed.all()
    assert np.abs(found.curves[:, :2] - truth[:, :2] / SIZE).max() < 0.008  # one pixel
    assert np.abs(found.curves[:, 2:] - truth[:, 2:]).max() < 0.02


def test_camera_explains_what_the_scene_does_and_nothing_else():
    shares = {name: camera_share(tracklets(name)) for name in ("pan", "zoom and roll", "pan, line", "line", "grey")}
    assert min(shares["pan"], shares["zoom and roll"]) > 0.9
    assert 0.4 < shares["pan, line"] < 0.9
    assert shares["line"] < 0.1
    assert shares["grey"] == 0


def test_a_subject_before_a_flat_scene_is_not_the_camera():
    found = camera_from_tracklets(tracklets("line, flat"))
    assert not found.observed.any()
    assert np.abs(found.curves).max() == 0


def test_a_static_camera_stays_at_rest_behind_a_moving_subject():
    found = camera_from_tracklets(tracklets("line"))
    assert np.abs(found.curves).max() < 0.005


def test_camera_agreement():
    pan, back, rolling, still = (
        camera_from_tracklets(tracklets(n)) for n in ("pan", "pan back", "zoom and roll", "still")
    )
    same = camera_agreement(pan, camera_from_tracklets(tracklets("pan", 1)))
    assert same["pan_x"] == pytest.approx(1, abs=0.01)
    assert same["camera"] == pytest.approx(1, abs=0.01)
    assert same["zoom"] is None  # the reference does not zoom: nothing to follow
    assert camera_agreement(pan, back)["pan_x"] == pytest.approx(-1, abs=0.01)
    assert camera_agreement(pan, still)["pan_x"] == 0
    assert camera_agreement(still, pan)["camera"] is None
    assert camera_agreement(rolling, rolling)["roll"] == pytest.approx(1)
    assert camera_agreement(rolling, rolling)["roll_reference"] == pytest.approx(0.4, abs=0.02)


# Temporal consistency -----------------------------------------------------------------------------------------------


def test_motion_is_consistent_and_flicker_is_not():
    rng = np.random.default_rng(0)
    moving = clip("pan")

    def flickering(strength: float) -> np.ndarray:
        noise = rng.normal(0, strength, moving.shape)
        return (moving + noise).clip(0, 255).astype(np.uint8)

    cuts = np.concatenate([clip("line", seed)[:1] for seed in range(FRAMES)])
    values = [temporal_consistency(frames) for frames in (moving, flickering(8), flickering(20), cuts)]
    assert temporal_consistency(clip("still")) == pytest.approx(1, abs=1e-4)
    assert values[0] > 0.95
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5


@pytest.mark.parametrize("value", [0, 127, 255])
def test_flat_frames_give_numbers(value):
    frames = np.full((FRAMES, 64, 64, 3), value, np.uint8)
    assert temporal_consistency(frames) == pytest.approx(1)
    assert motion_fidelity(frames, frames) == 1
    assert np.isfinite(camera_motion(frames).curves).all()
    assert np.isfinite(leakage.appearance(frames)).all()


# Leakage ------------------------------------------------------------------------------------------------------------


def colours(red: int, green: int, blue: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 60, (4, 32, 32, 3))
    return (np.array([red, green, blue]) + noise).astype(np.uint8)


def test_leakage_is_one_for_a_copy_and_zero_for_what_resembles_no_reference_more_than_another():
    references = [colours(190, 10, 10, 0), colours(10, 190, 10, 1), colours(10, 10, 190, 2)]
    results = [references[0], colours(120, 120, 120, 4), (references[2] // 2 + colours(120, 120, 0, 5) // 2)]
    looks = [leakage.appearance(part) for part in references], [leakage.appearance(part) for part in results]
    copied, neutral, mixed = leakage.appearance_leakage(*looks, ["a", "b", "c"])
    assert copied == pytest.approx(1, abs=1e-3)
    assert abs(neutral) < 0.05
    assert neutral <= mixed < copied


def test_leakage_needs_an_unrelated_reference():
    look = leakage.appearance(colours(190, 10, 10, 0))
    assert leakage.appearance_leakage([look, look], [look, look], ["a", "a"]) == [None, None]


def test_appearance_does_not_depend_on_where_things_are():
    frames = clip("line")
    assert leakage.appearance(frames) @ leakage.appearance(frames[:, ::-1, ::-1]) == pytest.approx(1, abs=5e-3)


# Statistics ---------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    estimates = [statistics.mean(rng.normal(3, 1, 60)) for _ in range(100)]
    assert 88 <= sum(e.low <= 3 <= e.high for e in estimates) <= 100
    assert np.mean([e.high - e.low for e in estimates]) == pytest.approx(2 * 1.96 / 60**0.5, rel=0.1)


def test_clips_without_a_value_are_left_out():
    assert statistics.mean([1.0, None, float("nan"), 3.0]).value == 2
    assert statistics.mean([1.0, None, float("nan"), 3.0]).clips == 2
    assert statistics.mean([None]) is statistics.NOTHING
    assert statistics.NOTHING.as_dict()["value"] is None


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_pooled_correlation_is_that_of_all_values_together(seed):
    rng = np.random.default_rng(seed)
    pairs = [(x := rng.normal(size=n), x + rng.normal(size=n)) for n in (5, 9, 30)]
    expected = np.corrcoef(*(np.concatenate(part) for part in zip(*pairs)))[0, 1]
    assert statistics.pooled_pearson(pairs).value == pytest.approx(expected)


def test_k9_the_interval_of_a_pooled_correlation_covers_it_as_often_as_it_says():
    """Clips of 16 values each that correlate at 0.6: what varies is which clips there are."""
    rng, estimates = np.random.default_rng(0), []
    for _ in range(100):
        x, noise = rng.normal(size=(2, 40, 16))
        estimates.append(statistics.pooled_pearson(list(zip(x, 0.6 * x + 0.8 * noise))))
    assert 88 <= sum(e.low <= 0.6 <= e.high for e in estimates) <= 100
    width = 2 * 1.96 * (1 - 0.6**2) / (40 * 16) ** 0.5
    assert np.mean([e.high - e.low for e in estimates]) == pytest.approx(width, rel=0.1)


def test_k9_clips_are_resampled_whole():
    """In each clip the values are one value: sixteen of it say no more than one."""
    rng, widths = np.random.default_rng(1), []
    for _ in range(20):
        x, noise = rng.normal(size=(2, 40))
        pairs = [(np.full(16, a), np.full(16, 0.6 * a + 0.8 * b)) for a, b in zip(x, noise)]
        found = statistics.pooled_pearson(pairs)
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (1 - 0.6**2) / 40**0.5, rel=0.2)


def test_a_constant_has_no_correlation():
    assert statistics.pooled_pearson([(np.ones(4), np.arange(4.0))]).value == 0


# ---- how far, how much, how alike ----------------------------------------------------------------------------------


def points(speed: float, count: int = 40, frames: int = 9, direction: tuple[float, float] = (1.0, 0.0)) -> Tracklets:
    """A grid of points that all move alike, in pixels of 256 a frame."""
    start = np.stack(np.meshgrid(np.linspace(-60, 60, 8), np.linspace(-60, 60, count // 8)), -1).reshape(-1, 2)
    moved = start[:, None] + speed * np.arange(frames)[:, None] * np.array(direction)
    return Tracklets(moved.astype(np.float32), np.ones(moved.shape[:2], bool), 256, 256, changes=True)


@pytest.mark.parametrize("share", [0.25, 0.64, 1.0, 1.5])
def test_the_gain_of_paths_is_how_far_points_go(share):
    gain = motion.path_gain(motion.moving(points(4.0)), motion.moving(points(4.0 * share, direction=(0.0, 1.0))))
    assert gain == pytest.approx(share, rel=1e-3)


def test_the_gain_of_a_result_at_rest_is_0_and_of_a_reference_at_rest_there_is_none():
    moves, rests = motion.moving(points(4.0)), motion.moving(points(0.0))
    assert motion.path_gain(moves, rests) == 0
    assert motion.path_gain(rests, moves) is None


@pytest.mark.parametrize("share", [0.5, 1.0, -0.8])
def test_the_gain_of_a_pan_is_beside_its_correlation(share):
    curves = np.zeros((9, 4))
    curves[:, 0] = np.linspace(0, 0.3, 9)
    reference, result = (CameraMotion(factor * curves, np.ones(8, bool)) for factor in (1, share))
    found = camera_agreement(reference, result)
    assert found["pan_x_gain"] == pytest.approx(abs(share))
    assert found["pan_x"] == pytest.approx(np.sign(share))
    assert found["pan_y_gain"] is found["zoom_gain"] is found["roll_gain"] is None


@pytest.mark.parametrize(("speed", "degree"), [(0.0, 0), (5.0, 0), (7.0, 1)])
def test_the_dynamic_degree_is_1_from_6_256ths_of_the_frame_a_step(speed, degree):
    assert motion.dynamic_degree(points(speed)) == degree


def test_a_twentieth_of_the_points_in_a_quarter_of_the_steps_is_dynamic():
    few = points(0.0, count=80)
    few.points[:3, 3:5, 0] += 20 * np.array([1, 2])
    few.points[:3, 5:, 0] += 40
    assert motion.dynamic_degree(few) == 1
    few.points[:3, 3:, 0] = few.points[:3, :1, 0] + 20
    assert motion.dynamic_degree(few) == 0, "one step of eight"


def test_likeness_to_the_reference_needs_no_model():
    red, other = (np.full((3, 32, 32, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 30, 200)))
    looks = [leakage.appearance(frames) for frames in (red, red, other)]
    assert looks[0] @ looks[1] == pytest.approx(1, abs=1e-5)
    assert looks[0] @ looks[2] < 0.1
