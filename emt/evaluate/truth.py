"""Motion of generated clips of the rendered world, measured against the exact truth."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emt.errors import EmtError
from emt.evaluate.camera import REACH
from emt.evaluate.judge import SIZE, Judge, JudgeVocabulary, Reading
from emt.evaluate.statistics import Estimate, mean, pooled_pearson
from emt.synthetic.motions import shortest

if TYPE_CHECKING:
    from emt.synthetic.renderer import Appearances, Motions, World

MEASURES: dict[str, str] = {
    "displacement": "object displacement, Pearson",
    "position_error": "position error, pixels of 128",
    "size": "size (log area), Pearson",
    "rotation": "rotation, Pearson",
    "pan_x": "camera pan x, Pearson",
    "pan_y": "camera pan y, Pearson",
    "zoom": "camera zoom, Pearson",
    "roll": "camera roll, Pearson",
    "camera": "camera, the four curves in equal units, Pearson",
    "still_camera": "camera drift where it should rest, pixels of 128",
    "two_displacement": "two subjects: displacement of each, Pearson",
    "two_position_error": "two subjects: position error, pixels of 128",
    "subject": "subject right",
    "colour": "colour right",
    "scene": "scene right",
    "leak_subject": "reference's subject instead",
    "leak_colour": "reference's colour instead",
    "leak_scene": "reference's scene instead",
    "leakage": "reference's appearance leaking (any of the three)",
}
"""The rows of the table: name and description."""

TARGETS: dict[str, float] = {
    "displacement": 0.98,
    "position_error": 3.0,
    "size": 0.95,
    "rotation": 0.8,
    "pan_x": 0.9,
    "pan_y": 0.9,
    "zoom": 0.9,
    "roll": 0.9,
    "two_displacement": 0.9,
    "subject": 0.95,
    "colour": 0.95,
    "scene": 0.95,
    "leakage": 0.01,
}
"""Targets of the shipped small model on held-out motions: at least this, or for `AT_MOST` at most this."""

AT_MOST = ("position_error", "leakage")
"""Measures that are better the smaller they are, of those that have targets."""

Truth = dict[str, Estimate]

_CAMERA_UNITS = torch.tensor([1.0, 1.0, REACH * SIZE, REACH * SIZE])


def evaluate_truth(
    judge: Judge,
    clips: Tensor,
    motions: Motions,
    appearances: Appearances,
    reference: Appearances | None = None,
    *,
    camera: Tensor | None = None,
    seed: int = 0,
) -> Truth:
    """Measure generated clips against the motion that they should play and the requested appearance.

    Args:
        judge: Reads the clips; of the same vocabulary as the world.
        clips: (n, frames, 3, height, width) uint8.
        motions: The n motions that the references play.
        appearances: What the prompts ask for.
        reference: What the references show; without it leakage is not measured.
        camera: Camera curves measured otherwise, such as by `camera_curves`, in place of the judge's, which aligns
            frames (`Judge.observe`).
        seed: Seed of the bootstrap.

    Returns:
        An estimate with a confidence interval for each of `MEASURES`; see `compare`.

    Raises:
        EmtError: The numbers of clips or frames differ, or the judge does not know the world.
    """
    if judge.vocabulary != JudgeVocabulary.of_world():
        raise EmtError(
            "The judge was trained on another vocabulary than this world's.",
            "Train it again: python -m emt.evaluate.train_judge train --minutes 2 --device cuda judge.safetensors",
        )
    if clips.shape[:2] != motions.position.shape[:2] or len(appearances) != len(clips):
        raise EmtError(
            f"{clips.shape[0]} clips of {clips.shape[1]} frames cannot be compared with {len(motions)} motions of "
            f"{motions.position.shape[1]} frames in {len(appearances)} appearances.",
            "Give one motion and one appearance for each clip.",
        )
    requested = torch.stack([appearances.subject, appearances.colour], -1)
    seen = judge.observe(clips, motions.subjects, requested, align=camera is None)
    if camera is not None:
        seen = replace(seen, camera=camera)
    return compare(seen, motions, appearances, reference, readable=judge.readable > 0, seed=seed)


def compare(
    seen: Reading,
    motions: Motions,
    appearances: Appearances,
    reference: Appearances | None,
    *,
    readable: Tensor,
    seed: int = 0,
) -> Truth:
    """The table of `MEASURES` from what was seen and what is true.

    Correlations are Pearson's over all frames of all clips together; intervals resample whole clips.

    - *Displacement* is the subject's position relative to frame 0, x and y, of clips with one subject;
      *position error* the mean distance to where it should be. With two subjects each is compared with its own path.
    - *Size* is the log of the sprite's area; *rotation* is unwrapped in time (`unwrap`) and relative to frame 0.
      Subjects that look alike under some rotation (a ball, a ring, a square, a star …) are left out of rotation:
      those that the judge misread on true renders when it was trained (`rotation_readable`).
    - *Camera* curves (cumulative pan, zoom, roll) are those of clips whose camera moves, one by one and all four
      together, as pixels that a typical point of the frame moves (`emt.evaluate.camera.camera_agreement`); where it
      does not move, the root-mean-square pan found is reported.
    - An attribute is *right* if the judge's first choice over the clip is the requested one, for each subject.
    - It *leaks* if the first choice is the reference's instead, where the two differ.

    Args:
        seen: What a judge saw in n clips.
        motions, appearances, reference: As for `evaluate_truth`.
        readable: (subjects,) bool: whose rotation counts.
        seed: Seed of the bootstrap.
    """
    seen = Reading(**{f.name: getattr(seen, f.name).float().cpu() for f in fields(Reading)})
    motions, appearances, readable = motions.to("cpu"), appearances.to("cpu"), readable.cpu()
    rows: dict[str, list] = {name: [] for name in MEASURES}
    for i in range(len(motions)):
        count = int(motions.subjects[i])
        prefix = "two_" if count == 2 else ""
        true, found = motions.position[i, :, :count], seen.position[i, :, :count]
        rows[prefix + "displacement"].append(_pair(true - true[:1], found - found[:1]))
        rows[prefix + "position_error"].append(float((true - found).norm(dim=-1).mean()))
        rows["size"].append(_pair(2 * motions.scale[i, :, :count].log(), 2 * seen.scale[i, :, :count].log()))
        turning = [slot for slot in range(count) if readable[appearances.subject[i, slot]]]
        if turning:
            turned = motions.rotation[i, :, turning]
            rows["rotation"].append(_pair(turned - turned[:1], unwrap(seen.rotation[i, :, turning])))
        camera = motions.camera[i]
        if camera.abs().amax() > 1e-3:
            for index, name in enumerate(("pan_x", "pan_y", "zoom", "roll")):
                rows[name].append(_pair(camera[:, index], seen.camera[i, :, index]))
            rows["camera"].append(_pair(camera * _CAMERA_UNITS, seen.camera[i] * _CAMERA_UNITS))
        else:
            rows["still_camera"].append(float(seen.camera[i, :, :2].square().sum(-1).mean().sqrt()))
        leaks = []
        for name in ("subject", "colour", "scene"):
            choice = getattr(seen, name)[i].argmax(-1).reshape(-1)[:count]
            wanted = getattr(appearances, name)[i].reshape(-1)[:count]
            rows[name].append(float((choice == wanted).all()))
            if reference is not None:
                had = getattr(reference, name)[i].cpu().reshape(-1)[:count]
                leaks.append(bool(((choice == had) & (choice != wanted)).any()))
                if (had != wanted).any():
                    rows[f"leak_{name}"].append(float(leaks[-1]))
        if leaks:
            rows["leakage"].append(float(any(leaks)))
    return {
        name: pooled_pearson(values, seed) if values and isinstance(values[0], tuple) else mean(values, seed)
        for name, values in rows.items()
    }


def camera_curves(clips: Tensor, workers: int = 1) -> Tensor:
    """Camera motion of clips by tracking points, as `Reading.camera`: an instrument that was not trained.

    Args:
        clips: (n, frames, 3, height, width) uint8.
        workers: Threads; a clip takes about a second.

    Returns:
        (n, frames, 4) pan x, pan y (pixels of 128), log zoom, roll.
    """
    from emt.evaluate.camera import camera_motion

    arrays = [clip.permute(0, 2, 3, 1).contiguous().numpy() for clip in clips.cpu()]
    with ThreadPoolExecutor(workers) as pool:
        curves = torch.from_numpy(np.stack([found.curves for found in pool.map(camera_motion, arrays)])).float()
    return curves * torch.tensor([SIZE, SIZE, 1.0, 1.0])


def _pair(true: Tensor, found: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return true.flatten().numpy(), found.flatten().numpy()


def unwrap(angle: Tensor) -> Tensor:
    """Angles (frames, …) as a continuous curve that starts at 0.

    The number of revolutions is found from the shortest turns of the mean direction of five frames: a single frame that
    was misread is off by half a turn at most, and adds no whole one to all that follow.
    """
    directions = F.pad(torch.polar(torch.ones_like(angle), angle).movedim(0, -1), (2, 2))
    mean = directions.unfold(-1, 5, 1).sum(-1).angle().movedim(-1, 0)
    step = shortest(mean.diff(dim=0))
    around = torch.cat([mean[:1], mean[:1] + step.cumsum(0)])
    curve = around + shortest(angle - around)
    return curve - curve[:1]


def judge_floor(judge: Judge, world: World, clips: int = 256, *, seed: int = 1, held_out: bool = True) -> Truth:
    """The judge's own error: the table of renders that play the motion exactly."""
    generator = torch.Generator(world.device).manual_seed(seed)
    motions, appearances, reference = draw_cases(world, clips, generator, held_out=held_out)
    return evaluate_truth(
        judge, world.render(motions, appearances, generator=generator), motions, appearances, reference
    )


def draw_cases(
    world: World, clips: int, generator: torch.Generator, *, held_out: bool = True
) -> tuple[Motions, Appearances, Appearances]:
    """Motions, and for each two appearances: the one to request and the reference's.

    A third have two subjects, half a moving camera. `held_out` requests families of motion and combinations
    of subject, colour and scene that training never shows; references are dressed in trained combinations.
    """
    motions = world.motions(clips, generator, held_out=held_out, two_subjects=0.33, camera=0.5)
    requested = world.appearances(motions, generator, held_out=held_out)
    return motions, requested, world.appearances(motions, generator, held_out=False)


def verdict(name: str, value: float, floor: float | None = None) -> str:
    """Verdict on a measure and its target: "met", "missed", or that the judge does not see it in true renders either.

    Args:
        name: Of `TARGETS`.
        value: The model's.
        floor: What the judge finds in renders that play the motion exactly.
    """

    def reaches(found: float) -> bool:
        return found <= TARGETS[name] if name in AT_MOST else found >= TARGETS[name]

    if reaches(value):
        return "met"
    return "missed" if floor is None or reaches(floor) else "missed, by the judge on true renders too"


def format_truth(columns: Truth | Mapping[str, Truth], *, floor: str | None = None, targets: bool = False) -> str:
    """The table as Markdown: one column, or several by name.

    Args:
        columns: What was measured.
        floor: Which of several columns is of true renders.
        targets: Whether to add `TARGETS`, and the `verdict` on the first column.
    """
    first = next(iter(columns.values()))
    named: Any = {"value": columns} if isinstance(first, Estimate) else columns
    heads = [*named, "target", "verdict"] if targets else [*named]
    lines = [f"| measure | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    tables = list(named.values())
    for name, description in MEASURES.items():
        cells = [str(table[name]) for table in tables]
        if targets and name in TARGETS and tables[0][name].clips:
            best = named[floor][name].value if floor is not None else None
            cells += [f"{'≤' if name in AT_MOST else '≥'} {TARGETS[name]:g}"]
            cells += [verdict(name, tables[0][name].value, best)]
        elif targets:
            cells += ["", ""]
        lines.append(f"| {description} | {' | '.join(cells)} |")
    return "\n".join(lines)
