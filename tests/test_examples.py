"""The notebook and the documentation of Python are run as they are, on a model that takes no time."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils
from program import FRAMES, SIDE, model

from emt import demo
from emt.video import probe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A copy of the folder of examples, in which another model stands for the small one."""
    shutil.copytree(ROOT / "examples" / "references", tmp_path / "references")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # diffusers adds that folder
    monkeypatch.setattr(demo, "path", model)
    return tmp_path


def cells(notebook: Path) -> Iterator[str]:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "it is stored without results"
            yield "".join(cell["source"])


def test_the_notebook_runs(place):
    names: dict[str, object] = {}
    for number, cell in enumerate(cells(ROOT / "examples" / "motion_transfer.ipynb")):
        exec(compile(cell, f"cell {number}", "exec"), names)
    info = probe(place / "penguin.gif")
    assert (info.frames, info.width, info.height) == (FRAMES, SIDE, SIDE)


def test_the_documentation_of_python_runs(place):
    names: dict[str, object] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S
    ):
        exec(compile(block, block[:40], "exec"), names)
    assert probe(place / "penguin.mp4").frames == FRAMES
    assert names["both"].frames.shape == (2, FRAMES, 3, SIDE, SIDE)
    assert type(names["same"]) is type(names["pipe"])
