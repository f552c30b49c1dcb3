"""The diffusion transformer of Wan 2.1, top to bottom, in which some blocks take a reference's motion.

A clip's latents are cut into patches of 1×2×2, one token each, frame by frame. Every block has self-attention over all
tokens of the clip, cross-attention to the prompt and a feed-forward layer; norms are modulated by the noise level
(Peebles and Xie 2022, arXiv 2212.09748). Parameter names are those of diffusers' `WanTransformer3DModel`; what is
trained is under `blocks.N.adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from emt.backbone import PLAIN, Execution, Facts
from emt.backbones.wan21.adapter import Adapter, PreparedReference
from emt.backbones.wan21.attention import attention, attention_with_reference, repeated
from emt.backbones.wan21.facts import default_reference_blocks, facts
from emt.backbones.wan21.layers import (
    Attention,
    ConditionEmbedder,
    FeedForward,
    Rotation,
    rotation_of,
)
from emt.features import MotionFeatures, PreparedMotion, TextFeatures
from emt_kernels.modulated_norm import gated_sum, norm_of_sum

torch.export.register_dataclass(PreparedReference)


ABSENT = -1000.0
"""Logarithm of the strength of a reference that is not there: beside own tokens its weigh 0 in any precision."""


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; `path` is its own name, the key of its features.

    With an adapter, self-attention takes a reference.
    """

    def __init__(self, path: str, channels: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.path = path
        self.eps = eps
        self.attn1 = Attention(channels, heads, eps)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.attn2 = Attention(channels, heads, eps)
        self.ffn = FeedForward(channels, inner)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, channels) / channels**0.5)
        self.adapter: Adapter | None = None

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded prompts: (batch, tokens, channels) → two (batch, heads, tokens, …)."""
        return self.attn2.key(text), self.attn2.split(self.attn2.to_v(text))

    def prepare(self, hidden: Tensor, rotation: Rotation, strength: Tensor) -> PreparedReference:
        """Constants of references for all steps, from hidden states (n, tokens, channels) and strengths (n, 1, 1)."""
        attn, adapter = self.attn1, self.adapter
        return PreparedReference(
            key=attn.turned_key(hidden, rotation, adapter.key(hidden)),
            value=attn.split(attn.to_v(hidden) + adapter.value(hidden)),
            scaler=adapter.scaler.prepare(hidden),
            strength=strength,
        )

    def attention_to_next(self, hidden: Tensor, rotation: Rotation, frames: int) -> Tensor:
        """`WanMotionTransferTransformer.attention_maps` of this block, from hidden states (n, tokens, channels)."""
        attn = self.attn1
        query, key = (
            x.unflatten(2, (frames, -1))
            for x in (attn.turned_query(hidden, rotation), attn.turned_key(hidden, rotation))
        )
        scale = query.shape[-1] ** -0.5
        pairs = zip(query.unbind(2)[:-1], key.unbind(2)[1:], strict=True)  # a frame at a time, for the memory's sake
        return torch.stack([(scale * (q @ k.mT)).float().softmax(-1).mean(1) for q, k in pairs], dim=1)

    def self_attention(
        self, h: Tensor, rotation: Rotation, reference: PreparedReference | None, frames: int, neighbours: int | None
    ) -> Tensor:
        """(batch, tokens, channels) → the same, by attention to the clip's own tokens and those of a reference."""
        attn = self.attn1
        if reference is None:
            return attn.out(attention(*attn.project(h, rotation, None)))
        scaler, strength = (repeated(t, h.shape[0]) for t in (reference.scaler, reference.strength))
        present = reference.strength > ABSENT / 2
        added = self.adapter.query(h, repeated(present, h.shape[0]).to(h.dtype))
        query, key, value = attn.project(h, rotation, added)
        bias = self.adapter.scaler(h, scaler) + strength
        given = query, key, value, reference.key, reference.value, bias
        return attn.out(attention_with_reference(*given, frames, neighbours, present.flatten()))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        rotation: Rotation,
        reference: PreparedReference | None,
        frames: int,
        neighbours: int | None,
        ffn_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """(batch, tokens, channels) → the same, and the hidden states that self-attention projects.

        Args:
            x: tokens. What is modulated and what is added to them is computed in float32.
            modulation: of the noise level, (batch, 6, channels), float32.
            text: keys and values of the prompts.
            rotation: of queries and keys, by their places.
            reference: None for none.
            frames: that the tokens are divided into.
            neighbours: reference frames on either side that a frame sees; None for all.
            ffn_tokens: that inference takes through the feed-forward layer at once.
        """
        vectors = self.scale_shift_table + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors.unbind(1)

        _, h = norm_of_sum(x, self.eps, scale, shift)
        out = self.self_attention(h, rotation, reference, frames, neighbours)

        affine = self.norm2.weight.float()[None], self.norm2.bias.float()[None]
        x, normed = norm_of_sum(x, self.eps, *affine, out, gate, modulated=False)
        out = self.attn2.out(attention(self.attn2.query(normed), *text))

        x, normed = norm_of_sum(x, self.eps, ffn_scale, ffn_shift, out)
        x = gated_sum(x, self.ffn(normed, ffn_tokens), ffn_gate)
        return x, h


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
        max_frames: most frames of a clip.
        frames_per_latent: frames of every latent frame but the first.
        first_frames: frames of the first latent frame.

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
        max_frames: int = 81,
        frames_per_latent: int = 4,
        first_frames: int = 1,
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
        *,
        adapted: bool = True,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """Predict the velocity of a noisy clip, noise − clip, moved by a reference.

        Args:
            sample: noisy latents, (batch, in_channels, frames, height, width).
            timestep: noise level of 1000, one for all or (batch,).
            text: the prompts' encoding, (batch, tokens, width), or `encode_text` of it.
            motion: the motion of n references, n a divisor of batch: sample i follows reference i mod n, so that the
                two halves of guidance share one. None is the backbone alone, as if there were no adapter.
            adapted: False is the backbone alone, too.
            execution: how it is computed.

        Returns:
            (batch, out_channels, frames, height, width).

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._run(sample, timestep, text, motion if adapted else None, execution)[0]

    @apply_forward_hook
    def encode_reference(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        *,
        execution: Execution = PLAIN,
    ) -> MotionFeatures:
        """Read the motion of references in one pass of the backbone, as far as the last block that takes it.

        Args:
            latents: the references' latents with noise of `timestep` added, (n, channels, frames, height, width).
            timestep: noise level of 1000, one for all or (n,).
            text: encoding of the empty prompt, (n, tokens, width), or `encode_text` of it.
            execution: how it is computed.

        Returns:
            By path of the blocks that take the reference, the hidden states that their self-attention projects,
            (n, frames, height, width, channels) in patches, and the logarithm of the reference's strength (n,), 0.
            Keys and values are linear in hidden states: `prepare` computes them, and a motion is a third as large.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._run(latents, timestep, text, None, execution, blocks=max(self._fused(), default=-1) + 1)[1]

    @apply_forward_hook
    def denoise_with_features(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures
    ) -> tuple[Tensor, MotionFeatures]:
        """The prediction of the backbone alone, and the motion that was read on the way, for `emt.train.teacher`."""
        return self._run(sample, timestep, text, None, PLAIN)

    @apply_forward_hook
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
        return *self._run(sample, timestep, text, motion, PLAIN, hidden=hidden), hidden

    @apply_forward_hook
    def encode_text(self, text: Tensor) -> TextFeatures:
        """Keys and values of all cross-attentions for prompts (batch, tokens, width)."""
        width = self.config.text_dim
        if text.ndim != 3 or text.shape[2] != width:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (batch, tokens, {width})")
        embedded = self.condition_embedder.text_embedder(text)
        return TextFeatures({block.path: block.encode_text(embedded) for block in self.blocks})

    @apply_forward_hook
    def encode_text_without_adapter(self, text: Tensor) -> TextFeatures:
        """`encode_text`: the adapter has no part in it."""
        return self.encode_text(text)

    @apply_forward_hook
    def attention_maps(self, features: MotionFeatures, blocks: Sequence[int]) -> list[Tensor]:
        """Attention of each frame's tokens to those of the next frame alone, which shows where things go.

        DiTFlow (Pondaven et al. 2025, arXiv 2412.07776) takes motion from it. Queries and keys are those of
        self-attention.

        Args:
            features: of clips.
            blocks: whose attentions are wanted; of those that take the reference.

        Returns:
            Of each block (batch, frames − 1, tokens of a frame, tokens of a frame), float32, the mean over heads; rows
            sum to 1.
        """
        maps = []
        for i in sorted(set(blocks) & set(self._fused())):
            hidden = features.layers[self.blocks[i].path][0]
            grid = hidden.shape[1:4]
            rotation = self._rotation(grid, hidden.device)
            maps.append(self.blocks[i].attention_to_next(hidden.flatten(1, 3), rotation, grid[0]))
        return maps

    def prepare(self, features: MotionFeatures) -> PreparedMotion:
        """Compute what does not change from step to step.

        Raises:
            ValueError: if the features are of other blocks than take a reference here.
        """
        read, taken = list(features.layers), self.reference_layers()
        if set(read) != set(taken):
            raise ValueError(f"the motion was read in {sorted(read)}, but this network takes it in {sorted(taken)}")
        return PreparedMotion({path: self.prepare_layer(path, features.layers[path]) for path in taken})

    @apply_forward_hook
    def prepare_layer(self, path: str, features: tuple[Tensor, ...]) -> tuple[PreparedReference]:
        """`prepare` for the block at `path`."""
        hidden, strength = features
        rotation = self._rotation(hidden.shape[1:4], hidden.device)
        block = self.blocks[int(path.rpartition(".")[2])]
        return (block.prepare(hidden.flatten(1, 3), rotation, strength.view(-1, 1, 1)),)

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None,
        execution: Execution,
        blocks: int | None = None,
        hidden: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, MotionFeatures]:
        """The prediction, and features of blocks that take the reference; only of the first `blocks` if given."""
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        if isinstance(motion, MotionFeatures):
            motion = self.prepare(motion)
        self._check_inputs(sample, text)
        batch, _, frames, height, width = sample.shape
        _, down, across = self.config.patch_size
        grid = (frames, height // down, width // across)

        rotation = self._rotation(grid, sample.device)
        noise_level = torch.as_tensor(timestep, device=sample.device).expand(batch)
        time, modulation = self.condition_embedder(noise_level, self.patch_embedding.weight.dtype)
        modulation = modulation.float()
        x = self.patch_embedding(sample).flatten(2).transpose(1, 2).contiguous()  # (batch, tokens, channels)

        features: dict[str, tuple[Tensor, ...]] = {}
        for block in self.blocks[:blocks]:
            reference = None
            if motion is not None and block.adapter is not None:
                (reference,) = motion.layers[block.path]
                self._check_reference(reference, sample, grid)
            given = x, modulation, text.layers[block.path], rotation, reference
            options = frames, self.config.reference_neighbours, execution.feed_forward_tokens
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, h = self._gradient_checkpointing_func(block, *given, *options)
            else:
                x, h = block(*given, *options)
            if block.adapter is not None:
                read = h.unflatten(1, grid)
                features[block.path] = (read.cpu() if execution.features_on_host else read, h.new_zeros(batch))
            if hidden is not None:
                hidden[block.path] = x.unflatten(1, grid)

        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).unbind(1)
        patches = self.proj_out(norm_of_sum(x, self.config.eps, scale, shift)[1])
        image = patches.view(batch, *grid, down, across, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return image.reshape(batch, -1, frames, height, width), MotionFeatures(features)

    # -------------------------------------------------------------------------------------------------- its parts

    @property
    def facts(self) -> Facts:
        """Limits and costs."""
        return facts(self.config)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it denoises."""
        return self.config.in_channels

    @property
    def text_width(self) -> int:
        """Width of the prompts' encoding that it reads."""
        return self.config.text_dim

    def reference_layers(self) -> list[str]:
        """Paths of the blocks that take a reference, in the order in which they run."""
        return [self.blocks[i].path for i in self._fused()]

    @staticmethod
    def without_reference(features: MotionFeatures) -> MotionFeatures:
        """Features of n references that leave it as it is alone, for samples beside others that follow a reference."""
        layers = {path: (hidden, torch.full_like(added, ABSENT)) for path, (hidden, added) in features.layers.items()}
        return MotionFeatures(layers)

    def fuse_projections(self) -> None:
        """Let inference compute query, key and value of each self-attention in one matmul."""
        for block in self.blocks:
            block.attn1.fuse()

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

    def _check_inputs(self, sample: Tensor, text: TextFeatures) -> None:
        channels, (_, down, across) = self.config.in_channels, self.config.patch_size
        shape = tuple(sample.shape)
        if sample.ndim != 5 or sample.shape[1] != channels or sample.shape[3] % down or sample.shape[4] % across:
            raise ValueError(
                f"sample has shape {shape}, expected (batch, {channels}, frames, height, width) with height divisible "
                f"by {down} and width by {across}"
            )
        for key, _ in text.layers.values():
            if key.shape[0] != sample.shape[0]:
                raise ValueError(f"text has batch {key.shape[0]}, sample has batch {sample.shape[0]} in shape {shape}")

    def _check_reference(self, reference: PreparedReference, sample: Tensor, grid: tuple[int, int, int]) -> None:
        n, tokens = reference.key.shape[0], reference.key.shape[2]
        if sample.shape[0] % n:
            raise ValueError(f"{n} motions do not divide the batch of sample, shape {tuple(sample.shape)}")
        if tokens != math.prod(grid):
            raise ValueError(
                f"the motion has {tokens} tokens, the sample {math.prod(grid)} in shape {tuple(sample.shape)}: a "
                "sample and its reference have the same frames and size"
            )


def with_strength(features: MotionFeatures, strength: float | Tensor) -> MotionFeatures:
    """Features of references that count more or less beside what was learnt.

    Args:
        features: of n references, as `encode_reference` gives them.
        strength: positive, one for all or (n,); 1 changes nothing.

    Raises:
        ValueError: if a strength is not positive.
    """
    weight = torch.as_tensor(strength, dtype=torch.float32)
    if not (weight > 0).all():
        raise ValueError(f"strength is {strength}, allowed are positive numbers; without a reference give no motion")
    layers = {}
    for path, (hidden, added) in features.layers.items():
        layers[path] = (hidden, added + weight.log().to(added))
    return MotionFeatures(layers)
