"""RMS normalization of queries and keys, and their rotation by place, in one pass of memory.

Zhang and Sennrich 2019 (arXiv 1910.07467), Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, is_fused, untraced


def rotated_norm_reference(
    x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, added: Tensor | None = None
) -> Tensor:
    """Plain PyTorch reference of `rotated_norm`."""
    y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    y = y if added is None else y + added
    a, b = y.unflatten(-1, (-1, cosines.shape[1], 2)).unbind(-1)
    cos, sin = cosines[:, None], sines[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-3).to(x.dtype)


def rotated_norm(
    x: Tensor, weight: Tensor, eps: float, cosines: Tensor, sines: Tensor, added: Tensor | None = None
) -> Tensor:
    """Normalize tokens over all heads together, and turn pairs of channels of each head. Has no gradients.

    Arithmetic is in float32, with one rounding at the end.

    Args:
        x: (batch, tokens, channels); rows need not follow each other without a gap.
        weight: (channels,).
        eps: added to the mean square.
        cosines: of the angles, (tokens, channels of a head / 2), float32.
        sines: likewise.
        added: as `x`, after the norm and before the rotation.

    Returns:
        (batch, tokens, channels).

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    _check(x, weight, cosines, sines, added)
    if not is_fused(x):
        return rotated_norm_reference(x, weight, eps, cosines, sines, added)
    return launch(x, weight, eps, cosines, sines, added)


def _check(x: Tensor, weight: Tensor, cosines: Tensor, sines: Tensor, added: Tensor | None) -> None:
    tokens, channels = x.shape[1:]
    if weight.shape != (channels,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(channels,)}")
    if added is not None and added.shape != x.shape:
        raise ValueError(f"added has shape {tuple(added.shape)}, expected {tuple(x.shape)}")
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table.ndim != 2 or table.shape[0] != tokens or channels % (2 * table.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, expected {tokens} rows of half the channels of a head, "
                f"which divide {channels}"
            )


if INSTALLED:
    import triton
    import triton.language as tl

    from emt_kernels.modulated_norm import token_blocks

    @triton.jit
    def _rotated_norm(
        x,
        weight,
        added,
        cosines,
        sines,
        out,
        tokens,
        channels,
        sample_stride,
        row_stride,
        pairs,
        EPS: tl.constexpr,
        ADDED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """ROWS tokens of one sample, all heads of each, of which every one turns `pairs` pairs of channels."""
        sample = tl.program_id(1).to(tl.int64)
        row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
        has = channel < channels
        mask = (row < tokens)[:, None] & has[None, :]
        x += sample * sample_stride
        v = tl.load(x + row.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / (channels * 1.0) + EPS)
        w = tl.load(weight + channel, mask=has, other=0.0).to(tl.float32)
        v = v * scale[:, None] * w[None, :]
        at = (sample * tokens + row)[:, None] * channels + channel[None, :]
        if ADDED:
            v += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(v, (ROWS, LANES // 2, 2)))
        pair = tl.arange(0, LANES // 2)
        turned = (row < tokens)[:, None] & (pair < channels // 2)[None, :]
        angle = row[:, None] * pairs + (pair % pairs)[None, :]
        cos = tl.load(cosines + angle, mask=turned, other=0.0)
        sin = tl.load(sines + angle, mask=turned, other=0.0)
        y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, LANES))
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)

    def launch(
        x: Tensor,
        weight: Tensor,
        eps: float,
        cosines: Tensor,
        sines: Tensor,
        added: Tensor | None = None,
        rows: int = 0,
        warps: int = 0,
    ) -> Tensor:
        """Run the kernel."""
        batch, tokens, channels = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        out = x.new_empty((batch, tokens, channels))
        lanes, own_rows, own_warps = token_blocks(channels)
        rows = rows or own_rows
        untraced(_rotated_norm)[(triton.cdiv(tokens, rows), batch)](
            x=x,
            weight=weight.contiguous(),
            added=x if added is None else added.contiguous(),
            cosines=cosines.contiguous(),
            sines=sines.contiguous(),
            out=out,
            tokens=tokens,
            channels=channels,
            sample_stride=x.stride(0),
            row_stride=x.stride(1),
            pairs=cosines.shape[1],
            EPS=eps,
            ADDED=added is not None,
            ROWS=rows,
            LANES=lanes,
            num_warps=warps or own_warps,
        )
        return out
