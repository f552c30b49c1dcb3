"""Latents of Wan's VAE, some frames at a time.

The VAE is causal in time: latent frame 0 is of one frame, each of the others of the next four. Its convolutions keep
the last frames that they saw, so that a clip of any length goes through it in chunks, with the same result and the
memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emt.backends.vae import as_pixels, is_finite, no_pictures
from emt.parts import offloaded

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

#: Frames of a latent frame, but the first, and pixels of a latent.
FRAMES, PIXELS = 4, 8


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 4n + 1 frames.

    Raises:
        ValueError: for another number of frames.
    """
    if frames < 1 or frames % FRAMES != 1:
        raise ValueError(f"a clip has {frames} frames, allowed are 1, 5, 9, … (4n + 1)")
    return (frames - 1) // FRAMES + 1


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Normalized latents of a clip, the means of the VAE's posterior.

    Args:
        vae: on the device to compute on.
        frames: RGB of 4n + 1 frames, uint8, (frames, height, width, 3), on any device.

    Returns:
        (1, channels, n + 1, height/8, width/8), float32, on the VAE's device.

    Raises:
        ValueError: for a number of frames that is not 4n + 1.
        EmtError: the latents are not finite.
    """
    count, cache, encoded = latent_frames(len(frames)), _cache(vae.encoder), []
    _bring(vae)
    for i in range(count):
        chunk = frames[:1] if i == 0 else frames[FRAMES * (i - 1) + 1 : FRAMES * i + 1]
        pixels = chunk.to(vae.device).permute(3, 0, 1, 2).unsqueeze(0).to(vae.dtype) / 127.5 - 1
        hidden = vae.encoder(pixels, feat_cache=cache, feat_idx=[0])
        encoded.append(vae.quant_conv(hidden).chunk(2, dim=1)[0])
    mean, std = _statistics(vae)
    latents: Tensor = (torch.cat(encoded, dim=2).float() - mean) / std
    if not is_finite(latents):
        raise no_pictures(vae)
    return latents


@torch.no_grad()
def decode_frames(vae: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """RGB of a clip, from normalized latents.

    Args:
        vae: on the device to compute on.
        latents: (1, channels, n + 1, height/8, width/8), on the VAE's device.

    Yields:
        One frame, and then four at a time, uint8, (frames, height, width, 3), on the VAE's device.

    Raises:
        EmtError: they are not finite, or each of them is of one colour.
    """
    _bring(vae)
    mean, std = _statistics(vae)
    hidden, cache, pictured = (latents.float() * std + mean).to(vae.dtype), _cache(vae.decoder), False
    for i in range(hidden.shape[2]):
        z = vae.post_quant_conv(hidden[:, :, i : i + 1])
        pixels = vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
        if not is_finite(pixels):
            raise no_pictures(vae)
        images = as_pixels(pixels[0])
        colours = images.flatten(2)
        pictured = pictured or bool((colours.amax(-1) > colours.amin(-1)).any())
        yield images.permute(1, 2, 3, 0)
    if not pictured:
        raise no_pictures(vae)


@offloaded
def _bring(vae: AutoencoderKLWan) -> None:
    """Move the VAE to where it computes, if it is offloaded: its own methods would do so when they are called."""


def _cache(network: nn.Module) -> list[Tensor | None]:
    """Room for the last frames that each convolution over time saw."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Means and deviations of latents by channel, each (channels, 1, 1, 1), float32."""
    mean, std = (
        torch.tensor(values, device=vae.device) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
