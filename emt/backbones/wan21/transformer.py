"""The diffusion transformer of Wan 2.1, top to bottom, in which some blocks take a reference's motion.

A clip's latents are cut into patches of 1×2×2, one token each, frame by frame. Every block has self-attention over all
tokens of the clip, cross-attention to the prompt and a feed-forward layer; norms are modulated by the noise level
(Peebles and Xie 2022, arXiv 2212.09748). Parameter names are those of diffusers' `WanTransformer3DModel`; what is
trained is under `blocks.N.adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from emt.backbones.wan21.adapter import Adapter, PreparedReference
from emt.backbones.wan21.attention import attention, attention_with_reference

Rotation = tuple[Tensor, Tensor]


@dataclass
class TextFeatures:
    """Cross-attention keys and values of prompts, constants over steps.

    `layers` maps the path of a block to its keys and values, each (batch, heads, tokens, channels per head).
    """

    layers: dict[str, tuple[Tensor, Tensor]]


@dataclass
class MotionFeatures:
    """The motion of n references: what `WanMotionTransferTransformer.encode_reference` read in one pass over them.

    `layers` maps the path of a block that takes the reference to the hidden states that its self-attention projects,
    (n, frames, height, width, channels) in patches. Keys and values are linear maps of them, which `prepare` computes:
    kept in their stead, a motion is a third as large.
    """

    layers: dict[str, Tensor]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MotionFeatures:
        """The same features on another device or in another dtype."""
        return MotionFeatures({path: hidden.to(device, dtype) for path, hidden in self.layers.items()})


@dataclass
class PreparedMotion:
    """A reference's motion, ready for denoising, by path of the blocks that take it."""

    layers: dict[str, PreparedReference]


for _dataclass in (TextFeatures, MotionFeatures, PreparedReference, PreparedMotion):
    torch.export.register_dataclass(_dataclass)


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, and passed on in it."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels), float32."""
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Projections of multi-head attention; queries and keys are normed over all heads together."""

    def __init__(self, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.norm_q = nn.RMSNorm(channels, eps=eps)
        self.norm_k = nn.RMSNorm(channels, eps=eps)

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

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, channels)."""
        return self.net(x)


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; `path` is its own name, the key of its features.

    With an adapter, self-attention takes a reference.
    """

    def __init__(self, path: str, channels: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.path = path
        self.norm1 = Float32LayerNorm(channels, eps, elementwise_affine=False)
        self.attn1 = Attention(channels, heads, eps)
        self.norm2 = Float32LayerNorm(channels, eps)
        self.attn2 = Attention(channels, heads, eps)
        self.norm3 = Float32LayerNorm(channels, eps, elementwise_affine=False)
        self.ffn = FeedForward(channels, inner)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, channels) / channels**0.5)
        self.adapter: Adapter | None = None

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded prompts: (batch, tokens, channels) → two (batch, heads, tokens, …)."""
        return self.attn2.split(self.attn2.key(text)), self.attn2.split(self.attn2.to_v(text))

    def prepare(self, hidden: Tensor, rotation: Rotation, strength: Tensor) -> PreparedReference:
        """Constants of references for all steps, from hidden states (n, tokens, channels) and strengths (n, 1, 1)."""
        attn, adapter = self.attn1, self.adapter
        return PreparedReference(
            key=rotate(attn.split(attn.key(hidden) + adapter.key(hidden)), rotation),
            value=attn.split(attn.to_v(hidden) + adapter.value(hidden)),
            scaler=adapter.scaler.prepare(hidden),
            strength=strength,
        )

    def self_attention(
        self, h: Tensor, rotation: Rotation, reference: PreparedReference | None, frames: int, neighbours: int | None
    ) -> Tensor:
        """(batch, tokens, channels) → the same, by attention to the clip's own tokens and those of a reference."""
        attn = self.attn1
        query, key, value = attn.query(h), rotate(attn.split(attn.key(h)), rotation), attn.split(attn.to_v(h))
        if reference is None:
            return attn.out(attention(rotate(attn.split(query), rotation), key, value))
        query = rotate(attn.split(query + self.adapter.query(h)), rotation)
        r = [_repeated(t, len(h)) for t in (reference.key, reference.value, reference.scaler, reference.strength)]
        bias = self.adapter.scaler(h, r[2]) + r[3]
        return attn.out(attention_with_reference(query, key, value, r[0], r[1], bias, frames, neighbours))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        rotation: Rotation,
        reference: PreparedReference | None,
        frames: int,
        neighbours: int | None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, tokens, channels) → the same, and the hidden states that self-attention projects.

        Args:
            x: tokens. What is modulated and what is added to them is computed in float32.
            modulation: of the noise level, (batch, 6, channels).
            text: keys and values of the prompts.
            rotation: of queries and keys, by their places.
            reference: None for none.
            frames: that the tokens are divided into.
            neighbours: reference frames on either side that a frame sees; None for all.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + modulation.float()).split(1, 1)

        h = (self.norm1(x) * (1 + scale) + shift).to(x.dtype)
        x = (x + gate * self.self_attention(h, rotation, reference, frames, neighbours)).to(x.dtype)

        query = self.attn2.split(self.attn2.query(self.norm2(x).to(x.dtype)))
        x = x + self.attn2.out(attention(query, *text))

        ffn = self.ffn((self.norm3(x) * (1 + ffn_scale) + ffn_shift).to(x.dtype))
        x = (x + ffn_gate * ffn).to(x.dtype)
        return x, h


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


def default_reference_blocks(layers: int) -> range:
    """Blocks that take the reference unless told otherwise: 4 to 18 of 30, as many in proportion of others.

    Guidance reads motion best in the middle: in block 14 (FastVMT) or 15 of 30 and 20 of 42 (DiTFlow, Pondaven et al.
    2025, arXiv 2412.07776); the last 65% can be left out (DeT); the deepest third is about appearance.
    """
    return range(round(layers * 4 / 30), max(round(layers * 19 / 30), 1))


class WanMotionTransferTransformer(ModelMixin, ConfigMixin):
    """Transformer of Wan 2.1 (text to video) with references' motion in some blocks.

    Args:
        patch_size: latents of a token in time, height and width; time is 1.
        num_attention_heads: of every attention.
        attention_head_dim: channels of a head, a multiple of 8.
        in_channels: latent channels in.
        out_channels: latent channels out.
        text_dim: width of the text encoding.
        freq_dim: waves that encode the noise level.
        ffn_dim: width of the feed-forward layers.
        num_layers: blocks.
        eps: of every norm.
        reference_blocks: blocks that take the reference; None for `default_reference_blocks`.
        reference_neighbours: reference frames on either side that a frame sees besides the one at its own time; None
            for all.
        adapter_rank: rank of the additions to queries, and to keys and values of the reference.
        scaler_channels: width of the scalers.

    Raises:
        ValueError: if a block does not exist, or a number is not allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]
    _keep_in_fp32_modules: ClassVar = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        eps: float = 1e-6,
        reference_blocks: Sequence[int] | None = None,
        reference_neighbours: int | None = None,
        adapter_rank: int = 64,
        scaler_channels: int = 256,
    ) -> None:
        super().__init__()
        heads, channels = num_attention_heads, num_attention_heads * attention_head_dim
        fused = default_reference_blocks(num_layers) if reference_blocks is None else sorted(set(reference_blocks))
        if attention_head_dim % 8:
            raise ValueError(f"attention_head_dim is {attention_head_dim}, allowed are multiples of 8")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size is {tuple(patch_size)}, its first number has to be 1")
        if not set(fused) <= set(range(num_layers)):
            raise ValueError(f"reference_blocks is {list(fused)}, allowed are 0 to {num_layers - 1}")
        if reference_neighbours is not None and reference_neighbours < 0:
            raise ValueError(f"reference_neighbours is {reference_neighbours}, allowed are 0, 1, … and None for all")

        self.patch_embedding = nn.Conv3d(in_channels, channels, tuple(patch_size), tuple(patch_size))
        self.condition_embedder = ConditionEmbedder(channels, freq_dim, text_dim)
        self.blocks = nn.ModuleList([Block(f"blocks.{i}", channels, heads, ffn_dim, eps) for i in range(num_layers)])
        self.norm_out = Float32LayerNorm(channels, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(channels, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, channels) / channels**0.5)
        for i in fused:
            self.blocks[i].adapter = Adapter(channels, heads, adapter_rank, scaler_channels)
        self.gradient_checkpointing = False

    # ------------------------------------------------------------------------------------------------ the network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
    ) -> Tensor:
        """Predict the velocity of a noisy clip, noise − clip, moved by a reference.

        Args:
            sample: noisy latents, (batch, in_channels, frames, height, width).
            timestep: noise level of 1000, one for all or (batch,).
            text: the prompts' encoding, (batch, tokens, width), or `encode_text` of it.
            motion: the motion of n references, n a divisor of batch: sample i follows reference i mod n, so that the
                two halves of guidance share one. None is the backbone alone, as if there were no adapter.

        Returns:
            (batch, out_channels, frames, height, width).

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._run(sample, timestep, text, motion)[0]

    def encode_reference(
        self, latents: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures
    ) -> MotionFeatures:
        """Read the motion of references in one pass of the backbone, as far as the last block that takes it.

        Args:
            latents: the references' latents with noise of `timestep` added, (n, channels, frames, height, width).
            timestep: noise level of 1000, one for all or (n,).
            text: encoding of the empty prompt, (n, tokens, width), or `encode_text` of it.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._run(latents, timestep, text, None, blocks=max(self._fused(), default=-1) + 1)[1]

    def denoise_with_hidden_states(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
    ) -> tuple[Tensor, MotionFeatures, dict[str, Tensor]]:
        """The prediction, the motion that was read on the way, and what every block passes on, in one pass.

        Args:
            sample: as in `forward`.
            timestep: as in `forward`.
            text: as in `forward`.
            motion: as in `forward`.

        Returns:
            The prediction, the features, and hidden states (batch, frames, height, width, channels) in patches by path
            of the block that made them.
        """
        hidden: dict[str, Tensor] = {}
        return *self._run(sample, timestep, text, motion, hidden=hidden), hidden

    def encode_text(self, text: Tensor) -> TextFeatures:
        """Keys and values of all cross-attentions for prompts (batch, tokens, width)."""
        width = self.config.text_dim
        if text.ndim != 3 or text.shape[2] != width:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (batch, tokens, {width})")
        embedded = self.condition_embedder.text_embedder(text)
        return TextFeatures({block.path: block.encode_text(embedded) for block in self.blocks})

    def prepare(self, motion: MotionFeatures, strength: float | Tensor = 1.0) -> PreparedMotion:
        """Compute what does not change from step to step.

        Args:
            motion: of n references.
            strength: how much the reference counts beside what was learnt, positive, one for all or (n,).

        Raises:
            ValueError: if the features are of other blocks than take a reference here, or a strength is not positive.
        """
        fused: dict[str, Block] = {self.blocks[i].path: self.blocks[i] for i in self._fused()}
        if fused.keys() != motion.layers.keys():
            raise ValueError(
                f"the motion was read in {sorted(motion.layers)}, this network takes it in {sorted(fused)}"
            )
        n, *grid, _ = next(iter(motion.layers.values())).shape
        weight = torch.as_tensor(strength, dtype=torch.float32)
        if not (weight > 0).all():
            raise ValueError(
                f"strength is {strength}, allowed are positive numbers; without a reference give no motion"
            )
        first = motion.layers[next(iter(fused))]
        added = weight.log().expand(n).view(n, 1, 1).to(first.device, first.dtype)
        rotation = self._rotation(grid, first.device)
        return PreparedMotion(
            {path: block.prepare(motion.layers[path].flatten(1, 3), rotation, added) for path, block in fused.items()}
        )

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None,
        blocks: int | None = None,
        hidden: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, MotionFeatures]:
        """The prediction, and hidden states of blocks that take the reference; only features of the first `blocks`."""
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        if isinstance(motion, MotionFeatures):
            motion = self.prepare(motion)
        references = {} if motion is None else motion.layers
        batch, _, frames, height, width = sample.shape
        _, down, across = self.config.patch_size
        grid = (frames, height // down, width // across)
        self._check_inputs(sample, text, references, math.prod(grid))

        rotation = self._rotation(grid, sample.device)
        noise_level = torch.as_tensor(timestep, device=sample.device).expand(batch)
        time, modulation = self.condition_embedder(noise_level, self.patch_embedding.weight.dtype)
        x = self.patch_embedding(sample).flatten(2).transpose(1, 2).contiguous()  # (batch, tokens, channels)

        features: dict[str, Tensor] = {}
        for block in self.blocks[:blocks]:
            given = x, modulation, text.layers[block.path], rotation, references.get(block.path)
            neighbours = self.config.reference_neighbours
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, h = self._gradient_checkpointing_func(block, *given, frames, neighbours)
            else:
                x, h = block(*given, frames, neighbours)
            if block.adapter is not None:
                features[block.path] = h.unflatten(1, grid)
            if hidden is not None:
                hidden[block.path] = x.unflatten(1, grid)

        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).split(1, 1)
        patches = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))
        image = patches.view(batch, *grid, down, across, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return image.reshape(batch, -1, frames, height, width), MotionFeatures(features)

    # -------------------------------------------------------------------------------------------------- its parts

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters: low-rank additions and scalers, by name in the state dict."""
        for name, parameter in self.named_parameters():
            if ".adapter." in name:
                yield name, parameter

    def initialize_adapter(self) -> None:
        """Bring the adapter to where training starts."""
        for i in self._fused():
            self.blocks[i].adapter.reset()

    def _fused(self) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if block.adapter is not None]

    def _rotation(self, grid: Sequence[int], device: torch.device) -> Rotation:
        frames, height, width = grid
        return rotation_of((frames, height, width), self.config.attention_head_dim, device)

    def _check_inputs(
        self, sample: Tensor, text: TextFeatures, references: Mapping[str, PreparedReference], tokens: int
    ) -> None:
        channels, (_, down, across) = self.config.in_channels, self.config.patch_size
        shape = tuple(sample.shape)
        if sample.shape[1] != channels or sample.shape[3] % down or sample.shape[4] % across:
            raise ValueError(
                f"sample has shape {shape}, expected (batch, {channels}, frames, height, width) with height divisible "
                f"by {down} and width by {across}"
            )
        for key, _ in text.layers.values():
            if key.shape[0] != sample.shape[0]:
                raise ValueError(f"text has batch {key.shape[0]}, sample has batch {sample.shape[0]} in shape {shape}")
        for path, reference in references.items():
            if sample.shape[0] % reference.key.shape[0]:
                raise ValueError(f"{reference.key.shape[0]} motions do not divide the batch of sample, shape {shape}")
            if reference.key.shape[2] != tokens:
                raise ValueError(
                    f"the motion has {reference.key.shape[2]} tokens in {path}, the sample has {tokens} in shape "
                    f"{shape}: a sample and its reference have the same frames and size"
                )


def _repeated(x: Tensor, batch: int) -> Tensor:
    """(n, …) → (batch, …), sample i from i mod n; not copied where n is 1."""
    return x.expand(batch, *x.shape[1:]) if len(x) == 1 else x.repeat(batch // len(x), *[1] * (x.ndim - 1))
