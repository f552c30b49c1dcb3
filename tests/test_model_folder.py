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
from emt.model_folder import DEFAULTS, Model, find_model, new_folder
from emt.pipeline import load_pipeline
from emt.prompt_syntax import reading_of
from emt_cli.batch.estimates import memory
from emt_cli.batch.options import Method, PromptSyntax, Scheduler, Settings

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


@pytest.mark.parametrize("shape", [None, "ab", [[2]], [-2], [-1], [0.5], {"a": 1}])
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


CONTROL = {"control": "net.safetensors", "control_image": ("first.png", "last.png@3")}
KEY_FRAMES = "0: a fox | 3: a wolf"


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("a fox", {}),
        ("a fox", {"frames": 40}),  # in windows
        ("a fox", {"height": 24, "width": 40}),
        ("a fox", {"scheduler": Scheduler.LCM, "steps": 50}),
        ("a fox", {"cache_interval": 2}),
        ("a fox", {"method": Method.GUIDANCE}),
        ("a fox", CONTROL),
        (KEY_FRAMES, {}),
        ("0: a fox | 9: a wolf", {"prompt_syntax": PromptSyntax.PLAIN}),  # by the letter
        ("a fox", {"lora": ("style.safetensors",)}),
    ],
)
def test_what_a_model_can_make(prompt, settings):
    find_model(str(model()), download=False).check(prompt, Settings(**{"frames": 4} | settings).as_dict())


@pytest.mark.parametrize(
    ("prompt", "settings", "problem", "hint"),
    [
        ("a fox", {"height": 20}, "height is 20", "multiples of 8: --height 16"),
        ("a fox", {"width": 12, "height": 3}, "height is 3", "multiples of 8: --height 8"),
        ("a fox", {"width": 30}, "width is 30", "multiples of 8: --width 32"),
        ("a fox", {"clip_skip": 2}, "clip_skip is 2", "has 1 layer."),
        ("a fox", {"scheduler": Scheduler.LCM, "steps": 51}, "steps is 51", "at most 50"),
        ("a fox", {"scheduler": Scheduler.TCD, "steps": 51}, "steps is 51", "at most 50"),
        ("0: a fox | 4: a wolf", {}, "the prompt has frame 4", "frames 0 to 3"),
        (KEY_FRAMES, {"method": Method.GUIDANCE}, "method guidance takes one prompt", "--method adapter"),
        ("a fox", {"method": Method.GUIDANCE, "frames": 40}, "frames is 40 with method guidance", "to 32 frames"),
        ("a fox", {"method": Method.GUIDANCE, "cache_interval": 2}, "cache_interval is 2 with method", "interval 1"),
        ("a fox", {"control": "net.safetensors"}, "--control is given without --control-image", "give both"),
        ("a fox", {"control_image": ("a.png",)}, "--control-image is given without --control", "give both"),
        ("a fox", CONTROL | {"control_image": ("a.png@4",)}, "a control image is of frame 4", "frames 0 to 3"),
        ("a fox", CONTROL | {"control_image": ("a.png", "b.png")}, "two control images are of frame 0", "@15"),
        ("a fox", CONTROL | {"method": Method.GUIDANCE}, "method guidance takes no control network", "adapter"),
        ("a fox", CONTROL | {"frames": 40}, "frames is 40 with a control network", "to 32 frames"),
        ("a fox", CONTROL | {"cache_interval": 2}, "cache_interval is 2 with a control network", "interval 1"),
    ],
)
def test_what_a_model_cannot_make_is_said_with_what_it_can(prompt, settings, problem, hint):
    found = find_model(str(model()), download=False)
    with pytest.raises(EmtError) as caught:
        found.check(prompt, Settings(**{"frames": 4} | settings).as_dict())
    assert problem in caught.value.problem
    assert hint in caught.value.hint


def test_a_model_without_a_trained_adapter_is_guided(folder):
    """Unless it is told otherwise, which it refuses."""
    listed = json.loads((folder / "model_index.json").read_bytes())
    assert "method" not in open_model(folder).defaults
    assert open_model(folder).has_adapter
    (folder / "model_index.json").write_text(json.dumps(listed | {"adapter": "none"}))
    found = open_model(folder)
    assert found.defaults["method"] == "guidance"
    found.check("a fox", Settings(frames=4, method=Method.GUIDANCE).as_dict())
    with pytest.raises(EmtError, match="has no trained adapter"):
        found.check("a fox", Settings(frames=4).as_dict())


def test_a_long_clip_is_made_in_windows_of_the_models_own_length():
    found = find_model(str(model()), download=False)
    assert [found.frames_at_once(frames) for frames in (2, 32, 33, 500)] == [2, 32, 4, 4]


def test_facts_of_a_models_prompts_are_those_of_its_text_encoder(folder):
    """Tokens that are read at once, of which the first and the last are no words, and layers that can be skipped."""
    found = open_model(folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_bytes())
    assert found.text_layers == config["num_hidden_layers"]
    assert found._chunk_size == config["max_position_embeddings"] - 2
    assert not found.encodes_prompts_apart
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({name: config[name] for name in config if name != "num_hidden_layers"}))
    assert open_model(folder).text_layers == 1
    listed = json.loads((folder / "model_index.json").read_bytes())
    listed["text_encoder"] = ["transformers", "UMT5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(listed))
    assert open_model(folder).encodes_prompts_apart


def test_what_a_part_lacks_is_listed(folder):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    (folder / UNET).rename(folder / "elsewhere.safetensors")
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(EmtError) as caught:
        open_model(folder)
    lacking = caught.value.problem.partition("lacks ")[2].partition(" (in")[0]
    assert set(lacking.split(", ")) == {
        "unet/*.safetensors",
        "vae/*.safetensors",
        "text_encoder/config.json",
        "tokenizer/",
    }
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(EmtError, match="lacks a unet"):
        open_model(folder)


@pytest.mark.parametrize("name", ["./demo", "nowhere", "a/b/c", "no/such/model"])
def test_a_model_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    """`demo` is the small model wherever one is; a folder of that name is `./demo`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(EmtError, match=name):
        find_model(name, download=False)
    assert find_model("demo", download=False).folder == find_model(None, download=False).folder


def test_parameters_are_counted_by_part(folder):
    """From the headers of the files, as many as are in them."""
    from safetensors.torch import load_file

    found = open_model(folder).parameters
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (folder / part).glob("*.safetensors")
        assert found[part] == sum(tensor.numel() for tensor in load_file(path).values())
    assert found["tokenizer"] == 0


def test_a_folder_that_cannot_be_cleared_up_hides_no_error(tmp_path):
    """The error of writing is reported, not a later one of cleaning up."""

    def write() -> None:
        with new_folder(tmp_path / "m", overwrite=False) as partial:
            partial.rmdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_an_index_is_no_model(tmp_path):
    for empty in (tmp_path, str(tmp_path)):
        with pytest.raises(EmtError, match="is not a model folder"):
            load_pipeline(empty)
