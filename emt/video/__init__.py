"""Clips in and out: sampled frames as arrays, through the ffmpeg that imageio-ffmpeg brings along.

Frames are read in the colours, order and size that players show: docs/reading-video.md says which files and how.
Transparent pixels are composited over white. `fit="pad"` adds black bars.
"""

from __future__ import annotations

from emt.video.clip import (
    FITS,
    FOLDER_FPS,
    MAX_FRAMES,
    MAX_PIXELS,
    SPARSE_SECONDS,
    Clip,
    ClipInfo,
    Fit,
    Sound,
)
from emt.video.kinds import VIDEO_SUFFIXES, describe_unread, is_clip, unread_files
from emt.video.names import natural_key
from emt.video.pictures import IMAGE_SUFFIXES
from emt.video.reading import count_frames, probe, read_clip, sampled_sound
from emt.video.writing import MAX_METADATA, check_place, read_metadata, write_clip

__all__ = [
    "FITS",
    "FOLDER_FPS",
    "IMAGE_SUFFIXES",
    "MAX_FRAMES",
    "MAX_METADATA",
    "MAX_PIXELS",
    "SPARSE_SECONDS",
    "VIDEO_SUFFIXES",
    "Clip",
    "ClipInfo",
    "Fit",
    "Sound",
    "check_place",
    "count_frames",
    "describe_unread",
    "is_clip",
    "natural_key",
    "probe",
    "read_clip",
    "read_metadata",
    "sampled_sound",
    "unread_files",
    "write_clip",
]
