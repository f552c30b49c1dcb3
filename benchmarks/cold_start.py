"""Time a fresh process from its start to its first finished denoising step: engine, eager PyTorch, torch.compile.

    python benchmarks/cold_start.py --minutes 9 [--size sd15] [--pixels 512x512] [--batch 1..4] [--folder FOLDER]
    python benchmarks/cold_start.py --ways torch            # no engine: PyTorch with empty and with kept caches
    python benchmarks/cold_start.py --build --folder FOLDER  # model and engine alone; measure them later from FOLDER

Makes a model of random weights and builds an inductor engine of it (with --folder they are kept, and used again), then
starts processes that each load the model, read the motion of a clip of noise and make a clip. Every row is printed as
soon as it is known. A way is started with empty caches of compilers, and then again with those that it left. What does
not fit into --minutes any more is left out, and said.

Phases of a row, in seconds since the process was started: libraries imported, model on the device, engine opened,
motion read, first step finished. Then the median step with guidance, the first clip without and with reading its
motion, a second one with reading its motion, and peak memory. What the first costs more than the second is the cold
start; lines before a row say how much of that was compiling kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("engine", "torch", "compile")


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop")
    parser.add_argument("--size", default="sd15", choices=("sd15", "tiny"), help="of the network")
    parser.add_argument("--pixels", default="512x512", help="width and height")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", default="1..4", help="clips at once that the engine is built for")
    parser.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--ways", default=",".join(WAYS), help="of engine, torch and compile")
    parser.add_argument("--folder", type=Path, help="for model, engine and caches; kept")
    parser.add_argument("--build", action="store_true", help="make model and engine in --folder, and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build and not options.folder:
        parser.error("--build needs --folder, where model and engine stay")
    if unknown := set(options.ways.split(",")) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    if options.child == "build":
        build(options)
    elif options.child:
        run(options)
    else:
        import torch

        if options.device.startswith("cuda") and not torch.cuda.is_available():
            parser.exit(1, "error: there is no CUDA GPU: name another --device, as cpu with --size tiny\n")
        with tempfile.TemporaryDirectory() as temporary:
            options.folder = options.folder or Path(temporary)
            measure(options)


def measure(options: argparse.Namespace) -> None:
    """Start one process after another."""
    end = time.monotonic() + 60 * options.minutes
    options.folder.mkdir(parents=True, exist_ok=True)
    start(options, "build", options.folder / "build-caches", end)
    if "engine" in options.ways.split(","):
        report_engine(options.folder / "engine")
    if options.build:
        return
    print(f"{'':22}" + "".join(f"{name:>9}" for name in COLUMNS), flush=True)
    for way in options.ways.split(","):
        for caches in ("empty caches", "caches kept"):
            kept = options.folder / f"caches-{way}"
            if caches == "empty caches":
                shutil.rmtree(kept, ignore_errors=True)
            line = start(options, way, kept, end)
            if line is None:
                print(f"{way}, {caches}: left out", flush=True)
                break
            row = json.loads(line)
            print(f"{f'{way}, {caches}':22}" + "".join(f"{row[name]:9.2f}" for name in COLUMNS), flush=True)


COLUMNS = ("imported", "loaded", "opened", "motion", "step 1", "p50 ms", "clip s", "1st s", "2nd s", "GiB")


def start(options: argparse.Namespace, child: str, caches: Path, end: float) -> str | None:
    """Run this file in a fresh process; its last line of standard output, None if it failed or had no time."""
    left = end - time.monotonic()
    if left < 5:
        return None
    words = [sys.executable, __file__, "--child", child, "--started", str(time.time())]
    for name in ("size", "pixels", "frames", "batch", "precision", "device", "steps", "ways", "folder"):
        words += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        if child == "build":
            out, _ = _echo(process, end)
        else:
            out, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"{child}: stopped after {left:.0f} s", flush=True)
        return None
    if process.returncode:
        print(f"{child}: failed", flush=True)
        return None
    return out.splitlines()[-1]


def _echo(process: subprocess.Popen[str], end: float) -> tuple[str, None]:
    """Print the lines of a process as they come, until the time is up."""
    import threading

    timer = threading.Timer(max(end - time.monotonic(), 0), process.kill)
    timer.start()
    out = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        out += line
    process.wait()
    timer.cancel()
    return out or "\n", None


def report_engine(folder: Path) -> None:
    """Engine that was built."""
    from emt.errors import EmtError
    from emt_engines.manifest import Manifest

    try:
        manifest = Manifest.read(folder)
    except EmtError as error:
        print(f"no engine: {error.problem}", flush=True)
        return
    total = sum(path.stat().st_size for path in folder.iterdir())
    made = f"{manifest.precision}, {manifest.sizes[0]} pixels, {'..'.join(map(str, manifest.batch))} clips"
    print(f"engine for {manifest.host.device}: {made}, built in {manifest.seconds:.0f} s, {total / 2**20:.1f} MiB")
    for part in manifest.parts:
        size = (folder / part.file).stat().st_size / 2**20
        print(f"  {part.name:<14} {size:6.1f} MiB  parity {part.parity or 0:.1e}", flush=True)


def build(options: argparse.Namespace) -> None:
    """Make model and engine, unless they are there; prints the time at which each part is begun."""
    import torch

    from emt.backbones.sd15.random_model import random_model
    from emt.pipeline import load_pipeline
    from emt_engines.build import build_engine
    from emt_engines.fingerprint import weights_of
    from emt_engines.manifest import FILE, Manifest, Request, Size

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]

    def say(what: str, done: float = 0.0) -> None:
        print(f"{time.time() - options.started:7.1f} s  {what}", flush=True)

    model = options.folder / "model"
    if not model.exists():
        say("making the model")
        random_model(model, size=options.size, dtype=dtype)
    if "engine" not in options.ways.split(","):
        return
    say("loading the model")
    pipe = load_pipeline(model, options.device, dtype)
    low, _, high = options.batch.partition("..")
    request = Request(
        backend="inductor",
        precision=options.precision,
        device=options.device,
        sizes=(Size.parse(options.pixels),),
        frames=options.frames,
        batch=(int(low), int(high or low)),
        weights=weights_of(model),
        model=str(model),
    )
    folder = options.folder / "engine"
    if (folder / FILE).exists() and Manifest.read(folder).match(request)[0]:
        return
    build_engine(pipe, request, folder, say)


def run(options: argparse.Namespace) -> None:
    """Make a clip in this process; prints a row as JSON."""
    import numpy as np
    import torch

    from emt.backends.torch import TorchBackend
    from emt.pipeline import load_pipeline

    row: dict[str, Any] = {}
    logging.basicConfig(stream=sys.stderr, format="  %(message)s")
    logging.getLogger("emt.backends.torch").setLevel(logging.INFO)

    def note(phase: str) -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        row[phase] = time.time() - options.started

    note("imported")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    pipe = load_pipeline(options.folder / "model", options.device, dtype)
    note("loaded")
    if options.child == "engine":
        from emt_engines.build import open_engine
        from emt_engines.manifest import Manifest, Request

        folder = options.folder / "engine"
        manifest = Manifest.read(folder)
        request = Request("", options.precision, options.device, (), 0, (0, 0), manifest.weights)
        ok, reason = manifest.match(request)
        assert ok, reason
        pipe.backend = open_engine(folder, manifest, pipe)
    elif options.child == "compile":
        pipe.backend = TorchBackend(pipe, compile=True)
    note("opened")
    width, height = map(int, options.pixels.split("x"))
    frames = np.random.default_rng(0).integers(0, 256, (options.frames, height, width, 3), np.uint8)
    motion = pipe.extract_motion(frames)
    note("motion")
    ends: list[float] = []

    def on_step(done: int, count: int) -> None:
        note(f"step {done}")
        ends.append(row[f"step {done}"])

    pipe.generate("a red car on a beach", motion, steps=options.steps, guidance=6.0, on_step=on_step)
    note("end")
    row["p50 ms"] = 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    row["clip s"], row["1st s"] = row["end"] - row["motion"], row["end"] - row["opened"]
    pipe.generate("a red car on a beach", pipe.extract_motion(frames), steps=options.steps, guidance=6.0)
    note("second end")
    row["2nd s"] = row["second end"] - row["end"]
    row["GiB"] = torch.cuda.max_memory_allocated() / 2**30 if options.device.startswith("cuda") else 0.0
    print(json.dumps({name: row[name] for name in COLUMNS}))


if __name__ == "__main__":
    main()
