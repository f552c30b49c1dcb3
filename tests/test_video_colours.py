"""Frames in the colours that players show: ranges, matrices, wide gamuts, HDR, transparency; fields become frames."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import EXACT, assert_near, encode, ffmpeg

from emt.errors import EmtError
from emt.video import read_clip, write_clip
from emt.video.colours import Colours

RED, GREEN, WHITE = (220, 20, 20), (20, 220, 20), (255, 255, 255)
LUMA = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}
# Light of BT.709's primaries in those of BT.2020 and of P3.
BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
P3 = np.array([[0.82246, 0.17754, 0], [0.03319, 0.96681, 0], [0.01708, 0.07240, 0.91052]])


def patches(height: int = 96) -> np.ndarray:
    """Red, green, white, from left to right, as fractions."""
    picture = np.empty((height, height * 2, 3))
    picture[:] = np.array(WHITE) / 255
    picture[:, : height * 2 // 3] = np.array(RED) / 255
    picture[:, height * 2 // 3 : height * 4 // 3] = np.array(GREEN) / 255
    return picture


def mistagged(path: Path, pixels: str, matrix: str, transfer: str) -> Path:
    """A clip of one colour whose frames are tagged, whatever is in them."""
    tags = f"format={pixels},setparams=colorspace={matrix}:color_primaries=bt2020:color_trc={transfer}"
    ffmpeg("-f", "lavfi", "-i", "color=0xDC1414:s=64x48:r=10:d=0.4", "-vf", tags, "-c:v", "ffv1", str(path))
    return path


@pytest.mark.parametrize(
    ("matrix", "transfer", "said"),
    [
        ("ictcp", "bt709", "tagged as ICtCp, which is defined for PQ and HLG, with the transfer bt709"),
        ("bt2020c", "smpte2084", "BT.2020 of constant luminance with PQ or HLG"),
        ("ipt-c2", "smpte2084", "stored as IPT-C2"),
        ("ycgco-re", "bt709", "stored as YCgCo-R"),
        ("smpte2085", "bt709", "stored as Y'D'zD'x"),
    ],
)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p10le"])
def test_k7_colours_that_nothing_converts_are_named(tmp_path, pixels, matrix, transfer, said):
    with pytest.raises(EmtError, match="cannot be read as a video: its colours are") as caught:
        read_clip(mistagged(tmp_path / "clip.mkv", pixels, matrix, transfer), frames=2)
    assert said in caught.value.problem


@pytest.mark.parametrize("transfer", ["bt709", "smpte2084"])
def test_k1_a_tag_of_rgb_on_other_pixels_does_not_count(tmp_path, transfer):
    frames = [
        read_clip(mistagged(tmp_path / f"{matrix}.mkv", "yuv420p", matrix, transfer), frames=2).frames
        for matrix in ("gbr", "unknown")
    ]
    assert np.array_equal(*frames)


def light(signal: np.ndarray) -> np.ndarray:
    """sRGB to light."""
    return np.where(signal < 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq(value: np.ndarray) -> np.ndarray:
    """Light, 1 for SDR white, to the signal of ST 2084."""
    y = (value * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(value: np.ndarray) -> np.ndarray:
    """Light, 1 for SDR white, to the signal of ARIB STD-B67: 75% for white."""
    e = value * 0.265
    return np.where(
        e <= 1 / 12, np.sqrt(3 * e), 0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-9)) + 0.55991073
    )


def yuv(rgb: np.ndarray, matrix: str, full: bool, bits: int) -> bytes:
    """4:4:4 planes."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    if matrix == "ycgco":
        y, u, v = r / 4 + g / 2 + b / 4, g / 2 - r / 4 - b / 4, (r - b) / 2
    else:
        kr, kb = LUMA[matrix]
        y = kr * r + (1 - kr - kb) * g + kb * b
        u, v = (b - y) / 2 / (1 - kb), (r - y) / 2 / (1 - kr)
    top, scale = (1 << bits) - 1, 1 << (bits - 8)
    if full:
        planes = [y * top, u * top + (top + 1) / 2, v * top + (top + 1) / 2]
    else:
        planes = [(219 * y + 16) * scale, (224 * u + 128) * scale, (224 * v + 128) * scale]
    return np.stack([np.rint(plane).clip(0, top) for plane in planes]).astype("<u2" if bits > 8 else "u1").tobytes()


def tagged(path: Path, rgb: np.ndarray, matrix: str, bits: int = 8, full: bool = False, **tags: str) -> Path:
    """Two frames of a picture, as lossless H.264 with some tags."""
    height, width = rgb.shape[:2]
    pixels = "yuv444p" + f"{bits}le" * (bits > 8)
    raw = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-framerate", "24", "-i", "-"]
    given = ":".join(f"{name}={value}" for name, value in tags.items())
    tag = ["-vf", f"setparams={given}"] if tags else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *tag, *EXACT[:-2], str(path)]
    subprocess.run(command, input=yuv(rgb, matrix, full, bits) * 2, check=True, timeout=60)
    return path


def assert_patches(path: Path, tolerance: int = 6, size: tuple[int, int] | None = None) -> None:
    frame = read_clip(path, frames=1, size=size, fit="stretch").frames[0]
    height, width = frame.shape[:2]
    for place, colour in ((1, RED), (3, GREEN), (5, WHITE)):
        assert_near(frame[height // 2, width * place // 6], colour, tolerance)


def stream_line(path: Path) -> str:
    log = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", path], capture_output=True, text=True)
    return next(line for line in log.stderr.splitlines() if "Video:" in line)


# ------------------------------------------------------------------------------------------- matrices and ranges


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc", "ycgco"])
def test_k2_matrix_and_range_are_those_of_the_tags(tmp_path: Path, matrix: str, bits: int, full: bool) -> None:
    tags = {"colorspace": matrix, "range": "pc" if full else "tv"}
    assert_patches(tagged(tmp_path / "a.mp4", patches(), matrix, bits, full, **tags), 4)


@pytest.mark.parametrize(("lines", "matrix"), [(96, "smpte170m"), (576, "smpte170m"), (720, "bt709"), (1080, "bt709")])
def test_k2_untagged_video_is_bt709_from_720_lines_on(tmp_path: Path, lines: int, matrix: str) -> None:
    path = tagged(tmp_path / "a.mp4", patches(lines), matrix)
    assert "bt709" not in stream_line(path)
    assert_patches(path, 4)
    assert_patches(path, 4, size=(96, 48))


@pytest.mark.parametrize(("width", "lines", "matrix"), [(720, 576, "smpte170m"), (1280, 720, "bt709")])
def test_k2_lines_are_those_that_are_stored_not_shown(tmp_path: Path, width: int, lines: int, matrix: str) -> None:
    # Turned, 720x576 has 720 lines on the screen.
    picture = np.empty((lines, width, 3))
    picture[:] = np.array(RED) / 255
    plain, turned = tagged(tmp_path / "plain.mp4", picture, matrix), tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", turned)
    clip = read_clip(turned, frames=1)
    assert clip.info.height == width
    assert_near(clip.frames[0, 40, 40], RED, 4)


@pytest.mark.parametrize(
    "output",
    [
        ["-c:v", "libx264rgb", "-qp", "0"],
        ["-c:v", "ffv1", "-pix_fmt", "gbrp16le"],
        ["-c:v", "png"],
        ["-c:v", "qtrle"],
        ["-c:v", "rawvideo", "-pix_fmt", "bgr24"],
        ["-c:v", "huffyuv", "-pix_fmt", "rgb24"],
        ["-c:v", "utvideo", "-pix_fmt", "gbrp"],
    ],
    ids=lambda output: "-".join(output[1::2]),
)
@pytest.mark.parametrize("size", [(160, 96), (161, 720)])
def test_k2_rgb_codecs_are_exact(tmp_path: Path, output: list[str], size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, size[1], size[0], 3), np.uint8)
    path = encode(tmp_path / "a.mov", frames, *output)
    assert_near(read_clip(path, frames=2).frames, frames, 1)


@pytest.mark.parametrize(("span", "stored"), [("tv", 16 + 219 * 0.5), ("pc", 127.5)])
def test_k2_grey_video_has_a_range_too(tmp_path: Path, span: str, stored: float) -> None:
    path = tmp_path / "a.mp4"
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", "64x48", "-framerate", "24", "-i", "-"]
    output = ["-vf", f"setparams=range={span}", "-c:v", "libx264", "-qp", "0", "-pix_fmt", "gray"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *output, str(path)]
    subprocess.run(command, input=bytes([round(stored)]) * 64 * 48, check=True, timeout=60)
    assert_near(read_clip(path, frames=1).frames, 128, 2)


# ------------------------------------------------------------------------------------------- wide gamuts and HDR


@pytest.mark.parametrize(
    ("name", "matrix", "to_primaries", "tags"),
    [
        ("bt2020", "bt2020nc", BT2020, {"colorspace": "bt2020nc", "color_trc": "bt2020-10"}),
        ("bt2020", "bt2020nc", BT2020, {}),
        ("smpte432", "bt709", P3, {"colorspace": "bt709", "color_trc": "bt709"}),
    ],
    ids=["bt2020", "bt2020-only-primaries", "p3"],
)
def test_k2_wide_gamuts_are_brought_to_srgb(
    tmp_path: Path, name: str, matrix: str, to_primaries: np.ndarray, tags: dict[str, str]
) -> None:
    signal = ((patches() ** 2.4) @ to_primaries.T) ** (1 / 2.4)  # as displays show it
    path = tagged(tmp_path / "a.mp4", signal, matrix, 10, color_primaries=name, range="tv", **tags)
    assert_patches(path)


@pytest.mark.parametrize("size", [None, (60, 40)])
@pytest.mark.parametrize("span", ["tv", "pc"])
@pytest.mark.parametrize(("curve", "transfer"), [(pq, "smpte2084"), (hlg, "arib-std-b67")], ids=["pq", "hlg"])
def test_k2_hdr_video_is_tone_mapped(
    tmp_path: Path, curve: object, transfer: str, span: str, size: tuple[int, int] | None
) -> None:
    signal = curve(light(patches()) @ BT2020.T)  # type: ignore[operator]
    tags = {"color_primaries": "bt2020", "colorspace": "bt2020nc", "range": span}
    path = tagged(tmp_path / "a.mp4", signal, "bt2020nc", 10, span == "pc", color_trc=transfer, **tags)
    assert transfer in stream_line(path)
    assert_patches(path, size=size)


@pytest.mark.parametrize("container", ["a.mkv", "a.webm", "a.mov", "a.ts"])
def test_k2_hdr_of_all_containers_and_codecs(tmp_path: Path, container: str) -> None:
    plain = tagged(tmp_path / "plain.mkv", pq(light(patches()) @ BT2020.T), "bt2020nc", 10)
    tags = "setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc:range=tv"
    codec = {
        "a.webm": ["-c:v", "libvpx-vp9", "-crf", "4", "-cpu-used", "8"],
        "a.mov": ["-c:v", "prores_ks"],
        "a.mkv": ["-c:v", "libsvtav1", "-crf", "8", "-preset", "12"],
        "a.ts": ["-c:v", "libx265", "-crf", "4", "-x265-params", "log-level=none"],
    }[container]
    pixels = "yuv422p10le" if container == "a.mov" else "yuv420p10le"
    ffmpeg("-i", plain, "-vf", f"format={pixels},{tags}", *codec, tmp_path / container)
    assert_patches(tmp_path / container, 10)


def test_k2_hdr_highlights_keep_their_order_and_colour(tmp_path: Path) -> None:
    steps = np.array([0.5, 0.9, 1, 1.2, 4])  # times white
    picture = np.repeat(np.repeat(steps[None], 16, 1), 32, 0)[..., None] * np.array([1.0, 0.25, 0.25])
    tags = {"color_primaries": "bt709", "color_trc": "smpte2084", "colorspace": "bt709", "range": "tv"}
    frame = read_clip(tagged(tmp_path / "a.mp4", pq(picture), "bt709", 10, **tags), frames=1).frames[0]
    seen = frame[16, 8::16].astype(int)
    assert np.all(np.diff(seen[:-1, 0]) > 0)  # compressed, not clipped
    assert seen[-1, 1] < 160  # still red: not each channel for itself


@pytest.mark.parametrize(("profile", "compatible", "warned"), [(5, 0, True), (8, 1, False), (8, 4, False)])
def test_k2_dolby_vision_without_a_base_is_warned_of(
    tmp_path: Path, profile: int, compatible: int, warned: bool
) -> None:
    path = tmp_path / "a.mp4"
    encode(path, np.full((2, 64, 64, 3), 128, np.uint8), "-c:v", "libx265", "-x265-params", "log-level=none")
    record = bytes([1, 0, profile << 1, 6 << 3 | 0b101, compatible << 4]) + bytes(19)
    box = (8 + len(record)).to_bytes(4, "big") + (b"dvcC" if profile < 8 else b"dvvC") + record
    data = path.read_bytes()
    end = data.index(b"hvcC") - 4
    end += int.from_bytes(data[end : end + 4], "big")
    grown = data[:end] + box + data[end:]
    for parent in (b"hev1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        at = grown.rindex(parent, 0, end) - 4
        size = int.from_bytes(grown[at : at + 4], "big") + len(box)
        grown = grown[:at] + size.to_bytes(4, "big") + grown[at + 4 :]
    path.write_bytes(grown)
    warnings = read_clip(path, frames=2).warnings
    assert [f"a.mp4 is Dolby Vision of profile {profile}" in warning for warning in warnings] == [True] * warned


def test_k2_light_that_is_stored_as_it_is(tmp_path: Path) -> None:
    tags = {"color_primaries": "bt709", "color_trc": "linear", "colorspace": "bt709", "range": "pc"}
    assert_patches(tagged(tmp_path / "a.mkv", light(patches()), "bt709", 10, True, **tags))


@pytest.mark.parametrize(
    ("matrix", "transfer", "reason"),
    [
        ("bt709", "log100", ""),
        ("bt2020nc", "log316", ""),
        ("bt709", "smpte428", "digital cinema"),
        ("bt2020c", "linear", "of a kind that is not read"),
        ("ictcp", "bt709", "ICtCp"),
    ],
)
def test_k7_rare_colours_are_read_or_refused_in_plain_words(
    matrix: str, transfer: str, reason: str, tmp_path: Path
) -> None:
    tags = f"format=yuv444p,setparams=colorspace={matrix}:color_trc={transfer}:color_primaries=bt2020"
    path = encode(tmp_path / "a.mkv", np.full((2, 48, 64, 3), 255, np.uint8), "-vf", tags, "-c:v", "ffv1")
    if not reason:
        assert_near(read_clip(path, frames=2).frames, (255, 255, 255))
        return
    with pytest.raises(EmtError, match=reason) as error:
        read_clip(path, frames=2)
    assert "filter" not in str(error.value), "the words of ffmpeg"


def test_k2_hdr_without_zimg_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"color_primaries": "bt2020", "color_trc": "smpte2084", "colorspace": "bt2020nc", "range": "tv"}
    path = tagged(tmp_path / "a.mp4", pq(light(patches()) @ BT2020.T), "bt2020nc", 10, **tags)
    without = tmp_path / "ffmpeg"  # such as some distributions build it
    without.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in *zscale*) echo "[AVFilterGraph @ 0x0] [error] No such filter: \'zscale\'" >&2; exit 8;; esac\n'
        f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    without.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(without))
    with pytest.raises(EmtError, match=r"a\.mp4 has colours \(bt2020, smpte2084\).*built without zimg") as error:
        read_clip(path, frames=1)
    assert "IMAGEIO_FFMPEG_EXE" in error.value.hint


# ------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    ("name", "output"),
    [("a.avi", ["-c:v", "rawvideo", "-pix_fmt", "bgra"]), ("a.mov", ["-c:v", "qtrle", "-pix_fmt", "argb"])],
)
def test_k2_a_fourth_byte_of_zeros_is_no_transparency(tmp_path: Path, name: str, output: list[str]) -> None:
    # 32-bit AVIs of Windows programs have it as padding; composited, nothing would be left of the clip.
    frames = np.zeros((3, 48, 64, 4), np.uint8)
    frames[..., :3] = RED
    assert_near(read_clip(encode(tmp_path / name, frames, *output), frames=3).frames, RED)


# ------------------------------------------------------------------------------------------- fields


def woven(
    count: int = 12, height: int = 96, width: int = 160, bottom_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a bar that moves 6 pixels a field, as whole pictures of each first field's time, and interlaced."""
    fields = np.full((2 * count, height, width, 3), 60, np.uint8)
    for k, field in enumerate(fields):
        field[:, 6 * k % (width - 20) : 6 * k % (width - 20) + 20] = 200
    frames = fields[::2].copy()
    interlaced = frames.copy()
    later = slice(0, None, 2) if bottom_first else slice(1, None, 2)  # lines of the second field
    interlaced[:, later] = fields[1::2, later]
    return frames, interlaced


def comb(frames: np.ndarray) -> float:
    """How far lines are from the mean of their neighbours."""
    grey = frames.astype(int).mean(-1)
    return float(np.abs(2 * grey[:, 2:-2] - grey[:, 1:-3] - grey[:, 3:-1]).mean())


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("a.mp4", ["-c:v", "libx264", "-qp", "4", "-flags", "+ildct+ilme", "-x264-params", "tff=1"]),
        ("a.mkv", ["-c:v", "libx264", "-qp", "4", "-flags", "+ildct+ilme", "-x264-params", "tff=1"]),
        ("a.mts", ["-c:v", "libx264", "-qp", "4", "-flags", "+ildct+ilme", "-x264-params", "tff=1", "-f", "mpegts"]),
        ("a.mpg", ["-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ildct+ilme"]),
        ("a.mov", ["-c:v", "prores_ks", "-flags", "+ildct"]),
        ("a.avi", ["-c:v", "mpeg4", "-q:v", "2", "-flags", "+ildct+ilme"]),
        ("ffv1.mkv", ["-c:v", "ffv1"]),
        ("mjpeg.mov", ["-c:v", "mjpeg", "-q:v", "2", "-field_order", "tt"]),  # only the container says it
        ("bottom.mov", ["-c:v", "mjpeg", "-q:v", "2", "-field_order", "bb"]),
        ("bottom.mkv", ["-c:v", "ffv1", "-field_order", "bb"]),
        ("utvideo.mov", ["-c:v", "utvideo", "-pix_fmt", "yuv422p", "-field_order", "tt"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_k2_interlaced_video_is_deinterlaced(tmp_path: Path, name: str, output: list[str]) -> None:
    bottom_first = "bb" in output
    whole, interlaced = woven(bottom_first=bottom_first)
    order = "setfield=bff" if bottom_first else "setfield=tff"
    clip = read_clip(encode(tmp_path / name, interlaced, "-vf", order, *output), frames=12)
    assert clip.info.frames == 12
    assert comb(clip.frames) < comb(interlaced) / 8
    edges = np.abs(clip.frames[2:-2].astype(int) - whole[2:-2]).mean()
    assert edges < np.abs(interlaced[2:-2].astype(int) - whole[2:-2]).mean() / 2  # the right field's time, too


def test_k2_fields_that_come_late_in_a_stream(tmp_path: Path) -> None:
    whole, interlaced = woven()
    for name, frames, flags in (
        ("first.ts", whole, []),
        ("then.ts", interlaced, ["-flags", "+ildct+ilme", "-x264-params", "tff=1"]),
    ):
        fields = ["-vf", "setfield=tff"] if flags else []
        encode(tmp_path / name, frames, *fields, "-c:v", "libx264", "-qp", "4", "-g", "12", *flags)
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "first.ts").read_bytes() + (tmp_path / "then.ts").read_bytes())
    clip = read_clip(both, frames=24)
    assert clip.info.frames == 24
    assert comb(clip.frames[13:]) < comb(interlaced) / 8
    assert_near(clip.frames[:11], whole[:11], 16)


def test_progressive_video_stays_as_it_is(tmp_path: Path) -> None:
    frames = np.zeros((6, 96, 160, 3), np.uint8)
    frames[:, ::2] = 200  # lines that a deinterlacer would take for a comb
    assert_near(read_clip(encode(tmp_path / "a.mp4", frames), frames=6).frames, frames, 3)


@pytest.mark.parametrize("size", [(2, 2), (6, 6), (8, 14)])
def test_a_few_interlaced_lines_are_read_all_the_same(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.full((3, size[1], size[0], 3), 128, np.uint8)
    path = encode(tmp_path / "a.mkv", frames, "-vf", "setfield=tff", "-c:v", "ffv1", "-pix_fmt", "yuv420p")
    assert_near(read_clip(path, frames=3).frames, 128, 2)


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_k2_written_clips_have_all_three_colour_tags(tmp_path: Path, name: str) -> None:
    write_clip(tmp_path / name, np.full((4, 64, 64, 3), 128, np.uint8), 24)
    # ffmpeg writes one name if matrix, primaries and transfer have the same.
    assert re.search(r"yuv420p\(tv, bt709[,)]", stream_line(tmp_path / name))


def test_only_what_zimg_converts_keeps_its_range_while_it_is_scaled():
    pq = Colours(matrix="bt2020nc", transfer="smpte2084", range="tv")
    assert pq.while_scaling() == ":in_range=limited:out_range=limited"
    assert (
        Colours(matrix="bt2020nc", transfer="smpte2084", range="pc").while_scaling() == ":in_range=full:out_range=full"
    )
    assert Colours(transfer="smpte2084", rgb=True).while_scaling() == ""
    assert Colours(matrix="bt709", transfer="bt709").while_scaling() == ""
    assert any("npl=203" in part for part in pq.after_scaling(alpha=False))
    assert any("peak=4.926108" in part for part in pq.after_scaling(alpha=False)), "1000 cd/m² to a white of 203"
