"""EfficientMT's additions to AnimateDiff: motion modules with a scaler and the temporal integration.

Everything here works on tokens: (batch, frames, height·width, channels), the channels-last memory of the
convolutions around it, so that neither spatial nor temporal attention needs a permuted copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbones.sd15.layers import (
    QKV,
    FeedForward,
    GroupNorm,
    LayerNorm,
    images_of,
    sinusoidal_positions,
    tokens_of,
)
from emt_kernels.scale_map import gelu_of_sum, scale_map
from emt_kernels.selection import is_fused
from emt_kernels.temporal_attention import temporal_attention


@dataclass
class PreparedReference:
    """Constants of n references in one temporal attention, computed once (`TemporalAttention.prepare`).

    With s the scale of a token, f its feature and p its position: ``W(s·f + p) = s·(W f) + W p``.
    """

    key: Tensor  # W_k f: (n, frames, tokens, channels)
    value: Tensor  # W_v f: (n, frames, tokens, channels)
    position_key: Tensor  # W_k p: (frames, channels)
    position_value: Tensor  # W_v p: (frames, channels)
    scaler: Tensor  # the reference's part of the scaler's first layer: (n, frames, channels/4, height, width)


torch.export.register_dataclass(PreparedReference)

#: What the two temporal attentions of a block need of references.
Reference = tuple[PreparedReference, PreparedReference]


class Scaler(nn.Module):
    """Scale map of the reference: which tokens carry motion (EfficientMT, section 3.3).

    Convolutions over [clip features, reference features] along channels, with a sinusoidal encoding over time of
    double width: 3×3 2C → C/4, GELU, 3×3 C/4 → C/16, GELU, 3×3 C/16 → 1, then ``sigmoid(x − 5)``.
    """

    positions: Tensor

    def __init__(self, channels: int, max_frames: int) -> None:
        super().__init__()
        middle, narrow = max(channels // 4, 1), max(channels // 16, 1)
        self.spatial_convs = nn.ModuleList(
            [
                nn.Conv2d(2 * channels, middle, 3, padding=1),
                nn.Conv2d(middle, narrow, 3, padding=1),
                nn.Conv2d(narrow, 1, 3, padding=1),
            ]
        )
        self.register_buffer("positions", sinusoidal_positions(max_frames, 2 * channels), persistent=False)

    def _half(self, x: Tensor, height: int, width: int, first: bool, weight: Tensor | None = None) -> Tensor:
        # The first convolution is linear, so that the clip's half and the reference's can be computed apart.
        conv, channels = self.spatial_convs[0], x.shape[3]
        if weight is None:
            weight = self.weight_of_clip() if first else conv.weight[:, channels:]
        image = x.flatten(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return F.conv2d(image, weight, None if first else conv.bias, padding=1)

    def weight_of_clip(self) -> Tensor:
        """The part of the first convolution's weight that meets the clip: (channels/4, channels, 3, 3), a view."""
        weight = self.spatial_convs[0].weight
        return weight[:, : weight.shape[1] // 2]

    def prepare(self, feature: Tensor, added: Tensor) -> Tensor:
        """All that the first convolution adds to the clip's half.

        Args:
            feature: of the reference, (n, frames, height, width, channels).
            added: position encoding that the clip's features come with, (frames, channels).

        Returns:
            (n, frames, channels/4, height, width).
        """
        n, frames, height, width, channels = feature.shape
        own, positions = self.positions[:frames].split(channels, dim=1)
        prepared = self._half(feature.flatten(2, 3) + positions[:, None], height, width, first=False)
        # The clip's features have the attention's encoding where they should have the scaler's own.
        # It is the same at all pixels but those of the border, as in images of three by three.
        rows, columns = (torch.arange(size, device=feature.device) for size in (height, width))
        small = [min(size, 3) for size in (height, width)]
        missing = (own - added)[None, :, None].expand(1, frames, small[0] * small[1], channels)
        correction = self._half(missing, *small, first=True)
        for dim, places, size in ((2, rows, height), (3, columns, width)):
            if size > 3:
                places = torch.where(places == size - 1, 2, places.clamp(max=1))
                correction = correction.index_select(dim, places)
        return prepared.unflatten(0, (n, frames)) + correction

    def forward(self, x: Tensor, prepared: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scale of every reference token for clips `x`.

        Args:
            x: the clip's layer-normed features with the attention's position encoding, (batch, frames, tokens,
                channels).
            prepared: the rest of the first convolution, (n, frames, channels/4, height, width); n divides batch.
            weight: `weight_of_clip`, if it is at hand in memory of its own, which convolutions copy it to.

        Returns:
            (batch, frames, tokens), between 0 and 1.
        """
        batch, n, (height, width) = x.shape[0], prepared.shape[0], prepared.shape[3:]
        own = self._half(x, height, width, True, weight)
        middle, last = self.spatial_convs[1:]
        if is_fused(own):
            h = gelu_of_sum(own, prepared.flatten(0, 1))
            h = gelu_of_sum(F.conv2d(h, middle.weight, padding=1), middle.bias[None, :, None, None])
            return scale_map(h, last.weight, last.bias).unflatten(0, (batch, -1))
        h = F.gelu((own.unflatten(0, (batch // n, n, -1)) + prepared).flatten(0, 2))
        # The 5 goes into the bias: subtracted afterwards, it would cost bfloat16 the digits of a small difference.
        h = F.conv2d(F.gelu(middle(h)), last.weight, last.bias - 5, padding=1)
        return torch.sigmoid(h).flatten(1).unflatten(0, (batch, -1))


class TemporalAttention(QKV):
    """Attention over time at every pixel, which may see [own frames, scale · reference frames].

    EfficientMT, section 3.3, temporal integration. `adapter` has the projections that denoising has of its own
    (`MotionTransferNetwork.denoiser`); the backbone's read the reference.
    """

    positions: Tensor

    def __init__(self, channels: int, heads: int, max_frames: int, adapter: bool) -> None:
        super().__init__(channels)
        self.heads = heads
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.adapter = QKV(channels) if adapter else None
        self.register_buffer("positions", sinusoidal_positions(max_frames, channels), persistent=False)

    def prepare(self, feature: Tensor, scaler: Tensor) -> PreparedReference:
        """Project the reference's feature, (n, frames, height, width, channels), once."""
        feature = feature.flatten(2, 3)
        # The positions of the reference part start again at 0.
        positions = self.positions[: feature.shape[1]].to(feature.dtype)
        return PreparedReference(
            self.to_k(feature), self.to_v(feature), self.to_k(positions), self.to_v(positions), scaler
        )

    def attend(self, x: Tensor, reference: PreparedReference | None, scale: Tensor | None) -> Tensor:
        """Attention before `to_out`: (batch, frames, tokens, channels) with positions → the same.

        `scale` is (batch, frames, tokens).
        """
        q, k, v = self.project(x)
        if reference is None:
            return temporal_attention(q, k, v, self.heads)
        given = reference.key, reference.value, reference.position_key, reference.position_value
        return temporal_attention(q, k, v, self.heads, *given, scale)

    def forward(self, x: Tensor, reference: PreparedReference | None, scale: Tensor | None) -> Tensor:
        """(batch, frames, tokens, channels) with positions → the same."""
        return self.to_out[0](self.attend(x, reference, scale))

    def attention_map(self, feature: Tensor) -> Tensor:
        """Attention of a clip's frames to each other, from the feature that stands before it.

        Args:
            feature: (batch, frames, height, width, channels).

        Returns:
            (batch, height·width, heads, frames, frames), float32; rows sum to 1.
        """
        x = feature.flatten(2, 3)
        x = x + self.positions[: x.shape[1], None].to(x.dtype)
        q, k = (
            project(x).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1, 4).float()
            for project in (self.to_q, self.to_k)
        )
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


class TemporalTransformerBlock(nn.Module):
    """Two temporal attentions, or another number, and a feed-forward layer; one scaler serves all attentions."""

    def __init__(self, channels: int, heads: int, max_frames: int, adapter: bool, attentions: int = 2) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            [TemporalAttention(channels, heads, max_frames, adapter) for _ in range(attentions)]
        )
        self.norms = nn.ModuleList([LayerNorm(channels) for _ in range(attentions)])
        self.ff = FeedForward(channels)
        self.ff_norm = LayerNorm(channels)
        self.scaler = Scaler(channels, max_frames) if adapter else None

    def forward(self, x: Tensor, reference: Reference | None, features: list[Tensor] | None) -> Tensor:
        """(batch, frames, tokens, channels) → the same.

        A reference pass gives a list of `features`, which the norms before the attentions are appended to.
        """
        for i, (attention, norm) in enumerate(zip(self.attention_blocks, self.norms, strict=True)):
            positions = attention.positions[: x.shape[1]]
            if features is not None:
                feature, h = norm.with_and_without(x, positions)
                features.append(feature)
            else:
                h = norm(x, positions)
            x = x + attention(h, *self.scaled(h, reference, i))
        return x + self.ff(self.ff_norm(x))

    def scaled(
        self, h: Tensor, reference: Reference | None, i: int, weight: Tensor | None = None
    ) -> tuple[PreparedReference | None, Tensor | None]:
        """The reference that attention `i` sees and the scale of its tokens, for a norm with positions.

        `weight` is as in `Scaler.forward`.
        """
        if reference is None:
            return None, None
        return reference[i], self.scaler(h, reference[i].scaler, weight)


class TemporalTransformer(nn.Module):
    """Group norm, projection in, temporal transformer block, projection out, residual."""

    def __init__(
        self, channels: int, heads: int, groups: int, max_frames: int, adapter: bool, attentions: int = 2
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        block = TemporalTransformerBlock(channels, heads, max_frames, adapter, attentions)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, frames: int, reference: Reference | None, features: list[Tensor] | None) -> Tensor:
        """(batch·frames, channels, height, width) → the same; `features` as `TemporalTransformerBlock` appends them."""
        # Normed per frame: the published network folds frames into the batch here.
        h = self.proj_in(tokens_of(self.norm(x)).unflatten(0, (-1, frames)))
        h = self.transformer_blocks[0](h, reference, features)
        return x + images_of(self.proj_out(h), x.shape[2:])


class MotionModule(nn.Module):
    """AnimateDiff's motion module (Guo et al. 2023), with the temporal integration where `adapter` is set.

    `path` is the module's own name in the network, the key of its layer in `MotionFeatures`.
    """

    def __init__(
        self, path: str, channels: int, heads: int, groups: int, max_frames: int, adapter: bool, attentions: int = 2
    ) -> None:
        super().__init__()
        self.path = path
        self.temporal_transformer = TemporalTransformer(channels, heads, groups, max_frames, adapter, attentions)

    @property
    def block(self) -> TemporalTransformerBlock:
        """Its transformer block."""
        return self.temporal_transformer.transformer_blocks[0]  # type: ignore[return-value]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (within this module) and parameters of what EfficientMT trains: adapter projections and scaler."""
        for name, parameter in self.named_parameters():
            if ".adapter." in name or ".scaler." in name:
                yield name, parameter

    def prepare(self, features: tuple[Tensor, ...]) -> Reference:
        """Constants of a reference for denoising, from its two features (n, frames, height, width, channels)."""
        first, second = (
            attention.prepare(feature, self.block.scaler.prepare(feature, attention.positions[: feature.shape[1]]))
            for attention, feature in zip(self.block.attention_blocks, features, strict=True)
        )
        return first, second

    def forward(
        self, x: Tensor, frames: int, reference: Reference | None = None, features: list[Tensor] | None = None
    ) -> Tensor:
        """(batch·frames, channels, height, width) → the same.

        Args:
            x: images.
            frames: that follow each other.
            reference: what `prepare` returned, of the same frames, height and width.
            features: a list that a reference pass has its two features appended to, each (batch, frames, tokens,
                channels).
        """
        return self.temporal_transformer(x, frames, reference, features)
