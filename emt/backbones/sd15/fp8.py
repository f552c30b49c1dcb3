"""The network's widest linear layers in float8 (e4m3), on GPUs that multiply it twice as fast as float16.

Weights have a scale for each output channel, computed once; activations one for each token, which the layer norm or
the GEGLU before the matmul computes (`emt_kernels.quantize`). Matmuls accumulate in float32 and return the network's
own dtype; everything else stays in it.

Float8 has three bits after the point, so that a matmul is 4% off. What is added to the residual stream may be: the
feed-forward layers, and query, key and value. What the stream itself goes through may not: projections into and out of
the transformers and the 1×1 convolutions of residual blocks would double the error of the network, for a tenth of the
gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt.backbones.sd15.layers import QKV, FeedForward, QuantizingLayerNorm
from emt_kernels.quantize import Quantized, geglu_quantized, quantize_rows

#: Multiply–adds per byte of memory traffic at which an fp16 matmul becomes compute-bound on compute capability 9.0 (the
#: ridge of the roofline).
_RIDGE = 240.0

#: Selects matmuls, by channels out, channels in, and whether the input is needed in full as well.
Choice = Callable[[int, int, bool], bool]
#: A layer, as its parent and its name there, so that it can be replaced.
Slot = tuple[nn.Module, str]


def is_faster(outputs: int, inputs: int, exact: bool = False) -> bool:
    """Return whether a matmul of many tokens is faster in float8, if the kernel before it quantizes.

    A matmul takes as long as its arithmetic or its traffic, whichever is longer. In bytes of traffic for each token:
    float16 reads 2·inputs and writes 2·outputs; float8 reads half of that, at twice the speed of arithmetic. The kernel
    before it writes inputs less, or inputs more if it writes the activations in full as well.

    Args:
        outputs: channels out.
        inputs: channels in.
        exact: whether the activations are needed in full as well.
    """
    half = 2 * max(outputs * inputs / _RIDGE, inputs + outputs)
    cost = inputs if exact else -inputs
    return max(outputs * inputs / _RIDGE, inputs + 2 * outputs) + cost < 0.95 * half


class Fp8Linear(nn.Module):
    """A linear layer whose matmul is in float8. It has no gradients.

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
        # As bytes, which nobody converts to another dtype along with the network.
        self.register_buffer("values", quantized.values.view(torch.uint8), persistent=False)
        self.register_buffer("scale", quantized.scale.t().contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        rows = x if isinstance(x, Quantized) else quantize_rows(x)
        values, scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
        out = scaled_matmul(values, scale, self.values.view(values.dtype), self.scale, self.bias, self.dtype)
        return out.view(*rows.values.shape[:-1], -1)


class Fp8GEGLU(nn.Module):
    """`emt.backbones.sd15.layers.GEGLU` whose result is quantized, for the matmul after it."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor | Quantized) -> Quantized:
        """(…, channels) → rows of (…, inner)."""
        return geglu_quantized(self.proj(x))


def scaled_matmul_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Reference of `scaled_matmul`, in plain PyTorch."""
    out = F.linear(x.float() * x_scale, weight.float() * weight_scale.t())
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_matmul(
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
        return scaled_matmul_reference(x, x_scale, weight, weight_scale, bias, dtype)
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
    """Return whether matmuls with a scale for each row can return this dtype here, and add a bias of it.

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


def quantize_self_attention(
    norms: Sequence[Slot], projections: Sequence[QKV], choice: Choice, exact: bool = False
) -> None:
    """Compute query, key and value after a norm in one matmul in float8, if `choice` selects it.

    Args:
        norms: the norm, and one that denoising has in its place.
        projections: all that read what they quantize, of one shape.
        choice: selects matmuls.
        exact: whether the norm is needed in full as well.
    """
    weights = [torch.cat([qkv.to_q.weight, qkv.to_k.weight, qkv.to_v.weight]) for qkv in projections]
    if any(isinstance(qkv.to_qkv, Fp8Linear) for qkv in projections) or not _fits(weights[0], choice, exact):
        return
    for qkv, weight in zip(projections, weights, strict=True):
        qkv.to_qkv = Fp8Linear(weight, None)
    _quantize_norms(norms)


def quantize_linear(norms: Sequence[Slot], layers: Sequence[Slot], choice: Choice) -> None:
    """Compute a linear layer after a norm in float8, if `choice` selects it.

    Args:
        norms: the norm, and one that denoising has in its place.
        layers: the layer, and one that denoising has in its place.
        choice: selects matmuls.
    """
    if _quantize(layers, choice):
        _quantize_norms(norms)


def quantize_feed_forward(
    norms: Sequence[Slot], ff: FeedForward, first: Sequence[Slot], last: Sequence[Slot], choice: Choice
) -> None:
    """Compute those of a feed-forward layer's two matmuls in float8 that `choice` selects.

    Args:
        norms: the norm before it, and one that denoising has in its place.
        ff: the layer.
        first: its first matmul, and one that denoising has in its place.
        last: its last matmul, likewise.
        choice: selects matmuls.
    """
    quantize_linear(norms, first, choice)
    if _quantize(last, choice):
        gate: Any = ff.net[0]
        ff.net[0] = Fp8GEGLU(gate.proj)


def _quantize(layers: Sequence[Slot], choice: Choice) -> bool:
    """Replace a linear layer, and one that denoising has in its place; whether they were and fit."""
    found = [parent.get_submodule(name) for parent, name in layers]
    if not isinstance(found[0], nn.Linear) or not _fits(found[0].weight, choice):
        return False
    for (parent, name), layer in zip(layers, found, strict=True):
        assert isinstance(layer, nn.Linear)
        setattr(parent, name, Fp8Linear(layer.weight, layer.bias))
    return True


def _fits(weight: Tensor, choice: Choice, exact: bool = False) -> bool:
    outputs, inputs = weight.shape
    return outputs % 16 == 0 and inputs % 16 == 0 and choice(outputs, inputs, exact)


def _quantize_norms(norms: Sequence[Slot]) -> None:
    """Have norms before a matmul quantize."""
    for parent, name in norms:
        norm: Any = parent.get_submodule(name)
        quantizing = QuantizingLayerNorm(norm.normalized_shape, norm.eps, device="meta")
        quantizing.weight, quantizing.bias = norm.weight, norm.bias
        setattr(parent, name, quantizing)
