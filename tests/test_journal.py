"""What a crash, a full disk or a second run can do to an output folder: nothing."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import stat
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import program
import pytest

from emt.errors import EmtError
from emt.storage import try_lock
from emt.video import write_clip
from emt_cli.batch import journal, records
from emt_cli.batch.feeder import Feeder
from emt_cli.batch.jobs import Job, identify, output_name, own_name
from emt_cli.batch.journal import Journal, Known
from emt_cli.batch.options import Settings
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.results import find_place, is_anothers, read_record, sidecar, state_on_disk, write_result
from emt_cli.batch.session import RunOptions, SessionOptions, open_session
from emt_cli.terminal import ProgressReporter
from emt_cli.text import printable

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
        ids = [json.loads(line)["id"] for line in lines]
        assert ids == (["1", "2", "3"] if cut == len(content) - 1 else ["1", "3"]), "only a line break may be missing"


def test_lines_that_are_no_json_do_not_hide_the_others(tmp_path):
    content = filled(tmp_path)
    (tmp_path / journal.FILE_NAME).write_bytes(b"\xff\x00 nonsense\n[1]\n" + content)
    assert [line["id"] for line in journal.read(tmp_path)] == ["1", "2"]


def test_a_second_run_is_refused_and_reported_by_whom(tmp_path):
    log = Journal(tmp_path)
    with pytest.raises(EmtError, match=f"process {os.getpid()}"):
        Journal(tmp_path)
    threading.Timer(0.1, log.close).start()
    Journal(tmp_path).close()  # who only looks at the lock, or is about to end, is waited for


def test_a_journal_is_closed_once_however_often(tmp_path):
    log = Journal(tmp_path)
    log.close()
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)  # may have the number of the file that was closed
    log.close()
    os.close(other)
    Journal(tmp_path).close()


def test_each_writer_has_a_file_of_its_own_and_they_are_read_as_one(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path, "gpu1")
    with pytest.raises(EmtError, match=f"process {os.getpid()}"):
        Journal(tmp_path, "gpu1")
    for count, log in enumerate([first, second, first, second]):
        log.append({"event": "job", "state": "done", "output": "a/x-0.mp4", "id": str(count)})
        time.sleep(0.002)  # times are kept to the millisecond
    assert [line["id"] for line in journal.read(tmp_path)] == ["0", "1", "2", "3"]
    assert (tmp_path / "journal-gpu1.jsonl").read_bytes().count(b"\n") == 2
    first.close()
    second.close()
    assert Journal(tmp_path).known.done["a/x-0.mp4"]["id"] == "3", "whoever wrote it"
    with pytest.raises(ValueError, match="letters"):
        Journal(tmp_path, "../x")


def test_writers_that_may_not_be_beside_one_are_waited_for_and_then_refused(tmp_path):
    (tmp_path / ".lock+").touch()  # no writer's
    held = try_lock(tmp_path / ".lock+")
    first, second = Journal(tmp_path, "a"), Journal(tmp_path, "b")
    for own in ("A", "c"):  # names before and after theirs
        with pytest.raises(EmtError, match=f"process {os.getpid()}"):
            Journal(tmp_path, own, beside=lambda other: other == "a")
    Journal(tmp_path, "c", beside=lambda other: other in ("a", "b")).close()
    second.close()
    Journal(tmp_path, "c", beside=lambda other: other == "a").close()
    first.close()
    Journal(tmp_path, "c", beside=lambda other: False).close()
    held.release()


def test_workers_of_a_run_that_was_killed_are_waited_for(tmp_path):
    """They end by themselves, but later than a process that only looks at a lock."""
    worker = Journal(tmp_path, "worker-1")
    threading.Timer(1.2, worker.close).start()
    Journal(tmp_path, "c", beside=lambda other: False).close()


@pytest.mark.parametrize("id", ["0", "2"])
def test_the_file_of_another_job_is_not_taken_for_a_finished_clip(tmp_path, id):
    done = {"event": "job", "state": "done", "output": "a/x-0.mp4", "id": "1", "bytes": 5, "mtime_ns": 6}
    known = Known()
    known.add(done)
    known.add({"event": "file", "output": "a/x-0.mp4", "id": id, "bytes": 7, "mtime_ns": 8})
    assert (known.done["a/x-0.mp4"]["bytes"], known.done["a/x-0.mp4"]["mtime_ns"]) == (5, 6)
    known.add({"event": "file", "output": "a/x-0.mp4", "id": "1", "bytes": 9})
    assert (known.done["a/x-0.mp4"]["bytes"], known.done["a/x-0.mp4"]["mtime_ns"]) == (9, 6)


def test_the_last_word_on_a_job_is_that_of_its_end(tmp_path):
    done = {"event": "job", "state": "done", "output": "a/x-0.mp4", "id": "1"}
    log = Journal(tmp_path)
    log.append({"event": "run", "state": "done", "output": "a/z-0.mp4"})
    log.append({"event": "job", "state": "started", "output": "a/y-0.mp4"})
    log.append(done)
    log.append({"event": "file", "output": "a/x-0.mp4", "id": "1", "bytes": 7})
    log.append({"event": "job", "state": "failed", "prompt": "a cat", "error": "no"})
    log.append({"event": "job", "state": "failed", "prompt": "a dog", "error": "no"})
    log.append({"event": "job", "state": "dropped", "prompt": "a dog", "output": "a/v-0.mp4"})
    said = [(line["state"], line.get("output"), line.get("prompt")) for line in journal.current(tmp_path)]
    assert said == [("done", "a/x-0.mp4", None), ("dropped", "a/v-0.mp4", "a dog"), ("failed", None, "a cat")]


def test_lines_of_one_file_keep_their_order_whatever_its_clock_did(tmp_path):
    times = ["2026-01-01T00:00:09.000+00:00", "2026-01-01T00:00:01.000+00:00", None]
    lines = [{"event": "job", "id": str(n), **({"finished": time} if time else {})} for n, time in enumerate(times)]
    (tmp_path / journal.FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "journal-b.jsonl").write_text(json.dumps({"id": "b", "finished": "2026-01-01T00:00:05.000+00:00"}))
    assert [line["id"] for line in journal.read(tmp_path)] == ["b", "0", "1", "2"]


def test_k2_a_clock_that_was_ahead_has_no_last_word(tmp_path):
    job = {"event": "job", "output": "a.mp4", "id": "1"}
    ahead = job | {"state": "failed", "error": "no memory", "finished": "2999-01-01T00:00:00.000+00:00"}
    (tmp_path / "journal-a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ahead, ahead)))
    made = job | {"state": "done", "finished": "2026-01-01T00:00:00.000+00:00"}
    (tmp_path / journal.FILE_NAME).write_text(json.dumps(made) + "\n")
    assert [line["state"] for line in journal.current(tmp_path)] == ["done"]


def test_k3_a_copy_by_hard_links_keeps_its_journal(tmp_path):
    with closing(Journal(tmp_path / "out")) as log:
        log.append({"event": "job", "state": "done", "output": "a.mp4", "id": "1"})
    before = (tmp_path / "out" / journal.FILE_NAME).read_bytes()
    (tmp_path / "backup").mkdir()
    os.link(tmp_path / "out" / journal.FILE_NAME, tmp_path / "backup" / journal.FILE_NAME)
    with closing(Journal(tmp_path / "out")) as log:
        log.append({"event": "job", "state": "failed", "output": "b.mp4", "id": "2"})
    assert (tmp_path / "backup" / journal.FILE_NAME).read_bytes() == before
    assert [line["output"] for line in journal.read(tmp_path / "out")] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("name", [journal.FILE_NAME, journal.LOCK_NAME])
def test_k7_a_folder_in_the_place_of_a_file_is_called_by_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(EmtError, match=f"{name} is a folder"):
        Journal(tmp_path)


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


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o644), (0o077, 0o600)])
def test_a_journal_is_written_by_its_owner_alone(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        Journal(tmp_path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / journal.FILE_NAME).stat().st_mode) == mode


def test_a_line_is_synced_before_append_returns(tmp_path, monkeypatch):
    log, synced = Journal(tmp_path), []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), synced.append(os.readlink(f"/proc/self/fd/{file}"))))
    log.append({"event": "job", "id": "1"})
    assert synced == [str(tmp_path / journal.FILE_NAME)]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"event": "job", "state": "done", "output": "a/x.mp4", "settings": ' + b'{"a":' * 100_000,
        b'{"event": "job", "state": "done", "output": "/etc/passwd", "id": "x"}',
        b'{"event": "job", "state": "done", "output": "a/../../x.mp4", "id": "x"}',
        b'{"event": "job", "state": "done", "output": "..\\\\x.mp4", "id": "x"}',
        b'{"event": "job", "state": "done", "output": "C:\\\\x.mp4", "id": "x"}',
        b'{"event": "job", "state": "done", "output": ["a"], "id": "x"}',
        b'{"event": "job", "state": "done", "id": "x"}',
        b'{"event": "job", "state": "done", "output": "a/x.mp4", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_k5_k6_damaged_and_hostile_lines_are_left_out(tmp_path, line):
    filled(tmp_path)
    with open(tmp_path / journal.FILE_NAME, "ab") as file:
        file.write(line + b"\n")
    assert [line["id"] for line in journal.read(tmp_path)] == ["1", "2"]
    assert [line["id"] for line in journal.current(tmp_path)] == ["1", "2"]
    log = Journal(tmp_path)
    assert set(log.known.done) == {"a/x-0.mp4", "a/y-0.mp4"}
    log.close()


def test_k5_fields_that_are_not_as_declared_are_left_out(tmp_path):
    good = {
        "event": "job", "state": "done", "output": "a/x.mp4", "id": "1", "seed": 3,
        "settings": {"fps": None, "steps": 2},
        "batch": {"size": 2, "index": 1, "shared_reference": False}, "timings": {"steps": 0.5}, "future": {"a": [1]},
        "best_of": {"first_seed": 2, "candidates": [{"seed": 2, "error": "x"}, {"seed": 3, "motion_fidelity": 0.5}]},
    }  # fmt: skip
    assert records.check(good) == good
    bad = {
        "id": [1], "seed": -1, "settings": {"steps": [2]}, "batch": {"size": 1, "index": 1, "shared_reference": False},
        "timings": {"steps": "0.5"}, "prompt": 5, "motion_fidelity": float("nan"), "bytes": True, "warnings": [1],
        "best_of": {"first_seed": 2, "candidates": [{"seed": 2, "motion_fidelity": 0.5}]},  # not the seed of the clip
    }  # fmt: skip
    kept = {name: value for name, value in good.items() if name not in bad}
    assert records.check({**good, **bad}) == kept
    for choice in (7, {"first_seed": 2, "candidates": 7}, {"first_seed": 2, "candidates": []}):
        assert "best_of" not in records.check({**good, "best_of": choice})
    (tmp_path / journal.FILE_NAME).write_text(json.dumps({**good, "future": [float("inf")], "motion_fidelity": 1e400}))
    assert journal.read(tmp_path) == [{**good, "future": [None]}], "a number that is not finite is null, or missing"


LORA = {"kind": "lora", "sha256": "0", "file": "a.safetensors", "scale": 0.5}
CONTROL = {"kind": "control_image", "sha256": "0", "file": "a.png", "frame": 3}


@pytest.mark.parametrize(
    ("name", "kept", "left_out"),
    [
        ("seed", [0, 7, 2**62, 2**63 - 1], [-1, 2**63, True, 1.0, "1", None, [1]]),
        ("seconds", [0, -2, 0.5, -9e299], [True, "1", None, 1e300, 10**400, float("inf"), float("nan")]),
        ("interrupted", [True, False], [0, 1, "true", None]),
        ("prompt", ["", "a fox"], [None, 1, ["a fox"]]),
        ("warnings", [[], ["a", "b"]], ["a", [1], ["a", None], {"a": "b"}, None]),
        ("settings", [{}, {"a": None, "b": 1.5, "c": True, "d": "e", "f": ["g"]}], [[], 7, {"a": {}}, {"a": [1]}]),
        ("versions", [{"torch": "2.11"}], [{"torch": 2.11}, "2.11"]),
        ("addons", [[], [LORA, CONTROL]], [LORA, [{}], [LORA | {"scale": "1"}], [CONTROL | {"frame": -1}], [7]]),
        ("addons", [[{"kind": "vae", "sha256": "0", "file": "a"}]], [[LORA | {"kind": "x"}], [LORA | {"file": None}]]),
        (
            "batch",
            [{"size": 2, "index": 1, "shared_reference": True}],
            [{"size": 2, "index": 2, "shared_reference": True}, {"size": 2, "index": 0}, {}, [], 2],
        ),
        ("of a later version", [None, 7, {"a": [1.5, "b"]}], []),
    ],
)
def test_k5_a_field_is_kept_where_it_is_as_declared_and_left_out_where_not(name, kept, left_out):
    for value in kept:
        assert records.check({"id": "1", name: value}) == {"id": "1", name: value}
    for value in left_out:
        assert records.check({"id": "1", name: value}) == {"id": "1"}, value


@pytest.mark.parametrize(
    ("candidates", "kept"),
    [
        ([{"seed": 2, "motion_fidelity": 0.5}], True),
        ([{"seed": 1, "error": "no memory"}, {"seed": 2, "motion_fidelity": 0.5}], True),
        ([{"seed": 2, "error": "no memory"}], False),  # it made no clip
        ([{"seed": 3, "motion_fidelity": 0.5}], False),  # not the seed of the clip
        ([{"seed": 2}], False),
        ([{"seed": "2", "motion_fidelity": 0.5}], False),
        ([{"seed": 2, "motion_fidelity": 0.5}, 7], False),
    ],
)
def test_k5_the_clip_that_was_chosen_is_one_of_those_to_choose_from(candidates, kept):
    choice = {"first_seed": 1, "candidates": candidates}
    assert ("best_of" in records.check({"id": "1", "seed": 2, "best_of": choice})) == kept
    assert "best_of" not in records.check({"id": "1", "seed": 2, "best_of": choice | {"first_seed": -1}})


@pytest.mark.parametrize("output", ["", "/a.mp4", "../a.mp4", "a/../b.mp4", "C:a.mp4", "a\\..\\b.mp4", 7, None])
def test_k6_a_record_of_a_clip_outside_of_its_folder_is_none(output):
    assert records.check({"id": "1", "output": output}) == {}
    assert records.check({"id": "1", "output": "a/b.mp4"}) == {"id": "1", "output": "a/b.mp4"}
    assert records.check([1]) == {}


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}], ids=["lists", "objects"])
def test_k5_values_are_kept_up_to_sixteen_levels(wrap):
    def nested(levels: int) -> object:
        return functools.reduce(lambda value, _: wrap(value), range(levels), 1)

    assert records.check({"event": "job", "future": nested(16)}) == {"event": "job", "future": nested(16)}
    assert records.check({"event": "job", "future": nested(17)}) == {"event": "job"}


def test_k8_a_torn_line_of_megabytes_costs_no_more_than_reading_it(tmp_path):
    content = filled(tmp_path)
    with open(tmp_path / journal.FILE_NAME, "ab") as file:
        file.write(b'{"event": "job", "prompt": "' + b"x" * 30_000_000)
    begun = time.process_time()
    Journal(tmp_path).close()
    assert time.process_time() - begun < 2
    assert (tmp_path / journal.FILE_NAME).read_bytes() == content


def test_k8_jobs_that_failed_without_an_output_take_time_in_proportion(tmp_path):
    failed = {"event": "job", "state": "failed", "reference": "/a.mp4", "error": "x"}
    done = {"event": "job", "state": "done", "reference": "/a.mp4", "seed": 0}
    lines = [{**failed, "prompt": f"p{n}"} for n in range(8000)]
    lines += [{**done, "prompt": f"p{n}", "output": f"a/{n}.mp4"} for n in range(4000)]
    (tmp_path / journal.FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    begun = time.process_time()
    assert len(journal.current(tmp_path)) == 8000
    assert time.process_time() - begun < 2


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    content = filled(tmp_path)
    log, limits = Journal(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 50, limits[1]))
    try:
        with pytest.raises(OSError, match=r"left|large") as error:
            log.append({"event": "job", "prompt": "x" * 500})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (tmp_path / journal.FILE_NAME).read_bytes() == content
    log.append({"event": "job", "id": "3"})
    assert [line["id"] for line in journal.read(tmp_path)] == ["1", "2", "3"]


def test_k4_a_pipe_in_an_output_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".holder")
    log = Journal(tmp_path)
    with pytest.raises(EmtError, match=f"process {os.getpid()}"):
        Journal(tmp_path)
    log.close()
    (tmp_path / journal.FILE_NAME).unlink()
    os.mkfifo(tmp_path / journal.FILE_NAME)
    for opened in (Journal, journal.read):
        with pytest.raises(EmtError, match=str(tmp_path)):
            opened(tmp_path)


def test_k6_a_link_in_an_output_folder_does_not_lead_to_a_file_that_is_written(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".holder").symlink_to(mine)
    Journal(tmp_path / "out").close()
    assert mine.read_text() == "kept"
    (tmp_path / "out" / "journal.jsonl").unlink()
    (tmp_path / "out" / "journal.jsonl").symlink_to(mine)
    with pytest.raises(EmtError, match=r"journal\.jsonl is a link"):
        Journal(tmp_path / "out")
    assert mine.read_text() == "kept"


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_k3_a_line_for_a_folder_that_has_gone_is_an_error_and_not_lost(tmp_path, how):
    out = tmp_path / "out"
    with_folder = Journal(out)
    with_folder.append({"event": "job", "state": "failed", "id": "one"})
    if how == "moved":
        out.rename(tmp_path / "away")
        out.mkdir()
    else:
        (out / journal.FILE_NAME).unlink()
    if how == "replaced":
        (out / journal.FILE_NAME).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="was removed or replaced while a run wrote into it"):
        with_folder.append({"event": "job", "state": "failed", "id": "two"})
    with_folder.close()
    if how == "moved":
        assert [line["id"] for line in journal.read(tmp_path / "away")] == ["one"]


@pytest.mark.parametrize(("kind", "reason"), [("file", "it is a file"), ("link", "it is a link that leads nowhere")])
def test_k7_what_is_no_folder_is_called_by_its_name(tmp_path, kind, reason):
    if kind == "file":
        (tmp_path / "out").write_text("x")
    else:
        (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(EmtError, match=reason):
        Journal(tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmtError, match="cannot write"):
        Journal(tmp_path / "file")


def test_k8_a_long_list_that_is_done_is_looked_through_at_once(tmp_path):
    """2,000 jobs, of which the last is open: 100,000 of them take 5 s of a processor."""
    reference = program.clip(tmp_path / "a.mp4")
    session = open_session(SessionOptions(model=str(program.model()), cache_dir=tmp_path / "cache"))
    jobs = [Job(reference, "x", seed, Settings(frames=4)) for seed in range(2000)]
    sha256, clips = session.index.sha256(reference), tmp_path / "out"
    lines = []
    for job in jobs[:-1]:
        output = output_name(job, sha256)
        (clips / output).parent.mkdir(parents=True, exist_ok=True)
        (clips / output).write_bytes(b"x")
        line = {"event": "job", "state": "done", "output": output, "settings": job.settings.as_dict(), "bytes": 1}
        line |= {"id": identify(job, reference=sha256, model=session.generator.model_sha256, precision="auto")}
        lines.append(line | {"mtime_ns": (clips / output).stat().st_mtime_ns, "prompt": "x" * 1000})
    (clips / journal.FILE_NAME).write_bytes(b"".join(records.dumps(line) + b"\n" for line in lines))
    begun = time.process_time()
    with ProgressReporter() as reporter:
        outcomes = Outcomes(Journal(clips), reporter)
        task = next(Feeder(session, outcomes, RunOptions()).tasks(jobs))
    assert time.process_time() - begun < 1
    assert task.job == jobs[-1]
    assert outcomes.counts == {"skipped": 1999}


def test_k7_many_jobs_that_are_done_have_a_line_together(capfd):
    with ProgressReporter() as reporter:
        for n in range(100):
            reporter.job({"state": "skipped", "output": f"{n}.mp4"})
        reporter.job({"state": "done", "output": "new.mp4"})
        reporter.job({"state": "skipped", "output": "last.mp4"})
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 23
    assert said[-3:] == ["… and 80 more that are there", "[101] done new.mp4", "[102] have last.mp4"]


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


def test_k3_a_finished_clip_of_another_job_is_known_by_the_journal_or_by_its_own_record(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    whole, cut, plain, text = (tmp_path / f"{name}.mp4" for name in ("whole", "cut", "plain", "text"))
    write_result(whole, frames, 8, {"id": "one", "settings": {"frames": 6}})
    write_result(cut, frames, 8, {"id": "one", "settings": {"frames": 7}})
    write_clip(plain, frames, 8)
    text.write_text("no clip")
    unlisted = {path: is_anothers(None, path, "two") for path in (whole, cut, plain, text, tmp_path / "none.mp4")}
    assert [path for path, another in unlisted.items() if another] == [whole, plain], "what is whole is kept"
    assert not is_anothers(None, whole, "one"), "its own"
    assert not is_anothers(None, Path("\0"), "two"), "no path at all"
    status = plain.stat()
    line = {"id": "one", "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert is_anothers(line, plain, "two"), "as the journal left it: its word is enough"
    assert not is_anothers(line, plain, "one")
    for field in ("bytes", "mtime_ns"):
        for change in (-1, 1):
            changed = line | {field: line[field] + change}
            assert not is_anothers(changed, cut, "two"), "written since, and not whole"
            assert is_anothers(changed, plain, "one"), "edited since, and still a clip"


def test_a_clip_that_must_be_read_to_be_known_comes_with_its_status(result):
    """So that the journal can have it as it was when it was read."""
    job, clip, line = result
    places = []
    for known_line in (line | {"output": clip.name}, line | {"output": clip.name, "mtime_ns": 1}, None):
        known = Known()
        if known_line:
            known.add({"event": "job", "state": "done"} | known_line)
        places.append(find_place(clip.parent, known, job, clip.name, "one", False))
    assert [place.state for place in places] == ["done", "done", "made"]
    assert [place.looked for place in places] == [None, clip.stat(), clip.stat()]


def test_a_clip_cut_short_afterwards_is_made_again(result):
    job, clip, line = result
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 3 // 4])
    assert state_on_disk(line, clip, job, "one") == "open"


def test_k6_lines_hold_nothing_that_a_terminal_obeys():
    value = {"prompt": "".join(map(chr, range(0x250))) + "\u200e\u202e\u2028\u2066\udc80 ein Löwe 🦁"}
    line = records.dumps(value)
    assert json.loads(line) == value
    text = line.decode()
    assert printable(text) == text
    assert "ein Löwe 🦁" in text


@pytest.mark.parametrize(
    ("plain", "own", "place", "with_overwrite"),
    [
        ("nothing", "nothing", "plain open", "plain open"),
        ("this job's", "nothing", "plain done", "plain replaces"),
        ("another job's", "nothing", "own open", "plain replaces"),
        ("another job's", "this job's", "own done", "own replaces"),
        ("no clip", "nothing", "plain open", "plain open"),
    ],
)
def test_k3_the_place_of_a_clip_is_one_where_nothing_finished_is_lost(tmp_path, plain, own, place, with_overwrite):
    job, identity = Job(Path("/a.mp4"), "x", 0, Settings(frames=4)), "f" * 32
    names, known = {"plain": "a/x.mp4", "own": own_name("a/x.mp4", identity)}, Known()
    for name, content in ((names["plain"], plain), (names["own"], own)):
        clip = tmp_path / name
        clip.parent.mkdir(exist_ok=True)
        if content != "nothing":
            clip.write_bytes(b"x")
        if content.endswith("job's"):
            line = {"event": "job", "state": "done", "output": name, "bytes": 1, "mtime_ns": clip.stat().st_mtime_ns}
            known.add(line | {"id": identity if content == "this job's" else "0" * 32})
    for overwrite, expected in ((False, place), (True, with_overwrite)):
        found = find_place(tmp_path, known, job, names["plain"], identity, overwrite)
        where, state = expected.split()
        assert (found.output, found.state) == (names[where], state)
