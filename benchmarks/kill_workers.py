"""Kill parts of distributed runs at random moments, and check after each that nothing is lost, half or done twice.

    python benchmarks/kill_workers.py --kills 100

As `kill_test.py`, with workers on CPUs (`emt transfer --device cpu --workers 2`). SIGKILL goes, in turn, to one of the
workers (the run must go on and come to its end), to Ray's raylet or its control server (the run must end, with an error
and without a traceback), to the driver, and to the whole group of processes; each time the next run goes on in the same
folder, and no worker may live on. Ends with exit code 1 at the first violation, and prints what was killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from kill_test import ROUNDS, check, clips_of, expect, finish, prepare, start

NAME = "workers"


def main(command_line: list[str] | None = None) -> None:
    """Run the test."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--seeds", type=int, default=10, help="jobs of a round: 3 references × 2 prompts × SEEDS")
    arguments.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = arguments.parse_args(command_line)
    chance = random.Random(given.seed)
    killed: Counter[str] = Counter()
    begun, rounds = time.monotonic(), 0
    kills, workers, seeds = given.kills, given.workers, given.seeds
    ROUNDS[NAME] = ["--workers", str(workers)]
    with tempfile.TemporaryDirectory(prefix="emt-kill-") as folder:
        work = Path(folder)
        prepare(work)
        while killed.total() < kills:
            rounds += 1
            out, checked = work / f"out{rounds}", dict[Path, int]()
            while killed.total() < kills:
                victim = VICTIMS[killed.total() % len(VICTIMS)]
                if not kill_part(work, out, seeds, victim, chance):
                    break
                killed[victim] += 1
                check(out, checked)
                print(
                    f"\r{killed.total()} kills, {len(checked)} clips whole in round {rounds}", end="", file=sys.stderr
                )
            finish(work, out, NAME, seeds)
    print(file=sys.stderr)
    print(
        f"{killed.total()} kills in {rounds} rounds of {6 * seeds} jobs on {workers} workers, "
        f"{time.monotonic() - begun:.0f} s: every clip decodes, the journals are whole, no job lost or done twice. "
        f"Killed: {dict(sorted(killed.items()))}"
    )


#: Parts of a distributed run that are killed, in turn.
VICTIMS = ("worker", "raylet", "driver", "group", "worker", "control server", "driver", "group")


def kill_part(work: Path, out: Path, seeds: int, victim: str, chance: random.Random) -> str:
    """Start a distributed run and kill a part of it; returns which, or an empty text if it had ended before."""
    skipped = len(clips_of(out))
    run = start(work, out, NAME, seeds)
    if chance.random() < 0.2:
        run.wait_for_start()
        time.sleep(chance.uniform(0, 15))
    elif run.wait_for_lines(skipped + chance.randrange(1, 12), seconds=600):
        time.sleep(chance.uniform(0, 0.4))
    below = processes_of(run.process.pid)
    if not run.process.is_alive():
        return ""
    names = {"worker": "ray::RayWorker", "raylet": "raylet/raylet", "control server": "gcs/gcs_server"}
    found = [pid for pid, words in below.items() if victim in names and names[victim] in words]
    if found:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(found), signal.SIGKILL)
        ended = run.end(seconds=1200)
        expect("Traceback" not in ended.err and "a fault of emt" not in ended.err, ended.err[-2000:])
        if victim == "worker":
            expect(ended.code == 0, f"a worker was killed, and the run ended with {ended.code}: {ended.err[-2000:]}")
        else:
            expect(ended.code in (0, 1), f"Ray was killed, and the run ended with {ended.code}: {ended.err[-2000:]}")
    else:
        victim = "group" if victim == "group" else "driver"
        run.send(signal.SIGKILL, group=victim == "group")
        run.process.join()
    wait_for_end(below)
    return victim


def processes_of(driver: int | None) -> dict[int, str]:
    """Processes below a driver, with their command lines."""
    parents, words = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            words[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])

    def is_below(pid: int) -> bool:
        while (pid := parents.get(pid, 0)) and pid != driver:
            pass
        return pid == driver

    return {pid: words[pid] for pid in parents if is_below(pid)}


def wait_for_end(processes: dict[int, str], seconds: float = 60) -> None:
    """Wait until none of a run's workers is left: what they write is looked at next."""
    workers = [pid for pid, words in processes.items() if "ray::RayWorker" in words]
    end = time.monotonic() + seconds
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        expect(time.monotonic() < end, f"workers {left} live on without their driver")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
