"""Pairs from real clips: the guidance of the teacher, the filter, and `emt make-pairs --from-references`."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from program import FRAMES, SIDE, Ended, Run, clip, emt, environment, journal, model

from emt.backbones.sd15.random_model import random_model
from emt.errors import EmtError
from emt.evaluate.tracks import track
from emt.features import Motion
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.train.data import PairDataset, find_pairs
from emt.train.teacher import Filter, Guidance, Teacher
from emt.video import read_clip
from emt_cli.batch.jobs import Job, Rejected
from emt_cli.batch.options import Settings
from emt_cli.batch.teaching import check_motions

cv2 = pytest.importorskip("cv2")

STRONG = 1e5  # a network with random weights hardly attends to anything: its maps are nearly flat


@pytest.fixture(scope="module")
def pipe() -> MotionTransferPipeline:
    return load_pipeline(model())


def motion(pipe: MotionTransferPipeline, seed: int = 0) -> Motion:
    return pipe.extract_motion(np.random.default_rng(seed).integers(0, 255, (FRAMES, SIDE, SIDE, 3), np.uint8))


# ---- guidance -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_published_one_and_scales_to_few_steps():
    guidance = Guidance()
    published = [guidance.strength(step, 300) for step in range(300)]
    assert published[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(published[10:170]) == {1.0}
    assert published[170:180] == pytest.approx([0.1 * n for n in range(10, 0, -1)])
    assert not any(published[180:])
    assert [guidance.strength(step, 10) for step in range(10)] == [1.0] * 6 + [0.0] * 4


def test_attention_maps_are_those_of_the_network(pipe):
    """Applied to the values, they give what the layer itself gives."""
    features = motion(pipe).features
    for path, module in pipe.unet.fusion_modules().items():
        blocks = module.temporal_transformer.transformer_blocks[0].attention_blocks
        for attention, feature in zip(blocks, features.layers[path]):
            probabilities = attention.attention_map(feature)
            x = feature.flatten(2, 3) + attention.positions[:FRAMES, None]
            value = attention.to_v(x).unflatten(-1, (attention.heads, -1))
            mixed = torch.einsum("bphqk,bkphc->bqphc", probabilities, value)
            expected = attention.attend(x, None, None)
            torch.testing.assert_close(mixed.flatten(3), expected)


def energies(pipe: MotionTransferPipeline, weight: float, wanted: Motion, **options: object) -> torch.Tensor:
    """How far clips of four seeds are from a motion, read from the finished latents as the reference's is."""
    teacher = Teacher(pipe, Guidance(weight=weight))
    latents = teacher.sample(["x"] * 4, [wanted] * 4, seeds=range(4), steps=5, **options)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    noisy = DDIMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, torch.tensor([400]))
    with torch.no_grad():
        features = pipe.unet.encode_reference(noisy, 400, pipe.encode_prompts([""] * 4))
        return teacher.energy(features, teacher.read([wanted]))


def test_guidance_brings_clips_closer_to_the_motion(pipe):
    wanted = motion(pipe)
    towards, without, away = (energies(pipe, weight, wanted) for weight in (STRONG, 0.0, -STRONG))
    assert (towards < 0.97 * without).all(), (towards, without)
    assert (away > 1.03 * without).all(), (away, without)


def test_guidance_works_for_velocity_and_a_schedule_that_ends_in_noise_alone(tmp_path):
    """As in the shipped model: at the first step there is no signal to divide by."""
    pipe = load_pipeline(model())
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-6
    wanted = motion(pipe)
    towards, without, away = (energies(pipe, weight, wanted) for weight in (3e4, 0.0, -3e4))
    assert torch.isfinite(towards).all()
    assert (towards < without).all(), (towards, without)
    assert (away > without).all(), (away, without)


def test_without_guidance_it_is_the_backbone(pipe):
    backbone = load_pipeline(model())
    backbone.unet.initialize_adapter()
    teacher = Teacher(pipe, Guidance(weight=0))
    made = teacher.decode(teacher.sample(["x", "y"], [motion(pipe)] * 2, seeds=[3, 4], negative_prompts=["z", ""]))
    expected = backbone.generate(["x", "y"], seed=[3, 4], negative_prompt=["z", ""])
    for one, other in zip(made, expected):
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("text_guidance", [1.0, 6.0])
def test_a_clip_does_not_depend_on_its_batch(pipe, text_guidance):
    teacher = Teacher(pipe, Guidance(weight=STRONG))
    motions = [motion(pipe, 1), motion(pipe, 2)]
    both = teacher.sample(["x", "y"], motions, seeds=[5, 6], steps=3, text_guidance=text_guidance)
    for i in range(2):
        alone = teacher.sample(["xy"[i]], motions[i : i + 1], seeds=[5 + i], steps=3, text_guidance=text_guidance)
        torch.testing.assert_close(both[i], alone[0], rtol=1e-3, atol=1e-3)


def test_checkpointing_saves_memory_not_digits(pipe):
    teacher = Teacher(pipe, Guidance(weight=STRONG))
    one = teacher.sample(["x"], [motion(pipe)], seeds=[0], steps=2)
    pipe.unet.disable_gradient_checkpointing()
    torch.testing.assert_close(one, teacher.sample(["x"], [motion(pipe)], seeds=[0], steps=2))


def test_a_model_that_reads_no_motion_there_is_refused(tmp_path):
    folder = random_model(tmp_path / "model", frames=FRAMES, height=SIDE, width=SIDE, fusion_blocks=(0,))
    with pytest.raises(EmtError, match="no motion in up block 1"):
        Teacher(load_pipeline(folder))


# ---- the filter ---------------------------------------------------------------------------------------------------


def panning(seed: int, step: int, flicker: float = 0.0) -> np.ndarray:
    """A texture that moves to the left."""
    rng = np.random.default_rng(seed)
    scene = cv2.resize(rng.random((16, 32, 3), np.float32), (256, 128), interpolation=cv2.INTER_CUBIC) * 255
    frames = np.stack([scene[:, 60 + step * t : 60 + step * t + 128] for t in range(6)])
    return (frames + rng.normal(0, flicker, frames.shape)).clip(0, 255).astype(np.uint8)


def test_the_filter_keeps_what_follows_steadily():
    reference = track(panning(0, 4))
    verdict = Filter().judge(reference, panning(1, 4))
    assert verdict.reason == ""
    assert verdict.fidelity > 0.9
    assert verdict.consistency > 0.9


def test_the_filter_says_why_it_drops():
    reference = track(panning(0, 4))
    assert Filter().judge(reference, panning(1, -4)).reason.startswith("motion fidelity -")
    assert "temporal consistency 0." in Filter().judge(reference, panning(1, 4, flicker=40)).reason
    assert Filter(None, None).judge(reference, panning(1, -4, flicker=40)).reason == ""


# ---- emt make-pairs -----------------------------------------------------------------------------------------------


ALL = ("--min-fidelity", "-1", "--min-consistency", "0")


def command(*options: str) -> list[str]:
    given = ["--prompts", "prompts.txt", "--model", str(model()), "-o", "pairs", "--device", "cpu"]
    return ["make-pairs", "--from-references", "clips", *given, *options]


def make(folder: Path, *options: str) -> Ended:
    return emt(*command(*options), folder=folder, environment=environment(folder))


def prepare(folder: Path, *more: str) -> None:
    for seed, name in enumerate(("walk", *more)):
        clip(folder / "clips" / f"{name}.mp4", seed)
    (folder / "prompts.txt").write_text("a red fox\na blue car, at night\n")


def reported(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("taught")
    prepare(folder, "turn")
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    return folder, make(folder, *ALL)


def test_pairs_are_what_training_reads(made):
    folder, ended = made
    assert ended.out == "pairs\n"
    said: list[str] = []
    pairs = find_pairs(folder / "pairs", said.append)
    assert not said
    assert {pair.caption for pair in pairs} == {"a red fox", "a blue car, at night"}
    references = {pair.reference for pair in pairs if pair.reference.name == "reference.mp4"}
    assert len(references) == 2
    assert len(pairs) == 2 * (2 + 2), "of each motion, its reference with both clips, and these with each other"
    sample = PairDataset(pairs, frames=FRAMES, size=(SIDE, SIDE), seed=0)[0]
    assert sample.reference.shape == sample.target.shape == (FRAMES, SIDE, SIDE, 3)
    [walk] = [path for path in references if "walk" in str(path)]
    seen = read_clip(folder / "clips" / "walk.mp4", frames=FRAMES, size=(SIDE, SIDE)).frames
    assert np.abs(read_clip(walk, frames=FRAMES).frames.astype(int) - seen).mean() < 20, (
        "the frames that the motion was read from"
    )
    trained = emt(
        *("train", "--pairs", "pairs", "-o", "run", "--model", str(model()), "--steps", "1", "--workers", "0"),
        *("--sample-every", "0"),
        folder=folder,
        environment=environment(folder),
    )
    assert trained.code == 0, trained.err


def test_a_bad_reference_fails_alone_and_is_reported(made):
    folder, ended = made
    assert ended.code == 1
    rows = reported(folder)
    assert [row["state"] for row in rows] == ["failed"] * 2 + ["kept"] * 4
    assert all("broken.mp4" in row["reason"] for row in rows[:2])
    for row in rows[2:]:
        assert (folder / "pairs" / row["file"]).is_file()
        assert -1 <= row["motion_fidelity"] <= 1
        assert 0 <= row["temporal_consistency"] <= 1
    assert "4 done, 0 already there, 2 failed, 0 dropped" in ended.err


def test_rerun_teaches_again(made):
    folder, _ = made
    file = next(row["file"] for row in reported(folder) if row["state"] == "kept")
    ended = emt("rerun", f"pairs/{file}", "-o", "again.mp4", folder=folder, environment=environment(folder))
    assert ended.code == 0, ended.err
    clips = [read_clip(path, frames=FRAMES).frames for path in (folder / "pairs" / file, folder / "again.mp4")]
    assert np.array_equal(*clips)


def test_thresholds_drop_clips_and_can_be_moved_later(tmp_path):
    """What was measured is not measured again; what is to be kept after all is made again."""
    prepare(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    strict = ("--min-fidelity", "-1", "--min-consistency", "1")
    first = make(tmp_path, *strict)
    assert first.code == 0, first.err
    assert "0 done, 0 already there, 0 failed, 1 dropped" in first.err
    assert not list((tmp_path / "pairs").rglob("*.mp4"))
    assert {row["state"] for row in reported(tmp_path)} == {"dropped"}
    assert all("below 1" in row["reason"] for row in reported(tmp_path))
    lines = len(journal(tmp_path / "pairs"))
    assert make(tmp_path, *strict).code == 0
    assert len(journal(tmp_path / "pairs")) == lines, "nothing was done"

    assert "1 done" in make(tmp_path, *strict, "--no-filter").err
    assert len(find_pairs(tmp_path / "pairs", lambda text: None)) == 1
    again = make(tmp_path, *strict)
    assert "0 already there, 0 failed, 1 dropped" in again.err
    assert not list((tmp_path / "pairs").rglob("*.mp4"))
    assert not list((tmp_path / "pairs").glob("*/metadata.jsonl"))


def test_an_interrupted_run_goes_on(tmp_path):
    prepare(tmp_path)
    run = Run(*command(*ALL, "--steps", "20"), folder=tmp_path, environment=environment(tmp_path))
    while not list((tmp_path / "cache").glob("emt/motion/*.json")):  # the reference is encoded, the first batch runs
        run.process.join(0.02)
        assert run.process.is_alive()
    run.process.join(0.05)
    run.send(signal.SIGINT)
    ended = run.end()
    assert ended.code == 130, ended.err
    assert [row["state"] for row in reported(tmp_path)] == ["kept"]
    assert find_pairs(tmp_path / "pairs", lambda text: None), "what is there can be trained on"
    ended = make(tmp_path, *ALL, "--steps", "20")
    assert "1 done, 1 already there" in ended.err
    assert len(reported(tmp_path)) == 2


def test_another_guidance_makes_another_clip(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    for name in ("turn.mp4", "broken.mp4"):
        (folder / "clips" / name).unlink()
    (folder / "prompts.txt").write_text("a red fox\n")
    earlier = reported(folder)
    [row] = [row for row in earlier if "walk" in row["reference"] and row["prompt"] == "a red fox"]
    before = (folder / "pairs" / row["file"]).read_bytes()
    ended = make(folder, *ALL, "--motion-guidance", "1e5")
    assert "1 done, 0 already there" in ended.err
    assert (folder / "pairs" / row["file"]).read_bytes() == before, "the finished clip stays"
    [other] = {row["file"] for row in reported(folder) if row.get("file")} - {row.get("file") for row in earlier}
    assert (folder / "pairs" / other).read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from-references", "clips", "-o", "x"], "--prompts"),
        (["--from-references", "clips", "--prompts", "p.txt", "--seeds", "9-1", "-o", "x"], "9-1"),
        (["--from-references", "clips", "--motions", "3", "-o", "x"], "either"),
        (["-o", "x"], "either"),
        (["x", "-o", "x", "--motions", "3"], "one folder"),
        (["-o", "x", "--motions", "3", "--prompts", "p.txt"], "--prompts goes with --from-references"),
        (["-o", "x", "--from-references", "c", "--prompts", "p.txt", "--realism", "1"], "--realism goes with"),
    ],
)
def test_what_does_not_fit_together_is_bad_usage(tmp_path, options, said):
    ended = emt("make-pairs", *options, folder=tmp_path, environment=environment(tmp_path))
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert not (tmp_path / "x").exists()


def test_a_prompt_may_not_read_its_reference_otherwise():
    """Clips of a folder share one motion: another start would be another one."""
    other = Job(Path("/a.mp4"), "a fox", 0, Settings(start=0.1), overrides=("start",), origin="line 1")
    same = Job(Path("/a.mp4"), "a car", 0, Settings(steps=1), overrides=("steps",))
    rejected, kept = check_motions([other, same])
    assert kept is same
    assert isinstance(rejected, Rejected)
    assert (rejected.origin, rejected.prompt) == ("line 1", "a fox")
    assert "a start of their own" in rejected.error.problem
