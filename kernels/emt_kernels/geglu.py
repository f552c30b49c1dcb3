"""Gated GELU of the feed-forward layers (Shazeer 2020, arXiv 2002.05202), after their first matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, triton_op, use_triton, wrap_triton


def geglu_reference(x: Tensor) -> Tensor:
    """Plain PyTorch reference of `geglu`."""
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels times the exact GELU of the second. Gradients take the reference.

    Args:
        x: (…, 2·inner).

    Returns:
        (…, inner).

    Raises:
        ValueError: for an odd number of channels.
    """
    _check(x)
    if not use_triton(x) or (torch.is_grad_enabled() and x.requires_grad):
        return geglu_reference(x)
    return torch.ops.emt.geglu(x)


def _check(x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected an even number of channels")


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def gated(h, gate):
        """`h` times the exact GELU of `gate`, all float32."""
        return h * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))

    @triton.jit
    def _geglu_kernel(x, out, rows, inner, ROWS: tl.constexpr, LANES: tl.constexpr):
        """ROWS tokens of LANES channels of both halves."""
        runs = tl.cdiv(inner, LANES)
        program = tl.program_id(0)
        first = (program // runs).to(tl.int64) * ROWS
        row = tl.arange(0, ROWS)
        channel = program % runs * LANES + tl.arange(0, LANES)
        mask = (first + row < rows)[:, None] & (channel < inner)[None, :]
        x += first * 2 * inner
        at = row[:, None] * 2 * inner + channel[None, :]
        h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(x + inner + at, mask=mask, other=0.0).to(tl.float32)
        y = gated(h, gate)
        tl.store(out + first * inner + row[:, None] * inner + channel[None, :], y.to(out.dtype.element_ty), mask=mask)

    @triton_op("emt::geglu")
    def _geglu(x: Tensor) -> Tensor:
        _check(x)
        x = x.contiguous()
        inner = x.shape[-1] // 2
        rows = x.numel() // (2 * inner)
        out = x.new_empty((*x.shape[:-1], inner))
        # The longest rows that leave no lane idle at the end, up to 2 KiB of float16.
        lanes = min(max(inner & -inner, 256), 1024, triton.next_power_of_2(inner))
        block = 2048 // lanes
        grid = (triton.cdiv(rows, block) * triton.cdiv(inner, lanes),)
        wrap_triton(_geglu_kernel)[grid](x=x, out=out, rows=rows, inner=inner, ROWS=block, LANES=lanes, num_warps=4)
        return out

    @_geglu.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
