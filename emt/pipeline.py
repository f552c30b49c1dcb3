"""From a reference clip and a prompt to a video: the sampling of EfficientMT around the adapted network."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emt.backbone import LARGE_TEXT_ENCODERS, OPENED_DIRECTLY, module_of
from emt.backends.base import Backend
from emt.backends.codec import codec_of
from emt.backends.torch import TorchBackend
from emt.backends.upload import upload
from emt.control import Control, ControlledSteps
from emt.errors import EmtError
from emt.features import Motion, MotionFeatures, in_dtype, joined
from emt.model_folder import find_model
from emt.parts import Config, align
from emt.presets import MOST_GUIDANCE, SCHEDULER_DEFAULTS
from emt.prompt_syntax import PLAIN, WEBUI, expanded, words_of
from emt.prompts import PromptEncoder
from emt.remote import is_url
from emt.sampling import (
    add_noise,
    check_finite,
    check_schedule,
    make_sampler,
    noise_generator,
    run_sampler,
)
from emt.scratch import scratch_array
from emt.text_encoding import TextReader, embeddings_of
from emt.vocabulary import Vocabulary
from emt.windowed import denoiser, read_in_windows
from emt.windows import Windows, windows_over

if TYPE_CHECKING:
    from typing_extensions import Self

    from emt.diffusers_pipeline import MotionTransferPipeline as MotionTransferPipeline
    from emt.video import Clip

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What a model has no number of its own for, as published.
DEFAULTS: dict[str, Any] = {
    "frames": 16,
    "height": 512,
    "width": 512,
    "steps": 25,
    "guidance": 6.0,
    "reference_timestep": 400,
}


def __getattr__(name: str) -> Any:
    """`MotionTransferPipeline`, when it is first used: diffusers takes several times as long to import as PyTorch."""
    if name != "MotionTransferPipeline":
        raise AttributeError(f"module 'emt.pipeline' has no attribute {name!r}")
    return importlib.import_module("emt.diffusers_pipeline").MotionTransferPipeline


class MotionTransfer:
    """Motion transfer with an adapted text-to-video network (EfficientMT, arXiv 2503.19369).

    It makes clips with the parts of a model. `MotionTransferPipeline` is the same as a pipeline of diffusers.

    Args:
        vae: autoencoder of images, such as Stable Diffusion's, or Wan's of video (`emt.backends.codec`).
        text_encoder: CLIP's. None where prompts are encoded apart (`prompt_encoder`).
        tokenizer: of the text encoder.
        unet: the adapted network, an `emt.backbone.Backbone`.
        scheduler: its configuration is what the named schedulers are made from.
        defaults: the model's own, which replace those of `DEFAULTS`.
    """

    config: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    #: Encodes prompts where there is no `text_encoder`: its encoder is too large to be open beside the network.
    prompt_encoder: PromptEncoder | None
    backend: Backend

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, **defaults: Any) -> None:
        self.config = Config(DEFAULTS | defaults)
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        self._assemble()

    def _assemble(self) -> None:
        """Put together what executes the parts."""
        self.codec = codec_of(self.vae, self.unet.latent_channels)
        self.vae_scale_factor = self.codec.pixels
        self.prompt_encoder = None
        #: Layer of the text encoder that prompts are read from, counted from the last: 1 is the last, 2 the one before.
        self.clip_skip = 1
        #: Way in which prompts are read: `plain` by the letter, `webui` with weights, in chunks and over time.
        self.prompt_syntax = PLAIN
        self.backend = TorchBackend(self)

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.unet.device

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def components(self) -> dict[str, Any]:
        """The parts by their names."""
        return {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}

    def to(self, device: torch.device | str) -> Self:
        """Move the parts to a device; on the CPU, what is mapped from files to where PyTorch's code is fastest."""
        parts = (self.vae, self.text_encoder, self.unet)
        if torch.device(device).type == "cuda":
            upload(parts, device)
        for part in parts:
            torch.nn.Module.to(part, device)
            align(part)
        return self

    def maybe_convert_prompt(self, prompt: str, tokenizer: Any) -> str:
        """A prompt in which words of several vectors (textual inversions) are written once for each of them."""
        return expanded(prompt, tokenizer.backend_tokenizer)

    @property
    def size_multiple(self) -> int:
        """Height and width of clips are multiples of this, in pixels."""
        return self.vae_scale_factor * self.unet.facts.grid_step

    # ------------------------------------------------------------------------------------------------------ motion

    @torch.no_grad()
    def extract_motion(self, frames: NDArray[np.uint8] | Clip, seed: int = 0, *, window: int | None = None) -> Motion:
        """Read the motion of a reference clip (EfficientMT, section 3.2).

        One pass of the backbone over the sampled latents, noised to the reference timestep, with the empty prompt; of
        more frames than the network takes, a pass for each window (`emt.windows`), and the features are in the
        computer's memory.

        Args:
            frames: RGB, (frames, height, width, 3), height and width multiples of `size_multiple`; or a `Clip`.
            seed: of the sampled latents and of the noise.
            window: frames of a window; None for the model's frames.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        pixels, step = np.asarray(getattr(frames, "frames", frames)), self.size_multiple
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % step or pixels.shape[2] % step:
            raise ValueError(
                f"reference frames have shape {pixels.shape}, expected (frames, height, width, 3) with height and "
                f"width multiples of {step}"
            )
        windows = self.windows_over(len(pixels), window)
        generator = noise_generator(seed)
        latents = self.encode_frames(pixels, generator, windows)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = torch.tensor([self.config.reference_timestep], device=latents.device)
        noisy, empty = add_noise(self.scheduler, latents, noise, timestep), self.encode_prompts([""])

        def read(part: Tensor) -> MotionFeatures:
            return self.backend.encode_reference(part, timestep, empty)

        features = read_in_windows(windows, noisy, read) if windows else read(noisy)
        count, height, width, _ = pixels.shape
        return Motion(features, count, height, width, seed)

    # -------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        motion: Motion | Sequence[Motion] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        scheduler: str | None = None,
        guidance_until: float = 1.0,
        motion_until: float = 1.0,
        cache_interval: int = 1,
        window: int | None = None,
        control: Control | Sequence[Control] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[np.uint8]]:
        """Generate a clip for each prompt, moving as its reference does.

        Lists of prompts, motions, seeds and negative prompts make one batch; single values serve all of it.
        A clip depends on its own prompt, motion and seed alone, not on what else is in the batch.

        Args:
            prompt: what the clips show.
            motion: how they move (`extract_motion`); motions of a batch have one shape. None generates without a
                reference, at the model's default size.
            steps: of the sampler; None for the model's default.
            guidance: classifier-free guidance scale; 1 is without; None for the sampler's or the model's default.
            seed: of the initial noise.
            negative_prompt: what guidance leads away from.
            scheduler: a name of `SCHEDULERS`; None for the model's default.
            guidance_until: part of the steps, from the first, that are guided; the others take half the time. Guidance
                matters where the layout comes about (Castillo et al. 2023, arXiv 2312.12487, section 4; Kynkäänniemi
                et al. 2024, arXiv 2404.07724, limit it to an interval).
            motion_until: part of the steps, from the first, in which the reference is attended to; the others cost less
                and have less of it to take over.
            cache_interval: what lies below the network's highest resolution is computed in every n-th step only, and
                reused in between (DeepCache, Ma et al. 2023, arXiv 2312.00858, section 3.2).
            window: of clips with more frames than the network takes at once, the frames that it is given; None for the
                model's frames (`emt.windows`).
            control: pictures that some frames are to show, by a control network (`emt.control`).
            on_step: called with (steps done, steps) after each.

        Returns:
            One array a clip, RGB, (frames, height, width, 3).

        Raises:
            ValueError: if lists differ in length or motions in shape, `guidance_until` or `motion_until` is not from 0
                to 1, or `cache_interval` not positive.
            EmtError: for an unknown scheduler, a prompt with words that the model does not know, a backend that cannot
                reuse features, or a result that is not finite.
        """
        scheduler = self.config.get("sampler", "ddim") if scheduler is None else scheduler
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = max(len(prompts), *(len(x) for x in (motion, seed) if isinstance(x, Sequence)), 1)
        prompts = _broadcast("prompt", prompts, count)
        negatives = _broadcast(
            "negative_prompt", [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt), count
        )
        seeds = _broadcast("seed", [seed] if isinstance(seed, int) else list(seed), count)
        motions = in_dtype([] if motion is None else motion, self.unet.dtype)
        if len(motions) > 1:
            motions = _broadcast("motion", motions, count)
        if guidance is None:
            own = {} if scheduler == self.config.get("sampler", "ddim") else SCHEDULER_DEFAULTS.get(scheduler, {})
            guidance = own.get("guidance", self.config.guidance)
        guided = guidance != 1

        if not (0 <= guidance_until <= 1 and 0 <= motion_until <= 1) or cache_interval < 1:
            raise ValueError(
                f"guidance_until is {guidance_until}, motion_until {motion_until} and cache_interval {cache_interval}, "
                "allowed are 0 to 1, 0 to 1 and positive whole numbers"
            )
        if cache_interval > 1 and not self.backend.reuses:
            problem = f"the engine {self.backend.name} computes the whole network in every step, not every n-th"
            raise EmtError(problem, "Use --cache-interval 1, or --engine torch.")

        shape = self.shape_of(motions)
        windows = self.windows_over(shape[0], window)
        sampler = self.make_sampler(scheduler, self.config.steps if steps is None else steps)
        generators = [noise_generator(s) for s in seeds]
        if guidance > (most := MOST_GUIDANCE.get(scheduler, guidance)):
            logger.warning("guidance %g with %s burns colours: use up to %g", guidance, scheduler, most)

        controls = [control] if isinstance(control, Control) else list(control or [])
        if controls and (windows or cache_interval > 1):
            what = f"{shape[0]} frames, in windows" if windows else f"a cache interval of {cache_interval}"
            hint = "Use --cache-interval 1, and no more frames than the model takes at once."
            raise EmtError(f"a control network makes no clips of {what}", hint)
        count = len(sampler.timesteps)
        plain = guided and guidance_until < 1
        moved_steps = math.ceil(motion_until * count)
        # What steps need of prompts and motions is let go before the clips are decoded.
        latents = run_sampler(
            self._network(
                prompts, negatives, motions, guided, plain, moved_steps, cache_interval, shape, windows, controls
            ),
            sampler,
            self.initial_noise(generators, *shape).to(self._execution_device),
            guidance,
            guided_steps=math.ceil(guidance_until * count),
            generators=generators,
            on_step=on_step,
        )
        check_finite(latents, seeds, self.unet.dtype)
        return self.decode_clips(list(latents), windows)

    def _network(
        self,
        prompts: list[str],
        negatives: list[str],
        motions: list[Motion],
        guided: bool,
        plain: bool,
        moved_steps: int,
        cache_interval: int,
        shape: tuple[int, int, int],
        windows: Windows | None,
        controls: Sequence[Control] = (),
    ) -> Callable[[Tensor, Tensor, int, bool], Tensor]:
        """The network with prompts and motions, as `run_sampler` takes it.

        Args:
            prompts: of the clips.
            negatives: negative prompts.
            motions: of the references, or none.
            guided: whether there are steps with guidance.
            plain: whether there are steps without, too.
            moved_steps: steps with the motion, the first ones.
            cache_interval: as `generate` has it.
            shape: frames, height and width of the clips.
            windows: over them; None where the network takes all at once.
            controls: one of all clips, or of each; or none.
        """
        text = self.encode_prompts(negatives + prompts if guided else prompts, shape[0])
        features = self.unet.encode_text(text)
        alone = self.unet.encode_text(text[len(text) // 2 :]) if plain else features
        features.guided = guided
        of_guidance = self.motions_of_guidance(motions, len(prompts)) if guided else motions
        if controls:
            controlled = ControlledSteps(self, controls, text, guided, len(prompts), shape)
            moved = self.backend.prepare_motion(joined(of_guidance)) if motions else None

            def predict_controlled(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
                known, reference = features if guided else alone, moved if step < moved_steps else None
                residuals = controlled(timestep, len(sample))
                return self.backend.denoise_controlled(
                    sample.to(self.unet.dtype), timestep, known, reference, residuals
                )

            return predict_controlled
        denoise_guided = denoise = denoiser(self.backend, of_guidance, windows, cache_interval)
        if plain and of_guidance is not motions:
            denoise = denoiser(self.backend, motions, windows, cache_interval)

        def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
            known, call = (features, denoise_guided) if guided else (alone, denoise)
            return call(sample.to(self.unet.dtype), timestep, known, step < moved_steps)

        return predict

    def motions_of_guidance(self, motions: list[Motion], clips: int) -> list[Motion]:
        """Motions of a batch that is doubled for guidance: of the first half, without the prompt, and of the second.

        Both halves follow the reference, unless the model is one that is `guided_by_reference`: then the first half has
        none, and guidance leads towards the prompt and the reference together.

        Args:
            motions: of the clips, one of all or of each; or none.
            clips: half of the batch.

        Raises:
            EmtError: the network cannot do that.
        """
        if not motions or not self.config.get("guided_by_reference", False):
            return motions
        drop = getattr(self.unet, "without_reference", None)
        if drop is None:
            problem = f"a {type(self.unet).__name__} is not guided by the reference"
            raise EmtError(problem, "Take guided_by_reference out of the model's model_index.json.")
        each = motions * (clips // motions[0].references) if len(motions) == 1 else motions
        return [*(replace(motion, features=drop(motion.features)) for motion in each), *each]

    # --------------------------------------------------------------------------------------------------- the parts

    def encode_prompts(self, prompts: Sequence[str], frames: int | None = None) -> Tensor:
        """Text encoding of prompts: (prompts, tokens, width).

        With `prompt_syntax` webui, as many chunks of tokens as the longest prompt has; and if a prompt changes over the
        clip, (prompts·frames, tokens, width).

        Args:
            prompts: the prompts.
            frames: of the clip, if prompts may change over it.

        Raises:
            EmtError: if the model's vocabulary is one of whole words and lacks some of a prompt, or a prompt's syntax
                has no sense.
        """
        if self.prompt_encoder is not None:
            return self.prompt_encoder(prompts).to(self._execution_device, self.unet.dtype)
        if (kind := type(self.text_encoder).__name__) in LARGE_TEXT_ENCODERS:
            hint = "Open the model with MotionTransferPipeline.from_pretrained."
            raise EmtError(f"prompts are not encoded by an open {kind}", hint)
        limit = self.tokenizer.model_max_length
        if self.prompt_syntax == WEBUI:
            for prompt in prompts:
                self.check_words(words_of(prompt))
            around = self.tokenizer("").input_ids[:1], self.tokenizer("").input_ids[1:]
            read = TextReader(self._tokenize, self._encode_tokens, around, self.tokenizer.pad_token_id, limit)
            return read(prompts, frames)
        # A word of a textual inversion stands for as many tokens as it has vectors.
        prompts = [self.maybe_convert_prompt(prompt, self.tokenizer) for prompt in prompts]
        for prompt in prompts:
            self.check_words(prompt)
            tokens = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if tokens > limit:
                logger.warning(
                    "the prompt has %d tokens, the model reads the first %d: %s…", tokens, limit, prompt[:60]
                )
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        return self._encode_tokens(ids)

    def _tokenize(self, text: str) -> list[int]:
        """Ids of the tokens of a text, however many, without those around them."""
        text = self.maybe_convert_prompt(text, self.tokenizer)  # a textual inversion has a token for each vector
        ids: list[int] = self.tokenizer(text, truncation=False, verbose=False).input_ids
        around = len(self.tokenizer("").input_ids)
        return ids[1 : len(ids) - around + 1]

    def _encode_tokens(self, ids: Tensor) -> Tensor:
        """Text encoding of token ids (prompts, tokens), from the layer that `clip_skip` says."""
        encoder: Any = self.text_encoder
        ids = ids.to(self._execution_device)
        if self.clip_skip == 1:
            return encoder(ids)[0].to(self.unet.dtype)
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden).to(self.unet.dtype)

    def check_words(self, prompt: str) -> None:
        """Raise an `EmtError` if the vocabulary is one of whole words and lacks some of the prompt."""
        if vocabulary := Vocabulary.of(self.tokenizer.backend_tokenizer):
            known = ", ".join(phrase for group in vocabulary.groups.values() for phrase in group)
            vocabulary.check(prompt, f"It knows: {known}")

    def windows_over(self, frames: int, window: int | None = None) -> Windows | None:
        """Windows over the latent frames of a clip; None where the network takes all of them at once.

        Args:
            frames: of the clip.
            window: frames of a window; None for the model's frames.

        Raises:
            ValueError: for a number of frames that the model makes no clips of.
        """
        facts = self.unet.facts
        return windows_over(facts, frames, window or min(self.config.frames, facts.max_frames))

    def encode_frames(
        self, frames: NDArray[np.uint8], generator: torch.Generator, windows: Windows | None = None
    ) -> Tensor:
        """Latents of RGB frames (frames, height, width, 3): (1, channels, latent frames, height/8, width/8).

        With windows, the device has the frames of one at a time, or of a latent frame if the autoencoder is of video.
        """
        if windows is None or self.codec.streams:
            images = torch.from_numpy(np.ascontiguousarray(frames))
            if windows is None:
                images = images.to(self._execution_device)
            return self.codec.encode(self.backend, images, generator).to(self.unet.dtype)
        encoded = []
        for start, new in windows.chunks():
            window = self.unet.facts.frames_of(slice(start, start + windows.size))
            latents = self.encode_frames(frames[window], generator)
            encoded.append(latents[:, :, new.start - start :])
        return torch.cat(encoded, dim=2)

    def decode_latents(self, latents: Tensor) -> NDArray[np.uint8]:
        """RGB frames (frames, height, width, 3) of latents (channels, latent frames, height/8, width/8)."""
        return self.decode_clips([latents])[0]

    def decode_clips(self, clips: Sequence[Tensor], windows: Windows | None = None) -> list[NDArray[np.uint8]]:
        """`decode_latents` of several clips, parts of which are copied to the host while others are decoded.

        With windows, the device has the frames of one at a time, or of a latent frame if the autoencoder is of video.
        """
        if windows:
            return [self._decode_in_windows(latents, windows) for latents in clips]
        decoded = []
        for latents in clips:
            parts = []
            for images in self.codec.decode(self.backend, latents):
                # Into pinned memory a copy needs no wait, so that the next part is being decoded meanwhile.
                part = torch.empty(images.shape, dtype=torch.uint8, pin_memory=images.is_cuda)
                parts.append(part.copy_(images, non_blocking=True))
            decoded.append(parts)
        if clips[0].is_cuda:
            torch.cuda.synchronize(clips[0].device)
        return [(parts[0] if len(parts) == 1 else torch.cat(parts)).numpy() for parts in decoded]

    def _decode_in_windows(self, latents: Tensor, windows: Windows) -> NDArray[np.uint8]:
        factor = self.vae_scale_factor
        height, width = (factor * side for side in latents.shape[2:])
        facts = self.unet.facts
        frames = scratch_array((facts.frames_of(slice(0, windows.frames)).stop, height, width, 3))
        if self.codec.streams:
            done = 0
            for images in self.codec.decode(self.backend, latents):
                frames[done : done + len(images)] = images.cpu().numpy()
                done += len(images)
            return frames
        for start, new in windows.chunks():
            window, own = facts.frames_of(slice(start, start + windows.size)), facts.frames_of(new)
            (part,) = self.decode_clips([latents[:, start : start + windows.size]])
            frames[own] = part[own.start - window.start :]
        return frames

    def initial_noise(self, generators: Sequence[torch.Generator], frames: int, height: int, width: int) -> Tensor:
        """Noise for a clip of each generator: (clips, channels, latent frames, height/8, width/8), on the CPU."""
        factor = self.vae_scale_factor
        shape = (self.unet.latent_channels, self.codec.latent_frames(frames), height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def shape_of(self, motions: Sequence[Motion]) -> tuple[int, int, int]:
        """Frames, height and width in pixels of clips with these motions; the model's own without any.

        Raises:
            ValueError: if motions differ in shape.
        """
        shapes = {(m.frames, m.height, m.width) for m in motions}
        if len(shapes) > 1:
            raise ValueError(f"motions of one batch have one shape (frames, height, width), got {sorted(shapes)}")
        return shapes.pop() if shapes else (self.config.frames, self.config.height, self.config.width)

    def make_sampler(self, name: str, steps: int) -> Any:
        """`emt.sampling.make_sampler` of the model."""
        return make_sampler(name, self.scheduler, steps)


def _broadcast(name: str, values: list[T], count: int) -> list[T]:
    if len(values) not in (1, count):
        raise ValueError(f"{name} has {len(values)} entries, expected 1 or {count}")
    return values * (count // len(values))


def load_pipeline(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MotionTransferPipeline:
    """Open a model folder, the URL of one, or a hub id on a device.

    Raises:
        EmtError: if there is no such model, or it is not one of motion transfer, or a file of it is damaged.
    """
    if is_url(model):
        model = find_model(str(model), download=True).folder
    with _opening(model):
        from emt.pipeline import MotionTransferPipeline

        pipe = MotionTransferPipeline.from_pretrained(str(model), dtype=dtype).to(device)
        _check_numbers(pipe, model)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        if part is not None:
            align(part)
    return pipe


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> MotionTransfer | None:
    """Open a model folder for making clips, without diffusers; None if only diffusers can open it.

    Its weights are mapped from its files, until `MotionTransfer.to` brings them to a device.

    Raises:
        EmtError: as `load_pipeline`.
    """
    with _opening(folder):
        index = Config.read(folder / "model_index.json")
        kind = index.get("unet", ["", ""])[1]
        if kind not in OPENED_DIRECTLY:
            return None
        parts = module_of(kind, "opening").open_parts(folder, index, dtype)
        if parts is None:
            return None
        scheduler = SimpleNamespace(config=Config.read(folder / "scheduler" / "scheduler_config.json"))
        known = (*DEFAULTS, "sampler", "adapter", "guided_by_reference")
        own = {name: value for name, value in index.items() if name in known}
        pipe = MotionTransfer(**parts, scheduler=scheduler, **own)
        _check_numbers(pipe, folder)
        return pipe


def _check_numbers(pipe: MotionTransfer, model: str | Path) -> None:
    """Check the numbers that a model's configurations give for what is computed with and between its networks.

    Raises:
        EmtError: one is none, contradicts another, or means what is not computed here.
    """

    def expect(fits: bool, name: str, value: Any, allowed: str) -> None:
        if not fits:
            raise EmtError(f"the model {model} cannot be opened: {name} is {value!r:.60}", f"Allowed: {allowed}.")

    try:
        check_schedule(pipe.scheduler.config)
    except EmtError as error:
        raise EmtError(f"the model {model} cannot be opened: {error.problem}", error.hint) from None
    last = pipe.scheduler.config.get("num_train_timesteps", 1000) - 1
    level = pipe.config.get("reference_timestep")
    expect(
        level is None or (type(level) is int and 0 <= level <= last),
        "reference_timestep of model_index.json",
        level,
        f"0 to {last}",
    )
    if pipe.codec.streams:  # its latents are scaled by each channel, its text encoder may be elsewhere
        return
    config = pipe.vae.config
    scale = config.get("scaling_factor", 0.18215)
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < 1e6
    expect(number, "scaling_factor of vae/config.json", scale, "a number above 0")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        expect(not config.get(name), f"{name} of vae/config.json", config.get(name), "null, for this network")
    if pipe.text_encoder is None:
        return
    text, network = pipe.text_encoder.config, pipe.unet.config
    width = network.get("cross_attention_dim", network.get("text_dim", text.hidden_size))
    expect(text.hidden_size == width, "hidden_size of text_encoder/config.json", text.hidden_size, f"{width}")
    tokens, positions = pipe.tokenizer.model_max_length, text.max_position_embeddings
    expect(tokens <= positions, "model_max_length of the tokenizer", tokens, f"up to {positions}")
    around = pipe.tokenizer("").input_ids  # each prompt is cut to fit between these
    expect(len(around) == 2, "what the tokenizer makes of no text", around, "a token before a prompt and one after it")
    words = embeddings_of(pipe.tokenizer)
    expect(words <= text.vocab_size, "the vocabulary of the tokenizer", words, f"up to {text.vocab_size}")


@contextlib.contextmanager
def _opening(model: str | Path) -> Iterator[None]:
    """Context manager in which a model is opened: whatever goes wrong with its files is one error.

    Raises:
        EmtError: as `load_pipeline`.
    """
    hint = "Make a model folder with: emt import-weights --help"
    local = isinstance(model, Path) or Path(model).exists()
    if local and not (Path(model) / "model_index.json").is_file():
        raise EmtError(f"{model} is not a model folder: it has no model_index.json", hint)
    try:
        yield
    except (EmtError, MemoryError):
        raise
    except Exception as error:  # damaged configurations fail in any way in the parsers of diffusers and transformers
        text = shorten(str(error) or type(error).__name__, 400)
        raise EmtError(f"the model {model} cannot be opened: {text}", hint) from error
