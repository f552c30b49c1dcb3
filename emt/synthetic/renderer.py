"""A rendered world in which the same motion is played by different subjects over different scenes.

Everything is drawn on the device in batches: scenes are sampled from painted canvases and subjects from a sprite
atlas, both with trilinear filtering. Two renderings of the same `Motions` with different `Appearances` are an exact
pair, and the motion of every clip is known exactly.

    python -m emt.synthetic.renderer sheet world.png       # what it looks like
"""

from __future__ import annotations

import argparse
import math
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from emt.synthetic.footage import cut_out, draw_outlines, film, paint_textures
from emt.synthetic.motions import (
    CAMERA_FAMILIES,
    FAMILIES,
    FRAME,
    HELD_OUT_CAMERA_FAMILIES,
    HELD_OUT_FAMILIES,
    Motions,
    choose,
    draw_motions,
    places,
    turned,
    uniform,
)
from emt.synthetic.scenes import CANVAS, PATTERNS, PLACES, SCENES, paint_scenes
from emt.synthetic.sprites import BORDER, COLOURS, SIDE, SUBJECTS, blur, finish, load_sprites, recolour

__all__ = [
    "CAMERA_FAMILIES",
    "COLOURS",
    "FAMILIES",
    "HELD_OUT_CAMERA_FAMILIES",
    "HELD_OUT_FAMILIES",
    "SCENES",
    "SUBJECTS",
    "Appearances",
    "Motions",
    "World",
    "words",
]

_CHUNK = 96
"""Clips drawn at once, which bounds the memory of a large batch (about 35 MB a clip)."""


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    found = {"a", "an", "and", *SUBJECTS, *COLOURS}
    for place in PLACES.values():
        found.update(place.split())
    return sorted(found)


def held_out_combinations() -> Tensor:
    """Which combinations training never shows: (subjects, colours, scenes) bool.

    A tenth of the subject-colour, of the colour-scene and of the subject-scene pairs is held out, chosen by a hash of
    the names, so that it does not change when names are added. A combination is held out if any of its pairs is.
    """

    def held(first: tuple[str, ...], second: tuple[str, ...]) -> Tensor:
        return torch.tensor([[zlib.crc32(f"{a} {b}".encode()) % 10 == 0 for b in second] for a in first])

    return held(SUBJECTS, COLOURS)[:, :, None] | held(COLOURS, SCENES)[None] | held(SUBJECTS, SCENES)[:, None, :]


@dataclass
class Appearances:
    """Content of a batch of clips; every tensor has the clips as its first dimension.

    Attributes:
        subject: (n, 2) index into `SUBJECTS`; the second is ignored where a clip has one subject.
        colour: (n, 2) index into `COLOURS`.
        scene: (n,) index into `SCENES`.
        variant: (n,) which painting of the scene.
        view: (n, 4) where the camera stands in frame 0: offset x and y in canvas pixels, log zoom, and -1 or 1 for a
            mirrored canvas.
    """

    subject: Tensor
    colour: Tensor
    scene: Tensor
    variant: Tensor
    view: Tensor

    def __len__(self) -> int:
        return self.subject.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Appearances:
        """The clips that `index` selects along the first dimension: a slice, a mask or a list of numbers."""
        return Appearances(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Appearances:
        """A copy with every tensor on `device`."""
        return Appearances(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class World:
    """Draws motions and appearances, and renders them.

    Args:
        device: Where canvases live and rendering happens.
        size: Side of the rendered frames in pixels.
        frames: Frames of a clip.
        seed: Seed of the painted textures.
        variants: Paintings of each scene; fewer paint faster.
        textures: Natural textures that clips made to look like footage draw from; fewer paint faster.
        free_views: Scenes are seen from anywhere at the start, mirrored or not; otherwise from nearly the same place
            always, so that there is little to guess but the motion.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        size: int = 128,
        frames: int = 16,
        seed: int = 0,
        variants: int = 8,
        textures: int = 32,
        free_views: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.size = size
        self.frames = frames
        self.seed = seed
        self.variants = variants
        self.free_views = free_views
        plain = load_sprites().to(self.device)
        sprites = recolour(plain)
        self._sprites = finish(sprites.flatten(0, 1)).unflatten(0, sprites.shape[:2])
        canvases = paint_scenes(variants).to(self.device).flatten(0, 1)
        self._textures = paint_textures(textures, seed).to(self.device)
        self._first_texture = 2 * canvases.shape[0]
        self._outlines = torch.cat([draw_outlines(2 * textures, seed).to(self.device), plain[:, 3]])
        canvases = torch.cat([canvases, self._textures])
        # One volume for all canvases, each a sharp plane followed by a blurred one: (1, 3, 2 * canvases, H, W).
        # Sampling at an integer depth reads one canvas; between the two planes it reads the right sharpness.
        self._canvases = (
            torch.stack([canvases, blur(canvases, 0.9)], 1).flatten(0, 1).transpose(0, 1)[None].contiguous()
        )
        held = held_out_combinations().to(self.device)
        self._allowed = {None: torch.ones_like(held), True: held, False: ~held}

    def motions(
        self,
        n: int,
        generator: torch.Generator,
        *,
        held_out: bool = False,
        two_subjects: float = 0.2,
        camera: float = 0.4,
        turning: float = 0.35,
        swift: float = 0.0,
    ) -> Motions:
        """Draw `n` motions on this world's device.

        Args:
            n: How many clips.
            generator: Source of all randomness, on the CPU or on this world's device.
            held_out: Draw only object and camera families that training never draws.
            two_subjects: Share of clips with two subjects.
            camera: Share of clips with a moving camera.
            turning: Share of subjects that also turn, whatever their family.
            swift: Share of moving cameras that go as often far as near; the others mostly move little, as in footage.
        """
        return draw_motions(
            n,
            generator,
            frames=self.frames,
            held_out=held_out,
            two_subjects=two_subjects,
            camera=camera,
            turning=turning,
            swift=swift,
            device=self.device,
        )

    def appearances(
        self, motions: Motions | int, generator: torch.Generator, *, held_out: bool | None = None, patterns: float = 1.0
    ) -> Appearances:
        """Draw what the clips show; two subjects of a clip differ in kind and in colour.

        Args:
            motions: The motions to dress, or how many clips.
            generator: Source of all randomness.
            held_out: False draws only combinations of subject, colour and scene meant for training, True only
                combinations never seen in training (for each subject of a clip), None draws from all.
            patterns: How many times as often as each other scene one of `PATTERNS` is drawn.
        """
        n = motions if isinstance(motions, int) else len(motions)
        device = self.device
        allowed = self._allowed[held_out]
        weights = torch.tensor([patterns if scene in PATTERNS else 1.0 for scene in SCENES], device=device)
        scene = choose(weights, n, generator)
        pairs = allowed.permute(2, 0, 1)[scene].float()  # (n, subjects, colours)

        def draw(weights: Tensor) -> tuple[Tensor, Tensor]:
            bounds = weights.flatten(1).cumsum(1)
            at = uniform((n, 1), generator, device) * bounds[:, -1:]
            pair = torch.searchsorted(bounds, at, right=True)[:, 0].clamp(max=bounds.shape[1] - 1)
            return pair // len(COLOURS), pair % len(COLOURS)

        subject, colour = draw(pairs)
        other = torch.arange(len(SUBJECTS), device=device) != subject[:, None]
        others = torch.arange(len(COLOURS), device=device) != colour[:, None]
        second_subject, second_colour = draw(pairs * other[:, :, None] * others[:, None])
        r = uniform((n, 5), generator, device)
        centre = torch.stack(
            [(r[:, 0] * 2 - 1) * 0.09 * CANVAS, (r[:, 1] * 2 - 1) * 0.05 * CANVAS, (r[:, 2] - 0.5) * 0.3], -1
        )
        mirror = torch.where(r[:, 3:4] < 0.5, -1.0, 1.0)
        if not self.free_views:
            centre, mirror = 0.2 * centre, torch.ones_like(mirror)
        return Appearances(
            subject=torch.stack([subject, second_subject], -1),
            colour=torch.stack([colour, second_colour], -1),
            scene=scene,
            variant=(r[:, 4] * self.variants).long().clamp(max=self.variants - 1),
            view=torch.cat([centre, mirror], -1),
        )

    def captions(self, appearances: Appearances, motions: Motions) -> list[str]:
        """One caption a clip, naming subjects, colours and scene but never the motion.

        Of two subjects the one that starts further left is named first.
        """
        out = []
        for subjects, colours, scene, count in zip(
            appearances.subject.tolist(),
            appearances.colour.tolist(),
            appearances.scene.tolist(),
            motions.subjects.tolist(),
        ):
            named = [f"{_article(COLOURS[c])} {COLOURS[c]} {SUBJECTS[s]}" for s, c in zip(subjects, colours)]
            out.append(f"{' and '.join(named[:count])} {PLACES[SCENES[scene]]}")
        return out

    @torch.no_grad()
    def render(
        self,
        motions: Motions,
        appearances: Appearances,
        *,
        realism: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw clips: (n, frames, 3, size, size) uint8.

        Args:
            motions: n motions.
            appearances: What the n clips show.
            realism: Probability that a clip looks like real footage instead of its `appearances`.
            generator: Source of what realism draws; by default seeded with this world's seed.

        Raises:
            ValueError: If the two batches differ in length.
        """
        if len(motions) != len(appearances):
            raise ValueError(f"{len(motions)} motions cannot be dressed in {len(appearances)} appearances")
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        out = torch.empty(len(motions), self.frames, 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        for start in range(0, len(motions), _CHUNK):
            part = slice(start, start + _CHUNK)
            with torch.autocast(self.device.type, enabled=False):  # half precision is not exact enough to draw
                video = self._draw(motions[part], appearances[part], realism, generator)
            out[part] = (video.transpose(1, 2) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
        return out

    def _draw(self, motions: Motions, appearances: Appearances, realism: float, generator: torch.Generator) -> Tensor:
        """Clips (n, 3, frames, size, size) in [0, 1]."""
        n = len(motions)
        plane = 2 * (appearances.scene * self.variants + appearances.variant)
        view = appearances.view
        real = torch.zeros(0, dtype=torch.long, device=self.device)
        if realism > 0:
            r = uniform((n, 13), generator, self.device)
            filmed = r[:, 0] < realism
            real = filmed.nonzero()[:, 0]
            texture = (r[:, 1] * len(self._textures)).long().clamp(max=len(self._textures) - 1)
            plane = torch.where(filmed, self._first_texture + 2 * texture, plane)
            anywhere = torch.stack(
                [*((r[:, 2:4] - 0.5) * 0.3 * CANVAS).unbind(-1), 0.9 * (r[:, 4] - 0.6), (r[:, 12] < 0.5) * 2.0 - 1], -1
            )
            view = torch.where(filmed[:, None], anywhere, view)
            # Footage of a place often has no subject: what the camera does is all there is to see.
            empty = filmed & (motions.family[:, 0] == FAMILIES.index("still")) & motions.attached & (r[:, 5] < 0.5)
        video = self._scene(motions, plane, view)
        for i in range(int(motions.subjects.max())):
            shown = motions.scale[:, :, i] > 0
            sprite = self._sprites[appearances.subject[:, i], appearances.colour[:, i]]
            bend = None
            if len(real):
                which = (r[:, 6 + i] * len(self._outlines)).long().clamp(max=len(self._outlines) - 1)
                cut = cut_out(self._textures, self._outlines[which[real]], generator)
                sprite = sprite.index_copy(0, real, finish(cut, rim=0.15))
                shown = shown & ~empty[:, None]
                bend = torch.where(filmed[:, None], r[:, 8:12], 0.0)
            video = self._over(video, motions, i, sprite, shown, bend)
        if len(real):
            video[real] = film(video[real], generator)
        return video

    def _scene(self, motions: Motions, plane: Tensor, view: Tensor) -> Tensor:
        """The scene under the moving camera: (n, 3, frames, size, size). `plane` (n,) is a depth of the volume."""
        x, y = places(self.size, self.device)
        pan_x, pan_y, zoom, roll = (part[..., None, None] for part in motions.camera.unbind(-1))
        # From the screen back to frame 0, then to the canvas.
        gain = torch.exp(-zoom)
        from_x, from_y = turned(x - pan_x, y - pan_y, -roll, gain)
        offset_x, offset_y, start, mirror = (part[:, None, None, None] for part in view.unbind(-1))
        stretch = torch.exp(-start)
        canvas_x = mirror * (stretch * from_x + offset_x)
        canvas_y = stretch * from_y + offset_y
        # Canvas pixels that one screen pixel spans decide the sharpness.
        level = torch.log2(gain * stretch * FRAME / self.size).clamp(0, 1)
        depth = plane[:, None, None, None] + level
        planes = self._canvases.shape[2]
        depth = ((2 * depth + 1) / planes - 1).expand_as(canvas_x)
        grid = torch.stack([canvas_x * (2 / CANVAS), canvas_y * (2 / CANVAS), depth], -1)
        video = F.grid_sample(self._canvases, grid.flatten(0, 1)[None], padding_mode="reflection", align_corners=False)
        return video[0].unflatten(1, grid.shape[:2]).transpose(0, 1)

    def _over(
        self, video: Tensor, motions: Motions, i: int, sprite: Tensor, shown: Tensor, bend: Tensor | None
    ) -> Tensor:
        """Lay subject `i` over `video` where `shown` (n, frames).

        `sprite` (n, 4, levels, side, side) is premultiplied; `bend` (n, 4) in [0, 1) lets it flex as living things do.
        """
        x, y = places(self.size, self.device)
        centre_x, centre_y = (part[:, :, i, None, None] - FRAME / 2 for part in motions.position.unbind(-1))
        scale, rotation = motions.scale[:, :, i, None, None].clamp(min=1.0), motions.rotation[:, :, i, None, None]
        unit = (2 * SIDE / (SIDE + 2 * BORDER)) / scale
        u, v = turned(x - centre_x, y - centre_y, -rotation, unit)
        if bend is not None:
            amount, rate, across, along = bend[:, :, None, None, None].unbind(1)
            t = 2 * math.pi * torch.arange(self.frames, device=self.device)[:, None, None] / self.frames
            wave = t * (0.5 + 2 * rate)
            u, v = (
                u + 0.09 * amount * torch.sin(wave + (2 + 3 * across) * v + 6 * along),
                v + 0.09 * amount * torch.sin(0.8 * wave + (2 + 3 * along) * u + 6 * across),
            )
        levels = sprite.shape[2]
        level = torch.log2(SIDE / scale * (FRAME / self.size)).clamp(0, levels - 1)
        depth = ((2 * level + 1) / levels - 1).expand_as(u)
        drawn = F.grid_sample(sprite, torch.stack([u, v, depth], -1), padding_mode="zeros", align_corners=False)
        drawn = drawn * shown[:, None, :, None, None]
        return drawn[:, :3] + video * (1 - drawn[:, 3:])


def _strips(clips: Tensor, every: int = 2) -> Tensor:
    """Clips (n, frames, 3, H, W) as one picture of frame strips (n * H, frames / every * W, 3), a clip a row."""
    shown = clips[:, ::every]
    n, frames, _, height, width = shown.shape
    return shown.permute(0, 3, 1, 4, 2).reshape(n * height, frames * width, 3)


def sheet(path: Path, seed: int = 0, size: int = 128) -> None:
    """Write a contact sheet: subjects in all colours, scenes, motions in two appearances, footage beside its motion."""
    world = World(size=size, variants=2, textures=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    width = 16 * world.size
    ground = torch.tensor([0.5, 0.58, 0.54]).view(3, 1, 1)
    table = world._sprites[:, :, :3, 0] + ground * (1 - world._sprites[:, :, 3:, 0])
    table = F.pad(table, (0,) * 9 + (-len(SUBJECTS) % 4,), value=0.5).unflatten(0, (-1, 4))
    table = table.permute(0, 4, 1, 2, 5, 3).reshape(-1, 4 * len(COLOURS) * table.shape[-1], 3)
    picture = Image.fromarray((table.clamp(0, 1) * 255).byte().numpy())
    picture = picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS)

    places = world.motions(2 * len(SCENES), generator, two_subjects=0, camera=0)
    looks = world.appearances(places, generator)
    looks.scene = torch.arange(2 * len(SCENES)) % len(SCENES)
    looks.variant = torch.arange(2 * len(SCENES)) // len(SCENES)
    scenes = world.render(places, looks)[:, 0].unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).reshape(-1, width, 3)

    parts = [torch.from_numpy(np.array(picture)), scenes]
    for count, held_out, two, camera, realism in (
        (6, False, 0, 0, 0),
        (4, False, 1, 0.3, 0),
        (8, False, 0, 1, 0),
        (4, True, 0, 0.5, 0),
        (8, False, 0.2, 0.6, 1),
    ):
        motions = world.motions(count, generator, held_out=held_out, two_subjects=two, camera=camera)
        left = world.render(motions, world.appearances(motions, generator), realism=realism, generator=generator)
        right = world.render(motions, world.appearances(motions, generator))
        parts.append(torch.cat([_strips(left), _strips(right)], 1))
    Image.fromarray(torch.cat(parts).numpy()).save(path)


def main() -> None:
    """Run the command line: `python -m emt.synthetic.renderer sheet OUT.png`."""
    parser = argparse.ArgumentParser(prog="python -m emt.synthetic.renderer", description="Look at the rendered world.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("sheet", help="write a contact sheet")
    command.add_argument("output", type=Path, help="the picture to write (PNG)")
    command.add_argument("--seed", type=int, default=0, help="what is drawn (default: 0)")
    arguments = parser.parse_args()
    sheet(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
