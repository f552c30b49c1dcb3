"""Attention extended to more keys, which have a bias and may be near in time only, on Hopper GPUs.

Blockwise softmax as in FlashAttention (Dao et al. 2022, arXiv 2205.14135): of the attention that there is, its output
and the logarithms of its sums of weights are all that is needed. Libraries take a bias of every key as further
channels of queries and keys, or as a mask, and are slower with either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emt_kernels.selection import INSTALLED, is_fused, untraced


def is_extensible(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `extend_attention` launches its kernel for such tensors: those it was measured to be faster for.

    Inference on a Hopper GPU in half precision; channels of a head are a power of two from 16 to 128.
    """
    return (
        is_fused(query)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] in (16, 32, 64, 128)
        and torch.cuda.get_device_capability(query.device)[0] == 9
    )


def extend_attention_reference(
    own: Tensor,
    own_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    frames: int,
    neighbours: int | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch reference of `extend_attention`."""
    batch, _, tokens, channels = query.shape
    key, value = (t.repeat(batch // t.shape[0], 1, 1, 1) for t in (key, value))
    logits = query @ key.mT / channels**0.5 + bias.unsqueeze(2)
    if neighbours is not None:
        frame = torch.arange(tokens, device=query.device) // (tokens // frames)
        logits = logits.masked_fill((frame[:, None] - frame).abs() > neighbours, -torch.inf)
    share = torch.sigmoid(logits.logsumexp(-1) - own_sum).unsqueeze(-1)
    if present is not None:
        share = share * present.repeat(batch // len(present)).view(-1, 1, 1, 1)
    return ((1 - share) * own + share * (logits.softmax(-1) @ value)).to(own.dtype)


def extend_attention(
    own: Tensor,
    own_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    frames: int,
    neighbours: int | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Extend an attention to more keys. Has no gradients.

    The logit of query q and key k is ``q·k / √channels + bias of k``.

    Args:
        own: output of the attention that there is, (batch, heads, tokens, channels).
        own_sum: logarithms of its sums of weights, (batch, heads, tokens), float32.
        query: as `own`.
        key: further ones, (n, heads, tokens, channels), n a divisor of batch: sample i attends to those of i mod n.
        value: likewise.
        bias: of further keys, (batch, heads, tokens).
        frames: that tokens are divided into.
        neighbours: frames on either side whose further keys a query sees besides those of its own; None for all.
        present: which samples have further keys, (m,) bool, m a divisor of batch: sample i as of i mod m. Those without
            are `own`, and take no time. None for all.

    Returns:
        As `own`.

    Raises:
        ValueError: for shapes that do not fit each other, which it names.
    """
    shape = tuple(query.shape)
    for name, found, expected in (
        ("own", own.shape, shape),
        ("own_sum", own_sum.shape, shape[:3]),
        ("bias", bias.shape, shape[:3]),
        ("value", value.shape, key.shape),
    ):
        if found != expected:
            raise ValueError(f"{name} has shape {tuple(found)}, expected {tuple(expected)}")
    if key.shape[1:] != query.shape[1:] or shape[0] % key.shape[0]:
        raise ValueError(f"key has shape {tuple(key.shape)}, expected {shape}, or a divisor of its batch")
    if shape[2] % frames:
        raise ValueError(f"{frames} frames do not divide the tokens of query, shape {shape}")
    if present is not None and (present.ndim != 1 or shape[0] % len(present)):
        raise ValueError(f"present has shape {tuple(present.shape)}, expected ({shape[0]},), or a divisor of it")
    given = own, own_sum, query, key, value, bias, frames, neighbours, present
    return launch(*given) if is_extensible(query, key, value) else extend_attention_reference(*given)


if INSTALLED:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _extend_attention(
        query,
        key,
        value,
        bias,
        own,
        own_sum,
        present,
        out,
        tokens,
        references,
        presences,
        frame,
        neighbours,
        heads,
        bias_sample,
        bias_head,
        own_sample,
        own_head,
        own_token,
        sum_sample,
        sum_head,
        scale,
        NEAR: tl.constexpr,
        SOME: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """ROWS queries of one head of one sample.

        `query`, `key` and `value` are descriptors of (samples·tokens, heads·channels) with blocks of one head; `out` is
        (batch, tokens, heads, channels). What a block reads beyond the sample's tokens has weight 0.
        """
        LOG2_E: tl.constexpr = 1.4426950408889634
        sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
        first = tl.program_id(0) * ROWS
        row, channel = first + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
        has = row < tokens
        column = (head * CHANNELS).to(tl.int32)
        base = (sample % references * tokens).to(tl.int32)
        bias += sample * bias_sample + head * bias_head
        begin, end = 0, tokens
        if NEAR:
            last = tl.minimum(first + ROWS, tokens) - 1
            begin = tl.maximum(first // frame - neighbours, 0) * frame
            end = tl.minimum((last // frame + neighbours + 1) * frame, tokens)
        if SOME:
            end = tl.where(tl.load(present + sample % presences) != 0, end, begin)
        q = query.load([(sample * tokens).to(tl.int32) + first, column])
        # A row may see none of the first block's keys: from here on its weights are 0 where minus infinity is added.
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS, CHANNELS), tl.float32)
        for start in tl.range(begin, end, KEYS):
            place = start + tl.arange(0, KEYS)
            added = tl.load(bias + place, mask=place < end, other=float("-inf")).to(tl.float32) * LOG2_E
            logits = tl.dot(q, key.load([base + start, column]).T) * (scale * LOG2_E) + added[None, :]
            if NEAR:
                apart = tl.abs(row[:, None] // frame - place[None, :] // frame)
                logits = tl.where(apart <= neighbours, logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, axis=1))
            weights = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            mean = tl.dot(weights.to(q.dtype), value.load([base + start, column]), mean * shrink[:, None])
            highest = higher
        total = tl.where(has & (total > 0.0), total, 1.0)  # of no keys the share is e to the power of -1e30
        a_sum = tl.load(own_sum + sample * sum_sample + head * sum_head + row, mask=has, other=0.0)
        own += sample * own_sample + head * own_head
        a = tl.load(own + row.to(tl.int64)[:, None] * own_token + channel[None, :], mask=has[:, None], other=0.0)
        share = tl.sigmoid((highest + tl.log2(total)) * (1.0 / LOG2_E) - a_sum)
        y = (1.0 - share)[:, None] * a.to(tl.float32) + (share / total)[:, None] * mean
        at = ((sample * tokens + row)[:, None] * heads + head) * CHANNELS + channel[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=has[:, None])

    def launch(
        own: Tensor,
        own_sum: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        frames: int,
        neighbours: int | None = None,
        present: Tensor | None = None,
        rows: int = 64,
        keys: int = 64,
        warps: int = 4,
        stages: int = 3,
    ) -> Tensor:
        """Run the kernel with blocks of `rows` queries and `keys` keys."""
        batch, heads, tokens, channels = query.shape

        def described(x: Tensor, block: int) -> Any:
            flat = x.transpose(1, 2).contiguous().view(-1, heads * channels)
            return TensorDescriptor.from_tensor(flat, [block, channels])

        own = own if own.stride(3) == 1 else own.contiguous()
        bias, own_sum = (t if t.stride(2) == 1 else t.contiguous() for t in (bias, own_sum))
        out = query.new_empty((batch, tokens, heads, channels))
        untraced(_extend_attention)[(triton.cdiv(tokens, rows), batch * heads)](
            query=described(query, rows),
            key=described(key, keys),
            value=described(value, keys),
            bias=bias,
            own=own,
            own_sum=own_sum,
            present=own_sum if present is None else present.view(torch.uint8),
            out=out,
            tokens=tokens,
            references=key.shape[0],
            presences=1 if present is None else len(present),
            frame=tokens // frames,
            neighbours=frames if neighbours is None else neighbours,
            heads=heads,
            bias_sample=bias.stride(0),
            bias_head=bias.stride(1),
            own_sample=own.stride(0),
            own_head=own.stride(1),
            own_token=own.stride(2),
            sum_sample=own_sum.stride(0),
            sum_head=own_sum.stride(1),
            scale=channels**-0.5,
            NEAR=neighbours is not None,
            SOME=present is not None,
            ROWS=rows,
            KEYS=keys,
            CHANNELS=channels,
            num_warps=warps,
            num_stages=stages,
        )
        return out.transpose(1, 2)
