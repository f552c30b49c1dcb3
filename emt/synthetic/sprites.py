"""The subjects of the rendered world: emoji from an atlas and plain shapes, each painted in eight colours."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional as F

GLYPHS: dict[str, str] = {
    "cat": "🐱",
    "dog": "🐶",
    "fox": "🦊",
    "panda": "🐼",
    "frog": "🐸",
    "lion": "🦁",
    "rabbit": "🐰",
    "koala": "🐨",
    "pig": "🐷",
    "cow": "🐮",
    "chicken": "🐔",
    "owl": "🦉",
    "penguin": "🐧",
    "fish": "🐠",
    "whale": "🐳",
    "octopus": "🐙",
    "butterfly": "🦋",
    "bee": "🐝",
    "ladybug": "🐞",
    "turtle": "🐢",
    "snail": "🐌",
    "crab": "🦀",
    "elephant": "🐘",
    "car": "🚗",
    "bus": "🚌",
    "bicycle": "🚲",
    "rocket": "🚀",
    "airplane": "✈",
    "boat": "⛵",
    "train": "🚂",
    "helicopter": "🚁",
    "balloon": "🎈",
    "apple": "🍎",
    "banana": "🍌",
    "pear": "🍐",
    "strawberry": "🍓",
    "cherries": "🍒",
    "grapes": "🍇",
    "pineapple": "🍍",
    "pumpkin": "🎃",
    "mushroom": "🍄",
    "cactus": "🌵",
    "flower": "🌸",
    "tree": "🌳",
    "hat": "🎩",
    "key": "🔑",
    "bell": "🔔",
    "umbrella": "☂",
}
"""Subject and its emoji, in the order of the atlas."""

SHAPES: tuple[str, ...] = ("star", "heart", "ball", "square", "triangle", "moon", "ring", "cross", "diamond", "arrow")
"""Plain shapes, drawn here."""

SUBJECTS: tuple[str, ...] = (*GLYPHS, *SHAPES)
"""Every subject a caption can name."""

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.04),
    "yellow": (1.00, 0.88, 0.10),
    "green": (0.16, 0.72, 0.20),
    "cyan": (0.10, 0.84, 0.90),
    "blue": (0.14, 0.30, 0.95),
    "purple": (0.62, 0.18, 0.86),
    "white": (0.96, 0.96, 0.96),
}
COLOURS: tuple[str, ...] = tuple(RGB)
"""Every colour a subject can have."""

SIDE = 64
"""Side of a sprite in the atlas; a subject's scale is the length of this side on the screen."""
BORDER = 8
"""Empty pixels around a sprite, for its dark rim and for filtering."""
COLUMNS = 8
"""Sprites in a row of the atlas."""
RIM = 0.55
"""Opacity of the soft dark rim that keeps a subject visible on any scene."""


def centred(alpha: np.ndarray) -> tuple[float, float, float]:
    """Placement of a cut-out in its cell: its centroid in the middle, its area like that of every other subject.

    Args:
        alpha: (height, width) opacity in [0, 1].

    Returns:
        Centroid x and y in pixels, and the side in pixels of the square that becomes the cell.
    """
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    total = alpha.sum()
    cx, cy = float((alpha * x).sum() / total), float((alpha * y).sum() / total)
    inside = alpha > 0.1
    reach = max(float(np.abs(x - cx)[inside].max()), float(np.abs(y - cy)[inside].max())) + 0.5
    return cx, cy, max(2.06 * reach, math.sqrt(total / 0.62))


def fit_cell(cutout: Image.Image, side: int = SIDE) -> Image.Image:
    """Scale and centre an RGBA cut-out into a square cell of `side` pixels."""
    cx, cy, span = centred(np.asarray(cutout, np.float32)[..., 3] / 255)
    pad = math.ceil(span)
    board = Image.new("RGBA", (cutout.width + 2 * pad, cutout.height + 2 * pad))
    board.paste(cutout, (pad, pad))
    box = (cx + pad - span / 2, cy + pad - span / 2, cx + pad + span / 2, cy + pad + span / 2)
    # Colour is weighted with opacity, or transparent black would darken the edges.
    return board.convert("RGBa").resize((side, side), Image.Resampling.BICUBIC, box=box).convert("RGBA")


def _polygon(name: str) -> list[tuple[float, float]]:
    """Outline of a shape in [-1, 1]."""
    turn = 2 * math.pi
    if name == "star":
        radii = [1.0 if i % 2 == 0 else 0.45 for i in range(10)]
        return [(r * math.sin(turn * i / 10), -r * math.cos(turn * i / 10)) for i, r in enumerate(radii)]
    if name == "heart":
        steps = [turn * i / 200 for i in range(200)]
        xs = [16 * math.sin(a) ** 3 / 17 for a in steps]
        waves = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in steps]
        return [(x, -y / 17) for x, y in zip(xs, waves)]
    if name == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if name == "triangle":
        return [(0, -1), (1, 0.75), (-1, 0.75)]
    if name == "cross":
        a, b = 0.3, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if name == "diamond":
        return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
    return [(0, -1), (0.9, 0), (0.36, 0), (0.36, 0.95), (-0.36, 0.95), (-0.36, 0), (-0.9, 0)]  # arrow


def draw_shape(name: str) -> Image.Image:
    """One plain shape as a grey, shaded RGBA cut-out; light from above left shows how far it has turned."""
    big = 320
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    if name in ("ball", "ring", "moon"):
        pen.ellipse((10, 10, big - 10, big - 10), fill=255)
        if name == "ring":
            pen.ellipse((90, 90, big - 90, big - 90), fill=0)
        if name == "moon":
            pen.ellipse((120, -20, big + 60, big - 80), fill=0)
    else:
        pen.polygon([(big / 2 * (1 + 0.95 * x), big / 2 * (1 + 0.95 * y)) for x, y in _polygon(name)], fill=255)
    y, x = (np.mgrid[:big, :big] + 0.5) / big * 2 - 1
    light = 0.58 - 0.22 * (x + y) / 1.4
    if name == "ball":  # three bands, so that its turning can be seen
        band = np.abs(((x * 0.8 + y * 0.6) + 0.13 * (x * 0.6 - y * 0.8) ** 2) * 3 % 2 - 1) < 0.42
        light = np.where(band, 0.92, 0.5) - 0.12 * (x + y)
    edge = np.asarray(mask.filter(ImageFilter.BoxBlur(15)), np.float32) / 255
    light = np.clip(light - 0.5 * np.clip(0.78 - edge, 0, 1), 0, 1)
    grey = np.repeat((light * 255).astype(np.uint8)[..., None], 3, 2)
    return Image.fromarray(np.dstack([grey, np.asarray(mask)]), "RGBA")


def load_sprites() -> Tensor:
    """All subjects in their own colours: (subjects, 4, SIDE, SIDE) float RGBA in [0, 1], not premultiplied."""
    with resources.files("emt.synthetic").joinpath("assets/sprites.png").open("rb") as file:
        atlas = Image.open(file).convert("RGBA")
    cells = []
    for i in range(len(GLYPHS)):
        left, top = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        cells.append(atlas.crop((left, top, left + SIDE, top + SIDE)))
    cells += [fit_cell(draw_shape(name)) for name in SHAPES]
    stacked = np.stack([np.asarray(cell, np.float32) / 255 for cell in cells])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def recolour(sprites: Tensor) -> Tensor:
    """Paint every sprite in every colour, keeping its shading, its dark features and its highlights.

    The luminance of a sprite, stretched so that its own darks and lights span the range, runs along a ramp from
    nearly black over the colour to a light tint of it.

    Args:
        sprites: (subjects, 4, side, side) RGBA in [0, 1].

    Returns:
        (subjects, colours, 4, side, side) RGBA in [0, 1].
    """
    weights = sprites.new_tensor([0.30, 0.59, 0.11]).view(1, 3, 1, 1)
    alpha = sprites[:, 3]
    luminance = (sprites[:, :3] * weights).sum(1)
    tone = torch.zeros_like(luminance)
    for i in range(sprites.shape[0]):
        seen = luminance[i][alpha[i] > 0.5]
        low, middle, high = torch.quantile(seen, seen.new_tensor([0.02, 0.5, 0.98])).tolist()
        low = min(low, middle - 0.25)
        high = max(high, middle + 0.15)
        value = luminance[i]
        below = 0.62 * (value - low) / (middle - low)
        above = 0.62 + 0.38 * (value - middle) / (high - middle)
        tone[i] = torch.where(value < middle, below, above).clamp(0, 1)
    colours = sprites.new_tensor(list(RGB.values()))[None, :, :, None, None]
    tone = tone[:, None, None]
    dark = (tone / 0.62).clamp(max=1)
    light = ((tone - 0.62) / 0.38).clamp(min=0)
    shade = colours * (0.1 + 0.9 * dark)
    tint = 0.5 * light * torch.where(colours.amin(2, keepdim=True) > 0.9, 1.0, 0.85)
    rgb = shade + (1 - shade) * tint
    return torch.cat([rgb, alpha[:, None, None].expand(-1, rgb.shape[1], -1, -1, -1)], 2)


def _spread(length: int, sigma: float, like: Tensor) -> Tensor:
    """The matrix (length, length) of a Gaussian blur whose input continues past its ends as its last value."""
    at = torch.arange(length, device=like.device, dtype=like.dtype)
    radius = math.ceil(4 * sigma)
    source = torch.arange(-radius, length + radius, device=like.device)
    weights = torch.exp(-0.5 * ((source - at[:, None]) / sigma) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.zeros_like(weights[:, :length]).index_add(1, source.clamp(0, length - 1), weights)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over the last two dimensions (…, height, width), edges repeated."""
    height, width = image.shape[-2:]
    # Two matmuls: on small pictures far quicker than convolving channel by channel.
    return _spread(height, sigma, image) @ image @ _spread(width, sigma, image).mT


def finish(sprites: Tensor, rim: float = RIM) -> Tensor:
    """Make sprites ready for drawing: premultiplied, with a soft dark rim, in three levels of sharpness.

    Args:
        sprites: (n, 4, side, side) RGBA in [0, 1].
        rim: Opacity of the rim.

    Returns:
        (n, 4, 3, side + 2 * BORDER, side + 2 * BORDER): levels for a scale of 64, 32 and 16 pixels, so that trilinear
        sampling never skips pixels.
    """
    alpha = F.pad(sprites[:, 3:], (BORDER,) * 4)
    rgb = F.pad(sprites[:, :3], (BORDER,) * 4) * alpha
    around = (blur(F.max_pool2d(alpha, 5, 1, 2), 1.6) * rim).clamp(max=1)
    sharp = torch.cat([rgb, alpha + around * (1 - alpha)], 1)
    return torch.stack([sharp, blur(sharp, 0.75), blur(sharp, 1.6)], 2)
