"""A teacher that needs no training: it plays a reference's motion with new content, to make pairs from real clips.

Motion guidance as in MotionClone (Ling et al., arXiv 2406.05338), with which EfficientMT's own pairs were made, on the
backbone alone: the adapter is not used, so that any base with an AnimateDiff motion module can teach.

The motion of a reference is what its temporal attention looks at. Every pixel has one attention map A (frames × frames)
for each head; of every row only the k = 1 largest entry is kept, a mask M, since the others are mostly noise. A is
read in one pass over the reference's latents, noised to t = 400, with the empty prompt: it is a function of the
layer-normed features that a reference pass keeps, A = softmax(Q Kᵀ / √d), so that nothing has to be hooked into the
network. While a clip is denoised from z_t, its own maps are held to these entries:

    g(z_t) = Σ_attentions mean‖M ∘ (A_reference − A(z_t))‖²              over the temporal attentions of up block 1
    ε̂ = ε(z_t, ∅) + s·(ε(z_t, c) − ε(z_t, ∅)) + λ·√(1 − ᾱ_t)·∇g(z_t)

The second line is classifier-free guidance with the gradient of an energy that is to fall, the first that energy. The
gradient passes through the conditional prediction alone. λ is 2000, in the first 60% of the steps, and rises and falls
linearly over 1/30 of all steps at both ends, as in the authors' configuration: 180 of 300 steps, 10 at each end. Four
things are ours:

- g is a mean over the entries, so that its gradient at one latent value is in inverse proportion to their number.
  λ is meant for 16 frames of 64×64 latents, and scaled with the number of values for other sizes.
- A network that predicts v = √ᾱ·ε − √(1−ᾱ)·z₀ has the same change of ε made as v̂ = v + λ·√((1−ᾱ)/ᾱ)·∇g. A schedule
  without signal at its last timestep would make that infinite: √ᾱ is taken as `SMALLEST_SIGNAL` at least.
- On Wan's network, a flow, A is the attention of each frame's tokens to those of the next frame, as in DiTFlow
  (Pondaven et al. 2025, arXiv 2412.07776), in the block in its middle; and the same change of ε is v̂ = v + λ·σ/(1−σ)·∇g
  of the velocity v = ε − z₀, 1 − σ at least `SMALLEST_SIGNAL`. λ was not tried on Wan's own weights.
- Guidance by text is the usual form above, of which the authors' scale s is one less.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emt.backbone import TeachingBackbone
from emt.errors import EmtError
from emt.evaluate.consistency import temporal_consistency
from emt.evaluate.motion import tracklet_fidelity
from emt.evaluate.tracks import Tracklets, track
from emt.features import Motion, MotionFeatures, TextFeatures
from emt.pipeline import MotionTransfer
from emt.sampling import check_finite, is_flow, noise_generator

PUBLISHED_VALUES = 16 * 4 * 64 * 64
"""Latent values of the clips for which `Guidance.weight` is published."""
SMALLEST_SIGNAL = 0.068
"""√ᾱ at the last timestep of Stable Diffusion's schedule."""


@dataclass(frozen=True)
class Guidance:
    """Strength of motion guidance; the defaults are MotionClone's.

    Attributes:
        weight: λ for 16 frames of 64×64 latents.
        share: Of the steps, the first ones, in which there is guidance.
        ramp: Share of the steps over which it rises, and falls again.
        blocks: Up blocks whose temporal attentions are compared, 0 the lowest.
        kept: k, entries of each row of an attention map that are compared.
    """

    weight: float = 2000.0
    share: float = 0.6
    ramp: float = 1 / 30
    blocks: tuple[int, ...] = (1,)
    kept: int = 1

    def strength(self, step: int, steps: int) -> float:
        """Factor of the weight in a step, between 0 and 1."""
        guided, ramp = round(self.share * steps), max(1.0, self.ramp * steps)
        return max(0.0, min(1.0, (step + 1) / ramp, (guided - step) / ramp))


@dataclass(frozen=True)
class SparseMaps:
    """The kept entries of a reference's temporal attention maps.

    `layers` has for each attention over time the entries and their places in the row, both (references, …, kept).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]


class Teacher:
    """Plays motions with new content on a model's backbone, whose weights it freezes.

    Args:
        pipe: The model.
        guidance: How.

    Raises:
        EmtError: If the model takes no reference in the blocks that are to be guided.
    """

    def __init__(self, pipe: MotionTransfer, guidance: Guidance = Guidance()) -> None:
        self.pipe, self.guidance = pipe, guidance
        if not hasattr(pipe.unet, "attention_maps"):
            problem = f"a {type(pipe.unet).__name__} has no attention over time alone, which a teacher compares"
            raise EmtError(problem, "Use a model of Stable Diffusion 1.5 with motion modules.")
        self.unet: TeachingBackbone = pipe.unet
        self.blocks = pipe.unet.facts.guided_blocks or guidance.blocks
        if not any(int(path.split(".")[1]) in self.blocks for path in self.unet.reference_layers()):
            raise EmtError(
                f"this model reads no motion in up block {', '.join(map(str, self.blocks))}",
                "Use one whose adapter covers it: fusion_blocks in unet/config.json lists the blocks.",
            )
        self.unet.requires_grad_(False)
        # Only passes that are differentiated pay for it: they need the memory of one layer, not of all.
        self.unet.enable_gradient_checkpointing()

    def maps(self, features: MotionFeatures) -> list[Tensor]:
        """The attention maps that are compared, each (batch, …, places), of which rows sum to 1."""
        return self.unet.attention_maps(features, self.blocks)

    @torch.no_grad()
    def read(self, motions: Sequence[Motion]) -> SparseMaps:
        """The sparse maps of references, from what `MotionTransfer.extract_motion` read of them."""
        device = self.pipe._execution_device  # features that spare a GPU's memory are on the host
        each = [
            [full.topk(self.guidance.kept, dim=-1) for full in self.maps(motion.features.to(device))]
            for motion in motions
        ]
        return SparseMaps(
            tuple((torch.cat([v for v, _ in layer]), torch.cat([i for _, i in layer])) for layer in zip(*each))
        )

    def energy(self, features: MotionFeatures, wanted: SparseMaps) -> Tensor:
        """g of the module's text for each clip: (batch,), float32.

        Args:
            features: Of `batch` clips.
            wanted: Of as many references, or of one for all.
        """
        total: Tensor | float = 0.0
        for full, (entries, places) in zip(self.maps(features), wanted.layers):
            found = full.gather(-1, places.expand(full.shape[0], *places.shape[1:]))
            total = total + (found - entries).square().flatten(1).mean(1)
        return total  # type: ignore[return-value]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        motions: Sequence[Motion],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        text_guidance: float | None = None,
        negative_prompts: Sequence[str] | None = None,
        scheduler: str = "ddim",
        guidance_until: float = 1.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents of clips that show the prompts and move as the references do.

        Args:
            prompts: One for each clip.
            motions: One for each clip, of one shape.
            seeds: Of the initial noise, which is that of `MotionTransfer` for the same seed.
            steps: None for the model's default.
            text_guidance: s of the module's text; None for the model's default.
            negative_prompts: What guidance by text leads away from; None for nothing.
            scheduler: A name of `SCHEDULERS`; the authors' is ddim.
            guidance_until: Part of the steps, from the first, with guidance by text.
            on_step: Called with (steps done, steps) after each.

        Returns:
            (clips, channels, frames, height, width), float32.

        Raises:
            ValueError: If motions differ in shape.
            EmtError: For words that the model does not know, or a result that is not finite.
        """
        pipe, count = self.pipe, len(prompts)
        steps = pipe.config.steps if steps is None else steps
        s = pipe.config.guidance if text_guidance is None else text_guidance
        frames, height, width = pipe.shape_of(motions)
        shared = all(motion is motions[0] for motion in motions)
        wanted = self.read(motions[:1] if shared else motions)
        encode = self.unet.encode_text_without_adapter
        towards = encode(pipe.encode_prompts(prompts))
        both = encode(pipe.encode_prompts([*(negative_prompts or [""] * count), *prompts]))
        away = TextFeatures({path: (key[:count], value[:count]) for path, (key, value) in both.layers.items()})

        sampler = pipe.make_sampler(scheduler, steps)
        steps = len(sampler.timesteps)
        generators = [noise_generator(seed) for seed in seeds]
        noise = pipe.initial_noise(generators, frames, height, width).to(pipe._execution_device)
        latents = noise * getattr(sampler, "init_noise_sigma", 1.0)
        scales = hasattr(sampler, "scale_model_input")  # Euler's method for flows has nothing to scale
        options = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
        weight = self.guidance.weight * latents[0].numel() / PUBLISHED_VALUES
        for i, timestep in enumerate(sampler.timesteps):
            strength = self.guidance.strength(i, steps)
            text = s if i < math.ceil(guidance_until * steps) else 1
            scaled = sampler.scale_model_input(latents, timestep) if scales else latents
            if strength and weight:
                with torch.enable_grad():
                    leaf = scaled.detach().requires_grad_(True)
                    given, features = self.unet.denoise_with_features(leaf.to(self.unet.dtype), timestep, towards)
                    # Clips of a batch do not touch each other: the sum's gradient is each one's own.
                    energy = weight * strength * self.energy(features, wanted).sum()
                    (gradient,) = torch.autograd.grad(energy, leaf)
                prediction = given.detach().float()
                del given, features, energy
                if text != 1:
                    without = self.unet(scaled.to(self.unet.dtype), timestep, away, adapted=False).float()
                    prediction = without + text * (prediction - without)
                prediction = prediction + _change(sampler, timestep) * gradient
            elif text != 1:
                sample = torch.cat([scaled, scaled]).to(self.unet.dtype)
                without, given = self.unet(sample, timestep, both, adapted=False).float().chunk(2)
                prediction = without + text * (given - without)
            else:
                prediction = self.unet(scaled.to(self.unet.dtype), timestep, towards, adapted=False).float()
            latents = sampler.step(prediction, timestep, latents, **options).prev_sample
            if on_step:
                on_step(i + 1, steps)
        check_finite(latents, seeds, self.unet.dtype)
        return latents

    def generate(
        self,
        prompt: str | Sequence[str],
        motion: Motion | Sequence[Motion],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        scheduler: str = "ddim",
        guidance_until: float = 1.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[np.uint8]]:
        """`MotionTransfer.generate` by motion guidance: `sample` and `decode`.

        Raises:
            ValueError: If motions differ in shape.
            EmtError: As `sample`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        motions = [motion] if isinstance(motion, Motion) else list(motion)
        latents = self.sample(
            prompts,
            motions * len(prompts) if len(motions) == 1 else motions,
            seeds=[seed] * len(prompts) if isinstance(seed, int) else seed,
            steps=steps,
            text_guidance=guidance,
            negative_prompts=[negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt,
            scheduler=scheduler,
            guidance_until=guidance_until,
            on_step=on_step,
        )
        return self.decode(latents)

    def decode(self, latents: Tensor) -> list[NDArray[np.uint8]]:
        """RGB frames (frames, height, width, 3) of what `sample` made, one array a clip."""
        with torch.no_grad():
            return self.pipe.decode_clips(list(latents))


def _change(sampler: Any, timestep: Tensor) -> float:
    """Change of a prediction for a gradient of the energy; the module's text says why."""
    if is_flow(sampler):
        noise = float(timestep) / 1000
        return noise / max(1 - noise, SMALLEST_SIGNAL)
    signal = float(sampler.alphas_cumprod[int(timestep)])
    if sampler.config.prediction_type != "v_prediction":
        return math.sqrt(1 - signal)
    return math.sqrt(1 - signal) / max(math.sqrt(signal), SMALLEST_SIGNAL)


# ----------------------------------------------------------------------------------------------------------- the filter


@dataclass(frozen=True)
class Verdict:
    """Verdict of the filter on a clip.

    Attributes:
        fidelity: `emt.evaluate.motion.tracklet_fidelity` to the reference.
        consistency: `emt.evaluate.consistency.temporal_consistency`.
        reason: Why it is dropped; empty if it is kept.
    """

    fidelity: float
    consistency: float
    reason: str = ""


@dataclass(frozen=True)
class Filter:
    """Thresholds for a teacher's clip to be trained on (EfficientMT filters its pairs by both measures).

    The authors do not publish their thresholds. These are drawn from the rendered world, where the truth is known, two
    looks of 24 motions: clips of the same motion have a fidelity of at least 0.89, of different motions 0.78 or less
    in nine of ten cases; the consistency of clean clips is at least 0.94, with noise of 10 grey levels that differs
    from frame to frame 0.73, of 20 0.51, and near 0 where the content alternates. Five of six real clips at 16 frames
    have 0.92 or more, one of a fast motorbike 0.56.

    Attributes:
        min_fidelity: Least motion fidelity, −1 to 1; None for any.
        min_consistency: Least temporal consistency, 0 to 1; None for any.
    """

    min_fidelity: float | None = 0.8
    min_consistency: float | None = 0.7

    def judge(self, reference: Tracklets, frames: NDArray[np.uint8]) -> Verdict:
        """Measure a clip against its reference.

        Args:
            reference: Tracklets of the reference's frames, as many as the clip has.
            frames: The clip, (frames, height, width, 3).

        Raises:
            EmtError: If OpenCV is not installed.
        """
        fidelity, consistency = tracklet_fidelity(reference, track(frames)), temporal_consistency(frames)
        return Verdict(fidelity, consistency, self.reason(fidelity, consistency))

    def reason(self, fidelity: float, consistency: float) -> str:
        """Reason why a clip with these measures is dropped; empty if it is kept."""
        low = [
            f"{name} {value:.3f} is below {least:g}"
            for name, value, least in (
                ("motion fidelity", fidelity, self.min_fidelity),
                ("temporal consistency", consistency, self.min_consistency),
            )
            if least is not None and value < least
        ]
        return ", ".join(low)
