"""Files that are there whole or not at all: partial files, what dead processes leave, mounts that lack something."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emt.storage import PARTIAL, partial_file, remove_partials, replace_folder, sync, write_atomically


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_k5_a_mount_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch, code):
    sync_file = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync_file(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_other_failures_of_fsync_are_failures(tmp_path, monkeypatch, code):
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(tmp_path)


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "device", "link"])
def test_k3_no_file_takes_the_place_of_a_device(tmp_path, place):
    path = tmp_path / place  # an absolute one is itself
    if place == "link":
        path.symlink_to("/dev/null")
    if place == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = os.lstat(path)
    with pytest.raises(OSError, match="whose place no file takes"), partial_file(path):
        pass
    if path.parent == tmp_path:  # of the system's own nothing is tried
        with pytest.raises(OSError, match="whose place no file takes"):
            write_atomically(path, b"x")
    assert os.path.samestat(os.lstat(path), before)


def test_a_file_that_cannot_be_synced_is_a_failure(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        write_atomically(tmp_path / "a", b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_k3_partial_files_belong_to_a_process(tmp_path, folder):
    script = f"""
import sys
from pathlib import Path
from emt.storage import partial_file
with partial_file(Path({str(tmp_path / "a")!r}), folder={folder}):
    print(flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert remove_partials(tmp_path, older_than=0) == []
    (partial,) = tmp_path.iterdir()
    child.kill()
    child.communicate()
    assert remove_partials(tmp_path) == [partial]
    assert not list(tmp_path.iterdir())


def test_partial_files_of_threads_of_one_process_stay(tmp_path):
    with partial_file(tmp_path / "a") as partial:
        thread = threading.Thread(target=remove_partials, args=(tmp_path,), kwargs={"older_than": 0})
        thread.start()
        thread.join()
        assert partial.exists()
    assert not partial.exists()


def test_where_nothing_can_be_locked_age_decides(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_file(tmp_path / "a") as young:
        old = tmp_path / f"{PARTIAL}0"
        old.touch()
        os.utime(old, (0, 0))
        assert remove_partials(tmp_path) == [old]
        assert young.exists()


def test_odd_things_with_a_partial_files_name(tmp_path):
    os.mkfifo(tmp_path / f"{PARTIAL}0")
    (tmp_path / f"{PARTIAL}1").symlink_to(tmp_path)
    assert remove_partials(tmp_path, older_than=0) == [tmp_path / f"{PARTIAL}0"]
    assert tmp_path.exists()


def made(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(content)
    return folder


@pytest.mark.parametrize("name", ["clip", "n" * 250])
def test_a_folder_takes_anothers_place(tmp_path, name):
    folder = made(tmp_path / name, "old")
    replace_folder(made(tmp_path / "new", "new"), folder)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "file").read_text() == "new"


def test_k3_a_replaced_folder_survives_a_failure_and_a_crash(tmp_path, monkeypatch):
    folder, partial = made(tmp_path / "clip", "old"), made(tmp_path / "new", "new")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path == partial:
            raise OSError(errno.EIO, "failed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="failed"):
        replace_folder(partial, folder)
    assert (folder / "file").read_text() == "old"

    def crash(path: Path, target: Path) -> Path:
        if path == partial or path.name.startswith(PARTIAL):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(partial, folder)
    monkeypatch.undo()
    assert not folder.exists()
    remove_partials(tmp_path)
    assert (folder / "file").read_text() == "old"


@pytest.mark.parametrize("place", ["/", ".", ".."])
def test_k5_a_path_without_a_name_is_no_place_for_a_file(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"director|busy"):
        write_atomically(Path(place), b"x")
    assert not os.listdir(tmp_path)
