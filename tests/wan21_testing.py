"""Small Wan 2.1 transformers: diffusers' own, and ours with the same weights."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.features import MotionFeatures

TEXT_TOKENS = 5
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 3,
}


@torch.no_grad()
def draw(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every weight, those of norms too, so that nothing is equal to another thing by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        inputs = p[0].numel() if p.ndim > 1 else 4
        p.copy_(torch.randn(p.shape, generator=generator) / inputs**0.5)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)


def diffusers_transformer(seed: int = 0, **sizes) -> WanTransformer3DModel:
    """diffusers' network with random weights."""
    model = WanTransformer3DModel(**(SIZES | sizes)).eval()
    draw(model, seed)
    return model


def transformer_like(theirs: WanTransformer3DModel, seed: int = 1, **options) -> WanMotionTransferTransformer:
    """Our network with the weights of diffusers', and an adapter of random weights."""
    sizes = {name: theirs.config[name] for name in SIZES}
    options = {"reference_blocks": (1, 2), "adapter_rank": 4, "scaler_channels": 8} | options
    model = WanMotionTransferTransformer(**sizes, **options).eval()
    draw(model, seed)
    given = theirs.state_dict()
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected
    assert all(".adapter." in name for name in missing)
    return model


def small_transformer(seed: int = 0, **options) -> WanMotionTransferTransformer:
    """Our network with random weights everywhere."""
    sizes = {name: options.pop(name) for name in list(options) if name in SIZES}
    return transformer_like(diffusers_transformer(seed, **sizes), seed + 1, **options)


def inputs(
    batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, seed: int = 0, channels: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (batch, channels, frames, height, width), timesteps (batch,) and text (batch, tokens, width)."""
    g = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, channels, frames, height, width, generator=g)
    timestep = torch.rand(batch, generator=g) * 1000
    return sample, timestep, torch.randn(batch, TEXT_TOKENS, SIZES["text_dim"], generator=g)


@torch.no_grad()
def motion_of(model: WanMotionTransferTransformer, n: int = 1, seed: int = 5, **shape) -> MotionFeatures:
    """The motion of n random references."""
    sample, _, text = inputs(n, seed=seed, **shape)
    return model.encode_reference(sample, 100.0, text)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference in parts of the largest value of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()
