"""Layer normalization in a diffusion transformer: modulated by the noise level, with the gated sum before it.

Peebles and Xie 2022 (arXiv 2212.09748). A block adds what a layer made, times a gate, to its tokens, normalizes the
sum, and scales and shifts the norm by vectors of the noise level. One pass reads each token once; arithmetic is in
float32, between one rounding of the sum and one of the norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, is_fused, untraced


def gated_sum_reference(x: Tensor, added: Tensor, gate: Tensor | None = None) -> Tensor:
    """Plain PyTorch reference of `gated_sum`."""
    return x + added if gate is None else (x + gate[:, None] * added).to(x.dtype)


def gated_sum(x: Tensor, added: Tensor, gate: Tensor | None = None) -> Tensor:
    """Add the output of a layer to tokens, times a gate, in float32.

    Args:
        x: (batch, tokens, channels).
        added: as `x`.
        gate: (batch, channels), float32; None for 1.

    Returns:
        As `x`.

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, added, {"gate": gate})
    return launch(x, added, gate)[0] if is_fused(x) else gated_sum_reference(x, added, gate)


def norm_of_sum_reference(
    x: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    modulated: bool = True,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch reference of `norm_of_sum`."""
    total = x if added is None else gated_sum_reference(x, added, gate)
    normalized = F.layer_norm(total.to(scale.dtype), total.shape[-1:], eps=eps)
    factor = 1 + scale if modulated else scale
    return total, (normalized * factor[:, None] + shift[:, None]).to(x.dtype)


def norm_of_sum(
    x: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    modulated: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalize the channels of every token of ``x + gate · added``, scale and shift them. Has no gradients.

    Args:
        x: (batch, tokens, channels).
        eps: added to the variance.
        scale: (batch, channels) or (1, channels), float32.
        shift: as `scale`.
        added: as `x`; None for nothing.
        gate: (batch, channels), float32; None for 1.
        modulated: whether the norm is multiplied by 1 + `scale`, or by `scale` itself, an affine norm's weight.

    Returns:
        The sum (`x` itself without `added`) and its norm, both as `x`.

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, added, {"scale": scale, "shift": shift, "gate": gate})
    if not is_fused(x):
        return norm_of_sum_reference(x, eps, scale, shift, added, gate, modulated)
    return launch(x, added, gate, scale, shift, eps, modulated)


def _check(x: Tensor, added: Tensor | None, vectors: dict[str, Tensor | None]) -> None:
    if added is not None and added.shape != x.shape:
        raise ValueError(f"added has shape {tuple(added.shape)}, expected {tuple(x.shape)}")
    for name, v in vectors.items():
        if v is not None and v.shape not in ((x.shape[0], x.shape[2]), (1, x.shape[2])):
            raise ValueError(f"{name} has shape {tuple(v.shape)}, expected {(x.shape[0], x.shape[2])}")


if INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _norm_of_sum(
        x,
        added,
        gate,
        scale,
        shift,
        total,
        out,
        tokens,
        channels,
        gate_stride,
        scale_stride,
        shift_stride,
        EPS: tl.constexpr,
        ADDED: tl.constexpr,
        GATE: tl.constexpr,
        NORM: tl.constexpr,
        MODULATED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS tokens of one sample, which share its vectors."""
        sample = tl.program_id(1).to(tl.int64)
        row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
        has = channel < channels
        mask = (row < tokens)[:, None] & has[None, :]
        at = (sample * tokens + row)[:, None] * channels + channel[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if ADDED:
            a = tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
            if GATE:
                a *= tl.load(gate + sample * gate_stride + channel, mask=has, other=0.0)[None, :]
            v = (v + a).to(total.dtype.element_ty)  # the norm is that of the sum as it is kept
            tl.store(total + at, v, mask=mask)
            v = v.to(tl.float32)
        if NORM:
            size = channels * 1.0
            mean = tl.sum(v, axis=1) / size
            difference = tl.where(mask, v - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(difference * difference, axis=1) / size + EPS)
            factor = tl.load(scale + sample * scale_stride + channel, mask=has, other=0.0)
            if MODULATED:
                factor += 1.0
            offset = tl.load(shift + sample * shift_stride + channel, mask=has, other=0.0)
            y = difference * rstd[:, None] * factor[None, :] + offset[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)

    def token_blocks(channels: int) -> tuple[int, int, int]:
        """Lanes, tokens and warps of a program that holds all channels of its tokens."""
        lanes = triton.next_power_of_2(channels)
        return lanes, max(4096 // lanes, 1), 4 if lanes <= 2048 else 8

    def launch(
        x: Tensor,
        added: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        eps: float = 0.0,
        modulated: bool = False,
        rows: int = 0,
        warps: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Run the kernel; the norm is not written without `scale` and `shift`."""
        batch, tokens, channels = x.shape
        x = x.contiguous()
        total = x if added is None else torch.empty_like(x)
        out = total if scale is None else torch.empty_like(x)
        lanes, own_rows, own_warps = token_blocks(channels)
        rows = rows or own_rows
        untraced(_norm_of_sum)[(triton.cdiv(tokens, rows), batch)](
            x=x,
            added=x if added is None else added.contiguous(),
            tokens=tokens,
            channels=channels,
            total=total,
            out=out,
            EPS=eps,
            ADDED=added is not None,
            GATE=gate is not None,
            NORM=scale is not None,
            MODULATED=modulated,
            ROWS=rows,
            LANES=lanes,
            num_warps=warps or own_warps,
            **_vectors(x, gate=gate, scale=scale, shift=shift),
        )
        return total, out

    def _vectors(x: Tensor, **vectors: Tensor | None) -> dict[str, Tensor | int]:
        """Vectors of each sample in dense rows, float32, and their strides; one that all samples share has none."""
        found: dict[str, Tensor | int] = {}
        for name, v in vectors.items():
            if v is not None:
                v = v.float()
                v = v if v.stride(1) == 1 else v.contiguous()
            found[name] = x if v is None else v
            found[f"{name}_stride"] = 0 if v is None or len(v) == 1 else v.stride(0)
        return found
