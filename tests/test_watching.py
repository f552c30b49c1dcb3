"""A folder as a queue: what is dropped in becomes jobs once it is there whole."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from program import clip, journal, start, transfer

from emt_cli.batch.inputs import expand
from emt_cli.batch.inputs.watching import SETTLED, Watcher
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import TransferOptions, UsageError


class Queue:
    """A watched folder with a clock of its own."""

    def __init__(self, folder: Path, beside: bool = True) -> None:
        self.folder, self.now, self.said = folder, 0.0, list[str]()
        self.watcher = Watcher(self.clips, self.jobs, beside, self.said.append)

    def clips(self) -> list[Path]:
        return sorted(self.folder.glob("*.mp4"))

    def jobs(self, path: Path) -> list[Job]:
        from emt_cli.batch.options import Settings

        prompts = path.with_suffix(".txt")
        lines = prompts.read_text().split("\n") if prompts.exists() else ["x"]
        return [Job(path, line, 0, Settings()) for line in lines if line]

    def look(self, seconds: float = 1.0) -> list[tuple[str, str]]:
        """Clip and prompt of each job that a look finds, so long after the one before."""
        self.now += seconds
        return [(job.reference.name, job.prompt) for job in self.watcher.look(self.now)]

    def wait(self) -> list[tuple[str, str]]:
        """All that is found until nothing has changed for long enough."""
        return self.look() + self.look(SETTLED)


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path)


def test_a_clip_with_its_prompts_is_taken_once(queue):
    clip(queue.folder / "a.mp4")
    (queue.folder / "a.txt").write_text("a fox\na wolf")
    assert queue.look() == [], "it may still be growing"
    assert queue.look(SETTLED) == [("a.mp4", "a fox"), ("a.mp4", "a wolf")]
    assert queue.wait() == []


def test_a_clip_waits_for_its_prompts_and_says_so_once(queue):
    clip(queue.folder / "a.mp4")
    assert queue.wait() + queue.wait() == []
    assert queue.said == ["note: a.mp4 waits for its prompts, in a.txt beside it"]
    (queue.folder / "a.txt").write_text("a fox")
    assert queue.wait() == [("a.mp4", "a fox")]


def test_a_copy_that_grows_is_not_taken_however_slowly_it_comes(tmp_path):
    whole = clip(tmp_path / "whole" / "a.mp4", frames=24).read_bytes()
    (tmp_path / "in").mkdir()
    queue = Queue(tmp_path / "in", beside=False)
    for share in (0.0, 0.3, 0.6, 0.9):
        (queue.folder / "a.mp4").write_bytes(whole[: int(len(whole) * share)])
        assert queue.wait() + queue.look(20) == [], f"{share:.0%} of the file"
    (queue.folder / "a.mp4").write_bytes(whole)
    assert queue.wait() == [("a.mp4", "x")]


def test_a_clip_that_stays_damaged_is_taken_and_fails_as_in_any_run(tmp_path):
    queue = Queue(tmp_path, beside=False)
    whole = clip(tmp_path / "a.mp4", frames=24).read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    assert queue.wait() == []
    assert queue.look(60) == [("a.mp4", "x")]


def test_new_prompts_of_a_clip_are_new_jobs_and_another_clip_of_its_name_is_made_anew(queue):
    clip(queue.folder / "a.mp4")
    (queue.folder / "a.txt").write_text("a fox")
    assert queue.wait() == [("a.mp4", "a fox")]
    (queue.folder / "a.txt").write_text("a fox\na wolf")
    assert queue.wait() == [("a.mp4", "a wolf")]
    clip(queue.folder / "a.mp4", seed=1, frames=12)
    assert queue.wait() == [("a.mp4", "a fox"), ("a.mp4", "a wolf")]


def test_what_goes_away_is_forgotten(queue):
    clip(queue.folder / "a.mp4")
    queue.look()
    (queue.folder / "a.mp4").unlink()
    assert queue.wait() == []
    clip(queue.folder / "a.mp4")
    (queue.folder / "a.txt").write_text("a fox")
    assert queue.wait() == [("a.mp4", "a fox")]


@pytest.mark.parametrize("options", [{"pair": True}, {"shard": "1/2"}, {"references": ["-"]}])
def test_a_queue_goes_with_no_other_source_of_jobs(tmp_path, options):
    with pytest.raises(UsageError, match="--watch"):
        TransferOptions(**{"references": [str(tmp_path)], "watch": True, **options}).check()


def test_what_is_no_folder_cannot_be_watched(tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        expand(TransferOptions(references=[str(clip(tmp_path / "a.mp4"))], watch=True, out=tmp_path / "out"), {})


def test_a_watched_folder_is_worked_off_until_ctrl_c_and_a_plain_run_finds_all_done(tmp_path):
    queue = tmp_path / "in"
    clip(queue / "before.mp4")
    (queue / "before.txt").write_text("x")
    run = start(tmp_path, "in", "--watch", "--json")
    run.wait_for_lines(1)
    whole = clip(tmp_path / "elsewhere.mp4", seed=1, frames=24).read_bytes()
    (queue / "later.mp4").write_bytes(whole[: len(whole) // 2])
    (queue / "later.txt").write_text("y")
    time.sleep(SETTLED + 1.5)  # long enough for what is there to have settled
    assert run.output().count("\n") == 1, "half of a copy is no clip"
    (queue / "part").write_bytes(whole)
    os.replace(queue / "part", queue / "later.mp4")
    run.wait_for_lines(2)
    run.send(signal.SIGINT)
    ended = run.end()
    assert ended.code == 0, ended.err
    assert [line["state"] for line in journal(tmp_path / "out")] == ["done", "done"]
    again = transfer(tmp_path, "in")
    assert again.code == 0
    assert "2 already there" in again.err, "names are those of a plain run"
