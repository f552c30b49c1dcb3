"""A small network that reads rendered clips: what is shown, where it is, how it is turned and how the camera moves.

It is trained on the rendered world of `emt.synthetic.renderer`, whose every clip comes with its truth, and then
measures clips that a model generated in the style of that world. It knows nothing of real footage. Training it is in
`emt.evaluate.train_judge`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from emt.errors import EmtError
from emt.evaluate.alignment import align as align_steps
from emt.storage import apply_umask
from emt.synthetic.motions import discs

SIZE = 128  # side of the frames that the judge sees
STRIDE = 4  # pixels between the cells that are classified
GRID = SIZE // STRIDE
_REACH = 5  # cells that the search for the camera's motion reaches: 20 pixels a frame
USUAL_SIDE = 32.0  # sprite side at which log size is 0
_CROP = 40  # pixels of the square in which a subject is looked at
_AROUND = 1.35  # its side on the screen, in sides of the subject's sprite: turned corners stay inside
SHIPPED = Path(__file__).with_name("judge.safetensors")


@dataclass(frozen=True)
class JudgeVocabulary:
    """The words that a judge distinguishes."""

    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    scenes: tuple[str, ...]

    @classmethod
    def of_world(cls) -> JudgeVocabulary:
        """The words of `emt.synthetic.renderer`."""
        from emt.synthetic.renderer import COLOURS, SCENES, SUBJECTS

        return cls(SUBJECTS, COLOURS, SCENES)


@dataclass(frozen=True)
class Reading:
    """A judge's reading of clips; n clips of `frames` frames with up to two subjects each.

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
    """Outputs of the network for each frame; `GRID` × `GRID` cells."""

    heat: Tensor  # (n, cells) logits: the centre of a subject is here
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


def cells_of(device: torch.device) -> Tensor:
    """Centres of the cells in pixels: (cells, 2) x, y."""
    at = (torch.arange(GRID, device=device) + 0.5) * STRIDE
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


class Judge(nn.Module):
    """Subjects as heat-map peaks, looked at in a crop of their own size, and the camera from a correlation volume.

    The camera's step is a similarity transform fitted, by least squares weighted with the network's own confidence, to
    a dense prediction of how the scene moves, so zoom and roll come out of geometry.

    Args:
        vocabulary: The words to distinguish.
    """

    def __init__(self, vocabulary: JudgeVocabulary) -> None:
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
        """Device of the weights."""
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
        """Camera motion from each frame to the next.

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
        point = torch.view_as_complex(cells_of(flow.device) - SIZE / 2)
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
        self, clips: Tensor, subjects: Tensor, requested: Tensor | None = None, batch: int = 16, *, align: bool = False
    ) -> Reading:
        """Read whole clips.

        Args:
            clips: (n, frames, 3, height, width) uint8 or float in [0, 1]; other sizes than 128 are resized.
            subjects: (n,) how many subjects to find, 1 or 2.
            requested: (n, 2, 2) subject and colour (indices) that each of two subjects should be: which of the two
                found is called the first. What is found does not depend on it.
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
                    None if requested is None else requested[part].to(self.device),
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

    def _observe(self, clips: Tensor, subjects: Tensor, requested: Tensor | None, align: bool) -> Reading:
        n, frames = clips.shape[:2]
        flat = clips.flatten(0, 1)
        maps = self(flat)
        heat, cell = _peaks(maps.heat, 3)  # (n · frames, 3)
        position = _refine(maps, cell)
        scale = maps.size.gather(1, cell).clamp(-1.5, 1.5).exp() * USUAL_SIDE
        subject, colour, turn = self.identify(flat, position, scale)
        subject, colour = subject.softmax(-1), colour.softmax(-1)
        turn = (turn * subject[..., None]).sum(-2)

        def by_clip(field: Tensor) -> Tensor:
            return field.unflatten(0, (n, frames))

        # Which peak each subject is: (n, frames, 2).
        order = _assign(by_clip(heat), by_clip(subject), by_clip(colour), subjects, requested)

        def pick(field: Tensor) -> Tensor:
            index = order[(...,) + (None,) * (field.ndim - 2)].expand(*order.shape, *field.shape[2:])
            return by_clip(field).gather(2, index)

        presence, position, scale = pick(heat), pick(position), pick(scale)
        weight = presence[..., None] / presence.sum(1)[:, None, :, None].clamp(min=1e-6)
        sin, cos = pick(turn).unbind(-1)
        steps = self.camera_steps(frames_of(maps, n, frames, slice(0, -1)), frames_of(maps, n, frames, slice(1, None)))
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
        apply_umask(Path(path))
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
                "Train one: python -m emt.evaluate.train_judge train --minutes 2 --device cuda judge.safetensors",
            )
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            words = {name: tuple(json.loads(metadata[name])) for name in ("subjects", "colours", "scenes")}
            judge = cls(JudgeVocabulary(**words))
            judge.load_state_dict(
                state | {k: v for k, v in judge.state_dict().items() if k not in state and "num_" in k}
            )
        except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise EmtError(f"{path} is not a judge of this version.", str(error).splitlines()[0]) from error
        return judge.to(device).eval()


def frames_of(maps: Maps, n: int, frames: int, part: slice) -> Maps:
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
    votes = (cells_of(cell.device).T + maps.offset * STRIDE) * probability[:, None]
    # Cells beyond the border have no vote: zero padding gives them no weight.
    both = torch.cat([votes, probability[:, None]], 1).unflatten(2, (GRID, GRID))
    summed = F.avg_pool2d(both, 3, 1, 1).flatten(2).gather(2, cell[:, None].expand(-1, 3, -1))
    return (summed[:, :2] / summed[:, 2:].clamp(min=1e-9)).transpose(1, 2)


def _assign(heat: Tensor, subject: Tensor, colour: Tensor, subjects: Tensor, requested: Tensor | None) -> Tensor:
    """Which peaks are the subjects: (n, frames, 2).

    One subject is the highest peak. Two are the pair of peaks, in the order, that heat and (where requested) subject
    and colour speak for most.
    """
    log_heat = heat.clamp(min=1e-4).log()
    pairs = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]], device=heat.device)
    score = log_heat[..., pairs].sum(-1)  # (n, frames, 6)
    if requested is not None:
        for slot in range(2):
            words = [
                field.gather(-1, requested[:, None, None, slot, i, None].expand(*field.shape[:3], 1))[..., 0]
                for i, field in enumerate((subject, colour))
            ]
            liking = ((words[0] + words[1]) / 2 + 0.02).log()
            score = score + liking[..., pairs[:, slot]]
    two = pairs[score.argmax(-1)]
    return torch.where((subjects == 2)[:, None, None], two, pairs[0])


# Prompts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Things that a prompt names, as indices into a judge's vocabulary; `None` where it names no such thing."""

    subjects: tuple[int, ...]
    colours: tuple[int | None, ...]
    scene: int | None


def read_prompt(prompt: str, vocabulary: JudgeVocabulary) -> Prompt | None:
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
    """Text alignment of each clip, by a judge: the mean probability of each thing that the prompt names.

    Args:
        judge: The judge.
        clips: (n, frames, 3, height, width) uint8.
        prompts: What should be seen in each.

    Returns:
        Numbers in [0, 1]; `None` where the prompt names no subject that the judge knows.
    """
    requested = [read_prompt(prompt, judge.vocabulary) for prompt in prompts]
    known = [(place, prompt) for place, prompt in enumerate(requested) if prompt is not None]
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
