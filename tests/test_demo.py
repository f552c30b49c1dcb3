"""The model that ships: it is what runs where none is named, and models with a list of words say which they know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from program import clip, emt, environment, model

from emt import demo
from emt.evaluate import judge
from emt.evaluate.pairs import Pair
from emt.model_folder import find_model
from emt.pipeline import load_pipeline
from emt.video import read_clip
from emt.vocabulary import GROUPS, Vocabulary
from emt_cli.batch.inputs import PromptWarnings
from emt_cli.commands import evaluate
from recipes.text import make_tokenizer, write_vocabulary


def run(folder: Path, command: str, *arguments: object):
    return emt(command, *map(str, arguments), folder=folder, environment=environment(folder))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A model folder whose tokenizer reads words, as the demo model's does."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    shutil.copytree(model(), folder)
    shutil.rmtree(folder / "tokenizer")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    write_vocabulary(folder)
    return folder


def test_without_a_model_the_demo_model_runs(tmp_path):
    """One clip, its sizes the model's own; the same by name, even beside a folder of that name; and made again."""
    clip(tmp_path / "a.mp4", frames=16)
    (tmp_path / "demo").mkdir()
    job = ["a.mp4", "--prompt", "a red fox in the snow", "--device", "cpu", "--steps", 2, "--json"]
    first = run(tmp_path, "transfer", *job)
    assert first.code == 0, first.err
    assert first.err.startswith("model: demo, a small one: clips of 16 frames of 128x128")
    assert "warning" not in first.err
    line = json.loads(first.out)
    frames = read_clip(tmp_path / "out" / line["output"]).frames
    assert frames.shape == (16, 128, 128, 3)
    record = json.loads((tmp_path / "out" / line["output"]).with_suffix(".mp4.json").read_bytes())
    assert record["model"] == "demo"

    again = run(tmp_path, "transfer", *job, "--model", "demo")
    assert json.loads(again.out)["state"] == "skipped"
    assert "model: demo" not in again.err, "who chose it needs no introduction"

    made = run(tmp_path, "rerun", tmp_path / "out" / line["output"], "--device", "cpu")
    assert made.code == 0, made.err
    assert np.array_equal(read_clip(made.out.strip()).frames, frames)


def test_the_diffusion_transformer_that_ships_runs_by_its_name(tmp_path):
    """One clip, planned, made, recorded, made again to the same frames, and measured with the judge of both models."""
    clip(tmp_path / "a.mp4", frames=16)
    job = ["a.mp4", "--prompt", "a red fox in the snow", "--model", "demo-dit", "--device", "cpu", "--steps", 2]
    planned = run(tmp_path, "plan", *job, "--json")
    assert planned.code == 0, planned.err
    assert json.loads(planned.out.splitlines()[0])["state"] == "open"
    first = run(tmp_path, "transfer", *job, "--json")
    assert first.code == 0, first.err
    assert "warning" not in first.err
    made = tmp_path / "out" / json.loads(first.out)["output"]
    frames = read_clip(made).frames
    assert frames.shape == (16, 128, 128, 3)
    assert json.loads(made.with_suffix(".mp4.json").read_bytes())["model"] == "demo-dit"
    again = run(tmp_path, "rerun", made, "--device", "cpu")
    assert again.code == 0, again.err
    assert np.array_equal(read_clip(again.out.strip()).frames, frames)


def centre_of_red(frames: np.ndarray) -> np.ndarray:
    """Centre of what is red in each frame: (frames, 2), pixels."""
    red, green, blue = np.moveaxis(frames.astype(int), -1, 0)
    weight = (red - np.maximum(green, blue)).clip(0) * (red - np.maximum(green, blue) >= 60)
    y, x = np.mgrid[: weight.shape[1], : weight.shape[2]]
    return np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], 1) / weight.sum((1, 2))[:, None]


def test_the_diffusion_transformer_follows_its_reference():
    """A red boat sails a figure of eight in the clouds; the red balloon that the prompt wants flies it over the sea."""
    pipeline = load_pipeline(demo.path("demo-dit"))
    reference = Path(__file__).parents[1] / "examples" / "references" / "figure-eight.mp4"
    frames = read_clip(reference, frames=16, size=(128, 128)).frames
    made = pipeline.generate("a red balloon over the sea", pipeline.extract_motion(frames), steps=10, seed=3)[0]
    wanted, found = centre_of_red(frames), centre_of_red(made)
    assert np.abs(wanted - found).mean() < 4
    for axis in (0, 1):
        assert np.corrcoef(wanted[:, axis], found[:, axis])[0, 1] > 0.85


def test_what_the_two_models_share_is_the_same():
    """Autoencoder, text encoder, tokenizer and words, to the byte; so that repositories keep them once."""
    shared = [*demo.path().glob("*/*"), demo.path() / GROUPS]
    shared = [file for file in shared if file.parent.name not in ("unet", "scheduler", "__pycache__")]
    assert len(shared) == 7
    for file in shared:
        twin = demo.path("demo-dit") / file.relative_to(demo.path())
        assert twin.read_bytes() == file.read_bytes(), file


def test_the_diffusion_transformer_is_small():
    weights = {name: [*demo.path(name).rglob("*.safetensors")] for name in demo.NAMES}
    sizes = {name: sum(path.stat().st_size for path in files) for name, files in weights.items()}
    assert sizes["demo-dit"] <= 24 * 2**20
    assert sum(sizes.values()) <= 48 * 2**20
    assert find_model("demo-dit", download=False).parameters["unet"] <= 12e6


def test_the_demo_model_is_small_and_knows_enough():
    folder = demo.path()
    weights = [*folder.rglob("*.safetensors"), judge.SHIPPED]
    assert sum(path.stat().st_size for path in weights) <= 24 * 2**20
    known = Vocabulary.read(folder)
    assert known is not None
    for kind, least in (("subjects", 40), ("colours", 8), ("scenes", 10)):
        assert len(known.groups[kind]) >= least
        assert not [word for phrase in known.groups[kind] for word in known.unknown(phrase)]


def test_the_examples_are_in_its_words():
    known = Vocabulary.read(demo.path())
    prompts = (Path(__file__).parents[1] / "examples" / "prompts.txt").read_text().splitlines()
    assert known is not None
    assert not [word for prompt in prompts if prompt[0] != "#" for word in known.unknown(prompt)]


def test_a_vocabulary_comes_from_the_model_folder(reader, tmp_path):
    known = Vocabulary.read(reader)
    assert known is not None
    assert known.unknown("A Red robot, in the FOREST with two kittens!") == ["robot", "with", "two", "kittens"]
    assert known.nearest("penguins")[0] == "penguin"
    assert "over the sea" in known.groups["scenes"]
    shutil.copytree(reader, tmp_path / "bare")
    (tmp_path / "bare" / GROUPS).unlink()
    bare = Vocabulary.read(tmp_path / "bare")
    assert bare is not None
    assert bare.unknown("a red robot") == ["robot"]
    assert {"penguin", "sea"} <= set(bare.groups["words"])
    assert "[UNK]" not in bare.groups["words"]


def test_a_tokenizer_that_spells_words_has_none():
    assert Vocabulary.read(model()) is None


def test_unknown_words_are_reported_before_anything_is_made(reader, tmp_path):
    clip(tmp_path / "a.mp4")
    prompts = ["a red robot in the snow", "a blue robot and a penguins on wood", "a red cat in the forest"]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    ended = run(tmp_path, "plan", "a.mp4", *options, "--model", reader, "--json")
    assert ended.code == 1
    assert len(ended.out.splitlines()) == 4, "standard output has the plan alone"
    *jobs, total = [json.loads(line) for line in ended.out.splitlines()]
    assert (total["open"], total["problem"]) == (1, 2)
    reported = {job["prompt"]: job.get("error", "") for job in jobs}
    assert reported[prompts[0]].endswith("does not know: robot")
    assert reported[prompts[1]].endswith("does not know: robot, penguins")
    assert reported[prompts[2]] == ""
    assert ended.err.count("warning") == 1
    assert "“robot”" in ended.err
    assert "“penguins” (penguin?)" in ended.err
    warning, *known = ended.err.splitlines()
    assert "cat" not in warning
    assert [line.split()[1] for line in known] == ["subjects:", "colours:", "scenes:"]
    assert "penguin" in known[0]
    assert "over the sea" in known[2]


def test_words_of_a_stream_are_reported_once(reader):
    from emt_cli.batch.jobs import Job
    from emt_cli.batch.options import Settings

    reported: list[str] = []
    watch = PromptWarnings("small", Vocabulary.read(reader), reported.append)
    words = ["robot", "robot", "wizard", *(f"word{n}" for n in range(12))]
    jobs = [Job(Path("a.mp4"), f"a {word} in the snow", 0, Settings()) for word in words]
    assert list(watch.watch([*jobs[:3], None])) == [*jobs[:3], None]
    assert [line.count("robot") for line in reported] == [1, 0, 0, 0, 0], "the warning, what is known, another warning"
    watch.look(jobs)
    assert "and 4 more words" in reported[5]
    PromptWarnings("large", None, reported.append).look(jobs)
    assert len(reported) == 6


def test_the_doctor_lists_the_words(reader, tmp_path):
    ended = run(tmp_path, "doctor", "--model", reader, "--json")
    found = {line["name"]: line["found"] for line in map(json.loads, ended.out.splitlines())}
    assert "8 colours: red, orange" in found["model"]
    assert "penguin" in found["model"]


def test_training_does_not_guess_its_model(tmp_path):
    ended = run(tmp_path, "train", "--pairs", "pairs", "-o", "run")
    assert ended.code == 2
    assert "demo" in ended.err


@pytest.mark.parametrize(
    ("made_by", "judged"), [("demo", True), ("demo-dit", True), (None, True), ("models/rv", False)]
)
def test_its_judge_reads_its_clips_alone(tmp_path, monkeypatch, made_by, judged):
    path = judge.Judge(judge.JudgeVocabulary.of_world()).save(tmp_path / "judge.safetensors")
    monkeypatch.setattr(judge, "SHIPPED", path)
    record = {"model": made_by} if made_by else {}
    pairs = [Pair(Path("a.mp4"), Path("b.mp4"), "a red fox in the snow", record=record)]
    found = evaluate._text_model("auto", "cpu", pairs)
    assert isinstance(found, judge.Judge) if judged else found is None
