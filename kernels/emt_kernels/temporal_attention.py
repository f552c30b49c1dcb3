"""Temporal integration: attention over time to a clip's own frames and a reference's frames.

EfficientMT (arXiv 2503.19369), section 3.3: the queries of a pixel are its F own frames, its keys and values are
the F own frames followed by the F reference frames, scaled by the scale map.

The kernels are bound by memory: they read every tensor once, where it lies, and write the results. The reference's
keys ``s·k + p`` are never formed: a query's score is ``s·(q·k) + q·p``, and its output the sum of ``(P·s) v`` and
``P p``. So everything goes from memory to the tensor cores as it is, and no sum can overflow in float16.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels.selection import substitute, use_triton, wrap_triton

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
    *,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
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
        attend: softmax attention of queries, keys and values, each (pixels, heads, frames, channels/heads).

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
        out = torch.cat([attend(*part) for part in parts])
    else:
        out = attend(q, k, v)
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
    float32 whatever the type of the tensors. Differentiable in every tensor; gradients repeat bit for bit.

    Args:
        query: (batch, frames, tokens, channels), tokens being height·width; `key` and `value` alike. Slices of one
            fused product are read where they lie: channels next to each other, any other strides.
        key: see `query`.
        value: see `query`.
        heads: attention heads; divides channels.
        reference_key: (n, reference frames, tokens, channels); n divides batch, sample i uses reference i mod n.
        reference_value: as `reference_key`.
        position_key: (reference frames, channels).
        position_value: as `position_key`.
        scale: (batch, reference frames, tokens).

    Returns:
        (batch, frames, tokens, channels), contiguous where the kernel runs, of the query's type.

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
    """How the work is divided: a program takes some heads of one pixel after another, a warp whole heads of it."""

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


# Shared memory that a program may use on every supported GPU: 99 KiB (RTX 30, 40 and 50), less what else it holds.
_SHARED_MEMORY = 80 * 1024
_PROGRAMS = 2048  # wanted, so that the last ones do not leave most of a GPU idle


def plan(heads: int, head_size: int, rows: int, itemsize: int) -> Plan:
    """Choose a plan for `rows` rows of `head_size` in all tensors that a pixel's head is computed from."""
    columns = _columns(head_size)
    tile = rows * (columns + _rest(head_size, columns)) * itemsize
    together = min(4, _power_of_two(heads))
    while together > 1 and 2 * together * tile > _SHARED_MEMORY:
        together //= 2
    stages = 2 if 2 * together * tile <= _SHARED_MEMORY else 1
    return Plan(heads=together, warps=together, stages=stages, columns=columns, pixels=8)


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


def _plan(query: Tensor, heads: int, reference_frames: int, own: int, reference: int) -> Plan:
    """The plan for a kernel that reads `own` tensors of the clip and `reference` of the reference."""
    rows = own * _rows(query.shape[1]) + (reference * _rows(reference_frames) if reference_frames else 0)
    return plan(heads, query.shape[-1] // heads, rows, query.itemsize)


def _arguments(
    tensors: dict[str, Tensor], heads: int, reference_frames: int, p: Plan
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of a kernel that reads and writes `tensors`."""
    query = tensors["query"]
    batch, frames, tokens, channels = query.shape
    head_size = channels // heads
    groups = -(-heads // p.heads)
    pixels = max(1, min(p.pixels, batch * groups * tokens // _PROGRAMS))
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        if name.startswith("scale"):
            arguments[name] = x
        else:
            x = x.to(query.dtype)
            arguments[name] = x if x.stride(-1) == 1 else x.contiguous()
        # (batch, frame, token, channel); positions are (frame, channel), the scale map (batch, frame, token).
        if name != "scale_gradient":
            dimensions = ("frame",) if x.ndim == 2 else ("batch", "frame", "token")
            strides = zip(dimensions, arguments[name].stride())
            arguments |= {f"{name}_{dimension}": stride for dimension, stride in strides}
    grid = (batch * groups * -(-tokens // pixels),)
    return grid, arguments | {
        "batch": batch,
        "tokens": tokens,
        "references": tensors["reference_key"].shape[0],
        "pixels": pixels,
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "FRAMES": frames,
        "REFERENCE_FRAMES": reference_frames,
        "HEADS_TOGETHER": p.heads,
        "ROWS": _rows(frames),
        "REFERENCE_ROWS": _rows(reference_frames),
        "COLUMNS": p.columns,
        "REST": _rest(head_size, p.columns),
        "STAGES": p.stages,
        "SOFTENING": math.log2(math.e) / math.sqrt(head_size),
        "num_warps": p.warps,
    }


# ------------------------------------------------------------------------------------------------------- kernels

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    # Tiles are (heads of a program, frames, columns of a head), in two tiles of columns, `a` and `b`, where a power
    # of two does not cover the size of a head tightly. Products are batched over heads: each warp has its own.

    @triton.jit
    def _tile(x, head, exists, rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """Pointers and mask of one tile; `rows` are offsets of frames, `exists` says which heads and frames are."""
        column = FIRST + tl.arange(0, COLUMNS)
        pointers = x + (rows[None, :, None] + (head * HEAD_SIZE)[:, None, None] + column[None, None, :])
        return pointers, exists[:, :, None] & (column < HEAD_SIZE)[None, None, :]

    @triton.jit
    def _load(x, head, exists, rows, COLUMNS: tl.constexpr, REST: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """Both tiles of columns; the first one twice if there is no second."""
        pointers, mask = _tile(x, head, exists, rows, 0, COLUMNS, HEAD_SIZE)
        a = tl.load(pointers, mask=mask, other=0.0)
        b = a
        if REST > 0:
            pointers, mask = _tile(x, head, exists, rows, COLUMNS, REST, HEAD_SIZE)
            b = tl.load(pointers, mask=mask, other=0.0)
        return a, b

    @triton.jit
    def _store(a, b, x, head, exists, rows, COLUMNS: tl.constexpr, REST: tl.constexpr, HEAD_SIZE: tl.constexpr):
        """Write both tiles of columns."""
        pointers, mask = _tile(x, head, exists, rows, 0, COLUMNS, HEAD_SIZE)
        tl.store(pointers, a.to(x.dtype.element_ty), mask=mask)
        if REST > 0:
            pointers, mask = _tile(x, head, exists, rows, COLUMNS, REST, HEAD_SIZE)
            tl.store(pointers, b.to(x.dtype.element_ty), mask=mask)

    @triton.jit
    def _scores(x_a, x_b, y_a, y_b, REST: tl.constexpr):
        """Products of all rows: (heads, rows of x, columns) and (heads, rows of y, columns) → float32."""
        s = tl.dot(x_a, tl.permute(y_a, (0, 2, 1)), input_precision="tf32x3")
        if REST > 0:
            s = tl.dot(x_b, tl.permute(y_b, (0, 2, 1)), s, input_precision="tf32x3")
        return s

    @triton.jit
    def _add_sums(o_a, o_b, p, y_a, y_b, REST: tl.constexpr):
        """Add weighted sums of rows: (heads, rows, rows of y) and (heads, rows of y, columns) → float32."""
        p = p.to(y_a.dtype)
        o_a = tl.dot(p, y_a, o_a, input_precision="tf32x3")
        if REST > 0:
            o_b = tl.dot(p, y_b, o_b, input_precision="tf32x3")
        return o_a, o_b

    @triton.jit
    def _zeros(HEADS_TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr):
        a = tl.zeros((HEADS_TOGETHER, ROWS, COLUMNS), tl.float32)
        b = a
        if REST > 0:
            b = tl.zeros((HEADS_TOGETHER, ROWS, REST), tl.float32)
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
    def _place(batch, pixels, HEADS: tl.constexpr, HEADS_TOGETHER: tl.constexpr):
        """Sample, group of heads and first token of this program.

        Programs follow each other with the sample fastest, so that samples of one reference find it in the cache.
        """
        program = tl.program_id(0)
        groups: tl.constexpr = (HEADS + HEADS_TOGETHER - 1) // HEADS_TOGETHER
        rest = program // batch
        return program % batch, rest % groups, (rest // groups).to(tl.int64) * pixels

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
        SOFTENING: tl.constexpr,
    ):
        """Attention of HEADS_TOGETHER heads at up to `pixels` tokens of one sample, one after another."""
        sample, group, first = _place(batch, pixels, HEADS, HEADS_TOGETHER)
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
            own = _scores(q_a, q_b, k_a, k_b, REST)
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
                reference = s * _scores(q_a, q_b, rk_a, rk_b, REST) + _scores(q_a, q_b, pk_a, pk_b, REST)
            own, reference, norm = _probabilities(
                own, reference, frame < FRAMES, reference_frame < REFERENCE_FRAMES, REFERENCE_FRAMES > 0, SOFTENING
            )
            v_a, v_b = _load(value + t * value_token, head, exists, value_rows, COLUMNS, REST, HEAD_SIZE)
            o_a, o_b = _zeros(HEADS_TOGETHER, ROWS, COLUMNS, REST)
            o_a, o_b = _add_sums(o_a, o_b, own, v_a, v_b, REST)
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
            _store(o_a * norm, o_b * norm, out + t * out_token, head, exists, out_rows, COLUMNS, REST, HEAD_SIZE)

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
        REST: tl.constexpr,
        STAGES: tl.constexpr,
        SOFTENING: tl.constexpr,
    ):
        """Gradients of HEADS_TOGETHER heads at up to `pixels` tokens of one sample; probabilities are recomputed.

        The gradients of reference keys and values are those of a sample, before the scale: (batch, reference frames,
        tokens, channels). The gradient of the scale is the sum over the program's heads, (batch, groups of heads,
        tokens, reference frames).
        """
        sample, group, first = _place(batch, pixels, HEADS, HEADS_TOGETHER)
        own_reference = (sample % references).to(tl.int64)
        sample = sample.to(tl.int64)
        head = group * HEADS_TOGETHER + tl.arange(0, HEADS_TOGETHER)
        frame = tl.arange(0, ROWS)
        exists = (head < HEADS)[:, None] & (frame < FRAMES)[None, :]
        query_rows = sample * query_batch + frame.to(tl.int64) * query_frame
        key_rows = sample * key_batch + frame.to(tl.int64) * key_frame
        value_rows = sample * value_batch + frame.to(tl.int64) * value_frame
        gradient_rows = sample * gradient_batch + frame.to(tl.int64) * gradient_frame
        query_gradient_rows = sample * query_gradient_batch + frame.to(tl.int64) * query_gradient_frame
        key_gradient_rows = sample * key_gradient_batch + frame.to(tl.int64) * key_gradient_frame
        value_gradient_rows = sample * value_gradient_batch + frame.to(tl.int64) * value_gradient_frame

        reference_frame = tl.arange(0, REFERENCE_ROWS)
        reference_exists = (head < HEADS)[:, None] & (reference_frame < REFERENCE_FRAMES)[None, :]
        if REFERENCE_FRAMES > 0:
            far = reference_frame.to(tl.int64)
            reference_key_rows = own_reference * reference_key_batch + far * reference_key_frame
            reference_value_rows = own_reference * reference_value_batch + far * reference_value_frame
            rk_gradient_rows = sample * reference_key_gradient_batch + far * reference_key_gradient_frame
            rv_gradient_rows = sample * reference_value_gradient_batch + far * reference_value_gradient_frame
            groups: tl.constexpr = (HEADS + HEADS_TOGETHER - 1) // HEADS_TOGETHER
            scale_gradient += (sample * groups + group) * tokens * REFERENCE_FRAMES + reference_frame
            scale += sample * scale_batch + far * scale_frame

        for i in tl.range(0, tl.minimum(pixels, tokens - first), num_stages=STAGES):
            t = first + i
            q_a, q_b = _load(query + t * query_token, head, exists, query_rows, COLUMNS, REST, HEAD_SIZE)
            k_a, k_b = _load(key + t * key_token, head, exists, key_rows, COLUMNS, REST, HEAD_SIZE)
            own = _scores(q_a, q_b, k_a, k_b, REST)
            v_a, v_b = _load(value + t * value_token, head, exists, value_rows, COLUMNS, REST, HEAD_SIZE)
            g_a, g_b = _load(gradient + t * gradient_token, head, exists, gradient_rows, COLUMNS, REST, HEAD_SIZE)
            d_own = _scores(g_a, g_b, v_a, v_b, REST)
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
                rv_a, rv_b = _load(
                    reference_value + t * reference_value_token,
                    head,
                    reference_exists,
                    reference_value_rows,
                    COLUMNS,
                    REST,
                    HEAD_SIZE,
                )
                # Read again at every token: kept, they would leave too few registers.
                pk_a, pk_b = _load(
                    position_key, head, reference_exists, far * position_key_frame, COLUMNS, REST, HEAD_SIZE
                )
                pv_a, pv_b = _load(
                    position_value, head, reference_exists, far * position_value_frame, COLUMNS, REST, HEAD_SIZE
                )
                unscaled = _scores(q_a, q_b, rk_a, rk_b, REST)
                d_unscaled = _scores(g_a, g_b, rv_a, rv_b, REST)
                reference = s * unscaled + _scores(q_a, q_b, pk_a, pk_b, REST)
                d_reference = s * d_unscaled + _scores(g_a, g_b, pv_a, pv_b, REST)
            own, reference, norm = _probabilities(
                own, reference, frame < FRAMES, reference_frame < REFERENCE_FRAMES, REFERENCE_FRAMES > 0, SOFTENING
            )
            own *= norm
            mean = tl.sum(own * d_own, axis=2, keep_dims=True)
            if REFERENCE_FRAMES > 0:
                reference *= norm
                mean += tl.sum(reference * d_reference, axis=2, keep_dims=True)
            d_own = own * (d_own - mean) * (SOFTENING * 0.6931471805599453)

            dv_a, dv_b = _zeros(HEADS_TOGETHER, ROWS, COLUMNS, REST)
            dv_a, dv_b = _add_sums(dv_a, dv_b, tl.permute(own, (0, 2, 1)), g_a, g_b, REST)
            dv = value_gradient + t * value_gradient_token
            _store(dv_a, dv_b, dv, head, exists, value_gradient_rows, COLUMNS, REST, HEAD_SIZE)
            dk_a, dk_b = _zeros(HEADS_TOGETHER, ROWS, COLUMNS, REST)
            dk_a, dk_b = _add_sums(dk_a, dk_b, tl.permute(d_own, (0, 2, 1)), q_a, q_b, REST)
            dk = key_gradient + t * key_gradient_token
            _store(dk_a, dk_b, dk, head, exists, key_gradient_rows, COLUMNS, REST, HEAD_SIZE)
            dq_a, dq_b = _zeros(HEADS_TOGETHER, ROWS, COLUMNS, REST)
            dq_a, dq_b = _add_sums(dq_a, dq_b, d_own, k_a, k_b, REST)
            if REFERENCE_FRAMES > 0:
                d_reference = reference * (d_reference - mean) * (SOFTENING * 0.6931471805599453)
                dq_a, dq_b = _add_sums(dq_a, dq_b, d_reference * s, rk_a, rk_b, REST)
                dq_a, dq_b = _add_sums(dq_a, dq_b, d_reference, pk_a, pk_b, REST)
                ds = tl.sum(tl.sum(d_reference * unscaled + reference * d_unscaled, axis=1), axis=0)
                tl.store(scale_gradient + t * REFERENCE_FRAMES, ds, mask=reference_frame < REFERENCE_FRAMES)
                dv_a, dv_b = _zeros(HEADS_TOGETHER, REFERENCE_ROWS, COLUMNS, REST)
                dv_a, dv_b = _add_sums(dv_a, dv_b, tl.permute(reference, (0, 2, 1)), g_a, g_b, REST)
                dv = reference_value_gradient + t * reference_value_gradient_token
                _store(dv_a, dv_b, dv, head, reference_exists, rv_gradient_rows, COLUMNS, REST, HEAD_SIZE)
                dk_a, dk_b = _zeros(HEADS_TOGETHER, REFERENCE_ROWS, COLUMNS, REST)
                dk_a, dk_b = _add_sums(dk_a, dk_b, tl.permute(d_reference, (0, 2, 1)), q_a, q_b, REST)
                dk = reference_key_gradient + t * reference_key_gradient_token
                _store(dk_a, dk_b, dk, head, reference_exists, rk_gradient_rows, COLUMNS, REST, HEAD_SIZE)
            dq = query_gradient + t * query_gradient_token
            _store(dq_a, dq_b, dq, head, exists, query_gradient_rows, COLUMNS, REST, HEAD_SIZE)

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
        p = chosen or _plan(query, heads, frames, own=3, reference=2)
        grid, arguments = _arguments(tensors | {"out": out}, heads, frames, p)
        wrap_triton(_temporal_attention)[grid](**arguments)
        return out

    @torch.library.triton_op("emt::temporal_attention", mutates_args={})
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

    @torch.library.triton_op("emt::temporal_attention_backward", mutates_args={})
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
        p = _plan(query, heads, frames, own=4, reference=2)
        gradients = _gradients(query, reference_key, -(-heads // p.heads))
        unused = dict.fromkeys(("reference_key_gradient", "reference_value_gradient", "scale_gradient"), gradient)
        grid, arguments = _arguments(tensors | unused | gradients, heads, frames, p)
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
        frames = 0 if reference_key is None else reference_key.shape[1]
        p = _plan(query, heads, frames, own=4, reference=2)
        return list(_gradients(query, reference_key, -(-heads // p.heads)).values())

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
