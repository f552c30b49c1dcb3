"""The nodes for ComfyUI: the interface that it documents, and what they make on a tiny model."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import FRAMES, SIDE, clip, environment, model, transfer

from emt.errors import EmtError
from emt.pipeline import load_pipeline
from emt.train.teacher import Teacher
from emt.video import read_clip

FOLDER = Path(__file__).parents[1] / "emt_comfyui"
PLAIN = ("INT", "FLOAT", "STRING", "BOOLEAN")


@pytest.fixture(scope="module")
def nodes() -> Any:
    """The folder as ComfyUI's loader imports it: by its file, under its path without dots, wherever it is."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for imported in [key for key in sys.modules if key.startswith(name)]:
        del sys.modules[imported]


def declared(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}
    every = {name: value for group in inputs.values() for name, value in group.items()}
    return {name: (value[0], value[1] if len(value) > 1 else {}) for name, value in every.items()}


def test_nodes_have_the_documented_interface(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    outputs = {kind for node in nodes.NODE_CLASS_MAPPINGS.values() for kind in node.RETURN_TYPES}
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert list(declared(node)) == [name for name in parameters if name != "self"]
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert node.CATEGORY == "emt"
        for name, (kind, options) in declared(node).items():
            optional = name in node.INPUT_TYPES().get("optional", {})
            assert optional == (parameters[name].default is not inspect.Parameter.empty), name
            if isinstance(kind, list):
                assert options["default"] in kind
            elif kind in PLAIN:
                assert (
                    options.get("min", options["default"])
                    <= options["default"]
                    <= options.get("max", options["default"])
                )
            else:
                assert kind in outputs, f"{name}: no node makes a {kind}"


def test_a_server_that_starts_waits_for_nothing():
    code = (
        "import sys; sys.modules['torch'] = None; from emt_comfyui import NODE_CLASS_MAPPINGS as nodes\n"
        "for node in nodes.values(): node.INPUT_TYPES()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def run(nodes: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    """A node's outputs, its other inputs at their defaults, as ComfyUI calls it: in inference mode."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    known = {key: options["default"] for key, (_, options) in declared(node).items() if "default" in options}
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**{**known, **inputs})
    assert len(outputs) == len(node.RETURN_TYPES)
    for kind, value in zip(node.RETURN_TYPES, outputs):
        if kind == "IMAGE":
            assert (value.dtype, value.ndim, value.shape[3]) == (torch.float32, 4, 3)
            assert 0 <= value.min() <= value.max() <= 1
    return outputs


def test_a_workflow_makes_the_clip_of_the_library(nodes, tmp_path):
    path = clip(tmp_path / "walk.mp4")
    loader = nodes.NODE_CLASS_MAPPINGS["EMTLoadReference"]
    assert loader.VALIDATE_INPUTS(str(path)) is True
    assert "nothing.mp4" in loader.VALIDATE_INPUTS("nothing.mp4")
    assert loader.VALIDATE_INPUTS() is loader.VALIDATE_INPUTS(path=None) is True, "another node makes the path"
    images, fps = run(nodes, "EMTLoadReference", path=str(path), frames=FRAMES, width=SIDE, height=SIDE)
    expected = read_clip(path, frames=FRAMES, size=(SIDE, SIDE))
    assert (images.shape, fps) == ((FRAMES, SIDE, SIDE, 3), expected.fps)

    (opened,) = run(nodes, "EMTLoadModel", model=str(model()), device="cpu")
    pipe = load_pipeline(model())
    motion = pipe.extract_motion(expected)
    wanted = {"adapter": pipe.generate("a cat", motion, seed=7, steps=3, guidance=2.0)}
    wanted["guidance"] = Teacher(pipe).generate("a cat", motion, seed=7, steps=3, guidance=2.0)
    inputs = {"model": opened, "reference": images, "prompt": "a cat", "seed": 7, "steps": 3, "guidance": 2.0}
    for method, (frames,) in wanted.items():
        (made,) = run(nodes, "EMTTransferMotion", **inputs, method=method)
        np.testing.assert_array_equal((made * 255).round().byte().numpy(), frames)
    rgba = torch.cat([images, torch.ones_like(images[..., :1])], -1)
    (smaller,) = run(nodes, "EMTTransferMotion", **{**inputs, "reference": rgba}, frames=2, width=16, height=24)
    assert smaller.shape == (2, 24, 16, 3)
    (short,) = run(nodes, "EMTTransferMotion", **{**inputs, "reference": images[:3]})
    assert len(short) == 3, "the model's number, as far as there are"
    with pytest.raises(EmtError, match="frames is 9, the reference has 4"):
        run(nodes, "EMTTransferMotion", **inputs, frames=9)


def test_a_clip_that_is_replaced_is_read_again_and_no_other(nodes, tmp_path):
    """A picture of a folder, too, whose own time it leaves as it was."""
    changed = nodes.NODE_CLASS_MAPPINGS["EMTLoadReference"].IS_CHANGED
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for file in (tmp_path / "a.mp4", pictures / "0.png", pictures / "1.png"):
        file.write_bytes(b"before")
    for source, file in ((tmp_path / "a.mp4",) * 2, (pictures, pictures / "1.png")):
        before = changed(str(source), frames=2)
        assert changed(path=str(source), frames=3) == before
        file.write_bytes(b"another one")
        assert changed(str(source)) != before
    assert changed(path=None, frames=2) == changed(frames=2), "another node makes it"
    assert changed("nothing.mp4") != changed("nothing.mp4")


def test_cancel_ends_a_batch(nodes, tmp_path, monkeypatch):
    """By ComfyUI's own check: the program is asked to end, and is waited for."""

    class Interrupted(Exception):
        pass

    def check():
        if (tmp_path / "started").exists():
            raise Interrupted

    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    management = types.ModuleType("comfy.model_management")
    management.throw_exception_if_processing_interrupted = check
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    code = (
        "import pathlib, signal, time\n"
        "def end(*_): pathlib.Path('ended').touch(); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('started').touch(); time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["EMTRunBatch"], "command", (sys.executable, "-c", code))
    with pytest.raises(Interrupted):
        run(nodes, "EMTRunBatch", references="a.mp4", prompts="a cat")
    assert (tmp_path / "ended").exists()


def test_a_batch_is_a_run_of_the_program(nodes, tmp_path, monkeypatch):
    """Here of clips that are there already, so that it ends at once."""
    clip(tmp_path / "walk this.mp4")
    ended = transfer(tmp_path, "walk this.mp4", "--prompt", "a cat", "--prompt", "a dog", "--steps", "1")
    assert ended.code == 0, ended.err
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    inputs = {"prompts": "a cat\n\na dog\n", "model": str(model()), "options": "--steps 1 --device cpu"}
    clips, count = run(nodes, "EMTRunBatch", references="walk this.mp4\n", **inputs)
    assert (set(clips.splitlines()), count) == (set(ended.out.splitlines()), 2)
    with pytest.raises(EmtError, match=r"nothing.*no such file"):
        run(nodes, "EMTRunBatch", references="nothing", **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stepz 2", r"no such option: --stepz \(did you mean --steps\?\); python.* -m emt_cli transfer --help"),
        ("--steps '2", "No closing quotation"),
    ],
)
def test_options_of_a_batch_that_make_no_sense_are_said_in_words_that_can_be_typed(nodes, options, message):
    with pytest.raises(EmtError, match=message):
        run(nodes, "EMTRunBatch", references="a.mp4", prompts="a cat", options=options)
