"""Sums under a GELU, and a 3×3 convolution to one channel under a sigmoid: the rest of a scaler between convolutions.

EfficientMT's scaler (section 3.3) has a dozen short operations for every temporal attention. Its two wide convolutions
stay a library's; a kernel adds and activates what each of them made, and another one computes the last, narrow one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, is_fused, untraced


def gelu_of_sum_reference(x: Tensor, added: Tensor) -> Tensor:
    """Plain PyTorch reference of `gelu_of_sum`."""
    return F.gelu((x.unflatten(0, (-1, added.shape[0])) + added).flatten(0, 1))


def gelu_of_sum(x: Tensor, added: Tensor) -> Tensor:
    """GELU (by the error function) of images and others that are repeated over them.

    Args:
        x: (k·n, channels, height, width); overwritten if it is in channels-last memory.
        added: (n, channels, height, width), or (1, channels, 1, 1).

    Returns:
        As `x`, in channels-last memory where the kernel runs.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    if x.shape[0] % added.shape[0] or added.shape[1:] not in (x.shape[1:], (x.shape[1], 1, 1)):
        raise ValueError(f"added has shape {tuple(added.shape)}, which does not repeat over x, {tuple(x.shape)}")
    return launch_gelu(x, added) if is_fused(x) else gelu_of_sum_reference(x, added)


def scale_map_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain PyTorch reference of `scale_map`."""
    # The 5 goes into the bias: subtracted afterwards, it would cost bfloat16 the digits of a small difference.
    return torch.sigmoid(F.conv2d(x, weight, bias - 5, padding=1)).flatten(1)


def scale_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid of a 3×3 convolution to one channel, minus 5.

    Args:
        x: (n, channels, height, width).
        weight: (1, channels, 3, 3).
        bias: (1,).

    Returns:
        (n, height·width), between 0 and 1.

    Raises:
        ValueError: for a weight of another shape.
    """
    if weight.shape != (1, x.shape[1], 3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(1, x.shape[1], 3, 3)}")
    return launch_map(x, weight, bias) if is_fused(x) else scale_map_reference(x, weight, bias)


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _gelu_of_sum(x, added, size, period, BLOCK: tl.constexpr):
        """BLOCK values, in place; `added` begins again after `period` of them."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(added + at % period, mask=mask, other=0.0).to(tl.float32)
        y = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
        tl.store(x + at, y.to(x.dtype.element_ty), mask=mask)

    @triton.jit
    def _scale_map(
        x,
        weight,
        bias,
        out,
        pixels,
        height,
        width,
        channels,
        channel_stride,
        row_stride,
        column_stride,
        PIXELS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """PIXELS pixels of the map."""
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        lane = tl.arange(0, LANES)
        i, j = pixel // width % height, pixel % width
        total = tl.zeros((PIXELS, LANES), tl.float32)
        for tap in tl.static_range(9):
            r, s = tap // 3 - 1, tap % 3 - 1
            inside = (pixel < pixels) & (i + r >= 0) & (i + r < height) & (j + s >= 0) & (j + s < width)
            mask = inside[:, None] & (lane < channels)[None, :]
            at = (pixel + r * width + s)[:, None] * channels + lane[None, :]
            w = weight + lane * channel_stride + (r + 1) * row_stride + (s + 1) * column_stride
            factor = tl.load(w, mask=lane < channels, other=0.0).to(tl.float32)
            total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
        y = tl.sum(total, axis=1) + (tl.load(bias).to(tl.float32) - 5.0)
        tl.store(out + pixel, tl.sigmoid(y).to(out.dtype.element_ty), mask=pixel < pixels)

    def launch_gelu(x: Tensor, added: Tensor) -> Tensor:
        """Run the kernel of `gelu_of_sum`."""
        x = x.contiguous(memory_format=torch.channels_last)
        added = added.permute(0, 2, 3, 1).contiguous()
        untraced(_gelu_of_sum)[(triton.cdiv(x.numel(), 1024),)](
            x=x, added=added, size=x.numel(), period=added.numel(), BLOCK=1024, num_warps=4
        )
        return x

    def launch_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Run the kernel of `scale_map`."""
        x = x.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        out = x.new_empty((count, height * width))
        lanes = triton.next_power_of_2(channels)
        rows = max(2048 // lanes, 1)
        _, channel_stride, row_stride, column_stride = weight.stride()
        untraced(_scale_map)[(triton.cdiv(out.numel(), rows),)](
            x=x,
            weight=weight,
            bias=bias,
            out=out,
            pixels=out.numel(),
            height=height,
            width=width,
            channels=channels,
            channel_stride=channel_stride,
            row_stride=row_stride,
            column_stride=column_stride,
            PIXELS=rows,
            LANES=lanes,
            num_warps=4,
        )
        return out
