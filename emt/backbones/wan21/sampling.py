"""Samplers of Wan's flow: from noise to a clip along velocities."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler

from emt.errors import EmtError

#: Of the published folders, for 480p; 5 is for 720p.
FLOW_SHIFT = 3.0

SAMPLERS = ("unipc", "euler")


def flow_scheduler(name: str = "unipc", shift: float = FLOW_SHIFT) -> SchedulerMixin:
    """Make a sampler; its noise levels are shifted towards noise (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).

    Args:
        name: one of `SAMPLERS`.
        shift: how far, 1 for not at all; larger clips need more.

    Raises:
        EmtError: for an unknown sampler.
    """
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    raise EmtError(f"there is no sampler {name!r} for a flow", f"Allowed: {', '.join(SAMPLERS)}.")
