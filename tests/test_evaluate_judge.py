"""The small judge, and the table that compares what it sees with the truth of the rendered world."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emt.errors import EmtError
from emt.evaluate import train_judge as train_judge_module
from emt.evaluate.alignment import Alignment
from emt.evaluate.judge import (
    SIZE,
    Judge,
    JudgeVocabulary,
    Prompt,
    Reading,
    compose,
    decompose,
    prompt_alignment,
    prompt_alignments,
    read_prompt,
)
from emt.evaluate.train_judge import degrade, judge_loss, main, rotation_readable, train_judge
from emt.evaluate.truth import (
    MEASURES,
    TARGETS,
    camera_curves,
    compare,
    evaluate_truth,
    format_truth,
    unwrap,
    verdict,
)
from emt.synthetic import renderer
from emt.synthetic.renderer import COLOURS, SCENES, SUBJECTS, World

WORDS = JudgeVocabulary(SUBJECTS, COLOURS, SCENES)


@functools.cache
def _painted() -> World:
    """A world of few paintings, which take longest and are the same whatever the number of frames."""
    return World(variants=1, textures=4)


def world_of(frames: int) -> World:
    world = copy.copy(_painted())
    world.frames = frames
    return world


@pytest.fixture
def world() -> World:
    return world_of(4)


@pytest.fixture(scope="module")
def cases():
    """40 motions of 16 frames, what is requested, and the references' looks."""
    world = world_of(16)
    generator = torch.Generator().manual_seed(0)
    motions = world.motions(40, generator, two_subjects=0.4, camera=0.5)
    return motions, world.appearances(motions, generator), world.appearances(motions, generator)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(WORDS).eval()


# The network --------------------------------------------------------------------------------------------------------


def test_the_judge_is_small(judge, tmp_path):
    assert sum(p.numel() for p in judge.parameters()) <= 600_000
    assert judge.save(tmp_path / "judge.safetensors").stat().st_size <= 1.2 * 2**20


def test_a_saved_judge_reads_the_same(judge, tmp_path):
    clips = torch.randint(0, 256, (1, 3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loaded = Judge.load(judge.save(tmp_path / "judge.safetensors"))
    assert loaded.vocabulary == WORDS
    for name in ("subject", "scene", "camera"):
        first, second = (getattr(j.observe(clips, torch.tensor([2])), name) for j in (judge, loaded))
        torch.testing.assert_close(first, second, atol=0.02, rtol=0.02)


def test_files_that_are_no_judge_are_named(tmp_path):
    with pytest.raises(EmtError, match="No judge at"):
        Judge.load(tmp_path / "missing.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"not this")
    with pytest.raises(EmtError, match=r"other\.safetensors is not a judge"):
        Judge.load(tmp_path / "other.safetensors")


def test_readings_have_the_documented_shapes_at_any_size(judge):
    clips = torch.randint(0, 256, (2, 3, 3, 96, 160), dtype=torch.uint8)
    reading = judge.observe(clips, torch.tensor([1, 2]), torch.zeros(2, 2, 2, dtype=torch.long), batch=1)
    shapes = {f.name: tuple(getattr(reading, f.name).shape) for f in fields(reading)}
    assert shapes == {
        "position": (2, 3, 2, 2),
        "scale": (2, 3, 2),
        "rotation": (2, 3, 2),
        "presence": (2, 3, 2),
        "subject": (2, 2, len(SUBJECTS)),
        "colour": (2, 2, len(COLOURS)),
        "scene": (2, len(SCENES)),
        "camera": (2, 3, 4),
    }
    assert reading.subject.sum(-1) == pytest.approx(1, abs=1e-4)


def test_camera_steps_compose_to_the_camera_they_came_from(cases):
    camera = cases[0].camera
    torch.testing.assert_close(compose(*decompose(camera)), camera, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("align", [False, True])
def test_flat_frames_give_numbers(judge, align):
    reading = judge.observe(torch.zeros(1, 3, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([2]), align=align)
    assert all(torch.isfinite(getattr(reading, f.name)).all() for f in fields(reading))


def moving_scenes(count: int) -> tuple[torch.Tensor, Any]:
    """Rendered clips, subjects and all, and their motions."""
    world = world_of(16)
    generator = torch.Generator().manual_seed(1)
    motions = world.motions(count, generator, camera=1.0, two_subjects=0.5)
    return world.render(motions, world.appearances(motions, generator)), motions


def test_aligned_frames_tell_the_camera_to_a_part_of_a_pixel():
    """Of all kinds of scenes and steps, though subjects go their own way; without aligning, it is off by more."""
    clips, motions = moving_scenes(10)
    judge, few = Judge.load(), 3
    error = (judge.observe(clips, motions.subjects, align=True).camera - motions.camera).abs()
    guessed = (judge.observe(clips[:few], motions.subjects[:few]).camera - motions.camera[:few]).abs()
    pan = error[..., :2].norm(dim=-1)
    assert pan.mean() < 0.1
    assert pan.quantile(0.95) < 0.25
    assert pan[:few].mean() < 0.3 * guessed[..., :2].norm(dim=-1).mean()
    assert error[..., 2:].mean() < 0.003


def test_of_several_guesses_the_one_that_explains_the_frames_is_taken():
    clips, motions = moving_scenes(6)
    a, b = (part[:, 0] for part in decompose(motions.camera[:, :2]))
    first, second = (clips[:, frame].float() / 255 for frame in (0, 1))
    alignment = Alignment(first, second, torch.ones(6, SIZE, SIZE))
    elsewhere, nowhere = (a, b + 9), (a, b + 1000)
    found = alignment.best([nowhere, elsewhere, (a, b)])
    assert torch.equal(found[0], a)
    assert torch.equal(found[1], b)


def test_scenes_that_leap_are_found_though_they_repeat():
    """Dots and stripes at 18 pixels a frame."""
    world = world_of(4)
    generator = torch.Generator().manual_seed(2)
    motions = world.motions(2, generator, camera=1.0, two_subjects=0.0)
    motions.camera = (
        torch.arange(4)[None, :, None] * torch.tensor([[14.0, 11.0, 0.02, 0.0], [-17.0, 6.0, 0.0, 0.01]])[:, None]
    )
    looks = world.appearances(motions, generator)
    looks.scene = torch.tensor([SCENES.index("dots"), SCENES.index("stripes")])
    found = Judge.load().observe(world.render(motions, looks), motions.subjects, align=True).camera
    error = (found - motions.camera).abs()
    assert error[..., :2].max() < 0.3
    assert error[..., 2:].max() < 0.005


def test_what_is_no_scene_does_not_move_an_alignment():
    """A texture that drifts by a whole pixel, a third of which another one covers that drifts the other way."""
    generator = torch.Generator().manual_seed(0)
    behind, before = torch.rand(2, 1, 3, SIZE + 8, SIZE + 8, generator=generator)
    behind, before = (F.avg_pool2d(texture, 5, 1, 2) for texture in (behind, before))
    frames = []
    for step in (0, 1):
        frame = behind[..., 4 : 4 + SIZE, 4 - step : 4 - step + SIZE].clone()
        frame[..., 40:110, 40:110] = before[..., 40:110, 40 + step : 110 + step]
        frames.append(frame)
    scene = torch.ones(1, SIZE, SIZE)
    rest = torch.ones(1, dtype=torch.complex64), torch.zeros(1, dtype=torch.complex64)
    a, b = Alignment(*frames, scene).refine(rest)
    assert abs(a.item() - 1) < 0.01
    assert abs(b.item() - 1) < 0.1
    scene[:, 36:114, 36:114] = 0
    a, b = Alignment(*frames, scene).refine(rest)
    assert abs(a.item() - 1) < 1e-3
    assert abs(b.item() - 1) < 0.02


def test_training_lowers_every_term_on_clips_it_has_seen(world):
    torch.manual_seed(0)
    judge = Judge(WORDS).train()
    generator = torch.Generator().manual_seed(0)
    motions = world.motions(4, generator, camera=1.0)
    appearances = world.appearances(motions, generator)
    frames = world.render(motions, appearances).float() / 255
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    seen = []
    for _ in range(16):
        terms = judge_loss(judge, frames, motions, appearances, generator)
        seen.append({name: float(term.detach()) for name, term in terms.items()})
        optimiser.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimiser.step()
    assert all(math.isfinite(value) for terms in seen for value in terms.values())
    for name in ("heat", "offset", "subject", "colour", "scene", "flow", "camera"):
        assert min(terms[name] for terms in seen[-4:]) < 0.8 * seen[0][name], name


def test_training_on_the_world_runs_to_the_end_and_returns_a_working_judge(world, monkeypatch):
    # One clip of each subject says which can be read, in place of eight: those take most of the time.
    monkeypatch.setattr(train_judge_module, "rotation_readable", functools.partial(rotation_readable, clips=1))
    steps = []
    judge = train_judge(
        world, windows=2, steps=20, progress=lambda step, share, terms: steps.append((step, share, terms))
    )
    assert [step for step, _, _ in steps] == [20]
    assert not judge.training
    assert set(judge.readable.tolist()) <= {0.0, 1.0}


def test_degraded_frames_stay_like_what_they_were():
    frames = torch.rand(2, 3, 3, 1, 1).expand(2, 3, 3, 64, 64).contiguous()
    through = []
    degraded = degrade(frames, torch.Generator().manual_seed(0), lambda x: through.append(len(x)) or x)
    assert through == [3]  # one of two clips goes through the VAE, with all of its frames
    assert degraded.shape == frames.shape
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    assert 0 < (degraded - frames).abs().mean() < 0.1


def test_the_program_prints_a_judges_own_errors(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(renderer, "World", lambda device: world_of(4))
    path = judge.save(tmp_path / "judge.safetensors")
    main(["check", str(path), "--clips", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert all(description in printed for description in MEASURES.values())


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_read_as_the_world_writes_them(cases):
    motions, requested, _ = cases
    for i, caption in enumerate(world_of(16).captions(requested, motions)):
        count = int(motions.subjects[i])
        expected = Prompt(
            tuple(requested.subject[i, :count].tolist()),
            tuple(requested.colour[i, :count].tolist()),
            int(requested.scene[i]),
        )
        assert read_prompt(caption, WORDS) == expected


def test_prompts_that_name_no_subject_are_not_read():
    assert read_prompt("a knight in shining armour", WORDS) is None
    assert read_prompt("", WORDS) is None


def test_alignment_is_a_share_of_what_the_prompt_names(judge):
    frames = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    value = prompt_alignment(judge, frames, f"a red {SUBJECTS[0]} and a blue {SUBJECTS[1]}")
    assert value is not None
    assert 0 <= value <= 1
    assert prompt_alignment(judge, frames, "a knight") is None


def test_clips_read_together_align_as_each_alone(judge):
    clips = torch.randint(0, 255, (3, 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = [f"a red {SUBJECTS[0]} and a blue {SUBJECTS[1]}", "a knight", f"a {SUBJECTS[2]} in the {SCENES[0]}"]
    alone = [prompt_alignment(judge, clip.permute(0, 2, 3, 1).numpy(), text) for clip, text in zip(clips, prompts)]
    assert prompt_alignments(judge, clips, prompts) == pytest.approx(alone, abs=1e-5)


# The table ----------------------------------------------------------------------------------------------------------


def true_reading(motions, looks) -> Reading:
    """What a judge without error would see."""
    return Reading(
        position=motions.position,
        scale=motions.scale.clamp(min=1),
        rotation=torch.remainder(motions.rotation + math.pi, 2 * math.pi) - math.pi,
        presence=torch.ones_like(motions.scale),
        subject=torch.nn.functional.one_hot(looks.subject, len(SUBJECTS)).float(),
        colour=torch.nn.functional.one_hot(looks.colour, len(COLOURS)).float(),
        scene=torch.nn.functional.one_hot(looks.scene, len(SCENES)).float(),
        camera=motions.camera,
    )


def table(cases, **changes):
    motions, requested, reference = cases
    seen = replace(true_reading(motions, requested), **changes)
    return compare(seen, motions, requested, reference, readable=torch.ones(len(SUBJECTS)))


def test_a_result_that_is_the_truth_gets_a_perfect_table(cases):
    values = table(cases)
    for name in ("displacement", "two_displacement", "size", "rotation", "pan_x", "pan_y", "zoom", "roll", "camera"):
        assert values[name].value == pytest.approx(1, abs=1e-4), name
    for name in ("subject", "colour", "scene"):
        assert values[name].value == 1
    for name in ("position_error", "two_position_error", "still_camera", "leakage"):
        assert values[name].value == 0


def test_a_result_that_shows_the_reference_leaks_in_every_clip_that_differs(cases):
    motions, requested, reference = cases
    seen = true_reading(motions, reference)
    values = compare(seen, motions, requested, reference, readable=torch.ones(len(SUBJECTS)))
    for name in ("leak_subject", "leak_colour", "leak_scene", "leakage"):
        assert values[name].value == 1, name
    assert values["scene"].value == pytest.approx(float((requested.scene == reference.scene).float().mean()))


def test_errors_are_measured_in_their_units(cases):
    motions = cases[0]
    shifted = motions.position + torch.tensor([3.0, 4.0])
    assert table(cases, position=shifted)["position_error"].value == pytest.approx(5, abs=1e-4)
    assert table(cases, position=shifted)["displacement"].value == pytest.approx(1, abs=1e-4)
    drifting = motions.camera + torch.tensor([3.0, 4.0, 0, 0])
    assert table(cases, camera=drifting)["still_camera"].value == pytest.approx(5, abs=1e-4)
    assert table(cases, camera=-motions.camera)["roll"].value == pytest.approx(-1, abs=1e-4)
    assert abs(table(cases, position=motions.position.roll(7, 0))["displacement"].value) < 0.6


def test_correlations_fall_as_errors_grow(cases):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(cases[0].position.shape, generator=generator)
    rows = [table(cases, position=cases[0].position + strength * noise)["displacement"] for strength in (0, 5, 20, 80)]
    values = [row.value for row in rows]
    assert values == sorted(values, reverse=True)
    assert all(row.low <= row.value <= row.high for row in rows)


def test_rotation_of_unreadable_subjects_does_not_count(cases):
    motions, requested, reference = cases
    wrong = replace(true_reading(motions, requested), rotation=torch.zeros_like(motions.rotation))
    values = compare(wrong, motions, requested, reference, readable=torch.zeros(len(SUBJECTS)))
    assert values["rotation"].clips == 0
    assert math.isnan(values["rotation"].value)


def test_tracked_points_tell_the_camera_of_a_rendered_clip():
    pytest.importorskip("cv2")
    world = world_of(6)
    generator = torch.Generator().manual_seed(3)
    motions = world.motions(2, generator, camera=1.0)
    clips = world.render(motions, world.appearances(motions, generator))
    error = (camera_curves(clips, workers=2) - motions.camera).abs()
    assert error[..., :2].max() < 1.5
    assert error[..., 2:].max() < 0.03


def test_unwrapped_rotation_runs_on_past_half_a_turn():
    true = torch.linspace(0, 9, 16)[:, None]
    wrapped = torch.remainder(true + 2 + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(unwrap(wrapped), true)


@pytest.mark.parametrize("frame", [1, 7, 14])
def test_a_frame_that_was_misread_is_no_whole_turn_for_those_that_follow(frame):
    true = torch.linspace(0, 6, 16)[:, None]
    read = true.clone()
    read[frame] += 3.0
    found = unwrap(torch.remainder(read + math.pi, 2 * math.pi) - math.pi)
    others = [i for i in range(16) if i != frame]
    torch.testing.assert_close(found[others], true[others])
    assert abs(found[frame] - true[frame]) < 1.1 * math.pi


def test_the_table_prints_every_measure_for_every_column(cases):
    text = format_truth({"adapted": table(cases), "floor": table(cases)})
    assert len(text.splitlines()) == 2 + len(MEASURES)
    assert "| measure | adapted | floor |" in text
    assert "| subject right | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |" in text


def test_the_table_says_which_targets_are_met(cases):
    perfect, wrong = table(cases), table(cases, position=cases[0].position + 4.0, camera=-cases[0].camera)
    lines = format_truth({"adapted": wrong, "floor": perfect}, floor="floor", targets=True).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    cells = {row[0]: row[-2:] for row in rows}
    assert sum(target != "" for target, _ in cells.values()) == len(TARGETS)
    assert cells[MEASURES["displacement"]] == ["≥ 0.98", "met"]
    assert cells[MEASURES["position_error"]] == ["≤ 3", "missed"]
    assert cells[MEASURES["roll"]] == ["≥ 0.9", "missed"]
    assert cells[MEASURES["leakage"]] == ["≤ 0.01", "met"]
    assert verdict("roll", 0.7, floor=0.8) == "missed, by the judge on true renders too"


def test_clips_and_motions_must_match(judge, cases):
    motions, requested, _ = cases
    with pytest.raises(EmtError, match="cannot be compared"):
        evaluate_truth(judge, torch.zeros(3, 16, 3, SIZE, SIZE, dtype=torch.uint8), motions, requested)


def test_a_judge_of_other_words_is_refused(cases):
    motions, requested, _ = cases
    other = Judge(JudgeVocabulary(("knight",), ("red",), ("castle",)))
    with pytest.raises(EmtError, match="another vocabulary"):
        evaluate_truth(other, torch.zeros(40, 16, 3, SIZE, SIZE, dtype=torch.uint8), motions, requested)
