"""Photometric alignment: the similarity transform under which the scene of one frame looks like that of the next.

Gauss–Newton from coarse to fine (Lucas and Kanade 1981; Baker and Matthews 2004, section 2), with weights that leave
out subjects and whatever else does not move as the scene does. It knows no textures and was trained on nothing: it
makes exact what a first guess has found in general, and of several guesses says which explains the pictures best.

A transform is two complex numbers `a` and `b` for each pair of frames: a point `p`, in pixels from the frame's centre,
goes to `a p + b`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from emt.synthetic.sprites import blur

Transform = tuple[Tensor, Tensor]
"""`a` and `b`, complex, (n,) each."""

_SIGMAS = (3.0, 1.5, 0.8)  # pixels of blur, coarse to fine: the first sees motions of some pixels
_ITERATIONS = 8
_SPACING = 2  # pixels between the points that are compared
_LONGEST = 3.0  # pixels of one iteration
_REACH, _GRID = 20, 5  # pixels to each side that are searched, and between the pans that are tried
_ENOUGH = 0.25  # of the scene's points have to stay in the frame
_DIFFERENT = 0.15  # of full brightness: a point that differs by more is no worse for it


class Alignment:
    """Aligns the first of each pair of frames with the second.

    Args:
        first: (n, 3, size, size) in [0, 1].
        second: as `first`.
        scene: (n, size, size) weights of the first frame's points, 0 where something else than the scene is.
    """

    def __init__(self, first: Tensor, second: Tensor, scene: Tensor) -> None:
        self._half = first.shape[-1] / 2
        at = torch.arange(_SPACING / 2, first.shape[-1], _SPACING, device=first.device) - self._half
        y, x = torch.meshgrid(at, at, indexing="ij")
        self._points = torch.complex(x.flatten(), y.flatten())
        here = self._points[None].expand(len(first), -1)
        self._scene = self._sample(scene[:, None].float(), here)[:, 0]
        # By level: colours of the points, the second frame, and its gradients.
        self._levels = []
        for sigma in _SIGMAS:
            goal = blur(second, sigma)
            wide = F.pad(goal, (1, 1, 1, 1), "replicate")
            across = (wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2]) / 2
            down = (wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]) / 2
            self._levels.append((self._sample(blur(first, sigma), here), torch.cat([goal, across, down], 1)))

    def refine(self, guess: Transform) -> Transform:
        """The transform near a guess under which the frames agree."""
        a, b = guess
        x, y = self._points.real, self._points.imag
        for colours, goal in self._levels:
            for _ in range(_ITERATIONS):
                place, weight = self._places(a, b)
                found, across, down = self._sample(goal, place).chunk(3, 1)  # (n, 3, points)
                off = found - colours
                # By the real and imaginary parts of `a`, then of `b`.
                slope = torch.stack([across * x + down * y, down * x - across * y, across, down], -1)
                # Cauchy weights: what disagrees by more than most is not of the scene.
                size = off.abs().mean(1)
                usual = (1.5 * size.median(1, keepdim=True).values).clamp(min=0.01)
                weighted = slope * (weight / (1 + (size / usual).square()))[:, None, :, None]
                normal = torch.einsum("ncpi,ncpj->nij", weighted, slope)
                damping = 1e-3 * normal.diagonal(dim1=1, dim2=2) + 1e-6
                right = -torch.einsum("ncpi,ncp->ni", weighted, off)
                step = torch.linalg.solve(normal + torch.diag_embed(damping), right)
                step = step * (_LONGEST / step[:, 2:].norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
                a = a + torch.complex(step[:, 0], step[:, 1])
                b = b + torch.complex(step[:, 2], step[:, 3])
        return a, b

    def search(self) -> Transform:
        """The pan that explains the pictures best, of a grid of them: to start from where scenes leap."""
        still = torch.ones_like(self._scene[:, 0], dtype=torch.complex64)
        steps = range(-_REACH, _REACH + 1, _GRID)
        return self.best([(still, torch.full_like(still, complex(x, y))) for y in steps for x in steps], level=0)

    def best(self, candidates: Sequence[Transform], level: int = -1) -> Transform:
        """For each pair of frames the candidate that explains it best, of equals the first; on a level of blur."""
        errors = torch.stack([self._error(*candidate, level) for candidate in candidates])
        which = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(0)
        row = torch.arange(errors.shape[1], device=errors.device)
        return tuple(torch.stack(part)[which, row] for part in zip(*candidates, strict=True))  # type: ignore[return-value]

    def _error(self, a: Tensor, b: Tensor, level: int) -> Tensor:
        """Mean difference of the scene's points that stay in the frame: (n,)."""
        colours, goal = self._levels[level]
        place, weight = self._places(a, b)
        off = (self._sample(goal[:, :3], place) - colours).abs().mean(1).clamp(max=_DIFFERENT)
        left, total = weight.sum(1), self._scene.sum(1)
        error = (off * weight).sum(1) / left.clamp(min=1)
        # Few points that stay in the frame agree by chance.
        return torch.where(left < _ENOUGH * total, torch.inf, error)

    def _places(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Destinations of the points, (n, points) complex, and their weights: 0 outside of the frame."""
        place = a[:, None] * self._points + b[:, None]
        inside = (place.real.abs() < self._half - 1) & (place.imag.abs() < self._half - 1)
        return place, self._scene * inside

    def _sample(self, images: Tensor, place: Tensor) -> Tensor:
        """Images (n, channels, size, size) at complex places (n, points): (n, channels, points)."""
        grid = torch.view_as_real(place)[:, None] / self._half
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)[:, :, 0]


def align(first: Tensor, second: Tensor, scene: Tensor, guess: Transform, clips: int) -> Transform:
    """Transforms of all steps of some clips: the best from a guess, from a search, and from what neighbours in time do.

    Args:
        first: frames but the last of each clip, one clip after the other: (clips · steps, 3, size, size) in [0, 1].
        second: frames but the first.
        scene: as for `Alignment`.
        guess: of each step.
        clips: how many.
    """
    alignment = Alignment(first, second, scene)
    found = alignment.best([guess, alignment.refine(guess), alignment.refine(alignment.search())])
    neighbours = []
    for way in (1, -1):
        a, b = (part.unflatten(0, (clips, -1)).roll(way, 1).flatten() for part in found)
        neighbours.append(alignment.refine((a, b)))
    return alignment.best([found, *neighbours])
