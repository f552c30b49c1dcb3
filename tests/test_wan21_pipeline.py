"""From a reference clip to a clip on Wan's network, with parts of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from program import console
from transformers import AutoTokenizer, UMT5EncoderModel

from emt.backbones.sd15.random_model import random_model as other_model
from emt.backbones.wan21.facts import facts
from emt.backbones.wan21.random_model import random_model
from emt.backbones.wan21.transformer import WanMotionTransferTransformer, with_strength
from emt.backends.codec import VideoCodec
from emt.backends.torch import TorchBackend
from emt.errors import EmtError
from emt.features import Motion, joined
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.prompts import PromptEncoder
from emt.sampling import add_noise, make_sampler, noise_generator
from emt.train.objective import FlowObjective
from emt.train.teacher import Guidance, Teacher
from emt.video import write_clip
from emt_cli.batch.estimates import memory, seconds
from emt_cli.batch.options import Settings

FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "steps": 3}
    return random_model(tmp_path_factory.mktemp("wan") / "model", **sizes)


@pytest.fixture(scope="module")
def pipe(folder) -> MotionTransferPipeline:
    opened = load_pipeline(folder)
    opened.prompt_encoder.cache = None
    return opened


def clip(seed: int = 0, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def motion(pipe) -> Motion:
    return pipe.extract_motion(clip())


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of two clips, in levels of 256."""
    return np.abs(a.astype(int) - b.astype(int)).mean()


@torch.no_grad()
def two_calls(pipe, prompt: str, motion: Motion, steps: int, guided: int = 99, moved: int = 99) -> np.ndarray:
    """A clip of guidance 3 by a call of the network with prompt and reference and another one with neither."""
    sampler = pipe.make_sampler(pipe.config.get("sampler", "ddim"), steps)
    text, empty = (pipe.unet.encode_text(pipe.encode_prompts([words])) for words in (prompt, ""))
    latents = pipe.initial_noise([noise_generator(5)], FRAMES, HEIGHT, WIDTH)
    for i, timestep in enumerate(sampler.timesteps):
        found = pipe.unet(latents, timestep, text, motion.features if i < moved else None)
        if i < guided:
            away = pipe.unet(latents, timestep, empty, None)
            found = away + 3.0 * (found - away)
        latents = sampler.step(found, timestep, latents).prev_sample
    return pipe.decode_latents(latents[0])


class TestLongClips:
    """More frames than the network takes at once, in windows over latent frames; the VAE streams them."""

    @pytest.fixture(scope="class")
    def short(self, tmp_path_factory) -> MotionTransferPipeline:
        """Takes 9 frames at once, 3 latent ones."""
        sizes = {"frames": 9, "height": HEIGHT, "width": WIDTH, "steps": 2, "max_frames": 9}
        opened = load_pipeline(random_model(tmp_path_factory.mktemp("long") / "model", **sizes))
        opened.prompt_encoder.cache = None
        return opened

    @pytest.fixture(scope="class")
    def long(self, short) -> Motion:
        return short.extract_motion(clip(frames=21))

    def test_it_has_all_frames_and_follows_its_reference(self, short, long):
        (made,) = short.generate("a cat", long)
        assert made.shape == (21, HEIGHT, WIDTH, 3)
        other = np.concatenate([clip(frames=21)[:13], clip(1, frames=8)])  # other frames in the last two latent ones
        (moved,) = short.generate("a cat", short.extract_motion(other))
        assert far(made[13:], moved[13:]) > 0

    def test_the_vae_encodes_and_decodes_it_as_a_whole(self, short):
        windows = short.windows_over(21)
        generator = torch.Generator()
        latents = short.encode_frames(clip(frames=21), generator, windows)
        assert torch.equal(latents, short.encode_frames(clip(frames=21), generator))
        in_parts, whole = short.decode_clips([latents[0]], windows)[0], short.decode_clips([latents[0]])[0]
        assert np.array_equal(in_parts, whole)

    def test_a_strength_goes_with_every_window(self, short, long):
        stronger = Motion(with_strength(long.features, 8.0), long.frames, long.height, long.width, long.seed)
        assert far(short.generate("a cat", long)[0], short.generate("a cat", stronger)[0]) > 0

    def test_other_numbers_of_frames_are_refused(self, short):
        with pytest.raises(ValueError, match=r"a clip has 22 frames, allowed are 5, 9, …"):
            short.extract_motion(clip(frames=22))


class TestTeacher:
    """Motion guidance on the backbone alone, by attention to the next frame."""

    def test_rows_are_attention_of_a_frame_to_the_next_one(self, pipe, motion):
        (maps,) = Teacher(pipe).maps(motion.features)
        block, hidden = pipe.unet.blocks[1], motion.features.layers["blocks.1"][0]
        frames, height, width = hidden.shape[1:4]
        assert maps.shape == (1, frames - 1, height * width, height * width)
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        tokens, rotation = hidden.flatten(1, 3), pipe.unet._rotation(hidden.shape[1:4], hidden.device)
        attn = block.attn1
        query, key = attn.turned_query(tokens, rotation), attn.turned_key(tokens, rotation)
        logits = (query @ key.mT / query.shape[-1] ** 0.5).unflatten(2, (frames, -1)).unflatten(4, (frames, -1))
        expected = torch.stack([logits[:, :, f, :, f + 1].softmax(-1).mean(1) for f in range(frames - 1)], 1)
        torch.testing.assert_close(maps, expected)

    def test_without_weight_it_is_the_plain_sampler(self, pipe, motion):
        (made,) = Teacher(pipe, Guidance(weight=0)).generate("a cat", motion, steps=2)
        assert far(made, pipe.generate("a cat", steps=2, scheduler="ddim")[0]) < 0.05

    def test_guidance_brings_the_attention_nearer_to_the_reference(self, pipe, motion):
        energies = []
        for weight in (0, 1e5):
            teacher = Teacher(pipe, Guidance(weight=weight))
            latents = teacher.sample(["a cat"], [motion], seeds=[0], steps=4, scheduler="unipc")
            empty = pipe.encode_prompts([""])
            _, features = pipe.unet.denoise_with_features(latents, torch.tensor(50.0), empty)
            energies.append(teacher.energy(features, teacher.read([motion])).item())
        assert energies[1] < 0.9 * energies[0]


class TestOpened:
    def test_the_network_is_wan_s_and_the_text_encoder_is_not_open(self, pipe):
        assert isinstance(pipe.unet, WanMotionTransferTransformer)
        assert isinstance(pipe.codec, VideoCodec)
        assert pipe.text_encoder is None
        assert pipe.size_multiple == 16

    def test_in_half_precision_the_vae_stays_in_float32(self, folder):
        pipe = load_pipeline(folder, dtype=torch.bfloat16)
        assert pipe.unet.dtype == torch.bfloat16
        assert pipe.unet.blocks[0].scale_shift_table.dtype == torch.float32
        assert pipe.vae.dtype == torch.float32
        made = pipe.generate("a cat", pipe.extract_motion(clip()))[0]
        assert made.shape == (FRAMES, HEIGHT, WIDTH, 3)

    def test_saved_it_has_its_text_encoder_and_makes_the_same_clips(self, pipe, motion, tmp_path):
        pipe.save_pretrained(tmp_path / "copy")
        index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
        assert index["unet"] == ["emt.backbones.wan21.transformer", "WanMotionTransferTransformer"]
        again = load_pipeline(tmp_path / "copy")
        again.prompt_encoder.cache = None
        assert far(again.generate("a cat", motion)[0], pipe.generate("a cat", motion)[0]) == 0


class TestAgainstDiffusers:
    """Without a reference, a clip is what diffusers' own pipeline makes of the same weights and noise."""

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_clips_are_those_of_its_pipeline(self, folder, pipe, guidance):
        ours = pipe.unet
        sizes = {
            name: ours.config[name]
            for name in ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers")
        }
        theirs = WanTransformer3DModel(**sizes).eval()
        theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if ".adapter." not in n})
        text = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        other = WanPipeline(tokenizer, text, pipe.vae, scheduler, theirs)
        other.set_progress_bar_config(disable=True)
        noise = pipe.initial_noise([torch.Generator().manual_seed(7)], FRAMES, HEIGHT, WIDTH)
        expected = other(
            prompt="a cat",
            negative_prompt="blurred",
            latents=noise.clone(),
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=4,
            guidance_scale=guidance,
            output_type="np",
        ).frames[0]
        made = pipe.generate("a cat", seed=7, negative_prompt="blurred", steps=4, guidance=guidance, scheduler="unipc")[
            0
        ]
        assert np.abs(made / 255 - expected).max() < 1.5 / 255


class TestMotion:
    def test_the_reference_shows_in_the_clip(self, pipe, motion):
        alone, moved, other = (pipe.generate("a cat", m)[0] for m in (None, motion, pipe.extract_motion(clip(1))))
        assert far(moved, alone) > 1
        assert far(moved, other) > 0.1

    def test_it_is_one_frame_and_then_four_to_a_latent_frame(self, motion):
        for hidden, _ in motion.features.layers.values():
            assert hidden.shape[1:4] == (3, 2, 3)

    def test_only_in_the_first_steps(self, pipe, motion):
        alone, moved = (pipe.generate("a cat", m, steps=4)[0] for m in (None, motion))
        assert far(pipe.generate("a cat", motion, steps=4, motion_until=1.0)[0], moved) == 0
        assert far(pipe.generate("a cat", motion, steps=4, motion_until=0.0)[0], alone) == 0
        half = pipe.generate("a cat", motion, steps=4, motion_until=0.5)[0]
        assert far(half, moved) > 0.1
        assert far(half, alone) > 0.1
        with pytest.raises(ValueError, match="motion_until 2"):
            pipe.generate("a cat", motion, motion_until=2)

    def test_the_weaker_it_is_the_nearer_is_the_clip_without_it(self, pipe, motion):
        alone = pipe.generate("a cat")[0]
        features = [with_strength(motion.features, strength) for strength in (1.0, 0.1, 1e-4)]
        distances = [far(pipe.generate("a cat", Motion(f, FRAMES, HEIGHT, WIDTH, 0))[0], alone) for f in features]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < distances[0] / 2

    def test_a_batch_is_its_clips(self, pipe, motion):
        other = pipe.extract_motion(clip(1))
        together = pipe.generate(["a cat", "a dog"], [motion, other], seed=[3, 4])
        for made, prompt, one, seed in zip(together, ["a cat", "a dog"], [motion, other], [3, 4], strict=True):
            assert far(made, pipe.generate(prompt, one, seed=seed)[0]) < 0.1

    def test_called_as_diffusers_pipelines_are_it_makes_the_same_clip(self, pipe, motion):
        seed = torch.Generator().manual_seed(3)
        (found,) = pipe("a cat", clip(), negative_prompt="a dog", generator=seed, output_type="np").frames
        expected = pipe.generate("a cat", motion, negative_prompt="a dog", seed=3)[0]
        assert far(np.round(found * 255), expected) == 0
        with pytest.raises(ValueError, match="num_frames is 8"):
            pipe("a cat", clip(), num_frames=8)

    @pytest.mark.parametrize(
        ("prompts", "each"), [(["a cat"], False), (["a cat", "a dog"], False), (["a cat", "a dog"], True)]
    )
    def test_guidance_by_the_reference_leads_away_from_the_clip_with_neither(self, pipe, motion, prompts, each):
        """Prediction with neither prompt nor reference is that of the network alone."""
        motions = [motion, pipe.extract_motion(clip(1))][: len(prompts)] if each else motion
        pipe.register_to_config(guided_by_reference=True)
        try:
            found = pipe.generate(prompts, motions, seed=5, guidance=3.0, steps=3)
            half = pipe.generate(prompts, motions, seed=5, guidance=3.0, steps=4, guidance_until=0.5, motion_until=0.75)
            if each:  # as one motion of all references
                batch = Motion(joined(motions), FRAMES, HEIGHT, WIDTH, 0)
                at_once = pipe.generate(prompts, batch, seed=5, guidance=3.0, steps=3)
                assert all(far(a, b) == 0 for a, b in zip(at_once, found, strict=True))
            called = pipe(prompts[0], clip(), guidance_scale=3.0, num_inference_steps=3, output_type="np",
                          generator=torch.Generator().manual_seed(5)).frames[0]  # fmt: skip
        finally:
            pipe.register_to_config(guided_by_reference=False)
        given = motions if isinstance(motions, list) else [motion] * len(prompts)
        for prompt, one, made, made_half in zip(prompts, given, found, half, strict=True):
            assert far(made, two_calls(pipe, prompt, one, 3)) < 0.1
            assert far(made_half, two_calls(pipe, prompt, one, 4, guided=2, moved=3)) < 0.1
            assert far(made, pipe.generate(prompt, one, seed=5, guidance=3.0, steps=3)[0]) > 0.5
        assert far(np.round(called * 255), found[0]) < 0.1

    def test_k5_another_network_is_not_guided_by_the_reference(self, tmp_path):
        folder = other_model(tmp_path / "model")
        index = json.loads((folder / "model_index.json").read_text()) | {"guided_by_reference": True}
        (folder / "model_index.json").write_text(json.dumps(index))
        opened = load_pipeline(folder)
        shape = opened.config.height, opened.config.width
        motion = opened.extract_motion(clip(0, opened.config.frames, *shape))
        with pytest.raises(EmtError, match="a MotionTransferUNet is not guided by the reference") as error:
            opened.generate("a cat", motion, steps=1)
        assert "model_index.json" in error.value.hint

    def test_long_clips_are_guided_by_the_reference_too(self, pipe, motion, tmp_path):
        sizes = {"frames": 9, "height": HEIGHT, "width": WIDTH, "steps": 2, "max_frames": 9}
        opened = load_pipeline(random_model(tmp_path / "model", **sizes))
        opened.prompt_encoder.cache = None
        long = opened.extract_motion(clip(frames=17))
        plain = opened.generate("a cat", long)[0]
        opened.register_to_config(guided_by_reference=True)
        other = opened.generate("a cat", long)[0]
        assert other.shape == plain.shape
        assert far(other, plain) > 0.5
        opened.save_pretrained(tmp_path / "saved")
        again = load_pipeline(tmp_path / "saved")
        again.prompt_encoder.cache = None
        assert far(again.generate("a cat", long)[0], other) == 0

    @pytest.mark.parametrize("scheduler", ["ddim", "euler", "unipc", "dpm++"])
    def test_every_sampler_of_a_flow(self, pipe, motion, scheduler):
        made = pipe.generate("a cat", motion, scheduler=scheduler)[0]
        assert made.shape == (FRAMES, HEIGHT, WIDTH, 3)
        assert far(made, np.full_like(made, 128)) > 1

    def test_a_sampler_that_no_flow_has(self, pipe):
        with pytest.raises(EmtError, match=r"(?s)flow of this model.*'lcm'.*Allowed: ddim"):
            pipe.generate("a cat", scheduler="lcm")

    @pytest.mark.parametrize("frames", [8, 10, 87])
    def test_a_number_of_frames_that_is_not_4n_plus_1(self, pipe, frames):
        with pytest.raises(ValueError, match=r"allowed are 5, 9, …$"):
            pipe.extract_motion(clip(frames=frames))

    def test_sizes_are_multiples_of_16(self, pipe):
        with pytest.raises(ValueError, match="multiples of 16"):
            pipe.extract_motion(clip(height=24))


class TestBackends:
    """However calls are made, the clips are the same."""

    class Recorder:
        """Records what a CUDA graph records: a computation on the tensors that it read, and its result."""

        calls_before = 0

        def record(self, compute):
            output = compute().clone()
            return lambda: output.copy_(compute()), output

    @pytest.mark.parametrize("options", [{"recorder": Recorder}, {"low_memory": True}])
    def test_they_make_the_same_clips(self, folder, pipe, options):
        other = load_pipeline(folder)
        other.prompt_encoder.cache = None
        other.backend = TorchBackend(other, **options)
        for seed in (0, 1, 2):  # a recorded reference pass is one that has been met
            motions = [p.extract_motion(clip(seed)) for p in (pipe, other)]
            a, b = (p.generate(["a cat", "a dog"], m)[1] for p, m in zip((pipe, other), motions, strict=True))
            assert far(a, b) < 0.1


class TestFlow:
    def test_noise_of_training_is_that_of_the_sampler(self, pipe):
        g = torch.Generator().manual_seed(0)
        latents, noise = torch.randn(2, 2, 4, 2, 4, 4, generator=g)
        t = torch.tensor([100.0, 900.0])
        noisy = FlowObjective().add_noise(latents, noise, t)
        torch.testing.assert_close(noisy, add_noise(pipe.scheduler, latents, noise, t))
        sampler = make_sampler("euler", pipe.scheduler, 10)
        expected = sampler.scale_noise(latents, sampler.timesteps[3:4], noise)
        torch.testing.assert_close(FlowObjective().add_noise(latents, noise, sampler.timesteps[3].item()), expected)

    @pytest.mark.parametrize("name", ["ddim", "unipc", "dpm++"])
    def test_a_network_that_is_right_is_followed_to_the_clip(self, pipe, name):
        """The velocity of one clip leads any noise to it."""
        g = torch.Generator().manual_seed(1)
        target, noise = torch.randn(2, 1, 4, 2, 4, 4, generator=g)
        sampler = make_sampler(name, pipe.scheduler, 8)
        x = noise
        for t, sigma in zip(sampler.timesteps, sampler.sigmas, strict=False):
            x = sampler.step((x - target) / sigma, t, x).prev_sample
        torch.testing.assert_close(x, target, atol=1e-3, rtol=1e-3)


class TestProgram:
    @pytest.fixture
    def run(self, folder, tmp_path):
        reference = write_clip(tmp_path / "reference.mp4", clip(), 8)

        def run(command: str, *options: object):
            return console(tmp_path, command, reference, "--model", folder, "-o", tmp_path / "out", *options)

        return run

    def test_transfer_makes_clips_and_plan_knows_them(self, run):
        prompts = ["--prompt", "a cat", "--prompt", "a dog"]
        planned = run("plan", *prompts)
        assert planned.returncode == 0, planned.stderr
        assert "2 to do" in planned.stdout + planned.stderr
        done = run("transfer", *prompts)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == 2
        assert "3 prompts encoded" in done.stderr  # and the empty one, of references and guidance
        again = run("transfer", *prompts, "--seeds", "1")
        assert again.returncode == 0, again.stderr
        assert " encoded" not in again.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--frames", "8"], "makes clips of 5, 9, … frames"),
            (["--frames", "80"], "makes clips of 5, 9, … frames"),
            (["--height", "40"], "makes clips of multiples of 16: --height 32"),
            (["--scheduler", "lcm"], "Allowed: ddim, dpm++, unipc, euler"),
        ],
    )
    def test_what_it_cannot_make_is_one_error(self, run, options, message):
        done = run("transfer", "--prompt", "a cat", *options)
        assert done.returncode == 1
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


class TestEstimates:
    """Memory and time of a clip of the published size, by arithmetic: a pass, counted by hand, is 18 and 283 TFLOP."""

    @pytest.fixture
    def full_size(self, monkeypatch, folder):
        model = find_model(str(folder), download=False)
        monkeypatch.setitem(
            model.__dict__, "parameters", {"unet": int(1.44e9), "vae": 127_000_000, "text_encoder": 5.7e9}
        )

        monkeypatch.setitem(model.__dict__, "facts", facts({}))
        return model

    @pytest.mark.parametrize(("shape", "tflop"), [((17, 512, 512), 18), ((81, 480, 832), 283)])
    def test_time_is_that_of_the_arithmetic(self, full_size, shape, tflop):
        frames, height, width = shape
        settings = Settings(frames=frames, height=height, width=width, steps=50, guidance=5.0)
        passes = seconds(full_size, settings, gpu=True) * 336e12 / 100
        assert passes == pytest.approx(tflop * 1e12, rel=0.15)

    def test_the_text_encoder_is_not_in_memory_beside_the_network(self, full_size):
        settings = Settings(frames=17, height=512, width=512, steps=50, guidance=5.0)
        assert 3e9 < memory(full_size, settings) < 8e9


def test_prompts_are_encoded_apart(pipe):
    assert isinstance(pipe.prompt_encoder, PromptEncoder)
    assert pipe.encode_prompts(["a cat", ""]).shape == (2, 512, 32)
