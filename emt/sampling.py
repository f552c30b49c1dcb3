"""Sampling: the solvers and their timesteps, and the steps with guidance."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emt.errors import EmtError
from emt.solvers import DDIM, DPMSolver

_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"

#: Steps up to which the spacing of a sampler matters.
_COARSE = 60


@dataclass(frozen=True)
class Kind:
    """A kind of sampler: a class of `emt.solvers`, or one of diffusers, which is imported when it is needed.

    Args:
        name: of diffusers' class.
        own: the class that takes its place for configurations that it builds.
    """

    name: str
    own: Callable[..., Any] | None = None

    def from_config(self, config: Mapping[str, Any], **others: Any) -> Any:
        """A sampler of a scheduler's configuration, with other entries."""
        builds = getattr(self.own, "builds", None)
        if self.own and (builds is None or builds(config, **others)):
            return self.own(config, **others)
        return self.load().from_config(config, **others)

    def load(self) -> Any:
        """The class of diffusers."""
        import diffusers

        return getattr(diffusers, self.name)


SCHEDULERS: dict[str, Kind] = {
    "ddim": Kind("DDIMScheduler", DDIM),
    "dpm++": Kind("DPMSolverMultistepScheduler", DPMSolver),
    "unipc": Kind("UniPCMultistepScheduler"),
    "euler": Kind("EulerDiscreteScheduler"),
    "lcm": Kind("LCMScheduler"),
    "euler_a": Kind("EulerAncestralDiscreteScheduler"),
    "heun": Kind("HeunDiscreteScheduler"),
    "dpm2": Kind("KDPM2DiscreteScheduler"),
    "dpm2_karras": Kind("KDPM2DiscreteScheduler"),
    "dpm2_a": Kind("KDPM2AncestralDiscreteScheduler"),
    "dpm2_a_karras": Kind("KDPM2AncestralDiscreteScheduler"),
    "dpm++_2m": Kind("DPMSolverMultistepScheduler", DPMSolver),
    "dpm++_2m_karras": Kind("DPMSolverMultistepScheduler", DPMSolver),
    "dpm++_2m_sde": Kind("DPMSolverMultistepScheduler", DPMSolver),
    "dpm++_2m_sde_karras": Kind("DPMSolverMultistepScheduler", DPMSolver),
    "dpm++_sde": Kind("DPMSolverSinglestepScheduler"),
    "dpm++_sde_karras": Kind("DPMSolverSinglestepScheduler"),
    "deis": Kind("DEISMultistepScheduler"),
    "ddpm": Kind("DDPMScheduler"),
    "tcd": Kind("TCDScheduler"),
}

#: Samplers that have the model's own spacing, or that of their distillation.
_OWN_SPACING = ("ddim", "lcm", "tcd")


def scheduler_options(name: str, steps: int) -> dict[str, Any]:
    """Options of the class of `SCHEDULERS` of a name, as diffusers' table of the names of other programs has them."""
    options: dict[str, Any] = {}
    if name not in _OWN_SPACING or (name, steps) == ("ddim", 1):
        # Of some larger numbers of steps, "trailing" has one more, at timestep −1; fine steps are alike in both.
        # The noise levels of Karras et al. (2022, arXiv 2206.00364, equation 5) go down to the last timestep, 0.
        trailing = steps == 1 or (steps <= _COARSE and not name.endswith("_karras"))
        options["timestep_spacing"] = "trailing" if trailing else "linspace"
    if name.endswith("_karras"):
        options["use_karras_sigmas"] = True
    if "_sde" in name:
        options["algorithm_type"] = "sde-dpmsolver++"
    if SCHEDULERS[name].name == "DPMSolverSinglestepScheduler":
        options["lower_order_final"] = True  # else it does not take an odd number of steps
    return options


#: Of a flow; DDIM without added noise is Euler's method there.
FLOW_SCHEDULERS: dict[str, Kind] = {
    "ddim": Kind(_FLOW_EULER),
    "dpm++": Kind("DPMSolverMultistepScheduler"),
    "unipc": Kind("UniPCMultistepScheduler"),
    "euler": Kind(_FLOW_EULER),
}


_CLIPPING = ("ddim", "ddpm")  # that cut clips at 1 where their configuration does not say otherwise


def check_schedule(config: Mapping[str, Any]) -> None:
    """Check that a scheduler's configuration describes a schedule that latents are sampled by.

    Args:
        config: of any scheduler of diffusers.

    Raises:
        EmtError: it does not; names the entry that is wrong, and what is allowed.
    """
    if config.get("prediction_type") == "flow_prediction" or config.get("_class_name") == _FLOW_EULER:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        _expect(config, "shift", _is_number(shift, 0) and shift > 0, "a number above 0")
        return
    count = config.get("num_train_timesteps", 1000)
    _expect(config, "num_train_timesteps", type(count) is int and 2 <= count <= 100_000, "a number from 2 to 100000")
    schedule = config.get("beta_schedule", "linear")
    _expect(config, "beta_schedule", schedule in SCHEDULES, ", ".join(SCHEDULES))
    if (betas := config.get("trained_betas")) is not None:
        fit = isinstance(betas, list) and len(betas) == count and all(_is_number(b, 0) and 0 < b < 1 for b in betas)
        _expect(config, "trained_betas", fit, f"null or {count} numbers between 0 and 1")
    elif schedule != "squaredcos_cap_v2":
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        _expect(config, "beta_start", _is_number(first, 0) and 0 < first < 1, "a number between 0 and 1")
        _expect(config, "beta_end", _is_number(last, first) and last < 1, f"a number from {first:g} to 1")
    kind = config.get("prediction_type", "epsilon")
    _expect(config, "prediction_type", kind in PREDICTIONS, ", ".join(PREDICTIONS))
    _expect(config, "timestep_spacing", config.get("timestep_spacing", "leading") in SPACINGS, ", ".join(SPACINGS))
    offset = config.get("steps_offset", 0)
    _expect(config, "steps_offset", type(offset) is int and 0 <= offset < count, f"a number from 0 to {count - 1}")
    zero = config.get("rescale_betas_zero_snr", False)
    _expect(config, "rescale_betas_zero_snr", isinstance(zero, bool), "true or false")
    # Lin et al. 2023, section 3.3: of pure noise, the noise says nothing about the clip.
    _expect(config, "rescale_betas_zero_snr", not (zero and kind == "epsilon"), "false with the prediction of noise")
    for name in ("clip_sample", "thresholding"):
        clips = config.get(name, name == "clip_sample" and config.get("_class_name") in ("DDIMScheduler",))
        _expect(config, name, clips is False, "false, as latents are no pixels")


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


def _expect(config: Mapping[str, Any], name: str, fits: bool, allowed: str) -> None:
    """Raise an EmtError about an entry of a scheduler's configuration unless it fits."""
    if not fits:
        value = config.get(name, "left out")
        raise EmtError(f"{name} of scheduler_config.json is {value!r:.60}", f"Allowed: {allowed}.")


def is_flow(scheduler: Any) -> bool:
    """True if a scheduler's model predicts the velocity of a flow, `noise − clip`, and not noise."""
    return scheduler.config.get("prediction_type") == "flow_prediction" or type(scheduler).__name__ == _FLOW_EULER


def flow_shift(scheduler: Any) -> float:
    """Shift of a flow's noise levels towards noise."""
    return float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)))


def make_sampler(name: str, scheduler: Any, steps: int) -> Any:
    """Make a sampler with its timesteps, from noise to image, on the CPU; a new one for each clip, as it keeps state.

    The spacing does not depend on how the model was opened: samplers begin at the end of the schedule ("trailing", Lin
    et al. 2023, arXiv 2305.08891, table 2); `lcm` and `tcd` have the timesteps of their distillation.
    `ddim` has the model's own spacing; of one step, it takes the last timestep, not the first.

    Args:
        name: of the kind of sampler.
        scheduler: the model's.
        steps: to take.

    Raises:
        EmtError: for a name that is not of `SCHEDULERS`, or not of `FLOW_SCHEDULERS` if the model has a flow; for steps
            that it does not take.
    """
    flow = is_flow(scheduler)
    allowed = FLOW_SCHEDULERS if flow else SCHEDULERS
    if name not in allowed:
        what = "the flow of this model has no scheduler" if flow and name in SCHEDULERS else "there is no scheduler"
        raise EmtError(f"{what} {name!r}", f"Allowed: {', '.join(allowed)}.")
    shift = flow_shift(scheduler)
    if not flow:
        options = scheduler_options(name, steps)
        if name in _CLIPPING and "clip_sample" not in scheduler.config:  # of a sampler that has no such entry
            options["clip_sample"] = False
        sampler = allowed[name].from_config(scheduler.config, **options)
    elif allowed[name].name == _FLOW_EULER:
        sampler = allowed[name].load()(shift=shift)
    else:
        sampler = allowed[name].load()(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    try:
        sampler.set_timesteps(steps, device="cpu")
    except ValueError as error:
        raise EmtError(f"{name} does not take {steps} steps: {error}", "Use fewer steps.") from None
    return sampler


def run_sampler(
    predict: Callable[[Tensor, Tensor, int, bool], Tensor],
    sampler: Any,
    noise: Tensor,
    guidance: float | Callable[[], float],
    *,
    guided_steps: int | None = None,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
    on_step: Callable[[int, int], None] | None = None,
    after_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Denoise with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    Args:
        predict: the network, of a sample, a timestep on its device, the number of the step, and whether the batch is
            doubled for guidance: then the first half is without the prompt, or with the negative one, the second half
            with it.
        sampler: of `make_sampler`.
        noise: (clips, …), float32.
        guidance: scale; 1 is without. A function is asked before each step.
        guided_steps: steps with guidance, the first ones; None for all.
        generators: of each clip, or one of all, for samplers that add noise; None for torch's own.
        on_step: called with (steps done, steps) after each.
        after_step: called with the number of each step, its timestep and the latents that it made; returns those to go
            on with, or None to end there.

    Returns:
        Latents, as the noise.
    """
    steps = len(sampler.timesteps)
    guided_steps = steps if guided_steps is None else guided_steps
    # The sampler's own numbers stay on the host, which does not have to wait for the device to read them.
    timesteps = sampler.timesteps.to(noise.device)
    latents = noise * getattr(sampler, "init_noise_sigma", 1.0)  # a flow begins with noise as it is
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        options["generator"] = list(generators) if isinstance(generators, Sequence) else generators
    scales = hasattr(sampler, "scale_model_input")  # Euler's method for flows has nothing to scale
    for i, timestep in enumerate(sampler.timesteps):
        scale = guidance() if callable(guidance) else guidance
        guided = i < guided_steps and scale != 1
        scaled = sampler.scale_model_input(latents, timestep) if scales else latents
        prediction = predict(torch.cat([scaled, scaled]) if guided else scaled, timesteps[i], i, guided).float()
        if guided:
            away, towards = prediction.chunk(2)
            prediction = away + scale * (towards - away)
        latents = sampler.step(prediction, timestep, latents, **options).prev_sample
        if on_step:
            on_step(i + 1, steps)
        if after_step:
            changed = after_step(i, timestep, latents)
            if changed is None:
                break
            latents = changed
    return latents


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Noisy latents of a timestep of 1000, (n,), in the terms of a model's scheduler."""
    if is_flow(scheduler):
        sigma = (timestep.float() / 1000).view(-1, *[1] * (latents.ndim - 1))
        return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)
    return DDIM(scheduler.config).add_noise(latents, noise, timestep)


class NonFiniteError(EmtError):
    """A clip came out as NaN or infinity.

    Attributes:
        clips: Their indices in the batch.
        seeds: Their seeds.
        half: They were computed in half precision, which may have overflowed.
    """

    def __init__(self, clips: list[int], seeds: list[int], half: bool = True) -> None:
        hint = "Half precision may have overflowed: try --precision bf16 or --precision fp32, or a lower --guidance."
        if not half:
            hint = "It was computed in fp32: leave out what was added to the model (--lora, --embedding, --vae, "
            hint += "--control), use a lower --guidance, or import the model again."
        super().__init__(f"the network produced NaN or infinity (seed {', '.join(map(str, seeds))})", hint)
        self.clips = clips
        self.seeds = seeds
        self.half = half

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.clips, self.seeds, self.half)


def noise_generator(seed: int) -> torch.Generator:
    """Random numbers of a seed, the same on every device; whole numbers of any size are distinct seeds.

    The generator itself reads 32 bits of a seed. Of larger seeds a hash is taken, so that they are not the same clip as
    their last 32 bits.
    """
    if seed > 0xFFFFFFFF:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return torch.Generator().manual_seed(seed)


def check_finite(latents: Tensor, seeds: Sequence[int], dtype: torch.dtype) -> None:
    """Raise `NonFiniteError` that names the clips (clips, …) that are not finite; waits for the device once.

    Args:
        latents: of the clips.
        seeds: of each.
        dtype: that the network computes in.
    """
    broken = [i for i, good in enumerate(torch.isfinite(latents).flatten(1).all(1).tolist()) if not good]
    if broken:
        raise NonFiniteError(broken, [seeds[i] for i in broken], half=dtype != torch.float32)
