"""DDIM and DPM-Solver++ without diffusers, whose import takes several times as long as PyTorch's.

They compute what `DDIMScheduler` and `DPMSolverMultistepScheduler` do, operation by operation, so that clips stay the
same to the last bit; names are diffusers', so that either can be put in the place of the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from emt.parts import Config

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}


def _betas(config: Config) -> Tensor:
    """Variances that each of the timesteps adds.

    Raises:
        NotImplementedError: for an unknown schedule.
    """
    first, last, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(first, last, count, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        signal = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(signal)], dtype=torch.float32)
    else:
        raise NotImplementedError(f"the schedule {config.beta_schedule!r} is not known")
    return _without_last_signal(betas) if config.rescale_betas_zero_snr else betas


def _without_last_signal(betas: Tensor) -> Tensor:
    """Betas after which nothing is left of an image (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    signal -= last
    signal *= first / (first - last)
    signal = signal**2
    return 1 - torch.cat([signal[0:1], signal[1:] / signal[:-1]])


class Solver:
    """Schedule, configuration and thresholding, which both have in common.

    Args:
        config: of any scheduler of diffusers; entries that this one has not, or that were filled in where none was
            given, do not count.
        others: entries that count in any case.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    order = 1
    init_noise_sigma = 1.0
    timesteps: Tensor
    num_inference_steps: int

    def __init__(self, config: Mapping[str, Any], **others: Any) -> None:
        filled = config.get("_use_default_values") or ()
        given = {name: value for name, value in config.items() if name in self.DEFAULTS and name not in filled}
        self.config = Config(self.DEFAULTS | given | others)
        self.betas = _betas(self.config)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **others: Any) -> Solver:
        """The same as calling the class, as diffusers has it."""
        return cls(config, **others)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def _threshold(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""
        flat = sample.flatten(1)
        most = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1)
        most = torch.clamp(most, min=1, max=self.config.sample_max_value).unsqueeze(1)
        return (torch.clamp(flat, -most, most) / most).reshape(sample.shape)


class DDIM(Solver):
    """DDIM (Song et al. 2021, arXiv 2010.02502) with even steps from the end of the schedule, whatever their number.

    diffusers takes steps of a whole number of timesteps, 1000 // n: of 334 steps the first is at timestep 667, and of
    201 the last at −1. Where that is off by more than a few percent of a step, timesteps are spread evenly, and each
    step leads to the next one.
    """

    DEFAULTS: ClassVar = _SCHEDULE | {
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    }

    def __init__(self, config: Mapping[str, Any], **others: Any) -> None:
        super().__init__(config, **others)
        self.final_alpha_cumprod = torch.tensor(1.0) if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        self._even = False

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps for a number of steps.

        Raises:
            ValueError: there are more steps than timesteps, or the configuration's spacing is not known.
        """
        total, spacing, steps = self.config.num_train_timesteps, self.config.timestep_spacing, num_inference_steps
        if steps > total:
            raise ValueError(f"the model has {total} timesteps")
        self.num_inference_steps = steps
        self._even = bool(total % steps) and steps**2 > total
        if self._even:
            places = np.arange(steps)[::-1] * (total / steps)
            if spacing == "leading":
                timesteps = places.round().astype(np.int64)
                timesteps += min(self.config.steps_offset, total - 1 - timesteps[0])
            else:
                timesteps = (places + total / steps).round().astype(np.int64) - 1
        elif spacing == "linspace":
            timesteps = np.linspace(0, total - 1, steps).round()[::-1].copy().astype(np.int64)
        elif spacing == "leading":
            timesteps = (np.arange(0, steps) * (total // steps)).round()[::-1].copy().astype(np.int64)
            timesteps += self.config.steps_offset
        elif spacing == "trailing":
            timesteps = np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
        else:
            raise ValueError(f"the spacing {spacing!r} is not known")
        self.timesteps = torch.from_numpy(timesteps).to(device)

    def step(self, model_output: Tensor, timestep: Tensor | int, sample: Tensor) -> Any:
        """Take the step from a timestep to the next one.

        Returns:
            `prev_sample`, and `pred_original_sample`, the clip that the prediction means.

        Raises:
            ValueError: for an unknown kind of prediction.
        """
        here, step = int(timestep), Fraction(self.config.num_train_timesteps // self.num_inference_steps)
        if self._even:
            later = self.timesteps[self.timesteps < here]
            step = Fraction(here - (int(later[0]) if len(later) else -1))
        following = here - int(step)
        alpha = self.alphas_cumprod[here]
        alpha_next = self.alphas_cumprod[following] if following >= 0 else self.final_alpha_cumprod
        beta = 1 - alpha
        kind = self.config.prediction_type
        if kind == "epsilon":
            clean = (sample - beta**0.5 * model_output) / alpha**0.5
            noise = model_output
        elif kind == "sample":
            clean = model_output
            noise = (sample - alpha**0.5 * clean) / beta**0.5
        elif kind == "v_prediction":
            clean = alpha**0.5 * sample - beta**0.5 * model_output
            noise = alpha**0.5 * model_output + beta**0.5 * sample
        else:
            raise ValueError(f"the prediction {kind!r} is not known")
        if self.config.thresholding:
            clean = self._threshold(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        direction = (1 - alpha_next) ** 0.5 * noise
        return SimpleNamespace(prev_sample=alpha_next**0.5 * clean + direction, pred_original_sample=clean)

    def add_noise(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples (n, …) of timesteps (n,)."""
        signal = self.alphas_cumprod.to(samples.device).to(samples.dtype)[timesteps.to(samples.device)]
        one = (-1, *[1] * (samples.ndim - 1))
        return (signal**0.5).view(one) * samples + ((1 - signal) ** 0.5).view(one) * noise


class DPMSolver(Solver):
    """DPM-Solver++ of second order with multiple steps (Lu et al. 2022, arXiv 2211.01095), the variant by midpoints."""

    #: What `builds` requires of a configuration, where it says anything.
    _REQUIRED: ClassVar[dict[str, Any]] = {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    }
    DEFAULTS: ClassVar = _SCHEDULE | {"timestep_spacing": "linspace"} | _REQUIRED

    @classmethod
    def builds(cls, config: Mapping[str, Any], **others: Any) -> bool:
        """Return whether a configuration of diffusers, with other entries, is of this variant."""
        filled = config.get("_use_default_values") or ()
        given = {name: value for name, value in config.items() if name not in filled} | others
        return all(given.get(name, wanted) == wanted for name, wanted in cls._REQUIRED.items())

    def __init__(self, config: Mapping[str, Any], **others: Any) -> None:
        super().__init__(config, **others)
        if self.config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # the first sigma is finite

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps for a number of steps.

        Raises:
            ValueError: the configuration's spacing is not known.
        """
        total, spacing, steps = self.config.num_train_timesteps, self.config.timestep_spacing, num_inference_steps
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].copy().astype(np.int64)
        elif spacing == "leading":
            timesteps = (np.arange(0, steps + 1) * (total // (steps + 1))).round()[::-1][:-1].copy().astype(np.int64)
            timesteps += self.config.steps_offset
        elif spacing == "trailing":
            timesteps = np.arange(total, 0, -total / steps).round().copy().astype(np.int64) - 1
        else:
            raise ValueError(f"the spacing {spacing!r} is not known")
        sigmas = np.array(((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5)
        sigmas = np.interp(timesteps, np.arange(0, len(sigmas)), sigmas)
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, [0]]).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps).to(device)
        self.num_inference_steps = len(timesteps)
        self._outputs: list[Tensor] = []
        self._index: int | None = None

    def _scales(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, sigma and lambda, half the logarithm of the signal's share, before step `index`."""
        alpha = 1 / ((self.sigmas[index] ** 2 + 1) ** 0.5)
        sigma = self.sigmas[index] * alpha
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def step(self, model_output: Tensor, timestep: Tensor | int, sample: Tensor) -> Any:
        """Take the step from a timestep to the next one.

        Returns:
            `prev_sample`.

        Raises:
            ValueError: for an unknown kind of prediction.
        """
        if self._index is None:
            found = (self.timesteps == timestep).nonzero()
            self._index = int(found[min(1, len(found) - 1)]) if len(found) else len(self.timesteps) - 1
        i, count = self._index, len(self.timesteps)
        alpha, sigma, level = self._scales(i)
        kind = self.config.prediction_type
        if kind == "epsilon":
            clean = (sample - sigma * model_output) / alpha
        elif kind == "sample":
            clean = model_output
        elif kind == "v_prediction":
            clean = alpha * sample - sigma * model_output
        else:
            raise ValueError(f"the prediction {kind!r} is not known")
        if self.config.thresholding:
            clean = self._threshold(clean)
        before, self._outputs = self._outputs[-1:], [clean]
        sample = sample.to(torch.float32)
        alpha_next, sigma_next, level_next = self._scales(i + 1)
        h = level_next - level
        following = (sigma_next / sigma) * sample - (alpha_next * (torch.exp(-h) - 1.0)) * clean
        if before and i < count - 1:
            r = (level - self._scales(i - 1)[2]) / h
            change = (1.0 / r) * (clean - before[0])
            following = following - 0.5 * (alpha_next * (torch.exp(-h) - 1.0)) * change
        self._index = i + 1
        return SimpleNamespace(prev_sample=following.to(clean.dtype))
