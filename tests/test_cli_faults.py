"""What the device and the disk can do to a run: each failure stays with its own job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from program import EMT, clip, emt, environment, journal, model

from emt.cache import ContentIndex, MotionCache
from emt.features import Motion
from emt.model_folder import find_model
from emt.sampling import NonFiniteError
from emt_cli import app
from emt_cli.batch import worker
from emt_cli.batch.estimates import memory, size_that_fits
from emt_cli.batch.generator import Generator
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import Settings, TransferOptions
from emt_cli.batch.session import RunOptions, Session
from emt_cli.executors.local import LocalExecutor
from emt_cli.terminal import ProgressReporter


class Faulty(Generator):
    """The real generator, on a device that holds `fits` clips, and fails at the prompts `nan` and `bug`."""

    fits = 64

    def check(self, job):
        if job.prompt == "odd":
            raise RecursionError("maximum recursion depth exceeded")
        super().check(job)

    def generate(self, jobs, motions, on_step):
        if len(jobs) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        broken = [place for place, job in enumerate(jobs) if job.prompt == "nan"]
        if broken:
            raise NonFiniteError(broken, [jobs[place].seed for place in broken])
        if any(job.prompt == "bug" for job in jobs):
            raise RuntimeError("expected scalar type Half but found Float\nand more lines")
        return super().generate(jobs, motions, on_step)


@pytest.fixture
def run(tmp_path, capfd):
    """Runs jobs with a faulty generator: prompts in, the journal's lines and standard error out."""
    clip(tmp_path / "a.mp4")

    def go(*prompts: str, fits: int = 64, batch_size: int | None = None):
        found = find_model(str(model()), download=False)
        index = ContentIndex(tmp_path / "cache")
        generator = Faulty(found, found.sha256(index), "cpu", "auto")
        generator.fits = fits
        jobs, _ = expand(TransferOptions([str(tmp_path / "a.mp4")], prompt=list(prompts)), found.defaults)
        log = Journal(tmp_path / "out")
        cache = MotionCache(tmp_path / "cache", 1e9)
        with ProgressReporter() as reporter:
            session = Session(found, index, cache, generator)
            summary = LocalExecutor(session, log, reporter, RunOptions(batch_size=batch_size)).run(jobs)
        log.close()
        return summary, {line["prompt"]: line for line in journal(tmp_path / "out")}, capfd.readouterr().err

    return go


@pytest.mark.parametrize(
    ("fits", "sizes"), [(4, [4, 4, 4, 4, 1]), (2, [2, 2, 2, 2, 1]), (1, [1] * 5), (3, [2, 2, 2, 2, 1])]
)
def test_out_of_memory_halves_the_batch_and_goes_on(run, fits, sizes):
    summary, reported, err = run("a", "b", "c", "d", "e", fits=fits, batch_size=4)
    assert summary.counts == {"done": 5}
    assert [reported[prompt]["batch"]["size"] for prompt in "abcde"] == sizes
    assert err.count("do not fit in memory") == {4: 0, 3: 1, 2: 1, 1: 2}[fits]


def test_out_of_memory_at_one_clip_says_what_would_fit(run):
    summary, reported, _ = run("a", fits=0)
    assert summary.counts == {"failed": 1}
    assert reported["a"]["error"].startswith("out of memory: a clip of 4 frames of 32x32 needs more than")
    assert reported["a"]["hint"] == "This should fit: --width 24 --height 24"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_clip_that_is_not_finite_fails_and_its_batch_does_not(run, batch_size):
    summary, reported, _ = run("a", "nan", "b", batch_size=batch_size)
    assert summary.counts == {"done": 2, "failed": 1}
    assert "NaN" in reported["nan"]["error"]
    assert "--precision" in reported["nan"]["hint"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_other_failure_is_one_line(run, batch_size):
    summary, reported, err = run("a", "bug", "b", batch_size=batch_size)
    assert summary.counts == {"done": 2, "failed": 1}
    assert reported["bug"]["error"] == "RuntimeError: expected scalar type Half but found Float"
    assert "Traceback" not in err


def test_k5_whatever_is_wrong_with_one_job_before_the_device_leaves_the_others(run):
    """Errors of any kind: of the libraries that read files, or of this program."""
    summary, reported, err = run("a", "odd", "b")
    assert summary.counts == {"done": 2, "failed": 1}
    assert reported["odd"]["error"] == "RecursionError: maximum recursion depth exceeded"
    assert "Traceback" not in err


def test_k5_a_listener_that_fails_loses_no_journal_line(tmp_path, run, monkeypatch):
    monkeypatch.setattr(ProgressReporter, "result", lambda self, line: 1 / 0)
    summary, reported, err = run("a", "b")
    assert summary.counts == {"done": 2}
    assert {line["state"] for line in reported.values()} == {"done"}
    assert "ZeroDivisionError" in err


def test_a_size_that_should_fit_is_smaller_by_the_memory_that_is_there():
    found = find_model(str(model()), download=False)
    large = Settings(frames=16, height=512, width=1024)
    needed = memory(found, large, half=True)
    width, height = (int(word) for word in size_that_fits(found, large, needed / 4, half=True).split()[1::2])
    assert width % 8 == height % 8 == 0
    assert 1.8 < width / height < 2.2
    smaller = Settings(frames=16, height=height, width=width)
    assert needed / 16 < memory(found, smaller, half=True) < needed / 4


def test_a_full_disk_fails_the_jobs_it_has_no_room_for(tmp_path):
    """On a disk of its own: clips of noise fill it after some jobs."""
    script = f"""
        mount -t tmpfs -o size=1700k tmpfs out &&
        '{EMT}' transfer a.mp4 --prompt x --seeds 0-39 --json --device cpu --model '{model()}' --frames 4 \
            --width 128 --height 128 --steps 1 >results 2>errors
        echo $? >code; cp out/journal.jsonl journal.jsonl
    """
    clip(tmp_path / "a.mp4")
    (tmp_path / "out").mkdir()
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small disk")
    env = os.environ | environment(tmp_path)
    subprocess.run([unshare, "-Urm", "sh", "-c", script], cwd=tmp_path, env=env, timeout=300)
    lines = [json.loads(line) for line in (tmp_path / "results").read_bytes().splitlines()]
    states = [line["state"] for line in lines]
    assert len(lines) == 40
    assert {"done", "failed"} == set(states)
    assert all("space" in line["error"] for line in lines if line["state"] == "failed")
    assert (tmp_path / "code").read_text().strip() == "1"
    assert "Traceback" not in (tmp_path / "errors").read_text()
    reported = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    assert sum(line.get("state") == "done" for line in reported) == states.count("done")


def test_batches_are_as_full_as_they_can_be(tmp_path):
    one, two = clip(tmp_path / "1.mp4", 1), clip(tmp_path / "2.mp4", 2)
    rows = [{"reference": str(r), "prompt": p, "steps": s} for p in "xy" for s in (1, 2) for r in (one, two)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    jobs, _ = expand(TransferOptions(prompts=[tmp_path / "jobs.jsonl"]), {})
    order = [(job.settings.steps, job.reference.name, job.prompt) for job in jobs if isinstance(job, Job)]
    assert order == [(s, r, p) for s in (1, 2) for r in ("1.mp4", "2.mp4") for p in "xy"]


@pytest.mark.parametrize(
    "arguments", [("transfer", "", "--prompt", "x"), ("transfer", "a.mp4", "--model", ""), ("rerun", "")]
)
def test_k2_an_empty_argument_is_not_the_working_folder(tmp_path, arguments):
    clip(tmp_path / "a.mp4")
    ended = emt(*arguments, folder=tmp_path, environment=environment(tmp_path))
    assert (ended.code, ended.out) == (2, "")
    assert "it is empty" in ended.err


def test_k5_a_folder_is_no_clip_to_make_again(tmp_path):
    ended = emt("rerun", ".", folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 1
    assert ended.err.splitlines()[0] == "error: . is no clip"


@pytest.mark.parametrize("arguments", [("rerun", "a\nb.mp4"), ("report", "a\nb"), ("plan", "--model", "a\nb")])
def test_k7_a_name_with_a_line_break_breaks_no_line_of_an_error(tmp_path, arguments):
    ended = emt(*arguments, folder=tmp_path, environment=environment(tmp_path))
    assert ended.code != 0
    problem, *hint = ended.err.splitlines()
    assert problem.startswith("error: ")
    assert r"a\nb" in problem
    assert len(hint) <= 1


def test_k7_a_working_folder_that_was_removed_is_said(tmp_path, monkeypatch, capfd):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    begun = []
    assert app._run(lambda **_: begun.append(1), []) == 1
    assert not begun, "PyTorch's libraries would end the process"
    assert capfd.readouterr().err == "error: the working folder was removed\nChange into another one: cd FOLDER\n"


def test_k7_a_working_folder_that_is_removed_in_mid_run_is_said(tmp_path, monkeypatch, capfd):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)

    def command(**_):
        gone.rmdir()
        Path("a").absolute()

    assert app._run(command, []) == 1
    assert capfd.readouterr().err.startswith("error: the working folder was removed\n")


def test_k5_what_nobody_has_foreseen_is_two_lines_and_a_file_with_the_rest(tmp_path, monkeypatch, capfd):
    def command(**_):
        raise ZeroDivisionError("division by zero\nmore")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert app._run(command, []) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == "error: ZeroDivisionError: division by zero"
    [kept] = tmp_path.iterdir()
    assert second == f"This is a fault of emt: please report it with {kept}."
    assert "in command" in kept.read_text()


def test_motions_of_references_that_are_done_are_let_go(tmp_path, monkeypatch):
    """However many threads have read references: on a GPU each holds half a gigabyte."""
    encoded: list[weakref.ref[Motion]] = []
    alive: list[int] = []

    class Counting(Generator):
        def encode(self, job, source):
            alive.append(sum(motion() is not None for motion in encoded))
            motion = super().encode(job, source)
            encoded.append(weakref.ref(motion))
            return motion

        def generate(self, jobs, motions, on_step):
            alive.append(sum(motion() is not None for motion in encoded))
            return super().generate(jobs, motions, on_step)

    monkeypatch.setattr(worker, "_READERS", 8)
    monkeypatch.setattr(worker, "_AHEAD", 10)
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for number, path in enumerate(paths):
        clip(path, number)
    found = find_model(str(model()), download=False)
    index, log = ContentIndex(tmp_path / "cache"), Journal(tmp_path / "out")
    jobs, _ = expand(TransferOptions([str(path) for path in paths], prompt=["a fox"]), found.defaults)
    with ProgressReporter() as reporter:
        generator = Counting(found, found.sha256(index), "cpu", "auto")
        session = Session(found, index, MotionCache(tmp_path / "cache", 0), generator)
        summary = LocalExecutor(session, log, reporter, RunOptions(batch_size=1)).run(jobs)
    log.close()
    assert summary.counts == {"done": 6}
    assert max(alive) == 1, "the one that is used, and none while the next one is encoded"
    assert alive[::2] == [0] * 6
