"""The `emt` program in processes forked from one that has imported its libraries.

Importing PyTorch and diffusers takes longer than making a tiny clip; for hundreds of runs it is done once. Each run
is a process of its own, with its own arguments, folder, environment and standard streams, as from a shell.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

#: What is imported once: the program, and what it imports on the way when it runs.
_IMPORTED = """
emt.pipeline emt.video emt.backbones.sd15.import_weights emt.backbones.sd15.opening emt.backends.measured
emt.backbones.wan21.import_weights emt.backbones.wan21.transformer emt.evaluate.pairs emt.train.trainer
emt_engines.inductor
emt_cli.app emt_cli.batch.planning emt_cli.executors.choice emt_cli.executors.local emt_cli.report.page
emt_cli.report.published emt_cli.terminal
emt_cli.commands.bench emt_cli.commands.config emt_cli.commands.engines emt_cli.commands.evaluate
emt_cli.commands.group emt_cli.commands.import_weights emt_cli.commands.plan emt_cli.commands.report
emt_cli.commands.rerun emt_cli.commands.train emt_cli.commands.transfer
PIL.GifImagePlugin PIL.JpegImagePlugin cv2 diffusers.guiders fsspec.implementations.http ftfy numpy.ma
pydantic.fields pydantic.type_adapter pydantic.types rich.progress rich.table s3fs torch.utils.tensorboard
"""

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(_IMPORTED.split())


@dataclass(frozen=True)
class Ended:
    """Result of a run: exit code (negative: the signal that ended it) and its two streams."""

    code: int
    out: str
    err: str


class Run:
    """A run of `emt` that was started.

    Args:
        arguments: Of the command line, without `emt`.
        folder: Working folder.
        environment: What is added to the environment.
        stdin: What is on standard input; a path to read, or bytes.
        stdout: Where standard output goes, such as a named pipe or /dev/full; a file of its own if None.
        stderr: Where standard error goes.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path = Path(),
        environment: Mapping[str, str] | None = None,
        stdin: bytes | Path = b"",
        stdout: Path | None = None,
        stderr: Path | None = None,
    ) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="emt-run-")
        self.streams = Path(self._kept.name)
        if isinstance(stdin, bytes):
            (self.streams / "in").write_bytes(stdin)
        source = stdin if isinstance(stdin, Path) else self.streams / "in"
        paths = (source, stdout or self.streams / "out", stderr or self.streams / "err", self.streams / "started")
        streams = tuple(map(str, paths))
        # Each run would have ffmpeg say its version, to see that it starts.
        surroundings = {"IMAGEIO_FFMPEG_EXE": imageio_ffmpeg.get_ffmpeg_exe(), **(environment or {})}
        self.process = _FORK.Process(target=_run, args=(arguments, str(folder), surroundings, streams))
        self.process.start()

    def output(self) -> str:
        """Standard output so far."""
        path = self.streams / "out"
        return path.read_text(errors="backslashreplace") if path.exists() else ""

    def wait_for_lines(self, count: int, seconds: float = 60) -> bool:
        """Wait until standard output has so many lines; False if the run ends before."""
        end = time.monotonic() + seconds
        while self.output().count("\n") < count:
            if not self.process.is_alive():
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"no {count} lines after {seconds} s: {self.output()}")
            time.sleep(0.01)
        return True

    def wait_for_start(self) -> None:
        """Wait until the program begins: a signal before would find the process that it is forked from."""
        while not (self.streams / "started").exists() and self.process.is_alive():
            time.sleep(0.002)

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to it and its children."""
        assert self.process.pid is not None
        if self.process.is_alive():
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = 120) -> Ended:
        """Wait for the end.

        Raises:
            TimeoutError: it does not end; it is killed.
        """
        self.process.join(seconds)
        if self.process.is_alive():
            self.send(signal.SIGKILL, group=True)
            raise TimeoutError(f"emt is still running after {seconds} s")
        err = (self.streams / "err").read_text(errors="backslashreplace") if (self.streams / "err").exists() else ""
        return Ended(self.process.exitcode or 0, self.output(), err)


def emt(
    *arguments: str,
    folder: Path = Path(),
    environment: Mapping[str, str] | None = None,
    stdin: bytes | Path = b"",
    seconds: float = 120,
) -> Ended:
    """Run `emt` to its end."""
    return Run(*arguments, folder=folder, environment=environment, stdin=stdin).end(seconds)


def emt_from_the_shell(
    *arguments: str, folder: Path = Path(), environment: Mapping[str, str] | None = None, seconds: float = 120
) -> Ended:
    """Run `emt` to its end in a process that nothing is imported in, as what opens a GPU is run."""
    command = [sys.executable, "-m", "emt_cli.app", *arguments]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=seconds,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def _run(arguments: tuple[str, ...], folder: str, environment: dict[str, str], streams: tuple[str, ...]) -> None:
    gc.freeze()  # what was imported is garbage to nobody: looking through it took a third of a run
    os.setsid()
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    *opened, started = streams
    for number, name in enumerate(opened):
        descriptor = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.close(os.open(started, os.O_CREAT | os.O_WRONLY))
    sys.stdin = os.fdopen(0)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["emt", *arguments]

    from emt_cli.app import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has it ignored
    main()
