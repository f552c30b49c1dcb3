"""Time and memory of Wan 2.1 T2V-1.3B's network with random weights: steps, reference pass, training of the adapter.

    python benchmarks/wan21.py speed [--sizes 17x512x512 81x480x832] [--clips 8] [--output wan21.json]
    python benchmarks/wan21.py memory [--sizes 17x256x256 81x480x832]

`speed`: a step of guidance (a batch of two, or two for each of `--clips` of one reference, text encoded, bf16) by
diffusers' `WanTransformer3DModel`, eager and with its blocks compiled, and by this project's network: without a
reference, with one in the default blocks and in the middle third of them, seen whole and by same frame ±1, by both
halves of the batch and, as `guided_by_reference` has it, by one; and the reference pass. A row is the median of
`--repeats` calls, of a CUDA graph where it says so or where the network is this project's; calls of more than 0.3 s are
not captured, and repeated less often.
`memory`: the peak of memory that tensors take in a step of training the adapter with gradients checkpointed, a batch of
one, AdamW in float32. `--tiny` takes toy sizes, to try it on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.features import MotionFeatures
from emt.train.objective import FlowObjective

#: Both networks are made of this: without it diffusers' is of the 14 B.
FULL = {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 8960, "num_layers": 30}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 64, "num_layers": 6}
TEXT_TOKENS = 512
LONG = 0.3
"""Seconds of a call that keeps the GPU busy whoever launches it: it is not captured, and takes `LONG_REPEATS`."""
LONG_REPEATS = 2


def make(kind: Any, device: str, dtype: torch.dtype, **options: Any) -> Any:
    """A network with random weights, in a dtype but for what it keeps in float32."""
    with torch.device(device):
        model = kind(**options)
    for name, p in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            p.data = p.data.to(dtype)
    return model.requires_grad_(False).eval()


def seconds(call: Callable[[], Any], repeats: int, device: str, *, graph: bool) -> float:
    """Median time of a call after two more, of its CUDA graph if wanted and the call so short that it may matter."""
    once = 0.0
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        once = time.perf_counter() - started
    if once > LONG:
        repeats = min(repeats, LONG_REPEATS)
    if device == "cuda" and graph and once <= LONG:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = call()
        call = captured.replay
        call()
        del kept
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def free(device: str) -> None:
    """Give memory back between rows."""
    gc.collect()
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def speed(size: tuple[int, int, int], o: argparse.Namespace) -> dict[str, float]:
    """Seconds of every row at a size."""
    frames, height, width = size
    shape = (2 * o.clips, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    given = torch.randn(shape, device=o.device, dtype=torch.bfloat16)
    rows: dict[str, float] = {}

    def row(name: str, call: Callable[[], Any], *, graph: bool = True) -> None:
        try:
            rows[name] = seconds(call, o.repeats, o.device, graph=graph)
        except Exception as error:  # the other rows are worth having
            print(f"  {name}: failed, {type(error).__name__}: {str(error)[:200]}", flush=True)
            return
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if o.device == "cuda" else ""
        print(f"  {name}: {1000 * rows[name]:.2f} ms{peak}", flush=True)

    time_own(given, row, o)
    free(o.device)
    time_published(given, row, rows, o)
    free(o.device)
    return rows


def time_own(given: Tensor, row: Callable[..., None], o: argparse.Namespace) -> None:
    """Rows of this project's network."""
    model = make(WanMotionTransferTransformer, o.device, given.dtype, **(TINY if o.tiny else FULL))
    model.fuse_projections()
    words = torch.randn(len(given), TEXT_TOKENS, model.config.text_dim, device=o.device, dtype=given.dtype)
    level = torch.full((len(given),), 700.0, device=o.device)
    text, empty = model.encode_text(words), model.encode_text(words[:1])
    row("emt, without reference", lambda: model(given, level, text))
    row("emt, reference pass", lambda: model.encode_reference(given[:1], level[:1], empty))
    features = model.encode_reference(given[:1], level[:1], empty)
    absent = model.without_reference(features)
    default = [i for i, block in enumerate(model.blocks) if block.adapter is not None]
    third = len(default) // 3
    for blocks in (default, default[third : len(default) - third]):
        for i in set(default) - set(blocks):
            model.blocks[i].adapter = None
        for parts, half in (([features], ""), ([absent] * o.clips + [features] * o.clips, ", in half of the batch")):
            joined = {
                path: tuple(map(torch.cat, zip(*(part.layers[path] for part in parts), strict=True)))
                for path in model.reference_layers()
            }
            motion = model.prepare(MotionFeatures(joined))
            del joined
            for neighbours, seen in ((None, "all frames"), (1, "same frame ±1")):
                model.register_to_config(reference_neighbours=neighbours)
                name = f"emt, with reference in blocks {blocks[0]} to {blocks[-1]}, {seen}{half}"
                row(name, functools.partial(model, given, level, text, motion))
            del motion


def time_published(given: Tensor, row: Callable[..., None], rows: dict[str, float], o: argparse.Namespace) -> None:
    """Rows of diffusers' network."""
    model = make(WanTransformer3DModel, o.device, given.dtype, **(TINY if o.tiny else FULL))
    words = torch.randn(len(given), TEXT_TOKENS, model.config.text_dim, device=o.device, dtype=given.dtype)
    level = torch.full((len(given),), 700.0, device=o.device)

    def step() -> Tensor:
        return model(given, level, words, return_dict=False)[0]

    row("diffusers, eager", step, graph=False)
    short = rows.get("diffusers, eager", 0.0) <= LONG
    if short:
        row("diffusers, eager, in a CUDA graph", step)
    if not o.no_compile:
        started = time.perf_counter()
        for block in model.blocks:
            block.compile(dynamic=False)
        row("diffusers, blocks compiled", step, graph=False)
        if short:
            row("diffusers, blocks compiled, in a CUDA graph", step)
        print(f"  (compiling: {time.perf_counter() - started:.0f} s)", flush=True)


def memory(size: tuple[int, int, int], o: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of training, and GiB at its peak."""
    frames, height, width = size
    device, dtype = o.device, torch.bfloat16
    model = make(WanMotionTransferTransformer, device, dtype, **(TINY if o.tiny else FULL))
    model.enable_gradient_checkpointing()
    trained = [p for _, p in model.adapter_parameters()]
    for p in trained:
        p.data = p.data.float()
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained)
    objective = FlowObjective(torch.device(device))
    shape = (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    latents, reference, noise = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    words = torch.randn(1, TEXT_TOKENS, model.config.text_dim, device=device, dtype=dtype)
    level = torch.full((1,), 500, device=device)
    times = []
    for _ in range(o.repeats):
        started = time.perf_counter()
        with torch.autocast(device, dtype=dtype):
            with torch.no_grad():
                motion = model.encode_reference(reference, 400.0, words)
            prediction = model(objective.add_noise(latents, noise, level), level, words, motion)
            loss = objective.loss(prediction, latents, noise, level)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    print(f"  a step of training: {statistics.median(times):.2f} s, {peak:.1f} GiB, loss {loss.item():.3f}", flush=True)
    free(device)
    return {"seconds": statistics.median(times), "gib": peak}


def main() -> None:
    """Print the rows of every size; write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--sizes", nargs="+", default=["17x512x512", "81x480x832"], help="frames × height × width")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clips", type=int, default=1, help="speed: of one reference, made at once")
    parser.add_argument("--no-compile", action="store_true", help="leave out diffusers' compiled row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try it on a CPU")
    o = parser.parse_args()
    if not o.device.startswith("cuda") and not o.tiny:
        raise SystemExit("networks of Wan's size are for a GPU; --tiny tries the benchmark on a CPU")
    name = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    found = {}
    for size in o.sizes:
        print(size, flush=True)
        frames, height, width = map(int, size.split("x"))
        found[size] = {"speed": speed, "memory": memory}[o.what]((frames, height, width), o)
        if o.output:
            o.output.write_text(
                json.dumps({"device": name, "torch": torch.__version__, o.what: found}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
