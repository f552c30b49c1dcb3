"""The pipeline called as diffusers' pipelines are: arguments, output, scheduler, callback, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import export_to_video
from PIL import Image
from safetensors.torch import save_file

from emt.backbones.sd15.random_model import random_model
from emt.diffusers_interface import MotionTransferOutput, read_video, videos_of
from emt.errors import EmtError
from emt.features import Motion
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.video import read_clip, write_clip

FRAMES, HEIGHT, WIDTH = 4, 16, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "steps": 2}
    return random_model(tmp_path_factory.mktemp("interface") / "model", **sizes)


@pytest.fixture(scope="module")
def pipe(folder) -> MotionTransferPipeline:
    opened = load_pipeline(folder)
    opened.set_progress_bar_config(disable=True)
    return opened


@pytest.fixture
def restored(pipe):
    """The pipeline, whose scheduler is its own again afterwards."""
    yield pipe
    pipe.scheduler = pipe.models_scheduler


def pixels(seed: int = 0, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def motion(pipe) -> Motion:
    return pipe.extract_motion(pixels())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(pipe, *arguments, seed: int = 3, **options) -> np.ndarray:
    """The first clip, (frames, height, width, 3)."""
    found = pipe(*arguments, **{"generator": seeded(seed), "output_type": "np", **options})
    return (found.frames[0] * 255).round().astype(np.uint8)


# ---- the same clips as generate() makes ---------------------------------------------------------------------------


def test_a_generators_seed_is_the_seed_of_generate(pipe, motion):
    (expected,) = pipe.generate("a cat", motion, seed=3, negative_prompt="a dog", guidance=4.0, steps=3)
    options = {"negative_prompt": "a dog", "guidance_scale": 4.0, "num_inference_steps": 3}
    np.testing.assert_array_equal(made(pipe, "a cat", motion=motion, **options), expected)
    np.testing.assert_array_equal(made(pipe, "a cat", pixels(), **options), expected)


def test_without_guidance_and_without_a_reference(pipe):
    np.testing.assert_array_equal(made(pipe, "a cat", guidance_scale=1), pipe.generate("a cat", seed=3, guidance=1)[0])
    assert made(pipe, "a cat", num_frames=3, height=8, width=32).shape == (3, 8, 32, 3)


def test_a_long_clip_is_made_in_the_windows_of_generate(pipe):
    frames = pipe.unet.facts.max_frames + 3
    long = pixels(frames=frames)
    (expected,) = pipe.generate("a cat", pipe.extract_motion(long), seed=3, steps=1)
    np.testing.assert_array_equal(made(pipe, "a cat", long, num_frames=frames, num_inference_steps=1), expected)


def test_a_batch_has_a_generator_a_motion_and_a_negative_prompt_for_each(pipe, motion):
    other = pipe.extract_motion(pixels(1))
    together = pipe(
        ["a cat", "a dog"],
        motion=[motion, other],
        negative_prompt=["", "x"],
        generator=[seeded(5), seeded(6)],
        output_type="np",
    ).frames
    alone = [made(pipe, "a cat", motion=motion, seed=5), made(pipe, "a dog", motion=other, negative_prompt="x", seed=6)]
    for one, expected in zip(together, alone, strict=True):
        assert np.abs(one * 255 - expected).max() <= 1


def test_several_videos_of_a_prompt_come_one_after_the_other(pipe, motion):
    generators = [seeded(n) for n in range(4)]
    clips = pipe(["a", "b"], motion=motion, num_videos_per_prompt=2, generator=generators, output_type="np").frames
    for clip, (prompt, seed) in zip(clips, [("a", 0), ("a", 1), ("b", 2), ("b", 3)], strict=True):
        assert np.abs(clip * 255 - made(pipe, prompt, motion=motion, seed=seed)).max() <= 1


def test_encodings_and_latents_stand_for_prompts_and_noise(pipe, motion):
    expected = made(pipe, "a cat", motion=motion, negative_prompt="a dog")
    cat, dog = pipe.encode_prompts(["a cat"]), pipe.encode_prompts(["a dog"])
    noise = pipe.initial_noise([seeded(3)], FRAMES, HEIGHT, WIDTH)
    given = {"prompt_embeds": cat, "negative_prompt_embeds": dog, "latents": noise, "generator": None}
    assert np.abs(made(pipe, motion=motion, **given).astype(int) - expected).max() <= 1


def test_without_a_generator_clips_differ(pipe, motion):
    clips = [pipe("a", motion=motion, num_inference_steps=1, output_type="pt").frames for _ in range(2)]
    assert not torch.equal(*clips)


# ---- videos of every kind -----------------------------------------------------------------------------------------


def kinds(frames: np.ndarray) -> dict[str, object]:
    floats = frames.astype(np.float32) / 255
    return {
        "array": frames,
        "array of floats": floats,
        "list of arrays": list(frames),
        "PIL images": [Image.fromarray(frame) for frame in frames],
        "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "tensor of floats": torch.from_numpy(floats).permute(0, 3, 1, 2),
        "list of tensors": list(torch.from_numpy(floats).permute(0, 3, 1, 2)),
        "double": floats.astype(np.float64),
    }


@pytest.mark.parametrize("kind", kinds(pixels()))
def test_every_kind_of_video_is_the_same_frames(kind):
    given = kinds(pixels())[kind]
    assert len(videos_of(given)) == 1
    assert len(videos_of([given, given])) == 2
    np.testing.assert_array_equal(read_video(given, FRAMES, (WIDTH, HEIGHT)), pixels())


def test_a_dark_video_of_bytes_is_not_taken_for_one_of_fractions():
    """Its numbers, 0 and 1, are allowed for both; the dtype alone decides."""
    dark = pixels() // 128
    np.testing.assert_array_equal(read_video(dark, FRAMES, (WIDTH, HEIGHT)), dark)
    np.testing.assert_array_equal(read_video(dark.astype(np.float32), FRAMES, (WIDTH, HEIGHT)), dark * 255)


def test_files_and_frames_are_sampled_and_cropped_alike(tmp_path):
    path = tmp_path / "clip"
    write_clip(path, pixels(frames=11, height=40, width=40), 8)
    expected = read_clip(path, frames=FRAMES, size=(WIDTH, HEIGHT))
    for given in (path, str(path), expected, pixels(frames=11, height=40, width=40)):
        np.testing.assert_array_equal(read_video(given, FRAMES, (WIDTH, HEIGHT)), expected.frames)
    assert len(videos_of([path, str(path)])) == 2
    assert len(videos_of(np.stack([pixels(), pixels(1)]))) == 2


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (pixels().astype(np.float32), ValueError, "0 to 255"),
        (pixels().astype(np.float32) / 127.5 - 1, ValueError, "from -1 to 1, expected 0 to 1"),
        (np.full((FRAMES, 8, 8, 3), np.nan), ValueError, "nan"),
        (pixels().astype(np.int64), TypeError, "int64"),
        (pixels()[..., :1], ValueError, r"\(frames, height, width, 3\)"),
        (torch.from_numpy(pixels()), ValueError, r"\(frames, 3, height, width\)"),
        (pixels()[:2], ValueError, "num_frames=2"),
        ([pixels()[0], pixels()[0, :8]], ValueError, "differ"),
    ],
)
def test_what_is_no_video_is_named(given, error, said):
    with pytest.raises(error, match=said):
        read_video(given, FRAMES, (WIDTH, HEIGHT))


def test_a_missing_file_is_one_error(pipe, tmp_path):
    with pytest.raises(EmtError, match="nothing"):
        pipe("a cat", tmp_path / "nothing.mp4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a", "video": 3}, "video is a int"),
        ({"prompt": "a", "video": []}, "empty"),
        ({"video": pixels()}, "prompt or prompt_embeds"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "a", "output_type": "gif"}, "pil, np, pt, latent"),
        ({"prompt": "a", "height": 12}, "height is 12, allowed are multiples of 8"),
        ({"prompt": "a", "num_frames": 1}, "num_frames is 1, allowed are 2 or more"),
        ({"prompt": "a", "video": pixels(), "num_frames": 999}, "999 are needed: num_frames=4"),
        ({"prompt": ["a", "b", "c"], "video": [pixels(), pixels(1)]}, "video has 2 entries, expected 1 or 3"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "generator has 2 entries, expected one or 1"),
        ({"prompt": "a", "num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"prompt": "a", "num_videos_per_prompt": 1.5}, "num_videos_per_prompt is 1.5, allowed are positive whole"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps is 0, allowed are positive whole"),
        ({"prompt": "a", "num_inference_steps": -1}, "num_inference_steps is -1"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps is True"),
        ({"prompt": "a", "num_frames": 4.0}, "num_frames is 4.0"),
        ({"prompt": "a", "height": "16"}, "height is '16'"),
        ({"prompt": "a", "guidance_scale": "4"}, "guidance_scale is '4', allowed are finite numbers"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": 5}, "prompt is 5, allowed are a text and a list of texts"),
        ({"prompt": ["a", None]}, "prompt is"),
        ({"prompt": "a", "negative_prompt": [5]}, "negative_prompt is"),
        ({"prompt": "a", "generator": 5}, "manual_seed\\(5\\)"),
        ({"prompt": ["a", "b"], "generator": [seeded(3), 5]}, "generator is 5"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 4, 2, 3))}, "latents is a ndarray, allowed is a tensor"),
        ({"prompt_embeds": np.zeros((1, 4, 5))}, "prompt_embeds is a ndarray"),
        ({"prompt": "a", "callback_on_step_end": 5}, "callback_on_step_end is 5"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": "latents"}, "allowed is a list of latents"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 2, 2, 2)}, "latents have shape"),
        ({"prompt_embeds": torch.zeros(1, 4, 5)}, "encodings of prompts have shape"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, "allowed are latents, prompt_embeds"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        pipe(**options)


def test_a_motion_goes_where_motions_go(pipe, motion):
    with pytest.raises(TypeError, match="motion="):
        pipe("a cat", motion)
    with pytest.raises(ValueError, match="both"):
        pipe("a cat", pixels(), motion)
    with pytest.raises(ValueError, match="height is 32, but the motion was read at 16"):
        pipe("a cat", motion=motion, height=32)


# ---- the output ---------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_diffusers(pipe, motion, tmp_path):
    outputs = {
        kind: pipe("a cat", motion=motion, generator=seeded(3), output_type=kind) for kind in ("pil", "np", "pt")
    }
    assert all(isinstance(output, MotionTransferOutput) for output in outputs.values())
    array = outputs["np"].frames
    assert (array.shape, array.dtype) == ((1, FRAMES, HEIGHT, WIDTH, 3), np.float32)
    assert outputs["pt"].frames.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    assert torch.equal(outputs["pt"].frames, torch.from_numpy(array).permute(0, 1, 4, 2, 3))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in outputs["pil"].frames[0]]), array[0] * 255)
    (latents,) = pipe("a cat", motion=motion, generator=seeded(3), output_type="latent", return_dict=False)
    assert latents.shape == (1, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
    np.testing.assert_array_equal(pipe.decode_latents(latents[0]), np.round(array[0] * 255).astype(np.uint8))
    for kind in ("pil", "np"):
        path = export_to_video(outputs[kind].frames[0], str(tmp_path / f"{kind}.mp4"), fps=8)
        assert read_clip(path, frames=FRAMES).frames.shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_a_call_shows_its_progress(folder, motion, capsys):
    pipe = load_pipeline(folder)
    pipe("a cat", motion=motion, num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", motion=motion, num_inference_steps=2)
    assert capsys.readouterr().err == ""


# ---- the scheduler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_a_scheduler_put_in_place_of_the_models_samples(restored, motion, name):
    pipe, steps = restored, 3
    own = made(pipe, "a cat", motion=motion, num_inference_steps=steps)
    expected = pipe.generate("a cat", motion, seed=3, scheduler=name, steps=steps, guidance=1.5)[0]
    kind = {"euler": EulerDiscreteScheduler, "lcm": LCMScheduler}[name]
    spacing = {"timestep_spacing": "trailing"} if name == "euler" else {}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **spacing)
    found = made(pipe, "a cat", motion=motion, num_inference_steps=steps, guidance_scale=1.5)
    np.testing.assert_array_equal(found, expected)
    assert (found != own).any()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert np.abs(made(pipe, "a cat", motion=motion, num_inference_steps=5).astype(int)).max() > 0


# ---- the callback -------------------------------------------------------------------------------------------------


def test_a_callback_sees_each_step_and_changes_what_it_returns(pipe, motion):
    seen = []

    def look(given, step, timestep, tensors):
        seen.append((given, step, int(timestep), sorted(tensors)))
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {"motion": motion, "num_inference_steps": 3}
    plain = made(pipe, "a cat", **options)
    watched = made(pipe, "a cat", **options, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    np.testing.assert_array_equal(watched, plain)
    assert [step for _, step, _, _ in seen] == [0, 1, 2]
    assert all(given is pipe and tensors == sorted(names) for given, _, _, tensors in seen)
    assert [timestep for _, _, timestep, _ in seen] == pipe.make_sampler("ddim", 3).timesteps.tolist()

    dog = pipe.encode_prompts(["a dog"])
    changed = made(pipe, "a cat", **options, callback_on_step_end=lambda *_: {"prompt_embeds": dog})
    assert (changed != plain).any()
    zero = pipe(
        "a cat", **options, output_type="latent", callback_on_step_end=lambda *a: {"latents": 0 * a[3]["latents"]}
    )
    assert not zero.frames.any()


@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a dog"]])
def test_a_callback_turns_guidance_off_as_diffusers_documents_it(pipe, motion, prompts):
    """The first step is guided and the others are not, which `generate` has an option for."""

    def turn_off(given, step, timestep, tensors):
        if step == int(given.num_timesteps * 0.25) - 1:
            given._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    seeds = list(range(len(prompts)))
    found = pipe(
        prompts,
        motion=motion,
        num_inference_steps=4,
        generator=[seeded(seed) for seed in seeds],
        output_type="np",
        callback_on_step_end=turn_off,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).frames
    expected = pipe.generate(prompts, motion, seed=seeds, steps=4, guidance_until=0.25)
    np.testing.assert_array_equal((found * 255).round().astype(np.uint8), np.stack(expected))


def test_callbacks_of_diffusers_are_taken(pipe, motion):
    options = {"motion": motion, "num_inference_steps": 4}
    cut = made(pipe, "a cat", **options, callback_on_step_end=SDCFGCutoffCallback(None, 1))  # after the second step
    expected = pipe.generate("a cat", motion, seed=3, steps=4, guidance_until=0.5)[0]
    np.testing.assert_array_equal(cut, expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_one_or_less_is_without_guidance(pipe, motion, scale):
    """As in diffusers, where few-step models are called with 0: the clip is the prompt's, not the empty prompt's."""
    expected = pipe.generate("a cat", motion, seed=3, steps=4, guidance=1.0)[0]
    np.testing.assert_array_equal(
        made(pipe, "a cat", motion=motion, num_inference_steps=4, guidance_scale=scale), expected
    )


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize("wrong", ["spin.safetensors", 3, ["spin.safetensors"]])
def test_what_is_no_motion_is_named(pipe, call, wrong):
    with pytest.raises(TypeError, match=r"motion is .*, allowed is what extract_motion returns"):
        getattr(pipe, call)("a cat", motion=wrong)


def test_a_lora_that_could_not_be_loaded_leaves_nothing(folder):
    pipe = load_pipeline(folder)
    with pytest.raises(EmtError, match="does not exist"):
        pipe.load_lora_weights("nowhere.safetensors")
    with pytest.raises(ValueError, match="there is no adapter 'x', loaded are: none"):
        pipe.set_adapters("x")
    pipe.disable_lora()
    pipe.unload_lora_weights()
    assert not pipe.get_active_adapters()
    assert not pipe.get_list_adapters()


def test_latents_that_are_not_finite_are_not_the_networks(pipe, motion):
    latents = torch.full((1, pipe.unet.latent_channels, FRAMES, HEIGHT // 8, WIDTH // 8), torch.nan)
    with pytest.raises(ValueError, match="latents have NaN or infinity"):
        pipe("a cat", motion=motion, latents=latents)


def test_what_a_callback_returns_has_to_fit(pipe, motion):
    wrong = torch.zeros(3, 77, pipe.unet.text_width)
    with pytest.raises(ValueError, match="prompt_embeds that a callback returned have shape"):
        pipe("a cat", motion=motion, callback_on_step_end=lambda *_: {"prompt_embeds": wrong})


@pytest.mark.parametrize("scheduler", [None, RePaintScheduler(), ScoreSdeVeScheduler()])
def test_a_scheduler_that_does_not_step_from_noise_to_clips_is_named(folder, motion, scheduler):
    pipe = load_pipeline(folder)
    pipe.scheduler = scheduler
    with pytest.raises(TypeError, match=f"scheduler is a {type(scheduler).__name__}, allowed are those of diffusers"):
        pipe("a cat", motion=motion)


def test_steps_that_a_scheduler_does_not_take_are_named(restored, motion):
    """PNDM begins with Runge-Kutta steps unless it is told to skip them, of which it needs four."""
    restored.scheduler = PNDMScheduler.from_config(restored.models_scheduler.config)
    with pytest.raises(ValueError, match=r"PNDMScheduler does not take num_inference_steps=3 .*: give another number"):
        restored("a cat", motion=motion, num_inference_steps=3)
    assert made(restored, "a cat", motion=motion, num_inference_steps=4).shape == (FRAMES, HEIGHT, WIDTH, 3)
    restored.scheduler = PNDMScheduler.from_config(restored.models_scheduler.config, skip_prk_steps=True)
    assert made(restored, "a cat", motion=motion, num_inference_steps=3).shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_a_callback_ends_the_call_and_the_next_one_is_whole(pipe, motion):
    steps = []

    def stop(given, step, timestep, tensors):
        steps.append(step)
        given._interrupt = step == 1
        return tensors

    options = {"motion": motion, "num_inference_steps": 4, "generator": seeded(3)}
    pipe("a cat", **options, callback_on_step_end=stop)
    assert steps == [0, 1]
    np.testing.assert_array_equal(
        made(pipe, "a cat", motion=motion, num_inference_steps=4),
        pipe.generate("a cat", motion, seed=3, steps=4)[0],
    )


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_makes_the_same_clip(folder, pipe, how, monkeypatch):
    """On the CPU in a GPU's place, which accelerate knows without a number only."""
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, at, **how: offload(part, torch.device(at.type), **how))
    spared = load_pipeline(folder)
    spared.set_progress_bar_config(disable=True)
    getattr(spared, how)(device="cpu")
    for _ in range(2):
        np.testing.assert_array_equal(made(spared, "a cat", pixels()), made(pipe, "a cat", pixels()))
    assert spared.backend.low_memory
    assert ("meta" in {p.device.type for p in spared.vae.parameters()}) == (how == "enable_sequential_cpu_offload")


# ---- the model folder ---------------------------------------------------------------------------------------------


def in_a_new_process(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python that has not imported anything of this project, with a folder of its own for modules of models."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize("options", ["", "custom_pipeline='pipeline', "])
def test_diffusers_opens_a_model_folder_by_itself(folder, pipe, options):
    code = (
        "import sys, numpy, torch\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained(sys.argv[1], {options}trust_remote_code=True)\n"
        "frames = pipe('a cat', output_type='np', generator=torch.Generator().manual_seed(3)).frames[0]\n"
        "numpy.save(sys.argv[2], frames)\n"
    )
    saved = folder.parent / "frames.npy"
    done = in_a_new_process(code, folder, saved, folder=folder.parent)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal((np.load(saved) * 255).round().astype(np.uint8), made(pipe, "a cat"))


def test_diffusers_alone_says_what_a_model_folder_needs(folder, tmp_path):
    """That its code has to be trusted; and where emt is missing, the package by the name that pip knows."""
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(folder)
    code = (
        "import sys\n"
        "sys.modules['emt'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    done = in_a_new_process(code, folder, folder=tmp_path)
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: This model needs emt: pip install emt-cli"), done.stderr
    assert "pip install emt`" not in done.stderr


def test_no_code_of_a_folder_runs_where_this_class_opens_it(folder, tmp_path):
    """Nor is a folder refused whose code cannot run, or whose index names another module."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "pipeline.py").write_text("raise SystemExit('ran')\n")
    assert made(MotionTransferPipeline.from_pretrained(copy), "a cat").shape == (FRAMES, HEIGHT, WIDTH, 3)
    again = tmp_path / "again"
    load_pipeline(copy).save_pretrained(again)
    for written in (folder, again):
        named = json.loads((written / "model_index.json").read_bytes())["_class_name"]
        assert named == ["pipeline", "MotionTransferPipeline"]
    assert find_model(str(copy), download=False).folder == copy


# ---- LoRAs and textual inversions ---------------------------------------------------------------------------------

LAYER = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_v"


def lora(pipe: MotionTransferPipeline, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A motion LoRA in diffusers' layout of rank 2, alpha 2, and the change that it makes."""
    rows, columns = pipe.unet.get_parameter(f"{LAYER}.weight").shape
    down, up = (torch.randn(shape, generator=seeded(seed)) for shape in ((2, columns), (rows, 2)))
    return {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, up @ down


def test_loras_are_loaded_weighed_and_taken_out_by_diffusers_names(folder, tmp_path):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    weight = pipe.unet.get_parameter(f"{LAYER}.weight")
    own, plain = weight.detach().clone(), made(pipe, "a cat", pixels())
    (first, change), (second, other) = lora(pipe, 1), lora(pipe, 2)
    pipe.load_lora_weights(first, adapter_name="one")
    torch.testing.assert_close(weight, own + change)
    assert (made(pipe, "a cat", pixels()) != plain).any()
    save_file(second, tmp_path / "two.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="two.safetensors")
    torch.testing.assert_close(weight, own + change + other)
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == (
        ["one", "default_0"],
        {"unet": ["one", "default_0"]},
    )
    pipe.set_adapters(["one", "default_0"], [0.5, -0.25])
    torch.testing.assert_close(weight, own + 0.5 * change - 0.25 * other)
    pipe.set_adapters("default_0", 2.0)
    torch.testing.assert_close(weight, own + 2 * other)
    pipe.disable_lora()
    pipe.disable_lora()
    assert (torch.equal(weight, own), pipe.get_active_adapters()) == (True, [])
    pipe.enable_lora()
    torch.testing.assert_close(weight, own + 2 * other)
    for weights in ({"unet": 0.5}, ["x"], True):
        with pytest.raises(TypeError, match=r"adapter_weights has .*, allowed are numbers"):
            pipe.set_adapters("default_0", weights)
    with pytest.raises(TypeError, match="is 5, allowed are a file"):
        pipe.load_lora_weights(5)
    with pytest.raises(ValueError, match="no adapter 'three', loaded are: one, default_0"):
        pipe.set_adapters("three")
    with pytest.raises(ValueError, match="there is an adapter 'one'"):
        pipe.load_lora_weights(first, adapter_name="one")
    with pytest.raises(EmtError, match="nothing"):
        pipe.load_lora_weights({"nothing.lora_A.weight": torch.zeros(2, 2), "nothing.lora_B.weight": torch.zeros(2, 2)})
    torch.testing.assert_close(weight, own + 2 * other)
    pipe.delete_adapters("default_0")
    assert torch.equal(weight, own)
    pipe.set_adapters("one", None)
    torch.testing.assert_close(weight, own + change)
    pipe.disable_lora()
    pipe.delete_adapters("one")
    pipe.enable_lora()
    assert torch.equal(weight, own), "what was forgotten stays away"
    pipe.unload_lora_weights()
    assert torch.equal(weight, own)
    np.testing.assert_array_equal(made(pipe, "a cat", pixels()), plain)


def test_a_textual_inversion_stays_when_loras_come_and_go(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    width = pipe.text_encoder.config.hidden_size
    plain = made(pipe, "<toy>")
    pipe.load_textual_inversion({"<toy>": torch.randn(width, generator=seeded(5)) * 3}, token="<toy>")
    learned = made(pipe, "<toy>")
    assert (learned != plain).any()
    pipe.load_lora_weights(lora(pipe, 1)[0])
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(made(pipe, "<toy>"), learned)


def test_a_pipeline_is_saved_with_a_textual_inversion_and_after_it(folder, tmp_path):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    width = pipe.text_encoder.config.hidden_size
    plain = made(pipe, "a cat")
    pipe.load_textual_inversion({"<toy>": torch.randn(2, width, generator=seeded(5)) * 3}, token="<toy>")
    learned = made(pipe, "<toy>")
    for name, prompt, expected in (("with", "<toy>", learned), ("after", "a cat", plain)):
        pipe.save_pretrained(tmp_path / name)
        opened = load_pipeline(tmp_path / name)
        opened.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(made(opened, prompt), expected)
        pipe.unload_textual_inversion()
