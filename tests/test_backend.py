"""The backend against the eager network: recorded calls see what is given now, never what was given before."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import needs_triton
from torch import Tensor

import emt_kernels
from emt.backbone import PLAIN
from emt.backbones.sd15.random_model import random_model
from emt.backends.torch import TorchBackend
from emt.backends.vae import prepare_vae
from emt.features import Motion, tensors_of
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt_kernels.precompile import Launches, record_launches
from emt_kernels.selection import untraced, wrap_triton

FRAMES, HEIGHT, WIDTH = 4, 24, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("backend") / "model", frames=FRAMES, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def pipe(folder) -> MotionTransferPipeline:
    return load_pipeline(folder)


def clip(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def motions(pipe) -> list[Motion]:
    return [pipe.extract_motion(clip(seed)) for seed in (0, 1)]


class Recorder:
    """Records on any device what a CUDA graph records: a computation on the tensors that it read, and its result."""

    recorded = 0
    calls_before = 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        type(self).recorded += 1
        output = compute().clone()
        return lambda: output.copy_(compute()), output


class Measuring(Recorder):
    """Finds the device busy, or waiting for launches, as a test has it."""

    calls_before = 2
    busy = False

    def keeps_busy(self, compute: Callable[[], Any]) -> tuple[Any, bool]:
        return compute(), self.busy


class SmallMemory(Recorder):
    """Has memory for batches up to a size; what is recorded first may leave less."""

    largest = 2

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if len(compute()) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(compute)


def test_a_compiled_network_makes_the_same_clips(folder, motions, monkeypatch):
    """With the compiler's front alone, which is what wraps the network; what it generates has tests of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = load_pipeline(folder, "cpu", torch.float32), load_pipeline(folder, "cpu", torch.float32)
    compiled.backend = TorchBackend(compiled, compile=True)
    expected, [made] = plain.generate("a fox", motions[0], steps=2)[0], compiled.generate("a fox", motions[0], steps=2)
    np.testing.assert_allclose(made.astype(int), expected.astype(int), atol=1)


@pytest.fixture
def recording(folder, monkeypatch) -> MotionTransferPipeline:
    monkeypatch.setattr(Recorder, "recorded", 0)
    pipe = load_pipeline(folder)
    pipe.backend = TorchBackend(pipe, recorder=Recorder)
    return pipe


class TestRecordedCalls:
    def test_each_clip_is_the_one_of_the_eager_network(self, pipe, recording, motions):
        """Prompt, motion, seed, batch, steps, guidance and scheduler change from clip to clip, and come back."""
        requested = [
            (("a cat", motions[0]), {}),
            (("a cat", motions[1]), {}),
            (("a dog", motions[0]), {"seed": 3}),
            (("a dog", None), {}),
            (("a dog", motions[0]), {"seed": 3, "guidance": 1.0}),
            ((["a cat", "a dog"], motions[0]), {"seed": [1, 2]}),
            ((["a cat", "a dog"], motions), {"scheduler": "dpm++", "steps": 3}),
            ((["a cat", "a dog"], motions[::-1]), {"negative_prompt": "blurry"}),
            (("a cat", motions[0]), {}),
        ]
        for (prompt, motion), options in requested:
            options = {"steps": 2} | options
            expected = pipe.generate(prompt, motion, **options)
            for got, wanted in zip(recording.generate(prompt, motion, **options), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)

    def test_one_recording_serves_all_clips_of_a_shape(self, recording, motions):
        for seed, motion in enumerate(motions * 2):
            recording.generate(f"cat {seed}", motion, steps=3, seed=seed)
        assert Recorder.recorded == 1
        recording.generate(["a", "b"], motions[0], steps=1)
        recording.generate("a", recording.extract_motion(clip(0, 16, 24)), steps=1)
        assert Recorder.recorded == 3
        recording.generate("a", motions[0], steps=1)
        assert Recorder.recorded == 3

    def test_references_of_a_shape_that_comes_again(self, pipe, recording):
        for seed in range(4):
            got, wanted = (p.extract_motion(clip(seed), seed=seed).features.layers for p in (recording, pipe))
            assert list(got) == list(wanted)
            for path in wanted:
                for a, b in zip(got[path], wanted[path], strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert Recorder.recorded == 1

    @pytest.mark.parametrize(("busy", "first", "recorded"), [(False, 4, 1), (True, 25, 0), (True, 26, 1)])
    def test_a_device_that_is_busy_anyway_has_only_what_comes_often_captured(
        self, pipe, folder, motions, monkeypatch, busy, first, recorded
    ):
        monkeypatch.setattr(Measuring, "recorded", 0)
        monkeypatch.setattr(Measuring, "busy", busy)
        own = load_pipeline(folder)
        own.backend = TorchBackend(own, recorder=Measuring)
        text, other = (pipe.unet.encode_text(pipe.encode_prompts([prompt])) for prompt in ("a", "b"))
        sample = torch.randn(1, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
        with torch.no_grad():
            moved = own.backend.prepare_motion(motions[0].features)
            wanted = [pipe.unet(sample, 5, each, pipe.unet.prepare(motions[0].features)) for each in (text, other)]
            for i in range(first):
                got = own.backend.denoise(sample, torch.tensor(5), (text, other)[i % 2], moved)
                torch.testing.assert_close(got, wanted[i % 2], rtol=0, atol=0)
            assert Measuring.recorded == recorded
            own.backend.prepare_motion(motions[1].features)
            with pytest.raises(RuntimeError, match="has given way"):
                own.backend.denoise(sample, torch.tensor(5), text, moved)

    def test_references_are_not_captured_where_they_keep_the_device_busy(self, folder, monkeypatch):
        monkeypatch.setattr(Measuring, "recorded", 0)
        own = load_pipeline(folder)
        for busy, recorded in ((True, 0), (False, 1)):
            monkeypatch.setattr(Measuring, "busy", busy)
            own.backend = TorchBackend(own, recorder=Measuring)
            for seed in range(3):
                own.extract_motion(clip(seed))
            assert Measuring.recorded == recorded

    def test_the_one_not_used_for_longest_gives_way(self, pipe, recording, motions):
        recording.backend.max_calls = 2
        for prompts in (["a"], ["a"] * 2, ["a"], ["a"] * 3, ["a"], ["a"] * 2):
            seeds = list(range(len(prompts)))
            expected = pipe.generate(prompts, motions[0], steps=1, seed=seeds)
            np.testing.assert_array_equal(recording.generate(prompts, motions[0], steps=1, seed=seeds), expected)
        assert Recorder.recorded == 4

    def test_a_motion_that_has_given_way_is_not_mistaken_for_the_next_one(self, recording, motions):
        text = recording.unet.encode_text(recording.encode_prompts(["a"]))
        sample = torch.randn(1, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
        t = torch.tensor(5)
        with torch.no_grad():
            first = recording.backend.prepare_motion(motions[0].features)
            recording.backend.denoise(sample, t, text, first)
            recording.backend.prepare_motion(motions[1].features)
            with pytest.raises(RuntimeError, match="has given way"):
                recording.backend.denoise(sample, t, text, first)

    @torch.no_grad()
    def test_motion_that_another_prepared_is_copied(self, pipe, recording, motions):
        text = recording.unet.encode_text(recording.encode_prompts(["a"]))
        sample = torch.randn(1, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
        for motion in motions * 2:
            prepared = recording.unet.prepare(motion.features)
            got = recording.backend.denoise(sample, torch.tensor(5), text, prepared)
            torch.testing.assert_close(got, pipe.unet(sample, 5, text, prepared), rtol=0, atol=0)

    @torch.no_grad()
    def test_weights_that_change(self, recording, motions):
        """In place they are read anew; those moved elsewhere are recorded anew."""
        before = recording.generate("a cat", motions[0], steps=1)
        recording.unet.conv_out.weight.mul_(2)
        changed = recording.generate("a cat", motions[0], steps=1)
        assert (before[0] != changed[0]).any()
        assert Recorder.recorded == 1
        recording.unet.conv_out.weight.data = recording.unet.conv_out.weight / 2
        np.testing.assert_array_equal(recording.generate("a cat", motions[0], steps=1), before)
        assert Recorder.recorded == 2


class TestFusedRecordedCalls:
    """Recorded calls of the layers that a GPU runs, here on the CPU."""

    @pytest.fixture
    def fused(self, recording, monkeypatch) -> MotionTransferPipeline:
        backend = recording.backend

        def context(self: TorchBackend, device: torch.device) -> Any:
            mine = replace(backend.execution, constants=self._constants)
            return contextlib.nullcontext(mine if self is backend else PLAIN)

        monkeypatch.setattr(TorchBackend, "_execution_context", context)
        return recording

    def test_clips_are_those_of_the_plain_network(self, pipe, fused, motions):
        for prompt, options in (
            ("a cat", {}),
            ("a dog", {"cache_interval": 2, "steps": 4}),
            ("a cat", {"guidance": 1.0}),
        ):
            options = {"steps": 2} | options
            for motion in (*motions, None):
                (got,), (wanted,) = (p.generate(prompt, motion, **options) for p in (fused, pipe))
                assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1
        assert len(fused.backend._constants) > 10

    def test_references_are_those_of_the_plain_network(self, pipe, fused):
        for seed in (0, 1, 2, 3):
            got, wanted = (p.extract_motion(clip(seed)).features for p in (fused, pipe))
            assert list(got.layers) == list(wanted.layers)
            for ours, theirs in zip(tensors_of(got), tensors_of(wanted), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_weights_that_change(self, folder, fused, motions):
        """Constants of weights are computed anew for the next clip, and for the next reference."""
        fused.generate("a cat", motions[0], steps=1)
        for seed in (0, 1):
            fused.extract_motion(clip(seed))
        changed = load_pipeline(folder)
        for pipe in (fused, changed):
            for name, parameter in pipe.unet.named_parameters():
                if name.endswith("bias"):
                    parameter.data.add_(0.1)
        for ours, theirs in zip(
            *(tensors_of(p.extract_motion(clip(1)).features) for p in (fused, changed)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        (got,), (wanted,) = (p.generate("a cat", motions[0], steps=1) for p in (fused, changed))
        assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


class TestWeightsForTheGpu:
    """What the backend does to weights on a GPU, done here on the CPU: to everybody else the model stays the same."""

    @pytest.fixture
    def own(self, folder) -> MotionTransferPipeline:
        return load_pipeline(folder)

    @torch.no_grad()
    def test_one_product_gives_query_key_and_value(self, pipe, own, motions):
        before = {name: tensor.clone() for name, tensor in own.unet.state_dict().items()}
        own.unet.fuse_projections()
        after = own.unet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        attention = own.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        assert attention.to_qkv.weight.data_ptr() == attention.to_q.weight.data_ptr()
        got, wanted = (p.generate("a cat", motions[0], steps=2)[0].astype(int) for p in (own, pipe))
        assert np.abs(got - wanted).max() <= 1
        own.unet.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in after.items()})
        assert not attention.to_qkv.weight.any()

    def test_fused_weights_are_still_trained(self, own, motions):
        own.unet.fuse_projections()
        sample = torch.randn(1, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
        own.unet(sample, 5, own.encode_prompts(["a"]), motions[0].features).square().mean().backward()
        assert all(parameter.grad.any() for name, parameter in own.unet.adapter_parameters() if "adapter.to_q" in name)

    def test_fused_weights_are_saved(self, own, tmp_path):
        own.unet.fuse_projections()
        own.unet.save_pretrained(tmp_path)
        again = type(own.unet).from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in own.unet.state_dict().items())

    def test_the_vae_computes_the_same(self, pipe, own):
        names = list(own.vae.state_dict())
        images = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
        for _ in range(2):  # twice is once
            prepare_vae(own.vae)
        assert list(own.vae.state_dict()) == names
        assert own.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert not any(isinstance(module, torch.nn.SiLU) for module in own.vae.decoder.modules())
        with torch.no_grad():
            for got, wanted in zip(own.backend.encode_images(images), pipe.backend.encode_images(images), strict=True):
                torch.testing.assert_close(got, wanted)
            latents = torch.randn(2, 4, HEIGHT // 8, WIDTH // 8)
            torch.testing.assert_close(own.backend.decode_images(latents), pipe.backend.decode_images(latents))


class TestInParts:
    def test_the_parts_make_the_whole(self, pipe, motions, monkeypatch):
        (wanted,) = pipe.generate("a cat", motions[0], steps=2)
        monkeypatch.setattr("emt.backbones.sd15.layers.FEED_FORWARD_TOKENS", 7)
        (got,) = pipe.generate("a cat", motions[0], steps=2)
        assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


class TestLowMemory:
    def test_clips_are_the_same(self, pipe, folder, motions):
        """To the last bit of a sum: samples go through the network one by one."""
        small = load_pipeline(folder)
        small.backend = TorchBackend(small, low_memory=True)
        for motion in (motions, motions[0], None):
            options = {"steps": 2, "seed": [3, 4]}
            got, wanted = small.generate(["a", "b"], motion, **options), pipe.generate(["a", "b"], motion, **options)
            assert np.abs(np.asarray(got, int) - np.asarray(wanted, int)).max() <= 1

    @pytest.mark.gpu
    def test_weights_come_and_go(self, folder):
        pipe = load_pipeline(folder, dtype=torch.float16)
        pipe.save_memory("cuda")
        motion = pipe.extract_motion(clip())
        (got,) = pipe.generate("a cat", motion, steps=2)
        assert {part.device.type for part in (pipe.unet, pipe.text_encoder)} == {"cpu"}
        usual = load_pipeline(folder, "cuda", torch.float16)
        (wanted,) = usual.generate("a cat", usual.extract_motion(clip()), steps=2)
        assert np.abs(got.astype(int) - wanted.astype(int)).mean() < 0.5


class TestOutOfMemory:
    def test_a_batch_that_does_not_fit_says_so_and_leaves_nothing(self, folder, motions):
        pipe = load_pipeline(folder)
        pipe.backend = TorchBackend(pipe, recorder=SmallMemory)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.generate(["a", "b"], motions[0], steps=1)
        assert not pipe.backend._calls
        assert not pipe.backend._motions
        pipe.generate("a", motions[0], steps=1)  # the smaller batch that a caller tries next

    def test_what_older_recordings_hold_is_freed_first(self, folder, motions, monkeypatch):
        """A recording that fails beside others is tried once more without them."""
        pipe = load_pipeline(folder)
        pipe.backend = TorchBackend(pipe, recorder=SmallMemory)
        pipe.generate("a", motions[0], steps=1)
        tried = []

        def fails_to_end(self, compute):
            tried.append(len(pipe.backend._calls))
            if len(tried) > 1:
                return Recorder.record(self, compute)
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("the capture was invalidated")  # as ending a CUDA graph's capture may

        monkeypatch.setattr(SmallMemory, "record", fails_to_end)
        pipe.generate(["a", "b"], motions[0], steps=1)
        assert tried == [1, 0]

    def test_a_reference_is_read_without_recording(self, pipe, folder, monkeypatch):
        own = load_pipeline(folder)
        own.backend = TorchBackend(own, recorder=SmallMemory)
        monkeypatch.setattr(SmallMemory, "largest", 0)
        for seed in (0, 1):
            got, wanted = (p.extract_motion(clip(seed)).features.layers for p in (own, pipe))
            for path in wanted:
                torch.testing.assert_close(got[path], wanted[path], rtol=0, atol=0)

    def test_other_errors_are_raised_as_they_are(self, recording):
        text = recording.unet.encode_text(recording.encode_prompts(["a"]))
        with pytest.raises(ValueError, match="text has batch 1, sample has batch 3"):
            recording.backend.denoise(torch.zeros(3, 4, 2, 3, 5), torch.tensor(3), text, None)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Triton compiles for an H100 that need not be here; the kernels' functions call their kernels on the CPU."""
    driver = pytest.importorskip("triton.runtime.driver").driver
    compiler = pytest.importorskip("triton.backends.compiler")

    class Hopper:
        def get_current_target(self):
            return compiler.GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(driver, "_active", Hopper())
    for name in (found.name for found in pkgutil.iter_modules(emt_kernels.__path__)):
        module = importlib.import_module(f"emt_kernels.{name}")
        if name != "selection" and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))


class TestCompilingAhead:
    def test_what_only_threads_disturbed_is_compiled_again(self):
        """Python 3.11 can fail to parse in two threads at once; what fails otherwise is returned and not repeated."""

        class Kernel:
            params = ()

            def __init__(self, *errors: Exception) -> None:
                self.errors, self.compiled = list(errors), 0

            def warmup(self, grid: tuple[int]) -> None:
                self.compiled += 1
                if self.errors:
                    raise self.errors.pop(0)

        broken, again = ValueError("broken"), SystemError("again")
        kernels = [Kernel(), Kernel(SystemError("mismatch")), Kernel(SystemError("mismatch"), again), Kernel(broken)]
        launches = Launches()
        for kernel in kernels:
            launches.add(kernel, {})
        assert launches.compile(torch.device("cpu"), threads=2) == [again, broken]
        assert [kernel.compiled for kernel in kernels] == [1, 2, 2, 1]

    @pytest.mark.usefixtures("hopper")
    def test_what_is_collected_is_compiled_once_and_for_all(self):
        module = importlib.import_module("emt_kernels.geglu")
        with record_launches() as launches, torch.no_grad():
            for rows, inner in (
                (48, 64),
                (96, 64),
                (32, 80),
            ):  # the first two differ in no way that Triton compiles for
                module.geglu(torch.empty(rows, 2 * inner, dtype=torch.float16))
        kernels = {wanted[0] for wanted in launches._recorded.values()}
        assert len(launches) == 2
        assert launches.compile(torch.device("cpu"), threads=2) == []
        (kernel,) = kernels
        cached = kernel.device_caches[0][0]
        assert len(cached) == 2
        assert all(compiled.asm["cubin"] for compiled in cached.values())
        for _, arguments in launches._recorded.values():  # the launch itself
            kernel.warmup(grid=(1,), **arguments)
        assert len(cached) == 2

    @pytest.mark.usefixtures("hopper")
    def test_what_cannot_be_compiled_is_reported_by_its_launch(self):
        kernel = importlib.import_module("emt_kernels.geglu")._geglu_kernel
        broken = {"x": torch.empty(32), "out": torch.empty(16), "rows": 1, "inner": 16, "ROWS": 3, "LANES": 16}
        with record_launches() as launches:
            wrap_triton(kernel)[(1,)](**broken)
        (error,) = launches.compile(torch.device("cpu"))
        with pytest.raises(type(error)):
            kernel.warmup(grid=(1,), **broken)

    @needs_triton
    def test_only_launches_of_its_own_thread_are_collected(self):
        kernel = pytest.importorskip("emt_kernels.geglu")._geglu_kernel
        with record_launches() as launches, ThreadPoolExecutor(1) as other:
            assert other.submit(untraced, kernel).result() is kernel
            assert untraced(kernel) is not kernel
        assert untraced(kernel) is kernel
        assert len(launches) == 0

    @pytest.mark.usefixtures("hopper")
    @torch.no_grad()
    def test_a_clip_launches_nothing_that_was_not_rehearsed(self, folder):
        pipe = load_pipeline(folder)
        prepare_vae(pipe.vae)
        backend = pipe.backend
        images = torch.rand(FRAMES, 3, HEIGHT, WIDTH)
        with record_launches() as rehearsed:
            backend._rehearse_clip(images)
        with record_launches() as launched:
            mean, _ = backend.encode_images(images)
            latents = mean.transpose(0, 1).unsqueeze(0)
            features = backend.encode_reference(latents, torch.tensor([3]), pipe.encode_prompts([""]))
            text = pipe.unet.encode_text(pipe.encode_prompts(["", "a cat"]))
            motion = backend.prepare_motion(features)
            backend.denoise(torch.cat([latents] * 2), torch.tensor(7), text, motion)
            backend.decode_images(mean)
        assert set(launched._recorded) == set(rehearsed._recorded)
        assert len(launched) > 10

    def test_a_shape_is_rehearsed_once_and_only_for_triton(self, folder, monkeypatch):
        pipe = load_pipeline(folder)
        rehearsals = []
        monkeypatch.setattr(pipe.backend, "_rehearse_clip", lambda images: rehearsals.append(images.shape))
        pipe.extract_motion(clip())
        assert rehearsals == []
        monkeypatch.setattr("emt.backends.torch.use_triton", lambda x: True)
        for height in (HEIGHT, HEIGHT, 16):
            pipe.extract_motion(clip(0, height))
        assert [shape[2] for shape in rehearsals] == [HEIGHT, 16]

    def test_a_shape_is_prepared_before_its_reference_is_there(self, folder, monkeypatch):
        pipe = load_pipeline(folder)
        rehearsals = []
        monkeypatch.setattr(pipe.backend, "_rehearse_clip", lambda images: rehearsals.append(images.shape))
        pipe.backend.prepare_shape(FRAMES, HEIGHT, WIDTH)
        assert rehearsals == [], "there is nothing to compile"
        monkeypatch.setattr("emt.backends.torch.use_triton", lambda x: True)
        pipe.backend.prepare_shape(FRAMES, HEIGHT, WIDTH)
        pipe.extract_motion(clip())
        assert rehearsals == [(FRAMES, 3, HEIGHT, WIDTH)]

    def test_without_room_for_it_the_call_goes_on(self, folder, monkeypatch):
        pipe = load_pipeline(folder)

        def fails(images):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(pipe.backend, "_rehearse_clip", fails)
        monkeypatch.setattr("emt.backends.torch.use_triton", lambda x: True)
        assert pipe.extract_motion(clip()).frames == FRAMES
        assert not importlib.import_module("emt_kernels.selection").launch_hook


@pytest.mark.gpu
class TestCudaGraphs:
    """On a GPU: a replay is the eager network, to the rounding of half precision."""

    def test_replays_are_the_eager_network(self, folder):
        pipe = load_pipeline(folder, "cuda", torch.float16)
        eager = TorchBackend(pipe, graphs=False)
        backend = pipe.backend
        backend.capture_at_once = True
        motions = [pipe.extract_motion(clip(seed)) for seed in (0, 1)]
        generator = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            for i in range(12):
                count = 1 + i % 3 // 2
                motion = backend.prepare_motion(motions[i % 2].features)
                text = pipe.unet.encode_text(pipe.encode_prompts([f"clip {i // 2}"] * 2 * count))
                shape = (2 * count, 4, FRAMES, HEIGHT // 8, WIDTH // 8)
                sample = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)
                timestep = torch.tensor(41 * i, device="cuda")
                got = backend.denoise(sample, timestep, text, motion if i % 5 else None)
                wanted = eager.denoise(sample, timestep, text, motion if i % 5 else None)
                error = (got.float() - wanted.float()).norm() / wanted.float().norm()
                assert error < 2e-3, i

    def test_clips_come_out_the_same(self, folder):
        pipe = load_pipeline(folder, "cuda", torch.float16)
        motion = pipe.extract_motion(clip())
        recorded = [pipe.generate("a cat", motion, steps=3, seed=seed)[0] for seed in (0, 1, 0)]
        pipe.backend = TorchBackend(pipe, graphs=False)
        for seed, got in zip((0, 1, 0), recorded, strict=True):
            wanted = pipe.generate("a cat", motion, steps=3, seed=seed)[0]
            assert np.abs(got.astype(int) - wanted.astype(int)).mean() < 0.5

    def test_out_of_memory_while_recording_is_reported_as_such(self, folder):
        pipe = load_pipeline(folder, "cuda", torch.float16)
        pipe.backend.capture_at_once = True
        motion, large = pipe.extract_motion(clip()), pipe.extract_motion(clip(0, 128, 128))
        torch.cuda.empty_cache()
        used, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((used + (24 << 20)) / total)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                pipe.generate(["a cat"] * 64, large, steps=1)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert pipe.generate("a cat", motion, steps=1)[0].std() > 0
