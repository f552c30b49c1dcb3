"""The adapted network of EfficientMT, top to bottom.

A Stable Diffusion 1.5 UNet with AnimateDiff's motion modules (`motion_module`), in which the up blocks take a
reference's motion. Inside, frames are folded into the batch, (batch·frames, channels, height, width) in
channels-last memory, which is (batch·frames, tokens, channels) to the attentions without a copy.
Parameter names are the published ones.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from emt.backbone import PLAIN, Execution, Facts
from emt.backbones.sd15.facts import facts
from emt.backbones.sd15.layers import (
    QKV,
    FeedForward,
    GroupNorm,
    LayerNorm,
    OwnLayers,
    PointwiseConv,
    images_of,
    repeated,
    sinusoidal_positions,
    sinusoids,
    tokens_of,
)
from emt.backbones.sd15.motion_module import MotionModule, Reference, TemporalAttention
from emt.backbones.sd15.passes import materialized, pass_of
from emt.checkpoints import check_keys
from emt.errors import EmtError
from emt.features import MotionFeatures, PreparedMotion, TextFeatures
from emt.parts import Network, configured, offloaded


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep through two linear layers."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """(batch,) → (batch, out_channels)."""
        # The sinusoids are computed in float32 whatever the type of the weights: half precision cannot count to 999.
        embedding = sinusoids(timestep, self.channels)
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Group norm, SiLU, 3×3 convolution, twice, with the timestep added in between."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-5, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-5, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Images (batch·frames, in, height, width) → (…, out, height, width); `time` after SiLU."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, shift=self.time_emb_proj(time)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(QKV):
    """Multi-head attention over the tokens of a frame, or from them to the tokens of the prompt."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__(channels, context_channels)
        self.heads = heads
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def attend(self, x: Tensor, text: tuple[Tensor, Tensor] | None = None, copies: int = 1) -> Tensor:
        """Attention before `to_out`: (batch·frames, tokens, channels) → the same, `copies` times as many frames.

        `text` are the keys and values of prompts, (batch, text tokens, channels), or of each frame, (batch·frames, …),
        for so many copies of the tokens.
        """
        if text is None:
            return self._attention(*self.project(x))
        # All frames of a clip see the same prompt: they are queries of one attention.
        query = repeated(self.to_q(x), copies)
        return self._attention(query.unflatten(0, (text[0].shape[0], -1)).flatten(1, 2), *text).reshape(query.shape)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor] | None = None, copies: int = 1) -> Tensor:
        """(batch·frames, tokens, channels) → the same, `copies` times as many frames."""
        return self.to_out[0](self.attend(x, text, copies))


class SpatialTransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the prompt, feed-forward."""

    def __init__(self, channels: int, text_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SpatialAttention(channels, channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = SpatialAttention(channels, text_channels, heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], copies: int = 1) -> Tensor:
        """`x` (batch·frames, tokens, channels); `text` keys and values (batch, text tokens, channels) of its copies."""
        x = x + self.attn1(self.norm1(x))
        x = repeated(x, copies) + self.attn2(self.norm2(x), text, copies)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Stable Diffusion's transformer of a frame; `path` is its own name, the key of its layer in `TextFeatures`."""

    def __init__(self, path: str, channels: int, text_channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.path = path
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = PointwiseConv(channels)
        self.transformer_blocks = nn.ModuleList([SpatialTransformerBlock(channels, text_channels, heads)])
        self.proj_out = PointwiseConv(channels)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt: (batch, tokens, width) → two (batch, tokens, channels)."""
        attention = self.transformer_blocks[0].attn2
        return attention.to_k(text), attention.to_v(text)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], copies: int = 1) -> Tensor:
        """(batch·frames, channels, height, width) → the same, `copies` times as many, of which each has its prompts."""
        h = self.transformer_blocks[0](self.proj_in(tokens_of(self.norm(x))), text, copies)
        return repeated(x, copies) + images_of(self.proj_out(h), x.shape[2:])


class Resample(nn.Module):
    """The convolution of a down- or upsampler, under its published name `conv`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)


class Block(nn.Module):
    """The parts of a down, mid or up block; `MotionTransferNetwork.forward` says how they are run."""

    def __init__(
        self,
        path: str,
        resnets: Sequence[tuple[int, int]],
        config: Any,
        spatial: int,
        temporal: int,
        fusion: bool,
        resample: int,
    ) -> None:
        super().__init__()
        c, channels = config, resnets[-1][1]
        self.resnets = nn.ModuleList(
            [ResnetBlock(i, o, 4 * c.block_out_channels[0], c.norm_num_groups) for i, o in resnets]
        )
        self.attentions = nn.ModuleList(
            [
                SpatialTransformer(
                    f"{path}.attentions.{i}", channels, c.cross_attention_dim, c.attention_heads, c.norm_num_groups
                )
                for i in range(spatial)
            ]
        )
        self.motion_modules = nn.ModuleList(
            [
                MotionModule(
                    f"{path}.motion_modules.{i}",
                    channels,
                    c.motion_attention_heads,
                    c.norm_num_groups,
                    c.motion_max_frames,
                    adapter=fusion,
                )
                for i in range(temporal)
            ]
        )
        self.downsamplers = nn.ModuleList([Resample(channels, 2)] if resample < 0 else [])
        self.upsamplers = nn.ModuleList([Resample(channels, 1)] if resample > 0 else [])


class MotionTransferNetwork(Network):
    """SD 1.5 UNet with AnimateDiff motion modules, the scaler and the temporal integration of EfficientMT.

    Args:
        in_channels: latent channels in.
        out_channels: latent channels out.
        block_out_channels: channels of each level, highest resolution first; any number of levels.
        layers_per_block: residual blocks in a down block (an up block has one more).
        cross_attention_dim: width of the text encoding.
        attention_heads: heads of the spatial attentions (8 in SD 1.5, where diffusers calls it `attention_head_dim`).
        motion_attention_heads: heads of the temporal attentions.
        norm_num_groups: groups of every group norm.
        motion_mid_block: whether the mid block has a motion module (AnimateDiff v2 has, v1 and v3 have not).
        motion_max_frames: positions of the temporal encoding, the largest number of frames.
        attention_levels: levels with spatial transformers; None for all but the lowest, as in SD 1.5.
        fusion_blocks: up blocks that take the reference, 0 the lowest; None for all (table 2 of the paper ablates it).
        denoising_layers: paths of layers that denoising has of its own, besides the temporal projections of the fusion
            blocks; their weights are under `denoising` and the same path. The backbone's read the reference.

    Raises:
        ValueError: if channels are not divisible by groups or heads, or a level or block does not exist.
    """

    denoising: OwnLayers | None

    @configured
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        attention_heads: int = 8,
        motion_attention_heads: int = 8,
        norm_num_groups: int = 32,
        motion_mid_block: bool = False,
        motion_max_frames: int = 32,
        attention_levels: Sequence[int] | None = None,
        fusion_blocks: Sequence[int] | None = None,
        denoising_layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        attended = set(range(levels - 1)) if attention_levels is None else set(attention_levels)
        fused = set(range(levels)) if fusion_blocks is None else set(fusion_blocks)
        _check_config(levels, attended, fused, self.config)

        widths, layers, config = list(block_out_channels), layers_per_block, self.config
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            previous, last = widths[max(level - 1, 0)], level == levels - 1
            resnets = [(previous if i == 0 else width, width) for i in range(layers)]
            spatial = layers if level in attended else 0
            path = f"down_blocks.{level}"
            self.down_blocks.append(Block(path, resnets, config, spatial, layers, False, 0 if last else -1))
            skips += [width] * (layers if last else layers + 1)

        width = widths[-1]
        self.mid_block = Block("mid_block", [(width, width)] * 2, config, 1, int(motion_mid_block), False, 0)

        self.up_blocks = nn.ModuleList()
        channels = width
        for index, width in enumerate(reversed(widths)):
            resnets = []
            for _ in range(layers + 1):
                resnets.append((channels + skips.pop(), width))
                channels = width
            spatial = layers + 1 if levels - 1 - index in attended else 0
            path, resample = f"up_blocks.{index}", 0 if index == levels - 1 else 1
            self.up_blocks.append(Block(path, resnets, config, spatial, layers + 1, index in fused, resample))

        self.conv_norm_out = GroupNorm(norm_num_groups, widths[0], eps=1e-5, silu=True)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None
        self.register_module("denoising", None)
        self.add_denoising_layers(denoising_layers or ())

    # ------------------------------------------------------------------------------------------------ the network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
        *,
        adapted: bool = True,
        control: Sequence[Tensor] | None = None,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """Predict the noise (or velocity) of a noisy clip, moved by a reference.

        Args:
            sample: noisy latents, (batch, channels, frames, height, width).
            timestep: one for all, or (batch,).
            text: the prompts' encoding, (batch, tokens, width), or `encode_text` of it.
            motion: the motion of n references, n a divisor of batch: sample i follows reference i mod n, so that the
                two halves of guidance share one. None generates without a reference.
            adapted: False runs the backbone with its own weights throughout, as the reference pass does.
            control: residuals of a control network (`emt.backbones.sd15.sparse_control`), of the skip connections in
                their order and of the mid block last, each (batch·frames, channels, height, width).
            execution: how it is computed.

        Returns:
            (batch, out_channels, frames, height, width).

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._run(sample, timestep, text, motion, adapted, execution, control=control)[0]

    @offloaded
    def encode_reference(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        *,
        execution: Execution = PLAIN,
    ) -> MotionFeatures:
        """Read the motion of references in one pass of the backbone (EfficientMT, section 3.2; published t = 400).

        Args:
            latents: the references' latents with noise of `timestep` added, (n, channels, frames, height, width).
            timestep: one for all, or (n,).
            text: encoding of the empty prompt, (n, tokens, width), or `encode_text_without_adapter` of it.
            execution: how it is computed.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._read(latents, timestep, text, execution, features_alone=True)[1]

    @offloaded
    def denoise_with_features(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures
    ) -> tuple[Tensor, MotionFeatures]:
        """The backbone's prediction for a noisy clip, and the motion that it read on the way, in one pass.

        Both are differentiable in `sample`.

        Args:
            sample: noisy latents, (batch, channels, frames, height, width).
            timestep: one for all, or (batch,).
            text: the prompts' encoding, (batch, tokens, width), or `encode_text_without_adapter` of it.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        return self._read(sample, timestep, text)

    @offloaded
    def denoise_with_hidden_states(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures
    ) -> tuple[Tensor, MotionFeatures, dict[str, Tensor]]:
        """As `denoise_with_features`, and the output of every motion module, for training to look at.

        Args:
            sample: as in `denoise_with_features`.
            timestep: as in `denoise_with_features`.
            text: as in `denoise_with_features`.

        Returns:
            The prediction, the features, and hidden states (batch·frames, channels, height, width) by path of the
            motion module that made them.
        """
        hidden: dict[str, Tensor] = {}
        prediction, features = self._read(sample, timestep, text, hidden=hidden)
        return prediction, features, hidden

    def move_with_hidden_states(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures, motion: MotionFeatures
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward` with a reference, and the output of every motion module, as in `denoise_with_hidden_states`."""
        hidden: dict[str, Tensor] = {}
        return self._run(sample, timestep, text, motion, adapted=True, hidden=hidden)[0], hidden

    def _read(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        execution: Execution = PLAIN,
        hidden: dict[str, Tensor] | None = None,
        features_alone: bool = False,
    ) -> tuple[Tensor, MotionFeatures]:
        prediction, features, _ = self._run(
            sample, timestep, text, None, False, execution, hidden=hidden, features_alone=features_alone
        )
        return prediction, MotionFeatures({path: features[path] for path in self.reference_layers()})

    @offloaded
    def denoise_deep(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
        *,
        execution: Execution = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """The prediction, as `forward` has it, and the features that the highest resolution takes from those below it.

        They change little from one step to the next, so that `denoise_shallow` can go without computing them again
        (DeepCache, Ma et al. 2023, arXiv 2312.00858, section 3.2).

        Args:
            sample: as in `forward`.
            timestep: as in `forward`.
            text: as in `forward`.
            motion: as in `forward`.
            execution: as in `forward`.

        Returns:
            The prediction, and the deep features (batch·frames, channels, height, width).
        """
        prediction, _, deep = self._run(sample, timestep, text, motion, True, execution)
        return prediction, materialized(deep)

    @offloaded
    def denoise_shallow(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None,
        deep: Tensor,
        *,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """The prediction with deep features of an earlier step: only the highest resolution is computed.

        Args:
            sample: as in `forward`.
            timestep: as in `forward`.
            text: as in `forward`.
            motion: as in `forward`.
            deep: the features that `denoise_deep` returned for an earlier step of the same samples.
            execution: as in `forward`.

        Raises:
            ValueError: for a wrong shape, which it names.
        """
        expected = (sample.shape[0] * sample.shape[2], deep.shape[1], *sample.shape[3:])
        if deep.shape != expected:
            raise ValueError(f"deep features have shape {tuple(deep.shape)}, expected {expected}")
        return self._run(sample, timestep, text, motion, True, execution, deep=deep)[0]

    @offloaded
    def encode_text(self, text: Tensor) -> TextFeatures:
        """Keys and values of all cross-attentions for prompts (batch, tokens, width), for denoising."""
        return self._encode_text(text, adapted=True)

    @offloaded
    def encode_text_without_adapter(self, text: Tensor) -> TextFeatures:
        """Keys and values of all cross-attentions for prompts (batch, tokens, width), for passes of the backbone."""
        return self._encode_text(text, adapted=False)

    def _encode_text(self, text: Tensor, adapted: bool) -> TextFeatures:
        if text.ndim != 3 or text.shape[2] != self.text_width:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (batch, tokens, {self.text_width})")
        modules = self._layers(adapted).modules()
        return TextFeatures({m.path: m.encode_text(text) for m in modules if isinstance(m, SpatialTransformer)})

    def prepare_layer(self, path: str, features: tuple[Tensor, ...]) -> Reference:
        """Constants of references in a motion module, for all steps, from the features that were read in it.

        Args:
            path: of the motion module.
            features: two (n, frames, height, width, channels).
        """
        return self._layers(adapted=True).get_submodule(path).prepare(features)

    def prepare(self, features: MotionFeatures) -> PreparedMotion:
        """Compute once what does not change from step to step. Results are those of the unprepared features.

        Raises:
            ValueError: if the features were read in other layers than take them here.
        """
        layers = self.reference_layers()
        if set(layers) != features.layers.keys():
            raise ValueError(
                f"the motion was read in {sorted(features.layers)}, but this network takes it in {sorted(layers)}"
            )
        return PreparedMotion({path: self.prepare_layer(path, features.layers[path]) for path in layers})

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None,
        adapted: bool,
        execution: Execution = PLAIN,
        deep: Tensor | None = None,
        hidden: dict[str, Tensor] | None = None,
        features_alone: bool = False,
        control: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...]], Any]:
        """The forward pass, or only its highest resolution with `deep` features.

        Also returns the features that stand before the temporal attentions of a pass that is not adapted, by module
        path, and the deep features. The output of motion modules is put into `hidden`. With `features_alone` the pass
        ends at the last layer that is read for references; the prediction is the sample then.
        """
        shallow = deep is not None
        net, run = self._layers(adapted), pass_of(execution, sample)
        if isinstance(text, Tensor):
            text = self._encode_text(text, adapted)
        if isinstance(motion, MotionFeatures):
            motion = self.prepare(motion)
        references: Mapping[str, Reference] = motion.layers if motion is not None else {}
        self._check_inputs(sample, text, references)
        batch, _, frames, _, _ = sample.shape
        features: dict[str, tuple[Tensor, ...]] = {}

        timestep = torch.as_tensor(timestep, device=sample.device)
        time = run.embed_time(net, timestep if timestep.ndim else timestep[None], batch, frames)
        last = self.reference_layers()[-1:] if features_alone else []

        # The halves of guidance are the same until the first layer reads the prompts.
        shared = text.guided and execution.share_guidance and batch % 2 == 0 and control is None
        copies = 2 if shared else 1
        if copies > 1:
            sample = sample[: batch // 2]

        def layer(block: Block, i: int, x: Any, skip: Any = None) -> Any:
            # Gradient checkpointing recomputes one such layer at a time.
            again = copies if copies > 1 and x.shape[0] < batch * frames else 1
            if skip is not None:
                x = run.concatenate(x, run.repeat(skip, copies if copies > 1 and skip.shape[0] < x.shape[0] else 1))
            x = run.resnet(block.resnets[i], x, time)
            if block.attentions:
                transformer = block.attentions[i]
                x = run.spatial(transformer, x, text.layers[transformer.path], again)
            else:
                x = run.repeat(x, again)
            if block.motion_modules:
                module = block.motion_modules[i]
                reference = references.get(module.path)
                _check_reference(reference, frames, x.shape)
                read: list[Tensor] | None = None if adapted else []
                x = run.temporal(module, x, frames, reference, read, module.path in last)
                if read is not None:
                    found = (feature.unflatten(2, x.shape[2:]) for feature in read)
                    features[module.path] = tuple(f.cpu() if execution.features_on_host else f for f in found)
                if hidden is not None:
                    hidden[module.path] = materialized(x)
            return x

        def checkpointed(block: Block, i: int, *inputs: Any) -> Any:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return self._gradient_checkpointing_func(layer, block, i, *inputs)
            return layer(block, i, *inputs)

        images = sample.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = run.conv(net.conv_in, images)  # (batch·frames, channels, height, width) from here on
        skips = [x]
        for block in net.down_blocks:
            for i in range(len(block.resnets)):
                x = checkpointed(block, i, x)
                skips.append(x)
            if shallow:
                break
            for downsample in block.downsamplers:
                x = run.conv(downsample.conv, materialized(x))
                skips.append(x)

        if not shallow:
            x = checkpointed(net.mid_block, 0, x)
            x = run.resnet(net.mid_block.resnets[1], x, time)
            if control is not None:
                x = run.images(materialized(x) + control[-1])
        if control is not None:
            skips = [run.images(materialized(skip) + residual) for skip, residual in zip(skips, control)]

        given: Any = None
        for block in net.up_blocks:
            if block is net.up_blocks[-1]:
                x = given = x if deep is None else run.images(deep)
            elif shallow:
                continue
            for i in range(len(block.resnets)):
                x = checkpointed(block, i, x, skips.pop())
                if last and last[0] in features:
                    return sample, features, given
            for upsample in block.upsamplers:
                x = run.upsample(upsample.conv, x, skips[-1].shape[2:])  # the skip connection knows odd sizes

        out = net.conv_out(run.norm(net.conv_norm_out, x))
        return out.unflatten(0, (batch, frames)).transpose(1, 2), features, given

    # -------------------------------------------------------------------------------------------------- its parts

    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they run."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def motion_modules(self) -> dict[str, MotionModule]:
        """All motion modules, by path, in the order in which they run."""
        return {module.path: module for block in self.blocks() for module in block.motion_modules}

    def fusion_modules(self) -> dict[str, MotionModule]:
        """The motion modules that take the reference, by path, in the order in which they run."""
        return {path: module for path, module in self.motion_modules().items() if module.block.scaler is not None}

    def reference_layers(self) -> list[str]:
        """Paths of the motion modules that take the reference, in the order in which they run."""
        return list(self.fusion_modules())

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
        return self.config.cross_attention_dim

    def _layers(self, adapted: bool) -> Any:
        """The network as it denoises, or without the adapter as it reads references."""
        return self._denoiser if adapted else self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, more time."""
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def add_denoising_layers(self, paths: Sequence[str]) -> None:
        """Give denoising layers of its own, with the weights that those of the backbone have now.

        Args:
            paths: of the backbone's layers whose place they take.

        Raises:
            ValueError: if there is no such layer, or denoising has its own already.
        """
        if paths and (bad := sorted(set(paths) - set(self.shared_layers()))):
            raise ValueError(f"denoising_layers has {bad[0]!r}, which is no layer that denoising shares")
        if paths and self.denoising is None:
            self.denoising = OwnLayers()
        chosen = {path.rpartition(".")[0] for path in paths if path.endswith(".to_v")}
        for path, qkv in list(self.named_modules()):
            if path in chosen and isinstance(qkv, QKV) and {f"{path}.to_q", f"{path}.to_k"} <= set(paths):
                self.denoising.put(path, QKV(qkv.to_q.in_features, qkv.to_k.in_features))
        for path in paths:
            self.denoising.put(path, copy.deepcopy(self.get_submodule(path)))
        listed = dict.fromkeys([*(self.config.denoising_layers or ()), *paths])
        self.register_to_config(denoising_layers=list(listed) or None)
        self._assemble_denoiser()

    def shared_layers(self) -> list[str]:
        """Paths of the layers with weights that both the reference pass and denoising use."""
        found = []
        for path, layer in self.named_modules():
            if not layer._parameters or path.startswith("denoising.") or re.search(r"\.(adapter|scaler)\.", path):
                continue
            parent = self.get_submodule(path.rpartition(".")[0])
            adapted = isinstance(parent, TemporalAttention) and parent.adapter is not None
            if not adapted and (self.denoising is None or self.denoising.find(path) is None):
                found.append(path)
        return found

    def _assemble_denoiser(self) -> None:
        """Put the layers that denoising has of its own in the place of the backbone's; all others are shared."""
        own: dict[str, nn.Module | None] = {}
        for path, attention in self.named_modules():
            if isinstance(attention, TemporalAttention) and attention.adapter is not None:
                own |= {f"{path}.{name}": layer for name, layer in attention.adapter._modules.items()}
        for path in self.config.denoising_layers or ():
            own[path] = self.denoising.find(path)
            if path.endswith((".to_q", ".to_k", ".to_v")):
                fused = f"{path.rpartition('.')[0]}.to_qkv"
                own[fused] = self.denoising.find(fused)  # None if it has not all three
        self.__dict__["_denoiser"] = _with_layers(self, own)  # not a part: all of its layers are parts already

    def fuse_projections(self) -> None:
        """Let inference compute query, key and value of each self-attention in one matmul (`QKV.fuse`)."""
        projections = [module for module in self.modules() if isinstance(module, QKV)]
        before = [qkv.to_qkv for qkv in projections]
        for qkv in projections:
            qkv.fuse()
        if any(qkv.to_qkv is not fused for qkv, fused in zip(projections, before, strict=True)):
            self._assemble_denoiser()

    def attention_maps(self, features: MotionFeatures, blocks: Sequence[int]) -> list[Tensor]:
        """The backbone's attention over time, from the features of a reference pass.

        Args:
            features: of clips.
            blocks: up blocks whose attentions are wanted, 0 the lowest.

        Returns:
            Of each temporal attention (batch, height·width, heads, frames, frames), float32; rows sum to 1.
        """
        return [
            attention.attention_map(feature)
            for path, module in self.fusion_modules().items()
            if int(path.split(".")[1]) in blocks
            for attention, feature in zip(module.block.attention_blocks, features.layers[path])
        ]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that EfficientMT trains, temporal q/k/v and the scalers, by name in the state dict."""
        for path, module in self.fusion_modules().items():
            for name, parameter in module.adapter_parameters():
                yield f"{path}.{name}", parameter

    @torch.no_grad()
    def initialize_adapter(self) -> None:
        """Start the adapter's projections from the backbone's, as training does."""
        for module in self.fusion_modules().values():
            for attention in module.block.attention_blocks:
                for name in ("to_q", "to_k", "to_v"):
                    getattr(attention.adapter, name).weight.copy_(getattr(attention, name).weight)

    def load_published(self, backbone: Mapping[str, Tensor], adapter: Mapping[str, Tensor] | None = None) -> None:
        """Load weights by their published names, strictly.

        Args:
            backbone: the SD 1.5 UNet and the motion module, in one dict.
            adapter: the temporal q/k/v and scalers of the up blocks as EfficientMT publishes them, and any weights of
                the backbone that denoising has of its own; None starts the adapter from the backbone's projections and
                leaves the scalers as they were initialised. A layer whose weights equal the backbone's is shared.

        Raises:
            EmtError: naming every missing, unexpected or mis-shaped key.
        """
        backbone, shapes = without_positions(backbone), self.published_shapes()
        check_keys("backbone", backbone, shapes.backbone)
        state = dict(backbone)
        if adapter is not None:
            adapter = without_positions(adapter)
            check_keys("adapter", adapter, shapes.of_adapter(adapter))
            state |= {name: adapter[name.replace(".adapter.", ".")] for name, _ in self.adapter_parameters()}
            more = {name: tensor for name, tensor in adapter.items() if name not in shapes.adapter}
            known = self.config.denoising_layers or ()
            self.add_denoising_layers([path for path in self._differing_layers(backbone, more) if path not in known])
            for path in self.config.denoising_layers or ():
                names = (f"{path}.{name}" for name, _ in self.get_submodule(path).named_parameters())
                state |= {f"denoising.{name}": more.get(name, backbone[name]) for name in names}
        self.load_state_dict(state, strict=False)
        if adapter is None:
            self.initialize_adapter()

    def denoising_states(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of an adapter checkpoint that are not trained ones, by their names under `denoising`."""
        trained = self.published_shapes().adapter
        return {f"denoising.{name}": tensor for name, tensor in adapter.items() if name not in trained}

    def published_shapes(self) -> PublishedShapes:
        """Shapes of the weights by their published names."""
        trained = {name for name, _ in self.adapter_parameters()}
        shapes = {n: p.shape for n, p in self.named_parameters() if not n.startswith("denoising.")}
        return PublishedShapes(
            backbone={name: shape for name, shape in shapes.items() if name not in trained},
            adapter={name.replace(".adapter.", "."): shapes[name] for name in trained},
        )

    def _differing_layers(self, backbone: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
        """Paths of layers of which `other` has a weight that is not the backbone's, in the dtype of the network."""

        def differs(name: str) -> bool:
            dtype = self.get_parameter(name).dtype
            return not torch.equal(other[name].to(dtype), backbone[name].to(dtype))

        return list(dict.fromkeys(name.rpartition(".")[0] for name in other if differs(name)))

    def _check_inputs(
        self,
        sample: Tensor,
        text: TextFeatures,
        references: Mapping[str, Reference],
    ) -> None:
        channels, limits = self.config.in_channels, self.facts
        shape = tuple(sample.shape)
        if sample.ndim != 5 or sample.shape[1] != channels:
            raise ValueError(f"sample has shape {shape}, expected (batch, {channels}, frames, height, width)")
        if not limits.takes_frames(sample.shape[2]):
            allowed = limits.allowed_frames()
            raise ValueError(f"sample has {sample.shape[2]} frames in shape {shape}, allowed are {allowed}")
        for key, _ in text.layers.values():
            if key.shape[0] not in (sample.shape[0], sample.shape[0] * sample.shape[2]):
                raise ValueError(f"text has batch {key.shape[0]}, sample has batch {sample.shape[0]} in shape {shape}")
        for first, _ in itertools.islice(references.values(), 1):
            if sample.shape[0] % first.key.shape[0]:
                raise ValueError(f"{first.key.shape[0]} motions do not divide the batch of sample, shape {shape}")


@dataclass(frozen=True)
class PublishedShapes:
    """Shapes of a network's weights by published names: of the backbone, and of what EfficientMT trains."""

    backbone: dict[str, torch.Size]
    adapter: dict[str, torch.Size]

    def of_adapter(self, given: Iterable[str]) -> dict[str, torch.Size]:
        """Shapes of an adapter checkpoint with these names: all that is trained, and of the backbone what it has."""
        more = {name: self.backbone[name] for name in given if name in self.backbone and name not in self.adapter}
        return self.adapter | more


def _with_layers(module: nn.Module, layers: Mapping[str, nn.Module | None], prefix: str = "") -> nn.Module:
    """The module with layers in the place of those at their paths; all that stays as it is is shared, not copied."""
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        path = prefix + name
        if path in layers:
            children[name] = layers[path]
        else:
            children[name] = None if child is None else _with_layers(child, layers, f"{path}.")
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    other = copy.copy(module)
    other.__dict__["_modules"] = children
    return other


def _check_reference(reference: Reference | None, frames: int, shape: torch.Size) -> None:
    """Raise ValueError if a reference has another number of frames or another size than the images of a clip."""
    if reference is None:
        return
    _, reference_frames, _, *grid = reference[0].scaler.shape
    if (reference_frames, *grid) != (frames, *shape[2:]):
        raise ValueError(
            f"the motion has (frames, height, width) = {(reference_frames, *grid)} where the sample has "
            f"{(frames, *shape[2:])}: a sample and its reference have the same shape"
        )


def _check_config(levels: int, attended: set[int], fused: set[int], config: Any) -> None:
    for name, chosen in (("attention_levels", attended), ("fusion_blocks", fused)):
        if not chosen <= set(range(levels)):
            raise ValueError(f"{name} is {sorted(chosen)}, allowed are 0 to {levels - 1}: there are {levels} levels")
    for name in ("norm_num_groups", "attention_heads", "motion_attention_heads"):
        bad = [w for w in config.block_out_channels if w % config[name]]
        if bad:
            raise ValueError(f"block_out_channels {bad} are not divisible by {name}={config[name]}")


def without_positions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop stored sinusoidal encodings, which are computed here, after checking that they are the same."""
    for name, stored in state.items():
        if name.endswith(".pe"):
            table = stored.reshape(-1, stored.shape[-1]).float()
            rounding = torch.finfo(stored.dtype).eps / 2 if stored.is_floating_point() else 0.0
            if not torch.allclose(table, sinusoidal_positions(*table.shape), atol=max(1e-2, rounding)):
                raise EmtError(
                    f"{name} is not the sinusoidal position encoding that AnimateDiff uses",
                    "Give a motion module whose position encoding is sinusoidal.",
                )
    return {name: tensor for name, tensor in state.items() if not name.endswith(".pe")}
