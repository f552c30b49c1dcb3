"""Settings of a clip, each declared once: type, range, unit and help."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Annotated, Any

from emt.hub import split_frame, split_scale
from emt.presets import PRESETS
from emt.remote import shown
from emt_cli.batch.options.declarations import Field

MAX_FRAMES = 65_536  # of a clip
ALL_FRAMES = "all"
MAX_SIDE = 4096  # pixels of a clip's width or height
#: Name of the size that has the aspect of each reference, and those of fixed aspects.
REFERENCE_SIZE = "reference"
SIZE_NAMES = ("portrait", "landscape", REFERENCE_SIZE)


class Scheduler(str, Enum):
    """Samplers of the pipeline, by the names that users know."""

    DDIM = "ddim"
    DPM = "dpm++"
    UNIPC = "unipc"
    EULER = "euler"
    LCM = "lcm"
    EULER_A = "euler_a"
    HEUN = "heun"
    DPM2 = "dpm2"
    DPM2_KARRAS = "dpm2_karras"
    DPM2_A = "dpm2_a"
    DPM2_A_KARRAS = "dpm2_a_karras"
    DPM_2M = "dpm++_2m"
    DPM_2M_KARRAS = "dpm++_2m_karras"
    DPM_2M_SDE = "dpm++_2m_sde"
    DPM_2M_SDE_KARRAS = "dpm++_2m_sde_karras"
    DPM_SDE = "dpm++_sde"
    DPM_SDE_KARRAS = "dpm++_sde_karras"
    DEIS = "deis"
    DDPM = "ddpm"
    TCD = "tcd"

    @classmethod
    def _missing_(cls, value: object) -> Scheduler | None:
        """The sampler of a name as the web UI spells it, such as “DPM++ 2M Karras”."""
        name = re.sub(r"[\s_-]+", "_", str(value).strip().lower())
        return next((member for member in cls if member.value == name), None)


class Method(str, Enum):
    """Ways to make a clip move as its reference does."""

    ADAPTER = "adapter"
    GUIDANCE = "guidance"


class PromptSyntax(str, Enum):
    """Ways to read prompts."""

    WEBUI = "webui"
    PLAIN = "plain"


class Fit(str, Enum):
    """Ways to fit a reference of another shape to the size of the clip."""

    CROP = "crop"
    PAD = "pad"
    STRETCH = "stretch"


class Format(str, Enum):
    """Formats of a result."""

    MP4 = "mp4"
    WEBM = "webm"
    GIF = "gif"
    PNG = "png"


class Audio(str, Enum):
    """Sound of a result."""

    NONE = "none"
    COPY = "copy"


def _clip(help: str, **limits: Any) -> Field:
    return Field(help, "The clip", show_default=False, **limits)


@dataclass(frozen=True)
class Settings:
    """Settings of one clip: all that decides its frames, besides its reference, prompt and seed.

    The defaults are the published ones; a model's own override the first six (`emt.model_folder.DEFAULTS`).
    """

    frames: Annotated[
        int,
        _clip(
            "Number of frames, or all: as many as there are in the part of the reference that is used. More than the "
            "network takes at once are made in overlapping windows. Default: the model's.",
            min=2,
            max=MAX_FRAMES,
            words=(ALL_FRAMES,),
            metavar="N|all",
        ),
    ] = 16
    height: Annotated[int, _clip("Height in pixels, a multiple of 8. Default: the model's.", min=8, max=MAX_SIDE)] = 512
    width: Annotated[int, _clip("Width in pixels, a multiple of 8. Default: the model's.", min=8, max=MAX_SIDE)] = 512
    size: Annotated[
        str | None,
        _clip(
            "Width and height in place of --width and --height: 768x432, portrait (9:16), landscape (16:9), or "
            "reference (each reference's own aspect); names have the model's area.",
            metavar="WxH|NAME",
        ),
    ] = None
    steps: Annotated[
        int,
        _clip(
            "Number of denoising steps. Default: the model's.",
            min=1,
            max=500,
            short="-n",
            also=("--num-inference-steps",),
        ),
    ] = 25
    guidance: Annotated[
        float,
        _clip(
            "Classifier-free guidance scale; 1 disables it. Default: the model's.",
            min=1.0,
            max=50.0,
            also=("--guidance-scale",),
        ),
    ] = 6.0
    scheduler: Annotated[
        Scheduler,
        _clip(
            f"Sampler: {', '.join(member.value for member in Scheduler)}. Default: the model's, ddim for most.",
            metavar="NAME",
        ),
    ] = Scheduler.DDIM
    preset: Annotated[
        str,
        _clip(
            "Sampling defaults. exact: the model's own. fast: an approximation in less time, by fewer steps of a "
            "better sampler, guidance in the first steps only and reuse of deep features. Explicit options take "
            "precedence. A config file may define others.",
            metavar="|".join((*PRESETS, "NAME")),
        ),
    ] = "exact"
    method: Annotated[
        Method,
        _clip(
            "Way to transfer the motion. adapter: the trained adapter. guidance: motion guidance, which needs none, by "
            "gradients of the base model's attention over time; slower, and without an engine. Default: adapter where "
            "the model has one."
        ),
    ] = Method.ADAPTER
    guidance_until: Annotated[
        float, _clip("Fraction of the steps, from the first, that use guidance. Default: 1.", min=0.0, max=1.0)
    ] = 1.0
    cache_interval: Annotated[
        int,
        _clip(
            "Compute the lower resolutions of the network in every N-th step only. Default: 1; not with an engine.",
            min=1,
            max=20,
        ),
    ] = 1
    negative_prompt: Annotated[str, _clip("Text prompt of what the clip must not show.")] = ""
    fit: Annotated[Fit, _clip("How to fit the reference to the size of the clip. Default: crop.")] = Fit.CROP
    start: Annotated[float, _clip("Position in the reference to start from, in seconds. Default: 0.", min=0.0)] = 0.0
    duration: Annotated[float | None, _clip("Length of the reference to use, in seconds. Default: all.", min=0.001)] = (
        None
    )
    stride: Annotated[
        int | None,
        _clip("Use every N-th frame of the reference. Default: frames spread evenly.", min=1, max=1000),
    ] = None
    fps: Annotated[
        float | None,
        _clip("Frame rate of the result, in frames per second. Default: the reference's pace.", min=0.1, max=240.0),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        _clip(
            "LoRA to lay over the model for these clips, also of motion: a file, its URL, or hf://owner/name/file; the "
            "default scale is 1. May be repeated.",
            metavar="SOURCE[:SCALE]",
        ),
    ] = ()
    vae: Annotated[
        str | None,
        _clip(
            "VAE to use instead of the model's, such as vae-ft-mse.",
            metavar="SOURCE",
        ),
    ] = None
    embedding: Annotated[
        tuple[str, ...],
        _clip(
            "Textual inversion: a word of the prompts and its file. May be repeated.",
            metavar="NAME=SOURCE",
        ),
    ] = ()
    control: Annotated[
        str | None,
        _clip(
            "SparseCtrl network that reads --control-image, AnimateDiff's rgb (pictures) or scribble (drawings): a "
            "file, or hf://owner/name/file; the default scale is 1.",
            metavar="SOURCE[:SCALE]",
        ),
    ] = None
    control_image: Annotated[
        tuple[str, ...],
        _clip(
            "Picture that a frame of the clip is to show, by --control; frames count from 0, the default. May be "
            "repeated.",
            metavar="SOURCE[@FRAME]",
        ),
    ] = ()
    clip_skip: Annotated[
        int,
        _clip(
            "Layer of the text encoder that prompts are read from, counted from the last, as the web UI counts: 2 is "
            "the one before the last. Default: 1.",
            min=1,
            max=12,
        ),
    ] = 1
    prompt_syntax: Annotated[
        PromptSyntax,
        _clip(
            "How to read prompts. webui: (word:1.3), [word] and BREAK, any length in chunks, and over the clip "
            "“0: a fox | 8: a wolf”. plain: by the letter. Default: webui with Stable Diffusion 1.5."
        ),
    ] = PromptSyntax.WEBUI
    format: Annotated[Format, _clip("File format of the result. Default: mp4.")] = Format.MP4
    audio: Annotated[
        Audio,
        _clip("Sound of the result. copy: the reference's, in mp4 and webm, as fast as its frames. Default: none."),
    ] = Audio.NONE
    best_of: Annotated[
        int,
        _clip(
            "Generate N candidates with consecutive seeds and keep the one with the highest motion fidelity. "
            "Default: 1.",
            min=1,
            max=64,
        ),
    ] = 1

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, without those of `UNLISTED` at their defaults."""
        return dict(self._values)

    @cached_property
    def _values(self) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if not self._is_unlisted(f.name, f.default))
        return {name: _plain(without_secrets(name, value)) for name, value in values}

    def _is_unlisted(self, name: str, default: Any) -> bool:
        return name in UNLISTED and getattr(self, name) == default


#: Settings that records and identities have only where they are not the default: so clips made before there was a
#: choice are those of the same jobs.
UNLISTED = (
    "size",
    "audio",
    *("lora", "vae", "embedding", "control", "control_image"),
    "clip_skip",
    "prompt_syntax",
    "method",
)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def without_secrets(name: str, value: Any) -> Any:
    """A setting as records have it, which are for everybody: URLs of files over the model without secrets."""
    if name not in ("lora", "vae", "embedding", "control", "control_image") or not value:
        return value
    if isinstance(value, tuple):
        return tuple(without_secrets(name, text) for text in value)
    if "://" not in value:
        return value
    return with_source(name, value, shown)


def with_source(name: str, value: str, change: Callable[[str], str]) -> str:
    """The value of a setting that names a file, such as `/x.safetensors:0.8`, with its path or address changed.

    Raises:
        EmtError: the scale or the frame that goes with it is none.
    """
    if name in ("lora", "control"):
        source, scale = split_scale(value, name)
        return f"{change(source)}:{scale!r}"
    if name == "control_image":
        source, frame = split_frame(value)
        return f"{change(source)}@{frame}"
    word, equals, source = value.partition("=") if name == "embedding" else ("", "", value)
    return f"{word}{equals}{change(source)}"
