"""Standard streams that close, fill or are not read, and interrupts at any moment: no hang, no lost line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import EMT, clip, environment, model, start

from emt_cli.streams import Stream

# A shell has what it starts in the background ignore interrupts: the tests, and this program unless it resets that.
LATE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
class Slow:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            print("importing", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Slow())
sys.argv = ["emt", "plan", "x.mp4"]
from emt_cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii:strict", rb"\xfc \u732b \ud800 "),
        ("latin-1", b"\xfc \\u732b \\ud800 "),
        ("utf-8:strict", "ü 猫 ".encode() + rb"\ud800 "),
        ("cp1252", b"\xfc \\u732b \\ud800 "),
    ],
)
def test_k5_what_an_encoding_does_not_have_is_written_as_an_escape(encoding, written):
    """Terminals of other locales, and files that Windows redirects to; names that are no text stay as they are."""
    code = "import sys; from emt_cli import streams; streams.open_standard_streams(); print('ü 猫 \\ud800 \\udcff')"
    surroundings = os.environ | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, check=True)
    assert ended.stdout == written + b"\xff\n"


@pytest.mark.parametrize("name", ["emt_cli.streams", "typer", "emt_cli.commands.plan", "emt.model_folder"])
def test_k4_an_interrupt_while_the_program_is_imported_is_quiet(name):
    with subprocess.Popen(
        [sys.executable, "-c", LATE.format(name=name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout.readline() == b"importing\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(25) == 130
        assert run.stderr.read() == b""


def shell(folder, redirections: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`emt plan` with its streams redirected by a shell; stdout, and in stderr what a file `err` has."""
    command = f"'{EMT}' plan a.mp4 --prompt x --model '{model()}' --device cpu {' '.join(options)} {redirections}"
    environ = os.environ | environment(folder)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("redirections", "code", "said"),
    [
        (">/dev/full", 1, "error: cannot write to standard output: No space left on device"),
        (">&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
        ("2>/dev/full", 0, ""),
        ("2>&- >&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_k4_streams_that_cannot_be_written_end_in_a_line_and_a_code(tmp_path, redirections, code, said, options):
    clip(tmp_path / "a.mp4")
    ended = shell(tmp_path, redirections, *options)
    assert (ended.returncode, ended.stderr.strip()) == (code, said)


def test_k4_files_do_not_take_the_place_of_a_closed_stream(tmp_path):
    """What is written to a closed standard error must not go into the journal that was opened next."""
    clip(tmp_path / "a.mp4")
    options = f"--prompt x --model '{model()}' --device cpu --json"
    environ = os.environ | environment(tmp_path)
    command = f"'{EMT}' transfer a.mp4 missing.mp4 {options} <&- 2>&- >&-"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environ, timeout=120)
    assert ended.returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_bytes().splitlines()]
    assert [line.get("state") for line in lines] == ["failed", "done", None]


def full_pipe() -> tuple[int, int]:
    """A pipe that takes nothing more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"\n" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


def test_k4_the_first_signal_ends_in_order_and_the_second_at_once_whatever_is_blocked(tmp_path):
    """Nobody reads either stream, and both are full."""
    clip(tmp_path / "a.mp4")
    readers = [full_pipe() for _ in range(2)]
    out, err = (f"/proc/{os.getpid()}/fd/{writer}" for _, writer in readers)
    job = ["a.mp4", "--prompt", "x", "--seeds", "0-999", "--json"]
    took = []
    for signals in (1, 2, 2, 2):
        if min(took[1:], default=2.0) < 1:
            break  # else the machine may be busy
        run = start(tmp_path, *job, stdout=Path(out), stderr=Path(err))
        journal = tmp_path / "out" / "journal.jsonl"
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        while not journal.exists() or journal.read_bytes().count(b"\n") < before + 3:
            run.process.join(0.05)
            assert run.process.is_alive()
        for _ in range(signals):
            run.send(signal.SIGINT)
            time.sleep(0.05)
        begun = time.monotonic()
        assert run.end(seconds=60).code == 130
        took.append(time.monotonic() - begun)
        if signals == 1:
            assert json.loads(journal.read_bytes().splitlines()[-1])["interrupted"]
    assert min(took[1:]) < 1, "the second signal ends it at once"


@pytest.mark.parametrize("clips", [1, 3])
def test_k4_a_full_standard_output_loses_no_clip_and_is_said(tmp_path, clips):
    """Also where the last result is the one that cannot be written."""
    clip(tmp_path / "a.mp4")
    seeds = f"0-{clips - 1}"
    ended = start(tmp_path, "a.mp4", "--prompt", "x", "--seeds", seeds, stdout=Path("/dev/full")).end()
    assert ended.code == 1
    assert ended.err.count("cannot write to standard output: No space left on device") == 1
    assert f"{clips} done" in ended.err
    assert len(list((tmp_path / "out").glob("*/*.mp4"))) == clips


# ---- a stream -----------------------------------------------------------------------------------------------------


def test_a_lossy_stream_never_waits_and_another_one_does():
    reader, writer = full_pipe()
    with open(reader, "rb"), open(writer, "w") as file:
        lossy = Stream(file, backlog=10, lossy=True)
        for _ in range(100):
            lossy.write(b"12345")
        assert not lossy.drain(0.1)
        patient = Stream(file, backlog=10)
        patient.write(b"1234567890.")
        patient.hurry()
        patient.write(b"more")  # does not wait any longer
        begun = time.monotonic()
        assert not patient.drain()
        assert time.monotonic() - begun < 20


def test_a_stream_that_has_failed_says_why_and_takes_nothing_more(tmp_path):
    with open("/dev/full", "w") as file:
        stream = Stream(file, backlog=10)
        stream.write(b"x")
        assert stream.drain(5)
        assert stream.error is not None
        assert stream.error.errno == errno.ENOSPC
        stream.write(b"x" * 100)
        assert stream.drain(0)
    nowhere = Stream(None, backlog=0)
    nowhere.write(b"x")
    assert nowhere.drain(0)


def test_a_sample_of_disturbed_streams():
    import streams

    streams.main(["--runs", "4"])
