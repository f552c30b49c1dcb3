"""The reference's sound, taken along for the time that is sampled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import EXACT, encode, ffmpeg, numbered, numbers

from emt.errors import EmtError
from emt.video import Sound, probe, read_clip, read_metadata, sampled_sound, write_clip

RATE = 16_000
LOW, HIGH = 440, 1760
SWITCH = 2.0  # seconds at which the tone changes from low to high


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of 10 numbered frames each, with a tone that changes in the middle, in some containers."""
    folder = tmp_path_factory.mktemp("sound")
    silent = encode(folder / "silent.mp4", numbered(40), fps=10)
    tone = f"aevalsrc='0.5*sin(2*PI*t*if(lt(t,{SWITCH}),{LOW},{HIGH}))':s=48000:d=4"
    for name, audio in (
        ("a.mp4", ["-c:a", "aac"]),
        ("a.mkv", ["-c:a", "flac"]),
        ("a.ts", ["-c:a", "mp2"]),
        ("a.avi", ["-c:a", "pcm_s16le", "-c:v", "mpeg4", "-q:v", "1"]),
        ("surround.mkv", ["-c:a", "ac3", "-ac", "6"]),
    ):
        ffmpeg("-i", silent, "-f", "lavfi", "-i", tone, "-c:v", "copy", *audio, folder / name)
    ffmpeg("-i", folder / "a.mkv", "-c", "copy", "-output_ts_offset", "100", folder / "late.mkv")
    return folder


def heard(path: Path) -> np.ndarray:
    """The sound of a file, mono."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a:0"]
    raw = subprocess.run([*command, *f"-ac 1 -ar {RATE} -f f32le -".split()], capture_output=True, check=True)
    return np.frombuffer(raw.stdout, np.float32)


def pitch(samples: np.ndarray) -> float:
    """Frequency of the loudest tone; 0 if there is silence."""
    if np.abs(samples).max() < 0.01:
        return 0.0
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * RATE / len(samples))


def switch(samples: np.ndarray) -> float:
    """Seconds at which the low tone ends."""
    step = RATE // 50
    high = [pitch(samples[at : at + step]) > 1000 for at in range(0, len(samples) - step, step)]
    return high.index(True) * step / RATE


FRAMES = np.full((15, 32, 32, 3), 100, np.uint8)


@pytest.mark.parametrize("result", ["out.mp4", "out.webm"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "late.mkv", "surround.mkv"])
def test_the_sampled_times_sound_goes_along(tmp_path: Path, folder: Path, name: str, result: str) -> None:
    clip = read_clip(folder / name, frames=15, start=1.5, duration=1.5)
    assert numbers(clip.frames) == pytest.approx(range(15, 30), abs=1)
    assert clip.sound is not None
    assert clip.sound.duration == pytest.approx(1.5, abs=0.02)
    path = write_clip(tmp_path / result, FRAMES, clip.fps, sound=clip.sound, metadata={"a": "b"})
    samples = heard(path)
    assert len(samples) / RATE == pytest.approx(1.5, abs=0.05)
    assert switch(samples) == pytest.approx(SWITCH - 1.5, abs=0.06)
    info = probe(path)
    assert (info.frames, info.sound, info.warnings) == (15, True, ())
    assert info.duration == pytest.approx(1.5, abs=0.02)
    assert read_metadata(path) == {"a": "b"}


@pytest.mark.parametrize("faster", [0.3, 0.5, 2.0, 3.0])
def test_sound_is_as_fast_as_the_frames_at_its_own_pitch(tmp_path: Path, folder: Path, faster: float) -> None:
    clip = read_clip(folder / "a.mkv", frames=30, start=0.5, duration=3)
    frames = np.repeat(FRAMES[:1], 30, 0)
    samples = heard(write_clip(tmp_path / "a.mp4", frames, clip.fps * faster, sound=clip.sound))
    assert len(samples) / RATE == pytest.approx(3 / faster, abs=0.06)
    assert switch(samples) == pytest.approx(1.5 / faster, abs=0.1)
    assert pitch(samples[: int(0.4 * RATE)]) == pytest.approx(LOW, rel=0.03)
    assert pitch(samples[-int(0.4 * RATE) :]) == pytest.approx(HIGH, rel=0.03)


def test_sound_that_starts_later_or_ends_earlier_is_silent_there(tmp_path: Path, folder: Path) -> None:
    silent = folder / "silent.mp4"
    ffmpeg("-i", silent, "-itsoffset", "1", "-f", "lavfi", "-i", "sine=f=440:d=1.5", "-c:v", "copy", tmp_path / "a.mkv")
    clip = read_clip(tmp_path / "a.mkv", frames=40)
    samples = heard(write_clip(tmp_path / "b.mp4", np.repeat(FRAMES[:1], 40, 0), clip.fps, sound=clip.sound))
    assert len(samples) / RATE == pytest.approx(4, abs=0.05)
    assert [round(pitch(samples[int(t * RATE) :][: RATE // 4])) for t in (0.4, 1.5, 2.1, 3.0)] == [0, 440, 440, 0]


def test_where_there_is_no_sound(tmp_path: Path, folder: Path) -> None:
    assert read_clip(folder / "silent.mp4").sound is None
    assert sampled_sound(folder / "silent.mp4") is None
    assert sampled_sound(encode(tmp_path / "a.gif", numbered(20), "-c:v", "gif")) is None
    assert probe(write_clip(tmp_path / "a.mp4", FRAMES, 8)).sound is False


def test_the_sound_of_a_clip_whose_frames_need_not_be_read(folder: Path) -> None:
    for part in ({"frames": 15, "start": 1.5, "duration": 1.5}, {"frames": 8, "stride": 2}, {"frames": 1}):
        clip = read_clip(folder / "late.mkv", **part)  # type: ignore[arg-type]
        assert sampled_sound(folder / "late.mkv", **part) == clip.sound  # type: ignore[arg-type]
    assert clip.sound
    assert clip.sound.start == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("name", ["a.gif", "frames"])
def test_clips_that_cannot_have_sound(tmp_path: Path, folder: Path, name: str) -> None:
    with pytest.raises(EmtError, match="there is no sound in such clips"):
        write_clip(tmp_path / name, FRAMES, 8, sound=Sound(folder / "a.mp4", 0, 1))
    assert not list(tmp_path.iterdir())


def test_sound_that_cannot_be_read_is_named(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "gone.mp4"
    for content in (None, b"text"):
        if content:
            path.write_bytes(content)
        with pytest.raises(EmtError, match=r"The sound of .*gone\.mp4 cannot be read"):
            write_clip(tmp_path / "a.mp4", FRAMES, 8, sound=Sound(path, 0, 1))
    assert not (tmp_path / "a.mp4").exists()
    assert numbers(read_clip(encode(tmp_path / "b.mp4", numbered(3), *EXACT), frames=1).frames) == [0]
