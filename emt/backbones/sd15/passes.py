"""Two ways to run the network's layers: as they are written, and fused for inference on a GPU.

The walk through the network, `MotionTransferNetwork`, is the same in both; a test holds their results to each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbone import Constants, Execution
from emt.backbones.sd15.layers import FeedForward, GroupNorm, repeated, rows_of, tokens_of
from emt.backbones.sd15.motion_module import MotionModule, Reference
from emt_kernels.add_matmul import add_matmul_
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

    def repeat(self, x: Any, copies: int) -> Any:
        """So many copies of images, one after the other."""
        return repeated(x, copies)

    def embed_time(self, net: Any, timestep: Tensor, batch: int, frames: int) -> Any:
        """Embeddings of timesteps (batch,) or (1,), as residual blocks take them: (batch·frames, channels)."""
        time = F.silu(net.time_embedding(timestep.expand(batch)))
        return time.repeat_interleave(frames, 0)

    def resnet(self, layer: Any, x: Any, time: Any) -> Any:
        """A `ResnetBlock`."""
        return layer(x, time[: x.shape[0]])

    def spatial(self, layer: Any, x: Any, text: tuple[Tensor, Tensor], copies: int = 1) -> Any:
        """A `SpatialTransformer`; `text` is for so many copies of the images, which come out."""
        return layer(x, text, copies)

    def temporal(
        self,
        layer: MotionModule,
        x: Any,
        frames: int,
        reference: Reference | None,
        features: list[Tensor] | None,
        features_alone: bool = False,
    ) -> Any:
        """A `MotionModule`; with `features_alone` its output may be anything."""
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


@dataclass
class Pair:
    """Images whose channels follow each other, and which stay where they are.

    Args:
        first: (frames, channels, height, width).
        second: (frames, more channels, height, width).
    """

    first: Images
    second: Images

    @property
    def shape(self) -> torch.Size:
        """(frames, all channels, height, width)."""
        frames, channels, *size = self.first.shape
        return torch.Size([frames, channels + self.second.shape[1], *size])


@dataclass
class Time:
    """Timesteps as residual blocks take them.

    Args:
        rows: their embeddings after SiLU, (1, channels) for one of all frames or (frames, channels).
        frames: of all clips.
        projected: what each residual block adds between its convolutions, by its identity: (1 or frames, channels).
    """

    rows: Tensor
    frames: int
    projected: dict[int, Tensor]


class FusedPass(Pass):
    """Runs the same layers at inference with fewer launches and less memory traffic.

    - A residual add is part of the matmul whose output is added: cuBLAS accumulates in place (`add_matmul_`). Such a
      matmul takes no bias; biases of a residual stream are summed up, and added by the norms that read the stream.
    - A convolution may leave its bias to the norm after it, too, which reads all values anyway (`Images`).
    - A skip connection may stay where it is: norms read two tensors, and shortcuts are two matmuls (`Pair`).
    - What follows from weights alone, such as sums of biases, may be kept (`Constants`); one matmul then projects the
      timestep for all residual blocks.
    - Feed-forward layers take tokens in parts and write into the residual stream.

    Args:
        defer_conv_biases: leave biases of convolutions to norms.
        feed_forward_tokens: tokens that a feed-forward layer takes at once.
        join_skips: leave skip connections where they are.
        constants: of the network; None for none that are kept.
    """

    def __init__(
        self,
        defer_conv_biases: bool,
        feed_forward_tokens: int,
        join_skips: bool = False,
        constants: Constants | None = None,
    ) -> None:
        self.defer_conv_biases = defer_conv_biases
        self.feed_forward_tokens = feed_forward_tokens
        self.join_skips = join_skips
        self.constants = constants

    def conv(self, conv: nn.Conv2d, x: Tensor) -> Images:
        """A convolution of images, without its bias if that is deferred."""
        if not self.defer_conv_biases:
            return Images(conv(x))
        return Images(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias)

    def norm(self, norm: GroupNorm, x: Images | Pair, shift: Tensor | None = None) -> Tensor:
        """The norm of ``x + shift``, `shift` (frames, channels)."""
        if isinstance(x, Pair):
            first, second = x.first, x.second
            bias = self._side_by_side(first, second)
            return norm(first.values, None if bias is None else bias.expand(x.shape[0], -1), second.values)
        if x.bias is not None:
            shift = x.bias.expand(x.shape[0], -1) if shift is None else shift + x.bias
        return norm(x.values, shift)

    def concatenate(self, x: Images, skip: Images) -> Images | Pair:
        """Images beside each other along channels."""
        if self.join_skips:
            return Pair(x, skip)
        return self._concatenated(x, skip)

    def images(self, x: Tensor) -> Images:
        """Images of a tensor."""
        return Images(x)

    def repeat(self, x: Images, copies: int) -> Images:
        """So many copies of images, one after the other."""
        return x if copies == 1 else Images(repeated(x.values, copies), x.bias)

    def embed_time(self, net: Any, timestep: Tensor, batch: int, frames: int) -> Time:
        """Embeddings of timesteps (batch,) or (1,), and, with constants, their projections for all residual blocks."""
        if torch.compiler.is_compiling():  # compiled code takes any number of timesteps
            timestep = timestep.expand(batch)
        rows = F.silu(net.time_embedding(timestep))
        if timestep.shape[0] > 1 or torch.compiler.is_compiling():
            rows = rows.repeat_interleave(frames, 0)
        time = Time(rows, batch * frames, {})
        if self.constants is not None and self.defer_conv_biases:
            resnets = [resnet for block in net.blocks() for resnet in block.resnets]
            weight = self.constants.get(
                ("time", id(resnets[0])), lambda: torch.cat([r.time_emb_proj.weight for r in resnets])
            )
            bias = self.constants.get(
                ("time bias", id(resnets[0])),
                lambda: torch.cat([r.time_emb_proj.bias + r.conv1.bias for r in resnets]),
            )
            parts = F.linear(rows, weight, bias).split([r.conv1.out_channels for r in resnets], dim=1)
            time.projected = {id(resnet): part for resnet, part in zip(resnets, parts, strict=True)}
        return time

    def resnet(self, layer: Any, x: Images | Pair, time: Time) -> Images:
        """A `ResnetBlock`."""
        if isinstance(x, Pair) and layer.conv_shortcut is None:
            x = self._concatenated(x.first, x.second)
        h = self.conv(layer.conv1, self.norm(layer.norm1, x))
        shift = time.projected.get(id(layer))
        if shift is None:
            shift = layer.time_emb_proj(time.rows)
        else:  # with the bias of the convolution
            h.bias = None
        shift = shift.expand(time.frames, -1) if shift.shape[0] == 1 else shift
        h = self.conv(layer.conv2, self.norm(layer.norm2, h, shift[: x.shape[0]]))
        return self.add_shortcut(h, layer.conv_shortcut, x)

    def add_shortcut(self, h: Images, shortcut: nn.Conv2d | None, x: Images | Pair) -> Images:
        """Add the images that a residual block takes, or a 1×1 convolution of them, to those that it makes."""
        if isinstance(x, Pair):
            assert shortcut is not None
            return self._add_pair(h, shortcut, x)
        if shortcut is not None:
            return self._add_to_images(h, shortcut, tokens_of(x.values), x.bias)
        h.values += x.values
        return Images(h.values, self._sum(h.bias, x.bias))

    def spatial(self, layer: Any, x: Images, text: tuple[Tensor, Tensor], copies: int = 1) -> Images:
        """A `SpatialTransformer`; `text` is for so many copies of the images, which come out."""
        h, block = layer.proj_in(tokens_of(self.norm(layer.norm, x))), layer.transformer_blocks[0]
        bias = self.add_linear(h, None, block.attn1.to_out[0], block.attn1.attend(block.norm1(h)))
        attended = block.attn2.attend(block.norm2(h, shift=bias), text, copies)
        h, x = repeated(h, copies), self.repeat(x, copies)
        bias = self.add_linear(h, bias, block.attn2.to_out[0], attended)
        bias = self._add_feed_forward(h, bias, block.ff, block.norm3(h, shift=bias))
        return self._add_to_images(x, layer.proj_out, h, bias)

    def temporal(
        self,
        layer: MotionModule,
        x: Images,
        frames: int,
        reference: Reference | None,
        features: list[Tensor] | None,
        features_alone: bool = False,
    ) -> Images:
        """A `MotionModule`; with `features_alone` its output may be anything."""
        transformer, block, bias = layer.temporal_transformer, layer.block, None
        weight = None
        if reference is not None and self.constants is not None:
            weight = self.constants.get(("scaler", id(block.scaler)), lambda: _copied(block.scaler.weight_of_clip()))
        h = transformer.proj_in(tokens_of(self.norm(transformer.norm, x)).unflatten(0, (-1, frames)))
        for i, (attention, norm) in enumerate(zip(block.attention_blocks, block.norms, strict=True)):
            positions = attention.positions[:frames]
            if features is not None:
                if features_alone and i == len(block.norms) - 1:
                    features.append(norm(h, None, bias))
                    return x
                feature, normed = norm.with_and_without(h, positions, bias)
                features.append(feature)
            else:
                normed = norm(h, positions, bias)
            attended = attention.attend(normed, *block.scaled(normed, reference, i, weight))
            bias = self.add_linear(h, bias, attention.to_out[0], attended)
        bias = self._add_feed_forward(h, bias, block.ff, block.ff_norm(h, shift=bias))
        return self._add_to_images(x, transformer.proj_out, h, bias)

    def _constant(self, key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that follows from weights alone, kept if there are constants."""
        return compute() if self.constants is None else self.constants.get(key, compute)

    def _sum(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """Sum of two biases."""
        if a is None or b is None:
            return b if a is None else a
        return self._constant(("sum", id(a), id(b)), lambda: a + b)

    def _side_by_side(self, first: Images, second: Images) -> Tensor | None:
        """Biases of two images, one after the other."""
        if first.bias is None and second.bias is None:
            return None
        biases = []
        for images in (first, second):
            zeros = functools.partial(
                torch.zeros, images.shape[1], device=images.values.device, dtype=images.values.dtype
            )
            none = ("none", images.shape[1])
            biases.append(self._constant(none, zeros) if images.bias is None else images.bias)
        return self._constant(("beside", *map(id, biases)), lambda: torch.cat(biases))

    def _concatenated(self, x: Images, skip: Images) -> Images:
        return Images(torch.cat([x.values, skip.values], dim=1), self._side_by_side(x, skip))

    def add_linear(self, x: Tensor, bias: Tensor | None, layer: nn.Linear, h: Tensor) -> Tensor | None:
        """Add a linear layer's output for `h` to `x`, in place, but for its bias; return the sum of biases."""
        add_matmul_(x.view(-1, x.shape[-1]), layer.weight, h.flatten(0, -2))
        return self._sum(bias, layer.bias)

    def _add_pair(self, x: Images, layer: nn.Conv2d, pair: Pair) -> Images:
        """Add a 1×1 convolution of both images of a pair to images, in place."""
        values, weight = x.values.contiguous(memory_format=torch.channels_last), layer.weight.flatten(1)
        rows = values.permute(0, 2, 3, 1).view(-1, values.shape[1])
        first, second = pair.first.values, pair.second.values
        add_matmul_(rows, weight[:, : first.shape[1]], tokens_of(first).flatten(0, -2))
        add_matmul_(rows, weight[:, first.shape[1] :], tokens_of(second).flatten(0, -2))
        return self._with_bias_of(Images(values, x.bias), layer, self._side_by_side(pair.first, pair.second))

    def _with_bias_of(self, x: Images, layer: nn.Linear | nn.Conv2d, bias: Tensor | None) -> Images:
        """Images with what a layer, whose matmul is in them, adds for inputs with this bias."""
        added = layer.bias
        if bias is not None:
            added = self._constant(
                ("of layer", id(layer), id(bias)), lambda: torch.addmv(layer.bias, layer.weight.flatten(1), bias)
            )
        total = Images(x.values, self._sum(x.bias, added))
        if not self.defer_conv_biases:
            total.materialize()
        return total

    def _add_feed_forward(self, x: Tensor, bias: Tensor | None, layer: FeedForward, h: Tensor) -> Tensor | None:
        """Add a feed-forward layer's output for `h` to `x`, in place, but for a bias; return the sum of biases."""
        first, _, last = layer.net
        total, count = x.view(-1, x.shape[-1]), self.feed_forward_tokens
        if torch.compiler.is_compiling():  # compiled code takes any number of tokens, at once
            parts = [(total, h.flatten(0, -2))]
        else:
            parts = list(zip(total.split(count), rows_of(h, count), strict=True))
        for rows, part in parts:
            add_matmul_(rows, last.weight, first(part))
        return self._sum(bias, last.bias)

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
        return self._with_bias_of(Images(values, x.bias), layer, bias)


def _copied(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.channels_last)


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
    if not fused:
        return Pass()
    kept = None if torch.compiler.is_compiling() else execution.constants
    return FusedPass(execution.defer_conv_biases, execution.feed_forward_tokens, execution.join_skips, kept)
