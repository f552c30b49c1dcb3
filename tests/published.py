"""The published network's outputs at a small width, and the weights that made them.

`data/small.safetensors` holds inputs and outputs of the authors' released network (float32, CPU) with seeded random
weights; `data/small.json` the sizes and every parameter's published name and shape. `spatial` is the same with a
checkpoint that holds query, key and value of the spatial and text attentions of the up blocks, too. The weights are
drawn here as they were drawn there: over the names in sorted order, from one generator.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from emt.backbones.sd15.unet import MotionTransferUNet

DATA = Path(__file__).parent / "data"
SMALL = json.loads((DATA / "small.json").read_text())
#: Both kinds of checkpoints: temporal projections and scalers alone, and spatial and text projections as well.
KINDS = {"small": SMALL, "spatial": json.loads((DATA / "spatial.json").read_text())}


def draw(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        x = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            x = x / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):
            x = 1 + 0.1 * x
        else:
            x = 0.1 * x
        if name.endswith("scaler.spatial_convs.2.bias"):
            x = torch.full(shape, 5.5)
        state[name] = x
    return state


def small_states(kind: str = "small") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sizes = KINDS[kind]
    return draw(sizes["backbone_keys"], sizes["seed"]), draw(sizes["adapter_keys"], sizes["seed"] + 1)


def small_unet(kind: str = "small", **config) -> MotionTransferUNet:
    sizes = KINDS[kind]
    unet = MotionTransferUNet(
        block_out_channels=sizes["channels"],
        cross_attention_dim=sizes["cross_attention_dim"],
        attention_heads=sizes["heads"],
        **config,
    )
    unet.load_published(*small_states(kind))
    return unet.eval()


def tensors(kind: str = "small") -> dict[str, Tensor]:
    return load_file(DATA / f"{kind}.safetensors")


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
