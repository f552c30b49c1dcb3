"""Which files are clips, which are frames of one, which are left unread and why; animated pictures; folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import EXACT, assert_near, encode, ffmpeg, numbered, numbers
from PIL import Image, PngImagePlugin

import emt.video.pictures
from emt.errors import EmtError
from emt.video import describe_unread, is_clip, natural_key, probe, read_clip, read_metadata, unread_files
from emt.video.kinds import UNREAD_VIDEO_SUFFIXES, VIDEO_SUFFIXES

LOSSY = ["-pix_fmt", "yuv420p", "-b:v", "4M"]
WRITTEN = {
    ".mp4": EXACT,
    ".m4v": EXACT,
    ".mov": EXACT,
    ".3gp": ["-c:v", "h263", "-s", "128x96", "-q:v", "1"],
    ".mkv": EXACT,
    ".webm": ["-c:v", "libvpx-vp9", "-lossless", "1", "-cpu-used", "8"],
    ".avi": ["-c:v", "mjpeg", "-q:v", "1"],
    ".divx": ["-c:v", "mpeg4", "-q:v", "1", "-f", "avi"],
    ".mpg": ["-c:v", "mpeg1video", *LOSSY],
    ".mpeg": ["-c:v", "mpeg2video", *LOSSY],
    ".vob": ["-c:v", "mpeg2video", *LOSSY, "-f", "dvd"],
    ".m2v": ["-c:v", "mpeg2video", *LOSSY],
    ".ts": EXACT,
    ".mts": [*EXACT, "-f", "mpegts"],
    ".m2ts": [*EXACT, "-f", "mpegts", "-mpegts_m2ts_mode", "1"],
    ".flv": ["-c:v", "libx264", "-qp", "1", "-pix_fmt", "yuv420p"],
    ".wmv": ["-c:v", "wmv2", "-q:v", "1"],
    ".asf": ["-c:v", "wmv1", "-q:v", "1"],
    ".ogv": ["-c:v", "libtheora", "-q:v", "10"],
    ".mxf": ["-c:v", "mpeg2video", *LOSSY],
    ".dv": ["-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p"],
    ".nut": ["-c:v", "ffv1"],
    ".y4m": ["-pix_fmt", "yuv444p"],
    ".ivf": ["-c:v", "libvpx-vp9", "-lossless", "1", "-cpu-used", "8"],
    ".h264": EXACT,
    ".hevc": ["-c:v", "libx265", "-x265-params", "log-level=none:lossless=1"],
    ".rm": ["-c:v", "rv20", "-q:v", "1"],
    ".wtv": ["-c:v", "mpeg2video", *LOSSY],
}
"""A codec for each container; benchmarks/containers.py tries all of them."""


def test_k2_theora_is_read_alike_every_time(tmp_path: Path) -> None:
    """On several threads ffmpeg's decoder gave other frames in every fourth run."""
    path = encode(tmp_path / "a.ogv", numbered(12, 128, 96), *WRITTEN[".ogv"])
    for _ in range(20):
        assert numbers(read_clip(path, frames=12).frames) == list(range(12))


@pytest.mark.parametrize("suffix", WRITTEN)
def test_k2_every_container_is_read(tmp_path: Path, suffix: str) -> None:
    path = encode(tmp_path / f"a{suffix}", numbered(12, 128, 96), *WRITTEN[suffix])
    assert is_clip(path)
    clip = read_clip(path, frames=12)
    assert clip.info.frames == 12
    assert numbers(clip.frames) == list(range(12))
    assert clip.info.fps == pytest.approx(25, rel=0.02)
    assert clip.warnings == ()
    assert not unread_files(tmp_path)


def test_the_documentation_lists_what_is_read() -> None:
    text = (Path(__file__).parents[1] / "docs/reading-video.md").read_text()
    assert not [suffix for suffix in VIDEO_SUFFIXES if f"`{suffix}`" not in text]


@pytest.mark.parametrize("suffix", sorted(UNREAD_VIDEO_SUFFIXES)[:3])
def test_video_that_is_not_read_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"video")
    with pytest.raises(EmtError, match=rf"a\{suffix} has the suffix '\{suffix}', which is not read") as error:
        probe(path)
    assert "ffmpeg -i INPUT" in error.value.hint
    assert ".mts" in error.value.hint


# ------------------------------------------------------------------------------------------- folders


def frames_in(folder: Path, count: int = 3, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for k, picture in enumerate(numbered(count)):
        Image.fromarray(picture).save(folder / f"{k}{suffix}")
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.MTS", "a.flv", "a.swf", "a.gif"])
def test_k2_a_folder_that_holds_video_is_a_folder_of_clips(tmp_path: Path, name: str) -> None:
    folder = frames_in(tmp_path / "both")
    assert is_clip(folder)
    (folder / name).write_bytes(b"video")
    assert not is_clip(folder)


def test_k2_links_and_folders_beside_frames(tmp_path: Path) -> None:
    folder = frames_in(tmp_path / "both")
    (folder / "b.mp4").mkdir()
    (folder / ".c.mp4").touch()
    (folder / "notes.txt").touch()
    assert is_clip(folder)
    (folder / "a.mp4").symlink_to("nowhere.mp4")
    assert not is_clip(folder)


def test_a_folder_of_animations_is_a_folder_of_clips(tmp_path: Path) -> None:
    folder = tmp_path / "stickers"
    folder.mkdir()
    animation(folder / "1.webp")
    animation(folder / "2.png")
    assert not is_clip(folder)
    assert is_clip(folder / "1.webp")
    assert is_clip(folder / "2.png")
    assert not unread_files(folder)


def test_k7_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = frames_in(tmp_path / "clips")
    encode(folder / "a.mts", numbered(3), *EXACT, "-f", "mpegts")
    for name in ("a.txt", "a.mts.json", ".hidden", "Thumbs.db", "old.swf", "README", "10.pdf", "9.pdf"):
        (folder / name).touch()
    (folder / "b.mp4").symlink_to("nowhere.mp4")
    (folder / "more").mkdir()
    os.mkfifo(folder / "c.mp4")
    assert unread_files(folder) == {
        "0.png": "a picture beside clips",
        "1.png": "a picture beside clips",
        "2.png": "a picture beside clips",
        "9.pdf": ".pdf is not read",
        "10.pdf": ".pdf is not read",
        "b.mp4": "a link that leads nowhere",
        "c.mp4": "no file but a pipe, socket or device",
        "old.swf": ".swf is not read",
        "README": "no suffix",
    }
    assert list(unread_files(folder)) == sorted(unread_files(folder), key=natural_key)
    line = describe_unread(folder, names=3)
    assert line.startswith(f"ignored 9 files in {folder}: 0.png and 2 more (a picture beside clips), ")
    assert "9.pdf and 1 more (.pdf is not read)" in line
    assert line.endswith(", others")
    assert "\n" not in line


def test_k7_a_folder_of_which_all_is_read(tmp_path: Path) -> None:
    assert unread_files(frames_in(tmp_path / "frames")) == {}
    assert describe_unread(tmp_path / "frames") == ""
    (tmp_path / "frames/notes.md").touch()
    assert (
        describe_unread(tmp_path / "frames") == f"ignored 1 file in {tmp_path / 'frames'}: notes.md (.md is not read)"
    )
    with pytest.raises(EmtError, match="does not exist"):
        unread_files(tmp_path / "missing")


def test_natural_order_everywhere() -> None:
    names = ["clip10.mp4", "Clip9.mp4", "clip2.mp4", "clip002.mp4", "a1b10", "a1b9", "①.png"]
    assert sorted(names, key=natural_key) == [
        "a1b9",
        "a1b10",
        "clip002.mp4",
        "clip2.mp4",
        "Clip9.mp4",
        "clip10.mp4",
        "①.png",
    ]


def test_k8_a_folder_of_a_thousand_images_is_seen_at_once(tmp_path: Path) -> None:
    first = frames_in(tmp_path, 1) / "0.png"
    for k in range(1, 1000):
        os.link(first, tmp_path / f"{k}.png")
    opened: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{tmp_path}{os.sep}"):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)  # stays, and hears nothing more of this folder
    assert is_clip(tmp_path)
    assert probe(tmp_path).frames == 1000
    assert len(opened) <= 3  # names are looked at, and the first image


# ------------------------------------------------------------------------------------------- animated pictures


def animation(path: Path, count: int = 12, ms: object = 40, **options: object) -> Path:
    images = [Image.fromarray(picture) for picture in numbered(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=ms, loop=0, lossless=True, **options)
    return path


@pytest.mark.parametrize(("name", "kind"), [("a.webp", "WEBP"), ("a.png", "PNG"), ("a.apng", "PNG"), ("a.gif", "WEBP")])
def test_k7_animated_pictures_are_clips(tmp_path: Path, name: str, kind: str) -> None:
    path = animation(tmp_path / name, format=kind)
    assert is_clip(path)
    clip = read_clip(path, frames=12)
    assert numbers(clip.frames) == list(range(12))
    assert (clip.info.frames, clip.info.fps, clip.info.duration) == (12, 25, 0.48)
    assert numbers(read_clip(path, frames=3, start=0.2, stride=2).frames) == [5, 7, 9]
    assert read_metadata(path) == {}


def test_animations_play_at_their_own_times(tmp_path: Path) -> None:
    for name in ("a.webp", "a.png"):
        path = animation(tmp_path / name, 4, [100, 300, 5, 100])  # 5 ms: shown for 100, as browsers do
        clip = read_clip(path, frames=4, stride=1)
        assert clip.times == (0, 0.1, 0.4, 0.5)
        assert clip.info.duration == pytest.approx(0.6)
        assert numbers(clip.frames) == [0, 1, 2, 3]


def test_an_animation_with_another_picture_for_old_viewers(tmp_path: Path) -> None:
    images = [Image.fromarray(picture) for picture in numbered(4)]
    images[3].save(tmp_path / "a.png", save_all=True, append_images=images[:3], duration=40, default_image=True)
    assert numbers(read_clip(tmp_path / "a.png", frames=3).frames) == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_animations_are_composited_over_white(tmp_path: Path, suffix: str) -> None:
    images = []
    for k in range(3):
        image = Image.new("RGBA", (32, 24), (0, 0, 0, 1))  # at 0, Pillow writes no alpha at all
        image.paste((255, 0, 0, 255), (8 * k, 0, 8 * k + 8, 24))
        images.append(image)
    options = {"lossless": True} if suffix == ".webp" else {"disposal": 1, "blend": 0}
    images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:], duration=40, **options)
    for k, frame in enumerate(read_clip(tmp_path / f"a{suffix}", frames=3).frames):
        expected = np.full((24, 32, 3), 255, np.uint8)
        expected[:, 8 * k : 8 * k + 8] = (255, 0, 0)
        assert_near(frame, expected, 12)


def test_k7_a_picture_that_is_no_clip(tmp_path: Path) -> None:
    for name, kind in (("a.webp", "WebP "), ("a.png", "PNG "), ("a.jpg", ""), ("a.bmp", "")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        assert not is_clip(tmp_path / name)
        with pytest.raises(EmtError, match=rf"cannot be read as a video: it is one {kind}picture"):
            read_clip(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", "WEBP")
    with pytest.raises(EmtError, match="has 1 frame, but 16 are needed"):
        read_clip(tmp_path / "a.gif")
    (tmp_path / "b.webp").write_bytes(b"text")
    with pytest.raises(EmtError, match="it is no WEBP picture"):
        read_clip(tmp_path / "b.webp")


def test_an_animation_among_frames_is_named(tmp_path: Path) -> None:
    animation(frames_in(tmp_path) / "2.png")
    with pytest.raises(EmtError, match=r"2\.png is an animation"):
        read_clip(tmp_path, frames=3)


# ------------------------------------------------------------------------------------------- pictures that are bad


def test_k5_a_gif_with_damaged_sizes_is_one_error(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.gif", numbered(3), "-c:v", "gif")
    data = bytearray(path.read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    for read in (probe, read_clip, read_metadata):
        with pytest.raises(EmtError, match=r"a\.gif"):
            read(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "BMP"])
@pytest.mark.parametrize("animated", [False, True])
def test_k5_every_exception_of_pillow_is_one_error(tmp_path: Path, kind: str, animated: bool) -> None:
    if animated and kind not in ("PNG", "WEBP"):
        pytest.skip("never animated")
    suffix = {"JPEG": ".jpg"}.get(kind, f".{kind.lower()}")
    good = tmp_path / f"good{suffix}"
    animation(good, 3) if animated else Image.fromarray(numbered(1)[0]).save(good)
    data, chance = good.read_bytes(), np.random.default_rng(0)
    folder = tmp_path / "frames"
    folder.mkdir()
    path = folder / f"a{suffix}"
    for _ in range(60):
        broken = np.frombuffer(data, np.uint8).copy()
        places = chance.integers(0, len(broken), 6)
        broken[places] = chance.integers(0, 256, 6)
        path.write_bytes(broken.tobytes()[: chance.integers(len(broken) // 2, len(broken) + 1)])
        for reference in (folder, path) if kind in ("PNG", "WEBP") else (folder,):
            try:
                assert read_clip(reference, frames=1, size=(16, 16)).frames.shape == (1, 16, 16, 3)
            except EmtError as error:
                assert str(reference.name) in error.problem.splitlines()[-1]  # noqa: PT017


def test_a_damaged_note_about_the_picture_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png"):
        Image.fromarray(numbered(1)[0]).save(tmp_path / name, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert numbers(read_clip(tmp_path, frames=2).frames) == [0, 0]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("kind", [b"gAMA", b"tRNS", b"cHRM", b"acTL", b"fcTL", b"eXIf"])
def test_k5_chunks_that_are_too_short_are_at_most_one_error(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk(kind, b"II*\0") + data[33:])
    try:
        read_clip(tmp_path, frames=1)
    except EmtError as error:
        said = ("a.png cannot be read as an image: ", "a.png is no image")  # the second of Pillow 10
        assert any(text in error.problem for text in said)  # noqa: PT017
    assert not is_clip(path)


def large_png(path: Path, width: int, height: int) -> Path:
    """A black PNG, compressed a thousandfold: many pixels in a small file."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_k6_memory_for_a_picture_is_bounded(tmp_path: Path) -> None:
    large_png(tmp_path / "a.png", 11_500, 11_500)
    assert (tmp_path / "a.png").stat().st_size < 4 << 20
    script = f"""
import resource, sys
from emt.errors import EmtError
from emt.video import read_clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: read_clip({str(tmp_path)!r}, frames=1, size=(512, 512))
except EmtError as error: print(error.problem)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    problem, kilobytes = done.stdout.splitlines()
    assert "a.png cannot be read as an image: 11500x11500 is too large (67,108,864 pixels are read)" in problem
    assert int(kilobytes) < 50_000
    assert not done.stderr  # no warning of Pillow's beside it


def test_k6_video_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    ffmpeg(
        "-f", "lavfi", "-i", "color=gray:s=9000x8000", "-frames:v", "1", "-c:v", "rawvideo", "-pix_fmt", "gray", path
    )
    with pytest.raises(EmtError, match=r"a\.mkv is 9000x8000, too large") as error:
        read_clip(path, frames=1, size=(8, 8))
    assert "67,108,864 pixels" in error.value.hint


def test_k6_large_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(emt.video.pictures, "_LARGE", 1)
    place, inside, most = emt.video.pictures.place, [0], [0]

    def watched(*arguments: object) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        place(*arguments)  # type: ignore[arg-type]
        inside[0] -= 1

    monkeypatch.setattr(emt.video.pictures, "place", watched)
    folder = frames_in(tmp_path / "frames")
    threads = [threading.Thread(target=read_clip, args=(folder,), kwargs={"frames": 3}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_k6_the_work_for_an_animation_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.webp")
    monkeypatch.setattr(emt.video.pictures, "_MOST_WORK", 12 * 32 * 24 - 1)
    with pytest.raises(EmtError, match=r"a\.webp has 12 frames of 32x24, too many for an animation"):
        probe(path)
    monkeypatch.setattr(emt.video.pictures, "_MOST_WORK", 12 * 32 * 24)
    assert probe(path).frames == 12


def test_k6_text_in_a_picture_is_bounded(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (80 << 20), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(EmtError, match=r"a\.png cannot be read as an image"):
        read_clip(tmp_path, frames=1)


# ------------------------------------------------------------------------------------------- nothing else is opened


@pytest.mark.parametrize("name", ["list.ts", "list.mpg", "list.mkv", "list.flv", "list.avi", "list.wmv", "list.h264"])
def test_k6_what_a_file_holds_opens_no_other_file(tmp_path: Path, name: str) -> None:
    """Playlists and lists by another name are refused, whatever they point to."""
    secret = encode(tmp_path / "secret.mp4", numbered(12))
    segment = encode(tmp_path / "segment.ts", numbered(12), *EXACT)
    for content in (
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{segment}\n#EXT-X-ENDLIST\n",
        f'<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation><BaseURL>{secret}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\nc=IN IP4 127.0.0.1\n",
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(EmtError, match=name):
            probe(tmp_path / name)


def test_k6_a_reference_to_another_file_inside_a_movie_is_not_followed(tmp_path: Path) -> None:
    movie = encode(tmp_path / "a.mov", numbered(12))
    secret = encode(tmp_path / "secret.mov", numbered(24)[12:])
    data = movie.read_bytes()
    at = data.index(b"dref")
    size = int.from_bytes(data[at - 4 : at], "big")
    url = str(secret).encode()
    alias = (
        b"\0\0\0\0"
        + b"\0" * 4
        + b"\0\x02"
        + b"\0" * 136
        + b"\0\x02"
        + len(url).to_bytes(2, "big")
        + url
        + b"\xff\xff\0\0"
    )
    entry = (12 + len(alias)).to_bytes(4, "big") + b"alis" + alias
    box = (16 + len(entry)).to_bytes(4, "big") + b"dref" + b"\0\0\0\0\0\0\0\1" + entry
    grown = data[: at - 4] + box + data[at - 4 + size :]
    for parent in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        where = grown.rindex(parent, 0, at)
        old = int.from_bytes(grown[where - 4 : where], "big")
        grown = grown[: where - 4] + (old + len(box) - size).to_bytes(4, "big") + grown[where:]
    movie.write_bytes(grown)
    try:
        assert max(numbers(read_clip(movie, frames=12).frames)) < 12
    except EmtError as error:
        assert "a.mov" in error.problem  # noqa: PT017


def test_k6_the_first_argument_of_ffmpeg_is_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a wrapper that writes down its arguments: each process opens the one file, with both whitelists."""
    path = encode(tmp_path / "a.mp4", numbered(12))
    seen = tmp_path / "seen"
    wrapper = tmp_path / "ffmpeg"
    wrapper.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {seen}\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(wrapper))
    read_clip(path, frames=3)
    read_metadata(path)
    calls = seen.read_text().splitlines()
    assert len(calls) == 3
    for call in calls:
        assert call.count(" -i ") == 1
        assert f" -i file:{path} " in f"{call} "
        assert "-protocol_whitelist file -format_whitelist mov," in call
        for other in ("concat", "hls", "dash", "image2", "sdp", "rtp", "http"):
            assert other not in call.split("-format_whitelist ")[1].split()[0].split(",")


def test_sound_only_is_no_video(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.ts", "a.wmv", "a.ogv"):
        codec = ["-c:a", "libvorbis"] if name == "a.ogv" else []
        ffmpeg("-f", "lavfi", "-i", "sine=d=1", *codec, tmp_path / name)
        with pytest.raises(EmtError, match=f"{name} has no video in it"):
            probe(tmp_path / name)


def test_k7_pillow_says_nothing_on_stderr(tmp_path: Path) -> None:
    """Neither of large pictures, which it takes for attacks, nor of damaged notes inside one."""
    Image.new("1", (9600, 9600)).convert("L").save(tmp_path / "a.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03")
    script = f"""
from pathlib import Path
from emt.errors import EmtError
from emt.video import read_clip
for name in ("a", "b"):
    folder = Path({str(tmp_path)!r}, name)
    folder.mkdir()
    (folder.parent / (name + ".jpg")).rename(folder / "0.jpg")
    print(read_clip(folder, frames=1, size=(8, 8)).frames.max())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
    assert not done.stderr
