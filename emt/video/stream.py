"""Video files, through two or three ffmpeg processes.

The first demuxes the whole file without decoding it, which shows when every frame is presented (containers lie about
counts, and rates vary), and decodes one frame for its real size and colours. The next decodes, and selects, crops,
scales and converts inside ffmpeg, so that this process only ever holds the frames that are wanted, at the size that is
wanted. Where decoded frames and packets do not agree, one more counts what is really decoded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from emt.errors import EmtError
from emt.video.clip import FOLDER_FPS, MAX_PIXELS, ClipInfo, Fit, FramesMissing, Sound, half_gap
from emt.video.colours import Colours
from emt.video.damage import describe_decoding, ends_early, lost_packets, signs_of_a_cut
from emt.video.ffmpeg import Ffmpeg, open_file
from emt.video.kinds import READABLE, not_video
from emt.video.names import show

_AT_ONCE = 500  # frames that one call of ffmpeg selects: their times fit on a command line, of Windows too
_TERMS = 8  # of a sum in an expression of ffmpeg's
_SHOWN = re.compile(
    r"^\[Parsed_showinfo.*?\] \[info\] n: .* fmt:(\S+) .*\bsar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\S)", re.MULTILINE
)
_SHOWN_COLOURS = re.compile(r"^\[Parsed_showinfo.*?\] \[info\] (color_range:.*)$", re.MULTILINE)
_STREAM = re.compile(r"^(?:\[info\])? *Stream #0:(\d+)(?:\[[^\]]*\])?(?:\([^)]*\))?: (\w+): (.*)$", re.MULTILINE)
_LENGTH = re.compile(r"^(?:\[info\])? *Duration: (\d+):(\d+):(\d+\.\d+)", re.MULTILINE)
_ALPHA = re.compile(r"yuva|ayuv|vuya|uyva|gbrap|rgba|bgra|argb|abgr|ya\d|pal8")
# Decoders of these mark each frame that is interlaced; for all others the container's word stands for all frames.
_MARK_FRAMES = re.compile(r"h264|mpeg\dvideo|mpeg4|vc1|wmv3|prores|dvvideo|dnxhd|ffv1|rawvideo|v210|msmpeg4")
_FEWEST_LINES = 16  # and columns, that a deinterlacer takes, with subsampled chroma
_TOO_LARGE = re.compile(r"Picture size (\d+x\d+) (?:exceeds|is invalid)")
_DOLBY = re.compile(r"DOVI configuration record: .*profile: (\d+).*compatibility id: (\d+)")
_BREAKS = re.compile(r"Non-monoton")  # "Non-monotonic DTS", and an older spelling
_JUMPING = ("mpeg", "mpegts")  # containers whose clock may start again; players close the gap
_LONGEST_JUMP = 10.0  # seconds; ffmpeg's own measure for such a jump (dts_delta_threshold)


@dataclass(frozen=True)
class Video:
    """An opened video file: `Source`.

    Attributes:
        is_counted: `times` are those of decoded frames, not of packets.
        stream: ffmpeg's specifier of the stream that is read.
        colours: Tags of the first frame.
        alpha: Whether frames have an alpha plane.
        fields: How to deinterlace: "" not at all, "marked" where frames say so, "tff" or "bff" all frames.
        can_interlace: Whether frames of this stream may say that they are interlaced, though the first does not.
        keep_times: Whether the container's clock runs through.
        cut_short: Whether a part of the file is missing.
        decoder: Options that choose a decoder and its threads.
    """

    info: ClipInfo
    times: np.ndarray
    is_counted: bool = False
    stream: str = "0:V:0"
    colours: Colours = field(default_factory=Colours)
    alpha: bool = False
    fields: str = ""
    can_interlace: bool = False
    keep_times: bool = True
    cut_short: bool = False
    decoder: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Video:
        """Open a file: demux all of it, decode one frame.

        Raises:
            EmtError: It holds no video, or cannot be read.
        """
        stream, keep_times = "0:V:0", True
        listing = _Listing.of(path, stream, keep_times)
        if (default := listing.default_stream()) is not None:
            stream = f"0:{default}"
            listing = _Listing.of(path, stream, keep_times)
        if listing.clock_breaks():
            keep_times = False
            listing = _Listing.of(path, stream, keep_times)
        if "matches no streams" in listing.log:
            raise EmtError(f"{show(path)} has no video in it.", READABLE)
        if size := _TOO_LARGE.search(listing.log):
            raise _too_large(path, size[1])
        shown = _SHOWN.search(listing.log)
        if not shown:
            raise not_video(path, listing.reason)
        described = listing.described(stream)
        width, height = _square(shown)
        if width * height > MAX_PIXELS:
            raise _too_large(path, f"{width}x{height}")
        video = cls(
            ClipInfo(path, width, height, 0.0, 0, 0.0, listing.has_sound()),
            listing.times,
            stream=stream,
            colours=_colours(shown, listing.log, described),
            alpha=bool(_ALPHA.match(shown[1])),
            fields=_fields(shown, described),
            can_interlace=bool(_MARK_FRAMES.match(described)) and min(width, height) >= _FEWEST_LINES,
            keep_times=keep_times,
        )
        if reason := video.colours.unread():
            raise not_video(path, reason)
        # ffmpeg's own VP8 and VP9 decoders drop the alpha plane; libvpx keeps it.
        codec = re.match(r"vp([89])\b", described)
        if codec and re.search(r"^(?:\[info\])? *alpha_mode *: 1", listing.log, re.MULTILINE | re.IGNORECASE):
            video = replace(video, alpha=True, decoder=("-c:v", "libvpx-vp9" if codec[1] == "9" else "libvpx"))
        # ffmpeg's decoder of Theora and VP3 races with itself on several threads: frames differ from run to run.
        if re.match(r"(theora|vp3|vp4)\b", described):
            video = replace(video, decoder=("-threads", "1"))
        video = video._at(listing.times, listing.last) if listing.timed and keep_times else video.counted()
        missing = listing.warning(video.times, video.info)
        warnings = tuple(filter(None, (missing, listing.colour_warning())))
        return replace(video, info=replace(video.info, warnings=warnings), cut_short=bool(missing))

    def read(self, picked: np.ndarray, out: np.ndarray, fit: Fit) -> tuple[str, ...]:
        """Read frames; see `Source.read`."""
        warnings, opaque = [], False
        for start in range(0, len(picked), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            warning, visible, combed = self._decode(picked[part], out[part], fit)
            if combed:  # the stream only says so later than at its first frame
                return replace(self, fields="marked", can_interlace=False).read(picked, out, fit)
            opaque = opaque or visible
            warnings.append(warning)
        if self.alpha and not opaque:
            # Nothing would be left of the clip: these are bytes that no player takes for transparency.
            return replace(self, alpha=False).read(picked, out, fit)
        return tuple(dict.fromkeys(filter(None, warnings)))

    def counted(self) -> Video:
        """Same source with the times of decoded frames; decodes all of it."""
        output = f"-map {self.stream} -vf scale=2:2 -fps_mode passthrough -enc_time_base demux -c:v rawvideo"
        arguments = [*self._opened(), *output.split(), *["-f", "framecrc", "pipe:1"]]
        with Ffmpeg(self.info.path, arguments, seconds=self._patience()) as ffmpeg:
            times, last, _ = _listed_times(ffmpeg.stdout)
            ffmpeg.finish()
        if not len(times):
            raise not_video(self.info.path, ffmpeg.reason)
        if np.isnan(times).any() or (np.diff(times) <= 0).any():  # the order is right, the clock is not
            interval = last or 1 / FOLDER_FPS
            times = np.arange(len(times)) * interval
        return replace(self._at(times, last), is_counted=True)

    def sound(self, start: float, duration: float) -> Sound | None:
        """The sound of a part, in seconds after the first frame; None if there is none."""
        if not self.info.sound or not self.keep_times:
            return None
        return Sound(self.info.path, round(float(self.times[0]) + start, 6), round(duration, 6))

    def _at(self, times: np.ndarray, last: float) -> Video:
        """Same source with these times of frames; `last` is how long the last one shows, 0 if unknown."""
        span, count = float(times[-1] - times[0]), len(times)
        interval = span / (count - 1) if count > 1 else last or 1 / FOLDER_FPS
        seconds = round(span + (last or interval), 9)
        return replace(
            self, info=replace(self.info, fps=round(1 / interval, 9), frames=count, duration=seconds), times=times
        )

    def _opened(self, *options: str) -> list[str]:
        pixels = self.info.width * self.info.height
        return open_file(self.info.path, *options, pixels=pixels, keep_times=self.keep_times, decoder=self.decoder)

    def _patience(self) -> float:
        """Time enough for decoding on a slow machine; packets are counted, so a header cannot stretch it."""
        return 120 + len(self.times) * (0.1 + self.info.width * self.info.height * 1e-6)

    def _decode(self, picked: np.ndarray, out: np.ndarray, fit: Fit) -> tuple[str, bool, bool]:
        """Decode frames into `out`.

        Returns:
            What is wrong with them, whether anything in them is opaque, whether some are interlaced though that was
            not expected.
        """
        wanted = self.times[np.unique(picked)]
        height, width = out.shape[1:3]
        # Times of packets may be those after a seek; where they were counted by decoding, only decoding finds them.
        early = float(wanted[0]) - 1
        seek = not self.is_counted and early >= self.times[0] + 1
        options = ["-noaccurate_seek", "-seek_timestamp", "1", "-ss", f"{early:.6f}"] if seek else []
        pixels = "rgba" if self.alpha else "rgb24"
        output = f"-fps_mode passthrough -frames:v {len(wanted)} -f rawvideo -pix_fmt {pixels} pipe:1".split()
        filters = ",".join(self._filters(wanted, width, height, fit))
        arguments = [*self._opened(*options), "-map", self.stream, "-vf", filters, *output]
        opaque = not self.alpha
        with Ffmpeg(self.info.path, arguments, seconds=self._patience()) as ffmpeg:
            buffer = np.empty((height, width, 4), np.uint8) if self.alpha else None
            for i, frame in enumerate(out):
                if i and picked[i] == picked[i - 1]:
                    frame[:] = out[i - 1]
                elif not _fill(ffmpeg.stdout, frame if buffer is None else buffer):
                    ffmpeg.finish()
                    self._raise_for(ffmpeg)
                elif buffer is not None:
                    alpha = buffer[..., 3:]
                    opaque = opaque or bool(alpha.any())
                    # Premultiplied, so over white it is colour + (1 - alpha), up to rounding.
                    frame[:] = np.minimum(buffer[..., :3].astype(np.uint16) + (255 - alpha), 255)
            # What is left is the end of the process; its log is whole only then.
            ffmpeg.finish()
        combed = self.can_interlace and not self.fields and any(m[6] in "TB" for m in _SHOWN.finditer(ffmpeg.log))
        return describe_decoding(self.info.path, ffmpeg.log, not seek, self.cut_short), opaque, combed

    def _raise_for(self, ffmpeg: Ffmpeg) -> None:
        if "No such filter: 'zscale'" in ffmpeg.log:
            raise EmtError(
                f"{show(self.info.path)} has colours ({self.colours.primaries}, {self.colours.transfer}) that this"
                " ffmpeg cannot convert: it was built without zimg (the filter zscale).",
                "Unset IMAGEIO_FFMPEG_EXE to use the ffmpeg that imageio-ffmpeg brings along.",
            )
        raise FramesMissing(ffmpeg.reason)

    def _filters(self, wanted: np.ndarray, width: int, height: int, fit: Fit) -> list[str]:
        filters = self.colours.before_scaling()
        if self.fields:  # before frames are selected: the fields of its neighbours complete a frame
            filters += [f"setfield={self.fields}"] if self.fields != "marked" else []
            filters += ["bwdif=mode=send_frame:parity=auto:deint=interlaced"]
        if self.is_counted:  # in decoding from the start
            numbers = np.searchsorted(self.times, wanted).tolist()
            chosen = _any_of("n", [(f"{number}", f"eq(n,{number})") for number in numbers])
        else:
            gap = half_gap(self.times) / 2
            first_last = [(f"{t - gap:.9f}", f"{t + gap:.9f}") for t in wanted.tolist()]
            chosen = _any_of("t", [(first, f"between(t,{first},{last})") for first, last in first_last])
        filters += [f"select='{chosen}'"]
        if self.can_interlace and not self.fields:
            filters += ["showinfo=checksum=0"]
        converted = self.colours.after_scaling(self.alpha)
        if self.alpha and not converted:
            # Colour under full transparency is arbitrary; scaled as it is, it would bleed into the edges.
            filters += ["format=gbrap", "premultiply=inplace=1"]
        scaled = f"{width}:{height}"
        if fit == "crop":  # before scaling: covering with a 16384x2 frame would make a picture of gigabytes
            cut = f"w='max(1,min(iw,ih*{width}/{height}/sar))':h='max(1,min(ih,iw*sar*{height}/{width}))'"
            filters += [f"crop={cut}:exact=1"]
        elif fit == "pad":
            scaled = f"w='max(1,min({width},round({height}*dar)))':h='max(1,min({height},round({width}/dar)))'"
        flags = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
        filters += [f"scale={scaled}:flags={flags}{self.colours.while_scaling()}", *converted]
        if self.alpha and converted:
            filters += ["format=gbrap", "premultiply=inplace=1"]
        filters += [f"format={'rgba' if self.alpha else 'rgb24'}"]
        if fit == "pad":
            filters += [f"pad={width}:{height}:(ow-iw)/2:(oh-ih)/2:color=black"]
        return filters


def _any_of(variable: str, chosen: list[tuple[str, str]]) -> str:
    """An expression of ffmpeg's that is true for what one of some conditions holds for.

    A search by halves: ffmpeg refuses sums of more than a hundred terms, and would evaluate all of them for each frame.

    Args:
        variable: `n` or `t`.
        chosen: The smallest number for which each condition holds, in rising order, and the condition.
    """
    if len(chosen) <= _TERMS:
        return "+".join(condition for _, condition in chosen)
    middle = len(chosen) // 2
    below, above = _any_of(variable, chosen[:middle]), _any_of(variable, chosen[middle:])
    return f"if(lt({variable},{chosen[middle][0]}),{below},{above})"


@dataclass(frozen=True)
class _Listing:
    """Description of a file by ffmpeg's demuxer and of its first frame.

    Attributes:
        times: When frames are presented, in seconds, increasing and distinct.
        last: How long the last one is on show, 0 if unknown.
        timed: Whether all packets have a time of their own.
    """

    path: Path
    stream: str
    times: np.ndarray
    last: float
    timed: bool
    log: str
    reason: str

    @classmethod
    def of(cls, path: Path, stream: str, keep_times: bool) -> _Listing:
        # One process, two outputs: the packets' times, and what the first decoded frame looks like after rotation.
        packets = ["-map", stream, "-c", "copy", "-copyinkf", "-f", "framecrc", "pipe:1"]
        picture = ["-map", stream, "-frames:v", "1", "-vf", "showinfo=checksum=0", "-f", "null", "-"]
        patience = min(60 + path.stat().st_size / 5e6, 3600)
        arguments = [*open_file(path, pixels=MAX_PIXELS, keep_times=keep_times), *packets, *picture]
        with Ffmpeg(path, arguments, seconds=patience) as ffmpeg:
            times, last, timed = _presentation_times(ffmpeg.stdout)
            ffmpeg.finish()
        return cls(path, stream, times, last, timed, ffmpeg.log, ffmpeg.reason)

    def _streams(self) -> list[tuple[int, str, str]]:
        """Number, kind and description of each stream of the file."""
        opened = self.log.split("Stream mapping:")[0]
        return [(int(number), kind, text) for number, kind, text in _STREAM.findall(opened)]

    def _videos(self) -> list[tuple[int, str]]:
        pictures = ("(attached pic)", "(timed thumbnails)", "(still image)")
        videos = [(number, text) for number, kind, text in self._streams() if kind == "Video"]
        return [(number, text) for number, text in videos if not any(kind in text for kind in pictures)]

    def default_stream(self) -> int | None:
        """Number of the stream that players show, where it is not the first: the first one marked as default."""
        videos = self._videos()
        default = [number for number, text in videos if "(default)" in text]
        return default[0] if default and videos[0][0] not in default else None

    def described(self, stream: str) -> str:
        """Description of the stream by ffmpeg: codec, pixels, size and more."""
        videos = self._videos()
        number = stream.split(":")[1]
        return (
            next((text for n, text in videos if number.isdecimal() and n == int(number)), videos[0][1])
            if videos
            else ""
        )

    def has_sound(self) -> bool:
        return any(kind == "Audio" for _, kind, _ in self._streams())

    def clock_breaks(self) -> bool:
        """Return whether the container's clock starts again, or jumps, in the middle."""
        container = re.search(r"^(?:\[info\])? *Input #0, ([\w,]+), from", self.log, re.MULTILINE)
        if not container or container[1] not in _JUMPING:
            return False
        jumps = len(self.times) > 1 and np.diff(self.times).max() > _LONGEST_JUMP
        return bool(_BREAKS.search(self.log)) or bool(jumps)

    def warning(self, times: np.ndarray, info: ClipInfo) -> str:
        """A line about what is missing of the file; "" if nothing is."""
        path, found = show(self.path), info.duration
        given = self._given_seconds()
        slack = max(0.5, 3 / info.fps)
        # Some containers count from 0, others from the first frame.
        missing = given - max(found, float(times[-1]) + found / info.frames) > slack
        early = ends_early(self.path, self.path.stat().st_size)
        cut = signs_of_a_cut(self.log) or early is True
        if missing and not cut:  # the word of a header against a structure that is whole is worth nothing
            missing = cut = early is None and self._nothing_else_lasts(given - slack)
        again = "Copy or download it again."
        if missing and (cut or lost_packets(self.log)):
            return f"{path} is cut short: {found:.2f} s of its {given:.2f} s are there. {again}"
        if cut:
            return f"{path} is cut short: it ends in the middle of its data, after {found:.2f} s. {again}"
        if lost := lost_packets(self.log):
            return f"{path} is damaged: parts of it are lost ({lost}). {again}"
        return ""

    def colour_warning(self) -> str:
        """A line about colours that nothing here can convert; "" if there are none."""
        dolby = _DOLBY.search(self.log)
        if not dolby or dolby[2] != "0":
            return ""
        return (
            f"{show(self.path)} is Dolby Vision of profile {dolby[1]}, without a picture for other players: its colours"
            " are read wrong (green and purple). Convert it to HDR10 or SDR first."
        )

    def _given_seconds(self) -> float:
        """Duration that the header gives; 0 if it gives none."""
        length = _LENGTH.search(self.log)
        return int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0.0

    def _nothing_else_lasts(self, seconds: float) -> bool:
        """Return whether no other stream explains a header's duration; sound often outlasts the picture."""
        others = [kind for number, kind, text in self._streams() if kind != "Video"]
        if not others:
            return True
        if set(others) != {"Audio"}:
            return False
        arguments = [*open_file(self.path), *["-map", "0:a:0", "-c", "copy", "-f", "framecrc", "pipe:1"]]
        with Ffmpeg(self.path, arguments, seconds=60 + self.path.stat().st_size / 5e6) as ffmpeg:
            times, last, timed = _presentation_times(ffmpeg.stdout)
            ffmpeg.finish()
        return timed and float(times[-1] - min(times[0], 0)) + last < seconds


def _too_large(path: Path, size: str) -> EmtError:
    if "0" in size.split("x"):
        return EmtError(f"{show(path)} has pictures of {size} pixels.", READABLE)
    scale = "ffmpeg -i INPUT -vf scale=1280:-2 OUTPUT.mp4"
    return EmtError(f"{show(path)} is {size}, too large.", f"{MAX_PIXELS:,} pixels are read. Scale it down: {scale}")


def _square(shown: re.Match[str]) -> tuple[int, int]:
    width, height = int(shown[4]), int(shown[5])
    if int(shown[2]) and int(shown[3]):
        width = max(1, round(width * int(shown[2]) / int(shown[3])))
    return width, height


def _colours(shown: re.Match[str], log: str, described: str) -> Colours:
    tags = _SHOWN_COLOURS.search(log, shown.end())
    size = re.search(r", (\d+)x(\d+)", described)  # as it is stored, before it is turned
    return Colours.read(tags[1] if tags else "", shown[1], int(size[2]) if size else int(shown[5]))


def _fields(shown: re.Match[str], described: str) -> str:
    if described.startswith("hevc") or min(int(shown[4]), int(shown[5])) < _FEWEST_LINES:
        return ""  # HEVC stores single fields, as pictures of their own
    if shown[6] in "TB":
        return "marked"
    order = re.search(r"\([^()]*\b(top|bottom) (?:coded )?first", described)
    if not order:
        return ""
    return "marked" if _MARK_FRAMES.match(described) else "tff" if order[1] == "top" else "bff"


def _presentation_times(lines: Iterable[bytes]) -> tuple[np.ndarray, float, bool]:
    """Read ffmpeg's framecrc listing of packets.

    Returns:
        When frames are presented, in seconds, increasing and distinct; for how long the last one is; and whether all
        packets have a time of their own (in AVI, those of frames that are stored out of order have none).
    """
    times, last, lengths = _listed_times(lines)
    distinct, at = np.unique(times, return_index=True)
    timed = not np.isnan(times).any() and 0 < len(times) == len(distinct)
    return distinct, float(lengths[at[-1]]) if timed else last, timed


def _listed_times(lines: Iterable[bytes]) -> tuple[np.ndarray, float, np.ndarray]:
    """Read ffmpeg's framecrc listing of one stream.

    Returns:
        Presentation times in seconds, in the order of the listing, nan where there is none; how long the last one
        listed is on show; how long each is.
    """
    shown: list[float] = []
    lengths: list[float] = []
    base = Fraction(1)
    for line in lines:
        if line.startswith(b"#tb 0:"):
            base = Fraction(line[6:].strip().decode())
        if line.startswith(b"#"):
            continue
        _, _, ticks, length, *rest = (field.strip() for field in line.split(b","))
        flags = next((int(field[2:], 16) for field in rest if field.startswith(b"F=")), 0)
        if not flags & 4:  # 4: only a base for other frames, itself cut by an edit list
            shown.append(float(int(ticks) * base) if int(ticks) != -(1 << 63) else math.nan)
            lengths.append(float(int(length) * base))
    return np.array(shown), lengths[-1] if lengths else 0.0, np.array(lengths)


def _fill(stream: IO[bytes], array: np.ndarray) -> bool:
    view = array.data.cast("B")
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return False
        view = view[count:]
    return True
