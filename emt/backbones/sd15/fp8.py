"""The network's widest linear layers in float8 (e4m3), on GPUs that multiply it twice as fast as float16.

Weights have a scale for each output channel, computed once; activations one for each token, which the layer norm or
the GEGLU before the product computes (`emt_kernels.quantize`). Products are added up in float32 and come out in the
network's own type; everything else stays in it.

Float8 has three bits after the point, so that a product is 4% off. What is added to the residual stream may be: the
feed-forward layers, and query, key and value. What the stream itself goes through may not: projections into and out of
the transformers and the 1×1 convolutions of residual blocks would double the error of the network, for a tenth of the
gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbones.sd15.motion_module import QKV, FeedForward, QuantizingLayerNorm, TemporalTransformerBlock
from emt.backbones.sd15.unet import MotionTransferUNet, SpatialTransformerBlock
from emt.errors import EmtError
from emt_kernels.quantize import Quantized, geglu_quantized, quantize_rows

#: Products of 16-bit numbers that a GPU of compute capability 9.0 makes while it reads or writes a byte.
_PRODUCTS = 240.0


def check_fp8(device: torch.device | str) -> None:
    """Say whether a device multiplies in float8.

    Raises:
        EmtError: it does not.
    """
    device = torch.device(device)
    problem = "fp8 needs an NVIDIA GPU"
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        name, found = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        problem = f"fp8 needs a GPU of compute capability 8.9 or newer, {name} has {found}"
    raise EmtError(f"{problem} (the device is {device})", "Allowed here are --precision auto, fp32, fp16 and bf16.")


def is_faster(outputs: int, inputs: int, exact: bool = False) -> bool:
    """Whether a product of many tokens is faster in float8, if the kernel before it quantizes.

    A product takes as long as its arithmetic or its traffic, whichever is longer. In bytes of traffic for each token:
    float16 reads 2·inputs and writes 2·outputs; float8 reads half of that, at twice the speed of arithmetic. The kernel
    before it writes inputs less, or inputs more if it writes the activations as they were, too.

    Args:
        outputs: channels out.
        inputs: channels in.
        exact: whether the activations are needed as they were, too.
    """
    half = 2 * max(outputs * inputs / _PRODUCTS, inputs + outputs)
    cost = inputs if exact else -inputs
    return max(outputs * inputs / _PRODUCTS, inputs + 2 * outputs) + cost < 0.95 * half


class Fp8Linear(nn.Module):
    """A linear layer whose product is in float8. It has no gradients.

    Args:
        weight: (outputs, inputs); both are multiples of 16.
        bias: (outputs,) or None.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        quantized = quantize_rows(weight.detach())
        self.dtype = weight.dtype
        # As bytes, which nobody converts to another type along with the network.
        self.register_buffer("values", quantized.values.view(torch.uint8), persistent=False)
        self.register_buffer("scale", quantized.scale.t().contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        rows = x if isinstance(x, Quantized) else quantize_rows(x)
        values, scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
        out = scaled_product(values, scale, self.values.view(values.dtype), self.scale, self.bias, self.dtype)
        return out.view(*rows.values.shape[:-1], -1)


class Fp8GEGLU(nn.Module):
    """`emt.backbones.sd15.motion_module.GEGLU` whose result is quantized, for the product after it."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor | Quantized) -> Quantized:
        """(…, channels) → rows of (…, inner)."""
        return geglu_quantized(self.proj(x))


def scaled_product_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `scaled_product` computes, in plain PyTorch."""
    out = F.linear(x.float() * x_scale, weight.float() * weight_scale.t())
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(x · x_scale) (weight · weight_scaleᵀ)ᵀ + bias``.

    Args:
        x: (tokens, inputs), float8.
        x_scale: (tokens, 1), float32.
        weight: (outputs, inputs), float8.
        weight_scale: (1, outputs), float32.
        bias: (outputs,) in `dtype`.
        dtype: of the result, float16 or bfloat16 on a GPU.
    """
    if not x.is_cuda:
        return scaled_product_reference(x, x_scale, weight, weight_scale, bias, dtype)
    own, with_bias = _abilities(x.device, dtype)
    out = torch._scaled_mm(
        x,
        weight.t(),
        x_scale,
        weight_scale,
        bias=bias if with_bias else None,
        out_dtype=dtype if own else torch.bfloat16,
        use_fast_accum=True,
    ).to(dtype)
    return out if with_bias or bias is None else out.add_(bias)


@functools.cache
def _abilities(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether products with a scale for each row can have this type here, and add a bias of it.

    PyTorch's kernels for some GPUs have bfloat16 only.
    """
    x, ones = torch.zeros(64, 64, device=device).to(torch.float8_e4m3fn), torch.ones(64, 1, device=device)
    can = []
    for bias in (None, torch.zeros(64, device=device, dtype=dtype)):
        try:
            torch._scaled_mm(x, x.t(), ones, ones.t().contiguous(), bias=bias, out_dtype=dtype, use_fast_accum=True)
            can.append(True)
        except (RuntimeError, ValueError, NotImplementedError):
            can.append(False)
    return can[0], can[1]


@torch.no_grad()
def use_fp8(
    unet: MotionTransferUNet, *, attention: bool = True, choice: Callable[[int, int, bool], bool] = is_faster
) -> int:
    """Let the network have its widest linear layers in float8; it cannot be trained afterwards, nor saved.

    Its weights have to be on their device, in their type, and complete (adapters merged). Calls that were compiled
    before do not know of it. Doing it again changes nothing.

    Args:
        unet: in float16 or bfloat16 on a GPU (`check_fp8`); in any type on a CPU, where float8 is emulated, slowly.
        attention: query, key and value, besides the feed-forward layers.
        choice: which products, by channels out, channels in, and whether what goes in is needed in full, too.

    Returns:
        How many products are in float8.
    """
    modules: list[Any] = list(unet.modules())
    for block in modules:
        if isinstance(block, SpatialTransformerBlock):
            if attention:
                _project(block, "norm1", block.attn1, choice)
                _project_query(block, "norm2", block.attn2, choice)
            _feed_forward(block, "norm3", block.ff, choice)
        elif isinstance(block, TemporalTransformerBlock):
            layers: Any = block.attention_blocks
            for i, layer in enumerate(layers if attention else ()):
                # The scaler reads the norm, too. The backbone's own projections read references, once for each.
                _project(block.norms, str(i), layer.projections(adapted=True), choice, exact=block.scaler is not None)
            _feed_forward(block, "ff_norm", block.ff, choice)
    return sum(isinstance(module, Fp8Linear) for module in unet.modules())


def _fits(weight: Tensor, choice: Callable[[int, int, bool], bool], exact: bool = False) -> bool:
    outputs, inputs = weight.shape
    return outputs % 16 == 0 and inputs % 16 == 0 and choice(outputs, inputs, exact)


def _project(parent: nn.Module, norm: str, qkv: QKV, choice: Callable[..., bool], exact: bool = False) -> None:
    """Query, key and value of a self-attention after a norm, in one product."""
    weight = torch.cat([qkv.to_q.weight, qkv.to_k.weight, qkv.to_v.weight])
    if qkv.fp8 is None and _fits(weight, choice, exact):
        qkv.fp8 = Fp8Linear(weight, None)
        _quantize_norm(parent, norm)


def _project_query(parent: nn.Module, norm: str, qkv: Any, choice: Callable[..., bool]) -> None:
    """The query of a cross-attention after a norm."""
    if isinstance(qkv.to_q, nn.Linear) and _fits(qkv.to_q.weight, choice):
        qkv.to_q = Fp8Linear(qkv.to_q.weight, None)
        _quantize_norm(parent, norm)


def _feed_forward(parent: nn.Module, norm: str, ff: FeedForward, choice: Callable[..., bool]) -> None:
    """A feed-forward layer's two products."""
    net: Any = ff.net
    first: Any = net[0]
    if isinstance(first.proj, nn.Linear) and _fits(first.proj.weight, choice):
        first.proj = Fp8Linear(first.proj.weight, first.proj.bias)
        _quantize_norm(parent, norm)
    if isinstance(net[2], nn.Linear) and _fits(net[2].weight, choice):
        net[0] = Fp8GEGLU(first.proj)
        net[2] = Fp8Linear(net[2].weight, net[2].bias)


def _quantize_norm(parent: nn.Module, name: str) -> None:
    """Have the norm before a product quantize."""
    norm: Any = parent.get_submodule(name)
    quantizing = QuantizingLayerNorm(norm.normalized_shape, norm.eps, device="meta")
    quantizing.weight, quantizing.bias = norm.weight, norm.bias
    setattr(parent, name, quantizing)
