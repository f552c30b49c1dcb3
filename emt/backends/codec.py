"""Between a clip's frames and its latents: autoencoders of images, frame by frame, and of video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from emt.backends.base import Backend
from emt.backends.vae import are_pictures, as_pixels, decode_exactly, encode_exactly, is_finite
from emt.backends.video_vae import PIXELS, decode_frames, encode_frames, latent_frames

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class Codec(Protocol):
    """Encodes and decodes clips by an autoencoder."""

    #: Pixels of a latent in height and width.
    pixels: int
    #: A clip of any length goes through it in parts, so that no window of it has to be encoded or decoded apart.
    streams: bool

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip.

        Raises:
            ValueError: for a number of frames that it does not encode.
        """
        ...

    def encode(self, backend: Backend, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents (1, channels, latent frames, height/pixels, width/pixels) of RGB (frames, height, width, 3).

        Args:
            backend: executes an autoencoder of images.
            frames: uint8, on any device.
            generator: of what is sampled, on the CPU.
        """
        ...

    def decode(self, backend: Backend, latents: Tensor) -> Iterator[Tensor]:
        """RGB of scaled latents (channels, latent frames, …): uint8 (frames, height, width, 3), some at a time."""
        ...


class ImageCodec:
    """Autoencoder of images, such as Stable Diffusion's, frame by frame; latents are sampled.

    Args:
        vae: of images.
        frames: so many neighbouring frames make a latent frame, channels of one after those of the other.
    """

    streams = False

    def __init__(self, vae: Any, frames: int = 1) -> None:
        self.vae, self.frames = vae, frames
        self.pixels = 2 ** (len(vae.config.block_out_channels) - 1)

    def latent_frames(self, frames: int) -> int:
        """One of so many frames.

        Raises:
            ValueError: if that leaves a remainder.
        """
        if frames % self.frames:
            raise ValueError(f"a clip has {frames} frames, allowed are multiples of {self.frames}")
        return frames // self.frames

    def encode(self, backend: Backend, frames: Tensor, generator: torch.Generator) -> Tensor:
        """As `Codec.encode`; in float32, with a warning, where the autoencoder overflows in half precision.

        Raises:
            EmtError: the latents are not finite in float32 either.
        """
        images = frames.permute(0, 3, 1, 2) / 127.5 - 1
        mean, std = backend.encode_images(images.to(self.vae.dtype))
        if not is_finite(mean, std):
            mean, std = encode_exactly(self.vae, images)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = (mean + std * noise) * self.vae.config.scaling_factor
        return pack(latents.transpose(0, 1).unsqueeze(0), self.frames)

    def decode(self, backend: Backend, latents: Tensor) -> Iterator[Tensor]:
        """As `Codec.decode`, all at once; in float32, with a warning, where half precision makes no pictures.

        Raises:
            EmtError: there are no pictures in float32 either.
        """
        latents = unpack(latents.unsqueeze(0), self.frames)[0]
        latents = (latents / self.vae.config.scaling_factor).transpose(0, 1)
        images = backend.decode_images(latents.to(self.vae.dtype))
        if not are_pictures(images):
            images = decode_exactly(self.vae, latents)
        yield as_pixels(images).permute(0, 2, 3, 1).contiguous()


def pack(latents: Tensor, frames: int) -> Tensor:
    """Neighbouring frames side by side in channels: (n, channels, k·frames, …) → (n, frames·channels, k, …)."""
    return latents.unflatten(2, (-1, frames)).movedim(3, 1).flatten(1, 2)


def unpack(latents: Tensor, frames: int) -> Tensor:
    """The inverse of `pack`: (n, frames·channels, k, …) → (n, channels, k·frames, …)."""
    return latents.unflatten(1, (frames, -1)).movedim(1, 3).flatten(2, 3)


class VideoCodec:
    """Wan's autoencoder of video, a latent frame at a time; latents are the means (`emt.backends.video_vae`)."""

    pixels = PIXELS
    streams = True

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    def latent_frames(self, frames: int) -> int:
        """n + 1 of 4n + 1 frames."""
        return latent_frames(frames)

    def encode(self, backend: Backend, frames: Tensor, generator: torch.Generator) -> Tensor:
        """As `Codec.encode`; nothing is sampled."""
        return encode_frames(self.vae, frames)

    def decode(self, backend: Backend, latents: Tensor) -> Iterator[Tensor]:
        """As `Codec.decode`, one frame and then four at a time."""
        return decode_frames(self.vae, latents.unsqueeze(0))


def codec_of(vae: Any, channels: int) -> Codec:
    """The codec of an autoencoder, for a network with so many latent channels."""
    if hasattr(vae.config, "latents_mean") and hasattr(vae.config, "temperal_downsample"):  # of diffusers' for Wan
        return VideoCodec(vae)
    return ImageCodec(vae, max(channels // vae.config.latent_channels, 1))
