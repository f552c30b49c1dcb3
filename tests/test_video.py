"""Clips in and out. Every input is made here, with the same ffmpeg and Pillow that read it."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import EXACT, X265, assert_near, encode, ffmpeg, numbered, numbers, quadrants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from emt.errors import EmtError
from emt.storage import remove_partials
from emt.video import (
    FOLDER_FPS,
    check_place,
    count_frames,
    is_clip,
    probe,
    read_clip,
    read_metadata,
    write_clip,
)
from emt.video.clip import ClipInfo, fitted, half_gap
from emt.video.ffmpeg import Ffmpeg
from emt.video.reading import _check_request
from emt.video.stream import _SHOWN, Video, _colours, _fields, _Listing, _presentation_times

WRITTEN = {"prompt": 'a=b; #c\n\\ "é" 😀 {}\x00\t', "ключ = ;": "x" * 9000, "": ""}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 numbered frames at 25 a second."""
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(40))


# ------------------------------------------------------------------------------------------- containers and sampling


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("a.mp4", EXACT),
        ("a.mov", EXACT),
        ("frag.mp4", [*EXACT, "-movflags", "frag_keyframe+empty_moov"]),
        ("bframes.mkv", ["-c:v", "libx264", "-qp", "1", "-bf", "3"]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-lossless", "1", "-cpu-used", "8"]),
        ("hidden.webm", ["-c:v", "libvpx", "-auto-alt-ref", "1", "-b:v", "2M", "-cpu-used", "8"]),
        ("a.avi", ["-c:v", "mjpeg", "-q:v", "1"]),
        ("untimed.avi", ["-c:v", "mpeg4", "-bf", "2", "-q:v", "1"]),
        ("a.gif", ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"]),
        ("UPPER.MKV", ["-c:v", "ffv1", "-f", "matroska"]),
        ("matroska_inside.mp4", ["-c:v", "ffv1", "-f", "matroska"]),
    ],
)
def test_containers(tmp_path: Path, name: str, output: list[str]) -> None:
    path = encode(tmp_path / name, numbered(40), *output)
    assert is_clip(path)
    clip = read_clip(path, frames=16)
    assert numbers(clip.frames) == np.linspace(0, 39, 16, dtype=int).tolist()
    assert clip.info == probe(path)
    assert (clip.info.width, clip.info.height, clip.info.frames) == (32, 24, 40)
    assert clip.info.fps == pytest.approx(25, rel=1e-3)
    assert clip.info.duration == pytest.approx(1.6, abs=2e-3)
    assert clip.times == pytest.approx(np.linspace(0, 39, 16, dtype=int) / 25, abs=2e-3)
    assert clip.fps == pytest.approx(15 / (39 / 25), rel=1e-3)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (16, 24, 32, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 1}, [0]),
        ({"frames": 2}, [0, 39]),
        ({"frames": 40}, list(range(40))),
        ({"frames": 4, "stride": 1}, [0, 1, 2, 3]),
        ({"frames": 4, "stride": 3, "start": 0.4}, [10, 13, 16, 19]),
        ({"frames": 3, "start": 0.4, "duration": 0.44}, [10, 15, 20]),
        ({"frames": 2, "duration": 0.08}, [0, 1]),
        ({"frames": 2, "start": 0.4, "duration": 1e9}, [10, 39]),
        ({"frames": 1, "start": 1.56}, [39]),
    ],
)
def test_which_frames(clip: Path, options: dict[str, float], expected: list[int]) -> None:
    sampled = read_clip(clip, **options)  # type: ignore[arg-type]
    assert numbers(sampled.frames) == expected
    assert sampled.times == pytest.approx([k / 25 for k in expected])
    if len(expected) > 1:
        assert sampled.fps == pytest.approx((len(expected) - 1) / (sampled.times[-1] - sampled.times[0]))
    else:
        assert sampled.fps == 25


@given(
    count=st.integers(1, 58),  # levels of grey that 8 bits hold
    frames=st.integers(1, 60),
    stride=st.none() | st.integers(1, 7),
    first=st.integers(0, 30),
)
@settings(max_examples=30, deadline=None)
def test_sampling_is_even_or_refused(count: int, frames: int, stride: int | None, first: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for k, picture in enumerate(numbered(count, 2, 1)):
            Image.fromarray(picture).save(f"{folder}/{k}.bmp")
        left, needed = count - first, (frames - 1) * (stride or 1) + 1
        if left < needed:
            with pytest.raises(EmtError, match=f"{needed} are needed"):
                read_clip(folder, frames=frames, stride=stride, start=first / FOLDER_FPS)
            return
        got = numbers(read_clip(folder, frames=frames, stride=stride, start=first / FOLDER_FPS).frames)
        spread = np.arange(frames) * stride if stride else np.linspace(0, left - 1, frames, dtype=int)
        assert got == (first + spread).tolist()


def test_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    # Ten frames at 25 a second, then one every 10/25 s: by index half the samples would fall into the first 0.4 s.
    path = encode(
        tmp_path / "v.mkv", numbered(51), "-vf", "select='lt(n,10)+not(mod(n,10))'", "-fps_mode", "vfr", "-c:v", "ffv1"
    )
    clip = read_clip(path, frames=6)
    assert probe(path).frames == 15
    assert numbers(clip.frames) == [0, 10, 20, 30, 40, 50]
    assert clip.fps == pytest.approx(2.5, rel=1e-2)
    assert numbers(read_clip(path, frames=15, stride=1).frames) == [*range(10), 10, 20, 30, 40, 50]
    held = read_clip(path, frames=11)  # more samples than frames in the slow part: they are held
    assert numbers(held.frames) == [0, 5, 10, 10, 20, 20, 30, 30, 40, 40, 50]


def test_jitter_is_no_variable_rate(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "j.mkv", numbered(20), "-vf", "setpts='(N+0.3*mod(N,2))/25/TB'", "-fps_mode", "vfr", "-c:v", "ffv1"
    )
    assert numbers(read_clip(path, frames=20).frames) == list(range(20))


def test_start_seeks_in_a_long_clip_without_losing_accuracy(tmp_path: Path) -> None:
    levels = numbered(50, 16, 16)
    for name, output in (
        ("a.mp4", ["-c:v", "libx264", "-qp", "1", "-bf", "3", "-g", "30"]),
        ("a.mkv", ["-c:v", "libx264", "-qp", "1", "-bf", "3", "-g", "250"]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-lossless", "1", "-cpu-used", "8", "-g", "40"]),
    ):
        path = encode(tmp_path / name, levels, *output, fps=5)
        clip = read_clip(path, frames=5, start=6.0, duration=2.0)
        assert numbers(clip.frames) == [30, 32, 34, 36, 39]


def test_late_start_time_and_negative_times(tmp_path: Path, clip: Path) -> None:
    late = tmp_path / "late.mkv"
    ffmpeg("-i", clip, "-c", "copy", "-output_ts_offset", "100", late)
    assert numbers(read_clip(late, frames=3, start=0.4, duration=0.44).frames) == [10, 15, 20]
    assert read_clip(late, frames=2).times[0] == 0


def test_edit_list_counts_what_is_presented(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", numbered(50), "-c:v", "libx264", "-qp", "1", "-bf", "3", "-g", "250")
    cut = tmp_path / "cut.mp4"
    ffmpeg("-ss", "0.8", "-i", whole, "-c", "copy", cut)
    got = numbers(read_clip(cut, frames=10).frames)
    assert got[0] in (20, 21)
    assert got[-1] == 49
    assert np.ptp(np.diff(got)) <= 1


def test_containers_that_lie(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", numbered(20), "-c:v", "mjpeg", "-q:v", "1")
    data = bytearray(path.read_bytes())
    at = data.index(b"avih") + 8
    data[at + 16 : at + 20] = (9999).to_bytes(4, "little")  # dwTotalFrames
    at = data.index(b"strh") + 8
    data[at + 32 : at + 36] = (9999).to_bytes(4, "little")  # dwLength
    path.write_bytes(data)
    assert probe(path).frames == 20
    assert numbers(read_clip(path, frames=20).frames) == list(range(20))

    path = encode(tmp_path / "a.mp4", numbered(20))
    data = bytearray(path.read_bytes())
    for box, at in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        at += data.index(box) + 4
        data[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    path.write_bytes(data)
    assert probe(path).frames == 20
    assert probe(path).duration == pytest.approx(0.8)


# ------------------------------------------------------------------------------------------- geometry and pixels


def reference(picture: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """What fit means, by nearest sampling: exact at points away from edges."""
    (height, width), (w, h) = picture.shape[:2], size
    scale = {"crop": max(w / width, h / height), "pad": min(w / width, h / height)}.get(fit)
    sx, sy = (scale, scale) if scale else (w / width, h / height)
    x = np.floor((np.arange(w) + 0.5 - w / 2) / sx + width / 2).astype(int)
    y = np.floor((np.arange(h) + 0.5 - h / 2) / sy + height / 2).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None]
    out = picture[y.clip(0, height - 1)][:, x.clip(0, width - 1)].copy()
    out[~inside] = 0
    return out


@given(
    width=st.integers(48, 150),
    height=st.integers(48, 150),
    out_width=st.integers(4, 12).map(lambda n: 8 * n),
    out_height=st.integers(4, 12).map(lambda n: 8 * n),
    fit=st.sampled_from(["crop", "pad", "stretch"]),
    kind=st.sampled_from(["folder", "a.mkv"]),
)
@settings(max_examples=12, deadline=None)
def test_fit(width: int, height: int, out_width: int, out_height: int, fit: str, kind: str) -> None:
    picture = quadrants(width, height)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if kind == "folder":
            Image.fromarray(picture).save(path / "0.png")
        else:
            path = encode(path / kind, picture[None], "-c:v", "ffv1", "-pix_fmt", "gbrp")
        got = read_clip(path, frames=1, size=(out_width, out_height), fit=fit).frames[0]  # type: ignore[arg-type]
    expected = reference(picture, (out_width, out_height), fit)
    assert got.shape == expected.shape
    wrong = np.abs(got.astype(int) - expected.astype(int)).max(-1) > 24
    assert wrong.mean() < 0.2  # a few blurred columns and rows at edges
    corners = np.ix_([0, -1], [0, -1])
    if fit != "pad":  # there bars are whole pixels wide, and one may be a pixel off
        assert_near(got[corners], expected[corners], 24)


@pytest.mark.parametrize("size", [None, (64, 64)])
@pytest.mark.parametrize("kind", ["phone.mp4", "phone.mov", "exif"])
def test_rotation_flag_comes_upright(tmp_path: Path, kind: str, size: tuple[int, int] | None) -> None:
    stored = quadrants(64, 32)
    upright = np.rot90(stored)  # counterclockwise
    path = tmp_path / kind
    if kind == "exif":
        path.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 8  # "rotate 90 counterclockwise to display"
        Image.fromarray(stored).save(path / "0.jpg", exif=exif, quality=100, subsampling=0)
    else:
        plain = encode(tmp_path / "plain.mp4", stored[None])
        ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", path)
    clip = read_clip(path, frames=1, size=size, fit="stretch")
    assert (clip.info.width, clip.info.height) == (32, 64)
    assert clip.frames.shape[1:3] == ((64, 32) if size is None else (64, 64))
    corners = np.ix_([2, -3], [2, -3])
    assert_near(clip.frames[0][corners], upright[corners], 24)


def test_non_square_pixels(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", quadrants(32, 32)[None], *EXACT, "-vf", "setsar=2")
    assert (probe(path).width, probe(path).height) == (64, 32)
    padded = read_clip(path, frames=1, size=(64, 64), fit="pad").frames[0]
    assert padded[:14].max() == padded[-14:].max() == 0
    assert_near(padded[20, 10], (255, 0, 0))
    cut = read_clip(path, frames=1, size=(32, 32), fit="crop").frames[0]
    assert_near(cut[np.ix_([0, -1], [0, -1])], quadrants(32, 32)[np.ix_([0, -1], [0, -1])])


@pytest.mark.parametrize("size", [(1, 1), (53, 37), (2, 99), (4096, 2)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_odd_and_extreme_sizes(tmp_path: Path, size: tuple[int, int], fit: str) -> None:
    path = encode(tmp_path / "a.mkv", numbered(2, *size), "-c:v", "rawvideo", "-pix_fmt", "yuv420p")
    native = read_clip(path, frames=2)
    assert native.frames.shape == (2, size[1], size[0], 3)
    assert numbers(native.frames) == [0, 1]
    scaled = read_clip(path, frames=1, size=(64, 48), fit=fit).frames[0]  # type: ignore[arg-type]
    assert scaled.shape == (48, 64, 3)
    assert_near(scaled.max((0, 1)), 20)
    if fit != "pad":
        assert_near(scaled, 20)


@pytest.mark.parametrize("kind", ["a.gif", "a.mov", "vp9.webm", "vp8.webm", "prores.mov", "folder"])
def test_alpha_is_composited_over_white(tmp_path: Path, kind: str) -> None:
    frames = np.zeros((2, 48, 64, 4), np.uint8)  # black under the transparency, so that bleeding would show
    frames[:, :, 32:] = (255, 0, 0, 255)
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        Image.fromarray(frames[0]).save(path / "0.png")
        Image.fromarray(frames[1]).save(path / "1.webp", lossless=True)
    elif kind == "a.gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, disposal=2)
        assert probe(path).frames == 1  # identical frames are merged by the writer
        frames = frames[:1]
    else:
        codec = {"a.mov": ["-c:v", "png"], "prores.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"]}.get(
            kind, ["-c:v", "libvpx-vp9" if "9" in kind else "libvpx", "-pix_fmt", "yuva420p", "-b:v", "2M"]
        )
        encode(path, frames, *codec, "-auto-alt-ref", "0") if "webm" in kind else encode(path, frames, *codec)
    for size in ((64, 48), (20, 16)):
        got = read_clip(path, frames=len(frames), size=size).frames
        assert_near(got[:, :, : size[0] // 3], 255)
        assert_near(got[:, :, -size[0] // 3 :], (255, 0, 0), 12)
        assert got[..., 0].min() > 200  # red is full on both sides: no dark fringe


@pytest.mark.parametrize(
    "output",
    [
        ["-c:v", "libx265", "-x265-params", "log-level=none:lossless=1", "-pix_fmt", "yuv420p10le"],
        ["-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv422p10le"],
        ["-c:v", "ffv1", "-pix_fmt", "gray16le"],
        ["-c:v", "ffv1", "-pix_fmt", "gbrp12le"],
        ["-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p10le", "-lossless", "1"],
        ["-c:v", "prores_ks", "-pix_fmt", "yuv444p10le"],
        ["-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuvj420p"],
    ],
    ids=lambda output: " ".join(output[1::2]),
)
def test_deep_and_full_range_pixels(tmp_path: Path, output: list[str]) -> None:
    path = encode(tmp_path / "a.mkv", numbered(20), *output)
    assert numbers(read_clip(path, frames=5).frames) == [0, 4, 9, 14, 19]


def test_hdr_decodes(tmp_path: Path) -> None:
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    path = encode(tmp_path / "a.mp4", numbered(4), *tags, "-pix_fmt", "yuv420p10le", *X265)
    assert np.all(np.diff(read_clip(path, frames=4).frames.mean((1, 2, 3))) > 0)


def test_sound_and_cover_art_are_ignored(tmp_path: Path, clip: Path) -> None:
    both = tmp_path / "both.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=5", "-i", clip, "-c:v", "copy", "-map", "0", "-map", "1", both)
    assert probe(both).frames == 40
    assert numbers(read_clip(both, frames=2).frames) == [0, 39]
    sound = tmp_path / "sound.mp4"
    ffmpeg("-i", both, "-map", "0:a", "-c", "copy", sound)
    with pytest.raises(EmtError, match="no video"):
        probe(sound)


# ------------------------------------------------------------------------------------------- memory


def test_memory_holds_only_what_was_requested(tmp_path: Path) -> None:
    path = tmp_path / "8k.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=7680x4320:r=25", "-frames:v", "3", *EXACT[:-2], "-threads", "1", path)
    probe(path)
    tracemalloc.start()
    clip = read_clip(path, frames=2, size=(64, 40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clip.info.width == 7680
    assert_near(clip.frames, 128)
    assert peak < 1 << 20  # one frame of the source is 100 MB

    path = tmp_path / "long.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=320x180:r=30", "-frames:v", "1000", *EXACT[:-2], "-g", "30", path)
    tracemalloc.start()
    clip = read_clip(path, frames=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clip.info.frames == 1000
    assert peak < clip.frames.nbytes + (1 << 20)


# ------------------------------------------------------------------------------------------- folders of images


def test_folder_in_natural_order_of_all_kinds(tmp_path: Path) -> None:
    names = ["f1.png", "f2.jpg", "f9.JPEG", "f10.webp", "f0011.bmp", "g1.png"]
    for name, picture in zip(names, numbered(6)):
        Image.fromarray(picture).save(tmp_path / name, lossless=True, quality=100)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._f0.png").write_text("left by another system")
    assert is_clip(tmp_path)
    clip = read_clip(tmp_path, frames=6)
    assert numbers(clip.frames) == list(range(6))
    assert clip.fps == clip.info.fps == FOLDER_FPS
    assert clip.info.duration == pytest.approx(6 / FOLDER_FPS)


def test_images_of_every_mode(tmp_path: Path) -> None:
    grey = np.full((4, 4), 0x8000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "1.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "2.png", transparency=0)
    Image.new("LA", (4, 4), (0, 127)).save(tmp_path / "3.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "4.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 127)).save(tmp_path / "5.jpg", quality=100)
    assert_near(read_clip(tmp_path, frames=6).frames.mean((1, 2, 3)), [128, 128, 255, 128, 255, 128])


def with_swapped_primaries() -> bytes:
    """An ICC profile in which red and green have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_k2_pictures_are_read_in_the_colours_of_their_profiles(tmp_path: Path, suffix: str, mode: str) -> None:
    picture = Image.new("RGBA" if mode == "RGBA" else "RGB", (32, 24), (255, 0, 0))
    if suffix == ".jpg":
        picture = picture.convert("RGB")
    elif mode == "P" and suffix == ".png":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    seen = {}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in {"srgb": srgb, "swapped": with_swapped_primaries(), "damaged": b"profile" * 30}.items():
        (tmp_path / name).mkdir()
        options = {"quality": 100, **({"lossless": True} if suffix == ".webp" else {})}
        picture.save(tmp_path / name / f"0{suffix}", icc_profile=profile, **options)
        seen[name] = read_clip(tmp_path / name, frames=1).frames[0, 3, 3].tolist()
    red, green, blue = seen["swapped"]
    assert green > 200
    assert max(red, blue) < 130
    assert seen["srgb"] == seen["damaged"] == ([254, 0, 0] if suffix == ".jpg" else [255, 0, 0])


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(EmtError, match="holds no images"):
        probe(tmp_path)
    assert not is_clip(tmp_path)
    for k, picture in enumerate(numbered(3)):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    (tmp_path / "1.png").write_bytes(b"text")
    with pytest.raises(EmtError, match=r"1\.png is no image"):
        read_clip(tmp_path, frames=3)
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes()[:-30])
    with pytest.raises(EmtError, match=r"1\.png cannot be read"):
        read_clip(tmp_path, frames=3)
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with pytest.raises(EmtError, match=r"1\.png is 9x9, but 0\.png in the same folder is 32x24"):
        read_clip(tmp_path, frames=3, size=(8, 8))
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(EmtError, match="it is no file"):
        read_clip(tmp_path, frames=3)


# ------------------------------------------------------------------------------------------- hostile input

NAMES = [
    "-x.mp4", "-i.mp4", "with space.mp4", "two\nlines.mp4", "emoji😀é.mp4", "%d.mp4", "%03d%%.mp4", "concat:a|b.mp4",
    "http:x.mp4", "file:x.mp4", "pipe:0.mp4", "a:b.mp4", "'quo\"te.mp4", "[0];,=.mp4", "*?.mp4", "$HOME`x`\\.mp4",
    ".hidden.mp4", "\udcff.mp4",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, tmp_path / name)
    assert numbers(read_clip(name, frames=2).frames) == [0, 39]
    write_clip(name, numbered(2), 8, metadata=WRITTEN)
    assert probe(name).frames == 2
    assert read_metadata(name) == WRITTEN
    assert not list(tmp_path.glob(".emt-partial-*"))
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(EmtError) as error:
        probe(name)
    str(error.value).encode()  # can be printed


def files_that_are_no_clips(folder: Path, good: Path) -> dict[str, str]:
    whole = good.read_bytes()
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("I am a film\n" * 100)
    (folder / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(20_000))
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "head.gif").write_bytes(b"GIF89a")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{good}'\n")
    (folder / "playlist.mkv").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{good}\n#EXT-X-ENDLIST\n"
    )
    Image.new("RGB", (8, 8)).save(folder / "picture.mp4", "PNG")
    (folder / "clip.txt").write_bytes(whole)
    (folder / "note.mp4").write_text("moved to another disk\n")
    (folder / "page.mp4").write_text("\n<!doctype HTML><title>404</title>")
    (folder / "archive.mov").write_bytes(gzip.compress(whole))
    (folder / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "broken.mp4").symlink_to("nowhere.mp4")
    (folder / "empty").mkdir()
    return {
        "zero.mp4": "is empty",
        "text.mp4": "cannot be read as a video",
        "noise.mkv": "cannot be read as a video",
        "note.mp4": "a page or a note may have been saved instead",
        "page.mp4": "cannot be read as a video: it is a web page",
        "archive.mov": "cannot be read as a video: it is a gzip archive",
        "pointer.mp4": "cannot be read as a video: it is a pointer of Git LFS",
        "half.mp4": "cannot be read as a video: its index (moov), which a recorder writes last, is missing",
        "head.gif": "cannot be read as a video",
        "concat.mp4": "cannot be read as a video",
        "playlist.mkv": "cannot be read as a video",
        "picture.mp4": "cannot be read as a video",
        "clip.txt": "suffix '.txt'",
        "pipe.mp4": "neither a file nor a folder",
        "loop.mp4": "symbolic links",
        "broken.mp4": "does not exist",
        "missing.mp4": "does not exist",
        "missing.mp4/x.mp4": "does not exist",
        "text.mp4/x.mp4": "Not a directory",
        "n" * 300 + ".mp4": "too long",
        "nul\0.mp4": "null",
        "empty": "holds no images",
    }


def test_hostile_files_are_named_and_refused(tmp_path: Path, clip: Path) -> None:
    for name, reason in files_that_are_no_clips(tmp_path, clip).items():
        for use in (probe, read_clip, read_metadata):
            with pytest.raises(EmtError) as error:
                use(tmp_path / name)
            assert reason in error.value.problem, name
            assert Path(name.split("\0")[0]).name[:200] in error.value.problem
            assert error.value.hint


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".gif"])
def test_truncated_files_give_their_whole_frames_or_an_error(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 40, (40, 24, 32, 3), np.uint8) + numbered(40)
    codec = {".gif": ["-c:v", "gif"], ".webm": ["-c:v", "libvpx-vp9", "-cpu-used", "8"], ".avi": ["-c:v", "mjpeg"]}.get(
        suffix, EXACT
    )
    path = encode(tmp_path / f"a{suffix}", noise, *codec, *(["-movflags", "+faststart"] if suffix == ".mp4" else []))
    data = path.read_bytes()
    for share in (0.05, 0.5, 0.9, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        try:
            clip = read_clip(path, frames=4, size=(32, 24))
        except EmtError as error:
            assert path.name in error.problem  # noqa: PT017
        else:
            assert 4 <= clip.info.frames <= 40
            assert np.all(np.diff(clip.frames.mean((1, 2, 3))) > 0)


def test_damaged_bytes_never_hang_or_crash(tmp_path: Path, clip: Path) -> None:
    data, random = clip.read_bytes(), np.random.default_rng(0)
    for _ in range(12):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[random.integers(0, len(broken), 40)] = random.integers(0, 256, 40)
        path = tmp_path / "a.mp4"
        path.write_bytes(broken.tobytes())
        try:
            assert read_clip(path, frames=4, size=(16, 16)).frames.shape == (4, 16, 16, 3)
        except EmtError as error:
            assert path.name in error.problem  # noqa: PT017


def test_no_permission(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "secret.mp4"
    shutil.copy(clip, path)
    path.chmod(0)
    tmp_path.chmod(0o755)
    script = f"""
import os, sys
from emt.errors import EmtError
from emt.storage import remove_partials
from emt.video import probe, write_clip
import numpy as np
if os.getuid() == 0: os.setuid(65534)
new, frames = {str(tmp_path / "new.gif")!r}, np.zeros((1, 8, 8, 3), np.uint8)
for act in (lambda: probe({str(path)!r}), lambda: write_clip(new, frames, 8)):
    try: act()
    except EmtError as error: print(error.problem)
"""
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=child_environment())
    tmp_path.chmod(0o755)
    assert [line.split("/")[0] for line in out.stdout.splitlines()] == [
        "No permission to read ",
        "No permission to write ",
    ], out.stderr


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        ({"frames": 41}, "has 40 frames, but 41 are needed", "--frames 40"),
        ({"frames": 16, "start": 1.4}, "5 frames in the part from 1.4 s on", "--frames 5 or an earlier --start"),
        ({"start": 9}, "0 frames in the part from 9 s", "an earlier --start"),
        ({"duration": 0.2}, "5 frames in the part from 0 s lasting 0.2 s", "a longer --duration"),
        ({"stride": 3}, "46 are needed (16 at a stride of 3)", "--frames 14 or a smaller --stride"),
        ({"frames": 0}, "0 frames", "--frames"),
        ({"size": (0, 8)}, "0x8", "--size"),
        ({"size": (10**6, 10**6)}, "1000000x1000000", "--size"),
        ({"fit": "cover"}, "'cover'", "crop, pad, stretch"),
        ({"start": -1}, "-1", "--start"),
        ({"start": float("nan")}, "nan", "--start"),
        ({"duration": 0}, "0", "--duration"),
        ({"stride": 0}, "0", "--stride"),
    ],
)
def test_requests_that_cannot_be_met(clip: Path, options: dict[str, object], problem: str, hint: str) -> None:
    with pytest.raises(EmtError) as error:
        read_clip(clip, **options)  # type: ignore[arg-type]
    assert problem in error.value.problem
    assert hint in error.value.hint


def test_ffmpeg_is_stopped_when_it_hangs_and_always_reaped() -> None:
    began = time.monotonic()
    endless = ["-f", "lavfi", "-i", "testsrc=s=16x16", "-f", "null", "-"]
    with Ffmpeg(Path("a.mp4"), endless, seconds=0.3) as process, pytest.raises(EmtError, match="did not finish"):
        process.finish()
    with Ffmpeg(Path("a.mp4"), endless, seconds=60) as process:
        pass  # left early
    assert time.monotonic() - began < 30
    assert not Path(f"/proc/{process._process.pid}").exists()


# ------------------------------------------------------------------------------------------- writing


@given(
    suffix=st.sampled_from([".mp4", ".webm", ".gif", ""]),
    width=st.integers(1, 24).map(lambda n: 2 * n),
    height=st.integers(1, 24).map(lambda n: 2 * n),
    odd=st.booleans(),
    count=st.integers(1, 5),
    fps=st.sampled_from([1.0, 7.627118644, 8, 12.5, 24000 / 1001, 25, 50]),
    metadata=st.dictionaries(st.text(max_size=20), st.text(max_size=200), max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_written_clips_read_back(
    suffix: str, width: int, height: int, odd: bool, count: int, fps: float, metadata: dict[str, str]
) -> None:
    if odd and suffix != ".mp4":
        width, height = width - 1, height - 1
    frames = numbered(count, width, height)
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(Path(folder) / f"new/clip{suffix}", frames, fps, metadata=metadata)
        assert read_metadata(path) == metadata
        clip = read_clip(path, frames=count)
        assert numbers(clip.frames) == list(range(count))
        assert clip.frames.shape == frames.shape
        if count > 1:
            rounding = {".webm": 1e-3, ".gif": 1e-2}.get(suffix, 1e-6)  # units of their clocks
            assert clip.times == pytest.approx(np.arange(count) / fps, abs=rounding)
        assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_colours_survive(tmp_path: Path) -> None:
    frames = np.repeat(quadrants(64, 64)[None], 3, 0)
    frames[:, 8:24, 8:24] = (200, 120, 90)
    for suffix, tolerance in ((".mp4", 6), (".webm", 12), (".gif", 2), ("", 0)):
        clip = read_clip(write_clip(tmp_path / f"c{suffix}", frames, 8), frames=3)
        for y, x in ((4, 4), (4, 60), (60, 4), (60, 60), (16, 16)):
            assert_near(clip.frames[1, y, x], frames[1, y, x], tolerance)


def test_formats_are_what_players_expect(tmp_path: Path) -> None:
    frames = numbered(3, 64, 48)
    mp4 = write_clip(tmp_path / "a.mp4", frames, 30000 / 1001).read_bytes()
    assert mp4.index(b"moov") < mp4.index(b"mdat")  # plays while it loads
    log = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True)
    assert "Video: h264" in log.stderr
    assert "yuv420p(tv, bt709" in log.stderr
    assert "29.97 fps" in log.stderr
    write_clip(tmp_path / "a.webm", frames, 8)
    log = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "a.webm"], capture_output=True, text=True)
    assert "Video: vp9" in log.stderr
    write_clip(tmp_path / "a.gif", frames, 8, metadata=WRITTEN)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        assert gif.n_frames == 3
        assert json.loads(gif.info["comment"]) == WRITTEN


def test_png_folders(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "out", numbered(3), 12.5, metadata=WRITTEN)
    assert sorted(p.name for p in folder.iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert probe(folder).fps == 12.5
    assert write_clip(tmp_path / "out", numbered(2), 8) == folder  # replaces a clip of its own
    assert probe(folder).frames == 2
    named = write_clip(tmp_path / "named/frame-%03d.png", numbered(2), 8)
    assert sorted(p.name for p in named.iterdir()) == ["frame-000.png", "frame-001.png"]
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(EmtError, match=r"thesis\.txt"):
        write_clip(folder, numbered(2), 8)
    (folder / "thesis.txt").unlink()
    Image.new("RGB", (4, 4)).save(folder / "0001.png")
    with pytest.raises(EmtError, match=r"0001\.png, which is no frame"):
        write_clip(folder, numbered(2), 8)
    assert len(list(folder.iterdir())) == 2
    assert not list(tmp_path.glob(".emt-partial-*"))


@pytest.mark.parametrize(
    ("name", "size", "fps", "problem"),
    [
        ("a.mp4", (33, 24), 8, "even width and height, not 33x24"),
        ("a.avi", (32, 24), 8, "not written under such a name"),
        ("a.png", (32, 24), 8, "names one image"),
        ("a%s.png", (32, 24), 8, "names one image"),
        ("a.gif", (32, 24), 60, "60 frames a second"),
        ("a.mp4", (32, 24), 0, "0 frames a second"),
        ("a.mp4", (32, 24), float("nan"), "nan frames a second"),
        ("a.gif", (16386, 2), 8, "too large"),
        ("file/a.gif", (32, 24), 8, "Not a directory|File exists"),
        ("folder.gif", (32, 24), 8, "is a folder"),
        ("file", (32, 24), 8, "is no folder"),
    ],
)
def test_places_that_cannot_be_written(
    tmp_path: Path, name: str, size: tuple[int, int], fps: float, problem: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(EmtError, match=problem):
        write_clip(tmp_path / name, numbered(2, *size), fps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.gif"]


def test_wrong_arrays_and_metadata(tmp_path: Path) -> None:
    for frames in (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 of shape"):
            write_clip(tmp_path / "a.gif", frames, 8)
    with pytest.raises(ValueError, match="strings to strings"):
        write_clip(tmp_path / "a.gif", numbered(1), 8, metadata={"seed": 1})  # type: ignore[dict-item]
    with pytest.raises(EmtError, match="bytes of metadata"):
        write_clip(tmp_path / "a.gif", numbered(1), 8, metadata={"a": "x" * 200_000})
    long = {"job": json.dumps({"prompts": ["é" * 50] * 200})}
    for name in ("a.mp4", "a.webm", "a.gif", "a"):
        assert read_metadata(write_clip(tmp_path / name, numbered(1), 8, metadata=long)) == long


def test_metadata_of_others_is_not_ours(tmp_path: Path, clip: Path) -> None:
    assert read_metadata(clip) == {}
    tagged = tmp_path / "t.mp4"
    ffmpeg("-i", clip, "-c", "copy", "-metadata", "comment=[1, 2] = ; # nice film", tagged)
    assert read_metadata(tagged) == {}


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.webm", numbered(2), 8)
    before = path.read_bytes()
    script = f"""
import numpy as np
from emt.video import write_clip
print("ready", flush=True)
write_clip({str(path)!r}, np.random.default_rng(0).integers(0, 255, (64, 512, 512, 3), np.uint8), 8)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=child_environment())
    deadline = time.monotonic() + 30
    while not (left := list(tmp_path.glob(".emt-partial-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGSTOP)
    assert remove_partials(tmp_path, older_than=0) == []  # a living process's, however long it has paused
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(left) == 1
    assert path.read_bytes() == before
    assert remove_partials(tmp_path) == left
    assert [p.name for p in tmp_path.iterdir()] == ["a.webm"]


def test_full_disk(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    script = f"""
import os, subprocess
import numpy as np
from emt.errors import EmtError
from emt.storage import remove_partials
from emt.video import write_clip
frames = np.random.default_rng(0).integers(0, 255, (8, 128, 128, 3), np.uint8)
for size in (4, 64):
    for name in ("a.mp4", "a.webm", "a.gif", "a"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={{size}}k", "none", {str(tmp_path)!r}], check=True)
        try:
            write_clip(os.path.join({str(tmp_path)!r}, name), frames, 8)
        except EmtError as error:
            print(size, name, "No space left" in error.problem, os.listdir({str(tmp_path)!r}))
        subprocess.run(["umount", {str(tmp_path)!r}], check=True)
"""
    child = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script], capture_output=True, text=True, env=child_environment()
    )
    assert child.stdout.splitlines() == [
        f"{size} {name} True []" for size in (4, 64) for name in ("a.mp4", "a.webm", "a.gif", "a")
    ], child.stderr


def test_hundreds_of_frames_are_read_in_order(tmp_path: Path) -> None:
    """More than ffmpeg takes conditions for, and than one call of it selects, by their times and by their numbers."""
    levels = np.random.default_rng(0).integers(20, 230, 620).astype(np.uint8)
    path = encode(tmp_path / "long.mp4", np.broadcast_to(levels[:, None, None, None], (620, 16, 16, 3)), fps=24)
    for frames, stride, expected in ((620, None, levels), (300, 2, levels[:600:2]), (101, 1, levels[:101])):
        found = read_clip(path, frames=frames, stride=stride).frames.mean((1, 2, 3))
        assert np.abs(found - expected).max() < 3
    out = np.empty((600, 16, 16, 3), np.uint8)
    Video.open(path).counted().read(np.arange(600), out, "crop")
    assert np.abs(out.mean((1, 2, 3)) - levels[:600]).max() < 3
    assert count_frames(path, start=1.0, stride=3) == 199


@pytest.mark.parametrize(
    ("picture", "fit", "box", "size"),
    [
        ((200, 100), "crop", (50, 0, 150, 100), (50, 50)),
        ((100, 200), "crop", (0, 50, 100, 150), (50, 50)),
        ((200, 100), "pad", (0, 0, 200, 100), (50, 25)),
        ((100, 200), "pad", (0, 0, 100, 200), (25, 50)),
        ((200, 100), "stretch", (0, 0, 200, 100), (50, 50)),
    ],
)
def test_the_part_of_a_picture_that_a_fit_takes(picture, fit, box, size):
    assert fitted(*picture, (50, 50), fit) == (box, size)


def test_half_of_the_shortest_gap():
    assert half_gap(np.array([0.0, 0.5, 0.7])) == pytest.approx(0.1)
    assert half_gap(np.array([3.0])) == 1e-3


# ------------------------------------------------------------------------------------------- what ffmpeg lists


def listed(*rows: str) -> list[bytes]:
    """Lines of ffmpeg's framecrc, in tenths of seconds: stream, decoding time, presentation time, length, …."""
    return [b"#software: Lavf", b"#tb 0: 1/10", *(f"0, 0, {row}, 99, 0x1".encode() for row in rows)]


def test_packets_are_listed_by_when_they_are_presented() -> None:
    """Decoders need the frames that others are made of first; the last one listed need not be the last one shown."""
    times, last, timed = _presentation_times(listed("0, 1", "7, 4", "3, 2"))
    assert (times.tolist(), last, timed) == (pytest.approx([0, 0.3, 0.7]), pytest.approx(0.4), True)
    cut = "0, 0, 9, 1, 99, 0x1, F=0x4"  # by an edit list: a base of other frames that is not shown itself
    times, last, timed = _presentation_times([*listed("0, 1", "1, 2"), cut.encode()])
    assert (times.tolist(), last, timed) == (pytest.approx([0, 0.1]), pytest.approx(0.2), True)


@pytest.mark.parametrize(
    "rows", [("0, 1", f"{-(1 << 63)}, 5"), ("0, 1", "0, 5"), ()], ids=["none", "the same", "no packet"]
)
def test_packets_without_times_of_their_own_have_to_be_decoded(rows: tuple[str, ...]) -> None:
    _, last, timed = _presentation_times(listed(*rows))
    assert (last, timed) == (pytest.approx(0.5 if rows else 0.0), False)


def test_parts_are_counted_from_the_first_frame_on(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", numbered(12), fps=10)
    for part, count in (({}, 12), ({"duration": 0.5}, 5), ({"start": 0.3}, 9), ({"start": 0.3, "duration": 0.2}, 2)):
        assert count_frames(path, **part) == count
    assert count_frames(path, stride=5) == 3
    assert count_frames(path, start=9) == 0


def test_a_decoder_of_transparency_is_for_streams_that_have_it(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", numbered(2), "-c:v", "libvpx-vp9", fps=10)
    opened = Video.open(path)
    assert (opened.alpha, opened.decoder) == (False, ())


SHOWN = "[Parsed_showinfo_0 @ 0x1] [info] n: 0 pts: 0 fmt:yuv420p cl:left sar:1/1 s:{width}x{height} i:{fields} iskey:1"


def shown(width: int = 64, height: int = 48, fields: str = "P") -> re.Match[str]:
    match = _SHOWN.search(SHOWN.format(width=width, height=height, fields=fields))
    assert match
    return match


def test_lines_that_decide_the_colours_are_those_that_are_stored() -> None:
    """A picture that is turned is shown with another height than it is stored with."""
    assert _colours(shown(height=640), "", "h264, yuv420p, 640x480 [SAR 1:1]").lines == 480
    assert _colours(shown(height=640), "", "rawvideo").lines == 640


@pytest.mark.parametrize(
    ("described", "picture", "fields"),
    [
        ("hevc (Main), yuv420p (tv, top first)", shown(fields="T"), ""),  # single fields, as pictures of their own
        ("mpeg2video, yuv420p (tv, top first)", shown(height=12, fields="T"), ""),  # fewer lines than can be completed
        ("mpeg2video, yuv420p", shown(fields="T"), "marked"),
        ("huffyuv, yuv420p", shown(fields="B"), "marked"),
        ("h264, yuv420p (tv, top first)", shown(), "marked"),
        ("huffyuv, yuv420p (top coded first (swapped))", shown(), "tff"),
        ("huffyuv, yuv420p (bottom first)", shown(), "bff"),
        ("h264, yuv420p (tv, progressive)", shown(), ""),
    ],
)
def test_how_fields_become_frames(described: str, picture: re.Match[str], fields: str) -> None:
    assert _fields(picture, described) == fields


def test_a_clips_rate_and_duration_follow_from_the_times_of_its_frames() -> None:
    video = Video(ClipInfo(Path("a.mp4"), 8, 8, 0.0, 0, 0.0), np.array([]))
    for times, last, fps, duration in (
        ([1.0, 1.5, 2.0], 0.25, 2.0, 1.25),
        ([1.0, 1.1, 2.0], 0.0, 2.0, 1.5),  # how long the last one shows is not known: as long as the others on average
        ([3.0], 0.5, 2.0, 0.5),
        ([3.0], 0.0, FOLDER_FPS, 1 / FOLDER_FPS),
    ):
        info = video._at(np.array(times), last).info
        assert (info.frames, info.fps, info.duration) == (len(times), pytest.approx(fps), pytest.approx(duration))


def heading(*lines: str) -> _Listing:
    return _Listing(Path("a.mkv"), "0:V:0", np.array([]), 0.0, False, "\n".join([*lines, "Stream mapping:"]), "")


def test_a_files_heading_gives_its_duration_and_streams() -> None:
    found = heading(
        "[info]   Duration: 01:02:03.50, start: 0.000000",
        "[info]   Stream #0:0: Video: mjpeg, yuvj420p, 8x8 (attached pic)",
        "[info]   Stream #0:1(eng): Audio: aac",
        "[info]   Stream #0:2: Video: h264, yuv420p, 16x16",
        "[info]   Stream #0:3: Video: vp9, yuv420p, 32x32 (default)",
    )
    assert found._given_seconds() == 3723.5
    assert found.has_sound()
    assert found.default_stream() == 3
    assert found.described("0:3").startswith("vp9")
    assert found.described("0:V:0").startswith("h264"), "a cover is no video"
    silent = heading("  Stream #0:0: Video: h264, yuv420p (default)", "  Stream #0:1: Video: vp9 (default)")
    assert silent.default_stream() is None, "it is the first one anyway"
    assert not silent.has_sound()
    assert silent._given_seconds() == 0
    assert heading().described("0:V:0") == ""


def test_a_clip_has_at_most_65536_frames_of_twice_8k() -> None:
    _check_request(65_536, (8192, 8192), "crop", 0.0, None, None)
    _check_request(1, (1, 1), "crop", 0.0, None, None)
    for frames, size in ((65_537, (8192, 8192)), (65_536, (8192, 8193)), (0, None), (1, (0, 8))):
        with pytest.raises(EmtError, match=r"cannot be sampled|is not possible"):
            _check_request(frames, size, "crop", 0.0, None, None)


def test_24_images_are_a_second(tmp_path: Path) -> None:
    for number in range(24):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{number}.png")
    assert probe(tmp_path).duration == pytest.approx(1)


@pytest.mark.parametrize(
    ("picture", "target", "fit", "box", "size"),
    [
        ((101, 50), (30, 20), "crop", (13.0, 0.0, 88.0, 50.0), (30, 20)),
        ((50, 101), (30, 20), "crop", (0.0, 101 / 2 - 50 / 3, 50.0, 101 / 2 + 50 / 3), (30, 20)),
        ((1000, 1), (20, 20), "pad", (0.0, 0.0, 1000.0, 1.0), (20, 1)),
        ((1, 1000), (20, 20), "pad", (0.0, 0.0, 1.0, 1000.0), (1, 20)),
    ],
)
def test_fits_of_odd_pictures(picture, target, fit, box, size) -> None:
    """The crop is in the middle, to fractions of a pixel; a picture that is padded stays a pixel wide at least."""
    found, scaled = fitted(*picture, target, fit)
    assert found == pytest.approx(box)
    assert scaled == size


def test_k7_a_place_where_no_clip_can_be_written_is_said_before_one_is_made(tmp_path: Path) -> None:
    (tmp_path / "file.mp4").touch()
    for name in ("a.mp4", "new/folder/a.webm", "frames", "frames/%04d.png"):
        check_place(tmp_path / name)
    for name, said in (("a.xyz", "under such a name"), ("a.png", "one image"), ("file.mp4/a.mp4", "is not a folder")):
        with pytest.raises(EmtError, match=said):
            check_place(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file.mp4"]
