"""The installed `emt` program, a tiny model and clips for it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from preloaded import Ended, Run, emt

from emt.video import write_clip

__all__ = [
    "EMT",
    "Ended",
    "Run",
    "clip",
    "console",
    "emt",
    "environment",
    "journal",
    "lines",
    "model",
    "start",
    "transfer",
]

EMT = Path(sys.executable).with_name("emt")
FRAMES, SIDE = 4, 32


@functools.cache
def _shared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="emt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def model() -> Path:
    """A model with random weights: a clip of it takes a tenth of a second."""
    from emt.backbones.sd15.random_model import random_model

    return random_model(_shared() / "model", frames=FRAMES, height=SIDE, width=SIDE, steps=2)


def environment(folder: Path) -> dict[str, str]:
    """A cache and a config folder of its own in `folder`, and one thread."""
    homes = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}
    return {**homes, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def clip(path: Path, seed: int = 0, frames: int = 8) -> Path:
    """A short clip of noise."""
    return write_clip(path, np.random.default_rng(seed).integers(0, 255, (frames, SIDE, SIDE, 3), np.uint8), 8)


def start(folder: Path, *arguments: object, stdin: bytes | Path = b"", **streams: Path) -> Run:
    """`emt transfer` in a folder, running; `stdout` and `stderr` go to files of its own, or to those given."""
    options = ["transfer", "--model", str(model()), "--device", "cpu", *map(str, arguments)]
    return Run(*options, folder=folder, environment=environment(folder), stdin=stdin, **streams)


def transfer(folder: Path, *arguments: object, stdin: bytes | Path = b"") -> Ended:
    """`emt transfer` in a folder, to its end."""
    return start(folder, *arguments, stdin=stdin).end()


def console(folder: Path, *arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """The program to its end, with this process's environment; `emt` as the shell finds it is in test_examples.py."""
    surroundings = os.environ | environment(folder)
    ended = emt(*map(str, arguments), folder=folder, environment=surroundings, stdin=input.encode())
    return subprocess.CompletedProcess(arguments, ended.code, ended.out, ended.err)


def lines(ended: Ended) -> list[dict[str, Any]]:
    """Standard output of a run with --json."""
    return [json.loads(line) for line in ended.out.splitlines()]


def journal(out: Path) -> list[dict[str, Any]]:
    """Lines of jobs in a journal, each of which must parse."""
    reported = [json.loads(line) for line in (out / "journal.jsonl").read_bytes().splitlines()]
    return [line for line in reported if line["event"] == "job"]
