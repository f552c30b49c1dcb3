"""Layer normalization with the residual add before it and the position encoding after it.

Ba, Kiros and Hinton 2016 (arXiv 1607.06450). A transformer block reads each hidden state once: x + residual is the
next residual, its norm is what the scaler and the motion features take, the norm with positions added is what
temporal attention projects.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, triton_op, use_triton, wrap_triton


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None = None,
    residual: Tensor | None = None,
    plain: bool = True,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Plain PyTorch reference of `layer_norm`."""
    total = x if residual is None else x + residual
    normalized = F.layer_norm(total if shift is None else total + shift, weight.shape, weight, bias, eps)
    positioned = normalized if positions is None else normalized + positions[:, None]
    return total, normalized if plain else None, positioned


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None = None,
    residual: Tensor | None = None,
    plain: bool = True,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalize the channels of every token of ``x + residual``. Gradients take the reference.

    Args:
        x: (…, tokens, channels); (batch, frames, tokens, channels) with `positions`.
        weight: (channels,).
        bias: (channels,).
        eps: added to the variance.
        positions: (frames, channels).
        residual: as `x`.
        plain: whether the norm without positions is wanted, too; it is a third of the memory traffic.
        shift: (channels,), added to the sum that is normalized, but not to the one that is returned: biases of the
            layers that made it.

    Returns:
        The sum ``x + residual`` (`x` itself without a residual), its norm (None unless `plain`), and the norm with the
        positions of its frame added (the norm itself without positions); each as `x`.

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, weight, bias, positions, residual, shift)
    tensors = [t for t in (x, weight, bias, positions, residual, shift) if t is not None]
    if not use_triton(x) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return layer_norm_reference(x, weight, bias, eps, positions, residual, plain, shift)
    outputs = torch.ops.emt.layer_norm(x, weight, bias, eps, positions, residual, plain, shift)
    total = x if residual is None else outputs[0]
    return total, outputs[-2 if positions is not None else -1] if plain else None, outputs[-1]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    residual: Tensor | None,
    shift: Tensor | None,
) -> None:
    for name, vector in (("weight", weight), ("bias", bias), ("shift", shift)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected {tuple(x.shape[-1:])}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}")
    if positions is not None:
        if x.ndim != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, frames, tokens, channels) with positions")
        if positions.shape != (x.shape[1], x.shape[3]):
            raise ValueError(f"positions has shape {tuple(positions.shape)}, expected {(x.shape[1], x.shape[3])}")


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def normalize_rows(
        x,
        residual,
        total,
        shift,
        weight,
        bias,
        at,
        channel,
        channels,
        mask,
        EPS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        SHIFT: tl.constexpr,
    ):
        """The norm, in float32, of rows of ``x + residual``, which go to `total`, plus `shift`."""
        has = channel < channels
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty)  # the norm is that of the sum as it is kept
            tl.store(total + at, v, mask=mask)
            v = v.to(tl.float32)
        if SHIFT:
            v += tl.load(shift + channel, mask=has, other=0.0).to(tl.float32)[None, :]
        # The mean is a value of the row plus the mean difference from it: exactly where all values are the same.
        pivot = tl.sum(tl.where(channel[None, :] == 0, v, 0.0), axis=1)
        size = channels * 1.0
        mean = pivot + tl.sum(tl.where(mask, v - pivot[:, None], 0.0), axis=1) / size
        difference = tl.where(mask, v - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(difference * difference, axis=1) / size + EPS)
        w = tl.load(weight + channel, mask=has, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=has, other=0.0).to(tl.float32)
        return difference * rstd[:, None] * w[None, :] + b[None, :]

    @triton.jit
    def load_positions(positions, row, tokens, frames, channel, channels, mask):
        """Position encodings, in float32, of the frames that rows belong to."""
        frame = (row // tokens % frames).to(tl.int32)
        return tl.load(positions + frame[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _layer_norm_kernel(
        x,
        weight,
        bias,
        positions,
        residual,
        shift,
        total,
        out,
        positioned,
        rows,
        tokens,
        frames,
        channels,
        EPS: tl.constexpr,
        PLAIN: tl.constexpr,
        POSITIONS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        SHIFT: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS tokens, all channels of each, held in registers: read once."""
        first = tl.program_id(0).to(tl.int64) * ROWS
        row, channel = tl.arange(0, ROWS), tl.arange(0, LANES)
        mask = (first + row < rows)[:, None] & (channel < channels)[None, :]
        base = first * channels
        at = row[:, None] * channels + channel[None, :]
        x += base
        residual += base
        total += base
        y = normalize_rows(x, residual, total, shift, weight, bias, at, channel, channels, mask, EPS, RESIDUAL, SHIFT)
        if PLAIN:
            tl.store(out + base + at, y.to(out.dtype.element_ty), mask=mask)
        if POSITIONS:
            y += load_positions(positions, first + row, tokens, frames, channel, channels, mask)
            tl.store(positioned + base + at, y.to(positioned.dtype.element_ty), mask=mask)

    @triton_op("emt::layer_norm")
    def _layer_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        positions: Tensor | None = None,
        residual: Tensor | None = None,
        plain: bool = True,
        shift: Tensor | None = None,
    ) -> list[Tensor]:
        """The sum with a residual, the norm if `plain` or without positions, the norm plus positions with them."""
        _check(x, weight, bias, positions, residual, shift)
        channels = x.shape[-1]
        rows = x.numel() // channels
        tokens, frames = (x.shape[2], x.shape[1]) if positions is not None else (1, 1)
        x = x.contiguous()
        written = residual is not None, plain or positions is None, positions is not None
        outputs = [torch.empty_like(x) for _ in range(sum(written))]
        remaining = iter(outputs)
        total, out, positioned = (next(remaining) if needed else outputs[0] for needed in written)
        lanes = triton.next_power_of_2(channels)
        # Rows of 512 lanes lie within one warp each, which waits for no other: 46 µs for 57 at 131072×320 on an H200.
        block, warps = (2, 1) if lanes == 512 else (max(4096 // lanes, 1), 4 if lanes <= 4096 else 8)
        wrap_triton(_layer_norm_kernel)[(triton.cdiv(rows, block),)](
            x=x,
            weight=weight.contiguous(),
            bias=bias.contiguous(),
            positions=x if positions is None else positions.contiguous(),
            residual=x if residual is None else residual.contiguous(),
            shift=x if shift is None else shift.contiguous(),
            total=total,
            out=out,
            positioned=positioned,
            rows=rows,
            tokens=tokens,
            frames=frames,
            channels=channels,
            EPS=eps,
            RESIDUAL=written[0],
            PLAIN=written[1],
            POSITIONS=written[2],
            SHIFT=shift is not None,
            ROWS=block,
            LANES=lanes,
            num_warps=warps,
        )
        return outputs

    @_layer_norm.register_fake
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        positions: Tensor | None = None,
        residual: Tensor | None = None,
        plain: bool = True,
        shift: Tensor | None = None,
    ) -> list[Tensor]:
        outputs = (residual is not None) + (plain or positions is None) + (positions is not None)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(outputs)]
