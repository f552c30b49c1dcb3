"""The scenes of the rendered world, painted as canvases larger than the frame."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CANVAS = 384
"""Side of a canvas in pixels; at zoom 1 one of them is one pixel of a 128 frame."""

PLACES: dict[str, str] = {
    "sea": "over the sea",
    "hills": "over the hills",
    "desert": "in the desert",
    "night": "in the night",
    "street": "on the street",
    "forest": "in the forest",
    "snow": "in the snow",
    "clouds": "in the clouds",
    "meadow": "on the meadow",
    "city": "over the city",
    "mountains": "over the mountains",
    "bricks": "on bricks",
    "checkerboard": "on a checkerboard",
    "stripes": "on stripes",
    "dots": "on dots",
    "wood": "on wood",
}
"""Scene and how a caption places a subject in it."""
SCENES: tuple[str, ...] = tuple(PLACES)
"""Every scene a caption can name."""


def paint(scene: str, variant: int) -> np.ndarray:
    """One canvas: (CANVAS, CANVAS, 3) uint8."""
    rng = np.random.default_rng([SCENES.index(scene), variant])
    y, x = np.mgrid[:CANVAS, :CANVAS] // int(rng.integers(12, 30))
    a, b = rng.integers(40, 200, (2, 3))
    return np.where(((x + y) % 2)[..., None] > 0, a, b).astype(np.uint8)


def paint_scenes(variants: int) -> Tensor:
    """Every scene in `variants` versions: (scenes, variants, 3, CANVAS, CANVAS) float in [0, 1]."""
    canvases = np.stack([np.stack([paint(scene, v) for v in range(variants)]) for scene in SCENES])
    return torch.from_numpy(canvases).permute(0, 1, 4, 2, 3).float() / 255
