"""Layers of Wan's transformer: norms and projections, embeddings of the noise level and the prompt, rotation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

#: Cosines and sines by which queries and keys are turned, each (tokens, channels of a head / 2), float32.
Rotation = tuple[Tensor, Tensor]


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, and passed on in it."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels), float32."""
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm whose weight takes the input's dtype: under autocast that is another than its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections of multi-head attention; queries and keys are normed over all heads together."""

    fused: Tensor | None

    def __init__(self, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.norm_q = RMSNorm(channels, eps=eps)
        self.norm_k = RMSNorm(channels, eps=eps)
        self.register_buffer("fused", None, persistent=False)

    def fuse(self) -> None:
        """Let inference compute query, key and value in one matmul; weights become parts of one tensor, not copies."""
        layers = (self.to_q, self.to_k, self.to_v)
        if self.fused is not None and self.fused.data_ptr() == self.to_q.weight.data_ptr():
            return
        self.fused = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, self.fused.chunk(3), strict=True):
            layer.weight.data = part

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key, both normed, and value of the same (batch, tokens, channels)."""
        if self.fused is None or torch.is_grad_enabled():
            return self.query(x), self.key(x), self.to_v(x)
        bias = torch.cat([self.to_q.bias, self.to_k.bias, self.to_v.bias])
        query, key, value = F.linear(x, self.fused, bias).chunk(3, dim=-1)
        return self.norm_q(query), self.norm_k(key), value

    def query(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → the same, normed."""
        return self.norm_q(self.to_q(x))

    def key(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → the same, normed."""
        return self.norm_k(self.to_k(x))

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → (batch, heads, tokens, channels per head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def out(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, channels per head) → (batch, tokens, channels)."""
        return self.to_out[0](x.transpose(1, 2).flatten(2))


class GELUProjection(nn.Module):
    """Linear layer and GELU, in its approximation by tanh."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, inner)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        # Published names count the dropout between the two: `net.0.proj` and `net.2`.
        self.net = nn.Sequential(GELUProjection(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """(batch, tokens, channels) → the same; inference takes at most `tokens` at once."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or math.prod(x.shape[:2]) <= tokens:
            return self.net(x)
        return torch.cat([self.net(part) for part in x.flatten(0, 1).split(tokens)]).view(x.shape)


class TwoLayers(nn.Module):
    """Linear layer, activation, linear layer."""

    def __init__(self, in_channels: int, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.activation = activation
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_channels) → (…, channels)."""
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Embeddings of the noise level and of the prompt."""

    def __init__(self, channels: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, channels, nn.SiLU())
        self.time_proj = nn.Linear(channels, 6 * channels)
        self.text_embedder = TwoLayers(text_dim, channels, nn.GELU(approximate="tanh"))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps (batch,) → (batch, channels) for the last norm, and (batch, 6, channels) for the blocks."""
        waves = get_timestep_embedding(timestep, self.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        return time, self.time_proj(F.silu(time)).unflatten(1, (6, -1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of channels by angles that grow with a token's place (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: (batch, heads, tokens, channels).
        rotation: cosines and sines, each (tokens, channels/2), float32.
    """
    cos, sin = rotation
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def rotation_of(grid: tuple[int, int, int], channels: int, device: torch.device) -> Rotation:
    """Rotations of a grid of tokens: two thirds of the channels turn with rows and columns, the others with frames.

    Args:
        grid: frames, height and width in patches.
        channels: of a head.
        device: to compute on.
    """
    spatial = channels // 6
    pairs = (channels // 2 - 2 * spatial, spatial, spatial)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    angles = []
    for axis, (size, n) in enumerate(zip(grid, pairs, strict=True)):
        rates = 1e4 ** -(torch.arange(n, dtype=dtype, device=device) / n)
        shape = [1, 1, 1, n]
        shape[axis] = size
        places = torch.arange(size, dtype=dtype, device=device)
        angles.append(torch.outer(places, rates).view(shape).expand(*grid, n))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos().float(), table.sin().float()
