"""Make a clip in every container and codec that ffmpeg writes, read each, and print which are read and which refused.

    python benchmarks/containers.py [--only mp4,mpegts] [--markdown docs/reading-video.md]

Each clip has numbered frames. One counts as read if it has the frames that the same ffmpeg decodes when requested
for all of them without any of this project's options, in the same order and colours, and without a warning; as refused
if there is one error that names the file. All else is a violation: wrong frames, a warning about a whole clip, a
traceback. Files that ffmpeg itself cannot read back (many codecs have no place in many containers, and it writes them
all the same) must be refused, or read as badly with a warning where ffmpeg has one; they are counted, and not in the
table. Neither is EXR in a video: it holds linear light, which ffmpeg alone leaves dark.

With --markdown, the rows of the suffixes that were tried are put into the table between the lines
`<!-- containers -->` and `<!-- end -->` of that file.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from emt.errors import EmtError
from emt.video import read_clip

WIDTH, HEIGHT, FRAMES, RATE = 176, 144, 12, 25
FAR = 4.0  # levels of 255, on average over a frame; neighbouring frames are 12 apart
ARGUMENTS = {
    "dvvideo": "-s 720x576 -pix_fmt yuv420p",
    "dnxhd": "-s 1920x1080 -pix_fmt yuv422p -b:v 120M",
    "roqvideo": "-s 256x128 -r 30",
    "libaom-av1": "-cpu-used 8 -usage realtime",
    "librav1e": "-speed 10",
    "libsvtav1": "-preset 12",
    "libvpx": "-cpu-used 8 -deadline realtime -b:v 2M",
    "libvpx-vp9": "-cpu-used 8 -deadline realtime -b:v 2M",
    "libvvenc": "-preset faster -pix_fmt yuv420p10le",
    "libx264": "-preset ultrafast",
    "libx265": "-preset ultrafast -x265-params log-level=none",
    "mpeg1video": "-b:v 4M",
    "mpeg2video": "-b:v 4M",
}
"""Options of encoders that need some, or are slow without."""
SUFFIXES = {"mxf_d10": ".mxf", "mxf_opatom": ".mxf", "vcd": ".mpg", "svcd": ".mpg", "dvd": ".vob", "mpegts": ".ts"}
"""Where a container's first suffix is another one, or it has none."""
MORE = {"mpegts": (".m2ts", ".mts"), "mpeg": (".mpeg",), "mov": (".qt",), "asf": (".asf",), "ogv": (".ogm",)}
"""Other names that the same container goes by."""
DEVICES = re.compile(r"nvenc|qsv|vaapi|amf|v4l2m2m|vulkan|wrapped_avframe|vnull|a64multi|xface|^exr$")
NO_FILES = re.compile(
    r"image2|pipe$|dash|hls|hds|segment|smoothstreaming|rtp|rtsp|sap|fifo|tee|crc|hash|md5|null|whip|xv$|fbdev"
)


def main() -> None:
    """Make, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of ffmpeg's muxers, separated by commas")
    parser.add_argument("--markdown", type=Path, help="file with the table")
    options = parser.parse_args()
    begun, found = time.monotonic(), Findings()
    with tempfile.TemporaryDirectory(prefix="emt-containers-") as folder:
        source = make_source(Path(folder))
        for muxer, suffix in muxers(options.only):
            for encoder in encoders():
                try_one(Path(folder), source, muxer, suffix, encoder, found)
    for line in found.violations:
        print(f"VIOLATED: {line}")
    table = found.table()
    print(table)
    total = sum(len(codecs) for codecs in found.read.values())
    refused = sum(len(codecs) for codecs in found.refused.values())
    print(
        f"{total} read, {refused} refused, {found.unreadable} that ffmpeg cannot read back,"
        f" {len(found.violations)} violations, {time.monotonic() - begun:.0f} s"
    )
    if options.markdown:
        before, start, old, end, after = re.split(r"(<!-- containers -->\n|<!-- end -->)", options.markdown.read_text())
        title, rows = table.splitlines()[:2], table.splitlines()[2:]
        rows += [row for row in old.splitlines()[2:] if row.split("|")[1] not in {new.split("|")[1] for new in rows}]
        options.markdown.write_text("".join([before, start, "\n".join([*title, *sorted(rows)]), "\n", end, after]))
    sys.exit(bool(found.violations))


def ffmpeg(*arguments: object, feed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg with as few words as it can."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=feed, capture_output=True, timeout=120, check=False)


def listed(what: str) -> list[tuple[str, str]]:
    """Flags and names that ffmpeg lists of its muxers or encoders."""
    text = ffmpeg(f"-{what}").stdout.decode()
    return re.findall(r"^ ([A-Z. ]{2,6}) +(\S+)", text, re.MULTILINE)


def muxers(only: str | None) -> list[tuple[str, str]]:
    """ffmpeg's containers for video, with the suffix of each."""
    chosen = []
    for flags, name in listed("muxers"):
        name = name.split(",")[0]
        if "E" not in flags or NO_FILES.search(name) or (only and name not in only.split(",")):
            continue
        described = ffmpeg("-h", f"muxer={name}").stdout.decode()
        suffix = re.search(r"Common extensions: (\w+)", described)
        if "Default video codec" in described and (suffix or name in SUFFIXES):
            chosen.append((name, SUFFIXES.get(name, f".{suffix[1]}" if suffix else "")))
    return chosen


def encoders() -> list[str]:
    """ffmpeg's encoders of video that need no device."""
    return [name for flags, name in listed("encoders") if flags.startswith("V") and not DEVICES.search(name)]


def make_source(folder: Path) -> Path:
    """Numbered frames: grey that brightens on the left, red over green on the right; lossless."""
    frames = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, :, : WIDTH // 2] = (40 + 16 * np.arange(FRAMES))[:, None, None, None]
    frames[:, : HEIGHT // 2, WIDTH // 2 :] = (200, 40, 40)
    frames[:, HEIGHT // 2 :, WIDTH // 2 :] = (40, 200, 40)
    raw = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {RATE} -i -".split()
    made = ffmpeg(*raw, "-c:v", "ffv1", folder / "source.mkv", feed=frames.tobytes())
    assert not made.returncode, made.stderr
    return folder / "source.mkv"


class Findings:
    """Codecs of each suffix that were read, those that were refused and why, and what should not be."""

    def __init__(self) -> None:
        self.read: dict[str, set[str]] = defaultdict(set)
        self.refused: dict[str, dict[str, str]] = defaultdict(dict)
        self.violations: list[str] = []
        self.unreadable = 0

    def table(self) -> str:
        """Markdown, a row for each suffix."""
        rows = ["| suffix | codecs that are read | refused, and the line |", "|---|---|---|"]
        for suffix in sorted({*self.read, *self.refused}):
            reasons: dict[str, list[str]] = defaultdict(list)
            for codec, reason in sorted(self.refused[suffix].items()):
                if codec not in self.read[suffix]:
                    reasons[reason].append(codec)
            lines = [f"{', '.join(codecs)}: {reason}" for reason, codecs in reasons.items()]
            rows.append(f"| `{suffix}` | {', '.join(sorted(self.read[suffix]))} | {' · '.join(lines)} |")
        return "\n".join(rows) + "\n"


def try_one(folder: Path, source: Path, muxer: str, suffix: str, encoder: str, found: Findings) -> None:
    """Make a clip with one encoder in one container, and read it by all of the container's names."""
    path = folder / f"clip{suffix}"
    options = [*ARGUMENTS.get(encoder, "").split(), "-strict", "experimental", "-threads", "2"]
    with_index = ["-movflags", "+faststart"] if muxer in ("mp4", "mov") else []
    made = ffmpeg("-i", source, "-an", "-c:v", encoder, *options, *with_index, "-f", muxer, f"file:{path}")
    if made.returncode or not path.exists() or not path.stat().st_size:
        path.unlink(missing_ok=True)
        return
    for name in (suffix, *MORE.get(muxer, ())):
        path = path.rename(path.with_suffix(name))
        whole = is_whole(path)
        try:
            problem = differs(path) if whole else not_warned(path)
        except EmtError as error:
            reason = error.problem.replace(str(path), "").strip()
            if whole:
                found.refused[name][encoder] = re.sub(r"0x[0-9a-f]+", "0x…", reason)
            if str(path) not in error.problem:
                found.violations.append(f"{muxer} {name} {encoder}: the error does not name the file")
        except Exception as error:
            found.violations.append(f"{muxer} {name} {encoder}: {type(error).__name__} {error}")
        else:
            if whole:
                found.read[name].add(encoder)
            if problem:
                found.violations.append(f"{muxer} {name} {encoder}: {problem}")
        found.unreadable += not whole
    path.unlink()


def decoded(path: Path, *filters: str) -> subprocess.CompletedProcess[bytes]:
    """All frames of a clip as ffmpeg decodes them, RGB."""
    output = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return ffmpeg("-i", path, "-map", "0:V:0", *filters, *output)


def complaints(process: subprocess.CompletedProcess[bytes]) -> bytes:
    """Errors that ffmpeg reports, without what it says of times or of itself."""
    harmless = (
        rb"(?m)^.*(?:davs2 info|non monotonically increasing dts to muxer|Last message repeated).*$|\x1b\[[\d;]*m|\s"
    )
    return re.sub(harmless, b"", process.stderr)


def is_whole(path: Path) -> bool:
    """Whether ffmpeg reads back what it wrote: brighter from frame to frame, and without a word."""
    plain = decoded(path, "-vf", "crop=iw/4:ih/2:0:ih/4,scale=16:16")
    if not plain.stdout or complaints(plain):
        return False
    levels = np.frombuffer(plain.stdout, np.uint8).reshape(-1, 16 * 16 * 3).mean(1)
    return bool(np.all(np.diff(levels) > 4))


def not_warned(path: Path) -> str:
    """Violations in reading a clip that ffmpeg finds damaged: a missing warning.

    Raises:
        EmtError: It is not read.
    """
    frames = read_clip(path, frames=1).info.frames
    warned = read_clip(path, frames=frames).warnings
    return "" if warned or not complaints(decoded(path)) else "no warning, though ffmpeg reports errors"


def differs(path: Path) -> str:
    """How a clip that is read differs from what ffmpeg decodes, "" if it does not.

    Raises:
        EmtError: It is not read.
    """
    info = read_clip(path, frames=1).info
    plain = decoded(path, "-vf", f"scale={info.width}:{info.height}").stdout
    truth = np.frombuffer(plain, np.uint8).reshape(-1, info.height, info.width, 3)
    clip = read_clip(path, frames=len(truth), stride=1)
    if clip.warnings:
        return "; ".join(clip.warnings)
    far = np.abs(truth.astype(int) - clip.frames).mean((1, 2, 3))
    if far.max() > FAR:
        return f"frame {far.argmax()} is {far.max():.1f} levels off"
    if not np.all(np.diff(clip.times) > 0):
        return f"times do not increase: {clip.times}"
    return ""


if __name__ == "__main__":
    main()
