"""Layers of Wan's transformer: norms and projections, embeddings of the noise level and the prompt, rotation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from emt_kernels.rotated_norm import rotated_norm
from emt_kernels.selection import is_fused

#: Cosines and sines by which queries and keys are turned (Su et al. 2021, arXiv 2104.09864), each (tokens, channels of
#: a head / 2), float32.
Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.RMSNorm):
    """RMS norm whose weight takes the input's dtype: under autocast that is another than its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections of multi-head attention; queries and keys are normed over all heads together."""

    fused: Tensor | None
    fused_bias: Tensor | None

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
        self.register_buffer("fused_bias", None, persistent=False)

    def fuse(self) -> None:
        """Let inference compute query, key and value in one matmul; weights become parts of one tensor, not copies."""
        layers = (self.to_q, self.to_k, self.to_v)
        if self.fused is not None and self.fused.data_ptr() == self.to_q.weight.data_ptr():
            return
        self.fused = torch.cat([layer.weight.data for layer in layers])
        self.fused_bias = torch.cat([layer.bias.data for layer in layers])
        for layer, weight, bias in zip(layers, self.fused.chunk(3), self.fused_bias.chunk(3), strict=True):
            layer.weight.data, layer.bias.data = weight, bias

    def project(self, x: Tensor, rotation: Rotation, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key, normed and turned to their places, and value of the same (batch, tokens, channels).

        Args:
            x: tokens.
            rotation: of their places.
            added: to the query's norm, (batch, tokens, channels).

        Returns:
            Three of (batch, heads, tokens, channels per head).
        """
        if self.fused is None or torch.is_grad_enabled():
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        else:
            query, key, value = F.linear(x, self.fused, self.fused_bias).chunk(3, dim=-1)
        return (
            self._turned(query, self.norm_q, rotation, added),
            self._turned(key, self.norm_k, rotation),
            self.split(value),
        )

    def turned_query(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(batch, tokens, channels) → (batch, heads, tokens, channels per head), normed and turned to its place."""
        return self._turned(self.to_q(x), self.norm_q, rotation)

    def turned_key(self, x: Tensor, rotation: Rotation, added: Tensor | None = None) -> Tensor:
        """Likewise, with something added to its norm, (batch, tokens, channels)."""
        return self._turned(self.to_k(x), self.norm_k, rotation, added)

    def _turned(self, x: Tensor, norm: RMSNorm, rotation: Rotation, added: Tensor | None = None) -> Tensor:
        return self.split(rotated_norm(x, norm.weight, norm.eps, *rotation, added))

    def query(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → (batch, heads, tokens, channels per head), normed."""
        return self.split(self.norm_q(self.to_q(x)))

    def key(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → (batch, heads, tokens, channels per head), normed."""
        return self.split(self.norm_k(self.to_k(x)))

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
        if is_fused(x) and x.dtype != torch.float32:  # cuBLAS computes it where it writes
            flat = torch._addmm_activation(self.proj.bias, x.flatten(0, -2), self.proj.weight.t(), use_gelu=True)
            return flat.view(*x.shape[:-1], -1)
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
