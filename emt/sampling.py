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
    FlowMatchEulerDiscreteScheduler,
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


#: Of a flow; DDIM without added noise is Euler's method there.
FLOW_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": FlowMatchEulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
}


def is_flow(scheduler: SchedulerMixin) -> bool:
    """True if a scheduler's model predicts the velocity of a flow, `noise − clip`, and not noise."""
    return scheduler.config.get("prediction_type") == "flow_prediction" or isinstance(
        scheduler, FlowMatchEulerDiscreteScheduler
    )


def make_sampler(name: str, scheduler: SchedulerMixin) -> Any:
    """A new sampler of the kind `name`, for the model whose scheduler this is.

    Raises:
        EmtError: for a name that is not of `SCHEDULERS`, or not of `FLOW_SCHEDULERS` if the model has a flow.
    """
    flow = is_flow(scheduler)
    allowed = FLOW_SCHEDULERS if flow else SCHEDULERS
    if name not in allowed:
        what = "the flow of this model has no scheduler" if flow and name in SCHEDULERS else "there is no scheduler"
        raise EmtError(f"{what} {name!r}", f"Allowed: {', '.join(allowed)}.")
    if not flow:
        return allowed[name].from_config(scheduler.config)
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
    if allowed[name] is FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return allowed[name](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def add_noise(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Noisy latents of a timestep of 1000, (n,), in the terms of a model's scheduler."""
    if is_flow(scheduler):
        sigma = (timestep.float() / 1000).view(-1, *[1] * (latents.ndim - 1))
        return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)
    return DDIMScheduler.from_config(scheduler.config).add_noise(latents, noise, timestep)


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
    """Random numbers of a seed, the same on every device; whole numbers of any size are distinct seeds.

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
