"""Gated GELU of a feed-forward layer (Shazeer 2020, arXiv 2002.05202) fused with the matmul that it gates.

The matmul is twice as wide as the result. A program computes a tile of the values and the same tile of the gates,
and writes only what the gate lets through: two thirds of the bytes that the two kernels move are never moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt_kernels.geglu import geglu_reference
from emt_kernels.selection import INSTALLED, custom_op, interpreted, untraced, use_triton


@dataclass(frozen=True)
class Plan:
    """Division of the work.

    Attributes:
        rows: of a program's tile of the result.
        inner: columns of that tile; it takes twice as many rows of the weight.
        channels: that are multiplied at once.
        warps: of a program.
        stages: tiles of x and the weight that are on their way at once.
        programs: for each multiprocessor, each for many tiles; 0 for one program a tile.
        descriptors: tiles are copied by Hopper's tensor memory accelerator, which has its own conditions on strides.
    """

    rows: int
    inner: int
    channels: int
    warps: int
    stages: int
    programs: int = 0
    descriptors: bool = False


#: For tensors that descriptors do not fit, and GPUs before Hopper.
PLAIN = Plan(128, 64, 32, 4, 4)
#: By the channels of x, on Hopper; `python benchmarks/kernels.py geglu_linear_plans` times what else there is.
PLANS = {
    320: Plan(128, 128, 64, 8, 4, 1, True),
    640: Plan(128, 128, 64, 8, 4, 1, True),
    1280: Plan(128, 128, 64, 8, 3, 1, True),
}
#: Channels at which the kernel was measured to be faster than a matmul and `geglu`.
FASTER_AT = frozenset({320, 640, 1280})


def geglu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain PyTorch reference of `geglu_linear`."""
    return geglu_reference(F.linear(x, weight, bias))


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first matmul of a feed-forward layer and its gated GELU: half of the features times the GELU of the others.

    Accumulation, GELU and gating are in float32, whatever the dtype of the tensors. Gradients take the reference.

    Args:
        x: (…, channels), channels next to each other, any other strides.
        weight: (2·inner, channels), as `torch.nn.Linear` has it: the values' features, then the gates'.
        bias: (2·inner,).

    Returns:
        (…, inner).

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, weight, bias)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if trained or not use_triton(x):
        return geglu_linear_reference(x, weight, bias)
    return torch.ops.emt.geglu_linear(x, weight, bias)


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Return whether inference by `geglu_linear` was measured to be faster than a matmul and `geglu` for such tensors.

    Never under `torch.compile`, which chooses its own matmuls.
    """
    return (
        x.shape[-1] in FASTER_AT
        and not torch.compiler.is_dynamo_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype == weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and use_triton(x)
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[0] % 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected an even number of features by channels")
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (…, {weight.shape[1]}) as the weight's channels")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _describable(*tensors: Tensor) -> bool:
    """Return whether tensor descriptors fit: plain matrices of one 16-bit dtype with rows aligned to 16 bytes."""
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.dtype in (torch.float16, torch.bfloat16)
        and t.data_ptr() % 16 == 0
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        for t in tensors
    )


if INSTALLED:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _place(tile, rows, inner, ROWS: tl.constexpr, INNER: tl.constexpr):
        """First row and column of a tile: eight tiles down, then the eight beside, so that the cache serves them."""
        down = tl.cdiv(rows, ROWS)
        across = tl.cdiv(inner, INNER)
        group = tile // (8 * across)
        high = tl.minimum(down - 8 * group, 8)
        row = 8 * group + tile % (8 * across) % high
        return row * ROWS, tile % (8 * across) // high * INNER

    @triton.jit
    def _gated(value, gate, bias, first, inner, INNER: tl.constexpr):
        """Values times the GELU of gates, once the bias is on both."""
        column = first + tl.arange(0, INNER)
        value += tl.load(bias + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + inner + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
        # Half of erfc(|gate|/√2) as a power of two, whose exponent is a polynomial: 1.4e-7 off at most once it is
        # multiplied by the gate, as float32 itself is, and half the instructions of `erf`, which are not hidden
        # behind so short a matmul.
        a = tl.abs(gate)
        p = a * -4.038448651044746e-07 + 6.8917092903575394e-06
        p = p * a - 1.2998304555367213e-05
        p = p * a - 0.0006077259895391762
        p = p * a + 0.007755493279546499
        p = p * a - 0.0530334897339344
        p = p * a - 0.45900970697402954
        p = p * a - 1.1511322259902954
        p = p * a - 0.9999994039535522
        return value * (tl.maximum(gate, 0.0) - a * tl.exp2(p))

    @triton.jit
    def _geglu_linear_kernel(
        x,
        weight,
        bias,
        out,
        rows,
        inner,
        channels,
        x_row,
        weight_row,
        ROWS: tl.constexpr,
        INNER: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """One tile of the result; `out` is contiguous."""
        first_row, first = _place(tl.program_id(0), rows, inner, ROWS, INNER)
        row = first_row + tl.arange(0, ROWS)
        column = first + tl.arange(0, INNER)
        channel = tl.arange(0, CHANNELS)
        # Rows and columns beyond the last are copies of it, computed and not written.
        x += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_row + channel[None, :]
        of_value = weight + tl.minimum(column, inner - 1).to(tl.int64)[None, :] * weight_row + channel[:, None]
        of_gate = of_value + tl.cast(inner, tl.int64) * weight_row  # a size of 1 is a constant, which has no `to`
        value = tl.zeros((ROWS, INNER), tl.float32)
        gate = tl.zeros((ROWS, INNER), tl.float32)
        for done in tl.range(0, channels, CHANNELS):
            left = channel < channels - done
            part = tl.load(x + done, mask=left[None, :], other=0.0)
            value = tl.dot(part, tl.load(of_value + done, mask=left[:, None], other=0.0), value, input_precision="ieee")
            gate = tl.dot(part, tl.load(of_gate + done, mask=left[:, None], other=0.0), gate, input_precision="ieee")
        y = _gated(value, gate, bias, first, inner, INNER).to(out.dtype.element_ty)
        at = row.to(tl.int64)[:, None] * inner + column[None, :]
        tl.store(out + at, y, mask=(row < rows)[:, None] & (column < inner)[None, :])

    @triton.jit
    def _geglu_linear_described(
        x,
        weight,
        bias,
        out,
        rows,
        inner,
        channels,
        programs,
        ROWS: tl.constexpr,
        INNER: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """Every `programs`-th tile of the result.

        Descriptors of x and `out` have blocks of a tile; that of the weight has blocks of (2, INNER, CHANNELS) of the
        weight as (2, inner, channels), so that one matmul makes values and gates. Two matmuls, pipelined, would
        wait for each other.
        """
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(inner, INNER)
        # The next tile's operands are copied while this one's result is made. What the result needs is computed
        # anew from a count of its own: it would be carried through the pipeline of copies otherwise.
        written = tl.program_id(0)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            row, first = _place(tile, rows, inner, ROWS, INNER)
            both = tl.zeros((ROWS, 2 * INNER), tl.float32)
            for done in range(0, channels, CHANNELS):
                block = weight.load([0, first, done]).reshape(2 * INNER, CHANNELS)
                both = tl.dot(x.load([row, done]), block.T, both)
            # In the accumulator's layout a thread owns whole rows: a value and its gate are in the same thread.
            value, gate = tl.split(both.reshape(ROWS, 2, INNER).permute(0, 2, 1))
            row, first = _place(written, rows, inner, ROWS, INNER)
            out.store([row, first], _gated(value, gate, bias, first, inner, INNER).to(out.dtype))
            written += programs

    def launch(x: Tensor, weight: Tensor, bias: Tensor, chosen: Plan | None = None) -> Tensor:
        """Run the kernel by a plan, the one for these tensors unless one is given; see `geglu_linear`."""
        _check(x, weight, bias)
        shape, (features, channels) = x.shape[:-1], weight.shape
        inner = features // 2
        x = x.reshape(-1, channels)
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        bias = bias.contiguous()
        rows = x.shape[0]
        out = x.new_empty((rows, inner))
        if not out.numel():
            return out.view(*shape, inner)
        plan = chosen or _plan(x, weight, out)
        tiles = triton.cdiv(rows, plan.rows) * triton.cdiv(inner, plan.inner)
        programs = min(tiles, plan.programs * _multiprocessors(x.device) if plan.programs else tiles)
        arguments: dict[str, Any] = {
            "bias": bias,
            "rows": rows,
            "inner": inner,
            "channels": channels,
            "ROWS": plan.rows,
            "INNER": plan.inner,
            "CHANNELS": plan.channels,
            "num_warps": plan.warps,
            "num_stages": plan.stages,
        }
        if plan.descriptors:
            untraced(_geglu_linear_described)[(programs,)](
                x=TensorDescriptor.from_tensor(x, [plan.rows, plan.channels]),
                weight=_describe_weight(weight, plan),
                out=TensorDescriptor.from_tensor(out, [plan.rows, plan.inner]),
                programs=programs,
                **arguments,
            )
        else:
            untraced(_geglu_linear_kernel)[(tiles,)](
                x=x, weight=weight, out=out, x_row=x.stride(0), weight_row=weight.stride(0), **arguments
            )
        return out.view(*shape, inner)

    def _plan(x: Tensor, weight: Tensor, out: Tensor) -> Plan:
        """The plan for matrices."""
        hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
        return PLANS.get(x.shape[1], PLANS[1280]) if hopper and _describable(x, weight, out) else PLAIN

    def _describe_weight(weight: Tensor, plan: Plan) -> Any:
        """The weight as (2, inner, channels): features of values, and those that gate them."""
        row, inner, channels = weight.stride(0), weight.shape[0] // 2, weight.shape[1]
        shape, strides = [2, inner, channels], [inner * row, row, 1]
        return TensorDescriptor(weight, shape, strides, [2, plan.inner, plan.channels])

    def _multiprocessors(device: torch.device) -> int:
        return 3 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count

    # Not a `triton_op`: what is traced cannot be described, so that compilers take it as it is.
    @custom_op("emt::geglu_linear")
    def _geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return launch(x, weight, bias)

    @_geglu_linear.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
