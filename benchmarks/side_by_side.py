"""Time a guided step of `emt` beside the same step of diffusers' AnimateDiff, eager and compiled, in one process.

    python benchmarks/side_by_side.py [--model FOLDER] [--rounds 3] [--ways emt,diffusers,compiled] [--size 512]

Random weights of Stable Diffusion 1.5 size, 16 frames, a batch of two for guidance, fp16. diffusers' network
(`UNetMotionModel`) has no reference: `emt` is timed with and without one. In each round every way is timed in turn;
printed are medians of all rounds (20th, 80th percentile) by device events. `compiled` is `torch.compile` with its
defaults, and what its first call takes is printed, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ladder import PROMPT, durations, guided
from torch import Tensor

from emt.backbones.sd15.random_model import random_model
from emt.pipeline import open_model

FRAMES = 16


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder that is there, instead of random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="emt,diffusers,compiled")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark times a CUDA GPU and finds none\n")
    chosen = options.ways.split(",")
    size = options.size
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {FRAMES} frames of {size}×{size}")
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if "emt" in chosen:
            model = options.model or random_model(Path(folder) / "model", size="sd15", dtype=torch.float16)
            ways |= emt_steps(model, size)
        if {"diffusers", "compiled"} & set(chosen):
            ways |= diffusers_steps(size, eager="diffusers" in chosen, compiled="compiled" in chosen)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, step in ways.items():
                times[name] += durations(step, 10)
                torch.cuda.synchronize()
    print("| a guided step | ms (20th, 80th percentile) |\n|---|---|")
    for name, found in times.items():
        low, middle, high = torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        print(f"| {name} | {middle:.1f} ({low:.1f}, {high:.1f}) |")


def emt_steps(model: Path, size: int) -> dict[str, Callable[[], object]]:
    """Steps of `emt transfer`'s network, each in a CUDA graph."""
    pipe = open_model(model, torch.float16)
    assert pipe is not None  # Stable Diffusion 1.5's parts are the project's own
    pipe.to("cuda")
    pipe.backend.capture_at_once = True  # type: ignore[attr-defined]
    noise = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, FRAMES, size // 8, size // 8, generator=noise).to("cuda", torch.float16)
    timestep, prompts = torch.tensor(601, device="cuda"), pipe.encode_prompts(["", PROMPT])
    features = pipe.backend.encode_reference(sample, timestep[None], prompts[:1])
    text, motion = guided(pipe.unet.encode_text(prompts)), pipe.backend.prepare_motion(features)
    twice = torch.cat([sample, sample])
    return {
        "emt, with reference": lambda: pipe.backend.denoise(twice, timestep, text, motion),
        "emt, without": lambda: pipe.backend.denoise(twice, timestep, text, None),
    }


def diffusers_steps(size: int, *, eager: bool, compiled: bool) -> dict[str, Callable[[], object]]:
    """Steps of `UNetMotionModel` with its default sizes, which are Stable Diffusion 1.5's, and random weights."""
    from diffusers import UNetMotionModel

    with torch.device("cuda"):
        network = UNetMotionModel(cross_attention_dim=768, motion_max_seq_length=32, use_motion_mid_block=False)
    network = network.to(torch.float16).eval()
    sample = torch.randn(2, 4, FRAMES, size // 8, size // 8, device="cuda", dtype=torch.float16)
    text = torch.randn(2 * FRAMES, 77, 768, device="cuda", dtype=torch.float16)
    timestep = torch.tensor(601, device="cuda")

    def step(call: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: call(sample, timestep, text, return_dict=False)

    ways: dict[str, Callable[[], object]] = {"diffusers' AnimateDiff, eager": step(network)} if eager else {}
    if compiled:
        call = step(torch.compile(network))
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        print(f"torch.compile and its first call: {time.perf_counter() - begun:.1f} s", flush=True)
        ways["diffusers' AnimateDiff, torch.compile"] = call
    return ways


if __name__ == "__main__":
    main()
