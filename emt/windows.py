"""Clips of more frames than a network takes at once: overlapping windows over clip and reference together.

In every step of the sampler the network sees the clip window by window, each with the reference's features of the same
frames, and its predictions are blended where windows overlap, as MultiDiffusion does in space (Bar-Tal et al. 2023,
arXiv 2302.08113) and Gen-L-Video in time (Wang et al. 2023, arXiv 2305.18264). The latents, and so the noise, are of
the whole clip. From step to step windows shift, so that a frame at the edge of a window in one is inside in the others.
The reference is read once, in windows of its own. Time is proportional to the length; on the device there is one window
at a time, besides the latents. docs/long-clips.md has the figures by which this was chosen.

Here is where windows are; `emt.windowed` denoises in them. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from emt.backbone import Facts


@dataclass(frozen=True)
class Windows:
    """Windows over the latent frames of a clip.

    Args:
        frames: of the clip, more than `size`.
        size: frames of a window.
    """

    frames: int
    size: int

    @property
    def stride(self) -> int:
        """Frames between the beginnings of windows: a quarter of each is in the next one, too."""
        return max(1, 3 * self.size // 4)

    def starts(self, shift: int) -> list[int]:
        """Beginnings of the windows of a step; the first is 0, and neighbours overlap by at least a quarter.

        Args:
            shift: number of the step; steps with consecutive numbers have windows far from each other's.
        """
        last = self.frames - self.size
        first = int(self.stride * _van_der_corput(shift))
        inner = range(first, last, self.stride)
        return sorted({0, *inner, last})

    def laid(self, shift: int) -> list[slice]:
        """Frames of the windows of a step.

        Args:
            shift: number of the step.
        """
        return [slice(start, start + self.size) for start in self.starts(shift)]

    def readings(self) -> Iterator[tuple[int, slice]]:
        """Beginnings of the windows in which a reference is read, and the frames that are taken from each.

        A frame is taken from the window in whose middle it is.
        """
        starts = self.starts(0)
        ends = [(a + b + self.size) // 2 for a, b in itertools.pairwise(starts)] + [self.frames]
        done = 0
        for start, end in zip(starts, ends):
            yield start, slice(done, end)
            done = end

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Beginnings of windows side by side, and the frames that are new in each: only the last may overlap."""
        for done in range(0, self.frames, self.size):
            yield min(done, self.frames - self.size), slice(done, min(done + self.size, self.frames))

    def weights(self) -> list[int]:
        """Weights of a window's frames where predictions are blended, rising from the edges to the middle."""
        return [min(place + 1, self.size - place) for place in range(self.size)]

    @property
    def most(self) -> int:
        """Most windows of a step."""
        return len(range(0, self.frames - self.size, self.stride)) + 2


def _van_der_corput(number: int) -> float:
    """The binary digits of a number behind the point, in reverse: 0, 1/2, 1/4, 3/4, 1/8, …"""
    found, place = 0.0, 0.5
    while number:
        found += place * (number & 1)
        number, place = number >> 1, place / 2
    return found


def windows_over(facts: Facts, frames: int, size: int) -> Windows | None:
    """Windows over a clip's latent frames; None where the network takes all of them at once.

    Args:
        facts: of the network.
        frames: of the clip.
        size: frames of a window.

    Raises:
        ValueError: the network takes neither so many frames at once nor windows, or no windows of this size.
    """
    if facts.takes_frames(frames):
        return None
    if not facts.makes_frames(frames):
        raise ValueError(f"a clip has {frames} frames, allowed are {facts.allowed_clips()}")
    if not facts.takes_frames(size) or size > frames:
        raise ValueError(f"a window has {size} frames, allowed are {facts.allowed_frames()}")
    return Windows(facts.latent_frames(frames), facts.latent_frames(size))
