"""`emt evaluate` from the command line, on clips and models made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from program import console
from typer.testing import CliRunner

from emt.errors import EmtError
from emt.evaluate.statistics import mean
from emt.video import write_clip
from emt_cli.batch.options import UsageError
from emt_cli.commands.evaluate import _from_file, evaluate

cv2 = pytest.importorskip("cv2")

FRAMES, SIZE = 5, 64


def panning(direction: tuple[int, int], seed: int) -> np.ndarray:
    """Texture that moves by a few pixels a frame."""
    scene = np.random.default_rng(seed).random((24, 24, 3)).astype(np.float32)
    scene = (cv2.resize(scene, (160, 160), interpolation=cv2.INTER_CUBIC).clip(0, 1) * 255).astype(np.uint8)
    corners = [(48 + t * direction[0], 48 + t * direction[1]) for t in range(FRAMES)]
    return np.stack([scene[y : y + SIZE, x : x + SIZE] for x, y in corners])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, frames in {
        "right": panning((3, 0), 0),
        "down": panning((0, 3), 1),
        "follows": panning((3, 0), 2),
        "opposes": panning((-3, 0), 3),
    }.items():
        write_clip(folder / f"{name}.mp4", frames, 8)
    return folder


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory) -> Path:
    """A CLIP of random weights, with everything that a published one has."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    size = {"height": 32, "width": 32}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


def run(*arguments: object, code: int = 0) -> str:
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    sys.stderr.write(result.stderr)
    return result.stdout


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def write_pairs(path: Path, clips: Path) -> Path:
    rows = [
        {"reference": "right.mp4", "result": "follows.mp4", "prompt": "a red cat", "seconds": 2.0, "seed": 7},
        {"reference": "right.mp4", "result": "opposes.mp4", "prompt": "a dog", "seconds": 4.0},
        {"reference": "down.mp4", "result": "down.mp4", "prompt": "a dog"},
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        body = [
            ",".join(str(row.get(name, "")) for name in ("reference", "result", "prompt", "seconds", "seed"))
            for row in rows
        ]
        path.write_text("\n".join(["reference,result,prompt,seconds,seed", *body]) + "\n")
    return path


def test_k7_a_device_that_is_none_and_clips_behind_urls_are_said_at_once(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"reference": "https://user:word@host/a.mp4", "result": "b.mp4"}\n')
    for arguments, said in (
        (("--pair", "a.mp4=b.mp4", "--device", "gpu"), "--device is 'gpu'"),
        (("--pair", "s3://bucket/a.mp4=b.mp4"), "--pair is s3://bucket/a.mp4, but must be on disk"),
        ((tmp_path / "pairs.jsonl",), "line 1: the reference is https://host/a.mp4, but must be on disk"),
    ):
        with pytest.raises(EmtError, match=said):
            run(*arguments)


@pytest.mark.parametrize("option", ["--plots", "--output"])
def test_k7_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, option, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("emt_cli.commands.evaluate._measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(EmtError, match=rf"{option} cannot be written: .*file is not a folder"):
        run("--pair", "a.mp4=b.mp4", option, tmp_path / "file" / "x.jsonl")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_k1_pairs_from_a_table_as_spreadsheets_write_it(tmp_path, delimiter):
    table = tmp_path / "pairs.csv"
    table.write_text(delimiter.join(("reference", "result", "note")) + "\n" + delimiter.join(("a.mp4", "b.mp4", "x")))
    [(number, fields)] = _from_file(table)
    assert (number, fields) == (2, {"reference": "a.mp4", "result": "b.mp4", "note": "x"})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_pairs_from_a_file(clips, suffix):
    *rows, last = lines(run(write_pairs(clips / f"pairs{suffix}", clips), "--json", "--text-model", "none"))
    follows, opposes, itself = rows
    assert follows["motion_fidelity"] > 0.95
    assert follows["pan_x"] > 0.99
    assert follows["pan_y"] is None
    assert opposes["motion_fidelity"] < -0.6
    assert opposes["camera"] < -0.9
    assert itself["motion_fidelity"] == pytest.approx(1)
    assert itself["leakage"] == pytest.approx(1, abs=1e-3)
    assert itself["leakage"] > max(follows["leakage"], opposes["leakage"])
    assert follows["text_alignment"] is None
    assert follows["prompt"] == "a red cat"
    assert int(follows["seed"]) == 7
    assert last["clips"] == 3
    expected = mean([row["motion_fidelity"] for row in rows]).as_dict()
    assert last["summary"]["motion_fidelity"] == pytest.approx(expected)
    assert last["summary"]["seconds"]["value"] == 3
    assert last["summary"]["seconds"]["clips"] == 2


def test_an_output_folder_of_transfer(clips, tmp_path):
    journal = [
        {"event": "job", "state": "done", "output": "a.mp4", "reference": str(clips / "right.mp4"), "prompt": "old",
         "timings": {"steps": 9.0}},
        {"event": "job", "state": "failed", "output": "b.mp4", "reference": "gone.mp4", "error": "broken"},
        {"event": "job", "state": "done", "output": "a.mp4", "reference": str(clips / "right.mp4"),
         "prompt": "a red cat", "seed": 3, "timings": {"steps": 1.0, "vae": 0.5},
         "settings": {"fit": "crop", "start": 0.0, "duration": None, "stride": None}},
        {"event": "run", "done": 1},
    ]  # fmt: skip
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    (tmp_path / "a.mp4").write_bytes((clips / "follows.mp4").read_bytes())
    row, last = lines(run(tmp_path, "--json"))
    assert row["prompt"] == "a red cat"
    assert row["seed"] == 3
    assert row["seconds"] == 1.5
    assert row["motion_fidelity"] > 0.95
    assert row["leakage"] is None  # there is no other reference to compare with
    assert last["clips"] == 1


def test_an_image_text_model_measures_alignment_and_consistency(clips, clip_model):
    source = write_pairs(clips / "with-model.jsonl", clips)
    rows = lines(run(source, "--json", "--text-model", clip_model, "--device", "cpu"))[:-1]
    plain = lines(run(source, "--json", "--text-model", "none"))[:-1]
    for row, without in zip(rows, plain):
        assert -1 <= row["text_alignment"] <= 1
        assert row["temporal_consistency"] != without["temporal_consistency"]
        assert row["motion_fidelity"] == pytest.approx(without["motion_fidelity"])
    assert rows[1]["text_alignment"] != rows[2]["text_alignment"]


def test_alignment_is_the_cosine_of_the_model(clips, clip_model):
    import torch
    from transformers import AutoModel, AutoProcessor

    from emt.evaluate.text import ImageTextModel, text_alignment

    frames = panning((3, 0), 0)
    model = ImageTextModel(str(clip_model))
    found = text_alignment(model.embed_frames(frames, batch=2), model.embed_prompts(["a red cat"])[0])
    inputs = AutoProcessor.from_pretrained(clip_model)(
        text=["a red cat"], images=list(frames), padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        plain = AutoModel.from_pretrained(clip_model)
        expected = plain(**inputs).logits_per_image.mean() / plain.logit_scale.exp()
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_k3_measures_take_the_place_of_no_clip_and_not_of_the_file_that_is_read(clips, tmp_path):
    listed, clip = write_pairs(tmp_path / "pairs.jsonl", clips), clips / "right.mp4"
    kept = listed.read_bytes(), clip.read_bytes()
    for path, said in ((clip, "is not replaced"), (listed, "is the file that is read")):
        with pytest.raises(EmtError, match=said):
            run(listed, "--output", path)
    assert (listed.read_bytes(), clip.read_bytes()) == kept


def test_the_table_names_every_measure_and_the_output_file_has_the_lines(clips, tmp_path):
    pair = f"{clips / 'right.mp4'}={clips / 'follows.mp4'}=a red cat"
    text = run("--pair", pair, "--output", tmp_path / "deep" / "out.jsonl", "--workers", 2, "--text-model", "none")
    for words in (
        "follows.mp4",
        "motion fidelity",
        "temporal consistency",
        "camera pan x, Pearson",
        "1 clip, mean",
    ):
        assert words in text, words
    assert len(lines((tmp_path / "deep" / "out.jsonl").read_text())) == 2


def test_plots_show_every_pair(clips, tmp_path):
    pytest.importorskip("matplotlib")
    run(write_pairs(clips / "plotted.jsonl", clips), "--plots", tmp_path / "plots", "--text-model", "none")
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["camera-0000-follows.png", "camera-0001-opposes.png", "camera-0002-down.png", "summary.png"]


def test_a_pair_that_cannot_be_read_is_reported_and_the_others_go_on(clips, tmp_path):
    (clips / "broken.jsonl").write_text(
        '{"reference": "right.mp4", "result": "missing.mp4"}\n{"reference": "right.mp4", "result": "follows.mp4"}\n'
    )
    bad, good, last = lines(run(clips / "broken.jsonl", "--json", code=1))
    assert "missing.mp4" in bad["error"]
    assert good["motion_fidelity"] > 0.95
    assert (last["clips"], last["failed"]) == (1, 1)


def test_k5_a_line_that_cannot_be_read_is_named_and_the_others_go_on(clips, capsys):
    good = '{"reference": "right.mp4", "result": "follows.mp4"}\n'
    bad = ["{broken", "[1]", '{"reference": 3, "result": "b.mp4"}', '{"reference": "s3://b/a", "result": "b"}']
    bad += ['{"reference": "a.mp4", "result": "b.mp4", "seconds": "soon"}'] * 6
    (clips / "lines.jsonl").write_text(good + "\n".join(bad) + "\n" + good)
    *rows, last = lines(run(clips / "lines.jsonl", "--json", code=1))
    assert [row["result"].endswith("follows.mp4") for row in rows] == [True, True]
    assert (last["clips"], last["failed"]) == (2, 10)
    said = capsys.readouterr().err
    assert [f"line {number}:" in said for number in (2, 3, 4, 5, 6, 10)] == [True] * 5 + [False]
    assert "and 2 more lines that cannot be read" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"reference": "a.mp4"}\n', "line 1: no reference or no result"),
        ("{broken\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"reference": "a.mp4", "result": "b.mp4", "seconds": "soon"}\n', "not a number"),
        ("", "no finished results"),
    ],
)
def test_bad_files_are_explained(tmp_path, content, message):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(EmtError, match=message):
        run(tmp_path / "pairs.jsonl")


def test_bad_sources_are_explained(tmp_path, clips):
    with pytest.raises(EmtError, match="not found"):
        run(tmp_path / "nowhere")
    with pytest.raises(EmtError, match="no journal"):
        run(tmp_path)
    with pytest.raises(UsageError, match="Nothing to evaluate"):
        run()
    run("--pair", "only-one.mp4", code=2)
    with pytest.raises(EmtError, match="cannot be loaded as an image-text model"):
        run(write_pairs(clips / "unloaded.jsonl", clips), "--text-model", tmp_path / "no-model")


# ---- folders of strangers ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(clips, tmp_path):
    """An output folder with one result."""
    line = {"event": "job", "state": "done", "output": "a/x-0.mp4", "reference": str(clips / "right.mp4")}
    line |= {"prompt": "a red cat", "seed": 3, "timings": {"steps": 1.0}, "settings": {"fit": "crop", "start": 0.0}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x-0.mp4").write_bytes((clips / "follows.mp4").read_bytes())
    (tmp_path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def add(folder: Path, *changes: dict) -> None:
    """Lines like the first, each with something else in it, of results of their own."""
    journal = folder / "journal.jsonl"
    first = json.loads(journal.read_text().splitlines()[0])
    with open(journal, "a") as file:
        for number, change in enumerate(changes):
            (folder / "a" / f"{number}.mp4").write_bytes((folder / "a" / "x-0.mp4").read_bytes())
            file.write(json.dumps({**first, "output": f"a/{number}.mp4", **change}) + "\n")


def test_measures_of_an_output_folder_are_where_its_report_looks(folder, clips):
    from emt_cli.report.metrics import Metrics

    run(folder, "--text-model", "none")
    [values] = Metrics.read(folder / "metrics.jsonl").rows.values()
    assert values["motion_fidelity"] > 0.95
    run(folder, "--text-model", "none", "--output", folder / "other.jsonl")
    assert (folder / "other.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_measures_that_cannot_be_written_are_printed_all_the_same(folder, capfd):
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(EmtError, match="cannot be written"):
        run(folder, "--text-model", "none", "--json")


HOSTILE = {
    "settings": [
        *(None, [], {"fit": 7}, {"fit": "x"}, {"start": "x"}, {"start": -1}, {"start": 1e300}),
        *({"stride": "2"}, {"stride": 0}, {"stride": 1.5}, {"duration": {}}),
    ],
    "reference": [None, 7, "\0", "", ".", "/dev/zero", "x" * 300],
    "timings": [{"steps": "x"}, {"steps": 10**400}, [], 7],
    "output": ["../../x.mp4", 7, "\0"],
    "prompt": [7],
    "seed": ["x"],
    "model": [{}],
}


def test_k5_hostile_lines_of_a_journal_leave_the_others(folder):
    """Each line is a good one with one value of another kind."""
    from emt.evaluate.pairs import evaluate_pairs
    from emt_cli.commands.evaluate import _from_results

    changes = [{field: value} for field, values in HOSTILE.items() for value in values]
    add(folder, *changes)
    rows = evaluate_pairs(list(_from_results(folder, None)))
    assert rows[0].values["motion_fidelity"] > 0.95
    failed = {row.pair.result.name: row.error for row in rows if row.error is not None}
    assert len(rows) == 1 + len(changes) - 3, "paths out of the folder are no results"
    assert 12 <= len(failed) < len(changes)
    assert all(isinstance(error, EmtError) for error in failed.values())


def test_k5_lines_that_are_nested_too_deep_are_left_out(folder):
    with open(folder / "journal.jsonl", "a") as file:
        file.write("[" * 100_000 + "]" * 100_000 + '\n{"event": "job", "state": "done", "output": "y.mp4"}\n')
    rows = lines(run(folder, "--json", "--text-model", "none", code=1))
    assert rows[0]["motion_fidelity"] > 0.95
    assert "does not exist" in rows[1]["error"]


def test_k6_terminal_escapes_are_shown_not_obeyed(folder):
    nasty = "\x1b]0;owned\x07\x9b31m"
    add(folder, {"prompt": nasty}, {"reference": f"/{nasty}.mp4"})
    ended = console(folder, "evaluate", ".", "--text-model", "none")
    assert ended.returncode == 1
    for text in (ended.stdout, ended.stderr):
        assert "\\x1b]0;owned" in text
        assert not {"\x1b", "\x07", "\x9b"} & set(text)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000 + b"]" * 100_000, b'{"reference": "a.mp4", "result": "b.mp4", "prompt": {"a": 1}}', b"\xff\xfe\x00"]
    + [
        b'{"reference": "a.mp4", "result": "b.mp4", "%s": %s}' % pair
        for pair in ((b"start", b"NaN"), (b"stride", b"[]"))
    ],
)
def test_k5_a_damaged_file_of_pairs_is_one_error(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(EmtError, match=r"pairs\.jsonl"):
        run(tmp_path / "pairs.jsonl")


def test_names_that_are_no_unicode_are_printed(clips, tmp_path, capfdbinary):
    odd = tmp_path / "odd\udc80.mp4"
    odd.write_bytes((clips / "follows.mp4").read_bytes())
    run("--pair", f"{clips / 'right.mp4'}={odd}", "--json", "--text-model", "none")


def test_the_table_tells_results_of_one_name_apart(folder):
    (folder / "b").mkdir()
    (folder / "b" / "x-0.mp4").write_bytes((folder / "a" / "x-0.mp4").read_bytes())
    line = json.loads((folder / "journal.jsonl").read_text())
    with open(folder / "journal.jsonl", "a") as file:
        file.write(json.dumps({**line, "output": "b/x-0.mp4"}) + "\n")
    output = run(folder, "--text-model", "none")
    assert "a/x-0.mp4" in output
    assert "b/x-0.mp4" in output


def test_the_table_tells_references_of_one_name_apart(folder, clips, monkeypatch):
    """Each by as many of its folders as the other does not share."""
    monkeypatch.setenv("COLUMNS", "200")
    line = json.loads((folder / "journal.jsonl").read_text())
    rows = []
    for number, where in enumerate(("day/walk", "night/walk")):
        (folder / where).mkdir(parents=True)
        (folder / where / "clip.mp4").write_bytes((clips / "right.mp4").read_bytes())
        (folder / "a" / f"{number}.mp4").write_bytes((folder / "a" / "x-0.mp4").read_bytes())
        rows.append({**line, "output": f"a/{number}.mp4", "reference": str(folder / where / "clip.mp4")})
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = "".join(run(folder, "--text-model", "none").split())
    assert "0.mp4day/walk/clip.mp4" in output
    assert "1.mp4night/walk/clip.mp4" in output
