"""Time a clip with OpenMP's threads that sleep or spin while they wait, on two cores that are idle or have other work.

    python benchmarks/waiting.py                       # 7 rounds, some 3 minutes; on the last two cores of the machine
    python benchmarks/waiting.py --cores 2,3 --rounds 3 --frames 4

`emt` has them sleep where the environment says nothing (`emt_cli.app.let_threads_sleep`). Every round starts a process
for each way, in turn: `emt transfer` of one clip of the small model with `--preset fast` on the CPU, pinned to two
cores. Idle: nothing else runs on them. Half busy: a process that computes without end is pinned to one of them. Printed
are the medians of the steps' seconds, of the whole process, and each against the spinning one on idle cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from emt.video import write_clip
from emt_cli.batch import journal

WAYS = {"sleeping": "PASSIVE", "spinning": "ACTIVE", "as OpenMP does": ""}
_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", help="two, as in 2,3; default: the last two that this process may use")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, help="of a clip; default: the model's")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[-2:]
    if given.cores:
        cores = [int(core) for core in given.cores.split(",")]
    if len(cores) != 2:
        parser.exit(1, "error: two cores are needed\n")
    with tempfile.TemporaryDirectory(prefix="emt-waiting-") as folder:
        work = Path(folder)
        chance = np.random.default_rng(0)
        write_clip(work / "noise.mp4", chance.integers(0, 256, (16, 64, 64, 3), np.uint8), fps=8)
        found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for number in range(given.rounds):
            for cores_are in ("idle", "half busy"):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if cores_are != "idle" else None
                try:
                    if other:
                        os.sched_setaffinity(other.pid, cores[1:])
                    for way, policy in WAYS.items():
                        out = work / f"{cores_are}-{way}-{number}"
                        found[cores_are, way].append(clip(work, out, policy, cores, given.frames))
                finally:
                    if other:
                        other.kill()
                        other.wait()
    base = medians(found["idle", "spinning"])
    print("| cores | threads that wait | steps, s | × | whole process, s | × |\n|---|---|---|---|---|---|")
    for (cores_are, way), times in found.items():
        steps, whole = medians(times)
        print(f"| {cores_are} | {way} | {steps:.2f} | {steps / base[0]:.2f} | {whole:.2f} | {whole / base[1]:.2f} |")


def clip(work: Path, out: Path, policy: str, cores: list[int], frames: int | None) -> tuple[float, float]:
    """Seconds of a clip's steps, and of its process, in a process of its own on these cores."""
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    # Set, so that `emt` leaves it at that; it is OpenMP's own default.
    environment |= {} if policy else {"KMP_BLOCKTIME": "200"}
    words = [sys.executable, "-m", "emt_cli.app", "transfer", "noise.mp4", "--prompt", "a red ball", "--device", "cpu"]
    words += ["--preset", "fast", "-o", str(out), "--cache-dir", str(out / "cache")]
    words += ["--frames", str(frames)] if frames else []
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cores)), *words], cwd=work, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"emt transfer failed: {done.stderr.strip()[-500:]}")
    lines = list(journal.lines(out))
    [job] = [line for line in lines if line.get("event") == "job"]
    [run] = [line for line in lines if line.get("event") == "run"]
    return job["timings"]["steps"], run["seconds"]


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Median of steps and of processes."""
    steps, whole = zip(*times, strict=True)
    return statistics.median(steps), statistics.median(whole)


if __name__ == "__main__":
    main()
