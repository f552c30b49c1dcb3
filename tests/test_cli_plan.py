"""`emt plan` and `emt doctor`: what is known before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from program import clip, emt, environment, model, start, transfer

from emt_cli.commands.doctor import _cache

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from emt_cli.app import main; main()"


def plan(folder, *arguments):
    """The lines of `emt plan --json` in a process that cannot import torch, and its exit code."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "--model", str(model()), "--device", "cpu", "--json"]
    ended = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()], ended.returncode


def test_a_plan_tells_what_is_done_what_is_open_and_what_it_will_cost(tmp_path):
    clip(tmp_path / "a.mp4")
    [*jobs, total], code = plan(tmp_path, "a.mp4", "--prompt", "x", "--seeds", "0-3")
    assert code == 0
    assert [job["state"] for job in jobs] == ["open"] * 4
    assert total["estimate"].startswith("a rough model")
    assert 0 < total["seconds"] < 60
    assert total["memory"] > 0
    assert not (tmp_path / "out").exists(), "a plan writes nothing"
    shared = plan(tmp_path, "a.mp4", "--prompt", "x", "--seeds", "0-3", "--workers", "2")[0][-1]
    assert (shared["workers"], shared["seconds"]) == (2, pytest.approx(total["seconds"] / 2, abs=0.1))

    made = transfer(tmp_path, "a.mp4", "--prompt", "x", "--seeds", "0-2", "--json")
    assert made.code == 0
    [*jobs, total], code = plan(tmp_path, "a.mp4", "--prompt", "x", "--seeds", "0-3")
    assert [job["state"] for job in jobs] == ["done", "done", "done", "open"]
    assert (total["open"], total["done"]) == (1, 3)
    assert total["estimate"] == "3 earlier clips on this device"
    reported = [json.loads(line) for line in made.out.splitlines()]
    spent = sorted(line["timings"]["steps"] + line["timings"]["vae"] for line in reported)
    assert total["seconds"] == pytest.approx(spent[1], abs=0.06), "the same work takes the same time"
    assert jobs[0]["output"] == reported[0]["output"]
    assert jobs[0]["id"] == reported[0]["id"]


def test_a_plan_finds_what_will_fail(tmp_path):
    clip(tmp_path / "short.mp4", frames=3)
    clip(tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [
        {"reference": "good.mp4", "frames": 32},
        {"reference": "good.mp4", "width": 33},
        {"reference": "good.mp4", "stride": 4},
        {"reference": "good.mp4", "scheduler": "lcm", "steps": 60},
        {"reference": "short.mp4"},
        {"reference": "broken.mp4"},
        {"reference": "missing.mp4"},
        {"reference": "good.mp4", "start": 0.9},
        {"reference": "good.mp4", "duration": 0.25},
        {"reference": "good.mp4", "start": 0.5},
        {"reference": "good.mp4"},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps({"prompt": "x", **row}) for row in rows))
    [*jobs, total], code = plan(tmp_path, "--prompts", "jobs.jsonl")
    assert code == 1
    reported = {job["origin"].split()[-1]: job for job in jobs}
    assert [reported[str(n)]["state"] for n in range(1, 12)] == ["problem"] * 9 + ["open"] * 2
    for n, word in (
        (1, "32"),
        (2, "33"),
        (3, "13 are needed"),
        (4, "60"),
        (5, "3 frames"),
        (6, "broken"),
        (7, "missing"),
        (8, "1 frame in the part from 0.9 s on, but 4 are needed"),
        (9, "2 frames in the part from 0 s lasting 0.25 s"),
    ):
        assert word in reported[str(n)]["error"]
    assert (total["open"], total["problem"]) == (2, 9)


def test_a_plan_words_a_broken_clip_and_a_clip_of_one_frame_as_people_do(tmp_path):
    """One sentence each, ended once, with what to do about it, on a terminal and in JSON alike."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clip(tmp_path / "one.mp4", frames=1)
    options = ["broken.mp4", "one.mp4", "--prompt", "x"]
    [broken, one, total], code = plan(tmp_path, *options)
    assert (code, total["problem"]) == (1, 2)
    assert re.fullmatch(r"\S*broken\.mp4 cannot be read as a video: [^.\n]*[^.\s]\.?", broken["error"])
    assert broken["hint"].endswith("OUTPUT.mp4"), "the command to copy comes last, where nothing runs into it"
    assert one["error"] == "one.mp4 has 1 frame, but 4 are needed"
    assert one["hint"] == "Name a longer clip, or use fewer --frames."
    planned = emt(
        *("plan", *options, "--model", str(model()), "--device", "cpu"),
        folder=tmp_path,
        environment=environment(tmp_path) | {"COLUMNS": "3000"},
    )
    for job in (broken, one):
        assert " ".join(f"{job['error'].rstrip('.')}. {job['hint']}".split()) in planned.out
    assert ".." not in planned.out
    assert "\\n" not in planned.out


@pytest.mark.parametrize("seeds", [2**63, f"0-{10**20}"])
def test_a_seed_out_of_range_names_the_range(tmp_path, seeds):
    clip(tmp_path / "a.mp4")
    command = ["plan", "a.mp4", "--prompt", "x", "--model", str(model()), "--seeds", str(seeds)]
    ended = emt(*command, folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 2
    assert f"from 0 to {2**63 - 1}" in ended.err


def test_k3_a_plan_names_what_failed_the_last_time(tmp_path):
    clip(tmp_path / "a.mp4")
    [job, _], _ = plan(tmp_path, "a.mp4", "--prompt", "x")
    (tmp_path / "out").mkdir()
    failed = {key: job[key] for key in ("event", "id", "output")} | {"state": "failed", "error": "out of memory"}
    (tmp_path / "out" / "journal.jsonl").write_text(json.dumps(failed) + "\n")
    [job, total], code = plan(tmp_path, "a.mp4", "--prompt", "x")
    assert (job["state"], job["error"], code) == ("failed", "out of memory", 0)
    assert job["seconds"] == pytest.approx(total["seconds"], abs=0.1)
    assert [total[state] for state in ("open", "replaces", "failed", "done", "problem")] == [0, 0, 1, 0, 0]


def test_a_plan_finds_missing_weights(tmp_path):
    shutil.copytree(model(), tmp_path / "model")
    next((tmp_path / "model" / "vae").glob("*.safetensors")).unlink()
    ended = emt(
        "plan", "a.mp4", "--prompt", "x", "--model", "model", folder=tmp_path, environment=environment(tmp_path)
    )
    assert ended.code == 1
    assert "lacks vae/*.safetensors" in ended.err
    assert "emt import-weights" in ended.err


def test_a_dry_run_is_a_plan(tmp_path):
    clip(tmp_path / "a.mp4")
    job = ["a.mp4", "--prompt", "[red]x\x07", "--prompt", "y", "--model", str(model())]
    planned = emt("plan", *job, folder=tmp_path, environment=environment(tmp_path))
    dry = emt("transfer", *job, "--dry-run", folder=tmp_path, environment=environment(tmp_path))
    assert planned.out == dry.out
    assert (planned.code, dry.code) == (1, 1)
    assert "[red]x\\x07" in dry.out
    assert "1 to do, 0 done, 1 with problems" in dry.out


def test_thousands_of_jobs_are_planned_in_seconds(tmp_path):
    for seed in range(3):
        clip(tmp_path / "clips" / f"{seed}.mp4", seed)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {n}" for n in range(100)))
    begun = time.monotonic()
    jobs, code = plan(tmp_path, "clips", "--prompts", "prompts.txt", "--seeds", "0-9")
    assert code == 0
    assert len(jobs) == 3001
    assert time.monotonic() - begun < 60


def test_the_next_plan_knows_a_stream_too(tmp_path):
    clip(tmp_path / "a.mp4")
    job = b'{"reference": "a.mp4", "prompt": "x"}\n'
    assert start(tmp_path, "-", stdin=job).end().code == 0
    ended = emt("plan", "-", "--model", str(model()), folder=tmp_path, environment=environment(tmp_path), stdin=job)
    assert "0 to do, 1 done" in ended.out


def doctor(folder, *arguments, **environ):
    ended = emt("doctor", "--json", *map(str, arguments), folder=folder, environment=environment(folder) | environ)
    return {line["name"]: line for line in map(json.loads, ended.out.splitlines())}, ended.code


def test_the_doctor_looks_at_everything(tmp_path):
    found, code = doctor(tmp_path, "--model", model())
    names = "python driver torch triton tensorrt compiler ffmpeg extras model disk cache"
    assert list(found) == names.split()
    assert "ray" in found["extras"]["found"]
    assert code == 0, found
    assert all(line["state"] in ("ok", "limited") for line in found.values())
    assert "4 frames" in found["model"]["found"]


def test_k2_the_doctor_reads_the_configuration_of_a_model(tmp_path):
    folder = shutil.copytree(model(), tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": "x"}))
    found, code = doctor(tmp_path, "--model", folder)
    assert (found["model"]["state"], code) == ("broken", 1)
    assert "block_out_channels is 'x'" in found["model"]["found"]


def test_k7_the_doctor_words_a_cache_that_cannot_be_read(tmp_path):
    found = _cache(tmp_path / ("x" * 300))  # as one in the home folder of another user
    assert (found.state, found.found) == ("limited", f"{tmp_path / ('x' * 300)} cannot be read")


def test_the_doctor_says_what_is_broken_and_what_mends_it(tmp_path):
    (tmp_path / "out").write_text("a file")
    found, code = doctor(tmp_path, "--model", "missing", IMAGEIO_FFMPEG_EXE="/bin/false")
    assert code == 1
    for name in ("ffmpeg", "model", "disk"):
        assert found[name]["state"] == "broken", found[name]
        assert found[name]["mend"]
