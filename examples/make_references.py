"""Render the reference clips of this folder, six motions of the world that the small model is trained on, and a sheet.

    python examples/make_references.py

The first two move as no training clip does, and every combination of subject, colour and scene is one that training
leaves out. The sheet, docs/pairs.jpg, shows below each of them the same motion played by another subject elsewhere:
what a perfect transfer would make, and what training pairs are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from emt.synthetic.motions import CAMERA_FAMILIES, FAMILIES, FRAME, HELD_OUT_CAMERA_FAMILIES, HELD_OUT_FAMILIES
from emt.synthetic.renderer import World
from emt.synthetic.scenes import SCENES
from emt.video import write_clip

OUT = Path(__file__).parent / "references"
SHEET = Path(__file__).parents[1] / "docs" / "pairs.jpg"
WANTED = {
    "figure-eight": ("figure-eight", "static"),
    "spiral": ("spiral", "static"),
    "bounce": ("bounce", "static"),
    "spin": ("spin", "static"),
    "grow": ("grow", "static"),
    "pan": ("still", "pan"),
}
"""File name: family of the subject's motion and of the camera's."""
PATTERNS = ("bricks", "checkerboard", "stripes", "dots", "wood", "meadow", "snow")
"""Scenes over which a camera's path is hard to see, as they look alike everywhere."""
STEP = FRAME / 12
"""Pixels that a subject moves between two frames at most: what leaps further no tracker of points follows."""


def main() -> None:
    """Write the clips, 16 frames of 128×128 at 8 frames a second."""
    families, cameras = FAMILIES + HELD_OUT_FAMILIES, CAMERA_FAMILIES + HELD_OUT_CAMERA_FAMILIES
    world, generator = World(), torch.Generator().manual_seed(7)
    rows = []
    drawn = [
        world.motions(1500, generator, held_out=held_out, two_subjects=0, camera=0.2) for held_out in (False, True)
    ]
    for name, (family, camera) in WANTED.items():
        motions = drawn[family in HELD_OUT_FAMILIES]
        is_family = motions.family[:, 0] == families.index(family)
        is_camera = motions.camera_family == (cameras.index(camera))
        # Large enough to see, and moving far enough: the most of those drawn.
        pan = motions.camera[..., :2]
        steps = motions.position[:, :, 0].diff(dim=1).norm(dim=-1)
        travel = steps.sum(1) + 10 * (pan.amax(1) - pan.amin(1)).norm(dim=-1)
        allowed = is_family & is_camera & (steps.amax(1) <= STEP)
        score = torch.where(allowed, motions.scale[:, :, 0].amin(1).clamp(max=30) + travel / 20, -1.0)
        one = motions[score.argmax().view(1)]
        appearance = world.appearances(one, generator, held_out=True)
        while SCENES[appearance.scene] in PATTERNS:
            appearance = world.appearances(one, generator, held_out=True)
        frames = world.render(one, appearance)[0].permute(0, 2, 3, 1)
        print(f"{name}: {world.captions(appearance, one)[0]}")
        write_clip(OUT / f"{name}.mp4", frames.numpy(), 8.0)
        other = world.render(one, world.appearances(one, generator, held_out=False))[0].permute(0, 2, 3, 1)
        rows += [torch.cat(list(clip[::2]), dim=1) for clip in (frames, other)]
    SHEET.parent.mkdir(exist_ok=True)
    Image.fromarray(torch.cat(rows).numpy()).save(SHEET, quality=88)


if __name__ == "__main__":
    main()
