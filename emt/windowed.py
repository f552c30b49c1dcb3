"""Reading references and denoising clips, window by window where they are long (`emt.windows` says where and why)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emt.backends.base import Backend
from emt.features import Motion, MotionFeatures, PreparedMotion, TextFeatures, joined
from emt.scratch import scratch_tensor, scratch_tensors
from emt.windows import Windows


def read_in_windows(windows: Windows, latents: Tensor, read: Callable[[Tensor], MotionFeatures]) -> MotionFeatures:
    """Features of all windows of a reference, in the computer's memory or on its disk: (1, `windows.read`, …).

    Args:
        windows: over its frames.
        latents: noisy ones, (1, channels, frames, height, width).
        read: reads a window of them; the features that it returns are (1, frames, …), or (1,) if of no frame.
    """
    layers: dict[str, tuple[Tensor, ...]] = {}
    for reading in windows.readings():
        start, taken, place = reading.start, reading.taken, reading.place
        found = read(latents[:, :, start : start + windows.size].contiguous())
        if not layers:
            layers = _room_for(found, windows.read)
        for path, parts in found.layers.items():
            for all_of_it, part in zip(layers[path], parts, strict=True):
                if part.ndim > 1:
                    own = part[:, taken.start - start : taken.stop - start]
                    all_of_it[:, place : place + own.shape[1]] = own
    return MotionFeatures(layers)


def _room_for(window: MotionFeatures, frames: int) -> dict[str, tuple[Tensor, ...]]:
    """Room for features of so many frames, by those of a window: many small tensors count as one large one."""
    rooms = {}
    for dtype in {part.dtype for part in _over_frames(window)}:
        own = [part for part in _over_frames(window) if part.dtype == dtype]
        rooms[dtype] = iter(scratch_tensors([(1, frames, *part.shape[2:]) for part in own], dtype))
    return {
        path: tuple(next(rooms[part.dtype]) if part.ndim > 1 else part for part in parts)
        for path, parts in window.layers.items()
    }


def _over_frames(features: MotionFeatures) -> list[Tensor]:
    """Features that are of frames, in their order."""
    return [part for parts in features.layers.values() for part in parts if part.ndim > 1]


def window_of(motions: Sequence[Motion], part: slice) -> MotionFeatures:
    """Features of a window of several motions, for a batch; a motion that serves all of it is not repeated.

    Args:
        motions: of the clips.
        part: place of the window in their features (`Windows.features_of`).
    """
    parts = {}
    for motion in motions:
        if id(motion) not in parts:
            layers = {
                path: tuple(feature[:, part].contiguous() if feature.ndim > 1 else feature for feature in layer)
                for path, layer in motion.features.layers.items()
            }
            count = len(range(*part.indices(part.stop)))
            parts[id(motion)] = Motion(MotionFeatures(layers), count, motion.height, motion.width, motion.seed)
    return joined([parts[id(motion)] for motion in motions])


def text_of(text: TextFeatures, sample: Tensor, part: slice) -> TextFeatures:
    """Features of prompts for a window of frames: themselves, or the window's of prompts that change over the clip.

    Args:
        text: of prompts, (batch, …) each, or of the prompt of each frame, (batch·frames, …).
        sample: noisy latents of all frames, (batch, channels, frames, height, width).
        part: frames of the window.
    """
    batch, frames = sample.shape[0], sample.shape[2]
    if all(len(key) == batch for key, _ in text.layers.values()):
        return text

    def taken(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, frames))[:, part].flatten(0, 1)

    layers = {path: (taken(key), taken(value)) for path, (key, value) in text.layers.items()}
    return TextFeatures(layers, text.guided)


Denoiser = Callable[[Tensor, Tensor, TextFeatures, bool], Tensor]
"""A prediction of noisy latents, their timestep, features of prompts, and whether the references are attended to."""


def denoiser(backend: Backend, motions: Sequence[Motion], windows: Windows | None, interval: int = 1) -> Denoiser:
    """Denoiser of all frames of clips: in windows, or at once where there are none.

    Args:
        backend: executes the network.
        motions: of the references of a batch; or none.
        windows: over the clips' frames; None where the network takes all of them at once.
        interval: steps of which one computes what lies below the highest resolution.

    Raises:
        ValueError: a reference was read in other windows.
    """
    if windows:
        return WindowedDenoiser(windows, backend, motions, interval)
    moved = backend.prepare_motion(joined(motions)) if motions else None
    denoise = DeepFeatureReuse(backend, interval)
    return lambda sample, timestep, text, attended: denoise(sample, timestep, text, moved if attended else None)


class DeepFeatureReuse:
    """Denoises, computing the part below the highest resolution in every n-th call only (DeepCache, arXiv 2312.00858).

    A call of another batch size than the last one, such as the first without guidance, computes it, too.

    Args:
        backend: executes the network.
        interval: n.
    """

    def __init__(self, backend: Backend, interval: int) -> None:
        self._backend, self._interval = backend, interval
        self._deep: Tensor | None = None
        self._batch = self._age = 0

    def __call__(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """As `emt.backends.base.Backend.denoise`."""
        if self._interval == 1:
            return self._backend.denoise(sample, timestep, text, motion)
        self._age += 1
        if self._deep is None or self._age == self._interval or self._batch != len(sample):
            self._batch, self._age = len(sample), 0
            prediction, self._deep = self._backend.denoise_deep(sample, timestep, text, motion)
            return prediction
        return self._backend.denoise_shallow(sample, timestep, text, motion, self._deep)


class WindowedDenoiser:
    """Denoises all frames of clips, window by window, as `DeepFeatureReuse` denoises one window.

    Args:
        windows: over the clips' frames.
        backend: executes the network.
        motions: of the references of a batch, with the clips' number of frames; or none.
        interval: steps of which one computes what lies below the highest resolution. The windows of the others are the
            same as its own; the deep features wait in the computer's memory or on its disk.

    Raises:
        ValueError: a reference was read in other windows.
    """

    def __init__(self, windows: Windows, backend: Backend, motions: Sequence[Motion], interval: int) -> None:
        read = {part.shape[1] for motion in motions for part in _over_frames(motion.features)}
        if read - {windows.read}:
            problem = f"the reference was read in windows of another size than {windows.size} frames"
            raise ValueError(f"{problem}: give extract_motion and generate the same one")
        self._windows, self._backend, self._motions, self._interval = windows, backend, motions, interval
        self._weights = torch.tensor(windows.weights(), dtype=torch.float32)
        self._shift = -1
        self._batch = self._age = 0
        self._deep: Tensor | None = None

    def __call__(self, sample: Tensor, timestep: Tensor, text: TextFeatures, moved: bool) -> Tensor:
        """The prediction, float32, shaped as the sample.

        Args:
            sample: noisy latents, (batch, channels, frames, height, width).
            timestep: of all.
            text: features of the prompts.
            moved: whether the references are attended to.
        """
        self._age += 1
        fresh = self._age >= self._interval or self._batch != len(sample) or self._shift < 0
        if fresh:
            self._batch, self._age, self._shift = len(sample), 0, self._shift + 1
        total = torch.zeros(sample.shape, device=sample.device)
        weight = torch.zeros(self._windows.frames)
        for i, part in enumerate(self._windows.laid(self._shift)):
            motion = None
            if moved and self._motions:
                motion = self._backend.prepare_motion(window_of(self._motions, self._windows.features_of(part)))
            own = sample[:, :, part].contiguous()
            prediction = self._denoise(own, timestep, text_of(text, sample, part), motion, i, fresh)
            weights = self._weights.to(sample.device)[:, None, None]
            total[:, :, part] += weights * prediction.float()
            weight[part] += self._weights
        return total / weight.to(sample.device)[:, None, None]

    def _denoise(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None, i: int, fresh: bool
    ) -> Tensor:
        if self._interval == 1:
            return self._backend.denoise(sample, timestep, text, motion)
        if not fresh:
            assert self._deep is not None
            deep = self._deep[i].to(sample.device)
            return self._backend.denoise_shallow(sample, timestep, text, motion, deep)
        prediction, deep = self._backend.denoise_deep(sample, timestep, text, motion)
        if self._deep is None or self._deep.shape[1:] != deep.shape:
            self._deep = scratch_tensor((self._windows.most, *deep.shape), deep.dtype)
        self._deep[i] = deep
        return prediction
