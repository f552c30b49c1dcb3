"""What a crash, a full disk or a second run can do to an output folder and to the caches: nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from emt import cache
from emt.backbones.sd15.motion_module import MotionFeatures
from emt.cache import ContentIndex, MotionCache
from emt.errors import EmtError
from emt.pipeline import Motion
from emt.video import write_clip
from emt_cli.batch import journal
from emt_cli.batch.jobs import Job
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import Settings
from emt_cli.batch.results import read_record, sidecar, state_on_disk, write_result

# ---- journal ------------------------------------------------------------------------------------------------------


def filled(out: Path) -> bytes:
    log = Journal(out)
    log.append({"event": "job", "state": "done", "output": "a/x-0.mp4", "id": "1", "prompt": "ein Löwe"})
    log.append({"event": "job", "state": "done", "output": "a/y-0.mp4", "id": "2", "prompt": "\udc80 odd\nname"})
    log.close()
    return (out / journal.FILE_NAME).read_bytes()


def test_a_journal_torn_anywhere_is_whole_when_opened_again(tmp_path):
    content = filled(tmp_path)
    first = content.index(b"\n") + 1
    for cut in range(first, len(content)):
        (tmp_path / journal.FILE_NAME).write_bytes(content[:cut])
        log = Journal(tmp_path)
        log.append({"event": "job", "state": "done", "output": "a/z-0.mp4", "id": "3"})
        log.close()
        lines = (tmp_path / journal.FILE_NAME).read_bytes().splitlines()
        told = [json.loads(line)["id"] for line in lines]
        assert told == (["1", "2", "3"] if cut == len(content) - 1 else ["1", "3"]), "only a line break may be missing"


def test_lines_that_are_no_json_do_not_hide_the_others(tmp_path):
    content = filled(tmp_path)
    (tmp_path / journal.FILE_NAME).write_bytes(b"\xff\x00 nonsense\n[1]\n" + content)
    assert [line["id"] for line in journal.read(tmp_path)] == ["1", "2"]


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    log = Journal(tmp_path)
    with pytest.raises(EmtError, match=f"process {os.getpid()}"):
        Journal(tmp_path)
    log.close()
    Journal(tmp_path).close()


def test_threads_write_whole_lines(tmp_path):
    log = Journal(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [log.append({"id": f"{n}-{i}", "x": "y" * 3000}) for i in range(20)])
        for n in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    log.close()
    assert len({line["id"] for line in journal.read(tmp_path)}) == 80


def _append_on_a_full_disk(out: Path) -> None:
    log = Journal(out)
    size = (out / journal.FILE_NAME).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
    try:
        log.append({"event": "job", "prompt": "x" * 500})
    except OSError:
        os._exit(17)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    content = filled(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_append_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 17
    assert (tmp_path / journal.FILE_NAME).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmtError, match="cannot write"):
        Journal(tmp_path / "file")


# ---- results ------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path):
    job = Job(tmp_path / "r.mp4", "a red star", 0, Settings(frames=6, height=32, width=32))
    clip = tmp_path / "out" / "x-0.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    write_result(clip, frames, 8, {"id": "one", "prompt": 'quo"te \udc80 🎬 \\ \n;=#'})
    status = clip.stat()
    line = {"id": "one", "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return job, clip, line


def test_a_clip_and_its_sidecar_carry_the_same_record(result):
    _, clip, _ = result
    record = read_record(clip)
    assert record == json.loads(sidecar(clip).read_bytes()) == {"id": "one", "prompt": 'quo"te \udc80 🎬 \\ \n;=#'}


def test_what_the_disk_says_of_a_job(result):
    job, clip, line = result
    assert state_on_disk(line, clip, job, "one") == "done"
    assert state_on_disk(None, clip, job, "one") == "made", "killed between the clip and its line"
    assert state_on_disk(line, clip, job, "two") == "open", "the settings have changed"
    os.utime(clip)
    assert state_on_disk(line, clip, job, "one") == "done", "copied with other times"
    write_clip(clip, np.zeros((6, 32, 32, 3), np.uint8), 8, metadata={})
    assert state_on_disk(line, clip, job, "one") == "open", "replaced by someone else"
    clip.unlink()
    assert state_on_disk(line, clip, job, "one") == "open"


def test_a_clip_cut_short_afterwards_is_made_again(result):
    job, clip, line = result
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 3 // 4])
    assert state_on_disk(line, clip, job, "one") == "open"


# ---- content hashes -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_settling(monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)


def test_a_hash_follows_the_content_even_if_size_and_time_are_the_same(tmp_path, no_settling):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    index = ContentIndex(tmp_path / "cache")
    first, times = index.sha256(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert index.sha256(file) != first
    file.write_bytes(b"one")
    assert index.sha256(file) == first


def test_a_known_file_is_not_read_again_not_even_by_the_next_process(tmp_path, no_settling, monkeypatch):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    first = ContentIndex(tmp_path / "cache").sha256(file)
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail("read again"))
    assert ContentIndex(tmp_path / "cache").sha256(file) == first


def test_a_folder_of_images_is_its_names_and_contents(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"x")
    index = ContentIndex(tmp_path / "cache")
    first = index.sha256(folder)
    (folder / "1.png").rename(folder / "2.png")
    assert index.sha256(folder) != first


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 100, b""])
def test_a_damaged_index_is_made_again(tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.sqlite").write_bytes(content)
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    assert ContentIndex(tmp_path / "cache").sha256(file) == ContentIndex(tmp_path / "a.mp4").sha256(file)


# ---- motion features ----------------------------------------------------------------------------------------------


def motion(value: float) -> Motion:
    layers = {"layer": (torch.full((1, 4, 8, 8), value), torch.full((1, 4, 8, 8), -value))}
    return Motion(MotionFeatures(layers), frames=4, height=32, width=32, seed=0)


def test_motion_is_kept(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    assert kept.load("a") is None
    kept.save("a", motion(3.0), 7.5)
    loaded, fps = MotionCache(tmp_path, 1e6).load("a")
    assert fps == 7.5
    assert torch.equal(loaded.features.layers["layer"][0], motion(3.0).features.layers["layer"][0])


@pytest.mark.parametrize("where", [0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_entry_is_dropped(tmp_path, suffix, where):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    file = tmp_path / f"a{suffix}"
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 0x55
    file.write_bytes(content)
    assert kept.load("a") is None or suffix == ".json"
    kept.save("a", motion(2.0), 8)
    assert kept.load("a")[0].features.layers["layer"][0].max() == 2.0


def test_the_least_recently_used_go_first(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("size", motion(0.0), 8)
    kept = MotionCache(tmp_path / "limited", 2.5 * kept.size())
    for key in "ab":
        kept.save(key, motion(1.0), 8)
    os.utime(tmp_path / "limited" / "b.json", (1, 1))
    assert kept.load("a")
    kept.save("c", motion(1.0), 8)
    assert [bool(kept.load(key)) for key in "abc"] == [True, False, True]
    assert kept.size() <= kept.limit


def test_no_cache_if_not_wanted(tmp_path):
    kept = MotionCache(tmp_path / "none", 0)
    kept.save("a", motion(1.0), 8)
    assert kept.load("a") is None
    assert not (tmp_path / "none").exists()
