"""Output folders in a store: what is published, what another machine reads of it, and what a crash leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from emt import remote
from emt.errors import EmtError
from emt.features import Motion, MotionFeatures
from emt.shared_cache import SharedMotionCache
from emt.video import write_clip
from emt_cli.batch import journal, published
from emt_cli.batch.jobs import Job, identify, output_name
from emt_cli.batch.options import Format, Settings
from emt_cli.batch.published import Published, PublishedJournal, open_journal
from emt_cli.batch.records import dumps
from emt_cli.batch.results import Place, find_place, sidecar

OUT = "memory://bucket/out"
JOB = Job(Path("/clips/walk.mp4"), "a star", 0, Settings(frames=4))
IDENTITY = identify(JOB, reference="r", model="m", precision="auto")
OUTPUT = output_name(JOB, "r")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))


def make(out: Path, identity: str = IDENTITY, seed: int = 0) -> dict[str, object]:
    """Make the files of a job that a run has not reported yet; returns its line."""
    record = {"id": identity, "reference": "/clips/walk.mp4", "settings": {"frames": 4}}
    clip = out / OUTPUT
    clip.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 255, (4, 32, 32, 3), np.uint8)
    write_clip(clip, frames, 8, metadata={"emt": dumps(record).decode()})
    sidecar(clip).write_bytes(dumps(record))
    return {"event": "job", "state": "done", "output": OUTPUT, "bytes": clip.stat().st_size, **record}


def opened(said: list[str] | None = None) -> PublishedJournal:
    folder = Published(OUT)
    return PublishedJournal(folder, (said if said is not None else []).append, folder.writer(""))


def finish() -> None:
    """Make the job's clip and publish it."""
    log = opened()
    log.append(make(log.out))
    log.close()


def place(log: PublishedJournal, overwrite: bool = False) -> Place:
    return find_place(log.out, log.known, JOB, OUTPUT, IDENTITY, overwrite)


def test_a_finished_clip_is_known_without_being_fetched(store, other_machine, monkeypatch):
    finish()
    assert store.exists(f"/bucket/out/{OUTPUT}.json")
    other_machine()
    log = opened()
    monkeypatch.setattr(Published, "fetch", None)
    assert place(log) == Place(OUTPUT, "done")
    assert place(log, overwrite=True) == Place(OUTPUT, "replaces")
    other = identify(JOB, reference="r", model="another", precision="auto")
    assert find_place(log.out, log.known, JOB, OUTPUT, other, False).output != OUTPUT, "it keeps its name"
    assert log.path_of(OUTPUT) == f"{OUT}/{OUTPUT}"


def test_a_clip_that_was_put_when_the_run_ended_is_adopted_by_any_machine(store, other_machine, tmp_path):
    line = make(tmp_path)
    store.pipe(f"/bucket/out/{OUTPUT}", (tmp_path / OUTPUT).read_bytes())
    other_machine()
    log = opened()
    found = place(log)
    assert (found.output, found.state) == (OUTPUT, "made")
    made = store.info(f"/bucket/out/{OUTPUT}")
    sidecar(log.out / OUTPUT).write_bytes(b"{}")  # as the feeder does
    log.append({**line, "adopted": True})
    assert store.info(f"/bucket/out/{OUTPUT}") == made, "it is not put again"
    assert place(log).state == "done"


def test_a_clip_that_could_not_be_put_is_put_by_the_next_run(store, monkeypatch):
    log = opened()
    line = make(log.out)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", _refuse)
        with pytest.raises(EmtError, match="cannot be written: no network") as caught:
            log.append(line)
    assert "stays on this machine" in caught.value.hint
    log.append({**line, "state": "failed", "error": caught.value.problem})
    log.close()
    log = opened()
    assert place(log).state == "made"
    log.append({**line, "adopted": True})
    assert place(log).state == "done"
    assert not (log.out / OUTPUT).exists(), "what is in the store is not kept twice"


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


def test_an_object_that_is_no_whole_clip_is_made_again(store):
    finish()
    store.pipe(f"/bucket/out/{OUTPUT}", b"half")
    log = opened()
    assert place(log) == Place(OUTPUT, "open")


def test_a_clip_of_another_run_that_came_meanwhile_is_not_replaced(store, tmp_path, other_machine):
    late = opened()
    other = make(tmp_path / "another", "another-job")
    finish_as = opened_elsewhere(other_machine)
    finish_as.append(make(finish_as.out, "another-job"))
    content = store.cat(f"/bucket/out/{OUTPUT}")
    with pytest.raises(EmtError, match="is the clip of another run meanwhile"):
        late.append(make(late.out))
    assert store.cat(f"/bucket/out/{OUTPUT}") == content
    assert other["id"] == "another-job"


def opened_elsewhere(other_machine) -> PublishedJournal:
    other_machine()
    return opened()


def test_the_same_clip_from_two_machines_is_one(store, other_machine):
    late = opened()
    early = opened_elsewhere(other_machine)
    early.append(make(early.out))
    content = store.cat(f"/bucket/out/{OUTPUT}")
    late.append(make(late.out, seed=1))
    assert store.cat(f"/bucket/out/{OUTPUT}") == content
    *_, line = (line for line in journal.read(late.out) if line.get("output"))
    assert line["etag"] == str(store.info(f"/bucket/out/{OUTPUT}")["created"].timestamp())


def test_a_journal_of_many_jobs_is_few_objects_and_is_read_in_order(store, other_machine, monkeypatch):
    monkeypatch.setattr(published, "PART", 20_000)
    log = opened()
    puts = []
    monkeypatch.setattr(published, "put", lambda *a, put=published.put: puts.append(a[1]) or put(*a))
    for number in range(400):
        log.append({"event": "job", "state": "failed", "output": f"a/{number}.mp4", "error": "x" * 100})
    log.close()
    parts = sorted(name for name in store.ls("/bucket/out", detail=False) if "journal" in name)
    assert len(parts) == -(-sum(store.size(part) for part in parts) // 20_000) <= 6
    assert len(puts) == 400
    own = [line["output"] for line in journal.read(log.out)]
    assert own == [f"a/{number}.mp4" for number in range(400)], "its own parts are not read twice"
    other_machine()
    assert [line["output"] for line in journal.read(Published(OUT).folder)] == own
    log = opened()
    log.append({"event": "job", "state": "failed", "output": "a/last.mp4", "error": ""})
    assert len({name.split(".")[0] for name in store.ls("/bucket/out", detail=False)}) == 2, "a journal a machine"


def test_lines_that_were_not_published_are_when_the_next_run_begins(store, other_machine, monkeypatch):
    said: list[str] = []
    log = opened(said)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", _refuse)
        for number in range(3):
            log.append({"event": "job", "state": "failed", "output": f"a/{number}.mp4", "error": ""})
        with pytest.raises(EmtError, match=r"journal-.* cannot be written"):
            log.append({"event": "run", "done": 0})
    assert len(said) == 1, "once is enough"
    assert "the journal is behind" in said[0]
    log.close()
    opened().close()
    other_machine()
    assert len(journal.read(Published(OUT).folder)) == 4


def test_journals_of_workers_that_died_are_published_by_their_run(store, other_machine):
    folder = Published(OUT)
    log = PublishedJournal(folder, print, folder.writer(""))
    worker = journal.Journal(folder.folder, folder.writer("worker-1"))
    worker.append({"event": "job", "state": "failed", "output": "a/w.mp4", "error": ""})
    log.append({"event": "run", "done": 0})
    worker.close()
    log.append({"event": "run", "done": 0})
    other_machine()
    assert "a/w.mp4" in {line.get("output") for line in journal.read(Published(OUT).folder)}


def test_an_output_folder_that_was_copied_into_a_store_is_continued(store, tmp_path):
    line = make(tmp_path / "local")
    local = journal.Journal(tmp_path / "local")
    local.append({**line, "mtime_ns": 1})
    local.close()
    store.put(f"{tmp_path}/local", "/bucket/out", recursive=True)
    log = opened()
    found = place(log)
    assert (found.state, found.looked is not None) == ("done", True)
    log.append({"event": "file", "id": IDENTITY, "output": OUTPUT, "bytes": line["bytes"], "mtime_ns": 1})
    log.close()
    log = opened()
    assert place(log) == Place(OUTPUT, "done"), "it is looked at once"


def test_a_copy_of_an_output_folder_is_one_on_disk(store, tmp_path):
    finish()
    store.get("/bucket/out", str(tmp_path / "copy"), recursive=True)
    known = journal.Known()
    for line in journal.lines(tmp_path / "copy"):
        known.add(line)
    assert find_place(tmp_path / "copy", known, JOB, OUTPUT, IDENTITY, False).state == "done"


def test_folders_of_frames_are_not_published():
    log = opened()
    job = Job(JOB.reference, "a star", 0, Settings(frames=4, format=Format.PNG))
    with pytest.raises(EmtError, match="a clip of format png is a folder of files"):
        find_place(log.out, log.known, job, output_name(job, "r"), IDENTITY, False)


def test_two_runs_of_one_machine_exclude_each_other():
    log = opened()
    with pytest.raises(EmtError, match=r"another run .* is writing to memory://bucket/out"):
        opened()
    log.close()


# ---- motion features that machines share ---------------------------------------------------------------------------

SHAPE = 4, 32, 32  # frames, height, width
CACHE = "memory://bucket/cache"


def shared(folder: Path, said: list[str] | None = None) -> SharedMotionCache:
    return SharedMotionCache(CACHE, folder, 1e6, (said if said is not None else []).append)


def motion() -> Motion:
    layers = {"layer": (torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), -3.0))}
    return Motion(MotionFeatures(layers), *SHAPE, seed=0)


def test_motion_that_one_machine_has_encoded_is_read_by_another(store, tmp_path):
    shared(tmp_path / "a").save("key", motion(), 7.5, ["a warning"])
    assert sorted(remote.files(CACHE)) == ["motion/key.json", "motion/key.safetensors"]
    other = shared(tmp_path / "b")
    found = other.load("key", SHAPE)
    assert found is not None
    assert (float(found[0].features.layers["layer"][0].max()), found[1]) == (3.0, 7.5)
    assert other.warnings("key") == ("a warning",)
    assert other.load("none", SHAPE) is None
    store.pipe("/bucket/cache/motion/key.safetensors", b"damaged")
    assert shared(tmp_path / "c").load("key", SHAPE) is None


def test_a_shared_cache_that_fails_costs_one_message(store, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(type(store), "put_file", _refuse)
    failing = shared(tmp_path / "a", said)
    failing.save("key", motion(), 7.5)
    failing.save("other", motion(), 7.5)
    assert failing.load("key", SHAPE) is not None, "this machine has it"
    assert len(said) == 1
    assert f"not shared in {CACHE}/motion" in said[0]


def test_a_worker_on_another_machine_than_its_driver_has_a_journal_of_its_own(store, other_machine):
    name = f"{Published(OUT).machine}-worker-0"
    line = {"event": "job", "state": "failed", "error": "too dark"}
    with closing(open_journal(OUT, name)) as log:
        log.append({**line, "output": "first"})
    other_machine()
    with closing(open_journal(OUT, name)) as log:
        log.append({**line, "output": "second"})
    parts = [store.cat(path).decode() for path in store.glob("/bucket/out/journal-*worker-0.*.jsonl")]
    assert sorted(json.loads(part)["output"] for part in parts) == ["first", "second"]
