"""Temporal integration: attention over time to a clip's own frames and a reference's frames.

EfficientMT (arXiv 2503.19369), section 3.3: the queries of a pixel are its F own frames, its keys and values are
the F own frames followed by the F reference frames, scaled by the scale map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# CUDA's fused attention kernels put the batch on a grid axis of 65,535 blocks.
_MAX_ATTENTION_BATCH = 65_535


def temporal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    reference_key: Tensor | None = None,
    reference_value: Tensor | None = None,
    position_key: Tensor | None = None,
    position_value: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attend over time at every pixel, to the clip's own frames and, if given, to the reference's.

    The reference's keys are ``scale · reference_key + position_key`` (values alike): linear in the scale map,
    so that the projections of the reference are constants of a clip.

    Args:
        query: (batch, frames, tokens, channels), tokens being height·width; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        heads: attention heads; divides channels.
        reference_key: (n, reference frames, tokens, channels); n divides batch, sample i uses reference i mod n.
        reference_value: as `reference_key`.
        position_key: (reference frames, channels).
        position_value: as `position_key`.
        scale: (batch, reference frames, tokens).
        attend: softmax attention of queries, keys and values, each (pixels, heads, frames, channels/heads).

    Returns:
        (batch, frames, tokens, channels).
    """
    batch, _, tokens, _ = query.shape
    if reference_key is not None:
        assert reference_value is not None
        assert position_key is not None
        assert position_value is not None
        assert scale is not None
        n = reference_key.shape[0]
        s = scale.unflatten(0, (batch // n, n)).unsqueeze(-1)  # (batch/n, n, frames, tokens, 1)
        key = torch.cat([key, (s * reference_key + position_key[:, None]).flatten(0, 1)], dim=1)
        value = torch.cat([value, (s * reference_value + position_value[:, None]).flatten(0, 1)], dim=1)

    def per_pixel(x: Tensor) -> Tensor:  # (batch·tokens, heads, frames, channels/heads)
        return x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    q, k, v = per_pixel(query), per_pixel(key), per_pixel(value)
    if q.shape[0] > _MAX_ATTENTION_BATCH:
        parts = zip(*(x.split(_MAX_ATTENTION_BATCH) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*part) for part in parts])
    else:
        out = attend(q, k, v)
    return out.unflatten(0, (batch, tokens)).permute(0, 3, 1, 2, 4).flatten(3)
