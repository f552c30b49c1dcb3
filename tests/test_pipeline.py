"""From a reference and a prompt to a clip, with a tiny model of random weights."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IPNDMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from emt.backbones.sd15.random_model import random_model
from emt.backends.vae import decode_exactly
from emt.errors import EmtError
from emt.features import Motion, in_dtype
from emt.pipeline import MotionTransferPipeline, load_pipeline, open_model
from emt.sampling import SCHEDULERS, NonFiniteError

FRAMES, HEIGHT, WIDTH = 4, 24, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("pipeline") / "model", frames=FRAMES, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def pipe(folder) -> MotionTransferPipeline:
    return load_pipeline(folder)


def reference(seed: int = 0, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def motion(pipe) -> Motion:
    return pipe.extract_motion(reference())


def test_k9_a_reference_is_read_at_the_models_noise_level(tmp_path, monkeypatch):
    pipe = load_pipeline(random_model(tmp_path / "model", frames=FRAMES, height=24, width=40, reference_timestep=250))
    read, original = [], pipe.backend.encode_reference

    def spy(latents, timestep, text):
        read.append((latents.clone(), timestep, text))
        return original(latents, timestep, text)

    monkeypatch.setattr(pipe.backend, "encode_reference", spy)
    pipe.extract_motion(reference(), seed=3)
    [(found, timestep, text)] = read
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        latents = pipe.encode_frames(reference(), generator)
        noise = torch.randn(latents.shape, generator=generator)
        variance = pipe.scheduler.alphas_cumprod[250]
        torch.testing.assert_close(found, variance.sqrt() * latents + (1 - variance).sqrt() * noise)
        assert timestep.tolist() == [250]
        torch.testing.assert_close(text, pipe.encode_prompts([""]))


class TestGeneration:
    def test_one_prompt_gives_one_clip(self, pipe, motion):
        (clip,) = pipe.generate("a cat", motion, steps=2)
        assert clip.shape == (FRAMES, HEIGHT, WIDTH, 3)
        assert clip.dtype == np.uint8
        assert clip.std() > 1

    def test_everything_given_matters(self, pipe, motion):
        (base,) = pipe.generate("a cat", motion, steps=2, seed=1)
        others = {
            "prompt": pipe.generate("a dog", motion, steps=2, seed=1),
            "motion": pipe.generate("a cat", pipe.extract_motion(reference(1)), steps=2, seed=1),
            "no motion": pipe.generate("a cat", steps=2, seed=1),
            "steps": pipe.generate("a cat", motion, steps=3, seed=1),
            "seed": pipe.generate("a cat", motion, steps=2, seed=2),
            "seed that ends in the same 32 bits": pipe.generate("a cat", motion, steps=2, seed=1 + 2**32),
            "seed that is larger still": pipe.generate("a cat", motion, steps=2, seed=1 + 2**62),
            "guidance": pipe.generate("a cat", motion, steps=2, seed=1, guidance=2.0),
            "negative prompt": pipe.generate("a cat", motion, steps=2, seed=1, negative_prompt="blurry"),
        }
        for name, (clip,) in others.items():
            assert (clip != base).any(), name

    def test_same_settings_same_pixels(self, pipe, motion):
        first, second = (pipe.generate("a cat", motion, steps=2, seed=3)[0] for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_a_clip_depends_on_its_own_seed_alone(self, pipe, motion):
        """What else is in the batch changes nothing but the last bit of a sum: at most one level of 255."""
        other = pipe.extract_motion(reference(1))
        batch = pipe.generate(
            ["a cat", "a dog", "a bird"],
            [motion, other, motion],
            steps=3,
            seed=[7, 8, 9],
            negative_prompt=["", "x", ""],
        )
        alone = [
            pipe.generate("a cat", motion, steps=3, seed=7),
            pipe.generate("a dog", other, steps=3, seed=8, negative_prompt="x"),
            pipe.generate("a bird", motion, steps=3, seed=9),
        ]
        for together, (apart,) in zip(batch, alone, strict=True):
            assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_every_scheduler(self, pipe, motion, scheduler):
        seeds = [4, 5]
        clips = pipe.generate("a cat", motion, steps=3, seed=seeds, scheduler=scheduler)
        for clip, seed in zip(clips, seeds, strict=True):
            (alone,) = pipe.generate("a cat", motion, steps=3, seed=seed, scheduler=scheduler)
            assert np.abs(clip.astype(int) - alone.astype(int)).max() <= 1

    def test_guidance_of_one_runs_no_second_half(self, pipe, motion, monkeypatch):
        batches = []
        forward = pipe.unet.forward
        monkeypatch.setattr(pipe.unet, "forward", lambda x, *a, **k: batches.append(len(x)) or forward(x, *a, **k))
        pipe.generate("a cat", motion, steps=1, guidance=1.0)
        pipe.generate("a cat", motion, steps=1, guidance=2.0)
        assert batches == [1, 2]

    def test_steps_are_reported(self, pipe, motion):
        calls = []
        pipe.generate("a cat", motion, steps=3, on_step=lambda done, total: calls.append((done, total)))
        assert calls == [(1, 3), (2, 3), (3, 3)]

    def test_size_comes_from_the_motion_and_otherwise_from_the_model(self, pipe):
        wide = pipe.extract_motion(reference(0, frames=3, height=16, width=48))
        assert pipe.generate("a cat", wide, steps=1)[0].shape == (3, 16, 48, 3)
        assert pipe.generate("a cat", steps=1)[0].shape == (FRAMES, HEIGHT, WIDTH, 3)

    def test_half_precision(self, folder):
        pipe = load_pipeline(folder, dtype=torch.bfloat16)
        motion = pipe.extract_motion(reference())
        assert pipe.generate("a cat", motion, steps=2)[0].shape == (FRAMES, HEIGHT, WIDTH, 3)


class TestGuidance:
    def test_k9_without_guidance_towards_the_prompt_it_is_the_negative_one(self, pipe, motion):
        (clip,) = pipe.generate("a cat", motion, steps=2, guidance=0.0, negative_prompt="a wet dog")
        (negative,) = pipe.generate("a wet dog", motion, steps=2, guidance=1.0)
        (positive,) = pipe.generate("a cat", motion, steps=2, guidance=1.0)
        assert np.abs(clip.astype(int) - negative.astype(int)).max() <= 1
        assert np.abs(clip.astype(int) - positive.astype(int)).max() > 1

    def test_k2_lcm_has_its_own_guidance(self, pipe, motion, caplog):
        (default,) = pipe.generate("a cat", motion, steps=2, scheduler="lcm")
        (without,) = pipe.generate("a cat", motion, steps=2, scheduler="lcm", guidance=1.0)
        np.testing.assert_array_equal(default, without)
        assert not caplog.text
        with caplog.at_level(logging.WARNING):
            pipe.generate("a cat", motion, steps=2, scheduler="lcm", guidance=6.0)
        assert "guidance 6 with lcm burns colours" in caplog.text

    @pytest.mark.parametrize("until", [0.0, 0.5])
    def test_steps_without_guidance_are_those_of_each_prompt(self, pipe, motion, until):
        given = {"steps": 2, "guidance_until": until, "negative_prompt": "ugly"}
        both = pipe.generate(["a cat", "a dog in the snow"], motion, seed=[1, 2], **given)
        alone = pipe.generate(["a cat"], motion, seed=[1], **given)
        alone += pipe.generate(["a dog in the snow"], motion, seed=[2], **given)
        for one, other in zip(both, alone, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 1
        if not until:
            [plain] = pipe.generate("a cat", motion, seed=1, steps=2, guidance=1)
            assert np.abs(plain.astype(int) - both[0]).max() <= 1

    @pytest.mark.parametrize("skip", [1, 2])
    def test_text_comes_from_the_layer_of_clip_skip(self, folder, skip):
        pipe = load_pipeline(folder)
        pipe.clip_skip = skip
        ids = pipe.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-skip]
            wanted = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm(hidden)
            torch.testing.assert_close(pipe.encode_prompts(["a cat"]), wanted)


class TestOverflowingVAE:
    """Some VAEs of Stable Diffusion 1.5 have activations that half precision does not hold."""

    @staticmethod
    def with_vae(folder: Path, target: Path, name: str, factor: float) -> Path:
        shutil.copytree(folder, target)
        file = target / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        state[name] *= factor
        save_file(state, file, {"format": "pt"})
        return target

    @pytest.mark.parametrize("side", ["decoder", "encoder"])
    def test_k2_it_is_computed_in_float32_with_a_word(self, folder, tmp_path, side, caplog):
        model = self.with_vae(folder, tmp_path / "m", f"{side}.conv_in.weight", 3e4)
        exact, half = load_pipeline(model), load_pipeline(model, dtype=torch.float16)
        with caplog.at_level(logging.WARNING):
            (clip,) = half.generate("a cat", half.extract_motion(reference()), steps=2)
        assert "the VAE overflows in fp16: it is computed in fp32" in caplog.text
        (wanted,) = exact.generate("a cat", exact.extract_motion(reference()), steps=2)
        assert wanted.std() > 5
        assert np.abs(clip.astype(int) - wanted.astype(int)).mean() < 3
        assert half.vae.dtype == torch.float16

    @pytest.mark.parametrize(
        ("name", "factor"), [("decoder.conv_in.weight", math.inf), ("decoder.conv_out.weight", 1e-9)]
    )
    def test_k2_one_that_makes_no_pictures_at_all_is_named(self, folder, tmp_path, name, factor):
        model = self.with_vae(folder, tmp_path / "m", name, factor)
        for dtype in (torch.float32, torch.float16):
            pipe = load_pipeline(model, dtype=dtype)
            with pytest.raises(EmtError, match=r"the VAE .*m/vae makes no pictures"):
                pipe.generate("a cat", steps=1)

    @pytest.mark.parametrize("factor", [0, 1e6])
    def test_k7_latents_of_no_image_are_not_blamed_on_it(self, folder, factor):
        """Schedulers of diffusers that take no single step make zeros, and LoRAs of large scales anything."""
        pipe = load_pipeline(folder)
        latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        with pytest.raises(EmtError, match=r"sampling made latents from .* which no VAE makes pictures of"):
            decode_exactly(pipe.vae, factor * latents)
        pipe.scheduler = IPNDMScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(EmtError, match="sampling made latents from 0 to 0"):
            pipe("a cat", num_inference_steps=1)

    def test_k2_an_encoder_that_gives_nan_is_named(self, folder, tmp_path):
        pipe = load_pipeline(self.with_vae(folder, tmp_path / "m", "encoder.conv_in.weight", math.nan))
        with pytest.raises(EmtError, match="makes no pictures"):
            pipe.extract_motion(reference())


class TestMotion:
    @pytest.mark.parametrize("timestep", [0, 250])
    def test_k9_the_reference_is_read_at_the_models_noise_level(self, folder, timestep):
        pipe = load_pipeline(folder)
        pipe.register_to_config(reference_timestep=timestep)
        features = pipe.extract_motion(reference(), seed=3).features
        generator = torch.Generator().manual_seed(3)
        latents = pipe.encode_frames(reference(), generator)
        noise = torch.randn(latents.shape, generator=generator)
        share = pipe.scheduler.alphas_cumprod[timestep]
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        with torch.no_grad():
            expected = pipe.unet.encode_reference(noisy, timestep, pipe.encode_prompts([""]))
            other = pipe.unet.encode_reference(noisy, timestep + 100, pipe.encode_prompts([""]))
        for path, layer in expected.layers.items():
            for found, wanted, at_another in zip(features.layers[path], layer, other.layers[path], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
                assert not torch.allclose(found, at_another, rtol=1e-4, atol=1e-4)

    def test_the_seed_samples_latents_and_noise(self, pipe, motion):
        same, other = pipe.extract_motion(reference()), pipe.extract_motion(reference(), seed=1)
        for path, (feature, _) in motion.features.layers.items():
            torch.testing.assert_close(same.features.layers[path][0], feature, rtol=0, atol=0)
            assert (other.features.layers[path][0] != feature).any()

    def test_files_keep_it(self, pipe, motion, tmp_path):
        motion.save(tmp_path / "m.safetensors")
        again = Motion.load(tmp_path / "m.safetensors")
        assert (again.frames, again.height, again.width, again.seed) == (FRAMES, HEIGHT, WIDTH, 0)
        np.testing.assert_array_equal(
            pipe.generate("a cat", again, steps=2)[0], pipe.generate("a cat", motion, steps=2)[0]
        )

    def test_one_that_was_read_in_another_precision_is_converted(self, pipe, motion):
        half = motion.to(dtype=torch.bfloat16)
        (expected,) = pipe.generate("a cat", half.to(dtype=torch.float32), steps=2)
        np.testing.assert_array_equal(pipe.generate("a cat", half, steps=2)[0], expected)
        frames = pipe("a cat", motion=half, generator=torch.Generator().manual_seed(0), num_inference_steps=2).frames
        np.testing.assert_array_equal(np.stack(frames[0]), expected)
        assert in_dtype([motion, motion], torch.float32) == [motion, motion]
        first, second = in_dtype([half, half], torch.float32)
        assert first is second

    @pytest.mark.parametrize("content", [b"", b"not a motion", b"\x10" + bytes(40)])
    def test_a_damaged_file_is_named(self, tmp_path, content):
        path = tmp_path / "m.safetensors"
        path.write_bytes(content)
        with pytest.raises(EmtError, match=r"m\.safetensors is not a motion file"):
            Motion.load(path)

    def test_a_file_of_other_tensors_than_its_layers_is_damaged(self, motion, tmp_path):
        motion.save(tmp_path / "motion.safetensors")
        tensors = load_file(tmp_path / "motion.safetensors")
        with safe_open(tmp_path / "motion.safetensors", "pt") as file:
            about = file.metadata()
        layer = next(iter(tensors)).rpartition("/")[0]
        less = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}/")}
        for harmed in (tensors | {"more": torch.zeros(1)}, less):
            save_file(harmed, tmp_path / "motion.safetensors", metadata=about)
            with pytest.raises(EmtError, match="is not a motion file"):
                Motion.load(tmp_path / "motion.safetensors")

    def test_features_are_trees_of_tensors(self, motion):
        leaves = torch.utils._pytree.tree_leaves(motion.features)
        assert leaves
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves), "as torch.export takes them"


class TestErrors:
    @pytest.mark.parametrize(
        "given", [{"guidance_until": -0.1}, {"guidance_until": 1.1}, {"motion_until": -0.1}, {"motion_until": 1.1}]
    )
    def test_shares_of_steps_are_from_0_to_1(self, pipe, motion, given):
        with pytest.raises(ValueError, match="allowed are 0 to 1"):
            pipe.generate("x", motion, **given)

    def test_no_prompts(self, pipe, motion):
        with pytest.raises(ValueError, match="prompt"):
            pipe.generate([], motion)

    @pytest.mark.parametrize("shape", [(4, 24, 41, 3), (4, 20, 40, 3), (4, 24, 40, 4), (24, 40, 3)])
    def test_reference_frames_of_a_wrong_shape(self, pipe, shape):
        with pytest.raises(ValueError, match="reference frames have shape"):
            pipe.extract_motion(np.zeros(shape, np.uint8))

    def test_lists_of_different_lengths(self, pipe, motion):
        with pytest.raises(ValueError, match="seed has 2 entries, expected 1 or 3"):
            pipe.generate(["a", "b", "c"], motion, seed=[1, 2])

    def test_motions_of_different_shapes(self, pipe, motion):
        other = pipe.extract_motion(reference(0, frames=3))
        with pytest.raises(ValueError, match="motions of one batch have one shape"):
            pipe.generate(["a", "b"], [motion, other])

    def test_an_unknown_scheduler(self, pipe, motion):
        with pytest.raises(EmtError, match="no scheduler 'plms'"):
            pipe.generate("a", motion, scheduler="plms")

    def test_a_result_that_is_not_finite_names_its_clips(self, folder):
        pipe = load_pipeline(folder)
        motion = pipe.extract_motion(reference())
        broken = pipe.extract_motion(reference(1))
        for features in broken.features.layers.values():
            features[0][:] = float("nan")
        with pytest.raises(NonFiniteError, match="seed 6") as error:
            pipe.generate("a cat", [motion, broken], seed=[5, 6], steps=1)
        assert error.value.clips == [1]
        assert pickle.loads(pickle.dumps(error.value)).clips == [1]
        assert "It was computed in fp32" in pickle.loads(pickle.dumps(error.value)).hint, "half precision is no reason"

    def test_a_long_prompt_is_cut_aloud(self, pipe, caplog):
        with caplog.at_level(logging.WARNING):
            pipe.encode_prompts(["very " * 200])
        assert "the model reads the first 77" in caplog.text

    def test_unknown_words_of_a_whole_word_vocabulary(self, pipe, monkeypatch):
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"[UNK]": 0, "[PAD]": 1, "[BOS]": 2, "[EOS]": 3, "a": 4, "red": 5, "cat": 6}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="[UNK]",
            pad_token="[PAD]",
            bos_token="[BOS]",
            eos_token="[EOS]",
            model_max_length=8,
        )
        monkeypatch.setattr(pipe, "tokenizer", fast)
        with pytest.raises(EmtError, match=r"does not know: zebra[\s\S]*It knows: a, cat, red"):
            pipe.encode_prompts(["a red zebra"])
        assert pipe.encode_prompts(["a red cat,"[:-1]]).shape[0] == 1
        monkeypatch.setattr(pipe, "prompt_syntax", "webui")
        with pytest.raises(EmtError, match="does not know: zebra"):
            pipe.encode_prompts(["a cat", "a (red:1.2) zebra"])

    @pytest.mark.parametrize("damage", ["no index", "no weights", "cut weights", "not json"])
    def test_a_damaged_model_folder(self, folder, tmp_path, damage):
        model = tmp_path / "model"
        shutil.copytree(folder, model)
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        if damage == "no index":
            (model / "model_index.json").unlink()
        elif damage == "no weights":
            weights.unlink()
        elif damage == "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            (model / "unet" / "config.json").write_text("{")
        with pytest.raises(EmtError, match="model"):
            load_pipeline(model)

    @pytest.mark.parametrize(
        ("part", "change", "said"),
        [
            ("vae", {"scaling_factor": 0}, "scaling_factor of vae/config.json is 0"),
            ("vae", {"scaling_factor": float("nan")}, "vae/config.json is nan"),
            ("vae", {"scaling_factor": "x"}, "vae/config.json is 'x'"),
            ("vae", {"shift_factor": 0.1}, "shift_factor of vae/config.json is 0.1"),
            ("vae", {"norm_num_groups": -1}, "vae/config.json is -1; allowed: a whole number from 0"),
            ("vae", {"use_quant_conv": 1}, "vae/config.json is 1; allowed: true or false"),
            ("", {"reference_timestep": -1}, "reference_timestep of model_index.json is -1"),
            ("", {"reference_timestep": 1000}, "reference_timestep of model_index.json is 1000"),
            ("tokenizer", {"model_max_length": 78}, "model_max_length of the tokenizer is 78"),
            ("tokenizer", {"model_max_length": 1}, "no number of tokens"),
            ("tokenizer", {"pad_token": None}, "no token that fills up (pad_token)"),
            ("vae", {"block_out_channels": []}, "vae/config.json: list index out of range"),
            ("scheduler", {"beta_end": None}, "beta_end of scheduler_config.json is None"),
            ("scheduler", {"beta_end": 0}, "beta_end of scheduler_config.json is 0"),
            ("scheduler", {"beta_schedule": "cubic"}, "beta_schedule of scheduler_config.json is 'cubic'"),
            ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps of scheduler_config.json"),
            ("scheduler", {"prediction_type": "image"}, "prediction_type of scheduler_config.json is 'image'"),
            ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr of scheduler_config.json"),
            ("scheduler", {"clip_sample": True}, "clip_sample of scheduler_config.json is True"),
            ("scheduler", {"thresholding": True}, "thresholding of scheduler_config.json is True"),
            ("scheduler", {"steps_offset": 1000}, "steps_offset of scheduler_config.json is 1000"),
            ("scheduler", {"timestep_spacing": "even"}, "timestep_spacing of scheduler_config.json is 'even'"),
            ("scheduler", {"trained_betas": [0.1]}, "trained_betas of scheduler_config.json"),
        ],
    )
    def test_k2_numbers_of_a_configuration_that_make_no_clips_are_named(self, folder, tmp_path, part, change, said):
        model = shutil.copytree(folder, tmp_path / "model")
        names = {"": "model_index", "vae": "config", "scheduler": "scheduler_config", "tokenizer": "tokenizer_config"}
        path = model / part / f"{names[part]}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(EmtError, match="cannot be opened") as caught:
            _ = open_model(model) or load_pipeline(model)
        assert said in caught.value.problem

    def test_k5_a_text_encoder_of_another_network_is_refused(self, folder, tmp_path):
        """Of another width, or with fewer words than its tokenizer has: both fail in the middle of a prompt."""
        for change in ({"hidden_size": 64}, {"vocab_size": 300}):
            model = shutil.copytree(folder, tmp_path / str(change))
            path = model / "text_encoder" / "config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps(config | change))
            weights = load_file(path.with_name("model.safetensors"))
            wide, words = (change.get(name, config[name]) for name in ("hidden_size", "vocab_size"))
            sizes = {config["hidden_size"]: wide, config["vocab_size"]: words}
            made = {
                name: torch.rand([sizes.get(n, n) for n in weight.shape], dtype=weight.dtype)
                for name, weight in weights.items()
            }
            save_file(made, path.with_name("model.safetensors"))
            with pytest.raises(EmtError, match=r"cannot be opened: (hidden_size|the vocabulary)"):
                open_model(model)

    @pytest.mark.parametrize("name", ["attention_heads", "motion_attention_heads", "norm_num_groups"])
    def test_k2_what_no_weight_shows_is_not_guessed(self, folder, tmp_path, name):
        model = shutil.copytree(folder, tmp_path / "model")
        path = model / "unet" / "config.json"
        config = json.loads(path.read_text())
        del config[name]
        path.write_text(json.dumps(config))
        with pytest.raises(EmtError, match=f"unet/config.json does not say {name}"):
            open_model(model)

    def test_k2_a_scheduler_of_another_class_does_not_have_latents_cut(self, folder, tmp_path):
        """diffusers' DDIM cuts clips at 1 where its configuration does not say; those of other classes never do."""
        model = shutil.copytree(folder, tmp_path / "model")
        path = model / "scheduler" / "scheduler_config.json"
        kept = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("clip_")}
        path.write_text(json.dumps(kept | {"_class_name": "EulerDiscreteScheduler"}))
        assert open_model(model).make_sampler("ddim", 2).config.clip_sample is False
        path.write_text(json.dumps(kept))
        with pytest.raises(EmtError, match="clip_sample of scheduler_config"):
            open_model(model)

    def test_no_such_model(self):
        with pytest.raises(EmtError, match="cannot be opened"):
            load_pipeline("nobody/nothing-here")
