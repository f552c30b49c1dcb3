"""Parity of an engine with eager PyTorch, on random inputs of its smallest, typical and largest shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emt_engines.manifest import Manifest, Size
from emt_engines.parts import text_tokens

if TYPE_CHECKING:
    from emt.backends.base import Backend
    from emt.pipeline import MotionTransfer

#: Of the 1,000 noise levels.
_TIMESTEPS = (999.0, 500.0, 1.0)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Greatest difference over the greatest value."""
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


@torch.no_grad()
def measure(engine: Backend, manifest: Manifest, pipe: MotionTransfer) -> dict[str, float]:
    """The worst `difference` of each part of an engine from eager PyTorch.

    Args:
        engine: The engine, opened for `pipe`.
        manifest: Its manifest.
        pipe: The model on the engine's device, in its type.
    """
    worst: dict[str, float] = {}
    draw = _Draw(pipe)

    def note(name: str, found: Tensor, wanted: Tensor) -> None:
        worst[name] = max(worst.get(name, 0.0), difference(found, wanted))

    names = {part.name for part in manifest.parts}
    for width, height in _sizes(manifest.sizes):
        grid = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
        latent = (pipe.codec.latent_frames(manifest.frames), *grid)
        clip, timestep, text = draw.clips(1, *latent), torch.tensor(400.0, device=pipe.device), draw.text(1)
        features = pipe.unet.encode_reference(clip, timestep, text)
        if "reference" in names:
            found = engine.encode_reference(clip, timestep, text)
            for path, pair in features.layers.items():
                for own, wanted in zip(found.layers[path], pair):
                    note("reference", own, wanted)
        motion = engine.prepare_motion(features)
        for i, samples in enumerate(_counts(manifest)):
            sample, text_features = draw.clips(samples, *latent), pipe.unet.encode_text(draw.text(samples))
            timestep = torch.tensor(_TIMESTEPS[i % len(_TIMESTEPS)], device=pipe.device)
            if "denoise" in names:
                wanted = pipe.unet(sample, timestep, text_features, motion)
                note("denoise", engine.denoise(sample, timestep, text_features, motion), wanted)
        if "vae_encoder" in names:
            images = draw.images(manifest.frames, height, width)
            for own, wanted in zip(engine.encode_images(images), _encode(pipe, images)):
                note("vae_encoder", own, wanted)
        if "vae_decoder" in names:
            latents = draw.latents(manifest.frames, *grid) / pipe.vae.config.scaling_factor
            note("vae_decoder", engine.decode_images(latents), _decode(pipe, latents))
    return worst


class _Draw:
    """Random inputs, the same every time."""

    def __init__(self, pipe: MotionTransfer) -> None:
        self.pipe = pipe
        self.generator = torch.Generator().manual_seed(0)

    def clips(self, count: int, frames: int, height: int, width: int) -> Tensor:
        """(count, channels, frames, height, width)."""
        return self._normal(count, self.pipe.unet.latent_channels, frames, height, width)

    def latents(self, count: int, height: int, width: int) -> Tensor:
        """(count, channels, height, width), of the VAE."""
        return self._normal(count, self.pipe.vae.config.latent_channels, height, width)

    def text(self, count: int) -> Tensor:
        """(count, tokens, width)."""
        return self._normal(count, text_tokens(self.pipe), self.pipe.unet.text_width)

    def images(self, count: int, height: int, width: int) -> Tensor:
        """(count, 3, height, width) from -1 to 1."""
        return self._normal(count, 3, height, width).clamp(-1, 1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.pipe.device, self.pipe.unet.dtype)


def _sizes(sizes: tuple[Size, ...]) -> Iterator[tuple[int, int]]:
    """Each size, or the least, typical and greatest of a range."""
    for size in sizes:
        yield from dict.fromkeys([size.least, size.typical, size.most])


def _counts(manifest: Manifest) -> list[int]:
    """Samples of a call: the fewest (one clip without guidance), one clip with it, and the most."""
    low, high = manifest.batch
    return list(dict.fromkeys([low, 2 * low, 2 * high]))


def _encode(pipe: MotionTransfer, images: Tensor) -> tuple[Tensor, Tensor]:
    posteriors = [pipe.vae.encode(image).latent_dist for image in images.split(1)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def _decode(pipe: MotionTransfer, latents: Tensor) -> Tensor:
    return torch.cat([pipe.vae.decode(image).sample for image in latents.split(1)])
