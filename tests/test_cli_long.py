"""`--frames all` through the program: clips as long as their references, in windows of the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clips import ffmpeg
from program import FRAMES, SIDE, clip, emt, environment, lines, model, transfer

from emt.video import probe, read_clip
from emt_cli.batch.inputs import expand
from emt_cli.batch.inputs.shapes import Shapes
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import TransferOptions

LONG, FPS = 36, 8.0  # frames, more than the 32 that the network takes, and frames a second


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A folder with a long and a short clip, and the lines of their results."""
    folder = tmp_path_factory.mktemp("long")
    clip(folder / "silent.mp4", frames=LONG)
    tone = ["-f", "lavfi", "-i", "sine=440:duration=9"]
    ffmpeg("-i", folder / "silent.mp4", *tone, "-c:v", "copy", "-shortest", folder / "long.mp4")
    clip(folder / "short.mp4", frames=7)
    clips = ["long.mp4", "short.mp4", "--prompt", "x", "--frames", "all", "--audio", "copy"]
    return folder, lines(transfer(folder, *clips, "--json"))


def of(made: tuple[Path, list[dict]], name: str) -> dict:
    (line,) = (row for row in made[1] if row["reference"].endswith(name))
    return line


@pytest.mark.parametrize(("name", "frames"), [("long.mp4", LONG), ("short.mp4", 7)])
def test_a_clip_is_as_long_as_its_reference_at_its_pace(made, name, frames):
    line = of(made, name)
    info = probe(made[0] / line["path"])
    assert (info.frames, line["settings"]["frames"]) == (frames, frames)
    assert info.duration == pytest.approx(frames / FPS, abs=0.01)
    assert info.sound == (name == "long.mp4")
    assert line.get("window") == (FRAMES if name == "long.mp4" else None), "what fits is made at once"


def test_all_frames_are_the_same_job_as_their_number(made):
    folder = made[0]
    (again,) = lines(transfer(folder, "long.mp4", "--prompt", "x", "--frames", LONG, "--audio", "copy", "--json"))
    assert (again["state"], again["id"]) == ("skipped", of(made, "long.mp4")["id"])


def test_a_plan_knows_the_frames_and_the_record_makes_the_clip_again(made):
    folder, line = made[0], of(made, "long.mp4")
    planned = ["plan", "--model", str(model()), "--device", "cpu", "--json", "long.mp4", "--prompt", "x"]
    options = ["--frames", "all", "--audio", "copy"]
    plan = lines(emt(*planned, *options, folder=folder, environment=environment(folder)))
    assert [(job["state"], job["id"]) for job in plan[:-1]] == [("done", line["id"])]
    again = emt("rerun", line["path"], "-o", "again.mp4", folder=folder, environment=environment(folder))
    assert again.code == 0, again.err
    assert "identical with the original" in again.err
    assert probe(folder / "again.mp4").sound


def test_the_motion_of_a_long_reference_is_read_once(made):
    folder = made[0]
    (line,) = lines(transfer(folder, "long.mp4", "--prompt", "y", "--frames", "all", "--json"))
    kept = list((folder / "cache").rglob("*.safetensors"))
    assert len(kept) == 2, "one of each reference"
    assert read_clip(folder / line["path"], frames=LONG).frames.shape == (LONG, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, 36),
        ({"stride": 5}, 8),
        ({"start": 1.0, "duration": 2.0}, 16),
        ({"start": 1.0, "duration": 2.0, "stride": 3}, 6),
        ({"start": 4.4}, 2),
    ],
)
def test_all_frames_are_those_of_the_part_that_is_used(made, part, expected):
    reference = made[0] / "long.mp4"
    options = TransferOptions([str(reference)], prompt=["x"], settings={"frames": "all", **part})
    (job,) = expand(options, {}, shapes=Shapes())[0]
    assert isinstance(job, Job)
    assert job.settings.frames == expected
    if expected > 2:
        sampled = read_clip(reference, frames=expected, **part)
        assert len(set(sampled.times)) == expected, "none is taken twice"


def test_a_number_of_frames_is_one_or_all(made):
    for given in ("some", "1", "70000", "3.5"):
        ended = transfer(made[0], "long.mp4", "--prompt", "x", "--frames", given)
        assert ended.code == 2
        assert "Allowed is a whole number from 2 to 65536, or all." in ended.err
    (made[0] / "jobs.jsonl").write_text(json.dumps({"prompt": "x", "frames": "most"}))
    ended = transfer(made[0], "long.mp4", "--prompts", "jobs.jsonl")
    assert ended.code == 1
    assert "or all" in ended.err
