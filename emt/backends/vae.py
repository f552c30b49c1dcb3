"""The VAE on a GPU: channels-last weights, fused group norms, frames at once; and in float32 where that overflows."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from emt.checkpoints import allocate
from emt.errors import EmtError
from emt_kernels.group_norm_silu import group_norm_silu

logger = logging.getLogger(__name__)

#: Largest number in latents of a clip, scaled as the network has them, of which variance is about 1.
_MOST = 1000.0
#: Pixels that the VAE takes at once on a GPU: two frames of 512×512 fill it, and take one GiB of activations.
VAE_PIXELS = 2 * 512 * 512
#: Frames that it takes at once elsewhere.
VAE_FRAMES = 4


class _GroupNormSiLU(nn.GroupNorm):
    """A group norm, and the SiLU after it, of ``x + shift`` in channels-last memory; `shift` (images, channels)."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, True, shift)


def prepare_vae(vae: Any) -> None:
    """Convert the weights of a VAE to channels-last memory and fuse its group norms with SiLUs and biases around them.

    Its state dict stays as it is.
    """
    convert_to_channels_last(vae)
    for module in vae.modules():
        if isinstance(getattr(module, "nonlinearity", None), nn.SiLU):  # of a residual block
            pairs = [("norm1", "nonlinearity"), ("norm2", "nonlinearity")]
        elif isinstance(getattr(module, "conv_act", None), nn.SiLU):
            pairs = [("conv_norm_out", "conv_act")]
        else:
            continue
        for norm, activation in pairs:
            plain = getattr(module, norm)
            fused = _GroupNormSiLU(plain.num_groups, plain.num_channels, plain.eps, device="meta")
            fused.weight, fused.bias = plain.weight, plain.bias
            setattr(module, norm, fused)
            setattr(module, activation, nn.Identity())
    for half in (vae.encoder, vae.decoder):
        if hasattr(half, "fused"):  # of the project's own autoencoder
            half.fused = True


def convert_to_channels_last(module: Any) -> None:
    """Convert the weights of all convolutions to channels-last memory, if that of the first one is not."""
    kernels = (p for p in module.parameters() if p.ndim == 4 and p.shape[2:].numel() > 1)
    first = next(kernels, None)
    if first is not None and not first.is_contiguous(memory_format=torch.channels_last):
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def as_pixels(images: Tensor) -> Tensor:
    """Values from 0 to 255, uint8, of images from about -1 to 1."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def is_finite(*tensors: Tensor) -> bool:
    """False if there is NaN or infinity in tensors; waits for the device."""
    return bool(torch.stack([torch.isfinite(x).all() for x in tensors]).all())


def are_pictures(images: Tensor) -> bool:
    """False if images (n, channels, height, width) are not finite, or have one colour each; waits for the device."""
    pixels = as_pixels(images).flatten(2)
    return bool(torch.isfinite(images).all() & (pixels.amax(-1) > pixels.amin(-1)).any())


def encode_exactly(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images (n, 3, h, w) in float32, of which half precision made no finite latents.

    Returns:
        Mean and standard deviation.

    Raises:
        EmtError: they are not finite in float32 either.
    """
    exact = _in_float32(vae, images.device)
    posteriors = [exact.encode(image.float()).latent_dist for image in images.split(1)]
    mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    if not is_finite(mean, std):
        raise no_pictures(vae)
    return mean, std


def decode_exactly(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (n, channels, h/8, w/8) in float32, of which half precision made no pictures.

    Raises:
        EmtError: they are none in float32 either, or the latents are none of an image.
    """
    least, most = (x.item() * vae.config.get("scaling_factor", 1.0) for x in latents.aminmax())
    if least == most or max(-least, most) > _MOST:
        raise EmtError(
            f"sampling made latents from {least:.2g} to {most:.2g}, which no VAE makes pictures of",
            "Use more --steps or another --scheduler, a lower --guidance, or lower scales of --lora.",
        )
    exact = _in_float32(vae, latents.device)
    images = torch.cat([exact.decode(latent.float()).sample for latent in latents.split(1)])
    if not are_pictures(images):
        raise no_pictures(vae)
    return images


def _in_float32(vae: Any, device: torch.device) -> Any:
    """A copy of a VAE in float32, of which it warns.

    Raises:
        EmtError: the VAE is in float32 already.
    """
    if vae.dtype == torch.float32:
        raise no_pictures(vae)
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(vae.dtype, vae.dtype)
    logger.warning("the VAE overflows in %s: it is computed in fp32", dtype)
    copy = allocate(lambda: type(vae).from_config(vae.config), torch.float32)
    copy.load_state_dict(vae.state_dict())
    return copy.to(device)


def no_pictures(vae: Any) -> EmtError:
    """The error of a VAE that makes no pictures."""
    name = vae.config.get("_name_or_path") or type(vae).__name__
    where = ", also not in fp32" if vae.dtype != torch.bfloat16 and vae.dtype != torch.float16 else ""
    return EmtError(
        f"the VAE {name} makes no pictures{where}: they are not finite, or of one colour",
        "Import the model with another VAE: emt import-weights --vae FILE.",
    )
