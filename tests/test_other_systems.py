"""Windows and macOS as far as Linux can stand for them: without what only POSIX has, with the names they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import clip, environment, model

from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job, output_name, own_name
from emt_cli.batch.options import Settings, TransferOptions

#: Modules, and attributes of others, that Windows does not have.
MODULES = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "nis", "spwd", "readline"]
ATTRIBUTES = {
    "os": "pread pwrite preadv pwritev posix_fadvise posix_fallocate sysconf getuid geteuid getgid getpgid "
    "setsid killpg sched_getaffinity sched_setaffinity mkfifo mknod getloadavg chown fchown nice ctermid sync",
    "select": "poll epoll",
    "signal": "SIGHUP SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 SIGSTOP SIGTSTP SIGCHLD SIGALRM SIGWINCH pthread_kill "
    "pthread_sigmask sigwait sigpending alarm setitimer siginterrupt",
}

#: Runs command lines, one after the other, in a Python without them, whose files are as on Windows: folders are not
#: opened, links need a privilege, nothing is renamed over what is there. `--watch` gets Ctrl-C once its clip is made.
ELSEWHERE = f"""
import _thread, glob, importlib, json, os, select, shutil, sys, threading, time
import psutil  # on Linux it is made of these modules
real = select.select
def of_sockets(*lists):
    raise OSError(10038, "An operation was attempted on something that is not a socket")
for name in {MODULES!r}:
    sys.modules[name] = None
for module, names in {ATTRIBUTES!r}.items():
    for name in names.split():
        if hasattr(importlib.import_module(module), name):
            delattr(importlib.import_module(module), name)
shutil._use_fd_functions = False
opened, renamed = os.open, os.rename
def open_no_folder(path, *arguments, **options):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *arguments, **options)
def rename(source, target, **options):
    if os.path.exists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", str(source), None, str(target))
    renamed(source, target, **options)
def link(*arguments, **options):
    raise OSError(1, "A required privilege is not held by the client")
os.open, os.rename, os.symlink = open_no_folder, rename, link
class Windows:
    name = "nt"
    def __getattr__(self, name):
        return getattr(os, name)
import emt.storage
emt.storage.os = Windows()
def interrupt():
    while not glob.glob("out/queued_*/*.json"):
        time.sleep(0.1)
    _thread.interrupt_main()
from emt_cli.app import main
for arguments in json.loads(sys.argv[1]):
    arguments = [glob.glob(word)[0] if "*" in word else word for word in arguments]
    sys.argv = ["emt", *arguments]
    if "--watch" in arguments:
        threading.Thread(target=interrupt, daemon=True).start()
    if "-" in arguments:
        select.select = of_sockets
    try:
        main()
    except SystemExit as ended:
        print(json.dumps({{"code": ended.code}}), flush=True)
    select.select = real
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Lines of standard output and exit code of each command, in a folder with a clip; and that folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    clip(folder / "a.mp4")
    clip(folder / "inbox" / "queued.mp4")
    (folder / "inbox" / "queued.txt").write_text("from the queue")
    common = ["-m", str(model()), "--device", "cpu", "--json"]
    job = {"reference": "a.mp4", "prompt": "from a pipe"}
    commands = [
        ["plan", "a.mp4", "-p", "x", *common],
        ["transfer", "a.mp4", "-p", "x", "--seeds", "random:2", *common],
        ["transfer", "a.mp4", "-p", "x", "--seeds", "random:3", *common],
        ["transfer", "-", *common],
        ["report", "out"],
        ["transfer", "inbox", "--watch", *common],
        ["rerun", "out/a_*/x-*.mp4", "--out", "again.mp4"],
        ["evaluate", "out", "--json"],
        ["transfer", "a.mp4", "-p", "con", "-o", "other", *common],
        ["report", "out", "--compare", "other", "-o", "both.html"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(commands)],
        input=json.dumps(job),
        cwd=folder,
        env=os.environ | environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    runs: list[tuple[list[str], int]] = []
    lines: list[str] = []
    for line in done.stdout.splitlines():
        if re.fullmatch(r'\{"code": \d+\}', line):
            runs.append((lines, json.loads(line)["code"]))
            lines = []
        else:
            lines.append(line)
    assert len(runs) == len(commands), done.stderr
    return runs, folder


def states(run) -> list[str]:
    """States of the jobs of a run."""
    return [line["state"] for line in map(json.loads, run[0]) if line["event"] == "job"]


def test_all_that_makes_and_shows_clips_needs_nothing_that_only_posix_has(elsewhere):
    (plan, first, second, piped, report, watch, rerun, evaluate, other, both), folder = elsewhere
    assert [code for _, code in elsewhere[0]] == [0] * 10
    assert states(plan) == ["open"]
    assert states(first) == ["done"] * 2
    assert sorted(states(second)) == ["done", "skipped", "skipped"], "it resumes, and adds what is new"
    assert states(piped) == states(watch) == states(other) == ["done"]
    assert len(list((folder / "out").glob("queued_*/from-the-queue-0.mp4"))) == 1
    assert rerun[0] == ["again.mp4"]
    assert len([line for line in map(json.loads, evaluate[0]) if "motion_fidelity" in str(line)]) >= 5
    for page in (report, both):
        assert (folder / page[0][0]).stat().st_size > 1000
    assert not [path.name for path in (folder / "out").rglob(".emt-partial-*")]


# ---- names ---------------------------------------------------------------------------------------------------------

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", re.IGNORECASE)


def windows_takes(path: str) -> bool:
    """Whether Windows makes such a file: its documented rules, for each part of the path."""
    parts = path.split("/")
    return all(
        part and not re.search(r'[<>:"\\|?*\x00-\x1f]', part) and part[-1] not in ". " and not RESERVED.fullmatch(part)
        for part in parts
    ) and all(len(part.encode("utf-16-le")) // 2 <= 255 for part in parts)


def outputs(reference: str, prompt: str) -> list[str]:
    """Names of a job's clip, in every format and where another job has its name."""
    made = []
    for form in ("mp4", "png"):
        job = Job(Path("/clips") / reference, prompt, 0, Settings(format=form_of(form)))
        made += [output_name(job, "f" * 64), own_name(output_name(job, "f" * 64), "e" * 32)]
    return made


def form_of(name: str):
    from emt_cli.batch.options import Format

    return Format(name)


@pytest.mark.parametrize(
    "name", ["con", "NUL", "aux", "com1", "LPT9", "a.", "a ", "a:b", 'a"b', "a<b>|c?*", "…", " ", "COM¹"]
)
def test_names_that_windows_refuses_are_never_written(name):
    assert windows_takes("con-0.mp4")
    assert not windows_takes("con.mp4")
    for output in (*outputs(f"{name}.mp4", "x"), *outputs("a.mp4", name)):
        assert windows_takes(output), output


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_names_are_whatever_references_and_prompts_are_and_differ_without_regard_to_case(reference, prompt):
    reference = reference.replace("/", "").replace("\0", "") or "x"
    made = outputs(f"{reference}.mp4", prompt)
    assert all(windows_takes(output) for output in made), made
    for other in (prompt.swapcase(), prompt.upper(), f"{prompt} ", f"{prompt}."):
        if other != prompt:
            same = {output.casefold() for output in made} & {o.casefold() for o in outputs(f"{reference}.mp4", other)}
            assert not same


def test_job_files_take_backslashes_and_drive_letters(tmp_path):
    """A job file that was written on Windows names clips by its paths."""
    clip(tmp_path / "clips" / "a.mp4")
    rows = [{"reference": "clips\\a.mp4", "prompt": "x"}, {"reference": "C:\\clips\\a.mp4", "prompt": "x"}]
    (tmp_path / "jobs.jsonl").write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        here, there = expand(TransferOptions(prompts=[Path("jobs.jsonl")], out=tmp_path / "out"), {})[0]
    finally:
        os.chdir(before)
    assert here.reference == tmp_path / "clips" / "a.mp4"
    assert there.reference.name.endswith("a.mp4"), "elsewhere the drive is not there; the job fails by itself"
