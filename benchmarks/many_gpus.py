"""Time `emt transfer` on 1, 2, 4 and 8 GPUs, or with so many workers on CPUs, and print a table.

    python benchmarks/many_gpus.py                                    # the GPUs of this machine, full size
    python benchmarks/many_gpus.py --device cpu --workers 0,1,2 --clips 40 --size 64 --steps 4

Each run makes new clips of a model with random weights (Stable Diffusion 1.5's size by default), `--clips` for each
worker, of five references for each, with an empty cache, or with what `--cache` keeps from run to run (what a model's
files hold, and the like; features are removed). 0 workers are one process without Ray. Columns: seconds of the whole
process and from the first clip to the last (by the journals), clips a second between them, also against the first row,
seconds until the first clip, the smallest share of the whole process in which a device computed, the largest share of
the time between batches in which one waited, and the driver's memory at its peak. Of each worker one clip is not
counted as made between the first and the last: it was under way before. With --kill a worker of each run is killed
when a third is done: the others must do its jobs. With --sleep a clip takes its seconds by sleeping, as for a process
that waits for its GPU: what remains is what feeding, reading, writing and Ray cost. Ends with exit code 1 if a clip is
missing or there twice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from kill_workers import processes_of

from emt.video import write_clip
from emt_cli.batch import journal

_REFERENCES = 5  # for each worker

#: Run by every Python process that is started: clips take their time, and show noise.
_SLEEPING = """
import os, sys, time
if os.environ.get("EMT_SLEEP") and any("emt_cli" in word or "default_worker" in word for word in sys.orig_argv):
    from emt_cli.batch.generator import Generator

    def generate(self, jobs, motions, on_step):
        import numpy

        time.sleep(float(os.environ["EMT_SLEEP"]) * len(jobs))
        s = jobs[0].settings
        clips = [numpy.random.default_rng(job.seed).integers(0, 255, (s.frames, s.height, s.width, 3), numpy.uint8)
                 for job in jobs]
        return clips, {"steps": 0.0, "vae": 0.0}, 0

    Generator.generate = generate
"""


def main(command_line: list[str] | None = None) -> None:
    """Measure."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--workers", default="0,1,2,4,8", help="numbers of GPUs, or of workers on CPUs")
    arguments.add_argument("--clips", type=int, default=30, help="for each worker")
    arguments.add_argument("--size", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--full", action="store_true", help="Stable Diffusion 1.5's size on a CPU, too")
    arguments.add_argument("--same", type=int, default=0, help="as many clips in all, however many workers there are")
    arguments.add_argument("--sleep", type=float, default=0.0, help="seconds a clip, instead of denoising it")
    arguments.add_argument("--model", type=Path, help="a model folder that is there, instead of random weights")
    arguments.add_argument("--cache", type=Path, help="a folder that is kept as cache, instead of an empty one each")
    arguments.add_argument("--kill", action="store_true", help="kill a worker in mid-run")
    given = arguments.parse_args(command_line)
    numbers = [int(number) for number in given.workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="emt-many-") as folder:
        work = Path(folder)
        prepare(work, given, max(numbers))
        print("| workers | clips | whole process | first to last | clips/s | × | start | busy | waiting | driver |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        base = 0.0
        for number in numbers:
            rate, row = measure(work, given, max(1, number), number > 0)
            base = base or rate
            print(row.replace("RATE", f"{rate:.2f} | {rate / base:.2f}"), flush=True)


def prepare(work: Path, given: argparse.Namespace, most: int) -> None:
    """A model and references."""
    from emt.backbones.sd15.random_model import random_model

    full = given.device == "cuda" or given.full
    sizes = {"frames": 16 if full else 8, "height": given.size, "width": given.size, "steps": given.steps}
    import torch

    dtype = torch.float16 if given.device == "cuda" else torch.float32
    if given.model:
        (work / "model").symlink_to(given.model.absolute())
    else:
        random_model(work / "model", size="sd15" if full else "tiny", dtype=dtype, **sizes)
    chance = np.random.default_rng(0)
    for number in range(_REFERENCES * max(1, most)):
        frames = chance.integers(0, 255, (24, 64, 64, 3), np.uint8)
        write_clip(work / "clips" / f"{number:03d}.mp4", frames, 8)


def measure(work: Path, given: argparse.Namespace, workers: int, ray: bool) -> tuple[float, str]:
    """One run; returns clips a second between the first and the last, and its row of the table."""
    references = _REFERENCES * workers
    clips = given.same or given.clips * workers
    out = Path(tempfile.mkdtemp(dir=work))
    names = [f"clips/{number:03d}.mp4" for number in range(references)]
    words = [sys.executable, "-m", "emt_cli.app", "transfer", *names, "--prompt", "a red fox in the snow"]
    words += ["--seeds", f"0-{max(1, clips // references) - 1}", "--model", "model", "--device", given.device]
    words += ["--width", str(given.size), "--height", str(given.size), "--steps", str(given.steps)]
    cache = given.cache.absolute() if given.cache else out / "cache"
    shutil.rmtree(cache / "motion", ignore_errors=True)
    words += ["--json", "-o", str(out), "--cache-dir", str(cache)]
    words += [("--workers" if given.device == "cpu" else "--gpus"), str(workers)] if ray else []
    begun = time.monotonic()
    environment = dict(os.environ)
    if given.sleep:
        (work / "sitecustomize.py").write_text(_SLEEPING)
        environment |= {"EMT_SLEEP": str(given.sleep)}
        environment |= {"PYTHONPATH": os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(words, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        made = peak = 0
        killed = False
        for content in run.stdout:
            made += json.loads(content)["state"] == "done"
            peak = max(peak, memory_of(run.pid))
            if given.kill and ray and not killed and made >= max(1, clips // 3):
                found = [pid for pid, text in processes_of(run.pid).items() if "ray::RayWorker" in text]
                os.kill(found[0], signal.SIGKILL)
                killed = True
    seconds = time.monotonic() - begun
    wanted = references * max(1, clips // references)
    if made != wanted:
        sys.exit(f"{made} of {wanted} clips were made on {workers} workers")
    lines = journal.read(out)
    outputs = [line["output"] for line in lines if line.get("state") == "done"]
    if len(outputs) != len(set(outputs)) or not all((out / output).exists() for output in outputs):
        sys.exit(f"clips are missing or were made twice on {workers} workers")
    ended = sorted(datetime.datetime.fromisoformat(line["finished"]) for line in lines if line.get("state") == "done")
    between = (ended[-1] - ended[0]).total_seconds()
    [end] = [line for line in lines if line["event"] == "run"]
    of = list(end["workers"].values()) if ray else [end]
    waits = [worker["device_wait"] for worker in of if "device_wait" in worker]
    busy = [w["device_busy_seconds"] / seconds if ray else w["device_busy"] for w in of if "device_wait" in w]
    start = ended[0].timestamp() - (time.time() - seconds)
    cells = [f"{workers}{'' if ray else ', no Ray'}", str(made), f"{seconds:.1f} s", f"{between:.1f} s", "RATE"]
    cells += [f"{start:.1f} s", f"{min(busy):.0%}" if busy else "", f"{max(waits):.1%}" if waits else ""]
    cells += [f"{peak / 1e6:.0f} MB"]
    return (made - workers) / between, f"| {' | '.join(cells)} |"


def memory_of(pid: int) -> int:
    """Memory of a process at its peak so far, in bytes."""
    with suppress(OSError, StopIteration):
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(row.split()[1] for row in rows if row.startswith("VmHWM"))) * 1024
    return 0


if __name__ == "__main__":
    main()
