"""Many workers: the scheduler alone, then processes of Ray on CPUs, which die, are interrupted and resumed."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import program
import pytest

from emt.errors import EmtError
from emt_cli.batch import journal
from emt_cli.batch.addons import Addon, Addons
from emt_cli.batch.batch_sizes import BatchSizes
from emt_cli.batch.generator import Generator
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Item, Job, numerics
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import Settings, TransferOptions, UsageError, parse_gpus
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.session import RunOptions, SessionOptions, open_session
from emt_cli.batch.tasks import Reference, Task
from emt_cli.batch.worker import Worker
from emt_cli.executors import choice, fleet, gpus
from emt_cli.executors.base import Summary
from emt_cli.executors.fleet import Death, FleetExecutor, worker_name
from emt_cli.executors.ray import _reach
from emt_cli.executors.scheduler import AHEAD, MOST_DEATHS, Parcel, Scheduler
from emt_cli.executors.worker import Order, RemoteWorker, Report, WorkerOptions, take_journal

# ---- which worker gets which job -----------------------------------------------------------------------------------


def parcels(reference: str, count: int) -> list[Parcel]:
    """Jobs of a reference."""
    made = []
    for seed in range(count):
        job = Job(Path(reference), "a fox", seed, Settings())
        made.append(Parcel(Task(job, f"{reference}-{seed}", f"{reference}/{seed}.mp4", Reference(job, reference))))
    return made


def scheduler(workers: int, **jobs: int) -> Scheduler:
    made = Scheduler(workers)
    for reference, count in jobs.items():
        for parcel in parcels(reference, count):
            made.add(parcel)
    return made


def names(taken: list[Parcel]) -> set[str]:
    return {parcel.task.job.reference.name for parcel in taken}


def test_a_reference_stays_with_a_worker_and_others_take_others():
    given = scheduler(3, a=8, b=8, c=8)
    first = [names(given.take(worker, 2)) for worker in range(3)]
    assert first == [{"a"}, {"b"}, {"c"}]
    assert [names(given.take(worker, 2)) for worker in (2, 0, 1)] == [{"c"}, {"a"}, {"b"}]


def test_who_runs_out_takes_from_where_most_is_left():
    given = scheduler(2, a=3, b=20)
    assert names(given.take(0, 3)) == {"a"}
    assert names(given.take(1, 2)) == {"b"}
    assert names(given.take(0, 2)) == {"b"}, "nothing else is left"


def test_the_end_of_a_list_is_shared_evenly():
    given = scheduler(2, a=6)
    assert len(given.take(0, 100)) == 3
    assert len(given.take(1, 100)) == 2
    assert len(given.take(0, 100)) == 1


def test_jobs_that_wait_are_bounded_however_long_the_list_is():
    given = Scheduler(2)
    supply = iter(parcels("a", 1000))
    for turn in range(50):
        while given.room:
            given.add(next(supply))
        assert given.waiting == 2 * AHEAD
        for parcel in given.take(turn % 2, 4):
            given.ended(turn % 2, parcel.task.output)
    assert given.held == 0
    assert Scheduler(1000).room < 10 * 1000  # nor does it grow much with the workers


def test_a_job_whose_worker_died_goes_alone_so_that_it_is_known_by_it():
    given = scheduler(2, a=8)
    assert len(given.take(0, 3)) == 3
    lost = given.lose(0)
    assert len(lost) == 3
    for parcel in lost:
        parcel.deaths += 1
        given.add(parcel)
    [alone] = given.take(0, 3)
    assert alone in lost
    assert given.take(0, 3) == [], "nothing beside it"
    assert given.ended(0, alone.task.output) is alone
    assert len(given.take(1, 3)) == 1
    assert given.ended(1, "of another worker") is None


def test_a_worker_goes_on_with_the_reference_of_one_that_is_no_more():
    given = scheduler(3, a=2)
    assert names(given.take(0, 1) + given.take(1, 1)) == {"a"}
    for parcel in given.lose(0):
        given.add(parcel)
    assert names(given.take(1, 1)) == {"a"}
    given.add(parcels("b", 1)[0])
    assert names(given.take(2, 1)) == {"b"}


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(["add", "take", "end", "die", "give up"]), st.integers(0, 2), st.integers(1, 2)),
        min_size=10,
        max_size=40,
    )
)
def test_every_job_waits_or_is_held_once_whatever_becomes_of_workers(turns):
    given, jobs = Scheduler(3), [iter(parcels(name, 80)) for name in "abc"]
    held: dict[int, list[Parcel]] = {worker: [] for worker in range(3)}
    added = ended = 0
    for what, number, count in turns:
        if what == "add":
            for parcel in itertools.islice(jobs[number], count):
                given.add(parcel)
                added += 1
        elif what == "take":
            held[number] += given.take(number, count)
        elif what == "end" and held[number]:
            parcel = held[number].pop(0)
            assert given.ended(number, parcel.task.output) is parcel
            ended += 1
        elif what in ("die", "give up"):
            assert given.lose(number) == held[number]
            for parcel in held[number]:
                parcel.deaths += what == "die"
                given.add(parcel)
            held[number] = []
        assert given.held == sum(map(len, held.values()))
        assert given.waiting + given.held + ended == added
    for number, parcels_of_it in held.items():
        assert all(given.ended(number, parcel.task.output) is parcel for parcel in parcels_of_it)
    while taken := given.take(0, 4):
        assert all(given.ended(0, parcel.task.output) is parcel for parcel in taken)
    assert (given.waiting, given.held) == (0, 0)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_gpus_are_all_a_number_or_a_list():
    assert [parse_gpus(text) for text in ("all", "3", "0,2,5")] == [None, 3, [0, 2, 5]]
    for text in ("0", "", "two", "1,1", "1,", "-1", "0-3"):
        with pytest.raises(EmtError, match=re.escape(repr(text))):
            parse_gpus(text)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": "2", "device": "cpu"}, "--gpus and --device cpu"),
        ({"gpus": "2", "device": "cuda:1"}, "--gpus and --device cuda:1"),
        ({"workers": 2}, "--device cpu"),
        ({"ray": "auto", "gpus": "0,1"}, "--ray takes --gpus all or N"),
        ({"ray": "auto", "device": "mps"}, "--ray and --device mps"),
        ({"ray": "ray://head:10001"}, "outside a cluster"),
        ({"gpus": "none"}, "--gpus is 'none'"),
    ],
)
def test_what_makes_no_sense_together_is_bad_usage(options, problem):
    with pytest.raises(UsageError, match=problem):
        TransferOptions(**options).check()


def test_gpus_are_counted_among_those_that_cuda_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-abc")
    assert gpus.choose_gpus("all") == ["4", "5", "GPU-abc"]
    assert gpus.choose_gpus("2") == ["4", "5"]
    assert gpus.choose_gpus("0,2") == ["4", "GPU-abc"]
    with pytest.raises(EmtError, match=r"--gpus is '4', this machine has 3") as error:
        gpus.choose_gpus("4")
    assert "--gpus all" in error.value.hint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EmtError, match="no NVIDIA GPU"):
        gpus.choose_gpus("1")


def test_gpus_are_counted_by_the_drivers_library(monkeypatch):
    """As far as a machine without one shows: its own calls, in order, and none of it where it does not start."""

    class Library:
        def __init__(self, fault=0):
            self.fault = fault

        def nvmlInit_v2(self):
            return self.fault

        def nvmlDeviceGetCount_v2(self, count):
            count._obj.value = 3
            return 0

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for library, names in ((Library(), ["0", "1", "2"]), (Library(fault=9), []), (None, [])):
        monkeypatch.setattr(gpus, "management_library", lambda library=library: library)
        assert gpus.visible_gpus() == names


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for options in ({"gpus": "2"}, {"workers": 2, "device": "cpu"}, {"ray": "auto"}):
        with pytest.raises(EmtError, match="needs Ray, which is not installed") as error:
            choice.choose_executor(TransferOptions(**options), SimpleNamespace())
        assert "emt-cli[ray]" in error.value.hint


def test_where_no_cluster_is_that_is_known_at_once(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        _reach(f"127.0.0.1:{port}")
    for address, ray_address in ((f"127.0.0.1:{port}", ""), ("auto", f"127.0.0.1:{port}")):
        monkeypatch.setenv("RAY_ADDRESS", ray_address)
        with pytest.raises(OSError, match=r"nothing answers at 127\.0\.0\.1"):
            _reach(address)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    _reach("auto")  # Ray itself says that none was started here


def test_one_device_needs_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    executor = choice.choose_executor(TransferOptions(), SimpleNamespace())
    assert executor.__name__ == "LocalExecutor"


# ---- files that are made -------------------------------------------------------------------------------------------

PROMPTS = ("--prompt", "a red star", "--prompt", "a lion")
POISON = "a poisoned apple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three references."""
    made = tmp_path_factory.mktemp("fleet")
    for seed in range(3):
        program.clip(made / "clips" / f"clip{seed}.mp4", seed)
    return made


def content(out: Path) -> dict[str, bytes]:
    """Clips and sidecars."""
    files = [*out.glob("*/*.mp4"), *out.glob("*/*.json")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def processes(run: program.Run, name: str) -> list[int]:
    """Processes of a run's own Ray whose command line has a word."""
    found, parents = [], {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if name in words:
            found.append(int(entry.name))

    def is_below(pid: int) -> bool:
        while pid in parents and pid != run.process.pid:
            pid = parents[pid]
        return pid == run.process.pid

    return [pid for pid in found if is_below(pid)]


def done(out: Path) -> list[str]:
    """Outputs of the lines of jobs that are done, of all writers."""
    return sorted(line["output"] for line in journal.read(out) if line.get("state") == "done")


# ---- the driver, with workers in threads of this process ------------------------------------------------------------


class Died(BaseException):
    """Ends a worker as a signal would."""


class ThreadFleet:
    """Real workers in threads of this process, which can die (a `emt_cli.executors.fleet.Fleet`)."""

    def __init__(self, size: int, options: WorkerOptions) -> None:
        self.size, self.options = size, options
        self.workers: dict[int, RemoteWorker] = {}
        self.started = 0

    def open(self) -> None: ...

    def start(self, number: int) -> None:
        self.started += 1
        self.workers[number] = RemoteWorker(replace(self.options, writer=worker_name("", number)))

    def add(self, number: int, orders: list[Order]) -> None:
        self.workers[number].add(orders)

    def wait(self, seconds: float) -> list[tuple[int, Report | Death]]:
        found: list[tuple[int, Report | Death]] = []
        for number, worker in list(self.workers.items()):
            report = worker.report(seconds / self.size)
            died = report.ended and report.error is not None and report.error[0].startswith("Died")
            found.append((number, Death("killed") if died else report))
            if report.ended:
                del self.workers[number]
        return found

    def stop(self, number: int) -> None:
        self.workers[number].stop()

    def close(self, number: int) -> None:
        self.workers[number].close()

    def remove(self, number: int) -> None:
        if worker := self.workers.pop(number, None):
            worker.stop()

    def shutdown(self) -> None:
        for number in list(self.workers):
            self.remove(number)

    abandon = shutdown


@pytest.fixture
def in_turn(monkeypatch):
    """Loading of models one at a time: transformers cannot in two threads of one process."""
    load, guard = Generator.load, threading.Lock()

    def load_in_turn(self: Generator, *rest: Any) -> Any:
        with guard:
            return load(self, *rest)

    monkeypatch.setattr(Generator, "load", load_in_turn)


class Heard:
    """A listener that keeps what it hears."""

    gone = False

    def __init__(self, on_job: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.on_job = on_job

    def job(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.on_job(line)

    def say(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *words, **named: None

    def states(self) -> Counter[str]:
        return Counter(line["state"] for line in self.lines)


def run(
    folder: Path,
    out: str,
    heard: Heard,
    seeds: str = "0-3",
    prompts: Sequence[str] = PROMPTS[1::2],
    come: Callable[[list[Item]], Iterator[Item]] = iter,
    workers: type[ThreadFleet] = ThreadFleet,
) -> Summary:
    """A run of two workers; `come` says when which jobs do."""
    options = TransferOptions(
        references=[str(folder / "clips")],
        prompt=list(prompts),
        seeds=seeds,
        out=folder / out,
        model=str(program.model()),
        device="cpu",
        cache_dir=folder / "cache" / "emt",
    )
    session = open_session(SessionOptions.of(options), "cpu")
    how = RunOptions.of(options, numerics(options))
    made = workers(2, WorkerOptions(SessionOptions.of(options), "cpu", how, options.out, ""))
    log = Journal(options.out)
    try:
        executor = FleetExecutor(session, log, heard, how, made)
        return executor.run(come(expand(options, session.model.defaults)[0]))
    finally:
        log.close()


def die_at(monkeypatch: pytest.MonkeyPatch, dies: Callable[[Job], bool]) -> None:
    """Let workers die where they make the clip of certain jobs."""
    generate = Generator.generate

    def made(self: Generator, jobs: Sequence[Job], *rest: Any) -> Any:
        if any(map(dies, jobs)):
            raise Died
        return generate(self, jobs, *rest)

    monkeypatch.setattr(Generator, "generate", made)


def test_workers_that_die_cost_nothing_but_time(folder, monkeypatch, in_turn):
    deaths = iter([True, True])
    die_at(monkeypatch, lambda job: job.seed == 1 and next(deaths, False))
    heard = Heard()
    summary = run(folder, "deaths", heard)
    assert (summary.exit_code(), heard.states()) == (0, Counter(done=24))
    assert sum("has died" in text for text in heard.said) == 2
    assert done(folder / "deaths") == sorted(line["output"] for line in heard.lines)
    again = Heard()
    run(folder, "deaths", again)
    assert again.states() == Counter(skipped=24)


def test_a_job_that_kills_its_workers_fails_alone(folder, monkeypatch, in_turn):
    die_at(monkeypatch, lambda job: job.prompt == POISON)
    heard = Heard()
    summary = run(folder, "poison", heard, "0", [POISON, *PROMPTS[1::2]])
    assert (summary.exit_code(), heard.states()) == (1, Counter(done=6, failed=3))
    failed = [line for line in heard.lines if line["state"] == "failed"]
    assert {line["prompt"] for line in failed} == {POISON}
    assert all(line["error"].startswith(f"{MOST_DEATHS} workers have died") for line in failed)
    last = {line["output"]: line["state"] for line in journal.current(folder / "poison")}
    assert Counter(last.values()) == Counter(done=6, failed=3), "the journal says so, too"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_clip_that_a_worker_had_written_when_it_died_is_adopted(folder, monkeypatch, in_turn):
    finish, encode, torn = Outcomes.done, Worker._encode, []

    def die_before_the_line(self: Outcomes, line: dict[str, Any], **how: bool) -> None:
        if not torn:
            torn.append((self, line["output"]))
            raise Died
        finish(self, line, **how)

    def die_with_the_writer(self: Worker, task: Task) -> bool:
        if torn and self.outcomes is torn[0][0]:
            raise Died
        return encode(self, task)

    monkeypatch.setattr(Outcomes, "done", die_before_the_line)
    monkeypatch.setattr(Worker, "_encode", die_with_the_writer)
    heard = Heard()
    assert run(folder, "torn", heard).exit_code() == 0
    assert heard.states() == Counter(done=24)
    lines = [line for line in journal.read(folder / "torn") if line.get("output") == torn[0][1]]
    assert [line.get("adopted") for line in lines] == [True]


def test_a_worker_whose_model_cannot_be_opened_is_the_error_of_the_run(folder, monkeypatch):
    def fail(self: Generator, *rest: Any) -> None:
        raise EmtError("the model does not fit", "Take another.")

    monkeypatch.setattr(Generator, "load", fail)
    with pytest.raises(EmtError, match="the model does not fit"):
        run(folder, "unopened", Heard(), "0")


def test_a_machine_on_which_every_worker_dies_ends_the_run(folder, monkeypatch):
    def die(self: RemoteWorker) -> None:
        raise Died

    monkeypatch.setattr(RemoteWorker, "_work", die)
    heard = Heard()
    with pytest.raises(EmtError, match="has died 3 times in a row"):
        run(folder, "dead", heard, "0")
    assert not heard.lines, "the jobs are not blamed"


def test_a_worker_for_which_there_is_never_room_does_not_keep_the_run(folder, monkeypatch):
    class Crowded(ThreadFleet):
        """A cluster that has room for the first worker alone, and for that one late."""

        def start(self, number: int) -> None:
            if number == 0:
                threading.Timer(0.5, super().start, [number]).start()

    monkeypatch.setattr(fleet, "_SILENCE", 0.1)
    heard = Heard()
    assert run(folder, "crowded", heard, "0", workers=Crowded).exit_code() == 0
    assert heard.states() == Counter(done=6)
    assert sum("no worker runs: jobs wait for one" in text for text in heard.said) == 1


def test_a_lost_worker_whose_journal_stays_locked_is_given_up_and_its_jobs_are_done(folder, monkeypatch, in_turn):
    monkeypatch.setattr("emt_cli.executors.worker._TRIES", 2)
    deaths, held = iter([True]), []
    die_at(monkeypatch, lambda job: job.seed == 1 and next(deaths, False))

    class Cut(ThreadFleet):
        """A node that cannot be reached any more, and whose worker holds its journal."""

        def wait(self, seconds: float) -> list[tuple[int, Report | Death]]:
            found = super().wait(seconds)
            for number, news in found:
                if isinstance(news, Death):
                    held.append(take_journal(self.options.out, worker_name("", number)))
            return found

    heard = Heard()
    try:
        assert run(folder, "cut", heard, "0-1", workers=Cut).exit_code() == 0
    finally:
        held[0].close()
    assert heard.states() == Counter(done=12)
    assert sum("going on without worker-" in text for text in heard.said) == len(held) == 1


def test_an_interrupt_ends_in_order_and_the_next_run_does_the_rest(folder, in_turn):
    heard = Heard(lambda line: os.kill(os.getpid(), signal.SIGINT) if len(heard.lines) == 4 else None)
    summary = run(folder, "stopped", heard, "0-9")
    assert summary.exit_code() == 130
    assert any("finishing the running batches" in text for text in heard.said)
    first = done(folder / "stopped")
    assert {line["output"] for line in heard.lines} == set(first), "what was done was reported"
    assert 4 <= len(first) < 60
    again = Heard()
    assert run(folder, "stopped", again, "0-9").exit_code() == 0
    assert again.states() == Counter(skipped=len(first), done=60 - len(first))


def test_jobs_of_a_worker_share_a_reference_only_if_the_same_weights_read_it(folder):
    """As in one process: a LoRA changes what is read, and a clip of another one must not be made of it."""
    lora = Addon("lora", Path("a.safetensors"), "0" * 64, 1.0)
    jobs = [Job(folder / "a.mp4", prompt, 0, Settings()) for prompt in ("a fox", "a fish", "a cat")]
    jobs[1] = replace(jobs[1], addons=Addons((lora,)))
    worker = object.__new__(RemoteWorker)
    worker._changed, worker._closed = threading.Condition(), True
    worker._orders = deque(Order(job, job.prompt, f"{job.prompt}.mp4", "1" * 64) for job in [*jobs, jobs[2]])
    first, laid, plain, again = worker._tasks()
    assert len({id(task.reference) for task in (first, laid, plain)}) == 3
    assert again.reference is plain.reference


def test_batches_of_workers_grow(folder, monkeypatch, in_turn):
    """Although a worker is given its jobs one by one, while it is at those before."""

    class Growing(BatchSizes):
        batches = 0

        def limit(self, *of: Any) -> int:
            return min(4, 2**self.batches)

        def learn(self, *of: Any) -> None:
            self.batches += 1

    made, generate = [], Generator.generate

    def slowly(self: Generator, jobs: Sequence[Job], *rest: Any) -> Any:
        made.append(len(jobs))
        time.sleep(0.5)
        return generate(self, jobs, *rest)

    monkeypatch.setattr("emt_cli.batch.worker.BatchSizes", Growing)
    monkeypatch.setattr(Generator, "generate", slowly)
    heard = Heard()
    run(folder, "growing", heard, "0-6")
    assert heard.states() == Counter(done=42)
    assert made[:2] == [1, 1]
    assert sum(size for size in made if size == 4) >= 20, made


def test_workers_wait_for_what_comes_into_a_queue_and_end_on_request(folder, in_turn):
    """As with --watch: a few jobs now, some more when those are done, and an interrupt while nobody has any."""

    def come(items: list[Item]) -> Iterator[Item]:
        for part in (items[:3], items[3:8]):
            before = len(heard.lines)
            yield from part
            yield None
            assert wait_for(lambda before=before, part=part: len(heard.lines) == before + len(part))
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            time.sleep(0.05)
            yield None

    def wait_for(condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    heard = Heard()
    summary = run(folder, "queue", heard, "0-3", come=come)
    assert summary.interrupted
    assert heard.states() == Counter(done=8)
    assert not any("finishing the running batches" in text for text in heard.said), "there are none"
    again = Heard()
    run(folder, "queue", again, "0-3", come=lambda items: iter(items[:8]))
    assert again.states() == Counter(skipped=8)


# ---- processes of Ray ----------------------------------------------------------------------------------------------


def test_two_workers_of_which_one_is_killed_make_the_same_files_as_one_process(folder):
    alone = program.transfer(folder, "clips", *PROMPTS, "--seeds", "0-9", "--json", "-o", "alone")
    words = ("clips", *PROMPTS, "--seeds", "0-9", "--workers", "2", "--json", "-o", "both")
    run = program.start(folder, *words)
    assert run.wait_for_lines(6, seconds=300), run.end().err
    os.kill(processes(run, "ray::RayWorker")[0], signal.SIGKILL)
    both = run.end(seconds=300)
    assert (alone.code, both.code) == (0, 0), both.err
    assert "has died" in both.err
    assert content(folder / "both") == content(folder / "alone")
    assert len(program.lines(both)) == 60
    assert done(folder / "both") == sorted({line["output"] for line in program.lines(alone)})
    writers = {path.name for path in (folder / "both").glob("journal*.jsonl")}
    assert writers == {"journal.jsonl", "journal-worker-0.jsonl", "journal-worker-1.jsonl"}
    [end] = [line for line in journal.read(folder / "both") if line["event"] == "run"]
    assert (end["done"], set(end["workers"])) == (60, {"worker-0", "worker-1"})
    assert 0 < end["first_clip"] < end["seconds"]
    busy = sum(facts.get("device_busy_seconds", 0) for facts in end["workers"].values())
    assert end["device_busy"] == pytest.approx(busy / 2 / end["seconds"], abs=0.01)
    assert "(worker-" in both.err
    assert "raylet" not in both.err, "Ray's own messages are for its developers"
    assert not list((folder / "both").rglob(".emt-partial-*"))
    again = program.transfer(folder, *words)
    assert [line["state"] for line in program.lines(again)] == ["skipped"] * 60
    assert "starting workers" not in again.err, "no worker is started for nothing"


@pytest.mark.slow
def test_processes_are_interrupted_in_order_too(folder):
    words = ("clips", *PROMPTS, "--seeds", "0-19", "--workers", "2", "--json", "-o", "stopped")
    run = program.start(folder, *words)
    assert run.wait_for_lines(8, seconds=180), run.end().err
    run.send(signal.SIGINT)
    ended = run.end(seconds=120)
    assert ended.code == 130, ended.err
    assert "finishing the running batches" in ended.err
    first = done(folder / "stopped")
    assert {line["output"] for line in program.lines(ended)} == set(first), "what was done was reported"
    again = program.transfer(folder, *words[:-3], "--json", "-o", "stopped")
    states = [line["state"] for line in program.lines(again)]
    assert (states.count("skipped"), states.count("done")) == (len(first), 120 - len(first))


@pytest.mark.slow
def test_the_end_of_ray_is_one_clear_error_and_the_end_of_the_driver_ends_all(folder):
    words = ("clips", *PROMPTS, "--seeds", "0-19", "--workers", "2", "--json", "-o", "head")
    run = program.start(folder, *words)
    assert run.wait_for_lines(4, seconds=180), run.end().err
    os.kill(processes(run, "raylet/raylet")[0], signal.SIGKILL)
    ended = run.end(seconds=60)
    assert ended.code == 1, ended.err
    assert "error: Ray has ended" in ended.err
    assert "Traceback" not in ended.err
    run = program.start(folder, *words)
    assert run.wait_for_lines(len(done(folder / "head")) + 4, seconds=180), run.end().err
    workers = processes(run, "ray::RayWorker")
    run.send(signal.SIGKILL)
    run.process.join()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "nothing goes on without its driver"
    assert program.transfer(folder, *words[:-3], "--json", "-o", "head").code == 0
    outputs = done(folder / "head")
    assert len(outputs) == len(set(outputs)) == 120


@pytest.mark.slow
def test_a_job_that_kills_its_workers_fails_and_the_others_are_done(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, threading\n"
        "def poison():\n"
        "    from emt_cli.batch.generator import Generator\n"
        "    make = Generator.generate\n"
        "    def generate(self, jobs, *rest):\n"
        f"        any(job.prompt == {POISON!r} for job in jobs) and os._exit(9)\n"
        "        return make(self, jobs, *rest)\n"
        "    Generator.generate = generate\n"
        "if os.environ.get('EMT_TEST_POISON'):\n"
        "    import emt_cli.executors.worker as worker\n"
        "    run = worker.RemoteWorker._run\n"
        "    worker.RemoteWorker._run = lambda self: (poison(), run(self))\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = program.environment(folder) | {"PYTHONPATH": path, "EMT_TEST_POISON": "1"}
    words = ["transfer", "clips/clip0.mp4", "--model", str(program.model()), "--device", "cpu", "--workers", "2"]
    prompts = ["--prompt", POISON, *PROMPTS, "--seeds", "0-1"]
    ended = program.Run(*words, *prompts, "--json", "-o", "poisoned", folder=folder, environment=environment).end(240)
    assert ended.code == 1, ended.err
    by_state = {line["prompt"] for line in program.lines(ended) if line["state"] == "failed"}
    assert by_state == {POISON}
    assert sum(line["state"] == "done" for line in program.lines(ended)) == 4
    [error] = {line["error"] for line in program.lines(ended) if line["state"] == "failed"}
    assert error.startswith(f"{MOST_DEATHS} workers have died while they made this clip")
    lines = [json.loads(line) for line in (folder / "poisoned" / "journal.jsonl").read_bytes().splitlines()]
    assert sum(line.get("state") == "failed" for line in lines) == 2


#: A cluster of a head without CPUs and two nodes with one each; `kill` ends the first node, with all that runs there.
_CLUSTER = """
import signal, sys
import psutil
from ray.cluster_utils import Cluster

least = {"object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **least})
nodes = [cluster.add_node(num_cpus=1, **least) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    raylet = psutil.Process(nodes[0].all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_of_a_cluster_that_dies_costs_only_what_was_running(folder, tmp_path):
    (folder / "model").symlink_to(program.model())
    quiet = (
        dict(os.environ) | program.environment(folder) | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    )
    words = [sys.executable, "-c", _CLUSTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=tmp_path, env=quiet, stdin=pipe, stdout=pipe, text=True) as cluster:
        assert cluster.stdin
        assert cluster.stdout
        address = cluster.stdout.readline().strip()
        # Relative paths count from here, not from where the cluster was started.
        given = ["transfer", "clips", *PROMPTS, "--model", "model", "--seeds", "0-9", "--device", "cpu"]
        given += ["--ray", address, "--json", "-o", "cluster"]
        run = program.Run(*given, folder=folder, environment=quiet)
        assert run.wait_for_lines(6, seconds=180), run.end().err
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()
        ended = run.end(seconds=240)
        cluster.stdin.close()
    assert ended.code == 0, ended.err
    assert "has died" in ended.err
    outputs = done(folder / "cluster")
    assert len(outputs) == len(set(outputs)) == 60
    assert {line["output"] for line in program.lines(ended)} == set(outputs)
