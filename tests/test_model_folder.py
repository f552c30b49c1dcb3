"""A model folder from outside: its hash is of exactly what is opened, and damaged files are one error."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from program import model

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.model_folder import DEFAULTS, Model, find_model
from emt.pipeline import load_pipeline
from emt.prompt_syntax import reading_of
from emt_cli.batch.estimates import memory
from emt_cli.batch.options import Settings

DEEP = b"[" * 100_000 + b"]" * 100_000
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(model(), tmp_path / "model")


def open_model(folder: Path) -> Model:
    return find_model(str(folder), download=False)


def plan_with(found: Model) -> None:
    """Ask all that a plan does."""
    found.check("a star", Settings(frames=4).as_dict())
    memory(found, Settings())


def hash_of(folder: Path) -> str:
    return open_model(folder).sha256(ContentIndex(folder.parent / "index"))


def test_the_hash_is_of_names_and_contents_wherever_the_folder_is(folder, tmp_path):
    assert hash_of(folder) == hash_of(model()) == hash_of(folder.rename(tmp_path / "moved"))


def link(folder: Path, part: str) -> Path:
    """Put a part of a model folder elsewhere, and a link in its place."""
    elsewhere = (folder / part).rename(folder.parent / "elsewhere")
    (folder / part).symlink_to(elsewhere, target_is_directory=elsewhere.is_dir())
    return elsewhere


def test_k2_a_part_that_is_a_link_to_a_folder_is_in_the_hash(folder):
    whole = hash_of(folder)
    elsewhere = link(folder, "unet")
    assert hash_of(folder) == whole, "the same files are opened"
    with open(elsewhere / Path(UNET).name, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    assert hash_of(folder) != whole


def test_k2_a_link_to_a_weight_file_is_in_the_hash(folder):
    whole = hash_of(folder)
    elsewhere = link(folder, UNET)
    elsewhere.write_bytes(elsewhere.read_bytes()[:-1] + b"\x77")
    assert hash_of(folder) != whole


def test_a_link_to_a_folder_around_it_ends(folder):
    whole = hash_of(folder)
    (folder / "unet" / "back").symlink_to(folder, target_is_directory=True)
    assert hash_of(folder) == whole


@pytest.mark.parametrize("shard", ["gone.safetensors", "../elsewhere.safetensors", "/elsewhere.safetensors", 7])
def test_k2_weights_that_are_not_in_the_folder_are_missing(folder, shard):
    shutil.copy(folder / UNET, folder / "elsewhere.safetensors")
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"a": Path(UNET).name, "b": shard}}))
    with pytest.raises(EmtError, match="lacks unet/"):
        open_model(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/x.safetensors.index.json", UNET])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", DEEP])
def test_k5_a_damaged_file_is_one_error(folder, name, content):
    if name.endswith(".safetensors"):
        content = struct.pack("<Q", len(content)) + content
    (folder / name).write_bytes(content)
    with pytest.raises(EmtError, match=Path(name).name):
        plan_with(open_model(folder))


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_k5_a_header_of_another_length_is_damaged(folder, length):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(EmtError, match="is damaged"):
        _ = open_model(folder).parameters


@pytest.mark.parametrize("shape", [None, "ab", [[2]], [-2], [0.5], {"a": 1}])
def test_k5_a_shape_that_is_none_is_damaged(folder, shape):
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (folder / UNET).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(EmtError, match="is damaged"):
        _ = open_model(folder).parameters


@pytest.mark.parametrize("name", ["motion_max_frames", "block_out_channels"])
@pytest.mark.parametrize("value", ["16", None, [], ["a"], -1, True, 1.5, {}])
def test_k5_a_configuration_with_values_of_other_types_is_one_error(folder, name, value):
    config = json.loads((folder / "unet" / "config.json").read_bytes())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, name: value}))
    found = open_model(folder)
    with pytest.raises(EmtError, match=name):
        plan_with(found)


@pytest.mark.parametrize(
    "vocabulary", [b"{", b"[]", DEEP, b'{"words": 7}', b'{"words": [7]}', b'{"words": [["a"]]}', b"\xff"]
)
def test_k5_a_damaged_vocabulary_is_one_error(tmp_path, vocabulary):
    from emt import demo

    folder = shutil.copytree(demo.path(), tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("unet", "vae", "text_encoder"):
        for weights in (demo.path() / part).glob("*.safetensors"):
            (folder / part / weights.name).symlink_to(weights)
    (folder / "vocabulary.json").write_bytes(vocabulary)
    with pytest.raises(EmtError, match=r"vocabulary\.json is damaged"):
        _ = open_model(folder).vocabulary


@pytest.mark.parametrize("tokenizer", [b"{", b"[]", DEEP, b'{"model": 7}', b'{"model": {"type": "WordLevel"}}'])
def test_k5_a_damaged_tokenizer_is_one_error(folder, tokenizer):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(EmtError, match=r"tokenizer\.json is damaged"):
        _ = open_model(folder).vocabulary


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("model_index.json", "text_encoder", []),
        ("vae/config.json", "block_out_channels", []),
        ("text_encoder/config.json", "hidden_size", float("nan")),
        ("unet/config.json", "block_out_channels", [0, 0, 0, 0]),
    ],
)
def test_k5_values_of_configurations_that_no_library_expects_are_one_error(folder, file, field, value):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {field: value}))
    with pytest.raises(EmtError) as caught:
        load_pipeline(folder)
    assert str(folder) in caught.value.problem
    assert len(str(caught.value).splitlines()) <= 8


@pytest.mark.parametrize("value", [{}, "512", None, True, 0, -8, 1.5])
@pytest.mark.parametrize("setting", ["frames", "height"])
def test_k5_a_default_that_is_no_number_is_one_error(folder, setting, value):
    listed = json.loads((folder / "model_index.json").read_bytes())
    (folder / "model_index.json").write_text(json.dumps(listed | {setting: value}))
    with pytest.raises(EmtError, match=f"the model's defaults: {setting} is"):
        open_model(folder)


@pytest.mark.parametrize("name", [UNET, "unet/config.json", "scheduler/scheduler_config.json"])
def test_k4_a_pipe_in_a_model_folder_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(EmtError, match=f"{name} is a pipe"):
        open_model(folder)


def test_k8_a_prompt_is_read_once_for_all_of_its_jobs(monkeypatch):
    read = []

    def watched(prompts, *how):
        read.append(prompts)
        return reading_of(prompts, *how)

    monkeypatch.setattr("emt.model_folder.reading_of", watched)
    opened = find_model(str(model()), download=False)
    settings = {"negative_prompt": "", "prompt_syntax": "webui"}
    plain = [opened.reading("a fox", settings) for _ in range(100)]
    weighted = [opened.reading("a (fox:1.3)", settings) for _ in range(100)]
    by_the_letter = opened.reading("a (fox:1.3)", settings | {"prompt_syntax": "plain"})
    assert set(plain) == {()} == {by_the_letter}
    assert set(weighted) == {("webui", 1, False)}
    assert read == [("a fox", ""), ("a (fox:1.3)", ""), ("a (fox:1.3)", "")]


def test_a_folder_that_says_nothing_has_the_published_settings():
    published = {"frames": 16, "height": 512, "width": 512, "steps": 25, "guidance": 6.0, "scheduler": "ddim"}
    assert published == DEFAULTS


def test_weights_of_which_all_shards_are_there_are_not_missing(folder):
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"a": Path(UNET).name}}))
    open_model(folder)


def test_both_prompts_are_checked():
    demo, plain = find_model(None, download=False), Settings().as_dict()
    demo.check("a red fox in the snow", plain)
    for prompt, negative in (("a xyzzy", ""), ("a red fox in the snow", "a xyzzy")):
        with pytest.raises(EmtError, match="xyzzy"):
            demo.check(prompt, plain | {"negative_prompt": negative})
