"""`--method`: clips by the adapter, or by motion guidance of any model with motion modules, in every command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from program import FRAMES, SIDE, clip, emt, environment, journal, model, transfer

from emt.backbones.sd15.random_model import random_model
from emt.errors import EmtError
from emt.model_folder import find_model
from emt.pipeline import load_pipeline
from emt.train.teacher import Guidance, Teacher
from emt.video import read_clip
from emt_cli.batch.estimates import PastTimings, activations, guidance_factor, memory, seconds, unfused, work
from emt_cli.batch.generator import Generator
from emt_cli.batch.jobs import Job, identify
from emt_cli.batch.options import Method, Settings, TransferOptions, UsageError

GUIDED = Settings(frames=FRAMES, height=SIDE, width=SIDE, steps=10, method=Method.GUIDANCE)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a clip by each method, of one reference, prompt and seed, by lines of jobs."""
    folder = tmp_path_factory.mktemp("methods")
    reference = clip(folder / "walk.mp4")
    lines = [{"reference": str(reference), "prompt": "a cat"} | how for how in ({}, {"method": "guidance"})]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = transfer(folder, "--prompts", "jobs.jsonl", "--steps", "5")
    assert ended.code == 0, ended.err
    return folder


def results(folder: Path) -> dict[str, Path]:
    """Clips by their method."""
    return {
        line["settings"].get("method", "adapter"): folder / "out" / line["output"]
        for line in journal(folder / "out")[:2]
    }


def test_a_line_of_jobs_chooses_its_method_and_the_record_has_it(made):
    clips = results(made)
    assert set(clips) == {"adapter", "guidance"}
    frames = [read_clip(path, frames=FRAMES).frames for path in clips.values()]
    assert (frames[0] != frames[1]).any()
    record = json.loads(Path(f"{clips['guidance']}.json").read_bytes())
    assert (record["settings"]["method"], record["engine"]) == ("guidance", "torch")


def test_the_option_is_the_same_job_and_none_is_the_adapters(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    arguments = ("walk.mp4", "--prompt", "a cat", "--steps", "5")
    for method in ((), ("--method", "adapter"), ("--method", "guidance")):
        ended = transfer(folder, *arguments, *method)
        assert ended.code == 0, ended.err
        done = (
            1 if method[1:] == ("guidance",) else 0
        )  # a line of jobs has a name of its own, the command line has none
        assert f"{done} done, {1 - done} already there" in ended.err
    assert len(list(folder.glob("out/*/*.mp4"))) == 3, "no clip is replaced"


def test_an_adapters_job_is_the_one_that_it_was_before_there_were_methods():
    job = Job(Path("/a.mp4"), "a cat", 0, Settings())
    names = {"reference": "r", "model": "m", "precision": "auto"}
    assert identify(job, **names) == "e01c60c20c2539343792dc8d70a96ca6"
    guided = replace(job, settings=replace(job.settings, method=Method.GUIDANCE))
    assert identify(guided, **names) != identify(job, **names)
    assert guided.shape != job.shape, "they are not of one batch"
    generator = Generator(find_model(str(model()), download=False), "m", "cpu", "fp32")
    assert generator.batch_key(guided) != generator.batch_key(job), "batches of gradients take other sizes"


def test_rerun_guides_again(made):
    original = results(made)["guidance"]
    ended = emt("rerun", str(original), "-o", "again.mp4", folder=made, environment=environment(made))
    assert ended.code == 0, ended.err
    assert "identical with the original" in ended.err


def test_plan_says_how_much_longer_it_takes(tmp_path):
    clip(tmp_path / "walk.mp4")
    arguments = ("plan", "walk.mp4", "--prompt", "a cat", "--model", str(model()), "--steps", "10", "--device", "cpu")
    ended = emt(*arguments, "--method", "guidance", folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 0, ended.err
    assert "by motion guidance, about 1.6 times as long as by an adapter" in ended.out
    assert "motion guidance" not in emt(*arguments, folder=tmp_path, environment=environment(tmp_path)).out


def test_estimates_count_the_gradients():
    adapted, known = replace(GUIDED, method=Method.ADAPTER), find_model(str(model()), download=False)
    assert guidance_factor(GUIDED.as_dict(), gpu=False) == pytest.approx(1.6)
    assert guidance_factor(GUIDED.as_dict(), gpu=True) == pytest.approx(2.64), "without an adapter's kernels and graphs"
    assert work(GUIDED.as_dict()) == pytest.approx(1.6 * work(adapted.as_dict()))
    assert guidance_factor({**GUIDED.as_dict(), "guidance": 1}, gpu=False) == pytest.approx(2.2), "without text"
    assert seconds(known, GUIDED, gpu=False) > seconds(known, adapted, gpu=False)
    assert memory(known, GUIDED) > memory(known, GUIDED, gpu=False) > memory(known, adapted)


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H200"])
def test_earlier_clips_of_either_method_tell_of_both(device):
    """Time and memory of an adapter's clips, from a journal of guided ones, are what an adapter's own would tell."""
    gpu, adapted = device != "cpu", replace(GUIDED, method=Method.ADAPTER)

    def past(settings):
        own = settings.as_dict()
        timings = {"steps": 3 * work(own) * unfused(own, gpu), "vae": 0.0}
        line = {"state": "done", "model_sha256": "x", "device": device, "settings": own, "timings": timings, "bytes": 9}
        return PastTimings.read([line | {"peak_memory": 1e9 * activations(own, gpu)}], "x", device)

    assert past(GUIDED).seconds == pytest.approx(past(adapted).seconds) == pytest.approx(3)
    assert past(GUIDED).memory == pytest.approx(past(adapted).memory)


# ---- models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A model as it is imported without an adapter."""
    folder = shutil.copytree(model(), tmp_path_factory.mktemp("untrained") / "plain")
    index = json.loads((folder / "model_index.json").read_bytes())
    (folder / "model_index.json").write_text(json.dumps(index | {"adapter": "none"}))
    return folder


def test_a_model_without_an_adapter_makes_clips_by_guidance(untrained, tmp_path):
    clip(tmp_path / "walk.mp4")
    arguments = ("walk.mp4", "--prompt", "a cat", "--model", str(untrained), "--device", "cpu")
    ended = emt("transfer", *arguments, folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 0, ended.err
    [line] = [line for line in journal(tmp_path / "out") if line["event"] == "job"]
    assert line["settings"]["method"] == "guidance", "its default"
    for command in ("plan", "transfer"):
        ended = emt(command, *arguments, "--method", "adapter", folder=tmp_path, environment=environment(tmp_path))
        assert ended.code == 1
        said = ended.out + ended.err
        assert f"{untrained} has no trained adapter: it was imported without one" in said
        assert "Use --method guidance" in said


def test_called_without_an_adapter_a_pipeline_names_what_to_do(untrained):
    pipe = load_pipeline(untrained)
    assert pipe.config.adapter == "none"
    with pytest.raises(EmtError, match=r"no trained adapter.*\n.*Teacher"):
        pipe("a cat", np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8))
    assert pipe("a cat", num_inference_steps=1).frames


def test_a_model_that_reads_no_motion_where_it_would_be_compared_is_refused_without_torch(tmp_path):
    folder = random_model(tmp_path / "model", frames=FRAMES, height=SIDE, width=SIDE, fusion_blocks=(0,))
    known = find_model(str(folder), download=False)
    known.check("a cat", replace(GUIDED, method=Method.ADAPTER).as_dict())
    with pytest.raises(EmtError, match="cannot be guided"):
        known.check("a cat", GUIDED.as_dict())


def test_what_guidance_cannot_do_is_named():
    known = find_model(str(model()), download=False)
    with pytest.raises(EmtError, match="frames is 99 with method guidance"):
        known.check("a cat", replace(GUIDED, frames=99).as_dict())
    with pytest.raises(EmtError, match="cache_interval is 2 with method guidance"):
        known.check("a cat", replace(GUIDED, cache_interval=2).as_dict())
    with pytest.raises(UsageError, match="--method guidance, which needs gradients"):
        TransferOptions(settings={"method": Method.GUIDANCE}, engine="folder").check()


# ---- the teacher as a sampler -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(model())


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "lcm"])
def test_without_weight_it_samples_as_the_pipeline_does(pipe, scheduler):
    """The adapter of this model has the backbone's projections, and no reference is attended to."""
    plain = load_pipeline(model())
    plain.unet.initialize_adapter()
    options = {"steps": 4, "seed": [3, 4], "scheduler": scheduler, "guidance": 1.5, "guidance_until": 0.5}
    found = Teacher(pipe, Guidance(weight=0)).generate(["a", "b"], pipe.extract_motion(noise()), **options)
    for one, expected in zip(found, plain.generate(["a", "b"], **options), strict=True):
        assert np.abs(one.astype(int) - expected).max() <= 1


def test_sparing_memory_makes_the_same_clip(pipe):
    """Features of the reference are on the host then, and parts of the pipeline where they are needed."""
    spared = load_pipeline(model())
    spared.save_memory("cpu")
    made = [
        Teacher(one, Guidance(weight=1e5)).generate("a", one.extract_motion(noise()), steps=3) for one in (pipe, spared)
    ]
    assert np.abs(made[0][0].astype(int) - made[1][0]).max() <= 1
