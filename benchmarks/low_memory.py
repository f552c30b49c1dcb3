"""Make a clip at Stable Diffusion 1.5 size in little GPU memory, as `emt transfer --memory low` does.

    python benchmarks/low_memory.py [--limit GIB] [--model FOLDER] [--clip CLIP.mp4] [--output low_memory.json]

PyTorch's allocator is held to the limit, so that a clip is only made if it fits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from emt.backbones.sd15.random_model import random_model
from emt.pipeline import load_pipeline
from emt.video import read_clip


def main() -> None:
    """Print seconds and memory of a clip; with --output, write them as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clip = Path(__file__).parent.parent / "examples" / "references" / "bounce.mp4"
    parser.add_argument("--model", type=Path, help="model folder; random weights unless given")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of GPU memory")
    parser.add_argument("--clip", type=Path, default=clip, help="a reference clip")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark needs a CUDA GPU and finds none\n")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(options.limit * 2**30 / total, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder) / "model", size="sd15", dtype=torch.float16)
        pipe = load_pipeline(model, "cpu", torch.float16)
    pipe.save_memory("cuda:0")
    frames = read_clip(options.clip, size=(options.size, options.size)).frames
    row: dict[str, float] = {"limit_GiB": options.limit}
    problem = ""
    try:
        for name in ("first_clip_s", "clip_s"):
            start = time.perf_counter()
            motion = pipe.extract_motion(frames)
            reading = time.perf_counter() - start
            pipe.generate("a red car on a beach", motion)
            row |= {name: time.perf_counter() - start, "reference_s": reading}
    except torch.OutOfMemoryError as error:
        problem = f"error: a clip does not fit: {error}"
    row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    row["peak_reserved_GiB"] = torch.cuda.max_memory_reserved() / 2**30
    for key, value in row.items():
        print(f"{key:20} {value:8.3f}")
    if options.output:
        options.output.write_text(json.dumps(row, indent=1))
    if problem:
        raise SystemExit(problem)


if __name__ == "__main__":
    main()
