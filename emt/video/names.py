"""Paths as messages show them, and errors of the file system as `EmtError`."""

from __future__ import annotations

import errno
import re
import shlex
from pathlib import Path

from emt.errors import EmtError


def show(path: Path) -> str:
    """Path for a message: as it is, or quoted with escapes where it holds something that does not print."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def quote(path: Path) -> str:
    """Path for a shell command in a hint."""
    return shlex.quote(str(path)) if str(path).isprintable() else repr(str(path))


def describe_part(start: float, duration: float | None) -> str:
    """Part of a clip after its number of frames: ` in the part from 2 s on`; start and duration in seconds."""
    return f" in the part from {start:g} s" + (" on" if duration is None else f" lasting {duration:g} s")


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key of natural order: numbers by value (`2.png` before `10.png`), letters whatever their case."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in parts], name


def unusable(path: Path, error: Exception, verb: str, allowed: str = "") -> EmtError:
    """Error of the file system as one for users.

    Args:
        path: The file or folder.
        error: An `OSError`, or a `ValueError` of a path that no file can have.
        verb: "read" or "write".
        allowed: The hint where the reason suggests no better one.
    """
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT:
        return EmtError(f"{show(path)} does not exist.", f"See what there is: ls {quote(path.parent)}")
    if code in (errno.EACCES, errno.EPERM):
        return EmtError(f"No permission to {verb} {show(path)}.", f"See who may: ls -ld {quote(path)}")
    if code in (errno.ENOSPC, errno.EDQUOT):
        return EmtError(
            f"No space left on the disk to {verb} {show(path)}.",
            f"Free some (df -h {quote(path.parent)}), or write to another disk with -o.",
        )
    return EmtError(f"Cannot {verb} {show(path)}: {reason}.", allowed)
