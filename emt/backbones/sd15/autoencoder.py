"""Stable Diffusion's autoencoder of images (Rombach et al. 2022, arXiv 2112.10752).

It computes what diffusers' `AutoencoderKL` does, bit by bit, and its parameters have the same names.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbones.sd15.passes import FusedPass
from emt.parts import Network, configured
from emt_kernels.upsample_conv import upsample_conv

_EPS = 1e-6


class _Resnet(nn.Module):
    """Group norm, SiLU, 3×3 convolution, twice, beside a shortcut."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1: Any = nn.GroupNorm(groups, channels, eps=_EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2: Any = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity: nn.Module = nn.SiLU()
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class _Attention(nn.Module):
    """Self-attention of one head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.group_norm(x.view(batch, channels, height * width)).transpose(1, 2)
        q, k, v = (project(h)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return h.transpose(1, 2).reshape(x.shape) + x


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([_Resnet(channels, channels, groups) for _ in range(2)])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], *self.attentions, self.resnets[1]]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class _Resample(nn.Module):
    """The convolution of a down- or upsampler, under its published name `conv`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=stride % 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride[0] == 2:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        if x.shape[0] >= 64 or 2 * x.numel() > 2**31:  # channels-last upsampling counts in 32 bits
            x = x.contiguous()
        return upsample_conv(x, self.conv.weight, self.conv.bias)


class _Block(nn.Module):
    def __init__(self, channels: Sequence[int], groups: int, resample: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Resnet(a, b, groups) for a, b in itertools.pairwise(channels)])
        last = channels[-1]
        self.downsamplers = nn.ModuleList([_Resample(last, 2)] if resample < 0 else [])
        self.upsamplers = nn.ModuleList([_Resample(last, 1)] if resample > 0 else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers, *self.upsamplers]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class _Half(nn.Module):
    """Encoder or decoder: `conv_in`, the blocks around the middle, and norm, SiLU and `conv_out`.

    `fused` says that its norms, of which those in residual blocks and the last one apply SiLU, take a shift.
    """

    def __init__(self, channels: int, widths: Sequence[int], out_channels: int, config: Any, up: bool) -> None:
        super().__init__()
        groups, layers, last = config.norm_num_groups, config.layers_per_block + up, len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        blocks = []
        for i, width in enumerate(widths):
            resample = 0 if i == last else 1 if up else -1
            blocks.append(_Block([widths[max(i - 1, 0)], *[width] * layers], groups, resample))
        self.add_module("up_blocks" if up else "down_blocks", nn.ModuleList(blocks))
        self.mid_block = _Middle(widths[0 if up else -1], groups, config.mid_block_add_attention)
        self.conv_norm_out: Any = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_act: nn.Module = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self._up = up
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self._fused(x) if fused else self._plain(x)

    def _plain(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in self._parts():
            x = part(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def _parts(self) -> tuple[Any, ...]:
        return (self.mid_block, *self.up_blocks) if self._up else (*self.down_blocks, self.mid_block)

    def _fused(self, x: Tensor) -> Tensor:
        """The same with biases of convolutions left to norms that add them, and shortcuts that matmuls add."""
        run = FusedPass(defer_conv_biases=True, feed_forward_tokens=0)
        images = run.conv(self.conv_in, x)
        for layer in (layer for part in self._parts() for layer in part.layers()):
            if isinstance(layer, _Resnet):
                h = run.conv(layer.conv1, run.norm(layer.norm1, images))
                h = run.conv(layer.conv2, run.norm(layer.norm2, h))
                images = run.add_shortcut(h, layer.conv_shortcut, images)
            else:
                images = run.images(layer(images.materialize()))
        return self.conv_out(run.norm(self.conv_norm_out, images))


@dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation of latents (n, channels, height, width)."""

    mean: Tensor
    std: Tensor


class Autoencoder(Network):
    """Autoencoder of images, of which a latent is 2^(levels − 1) pixels high and wide.

    Args:
        in_channels: of images.
        out_channels: of images that are decoded.
        block_out_channels: channels of each level, highest resolution first.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        latent_channels: of latents.
        norm_num_groups: groups of every norm.
        scaling_factor: by which latents are multiplied for the network.
        use_quant_conv: a 1×1 convolution after the encoder.
        use_post_quant_conv: one before the decoder.
        mid_block_add_attention: self-attention in the middle.
    """

    @configured
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        config, widths, latent = self.config, list(block_out_channels), latent_channels
        self.encoder = _Half(in_channels, widths, 2 * latent, config, up=False)
        self.decoder = _Half(latent, widths[::-1], out_channels, config, up=True)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if use_post_quant_conv else None

    @staticmethod
    def builds(config: dict[str, Any]) -> bool:
        """Return whether a configuration of diffusers is of an autoencoder of this kind."""
        kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
        shifted = any(config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
        known = kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        return config.get("act_fn", "silu") == "silu" and known and not shifted

    def encode(self, images: Tensor) -> Any:
        """The distribution of latents, `latent_dist`, of images (n, channels, height, width) from -1 to 1."""
        h = self.encoder(images)
        mean, log_variance = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return SimpleNamespace(latent_dist=Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))))

    def decode(self, latents: Tensor) -> Any:
        """Images, `sample`, (n, channels, height, width) from about -1 to 1 of latents that are not scaled."""
        h = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return SimpleNamespace(sample=self.decoder(h))
