"""Named choices between speed and fidelity."""

from __future__ import annotations

from typing import Any

#: What each preset sets of `MotionTransferPipeline.generate`; what it does not set is the model's own default.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    # A second-order solver needs a quarter of DDIM's steps (DPM-Solver++, Lu et al. 2022, arXiv 2211.01095). The
    # layout, and with it the motion, is settled in the first of them, which keep their guidance; in every second step
    # the lower resolutions are those of the step before. Everything at the highest resolution, where the reference's
    # motion is finest, is computed in every step.
    "fast": {"steps": 6, "scheduler": "dpm++", "guidance_until": 0.5, "cache_interval": 2},
}

#: Defaults of a sampler, in place of the model's: models of latent consistency have guidance distilled into them
#: (Luo et al. 2023, arXiv 2310.04378).
SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {"lcm": {"guidance": 1.0}, "tcd": {"guidance": 1.0}}
#: Guidance above which a sampler burns colours.
MOST_GUIDANCE = {"lcm": 2.0, "tcd": 2.0}
#: Samplers that call the network twice in every step but the last.
TWICE = ("heun", "dpm2", "dpm2_karras", "dpm2_a", "dpm2_a_karras")


def preset_values(name: str, steps: int) -> dict[str, Any]:
    """Settings of a preset for a model whose own number of steps is `steps`, which it does not exceed."""
    values = dict(PRESETS[name])
    if "steps" in values:
        values["steps"] = min(values["steps"], steps)
    return values
