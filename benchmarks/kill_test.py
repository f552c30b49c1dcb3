"""Kill `emt transfer` at random moments, many times, and check after each that nothing is lost, broken or done twice.

    python benchmarks/kill_test.py --kills 200

A tiny model with random weights makes clips of a few short references. Each process gets SIGKILL at a random
moment: half of the time it alone, so that its ffmpeg children live on for a while, half of the time with them.
After each kill: every file under a final name decodes fully and carries the identity that the journal gives it,
every sidecar is whole, every line of the journal but a torn last one parses, and no job has two `done` lines. When
a run comes to its end: every job has exactly one `done` line and one clip, and nothing half-written is left. Ends
with exit code 1 at the first violation, and prints what was killed when.
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
    begun, rounds, kills = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="emt-kill-") as folder:
        work = Path(folder)
        prepare(work)
        while kills < given.kills:
            rounds += 1
            out = work / f"out{rounds}"
            checked: dict[Path, int] = {}
            while kills < given.kills:
                phase = start_and_kill(work, out, given.seeds, chance)
                if phase == "ended":
                    break
                kills += 1
                phases[phase] += 1
                check(out, checked)
                print(
                    f"\r{kills} kills, {len(checked)} clips whole in round {rounds}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            ended = start(work, out, given.seeds).end(seconds=3600)
            expect(ended.code == 0, f"the last run failed: {ended.err[-2000:]}")
            check(out, {})
            check_complete(out, jobs=6 * given.seeds)
    print(file=sys.stderr)
    seconds = time.monotonic() - begun
    print(
        f"{kills} kills in {rounds} rounds of {6 * given.seeds} jobs, {seconds:.0f} s: every clip decodes, the journal"
        f" is whole, no job lost or done twice. Killed: {dict(sorted(phases.items()))}"
    )


def prepare(work: Path) -> None:
    """A model and three references."""
    from emt.backbones.sd15.random_model import random_model

    random_model(work / "model", frames=FRAMES, height=32, width=32, steps=1)
    frames = np.random.default_rng(0).integers(0, 255, (3, 8, 32, 32, 3), np.uint8)
    for name, clip in zip("abc", frames):
        write_clip(work / "clips" / f"{name}.mp4", clip, 8)


def start(work: Path, out: Path, seeds: int) -> Run:
    """Start the run under test."""
    prompts = ["--prompt", "a red star", "--prompt", "ein Löwe, der läuft"]
    options = ["--seeds", f"0-{seeds - 1}", "--model", "model", "--device", "cpu", "--json", "-o", str(out)]
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    return Run("transfer", "clips", *prompts, *options, folder=work, environment=environment)


def start_and_kill(work: Path, out: Path, seeds: int, chance: random.Random) -> str:
    """Start the program and kill it at a random moment; says in which phase it was, or that it had ended."""
    skipped = len(list(out.glob("*/[!.]*.mp4")))
    run = start(work, out, seeds)
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
    clips = {clip for clip in out.glob("*/*.mp4") if not clip.name.startswith(".")}
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
    expect(len(list(out.glob("*/[!.]*.mp4"))) == jobs, "not one clip a job")
    expect(not list(out.rglob(".emt-partial-*")), "something half-written is left")


def expect(condition: bool, problem: str) -> None:
    """End the test if something does not hold."""
    if not condition:
        sys.exit(f"\nVIOLATED: {problem}")


if __name__ == "__main__":
    main()
