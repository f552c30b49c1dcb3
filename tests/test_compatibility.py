"""What version 0.1.0 has written is opened, resumed and made again: tests/data/version_0_1/README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from program import console, emt, environment, journal, lines
from safetensors.torch import load_file

from emt.pipeline import load_pipeline
from emt.sampling import SCHEDULERS
from emt.video import read_clip

WRITTEN = Path(__file__).parent / "data" / "version_0_1"
KNOWN = json.loads((WRITTEN / "frames.json").read_bytes())
FRAMES = np.load(WRITTEN / "frames.npz")
PLAIN = {"prompt": "a red ball", "seed": 1}
MODEL = ["--model", "model", "--device", "cpu", "--cache-dir", "cache"]
FIRST_RUN = ["disc.mp4", "--prompt", "a red ball", "--prompt", "a blue star", "--seeds", "0-1"]


@pytest.fixture
def folder(tmp_path):
    """The files of version 0.1.0 in another place than where they were written."""
    return shutil.copytree(WRITTEN, tmp_path / "moved")


def transfer(folder: Path, *arguments: str):
    return emt("transfer", *arguments, *MODEL, "--json", folder=folder, environment=environment(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_frames(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit where torch adds in the same order; elsewhere a few values may be rounded the other way."""
    here = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    if here == KNOWN["made_by"]:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found.astype(int), expected, rtol=0, atol=1)
        assert (found != expected).mean() < 0.01


# ---- the model folder, and the frames ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several add in another order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe(one_thread):
    return load_pipeline(WRITTEN / "model")


@pytest.fixture(scope="module")
def motion(pipe):
    return pipe.extract_motion(FRAMES["reference"])


@pytest.mark.parametrize("name", KNOWN["calls"])
def test_the_frames_are_the_same(pipe, motion, name, monkeypatch):
    """But for samplers other than DDIM, which version 0.1.0 gave DDIM's spacing, and LCM the model's guidance."""
    options = {**PLAIN, "motion": motion, **KNOWN["calls"][name]}
    if options.get("scheduler", "ddim") != "ddim":
        assert (np.stack(pipe.generate(**options)) != FRAMES[name]).any()
        options["guidance"] = pipe.config.guidance
        monkeypatch.setattr(pipe, "make_sampler", lambda kind, steps: spaced_as_ddim(pipe, kind, steps))
    assert_same_frames(np.stack(pipe.generate(**options)), FRAMES[name])


def spaced_as_ddim(pipe, kind, steps):
    sampler = SCHEDULERS[kind].from_config(pipe.scheduler.config)
    sampler.set_timesteps(steps, device="cpu")
    return sampler


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model folder opened in the type in which it is stored, and saved in another place."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    load_pipeline(WRITTEN / "model", dtype=torch.float16).save_pretrained(folder)
    return folder


def test_a_model_folder_is_saved_as_it_was(saved):
    old, new = (json.loads((folder / "model_index.json").read_bytes()) for folder in (WRITTEN / "model", saved))
    assert new["unet"] == ["emt.unet", "MotionTransferUNet"], "a name that other versions open, too"
    assert new.pop("_class_name") == ["pipeline", old.pop("_class_name")], "for diffusers, which is told a module"
    assert {key for key in {**old, **new} if old.get(key) != new.get(key)} <= {"_diffusers_version", "_name_or_path"}
    for weights in (WRITTEN / "model").rglob("*.safetensors"):
        old, new = load_file(weights), load_file(saved / weights.relative_to(WRITTEN / "model"))
        assert new.keys() == old.keys()
        assert all(new[key].dtype == old[key].dtype and torch.equal(new[key], old[key]) for key in old)


def test_a_saved_model_folder_opens_in_another_process(saved, tmp_path):
    """As a model's card says: `from_pretrained`, and nothing but the pipeline imported before."""
    code = (
        "import sys, numpy, torch; torch.set_num_threads(1)\n"
        "from emt.pipeline import MotionTransferPipeline\n"
        "pipe = MotionTransferPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "motion = pipe.extract_motion(numpy.load(sys.argv[2])['reference'])\n"
        "numpy.save('frames.npy', pipe.generate('a red ball', motion, seed=1))\n"
    )
    command = [sys.executable, "-c", code, saved, WRITTEN / "frames.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_frames(np.load(tmp_path / "frames.npy"), FRAMES["plain"])


# ---- the output folder ---------------------------------------------------------------------------------------------


def test_an_output_folder_is_resumed(folder):
    before, reported = contents(folder / "out"), journal(folder / "out")
    [done] = [line for line in reported if line.get("output") == "disc_c46c5596/a-red-ball-0.mp4"]
    times = done["mtime_ns"]  # this one is as the journal left it, the others' times are those of the copy
    os.utime(folder / "out" / done["output"], ns=(times, times))

    first = transfer(folder, *FIRST_RUN)
    assert first.code == 0, first.err
    assert Counter(line["state"] for line in lines(first)) == {"skipped": 4}
    second = transfer(folder, "--prompts", "jobs.jsonl")
    assert second.code == 1, "the two that failed are tried, and fail again"
    assert Counter(line["state"] for line in lines(second)) == {"skipped": 3, "failed": 2}

    def known(line):
        return {key: line[key] for key in ("id", "output", "prompt", "seed", "settings") if key in line}

    ids = {line["output"]: known(line) for line in reported if "output" in line}
    assert all(known(line) == ids[line["output"]] for line in [*lines(first), *lines(second)] if "output" in line)

    after = contents(folder / "out")
    assert after.pop("journal.jsonl").startswith(before.pop("journal.jsonl")), "its lines are kept as they are"
    after.pop(".holder", None)  # names the process that has the lock
    assert {**after, ".lock": b""} == {**before, ".lock": b""}, "no clip and no sidecar is made or changed"
    again = journal(folder / "out")[len(reported) :]
    assert Counter(line["state"] for line in again) == {"failed": 2}, "what was tried again is reported again"


def test_a_plan_and_a_report_read_the_journal(folder):
    plan = console(folder, "plan", *FIRST_RUN[:-1], "0-2", *MODEL)
    assert plan.returncode == 0, plan.stderr
    assert "2 to do, 4 done" in plan.stdout
    assert "7 earlier clips" in plan.stdout, "their times and sizes are what the new ones are estimated by"
    report = console(folder, "report", "out")
    assert report.returncode == 0, report.stderr
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    outputs = {line["output"] for line in journal(folder / "out") if line["state"] == "done"}
    assert len(outputs) == 7
    assert all(output in page for output in outputs)
    assert "partial file" in page, "why the job failed"


def test_a_job_file_is_run_to_the_same_clips(folder):
    """In a new output folder: what the lines set, names and identities are as before; two lines fail."""
    ended = transfer(folder, "--prompts", "jobs.jsonl", "-o", "again")
    assert ended.code == 1
    old, new = (
        {line["output"]: line for line in journal(folder / out) if "output" in line} for out in ("out", "again")
    )
    assert new.keys() == {output for output, line in old.items() if "origin" in line}
    for output, line in new.items():
        same = ("id", "state", "origin", "prompt", "seed", "settings", "reference_sha256", "model_sha256")
        before = {key: old[output][key] for key in same if key in old[output]}
        assert {key: line.get(key) for key in before} == before
        assert line["reference_sha256"], "of jobs that failed as well, which lines of then do not have"
        if line["settings"]["format"] == "png":
            assert_same_frames(*(read_clip(folder / out / output, frames=4).frames for out in ("again", "out")))


def test_a_clip_is_made_again_from_its_record(folder):
    clip = folder / "out" / "disc_8cfe9afa" / "a-red-ball-7"
    where = ["--reference", "disc", "--model", "model", "--device", "cpu"]
    ended = emt("rerun", str(clip), "-o", "again", *where, folder=folder, environment=environment(folder))
    assert ended.code == 0, ended.err
    assert "note:" not in ended.err, "neither the arithmetic nor the device is another"
    assert_same_frames(read_clip(folder / "again", frames=4).frames, read_clip(clip, frames=4).frames)
    old, new = (json.loads(path.read_bytes()) for path in (clip.with_name("a-red-ball-7.json"), folder / "again.json"))
    assert {key for key in old if old[key] != new.get(key)} <= {"reference", "model_folder", "versions", "origin"}


# ---- the motion cache ----------------------------------------------------------------------------------------------


def test_a_motion_of_the_cache_is_used(folder):
    kept = sorted((folder / "cache" / "motion").iterdir())
    before = contents(folder / "cache" / "motion")
    for path in kept:
        os.utime(path, (1e9, 1e9))
    [line] = lines(transfer(folder, "disc", "--prompt", "a green box"))
    assert line["state"] == "done"
    touched = [path for path in kept if path.stat().st_mtime != 1e9]
    assert [path.suffix for path in touched] == [".json"], "the time of its use; its tensors are not written again"
    after = contents(folder / "cache" / "motion")
    assert after.keys() == before.keys(), "no entry more"
    for name in (name for name in before if name.endswith(".json")):
        assert json.loads(after[name]).items() >= json.loads(before[name]).items()


def test_a_motion_of_the_cache_is_the_one_that_is_read_today(pipe):
    """Of images: versions of ffmpeg decode a film's colours differently."""
    motion = pipe.extract_motion(read_clip(WRITTEN / "disc", frames=4, size=(32, 32)))
    entries = (WRITTEN / "cache" / "motion").glob("*.safetensors")
    found = motion.features.layers
    same = []
    for kept in (type(motion).load(entry).features.layers for entry in entries):
        assert kept.keys() == found.keys()
        pairs = [pair for layer in kept for pair in zip(kept[layer], found[layer])]
        same.append(all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs))
    assert sorted(same) == [False, True], "one entry is the images', the other the film's"
