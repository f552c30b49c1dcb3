"""Kill `emt` at random moments, many times, and check after each that nothing is lost, broken or done twice.

    python benchmarks/kill_test.py --kills 200

A tiny model with random weights makes clips of short references. Each process gets SIGKILL at a random moment: half of
the time it alone, so that its ffmpeg children live on for a while, half of the time with them. Rounds take turns, and
each has its share of the kills: plain runs, `--best-of`, a cache that holds a single reference (the kill comes just
after one is seen to give way to another), and a second run beside that shares this cache and is alive when the first
one is killed. After each kill: every file under a final name decodes fully and carries the identity that the journal
gives it, every sidecar is whole, every line of the journal but a torn last one parses, no job has two `done` lines, and
every reference that the cache gives back is as it was encoded. When a run comes to its end: every job has exactly one
`done` line and one clip, and nothing half-written is left. Then `emt rerun` and `emt report` are killed on the finished
folder: what they write is not there or whole, and the folder is as it was. Ends with exit code 1 at the first
violation, or if kills of a kind never hit what they are for, and prints what was killed when.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
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
    arguments.add_argument("--seeds", type=int, default=10, help="jobs of a round: 3 references × 2 prompts × SEEDS")
    arguments.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = arguments.parse_args(command_line)
    chance = random.Random(given.seed)
    phases: Counter[str] = Counter()
    begun, rounds = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="emt-kill-") as folder:
        work = Path(folder)
        prepare(work, many=3 * given.seeds)
        while phases.total() < given.kills:
            name = list(ROUNDS)[rounds % len(ROUNDS)]
            rounds += 1
            turns = 2 if given.kills >= 100 else 1
            share = math.ceil(given.kills / (turns * len(ROUNDS))) - 4  # four are of `rerun` and `report`
            share = max(1, min(share, given.kills - phases.total()))
            Round(work, rounds, name, given.seeds, chance).run(share, phases)
            whole: dict[Path, int] = {}
            for command in ("rerun", "report"):
                for _ in range(min(2, given.kills - phases.total())):
                    out = work / f"out{rounds}"
                    phases[f"{command}, {kill_beside(work, out, command, chance, whole)}"] += 1
            finish(work, work / f"out{rounds}", name, given.seeds)
    print(file=sys.stderr)
    for kind in HITS if rounds >= len(ROUNDS) else ():
        expect(phases[kind] > 0, f"no kill came {kind}: {dict(phases)}")
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
#: Seconds that a command lasts at most; less where one was seen to end before.
LASTS = {"rerun": 2.5, "report": 0.7}
#: Kills that a whole turn of rounds must have.
HITS = (
    "plain, while making clips",
    "best-of, while making clips",
    "eviction, as a reference gave way",
    "two processes, beside a living run",
)


class Round:
    """Runs into one folder that are killed, and a run beside them if the round is one of two processes.

    Args:
        work: Folder of the model, the references and all outputs.
        number: Of the round.
        name: Of its kind, in `ROUNDS`.
        seeds: As `main` has them.
        chance: Chooses the moments.
    """

    def __init__(self, work: Path, number: int, name: str, seeds: int, chance: random.Random) -> None:
        self.work, self.number, self.name, self.seeds, self.chance = work, number, name, seeds, chance
        self.out = work / f"out{number}"
        self.beside: tuple[Run, Path] | None = None
        self._besides = 0

    def run(self, kills: int, phases: Counter[str]) -> None:
        """Kill runs so many times, or until one ends; then let one come to its end."""
        checked: dict[Path, int] = {}
        for _ in range(kills):
            if self.name == "two processes" and (self.beside is None or not self.beside[0].process.is_alive()):
                self._end_beside()
                self._besides += 1
                out = self.work / f"beside{self.number}-{self._besides}"
                self.beside = (start(self.work, out, self.name, self.seeds), out)
                self.beside[0].wait_for_start()
            phase = self._start_and_kill()
            if phase == "ended":
                break
            phases[f"{self.name}, {phase}"] += 1
            check(self.out, checked)
            check_cache(self.work)
            counts = f"{phases.total()} kills, {len(checked)} clips whole in round {self.number}, {self.name}"
            print(f"\r{counts:70}", end="", file=sys.stderr, flush=True)
        finish(self.work, self.out, self.name, self.seeds)
        self._end_beside()

    def _end_beside(self) -> None:
        if self.beside is None:
            return
        run, out = self.beside
        ended = run.end(seconds=3600)
        expect(ended.code == 0, f"the run beside failed: {ended.err[-2000:]}")
        check(out, {})
        check_complete(out, 6 * self.seeds)
        self.beside = None

    def _start_and_kill(self) -> str:
        """Start the program and kill it at a random moment; says in which phase it was, or that it had ended."""
        skipped = len(clips_of(self.out))
        run = start(self.work, self.out, self.name, self.seeds)
        phase = "while making clips"
        if self.name == "eviction":
            if wait_for_eviction(self.work, run):
                phase = "as a reference gave way"
            time.sleep(self.chance.uniform(0, 0.01))
        elif self.chance.random() < 0.2:
            time.sleep(self.chance.uniform(0, 3))
            phase = "at the start" if run.output().count("\n") <= skipped else phase
        else:
            run.wait_for_lines(skipped + self.chance.randrange(1, 6), seconds=600)
            time.sleep(self.chance.uniform(0, 0.4))
        if not run.process.is_alive():
            return "ended"
        run.send(signal.SIGKILL, group=self.chance.random() < 0.5)
        living = self.beside is not None and self.beside[0].process.is_alive()
        run.process.join()
        return "beside a living run" if living else phase


def wait_for_eviction(work: Path, run: Run) -> bool:
    """Wait until an encoded reference leaves the cache; False if the run ends before."""
    known = cached(work)
    while run.process.is_alive():
        now = cached(work)
        if known - now:
            return True
        known = now
        time.sleep(0.001)
    return False


def cached(work: Path) -> set[str]:
    """Names of the encoded references in the cache."""
    return {path.name for path in (work / "cache").rglob("*.safetensors") if not path.name.startswith(".")}


def check_cache(work: Path) -> None:
    """An entry that a run would take is whole: others are dropped without a word, a wrong one makes a wrong clip."""
    for facts in (work / "cache" / "emt" / "motion").glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):  # a run beside drops entries
            known, content = json.loads(facts.read_bytes()), facts.with_suffix(".safetensors").read_bytes()
            same = hashlib.sha256(content).hexdigest() == known["sha256"]
            expect(same or not facts.exists() or known != json.loads(facts.read_bytes()), f"{facts} is of another file")


def prepare(work: Path, many: int = 0) -> None:
    """A model, three references in `clips`, and others in `many`."""
    from emt.backbones.sd15.random_model import random_model

    random_model(work / "model", frames=FRAMES, height=32, width=32, steps=1)
    names = [f"clips/{name}" for name in "abc"] + [f"many/{number:03d}" for number in range(many)]
    chance = np.random.default_rng(0)
    for name in names:
        write_clip(work / f"{name}.mp4", chance.integers(0, 255, (8, 32, 32, 3), np.uint8), 8)


def start(work: Path, out: Path, name: str, seeds: int) -> Run:
    """Start the run under test: 3 references × 2 prompts × `seeds` jobs, or as many of more references."""
    prompts = ["--prompt", "a red star", "--prompt", "ein Löwe, der läuft"]
    references, last = ("many", 0) if "--cache-size" in ROUNDS[name] else ("clips", seeds - 1)
    words = [*ROUNDS[name], "--seeds", f"0-{last}", "--model", "model", "--device", "cpu", "--json", "-o", str(out)]
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    return Run("transfer", references, *prompts, *words, folder=work, environment=environment)


def finish(work: Path, out: Path, name: str, seeds: int) -> None:
    """Do what is left, undisturbed."""
    ended = start(work, out, name, seeds).end(seconds=3600)
    expect(ended.code == 0, f"the last run failed: {ended.err[-2000:]}")
    check(out, {})
    check_complete(out, jobs=6 * seeds)


def kill_beside(work: Path, out: Path, command: str, chance: random.Random, checked: dict[Path, int]) -> str:
    """Kill `emt rerun` or `emt report` on a finished folder, and look at what it leaves; says when it was.

    Args:
        work: As `Round` has it.
        out: The finished folder.
        command: `rerun` or `report`.
        chance: Chooses the moment.
        checked: As `check` has it.
    """
    clip = chance.choice(clips_of(out))
    written = out / ("again.mp4" if command == "rerun" else "report.html")
    words = [str(clip), "--device", "cpu", "-o", str(written), "--overwrite"] if command == "rerun" else [str(out)]
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    run = Run(command, *words, folder=work, environment=environment)
    run.wait_for_start()
    moment = chance.uniform(0, LASTS[command])
    time.sleep(moment)
    phase = "killed" if run.process.is_alive() else "ended before"
    if phase == "ended before":
        LASTS[command] = moment
    run.send(signal.SIGKILL, group=chance.random() < 0.5)
    run.process.join()
    if command == "rerun" and written.exists():
        frames = read_clip(written, frames=FRAMES).frames
        expect(frames.shape == (FRAMES, 32, 32, 3), f"{written} has {frames.shape}")
    elif written.exists():
        expect(written.read_text().rstrip().endswith("</html>"), f"{written} is not whole")
    check(out, checked)
    return phase


def clips_of(out: Path) -> list[Path]:
    """The clips under final names, without the copies of references that a report shows."""
    return sorted(clip for clip in out.glob("*/[!.]*.mp4") if clip.parent.name != "report")


def check(out: Path, checked: dict[Path, int]) -> None:
    """The invariants that hold at every moment; `checked` spares clips that were whole and have not changed."""
    if not out.exists():
        return
    journals = [journal.read_bytes() for journal in sorted(out.glob("journal*.jsonl"))]
    # What follows the last line break may be torn.
    lines = [json.loads(line) for content in journals for line in content.split(b"\n")[:-1]]
    done = Counter(line["id"] for line in lines if line.get("state") == "done")
    expect(not done or max(done.values()) == 1, f"done twice: {done.most_common(1)}")
    failed = [line.get("error") for line in lines if line.get("state") == "failed"]
    expect(not failed, f"jobs failed: {failed[:3]}")
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
    journals = sorted(out.glob("journal*.jsonl"))
    lines = [json.loads(line) for journal in journals for line in journal.read_bytes().splitlines()]
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
