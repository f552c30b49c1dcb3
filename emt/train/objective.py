"""The diffusion objective: noise schedule, targets, timestep sampling, and the adapter's loss on pairs.

Pure functions of tensors: whoever calls draws the noise, so that a resumed or graph-captured step repeats exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emt.backbone import Backbone
from emt.sampling import flow_shift, is_flow

PREDICTION_TYPES = ("epsilon", "v_prediction")


def shift_timesteps(u: Tensor, shift: float) -> Tensor:
    """Move uniform times in [0, 1] towards noise: ``s·u / (1 + (s − 1)·u)`` (Esser et al. 2024, section 5.3.2).

    Neighbouring frames share their content, so that a video needs more noise than an image to lose it.
    1 changes nothing.
    """
    return shift * u / (1 + (shift - 1) * u)


def stratified(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(n,) numbers in [0, 1), one drawn from each of n equal parts, in random order."""
    u = torch.rand(n, generator=generator, device=device)
    return (torch.randperm(n, generator=generator, device=device) + u) / n


class Objective:
    """Noising and regression target of a discrete diffusion schedule.

    Args:
        alphas_cumprod: (timesteps,) share of the signal's variance that is left at each timestep.
        prediction_type: "epsilon" (the noise) or "v_prediction" (Salimans and Ho 2022).

    Raises:
        ValueError: for another prediction type.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}, allowed are {', '.join(PREDICTION_TYPES)}")
        self.prediction_type = prediction_type
        self.signal = alphas_cumprod.double().sqrt().float()
        self.noise = (1 - alphas_cumprod.double()).sqrt().float()

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | str = "cpu") -> Objective:
        """The objective that a diffusers scheduler samples from, on `device`."""
        return cls(scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type)

    def sample_timesteps(self, n: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        """(n,) int64 timesteps, one drawn from each of n equal parts of [0, 1], which evens out a batch's loss.

        Args:
            n: how many.
            generator: on the schedule's device.
            shift: see `shift_timesteps`.
        """
        count = self.signal.shape[0]
        u = stratified(n, generator, self.signal.device)
        return (shift_timesteps(u, shift) * count).long().clamp(max=count - 1)

    def signal_variance(self, timestep: Tensor) -> Tensor:
        """Share of the signal's variance that is left at timesteps (batch,)."""
        return self.signal[timestep].square()

    def _at(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        if isinstance(timestep, int):  # a slice: indexing by a number would copy it to the device
            signal, noise = self.signal[timestep : timestep + 1], self.noise[timestep : timestep + 1]
        else:
            signal, noise = self.signal[timestep], self.noise[timestep]
        return signal.view(shape), noise.view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Noisy latents, in the type of `latents`; `timestep` is one for all or (batch,)."""
        signal, sigma = self._at(timestep, latents)
        return (signal * latents.float() + sigma * noise.float()).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Target of the prediction, in float32: the noise, or ``v = √ᾱ·noise − √(1−ᾱ)·latents``."""
        if self.prediction_type == "epsilon":
            return noise.float()
        signal, sigma = self._at(timestep, latents)
        return signal * noise.float() - sigma * latents.float()

    def loss(
        self,
        prediction: Tensor,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor | int,
        subject: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error to `target`, a float32 scalar.

        Args:
            prediction: of the network.
            latents: that were noised.
            noise: that was added.
            timestep: one for all or (batch,).
            subject: where extra weight is put, broadcastable to `latents`. It counts in proportion to the signal's
                variance that is left: where the noise still hides what is there, an extra weight there would
                pull the prediction towards it.
        """
        target = self.target(latents, noise, timestep)
        if subject is None:
            return F.mse_loss(prediction.float(), target)
        signal, _ = self._at(timestep, latents)
        return ((1 + signal.square() * subject) * (prediction.float() - target).square()).mean()


class FlowObjective:
    """Noising and regression target of flow matching (Lipman et al. 2023, arXiv 2210.02747), as Wan is trained.

    The noisy latents of timestep t are ``(1 − σ)·latents + σ·noise`` with σ = t/1000, the target is their velocity
    ``noise − latents``. Timesteps are real numbers, float32.

    Args:
        device: to draw timesteps on.
        shift: of timesteps towards noise, where none is given.
    """

    def __init__(self, device: torch.device | str = "cpu", shift: float = 1.0) -> None:
        self.device, self.shift = torch.device(device), shift

    def sample_timesteps(self, n: int, generator: torch.Generator, shift: float | None = None) -> Tensor:
        """(n,) float32 timesteps, one drawn from each of n equal parts of [0, 1], as `Objective.sample_timesteps`."""
        drawn = stratified(n, generator, self.device)
        return 1000 * shift_timesteps(drawn, self.shift if shift is None else shift)

    def signal_variance(self, timestep: Tensor) -> Tensor:
        """Share of the signal's variance that is left at timesteps (batch,): (1 − σ)²."""
        return (1 - timestep.float() / 1000).square()

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Noisy latents, in the dtype of `latents`; `timestep` is one for all or (batch,)."""
        sigma = self._sigma(timestep, latents)
        return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """The velocity that the network is to predict, in float32; the same at every timestep."""
        return noise.float() - latents.float()

    def loss(
        self,
        prediction: Tensor,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor | float,
        subject: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error to `target`, a float32 scalar, weighted as in `Objective.loss`."""
        error = (prediction.float() - self.target(latents, noise, timestep)).square()
        if subject is None:
            return error.mean()
        return ((1 + (1 - self._sigma(timestep, latents)) ** 2 * subject) * error).mean()

    def _sigma(self, timestep: Tensor | float, like: Tensor) -> Tensor | float:
        if not isinstance(timestep, Tensor):
            return timestep / 1000
        return timestep.float().view(-1, *[1] * (like.ndim - 1)) / 1000


def objective_of(scheduler: Any, device: torch.device | str = "cpu") -> Objective | FlowObjective:
    """The objective of a model by its scheduler; of a flow, timesteps are shifted as the sampler's are."""
    if is_flow(scheduler):
        return FlowObjective(device, flow_shift(scheduler))
    return Objective.from_scheduler(scheduler, device)


def adapter_loss(
    unet: Backbone,
    objective: Objective | FlowObjective,
    reference: Tensor,
    target: Tensor,
    text: Tensor,
    empty_text: Tensor,
    timestep: Tensor,
    noise: Tensor,
    reference_noise: Tensor,
    reference_timestep: int = 400,
    subject: Tensor | None = None,
) -> Tensor:
    """Loss of denoising `target` with the motion of `reference` (EfficientMT, section 3.4).

    The reference pass runs the frozen backbone, without gradients.

    Args:
        unet: the adapted network; gradients reach what requires them.
        objective: of the base.
        reference: latents, (batch, channels, frames, height, width); the same motion as `target`, another appearance.
        target: latents of the same shape.
        text: the targets' captions, (batch, tokens, width); of the empty prompt where a caption is dropped.
        empty_text: encoding of the empty prompt, (1, tokens, width).
        timestep: (batch,) of the targets.
        noise: of the targets.
        reference_noise: of the references, fresh each step.
        reference_timestep: noise level at which references are read.
        subject: extra weight on parts of the targets (`Objective.loss`).

    Returns:
        A float32 scalar.
    """
    with torch.no_grad():
        noisy = objective.add_noise(reference, reference_noise, reference_timestep)
        level = torch.full_like(timestep, reference_timestep)
        motion = unet.encode_reference(noisy, level, empty_text.expand(reference.shape[0], -1, -1))
    prediction = unet(objective.add_noise(target, noise, timestep), timestep, text, motion)
    return objective.loss(prediction, target, noise, timestep, subject)
