"""Time and memory until `emt transfer` starts its first job, where nearly all jobs of a long list are done.

    python benchmarks/large_lists.py --jobs 100000

Makes an output folder whose journal has all jobs but the last thousand as done (their clips are files of one byte with
the size and time that the journal gives), for a tiny model with random weights. Prints the seconds from the start of
the process to the end of its first open job, and the memory at its peak beyond that of a run of one job; then the
seconds of `emt plan`. Ends with exit code 1 beyond 10 s or 500 MB.
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

import numpy as np

from emt.cache import ContentIndex
from emt.model_folder import find_model
from emt.video import write_clip
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job, identify, output_name
from emt_cli.batch.options import TransferOptions
from emt_cli.batch.records import dumps

_SECONDS, _BYTES = 10.0, 500e6
_REFERENCES, _PROMPTS = 50, 20
_OPEN = 1000


def main(command_line: list[str] | None = None) -> None:
    """Measure."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--jobs", type=int, default=100_000)
    given = arguments.parse_args(command_line)
    with tempfile.TemporaryDirectory(prefix="emt-large-") as folder:
        work = Path(folder)
        words = prepare(work, given.jobs)
        seconds, busy, base = first_job(work, [*words, "--seeds", "1000000000", "-o", "one"])
        print(f"one job a prompt: {seconds:.1f} s to the first ({busy:.1f} s of CPU), {base / 1e6:.0f} MB at the peak")
        seconds, busy, peak = first_job(work, [*words, "--seeds", seeds(given.jobs), "-o", "out"])
        print(f"{given.jobs:,} jobs: {seconds:.1f} s to the first open one ({busy:.1f} s of CPU), ", end="")
        print(f"{(peak - base) / 1e6:.0f} MB more at the peak", flush=True)
        begun = time.monotonic()
        plan = ["emt", "plan", *words[2:], "--seeds", seeds(given.jobs), "-o", "out", "--json"]
        subprocess.run(plan, cwd=work, env=environment(work), stdout=subprocess.DEVNULL, check=False)
        print(f"emt plan: {time.monotonic() - begun:.1f} s")
    sys.exit(int(seconds > _SECONDS or peak - base > _BYTES))


def environment(work: Path) -> dict[str, str]:
    """A cache of its own, and one thread."""
    return os.environ | {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}


def seeds(jobs: int) -> str:
    """Of each reference and prompt."""
    return f"0-{max(1, jobs // (_REFERENCES * _PROMPTS)) - 1}"


def prepare(work: Path, count: int) -> list[str]:
    """The model, the references, and the output folder; returns the command line but for the seeds."""
    from emt.backbones.sd15.random_model import random_model

    random_model(work / "model", frames=4, height=32, width=32, steps=1)
    for number in range(_REFERENCES):
        frames = np.random.default_rng(number).integers(0, 255, (8, 32, 32, 3), np.uint8)
        write_clip(work / "clips" / f"{number:03d}.mp4", frames, 8)
    (work / "prompts.txt").write_text("\n".join(f"a thing of number {n} in the snow" for n in range(_PROMPTS)))
    out = work / "out"
    out.mkdir()
    model, index = find_model(str(work / "model"), download=False), ContentIndex(work / "cache" / "emt")
    os.chdir(work)
    options = TransferOptions(["clips"], prompts=[Path("prompts.txt")], seeds=seeds(count), out=Path("out"))
    jobs = [job for job in expand(options, model.defaults)[0] if isinstance(job, Job)]
    sha256 = model.sha256(index)
    with open(out / "journal.jsonl", "wb") as journal:
        for job in jobs[: max(1, len(jobs) - _OPEN)]:
            reference = index.sha256(job.reference)
            output = output_name(job, reference)
            clip = out / output
            clip.parent.mkdir(exist_ok=True)
            clip.write_bytes(b"x")
            line = {"event": "job", "id": identify(job, reference=reference, model=sha256, precision="auto")}
            line |= {"output": str(output), "reference": str(job.reference), "prompt": job.prompt, "seed": job.seed}
            line |= {"settings": job.settings.as_dict(), "reference_sha256": reference, "model": "model"}
            line |= {"model_folder": str(work / "model"), "model_sha256": sha256, "device": "cpu", "precision": "fp32"}
            line |= {"kernels": "reference", "engine": "torch", "arithmetic": 2, "versions": {"emt": "0", "torch": "2"}}
            line |= {"batch": {"size": 1, "index": 0, "shared_reference": True}, "peak_memory": 2**30, "state": "done"}
            line |= {"timings": {"decode": 0.1, "reference": 0.1, "steps": 0.5, "vae": 0.1, "encode": 0.1}}
            line |= {"bytes": 1, "mtime_ns": clip.stat().st_mtime_ns, "finished": "2026-01-01T00:00:00.000+00:00"}
            journal.write(dumps(line) + b"\n")
    return ["emt", "transfer", "clips", "--prompts", "prompts.txt", "--model", "model", "--device", "cpu"]


def first_job(work: Path, words: list[str]) -> tuple[float, float, float]:
    """Seconds from the start of a run to the end of its first job, also of processors, and peak memory in bytes."""
    begun = time.monotonic()
    with subprocess.Popen(
        [*words, "--json"], cwd=work, env=environment(work), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout is not None
        for content in run.stdout:
            line = json.loads(content)
            if line["state"] == "done":
                break
        seconds = time.monotonic() - begun
        ticks = Path(f"/proc/{run.pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]
        busy = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        status = Path(f"/proc/{run.pid}/status").read_text()
        peak = next(float(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("VmHWM"))
        run.terminate()
        run.stdout.read()
    return seconds, busy, peak


if __name__ == "__main__":
    main()
