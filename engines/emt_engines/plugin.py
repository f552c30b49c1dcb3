"""Temporal integration as a plugin of TensorRT: the Triton kernel's PTX, launched by the engine itself.

A quickly deployable plugin with an ahead-of-time implementation (TensorRT 10.10 and newer): the engine embeds the
kernel, and needs neither Python nor Triton to run it. Registered as ``emt::TemporalAttention``, it takes the nodes of
that name in the files of `emt_engines.onnx_export`.

Not yet run on hardware by us: docs/engines-onnx-tensorrt.md says what is tested, and how to verify the rest.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass, replace
from types import GenericAlias
from typing import Any

import numpy as np
import torch

from emt.errors import EmtError
from emt_engines.onnx_export import DOMAIN, NODE
from emt_kernels import temporal_attention as kernels
from emt_kernels.selection import INSTALLED

PLUGIN = f"{DOMAIN}::{NODE}"
INPUTS = ("query", "key", "value", "reference_key", "reference_value", "position_key", "position_value", "scale")
#: Numbers that the kernel takes besides, 32 bits each.
EXTRAS = ("batch", "tokens", "references")

#: PTX for compute capability 8.0 runs on all later GPUs; PTX 8.0 is read by drivers from 525 (CUDA 12.0) on, the oldest
#: that TensorRT 10 supports.
_CAPABILITY, _PTX = 80, 80
#: Shared memory that a program has without opting in to more at the driver, which TensorRT is not documented to do.
_SHARED_MEMORY = 48 * 1024

if INSTALLED:
    import triton
    import triton.language as tl

    from emt_kernels.temporal_attention import _temporal_attention

    @triton.jit
    def _plugin_kernel(
        query,
        key,
        value,
        reference_key,
        reference_value,
        position_key,
        position_value,
        scale,
        batch,
        tokens,
        references,
        out,
        PIXELS: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_SIZE: tl.constexpr,
        FRAMES: tl.constexpr,
        REFERENCE_FRAMES: tl.constexpr,
        HEADS_TOGETHER: tl.constexpr,
        ROWS: tl.constexpr,
        REFERENCE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        REST: tl.constexpr,
        STAGES: tl.constexpr,
        SHARED: tl.constexpr,
        SOFTENING: tl.constexpr,
    ):
        """`_temporal_attention` of contiguous tensors, its parameters in TensorRT's order: inputs, extras, outputs."""
        channels: tl.constexpr = HEADS * HEAD_SIZE
        frame = tokens * channels
        _temporal_attention(
            query=query,
            key=key,
            value=value,
            reference_key=reference_key,
            reference_value=reference_value,
            position_key=position_key,
            position_value=position_value,
            scale=scale,
            out=out,
            batch=batch,
            tokens=tokens,
            references=references,
            pixels=PIXELS,
            query_batch=FRAMES * frame,
            query_frame=frame,
            query_token=channels,
            key_batch=FRAMES * frame,
            key_frame=frame,
            key_token=channels,
            value_batch=FRAMES * frame,
            value_frame=frame,
            value_token=channels,
            reference_key_batch=REFERENCE_FRAMES * frame,
            reference_key_frame=frame,
            reference_key_token=channels,
            reference_value_batch=REFERENCE_FRAMES * frame,
            reference_value_frame=frame,
            reference_value_token=channels,
            position_key_frame=channels,
            position_value_frame=channels,
            scale_batch=REFERENCE_FRAMES * tokens,
            scale_frame=tokens,
            scale_token=1,
            out_batch=FRAMES * frame,
            out_frame=frame,
            out_token=channels,
            HEADS=HEADS,
            HEAD_SIZE=HEAD_SIZE,
            FRAMES=FRAMES,
            REFERENCE_FRAMES=REFERENCE_FRAMES,
            HEADS_TOGETHER=HEADS_TOGETHER,
            ROWS=ROWS,
            REFERENCE_ROWS=REFERENCE_ROWS,
            COLUMNS=COLUMNS,
            REST=REST,
            STAGES=STAGES,
            SHARED=SHARED,
            SOFTENING=SOFTENING,
        )


@dataclass(frozen=True)
class Kernel:
    """Compiled code and how to launch it.

    Attributes:
        name: Of its entry.
        ptx: For `ptxas` and the driver.
        threads: Of a program.
        shared: Bytes of shared memory of a program.
        groups: Groups that a program computes one of the heads in.
        pixels: Tokens of a program.
    """

    name: str
    ptx: str
    threads: int
    shared: int
    groups: int
    pixels: int


@functools.cache
def compile_kernel(heads: int, channels: int, frames: int, reference_frames: int, dtype: torch.dtype) -> Kernel:
    """Compile temporal integration for all GPUs from compute capability 8.0 on, none of which need be here.

    Raises:
        EmtError: Triton is not installed.
    """
    if not INSTALLED:
        raise EmtError("the plugin's kernel cannot be compiled: Triton is not installed", "Build with --no-plugin.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Shapes of a clip of 512×512 with guidance: the kernel takes others, but is laid out for many tokens.
    query = torch.empty(2, frames, 64 * 64, channels, dtype=dtype, device="meta")
    other = query[:1, :1].expand(1, reference_frames, -1, -1)
    row = other[0, :, 0]
    scale = query.new_empty(2, reference_frames, query.shape[2])
    tensors = dict(zip((*INPUTS, "out"), (query, query, query, other, other, row, row, scale, query)))
    plan = kernels._plan(query, heads, reference_frames)
    names = [parameter.name for parameter in _plugin_kernel.params]
    while True:
        _, arguments = kernels._forward_arguments(tensors, heads, reference_frames, plan)
        constants = {name: x for name, x in arguments.items() if name in names and name.isupper()}
        constants["PIXELS"] = plan.pixels
        kind = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        signature = {n: "constexpr" if n in constants else "i32" if n in EXTRAS else kind for n in names}
        source = ASTSource(
            _plugin_kernel,
            signature,
            constexprs=constants,
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in (*INPUTS, "out")},
        )
        options = {"num_warps": plan.warps, "ptx_version": _PTX}
        compiled = triton.compile(source, target=GPUTarget("cuda", _CAPABILITY, 32), options=options)
        if compiled.metadata.shared <= _SHARED_MEMORY:
            break
        if plan.stages > 1:
            plan = replace(plan, stages=plan.stages - 1)
        elif plan.heads > 1:
            plan = replace(plan, heads=plan.heads // 2, warps=plan.warps // 2)
        else:
            raise EmtError(f"heads of {channels // heads} channels are too wide for the plugin", "Use --no-plugin.")
    return Kernel(
        name=compiled.metadata.name,
        ptx=_without_scratch(compiled.asm["ptx"], compiled.metadata, len(INPUTS) + len(EXTRAS) + 1),
        threads=32 * plan.warps,
        shared=compiled.metadata.shared,
        groups=-(-heads // plan.heads),
        pixels=plan.pixels,
    )


def parameters(ptx: str) -> list[str]:
    """The declarations of an entry's parameters."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    return [line.strip() for line in entry[1].split(",") if line.strip()]


def _without_scratch(ptx: str, metadata: Any, count: int) -> str:
    """PTX without the pointers to scratch memory that Triton appends to a kernel's own parameters."""
    declared = parameters(ptx)
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, name, 0):
            raise AssertionError(f"Triton {triton.__version__} gives the plugin's kernel a {name}")
    for line in declared[count:]:
        name = re.split(r"\s+", line)[-1]
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) != 1:
            raise AssertionError(f"Triton {triton.__version__} has the plugin's kernel read {name}")
        ptx = re.sub(rf",\s*{re.escape(line)}", "", ptx, count=1)
    return ptx


# ------------------------------------------------------------------------------------------------------- registration


def register(trt: Any) -> None:
    """Register the plugin, unless it is.

    Args:
        trt: The module `tensorrt`.
    """
    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    namespace = getattr(trtp.op, DOMAIN, None)
    if namespace is not None and hasattr(namespace, NODE):
        return

    def describe(query, key, value, reference_key, reference_value, position_key, position_value, scale, heads):
        return query.like()

    def implement(
        query,
        key,
        value,
        reference_key,
        reference_value,
        position_key,
        position_value,
        scale,
        heads,
        outputs,
        tactic,
    ):
        batch, frames, tokens, channels = query.shape_expr
        references, reference_frames = reference_key.shape_expr[0], reference_key.shape_expr[1]
        dtype = {trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.float32: torch.float32}[query.dtype]
        numbers = (x.constant_value() for x in (channels, frames, reference_frames))
        kernel = compile_kernel(int(heads[0]), *numbers, dtype)
        launch = trtp.KernelLaunchParams()
        launch.grid_x = batch * kernel.groups * trtp.cdiv(tokens, kernel.pixels)
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared
        extras = trtp.SymIntExprs(len(EXTRAS))
        for i, number in enumerate((batch, tokens, references)):
            extras[i] = trtp.SymInt32(number)
        return kernel.name, kernel.ptx, launch, extras

    # TensorRT reads the types of parameters from the annotations, as objects. An attribute that is an `int` it converts
    # in a way that NumPy 2.4 refuses (until TensorRT 11), an array of one it does not.
    tensors = dict.fromkeys(INPUTS, trtp.TensorDesc)
    number = np.ndarray[Any, np.dtype[np.int64]]
    describe.__annotations__ = {**tensors, "heads": number, "return": trtp.TensorDesc}
    implement.__annotations__ = {
        **tensors,
        "heads": number,
        "outputs": GenericAlias(tuple, (trtp.TensorDesc,)),
        "tactic": int,
        "return": GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs)),
    }
    trtp.register(PLUGIN)(describe)
    trtp.aot_impl(PLUGIN)(implement)
