"""Realism of rendered clips: natural textures, cut-outs of any outline, and a camera's flaws.

Textures are dead-leaves pictures and 1/f noise, which share the statistics of photographs, and photographs themselves
where a package that ships some (scikit-image, scikit-learn) happens to be installed.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from emt.synthetic.motions import uniform
from emt.synthetic.scenes import CANVAS
from emt.synthetic.sprites import SIDE, blur, fit_cell

_PHOTOGRAPHS = {
    "skimage": ("data", ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "brick", "grass", "gravel")),
    "sklearn": ("datasets/images", ("china", "flower")),
}

# Quantisation of luminance in the JPEG standard (ITU-T T.81, table K.1).
_QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def _noise(rng: np.random.Generator, slope: float, channels: int = 1) -> np.ndarray:
    """Noise whose amplitude falls as 1/f**slope: (channels, CANVAS, CANVAS), of zero mean and unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.normal(size=(channels, CANVAS, CANVAS)))
    out = np.fft.irfft2(white / np.maximum(frequency, 2 / CANVAS) ** slope, s=(CANVAS, CANVAS))
    return ((out - out.mean((1, 2), keepdims=True)) / out.std((1, 2), keepdims=True)).astype(np.float32)


def _palette(rng: np.random.Generator, size: int) -> np.ndarray:
    """Colours that belong together, mostly earth, leaf, stone and sky: (size, 3) in [0, 1]."""
    natural = np.array(
        [(0.45, 0.36, 0.26), (0.36, 0.42, 0.24), (0.46, 0.45, 0.43), (0.40, 0.48, 0.56), (0.60, 0.50, 0.42)]
    )
    mixed = rng.dirichlet(np.full(len(natural), 0.5), size) @ natural
    accents = rng.random((size, 1)) < 0.12
    tones = np.where(accents, rng.uniform(0.05, 0.9, (size, 3)), mixed) * rng.uniform(0.45, 1.9, (size, 1))
    return np.clip(tones, 0.02, 0.98).astype(np.float32)


def _cloth(rng: np.random.Generator) -> np.ndarray:
    """1/f noise coloured along a few hues: (3, CANVAS, CANVAS) in [0, 1]."""
    fields = _noise(rng, rng.uniform(1.0, 1.7), 3)
    centre, *directions = _palette(rng, 4)
    mixed = centre[:, None, None] + sum(
        0.45 * (direction - 0.4)[:, None, None] * field for direction, field in zip(directions, fields)
    )
    return np.clip(mixed + 0.1 * fields[:1], 0, 1)


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Opaque patches of all sizes over one another (Lee, Mumford and Huang, 2001), each with its own texture."""
    count = 700
    ids = Image.new("I", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(ids)
    smallest, largest = rng.uniform(5, 16), rng.uniform(70, 160)
    for i in range(count):
        # Radii with density r**-3 between the bounds.
        radius = (rng.uniform() * (smallest**-2 - largest**-2) + largest**-2) ** -0.5
        x, y, turn, flat = *rng.uniform(-20, CANVAS + 20, 2), rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 1)
        corners = int(rng.choice([4, 5, 7, 24]))
        angles = turn + (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * math.pi / corners
        px, py = radius * np.cos(angles - turn), radius * flat * np.sin(angles - turn)
        points = zip(x + px * math.cos(turn) - py * math.sin(turn), y + px * math.sin(turn) + py * math.cos(turn))
        pen.polygon([(float(a), float(b)) for a, b in points], fill=i)
    leaf = np.asarray(ids)
    tones = _palette(rng, 12)[rng.integers(0, 12, count)] * rng.uniform(0.75, 1.2, (count, 1)).astype(np.float32)
    grain, shade = _noise(rng, 0.9)[0], _noise(rng, 1.8)[0]
    y, x = np.mgrid[:CANVAS, :CANVAS]
    shift = rng.integers(0, CANVAS, (count, 2))
    textured = grain[(y + shift[leaf, 0]) % CANVAS, (x + shift[leaf, 1]) % CANVAS]
    strength = rng.uniform(0.02, 0.22, count).astype(np.float32)[leaf]
    lit = (1 + 0.14 * shade) * (1 + strength * textured)
    return _defocus(np.clip(tones[leaf].transpose(2, 0, 1) * lit, 0, 1), rng)


def _defocus(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of all textures as they are, half out of focus as backgrounds often are."""
    if rng.random() < 0.5:
        return texture
    return blur(torch.from_numpy(texture)[None].float(), rng.uniform(0.8, 3.0))[0].numpy()


def _photographs() -> list[Image.Image]:
    """Photographs shipped by whichever of the known packages are installed."""
    found = []
    for package, (folder, names) in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for name in names:
            for path in sorted((Path(spec.origin).parent / folder).glob(f"{name}.*")):
                if path.suffix in (".png", ".jpg", ".jpeg"):
                    found.append(Image.open(path).convert("RGB"))
    return found


def paint_textures(count: int, seed: int) -> Tensor:
    """Natural textures: at least `count`, more where photographs are installed: (n, 3, CANVAS, CANVAS) in [0, 1]."""
    rng = np.random.default_rng([seed, 1])
    textures = [_cloth(rng) if i % 4 == 3 else _dead_leaves(rng) for i in range(count)]
    for photograph in _photographs():
        for zoom in (1.0, 1.6):
            size = round(CANVAS * zoom)
            ratio = size / min(photograph.size)
            width, height = (max(size, round(side * ratio)) for side in photograph.size)
            scaled = np.asarray(photograph.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255
            left, top = int(rng.integers(0, width - CANVAS + 1)), int(rng.integers(0, height - CANVAS + 1))
            textures.append(scaled[top : top + CANVAS, left : left + CANVAS].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(textures)).float()


def draw_outlines(count: int, seed: int) -> Tensor:
    """Silhouettes like no subject of the world: round, ragged, limbed: (count, SIDE, SIDE) opacity."""
    rng = np.random.default_rng([seed, 2])
    side, masks = 256, []
    for i in range(count):
        mask = Image.new("L", (side, side))
        pen = ImageDraw.Draw(mask)
        if i % 2:  # a body with limbs and a head
            for _ in range(int(rng.integers(3, 7))):
                angle, length, width = rng.uniform(0, 2 * math.pi), rng.uniform(40, 105), rng.uniform(10, 26)
                end = (side / 2 + length * math.cos(angle), side / 2 + length * math.sin(angle))
                pen.line([(side / 2, side / 2), end], fill=255, width=round(width))
                pen.ellipse((end[0] - width, end[1] - width, end[0] + width, end[1] + width), fill=255)
            rx, ry = rng.uniform(28, 62, 2)
            pen.ellipse((side / 2 - rx, side / 2 - ry, side / 2 + rx, side / 2 + ry), fill=255)
        else:
            angles = np.linspace(0, 2 * math.pi, 160, endpoint=False)
            rough = rng.uniform(0.1, 0.45)
            radius = 70 * (
                1 + sum(rough / k * rng.normal() * np.cos(k * angles + rng.uniform(0, 6.3)) for k in range(2, 9))
            )
            stretch = rng.uniform(0.6, 1.0)
            xs, ys = side / 2 + radius * np.cos(angles), side / 2 + radius * stretch * np.sin(angles)
            pen.polygon([(float(a), float(b)) for a, b in zip(xs, ys)], fill=255)
        cutout = Image.merge("RGBA", (mask, mask, mask, mask))
        masks.append(np.asarray(fit_cell(cutout), np.float32)[..., 3] / 255)
    return torch.from_numpy(np.stack(masks))


def cut_out(textures: Tensor, outlines: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a subject of its own from a texture for each outline.

    Args:
        textures: (textures, 3, CANVAS, CANVAS).
        outlines: (n, SIDE, SIDE) opacity.
        generator: Source of all randomness.

    Returns:
        (n, 4, SIDE, SIDE) RGBA, not premultiplied.
    """
    n, device = outlines.shape[0], outlines.device
    r = uniform((n, 10), generator, device)
    which = (r[:, 0] * textures.shape[0]).long().clamp(max=textures.shape[0] - 1)
    corner = (r[:, 1:3] * (CANVAS - SIDE)).long()
    span = torch.arange(SIDE, device=device)
    rows, columns = corner[:, 0, None] + span, corner[:, 1, None] + span
    rgb = textures[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # A tint of its own, dark or bright, and rounded by shading towards the outline.
    tint = r[:, 3:6, None, None]
    rgb = rgb + (tint - rgb) * (0.3 + 0.5 * r[:, 6, None, None, None])
    body = blur(outlines[:, None], 4.0).clamp(0, 1)
    slope = (span / SIDE - 0.5) * (r[:, 7, None] - 0.5)
    rgb = rgb * (0.55 + 0.6 * body) * (1 + 1.2 * slope[:, None, :, None])
    return torch.cat([rgb.clamp(0, 1), outlines[:, None]], 1)


def _cosines() -> Tensor:
    """The orthonormal DCT-II matrix of 8 samples."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) * 0.5
    basis[0] /= math.sqrt(2)
    return basis


def compress(video: Tensor, strength: Tensor) -> Tensor:
    """Quantise 8×8 blocks as JPEG does.

    Args:
        video: (n, 3, frames, height, width) in [0, 1]; sides that are multiples of 8.
        strength: (n,) multiple of the standard's quantisation steps; 1 is quality 50, 0 leaves a clip as it is.
    """
    to_ycc = video.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    basis = _cosines().to(video)
    steps = video.new_tensor(_QUANTISATION) / 255 * video.new_tensor([1.0, 1.4, 1.4]).view(3, 1, 1, 1, 1, 1)
    n, _, frames, height, width = video.shape
    ycc = torch.einsum("dc,ncfhw->ndfhw", to_ycc, video)
    blocks = ycc.reshape(n, 3, frames, height // 8, 8, width // 8, 8).transpose(-2, -3)
    coefficients = basis @ blocks @ basis.mT
    step = steps[None] * strength.view(n, 1, 1, 1, 1, 1, 1).clamp(min=1e-4)
    coefficients = torch.round(coefficients / step) * step
    ycc = (basis.mT @ coefficients @ basis).transpose(-2, -3).reshape(n, 3, frames, height, width)
    return torch.einsum("dc,ncfhw->ndfhw", torch.linalg.inv(to_ycc), ycc)


def film(video: Tensor, generator: torch.Generator) -> Tensor:
    """Give clips the flaws of a camera: exposure, flicker, vignette, soft focus, sensor noise, compression.

    Args:
        video: (n, 3, frames, height, width) in [0, 1].
        generator: Source of all randomness.
    """
    n, _, frames, height, width = video.shape
    r = uniform((n, 12), generator, video.device)[:, :, None, None, None, None]
    video = video * (0.7 + 0.6 * r[:, 0]) * (0.9 + 0.2 * r[:, 1:4, 0])
    t = torch.arange(frames, device=video.device).view(1, 1, -1, 1, 1) / frames
    flicker = uniform((n, 1, frames, 1, 1), generator, video.device) - 0.5
    drift = torch.sin(2 * math.pi * (t * (0.2 + 1.3 * r[:, 4]) + r[:, 5])) * 0.12 * r[:, 6]
    video = video * (1 + drift + 0.05 * flicker * (r[:, 6] > 0.5))
    y = torch.linspace(-1, 1, height, device=video.device)[:, None]
    x = torch.linspace(-1, 1, width, device=video.device)[None]
    video = video * (1 - 0.28 * r[:, 7] * (x * x + y * y))
    images = video.transpose(1, 2).flatten(0, 1)
    soft = blur(images, 1.2 * height / 128).unflatten(0, (n, frames)).transpose(1, 2)
    video = video + (soft - video) * (r[:, 8] * 1.4 - 0.2).clamp(0, 1)
    # As many numbers as pixels: drawn where the video lives, whatever device the generator is on.
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    here = torch.Generator(video.device).manual_seed(int(seed))
    grain = torch.randn(video.shape, generator=here, device=video.device)
    video = video + grain * (0.035 * (r[:, 9] * 1.4 - 0.4).clamp(min=0))
    strength = 1.6 * (r[:, 10] * 1.5 - 0.5).clamp(min=0)
    return compress(video.clamp(0, 1), strength.flatten()).clamp(0, 1)
