"""Feed `emt transfer` hundreds of bad inputs beside good ones, and see that each fails alone, clearly and in time.

    python benchmarks/bad_inputs.py

Files that are damaged, empty, of another kind, or no files at all; names of every sort; prompts, settings and job
lines that make no sense; command lines likewise; files of weights and model folders (`bad_weights`). Each must end in
one clear error or in a clip that decodes: never in a traceback, never in a hang, never to the harm of the good jobs of
the same run. Prints a summary, and ends with exit code 1 if one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import bad_weights
import imageio_ffmpeg
import numpy as np
from preloaded import Ended, emt

from emt.errors import EmtError
from emt.video import read_clip, write_clip

FRAMES, SIDE = 4, 32
CHUNK = 60  # bad references of one run
SECONDS = 300  # for a run: so long only if it hangs


def main(command_line: list[str] | None = None) -> None:
    """Run the test."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--inputs", type=int, default=0, help="only so many of each kind, chosen by chance; 0 is all"
    )
    given = arguments.parse_args(command_line)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="emt-bad-") as folder:
        test = Test(Path(folder), given.inputs)
        test.references()
        test.job_lines()
        test.prompt_files()
        test.command_lines()
        test.weights()
    print(f"{sum(test.told.values())} bad inputs in {time.monotonic() - begun:.0f} s: {dict(test.told)}")
    print(f"{test.neighbours} good jobs beside them, {len(test.violations)} violations")
    for violation in test.violations:
        print(f"VIOLATED: {violation}")
    if test.violations:
        sys.exit(1)


class Test:
    """A folder with a model and good clips, and what came of the bad inputs so far."""

    def __init__(self, work: Path, limit: int) -> None:
        from emt.backbones.sd15.random_model import random_model

        self.work, self.limit = work, limit
        self.chance = random.Random(0)
        self.told: Counter[str] = Counter()
        self.violations: list[str] = []
        self.neighbours = 0
        random_model(work / "model", frames=FRAMES, height=SIDE, width=SIDE, steps=1)
        frames = np.random.default_rng(0).integers(0, 255, (8, SIDE, SIDE, 3), np.uint8)
        for name in ("good1.mp4", "good2.webm"):
            write_clip(work / name, frames, 8)
        self.runs = 0

    def emt(self, *arguments: str, stdin: bytes = b"") -> tuple[Ended, Path]:
        """Run the program on a new output folder."""
        self.runs += 1
        out = self.work / f"out{self.runs}"
        environment = {"XDG_CACHE_HOME": str(self.work / "cache"), "OMP_NUM_THREADS": "1"}
        options = ["transfer", "--model", "model", "--device", "cpu", "--json", "-o", str(out)]
        ended = emt(*options, *arguments, folder=self.work, environment=environment, stdin=stdin, seconds=SECONDS)
        if "Traceback" in ended.err or "Traceback" in ended.out:
            self.violations.append(f"traceback: {ended.err[-1500:]}")
        return ended, out

    def chosen(self, cases: list) -> list:
        """The cases that are tried."""
        return self.chance.sample(cases, min(self.limit, len(cases))) if self.limit else cases

    def judge(self, kind: str, name: str, lines: list[dict]) -> None:
        """One bad input has one line, with an error that says something, or with a clip that decodes."""
        if len(lines) != 1:
            self.violations.append(f"{kind} {name!r:.200}: {len(lines)} lines, expected one")
        for line in lines[:1]:
            if line["state"] == "failed":
                self.told[f"{kind} refused"] += 1
                if not line["error"].strip() or "Error:" in line["error"]:
                    self.violations.append(f"{kind} {name!r:.200}: no clear error: {line['error']!r}")
            else:
                self.told[f"{kind} served"] += 1
                self.decodes(kind, name, line)

    def decodes(self, kind: str, name: str, line: dict) -> None:
        """The clip of a line has all its frames."""
        settings = line["settings"]
        try:
            frames = read_clip(self.work / line["path"], frames=settings["frames"]).frames
            assert frames.shape == (settings["frames"], settings["height"], settings["width"], 3), frames.shape
        except (EmtError, AssertionError) as error:
            self.violations.append(f"{kind} {name!r:.200}: the result is broken: {error}")

    def good(self, kind: str, lines: list[dict], expected: int) -> None:
        """The good jobs of a run are done."""
        done = [line for line in lines if line["state"] == "done"]
        self.neighbours += len(done)
        for line in done:
            self.decodes(kind, "a good neighbour", line)
        if len(done) != expected:
            self.violations.append(f"{kind}: {len(done)} of {expected} good neighbours done: {lines}")

    def references(self) -> None:
        """Files and things that are no files, each as a reference."""
        cases = self.chosen(list(self.make_references()))
        good = [self.work / "good1.mp4", self.work / "good2.webm"]
        for start in range(0, len(cases), CHUNK):
            chunk = cases[start : start + CHUNK]
            paths = [str(good[0]), *(path for _, path in chunk), str(good[1])]
            ended, _ = self.emt("--prompt", "a red star", "--", *paths)
            lines = [json.loads(line) for line in ended.out.splitlines()]
            for name, path in chunk:
                place = path.encode("utf-8", "backslashreplace").decode()  # as JSON has names that are not Unicode
                self.judge("reference", name, [x for x in lines if _name(x["reference"]) == place])
            self.good("reference", [x for x in lines if x["reference"] in map(str, good)], 2)

    def weights(self) -> None:
        """Files of weights and model folders, in this process: opening each in one of its own would take hours."""
        for kind, what, read in self.chosen(list(bad_weights.cases(self.work / "model", self.work / "w", self.chance))):
            received, wrong = bad_weights.attempt(read)
            self.told[f"{kind} {received}"] += 1
            if wrong:
                self.violations.append(f"{kind} {what:.300}: {wrong:.500}")

    def make_references(self) -> Iterator[tuple[str, str]]:
        """(what it is, path) of each bad reference."""
        place = self.work / "bad"
        place.mkdir()
        whole = {}
        frames = np.random.default_rng(1).integers(0, 255, (8, SIDE, SIDE, 3), np.uint8)
        for suffix in (".mp4", ".webm", ".gif"):
            whole[suffix] = write_clip(self.work / f"whole{suffix}", frames, 8).read_bytes()

        def put(name: str, content: bytes) -> tuple[str, str]:
            (place / name).write_bytes(content)
            return name, str(place / name)

        for suffix, content in whole.items():
            for i in range(20):
                yield put(f"truncated{i}{suffix}", content[: len(content) * i // 20])
            for i in range(12):
                damaged = bytearray(content)
                for _ in range(1 + 4 * i):
                    damaged[self.chance.randrange(len(damaged))] = self.chance.randrange(256)
                yield put(f"damaged{i}{suffix}", bytes(damaged))
            yield put(f"twice{suffix}", content + content)
            yield put(f"padded{suffix}", b"\0" * 512 + content)
            for other in sorted({".mp4", ".webm", ".gif", ".avi", ".mov", ".mkv", ".txt", ".jpg", ""} - {suffix}):
                yield put(f"{suffix[1:]}-as-{other[1:] or 'nothing'}{other}", content)
        for suffix in (".mp4", ".avi", ".mov", ".mkv"):
            yield put(f"text{suffix}", b"this is no video\n" * 100)
            yield put(f"noise{suffix}", self.chance.randbytes(5000))
            yield put(f"playlist{suffix}", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
        for count in (1, 2, 3):
            write_clip(place / f"{count}-frames.mp4", frames[:count], 8)
            yield f"{count} frames", str(place / f"{count}-frames.mp4")
        write_clip(place / "pixel.gif", np.zeros((8, 1, 1, 3), np.uint8), 8)
        yield "1×1 pixel", str(place / "pixel.gif")
        write_clip(place / "sliver.gif", np.zeros((8, 500, 1, 3), np.uint8), 8)
        yield "1×500 pixels", str(place / "sliver.gif")
        self.make_8k(place / "8k.mp4")
        yield "8K", str(place / "8k.mp4")

        os.mkfifo(place / "fifo.mp4")
        yield "fifo", str(place / "fifo.mp4")
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):  # some temporary folders are too deep for it
            listener.bind(str(place / "socket.mp4"))
            yield "socket", str(place / "socket.mp4")
        for device in ("/dev/null", "/dev/zero", "/dev/full"):
            yield device, device
        (place / "loop.mp4").symlink_to(place / "loop.mp4")
        yield "symlink loop", str(place / "loop.mp4")
        (place / "dangling.mp4").symlink_to(place / "nothing")
        yield "dangling symlink", str(place / "dangling.mp4")
        (place / "empty").mkdir()
        yield "empty folder", str(place / "empty")
        (place / "closed").mkdir(mode=0)
        yield "folder without permission", str(place / "closed")
        yield put("unreadable.mp4", whole[".mp4"])
        (place / "unreadable.mp4").chmod(0)
        (place / "images").mkdir()
        (place / "images" / "1.png").write_bytes(b"no image")
        yield "folder of broken images", str(place / "images")
        yield "missing", str(place / "missing.mp4")
        yield "missing folder", str(place / "no" / "such" / "folder" / "clip.mp4")
        yield "below a file", str(self.work / "good1.mp4" / "clip.mp4")
        yield "no match", str(place / "*.nothing")
        yield "too long a name", str(place / ("x" * 300 + ".mp4"))
        names = [
            "with spaces",
            " leading space",
            "line\nbreak",
            "tab\tin",
            "emoji 🎬",
            "عربى",
            "日本語",
            "-leading-dash",
        ]
        names += [
            "--json",
            "[red]markup[/red]",
            "quo'te",
            'quo"te',
            "back\\slash",
            "per%20cent",
            "100%d",
            "a" * 240,
            "CON",
        ]
        names += [
            "bell\a",
            "escape\x1b[31m",
            "bidi\u202eexe",
            "udc\udc80",
            "star*",
            "[a-z]",
            "question?",
            "…",
            "#hash",
            "$HOME",
        ]
        for name in names:
            path = place / "names" / f"{name}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole[".mp4"])
            yield f"name {name}", str(path)
        for i, name in enumerate(("concat:a|b", "http://127.0.0.1:9/clip.mp4", "pipe:0", "file:good1.mp4", "data:,x")):
            yield f"protocol {i}", name

    @staticmethod
    def make_8k(path: Path) -> None:
        """A short clip of 7680×4320."""
        source = ["-f", "lavfi", "-i", "color=red:size=7680x4320:rate=4:duration=1.5"]
        encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-y", str(path)]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, *encoder], check=True)

    def job_lines(self) -> None:
        """Lines of jobs on standard input: malformed ones, and ones that ask for the impossible."""
        cases = self.chosen(list(self.make_job_lines()))
        good = b'{"reference": "good1.mp4", "prompt": "a red star"}'
        ended, _ = self.emt("-", stdin=b"\n".join([good, *cases, b'{"reference": "good2.webm", "prompt": "last"}']))
        lines = [json.loads(line) for line in ended.out.splitlines()]
        for number, case in enumerate(cases, 2):
            found = [x for x in lines if x.get("origin") == f"line {number}"]
            self.judge("job line", case[:100].decode(errors="replace"), found)
        self.good("job line", [x for x in lines if x.get("origin") in ("line 1", f"line {len(cases) + 2}")], 2)

    @staticmethod
    def make_job_lines() -> Iterator[bytes]:
        """Lines of jobs."""
        line = b'{"reference": "good1.mp4", "prompt": "a red star", "seed": 5}'
        yield from (line[:count] for count in range(1, len(line)) if line[:count].strip())
        yield from (b"[]", b"null", b"true", b"12", b'"text"', b"{}", b"[" * 5000, b"\xff\xfe{", b"{'a': 1}", b"NaN")
        yield from (
            line + b"x",
            line[:-1] + b",}",
            b'{"reference": "good1.mp4", "prompt": "a"} {"b": 1}',
            b"\x00",
            b"\x1b[31m",
        )
        values: dict[str, list] = {
            "prompt": [
                "",
                " ",
                "\n",
                "\x00",
                "\x1b[2J",
                "\ud800",
                None,
                5,
                [],
                {},
                True,
                "a" * 100_000,
                "word " * 10_000,
            ],
            "reference": ["", " ", None, 5, "\x00", "missing.mp4", "/", ".", "x" * 5000, [], "-", "good1.mp4\n"],
            "seed": [-1, 2**63, 1.5, "x", None, True, [], 1e400, "1e5", "٣"],
            "frames": [0, 1, 33, -4, 2.5, "four", None, True, 10**30],
            "width": [0, -8, 7, 33, 4104, "wide", None, 10**400],
            "height": [0, 12.5, 1, 100_000],
            "steps": [0, -1, 501, "many", None],
            "guidance": [0, -3, 51, "NaN", float("nan"), float("inf"), "high", None],
            "scheduler": ["", "DDIM", "magic", None, 3],
            "fit": ["", "none", None, 1],
            "format": ["", "exe", "../../x", "mp4 ", None],
            "start": [-1, "soon", 1e9, float("nan"), None],
            "duration": [0, -1, 1e-9, "long"],
            "stride": [0, -2, 1.5, 999, "far"],
            "fps": [0, -1, 1e6, "fast"],
            "negative_prompt": [5, "\x00", "\ud800", None, "a" * 5000],
            "nonsense": [1],
            "": [1],
        }
        for name, bad in values.items():
            for value in bad:
                job = {"reference": "good1.mp4", "prompt": "a red star", "seed": 7, name: value}
                yield json.dumps(job).encode()
        for prompt in [
            "../../etc/passwd",
            "/",
            "..",
            "~",
            "CON",
            "a\nb\tc",
            "[bold]x[/bold]",
            "👩‍👩‍👧‍👦 🏳️‍🌈",
            "‮reversed",
            "ſtraße",
            "ﷺ" * 80,
        ]:
            yield json.dumps({"reference": "good1.mp4", "prompt": prompt}, ensure_ascii=False).encode()

    def prompt_files(self) -> None:
        """Prompt files, a run each: some are bad usage, of others each bad line fails alone."""
        files = {
            "empty.txt": b"",
            "comments.txt": b"# nothing\n\n",
            "binary.txt": bytes(range(256)),
            "latin.txt": "ein Löwe\n".encode("latin-1"),
            "zero.txt": b"a\0b\n",
            "long.txt": b"word " * 50_000,
            "empty.csv": b"",
            "header.csv": b"prompt,seed\n",
            "unknown.csv": b"prompt,colour\na,red\n",
            "ragged.csv": b"prompt,seed\na,1,2,3\nb\n",
            "quotes.csv": b'prompt,seed\n"a,1\n',
            "zero.csv": b"prompt\na\0b\n",
            "values.csv": b"prompt,steps\na,none\nb,0\n",
            "broken.jsonl": b'{"prompt": "a"\n[]\n5\n',
            "folder": None,
            "missing.txt": None,
        }
        (self.work / "folder").mkdir()
        for name, content in self.chosen(list(files.items())):
            if content is not None:
                (self.work / name).write_bytes(content)
            ended, _ = self.emt("good1.mp4", "--prompts", name)
            self.judge_run("prompt file", name, ended)

    def command_lines(self) -> None:
        """Options that make no sense, a run each."""
        job = ["good1.mp4", "--prompt", "a red star"]
        bad = [[], ["good1.mp4"], ["--prompt", "a"], ["-", "--frames", "x"], [*job, "--pair", "--prompt", "b"]]
        bad += [
            [*job, "--seeds", text] for text in ("", "x", "-1", "3-1", "0-99999999999", "1,,2", "1-2-3", str(2**63))
        ]
        bad += [[*job, "--device", text] for text in ("gpu", "cuda:x", "cuda:99", "mps", "")]
        bad += [[*job, "--batch-size", text] for text in ("0", "65", "many", "-1")]
        bad += [
            [*job, "--model", text] for text in ("missing", "good1.mp4", "bad", "no/such-model", "../..", "a/b/c", "")
        ]
        bad += [[*job, "--guidance", text] for text in ("nan", "inf", "0", "x")]
        bad += [[*job, "--width", "33"], [*job, "--height", "0"], [*job, "--frames", "99"], [*job, "--fps", "nan"]]
        bad += [
            [*job, "-o", "good1.mp4"],
            [*job, "-o", "/proc/emt"],
            [*job, "-o", "good1.mp4/out"],
            [*job, "--cache-size", "-1"],
        ]
        bad += [
            ["missing.mp4", "--prompt", "a"],
            ["*.nothing", "--prompt", "a"],
            ["", "--prompt", "a"],
            [*job, "--nonsense"],
        ]
        bad += [["good1.mp4", "--prompt", text] for text in ("", " ", "\x1b[31m", "a" * 100_000)]
        for arguments in self.chosen(bad):
            ended, _ = self.emt(*arguments)
            self.judge_run("command line", " ".join(arguments), ended)

    def judge_run(self, kind: str, name: str, ended: Ended) -> None:
        """A run of its own ends with a code of the contract, and says why on standard error only."""
        lines = [json.loads(line) for line in ended.out.splitlines()]
        for line in lines:
            if line["state"] == "done":
                self.decodes(kind, name, line)
        self.told[f"{kind} {'served' if ended.code == 0 else 'refused'}"] += 1
        expected = any(line["state"] == "failed" for line in lines)
        if ended.code not in (0, 1, 2) or (ended.code == 0 and expected) or (ended.code and not ended.err.strip()):
            self.violations.append(f"{kind} {name!r:.200}: exit code {ended.code}, {ended.err[-500:]!r}")


def _name(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    main()
