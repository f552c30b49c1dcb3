"""SparseCtrl: pictures that some frames of a clip are to show (Guo et al. 2023, arXiv 2311.16933), of AnimateDiff v3.

A copy of the UNet's down and mid blocks, with motion modules of one attention, reads the pictures and which frames they
are of; what it makes of them is added to the network's skip connections and to its mid block. It does not see the noisy
clip: the published networks get zeros in its place. Parameter names are the published ones.

Two kinds of pictures are published: photographs, which it reads as latents (`rgb`), and drawings (`scribble`), which it
reads as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbones.sd15.checkpoint_kinds import CONTROL, read_kind
from emt.backbones.sd15.motion_checkpoint import published_motion_name
from emt.backbones.sd15.motion_module import MotionModule
from emt.backbones.sd15.network import Block, SpatialTransformer, TimeEmbedding, without_positions
from emt.checkpoints import check_keys
from emt.features import TextFeatures
from emt.parts import Config, Network, configured

RGB, SCRIBBLE = "rgb", "scribble"
_DRAWING_CHANNELS = (16, 32, 96, 256)


class DrawingEmbedding(nn.Module):
    """Convolutions from a drawing and its mask to an eighth of their size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = _DRAWING_CHANNELS
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        blocks = []
        for narrow, wide in itertools.pairwise(widths):
            blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, height, width) → (n, out_channels, height/8, width/8)."""
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class SparseControl(Network):
    """Control network of a `MotionTransferNetwork`.

    Args:
        kind: of its pictures, `RGB` or `SCRIBBLE`.
        in_channels: latent channels.
        block_out_channels: channels of each level of the network.
        layers_per_block: residual blocks in a down block.
        cross_attention_dim: width of the text encoding.
        attention_heads: heads of the spatial attentions.
        motion_attention_heads: heads of the temporal attentions.
        norm_num_groups: groups of every group norm.
        motion_max_frames: the largest number of frames.
        attention_levels: levels with spatial transformers; None for all but the lowest.
    """

    @configured
    def __init__(
        self,
        kind: str = RGB,
        in_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        attention_heads: int = 8,
        motion_attention_heads: int = 8,
        norm_num_groups: int = 32,
        motion_max_frames: int = 32,
        attention_levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths, layers, config = list(block_out_channels), layers_per_block, self.config
        levels = len(widths)
        attended = set(range(levels - 1)) if attention_levels is None else set(attention_levels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding: nn.Module = (
            nn.Conv2d(in_channels + 1, widths[0], 3, padding=1) if kind == RGB else DrawingEmbedding(4, widths[0])
        )
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            previous, last = widths[max(level - 1, 0)], level == levels - 1
            resnets = [(previous if i == 0 else width, width) for i in range(layers)]
            path = f"down_blocks.{level}"
            block = Block(path, resnets, config, layers if level in attended else 0, 0, False, 0 if last else -1)
            block.motion_modules = nn.ModuleList(
                MotionModule(
                    f"{path}.motion_modules.{i}",
                    width,
                    motion_attention_heads,
                    norm_num_groups,
                    motion_max_frames,
                    adapter=False,
                    attentions=1,
                )
                for i in range(layers)
            )
            self.down_blocks.append(block)
            skips += [width] * (layers if last else layers + 1)
        self.mid_block = Block("mid_block", [(widths[-1], widths[-1])] * 2, config, 1, 0, False, 0)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skips)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    @classmethod
    def of_network(cls, config: Mapping[str, Any], kind: str = RGB) -> SparseControl:
        """A control network for a network of this configuration."""
        return cls.from_config({**config, "kind": kind})

    @property
    def reads_latents(self) -> bool:
        """True if its pictures are read as latents."""
        return self.config.kind == RGB

    @torch.no_grad()
    def start_from(self, network: nn.Module) -> None:
        """Take over a network's down and mid blocks, as training begins; it adds nothing yet."""
        own, given = self.state_dict(), network.state_dict()
        self.load_state_dict({name: given.get(name, tensor) for name, tensor in own.items()})
        embedding = self.controlnet_cond_embedding
        last = embedding.conv_out if isinstance(embedding, DrawingEmbedding) else embedding
        for layer in (last, *self.controlnet_down_blocks, self.controlnet_mid_block):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode_text(self, text: Tensor) -> TextFeatures:
        """Keys and values of its cross-attentions for prompts (batch, tokens, width)."""
        return TextFeatures({m.path: m.encode_text(text) for m in self.modules() if isinstance(m, SpatialTransformer)})

    def forward(
        self, timestep: Tensor, text: Tensor | TextFeatures, pictures: Tensor, mask: Tensor, scale: float = 1.0
    ) -> list[Tensor]:
        """Residuals of the network's skip connections in their order, and of its mid block last.

        Args:
            timestep: one for all, or (batch,).
            text: the prompts' encoding, (batch, tokens, width), or `encode_text` of it.
            pictures: of each frame, zeros where there is none: latents (batch, channels, frames, height, width), or
                drawings from 0 to 1 (batch, 3, frames, 8·height, 8·width).
            mask: 1 where there is a picture, 0 elsewhere; as `pictures`, with one channel.
            scale: factor of all residuals.

        Returns:
            Each (batch·frames, channels, height, width).
        """
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        batch, frames = pictures.shape[0], pictures.shape[2]
        timestep = torch.as_tensor(timestep, device=pictures.device)
        time = F.silu(self.time_embedding(timestep if timestep.ndim else timestep[None]))
        time = time.expand(batch, -1).repeat_interleave(frames, 0)
        read = torch.cat([pictures, mask], dim=1).transpose(1, 2).flatten(0, 1)
        read = self.controlnet_cond_embedding(read.contiguous(memory_format=torch.channels_last))
        x = read + self.conv_in.bias[:, None, None]  # of zeros in the place of the noisy clip
        skips = [x]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(x, time)
                if block.attentions:
                    x = block.attentions[i](x, text.layers[block.attentions[i].path])
                x = block.motion_modules[i](x, frames)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample.conv(x)
                skips.append(x)
        middle = self.mid_block
        x = middle.attentions[0](middle.resnets[0](x, time), text.layers[middle.attentions[0].path])
        x = middle.resnets[1](x, time)
        residuals = [project(skip) for project, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(x))
        return residuals if scale == 1.0 else [scale * residual for residual in residuals]


def open_control(path: Path, config: Config, dtype: torch.dtype = torch.float32) -> SparseControl:
    """Read a control network, as AnimateDiff publishes it or as diffusers names its layers.

    Args:
        path: of the file.
        config: of the network that it is for.
        dtype: of the weights.

    Raises:
        EmtError: if it cannot be read, is of another kind, or naming every key that does not fit the network.
    """
    state = read_kind(path, CONTROL).state
    state = without_positions({published_motion_name(name): tensor for name, tensor in state.items()})
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".pos_embed.pe")}
    kind = RGB if "controlnet_cond_embedding.weight" in state else SCRIBBLE
    control = SparseControl.of_network(config, kind)
    check_keys(f"SparseCtrl network {path}", state, {name: p.shape for name, p in control.named_parameters()})
    control.load_state_dict(state, strict=False)
    return control.to(dtype).eval().requires_grad_(False)
