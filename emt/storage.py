"""Files that are there whole or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from emt.errors import EmtError

if TYPE_CHECKING:
    from filelock import BaseFileLock

PARTIAL = ".emt-partial-"
"""Prefix of the names of files that are being written; partial files of a killed process have it."""

_SET_ASIDE = ".was."  # in the name of a folder that another one is to replace, before the folder's own name


def partial_beside(path: Path) -> Path:
    """A name in the folder of `path` to write under before renaming.

    Raises:
        OSError: The path has no name, as `/` and `.`, whose place no file takes.
    """
    if not path.name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
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


def open_file(path: str | Path) -> BinaryIO:
    """Open a file that others may have put there for reading; a pipe or a device, which may wait for ever, is none.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return open(descriptor, "rb")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    hasher = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a directory entry.

    File systems that cannot sync a folder (CIFS, vboxsf, some FUSE) say so, and are taken at their word: there the
    entry is as durable as the mount makes it. Windows opens no folder, and flushes only what is open for writing.

    Raises:
        OSError: It cannot be synced.
    """
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        cannot = error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
        if not (cannot and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync a folder and all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def partial_file(path: Path, folder: bool = False) -> Iterator[Path]:
    """Context manager: an empty partial file beside `path` that belongs to this process, to write and to rename.

    The file is locked until the end of the block, so that `remove_partials`, in whatever process, leaves it alone;
    the lock ends with the process, however it ends. What is still there at the end of the block is removed.

    Args:
        path: What will be written; its folder exists.
        folder: Make a folder instead of a file.

    Raises:
        OSError: It cannot be made, or is to take the place of a device, such as /dev/null or /dev/stdout.
    """
    _expect_no_device(path)
    while True:
        partial = partial_beside(path)
        partial.mkdir() if folder else partial.touch(exist_ok=False)
        descriptor, locked = _open_locked(partial)
        if locked and not partial.exists():  # taken for a dead process's before it was locked
            _close(descriptor)
            continue
        break
    try:
        yield partial
    finally:
        _remove(partial)
        _close(descriptor)


def _expect_no_device(path: Path) -> None:
    """Raise OSError if a file that takes the name of a path would take it from a device: root may do that."""
    is_device = os.path.dirname(os.path.abspath(path)) in ("/dev", "/dev/fd", "/proc/self/fd")
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        is_device = is_device or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    if is_device:
        raise OSError(errno.EINVAL, "it is a device, whose place no file takes", str(path))


def _open_locked(path: Path) -> tuple[int | None, bool | None]:
    """Open a file or a folder and lock it for as long as it is open.

    Returns:
        Its descriptor; and whether it is locked: False if another process has, None if nothing can. On Windows there is
        neither: what is open cannot be renamed there.
    """
    try:
        import fcntl
    except ImportError:
        return None, None
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, False
    except OSError:  # ENOLCK, ENOSYS: a network mount without locks
        return descriptor, None
    return descriptor, True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def try_lock(path: Path) -> BaseFileLock | None:
    """Lock a file of its own, made if it is missing, until the lock is released or this process ends in whatever way.

    Returns:
        The lock; None if another process has it.

    Raises:
        OSError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False)  # threads of this process share it
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Context manager: nobody else, in whatever process or thread, is in a block with the same lock file; waits.

    Where the file system has no locks, it lets everybody in.

    Args:
        path: The lock file, which is made and stays.

    Raises:
        OSError: It cannot be made.
    """
    from filelock import FileLock

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        lock.release()


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename a folder to a name that another one has, which is removed; or leave that one, if it cannot be.

    It takes two renames, and between them there is no folder of the name. After a crash there, `remove_partials` puts
    the old one back.

    Raises:
        OSError: It cannot be renamed.
    """
    old = partial_beside(folder)
    if len(os.fsencode(old.name)) + len(os.fsencode(_SET_ASIDE + folder.name)) <= 255:
        old = old.with_name(old.name + _SET_ASIDE + folder.name)
    descriptor, _ = _open_locked(folder)
    try:
        folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        _remove(old)
    finally:
        _close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context manager: a partial folder to write into, which gets its name once it is complete and on disk.

    A folder of that name is replaced. Other users may read what is in it, as far as the umask says.

    Raises:
        OSError: It cannot be made or renamed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(folder, folder=True) as partial:
        yield partial
        apply_umask(partial)
        sync_tree(partial)
        if folder.exists():
            replace_folder(partial, folder)
        else:
            partial.rename(folder)
        sync(folder.parent)


def remove_partials(folder: str | os.PathLike[str], *, older_than: float = 3600.0) -> list[Path]:
    """Remove partial files that dead processes left in a folder; those of living ones stay.

    Args:
        folder: Its subfolders are not searched.
        older_than: Seconds since last written, where the file system has no locks: younger ones may belong to a
            process that is still at work.

    Returns:
        Paths that were removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{PARTIAL}*")):
        with suppress(OSError):
            _, set_aside, name = path.name.partition(_SET_ASIDE)
            if set_aside and not os.path.lexists(path.with_name(name)):
                path.rename(path.with_name(name))  # its process died before the new one was in its place
                continue
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                continue
            descriptor, is_free = _open_locked(path)
            try:
                if is_free or (is_free is None and time.time() - status.st_mtime >= older_than):
                    _remove(path)
                    removed.append(path)
            finally:
                _close(descriptor)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def apply_umask(*paths: Path) -> None:
    """Give files, and all files in folders, the mode that the umask gives new ones.

    safetensors lets nobody but their owner read what it writes.

    Raises:
        OSError: if a mode cannot be set.
    """
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
    for folder in {file.parent for file in files}:
        probe = partial_beside(folder / "mode")  # the umask itself cannot be read without changing it for all threads
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for file in files:
            if file.parent == folder:
                file.chmod(mode)


def check_replaceable(path: Path, kind: str, begins: tuple[bytes, ...]) -> None:
    """Raise EmtError if a file is there that a new one would replace and that is not of its kind, such as a clip.

    Args:
        path: Where the new file goes.
        kind: What it is, for the message.
        begins: Beginnings of files of its kind, in lower case.
    """
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            begin = file.read(512).lstrip().lower()
    except OSError:  # writing says why
        return
    if begin and not begin.startswith(begins):
        raise EmtError(f"{path} is there, and no {kind}: it is not replaced", "Name another file, or remove it.")


def unwritable(folder: Path) -> str:
    """Reason why nothing can be written into a folder, which may be yet to come; empty if it can."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        return f"{place} is not a folder"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written to"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there with all of its content, or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with partial_file(path) as partial:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
