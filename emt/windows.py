"""Clips of more frames than a network takes at once: overlapping windows over clip and reference together.

In every step of the sampler the network sees the clip window by window, each with the reference's features of the same
frames, and its predictions are blended where windows overlap, as MultiDiffusion does in space (Bar-Tal et al. 2023,
arXiv 2302.08113) and Gen-L-Video in time (Wang et al. 2023, arXiv 2305.18264). The latents, and so the noise, are of
the whole clip. From step to step windows shift, in two layouts by turns, so that a frame at the edge of a window in one
is inside in the other. The reference is read once, in the windows of both, and a window is denoised with the features
that were read in it: those of a frame depend on what else is in its window. Time is proportional to the length; on the
device there is one window at a time, besides the latents. docs/long-clips.md has the figures by which this was chosen.

Here is where windows are; `emt.windowed` denoises in them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emt.backbone import Facts

LAYOUTS = 2
"""Ways in which windows are laid, one step in this way and the next in that."""


@dataclass(frozen=True)
class Reading:
    """One window in which a reference is read.

    Attributes:
        start: its first frame.
        taken: frames of the clip of which features are taken from it.
        place: where they are in the features of all windows.
    """

    start: int
    taken: slice
    place: int


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
            shift: number of the step.
        """
        last = self.frames - self.size
        inner = range(shift % LAYOUTS * self.stride // LAYOUTS, last, self.stride)
        return sorted({0, *inner, last})

    def laid(self, shift: int) -> list[slice]:
        """Frames of the windows of a step.

        Args:
            shift: number of the step.
        """
        return [slice(start, start + self.size) for start in self.starts(shift)]

    @property
    def read(self) -> int:
        """Frames of features of the reference: those of all its windows, side by side."""
        return sum(reading.taken.stop - reading.taken.start for reading in self.readings())

    def readings(self) -> list[Reading]:
        """Readings of the reference: one of each window of each step, as a window is followed best as it was read."""
        starts = sorted({start for shift in range(LAYOUTS) for start in self.starts(shift)})
        return [Reading(start, slice(start, start + self.size), i * self.size) for i, start in enumerate(starts)]

    def features_of(self, part: slice) -> slice:
        """Place in the features of a reference where a window's are.

        Args:
            part: frames of one of `laid`.
        """
        place = next(reading.place for reading in self.readings() if reading.start == part.start)
        return slice(place, place + self.size)

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
