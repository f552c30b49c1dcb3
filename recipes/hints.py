"""Hints of motion in a backbone's training, which teach it to draw what it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.reader import MotionReader, readings, units_of_readings


class MotionHints(nn.Module):
    """Linear map from how everything moves to what is added to a backbone's hidden states in some of its clips.

    Captions of footage say how things move, and large models learn to draw what they are told. Captions of the rendered
    world never do: its backbone draws what it sees in the noise, and does not draw otherwise if an adapter tells it
    that a subject turns. The map is thrown away after training.

    Args:
        channels: of the hidden states.
        device: of the map.
        dtype: of the map.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.map = nn.Linear(len(MotionReader.NAMES) + 1, channels, device=device, dtype=dtype)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        # Denoising losses of clips without and with hints, and how many there were.
        self.register_buffer("_sums", torch.zeros(3, device=device), persistent=False)
        self.register_buffer("_units", units_of_readings(device), persistent=False)

    def forward(self, displacement: Tensor, pose: Tensor, upright: Tensor, height: int, width: int) -> Tensor:
        """Values for each token of what it is told, (batch, frames · height · width, channels).

        Args:
            displacement: (batch, frames, 2, …), as `MotionReader.forward`.
            pose: (batch, frames, 4, …), likewise.
            upright: (batch,), likewise.
            height: tokens of a frame down.
            width: tokens of a frame across.
        """
        values, weight = readings(displacement, pose, upright, self._units)
        seen = F.adaptive_avg_pool2d(weight, (height, width))
        here = F.adaptive_avg_pool2d(values, (height, width)) / seen.clamp(min=1e-4)
        told = torch.cat([here, seen[:, -1:]], 1).to(self.map.weight.dtype)
        batch = displacement.shape[0]
        return self.map(told.permute(0, 2, 3, 1)).view(batch, -1, self.map.out_features)

    @contextlib.contextmanager
    def told(self, block: nn.Module, clips: int, height: int, width: int, **truth: Tensor) -> Iterator[None]:
        """Context manager: the last `clips` of a batch are told how they move, in what `block` passes on."""
        if not clips:
            yield
            return
        hint = self(**{name: value[-clips:] for name, value in truth.items()}, height=height, width=width)

        def add(_module: nn.Module, _given: Any, passed_on: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, features = passed_on
            return torch.cat([x[:-clips], x[-clips:] + hint]), features

        handle = block.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def note(self, without: Tensor, told: Tensor) -> None:
        """Remember denoising losses, of the same weights, for `losses`."""
        self._sums += torch.stack([without, told, torch.ones_like(told)])

    def losses(self) -> dict[str, float]:
        """Mean denoising loss without and with hints since the last call. Waits for the device."""
        without, told, n = self._sums.tolist()
        self._sums.zero_()
        return {"plain": without / max(n, 1), "told": told / max(n, 1)} if n else {}
