"""Group normalization with SiLU that reads its input from memory once: programs share the statistics of a frame.

`emt_kernels.group_norm_silu` reads frames that are larger than a multiprocessor's cache twice, for the statistics and
for applying them. Here a unit, a run of whole groups of one frame, is divided among programs that are on the GPU at
the same time. Each loads its pixels, writes the mean and the squared differences of its share of each group, waits
until all programs of the unit have done so, combines what they wrote, and normalizes its pixels: those that it holds in
registers, or, which leaves room for more programs at once, the same ones read again from the cache. Nothing is added
atomically but the count of those that have arrived: results repeat bit for bit.

Programs of a unit have consecutive numbers and GPUs start programs in the order of their numbers, so that a program
waits only for programs that run or start as soon as earlier ones end. `plan` never divides a unit among more programs
than the GPU has multiprocessors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emt_kernels.selection import INSTALLED, wrap_triton


@dataclass(frozen=True)
class Plan:
    """Tile of a program: `rows` pixels of a run of `run` groups, with `warps` warps; `hold` keeps it in registers."""

    run: int
    rows: int
    warps: int
    hold: bool = False


def plan(size: int, groups: int, pixels: int, multiprocessors: int, lanes: int = 128, rows: int = 64) -> Plan | None:
    """Tile for groups of `size` channels; None where a unit would need more programs than can run at once.

    Args:
        size: channels of a group.
        groups: of a frame.
        pixels: of a frame.
        multiprocessors: of the GPU.
        lanes: channels of a tile; a power of two, of which a run of groups fills as many as it can.
        rows: pixels of a tile; a power of two.
    """
    run = min(max(lanes // size, 1), groups)
    lanes = _power_of_two(run * size)
    rows = min(rows, _power_of_two(pixels))
    if -(-pixels // rows) > multiprocessors or lanes * rows > 32_768:
        return None
    return Plan(run, rows, min(max(lanes * rows // 1024, 4), 16))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _by_group(values, own):
        """Sum over the lanes of each group; `own` is one-hot, (groups, lanes)."""
        return tl.sum(tl.where(own, values[None, :], 0.0), axis=1)

    @triton.jit
    def _by_lane(values, own):
        """Value of each lane's group."""
        return tl.sum(tl.where(own, values[:, None], 0.0), axis=0)

    @triton.jit
    def _group_norm_one_read(
        x,
        weight,
        bias,
        shift,
        shift_stride,
        partial,
        arrived,
        out,
        pixels,
        channel_units,
        runs,
        parts,
        EPS: tl.constexpr,
        SILU: tl.constexpr,
        SHIFT: tl.constexpr,
        WAIT: tl.constexpr,
        HOLD: tl.constexpr,
        ALIGN: tl.constexpr,
        UNITS: tl.constexpr,
        SIZE: tl.constexpr,
        RUN: tl.constexpr,
        RUNS: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        """ROWS pixels of one run of RUN groups of SIZE channels, which are UNITS · ALIGN channels.

        A frame has channel_units · ALIGN channels: ALIGN says how far rows are aligned, and loads as wide as that.

        `partial` is (units, 2, parts, RUNS), RUNS and PARTS the powers of two from RUN and `parts` on; `arrived` is
        (units,), 0 before the launch. Without WAIT a program takes what is in `partial`: of two launches, the second
        one finds there what the first one wrote, as interpreted programs need it, which run one after another.
        """
        part = tl.program_id(0) % parts
        unit = tl.program_id(0) // parts
        run, frame = unit % runs, (unit // runs).to(tl.int64)
        channels = channel_units * ALIGN
        lane, row, group = tl.arange(0, LANES), tl.arange(0, ROWS), tl.arange(0, RUNS)
        channel = run * UNITS * ALIGN + lane
        exists = (lane < RUN * SIZE) & (channel < channels)
        own = (lane // SIZE)[None, :] == group[:, None]  # (RUNS, LANES)
        first = part * ROWS
        here = tl.minimum(pixels - first, ROWS)
        mask = (row < here)[:, None] & exists[None, :]
        base = (frame * pixels + first) * channels
        at = row[:, None] * channels + channel[None, :]
        v = tl.load(x + base + at, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            s = tl.load(shift + frame * shift_stride + channel, mask=exists, other=0.0).to(tl.float32)
            v += s[None, :]

        # The mean of a share is its first value plus the mean difference from it: exactly where all values are equal.
        count = here * (SIZE * 1.0)
        leads = exists & (lane % SIZE == 0)
        pivot = tl.sum(tl.where((row == 0)[:, None] & leads[None, :], v, 0.0), axis=0)
        pivot = _by_group(pivot, own)
        difference = tl.where(mask, v - _by_lane(pivot, own)[None, :], 0.0)
        off = _by_group(tl.sum(difference, axis=0), own) / count
        difference = tl.where(mask, difference - _by_lane(off, own)[None, :], 0.0)
        squares = _by_group(tl.sum(difference * difference, axis=0), own)
        partial += unit.to(tl.int64) * 2 * parts * RUNS
        tl.store(partial + part * RUNS + group, pivot + off)
        tl.store(partial + (parts + part) * RUNS + group, squares)

        tl.debug_barrier()  # one thread reports what all of the program's have written
        tl.atomic_add(arrived + unit, 1, sem="release")
        if WAIT:
            while tl.atomic_add(arrived + unit, 0, sem="acquire") < parts:
                pass

        index = tl.arange(0, PARTS)
        there = (index < parts)[:, None] & (group < RUN)[None, :]
        at_part = index[:, None] * RUNS + group[None, :]
        # Not by way of the first-level cache, which does not see what other multiprocessors write.
        means = tl.load(partial + at_part, mask=there, other=0.0, cache_modifier=".cg")
        within = tl.load(partial + parts * RUNS + at_part, mask=there, other=0.0, cache_modifier=".cg")
        counts = tl.maximum(tl.minimum(pixels - index * ROWS, ROWS), 0).to(tl.float32)[:, None] * SIZE
        total = pixels * (SIZE * 1.0)
        pivot = tl.sum(tl.where((index == 0)[:, None], means, 0.0), axis=0)
        mean = pivot + tl.sum(tl.where(there, (means - pivot[None, :]) * counts, 0.0), axis=0) / total
        between = tl.where(there, means - mean[None, :], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(within + between * between * counts, axis=0) / total + EPS)

        scale = _by_lane(rstd, own) * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        if not HOLD:
            v = tl.load(x + base + at, mask=mask, other=0.0).to(tl.float32)
            if SHIFT:
                v += s[None, :]
        y = (v - _by_lane(mean, own)[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(out + base + at, y.to(out.dtype.element_ty), mask=mask)

    def launch(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None,
        chosen: Plan,
        wait: bool = True,
    ) -> Tensor:
        """Run the kernel of a plan; arguments and result as `emt_kernels.group_norm_silu.group_norm_silu` has them.

        Args:
            x: as there.
            weight: as there.
            bias: as there.
            groups: as there.
            eps: as there.
            silu: as there.
            shift: as there.
            chosen: the tile.
            wait: have programs wait for each other; if not, the kernel is launched twice.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = weight.contiguous(), bias.contiguous()
        if shift is not None and shift.stride(1) != 1:
            shift = shift.contiguous()
        out = torch.empty_like(x, memory_format=torch.channels_last)
        frames, channels, height, width = x.shape
        pixels, size = height * width, channels // groups
        runs, parts = -(-groups // chosen.run), -(-pixels // chosen.rows)
        units, padded = frames * runs, _power_of_two(chosen.run)
        partial = torch.empty((units, 2, parts, padded), device=x.device, dtype=torch.float32)
        arrived = torch.zeros(units, device=x.device, dtype=torch.int32)
        align = math.gcd(chosen.run * size, channels, 8)
        for _ in range(1 if wait else 2):
            wrap_triton(_group_norm_one_read)[(units * parts,)](
                x=x,
                weight=weight,
                bias=bias,
                shift=x if shift is None else shift,
                shift_stride=0 if shift is None else shift.stride(0),
                partial=partial,
                arrived=arrived,
                out=out,
                pixels=pixels,
                channel_units=channels // align,
                runs=runs,
                parts=parts,
                EPS=eps,
                SILU=silu,
                SHIFT=shift is not None,
                WAIT=wait,
                HOLD=chosen.hold,
                ALIGN=align,
                UNITS=chosen.run * size // align,
                SIZE=size,
                RUN=chosen.run,
                RUNS=padded,
                LANES=_power_of_two(chosen.run * size),
                ROWS=chosen.rows,
                PARTS=_power_of_two(parts),
                num_warps=chosen.warps,
            )
        return out
