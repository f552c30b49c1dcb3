"""Time the kernels on one GPU, against their references in eager PyTorch and under `torch.compile`.

    python benchmarks/kernels.py [temporal_attention] [group_norm_silu] [layer_norm] [geglu] [geglu_linear]
    python benchmarks/kernels.py transformer    # the kernels of Wan's blocks
    python benchmarks/kernels.py temporal_attention_plans group_norm_silu_plans geglu_linear_plans
    python benchmarks/kernels.py --skip-compile upsample_conv_plans    # not in the network

A row lists milliseconds, the memory traffic that the operation cannot avoid per second, that rate as a share of a
measured device copy's, the two references' milliseconds, the relative error against the reference in float32, and
the seconds of the first call, which compiles. Everything is timed within a CUDA graph that calls the operation on
many inputs in turn, more than the cache holds. The second form times every way to divide the work, not only the one
that is chosen. `--skip-compile` leaves torch.compile out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emt_kernels import geglu_linear as geglu_linear_module
from emt_kernels import group_norm_silu as group_norm_module
from emt_kernels import upsample_conv
from emt_kernels.extend_attention import extend_attention, extend_attention_reference
from emt_kernels.geglu import geglu, geglu_reference
from emt_kernels.geglu_linear import geglu_linear, geglu_linear_reference
from emt_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from emt_kernels.layer_norm import layer_norm, layer_norm_reference
from emt_kernels.modulated_norm import norm_of_sum, norm_of_sum_reference
from emt_kernels.rotated_norm import rotated_norm, rotated_norm_reference
from emt_kernels.temporal_attention import Plan, launch, temporal_attention, temporal_attention_reference

FOOTPRINT = 512 * 2**20  # bytes that the inputs of a timing fill, ten times the cache of an H100


@dataclass(frozen=True)
class Case:
    """One row: an operation on inputs of one shape.

    `kernel` and `reference` take what `inputs` makes; `traffic` is in bytes.
    """

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    traffic: int
    alone: bool = False  # the reference is not timed, only compared


def random(*shape: int, channels_last: bool = False) -> Tensor:
    """Normal float16 values on the GPU."""
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


GROUP_NORMS = [
    (32, 320, 64, 64),
    (32, 640, 64, 64),
    (32, 960, 64, 64),
    (32, 640, 32, 32),
    (32, 1280, 32, 32),
    (32, 1280, 16, 16),
    (32, 1920, 16, 16),
    (32, 2560, 16, 16),
    (32, 1280, 8, 8),
    (32, 2560, 8, 8),
]


def group_norm_silu_cases() -> Iterator[Case]:
    """The group norms of SD 1.5 at 16 frames of 512×512 with guidance, and their gradients."""

    def forward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias, shift: function(x, weight, bias, 32, 1e-5, True, shift)

    def backward(function: Callable[..., Tensor]) -> Callable[..., Any]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Any:
            return torch.autograd.grad(function(x, weight, bias, 32, 1e-5, True), (x, weight, bias), grad)

        return run

    for shape, shifted in itertools.product(GROUP_NORMS, (False, True)):
        if shifted and shape not in ((32, 320, 64, 64), (32, 1280, 8, 8)):
            continue

        def inputs(shape: tuple[int, ...] = shape, shifted: bool = shifted) -> tuple[Any, ...]:
            channels = shape[1]
            shift = random(shape[0], channels) if shifted else None
            return random(*shape, channels_last=True), random(channels), random(channels), shift

        functions = forward(group_norm_silu), forward(group_norm_silu_reference)
        name = f"group_norm_silu {shape}" + (" + shift" if shifted else "")
        yield Case(name, inputs, *functions, 4 * torch.Size(shape).numel())

    for shape in GROUP_NORMS[:1] + GROUP_NORMS[3:4] + GROUP_NORMS[-1:]:

        def trained(shape: tuple[int, ...] = shape) -> tuple[Any, ...]:
            x, weight, bias = random(*shape, channels_last=True), random(shape[1]), random(shape[1])
            grad = random(*shape, channels_last=True)
            return *(t.requires_grad_() for t in (x, weight, bias)), grad

        functions = backward(group_norm_silu), backward(group_norm_silu_reference)
        yield Case(f"group_norm_silu {shape} and gradient", trained, *functions, 10 * torch.Size(shape).numel())


def group_norm_silu_plan_cases() -> Iterator[Case]:
    """The same block by block, and by one program for a group with 4 to 16 warps; names end with the plan."""
    for case in group_norm_silu_cases():
        if "shift" in case.name or "gradient" in case.name:
            continue
        x = case.inputs()[0]
        size = x.shape[1] // 32
        lanes = 1 << (size - 1).bit_length()
        whole = [group_norm_module.Plan(lanes, 512 * warps // lanes, warps) for warps in (4, 8, 16)]
        for p in (None, *whole):

            def kernel(*arguments: Any, p: group_norm_module.Plan | None = p) -> Tensor:
                x, weight, bias, shift = arguments
                return group_norm_module.launch(x, weight, bias, 32, 1e-5, True, shift, p)

            chosen = " chosen" * (p == group_norm_module.plan(size, x.shape[2] * x.shape[3]))
            name = f"{case.name} {astuple(p) if p else 'in blocks'}{chosen}"
            yield replace(case, name=name, kernel=kernel, alone=True)


#: Upsampling in the network, of a clip with guidance, and in the VAE's decoder, of two frames of 512×512.
UPSAMPLED = [(32, 1280, 8, 8), (32, 1280, 16, 16), (32, 640, 32, 32), (2, 512, 64, 64), (2, 512, 128, 128)]
UPSAMPLED += [(2, 256, 256, 256)]


def upsample_conv_cases() -> Iterator[Case]:
    """Upsampling by two and the convolution after it by PyTorch, and as four convolutions in tiles of several sizes."""
    torch.backends.cudnn.benchmark = True
    for shape in UPSAMPLED:

        def inputs(shape: tuple[int, ...] = shape) -> tuple[Any, ...]:
            channels = shape[1]
            weight = random(channels, channels, 3, 3, channels_last=True) / (3 * channels**0.5)
            x, bias = random(*shape, channels_last=True), random(channels)
            return x, weight, bias, upsample_conv.phase_weights(weight)

        def reference(x: Tensor, weight: Tensor, bias: Tensor, phases: Tensor) -> Tensor:
            return upsample_conv.upsample_conv_reference(x, weight, bias)

        traffic = 2 * 5 * torch.Size(shape).numel()
        yield Case(f"upsample_conv {shape} by PyTorch", inputs, reference, reference, traffic, alone=True)
        tiles = [(128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3)]
        tiles += [(128, 128, 32, 8, 5), (128, 64, 64, 4, 4), (64, 256, 64, 8, 4)]
        for tile in tiles:

            def kernel(x: Tensor, weight: Tensor, bias: Tensor, phases: Tensor, tile: Any = tile) -> Tensor:
                return upsample_conv.launch(x, phases, bias, upsample_conv.Plan(*tile))

            yield Case(f"upsample_conv {shape} {tile}", inputs, kernel, reference, traffic, alone=True)


def layer_norm_cases() -> Iterator[Case]:
    """The layer norms of the spatial and temporal transformers at the same size, as denoising calls them."""
    for channels, tokens in ((320, 4096), (640, 1024), (1280, 256), (1280, 64)):
        shape = (2, 16, tokens, channels)
        for positions, residual in ((False, False), (True, False), (False, True), (True, True)):

            def inputs(
                shape: tuple[int, ...] = shape, positions: bool = positions, residual: bool = residual
            ) -> tuple[Any, ...]:
                return (
                    random(*shape),
                    random(shape[3]),
                    random(shape[3]),
                    1e-5,
                    random(shape[1], shape[3]) if positions else None,
                    random(*shape) if residual else None,
                    not positions,
                )

            name = f"layer_norm {shape}" + " + positions" * positions + " + residual" * residual
            traffic = 2 * torch.Size(shape).numel() * (2 + 2 * residual)
            yield Case(name, inputs, layer_norm, layer_norm_reference, traffic)


def transformer_cases() -> Iterator[Case]:
    """A block of Wan 2.1 of 1.3 B, 17 frames of 512×512 with guidance."""
    batch, tokens, heads, channels = 2, 5120, 12, 1536
    x = (batch, tokens, channels)
    size = torch.Size(x).numel()
    vectors = [(batch, channels)] * 2
    inference = torch.no_grad()  # which these kernels are for

    def norms(gated: bool) -> tuple[Any, ...]:
        scale, shift, gate = (random(*shape).float() for shape in [*vectors, vectors[0]])
        return random(*x), 1e-6, scale, shift, *((random(*x), gate) if gated else ())

    for gated in (False, True):
        name = f"norm_of_sum {x}" + " + gated sum" * gated
        inputs = functools.partial(norms, gated)
        yield Case(name, inputs, inference(norm_of_sum), norm_of_sum_reference, 2 * size * (4 if gated else 2))

    def part() -> tuple[Any, ...]:  # of a projection to query, key and value
        angle = random(tokens, channels // heads // 2).float()
        return random(*x[:2], 3 * channels)[..., :channels], random(channels), 1e-6, angle.cos(), angle.sin()

    yield Case(f"rotated_norm {x}", part, inference(rotated_norm), rotated_norm_reference, 4 * size)

    def attended() -> tuple[Any, ...]:
        own, query, key, value = (random(n, tokens, heads, channels // heads).transpose(1, 2) for n in (2, 2, 1, 1))
        sums, bias = random(batch, heads, tokens).float(), random(batch, tokens, heads).transpose(1, 2)
        return own, sums, query, key, value, bias, 5

    for near in (None, 1):

        def function(of: Callable[..., Tensor], near: int | None = near) -> Callable[..., Tensor]:
            return lambda *given: of(*given, near)

        name = f"extend_attention {x}" + ("" if near is None else " to frames ±1")
        kernel = inference(function(extend_attention))
        yield Case(name, attended, kernel, function(extend_attention_reference), 8 * size, alone=True)


def geglu_cases() -> Iterator[Case]:
    """The feed-forward layers at the same size."""
    for channels, tokens in ((320, 4096), (640, 1024), (1280, 256), (1280, 64)):
        shape = (32, tokens, 8 * channels)

        def inputs(shape: tuple[int, ...] = shape) -> tuple[Any, ...]:
            return (random(*shape),)

        yield Case(f"geglu {shape}", inputs, geglu, geglu_reference, 3 * torch.Size(shape).numel())


def matmul_and_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Separate matmul and `geglu`, which `geglu_linear` replaces."""
    return geglu(F.linear(x, weight, bias))


def geglu_linear_cases() -> Iterator[Case]:
    """The same layers with their matmul, by one kernel and by two, in the parts that inference takes at once."""
    for channels, tokens in ((320, 32768), (640, 32768), (1280, 8192), (1280, 2048)):

        def inputs(channels: int = channels, tokens: int = tokens) -> tuple[Any, ...]:
            weight = random(8 * channels, channels) * channels**-0.5
            return random(tokens, channels), weight, random(8 * channels)

        name = f"{tokens}×{channels}"
        traffic = 2 * (5 * tokens * channels + 8 * channels * channels)
        yield Case(f"geglu_linear {name}", inputs, geglu_linear, geglu_linear_reference, traffic)
        yield Case(f"matmul and geglu {name}", inputs, matmul_and_geglu, geglu_linear_reference, traffic, alone=True)


def geglu_linear_plan_cases() -> Iterator[Case]:
    """The matmul and `geglu`, then the one kernel under every plan; names end with the plan."""
    plan = geglu_linear_module.Plan
    plans = [
        plan(128, 64, 64, 4, 3, 0, True),
        plan(128, 64, 64, 4, 3, 2, True),
        plan(128, 64, 32, 4, 4, 2, True),
        plan(128, 64, 64, 8, 3, 0, True),
        plan(128, 64, 64, 8, 3, 2, True),
        plan(128, 64, 128, 8, 2, 1, True),
        plan(128, 128, 64, 8, 3, 0, True),
        plan(128, 128, 64, 8, 3, 1, True),
        plan(128, 128, 64, 8, 4, 1, True),
        plan(256, 64, 64, 8, 4, 1, True),
        geglu_linear_module.PLAIN,
        plan(128, 64, 64, 4, 3),
    ]
    for case in geglu_linear_cases():
        if case.alone:
            yield case
            continue
        for p in plans:
            kernel = functools.partial(geglu_linear_module.launch, chosen=p)
            yield replace(case, name=f"{case.name} {astuple(p)}", kernel=kernel, alone=True)


def temporal_attention_cases() -> Iterator[Case]:
    """Both temporal attentions of two clips (guidance) of 16 frames of 512×512, with one reference and without."""
    for (tokens, size), reference in itertools.product(((4096, 40), (1024, 80), (256, 160), (64, 160)), (True, False)):
        channels = 8 * size

        def inputs(tokens: int = tokens, channels: int = channels, reference: bool = reference) -> tuple[Any, ...]:
            own = tuple(random(2, 16, tokens, channels) for _ in range(3))
            if not reference:
                return *own, 8
            scale = torch.rand(2, 16, tokens, device="cuda").half()
            rows = (random(1, 16, tokens, channels), random(1, 16, tokens, channels))
            return *own, 8, *rows, random(16, channels), random(16, channels), scale

        clips, row = 2 * 16 * tokens, 2 * channels  # bytes of a row
        traffic = 4 * clips * row + reference * (clips * row + 2 * 16 * row + 2 * clips)
        name = f"temporal_attention {2 * tokens}×8×{size}" + " + reference" * reference
        yield Case(name, inputs, temporal_attention, temporal_attention_reference, traffic)


def temporal_attention_plan_cases() -> Iterator[Case]:
    """The highest level under several plans; names end with their heads, warps, stages, columns and pixels."""
    for case in itertools.islice(temporal_attention_cases(), 2):
        yield replace(case, name=f"{case.name}, as planned")
        for p in (Plan(2, 2, 3, 32, 4), Plan(1, 1, 2, 64, 4), Plan(4, 4, 2, 32, 2)):
            kernel = functools.partial(launch, chosen=p)
            yield replace(case, name=f"{case.name} {astuple(p)}", kernel=kernel, alone=True)


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    "temporal_attention": temporal_attention_cases,
    "group_norm_silu": group_norm_silu_cases,
    "layer_norm": layer_norm_cases,
    "transformer": transformer_cases,
    "geglu": geglu_cases,
    "geglu_linear": geglu_linear_cases,
}
PLANS = {  # run only if named
    "temporal_attention_plans": temporal_attention_plan_cases,
    "group_norm_silu_plans": group_norm_silu_plan_cases,
    "upsample_conv_plans": upsample_conv_cases,
    "geglu_linear_plans": geglu_linear_plan_cases,
}


def tensors(values: Any) -> list[Tensor]:
    """All tensors of one, or of a tuple."""
    return [t for t in (values if isinstance(values, tuple) else (values,)) if isinstance(t, Tensor)]


def milliseconds(function: Callable[..., Any], inputs: list[tuple[Any, ...]], repeats: int = 15) -> float:
    """Median time of one call within a CUDA graph that calls `function` on all inputs in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs[:2]:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [function(*arguments) for arguments in inputs]  # kept, so that no two share memory
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(inputs))
    del outputs
    return statistics.median(times[3:])


def error(case: Case, arguments: tuple[Any, ...]) -> float:
    """Largest relative error (Frobenius norm) of the outputs against the reference in float32."""
    wide = tuple(a.detach().float().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)
    pairs = zip(tensors(case.kernel(*arguments)), tensors(case.reference(*wide)), strict=True)
    return max(((ours.float() - exact).norm() / exact.norm()).item() for ours, exact in pairs)


def row(case: Case, copy: float, compile_reference: bool) -> str:
    """Time one case; `copy` is a device copy's bytes per second."""
    first = case.inputs()
    torch.cuda.synchronize()
    start = time.perf_counter()
    case.kernel(*first)
    torch.cuda.synchronize()
    cold = time.perf_counter() - start
    size = sum(t.nbytes for t in tensors(first))
    inputs = [first] + [case.inputs() for _ in range(min(max(FOOTPRINT // size, 2), 64))]
    ours, eager, compiled = milliseconds(case.kernel, inputs), "-", "-"
    if not case.alone:
        eager = f"{milliseconds(case.reference, inputs):.4f}"
    if compile_reference and not case.alone and not any(t.requires_grad for t in tensors(first)):
        torch.compiler.reset()
        compiled = f"{milliseconds(torch.compile(case.reference, fullgraph=True), inputs):.4f}"
    rate = case.traffic / ours * 1e3
    return (
        f"{case.name:70} {ours:8.4f} {rate / 1e9:8.0f} {rate / copy:7.1%} {eager:>9} {compiled:>9}"
        f" {error(case, first):9.1e} {cold:8.2f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS | PLANS))
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile of the references out")
    options = parser.parse_args()
    for name in options.kernels:
        if name not in KERNELS | PLANS:
            parser.error(f"no kernel {name}: {', '.join(KERNELS | PLANS)}")
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark times a CUDA GPU and finds none\n")
    big = torch.zeros(2**29, device="cuda", dtype=torch.float16)
    pair = [(torch.empty_like(big), big)] * 3
    # The better of the driver's copy and a kernel that reads and writes as much.
    times = milliseconds(torch.Tensor.copy_, pair), milliseconds(lambda out, x: torch.neg(x, out=out), pair)
    copy = 2 * big.nbytes / min(times) * 1e3
    del big, pair
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, device copy {copy / 1e9:.0f} GB/s")
    print(f"{'':70} {'ms':>8} {'GB/s':>8} {'of copy':>7} {'eager':>9} {'compiled':>9} {'error':>9} {'first s':>8}")
    for name in options.kernels or KERNELS:
        for case in (KERNELS | PLANS)[name]():
            print(row(case, copy, not options.skip_compile), flush=True)


if __name__ == "__main__":
    main()
