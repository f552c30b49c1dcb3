"""Kill `emt` at random moments, many times, and check after each that nothing is lost, broken or done twice.

    python benchmarks/kill_test.py --kills 200

A tiny model with random weights makes clips of a few short references. Each process gets SIGKILL at a random
moment: half of the time it alone, so that its ffmpeg children live on for a while, half of the time with them.
Rounds take turns: plain runs, `--best-of`, a cache so small that each reference drops another's, and a second run
beside that shares this cache and is not killed. After each kill: every file under a final name decodes fully and
carries the identity that the journal gives it, every sidecar is whole, every line of the journal but a torn last one
parses, and no job has two `done` lines. When a run comes to its end: every job has exactly one `done` line and one
clip, and nothing half-written is left. Then `emt rerun` and `emt report` are killed on the finished folder: what they
write is not there or whole, and the folder is as it was. Ends with exit code 1 at the first violation, and prints what
was killed when.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from preloaded import Run

from emt.video import read_clip, read_metadata, write_clip

FRAMES = 4


def main(command_line: list[str] | None = None) -> None:
    """Run the test."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--seeds", type=int, default=40, help="jobs of a round: 3 references × 2 prompts × SEEDS")
    arguments.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = arguments.parse_args(command_line)
    chance = random.Random(given.seed)
    phases: Counter[str] = Counter()
    begun, rounds = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="emt-kill-") as folder:
        work = Path(folder)
        prepare(work)
        while phases.total() < given.kills:
            name, options = list(ROUNDS.items())[rounds % len(ROUNDS)]
            rounds += 1
            out, jobs = work / f"out{rounds}", 6 * given.seeds
            beside = start(work, work / f"beside{rounds}", given.seeds, options) if name == "two processes" else None
            checked: dict[Path, int] = {}
            while phases.total() < given.kills:
                phase = start_and_kill(work, out, given.seeds, options, chance)
                if phase == "ended":
                    break
                phases[f"{name}, {phase}"] += 1
                check(out, checked)
                print(
                    f"\r{phases.total()} kills, {len(checked)} clips whole in round {rounds}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            finish(work, out, given.seeds, options)
            if beside is not None:
                ended = beside.end(seconds=3600)
                expect(ended.code == 0, f"the run beside failed: {ended.err[-2000:]}")
                check(work / f"beside{rounds}", {})
                check_complete(work / f"beside{rounds}", jobs)
            for command in ("rerun", "report"):
                for _ in range(min(2, given.kills - phases.total())):
                    phases[f"{command}, {kill_beside(work, out, command, chance)}"] += 1
            finish(work, out, given.seeds, options)
    print(file=sys.stderr)
    seconds = time.monotonic() - begun
    print(
        f"{phases.total()} kills in {rounds} rounds of {6 * given.seeds} jobs, {seconds:.0f} s: every clip decodes, the"
        f" journal is whole, no job lost or done twice. Killed: {dict(sorted(phases.items()))}"
    )


#: Options of the runs of a round, by its name; an encoded reference has 26 kB.
ROUNDS: dict[str, list[str]] = {
    "plain": [],
    "best-of": ["--best-of", "2"],
    "eviction": ["--cache-size", "0.00004"],
    "two processes": ["--cache-size", "0.00004"],
}


def prepare(work: Path) -> None:
    """A model and three references."""
    from emt.backbones.sd15.random_model import random_model

    random_model(work / "model", frames=FRAMES, height=32, width=32, steps=1)
    frames = np.random.default_rng(0).integers(0, 255, (3, 8, 32, 32, 3), np.uint8)
    for name, clip in zip("abc", frames):
        write_clip(work / "clips" / f"{name}.mp4", clip, 8)


def start(work: Path, out: Path, seeds: int, options: Sequence[str] = ()) -> Run:
    """Start the run under test."""
    prompts = ["--prompt", "a red star", "--prompt", "ein Löwe, der läuft"]
    options = [*options, "--seeds", f"0-{seeds - 1}", "--model", "model", "--device", "cpu", "--json", "-o", str(out)]
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    return Run("transfer", "clips", *prompts, *options, folder=work, environment=environment)


def finish(work: Path, out: Path, seeds: int, options: Sequence[str]) -> None:
    """Do what is left, undisturbed."""
    ended = start(work, out, seeds, options).end(seconds=3600)
    expect(ended.code == 0, f"the last run failed: {ended.err[-2000:]}")
    check(out, {})
    check_complete(out, jobs=6 * seeds)


def kill_beside(work: Path, out: Path, command: str, chance: random.Random) -> str:
    """Kill `emt rerun` or `emt report` on a finished folder, and look at what it leaves; says when it was."""
    clip = chance.choice(clips_of(out))
    written = out / ("again.mp4" if command == "rerun" else "report.html")
    words = [str(clip), "--device", "cpu", "-o", str(written), "--overwrite"] if command == "rerun" else [str(out)]
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    run = Run(command, *words, folder=work, environment=environment)
    run.wait_for_start()
    time.sleep(chance.uniform(0, 2.5 if command == "rerun" else 0.7))
    phase = "killed" if run.process.is_alive() else "ended before"
    run.send(signal.SIGKILL, group=chance.random() < 0.5)
    run.process.join()
    if command == "rerun" and written.exists():
        frames = read_clip(written, frames=FRAMES).frames
        expect(frames.shape == (FRAMES, 32, 32, 3), f"{written} has {frames.shape}")
    elif written.exists():
        expect(written.read_text().rstrip().endswith("</html>"), f"{written} is not whole")
    check(out, {})
    return phase


def start_and_kill(work: Path, out: Path, seeds: int, options: Sequence[str], chance: random.Random) -> str:
    """Start the program and kill it at a random moment; says in which phase it was, or that it had ended."""
    skipped = len(clips_of(out))
    run = start(work, out, seeds, options)
    phase = "at the start"
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 3))
    else:
        run.wait_for_lines(skipped + chance.randrange(1, 6))
        phase = "while making clips"
        time.sleep(chance.uniform(0, 0.4))
    if not run.process.is_alive():
        return "ended"
    run.send(signal.SIGKILL, group=chance.random() < 0.5)
    run.process.join()
    return phase


def clips_of(out: Path) -> list[Path]:
    """The clips under final names, without the copies of references that a report shows."""
    return sorted(clip for clip in out.glob("*/[!.]*.mp4") if clip.parent.name != "report")


def check(out: Path, checked: dict[Path, int]) -> None:
    """The invariants that hold at every moment; `checked` spares clips that were whole and have not changed."""
    if not out.exists():
        return
    journal = out / "journal.jsonl"
    content = journal.read_bytes() if journal.exists() else b""
    lines = [json.loads(line) for line in content.split(b"\n")[:-1]]  # what follows the last line break may be torn
    done = Counter(line["id"] for line in lines if line.get("state") == "done")
    expect(not done or max(done.values()) == 1, f"done twice: {done.most_common(1)}")
    expect(not any(line.get("state") == "failed" for line in lines), "a job failed")
    identities = {line["output"]: line["id"] for line in lines if line.get("state") == "done"}
    clips = set(clips_of(out))
    for clip in clips:
        if checked.get(clip) != clip.stat().st_mtime_ns:
            record = json.loads(read_metadata(clip)["emt"])
            frames = read_clip(clip, frames=FRAMES).frames
            expect(frames.shape == (FRAMES, 32, 32, 3), f"{clip} has {frames.shape}")
            expect(identities.get(str(clip.relative_to(out)), record["id"]) == record["id"], f"{clip} is another job's")
            checked[clip] = clip.stat().st_mtime_ns
    for output in identities:
        expect(out / output in clips, f"{output} is in the journal, but not there")
        expect(json.loads((out / f"{output}.json").read_bytes())["id"] == identities[output], f"sidecar of {output}")
    for sidecar in out.glob("*/[!.]*.json"):
        json.loads(sidecar.read_bytes())


def check_complete(out: Path, jobs: int) -> None:
    """Invariants at the end of a run."""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_bytes().splitlines()]
    done = [line["id"] for line in lines if line.get("state") == "done"]
    expect(len(done) == len(set(done)) == jobs, f"{len(done)} done lines of {len(set(done))} jobs, expected {jobs}")
    expect(len(clips_of(out)) == jobs, "not one clip a job")
    expect(not list(out.rglob(".emt-partial-*")), "something half-written is left")


def expect(condition: bool, problem: str) -> None:
    """End the test if something does not hold."""
    if not condition:
        sys.exit(f"\nVIOLATED: {problem}")


if __name__ == "__main__":
    main()
