"""Files that are there whole or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

from emt.errors import EmtError

PARTIAL = ".emt-partial-"
"""How the names of files begin that are being written; what a killed process left has such a name."""


def partial_beside(path: Path) -> Path:
    """A name in the folder of `path` to write under before renaming."""
    return path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")


def check_readable(path: Path) -> os.stat_result:
    """The status of a reference, if it is a file or a folder; opening a pipe or a device would wait for ever.

    Raises:
        EmtError: it is missing, may not be read, or is something else.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EmtError(f"cannot read {path.name}: {reason}", f"The whole path is {path}.") from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise EmtError(f"{path.name} is neither a file nor a folder", "Save the stream to a file first.")
    return status


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    hasher = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def sync(path: Path) -> None:
    """See that a file, or the list of a folder's files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """See that a folder and all that is in it are on disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there with all of its content, or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    partial = partial_beside(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
