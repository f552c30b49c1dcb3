"""Reading of motion from a backbone's hidden states, which teaches it to see what moves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MotionReader(nn.Module):
    """Linear maps from what layers of a backbone pass on to how everything moves and how subjects are held.

    A small backbone that only denoises shows its adapter where things are, and not how they move (recipes/README.md).
    The maps read hidden states as they are: through a layer norm, as the adapter has them, a network does not begin to
    learn what moves. They are thrown away after training.

    Args:
        widths: channels of the hidden states that are read, of each layer.
        device: of the maps.
        dtype: of the maps.
    """

    NAMES = ("x", "y", "step_x", "step_y", "sin", "cos", "turn", "size")
    """Readings: displacement since frame 0 and since the frame before, and `Motions.poses`."""
    UNITS = (32.0, 32.0, 4.0, 4.0, 0.5, 0.25, 0.125, 0.25)
    """Of displacements, pixels; a step is some eighth of the way. Of sine and cosine, radians, and log size."""

    def __init__(
        self,
        widths: Iterable[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(width, len(self.NAMES), device=device, dtype=dtype) for width in widths])
        for linear in self.maps:  # hidden states are large where nothing normalises them
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        # Squares of the last map's errors, and of the truth.
        self.register_buffer("_sums", torch.zeros(2, len(self.NAMES), device=device), persistent=False)
        self.register_buffer("_units", units_of_readings(device), persistent=False)

    def forward(
        self, hidden: Iterable[Tensor], displacement: Tensor, pose: Tensor, upright: Tensor, share: Tensor
    ) -> Tensor:
        """Error of the maps, a float32 scalar.

        Args:
            hidden: of noisy clips, after each layer: (batch·frames, channels, height, width).
            displacement: (batch, frames, 2, height, width), pixels.
            pose: (batch, frames, 4, height, width), `Motions.poses`: read where subjects are.
            upright: (batch,) 1 where sine and cosine of the rotation are defined, 0 where subjects have no upright.
            share: (batch,) of each clip in the sum; what noise hides cannot be read.
        """
        batch = displacement.shape[:2]
        exact, weight = readings(displacement, pose, upright, self._units)
        losses = []
        for linear, states in zip(self.maps, hidden, strict=True):
            size_here = states.shape[2:]
            seen = F.adaptive_avg_pool2d(weight, size_here).permute(0, 2, 3, 1)
            here = F.adaptive_avg_pool2d(exact, size_here).permute(0, 2, 3, 1) / seen.clamp(min=1e-4)
            read = linear(states.permute(0, 2, 3, 1)).float()
            off = F.smooth_l1_loss(read, here, beta=0.2, reduction="none") * seen
            # Each number counts the same, be it read everywhere or only where subjects are.
            off = off / seen.mean((0, 1, 2)).clamp(min=1e-3)
            losses.append((off.unflatten(0, batch).mean((1, 2, 3, 4)) * share).mean())
        with torch.no_grad():
            squares = (torch.stack([(read - here).square(), here.square()]) * seen).mean((2, 3))
            self._sums += (squares.unflatten(1, batch).mean(2) * share[:, None]).mean(1)
        return torch.stack(losses).mean()

    def explained(self) -> dict[str, float]:
        """Share of the variance (R²) that the last map explained since the last call. Waits for the device."""
        off, total = self._sums.tolist()
        self._sums.zero_()
        return {f"r2_{name}": 1 - a / max(b, 1e-12) for name, a, b in zip(self.NAMES, off, total, strict=True)}


def units_of_readings(device: torch.device | str) -> Tensor:
    """`MotionReader.UNITS` as `readings` divides by them."""
    return torch.tensor(MotionReader.UNITS, device=device).view(-1, 1, 1)


def readings(displacement: Tensor, pose: Tensor, upright: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Readings of clips, and where they are there to be read, 0 or 1.

    Args:
        displacement: as `MotionReader.forward`.
        pose: likewise.
        upright: likewise.
        units: `units_of_readings`.

    Returns:
        Two of (batch·frames, readings, height, width), float32; values are 0 where nothing is to be read.
    """
    sine, cosine, turn, size = pose.float().split(1, dim=2)
    there = sine.square() + cosine.square()
    steps = displacement.diff(dim=1, prepend=displacement[:, :1])
    exact = torch.cat([displacement, steps, sine, cosine - there, turn, size], 2).flatten(0, 1).float()
    turned = upright.float().view(-1, 1, 1, 1, 1) * there
    everywhere = torch.ones_like(there).expand(-1, -1, 4, -1, -1)
    weight = torch.cat([everywhere, turned, turned, there, there], 2).flatten(0, 1)
    return exact / units * weight, weight
