"""Estimates of what a job takes, before it is run: memory, seconds, bytes on disk; a model, not a measurement.

Nothing here imports torch: a plan over thousands of jobs makes one for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from emt.model_folder import Model
from emt.presets import TWICE
from emt.windows import Windows
from emt_cli.batch.options import Method, Settings

#: Arithmetic a second that is reached on one H100 in fp16 and on two CPU cores in fp32, where the journal has no time.
_GPU_RATE, _CPU_RATE = 336e12, 17e9
#: A step of however small a network takes this long, in seconds: its layers are launched one by one.
_SHORTEST_STEP = 0.02
#: Motion guidance (`emt.train.teacher`): share of the steps with a gradient; passes of such a step: forward, again for
#: the checkpointed layers, and back. 1.58 times an adapter's time was measured with the demo model on a CPU.
_GUIDED_SHARE, _GRADIENT_PASSES = 0.6, 3
#: On a GPU it has neither an adapter's fused kernels nor CUDA graphs: 2.65 times an adapter's time was measured at
#: Stable Diffusion 1.5's size, where the passes alone make 1.6.
_UNFUSED = 1.65
#: Its activations as a multiple of those without gradients: 1.8 to 1.86 were measured with the demo model on a CPU, and
#: at Stable Diffusion 1.5's size on an H200 2.4 times those that are estimated for an adapter.
_GRADIENT_ACTIVATIONS, _GRADIENT_ACTIVATIONS_OF_GPU = 1.9, 2.4
#: A control network's pass as a share of the network's: it has its down and mid blocks, with half as much attention
#: over time and none of the up blocks.
_CONTROL_PASS = 0.35
#: Bytes of a finished clip per pixel of all frames, where the journal has none.
_CLIP_BYTES = 0.25


def memory(model: Model, settings: Settings, clips: int = 1, half: bool = True, gpu: bool = True) -> float:
    """Estimated peak memory in bytes for denoising clips together; a model, not a measurement."""
    pixels = model.frames_at_once(settings.frames) * settings.height * settings.width
    together = [n for part, n in model.parameters.items() if part != "text_encoder" or not model.encodes_prompts_apart]
    weights = 2 * sum(together)
    held = clips * model.facts.activation_bytes * pixels * activations(settings.as_dict(), gpu)
    return (1 if half else 2) * (weights + held)


def activations(settings: Mapping[str, Any], gpu: bool) -> float:
    """Activations of a job's method as a multiple of the adapter's."""
    if settings.get("method") != "guidance":
        return 1.0
    return _GRADIENT_ACTIVATIONS_OF_GPU if gpu else _GRADIENT_ACTIVATIONS


def unfused(settings: Mapping[str, Any], gpu: bool) -> float:
    """Time of a job's passes as a multiple of the adapter's, for what they lack of its kernels."""
    return _UNFUSED if gpu and settings.get("method") == "guidance" else 1.0


def seconds(model: Model, settings: Settings, gpu: bool) -> float:
    """Estimated time of a job; a model, not a measurement."""
    facts, window = model.facts, model.frames_at_once(settings.frames)
    positions = window * settings.height * settings.width / 64
    pass_flop = facts.flop * model.parameters.get("unet", 0) + facts.attention_flop * positions  # for each position
    flop = pass_flop * work(settings.as_dict(), window) * unfused(settings.as_dict(), gpu)
    passes = guidance_factor(settings.as_dict(), gpu) if settings.method is Method.GUIDANCE else 1.0
    shortest = _SHORTEST_STEP * settings.steps * settings.best_of * passes
    return max(flop / (_GPU_RATE if gpu else _CPU_RATE), shortest)


def size_that_fits(model: Model, settings: Settings, available: float, half: bool) -> str:
    """Options of a smaller clip that should fit, of one that needs more than is available."""
    scale = max(1.0, available / memory(model, settings, half=half))  # the model said it would fit: it did not
    unit = model.size_multiple
    for step in range(15, 0, -1):
        width, height = (max(unit, side * step // 16 // unit * unit) for side in (settings.width, settings.height))
        smaller = replace(settings, width=width, height=height)
        if scale * memory(model, smaller, half=half) < 0.9 * available:
            return f"--width {width} --height {height}"
    return f"--frames {max(2, model.frames_at_once(settings.frames) // 2)} and the smallest size that serves"


def work(settings: Mapping[str, Any], window: int | None = None) -> float:
    """Amount of computation of a job, in units of one pass over a latent position: time is proportional to it.

    Below its highest resolution the network does half of its work.

    Args:
        settings: Of the clip.
        window: Frames that the network is given at once; None for all.
    """
    steps = settings["steps"] * (2 if settings.get("scheduler") in TWICE else 1)
    guided = 0 if settings["guidance"] == 1 else math.ceil(settings.get("guidance_until", 1) * steps)
    if settings.get("method") == "guidance":
        steps += (_GRADIENT_PASSES - 1) * round(_GUIDED_SHARE * steps)
    frames = settings["frames"]
    if window and window < frames:
        frames = Windows(frames, window).most * window
    positions = frames * settings["height"] * settings["width"] / 64
    computed = 0.5 + 0.5 / settings.get("cache_interval", 1) + (_CONTROL_PASS if settings.get("control") else 0)
    return positions * (steps + guided) * computed * settings.get("best_of", 1)


def guidance_factor(settings: Mapping[str, Any], gpu: bool) -> float:
    """Time of a job by motion guidance as a multiple of an adapter's."""
    guided = {**settings, "method": "guidance"}
    return work(guided) * unfused(guided, gpu) / work({**settings, "method": "adapter"})


@dataclass(frozen=True)
class PastTimings:
    """Time, memory and file size of earlier runs with the same model on the same kind of device, from their journal.

    Attributes:
        device: Name of the device.
        jobs: How many finished jobs it is drawn from.
        seconds: A unit of `work`.
        memory: Bytes at the peak, per pixel of the frames that the network is given at once, of an adapter's clips.
        size: Bytes of a clip, per pixel of all frames.
    """

    #: Fields of journal lines that it is drawn from.
    FIELDS = ("state", "model_sha256", "device", "settings", "window", "timings", "peak_memory", "bytes")

    device: str
    jobs: int
    seconds: float
    memory: float
    size: float

    @classmethod
    def read(cls, lines: Iterable[dict[str, Any]], model_sha256: str, device: str) -> PastTimings | None:
        """The timings in a journal's lines; None if there is none with this model on this device."""
        rows, gpu = [], device != "cpu"
        for line in lines:
            if (line.get("state"), line.get("model_sha256"), line.get("device")) != ("done", model_sha256, device):
                continue
            # Adopted clips have no timings; lines of other versions may lack others.
            with suppress(KeyError, TypeError):
                settings, timings = line["settings"], line["timings"]
                window = line.get("window") or settings["frames"]
                area, seconds = settings["height"] * settings["width"], timings["steps"] + timings["vae"]
                memory, size = (
                    line["peak_memory"] / (window * area) / activations(settings, gpu),
                    line["bytes"] / (settings["frames"] * area),
                )
                rows.append((seconds / work(settings, window) / unfused(settings, gpu), memory, size))
        if not rows:
            return None
        seconds, memory, size = (median(values) for values in zip(*rows))
        return cls(device, len(rows), seconds, memory, size)


def clip_bytes(settings: Settings, past: PastTimings | None = None) -> float:
    """Estimated size of a finished clip."""
    pixels = settings.frames * settings.height * settings.width
    return pixels * (past.size if past else _CLIP_BYTES)
