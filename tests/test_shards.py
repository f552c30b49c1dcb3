"""Shards of a job list: several runs, on any machines, that share one list and one output folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path

import program
import pytest
from test_report import embedded

from emt.errors import EmtError
from emt_cli.batch import journal
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job, Rejected
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import TransferOptions
from emt_cli.batch.shards import Shard

PROMPTS = ("--prompt", "a red star", "--prompt", "a lion")


@pytest.fixture
def clips(tmp_path):
    """Sixty files that are clips by their names and differ by size."""
    (tmp_path / "clips").mkdir()
    for number in range(60):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes(b"x" * (number + 1))
    return tmp_path / "clips"


def part(clips: Path, shard: str) -> list[tuple[str, int]]:
    """Names and seeds of the jobs of a shard."""
    options = TransferOptions([str(clips)], prompt=["a fox"], seeds="0-1", out=clips.parent / "out", shard=shard)
    return [(job.reference.name, job.seed) for job in expand(options, {})[0] if isinstance(job, Job)]


def test_every_job_is_in_exactly_one_shard_and_those_of_a_reference_are_together(clips):
    parts = [part(clips, f"{i}/4") for i in range(4)]
    assert sorted(job for jobs in parts for job in jobs) == sorted(part(clips, ""))
    for jobs in parts:
        assert 5 <= len({name for name, _ in jobs}) <= 27, "a fair share"
        assert all((name, 1 - seed) in jobs for name, seed in jobs), "both seeds of a reference"


def test_more_jobs_move_none_to_another_shard(clips):
    before = [set(part(clips, f"{i}/3")) for i in range(3)]
    for number in range(60, 90):
        (clips / f"{number}.mp4").write_bytes(b"y" * (number + 1))
    assert all(jobs <= set(part(clips, f"{i}/3")) for i, jobs in enumerate(before))


def test_a_shard_is_the_same_wherever_the_references_are(clips, tmp_path):
    elsewhere = shutil.copytree(clips, tmp_path / "another" / "mount")
    frames = clips / "frames"
    frames.mkdir()
    for number in range(3):
        (frames / f"{number}.png").write_bytes(b"p" * (number + 1))
    shutil.copytree(frames, elsewhere / "frames")
    for i in range(5):
        assert part(clips, f"{i}/5") == part(elsewhere, f"{i}/5")


def test_what_names_no_clip_is_reported_by_one_shard_alone(clips):
    items = [Rejected(EmtError("bad"), "jobs.jsonl line 3"), Rejected(EmtError("bad"), "", "gone.mp4"), None]
    found = [[list(Shard(i, 3).of(items))] for i in range(3)]
    rejected = [item for [items] in found for item in items if item is not None]
    assert sorted(map(id, rejected)) == sorted(map(id, items[:2]))
    assert all(None in items for [items] in found), "a pause of a stream is one for every shard"


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "0/0", "a/b", "1/4/2", "0/9999999", "0.5/2", " 1/4"])
def test_a_shard_that_is_none_is_one_clear_error(text, tmp_path):
    with pytest.raises(EmtError, match=re.escape(repr(text))) as error:
        Shard.parse(text)
    assert "0 to n-1" in error.value.hint


def test_bad_usage_of_shards_is_exit_code_2(tmp_path):
    for words in (["transfer", "x.mp4"], ["make-pairs", "out", "--from-references", "x.mp4", "--prompts", "p.txt"]):
        ended = program.emt(*words, "--shard", "2/2", folder=tmp_path, environment=program.environment(tmp_path))
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: --shard is '2/2'\nAllowed is i/n")


def test_shards_of_one_number_write_side_by_side_and_nobody_else_does(tmp_path):
    first, second = Shard(0, 2), Shard(1, 2)
    one = Journal(tmp_path, first.writer, beside=first.is_beside)
    two = Journal(tmp_path, second.writer, beside=second.is_beside)
    for other in (Shard(), Shard(0, 3), first):
        with pytest.raises(EmtError, match=f"process {os.getpid()}"):
            Journal(tmp_path, other.writer, beside=other.is_beside)
    one.close()
    two.close()
    Journal(tmp_path, beside=Shard().is_beside).close()


def test_a_run_waits_for_workers_of_a_run_that_was_killed(tmp_path):
    dying = Journal(tmp_path, "worker-0")
    threading.Timer(0.3, dying.close).start()
    Journal(tmp_path, beside=Shard().is_beside).close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder in which two shards have done their parts of six jobs, one after the other."""
    folder = tmp_path_factory.mktemp("sharded")
    for seed in range(3):
        program.clip(folder / "clips" / f"clip{seed}.mp4", seed, frames=8 + seed)
    ended = [program.transfer(folder, "clips", *PROMPTS, "--shard", f"{i}/2", "--json", "-o", "out") for i in range(2)]
    return folder, ended


def test_two_shards_make_what_one_run_makes_each_with_a_journal_of_its_own(sharded):
    folder, ended = sharded
    assert [run.code for run in ended] == [0, 0], ended[0].err + ended[1].err
    made = [[line["output"] for line in program.lines(run)] for run in ended]
    assert all(made), "each has a part"
    assert len(set(made[0] + made[1])) == 6
    names = [f"journal-shard-{i}-of-2.jsonl" for i in range(2)]
    assert [path.name for path in sorted((folder / "out").glob("*.jsonl"))] == names
    assert {line["output"] for line in journal.current(folder / "out")} == set(made[0] + made[1])
    again = program.transfer(folder, "clips", *PROMPTS, "--json", "-o", "out")
    assert [line["state"] for line in program.lines(again)] == ["skipped"] * 6, "a run without shards knows of all"


def test_a_plan_reads_all_writers_and_several_folders(sharded, tmp_path):
    folder, _ = sharded
    words = ["plan", "clips", *PROMPTS, "--model", str(program.model()), "--device", "cpu", "--json"]

    def counts(*more: str) -> tuple[int, int]:
        ended = program.emt(*words, *more, folder=folder, environment=program.environment(folder))
        last = json.loads(ended.out.splitlines()[-1])
        return last["open"], last["done"]

    assert counts("-o", "out") == (0, 6)
    assert sum(counts("-o", "new", "--shard", f"{i}/2")[0] for i in range(2)) == 6
    assert counts("-o", "new") == (6, 0)
    assert counts("-o", "new", "-o", "out") == (0, 6), "what another folder has is done"


def test_a_report_and_measures_take_several_folders(sharded, tmp_path):
    folder, _ = sharded
    more = shutil.copytree(folder / "out", tmp_path / "more")
    environment = program.environment(tmp_path)
    ended = program.emt("report", str(folder / "out"), str(more), folder=folder, environment=environment)
    assert ended.code == 0, ended.err
    page = embedded(Path(ended.out.strip()))
    assert (page["folders"], len(page["jobs"])) == (["out, more"], 12)
    ended = program.emt("report", "a", "b", "--sheet", "s.gif", folder=folder, environment=environment)
    assert ended.code == 2
    assert "one output folder" in ended.err
    words = ["evaluate", str(folder / "out"), str(more), "--json", "--text-model", "none"]
    ended = program.emt(*words, folder=folder, environment=environment)
    assert ended.code == 0, ended.err
    *rows, last = program.lines(ended)
    assert (len(rows), last["clips"]) == (12, 12)
    for out in (folder / "out", more):
        *own, summary = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert (len(own), summary["clips"]) == (6, 6), "each folder has its own"
