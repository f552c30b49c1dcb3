"""Training: pairs in their layout on disk, the adapter alone changes, and a run that was cut off goes on to the bit."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from program import FRAMES, SIDE, Run, console, emt, environment, model
from safetensors.torch import load_file
from typer.testing import CliRunner

from emt.backbone import PUBLISHED
from emt.backbones.sd15.random_model import random_model
from emt.errors import EmtError
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline
from emt.synthetic import renderer
from emt.synthetic.renderer import COLOURS, SUBJECTS, World, words
from emt.train import trainer as trainer_module
from emt.train.data import PairDataset, Rendering, find_pairs, write_pairs
from emt.train.objective import adapter_loss
from emt.train.run_folder import check_run, find_checkpoints
from emt.train.trainer import Trainer, TrainingSettings, published
from emt.video import read_clip, write_clip
from emt_cli.commands.group import app
from emt_cli.commands.train import _stop_on_signals

# ----------------------------------------------------------------------------------------------------------- the data


def clip(path: Path, seed: int, colour: tuple[int, int, int], frames: int = 5) -> Path:
    """A square of a colour that moves as the seed says."""
    start, speed = np.random.default_rng(seed).integers(2, 7, 2)
    video = np.full((frames, SIDE, SIDE, 3), 40, np.uint8)
    for i, frame in enumerate(video):
        frame[start + i * speed // 2 :, start + i * speed // 2 :][:8, :8] = colour
    return write_clip(path, video, 8)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two motions with captions in file names: four pairs."""
    root = tmp_path_factory.mktemp("pairs")
    for motion in range(2):
        clip(root / f"motion {motion}" / "a red square.mp4", motion, (220, 30, 30))
        clip(root / f"motion {motion}" / "a blue square.mp4", motion, (30, 30, 220))
    return root


def listed(root: Path) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Pairs as (reference, target, caption), and what was said."""
    said: list[str] = []
    found = find_pairs(root, said.append)
    return [(p.reference.name, p.target.name, p.caption) for p in found], said


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_any_two_clips_of_a_motion_are_a_pair(pairs):
    found, said = listed(pairs)
    both = [
        ("a red square.mp4", "a blue square.mp4", "a blue square"),
        ("a blue square.mp4", "a red square.mp4", "a red square"),
    ]
    assert found == both * 2
    assert not said


@pytest.mark.parametrize("place", ["", "spin"])
def test_metadata_give_captions_and_roles(tmp_path, place):
    """In the folder of a motion, or in that of all motions."""
    for name in ("1.mp4", "2.mp4", "filmed.mp4"):
        touch(tmp_path / "spin" / name)
    prefix = "" if place else "spin/"
    records = [
        {"file": f"{prefix}1.mp4", "caption": "a car: red / blue"},
        {"file": f"{prefix}2.mp4", "caption": "a fox", "role": "target"},
        {"file": f"{prefix}filmed.mp4", "role": "reference"},
    ]
    (tmp_path / place / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    found, said = listed(tmp_path)
    assert found == [
        ("2.mp4", "1.mp4", "a car: red / blue"),
        ("filmed.mp4", "1.mp4", "a car: red / blue"),
        ("1.mp4", "2.mp4", "a fox"),
        ("filmed.mp4", "2.mp4", "a fox"),
    ]
    assert not said


def test_what_cannot_be_used_is_named_with_the_reason(tmp_path):
    for name in ("good/a.mp4", "good/b.mp4", "good/empty.mp4", "lonely/a.mp4", "none/notes.txt"):
        touch(tmp_path / name)
    lines = [
        '{"file": "empty.mp4", "caption": " "}',
        "[" * 100_000,
        '{"file": "gone.mp4"}',
        '{"file": "a.mp4", "role": "x"}',
    ]
    (tmp_path / "good" / "metadata.jsonl").write_text("\n".join(lines))
    found, said = listed(tmp_path)
    assert {target for _, target, _ in found} == {"b.mp4"}
    for name, reason in [
        ("empty.mp4", "caption is empty"),
        ("metadata.jsonl:2", "a line is"),
        ("gone.mp4", "no clip"),
        ("metadata.jsonl:4", "role is 'x'"),
        ("lonely", "only one clip"),
        ("none", "no clip"),
    ]:
        assert [line for line in said if name in line and reason in line], (name, said)
    assert len(said) == 6


LINE = '{"file": "a.mp4", "caption": "a löwe"}\n'


@pytest.mark.parametrize(
    "content",
    [
        LINE.encode("utf-16"),
        LINE.encode("utf-8-sig"),
        LINE.replace("\n", "\r\n").encode(),
        LINE.strip().encode() + b"\r",
    ],
)
def test_k1_metadata_in_the_encodings_that_people_have(tmp_path, content):
    for name in ("m/a.mp4", "m/b.mp4"):
        touch(tmp_path / name)
    (tmp_path / "m" / "metadata.jsonl").write_bytes(content)
    found, said = listed(tmp_path)
    assert [caption for _, _, caption in found] == ["a löwe", "b"]
    assert not said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file": "a.mp4", "role": "Reference"}', "its role is 'Reference', allowed are"),
        ('{"file": "a.mp4", "caption": 3}', "its caption is 3, which is no text"),
        ('{"file": "a.mp4", "caption": "\\ud800"}', "not valid text"),
        ('{"file": "a.mp4", "caption": "x\\u0000"}', "not valid text"),
        ('{"file": "a.mp4", "caption": "\\u200b"}', "its caption is empty"),
        (b'{"file": "a.mp4", "caption": "l\xf6we"}', "not valid text"),
    ],
)
def test_k2_a_clip_whose_metadata_are_wrong_is_no_target_by_its_name(tmp_path, line, reason):
    for name in ("m/a.mp4", "m/b.mp4"):
        touch(tmp_path / name)
    (tmp_path / "m" / "metadata.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    found, said = listed(tmp_path)
    assert found == [("a.mp4", "b.mp4", "b")]
    assert len(said) == 1
    assert reason in said[0]


def test_k7_metadata_of_other_places_and_of_a_thousand_bad_lines_are_a_few_words(tmp_path):
    for name in ("m/a.mp4", "m/b.mp4"):
        touch(tmp_path / name)
    lines = ['{"file": "/etc/passwd"}', '{"file": ""}', '{"file": "../b/c.mp4"}', LINE.strip(), LINE.strip()]
    (tmp_path / "m" / "metadata.jsonl").write_text("\n".join(lines + ["x"] * 1000), encoding="utf-8")
    found, said = listed(tmp_path)
    assert len(found) == 2
    assert [text in line for text, line in zip(["outside"] * 3 + ["replaces"], said)] == [True] * 4
    assert said[-1].endswith("and so 996 more lines")
    assert len(said) == 9


def test_k2_what_is_no_file_among_clips_is_named(tmp_path):
    for name in ("good/a.mp4", "good/b.mp4", "good/b.txt", "good/c.swf", "good/metadata.jsonl"):
        touch(tmp_path / name)
    os.mkfifo(tmp_path / "good" / "pipe.mp4")
    found, said = listed(tmp_path)
    assert len(found) == 2
    (line,) = said
    assert line.startswith("ignored 2 files in ")
    assert "pipe.mp4 (no file but a pipe, socket or device)" in line


def test_copies_of_a_report_are_no_motion(tmp_path):
    """`emt report PAIRS` has been looked at before `emt train`: its clips are named by digests."""
    for name in ("m/a fox.mp4", "m/a cat.mp4", "report/0a1b.mp4", "report/2c3d.mp4"):
        touch(tmp_path / name)
    captions = {"a fox", "a cat"}
    assert {pair[2] for pair in listed(tmp_path)[0]} == captions | {"0a1b", "2c3d"}  # a motion that is called so
    touch(tmp_path / "report.html")
    found, said = listed(tmp_path)
    assert {pair[2] for pair in found} == captions
    assert not said


def test_a_caption_that_the_model_cannot_read_is_skipped(tmp_path):
    for name in ("m/a fox.mp4", "m/a qwzx.mp4"):
        touch(tmp_path / name)

    def check(caption: str) -> None:
        if "qwzx" in caption:
            raise EmtError("unknown word qwzx", "It knows: …")

    said: list[str] = []
    assert [p.caption for p in find_pairs(tmp_path, said.append, check)] == ["a fox"]
    assert "unknown word qwzx" in said[0]


@pytest.mark.parametrize("make", [lambda root: None, lambda root: touch(root / "m" / "one.mp4")])
def test_nothing_left_is_an_error(tmp_path, make):
    make(tmp_path)
    with pytest.raises(EmtError, match="no usable pair"):
        find_pairs(tmp_path, lambda text: None)
    with pytest.raises(EmtError, match="not a folder"):
        find_pairs(tmp_path / "nowhere", lambda text: None)


def dataset(root: Path, seed: int = 0) -> PairDataset:
    return PairDataset(find_pairs(root, lambda text: None), frames=FRAMES, size=(SIDE, SIDE), seed=seed)


def test_the_order_follows_from_the_seed_and_the_place(pairs):
    """Each pair once an epoch; any place can be read without those before it."""
    one, other = dataset(pairs), dataset(pairs)
    forwards = [one.pair(place) for place in range(8)]
    backwards = [other.pair(place) for place in reversed(range(8))]
    assert forwards == backwards[::-1]
    for epoch in (forwards[:4], forwards[4:]):
        assert {(p.reference, p.target) for p in epoch} == {(p.reference, p.target) for p in one.pairs}
    assert [dataset(pairs, seed=1).pair(place) for place in range(8)] != forwards


def test_a_sample_holds_the_clips_at_the_size_of_the_model(pairs):
    sample = dataset(pairs)[0]
    expected = read_clip(sample.pair.target, frames=FRAMES, size=(SIDE, SIDE)).frames
    assert sample.reference.shape == (FRAMES, SIDE, SIDE, 3)
    np.testing.assert_array_equal(sample.target, expected)


def test_clips_that_cannot_be_decoded_are_replaced(tmp_path):
    clip(tmp_path / "m" / "good.mp4", 0, (255, 0, 0))
    clip(tmp_path / "m" / "fine.mp4", 0, (0, 255, 0))
    clip(tmp_path / "m" / "short.mp4", 0, (0, 0, 255), frames=2)
    (tmp_path / "m" / "broken.mp4").write_bytes(b"no video at all")
    data = dataset(tmp_path)
    samples = [data[place] for place in range(6)]
    assert {s.pair.caption for s in samples} == {"good", "fine"}
    problems = {Path(path).name: text for s in samples for path, text in s.problems.items()}
    assert problems.keys() == {"short.mp4", "broken.mp4"}
    assert "2 frames" in problems["short.mp4"]
    for path in (tmp_path / "m").iterdir():
        path.write_bytes(b"")
    with pytest.raises(EmtError, match="none of the 12 pairs"):
        dataset(tmp_path)[0]


# --------------------------------------------------------------------------------------------------------- make-pairs


@pytest.fixture(scope="module")
def world() -> World:
    return World(size=32, frames=FRAMES, variants=1, textures=4)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def make(out: Path, motions: int, world: World, **options: float) -> list[bool]:
    return [fresh for _, fresh in write_pairs(out, motions, Rendering(**options), lambda: world)]  # type: ignore[arg-type]


def test_rendered_pairs_are_what_training_reads(tmp_path, world):
    make(tmp_path, 4, world, appearances=3, realism=0.5)
    records = [json.loads(line) for path in tmp_path.glob("*/metadata.jsonl") for line in path.read_text().splitlines()]
    filmed = [r for r in records if r["role"] == "reference"]
    assert len(records) == 12
    assert 0 < len(filmed) < 4
    assert {r["caption"] for r in filmed} == {""}
    for record in records:
        if record["role"] == "target":
            said = set(record["caption"].split())
            assert record["file"] == record["caption"] + ".mp4"
            assert said <= set(words())
            assert said & set(COLOURS)
            assert said & set(SUBJECTS)
    found, problems = listed(tmp_path)
    assert not problems
    assert len(found) == 2 * len(records) - 2 * len(filmed)
    assert dataset(tmp_path)[0].target.std() > 5


def test_the_seed_and_the_number_decide_a_motion(tmp_path, world):
    """Nothing depends on where a run was cut off; clips that are there are not made again."""
    make(tmp_path / "whole", 3, world)
    make(tmp_path / "parts", 1, world)
    whole = contents(tmp_path / "whole")
    parts = tmp_path / "parts"
    assert make(parts, 3, world) == [False, True, True]
    lost = sorted(parts.glob("motion-000002/*.mp4"))[0]
    lost.unlink()
    (lost.parent / "metadata.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*.mp4")}
    assert make(parts, 3, world) == [False, False, True]
    assert contents(parts) == whole
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    make(tmp_path / "other", 3, world, seed=1)
    assert contents(tmp_path / "other") != whole


def test_pairs_made_otherwise_are_not_mixed(tmp_path, world):
    make(tmp_path / "a", 1, world)
    with pytest.raises(EmtError, match="seed 0 there, 5 requested"):
        make(tmp_path / "a", 1, world, seed=5)
    touch(tmp_path / "b" / "thesis.txt")
    with pytest.raises(EmtError, match="something else"):
        make(tmp_path / "b", 1, world)
    for damaged in ("[]", "null", "{", "[" * 100_000):
        (tmp_path / "a" / "pairs.json").write_text(damaged)
        with pytest.raises(EmtError, match=r"pairs\.json is damaged"):
            make(tmp_path / "a", 1, world)


def test_k4_metadata_that_is_a_pipe_is_no_wait(tmp_path):
    for name in ("a fox.mp4", "a cat.mp4"):
        clip(tmp_path / "pairs" / "m" / name, 0, (255, 0, 0))
    os.mkfifo(tmp_path / "pairs" / "m" / "metadata.jsonl")
    said = []
    assert len(find_pairs(tmp_path / "pairs", said.append)) == 2
    assert said == [f"{tmp_path / 'pairs' / 'm' / 'metadata.jsonl'}: skipped, it is no file"]


def test_k2_a_run_is_not_written_among_its_pairs(tmp_path):
    with pytest.raises(EmtError, match="is the folder of pairs"):
        check_run(tmp_path, tmp_path / ".." / tmp_path.name, None)


@pytest.mark.parametrize("write", ["save_checkpoint", "_write_result"])
def test_k2_weights_that_are_not_finite_are_not_saved(tmp_path, pairs, write):
    trainer = start(pairs, tmp_path / "run")
    next(iter(trainer.ema.shadow_params)).fill_(float("nan"))
    with pytest.raises(EmtError, match="trained weights are not finite after step 0"):
        getattr(trainer, write)()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_make_pairs_as_a_program(tmp_path, monkeypatch):
    """Prints the folder; another run finds all there and paints nothing."""
    monkeypatch.chdir(tmp_path)
    # A world of fewer scenes: painting all takes longer than all else.
    monkeypatch.setattr(renderer, "World", functools.partial(World, variants=1, textures=4))
    words = ["make-pairs", "out", "--motions", "1", "--device", "cpu", "--fps", "12"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "out\n"
    clips = sorted((tmp_path / "out").glob("motion-000000/*.mp4"))
    assert len(clips) == 2
    for path in clips:
        clip = read_clip(path)
        assert (clip.info.frames, clip.info.width, clip.info.height, clip.info.fps) == (16, 128, 128, 12)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "0 motions made, 1 were there" in again.stderr
    assert "painting" not in again.stderr


# ----------------------------------------------------------------------------------------------------------- training


def settings(**given: object) -> TrainingSettings:
    usual = {"steps": 2, "workers": 0, "sample_every": 0, "checkpoint_every": 100, "learning_rate": 1e-2}
    return TrainingSettings(**(usual | given))  # type: ignore[arg-type]


def start(pairs: Path, run: Path, **given: object) -> Trainer:
    return Trainer(model(), pairs, run, settings(**given), say=lambda text: None)


def test_the_loss_falls_on_a_batch_it_has_seen(pairs, tmp_path):
    trainer = start(pairs, tmp_path, steps=25, drop_text=0.0)
    sample = trainer.dataset[0]
    batch = trainer.prepare([sample] * 4, step=0, part=0)
    trainer.prepare = lambda samples, step, part: batch
    trainer._batches = lambda: iter([[sample]] * 25)

    def loss() -> float:
        with torch.no_grad():
            return adapter_loss(trainer.pipe.unet, trainer.objective, **batch).item()

    before = loss()
    assert trainer.train()
    assert loss() < 0.9 * before


def test_only_the_adapter_changes(pairs, tmp_path):
    trainer = start(pairs, tmp_path, steps=2)
    unet = trainer.pipe.unet
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    frozen = [p.clone() for part in (trainer.pipe.vae, trainer.pipe.text_encoder) for p in part.parameters()]
    trainer.train()
    changed = {name for name, p in unet.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in unet.adapter_parameters()}
    after = [p for part in (trainer.pipe.vae, trainer.pipe.text_encoder) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))


def test_weights_are_averaged_by_the_formula(pairs, tmp_path):
    """``average ← d·average + (1 − d)·weights`` with d = min(decay, (1 + n) / (10 + n)), n updates after the first."""
    trainer = start(pairs, tmp_path, steps=5, ema_decay=0.25)
    name, weight = next(iter(trainer.trained.items()))
    expected, decays = weight.detach().clone(), []

    def follow(record: dict[str, float]) -> None:
        n = record["step"] - 1
        decay = min(0.25, (1 + n) / (10 + n)) if n else 0.0
        decays.append(decay)
        expected.mul_(decay).add_(weight.detach(), alpha=1 - decay)

    trainer.train(on_step=follow)
    assert decays == [0.0, 2 / 11, 0.25, 0.25, 0.25]
    average = load_file(tmp_path / "adapter.safetensors")[published(PUBLISHED, name)]
    torch.testing.assert_close(average, expected)
    assert not torch.equal(average, weight)


def test_a_tenth_of_the_captions_is_dropped(pairs, tmp_path):
    trainer = start(pairs, tmp_path, drop_text=0.1)
    trainer.pipe.encode_frames = lambda frames, generator: torch.zeros(1, 4, FRAMES, 4, 4)
    seen: list[str] = []
    trainer.pipe.encode_prompts = lambda prompts: seen.extend(prompts)
    samples = [trainer.dataset[0]] * 100
    for step in range(20):
        trainer.prepare(samples, step, 0)
    assert set(seen) == {"", samples[0].pair.caption}
    assert abs(seen.count("") / 2000 - 0.1) < 0.02


def test_k9_references_and_targets_are_noised_to_their_own_timesteps(pairs, tmp_path):
    """The reference to the model's, with noise of its own and the empty prompt; the target to the drawn one."""
    folder = random_model(tmp_path / "model", frames=FRAMES, height=SIDE, width=SIDE, reference_timestep=250)
    trainer = Trainer(folder, pairs, tmp_path / "run", settings(steps=1, drop_text=0.0), say=lambda text: None)
    unet, batches, read, denoised = trainer.pipe.unet, [], [], []
    prepare, encode_reference, forward = trainer.prepare, unet.encode_reference, unet.forward

    def spy_batch(samples, step, part):
        batches.append(prepare(samples, step, part))
        return batches[-1]

    def spy_reference(latents, timestep, text):
        read.append((latents.clone(), timestep, text))
        return encode_reference(latents, timestep, text)

    def spy_forward(sample, timestep, text, motion=None, **options):
        if motion is not None:
            denoised.append((sample.clone(), timestep, text))
        return forward(sample, timestep, text, motion, **options)

    trainer.prepare, unet.encode_reference, unet.forward = spy_batch, spy_reference, spy_forward
    trainer.train()
    [batch], [(reference, level, empty)], [(target, timestep, text)] = batches, read, denoised

    def noised(latents: torch.Tensor, noise: torch.Tensor, at: int) -> torch.Tensor:
        variance = trainer.pipe.scheduler.alphas_cumprod[at]
        return variance.sqrt() * latents + (1 - variance).sqrt() * noise

    assert level.tolist() == [250]
    torch.testing.assert_close(reference, noised(batch["reference"], batch["reference_noise"], 250))
    torch.testing.assert_close(empty, trainer.pipe.encode_prompts([""]))
    assert timestep.tolist() == batch["timestep"].tolist() != [250]
    torch.testing.assert_close(target, noised(batch["target"], batch["noise"], batch["timestep"].item()))
    torch.testing.assert_close(text, trainer.pipe.encode_prompts([trainer.dataset.pair(0).caption]))
    assert not torch.equal(batch["noise"], batch["reference_noise"])


def test_accumulated_batches_make_the_step_of_one_large_batch(pairs, tmp_path):
    """The gradient of a step is the mean over its batches: the same batch four times is that batch once."""
    weights = []
    for accumulate in (1, 4):
        trainer = start(pairs, tmp_path / str(accumulate), steps=1, accumulate=accumulate)
        batch = trainer.prepare([trainer.dataset[0]], 0, 0)
        trainer.prepare = lambda samples, step, part, batch=batch: batch
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.trained.values()]))
    torch.testing.assert_close(*weights)


def test_a_loss_that_is_not_finite_skips_the_step(pairs, tmp_path, monkeypatch):
    trainer = start(pairs, tmp_path, steps=3)
    prepare, states = trainer.prepare, []

    def broken(samples, step, part):
        batch = prepare(samples, step, part)
        return batch | {"noise": batch["noise"] * float("nan")} if step == 1 else batch

    def follow(record: dict[str, float]) -> None:
        states.append((record["skipped"], next(iter(trainer.trained.values())).detach().clone()))

    trainer.prepare = broken
    assert trainer.train(on_step=follow)
    assert [skipped for skipped, _ in states] == [0, 1, 1]
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[1][1], states[2][1])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [loss is None for loss in losses] == [False, True, False]

    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 3)
    trainer = start(pairs, tmp_path / "hopeless", steps=9)
    next(iter(trainer.trained.values())).data.fill_(float("nan"))
    with pytest.raises(EmtError, match="not finite for 3 steps in a row, the last was step 3"):
        trainer.train()


def test_reduced_precision_and_checkpointed_gradients_follow_the_plain_loss(pairs, tmp_path):
    """Gradient checkpointing changes nothing; bfloat16 little, and trained weights stay in float32."""
    losses: dict[str, list[float]] = {}
    for name, given in {"fp32": {}, "saving": {"gradient_checkpointing": True}, "bf16": {"precision": "bf16"}}.items():
        trainer = start(pairs, tmp_path / name, steps=2, **given)
        losses[name] = []
        trainer.train(on_step=lambda record, to=losses[name]: to.append(record["loss"]))
        assert {p.dtype for p in trainer.trained.values()} == {torch.float32}
    assert losses["saving"] == losses["fp32"]
    assert losses["bf16"] != losses["fp32"]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.05)


def test_the_result_is_a_model(pairs, tmp_path):
    """RUN/model makes clips; RUN/adapter.safetensors loads by its published names; sheets and curves are there."""
    trainer = start(pairs, tmp_path, steps=2, sample_every=2)
    trainer.train()
    pipe = MotionTransferPipeline.from_pretrained(str(tmp_path / "model"))
    motion = pipe.extract_motion(trainer.first[0].reference)
    [made] = pipe.generate("a red square", motion)
    assert made.shape == (FRAMES, SIDE, SIDE, 3)

    adapter = load_file(tmp_path / "adapter.safetensors")
    plain = MotionTransferPipeline.from_pretrained(str(model()))
    names = {name for name, _ in plain.unet.adapter_parameters()}
    backbone = {name: p for name, p in plain.unet.state_dict().items() if name not in names}
    plain.unet.load_published(backbone, adapter)
    [same] = plain.generate("a red square", motion)
    np.testing.assert_array_equal(made, same)

    assert "2 steps of 1 of 4 pairs" in (tmp_path / "model" / "README.md").read_text()
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Image.open(tmp_path / "samples" / "step-00000002.png") as sheet:
        everywhere = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), (SIDE, SIDE, 3))
    for sample in trainer.first:
        for clip in (sample.reference, sample.target):
            assert (everywhere == clip[-1]).all((-3, -2, -1)).any()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Tags()["images"] == ["samples"]


def test_k1_a_model_that_denoises_with_more_than_the_adapter_trains_through_it_and_keeps_it(pairs, tmp_path):
    pipe = MotionTransferPipeline.from_pretrained(str(model()))
    trained = {name for name, _ in pipe.unet.adapter_parameters()}
    state = pipe.unet.state_dict()
    backbone = {name: tensor for name, tensor in state.items() if name not in trained}
    adapter = {published(PUBLISHED, name): state[name] for name in trained}
    layers = [n for n in backbone if n.startswith("up_blocks") and ".attentions." in n and ".to_q." in n]
    pipe.unet.load_published(backbone, adapter | {name: backbone[name] * 2 for name in layers})
    pipe.save_pretrained(tmp_path / "wide")

    trainer = Trainer(tmp_path / "wide", pairs, tmp_path / "run", settings())
    unet = trainer.pipe.unet
    batch = trainer.prepare([trainer.dataset[0]], step=0, part=0)
    with torch.no_grad():
        wide, plain = (
            adapter_loss(u, trainer.objective, **batch) for u in (unet, start(pairs, tmp_path / "p").pipe.unet)
        )
    assert abs(wide - plain) > 1e-4 * plain, "its own layers take part in the loss"
    trainer.train()

    made = load_file(tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    given = load_file(tmp_path / "wide" / "unet" / "diffusion_pytorch_model.safetensors")
    own = {f"denoising.{name}" for name in layers}
    assert own <= made.keys()
    assert made.keys() == given.keys()
    assert {name for name in made if not torch.equal(made[name], given[name])} == trained
    assert load_file(tmp_path / "run" / "adapter.safetensors").keys() == adapter.keys()
    assert f"{len(layers)} more layers denoise" in (tmp_path / "run" / "model" / "README.md").read_text()
    again = Trainer(
        tmp_path / "wide",
        pairs,
        tmp_path / "run",
        settings(steps=3),
        resume=tmp_path / "run" / "checkpoints" / "step-00000002",
    )
    assert again.train()


def test_the_model_keeps_the_type_it_is_stored_in_and_has_an_adapter(pairs, tmp_path):
    half = MotionTransferPipeline.from_pretrained(str(model()), dtype=torch.float16)
    half.register_to_config(adapter="none")
    half.save_pretrained(tmp_path / "half")
    Trainer(tmp_path / "half", pairs, tmp_path / "run", settings(steps=1)).train()
    stored = load_file(tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert find_model(str(tmp_path / "run" / "model"), download=False).has_adapter, "it has one now"
    assert {t.dtype for t in load_file(tmp_path / "run" / "adapter.safetensors").values()} == {torch.float32}


def test_the_latest_checkpoints_are_kept(pairs, tmp_path):
    start(pairs, tmp_path, steps=5, checkpoint_every=1, keep=2).train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`emt train` where torch cannot be imported: what is said before anything is loaded."""
    code = "import sys; sys.modules['torch'] = sys.modules['tensorboard'] = None; from emt_cli.app import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_k7_what_a_run_lacks_is_said_before_anything_is_loaded(pairs, tmp_path, monkeypatch):
    words = ["train", "--model", "demo", "--pairs", pairs, "-o", tmp_path / "run"]
    assert "pip install 'emt-cli[train]'" in without_torch(*words).stderr
    assert "there is no checkpoint nowhere" in without_torch(*words, "--resume", "nowhere").stderr
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(EmtError, match=r"pip install 'emt-cli\[train\]'"):
        start(pairs, tmp_path)


# -------------------------------------------------------------------------------------------------------- the program


def command(pairs: Path, run: Path, *more: object) -> list[str]:
    arguments = ["train", "--model", model(), "--pairs", pairs, "-o", run, "--sample-every", 0, "--workers", 0, *more]
    return [str(argument) for argument in arguments]


def log(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient's norm of each line."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def wait_for(condition, run: Run) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert run.process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)


def state(run: Path, step: int) -> dict[str, bytes]:
    return contents(run / "checkpoints" / f"step-{step:08}")


def test_a_killed_run_goes_on_to_the_bit(pairs, tmp_path):
    """Same losses, weights, average and moments as a run that was left alone, wherever it was cut off."""
    env = environment(tmp_path)
    options = ["--steps", 5, "--checkpoint-every", 2]
    whole = emt(*command(pairs, tmp_path / "whole", *options), environment=env)
    assert whole.code == 0, whole.err
    assert whole.out == f"{tmp_path / 'whole' / 'model'}\n"

    run = tmp_path / "cut"
    killed = Run(*command(pairs, run, *options), environment=env)
    wait_for(lambda: len(find_checkpoints(run)) >= 1 and len(log(run)) >= 3, killed)
    killed.send(signal.SIGKILL, group=True)
    killed.process.join(30)
    assert not (run / "model").exists()
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a crash may leave it

    resumed = emt(*command(pairs, run, *options, "--resume", "latest", "--workers", 1), environment=env)
    assert resumed.code == 0, resumed.err
    assert "otherwise" not in resumed.err
    assert log(run) == log(tmp_path / "whole")
    assert [step for step, _, _ in log(run)] == list(range(1, 6))
    assert state(run, 5) == state(tmp_path / "whole", 5)
    assert (run / "adapter.safetensors").read_bytes() == (tmp_path / "whole" / "adapter.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit_too(pairs, tmp_path):
    """As `accelerate launch` starts them on two GPUs, here on the CPU."""

    def launch(run: Path, *options: object) -> str:
        words = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        launch = [sys.executable, "-m", *words, "-m", "emt_cli.app"]
        launch += command(pairs, run, "--checkpoint-every", 2, *options)
        env = os.environ | environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{run / 'model'}\n"
        return done.stderr

    assert "2 × cpu" in launch(tmp_path / "whole", "--steps", 4)
    launch(tmp_path / "cut", "--steps", 2)
    assert "otherwise" not in launch(tmp_path / "cut", "--steps", 4, "--resume", "latest")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert state(tmp_path / "cut", 4) == state(tmp_path / "whole", 4)
    alone = emt(*command(pairs, tmp_path / "alone", "--steps", 4), environment=environment(tmp_path))
    assert alone.code == 0
    assert log(tmp_path / "alone") != log(tmp_path / "whole")


def test_ctrl_c_saves_and_exits_130(pairs, tmp_path):
    """The processes that decode get the signal too, as from a terminal."""
    run = tmp_path / "run"
    running = Run(*command(pairs, run, "--steps", 500, "--workers", 1), environment=environment(tmp_path))
    wait_for(lambda: (run / "log.jsonl").exists() and log(run), running)
    running.send(signal.SIGINT, group=True)
    ended = running.end()
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    [checkpoint] = find_checkpoints(run)
    done = log(run)[-1][0]
    assert checkpoint.name == f"step-{done:08}"
    assert f"stopped at step {done}" in ended.err
    assert not (run / "model").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends(number, capsys):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and it stays so
    try:
        stop = _stop_on_signals()
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        assert "stopping after this step" in capsys.readouterr().err
        assert {signal.getsignal(each) for each in before} == {signal.SIG_DFL}
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_train_as_a_program_names_bad_pairs_and_goes_on(pairs, tmp_path):
    clip(tmp_path / "pairs" / "m" / "a red square.mp4", 0, (220, 30, 30))
    clip(tmp_path / "pairs" / "m" / "a blue square.mp4", 0, (30, 30, 220))
    (tmp_path / "pairs" / "m" / "broken.mp4").write_bytes(b"no video at all")
    touch(tmp_path / "pairs" / "lonely" / "one.mp4")
    done = console(tmp_path, *command(tmp_path / "pairs", tmp_path / "run", "--steps", 8))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'model'}\n"
    assert "step 8/8  loss" in done.stderr
    assert "steps/s" in done.stderr
    assert done.stderr.count("broken.mp4: skipped, ") == 1
    assert done.stderr.count("lonely: skipped, it has only one clip") == 1
    assert "it/s]" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--pairs", "nowhere"], "nowhere is not a folder of pairs"),
        (["--model", "nowhere"], "nowhere"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
        (["-o", "/dev/null/run"], "cannot write to /dev/null/run"),
    ],
)
def test_mistakes_are_reported_in_a_line(pairs, tmp_path, arguments, reported):
    ended = emt(*command(pairs, tmp_path / "run", *arguments), environment=environment(tmp_path), folder=tmp_path)
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert reported in ended.err
    assert "Traceback" not in ended.err


def test_any_checkpoint_can_be_gone_on_from_in_another_folder(pairs, tmp_path):
    start(pairs, tmp_path / "a", steps=4, checkpoint_every=1, batch_size=2).train()
    early = find_checkpoints(tmp_path / "a")[0]
    assert early.name == "step-00000002"
    same = settings(steps=4, batch_size=2)
    said: list[str] = []
    Trainer(model(), pairs, tmp_path / "b", same, resume=early, say=said.append).train()
    assert not said
    assert log(tmp_path / "b") == log(tmp_path / "a")[2:]
    assert state(tmp_path / "b", 4) == state(tmp_path / "a", 4)


def test_a_checkpoint_that_does_not_fit_is_refused(pairs, tmp_path):
    start(pairs, tmp_path / "a", steps=3, checkpoint_every=1).train()
    checkpoints = find_checkpoints(tmp_path / "a")
    with pytest.raises(EmtError, match="Go on with --resume latest"):
        start(pairs, tmp_path / "a", steps=3)
    with pytest.raises(EmtError, match="holds a later checkpoint"):
        Trainer(model(), pairs, tmp_path / "a", settings(steps=3), resume=checkpoints[0])
    with pytest.raises(EmtError, match="is at step 3, --steps is 2"):
        Trainer(model(), pairs, tmp_path / "b", settings(steps=2), resume=checkpoints[2])
    said: list[str] = []
    Trainer(model(), pairs, tmp_path / "c", settings(learning_rate=5e-2), resume=checkpoints[1], say=said.append)
    assert "learning_rate was 0.01" in said[0]
    for damage in (b"", b"neither a checkpoint nor a pickle"):
        (checkpoints[2] / "optimizer.pt").write_bytes(damage)
        with pytest.raises(EmtError, match="not a checkpoint that can be read"):
            Trainer(model(), pairs, tmp_path / "a", settings(steps=3), resume=checkpoints[2])


def test_k5_state_of_other_types_is_a_damaged_checkpoint(pairs, tmp_path):
    start(pairs, tmp_path / "a", steps=1, checkpoint_every=1).train()
    (checkpoint,) = find_checkpoints(tmp_path / "a")
    good = json.loads((checkpoint / "state.json").read_text())
    texts = ["[" * 100_000, "[]", "{}", *(json.dumps({**good, key: "3"}) for key in good)]
    for text in texts:
        (checkpoint / "state.json").write_text(text)
        with pytest.raises(EmtError, match="not a checkpoint that can be read"):
            Trainer(model(), pairs, tmp_path / "b", settings(), resume=checkpoint, say=lambda text: None)
    (checkpoint / "state.json").write_text(json.dumps(good))
    run = tmp_path / "b"
    run.mkdir()
    (run / "log.jsonl").write_bytes(b"[" * 100_000 + b"\n\xff\xfe\n" + b'{"step": {}}\n{"step": 1}\n{"step": 2}\n')
    Trainer(model(), pairs, run, settings(), resume=checkpoint, say=lambda text: None)
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n'
