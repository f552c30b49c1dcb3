"""The VAE on a GPU: channels-last weights, fused group norms, and how many frames it takes at once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from emt_kernels.group_norm_silu import group_norm_silu

#: Pixels that the VAE takes at once on a GPU: two frames of 512×512 fill it, and take one GiB of activations.
VAE_PIXELS = 2 * 512 * 512
#: Frames that it takes at once elsewhere.
VAE_FRAMES = 4


class _GroupNormSiLU(nn.GroupNorm):
    """A group norm, and the SiLU after it, of images in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=True)


def prepare_vae(vae: Any) -> None:
    """Convert the weights of a diffusers VAE to channels-last memory and fuse its group norms with SiLUs after them.

    Its state dict stays as it is.
    """
    convert_to_channels_last(vae)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
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


def convert_to_channels_last(module: Any) -> None:
    """Convert the weights of all convolutions to channels-last memory, if that of the first one is not."""
    kernels = (p for p in module.parameters() if p.ndim == 4 and p.shape[2:].numel() > 1)
    first = next(kernels, None)
    if first is not None and not first.is_contiguous(memory_format=torch.channels_last):
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
