"""Clips that are cut short, damaged or sampled too sparsely are read with a warning; whole ones without."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import EXACT, encode, ffmpeg, numbered, numbers
from PIL import Image

from emt.errors import EmtError
from emt.video import Clip, count_frames, probe, read_clip

SIZE = (160, 120)
X264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "24"]
ENCODINGS = {
    ".mp4": [*X264, "-movflags", "+faststart"],
    ".mov": [*X264, "-movflags", "+faststart"],
    ".frag.mp4": [*X264, "-movflags", "frag_keyframe+empty_moov"],
    ".mkv": X264,
    ".webm": ["-c:v", "libvpx", "-b:v", "500k", "-cpu-used", "8"],
    ".avi": ["-c:v", "mpeg4"],
    ".mpg": ["-c:v", "mpeg2video"],
    ".ts": X264,
    ".mts": [*X264, "-f", "mpegts", "-mpegts_m2ts_mode", "1"],
    ".flv": X264,
    ".wmv": ["-c:v", "wmv2"],
    ".ogv": ["-c:v", "libtheora"],
    ".mxf": ["-c:v", "mpeg2video"],
    ".gif": ["-c:v", "gif"],
}
SECONDS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same four seconds in many containers, some with sound."""
    folder = tmp_path_factory.mktemp("whole")
    picture = ["-f", "lavfi", "-i", f"testsrc2=s={SIZE[0]}x{SIZE[1]}:r=24:d={SECONDS}"]
    sound = ["-f", "lavfi", "-i", f"sine=d={SECONDS}:r=48000"]
    for suffix, codec in ENCODINGS.items():
        silent = suffix in (".gif", ".ogv", ".mxf", ".webm")
        ffmpeg(*picture, *([] if silent else [*sound, "-shortest"]), *codec, folder / f"clip{suffix}")
    return folder


def damage(path: Path, target: Path, seed: int = 1, places: int = 60) -> Path:
    """Bytes changed by chance, behind the headers."""
    data, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(places):
        data[chance.randrange(len(data) // 10, len(data))] ^= 0xFF
    target.write_bytes(data)
    return target


def cut(path: Path, target: Path, share: float = 0.6) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def all_frames(path: Path) -> Clip:
    return read_clip(path, frames=min(16, probe(path).frames))


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_whole_clips_are_read_without_a_word(whole: Path, suffix: str) -> None:
    assert all_frames(whole / f"clip{suffix}").warnings == ()
    late = read_clip(whole / f"clip{suffix}", frames=4, start=2.5)  # after a seek
    assert late.warnings == ()


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_k2_a_clip_cut_short_is_read_with_a_warning(tmp_path: Path, whole: Path, suffix: str) -> None:
    path = cut(whole / f"clip{suffix}", tmp_path / f"cut{suffix}")
    info = probe(path)
    (warning,) = info.warnings
    assert str(path) in warning
    assert "is damaged: parts of it are lost" in warning if suffix == ".mpg" else "is cut short" in warning
    assert warning in all_frames(path).warnings
    assert 1 < info.duration < 4
    if f"of its {SECONDS}" in warning:  # where the header says how long it was
        assert f"{info.duration:.2f} s of its {SECONDS}" in warning


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".flv", ".mxf"])
def test_k2_what_is_missing_is_said_in_seconds(tmp_path: Path, whole: Path, suffix: str) -> None:
    path = cut(whole / f"clip{suffix}", tmp_path / f"cut{suffix}")
    info = probe(path)
    assert f"is cut short: {info.duration:.2f} s of its {SECONDS}.0" in info.warnings[0]


@pytest.mark.parametrize("share", [0.3, 0.511, 0.85, 0.99])
def test_k2_every_cut_is_noticed(tmp_path: Path, whole: Path, share: float) -> None:
    for suffix in (".mp4", ".mkv", ".webm", ".avi", ".ts", ".wmv", ".ogv", ".gif"):
        path = cut(whole / f"clip{suffix}", tmp_path / f"cut{suffix}", share)
        assert "cut short" in " ".join(probe(path).warnings), suffix


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv411p", "yuv444p10le", "gray"])
def test_k2_the_last_frame_of_y4m_is_whole(tmp_path: Path, pixels: str) -> None:
    path = encode(tmp_path / "a.y4m", numbered(5, 33, 25), "-pix_fmt", pixels, "-strict", "-1")
    assert probe(path).warnings == ()
    cut(path, path, 0.7)
    assert "cut short" in probe(path).warnings[0]


def test_k2_the_last_frame_of_dv_is_whole(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "a.dv", numbered(5), *["-c:v", "dvvideo", "-s", "720x576", "-r", "25", "-pix_fmt", "yuv420p"]
    )
    assert probe(path).warnings == ()
    cut(path, path, 0.7)
    assert "cut short" in probe(path).warnings[0]


def test_k2_a_cut_at_the_end_of_a_picture_is_noticed(tmp_path: Path, whole: Path) -> None:
    # No picture is damaged then: only the header tells.
    data = (whole / "clip.mkv").read_bytes()
    clusters = [at for at in range(len(data)) if data.startswith(b"\x1f\x43\xb6\x75", at)]
    path = tmp_path / "cut.mkv"
    path.write_bytes(data[: clusters[-1]])
    assert "is cut short" in probe(path).warnings[0]


def test_k2_a_header_that_gives_more_than_there_is(tmp_path: Path) -> None:
    # FLV has nothing else to say how long it is.
    path = encode(tmp_path / "a.flv", numbered(20), "-c:v", "libx264", "-qp", "1", "-pix_fmt", "yuv420p")
    data = bytearray(path.read_bytes())
    at = data.index(b"duration") + 9
    data[at : at + 8] = struct.pack(">d", 20)
    path.write_bytes(data)
    assert "0.80 s of its 20.00 s" in probe(path).warnings[0]
    assert numbers(read_clip(path, frames=20).frames) == list(range(20))


def test_a_header_is_not_believed_against_the_files_structure(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", numbered(20))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = struct.pack(">d", 20_000)  # ms
    path.write_bytes(data)
    assert probe(path).warnings == ()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif", ".ts", ".wmv"])
def test_what_is_appended_to_a_file_is_nothing_missing(tmp_path: Path, whole: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((whole / f"clip{suffix}").read_bytes() + b"\xa5" * 100)
    assert probe(path).warnings == ()


@pytest.mark.parametrize(("kind", "codec"), [("matroska", X264), ("flv", X264), ("avi", ["-c:v", "mpeg4"])])
def test_a_stream_that_was_saved_is_whole(tmp_path: Path, kind: str, codec: list[str]) -> None:
    # Its header was written before its length was known.
    path = tmp_path / f"a.{'mkv' if kind == 'matroska' else kind}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:r=24:d=2", *codec]
    path.write_bytes(subprocess.run([*command, "-f", kind, "-"], capture_output=True, check=True).stdout)
    assert all_frames(path).warnings == ()


def test_a_recording_that_starts_between_key_frames_is_whole(tmp_path: Path, whole: Path) -> None:
    data = (whole / "clip.ts").read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    assert all_frames(path).warnings == ()


def test_sound_that_outlasts_the_picture_is_nothing_missing(tmp_path: Path) -> None:
    silent = encode(tmp_path / "silent.mp4", numbered(20))
    for name in ("a.mp4", "a.mkv", "a.mov"):
        ffmpeg("-i", silent, "-f", "lavfi", "-i", "sine=d=6", "-c:v", "copy", tmp_path / name)
        info = probe(tmp_path / name)
        assert (info.frames, info.sound, info.warnings) == (20, True, ())
    assert not probe(silent).sound


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mpg", ".ts", ".wmv", ".flv", ".gif"])
def test_k2_damaged_pictures_are_read_with_a_warning(tmp_path: Path, whole: Path, suffix: str) -> None:
    path = damage(whole / f"clip{suffix}", tmp_path / f"rot{suffix}")
    clip = all_frames(path)
    assert any(f"{path} is damaged" in warning or f"{path} is cut short" in warning for warning in clip.warnings)


def test_k2_damage_says_how_much(tmp_path: Path, whole: Path) -> None:
    path = damage(whole / "clip.mp4", tmp_path / "rot.mp4")
    (warning,) = (warning for warning in all_frames(path).warnings if "decoded whole" in warning)
    assert int(warning.split("is damaged: ")[1].split()[0]) >= 10  # of its pictures
    assert "\n" not in warning


def test_seeking_between_references_is_no_damage(tmp_path: Path) -> None:
    # Decoders complain of what open groups of pictures refer to, before the frames that are wanted.
    for name, codec in (
        ("a.ts", ["-c:v", "libx264", "-x264-params", "open-gop=1:keyint=24:bframes=3"]),
        ("b.ts", ["-c:v", "libx265", "-x265-params", "open-gop=1:keyint=24:bframes=3:log-level=none"]),
        ("c.mp4", ["-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=24"]),
        ("d.mpg", ["-c:v", "mpeg2video", "-bf", "2", "-g", "12"]),
    ):
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=24:d=6", *codec, tmp_path / name)
        assert read_clip(tmp_path / name, frames=3, start=3.1, duration=1).warnings == (), name


def test_k2_a_clock_that_starts_again_loses_no_frames(tmp_path: Path) -> None:
    # Two recordings in one file, as `cat` and some recorders make them. Players show one after the other.
    for suffix, codec in ((".ts", X264), (".mpg", ["-c:v", "mpeg2video", "-q:v", "1"])):
        one = encode(tmp_path / f"one{suffix}", numbered(20), *codec)
        two = encode(tmp_path / f"two{suffix}", numbered(40)[20:], *codec)
        both = tmp_path / f"both{suffix}"
        both.write_bytes(one.read_bytes() + two.read_bytes())
        clip = read_clip(both, frames=40)
        assert clip.info.frames == 40
        assert numbers(clip.frames) == pytest.approx(list(range(40)), abs=1)
        assert clip.info.duration == pytest.approx(1.6, abs=0.15)


def test_frames_with_one_and_the_same_time_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.nut"
    encode(path, numbered(12), "-vf", "setpts='floor(N/3)*3/25/TB'", "-fps_mode", "passthrough", "-c:v", "ffv1")
    clip = read_clip(path, frames=4)
    assert np.all(np.diff(clip.times) > 0)
    assert np.all(np.diff(numbers(clip.frames)) > 0)


# ------------------------------------------------------------------------------------------- sparse sampling


def still(path: Path, seconds: int, rate: int) -> Path:
    """A long clip that is quickly made."""
    ffmpeg("-f", "lavfi", "-i", f"testsrc=s=32x32:r={rate}:d={seconds}", *EXACT[:4], "-preset", "ultrafast", path)
    return path


def test_k7_frames_far_apart_are_warned_of(tmp_path: Path) -> None:
    path = still(tmp_path / "long.mp4", 1800, 2)
    (warning,) = read_clip(path, frames=16, size=(16, 16)).warnings
    assert "16 frames of 1,800 s are 120.0 s apart" in warning
    assert "--duration 8 or --stride 1" in warning  # two frames a second are all there are
    assert read_clip(path, frames=16, size=(16, 16), start=1000, duration=8).warnings == ()
    assert read_clip(path, frames=16, size=(16, 16), stride=1).warnings == ()


def test_k7_the_hint_of_a_sparse_clip_can_be_followed(tmp_path: Path) -> None:
    path = still(tmp_path / "a.mp4", 40, 24)
    (warning,) = read_clip(path, frames=16, size=(16, 16)).warnings
    assert "--duration 2 or --stride 3" in warning
    for part in ({"duration": 2.0}, {"stride": 3}):
        clip = read_clip(path, frames=16, size=(16, 16), start=10, **part)  # type: ignore[arg-type]
        assert clip.warnings == ()
        assert clip.fps == pytest.approx(8, rel=0.05)
    assert "--frames all --stride 3" in warning
    assert read_clip(path, frames=count_frames(path, stride=3), size=(16, 16), stride=3).warnings == ()


def test_a_slow_clip_of_which_every_frame_is_taken_is_not_sparse(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:r=1/3:d=48", *EXACT[:4], tmp_path / "slow.mkv")
    assert read_clip(tmp_path / "slow.mkv", frames=16).warnings == ()


def test_one_frame_is_never_sparse(tmp_path: Path) -> None:
    assert read_clip(still(tmp_path / "a.mp4", 40, 24), frames=1).warnings == ()


# ------------------------------------------------------------------------------------------- odd clips


@pytest.mark.parametrize("rate", ["1", "240", "1/10"])
def test_odd_rates(tmp_path: Path, rate: str) -> None:
    path = encode(tmp_path / "a.mkv", numbered(12), "-c:v", "ffv1", fps=rate)
    clip = read_clip(path, frames=12)
    assert numbers(clip.frames) == list(range(12))
    assert clip.info.fps == pytest.approx(eval(rate), rel=0.05)


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    for name, codec in (("a.mp4", EXACT), ("a.gif", ["-c:v", "gif"]), ("a.ts", X264), ("a.avi", ["-c:v", "mjpeg"])):
        path = encode(tmp_path / name, numbered(1), *codec)
        assert probe(path).frames == 1
        assert numbers(read_clip(path, frames=1).frames) == [0]
        with pytest.raises(EmtError, match=r"has 1 frame, but 16 are needed") as error:
            read_clip(path)
        assert "--frames 1," in error.value.hint


def test_k2_the_stream_that_players_show(tmp_path: Path) -> None:
    first = encode(tmp_path / "first.mp4", numbered(20))
    second = encode(tmp_path / "second.mp4", numbered(40)[20:])
    both = tmp_path / "both.mkv"
    maps = ["-i", first, "-i", second, "-map", "0:v", "-map", "1:v", "-c", "copy"]
    ffmpeg(*maps, "-disposition:v:0", "0", "-disposition:v:1", "default", both)
    assert numbers(read_clip(both, frames=2).frames) == [20, 39]
    ffmpeg(*maps, "-disposition:v:0", "default", "-disposition:v:1", "0", both)
    assert numbers(read_clip(both, frames=2).frames) == [0, 19]
    ffmpeg(*maps, "-disposition:v:0", "0", "-disposition:v:1", "0", both)
    assert numbers(read_clip(both, frames=2).frames) == [0, 19]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mpg", ".ts", ".flv", ".wmv", ".ogv", ".mxf", ".gif"])
def test_k5_fuzzed_clips_end_in_frames_or_in_one_error(tmp_path: Path, whole: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for seed in range(4):
        damage(whole / f"clip{suffix}", path, seed, 400)
        if seed == 3:  # the headers, too
            data = bytearray(path.read_bytes())
            for at in random.Random(seed).sample(range(400), 40):
                data[at] ^= 0x5A
            path.write_bytes(data)
        try:
            assert read_clip(path, frames=4, size=(16, 16)).frames.shape == (4, 16, 16, 3)
        except EmtError as error:
            assert path.name in error.problem  # noqa: PT017


def test_clips_that_are_copied_and_named_otherwise(tmp_path: Path, whole: Path) -> None:
    # What is inside decides, as in players.
    for inside, name in ((".mkv", "a.mp4"), (".mp4", "a.avi"), (".avi", "a.mov"), (".ts", "a.mp4"), (".mpg", "a.mkv")):
        shutil.copy(whole / f"clip{inside}", tmp_path / name)
        clip = all_frames(tmp_path / name)
        assert clip.warnings == ()
        assert clip.info.frames == SECONDS * 24


def test_pictures_with_the_name_of_a_video(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        path = tmp_path / f"{kind}.mp4"
        Image.new("RGB", (8, 8)).save(path, kind)
        with pytest.raises(EmtError, match=rf"cannot be read as a video: it is one (?i:{kind}) picture"):
            probe(path)
