"""`emt bench`: every part is timed, in a table and as JSON."""

from __future__ import annotations

import json

import pytest
from program import FRAMES, SIDE, console, emt, environment, model

PARTS = ("reference_pass_ms", "step_ms", "step_without_reference_ms", "encode_ms", "decode_ms", "clip_s")


def bench(folder, *arguments):
    ended = emt("bench", "--device", "cpu", *map(str, arguments), folder=folder, environment=environment(folder))
    assert ended.code == 0, ended.err
    return ended


def test_json_has_a_row_for_each_way(tmp_path):
    rows = [json.loads(line) for line in bench(tmp_path, "--model", model(), "--steps", "3", "--json").out.splitlines()]
    assert [row["way"] for row in rows] == ["plain PyTorch", "torch"]
    for row in rows:
        assert all(row[part] > 0 for part in PARTS)
        assert row["clip_s"] > 3 * row["step_ms"] / 1e3 * 0.3  # three steps, on a machine that does other things too
        assert (row["frames"], row["width"], row["height"], row["steps"]) == (FRAMES, SIDE, SIDE, 3)
        assert row["peak_GiB"] is None  # of a process, a CPU's peak says nothing
    assert rows[0]["change"] == 0
    assert rows[1]["change"] < 1e-5


def test_without_json_it_prints_a_table(tmp_path):
    reported = bench(tmp_path, "--model", model(), "--size", "48x32", "--frames", "3", "--steps", "2").out
    assert "3 frames of 48x32, 2 steps" in reported
    for name in ("step with reference, ms", "reference pass, ms", "encode, ms", "decode, ms", "clip, s", "torch"):
        assert name in reported


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--size", "512"], "Give width and height"),
        (["--size", "33x32"], "multiple of 8"),
        (["--engine", "somewhere"], "--engine needs --model"),
        (["--frames", "99"], "less than or equal to 81"),
    ],
)
def test_bad_usage(tmp_path, arguments, reported):
    done = console(tmp_path, "bench", *arguments)
    assert done.returncode == 2
    assert reported in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", [("bench",), ("transfer", "a.mp4", "--prompt", "x")])
def test_a_precision_that_there_is_not_is_named_with_those_that_there_are(tmp_path, command):
    done = emt(*command, "--precision", "fp8", folder=tmp_path, environment=environment(tmp_path))
    assert done.code == 2
    assert "'fp8' is not one of 'auto', 'fp32', 'fp16', 'bf16'" in " ".join(done.err.replace("│", " ").split())


def test_a_cold_start_is_timed_from_the_start_of_its_process(tmp_path):
    ended = bench(tmp_path, "--cold", "--model", model(), "--steps", "1", "--json")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert 0 < sum(line["phases"].values()) <= line["seconds"] + 0.01
        assert {"starting", "importing", "starting the device", "loading", "reading", "first step"} <= line[
            "phases"
        ].keys()
        assert 0 < line["first_clip"] <= line["seconds"]
        assert 0 < line["device_busy"] <= 1
