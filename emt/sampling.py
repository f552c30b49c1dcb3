"""Sampling: the solvers, the check of what they end with, and the reuse of deep features between steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from emt.errors import EmtError

if TYPE_CHECKING:
    from emt.backends.base import Backend
    from emt.features import PreparedMotion, TextFeatures

SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}


class NonFiniteError(EmtError):
    """A clip came out as NaN or infinity; `clips` are their indices in the batch."""

    def __init__(self, clips: list[int], seeds: list[int]) -> None:
        super().__init__(
            f"the network produced NaN or infinity (seed {', '.join(map(str, seeds))})",
            "Half precision may have overflowed: try --precision bf16 or --precision fp32, or a lower --guidance.",
        )
        self.clips = clips
        self.seeds = seeds

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.clips, self.seeds)


def noise_generator(seed: int) -> torch.Generator:
    """Random numbers of a seed, the same on every device; whole numbers of any size are told apart.

    The generator itself reads 32 bits of a seed. Of larger seeds a hash is taken, so that they are not the same clip as
    their last 32 bits.
    """
    if seed > 0xFFFFFFFF:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return torch.Generator().manual_seed(seed)


def check_finite(latents: Tensor, seeds: Sequence[int]) -> None:
    """Raise `NonFiniteError` that names the clips (clips, …) that are not finite; waits for the device once."""
    broken = [i for i, good in enumerate(torch.isfinite(latents).flatten(1).all(1).tolist()) if not good]
    if broken:
        raise NonFiniteError(broken, [seeds[i] for i in broken])


class DeepFeatureReuse:
    """Denoises, computing the part below the highest resolution in every n-th call only (DeepCache, arXiv 2312.00858).

    A call of another batch size than the last one, such as the first without guidance, computes it, too.

    Args:
        backend: executes the network.
        interval: n.
    """

    def __init__(self, backend: Backend, interval: int) -> None:
        self._backend, self._interval = backend, interval
        self._deep: Tensor | None = None
        self._batch = self._age = 0

    def __call__(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """As `emt.backends.base.Backend.denoise`."""
        if self._interval == 1:
            return self._backend.denoise(sample, timestep, text, motion)
        self._age += 1
        if self._deep is None or self._age == self._interval or self._batch != len(sample):
            self._batch, self._age = len(sample), 0
            prediction, self._deep = self._backend.denoise_deep(sample, timestep, text, motion)
            return prediction
        return self._backend.denoise_shallow(sample, timestep, text, motion, self._deep)
