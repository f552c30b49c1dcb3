"""The pipeline as diffusers' pipelines are called: their arguments, their output, their callback, their memory options.

`MotionTransferPipeline.generate` is the pipeline's own call, by motions and seeds. `DiffusersInterface.__call__` takes
what users of diffusers have in hand, and computes the same clip from the same noise.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from emt.backends.torch import TorchBackend
from emt.errors import EmtError
from emt.features import Motion, in_dtype
from emt.sampling import run_sampler
from emt.video import Clip, read_clip
from emt.video.frames import sample_frames
from emt.windowed import denoiser

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class MotionTransferOutput(BaseOutput):
    """Clips that a pipeline made; `diffusers.utils.export_to_video(output.frames[0], …)` takes the first one.

    Attributes:
        frames: By `output_type`: "pil": a list of PIL images for each clip; "np": float32 from 0 to 1, (clips, frames,
            height, width, 3); "pt": the same as a tensor, (clips, frames, 3, height, width); "latent": latents, (clips,
            channels, latent frames, height/8, width/8).
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


class DiffusersInterface:
    """Part of `MotionTransferPipeline` that follows diffusers' conventions."""

    config: Any
    unet: Any
    scheduler: Any
    backend: Any

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _exclude_from_cpu_offload: ClassVar = ["unet"]
    _interrupt = False
    _guidance_scale = 1.0  # of the running call; what a callback makes of it holds from there on
    _num_timesteps = 0

    @property
    def interrupt(self) -> bool:
        """Return whether the running call ends after the step: a callback sets `_interrupt` to end it."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Scale of the running call: a callback changes it by `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Return whether the running call is guided: not by a scale of 1 or less."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        video: Any = None,
        motion: Motion | Sequence[Motion] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MotionTransferOutput | tuple[Any]:
        """Generate clips that move as a video does, by the arguments of diffusers' pipelines.

        Several prompts make one batch. Videos, motions and negative prompts are one for all of it, or one for each
        prompt. With a `scheduler` that was put in place of the model's, that one samples, as it is configured.

        Args:
            prompt: what the clips show.
            video: how they move: a file's or folder's path; PIL images; an array, (frames, height, width, 3), or a list
                of its frames; a tensor, (frames, 3, height, width), or a list of its frames; a `Clip`; or a list of
                such videos. Numbers of uint8 are 0 to 255, of a floating-point dtype 0 to 1. Frames are spread evenly
                over the video and cropped to the clips' size, as `emt transfer` reads references.
            motion: in place of a video, what `extract_motion` read of it. Without either there is no reference.
            num_frames: of a clip; None for the motion's, or the model's default.
            height: in pixels; likewise.
            width: in pixels; likewise.
            num_inference_steps: None for the model's default.
            guidance_scale: 1 and less are without, as in diffusers; None for the model's default.
            negative_prompt: what guidance leads away from.
            num_videos_per_prompt: clips of each prompt, one after the other.
            generator: of the initial noise, and of noise that a sampler adds: one, or one for each clip. One with
                `manual_seed(n)` makes the clip of `generate`'s seed n.
            latents: initial noise, (clips, channels, latent frames, height/8, width/8).
            prompt_embeds: encodings in place of prompts, (prompts, tokens, width), as `encode_prompts` returns them.
            negative_prompt_embeds: likewise in place of negative prompts.
            output_type: "pil", "np", "pt" or "latent" (`MotionTransferOutput`).
            return_dict: return a `MotionTransferOutput`, and not a tuple of its frames.
            callback_on_step_end: called with the pipeline, the number of the step, its timestep and a dict of tensors
                after each step; what it returns of them is taken from there on.
            callback_on_step_end_tensor_inputs: names of the tensors: latents, prompt_embeds, negative_prompt_embeds.
                While the call is guided, prompt_embeds are the negative ones and after them the prompts', as diffusers
                has them; either both or the prompts' alone are taken back.

        Raises:
            TypeError: a video or another argument is of no kind that is read.
            ValueError: arguments do not fit together, or are none that are allowed.
            EmtError: a file cannot be read, a prompt has words that the model does not know, or a result is not finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, allowed are {', '.join(OUTPUT_TYPES)}")
        _check_counts(
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
        )
        if guidance_scale is not None and not _is_finite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale!r}, allowed are finite numbers")
        for name, tensor in (
            ("latents", latents),
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}, allowed is a tensor of torch")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        pipe: Any = self
        if self.config.get("adapter") == "none" and (video is not None or motion is not None):
            hint = "Use emt.train.teacher.Teacher(pipe).generate, which needs none, or train one: emt train --help"
            raise EmtError("this model has no trained adapter: it was imported without one", hint)
        motions = self._motions(video, motion, num_frames, height, width)
        shape = pipe.shape_of(motions)
        if not motions:
            shape = tuple(own if given is None else given for own, given in zip(shape, (num_frames, height, width)))
            _check_shape(pipe, *shape)

        self._guidance_scale = self.config.guidance if guidance_scale is None else float(guidance_scale)
        guided = self.do_classifier_free_guidance
        count, towards, away = self._embeddings(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, num_videos_per_prompt, guided
        )
        if len(motions) > 1:
            motions = _each("video" if motion is None else "motion", motions, count, num_videos_per_prompt)
        clips = count * num_videos_per_prompt
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        sampler = self._sampler(steps)
        noise = self._noise(clips, shape, generator, latents)

        device = pipe._execution_device
        windows = pipe.windows_over(shape[0])
        of_guidance = pipe.motions_of_guidance(motions, clips) if guided else motions
        denoise = denoiser(self.backend, motions, windows)  # guidance may be turned on and off between steps
        denoise_guided = denoise if of_guidance is motions else denoiser(self.backend, of_guidance, windows)
        text = _Text(self.unet, towards, away)

        def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
            known, call = (text.features, denoise_guided) if guided else (text.alone, denoise)
            return call(sample.to(self.unet.dtype), timestep, known, True)

        self._interrupt, self._num_timesteps = False, len(sampler.timesteps)
        with pipe.progress_bar(total=len(sampler.timesteps)) as bar:

            def after_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None:
                    both = text.both if self.do_classifier_free_guidance else text.towards
                    known = {"latents": latents, "prompt_embeds": both, "negative_prompt_embeds": text.away}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, given) or {}
                    text.replace(changed.get("prompt_embeds", both), changed.get("negative_prompt_embeds", text.away))
                    latents = changed.get("latents", latents)
                return None if self._interrupt else latents

            made = run_sampler(
                predict,
                sampler,
                noise.to(device),
                lambda: self._guidance_scale if guided and self.do_classifier_free_guidance else 1.0,
                generators=generator,
                after_step=after_step,
            )
        if not torch.isfinite(made).all():
            problem = "the network produced NaN or infinity"
            hint = "Half precision may have overflowed: open the model with dtype=torch.bfloat16 or torch.float32"
            raise EmtError(problem, f"{hint}, or use a lower guidance_scale.")
        frames = made if output_type == "latent" else _converted(pipe.decode_clips(list(made), windows), output_type)
        pipe.maybe_free_model_hooks()
        return MotionTransferOutput(frames=frames) if return_dict else (frames,)

    # ------------------------------------------------------------------------------------------------ the arguments

    def _motions(
        self,
        video: Any,
        motion: Motion | Sequence[Motion] | None,
        num_frames: int | None,
        height: int | None,
        width: int | None,
    ) -> list[Motion]:
        """Motions of a call: those given, or read from its videos."""
        pipe: Any = self
        given = {"num_frames": num_frames, "height": height, "width": width}
        if video is not None:
            if motion is not None:
                raise ValueError("video and motion are both given, allowed is one of them")
            config = self.config
            shape = [
                own if value is None else value
                for own, value in zip((config.frames, config.height, config.width), given.values())
            ]
            _check_shape(pipe, *shape)
            return [pipe.extract_motion(read_video(each, shape[0], (shape[2], shape[1]))) for each in videos_of(video)]
        motions = in_dtype([] if motion is None else motion, self.unet.dtype)
        for one in motions:
            for name, own in zip(given, (one.frames, one.height, one.width)):
                if given[name] not in (None, own):
                    raise ValueError(f"{name} is {given[name]}, but the motion was read at {own}")
        return motions

    def _embeddings(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt: str | Sequence[str] | None,
        negative_embeds: Tensor | None,
        repeats: int,
        guided: bool,
    ) -> tuple[int, Tensor, Tensor | None]:
        """Number of prompts; their encodings and those of the negative ones, a row for each clip."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give prompt or prompt_embeds, one of them")
        if negative_prompt is not None and negative_embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, one of them")
        prompts = [] if prompt is None else _texts("prompt", prompt)
        count = len(prompts) if prompt_embeds is None else len(prompt_embeds)
        if not count:
            raise ValueError("prompt is empty: give one or more")
        given = "" if negative_prompt is None else negative_prompt
        negatives = _each("negative_prompt", _texts("negative_prompt", given), count)
        pipe: Any = self
        # In one pass where nothing is given as an encoding, as `generate` encodes them.
        texts = [
            *(negatives if guided and negative_embeds is None else []),
            *(prompts if prompt_embeds is None else []),
        ]
        encoded = list(pipe.encode_prompts(texts)) if texts else []
        towards = (
            torch.stack(encoded[len(encoded) - count :]) if prompt_embeds is None else self._checked(prompt_embeds)
        )
        away = None
        if guided:
            away = torch.stack(encoded[:count]) if negative_embeds is None else self._checked(negative_embeds)
            away = away.expand(count, -1, -1) if len(away) == 1 else away
            if away.shape != towards.shape:
                raise ValueError(
                    f"negative_prompt_embeds has shape {tuple(away.shape)}, expected {tuple(towards.shape)} as prompts"
                )
        towards = towards.repeat_interleave(repeats, 0)
        return count, towards, away if away is None else away.repeat_interleave(repeats, 0)

    def _checked(self, embeds: Tensor) -> Tensor:
        """Encodings that a caller gave, on the device and in the dtype of the network."""
        if embeds.ndim != 3 or embeds.shape[2] != self.unet.text_width:
            expected = f"(prompts, tokens, {self.unet.text_width})"
            raise ValueError(f"encodings of prompts have shape {tuple(embeds.shape)}, expected {expected}")
        pipe: Any = self
        return embeds.to(pipe._execution_device, self.unet.dtype)

    def _sampler(self, steps: int) -> Any:
        """The model's own sampler, or the scheduler that was put in its place, with its timesteps."""
        pipe: Any = self
        if self.scheduler is pipe.models_scheduler:
            return pipe.make_sampler(self.config.get("sampler", "ddim"), steps)
        sampler: SchedulerMixin = self.scheduler
        name = type(sampler).__name__
        if not hasattr(sampler, "set_timesteps") or not _takes_samples(getattr(sampler, "step", None)):
            hint = "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
            raise TypeError(f"scheduler is a {name}, allowed are those of diffusers for images, as in {hint}")
        try:
            sampler.set_timesteps(steps, device="cpu")
        except ValueError as error:
            problem = f"{name} does not take num_inference_steps={steps} ({error})"
            raise ValueError(f"{problem}: give another number, or another scheduler") from None
        return sampler

    def _noise(
        self,
        clips: int,
        shape: tuple[int, int, int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Initial noise of clips, float32."""
        pipe: Any = self
        frames, factor = pipe.codec.latent_frames(shape[0]), pipe.vae_scale_factor
        size = (clips, self.unet.latent_channels, frames, shape[1] // factor, shape[2] // factor)
        if latents is not None:
            if tuple(latents.shape) != size:
                raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {size}")
            if not torch.isfinite(latents).all():
                raise ValueError("latents have NaN or infinity, allowed are finite numbers")
            return latents.float()
        generators = list(generator) if isinstance(generator, Sequence) else generator
        for one in generators if isinstance(generators, list) else [generators]:
            if one is not None and not isinstance(one, torch.Generator):
                hint = f"torch.Generator().manual_seed({one if isinstance(one, int) else 0})"
                raise TypeError(f"generator is {one!r}, allowed are those of torch, as in {hint}")
        if isinstance(generators, list) and len(generators) != clips:
            raise ValueError(f"generator has {len(generators)} entries, expected one or {clips}")
        return randn_tensor(size, generator=generators, device=pipe._execution_device, dtype=torch.float32)

    def _check_callback(self, callback: Any, names: Any) -> None:
        """Raise `TypeError` or `ValueError` unless a call can call it with the tensors of these names."""
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end is {callback!r}, allowed is a function")
        allowed = ", ".join(self._callback_tensor_inputs)
        if isinstance(names, str):
            raise TypeError(f"callback_on_step_end_tensor_inputs is {names!r}, allowed is a list of {allowed}")
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}, allowed are {allowed}")

    # ---------------------------------------------------------------------------------------------------- the memory

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep on the GPU only the part of the pipeline that runs, as diffusers does; the network runs sparingly."""
        super().enable_model_cpu_offload(**_offload(gpu_id, device))  # type: ignore[misc]
        if not getattr(self.backend, "low_memory", False):
            self._run_sparingly()

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep of text encoder and VAE only the layer that runs on the GPU, as diffusers does.

        The network stays there and runs sparingly: its layers read each other's weights, which have to be in place.
        `enable_model_cpu_offload` takes less memory.
        """
        super().enable_sequential_cpu_offload(**_offload(gpu_id, device))  # type: ignore[misc]
        # Hooks go with the modules that have them: the VAE's are not replaced by fused ones.
        self._run_sparingly(channels_last_vae=False)

    def _run_sparingly(self, channels_last_vae: bool = True) -> None:
        """Let PyTorch run the network without captured calls, which need weights to stay where they are."""
        pipe: Any = self
        self.backend = TorchBackend(pipe, low_memory=True, channels_last_vae=channels_last_vae)


class _Text:
    """Encodings of prompts as the network reads them, until a callback replaces them."""

    def __init__(self, unet: Any, towards: Tensor, away: Tensor | None) -> None:
        self.unet = unet
        self._set(towards, away)

    def _set(self, towards: Tensor, away: Tensor | None) -> None:
        self.towards, self.away = towards, away
        self.both = towards if away is None else torch.cat([away, towards])
        self.features = self.unet.encode_text(self.both)
        self._alone = self.features if away is None else None

    @property
    def alone(self) -> Any:
        """Those of the prompts without the negative ones, for steps that are not guided."""
        if self._alone is None:
            self._alone = self.unet.encode_text(self.towards)
        return self._alone

    def replace(self, prompts: Tensor, away: Tensor | None) -> None:
        """Take other encodings from here on: the prompts', or those of `both` at once; and the negative ones.

        Raises:
            ValueError: they are of another number of clips, or of another shape.
        """
        if (prompts is self.both or prompts is self.towards) and away is self.away:
            return
        clips = len(self.towards)
        towards = prompts
        if self.away is not None and len(prompts) == 2 * clips:
            first, towards = prompts.chunk(2)
            away = first if away is self.away else away
        for name, given in (("prompt_embeds", towards), ("negative_prompt_embeds", away)):
            if given is not None and given.shape != self.towards.shape:
                what = f"{name} that a callback returned have shape {tuple(given.shape)}"
                raise ValueError(f"{what}, expected {tuple(self.towards.shape)}")
        self._set(towards, away)


def _offload(gpu_id: int | None, device: torch.device | str | None) -> dict[str, Any]:
    """Arguments that diffusers gets: its own default device is not None everywhere."""
    return {name: value for name, value in (("gpu_id", gpu_id), ("device", device)) if value is not None}


def _check_counts(**given: Any) -> None:
    """Raise `TypeError` or `ValueError` unless each number that is given is whole and positive."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}, allowed are positive whole numbers")
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed are positive whole numbers")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _takes_samples(step: Any) -> bool:
    """Return whether a scheduler's step needs nothing but a prediction, a timestep and a sample."""
    if not callable(step):
        return False
    needed = [
        p for p in inspect.signature(step).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    return len(needed) <= 3


def _texts(name: str, value: Any) -> list[str]:
    """Texts of an argument that takes one or a list of them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {value!r}, allowed are a text and a list of texts")
    return list(texts)


def _check_shape(pipe: Any, frames: int, height: int, width: int) -> None:
    """Raise `ValueError` unless the model makes clips of this shape."""
    step, facts = pipe.size_multiple, pipe.unet.facts
    for name, pixels in (("height", height), ("width", width)):
        if pixels < step or pixels % step:
            raise ValueError(f"{name} is {pixels}, allowed are multiples of {step}")
    if not facts.makes_frames(frames):
        raise ValueError(f"num_frames is {frames}, allowed are {facts.allowed_clips()}")


def _each(name: str, values: list[T], count: int, repeats: int = 1) -> list[T]:
    """One value for each of so many prompts, of one for all or one for each; each as often as it has clips."""
    if len(values) not in (1, count):
        expected = f"1 or {count}" if count > 1 else "1, as there is one prompt"
        raise ValueError(f"{name} has {len(values)} entries, expected {expected}")
    return [value for value in values * (count // len(values)) for _ in range(repeats)]


def _converted(clips: list[np.ndarray], output_type: str) -> Any:
    """Clips of uint8, (frames, height, width, 3) each, as `MotionTransferOutput` has them."""
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]
    values = np.stack(clips).astype(np.float32) / 255
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3).contiguous()


# -------------------------------------------------------------------------------------------------------------- videos


def videos_of(video: Any) -> list[Any]:
    """Videos of a call's argument, by their types alone: a path, frames, or a list of such.

    Raises:
        TypeError: it is of no kind that is read.
        ValueError: it is an empty list.
    """
    if isinstance(video, Motion):
        raise TypeError("video is a Motion: give it as motion=…, or use generate(prompt, motion)")
    if isinstance(video, str | os.PathLike | Clip):
        return [video]
    if isinstance(video, np.ndarray | Tensor):
        return list(video) if video.ndim == 5 else [video]
    if isinstance(video, list | tuple):
        if not video:
            raise ValueError("video is an empty list")
        if all(isinstance(one, Image.Image) or _is_frame(one) for one in video):
            return [video]
        return [each for one in video for each in videos_of(one)]
    raise TypeError(
        f"video is a {type(video).__name__}, allowed are a path, PIL images, arrays, tensors, a Clip, and lists of such"
    )


def _is_frame(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) and value.ndim == 3


def read_video(video: Any, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Sample a video of any kind that `videos_of` passes: RGB, uint8, (frames, height, width, 3).

    Args:
        video: one of them.
        frames: how many, spread evenly.
        size: (width, height), reached by cropping.

    Raises:
        TypeError: its numbers have no range: neither uint8 nor floating point.
        ValueError: its shape is not that of frames, numbers are out of range, or it has too few frames.
        EmtError: a file cannot be read.
    """
    if isinstance(video, str | os.PathLike):
        clip = read_clip(video, frames=frames, size=size)
        for warning in clip.warnings:
            logger.warning("%s", warning)
        return clip.frames
    if isinstance(video, Clip):
        video = video.frames
    if isinstance(video, list | tuple) and not isinstance(video[0], Image.Image):
        kinds = {(type(one), tuple(one.shape)) for one in video}
        if len(kinds) > 1:
            raise ValueError("frames of a video differ in kind or shape")
        video = torch.stack(list(video)) if isinstance(video[0], Tensor) else np.stack(video)
    if isinstance(video, np.ndarray | Tensor):
        video = as_pictures(video)
    return sample_frames(video, frames, size)


def as_pictures(video: np.ndarray | Tensor) -> np.ndarray:
    """RGB of uint8, (frames, height, width, 3), of an array of such a shape or a tensor (frames, 3, height, width).

    Raises:
        TypeError: its dtype is neither uint8 nor floating point.
        ValueError: it has another shape, or numbers that are not from 0 to 1.
    """
    shape = tuple(video.shape)
    if isinstance(video, Tensor):
        if video.ndim != 4 or shape[1] != 3:
            raise ValueError(f"a video as a tensor has shape {shape}, expected (frames, 3, height, width)")
        video = video.detach().cpu().permute(0, 2, 3, 1)
        array = (video.float() if video.is_floating_point() else video).numpy()
    else:
        if video.ndim != 4 or shape[3] != 3:
            raise ValueError(f"a video as an array has shape {shape}, expected (frames, height, width, 3)")
        array = video
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a video has numbers of {array.dtype}, allowed are uint8 (0 to 255) and floats (0 to 1)")
    if not (array.min() >= 0 and array.max() <= 1):
        low, high = float(array.min()), float(array.max())
        raise ValueError(f"a video of floats has numbers from {low:g} to {high:g}, expected 0 to 1 (uint8: 0 to 255)")
    return (array * 255).round().astype(np.uint8)
