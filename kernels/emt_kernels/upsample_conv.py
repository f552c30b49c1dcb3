"""Nearest-neighbour upsampling by two and a 3×3 convolution after it, as four 2×2 convolutions of the input.

Of the nine inputs of an output pixel only four differ, in one of four ways, its phase: the parity of its row and of its
column. Weights that meet the same input are added beforehand (`phase_weights`), which leaves 4/9 of the arithmetic and
no upsampled image. A program computes a tile of one phase as an implicit matmul over taps and input channels, and
writes its pixels to their places in the output. Weights are rounded once more, after the addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, triton_op, use_triton, wrap_triton


def upsample_conv_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain PyTorch reference: (n, inputs, h, w) and (outputs, inputs, 3, 3) → (n, outputs, 2h, 2w)."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Upsample images by two, each pixel four times, and convolve them. Gradients take the reference.

    Phases of the weights are added up in every call, by one kernel: weights may be written in place between calls,
    also of a captured one.

    Args:
        x: (n, inputs, height, width).
        weight: (outputs, inputs, 3, 3).
        bias: (outputs,).

    Returns:
        (n, outputs, 2 · height, 2 · width).
    """
    if not is_fused(x, weight):
        return upsample_conv_reference(x, weight, bias)
    return torch.ops.emt.upsample_conv(x, weight, bias)


def is_fused(x: Tensor, weight: Tensor) -> bool:
    """Return whether `upsample_conv` launches its kernel: in half precision, at inference."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not trained and use_triton(x) and x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)


def phase_weights(weight: Tensor) -> Tensor:
    """Weights of the four 2×2 convolutions, added in float32: (4 phases, 4 taps, inputs, outputs), contiguous.

    Phase 2·a + b is that of output pixels (2i + a, 2j + b); its tap 2·r + s reads input (i + r − 1 + a, j + s − 1 + b).

    Args:
        weight: (outputs, inputs, 3, 3).

    Raises:
        ValueError: for a kernel of another size.
    """
    if weight.shape[2:] != (3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (outputs, inputs, 3, 3)")
    w = weight.float()

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    phases = [both for rows in halves(w, 2) for both in halves(rows, 3)]
    # (4, outputs, inputs, 2, 2) to (4, 2 · 2, inputs, outputs)
    return torch.stack(phases).permute(0, 3, 4, 2, 1).flatten(1, 2).to(weight.dtype).contiguous()


@dataclass(frozen=True)
class Plan:
    """Tile of a program: `rows` pixels of `columns` output channels, `depth` input channels at once."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 4

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of a program for numbers of so many bytes."""
        return (self.rows + self.columns) * self.depth * self.stages * itemsize


#: Fastest first of many channels, as in the network, and of few, as in the VAE's decoder, as measured on an H200; the
#: last is for GPUs with less shared memory.
_SMALL = Plan(128, 64, 64, 4, 3)
_PLANS = {True: (Plan(256, 128, 64, 8, 3), _SMALL), False: (Plan(128, 256, 64, 8, 3), _SMALL)}
_MANY_CHANNELS = 640


def plan(inputs: int, itemsize: int, shared: int) -> Plan:
    """The tile for a number of input channels, of so many bytes a number, on a GPU with `shared` bytes a block."""
    plans = _PLANS[inputs >= _MANY_CHANNELS]
    return next((p for p in plans if p.shared_bytes(itemsize) <= shared), plans[-1])


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _upsample_conv(
        x,
        weight,
        bias,
        out,
        pixels,
        height,
        width,
        inputs,
        outputs,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """One tile of one phase; tiles go through GROUP runs of pixels before they go on to other channels."""
        phase = tl.program_id(1)
        below, right = phase // 2 - 1, phase % 2 - 1
        across, down = tl.cdiv(outputs, COLUMNS), tl.cdiv(pixels, ROWS)
        tile = tl.program_id(0)
        first = tile // (GROUP * across) * GROUP
        high = tl.minimum(down - first, GROUP)
        pixel = (first + tile % (GROUP * across) % high) * ROWS + tl.arange(0, ROWS)
        channel = tile % (GROUP * across) // high * COLUMNS + tl.arange(0, COLUMNS)
        i, j = pixel // width % height, pixel % width
        exists, wanted = pixel < pixels, channel < outputs
        steps = tl.cdiv(inputs, DEPTH)
        lane = tl.arange(0, DEPTH)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(4 * steps):
            tap = step // steps
            r, s = below + tap // 2, right + tap % 2
            inside = exists & (i + r >= 0) & (i + r < height) & (j + s >= 0) & (j + s < width)
            depth = step % steps * DEPTH + lane
            at = (pixel + r * width + s).to(tl.int64) * inputs
            values = tl.load(
                x + at[:, None] + depth[None, :], mask=inside[:, None] & (depth < inputs)[None, :], other=0.0
            )
            row = ((phase * 4 + tap) * inputs + depth).to(tl.int64) * outputs
            factors = tl.load(
                weight + row[:, None] + channel[None, :], mask=(depth < inputs)[:, None] & wanted[None, :], other=0.0
            )
            total = tl.dot(values, factors, total, input_precision="tf32x3")
        total += tl.load(bias + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
        clip = pixel // (height * width)
        at = ((clip * 2 * height + 2 * i + below + 1) * 2 * width + 2 * j + right + 1).to(tl.int64) * outputs
        place = out + at[:, None] + channel[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=exists[:, None] & wanted[None, :])

    @triton.jit
    def _add_phases(
        weight,
        phases,
        inputs,
        outputs,
        output_stride,
        input_stride,
        row_stride,
        column_stride,
        INPUTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """All phases of INPUTS channels for OUTPUTS others, added as `phase_weights` adds them."""
        i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
        o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        mask = (i < inputs)[:, None] & (o < outputs)[None, :]
        w = weight + i.to(tl.int64)[:, None] * input_stride + o.to(tl.int64)[None, :] * output_stride
        at = phases + i.to(tl.int64)[:, None] * outputs + o[None, :]
        size = tl.cast(inputs, tl.int64) * outputs
        for a in tl.static_range(2):
            for r in tl.static_range(2):
                row = r * (1 + a)  # the first row of the kernel that meets row r of the input; there are one or two
                left = tl.load(w + row * row_stride, mask=mask, other=0.0).to(tl.float32)
                middle = tl.load(w + row * row_stride + column_stride, mask=mask, other=0.0).to(tl.float32)
                right = tl.load(w + row * row_stride + 2 * column_stride, mask=mask, other=0.0).to(tl.float32)
                if a != r:
                    after = w + (row + 1) * row_stride
                    left += tl.load(after, mask=mask, other=0.0).to(tl.float32)
                    middle += tl.load(after + column_stride, mask=mask, other=0.0).to(tl.float32)
                    right += tl.load(after + 2 * column_stride, mask=mask, other=0.0).to(tl.float32)
                first, second = at + (8 * a + 2 * r) * size, at + (8 * a + 4 + 2 * r) * size
                kind = phases.dtype.element_ty
                tl.store(first, left.to(kind), mask=mask)
                tl.store(first + size, (middle + right).to(kind), mask=mask)
                tl.store(second, (left + middle).to(kind), mask=mask)
                tl.store(second + size, right.to(kind), mask=mask)

    def add_phases(weight: Tensor) -> Tensor:
        """`phase_weights` by one kernel, to the bit."""
        outputs, inputs = weight.shape[:2]
        phases = weight.new_empty((4, 4, inputs, outputs))
        output_stride, input_stride, row_stride, column_stride = weight.stride()
        wrap_triton(_add_phases)[(triton.cdiv(inputs, 32), triton.cdiv(outputs, 64))](
            weight=weight,
            phases=phases,
            inputs=inputs,
            outputs=outputs,
            output_stride=output_stride,
            input_stride=input_stride,
            row_stride=row_stride,
            column_stride=column_stride,
            INPUTS=32,
            OUTPUTS=64,
            num_warps=4,
        )
        return phases

    def launch(x: Tensor, phases: Tensor, bias: Tensor, chosen: Plan = Plan()) -> Tensor:
        """Run the kernel.

        Args:
            x: (n, inputs, height, width), best in channels-last memory; another layout is copied into it.
            phases: (4, 4, inputs, outputs), as `phase_weights` makes them.
            bias: (outputs,).
            chosen: the tile.

        Returns:
            (n, outputs, 2 · height, 2 · width), in channels-last memory.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        count, inputs, height, width = x.shape
        outputs, pixels = phases.shape[3], count * height * width
        out = torch.empty(
            (count, outputs, 2 * height, 2 * width),
            device=x.device,
            dtype=x.dtype,
            memory_format=torch.channels_last,
        )
        tiles = -(-pixels // chosen.rows) * -(-outputs // chosen.columns)
        wrap_triton(_upsample_conv)[(tiles, 4)](
            x=x,
            weight=phases,
            bias=bias,
            out=out,
            pixels=pixels,
            height=height,
            width=width,
            inputs=inputs,
            outputs=outputs,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            DEPTH=chosen.depth,
            GROUP=8,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
        return out

    @triton_op("emt::upsample_conv")
    def _upsample_conv_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        phases = add_phases(weight)
        return launch(x, phases, bias.contiguous(), plan(x.shape[1], x.element_size(), _shared_memory(x)))

    @_upsample_conv_op.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = (x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
        return x.new_empty(size).to(memory_format=torch.channels_last)

    def _shared_memory(x: Tensor) -> int:
        """Bytes of shared memory that a block may have on the device of a tensor; a GPU's usual ones elsewhere."""
        if not x.is_cuda:
            return 100_000
        return int(getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 100_000))
