"""Clips for tests, made with ffmpeg by a route that shares nothing with `emt.video`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

EXACT = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-pix_fmt", "yuv444p"]  # lossless, any size
X265 = ["-c:v", "libx265", "-x265-params", "log-level=none"]


def ffmpeg(*arguments: object) -> None:
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", "-nostdin", "-y", *map(str, arguments)], check=True, timeout=300)


def encode(path: Path, frames: np.ndarray, *output: object, fps: object = 25, before: tuple[object, ...] = ()) -> Path:
    """Frames (RGB or RGBA) to a file, by a route that shares nothing with `write_clip`."""
    height, width, channels = frames.shape[1:]
    pixels = "rgba" if channels == 4 else "rgb24"
    raw = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-framerate", str(fps), "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *before, *raw, *(output or EXACT), f"file:{path}"]
    subprocess.run(list(map(str, command)), input=frames.tobytes(), check=True, timeout=300)
    return path


def numbered(count: int, width: int = 32, height: int = 24) -> np.ndarray:
    """Frame k is grey of level 20 + 4k, so that a decoded frame tells its number."""
    levels = (20 + 4 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(np.mean(frame)) - 20) / 4) for frame in frames]


def quadrants(width: int, height: int) -> np.ndarray:
    """Red, green over blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    picture[height // 2 :, width // 2 :] = 255
    return picture


def assert_near(actual: np.ndarray, expected: object, tolerance: int = 6) -> None:
    assert np.abs(actual.astype(int) - np.asarray(expected).astype(int)).max() <= tolerance
