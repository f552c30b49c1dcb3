"""Feed `emt transfer` hundreds of bad inputs beside good ones, and see that each fails alone, clearly and in time.

    python benchmarks/bad_inputs.py

Clips, pictures and folders that are damaged, empty, of another kind, or no files at all; names of every sort; prompts,
settings and job lines that make no sense; command lines likewise; and whatever the program reads back: journals,
records, measures, caches, engines, model folders, checkpoints, LoRAs (more of the last three in `bad_weights`). Each
must end in one clear error of at most eight lines or in a clip that decodes: never in a traceback, never in a hang,
never in another clip than a right file gives, never to the harm of the good jobs of the same run. Prints a summary, and
ends with exit code 1 if one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import bad_weights
import imageio_ffmpeg
import numpy as np
from hostile import VALUES, damages, flipped, forged, huge_png, tensor_files
from PIL import Image
from preloaded import Ended, emt, emt_from_the_shell
from safetensors.torch import save

from emt.errors import EmtError
from emt.video import read_clip, write_clip

FRAMES, SIDE = 4, 32
CHUNK = 60  # bad references of one run
MOST = 120  # of the bad inputs of a kind that each need a run that loads a model
SECONDS = 300  # for a run: so long only if it hangs
LINES = 8  # of one error, at most


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
        for kind in (
            test.references,
            test.job_lines,
            test.prompt_files,
            test.command_lines,
            test.journals,
            test.journal_files,
            test.results,
            test.measures,
            test.records,
            test.pair_files,
            test.caches,
            test.engines,
            test.models,
            test.checkpoints,
            test.weights,
        ):
            before, started = sum(test.told.values()), time.monotonic()
            kind()
            tried = sum(test.told.values()) - before
            print(f"{kind.__name__}: {tried} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
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
        options = ["transfer", "--model", "model", "--device", "cpu", "--json", "-o", str(out), *arguments]
        if "--device" in arguments:  # CUDA is not for processes that were forked from one with threads
            ended = emt_from_the_shell(*options, folder=self.work, environment=environment, seconds=SECONDS)
        else:
            ended = emt(*options, folder=self.work, environment=environment, stdin=stdin, seconds=SECONDS)
        self.no_traceback(" ".join(arguments), ended)
        return ended, out

    def command(self, name: str, *arguments: object) -> Ended:
        """Run another command."""
        environment = {"XDG_CACHE_HOME": str(self.work / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        ended = emt(name, *map(str, arguments), folder=self.work, environment=environment, seconds=SECONDS)
        self.no_traceback(f"{name} {' '.join(map(str, arguments))}", ended)
        return ended

    def no_traceback(self, name: str, ended: Ended) -> None:
        """No run ends in a traceback, or in an exception that nobody has foreseen."""
        if "Traceback" in ended.err + ended.out or "This is a fault of emt" in ended.err:
            self.violations.append(f"traceback of {name:.200}: {ended.err[-1500:]}")

    def side_by_side(self, do: Callable[[Any], None], cases: list) -> None:
        """Try cases, as many at a time as there are cores."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(do, cases))

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
        for name, path in cases:
            if name == "8K":  # takes as long as all others together
                self.make_8k(Path(path))
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
        yield from self.make_videos(place / "videos", frames)
        yield from self.make_pictures(place / "pictures", frames)

    def make_videos(self, place: Path, frames: np.ndarray) -> Iterator[tuple[str, str]]:
        """(what it is, path) of damaged clips in other containers, and of text that has their suffixes."""
        place.mkdir()
        encoders = {
            ".mkv": ("-c:v", "ffv1"),
            ".avi": ("-c:v", "mjpeg"),
            ".mov": ("-c:v", "mpeg4"),
            ".ts": ("-c:v", "mpeg2video"),
            ".flv": ("-c:v", "flv"),
            ".wmv": ("-c:v", "wmv2"),
            ".ogv": ("-c:v", "libtheora"),
            ".y4m": ("-pix_fmt", "yuv444p"),
            ".apng": ("-c:v", "apng"),
            ".webp": ("-c:v", "libwebp_anim"),
        }
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", "25", "-i", "-")
        for suffix, encoder in encoders.items():
            path = place / f"whole{suffix}"
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, "-r", "25", *encoder, str(path)]
            subprocess.run(command, input=frames.tobytes(), check=True, timeout=60)
            content = path.read_bytes()
            for name, damaged in damages(content, self.chance):
                (place / f"{name}{suffix}").write_bytes(damaged)
                yield f"{name}{suffix}", str(place / f"{name}{suffix}")
            for i in range(3):
                (place / f"flipped{i}{suffix}").write_bytes(flipped(content, self.chance))
                yield f"flipped{i}{suffix}", str(place / f"flipped{i}{suffix}")
        for suffix in (".mts", ".vob", ".mxf", ".h264", ".swf", ".exe", ".json", ".emt", ".MP4", ".mp4.part"):
            (place / f"text{suffix}").write_bytes(b"#EXTM3U\nfile:///etc/passwd\n")
            yield f"text{suffix}", str(place / f"text{suffix}")

    def make_pictures(self, place: Path, frames: np.ndarray) -> Iterator[tuple[str, str]]:
        """(what it is, path) of single pictures, and of folders of pictures of which one is bad."""
        place.mkdir()
        for suffix in (".png", ".jpg", ".bmp", ".tiff"):
            Image.fromarray(frames[0]).save(place / f"one{suffix}")
            yield f"one picture {suffix}", str(place / f"one{suffix}")
        whole = (place / "one.png").read_bytes()
        (place / "bomb.png").write_bytes(huge_png(30_000))
        yield "a picture of 900 megapixels", str(place / "bomb.png")
        bad = dict(damages(whole, self.chance)) | {"bomb": huge_png(30_000), "flipped": flipped(whole, self.chance)}
        for name, content in bad.items():
            folder = place / f"with {name}"
            folder.mkdir()
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / f"{i}.png")
            (folder / "3.png").write_bytes(content)
            yield f"frames, one {name}", str(folder)
        for name in ("a pipe", "a dangling link", "a folder", "another size"):
            folder = place / name
            folder.mkdir()
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / f"{i}.png")
            odd = folder / "3.png"
            odd.unlink()
            if name == "a pipe":
                os.mkfifo(odd)
            elif name == "a dangling link":
                odd.symlink_to("nothing.png")
            elif name == "a folder":
                odd.mkdir()
            else:
                Image.fromarray(frames[0, :10]).save(odd)
            yield f"frames and {name}", str(folder)

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
            "frames": [0, 1, 33, 70_000, -4, 2.5, "four", None, True, 10**30],
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
            "json.json": b'["a cat", "a dog"]',
            "table.tsv": b"prompt\tseed\na\t1\n",
            "utf16.txt": "a cat\n".encode("utf-16"),
            "utf32.csv": "prompt\na cat\n".encode("utf-32"),
            "half16.txt": "a cat\n".encode("utf-16")[:-1],
            "weighted.txt": b"(fox:1.3) BREAK <lora:x:0.8>\n",
            "deep.jsonl": b"[" * 100_000 + b"\n",
            "deeper.jsonl": b'{"a":' * 100_000 + b"\n",
            "endless.jsonl": b'{"prompt": "' + b"x" * (2 << 20) + b'"}\n',
            "endless.txt": b"x" * (2 << 20),
            "names.csv": b",,\n,,\n",
            "same.csv": b"prompt,prompt\na,b\n",
            "digits.jsonl": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n",
            "mark.jsonl": b"\xef\xbb\xbf{}\n",
            "returns.txt": b"\r\r\n\r",
            "archive.txt": b"PK\x03\x04" + bytes(200),
            "escapes.txt": b"\x1b]0;title\x07\n",
            "picture.jsonl": b"\x89PNG\r\n\x1a\n" + bytes(100),
            "clip.mp4": (self.work / "good1.mp4").read_bytes(),
            "program.exe": b"MZ" + bytes(100),
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

    # ------------------------------------------------------------------------- what the program reads back

    def finished(self, name: str) -> tuple[Path, list[dict]]:
        """An output folder with two clips, and the lines of its journal."""
        out = self.work / name
        ended = self.command(
            *("transfer", "good1.mp4", "good2.webm", "--prompt", "a red star", "--model", self.work / "model"),
            *("--device", "cpu", "-o", out),
        )
        if ended.code:
            self.violations.append(f"{name}: {ended.err[-500:]}")
        return out, [json.loads(line) for line in (out / "journal.jsonl").read_bytes().splitlines()]

    def unharmed(self, kind: str, out: Path, before: dict[Path, int], evaluate: bool) -> None:
        """Clips of a folder are skipped, not made again; a report and a table show them."""
        options = ("--model", self.work / "model", "--device", "cpu", "--json", "-o", out)
        ended = self.command("transfer", "good1.mp4", "good2.webm", "--prompt", "a red star", *options)
        states = [json.loads(line)["state"] for line in ended.out.splitlines()]
        after = {clip: clip.stat().st_mtime_ns for clip in before}
        if states != ["skipped", "skipped"] or before != after:
            self.violations.append(f"{kind}: the good clips are {states}, {ended.err[-500:]}")
        self.neighbours += 2
        ended = self.command("report", out)
        if ended.code or "a red star" not in (out / "report.html").read_text():
            self.violations.append(f"{kind}: no report: {ended.err[-500:]}")
        if evaluate:
            ended = self.command("evaluate", out, "--text-model", "none", "--json", "--workers", 1)
            rows = [json.loads(line) for line in ended.out.splitlines()]
            good = [row for row in rows if row.get("error") is None and "motion_fidelity" in row]
            if ended.code not in (0, 1) or len({row["result"] for row in good}) < 2:
                self.violations.append(f"{kind}: not evaluated: {ended.code}, {ended.err[-500:]}")

    def journals(self) -> None:
        """Lines of a journal between right ones: the clips stay done, and a report and a table show them."""
        out, right = self.finished("journals")
        before = {clip: clip.stat().st_mtime_ns for clip in out.glob("*/*.mp4")}
        other = {**right[0], "output": "other/x.mp4", "id": "0" * 64, "prompt": "another", "error": "x", "hint": "y"}
        failed = {key: value for key, value in other.items() if key != "output"} | {"state": "failed", "origin": "1"}
        cases = list(forged(other, self.chance, 3)) + list(forged(failed, self.chance, 1))
        cases += [*damages(json.dumps(other).encode(), self.chance), ("a line without end", b"x" * 5_000_000)]
        cases += [(f"output {name!r}", json.dumps({**other, "output": name}).encode()) for name in VALUES]
        cases = self.chosen([(name, content.replace(b"\n", b" ")) for name, content in cases])
        whole = [json.dumps(line).encode() for line in right]
        for number, start in enumerate(range(0, len(cases), CHUNK)):
            lines = [content for _, content in cases[start : start + CHUNK]]
            (out / "journal.jsonl").write_bytes(b"\n".join([whole[0], *lines, *whole[1:]]) + b"\n")
            self.unharmed(f"journal lines {start} to {start + len(lines)}", out, before, evaluate=number < 2)
            self.told["journal line"] += len(lines)

    def journal_files(self) -> None:
        """Journals that are damaged as a whole: clips are adopted by what they carry, or the run says what is wrong."""
        out, _ = self.finished("journal-files")
        path = out / "journal.jsonl"
        cases = dict(damages(path.read_bytes(), self.chance))
        for name, content in self.chosen(list(cases.items())):
            before = {clip: clip.stat().st_mtime_ns for clip in out.glob("*/*.mp4")}
            path.write_bytes(content)
            self.unharmed(f"journal {name}", out, before, evaluate=False)
            self.told["journal file"] += 1

    def results(self) -> None:
        """Finished clips that were damaged since: each is its own job's matter, and a report shows the others."""
        bad = dict(damages((self.work / "good1.mp4").read_bytes(), self.chance)) | dict(tensor_files())
        bad |= {"a picture of 900 megapixels": huge_png(30_000), "a GIF of 4 gigapixels": b"GIF89a" + b"\xff" * 60}
        cases = self.chosen(list(bad.items()))
        seeds = f"0-{len(cases)}"
        options = ["--prompt", "a red star", "--format", "gif", "--seeds", seeds, "--batch-size", "8"]
        _, out = self.emt("good1.mp4", *options)
        good, *clips = sorted(path for path in out.glob("*/*.gif") if not path.name.startswith("."))
        before = good.stat().st_mtime_ns
        for clip, (_, content) in zip(clips, cases):
            clip.write_bytes(content)
            self.told["result"] += 1
        ended = self.command("report", out)
        if ended.code:
            self.violations.append(f"results: no report: {ended.err[-500:]}")
        ended, _ = self.emt("good1.mp4", *options, "-o", str(out))
        lines = [json.loads(line) for line in ended.out.splitlines()]
        self.neighbours += 1
        if len(lines) != len(cases) + 1 or good.stat().st_mtime_ns != before:
            self.violations.append(f"results: {len(lines)} lines of {len(cases) + 1}, {ended.err[-500:]}")
        for line in lines:
            if line["state"] != "failed":
                self.decodes("result", line["path"], line)

    def measures(self) -> None:
        """Lines of measures, all in one file, of which a report shows those that can be shown."""
        out, right = self.finished("measures")
        row = {"result": right[0]["output"], "motion_fidelity": 0.5, "camera": 0.5, "temporal_consistency": 0.9}
        summary = {"summary": {"motion_fidelity": {"value": 0.5, "low": 0.4, "high": 0.6, "clips": 2}}}
        cases = list(forged({**row, "result": "other/x.mp4"}, self.chance, 5))
        cases += [*forged(summary, self.chance, 9), *damages(json.dumps(row).encode(), self.chance)]
        cases = self.chosen(cases)
        lines = [json.dumps(row).encode(), *(content.replace(b"\n", b" ") for _, content in cases)]
        (out / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        ended = self.command("report", out)
        page = (out / "report.html").read_text() if ended.code == 0 else ""
        if "a red star" not in page or "NaN" in page.partition("application/json")[2].partition("</script>")[0]:
            self.violations.append(f"measures: no report: {ended.err[-500:]}")
        self.told["line of measures"] += len(cases)

    def records(self) -> None:
        """Records beside a clip, each made again from: refused in a few lines, or a clip that decodes."""
        out, right = self.finished("records")
        clip = out / right[0]["output"]
        sidecar = clip.with_name(f"{clip.name}.json")
        record = json.loads(sidecar.read_bytes())
        cases = list(forged(record, self.chance, 3))
        cases += [
            (f"settings.{n}", json.dumps({**record, "settings": json.loads(c)}).encode())
            for n, c in forged(record["settings"], self.chance, 1)
        ]
        cases += [
            (f"batch.{n}", json.dumps({**record, "batch": json.loads(c)}).encode())
            for n, c in forged(record["batch"], self.chance, 3)
        ]
        cases += damages(sidecar.read_bytes(), self.chance)

        def again(case: tuple[int, tuple[str, bytes]]) -> None:
            number, (name, content) = case
            folder = self.work / "forged" / str(number)
            folder.mkdir(parents=True)
            os.link(clip, folder / "a.mp4")
            (folder / "a.mp4.json").write_bytes(content)
            new = folder / "again.mp4"
            ended = self.command("rerun", folder / "a.mp4.json", "--device", "cpu", "-o", new)
            self.one_error("record", name, ended)
            if "\x1b" in ended.err:
                self.violations.append(f"record {name}: terminal escapes: {ended.err[-500:]!r}")
            if ended.code == 0:
                self.readable("record", name, new)

        self.side_by_side(again, list(enumerate(self.chosen(self.chance.sample(cases, min(MOST, len(cases)))))))

    def pair_files(self) -> None:
        """Files of pairs, and of models of text, for `emt evaluate`."""
        row = {"reference": "good1.mp4", "result": "good1.mp4", "prompt": "a", "seconds": 1, "stride": 1}
        cases = [(name, ".jsonl", content) for name, content in forged(row, self.chance, 2)]
        cases += [(name, ".csv", content) for name, content in damages(b"reference,result\ngood1.mp4,x\n", self.chance)]
        cases += [(name, ".safetensors", content) for name, content in tensor_files()]

        def measure(case: tuple[int, tuple[str, str, bytes]]) -> None:
            number, (name, suffix, content) = case
            path = self.work / f"pairs{number}{suffix}"
            path.write_bytes(content)
            pairs = ["--pair", "good1.mp4=good1.mp4=x", "--text-model"] if suffix == ".safetensors" else []
            options = [] if pairs else ["--text-model", "none"]
            self.one_error("file of pairs", f"{name}{suffix}", self.command("evaluate", *pairs, path, *options))

        self.side_by_side(measure, list(enumerate(self.chosen(cases))))

    def caches(self) -> None:
        """Entries of the caches: each only ever costs time, and the clips are those that an empty cache gives."""
        count = min(24, self.limit or 24)
        names = [f"ref{i}.mp4" for i in range(count)]
        for i, name in enumerate(names):
            frames = np.random.default_rng(100 + i).integers(0, 255, (8, SIDE, SIDE, 3), np.uint8)
            write_clip(self.work / name, frames, 8)
        cache = self.work / "damaged"
        options = ["--prompt", "a red star", "--cache-dir", str(cache), "--batch-size", "4"]
        _, first = self.emt(*names, *options)
        right = self.clips(first)
        whole = self.work / "whole-cache"
        shutil.copytree(cache, whole)
        kinds: list[tuple[str, Callable[[Path, int], None]]] = [
            (name, lambda path, _, content=content: path.write_bytes(content))
            for name, content in (*damages(b"x" * 900, self.chance), *tensor_files())
        ]
        kinds.append(("flipped", lambda path, _: path.write_bytes(flipped(path.read_bytes(), self.chance))))
        kinds.append(("a folder", lambda path, _: (path.unlink(), path.mkdir())[0]))
        kinds.append(("a loop", lambda path, _: (path.unlink(), path.symlink_to(path))[0]))
        for pattern in ("motion/*.safetensors", "motion/*.json", "another's", "index.sqlite"):
            shutil.rmtree(cache)
            shutil.copytree(whole, cache)
            entries = sorted((cache / "motion").glob("*.json"))
            if pattern == "another's":
                contents = [(e.read_bytes(), e.with_suffix(".safetensors").read_bytes()) for e in entries]
                for entry, (facts, tensors) in zip(entries, contents[1:] + contents[:1]):
                    entry.write_bytes(facts)
                    entry.with_suffix(".safetensors").write_bytes(tensors)
                self.told["cache entry"] += len(entries)
            elif pattern == "index.sqlite":
                (cache / pattern).write_bytes(b"no database")
                self.told["cache entry"] += 1
            else:
                for path, (_, damage) in zip(sorted(cache.glob(pattern)), kinds):
                    damage(path, 0)
                    self.told["cache entry"] += 1
            ended, out = self.emt(*names, *options)
            found = self.clips(out)
            self.neighbours += len(found)
            if ended.code or len(entries) != count:
                self.violations.append(f"cache {pattern}: {ended.code}, {len(entries)} entries, {ended.err[-1000:]}")
            wrong = [name for name, frames in right.items() if not np.array_equal(frames, found.get(name, 0))]
            if wrong:
                self.violations.append(f"cache {pattern}: other clips: {wrong}")

    def clips(self, out: Path) -> dict[str, np.ndarray]:
        """Frames of all clips of a folder, by path."""
        found = sorted(path for path in out.glob("*/*.mp4") if not path.name.startswith("."))
        return {str(path.relative_to(out)): read_clip(path, frames=FRAMES).frames for path in found}

    def engines(self) -> None:
        """Folders in the cache of engines: all are listed as damaged, and a run goes on without them."""
        cache = self.work / "engines-cache"
        manifest = {
            "format": 1,
            "id": "x",
            "backend": "inductor",
            "precision": "fp32",
            "batch": [1, 1],
            "frames": FRAMES,
        }
        cases = [*forged(manifest, self.chance, 4), *damages(json.dumps(manifest).encode(), self.chance)]
        cases = self.chosen(cases)
        for number, (_, content) in enumerate(cases):
            folder = cache / "engines" / str(number)
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_bytes(content)
        self.told["engine"] += len(cases)
        ended = self.command("engines", "list", "--cache-dir", cache, "--json")
        if ended.code not in (0, 1):
            self.violations.append(f"engines: {ended.code}, {ended.err[-500:]}")
        ended, out = self.emt("good1.mp4", "--prompt", "a red star", "--cache-dir", str(cache))
        if ended.code or len(self.clips(out)) != 1:
            self.violations.append(f"engines: a run does not go on: {ended.err[-500:]}")
        self.neighbours += 1
        ended = self.command("engines", "show", cache / "engines" / "0")
        self.one_error("engine", "shown", ended)

    def models(self) -> None:
        """Model folders with one file that is bad: refused in a few lines, or the same clip as of the right one."""
        model = self.work / "model"
        job = ["good1.mp4", "--prompt", "a red star"]
        _, out = self.emt(*job)
        [right] = self.clips(out).values()
        cases: list[tuple[str, bytes | None, bool]] = []
        for path in sorted(path for path in model.rglob("*") if path.is_file() and path.suffix != ".md"):
            name, content = str(path.relative_to(model)), path.read_bytes()
            cases.append((name, None, True))
            cases += [(name, damaged, True) for _, damaged in damages(content, self.chance)]
            if path.suffix == ".safetensors":
                cases += [(name, tensors, True) for _, tensors in tensor_files()]
            elif path.name in ("config.json", "scheduler_config.json", "model_index.json"):
                cases += [(name, changed, False) for _, changed in forged(json.loads(content), self.chance, 1)]

        def open_model(case: tuple[int, tuple[str, bytes | None, bool]]) -> None:
            number, (name, content, same) = case
            folder = self.work / "models" / str(number)
            shutil.copytree(model, folder, copy_function=os.link)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            ended, out = self.emt(*job, "--model", str(folder))
            shown = f"{name} {content[:80]!r}" if content is not None else f"no {name}"
            self.one_error("model", shown, ended)
            found = list(self.clips(out).values()) if ended.code == 0 else []
            if ended.code == 0 and len(found) != 1:
                self.violations.append(f"model {shown}: done without a clip")
            if same and found and not np.array_equal(found[0], right):
                self.violations.append(f"model {shown}: another clip, and no error")

        self.side_by_side(open_model, list(enumerate(self.chosen(self.chance.sample(cases, MOST)))))

    def checkpoints(self) -> None:
        """Files for `emt import-weights`, in each of their places."""
        places = ("--base", "--motion-module", "--adapter", "--dreambooth", "--vae", "--lora")
        files = [(name, ".safetensors", content) for name, content in tensor_files()]
        for suffix in (".safetensors", ".ckpt"):
            files += [(name, suffix, content) for name, content in damages(b"PK" + bytes(2000), self.chance)]
        pickles = {
            "a call": b"cos\nsystem\n(S'touch called'\ntR.",
            "a builtin": b"c__builtin__\neval\n(S'1'\ntR.",
            "a number": b"\x80\x02K\x01.",
            "a loop": b"\x80\x02]q\x00h\x00a.",
            "without an end": b"\x80\x02" + b"(" * 50_000,
        }
        files += [(name, ".ckpt", content) for name, content in pickles.items()]
        cases = [(place, *file) for place in places for file in self.chance.sample(files, len(files) // 2)]
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from weight_files import Files

        (self.work / "files").mkdir()
        right = Files(self.work / "files")
        base = ["--base", right.sd, "--motion-module", right.motion_ckpt, "--adapter", right.adapter_ckpt]
        base += ["--tokenizer", right.tokenizer]
        states = {"--motion-module": right.motion, "--adapter": right.adapter}
        for place, state in states.items():
            for name, key in zip(("missing", "cut", "renamed"), self.chance.sample(sorted(state), 3)):
                rest = {other: tensor for other, tensor in state.items() if other != key}
                changed = {"missing": {}, "cut": {key: state[key][1:]}, "renamed": {f"x.{key}": state[key]}}[name]
                cases.append((place, f"{key} {name}", ".safetensors", save({**rest, **changed})))

        def read(case: tuple[int, tuple[str, str, str, bytes]]) -> None:
            number, (place, name, suffix, content) = case
            path = self.work / f"checkpoint{number}{suffix}"
            path.write_bytes(content)
            ended = self.command("import-weights", *base, place, path, "-o", self.work / f"imported{number}")
            self.one_error("checkpoint", f"{place} {name}{suffix}", ended)
            if ended.code == 0 or (self.work / f"imported{number}").exists():
                self.violations.append(f"checkpoint {place} {name}{suffix}: imported")

        self.side_by_side(read, list(enumerate(self.chosen(cases))))
        ended = self.command("import-weights", *base, "-o", self.work / "imported")
        self.neighbours += 1
        if ended.code:
            self.violations.append(f"right checkpoints are refused: {ended.err[-500:]}")
        if (self.work / "called").exists():
            self.violations.append("a checkpoint ran code")

    def readable(self, kind: str, name: str, path: Path) -> None:
        """A clip has frames."""
        try:
            read_clip(path, frames=2)
        except EmtError as error:
            self.violations.append(f"{kind} {name:.200}: the result is broken: {error}")

    def one_error(self, kind: str, name: str, ended: Ended) -> None:
        """A run ends well, or with one error of a few lines."""
        self.told[f"{kind} {'served' if ended.code == 0 else 'refused'}"] += 1
        lines = ended.err.splitlines()
        first = next((number for number, line in enumerate(lines) if line.startswith(("error:", "Usage:"))), None)
        said = lines[first:] if first is not None else lines[-1:]
        if ended.code not in (0, 1, 2) or (ended.code and not said) or len(said) > LINES + 1:
            self.violations.append(f"{kind} {name!r:.200}: exit code {ended.code}, {ended.err[-800:]!r}")

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
