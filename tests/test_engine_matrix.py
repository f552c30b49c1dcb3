"""The benchmark that builds engines of every kind of request."""

from __future__ import annotations

import importlib
import itertools
import json

import program  # puts benchmarks on the path  # noqa: F401
import pytest

from emt.errors import EmtError

engine_matrix = importlib.import_module("engine_matrix")


def test_any_two_properties_of_a_request_meet_in_a_row_of_the_matrix():
    for size, values in engine_matrix.VALUES.items():
        found = [(row.batch, row.sizes, row.frames, row.precision, row.lora) for row in engine_matrix.rows(size)]
        for one, other in itertools.combinations(range(len(values)), 2):
            assert {(row[one], row[other]) for row in found} == set(itertools.product(values[one], values[other]))
        assert len(found) < 12


def test_the_matrix_counts_a_failure_and_goes_on(tmp_path, monkeypatch, capsys):
    made = {"built_s": 61.2, "parity": 2e-5, "MiB": 12.0, "torch_ms": 40.0, "engine_ms": 30.0}

    def run(row, *others):
        if row.lora:
            raise EmtError("it cannot be built", "Never mind.")
        return made

    monkeypatch.setattr(engine_matrix, "run", run)
    assert engine_matrix.main(["--folder", str(tmp_path), "--size", "tiny", "--device", "cpu", "--rows", "1-2"]) == 1
    assert engine_matrix.main(["--folder", str(tmp_path), "--size", "tiny", "--device", "cpu", "--rows", "1"]) == 0
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    assert "| 1..2 | 32x32 | 4 | fp32 | no | 61 | 12.0 | 2.0e-05 | 40.0 | 30.0 | 0.750 of PyTorch's |" in first
    assert "failed: it cannot be built" in second


@pytest.mark.slow
def test_a_row_of_the_matrix_is_built_verified_and_run(tmp_path, capsys):
    words = ["--folder", str(tmp_path), "--size", "tiny", "--device", "cpu", "--rows", "3"]
    assert engine_matrix.main(words) == 0
    (record,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert record["lora"]
    assert record["parity"] < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora-tiny.safetensors", "model-tiny", "rows.jsonl"]
    assert "of PyTorch's" in capsys.readouterr().out
