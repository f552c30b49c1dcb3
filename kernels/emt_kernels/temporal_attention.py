"""Temporal integration: attention over time to a clip's own frames and a reference's frames.

EfficientMT (arXiv 2503.19369), section 3.3: the queries of a pixel are its F own frames, its keys and values are
the F own frames followed by the F reference frames, scaled by the scale map.

The kernels are bound by memory: they read every tensor once, in place, and write the results. The reference's
keys ``s·k + p`` are never formed: a query's score is ``s·(q·k) + q·p``, and its output the sum of ``(P·s) v`` and
``P p``. So everything goes from memory to the tensor cores as it is, and no sum can overflow in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import INSTALLED, substitute, triton_op, use_triton, wrap_triton

# CUDA's fused attention kernels put the batch on a grid axis of 65,535 blocks.
_MAX_ATTENTION_BATCH = 65_535


def temporal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    reference_key: Tensor | None = None,
    reference_value: Tensor | None = None,
    position_key: Tensor | None = None,
    position_value: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Attend over time at every pixel, to the clip's own frames and, if given, to the reference's.

    The reference's keys are ``scale · reference_key + position_key`` (values alike): linear in the scale map,
    so that the projections of the reference are constants of a clip.

    Args:
        query: (batch, frames, tokens, channels), tokens being height·width; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        heads: attention heads; divides channels.
        reference_key: (n, reference frames, tokens, channels); n divides batch, sample i uses reference i mod n.
        reference_value: as `reference_key`.
        position_key: (reference frames, channels).
        position_value: as `position_key`.
        scale: (batch, reference frames, tokens).

    Returns:
        (batch, frames, tokens, channels).
    """
    batch, _, tokens, _ = query.shape
    if reference_key is not None:
        assert reference_value is not None
        assert position_key is not None
        assert position_value is not None
        assert scale is not None
        n = reference_key.shape[0]
        s = scale.unflatten(0, (batch // n, n)).unsqueeze(-1)  # (batch/n, n, frames, tokens, 1)
        key = torch.cat([key, (s * reference_key + position_key[:, None]).flatten(0, 1)], dim=1)
        value = torch.cat([value, (s * reference_value + position_value[:, None]).flatten(0, 1)], dim=1)

    def per_pixel(x: Tensor) -> Tensor:  # (batch·tokens, heads, frames, channels/heads)
        return x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    q, k, v = per_pixel(query), per_pixel(key), per_pixel(value)
    if q.shape[0] > _MAX_ATTENTION_BATCH:
        parts = zip(*(x.split(_MAX_ATTENTION_BATCH) for x in (q, k, v)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(0, (batch, tokens)).permute(0, 3, 1, 2, 4).flatten(3)


def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    reference_key: Tensor | None = None,
    reference_value: Tensor | None = None,
    position_key: Tensor | None = None,
    position_value: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Attend over time at every pixel, to the clip's own frames and, if given, to the reference's.

    The reference's keys are ``scale · reference_key + position_key`` (values alike). Scores, softmax and sums are in
    float32 whatever the dtype of the tensors. Differentiable in every tensor; gradients repeat bit for bit.

    Args:
        query: (batch, frames, tokens, channels), tokens being height·width; `key` and `value` alike. Slices of one
            fused matmul are read in place: channels next to each other, any other strides.
        key: see `query`.
        value: see `query`.
        heads: attention heads; divides channels.
        reference_key: (n, reference frames, tokens, channels); n divides batch, sample i uses reference i mod n.
        reference_value: as `reference_key`.
        position_key: (reference frames, channels).
        position_value: as `position_key`.
        scale: (batch, reference frames, tokens).

    Returns:
        (batch, frames, tokens, channels), contiguous where the kernel runs, in the query's dtype.

    Raises:
        ValueError: for shapes that do not fit each other, which it names, and for a reference of which a part
            is missing.
    """
    _check(query, key, value, heads, reference_key, reference_value, position_key, position_value, scale)
    function = substitute("temporal_attention")
    if function is None:
        function = torch.ops.emt.temporal_attention if use_triton(query) else temporal_attention_reference
    return function(query, key, value, heads, reference_key, reference_value, position_key, position_value, scale)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    position_key: Tensor | None,
    position_value: Tensor | None,
    scale: Tensor | None,
) -> None:
    batch, _, tokens, channels = query.shape
    if channels % heads:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected channels divisible by {heads} heads")
    expected = [("key", key, query.shape), ("value", value, query.shape)]
    reference = (reference_key, reference_value, position_key, position_value, scale)
    if reference_key is not None:
        n, frames = reference_key.shape[:2]
        if batch % n:
            raise ValueError(f"{n} references for {batch} samples: the references must divide the samples")
        shapes = (
            ("reference_key", (n, frames, tokens, channels)),
            ("reference_value", (n, frames, tokens, channels)),
            ("position_key", (frames, channels)),
            ("position_value", (frames, channels)),
            ("scale", (batch, frames, tokens)),
        )
        for (name, shape), x in zip(shapes, reference, strict=True):
            if x is None:
                raise ValueError(f"reference_key is given without {name}")
            expected.append((name, x, torch.Size(shape)))
    elif any(x is not None for x in reference):
        raise ValueError("a part of the reference is given without reference_key")
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


# ------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Plan:
    """Division of the work: a program takes some heads of one pixel after another, a warp whole heads of it."""

    heads: int  # of a program, a power of two; as many as cover whole sectors of memory
    warps: int  # of a program, at most one a head
    stages: int  # pixels in flight: being loaded while one is computed, plus that one
    columns: int  # of a head in its first tile, a power of two; what is left goes into a second one
    pixels: int  # of a program, at most


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _rows(frames: int) -> int:
    """Rows of a tile that holds all frames: a power of two that tensor cores take."""
    return max(_power_of_two(frames), 16)


def _rest(head_size: int, columns: int) -> int:
    """Columns of a head's second tile, which the first one leaves: 0 or a power of two that tensor cores take."""
    return max(_power_of_two(head_size - columns), 16) if columns < head_size else 0


def _columns(head_size: int) -> int:
    """Columns of a head's first tile: a power of two below the head's size if a second tile saves padding."""
    whole = max(_power_of_two(head_size), 16)
    half = whole // 2
    return half if 16 <= half < head_size and half + _rest(head_size, half) < whole else whole


# Shared memory that a program may load into: every supported GPU has 99 KiB (RTX 30, 40 and 50), the rest is scratch.
_SHARED_MEMORY = 72 * 1024
_HEADS_BACKWARD = 2  # of a program
_PROGRAMS = 2048  # wanted, so that the last ones do not leave most of a GPU idle


def plan(heads: int, head_size: int, rows: int, itemsize: int, reference: bool) -> Plan:
    """Choose a plan for `rows` rows of `head_size` in all tensors that a pixel's head is computed from."""
    if head_size <= 64 and reference:
        # One head a program: with five tensors in flight, programs of fewer registers hide more of the memory's time.
        columns, together, stages, pixels = max(_power_of_two(head_size), 16), 1, 2, 4
    elif head_size <= 64:
        # One tile, so that a row is read in as few pieces as there can be: 40 channels are two and a half sectors.
        columns, together, stages, pixels = max(_power_of_two(head_size), 16), 2, 3, 4
    else:
        columns, together, stages, pixels = _columns(head_size), 4, 2, 8
    tile = rows * (columns + _rest(head_size, columns)) * itemsize
    together = min(together, _power_of_two(heads))
    while together > 1 and 2 * together * tile > _SHARED_MEMORY:
        together //= 2
    if 2 * together * tile > _SHARED_MEMORY:
        stages = 1
    return Plan(heads=together, warps=together, stages=stages, columns=columns, pixels=pixels)


def _reference(
    key: Tensor,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    position_key: Tensor | None,
    position_value: Tensor | None,
    scale: Tensor | None,
) -> dict[str, Tensor]:
    """The reference's tensors by name; without a reference tensors of the same dimensions, which are never read."""
    if reference_key is None:
        row = key[0, :, 0]
        return {
            "reference_key": key,
            "reference_value": key,
            "position_key": row,
            "position_value": row,
            "scale": key[..., 0],
        }
    assert reference_value is not None
    assert position_key is not None
    assert position_value is not None
    assert scale is not None
    return {
        "reference_key": reference_key,
        "reference_value": reference_value,
        "position_key": position_key,
        "position_value": position_value,
        "scale": scale,
    }


def _plan(query: Tensor, heads: int, reference_frames: int) -> Plan:
    """The plan for the forward kernel, with fewer pixels for a program where there are few."""
    batch, frames, tokens, channels = query.shape
    rows = 3 * _rows(frames) + (2 * _rows(reference_frames) if reference_frames else 0)
    p = plan(heads, channels // heads, rows, query.itemsize, reference_frames > 0)
    pixels = max(1, min(p.pixels, batch * -(-heads // p.heads) * tokens // _PROGRAMS))
    return replace(p, pixels=pixels, stages=p.stages if pixels > 1 else 1)


def _arguments(tensors: dict[str, Tensor], heads: int, reference_frames: int, p: Plan) -> dict[str, Any]:
    """Arguments of a kernel that reads and writes `tensors`."""
    query = tensors["query"]
    batch, frames, tokens, channels = query.shape
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        if name == "scale_gradient":
            arguments[name] = x
            continue
        if name != "scale":
            x = x.to(query.dtype)
            x = x if x.stride(-1) == 1 else x.contiguous()
        # (batch, frame, token, channel); positions are (frame, channel), the scale map (batch, frame, token).
        dimensions = ("frame",) if x.ndim == 2 else ("batch", "frame", "token")
        arguments[name] = x
        arguments |= {f"{name}_{dimension}": stride for dimension, stride in zip(dimensions, x.stride())}
    return arguments | {
        "batch": batch,
        "tokens": tokens,
        "references": tensors["reference_key"].shape[0],
        "HEADS": heads,
        "HEAD_SIZE": channels // heads,
        "FRAMES": frames,
        "REFERENCE_FRAMES": reference_frames,
        "HEADS_TOGETHER": p.heads,
        "ROWS": _rows(frames),
        "REFERENCE_ROWS": _rows(reference_frames),
        "COLUMNS": p.columns,
        "STAGES": p.stages,
        "SHARED": reference_frames > 0 and tensors["reference_key"].shape[0] < batch,
        "SOFTENING": math.log2(math.e) / math.sqrt(channels // heads),
        "num_warps": p.warps,
    }


def _forward_arguments(
    tensors: dict[str, Tensor], heads: int, reference_frames: int, p: Plan
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of the forward kernel."""
    batch, _, tokens, channels = tensors["query"].shape
    arguments = _arguments(tensors, heads, reference_frames, p)
    arguments |= {"pixels": p.pixels, "REST": _rest(channels // heads, p.columns)}
    return (batch * -(-heads // p.heads) * -(-tokens // p.pixels),), arguments


def _backward_arguments(
    tensors: dict[str, Tensor], heads: int, reference_frames: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of the backward kernel."""
    batch, _, tokens, channels = tensors["query"].shape
    p = Plan(
        heads=_HEADS_BACKWARD,
        warps=_HEADS_BACKWARD,
        stages=2,
        columns=min(_columns(channels // heads), 32),
        pixels=1,
    )
    grid = (batch * -(-heads // _HEADS_BACKWARD) * tokens,)
    return grid, _arguments(tensors, heads, reference_frames, p)


# ------------------------------------------------------------------------------------------------------- kernels

if INSTALLED:
    import triton
    import triton.language as tl

    # Tiles are (heads of a program, frames, columns of a head). Products are batched over heads: each warp has its own.
    # The forward kernel holds a head in two tiles, `a` and `b`, where one power of two does not cover it tightly.

    @triton.jit
    def _tile(x, head, exists, rows, first, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """Pointers and mask of one tile; `rows` are offsets of frames, `exists` says which heads and frames are."""
        column = first + tl.arange(0, COLUMNS)
        pointers = x + (rows[None, :, None] + (head * HEAD_SIZE)[:, None, None] + column[None, None, :])
        return pointers, exists[:, :, None] & (column < HEAD_SIZE)[None, None, :]

    @triton.jit
    def _load_tile(x, head, exists, rows, first, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr):
        pointers, mask = _tile(x, head, exists, rows, first, COLUMNS, HEAD_SIZE)
        return tl.load(pointers, mask=mask, other=0.0)

    @triton.jit
    def _store_tile(y, x, head, exists, rows, first, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """Write a tile with heads next to columns: together they are rows of memory, in whole sectors."""
        pointers, mask = _tile(x, head, exists, rows, first, COLUMNS, HEAD_SIZE)
        y = tl.permute(y.to(x.dtype.element_ty), (1, 0, 2))
        tl.store(tl.permute(pointers, (1, 0, 2)), y, mask=tl.permute(mask, (1, 0, 2)))

    # Products of float32 are made of three of TensorFloat-32: as exact. Types of 16 bits are taken as they are.

    @triton.jit
    def _add_matmuls(total, x, y):
        """Accumulate the matmuls of all rows: (heads, rows of x, columns) and (heads, rows of y, columns)."""
        return tl.dot(x, tl.permute(y, (0, 2, 1)), total, input_precision="tf32x3")

    @triton.jit
    def _sums(weights, y):
        """Sums of rows: (heads, rows, rows of y) and (heads, rows of y, columns), in float32."""
        return tl.dot(weights.to(y.dtype), y, input_precision="tf32x3")

    @triton.jit
    def _load(x, head, exists, rows, COLUMNS: tl.constexpr, REST: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """A head's two tiles; the first one twice if there is no second."""
        a = _load_tile(x, head, exists, rows, 0, COLUMNS, HEAD_SIZE)
        b = a
        if REST > 0:
            b = _load_tile(x, head, exists, rows, COLUMNS, REST, HEAD_SIZE)
        return a, b

    @triton.jit
    def _matmuls(x_a, x_b, y_a, y_b, REST: tl.constexpr):
        """Matmul of all rows of two pairs of tiles."""
        s = tl.dot(x_a, tl.permute(y_a, (0, 2, 1)), input_precision="tf32x3")
        if REST > 0:
            s = _add_matmuls(s, x_b, y_b)
        return s

    @triton.jit
    def _add_sums(a, b, weights, y_a, y_b, REST: tl.constexpr):
        """Add sums of rows of a pair of tiles."""
        weights = weights.to(y_a.dtype)
        a = tl.dot(weights, y_a, a, input_precision="tf32x3")
        if REST > 0:
            b = tl.dot(weights, y_b, b, input_precision="tf32x3")
        return a, b

    @triton.jit
    def _probabilities(own, reference, own_exists, reference_exists, REFERENCE: tl.constexpr, SOFTENING: tl.constexpr):
        """Exponentials of own and reference scores, and the reciprocals of their sums (heads, queries, 1).

        The maximum is subtracted before the factor is applied: scores may be so large that their rounding matters.
        """
        own = tl.where(own_exists[None, None, :], own, float("-inf"))
        top = tl.max(own, axis=2, keep_dims=True)
        if REFERENCE:
            reference = tl.where(reference_exists[None, None, :], reference, float("-inf"))
            top = tl.maximum(top, tl.max(reference, axis=2, keep_dims=True))
        own = tl.exp2((own - top) * SOFTENING)
        total = tl.sum(own, axis=2, keep_dims=True)
        if REFERENCE:
            reference = tl.exp2((reference - top) * SOFTENING)
            total += tl.sum(reference, axis=2, keep_dims=True)
        return own, reference, 1.0 / total

    @triton.jit
    def _place(batch, tokens, pixels, HEADS: tl.constexpr, HEADS_TOGETHER: tl.constexpr, SHARED: tl.constexpr):
        """Sample, group of heads and first token of this program.

        Samples that share a reference are at a token at the same time, so that the reference comes from the cache.
        """
        program = tl.program_id(0)
        groups: tl.constexpr = (HEADS + HEADS_TOGETHER - 1) // HEADS_TOGETHER
        if SHARED:
            sample = program % batch
            rest = program // batch
        else:
            programs = groups * tl.cdiv(tokens, pixels)  # of a sample
            sample = program // programs
            rest = program % programs
        return sample, rest % groups, (rest // groups).to(tl.int64) * pixels

    @triton.jit
    def _temporal_attention(
        query,
        key,
        value,
        reference_key,
        reference_value,
        position_key,
        position_value,
        scale,
        out,
        batch,
        tokens,
        references,
        pixels,
        query_batch,
        query_frame,
        query_token,
        key_batch,
        key_frame,
        key_token,
        value_batch,
        value_frame,
        value_token,
        reference_key_batch,
        reference_key_frame,
        reference_key_token,
        reference_value_batch,
        reference_value_frame,
        reference_value_token,
        position_key_frame,
        position_value_frame,
        scale_batch,
        scale_frame,
        scale_token,
        out_batch,
        out_frame,
        out_token,
        HEADS: tl.constexpr,
        HEAD_SIZE: tl.constexpr,
        FRAMES: tl.constexpr,
        REFERENCE_FRAMES: tl.constexpr,  # 0 without reference
        HEADS_TOGETHER: tl.constexpr,
        ROWS: tl.constexpr,
        REFERENCE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        REST: tl.constexpr,
        STAGES: tl.constexpr,
        SHARED: tl.constexpr,
        SOFTENING: tl.constexpr,
    ):
        """Attention of HEADS_TOGETHER heads at up to `pixels` tokens of one sample, one after another."""
        sample, group, first = _place(batch, tokens, pixels, HEADS, HEADS_TOGETHER, SHARED)
        own_reference = (sample % references).to(tl.int64)
        sample = sample.to(tl.int64)
        head = group * HEADS_TOGETHER + tl.arange(0, HEADS_TOGETHER)
        frame = tl.arange(0, ROWS)
        exists = (head < HEADS)[:, None] & (frame < FRAMES)[None, :]
        query_rows = sample * query_batch + frame.to(tl.int64) * query_frame
        key_rows = sample * key_batch + frame.to(tl.int64) * key_frame
        value_rows = sample * value_batch + frame.to(tl.int64) * value_frame
        out_rows = sample * out_batch + frame.to(tl.int64) * out_frame

        reference_frame = tl.arange(0, REFERENCE_ROWS)
        reference_exists = (head < HEADS)[:, None] & (reference_frame < REFERENCE_FRAMES)[None, :]
        if REFERENCE_FRAMES > 0:
            far = reference_frame.to(tl.int64)
            reference_key_rows = own_reference * reference_key_batch + far * reference_key_frame
            reference_value_rows = own_reference * reference_value_batch + far * reference_value_frame
            scale += sample * scale_batch + far * scale_frame
            pk_a, pk_b = _load(position_key, head, reference_exists, far * position_key_frame, COLUMNS, REST, HEAD_SIZE)
            pv_a, pv_b = _load(
                position_value, head, reference_exists, far * position_value_frame, COLUMNS, REST, HEAD_SIZE
            )

        for i in tl.range(0, tl.minimum(pixels, tokens - first), num_stages=STAGES):
            t = first + i
            q_a, q_b = _load(query + t * query_token, head, exists, query_rows, COLUMNS, REST, HEAD_SIZE)
            k_a, k_b = _load(key + t * key_token, head, exists, key_rows, COLUMNS, REST, HEAD_SIZE)
            own = _matmuls(q_a, q_b, k_a, k_b, REST)
            reference = own
            if REFERENCE_FRAMES > 0:
                s = tl.load(scale + t * scale_token, mask=reference_frame < REFERENCE_FRAMES, other=0.0)
                s = s.to(tl.float32)[None, None, :]
                rk_a, rk_b = _load(
                    reference_key + t * reference_key_token,
                    head,
                    reference_exists,
                    reference_key_rows,
                    COLUMNS,
                    REST,
                    HEAD_SIZE,
                )
                reference = s * _matmuls(q_a, q_b, rk_a, rk_b, REST) + _matmuls(q_a, q_b, pk_a, pk_b, REST)
            own, reference, norm = _probabilities(
                own, reference, frame < FRAMES, reference_frame < REFERENCE_FRAMES, REFERENCE_FRAMES > 0, SOFTENING
            )
            v_a, v_b = _load(value + t * value_token, head, exists, value_rows, COLUMNS, REST, HEAD_SIZE)
            o_a = _sums(own, v_a)
            o_b = o_a
            if REST > 0:
                o_b = _sums(own, v_b)
            if REFERENCE_FRAMES > 0:
                rv_a, rv_b = _load(
                    reference_value + t * reference_value_token,
                    head,
                    reference_exists,
                    reference_value_rows,
                    COLUMNS,
                    REST,
                    HEAD_SIZE,
                )
                o_a, o_b = _add_sums(o_a, o_b, reference * s, rv_a, rv_b, REST)
                o_a, o_b = _add_sums(o_a, o_b, reference, pv_a, pv_b, REST)
            here = out + t * out_token
            _store_tile(o_a * norm, here, head, exists, out_rows, 0, COLUMNS, HEAD_SIZE)
            if REST > 0:
                _store_tile(o_b * norm, here, head, exists, out_rows, COLUMNS, REST, HEAD_SIZE)

    @triton.jit
    def _temporal_attention_backward(
        query,
        key,
        value,
        reference_key,
        reference_value,
        position_key,
        position_value,
        scale,
        gradient,
        query_gradient,
        key_gradient,
        value_gradient,
        reference_key_gradient,
        reference_value_gradient,
        scale_gradient,
        batch,
        tokens,
        references,
        query_batch,
        query_frame,
        query_token,
        key_batch,
        key_frame,
        key_token,
        value_batch,
        value_frame,
        value_token,
        reference_key_batch,
        reference_key_frame,
        reference_key_token,
        reference_value_batch,
        reference_value_frame,
        reference_value_token,
        position_key_frame,
        position_value_frame,
        scale_batch,
        scale_frame,
        scale_token,
        gradient_batch,
        gradient_frame,
        gradient_token,
        query_gradient_batch,
        query_gradient_frame,
        query_gradient_token,
        key_gradient_batch,
        key_gradient_frame,
        key_gradient_token,
        value_gradient_batch,
        value_gradient_frame,
        value_gradient_token,
        reference_key_gradient_batch,
        reference_key_gradient_frame,
        reference_key_gradient_token,
        reference_value_gradient_batch,
        reference_value_gradient_frame,
        reference_value_gradient_token,
        HEADS: tl.constexpr,
        HEAD_SIZE: tl.constexpr,
        FRAMES: tl.constexpr,
        REFERENCE_FRAMES: tl.constexpr,  # 0 without reference
        HEADS_TOGETHER: tl.constexpr,
        ROWS: tl.constexpr,
        REFERENCE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
        SHARED: tl.constexpr,
        SOFTENING: tl.constexpr,
    ):
        """Gradients of HEADS_TOGETHER heads at one token of one sample; probabilities are recomputed.

        The gradients of reference keys and values are those of a sample, before the scale: (batch, reference frames,
        tokens, channels). The gradient of the scale is the sum over the program's heads, (batch, groups of heads,
        tokens, reference frames). Heads are gone through twice in tiles of COLUMNS, for the matmuls of all rows and
        for the gradients: the second time they come from the cache, and few registers are needed.
        """
        sample, group, token = _place(batch, tokens, 1, HEADS, HEADS_TOGETHER, SHARED)
        own_reference = (sample % references).to(tl.int64)
        sample = sample.to(tl.int64)
        head = group * HEADS_TOGETHER + tl.arange(0, HEADS_TOGETHER)
        frame = tl.arange(0, ROWS)
        exists = (head < HEADS)[:, None] & (frame < FRAMES)[None, :]
        near = frame.to(tl.int64)
        query_rows = sample * query_batch + near * query_frame + token * query_token
        key_rows = sample * key_batch + near * key_frame + token * key_token
        value_rows = sample * value_batch + near * value_frame + token * value_token
        gradient_rows = sample * gradient_batch + near * gradient_frame + token * gradient_token

        own = tl.zeros((HEADS_TOGETHER, ROWS, ROWS), tl.float32)
        d_own = tl.zeros((HEADS_TOGETHER, ROWS, ROWS), tl.float32)
        reference_frame = tl.arange(0, REFERENCE_ROWS)
        if REFERENCE_FRAMES > 0:
            far = reference_frame.to(tl.int64)
            reference_exists = (head < HEADS)[:, None] & (reference_frame < REFERENCE_FRAMES)[None, :]
            rk_rows = own_reference * reference_key_batch + far * reference_key_frame + token * reference_key_token
            rv_rows = (
                own_reference * reference_value_batch + far * reference_value_frame + token * reference_value_token
            )
            pk_rows = far * position_key_frame
            pv_rows = far * position_value_frame
            scale += sample * scale_batch + far * scale_frame + token * scale_token
            s = tl.load(scale, mask=reference_frame < REFERENCE_FRAMES, other=0.0).to(tl.float32)[None, None, :]
            unscaled = tl.zeros((HEADS_TOGETHER, ROWS, REFERENCE_ROWS), tl.float32)
            positions = unscaled
            d_unscaled = unscaled
            d_positions = unscaled

        for first in tl.range(0, HEAD_SIZE, COLUMNS, num_stages=STAGES):
            q = _load_tile(query, head, exists, query_rows, first, COLUMNS, HEAD_SIZE)
            k = _load_tile(key, head, exists, key_rows, first, COLUMNS, HEAD_SIZE)
            v = _load_tile(value, head, exists, value_rows, first, COLUMNS, HEAD_SIZE)
            g = _load_tile(gradient, head, exists, gradient_rows, first, COLUMNS, HEAD_SIZE)
            own = _add_matmuls(own, q, k)
            d_own = _add_matmuls(d_own, g, v)
            if REFERENCE_FRAMES > 0:
                rk = _load_tile(reference_key, head, reference_exists, rk_rows, first, COLUMNS, HEAD_SIZE)
                rv = _load_tile(reference_value, head, reference_exists, rv_rows, first, COLUMNS, HEAD_SIZE)
                pk = _load_tile(position_key, head, reference_exists, pk_rows, first, COLUMNS, HEAD_SIZE)
                pv = _load_tile(position_value, head, reference_exists, pv_rows, first, COLUMNS, HEAD_SIZE)
                unscaled = _add_matmuls(unscaled, q, rk)
                positions = _add_matmuls(positions, q, pk)
                d_unscaled = _add_matmuls(d_unscaled, g, rv)
                d_positions = _add_matmuls(d_positions, g, pv)

        reference = own
        if REFERENCE_FRAMES > 0:
            reference = s * unscaled + positions
        own, reference, norm = _probabilities(
            own, reference, frame < FRAMES, reference_frame < REFERENCE_FRAMES, REFERENCE_FRAMES > 0, SOFTENING
        )
        own *= norm
        mean = tl.sum(own * d_own, axis=2, keep_dims=True)
        if REFERENCE_FRAMES > 0:
            reference *= norm
            d_reference = s * d_unscaled + d_positions
            mean += tl.sum(reference * d_reference, axis=2, keep_dims=True)
            d_reference = reference * (d_reference - mean) * (SOFTENING * 0.6931471805599453)
            d_scale = tl.sum(tl.sum(d_reference * unscaled + reference * d_unscaled, axis=1), axis=0)
            groups: tl.constexpr = (HEADS + HEADS_TOGETHER - 1) // HEADS_TOGETHER
            scale_gradient += ((sample * groups + group) * tokens + token) * REFERENCE_FRAMES + reference_frame
            tl.store(scale_gradient, d_scale, mask=reference_frame < REFERENCE_FRAMES)
        d_own = own * (d_own - mean) * (SOFTENING * 0.6931471805599453)

        dq_rows = sample * query_gradient_batch + near * query_gradient_frame + token * query_gradient_token
        dk_rows = sample * key_gradient_batch + near * key_gradient_frame + token * key_gradient_token
        dv_rows = sample * value_gradient_batch + near * value_gradient_frame + token * value_gradient_token
        if REFERENCE_FRAMES > 0:
            drk_rows = sample * reference_key_gradient_batch + far * reference_key_gradient_frame
            drk_rows += token * reference_key_gradient_token
            drv_rows = sample * reference_value_gradient_batch + far * reference_value_gradient_frame
            drv_rows += token * reference_value_gradient_token
        for first in tl.range(0, HEAD_SIZE, COLUMNS, num_stages=STAGES):
            q = _load_tile(query, head, exists, query_rows, first, COLUMNS, HEAD_SIZE)
            k = _load_tile(key, head, exists, key_rows, first, COLUMNS, HEAD_SIZE)
            g = _load_tile(gradient, head, exists, gradient_rows, first, COLUMNS, HEAD_SIZE)
            dq = _sums(d_own, k)
            if REFERENCE_FRAMES > 0:
                rk = _load_tile(reference_key, head, reference_exists, rk_rows, first, COLUMNS, HEAD_SIZE)
                pk = _load_tile(position_key, head, reference_exists, pk_rows, first, COLUMNS, HEAD_SIZE)
                dq += _sums(d_reference * s, rk) + _sums(d_reference, pk)
            dk = _sums(tl.permute(d_own, (0, 2, 1)), q)
            dv = _sums(tl.permute(own, (0, 2, 1)), g)
            _store_tile(dq, query_gradient, head, exists, dq_rows, first, COLUMNS, HEAD_SIZE)
            _store_tile(dk, key_gradient, head, exists, dk_rows, first, COLUMNS, HEAD_SIZE)
            _store_tile(dv, value_gradient, head, exists, dv_rows, first, COLUMNS, HEAD_SIZE)
            if REFERENCE_FRAMES > 0:
                drk = _sums(tl.permute(d_reference, (0, 2, 1)), q)
                drv = _sums(tl.permute(reference, (0, 2, 1)), g)
                _store_tile(drk, reference_key_gradient, head, reference_exists, drk_rows, first, COLUMNS, HEAD_SIZE)
                _store_tile(drv, reference_value_gradient, head, reference_exists, drv_rows, first, COLUMNS, HEAD_SIZE)

    # ------------------------------------------------------------------------------------------------- operators

    def launch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        reference_key: Tensor | None = None,
        reference_value: Tensor | None = None,
        position_key: Tensor | None = None,
        position_value: Tensor | None = None,
        scale: Tensor | None = None,
        chosen: Plan | None = None,
    ) -> Tensor:
        """Run the kernel by a plan, the one for these shapes unless one is given; see `temporal_attention`."""
        tensors = {"query": query, "key": key, "value": value}
        tensors |= _reference(key, reference_key, reference_value, position_key, position_value, scale)
        frames = 0 if reference_key is None else reference_key.shape[1]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        p = chosen or _plan(query, heads, frames)
        grid, arguments = _forward_arguments(tensors | {"out": out}, heads, frames, p)
        wrap_triton(_temporal_attention)[grid](**arguments)
        return out

    @triton_op("emt::temporal_attention")
    def _operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        reference_key: Tensor | None = None,
        reference_value: Tensor | None = None,
        position_key: Tensor | None = None,
        position_value: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        return launch(query, key, value, heads, reference_key, reference_value, position_key, position_value, scale)

    @_operator.register_fake
    def _(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        reference_key: Tensor | None = None,
        reference_value: Tensor | None = None,
        position_key: Tensor | None = None,
        position_value: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)

    def _gradients(query: Tensor, reference_key: Tensor | None, groups: int) -> dict[str, Tensor]:
        """Memory for what the backward kernel writes."""
        batch, _, tokens, channels = query.shape
        shapes = dict.fromkeys(("query", "key", "value"), query.shape)
        if reference_key is not None:
            shape = torch.Size((batch, reference_key.shape[1], tokens, channels))
            shapes |= {"reference_key": shape, "reference_value": shape}
        gradients = {
            f"{name}_gradient": torch.empty(shape, dtype=query.dtype, device=query.device)
            for name, shape in shapes.items()
        }
        if reference_key is not None:
            gradients["scale_gradient"] = torch.empty(
                (batch, groups, tokens, reference_key.shape[1]), dtype=torch.float32, device=query.device
            )
        return gradients

    @triton_op("emt::temporal_attention_backward")
    def _backward_operator(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        reference_key: Tensor | None = None,
        reference_value: Tensor | None = None,
        position_key: Tensor | None = None,
        position_value: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> list[Tensor]:
        tensors = {"query": query, "key": key, "value": value, "gradient": gradient}
        tensors |= _reference(key, reference_key, reference_value, position_key, position_value, scale)
        frames = 0 if reference_key is None else reference_key.shape[1]
        gradients = _gradients(query, reference_key, -(-heads // _HEADS_BACKWARD))
        unused = dict.fromkeys(("reference_key_gradient", "reference_value_gradient", "scale_gradient"), gradient)
        grid, arguments = _backward_arguments(tensors | unused | gradients, heads, frames)
        wrap_triton(_temporal_attention_backward)[grid](**arguments)
        return list(gradients.values())

    @_backward_operator.register_fake
    def _(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        reference_key: Tensor | None = None,
        reference_value: Tensor | None = None,
        position_key: Tensor | None = None,
        position_value: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> list[Tensor]:
        return list(_gradients(query, reference_key, -(-heads // _HEADS_BACKWARD)).values())

    def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *own, heads, reference_key, reference_value, position_key, position_value, scale = inputs
        ctx.heads = heads
        ctx.save_for_backward(*own, reference_key, reference_value, position_key, position_value, scale)

    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *reference = ctx.saved_tensors
        gradients = torch.ops.emt.temporal_attention_backward(gradient, query, key, value, ctx.heads, *reference)
        if reference[0] is None:
            return *gradients, None, None, None, None, None, None
        *own, key_gradient, value_gradient, scale_gradient = gradients
        n, scale = reference[0].shape[0], reference[-1]

        def of_reference(x: Tensor) -> Tensor:  # of all samples that share it, in a fixed order
            x = x * scale.unsqueeze(-1).to(x.dtype)
            return x if len(x) == n else x.unflatten(0, (-1, n)).sum(0)

        return (
            *own,
            None,
            of_reference(key_gradient),
            of_reference(value_gradient),
            key_gradient.sum((0, 2)),
            value_gradient.sum((0, 2)),
            scale_gradient.sum(1).transpose(1, 2).to(scale.dtype),
        )

    _operator.register_autograd(_backward, setup_context=_save)
