"""Sampling that distilled weights are made for, by the names under which they are published."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FewSteps:
    """Sampler of distilled weights, a model's default.

    Args:
        title: of the weights.
        sampler: a name of `emt.sampling.SCHEDULERS`.
        steps: that they are made for.
        guidance: classifier-free guidance scale; 1 is without.
        spacing: of the timesteps, as diffusers calls it; None for the sampler's own.
    """

    title: str
    sampler: str
    steps: int
    guidance: float
    spacing: str | None = None


# The tensors of distilled weights have the names and shapes of all others: only the file's name identifies them.
_LIGHTNING = re.compile(r"lightning[ _-]?(\d)[ _-]?step", re.IGNORECASE)
_LCM = re.compile(r"animatelcm|(^|[^a-z])lcm([^a-z]|$)", re.IGNORECASE)


def find_few_steps(names: Iterable[str]) -> FewSteps | None:
    """The sampling of the first source whose name says that its weights are distilled; None if there is none.

    AnimateDiff-Lightning (Lin and Yang 2024, arXiv 2403.12706) is sampled by Euler's method from the end of the
    schedule, as its publisher's page says; AnimateLCM (Wang et al. 2024, arXiv 2402.00769) in 4 to 8 steps with
    guidance from 1 to 2; the LoRAs of latent consistency (Luo et al. 2023, arXiv 2311.05556) without guidance.

    Args:
        names: of the sources as given, and of their files: the motion module's first.
    """
    for name in names:
        last = name.replace("\\", "/").rsplit("/", 1)[-1]
        if match := _LIGHTNING.search(last):
            return FewSteps("AnimateDiff-Lightning", "euler", int(match[1]), 1.0, "trailing")
        if "animatelcm" in name.lower():
            return FewSteps("AnimateLCM", "lcm", 6, 1.5)
        if _LCM.search(last) or _LCM.search(name):
            return FewSteps("latent consistency", "lcm", 6, 1.0)
    return None
