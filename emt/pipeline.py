"""From a reference clip and a prompt to a video: the sampling of EfficientMT around the adapted network."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from emt.backbone import import_backbones
from emt.backends.base import Backend
from emt.backends.torch import TorchBackend
from emt.checkpoints import check_loaded
from emt.errors import EmtError
from emt.features import Motion, joined
from emt.sampling import SCHEDULERS, DeepFeatureReuse, check_finite, noise_generator
from emt.vocabulary import Vocabulary

if TYPE_CHECKING:
    from emt.video import Clip

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MotionTransferPipeline(DiffusionPipeline):
    """Motion transfer with an adapted text-to-video network (EfficientMT, arXiv 2503.19369).

    The numbers are the model's defaults; those of this signature are the published ones.

    Args:
        vae: of Stable Diffusion, 8 pixels a latent.
        text_encoder: CLIP's.
        tokenizer: of the text encoder.
        unet: the adapted network, an `emt.backbone.Backbone`.
        scheduler: its configuration is what the named schedulers are made from.
        frames: of a clip.
        height: pixels.
        width: pixels.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        reference_timestep: noise level at which the reference is read, of 1000.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        frames: int = 16,
        height: int = 512,
        width: int = 512,
        steps: int = 25,
        guidance: float = 6.0,
        reference_timestep: int = 400,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            reference_timestep=reference_timestep,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.backend: Backend = TorchBackend(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> MotionTransferPipeline:
        """Open a model folder or hub id, with the options of `DiffusionPipeline.from_pretrained`.

        Raises:
            EmtError: a part has not the weights that its file holds.
            OSError: there is no such model, or a file of it is missing.
        """
        where = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        given = {name: options[name] for name in where if name in options}
        import_backbones(cls.load_config(str(pretrained_model_name_or_path), **given))
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            cached = {name: options[name] for name in ("cache_dir", "revision", "variant") if name in options}
            folder = Path(cls.download(str(pretrained_model_name_or_path), local_files_only=True, **cached))
        parts = {name: part for name, part in pipe.components.items() if name not in options}
        networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        check_loaded(networks, folder, options.get("variant"))
        return pipe

    @property
    def size_multiple(self) -> int:
        """Height and width of clips are multiples of this, in pixels."""
        return self.vae_scale_factor * self.unet.facts.grid_step

    def save_memory(self, device: torch.device | str) -> None:
        """Make clips on a GPU with little memory, more slowly; the pipeline is in the computer's memory so far.

        Of text encoder, network and VAE only the one that is needed is on the GPU. Samples go through the network
        one by one, frames through the VAE, and a reference is prepared layer by layer, anew at each step, from features
        in the computer's memory.
        """
        self.enable_model_cpu_offload(device=device)
        self.backend = TorchBackend(self, low_memory=True)

    # ------------------------------------------------------------------------------------------------------ motion

    @torch.no_grad()
    def extract_motion(self, frames: NDArray[np.uint8] | Clip, seed: int = 0) -> Motion:
        """Read the motion of a reference clip (EfficientMT, section 3.2).

        One pass of the backbone over the sampled latents, noised to the reference timestep, with the empty prompt.

        Args:
            frames: RGB, (frames, height, width, 3), height and width multiples of `size_multiple`; or a `Clip`.
            seed: of the sampled latents and of the noise.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        pixels, step = np.asarray(getattr(frames, "frames", frames)), self.size_multiple
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % step or pixels.shape[2] % step:
            raise ValueError(
                f"reference frames have shape {pixels.shape}, expected (frames, height, width, 3) with height and "
                f"width multiples of {step}"
            )
        generator = noise_generator(seed)
        latents = self.encode_frames(pixels, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = torch.tensor([self.config.reference_timestep], device=latents.device)
        noisy = DDIMScheduler.from_config(self.scheduler.config).add_noise(latents, noise, timestep)
        features = self.backend.encode_reference(noisy, timestep, self.encode_prompts([""]))
        count, height, width, _ = pixels.shape
        return Motion(features, count, height, width, seed)

    # -------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        motion: Motion | Sequence[Motion] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        scheduler: str = "ddim",
        guidance_until: float = 1.0,
        cache_interval: int = 1,
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
            guidance: classifier-free guidance scale; 1 is without; None for the model's default.
            seed: of the initial noise.
            negative_prompt: what guidance leads away from.
            scheduler: a name of `SCHEDULERS`.
            guidance_until: part of the steps, from the first, that are guided; the others take half the time. Guidance
                matters where the layout comes about (Castillo et al. 2023, arXiv 2312.12487, section 4; Kynkäänniemi
                et al. 2024, arXiv 2404.07724, limit it to an interval).
            cache_interval: what lies below the network's highest resolution is computed in every n-th step only, and
                reused in between (DeepCache, Ma et al. 2023, arXiv 2312.00858, section 3.2).
            on_step: called with (steps done, steps) after each.

        Returns:
            One array a clip, RGB, (frames, height, width, 3).

        Raises:
            ValueError: if lists differ in length or motions in shape, `guidance_until` is not from 0 to 1, or
                `cache_interval` not positive.
            EmtError: for an unknown scheduler, a prompt with words that the model does not know, a backend that cannot
                reuse features, or a result that is not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = max(len(prompts), *(len(x) for x in (motion, seed) if isinstance(x, Sequence)), 1)
        prompts = _broadcast("prompt", prompts, count)
        negatives = _broadcast(
            "negative_prompt", [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt), count
        )
        seeds = _broadcast("seed", [seed] if isinstance(seed, int) else list(seed), count)
        motions = [motion] if isinstance(motion, Motion) else list(motion or [])
        if len(motions) > 1:
            motions = _broadcast("motion", motions, count)
        guidance = self.config.guidance if guidance is None else guidance
        guided = guidance != 1

        if not 0 <= guidance_until <= 1 or cache_interval < 1:
            raise ValueError(
                f"guidance_until is {guidance_until} and cache_interval {cache_interval}, "
                "allowed are 0 to 1 and positive whole numbers"
            )
        if cache_interval > 1 and not self.backend.reuses:
            problem = f"the engine {self.backend.name} computes the whole network in every step, not every n-th"
            raise EmtError(problem, "Use --cache-interval 1, or --engine torch.")

        text = self.encode_prompts(negatives + prompts if guided else prompts)
        text_features = self.unet.encode_text(text)
        plain_features = self.unet.encode_text(text[-count:]) if guided and guidance_until < 1 else text_features
        frames, height, width = self.shape_of(motions)
        moved = self.backend.prepare_motion(joined(motions)) if motions else None
        # The sampler's own numbers stay on the host, which does not have to wait for the device to read them.
        sampler = self._sampler(scheduler)
        sampler.set_timesteps(self.config.steps if steps is None else steps, device="cpu")
        timesteps = sampler.timesteps.to(self._execution_device)

        generators = [noise_generator(s) for s in seeds]
        noise = self.initial_noise(generators, frames, height, width)
        latents = noise.to(self._execution_device) * sampler.init_noise_sigma  # the sampler's state stays in float32
        step_options: dict[str, Any] = {}
        if "generator" in inspect.signature(sampler.step).parameters:
            step_options["generator"] = generators

        guided_steps = math.ceil(guidance_until * len(timesteps)) if guided else 0
        denoise = DeepFeatureReuse(self.backend, cache_interval)
        for i, timestep in enumerate(sampler.timesteps):
            guided = i < guided_steps
            scaled = sampler.scale_model_input(latents, timestep)
            sample = torch.cat([scaled, scaled]) if guided else scaled
            known = text_features if guided else plain_features
            prediction = denoise(sample.to(self.unet.dtype), timesteps[i], known, moved).float()
            if guided:
                away, towards = prediction.chunk(2)
                prediction = away + guidance * (towards - away)
            latents = sampler.step(prediction, timestep, latents, **step_options).prev_sample
            if on_step:
                on_step(i + 1, len(sampler.timesteps))

        check_finite(latents, seeds)
        del moved, prediction, sample, denoise
        return self.decode_clips(list(latents))

    # --------------------------------------------------------------------------------------------------- the parts

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text encoding of prompts: (prompts, tokens, width).

        Raises:
            EmtError: if the model's vocabulary is one of whole words and lacks some of a prompt.
        """
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            self.check_words(prompt)
            tokens = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if tokens > limit:
                logger.warning(
                    "the prompt has %d tokens, the model reads the first %d: %s…", tokens, limit, prompt[:60]
                )
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self._execution_device))[0].to(self.unet.dtype)

    def check_words(self, prompt: str) -> None:
        """Raise an `EmtError` if the vocabulary is one of whole words and lacks some of the prompt."""
        if vocabulary := Vocabulary.of(self.tokenizer.backend_tokenizer):
            known = ", ".join(phrase for group in vocabulary.groups.values() for phrase in group)
            vocabulary.check(prompt, f"It knows: {known}")

    def encode_frames(self, frames: NDArray[np.uint8], generator: torch.Generator) -> Tensor:
        """Sampled latents of RGB frames (frames, height, width, 3): (1, channels, frames, height/8, width/8)."""
        images = torch.from_numpy(np.ascontiguousarray(frames)).to(self._execution_device).permute(0, 3, 1, 2)
        mean, std = self.backend.encode_images((images / 127.5 - 1).to(self.vae.dtype))
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = (mean + std * noise) * self.vae.config.scaling_factor
        return latents.transpose(0, 1).unsqueeze(0).to(self.unet.dtype)

    def decode_latents(self, latents: Tensor) -> NDArray[np.uint8]:
        """RGB frames (frames, height, width, 3) of latents (channels, frames, height/8, width/8)."""
        return self.decode_clips([latents])[0]

    def decode_clips(self, clips: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
        """`decode_latents` of several clips, one of which is copied to the host while the next one is decoded."""
        decoded = []
        for latents in clips:
            latents = (latents / self.vae.config.scaling_factor).transpose(0, 1).to(self.vae.dtype)
            images = ((self.backend.decode_images(latents).float() + 1) * 127.5).clamp(0, 255).round()
            images = images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            # Into pinned memory a copy needs no wait, so that the next clip is being decoded meanwhile.
            frames = torch.empty(images.shape, dtype=torch.uint8, pin_memory=images.is_cuda)
            decoded.append(frames.copy_(images, non_blocking=True))
        if clips[0].is_cuda:
            torch.cuda.synchronize(clips[0].device)
        return [frames.numpy() for frames in decoded]

    def initial_noise(self, generators: Sequence[torch.Generator], frames: int, height: int, width: int) -> Tensor:
        """Noise for a clip of each generator: (clips, channels, frames, height/8, width/8), float32, on the CPU."""
        factor = self.vae_scale_factor
        shape = (self.unet.latent_channels, frames, height // factor, width // factor)
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

    def _sampler(self, name: str) -> Any:
        if name not in SCHEDULERS:
            raise EmtError(f"there is no scheduler {name!r}", f"Allowed: {', '.join(SCHEDULERS)}.")
        # A fresh one each time: multistep solvers carry state from clip to clip.
        return SCHEDULERS[name].from_config(self.scheduler.config)


def _broadcast(name: str, values: list[T], count: int) -> list[T]:
    if len(values) not in (1, count):
        raise ValueError(f"{name} has {len(values)} entries, expected 1 or {count}")
    return values * (count // len(values))


def load_pipeline(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MotionTransferPipeline:
    """Open a model folder or hub id on a device.

    Raises:
        EmtError: if there is no such model, or it is not one of motion transfer, or a file of it is damaged.
    """
    hint = "Make a model folder with: emt import-weights --help"
    local = isinstance(model, Path) or Path(model).exists()
    if local and not (Path(model) / "model_index.json").is_file():
        raise EmtError(f"{model} is not a model folder: it has no model_index.json", hint)
    try:
        pipe = MotionTransferPipeline.from_pretrained(str(model), dtype=dtype)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise EmtError(f"the model {model} cannot be opened: {error}", hint) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
