"""The notebook, the documentation of Python and README's lines for a shell are run as they are, on a tiny model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils
from program import EMT, FRAMES, SIDE, clip, environment, model

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


def shell_lines(heading: str) -> list[str]:
    """Commands of a part of README, without what is said of them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line.partition("  #")[0].rstrip() for line in re.findall(r"^\$ (.*)$", text, re.M)]


def test_what_readme_pipes_into_jq_is_the_path_of_the_clip(place):
    """As seen from where the command was typed; `output` is the clip's place in the output folder."""
    [line] = [line for line in shell_lines("Use") if "jq" in line]
    clip(place / "clip.mp4")
    command, _, query = line.partition(" | ")
    own = {"EMT_MODEL": str(model()), "EMT_DEVICE": "cpu", "PATH": f"{EMT.parent}:{os.environ['PATH']}"}
    shell = line if shutil.which("jq") else command
    done = subprocess.run(
        ["sh", "-c", shell], env=os.environ | environment(place) | own, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    if shell is command:  # a machine without jq: what it would print
        printed = json.loads(printed)[re.fullmatch(r"jq -r \.(\w+)", query)[1]]
    assert probe(place / printed).frames == FRAMES


def test_readme_says_how_to_install_and_every_hint_names_an_extra_that_there_is():
    """The addresses of weights are there, too."""
    commands = [line for line in shell_lines("Install") if line.startswith("pip install ")]
    assert "pip install ." in commands
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = set(re.findall(r"'?(?:\.|emt-cli)\[([\w,]+)\]", text))
    for folder in ("emt", "emt_cli", "engines", "kernels", "docs"):
        for path in (p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")):
            extras |= set(re.findall(r"pip install '(?:\.|emt-cli)\[([\w,]+)\]'", path.read_text(encoding="utf-8")))
    named = {extra for names in extras for extra in names.split(",")}
    assert {"evaluate", "train", "engines", "ray"} <= named
    declared = importlib.metadata.metadata("emt-cli").get_all("Provides-Extra")
    assert named <= set(declared)
    table = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", text, re.M))))
    assert named <= table
    assert {"hf://guoyww/animatediff/v3_sd15_mm.ckpt", "hf://yfcai/EfficientMT/checkpoint.ckpt"} <= set(
        re.findall(r"`(hf://[^`]+)`", text)
    )
