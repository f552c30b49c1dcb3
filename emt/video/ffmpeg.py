"""One ffmpeg process: started, watched, read and reaped; and the arguments that open one file and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import imageio_ffmpeg

from emt.errors import EmtError
from emt.signatures import holds_no_video, kind_of_file
from emt.video.clip import MAX_PIXELS
from emt.video.names import show

_LONGEST_LOG = 1 << 20
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
# Demuxers of files that hold their video themselves. Those of playlists and lists of files (hls, dash, concat, imf,
# sdp, image2) open other files by what a file holds, so they are left out.
_FORMATS = (
    "mov,matroska,avi,gif,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,mxf,gxf,dv,nut,yuv4mpegpipe,ivf,obu,av1,h264,hevc,"
    "rm,wtv"
)

# What ffmpeg says of common damage and of rare kinds, in words for those who do not know the format.
_COLOURS = "its colours are tagged as of a kind that is not read"
_REASONS = {
    "Impossible to convert between the formats": _COLOURS,
    "Unsupported input (": _COLOURS,
    "no path between colorspaces": _COLOURS,
    "moov atom not found": "its index (moov), which a recorder writes last, is missing: it was cut off",
    "Cannot determine format of input": "nothing in it can be decoded: it was cut off, or is damaged",
}


def _name_of(number: int) -> str:
    """Name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Ffmpeg:
    """One ffmpeg process, killed when it overstays and always reaped. Use as a context manager.

    Attributes:
        stdout: What it writes.
        stdin: What it reads, if `feed`.
        log: What it said, after `finish`.
    """

    def __init__(self, path: Path, arguments: Iterable[str], *, seconds: float, feed: bool = False) -> None:
        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            hint = "Install one and set IMAGEIO_FFMPEG_EXE to its path."
            raise EmtError("There is no ffmpeg for this machine.", hint) from error
        self._path, self._seconds, self._late, self.log = path, seconds, False, ""
        self._process = subprocess.Popen(
            [program, "-hide_banner", *([] if feed else ["-nostdin"]), "-loglevel", "level+info", *arguments],
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
            # Ctrl-C is for the program, which may want to finish this clip first.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        assert self._process.stdout is not None
        self.stdout, self.stdin = self._process.stdout, self._process.stdin
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._watchdog = threading.Timer(seconds, self._stop)
        self._watchdog.daemon = True
        self._reader.start()
        self._watchdog.start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        log = bytearray()
        with self._process.stderr as stream:
            while chunk := os.read(stream.fileno(), 1 << 16):  # to the end: a full pipe would block ffmpeg
                log += chunk[: _LONGEST_LOG - len(log)]
        self.log = log.decode(errors="replace")

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def finish(self) -> int:
        """Waits for the end; the exit status. Raises `EmtError` if the process had to be killed."""
        self._reap()
        if self._late:
            raise EmtError(
                f"{show(self._path)}: ffmpeg did not finish in {self._seconds:.0f} s and was stopped.",
                "Copy the clip to a local disk, or use a shorter or smaller one.",
            )
        return self._process.returncode

    def _reap(self) -> None:
        if self.stdin is not None:
            with suppress(OSError):
                self.stdin.close()
        self._process.wait()
        self._reader.join()

    @property
    def reason(self) -> str:
        """Reason of the failure, after `finish`, in one line."""
        errors = re.findall(r"^(?:\[[^\]]*\] )*\[(?:error|fatal|panic)\] (.+)", self.log, re.MULTILINE)
        if self._process.returncode < 0:
            return f"ffmpeg crashed ({_name_of(-self._process.returncode)})"
        if holds_no_video(kind := kind_of_file(self._path)):
            return f"it is {kind}"
        reason = errors[0].strip().rstrip(".") if errors else "frames are missing when it is decoded"
        if "moov atom not found" in reason and not self._is_of_boxes():
            return "there is none in it: a page or a note may have been saved instead"
        return next((ours for theirs, ours in _REASONS.items() if theirs in reason), reason)

    def _is_of_boxes(self) -> bool:
        """Return whether the file begins as those of MP4 and QuickTime do."""
        with suppress(OSError), self._path.open("rb") as file:
            return file.read(8)[4:] in _BOXES
        return False

    def __enter__(self) -> Ffmpeg:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.cancel()
        self._process.kill()  # does nothing to one that has ended
        self.stdout.close()
        self._reap()


def open_file(
    path: Path, *options: str, pixels: int = 0, keep_times: bool = True, decoder: Iterable[str] = ()
) -> list[str]:
    """Arguments of ffmpeg to open exactly this file.

    The name is never taken for a protocol, pattern or option, and what the file holds (a playlist, a reference to
    other data) cannot make ffmpeg open anything else.

    Args:
        path: The file.
        options: More options of the input, such as `-ss`.
        pixels: Of a frame, if known: decoders hold some frames for each thread, so large ones get few threads.
        keep_times: Leave times as the container has them. Otherwise they start at 0, and jumps in them are closed.
        decoder: Options that choose a decoder.
    """
    threads = max(1, min(8, os.cpu_count() or 1, (1 << 27) // max(pixels, 1)))
    limits = f"-protocol_whitelist file -format_whitelist {_FORMATS} -max_pixels {MAX_PIXELS} -threads {threads}"
    times = ["-copyts"] if keep_times else []
    return [*limits.split(), *times, *decoder, *options, "-i", f"file:{path}"]
