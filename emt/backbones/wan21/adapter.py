"""Trained parts of a block that takes a reference: low-rank additions and the scaler.

EfficientMT (arXiv 2503.19369, section 3.3) trains temporal projections and a scaler within AnimateDiff. Here the
backbone's projections stay as they are, with additions of low rank (Hu et al. 2021, arXiv 2106.09685), and the scaler
gives the logarithm of how much a reference token counts, so that values are not distorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How much a reference token counts beside an own one before training.
INITIAL_SHARE = math.exp(-1.0)


class LowRank(nn.Module):
    """Linear map of low rank, zero before training."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """(…, channels) → (…, channels), times `share`, which broadcasts, if given."""
        low = self.down(x)
        return self.up(low if share is None else low * share)


class Scaler(nn.Module):
    """Logarithm of how much a reference token counts in each head, from the hidden states of both clips at its place.

    Args:
        channels: of hidden states.
        width: of the layer in between.
        heads: of the attention.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.own = nn.Linear(channels, width)
        self.reference = nn.Linear(channels, width, bias=False)
        self.out = nn.Linear(width, heads)

    def prepare(self, hidden: Tensor) -> Tensor:
        """The reference's part of the first layer: (n, tokens, channels) → (n, tokens, width)."""
        return self.reference(_normalized(hidden))

    def forward(self, hidden: Tensor, prepared: Tensor) -> Tensor:
        """(batch, tokens, channels) of the clip, (batch, tokens, width) prepared → (batch, heads, tokens)."""
        return self.out(F.gelu(self.own(_normalized(hidden)) + prepared, approximate="tanh")).transpose(1, 2)


def _normalized(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:])


class Adapter(nn.Module):
    """Trained parameters of one block.

    Before training, additions are zero and every reference token counts `INITIAL_SHARE`. So a block attends to both
    clips with the backbone's own projections, and a reference equal to the clip changes nothing.

    Args:
        channels: of the transformer.
        heads: of its attention.
        rank: of the additions.
        scaler_channels: width of the scaler's hidden layer.
    """

    def __init__(self, channels: int, heads: int, rank: int, scaler_channels: int) -> None:
        super().__init__()
        self.query = LowRank(channels, rank)
        self.key = LowRank(channels, rank)
        self.value = LowRank(channels, rank)
        self.scaler = Scaler(channels, scaler_channels, heads)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Bring the weights to where training starts."""
        for addition in (self.query, self.key, self.value):
            addition.down.reset_parameters()
            addition.up.weight.zero_()
        self.scaler.own.reset_parameters()
        self.scaler.reference.reset_parameters()
        self.scaler.out.weight.zero_()
        self.scaler.out.bias.fill_(math.log(INITIAL_SHARE))


@dataclass
class PreparedReference:
    """Constants of n references in one block, computed once (`WanMotionTransferTransformer.prepare`)."""

    key: Tensor  # with its addition, rotated to its place: (n, heads, tokens, channels per head)
    value: Tensor  # with its addition, likewise
    scaler: Tensor  # the reference's part of the scaler's first layer: (n, tokens, width)
    strength: Tensor  # added to the scaler's output: (n, 1, 1)
