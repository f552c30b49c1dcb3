"""Two ways to run the network's layers: as they are written, and fused for inference on a GPU.

The walk through the network, `MotionTransferNetwork`, is the same in both; a test holds their results to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbone import Execution
from emt.backbones.sd15.layers import FeedForward, GroupNorm, rows_of, tokens_of
from emt.backbones.sd15.motion_module import MotionModule, Reference
from emt_kernels.add_matmul import add_matmul_
from emt_kernels.quantize import Quantized
from emt_kernels.upsample_conv import is_fused, upsample_conv


class Pass:
    """Runs layers as they are written, with gradients, on any device; images are tensors."""

    def conv(self, conv: nn.Conv2d, x: Tensor) -> Any:
        """A convolution of images (frames, channels, height, width)."""
        return conv(x)

    def upsample(self, conv: nn.Conv2d, x: Any, size: torch.Size) -> Any:
        """A 3×3 convolution of images upsampled to a size (height, width), each pixel as often as that needs."""
        x = materialized(x)
        if is_fused(x, conv.weight) and size == torch.Size([2 * x.shape[2], 2 * x.shape[3]]):
            return self.images(upsample_conv(x, conv.weight, conv.bias))
        return self.conv(conv, F.interpolate(x, size=size, mode="nearest"))

    def norm(self, norm: GroupNorm, x: Any) -> Tensor:
        """The norm of images."""
        return norm(x)

    def concatenate(self, x: Any, skip: Any) -> Any:
        """Images beside each other along channels."""
        return torch.cat([x, skip], dim=1)

    def images(self, x: Tensor) -> Any:
        """Images of a tensor."""
        return x

    def resnet(self, layer: Any, x: Any, time: Tensor) -> Any:
        """A `ResnetBlock`."""
        return layer(x, time)

    def spatial(self, layer: Any, x: Any, text: tuple[Tensor, Tensor]) -> Any:
        """A `SpatialTransformer`."""
        return layer(x, text)

    def temporal(
        self, layer: MotionModule, x: Any, frames: int, reference: Reference | None, features: list[Tensor] | None
    ) -> Any:
        """A `MotionModule`."""
        return layer(x, frames, reference, features)


@dataclass
class Images:
    """Images with a deferred bias: the activation is ``values + bias``; the norm that reads them adds it.

    Args:
        values: (frames, channels, height, width).
        bias: (channels,), or None for none.
    """

    values: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(frames, channels, height, width)."""
        return self.values.shape

    def materialize(self) -> Tensor:
        """Add the bias to all pixels; the images as a tensor."""
        if self.bias is not None:
            self.values += self.bias[:, None, None]
            self.bias = None
        return self.values


class FusedPass(Pass):
    """Runs the same layers at inference with fewer launches and less memory traffic.

    - A residual add is part of the matmul whose output is added: cuBLAS accumulates in place (`add_matmul_`). Such a
      matmul takes no bias; biases of a residual stream are summed up, and added by the norms that read the stream.
    - A convolution may leave its bias to the norm after it, too, which reads all values anyway (`Images`).
    - Feed-forward layers take tokens in parts and write into the residual stream.

    Args:
        defer_conv_biases: leave biases of convolutions to norms.
        feed_forward_tokens: tokens that a feed-forward layer takes at once.
    """

    def __init__(self, defer_conv_biases: bool, feed_forward_tokens: int) -> None:
        self.defer_conv_biases = defer_conv_biases
        self.feed_forward_tokens = feed_forward_tokens

    def conv(self, conv: nn.Conv2d, x: Tensor) -> Images:
        """A convolution of images, without its bias if that is deferred."""
        if not self.defer_conv_biases:
            return Images(conv(x))
        return Images(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias)

    def norm(self, norm: GroupNorm, x: Images, shift: Tensor | None = None) -> Tensor:
        """The norm of ``x + shift``, `shift` (frames, channels)."""
        if x.bias is not None:
            shift = x.bias.expand(x.shape[0], -1) if shift is None else shift + x.bias
        return norm(x.values, shift)

    def concatenate(self, x: Images, skip: Images) -> Images:
        """Images beside each other along channels."""
        values = torch.cat([x.values, skip.values], dim=1)
        if x.bias is None and skip.bias is None:
            return Images(values)
        biases = [i.values.new_zeros(i.shape[1]) if i.bias is None else i.bias for i in (x, skip)]
        return Images(values, torch.cat(biases))

    def images(self, x: Tensor) -> Images:
        """Images of a tensor."""
        return Images(x)

    def resnet(self, layer: Any, x: Images, time: Tensor) -> Images:
        """A `ResnetBlock`."""
        h = self.conv(layer.conv1, self.norm(layer.norm1, x))
        h = self.conv(layer.conv2, self.norm(layer.norm2, h, layer.time_emb_proj(time)))
        if layer.conv_shortcut is not None:
            return self._add_to_images(h, layer.conv_shortcut, tokens_of(x.values), x.bias)
        h.values += x.values
        return Images(h.values, _sum(h.bias, x.bias))

    def spatial(self, layer: Any, x: Images, text: tuple[Tensor, Tensor]) -> Images:
        """A `SpatialTransformer`."""
        h, block = layer.proj_in(tokens_of(self.norm(layer.norm, x))), layer.transformer_blocks[0]
        bias = add_linear(h, None, block.attn1.to_out[0], block.attn1.attend(block.norm1(h)))
        bias = add_linear(h, bias, block.attn2.to_out[0], block.attn2.attend(block.norm2(h, shift=bias), text))
        bias = self._add_feed_forward(h, bias, block.ff, block.norm3(h, shift=bias))
        return self._add_to_images(x, layer.proj_out, h, bias)

    def temporal(
        self, layer: MotionModule, x: Images, frames: int, reference: Reference | None, features: list[Tensor] | None
    ) -> Images:
        """A `MotionModule`."""
        transformer, block, bias = layer.temporal_transformer, layer.block, None
        h = transformer.proj_in(tokens_of(self.norm(transformer.norm, x)).unflatten(0, (-1, frames)))
        for i, (attention, norm) in enumerate(zip(block.attention_blocks, block.norms, strict=True)):
            positions = attention.positions[:frames]
            if features is not None:
                feature, normed = norm.with_and_without(h, positions, bias)
                features.append(feature)
            else:
                normed = norm(h, positions, bias, exact=reference is not None)
            attended = attention.attend(normed, *block.scaled(normed, reference, i))
            bias = add_linear(h, bias, attention.to_out[0], attended)
        bias = self._add_feed_forward(h, bias, block.ff, block.ff_norm(h, shift=bias))
        return self._add_to_images(x, transformer.proj_out, h, bias)

    def _add_feed_forward(
        self, x: Tensor, bias: Tensor | None, layer: FeedForward, h: Tensor | Quantized
    ) -> Tensor | None:
        """Add a feed-forward layer's output for `h` to `x`, in place, but for a bias; return the sum of biases."""
        first, _, last = layer.net
        total, count = x.view(-1, x.shape[-1]), self.feed_forward_tokens
        if torch.compiler.is_compiling():  # compiled code takes any number of tokens, at once
            parts = [(total, h.flatten(0, -2))]
        else:
            parts = list(zip(total.split(count), rows_of(h, count), strict=True))
        for rows, part in parts:
            if isinstance(last, nn.Linear):
                add_matmul_(rows, last.weight, first(part))
            else:  # in float8
                rows += last(first(part))
        return _sum(bias, last.bias) if isinstance(last, nn.Linear) else bias

    def _add_to_images(self, x: Images, layer: nn.Linear | nn.Conv2d, tokens: Tensor, bias: Tensor | None) -> Images:
        """Add the output of a linear layer or 1×1 convolution for ``tokens + bias`` to images, in place.

        Args:
            x: overwritten if it is in channels-last memory.
            layer: with a bias.
            tokens: (frames, height·width, inputs) or (batch, frames, height·width, inputs).
            bias: (inputs,) or None.
        """
        values, weight = x.values.contiguous(memory_format=torch.channels_last), layer.weight.flatten(1)
        add_matmul_(values.permute(0, 2, 3, 1).view(-1, values.shape[1]), weight, tokens.flatten(0, -2))
        added = layer.bias if bias is None else torch.addmv(layer.bias, weight, bias)
        total = Images(values, _sum(x.bias, added))
        if not self.defer_conv_biases:
            total.materialize()
        return total


def add_linear(x: Tensor, bias: Tensor | None, layer: nn.Linear, h: Tensor) -> Tensor | None:
    """Add a linear layer's output for `h` to `x`, in place, but for its bias; return the sum of biases."""
    add_matmul_(x.view(-1, x.shape[-1]), layer.weight, h.flatten(0, -2))
    return _sum(bias, layer.bias)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def materialized(x: Tensor | Images) -> Tensor:
    """Images of either pass as a tensor."""
    return x if isinstance(x, Tensor) else x.materialize()


def pass_of(execution: Execution, x: Tensor) -> Pass:
    """The way to run the network that `execution` selects for inputs like `x`.

    Fused layers are for inference: gradients, `torch.compile` and autocast need layers as they are written.
    """
    fused = (
        execution.fuse_residual_adds
        and not torch.is_grad_enabled()
        and not torch.compiler.is_dynamo_compiling()  # false in an export, which is not strict
        and not torch.is_autocast_enabled(x.device.type)
    )
    return FusedPass(execution.defer_conv_biases, execution.feed_forward_tokens) if fused else Pass()
