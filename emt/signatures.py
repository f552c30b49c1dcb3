"""Signatures of files: what they are by their first bytes, whatever their names say."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

LENGTH = 64
"""Bytes of a file that tell its kind."""

_PICTURES = {
    "a PNG picture": rb"\x89PNG\r\n\x1a\n",
    "a JPEG picture": rb"\xff\xd8\xff",
    "a WebP picture": rb"RIFF....WEBP",
}
_VIDEOS = {
    "an MP4 or QuickTime video": rb"....ftyp",
    "a Matroska or WebM video": rb"\x1aE\xdf\xa3",
    "an AVI video": rb"RIFF....AVI ",
    "a GIF": rb"GIF8[79]a",
}
_OTHERS = {
    "a GGUF file": rb"GGUF",
    "an HDF5 file, such as Keras saves": rb"\x89HDF\r\n",
    "an array of numpy": rb"\x93NUMPY",
    "a document or archive (zip)": rb"PK\x03\x04",
    "a gzip archive": rb"\x1f\x8b",
    "a 7z archive": rb"7z\xbc\xaf",
    "a RAR archive": rb"Rar!\x1a",
    "a PDF": rb"(?i:%pdf-)",
    "RTF": rb"\{\\rtf",
    "a document of an office program": rb"\xd0\xcf\x11\xe0",
    "a web page": rb"(?i:\s*<(?:!doctype html|html))",
    "a pointer of Git LFS": rb"version https://git-lfs",
}
_KINDS = [(name, re.compile(start, re.DOTALL)) for name, start in (_PICTURES | _VIDEOS | _OTHERS).items()]


def kind_of(head: bytes) -> str:
    """Kind of a file in words, such as "a gzip archive", by its first `LENGTH` bytes; empty if it is none of these."""
    return next((name for name, start in _KINDS if start.match(head)), "")


def kind_of_file(path: Path) -> str:
    """`kind_of` of a file; empty if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return kind_of(file.read(LENGTH))
    return ""


def picture_format(path: Path) -> str:
    """Format of a file that is a picture, PNG, JPEG or WebP; empty for any other, and for one that cannot be read."""
    kind = kind_of_file(path)
    return kind.split()[1] if kind in _PICTURES else ""


def holds_no_video(kind: str) -> bool:
    """Return whether a file of a kind that `kind_of` names is neither a picture nor a video."""
    return kind in _OTHERS
