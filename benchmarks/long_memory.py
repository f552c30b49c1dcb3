"""Memory and time of clips by their length: what a process holds itself, and what the device holds.

    python benchmarks/long_memory.py [--frames 150 300 900] [--size 512] [--sd15] [--device cpu] [--output FILE]

Each length is one `emt transfer --frames all` of a reference of 30 frames a second, with random weights: those of the
tests' small network with frames of the size, or with --sd15 of Stable Diffusion 1.5's. *Own* memory is anonymous memory
(RssAnon): the pages of files that the process has mapped come and go as the system has room for them. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emt.backbones.sd15.random_model import random_model
from emt.scratch import scratch_array
from emt.video import write_clip


def reference(path: Path, frames: int, size: int) -> Path:
    """A picture that moves by a pixel a frame, as a clip."""
    coarse = np.random.default_rng(0).integers(0, 256, ((size + 64) // 8 + 1,) * 2 + (3,), np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    clip = scratch_array((frames, size, size, 3))
    for i in range(frames):
        clip[i] = picture[i % 64 : i % 64 + size, :size]
    return write_clip(path, clip, 30)


def own_memory(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def transfer(o: argparse.Namespace, folder: Path, model: Path, frames: int) -> dict[str, Any]:
    """Make a clip; its figures."""
    clip = reference(folder / f"{frames}.mp4", frames, o.size)
    options = ["--frames", "all", "--size", f"{o.size}x{o.size}", "--steps", str(o.steps), "--scheduler", "dpm++"]
    command = [sys.executable, "-m", "emt_cli.app", "transfer", str(clip), "--prompt", "x", "--model", str(model)]
    command += ["--device", o.device, "--out", str(folder / "out"), "--json", *options]
    homes = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}
    begun, most = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | homes) as running:
        while running.poll() is None:
            most = max(most, own_memory(running.pid))
            time.sleep(0.05)
        assert running.stdout is not None
        line = json.loads(running.stdout.read().splitlines()[-1])
    if line["state"] != "done":
        raise SystemExit(f"error: {line}")
    return {
        "frames": frames,
        "own_GiB": most / 2**30,
        "device_GiB": line["peak_memory"] / 2**30,
        "seconds": time.monotonic() - begun,
        "timings": line["timings"],
    }


def main() -> None:
    """Run as the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[150, 300, 900])
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sd15", action="store_true", help="a network of Stable Diffusion 1.5's size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="JSON lines")
    o = parser.parse_args()
    print(
        "| frames | own memory | device memory | seconds | reading | steps | decoding |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="emt-long-") as name:
        folder = Path(name)
        if o.sd15:
            model = random_model(folder / "model", size="sd15", dtype=torch.float16)
        else:
            model = random_model(folder / "model", frames=16, height=o.size, width=o.size)
        for frames in o.frames:
            row = transfer(o, folder, model, frames)
            spent = row["timings"]
            parts = " | ".join(f"{spent.get(part, 0.0):.1f}" for part in ("reference", "steps", "vae"))
            memory = f"{row['own_GiB']:.2f} GiB | {row['device_GiB']:.2f} GiB"
            print(f"| {frames} | {memory} | {row['seconds']:.0f} | {parts} |", flush=True)
            if o.output:
                with o.output.open("a") as file:
                    print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
