"""Clips longer than the network takes at once: windows, what is read and blended in them, and what they cost."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backend import Recorder

from emt import scratch
from emt.backbone import Facts
from emt.backbones.sd15.random_model import random_model
from emt.backends.torch import TorchBackend
from emt.errors import EmtError
from emt.features import Motion, MotionFeatures, TextFeatures
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.windowed import WindowedDenoiser, read_in_windows, window_of
from emt.windows import Windows, windows_over
from emt_cli.batch import estimates
from emt_cli.batch.options import Settings

SIZE, SIDE = 4, 16  # frames of a window and of the network at most, and pixels of a side
LAYOUTS = st.integers(2, 40).flatmap(lambda size: st.builds(Windows, st.integers(size + 1, size * 12), st.just(size)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose network takes 4 frames at once."""
    sizes = {"frames": SIZE, "height": SIDE, "width": SIDE, "steps": 2, "motion_max_frames": SIZE}
    return random_model(tmp_path_factory.mktemp("windows") / "model", **sizes)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> MotionTransferPipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def motion(pipe: MotionTransferPipeline) -> Motion:
    return pipe.extract_motion(reference(11))


def reference(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)


class Counting:
    """A backend around another one, that counts what goes through it and how much motion is alive."""

    def __init__(self, backend) -> None:
        self.backend, self.calls, self.frames = backend, Counter(), set()

    def __getattr__(self, name):
        found = getattr(self.backend, name)
        if name not in ("encode_reference", "denoise", "denoise_deep", "denoise_shallow", "prepare_motion"):
            return found

        def counted(*arguments):
            self.calls[name] += 1
            if name != "prepare_motion":
                self.frames.add(arguments[0].shape[2])
            return found(*arguments)

        return counted


# ---- where windows are ---------------------------------------------------------------------------------------------


@given(LAYOUTS, st.integers(0, 500))
def test_every_frame_is_in_a_window_in_every_step(windows, shift):
    starts = windows.starts(shift)
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == windows.frames - windows.size
    assert all(b - a <= windows.stride for a, b in itertools.pairwise(starts))
    assert len(starts) <= windows.most


@given(LAYOUTS)
@settings(max_examples=50)
def test_no_frame_is_always_at_the_edge_of_its_windows(windows):
    """Over steps as many as a stride is long, each frame is well inside a window; those at the clip's ends cannot."""
    margin = windows.size // 4
    inside = np.zeros(windows.frames, bool)
    for shift in range(2 * windows.stride):
        for start in windows.starts(shift):
            inside[start + margin : start + windows.size - margin] = True
    assert inside[margin : windows.frames - margin].all()


@given(LAYOUTS)
def test_each_frame_is_decoded_once(windows):
    taken = []
    for start, frames in windows.chunks():
        assert 0 <= start <= frames.start < frames.stop <= start + windows.size <= windows.frames
        taken += range(frames.start, frames.stop)
    assert taken == list(range(windows.frames))


@given(LAYOUTS, st.integers(0, 50))
def test_every_window_of_every_step_has_been_read(windows, shift):
    readings = windows.readings()
    assert [reading.place for reading in readings] == list(range(0, windows.read, windows.size))
    for part in windows.laid(shift):
        place = windows.features_of(part)
        (reading,) = (reading for reading in readings if reading.place == place.start)
        assert (reading.start, reading.taken) == (part.start, part)
        assert place.stop - place.start == windows.size


@given(LAYOUTS)
def test_windows_grow_in_number_as_clips_in_length(windows):
    assert windows.most <= (windows.frames - windows.size) / windows.stride + 3


def test_the_network_takes_what_it_can_at_once():
    facts = Facts(32, 1, 1, 8, 1.0, 1.0, windows=True)
    assert windows_over(facts, 32, 16) is None
    assert windows_over(facts, 33, 16) == Windows(33, 16)
    with pytest.raises(ValueError, match=r"a clip has 1 frames, allowed are 2 or more"):
        windows_over(facts, 1, 16)
    with pytest.raises(ValueError, match=r"a window has 33 frames, allowed are 2 to 32"):
        windows_over(facts, 50, 33)


def test_a_network_without_windows_says_what_it_takes():
    facts = Facts(81, 4, 2, 8, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"a clip has 85 frames, allowed are 5, 9, … up to 81"):
        windows_over(facts, 85, 81)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 30), st.data())
def test_windows_are_over_latent_frames(first, step, latents, data):
    """Latent frames of more frames than one: the frames of all are those of the clip, in order."""
    facts = Facts(first + 3 * step, step, 1, 8, 1.0, 1.0, first_frames=first, windows=True)
    frames = first + (latents - 1) * step
    assert facts.makes_frames(frames)
    assert facts.latent_frames(frames) == latents
    assert facts.frames_of(slice(0, latents)) == slice(0, frames)
    cut = data.draw(st.integers(1, latents - 1))
    assert facts.frames_of(slice(0, cut)).stop == facts.frames_of(slice(cut, latents)).start
    expected = Windows(latents, 4) if frames > facts.max_frames else None
    assert windows_over(facts, frames, facts.max_frames) == expected


def test_long_clips_have_frames_that_make_latent_frames():
    facts = Facts(81, 4, 2, 8, 1.0, 1.0, windows=True)
    assert [frames for frames in range(80, 100) if facts.makes_frames(frames)] == [81, 85, 89, 93, 97]
    with pytest.raises(ValueError, match=r"a clip has 86 frames, allowed are 5, 9, …$"):
        windows_over(facts, 86, 81)


# ---- reading and blending ------------------------------------------------------------------------------------------


class Constant:
    """A backend whose prediction is one number, or the number of each frame as the sample says it."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def denoise(self, sample, timestep, text, motion):
        return sample if self.value is None else torch.full_like(sample, self.value)


@given(LAYOUTS, st.floats(-1e3, 1e3))
@settings(max_examples=30)
def test_constant_predictions_stay_constant_where_they_are_blended(windows, value):
    sample = torch.arange(windows.frames).float()[None, None, :, None, None].expand(2, 1, -1, 1, 2)
    for backend, expected in ((Constant(value), torch.full_like(sample, value)), (Constant(None), sample)):
        denoise = WindowedDenoiser(windows, backend, [], 1)
        for _ in range(3):
            torch.testing.assert_close(denoise(sample, torch.tensor(1), TextFeatures({}), False), expected)


@given(LAYOUTS)
@settings(max_examples=20)
def test_a_window_is_denoised_with_features_that_were_read_in_it(windows):
    """A frame's features depend on what else is in its window: those of another one lead to another motion."""
    latents = torch.arange(float(windows.frames)).view(1, 1, -1, 1, 1)

    def read(part: torch.Tensor) -> MotionFeatures:
        numbers = part[:, 0, :, 0]
        return MotionFeatures({"layer": (numbers, numbers[:, :1].expand_as(numbers))})

    motion = Motion(read_in_windows(windows, latents, read), windows.frames, 8, 8, 0)
    for shift in range(2):
        for part in windows.laid(shift):
            numbers, first = window_of([motion], windows.features_of(part)).layers["layer"]
            assert numbers.flatten().tolist() == list(range(part.start, part.stop))
            assert set(first.flatten().tolist()) == {part.start}


def test_features_of_other_windows_are_not_taken(pipe, motion):
    with pytest.raises(ValueError, match=r"read in windows of another size"):
        pipe.generate("a cat", motion, steps=1, window=3)


# ---- the pipeline --------------------------------------------------------------------------------------------------


def test_within_the_network_nothing_changes(pipe, folder):
    """Clips that fit are made as by a pipeline that knows of no windows, to the bit."""
    short = pipe.extract_motion(reference(SIZE), window=3)
    assert pipe.windows_over(SIZE, 3) is None
    with torch.no_grad():
        latents = pipe.encode_frames(reference(SIZE), torch.Generator().manual_seed(0))
    assert latents.shape[2] == SIZE
    first, second = (pipe.generate("a cat", short, steps=2, window=window)[0] for window in (None, 2))
    assert np.array_equal(first, second)


def test_one_window_is_the_plain_path_to_the_bit(pipe):
    """A layout of one window over all frames calls the network once, with all of them."""
    short = pipe.extract_motion(reference(SIZE))
    plain = pipe.backend.prepare_motion(short.features)
    text = pipe.unet.encode_text(pipe.encode_prompts(["", "a cat"]))
    sample, timestep = torch.randn(2, 4, SIZE, 2, 2), torch.tensor(500)
    with torch.no_grad():
        whole = pipe.backend.denoise(sample, timestep, text, plain)
        blended = WindowedDenoiser(Windows(SIZE, SIZE), pipe.backend, [short], 1)(sample, timestep, text, True)
    assert torch.equal(whole, blended)


def test_a_long_clip_has_all_frames_and_follows_what_is_given(pipe, motion):
    (clip,) = pipe.generate("a cat", motion, steps=2)
    assert clip.shape == (11, SIDE, SIDE, 3)
    assert np.array_equal(clip, pipe.generate("a cat", motion, steps=2)[0])
    other = pipe.extract_motion(np.concatenate([reference(8), reference(3, seed=1)]))
    (moved,) = pipe.generate("a cat", other, steps=2)
    assert (moved[-1] != clip[-1]).any()
    assert (pipe.generate("a dog", motion, steps=2)[0] != clip).any()


def test_long_clips_of_a_batch_are_those_made_alone(pipe, motion):
    other = pipe.extract_motion(reference(11, seed=1))
    batch = pipe.generate(["a cat", "a dog"], [motion, other], steps=2, seed=[3, 4], guidance_until=0.5)
    for i, own in enumerate((motion, other)):
        (alone,) = pipe.generate(["a cat", "a dog"][i], own, steps=2, seed=3 + i, guidance_until=0.5)
        assert np.abs(batch[i].astype(int) - alone.astype(int)).max() <= 1


def test_diffusers_call_makes_long_clips_too(pipe, motion):
    made = pipe("a cat", motion=motion, num_inference_steps=1, output_type="np").frames
    assert np.asarray(made[0]).shape == (11, SIDE, SIDE, 3)


@pytest.mark.parametrize("interval", [1, 2])
def test_time_is_linear_and_the_network_never_sees_more_than_a_window(pipe, monkeypatch, interval):
    counts = []
    for frames in (8, 16, 32):
        backend = Counting(pipe.backend)
        monkeypatch.setattr(pipe, "backend", backend)
        long = pipe.extract_motion(reference(frames))
        pipe.generate("a cat", long, steps=2 * interval, cache_interval=interval)
        monkeypatch.undo()
        assert backend.frames == {SIZE}
        assert backend.calls["encode_reference"] == len(Windows(frames, SIZE).readings()), "read once"
        windows = [Windows(frames, SIZE).starts(step // interval) for step in range(2 * interval)]
        calls = sum(backend.calls[name] for name in ("denoise", "denoise_deep", "denoise_shallow"))
        assert calls == sum(map(len, windows)) == backend.calls["prepare_motion"]
        assert bool(backend.calls["denoise_shallow"]) == (interval > 1)
        counts.append(calls)
    first, second = np.diff(counts)
    assert second == pytest.approx(2 * first, rel=0.15)


def test_one_windows_motion_is_prepared_at_a_time(pipe, motion, monkeypatch):
    """Memory of the device does not grow with the clip: constants of one window give way to the next one's."""
    import weakref

    alive: list[weakref.ref] = []
    prepare = type(pipe.backend).prepare_motion

    def prepared(self, features):
        made = prepare(self, features)
        alive.append(weakref.ref(made))
        assert sum(ref() is not None for ref in alive) <= 2, "the last one, and the one that takes its place"
        assert all(part.shape[1] == SIZE for layer in features.layers.values() for part in layer)
        return made

    monkeypatch.setattr(type(pipe.backend), "prepare_motion", prepared)
    pipe.generate("a cat", motion, steps=2)
    assert len(alive) > 4


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("options", [{"recorder": Recorder}, {"low_memory": True}], ids=["captured", "low memory"])
def test_every_way_to_run_the_network_makes_the_same_long_clip(pipe, motion, monkeypatch, options, interval):
    """Captured calls are replayed with one window's motion after the other in the same place."""
    other = pipe.extract_motion(reference(11, seed=1))
    given = {"steps": 3, "seed": [1, 2], "cache_interval": interval}
    expected = pipe.generate("a cat", [motion, other], **given)
    monkeypatch.setattr(pipe, "backend", TorchBackend(pipe, **options))
    made = pipe.generate("a cat", [motion, other], **given)
    for one, same in zip(made, expected, strict=True):
        assert np.abs(one.astype(int) - same.astype(int)).max() <= 1


def test_long_motions_are_kept_in_files_beyond_the_memory(pipe, motion, monkeypatch, tmp_path):
    (expected,) = pipe.generate("a cat", motion, steps=1)
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    filed = pipe.extract_motion(reference(11))
    assert np.array_equal(pipe.generate("a cat", filed, steps=1)[0], expected)
    filed.save(tmp_path / "motion.safetensors")
    assert np.array_equal(pipe.generate("a cat", Motion.load(tmp_path / "motion.safetensors"), steps=1)[0], expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_many_small_features_of_a_long_reference_are_in_a_file_as_one_large_one(monkeypatch):
    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

    monkeypatch.setattr(scratch, "IN_MEMORY", 1 << 20)
    windows, layers = Windows(64, 16), 80  # each layer's features come to half of what is kept in memory
    frame = torch.ones(1, 16, 2048)
    before = own_memory()
    found = read_in_windows(
        windows, torch.zeros(1, 4, 64, 2, 2), lambda part: MotionFeatures({str(i): (frame,) for i in range(layers)})
    )
    assert all(bool((layer[0] == 1).all()) for layer in found.layers.values())
    assert sum(part.nbytes for layer in found.layers.values() for part in layer) >= 40 << 20
    assert own_memory() - before < 20 << 20


def test_a_full_disk_is_said_and_not_met_in_the_middle(monkeypatch):
    def full(descriptor, start, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(EmtError, match=r"no room for 1\.0 GiB in .*: No space left on device") as raised:
        scratch.scratch_array((1 << 30,))
    assert "TMPDIR" in raised.value.hint


# ---- what is known before ------------------------------------------------------------------------------------------


def test_a_plan_knows_that_memory_stays_and_time_is_linear(folder):
    model = find_model(str(folder), download=False)
    lengths = [Settings(frames=frames, height=SIDE, width=SIDE) for frames in (SIZE, 40, 80, 160)]
    memory = [estimates.memory(model, settings) for settings in lengths]
    assert len(set(memory)) == 1
    work = [estimates.work(settings.as_dict(), model.frames_at_once(settings.frames)) for settings in lengths]
    assert (work[3] - work[2]) == pytest.approx(2 * (work[2] - work[1]), rel=0.1)
