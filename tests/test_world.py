"""The rendered world: what is on the pixels is what the tensors say, and training never sees what is held out."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emt.synthetic import renderer as w
from emt.synthetic.footage import compress, film, paint_textures
from emt.synthetic.motions import FRAME
from emt.synthetic.scenes import CANVAS, PATTERNS, SCENES, paint
from emt.synthetic.sprites import load_sprites

SEEDS = st.integers(0, 2**31)
CENTRE = FRAME / 2 - 0.5  # index of the frame's centre between the middle pixels


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.World(variants=1, textures=4)


@pytest.fixture(scope="module")
def small_world() -> w.World:
    return w.World(size=64, variants=1, textures=4)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dressed(world: w.World, motions: w.Motions, seed: int, subject: str | None = None) -> w.Appearances:
    """Appearances, with both subjects replaced by a white `subject` if one is named."""
    looks = world.appearances(motions, rng(seed))
    if subject is not None:
        looks.subject[:] = w.SUBJECTS.index(subject)
        looks.colour[:] = w.COLOURS.index("white")
    return looks


def without_subjects(motions: w.Motions) -> w.Motions:
    return dataclasses.replace(motions, scale=torch.zeros_like(motions.scale))


def silhouettes(world: w.World, motions: w.Motions, looks: w.Appearances) -> np.ndarray:
    """Where a clip differs from the same clip without its subjects: (n, frames, height, width) bool."""
    there = world.render(motions, looks).int()
    bare = world.render(without_subjects(motions), looks).int()
    return ((there - bare).abs().amax(2) > 20).numpy()


def moments(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Centroid x, y in frame coordinates, area, and direction of the long axis modulo pi."""
    y, x = np.nonzero(mask)
    (xx, xy), (_, yy) = np.cov(np.stack([x, y]))
    return x.mean() + 0.5, y.mean() + 0.5, float(len(x)), 0.5 * math.atan2(2 * xy, xx - yy)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def test_vocabulary_is_as_large_as_promised_and_of_single_words():
    assert len(set(w.SUBJECTS)) == len(w.SUBJECTS) >= 48
    assert len(set(w.COLOURS)) == 8
    assert len(set(w.SCENES)) >= 12
    assert all(word.isalpha() and word.islower() for word in w.words())
    assert not set(w.SUBJECTS) & set(w.COLOURS)


def test_captions_use_known_words_only_and_never_name_the_motion(world: w.World):
    motions = world.motions(300, rng(0), camera=0.5, two_subjects=0.5)
    captions = world.captions(world.appearances(motions, rng(1)), motions)
    used = {word for caption in captions for word in caption.split()}
    assert used <= set(w.words())
    named = {*w.FAMILIES, *w.HELD_OUT_FAMILIES, *w.CAMERA_FAMILIES, *w.HELD_OUT_CAMERA_FAMILIES}
    parts = {part for name in named for part in name.split("-")}
    assert not used & parts - {"and", "on"}
    for caption, count in zip(captions, motions.subjects.tolist()):
        assert caption.count(" and ") == count - 1


def test_captions_read_naturally(world: w.World):
    motions = world.motions(2, rng(0))
    motions.subjects[:] = torch.tensor([1, 2])
    looks = world.appearances(2, rng(0))
    looks.subject[:] = torch.tensor([w.SUBJECTS.index("cat"), w.SUBJECTS.index("car")])
    looks.colour[:] = torch.tensor([w.COLOURS.index("orange"), w.COLOURS.index("blue")])
    looks.scene[:] = torch.tensor([w.SCENES.index("sea"), w.SCENES.index("desert")])
    assert world.captions(looks, motions) == [
        "an orange cat over the sea",
        "an orange cat and a blue car in the desert",
    ]


# --- what is held out -------------------------------------------------------------------------------------------------


def test_training_and_held_out_combinations_are_disjoint_and_cover_everything(world: w.World):
    seen, unseen = set(), set()
    for held_out, found in ((False, seen), (True, unseen)):
        looks = world.appearances(2000, rng(1), held_out=held_out)
        for i in range(2):
            triples = torch.stack([looks.subject[:, i], looks.colour[:, i], looks.scene], -1)
            found |= {tuple(row) for row in triples.tolist()}
    assert not seen & unseen
    share = w.held_out_combinations().float().mean()
    assert 0.1 < share < 0.4
    for part, names in enumerate((w.SUBJECTS, w.COLOURS, w.SCENES)):  # each is shown, in other company
        assert {triple[part] for triple in seen} == set(range(len(names)))


def test_scenes_with_patterns_are_drawn_as_often_as_asked_and_no_combination_that_is_held_out(world: w.World):
    assert torch.equal(world.appearances(500, rng(1)).scene, world.appearances(500, rng(1), patterns=1).scene)
    looks = world.appearances(4000, rng(1), held_out=False, patterns=3)
    share = torch.isin(looks.scene, torch.tensor([SCENES.index(name) for name in PATTERNS])).float().mean()
    assert share == pytest.approx(15 / 26, abs=0.03)
    held = w.held_out_combinations()
    assert not held[looks.subject, looks.colour, looks.scene[:, None]].any()


def test_two_subjects_of_a_clip_differ_in_kind_and_colour(world: w.World):
    looks = world.appearances(2000, rng(0), held_out=False)
    assert (looks.subject[:, 0] != looks.subject[:, 1]).all()
    assert (looks.colour[:, 0] != looks.colour[:, 1]).all()


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_families_are_held_out(seed: int):
    names, cameras = w.FAMILIES + w.HELD_OUT_FAMILIES, w.CAMERA_FAMILIES + w.HELD_OUT_CAMERA_FAMILIES
    for held_out in (False, True):
        motions = w.draw_motions(64, rng(seed), held_out=held_out, camera=0.6)
        allowed = w.HELD_OUT_FAMILIES if held_out else w.FAMILIES
        assert {names[i] for i in motions.family[:, 0].tolist()} <= set(allowed)
        moving = motions.camera_family > 0
        allowed = w.HELD_OUT_CAMERA_FAMILIES if held_out else w.CAMERA_FAMILIES
        assert {cameras[i] for i in motions.camera_family[moving].tolist()} <= set(allowed)


# --- motions ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_subjects_stay_in_the_frame_and_apart(seed: int, held_out: bool, camera: float, two: float):
    # So many that the share of those that overlap, a twentieth where motions are held out, is known to 2%.
    motions = w.draw_motions(512, rng(seed), held_out=held_out, camera=camera, two_subjects=two)
    present = motions.scale > 0
    assert (present.all(1).sum(-1) == motions.subjects).all()
    assert (motions.family[:, 1] == -1).equal(motions.subjects == 1)
    for values in (motions.position, motions.scale, motions.rotation, motions.camera):
        assert values.isfinite().all()
    outside = torch.maximum(-motions.position, motions.position - FRAME) + 0.42 * motions.scale[..., None]
    worst = outside.amax((1, 2, 3))
    assert worst.median() <= 0.5
    assert worst.max() < 7
    distance = (motions.position[:, :, 0] - motions.position[:, :, 1]).norm(dim=-1)
    overlap = (0.42 * motions.scale.sum(-1) - distance).amax(1)[motions.subjects == 2]
    assert (overlap < 8).float().mean() > 0.85 if len(overlap) else True


def test_every_family_moves_and_the_camera_starts_at_zero():
    for held_out in (False, True):
        motions = w.draw_motions(600, rng(0), held_out=held_out, camera=0.5, two_subjects=0)
        assert (motions.camera[:, 0] == 0).all()
        static = motions.camera_family == 0
        assert (motions.camera[static] == 0).all()
        assert (motions.camera[~static].abs() * torch.tensor([1, 1, 60, 60])).amax((1, 2)).min() > 1
        names = w.FAMILIES + w.HELD_OUT_FAMILIES
        for family in motions.family[:, 0].unique().tolist():
            chosen = motions[(motions.family[:, 0] == family) & static]
            if names[family] == "still":
                assert len(chosen) == 0
                continue
            travelled = (chosen.position[:, :, 0] - chosen.position[:, :1, 0]).norm(dim=-1).amax(1)
            resized = (chosen.scale[:, :, 0] / chosen.scale[:, :1, 0]).log().abs().amax(1) * 40
            turned = (chosen.rotation[:, :, 0] - chosen.rotation[:, :1, 0]).abs().amax(1) * 20
            assert (travelled + resized + turned).min() > 5, names[family]


def test_of_two_subjects_the_first_starts_further_left():
    motions = w.draw_motions(300, rng(0), two_subjects=1, camera=0.3)
    start = motions.position[:, 0, :, 0]
    assert (start[:, 0] <= start[:, 1]).all()
    assert (start[:, 1] - start[:, 0] > 8).float().mean() > 0.95


def test_growing_grows_and_shrinking_shrinks():
    motions = w.draw_motions(800, rng(0), camera=0, two_subjects=0)
    for name, sign in (("grow", 1), ("shrink", -1)):
        chosen = motions.scale[motions.family[:, 0] == w.FAMILIES.index(name)][..., 0]
        change = sign * (chosen[:, -1] / chosen[:, 0]).log()
        assert (change > 0).float().mean() > 0.95  # a random change of size may be added to any family


def test_what_stands_in_the_scene_moves_with_it():
    motions = w.draw_motions(600, rng(0), camera=1, two_subjects=0)
    still = motions.family[:, 0] == w.FAMILIES.index("still")
    fixed = motions[still & motions.attached]
    pan, zoom, roll = fixed.camera[..., :2], fixed.camera[..., 2], fixed.camera[..., 3]
    cos, sin = torch.cos(roll), torch.sin(roll)
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    # `still` may wander by a few pixels, grow and turn only through what any family may add; undo the camera.
    at = fixed.position[:, :, 0] - FRAME / 2 - pan
    back = (turn.mT @ at[..., None])[..., 0] / zoom.exp()[..., None]
    assert torch.allclose(back, back[:, :1].expand_as(back), atol=1e-3)
    free = motions[still & ~motions.attached].position[:, :, 0]
    assert torch.allclose(free, free[:, :1].expand_as(free), atol=1e-3)
    assert len(fixed) > 10
    assert len(free) > 10


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_the_same_seed_gives_the_same_motions_and_pixels(small_world: w.World, seed: int):
    clips = []
    for _ in range(2):
        generator = rng(seed)
        motions = small_world.motions(2, generator)
        looks = small_world.appearances(motions, generator)
        clips.append(small_world.render(motions, looks, realism=0.5, generator=generator))
    assert clips[0].equal(clips[1])


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["ball", "cat", "key", "rocket", "umbrella", "moon"])
def test_position_on_the_pixels_is_the_position_in_the_motion(world: w.World, subject: str):
    motions = world.motions(4, rng(len(subject)), two_subjects=0, camera=0.5)
    masks = silhouettes(world, motions, dressed(world, motions, 1, subject))
    errors = []
    for clip, frame in np.ndindex(4, 16):
        x, y = motions.position[clip, frame, 0].tolist()
        reach = 0.62 * float(motions.scale[clip, frame, 0])
        if reach < min(x, y) and max(x, y) < FRAME - reach:  # only what is wholly in the frame can be measured
            cx, cy, _, _ = moments(masks[clip, frame])
            errors.append(math.hypot(cx - x, cy - y) / float(motions.scale[clip, frame, 0]))
    assert len(errors) > 8
    assert np.mean(errors) < 0.04  # of its size


def test_size_and_rotation_on_the_pixels_are_those_in_the_motion(world: w.World):
    frames = world.frames
    motions = world.motions(1, rng(0), two_subjects=0, camera=0)
    motions.position[:] = 64.0
    motions.scale[:, :, 0] = torch.linspace(22, 80, frames)
    motions.rotation[:, :, 0] = torch.linspace(-1.2, 1.3, frames)
    masks = silhouettes(world, motions, dressed(world, motions, 3, "diamond"))
    areas, axes = zip(*(moments(mask)[2:] for mask in masks[0]))
    scale = np.sqrt(areas) / motions.scale[0, :, 0].numpy()
    assert scale.std() / scale.mean() < 0.06
    # An upright diamond is longest along y, an angle of pi/2.
    turned = np.array(axes) - math.pi / 2 - motions.rotation[0, :, 0].numpy()
    assert np.abs((turned + math.pi / 2) % math.pi - math.pi / 2).max() < 0.06


def test_rotation_is_clockwise_on_the_screen(world: w.World):
    motions = world.motions(1, rng(0), two_subjects=0, camera=0)
    motions.position[:], motions.scale[:, :, 0] = 64.0, 60.0
    motions.rotation[:, :, 0] = torch.linspace(0, math.pi / 2, world.frames)
    masks = silhouettes(world, motions, dressed(world, motions, 3, "arrow"))[0]
    clockwise, other = (np.rot90(masks[0], turns) for turns in (-1, 1))
    assert (clockwise & masks[-1]).sum() / (clockwise | masks[-1]).sum() > 0.9
    assert (other & masks[-1]).sum() / (other | masks[-1]).sum() < 0.8


@pytest.mark.parametrize("camera", [*w.CAMERA_FAMILIES[1:], *w.HELD_OUT_CAMERA_FAMILIES])
def test_the_scene_moves_as_the_camera_says(world: w.World, camera: str):
    held_out = camera in w.HELD_OUT_CAMERA_FAMILIES
    drawn = world.motions(60, rng(5), held_out=held_out, camera=1, two_subjects=0)
    index = (w.CAMERA_FAMILIES + w.HELD_OUT_CAMERA_FAMILIES).index(camera)
    drawn = drawn[drawn.camera_family == index]
    fastest = drawn.camera.abs().amax((1, 2)).argmax().item()
    motions = without_subjects(drawn[fastest : fastest + 1])
    looks = world.appearances(motions, rng(2))
    looks.scene[:] = w.SCENES.index("dots")
    video = world.render(motions, looks)[0].permute(0, 2, 3, 1).numpy()
    first = cv2.GaussianBlur(video[0], (0, 0), 1)
    for frame in (5, 10, 15):
        pan_x, pan_y, zoom, roll = motions.camera[0, frame].tolist()
        matrix = math.exp(zoom) * np.array([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])
        shift = np.array([CENTRE + pan_x, CENTRE + pan_y]) - matrix @ np.array([CENTRE, CENTRE])
        affine = np.concatenate([matrix, shift[:, None]], 1)
        warped = cv2.warpAffine(first, affine, (128, 128)).astype(int)
        seen = cv2.warpAffine(np.full((128, 128), 255, np.uint8), affine, (128, 128)) == 255
        now = cv2.GaussianBlur(video[frame], (0, 0), max(0.6, math.exp(zoom)))
        assert seen.mean() > 0.1
        assert np.abs(warped - now)[seen].mean() < 4
        if np.abs(affine - np.eye(2, 3)).max() > 3:
            assert np.abs(first.astype(int) - now)[seen].mean() > 8


@pytest.mark.parametrize("kind", ["subject", "scene", "both"])
def test_displacements_lead_back_to_frame_0(world: w.World, kind: str):
    """What a frame shows at a place, frame 0 shows at that place plus the displacement."""
    side = world.size
    motions = world.motions(12, rng(3), two_subjects=0, camera=0 if kind == "subject" else 1)
    if kind == "scene":
        motions = without_subjects(motions)
    looks = world.appearances(motions, rng(2))
    looks.scene[:] = w.SCENES.index("dots")
    video = world.render(motions, looks).float()
    at = (torch.arange(side) + 0.5) * (FRAME / side)
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (height, width, 2)
    displacements = motions.displacements(side).permute(0, 1, 3, 4, 2)
    errors, changes = [], []
    for frame in (3, 9, 15):
        where = places + displacements[:, frame]
        back = F.grid_sample(video[:, 0], where * (2 / FRAME) - 1, align_corners=False)
        away = (places - motions.position[:, frame, 0, None, None]).norm(dim=-1) / motions.scale[:, frame, :1, None]
        seen = ((where > 2) & (where < FRAME - 2)).all(-1)
        if kind != "scene":  # just around a subject frame 0 may show what it covered
            seen &= away < 0.38 if kind == "subject" else away > 0.8
        errors.append((video[:, frame] - back).abs().mean(1)[seen])
        changes.append((video[:, frame] - video[:, 0]).abs().mean(1)[seen])
    error, change = torch.cat(errors).mean(), torch.cat(changes).mean()
    assert error < 0.35 * change


def test_poses_are_those_of_the_subject_that_a_place_sees(world: w.World):
    motions = world.motions(6, rng(4), two_subjects=1, camera=0.5)
    # On top of the first subject, the second is what is seen there.
    motions.position[0, :, 1] = motions.position[0, :, 0]
    motions.scale[0] = 40.0
    side = 64
    poses = motions.poses(side)
    assert poses.shape == (6, world.frames, 4, side, side)
    corner = torch.hypot(motions.position[..., 0], motions.position[..., 1]) < 0.4 * motions.scale
    assert (poses[..., 0, 0].abs().sum(2) == 0)[~corner.any(-1)].all()
    cells = (motions.position * (side / FRAME)).long().clamp(0, side - 1)
    for clip, subject in ((0, 1), *((clip, subject) for clip in range(1, 6) for subject in range(2))):
        for frame in range(1, world.frames):
            x, y = cells[clip, frame, subject].tolist()
            before, now = motions.rotation[clip, frame - 1 : frame + 1, subject].tolist()
            size = math.log(motions.scale[clip, frame, subject].item() / 32)
            expected = [math.sin(now), math.cos(now), now - before, size]
            assert poses[clip, frame, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)
    assert (poses[:, 0, 2] == 0).all()


def test_more_subjects_turn_where_more_are_to(world: w.World):
    def turning(share: float) -> float:
        motions = world.motions(200, rng(5), two_subjects=0, camera=0, turning=share)
        return (motions.rotation[:, :, 0].amax(1) - motions.rotation[:, :, 0].amin(1) > 0.3).float().mean().item()

    assert turning(0.0) + 0.1 < turning(0.35) < turning(1.0) - 0.1


def test_cameras_go_further_where_more_of_them_are_swift(world: w.World):
    def travelled(swift: float) -> float:
        motions = world.motions(400, rng(5), camera=1, swift=swift)
        return motions.camera[..., :2].norm(dim=-1).amax(1).mean().item()

    assert travelled(0.0) * 1.05 < travelled(0.5) < travelled(1.0) / 1.05


def test_the_drift_of_a_camera_may_zoom_and_roll_and_its_other_half_does_not(world: w.World):
    motions = world.motions(600, rng(6), camera=1)
    drifts = motions.camera[motions.camera_family == w.CAMERA_FAMILIES.index("drift")]
    for curve, most in ((2, 0.41), (3, 0.71)):
        spans = drifts[..., curve].amax(1) - drifts[..., curve].amin(1)
        assert 0.35 < (spans > 1e-4).float().mean() < 0.65
        assert 0.05 < spans.max() < most


def test_two_appearances_of_a_motion_move_alike(world: w.World):
    motions = world.motions(1, rng(3), two_subjects=0, camera=0)
    first = silhouettes(world, motions, dressed(world, motions, 1, "heart"))
    second = silhouettes(world, motions, dressed(world, motions, 2, "ball"))
    paths = [np.array([moments(mask)[:2] for mask in masks[0]]) for masks in (first, second)]
    assert np.abs(paths[0] - paths[1]).mean() < 1.5


def test_render_refuses_batches_of_different_length(world: w.World):
    with pytest.raises(ValueError, match="2 motions cannot be dressed in 3"):
        world.render(world.motions(2, rng(0)), world.appearances(3, rng(0)))


def test_frames_of_another_size_show_the_same(world: w.World, small_world: w.World):
    motions, looks = world.motions(2, rng(8)), world.appearances(2, rng(8))
    large = world.render(motions, looks).float()
    reduced = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).unflatten(0, large.shape[:2])
    assert (reduced - small_world.render(motions, looks).float()).abs().mean() < 6


# --- art --------------------------------------------------------------------------------------------------------------


def test_sprites_are_whole_centred_and_of_comparable_size():
    alpha = load_sprites()[:, 3]
    border = torch.cat([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], 1)
    assert border.mean(1).max() < 0.12  # only tips touch the edge of the cell
    at = torch.arange(64) + 0.5
    total = alpha.sum((1, 2))
    x, y = (alpha.sum(1) * at).sum(1) / total, (alpha.sum(2) * at).sum(1) / total
    assert (x - 32).abs().max() < 0.6
    assert (y - 32).abs().max() < 0.6
    assert (total / 64**2).min() > 0.2


def test_a_colour_is_recognised_on_every_subject(world: w.World):
    sprites = world._sprites[:, :, :, 0]
    tone = sprites[:, :, :3].sum((-1, -2)) / sprites[:, :, 3].sum((-1, -2))[..., None]
    tone = tone / tone.norm(dim=-1, keepdim=True)
    typical = torch.nn.functional.normalize(tone.mean(0), dim=-1)
    nearest = torch.einsum("scd,kd->sck", tone, typical).argmax(-1)
    assert (nearest == torch.arange(8)).float().mean() > 0.99


@pytest.mark.parametrize("scene", w.SCENES)
def test_scenes_show_movement_everywhere_and_are_painted_the_same_each_time(scene: str):
    canvases = np.stack([paint(scene, variant) for variant in range(8)])
    assert canvases.shape == (8, CANVAS, CANVAS, 3)
    assert (canvases[0] == paint(scene, 0)).all()
    assert (canvases[0] != canvases[1]).any()
    windows = canvases.mean(-1).reshape(8, 4, 96, 4, 96)
    assert windows.std((2, 4)).min() > 3


# --- footage ----------------------------------------------------------------------------------------------------------


def test_footage_keeps_the_motion_but_not_the_appearance(world: w.World):
    motions = world.motions(4, rng(0), two_subjects=0.5)
    looks = world.appearances(motions, rng(1))
    plain = world.render(motions, looks)
    real = world.render(motions, looks, realism=1.0, generator=rng(2))
    other = world.render(motions, world.appearances(motions, rng(9)), realism=1.0, generator=rng(2))
    assert real.shape == plain.shape
    assert (real.int() - plain.int()).abs().float().mean((1, 2, 3, 4)).min() > 10
    assert real.equal(other)
    assert world.render(motions, looks, realism=0.0).equal(plain)


def test_photographs_of_installed_packages_become_textures(tmp_path, monkeypatch):
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").touch()
    colour = (200, 20, 10)
    Image.new("RGB", (300, 200), colour).save(tmp_path / "skimage" / "data" / "coffee.png")
    monkeypatch.syspath_prepend(tmp_path)
    textures = paint_textures(2, 0)
    assert textures.shape[1:] == (3, CANVAS, CANVAS)
    shown = torch.tensor(colour).view(3, 1, 1) / 255
    assert any(torch.allclose(texture, shown.expand_as(texture), atol=0.01) for texture in textures[2:])


def test_compression_grows_with_its_strength():
    video = torch.from_numpy(np.stack([paint("city", 0)[:64, :64], paint("wood", 0)[:64, :64]])).float() / 255
    video = video.permute(0, 3, 1, 2)[:, :, None]
    errors = [(compress(video, torch.full((2,), s)) - video).square().mean().item() for s in (0.0, 0.3, 1.0, 3.0)]
    assert errors[0] < 1e-7
    assert errors == sorted(errors)
    assert errors[2] > 1e-5


def test_film_stays_in_range_and_differs_from_clip_to_clip():
    video = torch.full((3, 3, 4, 32, 32), 0.5)
    filmed = film(video, rng(0))
    assert filmed.min() >= 0
    assert filmed.max() <= 1
    assert (filmed[0] - filmed[1]).abs().mean() > 0.005


def test_the_sheet_shows_everything(tmp_path):
    w.sheet(tmp_path / "sheet.png", size=32)
    height, width, _ = cv2.imread(str(tmp_path / "sheet.png")).shape
    assert width == 16 * 32
    assert height > width
