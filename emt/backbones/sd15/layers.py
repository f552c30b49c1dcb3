"""Layers that the network's blocks are made of: norms, projections of attention, feed-forward.

They call the kernels of `emt_kernels`, whose references define them. Parameter names are the published ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt_kernels.geglu import geglu
from emt_kernels.geglu_linear import fuses, geglu_linear
from emt_kernels.group_norm_silu import group_norm_silu
from emt_kernels.layer_norm import layer_norm

#: Tokens that a feed-forward layer takes at once at inference.
FEED_FORWARD_TOKENS = 32_768


def sinusoidal_positions(frames: int, channels: int) -> Tensor:
    """Sinusoidal encoding over time, sine and cosine interleaved (Vaswani et al. 2017, section 3.5).

    Returns:
        (frames, channels), float32.
    """
    time = torch.arange(frames, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, channels, 2, dtype=torch.float32) * (-math.log(10_000.0) / channels))
    positions = torch.zeros(frames, channels)
    positions[:, 0::2] = torch.sin(time * rate)
    positions[:, 1::2] = torch.cos(time * rate)
    return positions


def sinusoids(timestep: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of a timestep (batch,): (batch, channels), float32 (Ho et al. 2020, arXiv 2006.11239)."""
    exponent = -math.log(10_000) * torch.arange(channels // 2, dtype=torch.float32, device=timestep.device)
    phase = timestep[:, None].float() * torch.exp(exponent / (channels // 2))[None]
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)


def tokens_of(images: Tensor) -> Tensor:
    """(frames, channels, height, width) → (frames, height·width, channels); a view of channels-last memory."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def images_of(tokens: Tensor, size: torch.Size) -> Tensor:
    """(…, height·width, channels) → (frames, channels, height, width), the leading dimensions as one."""
    return tokens.flatten(0, -3).unflatten(1, size).permute(0, 3, 1, 2)


def repeated(x: Tensor, copies: int) -> Tensor:
    """So many copies of a batch (n, …), one after the other: (copies·n, …); in the memory format that it has."""
    return x if copies == 1 else torch.cat([x] * copies)


class GroupNorm(nn.GroupNorm):
    """Group norm of each frame, optionally with SiLU after it."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """Norm of ``x + shift``: (frames, channels, height, width), `shift` (frames, channels).

        Channels of `beside` follow those of `x`; the shift is of both.
        """
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, shift, beside)


class LayerNorm(nn.LayerNorm):
    """Layer norm of each token, optionally with the position encoding added."""

    def forward(  # type: ignore[override]
        self, x: Tensor, positions: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Norm of ``x + shift``, plus positions.

        Args:
            x: (…, tokens, channels); (batch, frames, tokens, channels) with `positions`.
            positions: (frames, channels).
            shift: (channels,).
        """
        return layer_norm(x, self.weight, self.bias, self.eps, positions, None, False, shift)[2]

    def with_and_without(self, x: Tensor, positions: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm without positions, and with them."""
        _, plain, positioned = layer_norm(x, self.weight, self.bias, self.eps, positions, None, True, shift)
        assert plain is not None
        return plain, positioned


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution, as checkpoints store it, applied to tokens (…, channels) as the linear map that it is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class FusedQKV(nn.Module):
    """The three projections of a `QKV` in one matmul, which their weights are parts of."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, 3·channels)."""
        return F.linear(x, self.weight)


class QKV(nn.Module):
    """Query, key and value projections without biases; keys and values of `context_channels`.

    `to_qkv`, if it is not None, computes the three at inference.
    """

    to_qkv: FusedQKV | None

    def __init__(self, channels: int, context_channels: int | None = None) -> None:
        super().__init__()
        context_channels = context_channels or channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.register_module("to_qkv", None)

    def fuse(self) -> None:
        """Compute the three in one matmul at inference; the weights become parts of one tensor, not copies of it.

        The query of a cross-attention stays as it is.
        """
        layers = (self.to_q, self.to_k, self.to_v)
        if self.to_q.in_features != self.to_k.in_features:
            return
        if self.to_qkv is not None and self.to_qkv.weight.data_ptr() == self.to_q.weight.data_ptr():
            return
        self.to_qkv = FusedQKV(torch.cat([layer.weight.data for layer in layers]))
        for layer, part in zip(layers, self.to_qkv.weight.chunk(3), strict=True):
            layer.weight.data = part

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of the same (…, channels)."""
        if self.to_qkv is None or torch.is_grad_enabled():
            return self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_qkv(x).chunk(3, dim=-1)


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020): twice the width out of one matmul, one half gating the other."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, inner)."""
        if type(self.proj) is nn.Linear and fuses(x, self.proj.weight):
            return geglu_linear(x, self.proj.weight, self.proj.bias)
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU and a linear layer back, four times the width between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Published names count the dropout between the two: `net.0.proj` and `net.2`.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels).

        Inference takes tokens in parts: at the highest resolution the wide tensor in between is the largest of the
        network, 0.7 GB for a batch with classifier-free guidance of 16 frames at 512×512.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled code takes any number of tokens
            return self.net[2](self.net[0](x))
        parts = [self.net[2](self.net[0](part)) for part in rows_of(x, FEED_FORWARD_TOKENS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


class OwnLayers(nn.Module):
    """Layers that denoising has of its own, at the paths of those whose place they take; the others are not here."""

    def put(self, path: str, layer: nn.Module) -> None:
        """Add a layer."""
        parent: nn.Module = self
        *above, name = path.split(".")
        for step in above:
            if parent._modules.get(step) is None:
                parent.add_module(step, OwnLayers())
            parent = parent._modules[step]  # type: ignore[assignment]
        parent.add_module(name, layer)

    def find(self, path: str) -> nn.Module | None:
        """The layer, or what contains layers, at a path; None if nothing is there."""
        module: nn.Module | None = self
        for step in path.split("."):
            module = None if module is None else module._modules.get(step)
        return module


def rows_of(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Tokens (…, channels) as (rows, channels), at most `count` at a time."""
    return x.reshape(-1, x.shape[-1]).split(count)
