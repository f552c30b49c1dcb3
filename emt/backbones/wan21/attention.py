"""Attention from a clip's tokens to [own tokens, reference tokens], with a bias for each reference token.

Of a query q in frame f, with own keys k and values v, reference keys r and values w, and biases b:

    weight of own token j        exp(q·k_j / √channels)
    weight of reference token j  exp(q·r_j / √channels + b_j), of frames f − n to f + n
    output                       the weighted mean of all v_j and w_j

Nothing of size (tokens × tokens) is made: biases are one more channel of queries and keys. Tensors are
(batch, heads, tokens, channels), tokens frame by frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.extend_attention import extend_attention, is_extensible

#: Fused attention takes channels by the eight.
_CHANNELS = 8
#: What keeps a query from a reference token: e to its power is nothing, and float16 can hold it.
_NEVER = -1e4


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention: (batch, heads, tokens, channels), (batch, heads, others, channels) twice."""
    return F.scaled_dot_product_attention(query, key, value)


def repeated(x: Tensor, batch: int) -> Tensor:
    """(n, …) → (batch, …), sample i from i mod n; not copied where n is 1."""
    n = x.shape[0]  # `len` would write the number of samples into an exported graph
    return x.expand(batch, *x.shape[1:]) if n == 1 else x.repeat(batch // n, *[1] * (x.ndim - 1))


def attention_with_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor,
    reference_value: Tensor,
    bias: Tensor,
    frames: int,
    neighbours: int | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Attend to own and reference tokens, as the module's docstring defines it.

    Inference on a Hopper GPU extends attention to the own tokens by a kernel. Elsewhere, inference with `neighbours`
    computes only the reference tokens that are seen, frame by frame, and merges that with attention to the own tokens;
    everything else is one attention, which has gradients.

    Args:
        query: of the clip, (batch, heads, tokens, channels); channels are a multiple of 8.
        key: of the clip, likewise.
        value: of the clip, likewise.
        reference_key: (n, heads, tokens, channels), n a divisor of batch: sample i attends to reference i mod n.
        reference_value: likewise.
        bias: logarithm of how much a reference token counts, (batch, heads, tokens).
        frames: that `tokens` are divided into.
        neighbours: reference frames on either side that a frame sees besides the one at its own time; None for all.
        present: which samples have a reference, (m,) bool, m a divisor of batch, for what need not be computed: biases
            of the others are such that reference tokens weigh nothing.
    """
    if is_extensible(query, reference_key, reference_value):
        own, own_sum = _with_logsumexp(query, key, value, query.shape[-1])
        given = own, own_sum, query, reference_key, reference_value, bias
        return extend_attention(*given, frames, neighbours, present)
    reference_key, reference_value = (repeated(t, query.shape[0]) for t in (reference_key, reference_value))
    given = query, key, value, reference_key, reference_value, bias
    if neighbours is None or neighbours >= frames - 1:
        return _joined(*given, None)
    if torch.is_grad_enabled() or query.device.type not in ("cpu", "cuda"):
        return _joined(*given, _unseen(frames, neighbours, query))
    return _merged(*given, frames, neighbours)


def _unseen(frames: int, neighbours: int, like: Tensor) -> Tensor:
    """Bias of the logits, (frames, reference frames): 0, or `_NEVER` times `1/√channels` where too far apart."""
    time = torch.arange(frames, device=like.device)
    return ((time[:, None] - time).abs() > neighbours).to(like.dtype) * _NEVER


def _joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor,
    reference_value: Tensor,
    bias: Tensor,
    unseen: Tensor | None,
) -> Tensor:
    """One attention over keys of both.

    Further channels carry what is added to logits: first the bias (1 in queries), then `unseen` (frames × frames), as
    its row in queries and as which frame it is in reference keys.
    """
    channels = query.shape[-1]
    columns = 1 if unseen is None else 1 + len(unseen)
    wide = channels + -(-columns // _CHANNELS) * _CHANNELS

    more_query = _empty(query, wide)
    more_query[..., 0].fill_(1)  # assigned, it would be a constant of an exported graph, which no module has
    more_key = _empty(reference_key, wide)
    more_key[..., 0] = bias * channels**0.5
    if unseen is not None:
        frames = len(unseen)
        more_query[..., 1:columns].unflatten(2, (frames, -1)).copy_(unseen[:, None])
        more_key[..., 1:columns].unflatten(2, (frames, -1)).copy_(torch.eye(frames, device=key.device)[:, None])

    query = torch.cat([query, more_query], dim=-1)
    own_key = F.pad(key, (0, wide - channels))
    keys = torch.cat([own_key, torch.cat([reference_key, more_key], dim=-1)], dim=2)
    values = F.pad(torch.cat([value, reference_value], dim=2), (0, wide - channels))
    return F.scaled_dot_product_attention(query, keys, values, scale=channels**-0.5)[..., :channels]


def _empty(like: Tensor, wide: int) -> Tensor:
    """Zeros in the channels that `like` lacks to have `wide`."""
    return like.new_zeros(*like.shape[:3], wide - like.shape[3])


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor,
    reference_value: Tensor,
    bias: Tensor,
    frames: int,
    neighbours: int,
) -> Tensor:
    """Attention to own tokens and, frame by frame, to reference tokens, weighted by their sums of exponentials."""
    channels = query.shape[-1]
    own, own_sum = _with_logsumexp(query, key, value, channels)

    wide = channels + _CHANNELS
    more_query, more_key = _empty(query, wide), _empty(reference_key, wide)
    more_query[..., 0].fill_(1)
    more_key[..., 0] = bias * channels**0.5
    q = torch.cat([query, more_query], dim=-1).unflatten(2, (frames, -1))
    k = torch.cat([reference_key, more_key], dim=-1).unflatten(2, (frames, -1))
    v = F.pad(reference_value, (0, _CHANNELS)).unflatten(2, (frames, -1))
    seen = [slice(max(f - neighbours, 0), f + neighbours + 1) for f in range(frames)]
    parts = [
        _with_logsumexp(q[:, :, f], k[:, :, s].flatten(2, 3), v[:, :, s].flatten(2, 3), channels)
        for f, s in enumerate(seen)
    ]
    other = torch.cat([part[..., :channels] for part, _ in parts], dim=2)
    other_sum = torch.cat([total for _, total in parts], dim=2)

    share = torch.sigmoid(other_sum - own_sum).unsqueeze(-1)  # of the reference in all weights
    return torch.lerp(own.float(), other.float(), share).to(query.dtype)


def _with_logsumexp(query: Tensor, key: Tensor, value: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Attention with a scale of 1/√channels, and the logarithm of each query's sum of weights, float32."""
    scale, ops = channels**-0.5, torch.ops.aten
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms leave them in float32
    if query.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    if query.dtype == torch.float32:
        out, total, *_ = ops._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
    elif _by_cudnn(query, key, value):
        out, total, *_ = ops._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, False, False, scale=scale
        )
        return out, total.squeeze(-1)
    else:
        out, total, *_ = ops._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return out, total[..., : query.shape[2]]


def _by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether cuDNN's attention, which takes half the time of FlashAttention's, takes these; never compiled."""
    if torch.compiler.is_compiling():
        return False
    given = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(given)
