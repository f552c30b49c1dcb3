"""`emt transfer` as a shell runs it: what it makes, skips, prints and returns."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from program import EMT, FRAMES, SIDE, Run, clip, console, emt, environment, journal, lines, model, start, transfer

from emt.video import read_clip, read_metadata, write_clip
from emt_cli.batch.journal import Journal, current, read
from emt_cli.batch.results import is_untouched, reference_of
from emt_cli.commands.rerun import compare


def states(ended) -> dict[str, int]:
    return dict(Counter(line["state"] for line in lines(ended)))


def test_references_times_prompts_become_clips_that_carry_their_settings(tmp_path):
    clip(tmp_path / "clips" / "walk.mp4", 1)
    clip(tmp_path / "clips" / "run.gif", 2)
    ended = console(
        tmp_path,
        "transfer",
        "clips",
        "--prompt",
        "a red star",
        "--prompt",
        "Löwe!",
        "--model",
        model(),
        "--device",
        "cpu",
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 done, 0 already there, 0 failed" in ended.stderr
    results = [tmp_path / line for line in ended.stdout.splitlines()]
    assert sorted(path.name[:5] for path in results) == ["a-red", "a-red", "löwe_", "löwe_"]
    reported = {line["output"]: line for line in journal(tmp_path / "out")}
    for path in results:
        assert read_clip(path, frames=FRAMES).frames.shape == (FRAMES, SIDE, SIDE, 3)
        record = json.loads(read_metadata(path)["emt"])
        assert record == json.loads(path.with_name(path.name + ".json").read_bytes())
        line = reported[f"{path.parent.name}/{path.name}"]
        assert line.items() >= record.items()
        assert set(line["timings"]) == {"decode", "reference", "steps", "vae", "encode"}
        assert line["peak_memory"] > 1e6
        assert (record["device"], record["precision"], record["engine"]) == ("cpu", "fp32", "torch")
        assert record["kernels"] == "reference"
        assert record["settings"]["steps"] == 2, "the model's own default"
    assert not list(tmp_path.rglob(".emt-partial-*"))


def test_k2_a_reference_that_has_moved_is_found_where_the_next_run_found_it(tmp_path):
    """`emt evaluate` and `emt report` read the journal; a copy beside the old one changes nothing."""
    (tmp_path / "clips").mkdir()
    old = clip(tmp_path / "clips" / "a.mp4", 1)
    arguments = ("--prompt", "x", "--json", "-o", "out")

    def named() -> tuple[int, list[Path]]:
        found = current(tmp_path / "out")
        return len(read(tmp_path / "out")), [reference_of(tmp_path / "out", line["reference"]) for line in found]

    assert states(transfer(tmp_path, "clips", *arguments)) == {"done": 1}
    assert named() == (2, [old])
    shutil.copytree(tmp_path / "clips", tmp_path / "copy")
    assert states(transfer(tmp_path, "copy", *arguments)) == {"skipped": 1}
    assert named() == (3, [old])
    shutil.rmtree(tmp_path / "clips")
    for lines_then in (5, 6):  # it is said once
        assert states(transfer(tmp_path, "copy", *arguments)) == {"skipped": 1}
        assert named() == (lines_then, [tmp_path / "copy" / "a.mp4"])


def test_finished_jobs_are_skipped_while_contents_and_settings_are_the_same(tmp_path):
    reference = clip(tmp_path / "a.mp4", 1)
    job = ["a.mp4", "--prompt", "x", "--json"]
    assert states(transfer(tmp_path, *job)) == {"done": 1}
    os.utime(reference)
    assert states(transfer(tmp_path, *job)) == {"skipped": 1}, "the time of a file is not its content"
    assert states(transfer(tmp_path, *job, "--steps", 1)) == {"done": 1}, "another setting"
    assert states(transfer(tmp_path, *job, "--steps", 1, "--overwrite")) == {"done": 1}
    clip(reference, 2)
    assert states(transfer(tmp_path, *job, "--steps", 1)) == {"done": 1}, "another content"
    shutil.move(reference, tmp_path / "deep-a.mp4")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "deep-a.mp4", tmp_path / "elsewhere" / "a.mp4")
    assert states(transfer(tmp_path, "elsewhere/a.mp4", *job[1:], "--steps", 1)) == {"skipped": 1}, "moved"


@pytest.mark.parametrize(
    "changed", [["--guidance", "3"], ["--steps", "1"], ["--precision", "bf16"], ["--model", "other"]]
)
def test_k3_a_finished_clip_is_never_replaced_without_overwrite(tmp_path, changed):
    """The same reference, prompt and seed made otherwise has a name of its own, which later runs know."""
    clip(tmp_path / "a.mp4")
    if "other" in changed:
        config = json.loads((shutil.copytree(model(), tmp_path / "other") / "model_index.json").read_bytes())
        (tmp_path / "other" / "model_index.json").write_text(json.dumps({**config, "steps": 3}))
    job = ["a.mp4", "--prompt", "x", "--json"]

    def plan_states(*options):
        words = ["plan", *job, "--model", model(), "--device", "cpu", *options]
        ended = emt(*map(str, words), folder=tmp_path, environment=environment(tmp_path))
        return [line["state"] for line in map(json.loads, ended.out.splitlines()) if line["event"] == "job"]

    [first] = lines(transfer(tmp_path, *job))
    before = (tmp_path / first["path"]).read_bytes()
    assert plan_states(*changed) == ["open"]
    [second] = lines(transfer(tmp_path, *job, *changed))
    assert second["state"] == "done"
    assert second["output"].removesuffix(".mp4") == f"{first['output'].removesuffix('.mp4')}_{second['id'][:10]}"
    assert (tmp_path / first["path"]).read_bytes() == before
    for options in ([], changed):
        assert states(transfer(tmp_path, *job, *options)) == {"skipped": 1}
        assert plan_states(*options) == ["done"]
    assert len(journal(tmp_path / "out")) == 2

    assert plan_states("--overwrite") == plan_states(*changed, "--overwrite") == ["replaces"]
    [again] = lines(transfer(tmp_path, *job, *changed, "--overwrite"))
    assert again["output"] == second["output"], "the clip itself, not that which has its plain name"
    assert (tmp_path / first["path"]).read_bytes() == before


def test_k3_overwrite_replaces_what_has_the_plain_name(tmp_path):
    clip(tmp_path / "a.mp4")
    [first] = lines(transfer(tmp_path, "a.mp4", "--prompt", "x", "--json"))
    (tmp_path / "out" / "journal.jsonl").unlink()  # what the clip itself carries says so
    [second] = lines(transfer(tmp_path, "a.mp4", "--prompt", "x", "--json", "--steps", "1", "-o", "out"))
    assert second["output"] != first["output"]
    (tmp_path / second["path"]).unlink()
    [third] = lines(transfer(tmp_path, "a.mp4", "--prompt", "x", "--json", "--steps", "1", "--overwrite"))
    assert third["output"] == first["output"]


def test_k8_clips_of_a_copied_folder_are_looked_at_once(tmp_path):
    """Copies have other times: the first run that finds them whole writes these down."""
    clip(tmp_path / "a.mp4")
    job = ["a.mp4", "--prompt", "x", "--seeds", "0-2", "--json"]
    transfer(tmp_path, *job)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    assert states(transfer(tmp_path, *job, "-o", "copy")) == {"skipped": 3}
    log = (tmp_path / "copy" / "journal.jsonl").read_bytes()
    assert log.count(b'"event": "file"') == 3
    assert states(transfer(tmp_path, *job, "-o", "copy")) == {"skipped": 3}
    known = Journal(tmp_path / "copy").known
    for output, line in known.done.items():
        assert is_untouched(line, (tmp_path / "copy" / output).stat())
    assert (tmp_path / "copy" / "journal.jsonl").read_bytes().count(b'"event": "file"') == 3


def test_a_clip_that_its_run_could_not_write_down_is_adopted_not_made_again(tmp_path):
    clip(tmp_path / "a.mp4")
    job = ["a.mp4", "--prompt", "x", "--seeds", "0-1", "--json"]
    first, second = lines(transfer(tmp_path, *job))
    before = (tmp_path / first["path"]).stat().st_mtime_ns
    content = (tmp_path / "out" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "journal.jsonl").write_bytes(content[1][:50])  # as a crash might leave it
    (tmp_path / f"{first['path']}.json").unlink()
    (tmp_path / "out" / Path(second["output"]).parent / ".emt-partial-0123").write_text("left")
    assert states(transfer(tmp_path, *job)) == {"skipped": 2}
    assert [(line["id"], line["adopted"]) for line in journal(tmp_path / "out")] == [
        (first["id"], True),
        (second["id"], True),
    ]
    assert (tmp_path / first["path"]).stat().st_mtime_ns == before
    assert (tmp_path / f"{first['path']}.json").exists()
    assert not list(tmp_path.rglob(".emt-partial-*"))


def test_a_bad_job_fails_alone_with_one_clear_line(tmp_path):
    clip(tmp_path / "good.mp4")
    clip(tmp_path / "short.mp4", frames=2)
    content = clip(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    jobs = [
        {"reference": "cut.mp4", "prompt": "x"},
        {"reference": "short.mp4", "prompt": "x"},
        {"reference": "missing.mp4", "prompt": "x"},
        {"reference": "good.mp4", "prompt": ""},
        {"reference": "good.mp4", "prompt": "x", "steps": "many"},
        {"reference": "good.mp4", "prompt": "x", "frames": 32},
        {"reference": "good.mp4", "prompt": "x"},
    ]
    ended = transfer(tmp_path, "-", "--json", stdin="\n".join([*map(json.dumps, jobs), "{nonsense", ""]).encode())
    assert ended.code == 1
    reported = {line["origin"]: line for line in lines(ended)}
    assert len(reported) == 8
    assert [reported[f"line {n}"]["state"] for n in range(1, 9)] == ["failed"] * 6 + ["done", "failed"]
    for n, word in ((1, "cut.mp4"), (2, "2 frames"), (3, "missing.mp4"), (4, "empty"), (5, "many"), (8, "not JSON")):
        assert word in reported[f"line {n}"]["error"]
        assert ended.err.count(f"line {n} ") + ended.err.count(f"line {n}:") <= 1
    assert "Traceback" not in ended.err
    failed = [line for line in journal(tmp_path / "out") if line["state"] == "failed"]
    assert len(failed) == 7
    assert all(line["error"] for line in failed)


def test_jobs_on_standard_input_are_done_as_they_arrive(tmp_path):
    clip(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "jobs")
    run = start(tmp_path, "-", "--json", "--batch-size", "4", stdin=tmp_path / "jobs")
    with open(tmp_path / "jobs", "w") as jobs:
        for count in (1, 2):
            jobs.write(json.dumps({"reference": "a.mp4", "prompt": "x", "seed": count}) + "\n")
            jobs.flush()
            assert run.wait_for_lines(count), "the first result comes before the second job is sent"
    assert run.end().code == 0


def test_k7_a_run_says_what_it_waits_for_and_where_its_time_went(tmp_path):
    """Each second since the process was started is in one phase; a stream's pauses are no time of the device's."""
    clip(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "jobs")
    run = start(tmp_path, "-", "--json", stdin=tmp_path / "jobs")
    with open(tmp_path / "jobs", "w") as jobs:
        for seed in (1, 2):
            jobs.write(json.dumps({"reference": "a.mp4", "prompt": "x", "seed": seed}) + "\n")
            jobs.flush()
            assert run.wait_for_lines(seed)
            time.sleep(1.5)
    ended = run.end()
    last = json.loads((tmp_path / "out" / "journal.jsonl").read_bytes().splitlines()[-1])
    assert sum(last["phases"].values()) == pytest.approx(last["seconds"], abs=0.05)
    assert {"starting", "importing", "loading", "reading", "first step", "sampling"} <= set(last["phases"])
    assert last["phases"]["waiting for jobs"] > 1.5
    assert 0 <= last["device_wait"] <= 1
    said = ended.err.splitlines()
    assert "waiting for jobs …" in said
    assert re.search(r"waiting for jobs \d\.\d s", said[-1])


def test_a_job_named_twice_is_done_once(tmp_path):
    clip(tmp_path / "a.mp4")
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=lambda *_: ["cache"])
    ended = transfer(tmp_path, "a.mp4", "copy/a.mp4", "--prompt", "x", "--prompt", "x", "--json")
    assert states(ended) == {"done": 1, "skipped": 3}
    assert len(journal(tmp_path / "out")) == 1


def test_the_duplicate_of_a_failed_job_has_failed_too(tmp_path):
    """Whether the first one is still to be tried when the second arrives, or has failed long since."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    ended = transfer(tmp_path, "broken.mp4", "--prompt", "x", "--prompt", "x", "--json")
    assert ended.code == 1
    first, second = lines(ended)
    assert first["state"] == second["state"] == "failed"
    assert first["error"] == second["error"]
    os.mkfifo(tmp_path / "jobs")
    run = start(tmp_path, "-", "--json", stdin=tmp_path / "jobs")
    with open(tmp_path / "jobs", "w") as jobs:
        for count in (1, 2):
            jobs.write(json.dumps({"reference": "broken.mp4", "prompt": "x"}) + "\n")
            jobs.flush()
            assert run.wait_for_lines(count)
    ended = run.end()
    assert states(ended) == {"failed": 2}
    assert ended.code == 1
    assert "2 failed" in ended.err


def test_batches_make_the_same_clips(tmp_path):
    clip(tmp_path / "a.mp4", 1)
    clip(tmp_path / "b.mp4", 2)
    job = ["a.mp4", "b.mp4", "--prompt", "x", "--seeds", "0-1", "--format", "png", "--json"]
    alone = lines(transfer(tmp_path, *job, "-o", "alone"))
    together = lines(transfer(tmp_path, *job, "-o", "together", "--batch-size", "3"))
    assert Counter(line["batch"]["size"] for line in together) == {3: 3, 1: 1}
    assert {line["batch"]["shared_reference"] for line in together if line["batch"]["size"] == 3} == {False}
    for line in alone:
        one, other = (read_clip(tmp_path / o / line["output"], frames=FRAMES).frames for o in ("alone", "together"))
        assert np.abs(one.astype(int) - other).max() <= 1, "the last bit may depend on the batch, no more"


def test_encoded_references_serve_the_next_run(tmp_path):
    clip(tmp_path / "a.mp4")
    job = ["a.mp4", "--format", "png", "--json"]
    [first] = lines(transfer(tmp_path, *job, "--prompt", "x"))
    assert first["timings"]["reference"] > 0
    [entry] = (tmp_path / "cache" / "emt" / "motion").glob("*.safetensors")
    [again] = lines(transfer(tmp_path, *job, "--prompt", "x", "-o", "again"))
    frames = [read_clip(tmp_path / line["path"], frames=FRAMES).frames for line in (first, again)]
    assert np.array_equal(*frames)
    entry.write_bytes(b"damaged")
    [mended] = lines(transfer(tmp_path, *job, "--prompt", "x", "-o", "mended"))
    assert np.array_equal(frames[0], read_clip(tmp_path / mended["path"], frames=FRAMES).frames)
    assert entry.stat().st_size > 1000


def test_the_device_hardly_waits(tmp_path):
    for seed in range(10):
        clip(tmp_path / "clips" / f"{seed}.mp4", seed)
    ended = transfer(tmp_path, "clips", "--prompt", "x", "--seeds", "0-4", "--steps", 3, "--json")
    assert states(ended) == {"done": 50}
    last = json.loads((tmp_path / "out" / "journal.jsonl").read_bytes().splitlines()[-1])
    assert last["event"] == "run"
    assert last["device_wait"] < 0.05, ended.err


def test_k2_what_cannot_be_honoured_is_said_once_and_recorded(tmp_path):
    """A clip sampled too coarsely, a prompt that is too long: on stderr, in the journal, in the clip's record."""
    write_clip(tmp_path / "slow.mp4", np.random.default_rng(0).integers(0, 255, (40, SIDE, SIDE, 3), np.uint8), 1)
    prompt = "a red star " * 60
    job = ["slow.mp4", "--prompt", prompt, "--prompt-syntax", "plain", "--seeds", "0-1", "--json"]
    for out in ("first", "from-the-cache"):
        ended = transfer(tmp_path, *job, "-o", out)
        assert ended.err.count("so that movement between them is lost") == 1
        assert ended.err.count("the model reads the first") == 1
        for line in lines(ended):
            sparse, cut = line["warnings"]
            assert "movement between them is lost" in sparse
            assert "the model reads the first" in cut
            assert json.loads((tmp_path / (line["path"] + ".json")).read_bytes())["warnings"] == line["warnings"]
        assert [line["warnings"] for line in journal(tmp_path / out)] == [[sparse, cut]] * 2
    ended = transfer(tmp_path, "slow.mp4", "--prompt", "x", "--duration", "4", "--json")
    assert "warnings" not in lines(ended)[0]


# ---- streams and exit codes ---------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_quietly(tmp_path):
    clip(tmp_path / "a.mp4")
    command = f"'{EMT}' transfer a.mp4 --prompt x --seeds 0-9 --json --device cpu --model '{model()}'"
    shell = subprocess.run(
        ["bash", "-c", f"{command} 2>err | head -1; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=os.environ | environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, code = shell.stdout.splitlines()
    assert json.loads(first)["state"] == "done"
    assert code == "0"
    assert (tmp_path / "err").read_text().count("\n") <= 10, "a line for each job that was finished, nothing else"
    done = journal(tmp_path / "out")
    assert 1 <= len(done) < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_finishes_the_running_batch_and_the_next_run_the_rest(tmp_path, number):
    clip(tmp_path / "a.mp4")
    job = ["a.mp4", "--prompt", "x", "--seeds", "0-19", "--json"]
    run = start(tmp_path, *job)
    assert run.wait_for_lines(2)
    run.send(number, group=True)  # as a terminal does: ffmpeg must not take it for its own
    ended = run.end()
    assert ended.code == 130
    assert "finishing the running batch" in ended.err
    done = journal(tmp_path / "out")
    assert 2 <= len(done) < 20
    assert {line["state"] for line in done} == {"done"}
    assert len(done) == len(lines(ended))
    assert states(transfer(tmp_path, *job)) == {"skipped": len(done), "done": 20 - len(done)}


def test_a_second_interrupt_stops_at_once(tmp_path):
    clip(tmp_path / "a.mp4")
    run = start(tmp_path, "a.mp4", "--prompt", "x", "--steps", "500", "--json")
    while not list((tmp_path / "cache").glob("emt/motion/*.json")):  # the reference is encoded, the batch runs
        run.process.join(0.05)
        assert run.process.is_alive()
    run.process.join(0.5)
    run.send(signal.SIGINT)
    run.process.join(0.3)
    assert run.process.is_alive(), "the first lets it finish"
    run.send(signal.SIGINT)
    assert run.end(seconds=5).code == 130
    assert journal(tmp_path / "out") == []


def test_two_runs_on_one_folder(tmp_path):
    clip(tmp_path / "a.mp4")
    first = start(tmp_path, "a.mp4", "--prompt", "x", "--seeds", "0-9", "--json")
    first.wait_for_lines(1)
    os.kill(first.process.pid, signal.SIGSTOP)  # however slowly the second starts, the first is still at work
    second = transfer(tmp_path, "a.mp4", "--prompt", "y")
    os.kill(first.process.pid, signal.SIGCONT)
    assert second.code == 1
    assert f"process {first.process.pid}" in second.err
    assert first.end().code == 0
    assert len(journal(tmp_path / "out")) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "references"),
        (["a.mp4", "--prompt", "x", "--frames", "0"], "frames is '0'"),
        (["a.mp4", "--prompt", "x", "--width", "30"], "24 or 32"),
        (["a.mp4", "--prompt", "x", "--guidance", "nan"], "guidance"),
        (["a.mp4", "--prompt", "x", "--scheduler", "magic"], "ddim"),
        (["a.mp4", "--prompt", "x", "--seeds", "9-1"], "9-1"),
        (["a.mp4", "--prompt", "x", "--device", "gpu"], "cuda"),
        (["a.mp4", "--prompt", "x", "--batch-size", "0"], "auto"),
        (["a.mp4", "--prompts", "missing.txt"], "missing.txt"),
        (["a.mp4", "--prompt", "x", "--prompt", "y", "--pair"], "1 and 2"),
        (["a.mp4", "--nonsense"], "nonsense"),
    ],
)
def test_bad_usage_is_exit_code_2_and_reported_on_stderr(tmp_path, arguments, said):
    (tmp_path / "a.mp4").write_bytes(b"")
    ended = transfer(tmp_path, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_at_all_is_exit_code_1_and_says_what_to_type(tmp_path):
    clip(tmp_path / "a.mp4")
    for arguments, said in (
        (["--model", "missing"], "import-weights"),
        (["--model", "."], "no model_index.json"),
        (["--device", "cuda:7"], "--device cpu"),
        (["-o", "a.mp4"], "--out"),
    ):
        ended = transfer(tmp_path, "a.mp4", "--prompt", "x", *arguments)
        assert (ended.code, ended.out) == (1, "")
        assert said in ended.err
        assert ended.err.startswith("error: "), "reported once, not for each job"
        assert "Traceback" not in ended.err


def read_terminal(reader: int, writer: int, run: Run) -> str:
    """All that a program writes to a pseudo-terminal, until it closes its side."""
    run.wait_for_start()
    os.close(writer)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 1 << 16)
        except OSError:
            return shown.decode()


def test_on_a_terminal_there_are_bars_and_a_table_and_nothing_of_it_on_stdout(tmp_path):
    clip(tmp_path / "a.mp4")
    reader, writer = pty.openpty()
    terminal = environment(tmp_path) | {"TERM": "xterm", "COLUMNS": "150"}
    words = ["transfer", "a.mp4", "missing.mp4", "--prompt", "[red]x[/red]", "--device", "cpu", "--model", str(model())]
    run = Run(*words, folder=tmp_path, environment=terminal, stderr=Path(os.ttyname(writer)))
    text = read_terminal(reader, writer, run)
    ended = run.end()
    assert ended.code == 1
    out = ended.out
    assert out.count("\n") == 1
    assert out.strip().endswith(".mp4")
    assert "━" in text
    assert "clips/min" in text
    assert "[red]x[/red]" in text, "markup in a prompt is text"
    assert "missing.mp4" in text
    assert "1 done, 0 already there, 1 failed" in text


def test_results_stand_above_the_bars_where_all_is_one_terminal(tmp_path):
    clip(tmp_path / "a.mp4")
    reader, writer = pty.openpty()
    terminal = environment(tmp_path) | {"TERM": "xterm", "COLUMNS": "150"}
    place = Path(os.ttyname(writer))
    words = ["transfer", "a.mp4", "--prompt", "x", "--device", "cpu", "--model", str(model())]
    run = Run(*words, folder=tmp_path, environment=terminal, stdout=place, stderr=place)
    shown = read_terminal(reader, writer, run)
    run.process.join(60)
    assert run.process.exitcode == 0
    before, name, _ = shown.partition("out/a_")
    assert name
    assert before.endswith("\x1b[2K"), "on a line of its own, cleared of the bars"


# ---- rerun --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batched")
    clip(folder / "a.mp4", 1)
    clip(folder / "b.mp4", 2)
    made = lines(transfer(folder, "a.mp4", "b.mp4", "--prompt", "x", "--format", "png", "--batch-size", "2", "--json"))
    return folder, [folder / line["path"] for line in made]


def rerun(folder: Path, *arguments: object):
    return emt("rerun", *map(str, arguments), folder=folder, environment=environment(folder))


@pytest.mark.parametrize("which", [0, 1])
def test_rerun_makes_the_very_same_frames(batched, which):
    folder, results = batched
    source = results[which] if which else results[which].with_name(results[which].name + ".json")
    ended = rerun(folder, source, "-o", folder / f"again{which}")
    assert ended.code == 0, ended.err
    made, again = (read_clip(path, frames=FRAMES).frames for path in (results[which], folder / f"again{which}"))
    assert np.array_equal(made, again)
    assert f"again{which} is identical with the original" in ended.err
    assert rerun(folder, source, "-o", folder / f"again{which}").code == 1, "it does not overwrite unless requested"


def test_k7_rerun_says_at_once_where_nothing_can_be_written(batched):
    folder, results = batched
    ended = rerun(folder, results[0], "-o", folder / "a.xyz")
    assert ended.code == 1
    assert "under such a name" in ended.err
    assert "loading" not in ended.err


def test_rerun_is_not_silent_while_it_works(batched, tmp_path):
    """Each thing that may take a while has its line, in order; one that takes a second has it without --verbose."""
    folder, results = batched
    ended = rerun(folder, results[0], "-o", tmp_path / "again", "--verbose")
    said = [line for line in ended.err.splitlines() if line.endswith(" …")]
    assert said == [
        "looking for the clip …",
        "looking for the model and the reference …",
        "importing PyTorch …",
        "reading the reference …",
        "loading the model …",
        "denoising …",
        "writing …",
        "comparing …",
    ]
    run = Run("rerun", str(results[0]), "-o", str(tmp_path / "slowly"), folder=folder, environment=environment(folder))
    run.wait_for_start()
    while run.process.is_alive() and not (run.streams / "err").read_text():
        time.sleep(0.05)
        run.send(signal.SIGSTOP)  # a machine that is as slow as that
        time.sleep(1.1)
        run.send(signal.SIGCONT)
    ended = run.end()
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[0].endswith(" …"), ended.err


def test_rerun_says_if_the_reference_has_moved_or_changed(batched, tmp_path):
    _, results = batched
    record = json.loads(results[0].with_name(results[0].name + ".json").read_bytes())
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps({**record, "reference": str(tmp_path / "gone.mp4")}))
    ended = rerun(tmp_path, moved)
    assert ended.code == 1
    assert "gone.mp4" in ended.err
    assert "--reference" in ended.err
    ended = rerun(tmp_path, moved, "--reference", clip(tmp_path / "other.mp4", 9))
    assert ended.code == 1
    assert "content differs" in ended.err
    for content in ("", "[]", "{}", '{"settings": {"frames": "x"}}'):
        moved.write_text(content)
        ended = rerun(tmp_path, moved)
        assert ended.code == 1
        assert "Traceback" not in ended.err
    assert "carries no settings" in rerun(tmp_path, tmp_path / "other.mp4").err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").touch()
    assert "out is an output folder" in rerun(tmp_path, tmp_path / "out").err


def test_rerun_says_what_will_differ(batched, tmp_path):
    _, results = batched
    record = json.loads(results[0].with_name(results[0].name + ".json").read_bytes())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**record, "kernels": "triton", "arithmetic": 1}))
    ended = rerun(tmp_path, other, "-o", tmp_path / "again.mp4")
    assert ended.code == 0, ended.err
    assert "made with the kernels triton, made again with reference: bits may differ" in ended.err
    assert "another version" in ended.err


def test_k2_rerun_says_how_far_the_new_clip_is_from_the_original(batched, tmp_path):
    folder, results = batched
    made = shutil.copytree(results[0], tmp_path / "made")
    record = json.loads(results[0].with_name(results[0].name + ".json").read_bytes())
    versions = {**record["versions"], "torch": "1.0"}
    (tmp_path / "made.json").write_text(json.dumps({**record, "seed": 7, "versions": versions}))
    ended = rerun(folder, tmp_path / "made.json")
    assert ended.code == 0, ended.err
    assert "made-rerun is not identical with the original" in ended.err
    assert "of 255 on average" in ended.err
    assert "made with torch 1.0 (here " in ended.err
    (made / "0000.png").unlink()
    ended = rerun(folder, tmp_path / "made.json", "--overwrite")
    assert f"which has {FRAMES - 1} frames of {SIDE}x{SIDE}" in ended.err
    assert set(record["versions"]) == {"emt", "torch", "diffusers", "transformers", "imageio-ffmpeg"}


def test_a_clip_made_again_in_another_format_is_said_to_be():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    assert compare(frames, frames, (".png", "")) == "identical with the original"
    assert "another format" not in compare(frames, frames + 1, (".mp4", ".mp4"))
    said = compare(frames, frames + 1, (".mp4", ""))
    assert said.startswith("not identical with the original: another format (.png for .mp4), in which 100.0% of")


def test_k6_rerun_takes_no_word_of_a_record(batched, tmp_path):
    """No download, no relative folder, no engine from where it says; what is printed is escaped."""
    _, results = batched
    record = json.loads(results[0].with_name(results[0].name + ".json").read_bytes())
    strange = tmp_path / "strange.json"

    def again(**changes):
        strange.write_text(json.dumps({**record, **changes}))
        ended = rerun(tmp_path, strange, "--overwrite")
        assert "Traceback" not in ended.err
        assert "\x1b" not in ended.err
        return ended

    shutil.copytree(model(), tmp_path / "here")
    for name in ("someone/model", "here", "../here"):
        ended = again(model_folder="here", model=name)
        assert ended.code == 1
        assert "--model" in ended.err
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "manifest.json").write_text("never read")
    ended = again(engine="x\x1b[2J", engine_id="abc\x1b[2J", engine_folder=str(tmp_path / "engine"))
    assert ended.code == 0, ended.err
    assert "is not in your cache; made again by torch" in ended.err
    for changes in ({"reference": "a.mp4"}, {"device": "gpu\x1b[31m", "reference": "/gone\x1b[31m.mp4"}):
        ended = again(**changes)
        assert ended.code == 1
        assert "--reference" in ended.err
    for changes in ({"batch": {"size": 10**6, "index": 0, "shared_reference": True}}, {"settings": {"frames": 1e9}}):
        assert again(**changes).code == 1
    ended = again(precision="fp8")
    assert ended.code == 1
    assert "was made with precision fp8, which is none of auto, fp32, fp16, bf16" in ended.err
    strange.write_text("[" * 100_000)
    assert rerun(tmp_path, strange).code == 1
    assert rerun(tmp_path, results[0], "--device", "gpu").code == 2


@pytest.mark.parametrize(
    ("options", "code", "reported"),
    [
        (["--kernels", "triton"], 1, "Triton's kernels need a CUDA GPU"),
        (["--memory", "low"], 2, "--memory low and --device cpu exclude each other"),
        (["--memory", "low", "--engine", "somewhere"], 2, "exclude each other"),
    ],
)
def test_what_this_machine_cannot_do_is_said(tmp_path, options, code, reported):
    clip(tmp_path / "a.mp4")
    ended = transfer(tmp_path, "a.mp4", "--prompt", "x", *options)
    assert ended.code == code
    assert reported in " ".join(ended.err.replace("│", "").split())
    assert "Traceback" not in ended.err


# ---- the tests that anyone can run at full length -----------------------------------------------------------------


def test_a_short_kill_test():
    import kill_test

    kill_test.main(["--kills", "8", "--seeds", "2"])  # the first round, and what comes after it


def test_a_sample_of_bad_inputs():
    import bad_inputs

    bad_inputs.main(["--inputs", "4"])  # of each of thirteen kinds
