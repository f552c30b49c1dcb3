"""From a reference clip and a prompt to a video: the sampling of EfficientMT around the adapted network."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.loaders import TextualInversionLoaderMixin
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.backbone import BACKBONES, LARGE_TEXT_ENCODERS, import_backbones
from emt.backends.base import Backend
from emt.backends.codec import codec_of
from emt.backends.torch import TorchBackend
from emt.checkpoints import check_loaded
from emt.diffusers_interface import DiffusersInterface
from emt.diffusers_loras import LoraInterface
from emt.errors import EmtError
from emt.features import Motion, MotionFeatures, joined
from emt.model_folder import find_model
from emt.presets import MOST_GUIDANCE, SCHEDULER_DEFAULTS
from emt.prompts import PromptEncoder
from emt.remote import is_url
from emt.sampling import DeepFeatureReuse, add_noise, check_finite, make_sampler, noise_generator, run_sampler
from emt.scratch import scratch_array
from emt.vocabulary import Vocabulary
from emt.windowed import WindowedDenoiser, read_in_windows
from emt.windows import Windows, windows_over

if TYPE_CHECKING:
    from emt.video import Clip

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Of a model folder: diffusers imports no network's module because a folder names it.
_CUSTOM_PIPELINE = '''"""Opens this folder in diffusers, where emt is installed.

    DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
"""

import {module}
from emt.pipeline import MotionTransferPipeline
'''


class MotionTransferPipeline(DiffusersInterface, LoraInterface, TextualInversionLoaderMixin, DiffusionPipeline):
    """Motion transfer with an adapted text-to-video network (EfficientMT, arXiv 2503.19369).

    The numbers are the model's defaults; those of this signature are the published ones.

    Args:
        vae: autoencoder of images, such as Stable Diffusion's, or Wan's of video (`emt.backends.codec`).
        text_encoder: CLIP's. None where prompts are encoded apart (`prompt_encoder`).
        tokenizer: of the text encoder.
        unet: the adapted network, an `emt.backbone.Backbone`.
        scheduler: its configuration is what the named schedulers are made from.
        frames: of a clip.
        height: pixels.
        width: pixels.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        reference_timestep: noise level at which the reference is read, of 1000.
        sampler: a name of `SCHEDULERS`.
        adapter: "none" if it is not trained.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar = ["text_encoder"]

    def __init__(
        self,
        vae: ModelMixin,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        frames: int = 16,
        height: int = 512,
        width: int = 512,
        steps: int = 25,
        guidance: float = 6.0,
        reference_timestep: int = 400,
        sampler: str = "ddim",
        adapter: str = "trained",
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
            # Only what is not usual, so that other versions open the folder, too.
            **({} if sampler == "ddim" else {"sampler": sampler}),
            **({} if adapter == "trained" else {"adapter": adapter}),
        )
        self.codec = codec_of(vae, unet.latent_channels)
        self.vae_scale_factor = self.codec.pixels
        #: Encodes prompts where there is no `text_encoder`: its encoder is too large to be open beside the network.
        self.prompt_encoder: PromptEncoder | None = None
        #: Layer of the text encoder that prompts are read from, counted from the last: 1 is the last, 2 the one before.
        self.clip_skip = 1
        self.backend: Backend = TorchBackend(self)
        #: The scheduler that the model came with: one that was put in its place samples itself (`__call__`).
        self.models_scheduler = scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> MotionTransferPipeline:
        """Open a model folder or hub id, with the options of `DiffusionPipeline.from_pretrained`.

        Raises:
            EmtError: a part has not the weights that its file holds.
            OSError: there is no such model, or a file of it is missing.
        """
        where = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        given = {name: options[name] for name in where if name in options}
        index = cls.load_config(str(pretrained_model_name_or_path), **given)
        import_backbones(index)
        if index.get("vae", ["", ""])[1] == "AutoencoderKLWan" and isinstance(options.get("dtype"), torch.dtype):
            options["dtype"] = {"default": options["dtype"], "vae": torch.float32}  # as it was trained
        apart = index.get("text_encoder", ["", ""])[1] in LARGE_TEXT_ENCODERS and "text_encoder" not in options
        if apart:
            options["text_encoder"] = None
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            cached = {name: options[name] for name in ("cache_dir", "revision", "variant") if name in options}
            folder = Path(cls.download(str(pretrained_model_name_or_path), local_files_only=True, **cached))
        parts = {name: part for name, part in pipe.components.items() if name not in options}
        networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        check_loaded(networks, folder, options.get("variant"))
        if apart:
            pipe.prompt_encoder = PromptEncoder.of_model(pretrained_model_name_or_path, **given)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a model folder, as `DiffusionPipeline.save_pretrained`, with the text encoder that is not open.

        With `pipeline.py`, `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline",
        trust_remote_code=True)` opens it, too; not a model whose prompts are encoded apart.
        """
        super().save_pretrained(str(save_directory), **options)
        kind = type(self.unet).__name__
        if self.prompt_encoder is None and kind in BACKBONES:
            text = _CUSTOM_PIPELINE.format(module=BACKBONES[kind][0])
            (Path(save_directory) / "pipeline.py").write_text(text, encoding="utf-8")
        if self.prompt_encoder is not None:
            source, index = self.prompt_encoder.model, Path(save_directory) / "model_index.json"
            shutil.copytree(source / "text_encoder", Path(save_directory) / "text_encoder")
            listed = json.loads((source / "model_index.json").read_bytes())["text_encoder"]
            index.write_text(json.dumps(json.loads(index.read_bytes()) | {"text_encoder": listed}, indent=2) + "\n")

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
        motions = [motion] if isinstance(motion, Motion) else list(motion or [])
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

        count = len(sampler.timesteps)
        plain = guided and guidance_until < 1
        moved_steps = math.ceil(motion_until * count)
        # What steps need of prompts and motions is let go before the clips are decoded.
        latents = run_sampler(
            self._network(prompts, negatives, motions, guided, plain, moved_steps, cache_interval, windows),
            sampler,
            self.initial_noise(generators, *shape).to(self._execution_device),
            guidance,
            guided_steps=math.ceil(guidance_until * count),
            generators=generators,
            on_step=on_step,
        )
        check_finite(latents, seeds)
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
        windows: Windows | None,
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
            windows: over the clips' frames; None where the network takes all at once.
        """
        text = self.encode_prompts(negatives + prompts if guided else prompts)
        features = self.unet.encode_text(text)
        alone = self.unet.encode_text(text[-len(prompts) :]) if plain else features
        if windows:
            denoise_windows = WindowedDenoiser(windows, self.backend, motions, cache_interval)

            def predict_in_windows(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
                known = features if guided else alone
                return denoise_windows(sample.to(self.unet.dtype), timestep, known, step < moved_steps)

            return predict_in_windows
        moved = self.backend.prepare_motion(joined(motions)) if motions else None
        denoise = DeepFeatureReuse(self.backend, cache_interval)

        def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
            known, reference = features if guided else alone, moved if step < moved_steps else None
            return denoise(sample.to(self.unet.dtype), timestep, known, reference)

        return predict

    # --------------------------------------------------------------------------------------------------- the parts

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text encoding of prompts: (prompts, tokens, width).

        Raises:
            EmtError: if the model's vocabulary is one of whole words and lacks some of a prompt.
        """
        if self.prompt_encoder is not None:
            return self.prompt_encoder(prompts).to(self._execution_device, self.unet.dtype)
        if (kind := type(self.text_encoder).__name__) in LARGE_TEXT_ENCODERS:
            hint = "Open the model with MotionTransferPipeline.from_pretrained."
            raise EmtError(f"prompts are not encoded by an open {kind}", hint)
        limit = self.tokenizer.model_max_length
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
        """Windows over a clip of so many frames; None where the network takes all of them at once.

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

        With windows, the device has the frames of one at a time.
        """
        if windows is None:
            images = torch.from_numpy(np.ascontiguousarray(frames)).to(self._execution_device)
            return self.codec.encode(self.backend, images, generator).to(self.unet.dtype)
        encoded = []
        for start, new in windows.chunks():
            latents = self.encode_frames(frames[start : start + windows.size], generator)
            encoded.append(latents[:, :, new.start - start :])
        return torch.cat(encoded, dim=2)

    def decode_latents(self, latents: Tensor) -> NDArray[np.uint8]:
        """RGB frames (frames, height, width, 3) of latents (channels, latent frames, height/8, width/8)."""
        return self.decode_clips([latents])[0]

    def decode_clips(self, clips: Sequence[Tensor], windows: Windows | None = None) -> list[NDArray[np.uint8]]:
        """`decode_latents` of several clips, parts of which are copied to the host while others are decoded.

        With windows, the device has the frames of one at a time.
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
        frames = scratch_array((windows.frames, height, width, 3))
        for start, new in windows.chunks():
            (part,) = self.decode_clips([latents[:, start : start + windows.size]])
            frames[new] = part[new.start - start :]
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
    hint = "Make a model folder with: emt import-weights --help"
    if is_url(model):
        model = find_model(str(model), download=True).folder
    local = isinstance(model, Path) or Path(model).exists()
    if local and not (Path(model) / "model_index.json").is_file():
        raise EmtError(f"{model} is not a model folder: it has no model_index.json", hint)
    try:
        pipe = MotionTransferPipeline.from_pretrained(str(model), dtype=dtype)
    except (EmtError, MemoryError):
        raise
    except Exception as error:  # damaged configurations fail in any way in the parsers of diffusers and transformers
        text = shorten(str(error) or type(error).__name__, 400)
        raise EmtError(f"the model {model} cannot be opened: {text}", hint) from error
    return pipe.to(device)
