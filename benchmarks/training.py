"""Time the training of the adapter at Stable Diffusion 1.5 size with random weights, as `emt train` does it.

    python benchmarks/training.py [--rows 1 8c] [--seconds 30] [--output training.json]
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        benchmarks/training.py --rows 1 8c

A row is a batch on each GPU, with a c if gradients are checkpointed: `emt.train.trainer.Trainer` in bf16 on pairs of
16 frames of 512×512, decoded from files by worker processes. The first steps, in which kernels compile, are not timed.
Printed: seconds a step (median; 10th and 90th percentile), steps and pairs a second of all GPUs together, and the peak
of the memory that tensors take on the first. About three minutes on an H100, half of it for the random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging

from emt.backbones.sd15.random_model import random_model
from emt.train.trainer import Trainer, TrainingSettings
from emt.video import write_clip

SIDE, FRAMES = 512, 16
_FEWEST = 3  # timed steps, however long they take


class _EnoughError(Exception):
    """Raised from within training to leave it before anything of the run is saved."""


def write_pairs(root: Path, side: int, frames: int) -> Path:
    """Two motions in two appearances each: a square over a texture."""
    rng = np.random.default_rng(0)
    for motion in range(2):
        for colour in ("red", "blue"):
            coarse = rng.integers(0, 255, (side // 16, side // 16, 3), np.uint8)
            texture = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
            clip = np.repeat(texture[None], frames, 0)
            for i, frame in enumerate(clip):
                at = (i + motion * (frames - 1 - 2 * i)) * side // (2 * frames)
                frame[at : at + side // 4, at : at + side // 4] = (220, 30, 30) if colour == "red" else (30, 30, 220)
            write_clip(root / f"motion {motion}" / f"a {colour} square.mp4", clip, 8)
    return root


def time_steps(model: Path, pairs: Path, run: Path, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train until enough steps are timed."""
    settings = TrainingSettings(
        batch_size=int(row.removesuffix("c")),
        gradient_checkpointing=row.endswith("c"),
        precision="bf16",
        sample_every=0,
        checkpoint_every=10**9,
        workers=options.workers,
    )
    trainer = Trainer(model, pairs, run, settings)
    device = trainer.accelerator.device
    on_gpu = device.type == "cuda"
    times: list[float] = []
    begun = last = time.perf_counter()
    warmed = 0.0

    def on_step(record: dict[str, Any]) -> None:
        nonlocal last, warmed
        now = time.perf_counter()  # a step has ended on the device: its loss has been read
        if record["step"] > options.warmup:
            times.append(now - last)
        elif record["step"] == options.warmup:
            warmed = now - begun
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
        last = now
        # All processes leave after the same step: the first one's clock decides.
        over = torch.tensor(float(len(times) >= _FEWEST and sum(times) > options.seconds), device=device)
        if not trainer.accelerator.is_main_process:
            over.zero_()
        if trainer.accelerator.reduce(over, "sum").item():
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        trainer.train(on_step=on_step)
    low, median, high = np.percentile(times, [10, 50, 90]).tolist()
    processes = trainer.accelerator.num_processes
    return {
        "row": row,
        "gpus": processes,
        "seconds": median,
        "low": low,
        "high": high,
        "timed": len(times),
        "steps_per_second": 1 / median,
        "pairs_per_second": settings.batch_size * processes / median,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "warmup_seconds": warmed,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["1", "8c"], help="batches, with a c for gradient checkpointing")
    parser.add_argument("--seconds", type=float, default=30, help="of timed steps for each row")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode clips, for each GPU")
    parser.add_argument("--tiny", action="store_true", help="a toy model instead, to try this on a CPU")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    main_process = os.environ.get("RANK", "0") == "0"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        begun = time.perf_counter()
        if options.tiny:
            random_model(folder / "model", frames=4, height=32, width=32)
            write_pairs(folder / "pairs", 32, 4)
        else:
            random_model(folder / "model", size="sd15", dtype=torch.float16)
            write_pairs(folder / "pairs", SIDE, FRAMES)
        if main_process:
            print(f"model and pairs written in {time.perf_counter() - begun:.0f} s", flush=True)
            print("| batch a GPU | GPUs | seconds a step | steps/s | pairs/s | peak GiB | warm-up, s |")
            print("|---|---|---|---|---|---|---|", flush=True)
        for place, row in enumerate(options.rows):
            try:
                found = time_steps(folder / "model", folder / "pairs", folder / f"run-{place}", row, options)
            except torch.OutOfMemoryError:
                if main_process:
                    print(f"| {row} | out of memory |", flush=True)
                found = None
            gc.collect()
            torch.cuda.empty_cache()
            if found is None or not main_process:
                continue
            rows.append(found)
            peak = "–" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
            print(
                f"| {row.replace('c', ', checkpointed')} | {found['gpus']} | "
                f"{found['seconds']:.3f} ({found['low']:.3f}, {found['high']:.3f}) | {found['steps_per_second']:.3f} | "
                f"{found['pairs_per_second']:.3f} | {peak} | {found['warmup_seconds']:.0f} |",
                flush=True,
            )
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
