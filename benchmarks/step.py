"""Time the steps of a transfer at Stable Diffusion 1.5 size on one GPU, with random weights.

    python benchmarks/step.py --clip CLIP.mp4 [--output table.json]

Each rung of the ladder prints a row: the reference pass, one guided step with reference and one without, encoding and
decoding, the whole clip, peak memory, and how far its guided step is from float32.
Times are medians (20th, 80th percentile) of device events after warming up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emt.pipeline import Motion, MotionTransferPipeline, load_pipeline
from emt.video import read_clip
from emt.weights import random_model

RUNGS = ("published arithmetic", "fp16 weights", "bf16 weights")


def timed(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of `work` at the 20th, 50th and 80th percentile."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    quantiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(zip(("p20", "p50", "p80"), quantiles, strict=True))


def inputs(pipe: MotionTransferPipeline, motion: Motion) -> tuple[torch.Tensor, torch.Tensor]:
    """A guided batch of two at the size of `motion`, and its text."""
    generator = torch.Generator().manual_seed(0)
    scale = pipe.vae_scale_factor
    shape = (2, 4, motion.frames, motion.height // scale, motion.width // scale)
    sample = torch.randn(shape, generator=generator)
    return sample.to(pipe.device), pipe.encode_prompts(["", "a red car on a beach"])


@torch.no_grad()
def measure(rung: str, folder: Path, clip: Path, size: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    # As published: float32 weights under autocast for denoising, the reference pass in float32.
    published = rung == "published arithmetic"
    dtype = {"fp16 weights": torch.float16, "bf16 weights": torch.bfloat16}.get(rung, torch.float32)
    start = time.perf_counter()
    pipe = load_pipeline(folder, "cuda", dtype)
    loading = time.perf_counter() - start
    frames = read_clip(clip, size=(size, size)).frames
    half = torch.autocast("cuda", torch.float16) if published else contextlib.nullcontext()

    prompt, row = "a red car on a beach", {"rung": rung, "loading_s": loading}
    motion = pipe.extract_motion(frames)
    with half:
        pipe(prompt, motion, steps=2)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pipe(prompt, pipe.extract_motion(frames))
        row["clip_s"] = time.perf_counter() - start
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30

    sample, text = inputs(pipe, motion)
    sample = sample.to(pipe.unet.dtype)
    generator = torch.Generator().manual_seed(0)
    latents, nothing = pipe.encode_frames(frames, generator), pipe.encode_prompts([""])
    t = torch.tensor(601, device="cuda")
    row["reference_pass_ms"] = timed(lambda: pipe.unet.encode_reference(latents, t, nothing), repeats)
    row["encode_ms"] = timed(lambda: pipe.encode_frames(frames, generator), repeats)
    with half:
        row["prepare_ms"] = timed(lambda: motion.features.prepare(pipe.unet), repeats)
        row["step_without_reference_ms"] = timed(lambda: pipe.unet(sample, t, text), repeats)
        row["step_ms"] = timed(lambda: pipe.unet(sample, t, text, motion.features), repeats)
        prepared, encoded = motion.features.prepare(pipe.unet), pipe.unet.encode_text(text)
        row["step_precomputed_ms"] = timed(lambda: pipe.unet(sample, t, encoded, prepared), repeats)
        row["decode_ms"] = timed(lambda: pipe.decode_latents(sample[0]), max(repeats // 4, 3))
        row["output"] = pipe.unet(sample, t, encoded, prepared).float().cpu()
    return row


@torch.no_grad()
def exact(folder: Path, clip: Path, size: int) -> torch.Tensor:
    """The guided step in float32 without TensorFloat-32, which the rungs are compared with."""
    pipe = load_pipeline(folder, "cuda", torch.float32)
    motion = pipe.extract_motion(read_clip(clip, size=(size, size)).frames)
    sample, text = inputs(pipe, motion)
    return pipe.unet(sample, torch.tensor(601, device="cuda"), text, motion.features).cpu()


def main() -> None:
    """Print the table; with --output, write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, required=True, help="a reference clip")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark times a CUDA GPU and finds none\n")

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_model(model, size="sd15")
        truth = exact(model, options.clip, options.size)
        rows = [measure(rung, model, options.clip, options.size, options.repeats) for rung in RUNGS]

    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; 16 frames of {options.size}×{options.size}, guidance, DDIM 25 steps")
    columns = [key for key in rows[0] if key.endswith("_ms")]
    for row in rows:
        output = row.pop("output")
        row["relative_change"] = ((output - truth).norm() / truth.norm()).item()
        print(f"\n{row['rung']}")
        for key in columns:
            q = row[key]
            print(f"  {key:28} {q['p50']:8.1f}  ({q['p20']:.1f}, {q['p80']:.1f})")
        for key in ("loading_s", "clip_s", "peak_GiB", "relative_change"):
            print(f"  {key:28} {row[key]:8.4g}")
    if options.output:
        options.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
