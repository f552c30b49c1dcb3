"""Networks of the small model: their sizes, how they are made, loaded and saved."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from emt.backbones.sd15.unet import MotionTransferUNet
from emt.synthetic.renderer import World
from recipes.text import make_text_encoder


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks and of the rendered clips."""

    side: int = 128
    frames: int = 16
    variants: int = 1  # paintings of each scene of the world
    textures: int = 48  # that its footage draws from
    latents: int = 8  # channels; with 4, a subject of 40 pixels is decoded as a blot
    vae: tuple[int, ...] = (32, 64, 96, 96)
    unet: tuple[int, ...] = (96, 128)
    groups: int = 16
    heads: int = 4
    text_width: int = 128
    text_layers: int = 3


REFERENCE_TIMESTEP = 20
"""Noise level at which the small model reads references.

The published 400 is meant for latents of 64×64. Of 16×16, with a sixteenth of the values to average over, it leaves
less than is needed: what a backbone itself sees at 400 shows paths (correlation 0.999 with the truth), but not how
subjects turn (0.1; 0.97 at 50), and the camera's way only in part (0.77).
"""


SMALL = Sizes()
"""The small model."""


TINY = Sizes(
    side=32,
    frames=4,
    textures=4,
    latents=4,
    vae=(16, 16, 16, 16),
    unet=(16, 32),
    groups=8,
    text_width=32,
    text_layers=1,
)
"""A toy with the same parts, to try the recipes on a CPU."""


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """A KL autoencoder, 8 pixels a latent, without attention."""
    levels = len(sizes.vae)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        latent_channels=sizes.latents,
        norm_num_groups=min(sizes.groups, 16),
        sample_size=sizes.side,
        scaling_factor=1.0,  # not known before there are latents
        mid_block_add_attention=False,
    )


def make_unet(sizes: Sizes, fusion_blocks: Sequence[int] | None) -> MotionTransferUNet:
    """The network; `fusion_blocks` () for the backbone alone, None for the adapter in all up blocks."""
    unet = MotionTransferUNet(
        in_channels=sizes.latents,
        out_channels=sizes.latents,
        block_out_channels=sizes.unet,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_heads=sizes.heads,
        motion_attention_heads=sizes.heads,
        norm_num_groups=sizes.groups,
        motion_mid_block=True,
        motion_max_frames=sizes.frames,
        attention_levels=list(range(len(sizes.unet))),
        fusion_blocks=fusion_blocks if fusion_blocks is None else list(fusion_blocks),
    )
    with torch.no_grad():
        # A motion module whose output is zero is no module: video training starts from the frames that were learnt.
        for name, parameter in unet.named_parameters():
            if "temporal_transformer.proj_out" in name or name.startswith("conv_out"):
                parameter.zero_()
    return unet


def make_scheduler() -> DDIMScheduler:
    """Scaled-linear betas with zero terminal signal (Lin et al. 2024), v-prediction, trailing timesteps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@functools.lru_cache(maxsize=1)
def make_world(device: torch.device, sizes: Sizes) -> World:
    """The rendered world; painting its scenes takes a while, so that the stages of one process share it."""
    return World(
        device,
        size=sizes.side,
        frames=sizes.frames,
        variants=sizes.variants,
        textures=sizes.textures,
        free_views=False,
    )


def save_weights(path: Path, metadata: dict[str, str] | None = None, **modules: dict[str, Tensor]) -> None:
    """Write state dicts under their prefixes into one safetensors file, atomically."""
    state = {
        f"{prefix}.{k}": v.detach().cpu().contiguous() for prefix, part in modules.items() for k, v in part.items()
    }
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata)
    os.replace(partial, path)


def adapter_metadata(
    steps: int, fusion_blocks: Sequence[int] | None = None, reference_timestep: int = REFERENCE_TIMESTEP
) -> dict[str, str]:
    """Metadata of an adapter's result, by which `assemble` makes the network: steps trained, and how it is read."""
    return {
        "fusion_blocks": json.dumps(fusion_blocks),
        "reference_timestep": str(reference_timestep),
        "steps": str(steps),
    }


def load_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote under `prefix`."""
    return {k[len(prefix) + 1 :]: v for k, v in load_file(path).items() if k.startswith(prefix + ".")}


def load_vae(out: Path) -> AutoencoderKL:
    """The autoencoder that `train_vae` wrote."""
    return AutoencoderKL.from_pretrained(out / "vae", low_cpu_mem_usage=False).requires_grad_(False).eval()


def make_base(sizes: Sizes, start: Path | None = None) -> tuple[MotionTransferUNet, CLIPTextModel]:
    """Backbone and text encoder: new, from the result of a stage, or from a model folder."""
    unet, text = make_unet(sizes, ()), make_text_encoder(sizes.text_width, sizes.text_layers)
    if start is not None and start.is_dir():
        text.load_state_dict(CLIPTextModel.from_pretrained(start / "text_encoder").float().state_dict())
        unet.load_state_dict({k: v for k, v in network_weights(start).items() if k in unet.state_dict()})
    elif start is not None:
        unet.load_state_dict(load_weights(start, "unet"))
        text.load_state_dict(load_weights(start, "text"))
    return unet, text


def add_adapter(
    base: MotionTransferUNet, sizes: Sizes, fusion_blocks: Sequence[int] | None = None
) -> MotionTransferUNet:
    """A network with the weights of a backbone, and an adapter that is new in some up blocks, or all.

    The adapter's projections are the backbone's, and its scalers half open.
    """
    unet = make_unet(sizes, fusion_blocks)
    unet.load_state_dict(unet.state_dict() | base.state_dict())
    unet.initialize_adapter()
    set_scalers(unet, open_always=False)
    return unet


@torch.no_grad()
def set_scalers(unet: MotionTransferUNet, *, open_always: bool) -> None:
    """Start the scalers half open, or take them out: open for ever.

    The network subtracts 5 before the sigmoid, so that a scaler starts closed and passes a hundredth of the gradient;
    a bias of 5 on its last convolution takes that back.
    """
    for module in unet.fusion_modules().values():
        last = module.temporal_transformer.transformer_blocks[0].scaler.spatial_convs[2]
        last.bias.fill_(20.0 if open_always else 5.0)
        if open_always:
            last.weight.zero_()


def network_weights(start: Path) -> dict[str, Tensor]:
    """The network's state dict, its adapter if there is one, in a model folder or a stage's result, in float32."""
    if start.is_dir():
        return MotionTransferUNet.from_pretrained(start / "unet", low_cpu_mem_usage=False).float().state_dict()
    return load_weights(start, "unet") | load_weights(start, "adapter")
