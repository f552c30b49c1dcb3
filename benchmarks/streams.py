"""Close, fill and pause the standard streams of `emt transfer` at random moments, and interrupt it, many times.

    python benchmarks/streams.py --runs 200

A tiny model with random weights makes clips of two short references. In each run standard output and standard error
are a file, a full disk, a small pipe whose reader closes it or pauses at a random moment, or one pipe together; jobs
come from the command line or, one by one, from a pipe; and none, one or two signals arrive. After each run: it has
ended, and in time (within a second of a second signal); its exit code is as documented; every clip decodes fully and
carries the identity that the journal gives it; every line of the journal parses; what could be read of the streams has
no traceback and no line twice. When nothing was disturbed but by pauses, all jobs are done and all results are there.
Ends with exit code 1 at the first violation, and prints which run it was; `--first N` starts with that one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kill_test import check, expect, prepare
from preloaded import Run

JOBS = 6
_PIPE = 4096  # bytes, the smallest that Linux makes
_LONG = 60.0  # seconds within which any run of this size ends
_AT_ONCE = 1.0  # seconds within which a second signal ends it
_REST = 5.0  # seconds that the first one may take beyond the running batch: a short clip


def main(command_line: list[str] | None = None) -> None:
    """Run the test."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=200)
    arguments.add_argument("--first", type=int, default=0, help="number of the first run; its random moments follow")
    given = arguments.parse_args(command_line)
    begun, kinds = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="emt-streams-") as folder:
        work = Path(folder)
        prepare(work)
        for number in range(given.first, given.first + given.runs):
            case = Case.draw(random.Random(number))
            try:
                one_run(work, work / f"run{number}", case)
            except SystemExit as violated:
                sys.exit(f"{violated}\nin run {number}: {case}")
            kinds.update([f"stdout {case.out}", f"stderr {case.err}", f"{len(case.signals)} signals"])
            print(f"\r{number + 1 - given.first} of {given.runs} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{given.runs} runs, {time.monotonic() - begun:.0f} s, 0 violations: {dict(sorted(kinds.items()))}")


@dataclass(frozen=True)
class Case:
    """Disturbance of a run: kinds of streams, moments in seconds from its start."""

    out: str  # file, full, closes, pauses
    err: str  # the same, or with-out: the same pipe
    json: bool
    streamed: bool  # jobs come from a pipe
    moment: float  # at which a pipe closes or pauses
    pause: float  # how long
    signals: tuple[float, ...]

    @classmethod
    def draw(cls, chance: random.Random) -> Case:
        """A random case."""
        kinds = ("file", "full", "closes", "pauses")
        moments = sorted(chance.uniform(0, 2.5) for _ in range(chance.choice((0, 0, 1, 2))))
        return cls(
            chance.choice(kinds),
            chance.choice((*kinds, "with-out")),
            chance.random() < 0.5,
            chance.random() < 0.25,
            chance.uniform(0, 2.5),
            chance.uniform(0.1, 2),
            tuple(moments),
        )


class Reader(threading.Thread):
    """Reads a named pipe; closes it, or pauses, at a moment."""

    def __init__(self, path: Path, kind: str, moment: float, pause: float, forever: bool) -> None:
        super().__init__(daemon=True)
        os.mkfifo(path)
        self.path, self.kind, self.moment, self.pause, self.forever = path, kind, moment, pause, forever
        self.content = b""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self.descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
        with open(path, "wb", buffering=0) as pipe:
            pipe.write(b"\n" * (_PIPE - 200))  # a few lines more fill it
        self.ended = threading.Event()

    def run(self) -> None:
        """Read until the writer closes the pipe."""
        disturbed, begun = False, time.monotonic()
        while True:
            if not disturbed and time.monotonic() - begun >= self.moment:
                disturbed = True
                if self.kind == "closes":
                    break
                if self.forever:
                    self.ended.wait()
                    break
                time.sleep(self.pause)
            if select.select([self.descriptor], [], [], 0.02)[0]:
                content = os.read(self.descriptor, 4096)
                if not content and self.ended.is_set():
                    break
                if not content:
                    time.sleep(0.01)  # the writer has not opened it yet
                self.content += content
            elif self.ended.is_set():
                break
        os.close(self.descriptor)


def one_run(work: Path, folder: Path, case: Case) -> None:
    """Do a run and check what it leaves."""
    folder.mkdir()
    readers: dict[str, Reader] = {}
    paths: dict[str, Path] = {}
    # A reader that never reads on is only fair where a signal ends the run.
    forever = bool(case.signals) and case.pause > 1
    for name, kind in (("out", case.out), ("err", case.err)):
        paths[name] = folder / name
        if kind == "full":
            paths[name] = Path("/dev/full")
        elif kind == "with-out":
            paths[name] = paths["out"]
        elif kind != "file":
            readers[name] = Reader(paths[name], kind, case.moment, case.pause, forever)
    references = [str(work / "clips" / f"{name}.mp4") for name in "ab"]
    options = ["--model", str(work / "model"), "--device", "cpu", "-o", str(folder / "result")]
    options += ["--json"] if case.json else []
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    jobs = folder / "jobs"
    if case.streamed:
        os.mkfifo(jobs)
        words = ["transfer", "-", *options]
    else:
        words = ["transfer", *references, "--prompt", "x", "--seeds", f"0-{JOBS // 2 - 1}", *options]
    run = Run(
        *words,
        folder=folder,
        environment=environment,
        stdin=jobs if case.streamed else b"",
        stdout=paths["out"],
        stderr=paths["err"],
    )
    if case.streamed:
        threading.Thread(target=_send_jobs, args=(jobs, references), daemon=True).start()  # before it: opening waits
    run.wait_for_start()
    begun = time.monotonic()
    for reader in readers.values():
        reader.start()
    took = _interrupt(run, begun, case.signals)
    for reader in readers.values():
        reader.ended.set()
        reader.join(10)
    _check(folder, case, run.process.exitcode or 0, took, paths, readers)


def _send_jobs(jobs: Path, references: list[str]) -> None:
    with contextlib.suppress(OSError), open(jobs, "w") as pipe:
        for count in range(JOBS):
            job = {"reference": references[count * 2 // JOBS], "prompt": "x", "seed": count}
            pipe.write(json.dumps(job) + "\n")
            pipe.flush()
            time.sleep(0.1)


def _interrupt(run: Run, begun: float, moments: tuple[float, ...]) -> list[float]:
    """Send signals, and wait for the end; returns how long it took after each that still found the run."""
    sent: list[float] = []
    for moment in moments:
        run.process.join(max(0.0, begun + moment - time.monotonic()))
        if run.process.is_alive():
            run.send(random.Random(moment).choice((signal.SIGINT, signal.SIGTERM)))
            sent.append(time.monotonic())
    try:
        run.end(_LONG)
    except TimeoutError as error:
        expect(False, f"it hangs: {error}")
    return [time.monotonic() - when for when in sent]


def _check(
    folder: Path, case: Case, code: int, took: list[float], paths: dict[str, Path], readers: dict[str, Reader]
) -> None:
    """Invariants after every run."""
    if len(took) == 2:
        expect(took[1] < _AT_ONCE, f"a second signal has ended it after {took[1]:.1f} s")
    if len(took) == 1:
        expect(took[0] < _REST, f"the first signal has ended it after {took[0]:.1f} s")
    # A signal that comes before the run has begun has its usual effect.
    allowed = {130, -signal.SIGTERM, -signal.SIGINT} if took else set()
    gone = "closes" in (case.out, case.out if case.err == "with-out" else "")
    allowed |= {1} if case.out == "full" else {0}
    allowed |= {0} if gone else set()
    expect(code in allowed, f"exit code {code}, allowed are {sorted(allowed)}")
    out = folder / "result"
    check(out, {})
    texts = {name: readers[name].content if name in readers else b"" for name in paths}
    for name, path in paths.items():
        if name not in readers and path.is_file():
            texts[name] = path.read_bytes()
    for name, text in texts.items():
        expect(
            not any(word in text for word in (b"Traceback", b"Exception ignored", b"a fault of emt")),
            f"{name} has {text.decode()[-2000:]}",
        )
    journal = out / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()] if journal.exists() else []
    done = [line for line in lines if line.get("state") == "done"]
    results = [line for line in texts["out"].split(b"\n") if line.startswith((b"{", str(folder).encode()))]
    expect(len(results) == len(set(results)), "a result is there twice")
    expect(len(results) <= len(done), f"{len(results)} results of {len(done)} clips in the journal")
    if not took and not gone:
        expect(len(done) == JOBS, f"{len(done)} of {JOBS} jobs are done")
        expect(lines[-1]["event"] == "run", "the run's own line is missing")
        if case.out in ("file", "pauses"):
            expect(len(results) == JOBS, f"{len(results)} of {JOBS} results on standard output")
    clips = [path for path in out.glob("*/*.mp4") if not path.name.startswith(".")]
    if len(took) < 2:
        expect(len(clips) == len(done), f"{len(clips)} clips, {len(done)} in the journal: a line is lost")


if __name__ == "__main__":
    main()
