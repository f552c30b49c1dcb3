"""Quantization to float8 (e4m3, largest value 448), alone or as the last thing that a norm or a GEGLU does.

Each row of activations, the channels of one token, gets a scale of its own, so that its largest value becomes 448
(Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433). Quantizing by itself reads and writes
memory once more, which costs what the faster matmul gains; a kernel that has the whole row at hand quantizes it for
nothing, and writes half the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emt_kernels.geglu import geglu_reference
from emt_kernels.layer_norm import layer_norm_reference
from emt_kernels.selection import INSTALLED, triton_op, use_triton, wrap_triton

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
#: Rows of zeros, and of numbers too small to divide by, have the scale of this.
SMALLEST = 1e-12


class Quantized(NamedTuple):
    """Rows in float8: ``values · scale``."""

    values: Tensor  # (…, channels), float8
    scale: Tensor  # (…, 1), float32
    exact: Tensor | None = None  # the same as they were, (…, channels), where somebody needs them too

    def dequantize(self) -> Tensor:
        """(…, channels), float32."""
        return self.values.float() * self.scale

    def split(self, rows: int) -> list[Quantized]:
        """Parts of so many rows each, without `exact`."""
        values, scales = self.values.flatten(0, -2).split(rows), self.scale.flatten(0, -2).split(rows)
        return [Quantized(*part) for part in zip(values, scales, strict=True)]


def quantize_rows_reference(x: Tensor) -> Quantized:
    """Plain PyTorch reference of `quantize_rows`."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return Quantized((x / scale).to(FLOAT8), scale)


def quantize_rows(x: Tensor) -> Quantized:
    """Quantize rows of channels. It has no gradients.

    Args:
        x: (…, channels).
    """
    if not use_triton(x):
        return quantize_rows_reference(x)
    return Quantized(*torch.ops.emt.quantize_rows(x))


def geglu_quantized_reference(x: Tensor) -> Quantized:
    """Plain PyTorch reference of `geglu_quantized`."""
    return quantize_rows_reference(geglu_reference(x.float()))


def geglu_quantized(x: Tensor) -> Quantized:
    """`emt_kernels.geglu.geglu`, quantized. It has no gradients.

    Args:
        x: (…, 2·inner).

    Returns:
        Rows of (…, inner).
    """
    if not use_triton(x):
        return geglu_quantized_reference(x)
    return Quantized(*torch.ops.emt.geglu_quantized(x))


def layer_norm_quantized_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None = None,
    residual: Tensor | None = None,
    exact: bool = False,
    shift: Tensor | None = None,
) -> tuple[Tensor, Quantized]:
    """Plain PyTorch reference of `layer_norm_quantized`."""
    total, _, normalized = layer_norm_reference(x, weight, bias, eps, positions, residual, False, shift)
    return total, quantize_rows_reference(normalized)._replace(exact=normalized if exact else None)


def layer_norm_quantized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None = None,
    residual: Tensor | None = None,
    exact: bool = False,
    shift: Tensor | None = None,
) -> tuple[Tensor, Quantized]:
    """`emt_kernels.layer_norm.layer_norm`, quantized. It has no gradients.

    Args:
        x: (…, tokens, channels); (batch, frames, tokens, channels) with `positions`.
        weight: (channels,).
        bias: (channels,).
        eps: added to the variance.
        positions: (frames, channels).
        residual: as `x`.
        exact: whether to return the norm before quantization, too.
        shift: (channels,), added to what is normalized alone.

    Returns:
        The sum ``x + residual`` (`x` itself without a residual), and rows of its norm with positions.
    """
    if not use_triton(x):
        return layer_norm_quantized_reference(x, weight, bias, eps, positions, residual, exact, shift)
    values, scale, *others = torch.ops.emt.layer_norm_quantized(x, weight, bias, eps, positions, residual, exact, shift)
    kept = others.pop() if exact else None
    return others[0] if residual is not None else x, Quantized(values, scale, kept)


if INSTALLED:
    import triton
    import triton.language as tl

    from emt_kernels.geglu import gated
    from emt_kernels.layer_norm import load_positions, normalize_rows

    @triton.jit
    def _store_quantized(v, at, row, inside, mask, values, scale, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
        """Rows `v` of float32, which are 0 outside of `mask`, and their scales."""
        largest = tl.max(tl.abs(v), axis=1)
        # A NaN must not be lost: the maximum leaves it out, the sum does not.
        total = tl.sum(tl.where(mask, v, 0.0), axis=1)
        s = tl.where(total == total, tl.maximum(largest, SMALLEST), total) / LARGEST
        tl.store(scale + row, s, mask=inside)
        tl.store(values + at, (v / s[:, None]).to(values.dtype.element_ty), mask=mask)

    @triton.jit
    def _quantize_rows_kernel(
        x,
        values,
        scale,
        rows,
        channels,
        LARGEST: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS rows, held in registers: read once."""
        row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
        inside = row < rows
        mask = inside[:, None] & (channel < channels)[None, :]
        at = row[:, None] * channels + channel[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        _store_quantized(v, at, row, inside, mask, values, scale, LARGEST, SMALLEST)

    @triton.jit
    def _geglu_quantized_kernel(
        x,
        values,
        scale,
        rows,
        inner,
        LARGEST: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS rows of both halves, held in registers: read once."""
        row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
        inside = row < rows
        mask = inside[:, None] & (channel < inner)[None, :]
        first = row[:, None] * 2 * inner + channel[None, :]
        h = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(x + first + inner, mask=mask, other=0.0).to(tl.float32)
        v = gated(h, gate)
        at = row[:, None] * inner + channel[None, :]
        _store_quantized(v, at, row, inside, mask, values, scale, LARGEST, SMALLEST)

    @triton.jit
    def _layer_norm_quantized_kernel(
        x,
        weight,
        bias,
        positions,
        residual,
        shift,
        total,
        exact,
        values,
        scale,
        rows,
        tokens,
        frames,
        channels,
        EPS: tl.constexpr,
        POSITIONS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        SHIFT: tl.constexpr,
        EXACT: tl.constexpr,
        LARGEST: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS tokens, all channels of each, held in registers: read once."""
        row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
        inside = row < rows
        mask = inside[:, None] & (channel < channels)[None, :]
        at = row[:, None] * channels + channel[None, :]
        y = normalize_rows(x, residual, total, shift, weight, bias, at, channel, channels, mask, EPS, RESIDUAL, SHIFT)
        if POSITIONS:
            y += load_positions(positions, row, tokens, frames, channel, channels, mask)
        if EXACT:
            tl.store(exact + at, y.to(exact.dtype.element_ty), mask=mask)
        _store_quantized(y, at, row, inside, mask, values, scale, LARGEST, SMALLEST)

    def _plan(rows: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
        """Grid and options of a launch that holds whole rows in registers."""
        lanes = triton.next_power_of_2(channels)
        block = max(2048 // lanes, 1)
        warps = min(max(lanes // 512, 4), 16)
        return (triton.cdiv(rows, block),), {"ROWS": block, "LANES": lanes, "num_warps": warps}

    def _outputs(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        shape = x.shape[:-1]
        return x.new_empty((*shape, channels), dtype=FLOAT8), x.new_empty((*shape, 1), dtype=torch.float32)

    _BOUNDS = {"LARGEST": LARGEST, "SMALLEST": SMALLEST}

    @triton_op("emt::quantize_rows")
    def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        x, channels = x.contiguous(), x.shape[-1]
        values, scale = _outputs(x, channels)
        rows = x.numel() // channels
        grid, plan = _plan(rows, channels)
        wrap_triton(_quantize_rows_kernel)[grid](
            x=x, values=values, scale=scale, rows=rows, channels=channels, **_BOUNDS, **plan
        )
        return values, scale

    @_quantize_rows.register_fake
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return _outputs(x, x.shape[-1])

    @triton_op("emt::geglu_quantized")
    def _geglu_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        x, inner = x.contiguous(), x.shape[-1] // 2
        values, scale = _outputs(x, inner)
        rows = x.numel() // (2 * inner)
        grid, plan = _plan(rows, inner)
        wrap_triton(_geglu_quantized_kernel)[grid](
            x=x, values=values, scale=scale, rows=rows, inner=inner, **_BOUNDS, **plan
        )
        return values, scale

    @_geglu_quantized.register_fake
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return _outputs(x, x.shape[-1] // 2)

    @triton_op("emt::layer_norm_quantized")
    def _layer_norm_quantized(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        positions: Tensor | None = None,
        residual: Tensor | None = None,
        exact: bool = False,
        shift: Tensor | None = None,
    ) -> list[Tensor]:
        """Values, scale, the sum with a residual, the norm itself if `exact`."""
        x, channels = x.contiguous(), x.shape[-1]
        outputs = [*_outputs(x, channels), *(torch.empty_like(x) for _ in range((residual is not None) + exact))]
        tokens, frames = (x.shape[2], x.shape[1]) if positions is not None else (1, 1)
        rows = x.numel() // channels
        grid, plan = _plan(rows, channels)
        wrap_triton(_layer_norm_quantized_kernel)[grid](
            x=x,
            weight=weight.contiguous(),
            bias=bias.contiguous(),
            positions=x if positions is None else positions.contiguous(),
            residual=x if residual is None else residual.contiguous(),
            shift=x if shift is None else shift.contiguous(),
            total=outputs[2] if residual is not None else x,
            exact=outputs[-1] if exact else x,
            values=outputs[0],
            scale=outputs[1],
            rows=rows,
            tokens=tokens,
            frames=frames,
            channels=channels,
            EPS=eps,
            POSITIONS=positions is not None,
            RESIDUAL=residual is not None,
            SHIFT=shift is not None,
            EXACT=exact,
            **_BOUNDS,
            **plan,
        )
        return outputs

    @_layer_norm_quantized.register_fake
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        positions: Tensor | None = None,
        residual: Tensor | None = None,
        exact: bool = False,
        shift: Tensor | None = None,
    ) -> list[Tensor]:
        like = [torch.empty_like(x, memory_format=torch.contiguous_format)] * ((residual is not None) + exact)
        return [*_outputs(x, x.shape[-1]), *(torch.empty_like(t) for t in like)]
