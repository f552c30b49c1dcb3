"""Time a transfer at Stable Diffusion 1.5 size on one GPU, one optimisation after another, with random weights.

    python benchmarks/ladder.py [--clip CLIP.mp4] [--output ladder.json] [--rungs vae,published,fp16]

Rungs are cumulative: each one adds what it is named for to those before it, chosen or not. The last one, with
everything on, comes first: its step is then taken apart, operations and bytes of each kind of kernel against the
ceilings that this GPU reaches. Each rung prints a row: one guided step with reference and one without, the reference
pass, encoding, decoding, the whole clip (where the rung changes them), peak memory, and how far its step is from the
same step in float32 without TensorFloat-32. Times are medians (20th, 80th percentile) of device events after warming
up. With --output everything is written after each rung, so that nothing measured is lost. The rungs of torch.compile
stand beside the last one; `compile` and `compiled-kernels` take minutes each and run only when they are
chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from emt.backbones.sd15 import autoencoder, layers, motion_module, passes
from emt.backbones.sd15.random_model import random_model
from emt.backends.torch import ATTENTION, TorchBackend
from emt.features import Motion, TextFeatures
from emt.pipeline import MotionTransfer, open_model
from emt.presets import PRESETS
from emt.video import read_clip
from emt_kernels.geglu import geglu, geglu_reference
from emt_kernels.geglu_linear import fuses
from emt_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from emt_kernels.layer_norm import layer_norm, layer_norm_reference
from emt_kernels.temporal_attention import temporal_attention, temporal_attention_reference
from emt_kernels.upsample_conv import upsample_conv_reference

PROMPT = "a red car on a beach"
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "temporal_attention": (temporal_attention, temporal_attention_reference),
    "group_norm_silu": (group_norm_silu, group_norm_silu_reference),
    "layer_norm": (layer_norm, layer_norm_reference),
    "geglu": (geglu, geglu_reference),
    "fuses": (fuses, lambda x, weight: False),
}
#: What else a rung switches: names of a module or class, with the kernel and without.
PLACES: dict[str, list[tuple[Any, str, Any]]] = {
    "upsample": [
        (passes, "is_fused", lambda x, weight: False),
        (autoencoder, "upsample_conv", upsample_conv_reference),
    ],
    "scale_map": [(motion_module, "is_fused", lambda x: False)],
    "vae-biases": [(autoencoder._Half, "_fused", autoencoder._Half._plain)],
}
ALL = 1 << 30
#: Tokens at once in feed-forward layers, to compare.
PARTS = (32_768, ALL, 16_384, 8192)
#: What PyTorch chooses by itself.
USUAL_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Rung:
    """One rung: what it switches on stays on in those after it, unless it is `aside`; `whole`: clips are timed too."""

    name: str
    title: str
    switches: tuple[str, ...]
    whole: bool = False
    optional: bool = False
    aside: bool = False


LADDER = (
    Rung("published", "published arithmetic: fp32 weights, fp16 autocast, reference pass in fp32", (), whole=True),
    Rung("constants", "+ constants of reference and prompt computed once", ("constants",)),
    Rung("fp16", "+ fp16 weights", ("fp16",), whole=True),
    Rung("channels-last", "+ channels-last weights", ("channels-last",)),
    Rung("temporal-attention", "+ kernel: temporal_attention", ("temporal_attention",)),
    Rung("group-norm", "+ kernel: group_norm_silu", ("group_norm_silu",)),
    Rung("layer-norm", "+ kernel: layer_norm", ("layer_norm",)),
    Rung("geglu", "+ kernel: geglu", ("geglu",)),
    Rung("cudnn", "+ cuDNN's attention within a frame", ("cudnn",)),
    Rung("fused-qkv", "+ one matmul for query, key and value", ("fuse",)),
    Rung("residuals", "+ residual adds in matmuls", ("residuals",)),
    Rung("conv-biases", "+ biases of convolutions in norms", ("conv-biases",)),
    Rung("geglu-linear", "+ kernel: geglu_linear", ("fuses",)),
    Rung("graph", "+ CUDA graph of the step", ("graph",)),
    Rung("vae", "+ channels-last VAE with kernel: group_norm_silu", ("vae",), whole=True),
    Rung("upsample", "+ kernel: upsample_conv", ("upsample",), whole=True),
    Rung("skips", "+ skip connections where they are", ("skips",)),
    Rung("kept", "+ sums of biases kept, one matmul for the timestep", ("kept",)),
    Rung("scale-map", "+ kernels: gelu_of_sum, scale_map", ("scale_map",)),
    Rung("vae-biases", "+ biases of the VAE's convolutions in norms", ("vae-biases",), whole=True),
    Rung("guidance", "+ what the halves of guidance share once", ("guidance",), whole=True),
    Rung("cublaslt", "+ matmuls by cuBLASLt", ("cublaslt",), aside=True),
    Rung(
        "compile",
        "torch.compile in place of kernels, in a CUDA graph",
        ("compile", "no kernels"),
        optional=True,
        aside=True,
    ),
    Rung("compiled-kernels", "torch.compile with kernels, in a CUDA graph", ("compile",), optional=True, aside=True),
    Rung("fast", "+ --preset fast: its clip (steps are those above)", ("fast",), whole=True, aside=True),
)


class Bench:
    """Pipelines of random weights, and the reference clip that all rungs read."""

    def __init__(self, folder: Path, clip: Path, size: int, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats
        self.frames = read_clip(clip, size=(size, size)).frames
        self.outputs: dict[str, Tensor] = {}  # of a step with classifier-free guidance, by rung
        self._pipe: MotionTransfer | None = None
        self._changed: set[str] = set()

    def pipe(self, on: set[str]) -> MotionTransfer:
        """The pipeline in a rung's type. Rungs change its layout: one with less on has a new one."""
        dtype = torch.float16 if "fp16" in on else torch.float32
        if self._pipe is None or self._pipe.unet.dtype != dtype or self._changed - on:
            self._pipe = None
            gc.collect()
            torch.cuda.empty_cache()
            pipe = open_model(self.folder, dtype)
            assert pipe is not None  # its parts are the project's own, as in `emt transfer`
            self._pipe = pipe.to("cuda")
        self._changed = on & {"channels-last", "fuse", "vae"}
        return self._pipe

    def inputs(self, pipe: MotionTransfer, motion: Motion) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of two with classifier-free guidance at the size of `motion`, its timestep and its text."""
        scale = pipe.vae_scale_factor
        shape = (1, 4, motion.frames, motion.height // scale, motion.width // scale)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.device, pipe.unet.dtype)
        sample = torch.cat([sample, sample])
        return sample, torch.tensor(601, device=pipe.device), pipe.encode_prompts(["", PROMPT])

    @torch.no_grad()
    def truth(self) -> Tensor:
        """The step with guidance in float32 without TensorFloat-32, which the rungs are compared with."""
        with kernels(set()), torch.backends.cudnn.flags(allow_tf32=False):
            pipe = self.pipe(set())
            pipe.backend = rung_backend(pipe, set())
            motion = pipe.extract_motion(self.frames)
            sample, timestep, text = self.inputs(pipe, motion)
            return pipe.unet(sample, timestep, text, motion.features).cpu()

    @torch.no_grad()
    def measure(self, rung: Rung, on: set[str]) -> dict[str, Any]:
        """One row of the table."""
        begun = time.perf_counter()
        row: dict[str, Any] = {"rung": rung.name, "title": rung.title}
        with kernels(set() if "no kernels" in on else on):
            pipe = self.pipe(on)
            if rung.whole:
                pipe.backend = rung_backend(pipe, on)  # nothing is recorded or held yet
                row |= self.clip(pipe, on)
            pipe.backend = rung_backend(pipe, on)
            row |= self.parts(pipe, on, rung)
        row["measuring_s"] = time.perf_counter() - begun
        return row

    @torch.no_grad()
    def parts(self, pipe: MotionTransfer, on: set[str], rung: Rung) -> dict[str, Any]:
        """Times of the parts of a clip; keeps the step's output."""
        row: dict[str, Any] = {}
        backend, once = pipe.backend, "constants" in on
        motion = pipe.extract_motion(self.frames)
        sample, timestep, text = self.inputs(pipe, motion)
        with autocast(on):
            moved: Any = backend.prepare_motion(motion.features) if once else motion.features
            encoded: Any = guided(pipe.unet.encode_text(text)) if once else text
            call = backend.denoise if once else pipe.unet
            torch.cuda.reset_peak_memory_stats()
            self.outputs[rung.name] = call(sample, timestep, encoded, moved).float().cpu()
            row["step_ms"] = self.timed(lambda: call(sample, timestep, encoded, moved))
            row["step_peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
            row["step_without_reference_ms"] = self.timed(lambda: call(sample, timestep, encoded, None))
            if once and rung.whole:
                row["prepare_ms"] = self.timed(lambda: backend.prepare_motion(motion.features))
        latents = sample[:1].clone()
        row["reference_pass_ms"] = self.timed(lambda: backend.encode_reference(latents, timestep, text[:1]))
        if rung.whole:
            images = torch.randn(len(self.frames), 3, motion.height, motion.width).to(latents.device, pipe.vae.dtype)
            scaled = latents[0].transpose(0, 1).to(pipe.vae.dtype)
            row["encode_ms"] = self.timed(lambda: backend.encode_images(images))
            with autocast(on):
                row["decode_ms"] = self.timed(lambda: backend.decode_images(scaled))
        return row

    def clip(self, pipe: MotionTransfer, on: set[str]) -> dict[str, float]:
        """Seconds and memory from frames to frames: encoding, reference pass, 25 steps, decoding.

        The first clip records graphs and lets libraries choose their kernels; the peak is its own.
        """

        def make() -> None:
            motion = pipe.extract_motion(self.frames)
            with autocast(on):
                if "constants" not in on:
                    plain = pipe.encode_prompts(["", PROMPT])
                    denoise = pipe.backend.denoise
                    pipe.backend.denoise = lambda x, t, text, moved: pipe.unet(x, t, plain, motion.features)
                pipe.generate(PROMPT, motion, **(PRESETS["fast"] if "fast" in on else {"steps": 25}))
                if "constants" not in on:
                    pipe.backend.denoise = denoise

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row: dict[str, float] = {}
        # Graphs of a large network are recorded in the second; memory that this frees is allocated again in the third.
        for name in ("first_clip_s", "second_clip_s", "third_clip_s", "clip_s"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            make()
            row[name] = time.perf_counter() - start
            if name == "first_clip_s":
                row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
                row["peak_reserved_GiB"] = torch.cuda.max_memory_reserved() / 2**30
        return row

    def timed(self, work: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of `work` at the 20th, 50th and 80th percentile, of one second or `repeats` runs."""
        quantiles = (
            torch.tensor(durations(work, self.repeats, enough=1000)).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        )
        return dict(zip(("p20", "p50", "p80"), quantiles, strict=True))


def rung_backend(pipe: MotionTransfer, on: set[str]) -> TorchBackend:
    """The backend of a rung."""
    backend = TorchBackend(
        pipe,
        graphs="graph" in on,
        fuse_projections="fuse" in on,
        fuse_residual_adds="residuals" in on,
        defer_conv_biases="conv-biases" in on,
        join_skips="skips" in on,
        keep_constants="kept" in on,
        share_guidance="guidance" in on,
        attention=ATTENTION if "cudnn" in on else USUAL_ATTENTION,
        compile="compile" in on,
        channels_last="channels-last" in on,
        channels_last_vae="vae" in on,
    )
    backend.capture_at_once = True
    return backend


@contextlib.contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    """Names of a module with other values meanwhile."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def kernels(on: set[str]) -> Iterator[None]:
    """Let the network call the kernels that are on, and the references of the others."""
    chosen = {name: kernel if name in on else reference for name, (kernel, reference) in KERNELS.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(motion_module, temporal_attention=chosen.pop("temporal_attention")))
        stack.enter_context(patched(layers, **chosen))
        for place, name, other in (found for switch in PLACES.keys() - on for found in PLACES[switch]):
            stack.enter_context(patched(place, **{name: other}))
        library = torch.backends.cuda.preferred_blas_library()
        stack.callback(torch.backends.cuda.preferred_blas_library, library)
        if "cublaslt" in on:
            torch.backends.cuda.preferred_blas_library("cublaslt")
        yield


def guided(text: TextFeatures) -> TextFeatures:
    """Features of prompts for a batch whose halves are the same."""
    text.guided = True
    return text


def autocast(on: set[str]) -> contextlib.AbstractContextManager[Any]:
    """As published: float32 weights and float16 autocast, but for the reference pass, which is in float32."""
    return contextlib.nullcontext() if "fp16" in on else torch.autocast("cuda", torch.float16)


# --------------------------------------------------------------------------------------------------------- roofline

#: Kinds of kernels, by what their names match, in this order.
KINDS = {
    "temporal_attention": r"temporal_attention|_attend",
    "group_norm_silu": r"group_norm",
    "layer_norm": r"layer_norm",
    "geglu": r"geglu",
    "upsample_conv": r"upsample_conv|add_phases",
    "scale_map": r"scale_map|gelu_of_sum",
    "spatial attention": r"flash|fmha|sdpa|attention|mha",
    "convolution": r"conv|fprop|xmma_.*nhwc|implicit|dgrad",
    "matmul": r"gemm|cutlass|nvjet|cublas|wgmma|s161616|splitK",
    "copy": r"[cC]opy|Cat|Memcpy|Memset|FillFunctor",
    "elementwise": r"elementwise|vectorized|upsample|softmax|reduce|index",
}
#: The same kinds of operators, by the names that PyTorch's dispatcher gives them.
OPERATORS = {
    "temporal_attention": r"emt::temporal_attention",
    "group_norm_silu": r"emt::group_norm",
    "layer_norm": r"emt::layer_norm",
    "geglu": r"emt::geglu",
    "upsample_conv": r"emt::upsample_conv",
    "spatial attention": r"scaled_dot_product",
    "convolution": r"convolution",
    "matmul": r"aten::(mm|addmm|bmm|linear|_scaled_mm)",
    "copy": r"aten::(cat|copy_|clone|_to_copy|contiguous)",
}
#: Matmuls that add in place: as many operations as those that do not.
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
_VIEWS = re.compile(
    r"view|reshape|expand|permute|transpose|unsqueeze|squeeze|slice|select|split|chunk|aten::t$|alias|detach|empty|"
    r"unflatten|flatten|as_strided|native_|aten::(sym_|is_)"
)


class Count(TorchDispatchMode):
    """Operations, and bytes of inputs and outputs, of every operator by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.flop: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator."""
        out = func(*args, **(kwargs or {}))
        name = func.name().rsplit(".", 1)[0] if "." in func.name() else func.name()
        if not _VIEWS.search(name):
            kind = next((kind for kind, pattern in OPERATORS.items() if re.search(pattern, name)), "elementwise")
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if t.is_cuda)
            counter = flop_registry.get(_IN_PLACE.get(func.overloadpacket, func.overloadpacket))
            if counter is not None:
                self.flop[kind] += counter(*args, **(kwargs or {}), out_val=out)
            elif kind == "temporal_attention":
                query, references = args[0], 2 if len(args) > 4 and args[4] is not None else 1
                self.flop[kind] += 4 * query.numel() * query.shape[1] * references
        return out


def ceilings() -> dict[str, float]:
    """Ceilings of this GPU: bytes a second of a large copy, read plus written; operations a second of a matmul."""
    half = {"device": "cuda", "dtype": torch.float16}
    source, target = torch.randn(2**30, **half), torch.empty(2**30, **half)
    copy = 2 * source.numel() * source.element_size() / median_ms(lambda: target.copy_(source))
    x, y = torch.randn(8192, 8192, **half), torch.randn(8192, 8192, **half)
    matmul = 2 * 8192**3 / median_ms(lambda: x @ y)
    return {"copy_TB_s": copy * 1e3 / 1e12, "matmul_TFLOP_s": matmul * 1e3 / 1e12}


def durations(work: Callable[[], object], repeats: int, enough: float = math.inf) -> list[float]:
    """Milliseconds by device events, after warming up: of `repeats` runs, or of five and as many as take `enough`."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 5 or sum(times) < enough):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def median_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """The median of `durations`."""
    return statistics.median(durations(work, repeats))


@torch.no_grad()
def take_apart(bench: Bench, on: set[str], variants: bool) -> dict[str, Any]:
    """Time, operations and bytes of one guided step with reference by kind of kernel, and its longest kernels.

    With `variants`, times of it in parts of several sizes, and with all of cuDNN's convolutions, too.
    """
    limits = ceilings()
    with kernels(on):
        pipe = bench.pipe(on)
        eager = rung_backend(pipe, on - {"graph", "compile"})
        pipe.backend = rung_backend(pipe, on)
        motion = pipe.extract_motion(bench.frames)
        sample, timestep, text = bench.inputs(pipe, motion)
        encoded = guided(pipe.unet.encode_text(text))
        moved = pipe.backend.prepare_motion(motion.features)
        eager.denoise(sample, timestep, encoded, moved)  # the first is rehearsed, and would be counted twice
        with Count() as count:
            eager.denoise(sample, timestep, encoded, moved)
        pipe.backend.denoise(sample, timestep, encoded, moved)
        torch.cuda.synchronize()
        steps = 3
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                pipe.backend.denoise(sample, timestep, encoded, moved)
            torch.cuda.synchronize()
        in_parts, tried, tried_s = {}, math.nan, math.nan
        for tokens in PARTS if variants else ():
            backend = pipe.backend = rung_backend(pipe, on)
            backend.execution = replace(backend.execution, feed_forward_tokens=tokens)
            backend.denoise(sample, timestep, encoded, moved)
            in_parts[str(tokens)] = median_ms(lambda b=backend: b.denoise(sample, timestep, encoded, moved), 8)
        # Not for use: what it chooses depends on the moment, and with it the last bits of a clip.
        if variants:
            with torch.backends.cudnn.flags(benchmark=True, allow_tf32=True):
                backend = pipe.backend = rung_backend(pipe, on)
                begun = time.perf_counter()
                backend.denoise(sample, timestep, encoded, moved)
                tried_s = time.perf_counter() - begun
                tried = median_ms(lambda: backend.denoise(sample, timestep, encoded, moved), 8)
    rows: dict[str, dict[str, float]] = {}
    longest = []
    for event in profiled.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.self_device_time_total <= 0:
            continue
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        row = rows.setdefault(kind, {"ms": 0.0, "kernels": 0})
        row["ms"] += event.self_device_time_total / 1e3 / steps
        row["kernels"] += event.count / steps
        longest.append((event.self_device_time_total / 1e3 / steps, event.count / steps, kind, event.key[:110]))
    for kind, row in rows.items():
        row["TFLOP"], row["GB"] = count.flop[kind] / 1e12, count.bytes[kind] / 1e9
        seconds = row["ms"] / 1e3
        row["share_of_matmul"] = row["TFLOP"] / seconds / limits["matmul_TFLOP_s"]
        row["share_of_copy"] = row["GB"] / 1e3 / seconds / limits["copy_TB_s"]
    longest.sort(reverse=True)
    return {
        "ceilings": limits,
        "kinds": rows,
        "cudnn_benchmark": {"ms": tried, "first_s": tried_s},
        "tokens_at_once_ms": in_parts,
        "longest": longest[:40],
    }


# ------------------------------------------------------------------------------------------------------------ report


def show(row: dict[str, Any]) -> None:
    """Print a row of the ladder."""
    print(f"\n{row['title']}")
    for key, value in row.items():
        if isinstance(value, dict):
            print(f"  {key:28} {value['p50']:8.1f}  ({value['p20']:.1f}, {value['p80']:.1f})")
        elif isinstance(value, float):
            print(f"  {key:28} {value:8.4g}", flush=True)


def show_parts(parts: dict[str, Any]) -> None:
    """Print the last rung's kinds of kernels against the ceilings."""
    limits = parts["ceilings"]
    print(f"\nceilings: copy {limits['copy_TB_s']:.2f} TB/s, fp16 matmul {limits['matmul_TFLOP_s']:.0f} TFLOP/s")
    print(f"  {'kind':20} {'ms':>8} {'kernels':>8} {'TFLOP':>8} {'GB':>8} {'of matmul':>11} {'of copy':>9}")
    for kind, row in sorted(parts["kinds"].items(), key=lambda item: -item[1]["ms"]):
        print(
            f"  {kind:20} {row['ms']:8.2f} {row['kernels']:8.0f} {row['TFLOP']:8.2f} {row['GB']:8.2f} "
            f"{row['share_of_matmul']:10.0%} {row['share_of_copy']:9.0%}"
        )
    print("  step, ms, by tokens at once in feed-forward layers:")
    for tokens, took in parts["tokens_at_once_ms"].items():
        print(f"  {tokens:24} {took:8.2f}")
    print(f"  with cuDNN trying all its convolutions: {parts['cudnn_benchmark']}")
    print("  longest kernels: ms, launches, kind, name")
    for ms, launches, kind, name in parts["longest"][:25]:
        print(f"  {ms:8.3f} {launches:6.0f}  {kind:20} {name}")


def main() -> None:
    """Print the table; with --output, write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clip = Path(__file__).parent.parent / "examples" / "references" / "bounce.mp4"
    parser.add_argument("--clip", type=Path, default=clip, help="a reference clip")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--repeats", type=int, default=20, help="runs that a time is the median of, at most")
    parser.add_argument("--rungs", help=f"of {', '.join(rung.name for rung in LADDER)}, with commas between")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark times a CUDA GPU and finds none\n")
    usual = [rung.name for rung in LADDER if not rung.optional]
    top = [rung.name for rung in LADDER if not rung.aside][-1]
    chosen = options.rungs.split(",") if options.rungs else [*usual, "low-memory"]
    if unknown := set(chosen) - {rung.name for rung in LADDER} - {"low-memory"}:
        parser.error(f"unknown rungs: {', '.join(sorted(unknown))}")

    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; 16 frames of {options.size}×{options.size}, guidance, DDIM 25 steps")
    results: dict[str, Any] = {"versions": versions, "rows": []}

    def save(**more: Any) -> None:
        results.update(more)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1))

    def climb(rung: Rung) -> None:
        try:
            row = bench.measure(rung, switched_on(rung))
        except Exception:  # the others can still be measured
            traceback.print_exc()
            return
        row["relative_change"] = ((bench.outputs[rung.name] - truth).norm() / truth.norm()).item()
        results["rows"].append(row)
        results["rows"].sort(key=lambda row: [rung.name for rung in LADDER].index(row["rung"]))
        show(row)
        save()

    def disassemble(rung: Rung, name: str) -> None:
        try:
            parts = take_apart(bench, switched_on(rung), variants=not options.rungs)
        except Exception:
            traceback.print_exc()
            return
        show_parts(parts)
        save(**{name: parts})

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_model(model, size="sd15")
        bench = Bench(model, options.clip, options.size, options.repeats)
        truth = bench.truth()
        last = next(rung for rung in LADDER if rung.name == top)
        if last.name in chosen:
            climb(last)
            disassemble(last, "parts")
        if "low-memory" in chosen:
            save(low_memory=low_memory(model, options.clip, options.size))
        rest = [rung for rung in LADDER if rung.name in chosen and rung is not last]
        for rung in rest:
            climb(rung)


def switched_on(rung: Rung) -> set[str]:
    """All that is on at a rung."""
    below = itertools.takewhile(lambda other: other is not rung, LADDER)
    return {switch for other in below if not other.aside for switch in other.switches} | set(rung.switches)


def low_memory(model: Path, clip: Path, size: int) -> dict[str, float]:
    """A clip in 4 GiB, by a process of its own."""
    output = model.parent / "low_memory.json"
    program = Path(__file__).with_name("low_memory.py")
    options = ["--model", model, "--clip", clip, "--size", size, "--output", output]
    print("\nin little memory (benchmarks/low_memory.py)", flush=True)
    subprocess.run([sys.executable, program, *map(str, options)], check=False)
    return json.loads(output.read_text()) if output.exists() else {}


if __name__ == "__main__":
    main()
