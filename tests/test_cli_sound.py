"""`--audio copy` and `--size reference` through the program: clips with their reference's sound, in its shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clips import ffmpeg
from program import FRAMES, clip, emt, environment, lines, transfer

from emt.video import probe
from emt_cli.batch.results import sidecar

SECONDS = 1.0  # of the reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], str]:
    """A folder, the lines of its results, and what was said on stderr."""
    folder = tmp_path_factory.mktemp("sound")
    clip(folder / "silent.mp4")
    tone = ["-f", "lavfi", "-i", f"sine=440:duration={SECONDS}"]
    ffmpeg("-i", folder / "silent.mp4", *tone, "-vf", "crop=32:16", "-shortest", folder / "wide.mp4")
    rows = [{"prompt": "x"}, {"prompt": "y", "format": "webm"}, {"prompt": "z", "format": "gif"}]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips = ["wide.mp4", "silent.mp4", "--prompts", "jobs.jsonl"]
    ended = transfer(folder, *clips, "--audio", "copy", "--size", "reference", "--json")
    return folder, lines(ended), ended.err


def of(made: tuple[Path, list[dict], str], reference: str, prompt: str) -> dict:
    (line,) = (row for row in made[1] if row["reference"].endswith(reference) and row["prompt"] == prompt)
    return line


@pytest.mark.parametrize("prompt", ["x", "y"])
def test_the_sound_lasts_as_long_as_the_frames(made, prompt):
    line = of(made, "wide.mp4", prompt)
    info = probe(line["path"] if Path(line["path"]).is_absolute() else made[0] / line["path"])
    assert info.sound
    assert info.frames == FRAMES
    assert info.duration == pytest.approx(FRAMES / info.fps, abs=0.02)
    assert info.duration == pytest.approx(SECONDS, abs=0.2), "at the reference's pace"
    assert line["settings"]["audio"] == "copy"
    assert "warnings" not in line


def test_a_reference_without_sound_is_said_once_and_recorded(made):
    line = of(made, "silent.mp4", "x")
    assert not probe(made[0] / line["path"]).sound
    assert line["warnings"] == ["silent.mp4 has no sound: the clip is silent"]
    assert made[2].count("has no sound") == 1


def test_a_format_without_sound_fails_alone(made):
    for reference in ("wide.mp4", "silent.mp4"):
        line = of(made, reference, "z")
        assert (line["state"], line["error"]) == ("failed", "clips in the format gif have no sound")


def test_each_clip_has_its_references_shape(made):
    shapes = {name: of(made, name, "x")["settings"] for name in ("wide.mp4", "silent.mp4")}
    assert {name: (s["width"], s["height"]) for name, s in shapes.items()} == {
        "wide.mp4": (48, 24),
        "silent.mp4": (32, 32),
    }


def test_rerun_makes_the_sound_and_the_shape_again(made):
    folder, line = made[0], of(made, "wide.mp4", "x")
    ended = emt("rerun", line["path"], "-o", "again.mp4", folder=folder, environment=environment(folder))
    assert ended.code == 0, ended.err
    assert "identical with the original" in ended.err
    first, again = probe(folder / line["path"]), probe(folder / "again.mp4")
    assert (again.sound, again.duration, again.width) == (True, first.duration, first.width)
    assert json.loads(sidecar(folder / "again.mp4").read_bytes())["settings"] == line["settings"]


def test_sound_in_a_format_that_has_none_is_bad_usage(made):
    ended = transfer(made[0], "wide.mp4", "--prompt", "x", "--audio", "copy", "--format", "gif")
    assert ended.code == 2
    assert "--format mp4 or webm" in ended.err
