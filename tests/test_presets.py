"""Presets, and what they set: guidance in a part of the steps, deep features reused across steps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import FRAMES, clip, console, emt, environment, journal, model, transfer
from safetensors.torch import load_file, save_file
from test_backend import Recorder

from emt.backbones.sd15.random_model import random_model
from emt.backends.torch import TorchBackend
from emt.errors import EmtError
from emt.features import Motion
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.presets import PRESETS, preset_values
from emt.sampling import SCHEDULERS
from emt_cli.batch.estimates import work
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job, identify
from emt_cli.batch.options import Settings, TransferOptions, parse_field

STEPS = 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> MotionTransferPipeline:
    folder = tmp_path_factory.mktemp("presets") / "model"
    return load_pipeline(random_model(folder, frames=4, height=24, width=40, steps=STEPS))


@pytest.fixture(scope="module")
def motion(pipe) -> Motion:
    return pipe.extract_motion(np.random.default_rng(0).integers(0, 256, (4, 24, 40, 3), dtype=np.uint8))


class Watched(TorchBackend):
    """Notes every call: what it was, and of how many samples."""

    def __init__(self, pipe: MotionTransferPipeline) -> None:
        super().__init__(pipe)
        self.calls: list[tuple[str, int]] = []

    def denoise(self, sample, *rest):
        self.calls.append(("whole", len(sample)))
        return super().denoise(sample, *rest)

    def denoise_deep(self, sample, *rest):
        self.calls.append(("deep", len(sample)))
        return super().denoise_deep(sample, *rest)

    def denoise_shallow(self, sample, *rest):
        self.calls.append(("shallow", len(sample)))
        return super().denoise_shallow(sample, *rest)


def watched(pipe: MotionTransferPipeline, motion: Motion, **options) -> list[tuple[str, int]]:
    pipe.backend = Watched(pipe)
    pipe.generate("a cat", motion, **options)
    calls = pipe.backend.calls
    pipe.backend = TorchBackend(pipe)
    return calls


# ------------------------------------------------------------------------------------------------- guidance and reuse


def test_guidance_ends_after_its_part_of_the_steps(pipe, motion):
    assert watched(pipe, motion, guidance_until=0.5) == [("whole", 2)] * 3 + [("whole", 1)] * 3
    assert watched(pipe, motion, guidance_until=0.4) == [("whole", 2)] * 3 + [("whole", 1)] * 3
    assert watched(pipe, motion, guidance=1.0, guidance_until=0.5) == [("whole", 1)] * 6


def test_without_guidance_all_the_way_it_is_guidance_of_one(pipe, motion):
    (never,) = pipe.generate("a cat", motion, guidance_until=0.0)
    (one,) = pipe.generate("a cat", motion, guidance=1.0)
    (all_the_way,) = pipe.generate("a cat", motion, guidance_until=1.0)
    assert np.array_equal(never, one)
    assert not np.array_equal(never, all_the_way)


def test_unguided_steps_see_the_prompt_and_not_the_negative_one(pipe, motion):
    options = {"guidance_until": 0.0, "seed": [1, 2]}
    together = pipe.generate(["a cat", "a dog"], motion, negative_prompt=["wet", "dry"], **options)
    (alone,) = pipe.generate("a dog", motion, guidance=1.0, seed=2)
    assert np.abs(together[1].astype(int) - alone).max() <= 1


def test_every_nth_step_computes_the_deep_features(pipe, motion):
    deep, shallow = ("deep", 2), ("shallow", 2)
    assert watched(pipe, motion, cache_interval=2) == [deep, shallow] * 3
    assert watched(pipe, motion, cache_interval=4) == [deep, shallow, shallow, shallow, deep, shallow]


def test_the_first_unguided_step_computes_its_own(pipe, motion):
    calls = watched(pipe, motion, cache_interval=2, guidance_until=0.5)
    assert calls == [("deep", 2), ("shallow", 2), ("deep", 2), ("deep", 1), ("shallow", 1), ("deep", 1)]


def test_deep_features_of_the_same_step_change_nothing(pipe, motion):
    generator = torch.Generator().manual_seed(0)
    sample, timestep = torch.randn(2, 4, 4, 3, 5, generator=generator), torch.tensor(601)
    text, moved = pipe.unet.encode_text(pipe.encode_prompts(["", "a cat"])), pipe.unet.prepare(motion.features)
    with torch.no_grad():
        exact = pipe.unet(sample, timestep, text, moved)
        prediction, deep = pipe.unet.denoise_deep(sample, timestep, text, moved)
        assert torch.equal(prediction, exact)
        assert torch.equal(pipe.unet.denoise_shallow(sample, timestep, text, moved, deep), exact)
        later = pipe.unet.denoise_shallow(sample + 0.1, timestep, text, moved, deep)
        exact_later = pipe.unet(sample + 0.1, timestep, text, moved)
    assert not torch.equal(later, exact)  # the highest resolution is that of the new sample,
    assert not torch.equal(later, exact_later)  # what lies below it is not
    with pytest.raises(ValueError, match=r"deep features have shape \(1, 32, 3, 5\), expected \(8, 32, 3, 5\)"):
        pipe.unet.denoise_shallow(sample, timestep, text, moved, deep[:1])


def test_recorded_calls_give_the_same_clips(pipe, motion):
    fast = preset_values("fast", STEPS) | {"seed": [3, 4]}
    eager = pipe.generate(["a cat", "a dog"], motion, **fast)
    pipe.backend = TorchBackend(pipe, recorder=Recorder)
    for _ in range(2):  # recorded, and recorded before
        assert np.array_equal(pipe.generate(["a cat", "a dog"], motion, **fast), eager)
    (other,) = pipe.generate("a cat", motion, seed=3)
    pipe.backend = TorchBackend(pipe)
    assert np.array_equal(other, pipe.generate("a cat", motion, seed=3)[0])


def test_numbers_that_make_no_sense_are_refused(pipe, motion):
    for wrong in ({"guidance_until": 1.5}, {"guidance_until": -0.1}, {"cache_interval": 0}):
        with pytest.raises(ValueError, match="allowed are 0 to 1, 0 to 1 and positive"):
            pipe.generate("a cat", motion, **wrong)


def test_a_backend_that_cannot_reuse_says_so(pipe, motion, monkeypatch):
    monkeypatch.setattr(TorchBackend, "reuses", False)
    with pytest.raises(EmtError, match="computes the whole network in every step") as raised:
        pipe.generate("a cat", motion, cache_interval=2)
    assert "--engine torch" in raised.value.hint


# ------------------------------------------------------------------------------------------------------------ presets


def test_presets_set_what_the_pipeline_and_the_options_know():
    assert parse_field("preset", "fast") == "fast"
    for values in PRESETS.values():
        for name, value in values.items():
            parse_field(name, value)
    assert PRESETS["fast"]["scheduler"] in SCHEDULERS


def test_a_preset_takes_no_more_steps_than_the_model():
    assert preset_values("fast", 25)["steps"] == PRESETS["fast"]["steps"] < 25
    assert preset_values("fast", 4)["steps"] == 4
    assert preset_values("exact", 25) == {}


def settings_of(tmp_path: Path, line: dict | None = None, **given) -> Settings:
    """The settings of a job: what a line of a file and the command line set, of a model with defaults."""
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": "x", **(line or {})}))
    (tmp_path / "x.mp4").touch()
    settings = {name: parse_field(name, value) for name, value in given.items()}
    options = TransferOptions([str(tmp_path / "x.mp4")], prompts=[tmp_path / "jobs.jsonl"], settings=settings)
    (job,) = expand(options, {"steps": 20, "guidance": 3.0})[0]
    assert isinstance(job, Job)
    return job.settings


def test_options_given_win_over_the_preset(tmp_path):
    fast = PRESETS["fast"]
    plain, quick = settings_of(tmp_path), settings_of(tmp_path, preset="fast")
    assert (plain.steps, plain.cache_interval, plain.preset) == (20, 1, "exact")
    assert (quick.steps, quick.cache_interval, quick.guidance) == (fast["steps"], fast["cache_interval"], 3.0)
    chosen = settings_of(tmp_path, preset="fast", steps=17, scheduler="ddim")
    assert (chosen.steps, chosen.scheduler.value, chosen.cache_interval) == (17, "ddim", fast["cache_interval"])


def test_a_jobs_own_line_may_name_a_preset(tmp_path):
    assert settings_of(tmp_path, {"preset": "fast"}).steps == PRESETS["fast"]["steps"]
    assert settings_of(tmp_path, {"preset": "exact"}, preset="fast").cache_interval == 1
    assert settings_of(tmp_path, {"preset": "fast", "steps": 3}).steps == 3
    assert settings_of(tmp_path, {"preset": "fast"}, steps=17).steps == 17


def test_the_identity_is_that_of_what_the_preset_sets(tmp_path):
    def identity(settings: Settings) -> str:
        return identify(Job(Path("/x.mp4"), "x", 0, settings), reference="r", model="m", precision="auto")

    fast = identity(settings_of(tmp_path, preset="fast"))
    assert fast == identity(settings_of(tmp_path, **PRESETS["fast"]))
    assert fast != identity(settings_of(tmp_path))


def test_the_time_that_is_estimated_knows_of_presets(tmp_path):
    exact, fast = (work(settings_of(tmp_path, preset=name).as_dict()) for name in PRESETS)
    # Six of twenty steps, 1.5 samples instead of two, and three quarters to all of the network.
    assert 0.15 < fast / exact < 0.25


# -------------------------------------------------------------------------------------------------------- the program


def test_a_fast_clip_is_made_again_exactly(tmp_path):
    reference = clip(tmp_path / "x.mp4", frames=FRAMES)
    options = ["--prompt", "a cat", "--preset", "fast", "--format", "png"]
    ended = transfer(tmp_path, reference, *options, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    (line,) = journal(tmp_path / "out")
    settings = line["settings"]
    assert settings["preset"] == "fast"
    assert settings["cache_interval"] == PRESETS["fast"]["cache_interval"]
    (made,) = ended.out.split()
    again = emt("rerun", made + ".json", folder=tmp_path, environment=environment(tmp_path))
    assert again.code == 0, again.err
    frames = [sorted(Path(folder).glob("*.png")) for folder in (made, again.out.strip())]
    assert len(frames[0]) == FRAMES
    assert [f.read_bytes()[-4000:] for f in frames[0]] == [f.read_bytes()[-4000:] for f in frames[1]]


def test_an_unknown_preset_is_bad_usage(tmp_path):
    done = console(tmp_path, "transfer", "x.mp4", "--prompt", "x", "--preset", "fastest")
    assert done.returncode == 2
    assert "exact" in done.stderr
    assert "fast" in done.stderr


def test_candidates_are_measured_and_one_is_chosen(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import presets

    clip(tmp_path / "references" / "x.mp4", frames=FRAMES)
    (tmp_path / "prompts.txt").write_text("# one\na cat\n")
    arguments = ["--model", model(), "--references", tmp_path / "references", "--prompts", tmp_path / "prompts.txt"]
    arguments += ["--seeds", "1", "--device", "cpu", "--candidates", "fast", "--output", tmp_path / "reported.json"]
    monkeypatch.setattr(sys, "argv", ["presets.py", *map(str, arguments)])
    presets.main()
    exact, fast = json.loads((tmp_path / "reported.json").read_text())
    assert (exact["name"], fast["name"]) == ("exact", "fast")
    assert exact["change"] == 0 < fast["change"]
    assert -1 <= fast["fidelity"]["value"] <= 1
    assert fast["seconds"] > 0
    assert "fast " in capsys.readouterr().out


def test_k2_lcm_has_its_own_default_of_guidance(tmp_path):
    assert settings_of(tmp_path, scheduler="lcm").guidance == 1
    assert settings_of(tmp_path, scheduler="lcm", guidance=1.5).guidance == 1.5
    assert settings_of(tmp_path, {"scheduler": "lcm"}).guidance == 1
    assert settings_of(tmp_path, {"scheduler": "ddim"}, scheduler="lcm").guidance == 3


def test_k2_a_vae_that_overflows_is_reported_on_stderr_and_in_the_journal(tmp_path):
    folder = shutil.copytree(model(), tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] *= 3e4
    state["encoder.conv_in.weight"] *= 3e4
    save_file(state, file, {"format": "pt"})
    reference = clip(tmp_path / "x.mp4", frames=FRAMES)
    options = ["--prompt", "a cat", "--precision", "fp16", "--model", folder, "--out", "out", "--format", "png"]
    ended = transfer(tmp_path, reference, *options)
    assert ended.code == 0, ended.err
    (line,) = journal(tmp_path / "out")
    (made,) = ended.out.split()
    for reported in (ended.err, *line["warnings"]):
        assert "the VAE overflows in fp16: it is computed in fp32" in reported
    assert np.asarray(Image.open(sorted((tmp_path / made).glob("*.png"))[0])).std() > 5
