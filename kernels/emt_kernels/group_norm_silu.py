"""Group normalization of each frame, optionally with SiLU after it and a vector a channel added before it.

Wu and He 2018 (arXiv 1803.08494). The kernels read channels-last memory, that is (frames, pixels, channels). Where a
group of a frame is small enough to stay in a multiprocessor's cache, one kernel reads it twice, a program for a
group. Otherwise one kernel writes the statistics of blocks of pixels, channel by channel, so that rows are read
whole; a second one combines them; and a third one applies them, in the opposite order, so that it finds in the cache
what the first one read last. Nothing is added atomically: results repeat bit for bit.

Two tensors whose channels follow each other, an activation and a skip connection, are normalized as one without being
copied into one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, triton_op, use_triton, wrap_triton


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch reference of `group_norm_silu`."""
    if beside is not None:
        x = torch.cat([x, beside], dim=1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Normalize each group of channels of each frame, scale and shift each channel, optionally apply SiLU.

    Statistics are computed in float32 about a value of the channel, so that no finite float16 input overflows and a
    large mean costs no accuracy.

    Args:
        x: (frames, channels, height, width), best in channels-last memory; another layout is copied into it.
        weight: (channels,).
        bias: (channels,).
        groups: divides channels.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: (frames, channels), added to all pixels before: the time embedding of a residual block, biases of the
            convolutions that made `x`. One vector for all frames may be expanded.
        beside: (frames, more channels, height, width), whose channels follow those of `x`: all arguments are of both.

    Returns:
        As `x` with all channels, in channels-last memory where the kernel runs: (frames, tokens, channels) is a view.

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, weight, bias, groups, shift, beside)
    if not use_triton(x):
        return group_norm_silu_reference(x, weight, bias, groups, eps, silu, shift, beside)
    if beside is None:
        return torch.ops.emt.group_norm_silu(x, weight, bias, groups, eps, silu, shift)
    tensors = [t for t in (x, beside, weight, bias, shift) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return torch.ops.emt.group_norm_silu(torch.cat([x, beside], dim=1), weight, bias, groups, eps, silu, shift)
    return torch.ops.emt.group_norm_silu_of_two(x, beside, weight, bias, groups, eps, silu, shift)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None, beside: Tensor | None = None
) -> None:
    if beside is not None and (
        x.ndim != 4 or beside.ndim != 4 or (*beside.shape[:1], *beside.shape[2:]) != (*x.shape[:1], *x.shape[2:])
    ):
        raise ValueError(
            f"beside has shape {tuple(beside.shape)}, expected that of x but for channels: {tuple(x.shape)}"
        )
    if x.ndim != 4 or (x.shape[1] + (0 if beside is None else beside.shape[1])) % groups:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (frames, channels divisible by {groups}, height, width)"
        )
    channels = x.shape[1] + (0 if beside is None else beside.shape[1])
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected {(channels,)}")
    if shift is not None and shift.shape != (x.shape[0], channels):
        raise ValueError(f"shift has shape {tuple(shift.shape)}, expected {(x.shape[0], channels)}")


# ------------------------------------------------------------------------------------------------------ launches

_LANES = 64  # channels that a program reads of a pixel, where groups are not read apart
_BLOCK = 128  # pixels of a block of sums of gradients
_ROWS = 32  # pixels that a program holds at once of two inputs; of one it holds twice as many, or half with loads ahead
_CACHED = 20_000  # values of a group that one program reads twice, the second time from the cache
_WARP = 512  # values for which one more warp reads such a group


@dataclass(frozen=True)
class Plan:
    """Tile of a program that reads one group of a frame: `rows` pixels of `lanes` channels at once, with `warps`."""

    lanes: int
    rows: int
    warps: int


def plan(size: int, pixels: int) -> Plan | None:
    """Tile of a program that normalizes a group of `size` channels; None where blocks of pixels are to be faster.

    The more a group takes of the cache, the more warps share it, so that fewer groups are in the cache at once.
    """
    values = size * pixels
    # A group's row of less than 40 bytes wastes memory transactions, which a tiny frame need not care about.
    if values > (_CACHED if size >= 20 else 4096) or size > 4096:
        return None
    lanes = _power_of_two(size)
    warps = 4 if values <= 8192 else 8
    return Plan(lanes, min(max(_WARP * warps // lanes, 1), _power_of_two(pixels)), warps)


def block_of_statistics(pixels: int) -> int:
    """Pixels of a frame whose statistics one program takes: many frames are small ones, and large ones are few."""
    return 256 if pixels <= 1024 else 512 if pixels <= 65_536 else 1024


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ------------------------------------------------------------------------------------------------------- kernels

if INSTALLED:
    import triton
    import triton.language as tl

    # ALIGN says how far rows are aligned: specialising on sizes besides would only make more kernels to compile.
    _SIZES = ("channel_units", "first_units", "groups", "group_channels", "block", "blocks")

    @triton.jit
    def _load_pixels(x, beside, pixel, channel, channels, first, mask, PAIR: tl.constexpr):
        """Values, in float32, of pixels; with PAIR, channels from `first` on are those of `beside`."""
        if PAIR:
            left = mask & (channel < first)[None, :]
            right = mask & (channel >= first)[None, :]
            v = tl.load(x + pixel[:, None] * first + channel[None, :], mask=left, other=0.0).to(tl.float32)
            at = pixel[:, None] * (channels - first) + (channel - first)[None, :]
            v += tl.load(beside + at, mask=right, other=0.0).to(tl.float32)
        else:
            v = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        return v

    @triton.jit
    def _group_norm_frame(
        x,
        beside,
        weight,
        bias,
        shift,
        shift_stride,
        out,
        pixels,
        groups,
        group_units,
        first_units,
        EPS: tl.constexpr,
        SILU: tl.constexpr,
        SHIFT: tl.constexpr,
        PAIR: tl.constexpr,
        ALIGN: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One group of one frame: its statistics, then itself once more from the cache.

        Every lane follows its own values by Welford's recurrence; the lanes are put together at the end (Chan, Golub
        and LeVeque 1983).
        """
        group, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
        group_channels = group_units * ALIGN
        channels = groups * group_channels
        lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
        exists = lane < group_channels
        channel = group * group_channels + lane
        first = first_units * ALIGN
        x += frame * pixels * first
        beside += frame * pixels * (channels - first)
        out += frame * pixels * channels
        if SHIFT:
            s = tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)
        means = tl.zeros((ROWS, LANES), tl.float32)
        squares = tl.zeros((ROWS, LANES), tl.float32)
        count = 0.0
        for start in range(0, pixels, ROWS):
            mask = (start + row < pixels)[:, None] & exists[None, :]
            v = _load_pixels(x, beside, start + row, channel, channels, first, mask, PAIR)
            if SHIFT:
                v += s[None, :]
            count += 1.0
            difference = tl.where(mask, v - means, 0.0)
            means += difference * (1.0 / count)
            squares += difference * (v - means)
        counts = tl.maximum((pixels - row + ROWS - 1) // ROWS, 0).to(tl.float32)  # values that a lane has seen
        weights = tl.where(exists[None, :], counts[:, None], 0.0)
        # The mean is a value of the group plus the mean difference from it: exactly where all values are the same.
        size = pixels * group_channels * 1.0
        pivot = tl.sum(tl.where((row == 0)[:, None] & (lane == 0)[None, :], means, 0.0))
        means -= pivot
        off = tl.sum(weights * means) / size
        means -= off
        mean = pivot + off
        rstd = 1.0 / tl.sqrt(tl.sum(squares + weights * means * means) / size + EPS)
        scale = rstd * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        for start in range(0, pixels, ROWS):
            mask = (start + row < pixels)[:, None] & exists[None, :]
            at = (start + row)[:, None] * channels + channel[None, :]
            v = _load_pixels(x, beside, start + row, channel, channels, first, mask, PAIR)
            if SHIFT:
                v += s[None, :]
            y = (v - mean) * scale[None, :] + offset[None, :]
            if SILU:
                y *= tl.sigmoid(y)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=_SIZES)
    def _group_norm_statistics(
        x,
        beside,
        shift,
        shift_stride,
        partial,
        pixels,
        channel_units,
        first_units,
        block,
        SHIFT: tl.constexpr,
        PAIR: tl.constexpr,
        ALIGN: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Mean of every channel in one of the blocks of `block` pixels, and sum of squared differences from it.

        Every lane adds up differences from the channel's first value, and their squares, so that lanes are put
        together once. No value is further from the mean than √block standard deviations: what that costs of the
        squares is `block` times the rounding of float32. `partial` is (frames, 2, blocks, channels).
        """
        index, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
        blocks = tl.num_programs(1)
        channels, first = channel_units * ALIGN, first_units * ALIGN
        channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
        exists = channel < channels
        row = tl.arange(0, ROWS)
        begin = index * block
        here = tl.minimum(pixels - begin, block)
        x += (frame * pixels + begin) * first
        beside += (frame * pixels + begin) * (channels - first)
        one = tl.arange(0, 1)
        pivot = tl.sum(_load_pixels(x, beside, one, channel, channels, first, exists[None, :], PAIR), axis=0)
        sums = tl.zeros((ROWS, LANES), tl.float32)
        squares = tl.zeros((ROWS, LANES), tl.float32)
        for start in tl.range(0, here, ROWS, num_stages=4):  # loads run ahead of the sums
            mask = (start + row < here)[:, None] & exists[None, :]
            v = _load_pixels(x, beside, start + row, channel, channels, first, mask, PAIR)
            v = tl.where(mask, v - pivot[None, :], 0.0)
            sums += v
            squares += v * v
        total = tl.sum(sums, axis=0)
        # The mean is the first value plus the mean difference from it: exactly where all values are the same.
        off = total / here.to(tl.float32)
        mean = pivot + off
        if SHIFT:
            mean += tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)
        partial += (frame * 2 * blocks + index) * channels + channel
        tl.store(partial, mean, mask=exists)
        tl.store(partial + blocks * channels, tl.maximum(tl.sum(squares, axis=0) - total * off, 0.0), mask=exists)

    @triton.jit(do_not_specialize=_SIZES)
    def _group_norm_combine(
        partial,
        statistics,
        pixels,
        groups,
        group_channels,
        block,
        blocks,
        EPS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """Mean and reciprocal standard deviation of one group of one frame; `statistics` is (frames, 2, groups)."""
        group, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
        channels = groups * group_channels
        partial += frame * 2 * blocks * channels + group * group_channels
        size = pixels * (group_channels * 1.0)
        pivot = tl.load(partial)
        lane = tl.arange(0, LANES)
        off = tl.zeros((LANES,), tl.float32)
        for start in range(0, blocks * group_channels, LANES):
            index = (start + lane) // group_channels
            mask = index < blocks
            at = index * channels + (start + lane) % group_channels
            count = tl.minimum(pixels - index * block, block).to(tl.float32)
            off += tl.where(mask, (tl.load(partial + at, mask=mask, other=0.0) - pivot) * count, 0.0)
        mean = pivot + tl.sum(off) / size
        squares = tl.zeros((LANES,), tl.float32)
        for start in range(0, blocks * group_channels, LANES):
            index = (start + lane) // group_channels
            mask = index < blocks
            at = index * channels + (start + lane) % group_channels
            count = tl.minimum(pixels - index * block, block).to(tl.float32)
            difference = tl.load(partial + at, mask=mask, other=0.0) - mean
            squares += tl.load(partial + blocks * channels + at, mask=mask, other=0.0)
            squares += tl.where(mask, difference * difference * count, 0.0)
        statistics += frame * 2 * groups + group
        tl.store(statistics, mean)
        tl.store(statistics + groups, 1.0 / tl.sqrt(tl.sum(squares) / size + EPS))

    @triton.jit(do_not_specialize=_SIZES)
    def _group_norm_apply(
        x,
        beside,
        weight,
        bias,
        shift,
        shift_stride,
        statistics,
        out,
        pixels,
        channel_units,
        first_units,
        groups,
        group_channels,
        SILU: tl.constexpr,
        SHIFT: tl.constexpr,
        PAIR: tl.constexpr,
        ALIGN: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Normalize ROWS pixels, the last ones first."""
        run = tl.num_programs(0) - 1 - tl.program_id(0)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
        frame = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
        channels, split = channel_units * ALIGN, first_units * ALIGN
        channel = run * LANES + tl.arange(0, LANES)
        exists = channel < channels
        statistics += frame * 2 * groups + channel // group_channels
        mean = tl.load(statistics, mask=exists, other=0.0)
        scale = tl.load(statistics + groups, mask=exists, other=0.0)
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        first = block * ROWS
        row = tl.arange(0, ROWS)
        mask = (first + row < pixels)[:, None] & exists[None, :]
        base = (frame * pixels + first) * channels
        at = row[:, None] * channels + channel[None, :]
        x += (frame * pixels + first) * split
        beside += (frame * pixels + first) * (channels - split)
        v = _load_pixels(x, beside, row, channel, channels, split, mask, PAIR)
        if SHIFT:
            v += tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        y = (v - mean[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(out + base + at, y.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _normalized_and_gradient(v, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
        """The normalized values, and the gradient of what SiLU takes."""
        normalized = (v - mean[None, :]) * rstd[None, :]
        if SILU:
            y = normalized * weight[None, :] + bias[None, :]
            sigmoid = tl.sigmoid(y)
            grad *= sigmoid * (1.0 + y * (1.0 - sigmoid))
        return normalized, grad

    @triton.jit
    def _group_norm_gradient_sums(
        x,
        grad,
        weight,
        bias,
        shift,
        shift_stride,
        statistics,
        sums,
        pixels,
        channel_units,
        groups,
        group_channels,
        SILU: tl.constexpr,
        SHIFT: tl.constexpr,
        ALIGN: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Sums over a block of pixels: of the gradient, of gradient · normalized, and, with a shift, of normalized.

        `sums` is (2 or 3, frames, blocks, channels).
        """
        block, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
        blocks = tl.num_programs(1)
        channels = channel_units * ALIGN
        channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
        exists = channel < channels
        statistics += frame * 2 * groups + channel // group_channels
        mean = tl.load(statistics, mask=exists, other=0.0)
        rstd = tl.load(statistics + groups, mask=exists, other=0.0)
        w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        if SHIFT:
            s = tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)
        first = block * BLOCK
        here = tl.minimum(pixels - first, BLOCK)
        x += (frame * pixels + first) * channels
        grad += (frame * pixels + first) * channels
        row = tl.arange(0, ROWS)
        gradient_sum = tl.zeros((ROWS, LANES), tl.float32)
        scaled_sum = tl.zeros((ROWS, LANES), tl.float32)
        normalized_sum = tl.zeros((ROWS, LANES), tl.float32)
        for start in range(0, here, ROWS):
            mask = (start + row < here)[:, None] & exists[None, :]
            at = (start + row)[:, None] * channels + channel[None, :]
            v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            if SHIFT:
                v += s[None, :]
            normalized, g = _normalized_and_gradient(v, g, mean, rstd, w, b, SILU)
            gradient_sum += g  # 0 where masked, as the gradient is
            scaled_sum += g * normalized
            if SHIFT:
                normalized_sum += tl.where(mask, normalized, 0.0)
        sums += (frame * blocks + block) * channels + channel
        stride = tl.num_programs(2).to(tl.int64) * blocks * channels
        tl.store(sums, tl.sum(gradient_sum, axis=0), mask=exists)
        tl.store(sums + stride, tl.sum(scaled_sum, axis=0), mask=exists)
        if SHIFT:
            tl.store(sums + 2 * stride, tl.sum(normalized_sum, axis=0), mask=exists)

    @triton.jit
    def _group_norm_input_gradient(
        x,
        grad,
        weight,
        bias,
        shift,
        shift_stride,
        statistics,
        means,
        grad_x,
        pixels,
        channel_units,
        groups,
        group_channels,
        SILU: tl.constexpr,
        SHIFT: tl.constexpr,
        ALIGN: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Gradient of ROWS pixels, the last ones first.

        `means` is (2, frames, groups): of weight · gradient, and of weight · gradient · normalized.
        """
        run = tl.num_programs(0) - 1 - tl.program_id(0)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
        frames = tl.num_programs(2)
        frame = (frames - 1 - tl.program_id(2)).to(tl.int64)
        channels = channel_units * ALIGN
        channel = run * LANES + tl.arange(0, LANES)
        exists = channel < channels
        group = channel // group_channels
        mean = tl.load(statistics + frame * 2 * groups + group, mask=exists, other=0.0)
        rstd = tl.load(statistics + (frame * 2 + 1) * groups + group, mask=exists, other=0.0)
        mean_gradient = tl.load(means + frame * groups + group, mask=exists, other=0.0)
        mean_scaled = tl.load(means + (frames + frame) * groups + group, mask=exists, other=0.0)
        w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        first = block * ROWS
        row = tl.arange(0, ROWS)
        mask = (first + row < pixels)[:, None] & exists[None, :]
        base = (frame * pixels + first) * channels
        at = row[:, None] * channels + channel[None, :]
        v = tl.load(x + base + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + base + at, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            v += tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        normalized, g = _normalized_and_gradient(v, g, mean, rstd, w, b, SILU)
        dx = rstd[None, :] * (g * w[None, :] - mean_gradient[None, :] - normalized * mean_scaled[None, :])
        tl.store(grad_x + base + at, dx.to(grad_x.dtype.element_ty), mask=mask)

    # ------------------------------------------------------------------------------------------------- operators

    def _in_rows(shift: Tensor | None) -> Tensor | None:
        """As kernels read it; a vector that all frames share stays one."""
        return shift if shift is None or shift.stride(1) == 1 else shift.contiguous()

    def _grid(x: Tensor, rows: int, more: int = 0) -> tuple[int, int, int]:
        return -(-(x.shape[1] + more) // _LANES), -(-(x.shape[2] * x.shape[3]) // rows), x.shape[0]

    def _arguments(x: Tensor, shift: Tensor | None) -> dict[str, Any]:
        """Arguments shared by the kernels that iterate over blocks of pixels."""
        align = math.gcd(x.shape[1], 8)
        return {
            "x": x,
            "shift": x if shift is None else shift,
            "shift_stride": 0 if shift is None else shift.stride(0),
            "pixels": x.shape[2] * x.shape[3],
            "channel_units": x.shape[1] // align,
            "SHIFT": shift is not None,
            "ALIGN": align,
            "LANES": _LANES,
            "num_warps": 4,
        }

    def _of_both(x: Tensor, beside: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
        """The same, also where channels of another tensor follow those of x."""
        more = 0 if beside is None else beside.shape[1]
        align = math.gcd(x.shape[1], more, 8)
        return _arguments(x, shift) | {
            "beside": x if beside is None else beside,
            "channel_units": (x.shape[1] + more) // align,
            "first_units": x.shape[1] // align,
            "PAIR": beside is not None,
            "ALIGN": align,
        }

    def _statistics(x: Tensor, shift: Tensor | None, groups: int, eps: float, beside: Tensor | None = None) -> Tensor:
        """Mean and reciprocal standard deviation, (frames, 2, groups)."""
        frames, channels, height, width = x.shape
        more = 0 if beside is None else beside.shape[1]
        block = block_of_statistics(height * width)
        grid = _grid(x, block, more)
        partial = torch.empty((frames, 2, grid[1], channels + more), device=x.device, dtype=torch.float32)
        statistics = torch.empty((frames, 2, groups), device=x.device, dtype=torch.float32)
        wrap_triton(_group_norm_statistics)[grid](
            partial=partial, block=block, ROWS=_ROWS // 2, **_of_both(x, beside, shift)
        )
        wrap_triton(_group_norm_combine)[(groups, frames)](
            partial=partial,
            statistics=statistics,
            pixels=height * width,
            groups=groups,
            group_channels=(channels + more) // groups,
            block=block,
            blocks=grid[1],
            EPS=eps,
            LANES=256,
            num_warps=2,
        )
        return statistics

    def launch(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None,
        chosen: Plan | None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Run the kernels of one plan; see `group_norm_silu`."""
        x = x.contiguous(memory_format=torch.channels_last)
        beside = None if beside is None else beside.contiguous(memory_format=torch.channels_last)
        weight, bias, shift = weight.contiguous(), bias.contiguous(), _in_rows(shift)
        frames, channels, height, width = x.shape
        more = 0 if beside is None else beside.shape[1]
        out = torch.empty(
            (frames, channels + more, height, width),
            device=x.device,
            dtype=x.dtype,
            memory_format=torch.channels_last,
        )
        size = (channels + more) // groups
        if chosen is None:
            wrap_triton(_group_norm_apply)[_grid(x, 2 * _ROWS, more)](
                weight=weight,
                bias=bias,
                statistics=_statistics(x, shift, groups, eps, beside),
                out=out,
                groups=groups,
                group_channels=size,
                SILU=silu,
                ROWS=2 * _ROWS,
                **_of_both(x, beside, shift),
            )
            return out
        align = math.gcd(size, 8) if beside is None else math.gcd(size, channels, 8)
        wrap_triton(_group_norm_frame)[(groups, frames)](
            x=x,
            beside=x if beside is None else beside,
            weight=weight,
            bias=bias,
            shift=x if shift is None else shift,
            shift_stride=0 if shift is None else shift.stride(0),
            out=out,
            pixels=height * width,
            groups=groups,
            group_units=size // align,
            first_units=channels // align,
            EPS=eps,
            SILU=silu,
            SHIFT=shift is not None,
            PAIR=beside is not None,
            ALIGN=align,
            LANES=chosen.lanes,
            ROWS=chosen.rows,
            num_warps=chosen.warps,
        )
        return out

    @triton_op("emt::group_norm_silu")
    def _group_norm_silu(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None = None
    ) -> Tensor:
        _check(x, weight, bias, groups, shift)
        chosen = plan(x.shape[1] // groups, x.shape[2] * x.shape[3])
        return launch(x, weight, bias, groups, eps, silu, shift, chosen)

    @_group_norm_silu.register_fake
    def _(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None = None
    ) -> Tensor:
        return torch.empty_like(x, memory_format=torch.channels_last)

    @triton_op("emt::group_norm_silu_of_two")
    def _group_norm_silu_of_two(
        x: Tensor,
        beside: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Without gradients."""
        _check(x, weight, bias, groups, shift, beside)
        chosen = plan(weight.shape[0] // groups, x.shape[2] * x.shape[3])
        return launch(x, weight, bias, groups, eps, silu, shift, chosen, beside)

    @_group_norm_silu_of_two.register_fake
    def _(
        x: Tensor,
        beside: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
    ) -> Tensor:
        size = (x.shape[0], weight.shape[0], *x.shape[2:])
        return x.new_empty(size).to(memory_format=torch.channels_last)

    @triton_op("emt::group_norm_silu_backward")
    def _group_norm_silu_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, weight, bias and shift (empty where there is none)."""
        grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
        weight, bias, shift = weight.contiguous(), bias.contiguous(), _in_rows(shift)
        frames, channels, height, width = x.shape
        pixels, size = height * width, channels // groups
        statistics = _statistics(x, shift, groups, eps)
        arguments = _arguments(x, shift) | {
            "grad": grad,
            "weight": weight,
            "bias": bias,
            "statistics": statistics,
            "groups": groups,
            "group_channels": size,
            "SILU": silu,
            "ROWS": _ROWS,
        }
        grid = _grid(x, _BLOCK)
        partial = torch.empty(
            (2 if shift is None else 3, frames, grid[1], channels), device=x.device, dtype=torch.float32
        )
        wrap_triton(_group_norm_gradient_sums)[grid](sums=partial, BLOCK=_BLOCK, **arguments)
        sums = partial.sum(2)  # (2 or 3, frames, channels)
        weighted = weight.float() * sums[:2]
        means = weighted.unflatten(2, (groups, size)).sum(3) / (pixels * size)
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        wrap_triton(_group_norm_input_gradient)[_grid(x, _ROWS)](means=means, grad_x=grad_x, **arguments)
        grad_bias, grad_weight = sums[0].sum(0), sums[1].sum(0)
        if shift is None:
            grad_shift = x.new_empty(0)
        else:
            mean_gradient, mean_scaled = means.repeat_interleave(size, 2)
            rstd = statistics[:, 1].repeat_interleave(size, 1)
            grad_shift = rstd * (weighted[0] - pixels * mean_gradient - sums[2] * mean_scaled)
            grad_shift = grad_shift.to(shift.dtype)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_shift

    @_group_norm_silu_backward.register_fake
    def _(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_shift = torch.empty_like(shift) if shift is not None else x.new_empty(0)
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        return grad_x, torch.empty_like(weight), torch.empty_like(bias), grad_shift

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.groups, ctx.eps, ctx.silu, shift = inputs
        ctx.save_for_backward(x, weight, bias, shift)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, shift = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_shift = torch.ops.emt.group_norm_silu_backward(
            grad, x, weight, bias, ctx.groups, ctx.eps, ctx.silu, shift
        )
        return grad_x, grad_weight, grad_bias, None, None, None, None if shift is None else grad_shift

    _group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
