"""A small network that reads rendered clips: what is shown, where it is, how it is turned and how the camera moves.

It is trained on the rendered world of `emt.synthetic.renderer`, whose every clip comes with its truth, and then
measures clips that a model generated in the style of that world. It knows nothing of real footage.

    python -m emt.evaluate.judge train --minutes 2 --device cuda judge.safetensors
    python -m emt.evaluate.judge check judge.safetensors
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from emt.errors import EmtError
from emt.evaluate.alignment import align as align_steps
from emt.synthetic.motions import discs, shortest

if TYPE_CHECKING:
    from emt.synthetic.renderer import Appearances, Motions, World

SIZE = 128  # side of the frames that the judge sees
STRIDE = 4  # pixels between the cells that say what lies at them
GRID = SIZE // STRIDE
_REACH = 5  # cells that the search for the camera's motion reaches: 20 pixels a frame
_USUAL_SIDE = 32.0  # sprite side at which log size is 0
_CROP = 40  # pixels of the square in which a subject is looked at
_AROUND = 1.35  # its side on the screen, in sides of the subject's sprite: turned corners stay inside
SHIPPED = Path(__file__).with_name("judge.safetensors")


@dataclass(frozen=True)
class Vocabulary:
    """The words that a judge tells apart."""

    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    scenes: tuple[str, ...]

    @classmethod
    def of_world(cls) -> Vocabulary:
        """The words of `emt.synthetic.renderer`."""
        from emt.synthetic.renderer import COLOURS, SCENES, SUBJECTS

        return cls(SUBJECTS, COLOURS, SCENES)


@dataclass(frozen=True)
class Reading:
    """What a judge sees in clips; n clips of `frames` frames with up to two subjects each.

    Attributes:
        position: (n, frames, 2, 2) centres of the subjects in pixels of a 128 frame.
        scale: (n, frames, 2) side of the subjects' sprites in pixels of a 128 frame.
        rotation: (n, frames, 2) radians in (−π, π], clockwise, 0 upright.
        presence: (n, frames, 2) in [0, 1]: how sure it is that a subject is there.
        subject: (n, 2, subjects) probabilities over the clip.
        colour: (n, 2, colours) probabilities over the clip.
        scene: (n, scenes) probabilities over the clip.
        camera: (n, frames, 4) pan x, pan y (pixels of 128), log zoom and roll relative to frame 0, as in
            `emt.synthetic.motions.Motions`.
    """

    position: Tensor
    scale: Tensor
    rotation: Tensor
    presence: Tensor
    subject: Tensor
    colour: Tensor
    scene: Tensor
    camera: Tensor


@dataclass(frozen=True)
class Maps:
    """What the network says of each frame; `GRID` × `GRID` cells."""

    heat: Tensor  # (n, cells) logits: the centre of a subject lies here
    offset: Tensor  # (n, 2, cells) from the cell's centre to the subject's, in cells
    size: Tensor  # (n, cells) log(side / 32)
    scene: Tensor  # (n, scenes) logits
    matching: Tensor  # (n, 24, GRID, GRID) unit features for the camera
    context: Tensor  # (n, 48, GRID, GRID)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _cells(device: torch.device) -> Tensor:
    """Centres of the cells in pixels: (cells, 2) x, y."""
    at = (torch.arange(GRID, device=device) + 0.5) * STRIDE
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


class Judge(nn.Module):
    """Subjects as heat-map peaks, looked at in a crop of their own size, and the camera from a correlation volume.

    The camera's step is a similarity transform fitted, by least squares weighted with the network's own confidence, to
    a dense prediction of how the scene moves, so zoom and roll come out of geometry.

    Args:
        vocabulary: The words to tell apart.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.stem = nn.Sequential(_conv(3, 16, 5, 2), _conv(16, 32, 3, 2), _Block(32))
        self.middle = nn.Sequential(_conv(32, 64, 3, 2), _Block(64))
        self.deep = nn.Sequential(_conv(64, 96, 3, 2), _Block(96))
        self.deep_to_middle = nn.Conv2d(96, 64, 1)
        self.join_middle = _conv(64, 64)
        self.middle_to_fine = nn.Conv2d(64, 48, 1)
        self.fine = nn.Conv2d(32, 48, 1)
        self.join_fine = _conv(48, 48)
        self.read = _conv(48, 64)
        self.out = nn.Conv2d(64, 4, 1)
        self.look = nn.Sequential(
            _conv(3, 24, 5, 2), _conv(24, 48, 3, 2), _conv(48, 72, 3, 2), _conv(72, 96), nn.AdaptiveAvgPool2d(1)
        )
        # Where upright is depends on the subject, so each has its own sin and cos.
        self.name = nn.Linear(96, 3 * len(vocabulary.subjects) + len(vocabulary.colours))
        self.standard = nn.BatchNorm1d(32 + 64 + 96, affine=False)
        self.scene = nn.Linear(32 + 64 + 96, len(vocabulary.scenes))
        self.match = nn.Conv2d(32, 24, 1)
        self.compare = nn.Sequential(_conv((2 * _REACH + 1) ** 2 + 48, 48, 1), _conv(48, 32), _conv(32, 32))
        self.flow = nn.Conv2d(32, 3, 1)
        # Which subjects' rotation can be read; a ball's cannot.
        self.readable: Tensor
        self.register_buffer("readable", torch.ones(len(vocabulary.subjects)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.scene.weight.device

    def forward(self, frames: Tensor) -> Maps:
        """Read frames, (n, 3, 128, 128) in [0, 1]."""
        x1 = self.stem(frames * 4 - 2)  # (n, 32, 32, 32)
        x2 = self.middle(x1)  # (n, 64, 16, 16)
        x3 = self.deep(x2)  # (n, 96, 8, 8)
        up = F.interpolate(self.deep_to_middle(x3), scale_factor=2.0, mode="bilinear")
        up = self.middle_to_fine(self.join_middle(x2 + up))
        context = self.join_fine(self.fine(x1) + F.interpolate(up, scale_factor=2.0, mode="bilinear"))
        out = self.out(self.read(context)).flatten(2).float()  # (n, 4, cells)
        pooled = self.standard(torch.cat([x.mean((2, 3)) for x in (x1, x2, x3)], 1).float())
        matching = F.normalize(self.match(x1).float(), dim=1)
        # Peaks are rare: training starts from a network that sees nothing anywhere.
        return Maps(out[:, 0] - 4, out[:, 1:3], out[:, 3], self.scene(pooled).float(), matching, context)

    def identify(self, frames: Tensor, position: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look at subjects at their own size.

        Args:
            frames: (n, 3, 128, 128) in [0, 1].
            position: (n, k, 2) centres in pixels.
            scale: (n, k) sprite sides in pixels.

        Returns:
            Logits of the subject (n, k, subjects) and the colour (n, k, colours), and sin and cos of each subject's
            rotation (n, k, subjects, 2).
        """
        n, k = scale.shape
        at = (torch.arange(_CROP, device=frames.device) + 0.5) / _CROP - 0.5
        offset = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (crop, crop, 2) x, y
        grid = position[:, :, None, None] + _AROUND * scale[:, :, None, None, None] * offset
        grid = (grid / SIZE * 2 - 1).flatten(1, 2)  # the crops of a frame below each other
        crops = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
        crops = crops.unflatten(2, (k, _CROP)).transpose(1, 2).flatten(0, 1)
        out = self.name(self.look(crops * 4 - 2).flatten(1)).float().unflatten(0, (n, k))
        count = len(self.vocabulary.subjects)
        subject, turn, colour = out.split([count, 2 * count, len(self.vocabulary.colours)], dim=-1)
        return subject, colour, turn.unflatten(-1, (count, 2))

    def scene_flow(self, first: Maps, second: Maps) -> tuple[Tensor, Tensor]:
        """How the scene moves from one frame to the next.

        Returns:
            Displacement in pixels (n, cells, 2) and the log of its expected error in cells (n, cells).
        """
        channels = first.matching.shape[1]
        side = 2 * _REACH + 1
        # The second frame's cells at each horizontal displacement, as views: (n, channels, rows, side, GRID).
        rows = F.pad(second.matching, (_REACH,) * 4).unfold(3, GRID, 1)
        volume = torch.stack(
            [(first.matching[:, :, :, None] * rows[:, :, dy : dy + GRID]).sum(1) for dy in range(side)], 1
        )
        # (n, side², GRID, GRID): cosine with the cell at each displacement.
        volume = volume.permute(0, 1, 3, 2, 4).flatten(1, 2)
        out = self.flow(self.compare(torch.cat([volume * math.sqrt(channels), first.context], 1)))
        out = out.flatten(2).float()
        return out[:, :2].transpose(1, 2) * STRIDE, out[:, 2].clamp(-5, 3)

    def camera_steps(self, first: Maps, second: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """The similarity transform of the scene between frames, and the flow it was fitted to.

        Returns:
            (n,) complex `a` and (n,) complex `b`: a point `p` (complex, pixels from the frame's centre) goes to
            `a p + b`; and `scene_flow`'s results as one tensor (n, cells, 3).
        """
        flow, error = self.scene_flow(first, second)
        point = torch.view_as_complex(_cells(flow.device) - SIZE / 2)
        target = point + torch.view_as_complex(flow.contiguous())
        weight = torch.exp(-2 * error)
        weight = weight / weight.sum(1, keepdim=True)
        centre, goal = (weight * point).sum(1), (weight * target).sum(1)
        from_centre, to_goal = point - centre[:, None], target - goal[:, None]
        a = (weight * from_centre.conj() * to_goal).sum(1) / (weight * from_centre.abs().square()).sum(1).clamp(
            min=1e-3
        )
        return a, goal - a * centre, torch.cat([flow, error[..., None]], -1)

    @torch.inference_mode()
    def observe(
        self, clips: Tensor, subjects: Tensor, asked: Tensor | None = None, batch: int = 16, *, align: bool = False
    ) -> Reading:
        """Read whole clips.

        Args:
            clips: (n, frames, 3, height, width) uint8 or float in [0, 1]; other sizes than 128 are resized.
            subjects: (n,) how many subjects to find, 1 or 2.
            asked: (n, 2, 2) subject and colour (indices) that each of two subjects should be: which of the two found
                is called the first. What is found does not depend on it.
            batch: Clips read at once.
            align: Make the camera exact by aligning frames (`emt.evaluate.alignment`), from what the network sees. A
                clip takes a second on a CPU.
        """
        self.eval()
        parts = []
        for start in range(0, len(clips), batch):
            part = slice(start, start + batch)
            parts.append(
                self._observe(
                    self._prepare(clips[part]),
                    subjects[part].to(self.device),
                    None if asked is None else asked[part].to(self.device),
                    align,
                )
            )
        return Reading(*(torch.cat([getattr(p, name) for p in parts]) for name in Reading.__dataclass_fields__))

    def _prepare(self, clips: Tensor) -> Tensor:
        clips = clips.to(self.device)
        clips = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
        if clips.shape[-2:] != (SIZE, SIZE):
            resized = F.interpolate(clips.flatten(0, 1), (SIZE, SIZE), mode="bilinear", antialias=True)
            clips = resized.unflatten(0, clips.shape[:2])
        return clips

    def _observe(self, clips: Tensor, subjects: Tensor, asked: Tensor | None, align: bool) -> Reading:
        n, frames = clips.shape[:2]
        flat = clips.flatten(0, 1)
        maps = self(flat)
        heat, cell = _peaks(maps.heat, 3)  # (n · frames, 3)
        position = _refine(maps, cell)
        scale = maps.size.gather(1, cell).clamp(-1.5, 1.5).exp() * _USUAL_SIDE
        subject, colour, turn = self.identify(flat, position, scale)
        subject, colour = subject.softmax(-1), colour.softmax(-1)
        turn = (turn * subject[..., None]).sum(-2)

        def by_clip(field: Tensor) -> Tensor:
            return field.unflatten(0, (n, frames))

        # Which peak each subject is: (n, frames, 2).
        order = _assign(by_clip(heat), by_clip(subject), by_clip(colour), subjects, asked)

        def pick(field: Tensor) -> Tensor:
            index = order[(...,) + (None,) * (field.ndim - 2)].expand(*order.shape, *field.shape[2:])
            return by_clip(field).gather(2, index)

        presence, position, scale = pick(heat), pick(position), pick(scale)
        weight = presence[..., None] / presence.sum(1)[:, None, :, None].clamp(min=1e-6)
        sin, cos = pick(turn).unbind(-1)
        steps = self.camera_steps(
            _frames_of(maps, n, frames, slice(0, -1)), _frames_of(maps, n, frames, slice(1, None))
        )
        transform = steps[:2]
        if align:
            hidden = _near_subjects(position, scale, presence)
            scene = ~(hidden[:, :-1] | hidden[:, 1:]).flatten(0, 1)
            transform = align_steps(clips[:, :-1].flatten(0, 1), clips[:, 1:].flatten(0, 1), scene, transform, n)
        a, b = (part.unflatten(0, (n, frames - 1)) for part in transform)
        return Reading(
            position=position,
            scale=scale,
            rotation=torch.atan2(sin, cos),
            presence=presence,
            subject=(pick(subject) * weight).sum(1),
            colour=(pick(colour) * weight).sum(1),
            scene=maps.scene.softmax(-1).unflatten(0, (n, frames)).mean(1),
            camera=compose(a, b),
        )

    def save(self, path: str | Path) -> Path:
        """Write the weights in half precision, with the vocabulary, as safetensors."""
        words = {name: json.dumps(getattr(self.vocabulary, name)) for name in ("subjects", "colours", "scenes")}
        state = {
            name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
            for name, value in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        save_file(state, str(path), metadata={"format": "emt-judge", **words})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path = SHIPPED, device: str | torch.device = "cpu") -> Judge:
        """Read a judge.

        Raises:
            EmtError: The file is missing or is not a judge.
        """
        if not Path(path).is_file():
            raise EmtError(
                f"No judge at {path}.",
                "Train one: python -m emt.evaluate.judge train --minutes 2 --device cuda judge.safetensors",
            )
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            words = {name: tuple(json.loads(metadata[name])) for name in ("subjects", "colours", "scenes")}
            judge = cls(Vocabulary(**words))
            judge.load_state_dict(
                state | {k: v for k, v in judge.state_dict().items() if k not in state and "num_" in k}
            )
        except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise EmtError(f"{path} is not a judge of this version.", str(error).splitlines()[0]) from error
        return judge.to(device).eval()


def _frames_of(maps: Maps, n: int, frames: int, part: slice) -> Maps:
    """The fields that the camera needs, for some frames of each clip."""

    def some(field: Tensor) -> Tensor:
        return field.unflatten(0, (n, frames))[:, part].flatten(0, 1)

    return replace(maps, matching=some(maps.matching), context=some(maps.context))


def _near_subjects(position: Tensor, scale: Tensor, presence: Tensor) -> Tensor:
    """Which pixels a subject that is there may cover: (n, frames, SIZE, SIZE) bool, from fields of a `Reading`."""
    return (discs(position, 0.65 * scale, SIZE) & (presence > 0.3)[..., None, None]).any(2)


def compose(a: Tensor, b: Tensor) -> Tensor:
    """Cumulative camera (n, steps + 1, 4): pan x, pan y, log zoom, roll; from steps `p -> a p + b` (n, steps)."""
    pan = torch.zeros_like(b[:, 0])
    pans = [pan]
    for step in range(a.shape[1]):
        pan = a[:, step] * pan + b[:, step]
        pans.append(pan)
    path = torch.stack(pans, 1)
    zoom = F.pad(a.abs().clamp(min=1e-3).log().cumsum(1), (1, 0))
    roll = F.pad(a.angle().cumsum(1), (1, 0))
    return torch.stack([path.real, path.imag, zoom, roll], -1)


def decompose(camera: Tensor) -> tuple[Tensor, Tensor]:
    """Steps from a cumulative camera (n, frames, 4): complex `a`, `b`, (n, frames − 1); inverse of `compose`."""
    total = torch.polar(camera[..., 2].exp(), camera[..., 3])
    pan = torch.complex(camera[..., 0].contiguous(), camera[..., 1].contiguous())
    a = total[:, 1:] / total[:, :-1]
    return a, pan[:, 1:] - a * pan[:, :-1]


def _peaks(heat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest local maxima of each heat map (n, cells): probabilities and cells, (n, count) each."""
    grid = heat.unflatten(1, (GRID, GRID))[:, None]
    highest = F.max_pool2d(grid, 5, 1, 2) == grid
    return torch.where(highest, grid.sigmoid(), 0.0).flatten(1).topk(count, dim=1)


def _refine(maps: Maps, cell: Tensor) -> Tensor:
    """Positions of peaks in pixels: the offsets that the 3 × 3 cells around vote for, weighted by their heat.

    `cell` (n, peaks); returns (n, peaks, 2).
    """
    probability = maps.heat.sigmoid()
    votes = (_cells(cell.device).T + maps.offset * STRIDE) * probability[:, None]
    # Cells beyond the border have no vote: zero padding gives them no weight.
    both = torch.cat([votes, probability[:, None]], 1).unflatten(2, (GRID, GRID))
    summed = F.avg_pool2d(both, 3, 1, 1).flatten(2).gather(2, cell[:, None].expand(-1, 3, -1))
    return (summed[:, :2] / summed[:, 2:].clamp(min=1e-9)).transpose(1, 2)


def _assign(heat: Tensor, subject: Tensor, colour: Tensor, subjects: Tensor, asked: Tensor | None) -> Tensor:
    """Which peaks are the subjects: (n, frames, 2).

    One subject is the highest peak. Two are the pair of peaks, in the order, that heat and (where asked for) subject
    and colour speak for most.
    """
    log_heat = heat.clamp(min=1e-4).log()
    pairs = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]], device=heat.device)
    score = log_heat[..., pairs].sum(-1)  # (n, frames, 6)
    if asked is not None:
        for slot in range(2):
            words = [
                field.gather(-1, asked[:, None, None, slot, i, None].expand(*field.shape[:3], 1))[..., 0]
                for i, field in enumerate((subject, colour))
            ]
            liking = ((words[0] + words[1]) / 2 + 0.02).log()
            score = score + liking[..., pairs[:, slot]]
    two = pairs[score.argmax(-1)]
    return torch.where((subjects == 2)[:, None, None], two, pairs[0])


# Training -----------------------------------------------------------------------------------------------------------


def judge_loss(
    judge: Judge, frames: Tensor, motions: Motions, appearances: Appearances, generator: torch.Generator
) -> dict[str, Tensor]:
    """The terms of the training loss on short clips.

    Args:
        judge: The network, in training mode.
        frames: (n, frames, 3, 128, 128) in [0, 1].
        motions, appearances: Their truth.
        generator: Source of randomness, on the frames' device.
    """
    n, count = frames.shape[:2]
    maps = judge(frames.flatten(0, 1))
    cells = _cells(frames.device)
    position = motions.position.flatten(0, 1)  # (n · frames, 2, 2)
    present = motions.scale.flatten(0, 1) > 0
    inside = present & ((position > 0) & (position < SIZE)).all(-1)
    distance = (cells[None, None] - position[:, :, None]).square().sum(-1)  # (n · frames, 2, cells)
    near = torch.exp(-distance / (2 * STRIDE**2)) * inside[..., None]
    closeness, nearest = near.max(1)
    # CenterNet's focal loss: cells next to a centre are punished less for claiming it.
    probability = maps.heat.sigmoid().clamp(1e-5, 1 - 1e-5)
    centre = (distance == distance.amin(-1, keepdim=True)).logical_and(inside[..., None]).any(1)
    hit = (1 - probability) ** 2 * -probability.log()
    miss = probability**2 * (1 - closeness) ** 4 * -(1 - probability).log()
    total = inside.sum().clamp(min=1)

    weight = torch.where(closeness > 0.3, closeness, 0.0)
    weight = weight / weight.sum()

    def nearest_of(values: Tensor) -> Tensor:  # (n · frames, 2) -> (n · frames, cells)
        return values.gather(1, nearest)

    def everywhere(values: Tensor) -> Tensor:  # (n, 2) -> (n · frames, 2)
        return values[:, None].expand(n, count, 2).flatten(0, 1)

    goal = torch.stack([nearest_of(position[..., i]) for i in range(2)], 1)
    offset = ((goal - cells.T) / STRIDE - maps.offset).abs().sum(1)
    size = (nearest_of(motions.scale.flatten(0, 1).clamp(min=1) / _USUAL_SIDE).log() - maps.size).abs()
    # The crops are off by about as much as the peaks that they will be taken at.
    true_scale = motions.scale.flatten(0, 1).clamp(min=8)
    seen_at = position + 1.5 * torch.randn(position.shape, generator=generator, device=position.device)
    off = 0.1 * torch.randn(true_scale.shape, generator=generator, device=position.device)
    subject, colour, turn = judge.identify(frames.flatten(0, 1), seen_at, true_scale * off.exp())
    kind, paint = everywhere(appearances.subject), everywhere(appearances.colour)
    turn = turn.gather(2, kind[..., None, None].expand(*kind.shape, 1, 2))[:, :, 0]
    rotation = motions.rotation.flatten(0, 1)
    turned = (torch.stack([rotation.sin(), rotation.cos()], -1) - turn).square().sum(-1)

    def of_subjects(values: Tensor) -> Tensor:  # (n · frames, 2) -> mean over those inside
        return (values * inside).sum() / total

    terms = {
        "heat": torch.where(centre, hit, miss).sum() / total,
        "offset": (offset * weight).sum(),
        "size": (size * weight).sum() * 2,
        "turn": of_subjects(turned),
        "subject": of_subjects(F.cross_entropy(subject.transpose(1, 2), kind, reduction="none")),
        "colour": of_subjects(F.cross_entropy(colour.transpose(1, 2), paint, reduction="none")) * 0.5,
        "scene": F.cross_entropy(maps.scene, appearances.scene.repeat_interleave(count)) * 0.5,
    }
    if count > 1:
        a, b = (part.flatten() for part in decompose(motions.camera))
        found_a, found_b, flow = judge.camera_steps(
            _frames_of(maps, n, count, slice(0, -1)), _frames_of(maps, n, count, slice(1, None))
        )
        point = torch.view_as_complex(cells - SIZE / 2)
        moved = torch.view_as_real((a[:, None] - 1) * point + b[:, None])
        error = (moved - flow[..., :2]).abs().sum(-1) / STRIDE
        # Laplace likelihood: the network says where it can be trusted, and the fit weighs its cells by that.
        terms["flow"] = (error * torch.exp(-flow[..., 2]) + 2 * flow[..., 2]).mean() * 0.5
        reach = SIZE * 0.4
        terms["camera"] = ((found_b - b).abs() + reach * (found_a - a).abs()).clamp(max=20).mean() * 0.25
    return terms


def degrade(frames: Tensor, generator: torch.Generator, roundtrip: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Make rendered clips look as if a model had made them: soft, noisy, a little off in tone.

    Args:
        frames: (n, frames, 3, height, width) in [0, 1].
        generator: Source of randomness, on the frames' device.
        roundtrip: Encodes and decodes frames (n, 3, height, width) in [0, 1] by the model's VAE; applied to a quarter.
    """
    n, count = frames.shape[:2]
    flat = frames.flatten(0, 1)
    device = frames.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    if roundtrip is not None:
        part = max(1, n // 4) * count
        flat = torch.cat([roundtrip(flat[:part]), flat[part:]])
    height, width = flat.shape[-2:]
    soft = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), "replicate"), 3, 1)
    low = F.interpolate(F.avg_pool2d(flat, 2), (height, width), mode="bilinear")
    mix = draw(n, 3, 1, 1, 1).repeat_interleave(count, 0)
    mix = torch.where(mix < 0.4, 0.0, mix)
    flat = flat + mix[:, 0] * 0.9 * (soft - flat)
    flat = flat + mix[:, 1] * 0.6 * (low - flat)
    gain = 1 + (draw(n, 3, 1, 1) - 0.5).repeat_interleave(count, 0) * 0.16
    shift = (draw(n, 3, 1, 1) - 0.5).repeat_interleave(count, 0) * 0.08
    fine = torch.randn(flat.shape, generator=generator, device=device)
    coarse = torch.randn((*flat.shape[:2], height // 8, width // 8), generator=generator, device=device)
    coarse = F.interpolate(coarse, (height, width), mode="bilinear")
    flat = flat * gain + shift + mix[:, 2] * (0.03 * fine + 0.05 * coarse)
    return flat.clamp(0, 1).unflatten(0, (n, count))


def train_judge(
    world: World,
    minutes: float = 1.5,
    device: str | torch.device | None = None,
    *,
    windows: int = 128,
    length: int = 2,
    seed: int = 0,
    steps: int | None = None,
    roundtrip: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, float, dict[str, float]], None] | None = None,
) -> Judge:
    """Train a judge on the rendered world, held-out motions and combinations included: it measures, it is not measured.

    Args:
        world: What to render, on `device`.
        minutes: Time to train for; the learning rate falls over it.
        device: Where to train; by default where the world is.
        windows: Clips of a batch.
        length: Consecutive frames taken of each clip; at least 2.
        seed: Seed of everything drawn.
        steps: Stop after so many steps instead of `minutes`.
        roundtrip: See `degrade`.
        progress: Called every 20 steps with the step, the share of the training done and the mean terms of the loss.

    Returns:
        The judge, in evaluation mode.
    """
    device = torch.device(device) if device is not None else world.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    judge = Judge(Vocabulary.of_world()).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    rate = 4e-3
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    # The world renders as many frames as it says; a window of a clip is rendered by a copy that says fewer.
    painter = copy.copy(world)
    painter.frames = length
    pool_size = max(64, 16 * windows)
    starts = random.Random(seed)
    begun = time.monotonic()
    step, kept = 0, []
    while True:
        share = step / steps if steps is not None else (time.monotonic() - begun) / (60 * minutes)
        if share >= 1:
            break
        if step % 24 == 0:
            held_out = step % 72 == 48
            pool = world.motions(pool_size, generator, held_out=held_out, two_subjects=0.35, camera=0.65)
        index = torch.randint(pool_size, (windows,), generator=generator, device=device)
        start = starts.randrange(world.frames - length + 1)
        motions = _window(pool[index], start, length)
        # The world keeps subjects nearly upright; what a model makes of them may not be.
        turned = torch.rand(windows, 1, 2, generator=generator, device=device)
        turned = torch.where(turned < 0.2, turned * (2 * math.pi / 0.2), 0.0)
        motions = replace(motions, rotation=motions.rotation + turned)
        appearances = world.appearances(motions, generator)
        frames = painter.render(motions, appearances).float() / 255
        frames = degrade(frames, generator, roundtrip)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * share))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            terms = judge_loss(judge, frames, motions, appearances, generator)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimiser.step()
        step += 1
        if progress is not None:
            kept.append({name: value.detach() for name, value in terms.items()})
            if step % 20 == 0:
                progress(step, share, {name: float(torch.stack([k[name] for k in kept]).mean()) for name in terms})
                kept.clear()
    judge.eval()
    judge.readable.copy_(rotation_readable(judge, world, generator))
    return judge


def rotation_readable(judge: Judge, world: World, generator: torch.Generator, clips: int = 8) -> Tensor:
    """Which subjects a judge reads the rotation of: (subjects,) 1 or 0.

    Those whose mean error on turned true renders is under 0.35 radians. It leaves out what looks alike under some
    rotation, without a list of such subjects to keep.
    """
    count = len(judge.vocabulary.subjects)
    painter = copy.copy(world)
    painter.frames = 2
    motions = _window(world.motions(count * clips, generator, two_subjects=0.0, camera=0.0), 0, 2)
    # Any angle, so that a symmetric subject cannot pass by being usually upright.
    turned = 2 * math.pi * torch.rand(count * clips, 1, 1, generator=generator, device=world.device)
    motions = replace(motions, rotation=turned.expand_as(motions.rotation))
    appearances = world.appearances(motions, generator)
    appearances.subject[:, 0] = torch.arange(count, device=world.device).repeat(clips)
    found = judge.observe(painter.render(motions, appearances, generator=generator), motions.subjects).rotation
    error = (found - motions.rotation.to(found.device))[..., 0]
    error = shortest(error).abs().mean(1)
    return (error.unflatten(0, (clips, count)).mean(0) < 0.35).float()


def _window(motions: Motions, start: int, length: int) -> Motions:
    """Some consecutive frames of motions, the camera relative to the first of them."""
    part = slice(start, start + length)
    camera = motions.camera[:, part]
    return replace(
        motions,
        position=motions.position[:, part],
        scale=motions.scale[:, part],
        rotation=motions.rotation[:, part],
        camera=compose(*decompose(camera)),
    )


# Prompts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What a prompt asks for, as indices into a judge's vocabulary; `None` where it names no such thing."""

    subjects: tuple[int, ...]
    colours: tuple[int | None, ...]
    scene: int | None


def read_prompt(prompt: str, vocabulary: Vocabulary) -> Prompt | None:
    """Find the words of a vocabulary in a prompt; `None` if it names no subject of it, or more than two.

    A colour belongs to the first subject named after it. A scene's name may be any word of the prompt that is not
    a subject's.
    """
    subjects: list[int] = []
    colours: list[int | None] = []
    colour: int | None = None
    scene: int | None = None
    for word in re.findall(r"[\w-]+", prompt.lower()):
        if word in vocabulary.colours:
            colour = vocabulary.colours.index(word)
        elif word in vocabulary.subjects:
            subjects.append(vocabulary.subjects.index(word))
            colours.append(colour)
            colour = None
        elif word in vocabulary.scenes:
            scene = vocabulary.scenes.index(word)
    if not 1 <= len(subjects) <= 2:
        return None
    return Prompt(tuple(subjects), tuple(colours), scene)


def prompt_alignments(judge: Judge, clips: Tensor, prompts: Sequence[str]) -> list[float | None]:
    """How much of its prompt a judge sees in each clip: the mean probability of each thing that the prompt names.

    Args:
        judge: The judge.
        clips: (n, frames, 3, height, width) uint8.
        prompts: What should be seen in each.

    Returns:
        Numbers in [0, 1]; `None` where the prompt names no subject that the judge knows.
    """
    asked = [read_prompt(prompt, judge.vocabulary) for prompt in prompts]
    known = [(place, prompt) for place, prompt in enumerate(asked) if prompt is not None]
    values: list[float | None] = [None] * len(prompts)
    if not known:
        return values
    queries = [[(s, c or 0) for s, c in zip(p.subjects, p.colours)] * (3 - len(p.subjects)) for _, p in known]
    counts = torch.tensor([len(p.subjects) for _, p in known])
    reading = judge.observe(clips[[place for place, _ in known]], counts, torch.tensor(queries))
    for i, (place, prompt) in enumerate(known):
        seen = [reading.subject[i, slot, s] for slot, s in enumerate(prompt.subjects)]
        seen += [reading.colour[i, slot, c] for slot, c in enumerate(prompt.colours) if c is not None]
        if prompt.scene is not None:
            seen.append(reading.scene[i, prompt.scene])
        values[place] = float(torch.stack(seen).mean())
    return values


def prompt_alignment(judge: Judge, frames: Any, prompt: str) -> float | None:
    """`prompt_alignments` of one clip, a uint8 array (frames, height, width, 3)."""
    return prompt_alignments(judge, torch.from_numpy(frames).permute(0, 3, 1, 2)[None], [prompt])[0]


def main(arguments: list[str] | None = None) -> None:
    """Train a judge, or check one against renders it has not seen."""
    parser = argparse.ArgumentParser(prog="python -m emt.evaluate.judge", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a judge on the rendered world")
    train.add_argument("output", type=Path)
    train.add_argument("--minutes", type=float, default=1.5)
    train.add_argument("--windows", type=int, default=128, help="clips of a batch")
    train.add_argument("--vae", help="folder of a VAE whose reconstructions it should read well")
    check = commands.add_parser("check", help="print the judge's own errors on fresh renders")
    check.add_argument("judge", type=Path)
    for command in (train, check):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--clips", type=int, default=256, help="clips to check on")
    options = parser.parse_args(arguments)

    from emt.evaluate.truth import format_truth, judge_floor
    from emt.synthetic.renderer import World

    world = World(device=options.device)
    if options.command == "train":
        judge = train_judge(
            world,
            options.minutes,
            windows=options.windows,
            seed=options.seed,
            roundtrip=_vae_roundtrip(options.vae, options.device) if options.vae else None,
            progress=_print_progress,
        )
        judge.save(options.output)
    else:
        judge = Judge.load(options.judge, options.device)
    print(format_truth(judge_floor(judge, world, options.clips, seed=options.seed + 1)))


def _print_progress(step: int, share: float, terms: dict[str, float]) -> None:
    print(f"{step:5d} {share:4.0%} " + " ".join(f"{name} {value:.3f}" for name, value in terms.items()), flush=True)


def _vae_roundtrip(folder: str, device: str) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).to(device).eval()

    @torch.no_grad()
    @torch.autocast(torch.device(device).type, torch.bfloat16)
    def roundtrip(frames: Tensor) -> Tensor:
        return (vae.decode(vae.encode(frames * 2 - 1).latent_dist.sample()).sample.float() / 2 + 0.5).clamp(0, 1)

    return roundtrip


if __name__ == "__main__":
    # Run as a program this file is a second module; the classes that others import are those of the first.
    from emt.evaluate import judge as module

    try:
        module.main()
    except EmtError as problem:
        raise SystemExit(f"error: {problem}") from None
