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
    parent: nn.Module, norm: str, projections: Sequence[QKV], choice: Choice, exact: bool = False
) -> None:
    """Compute query, key and value after a norm in one matmul in float8, if `choice` selects it.

    Args:
        parent: has the norm.
        norm: its name.
        projections: all that read what the norm quantizes.
        choice: selects matmuls.
        exact: whether the norm is needed in full as well.
    """
    weights = [torch.cat([qkv.to_q.weight, qkv.to_k.weight, qkv.to_v.weight]) for qkv in projections]
    if any(isinstance(qkv.to_qkv, Fp8Linear) for qkv in projections) or not _fits(weights[0], choice, exact):
        return
    for qkv, weight in zip(projections, weights, strict=True):
        qkv.to_qkv = Fp8Linear(weight, None)
    _quantize_norm(parent, norm)


def quantize_query(parent: nn.Module, norm: str, attention: Any, choice: Choice) -> None:
    """Compute the query of a cross-attention after a norm in float8, if `choice` selects it."""
    if isinstance(attention.to_q, nn.Linear) and _fits(attention.to_q.weight, choice):
        attention.to_q = Fp8Linear(attention.to_q.weight, None)
        _quantize_norm(parent, norm)


def quantize_feed_forward(parent: nn.Module, norm: str, ff: FeedForward, choice: Choice) -> None:
    """Compute those of a feed-forward layer's two matmuls in float8 that `choice` selects."""
    net: Any = ff.net
    first: Any = net[0]
    if isinstance(first.proj, nn.Linear) and _fits(first.proj.weight, choice):
        first.proj = Fp8Linear(first.proj.weight, first.proj.bias)
        _quantize_norm(parent, norm)
    if isinstance(net[2], nn.Linear) and _fits(net[2].weight, choice):
        net[0] = Fp8GEGLU(first.proj)
        net[2] = Fp8Linear(net[2].weight, net[2].bias)


def _fits(weight: Tensor, choice: Choice, exact: bool = False) -> bool:
    outputs, inputs = weight.shape
    return outputs % 16 == 0 and inputs % 16 == 0 and choice(outputs, inputs, exact)


def _quantize_norm(parent: nn.Module, name: str) -> None:
    """Have the norm before a matmul quantize."""
    norm: Any = parent.get_submodule(name)
    quantizing = QuantizingLayerNorm(norm.normalized_shape, norm.eps, device="meta")
    quantizing.weight, quantizing.bias = norm.weight, norm.bias
    setattr(parent, name, quantizing)
