"""Every option of the batch commands, declared once: type, range, unit and help.

The command line, job files and `emt rerun` all read the same declarations: `emt_cli.commands.arguments.takes_options`
turns them into a command's parameters, `parse_field` checks one value of a JSON Lines or CSV job against them.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from emt.errors import EmtError
from emt.hub import split_frame, split_scale, split_word
from emt.presets import PRESETS
from emt.remote import check_writable, is_url, normal, shown
from emt_cli.batch.shards import Shard
from emt_cli.text import nearest


class UsageError(EmtError):
    """Invalid command line: exit code 2."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Context manager: values of the command line are checked here, so an `EmtError` is a `UsageError`."""
    try:
        yield
    except EmtError as error:
        raise UsageError(error.problem, error.hint) from None


@dataclass(frozen=True)
class Field:
    """Declaration of one option of the command line.

    Attributes:
        help: Text of `--help`.
        panel: Heading under which `--help` lists it; empty for none.
        min: Smallest number allowed.
        max: Largest number allowed.
        metavar: Name of its value in `--help`; empty for its type's.
        short: Its one-letter name, such as `-o`; empty for none.
        also: Other long names, by which users of other programs know it.
        positional: Takes the arguments that no option claims.
        show_default: `--help` shows the default.
        words: Words that may stand in place of a number.
    """

    help: str
    panel: str = ""
    min: float | None = None
    max: float | None = None
    metavar: str = ""
    short: str = ""
    also: tuple[str, ...] = ()
    positional: bool = False
    show_default: bool = True
    words: tuple[str, ...] = ()


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


class Precision(str, Enum):
    """Arithmetic of the network."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Kernels(str, Enum):
    """Kernels for attention over time, norms and gated activations."""

    AUTO = "auto"
    TRITON = "triton"
    REFERENCE = "reference"


class Memory(str, Enum):
    """Limits on the use of a GPU's memory."""

    AUTO = "auto"
    LOW = "low"


MAX_FRAMES = 65_536  # of a clip
ALL_FRAMES = "all"
MAX_SIDE = 4096  # pixels of a clip's width or height
#: Name of the size that has the aspect of each reference, and those of fixed aspects.
REFERENCE_SIZE = "reference"
SIZE_NAMES = ("portrait", "landscape", REFERENCE_SIZE)

_HUB_ID = re.compile(r"[\w.-]+/[\w-]+")
_CLIP, _JOBS, _RUN = "The clip", "Jobs", "Running"


def _clip(help: str, **limits: Any) -> Field:
    return Field(help, _CLIP, show_default=False, **limits)


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
    scheduler: Annotated[Scheduler, _clip("Sampler. Default: the model's, ddim for most.")] = Scheduler.DDIM
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
            "VAE to use instead of the model's, such as vae-ft-mse-840000-ema-pruned.safetensors.",
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
            "SparseCtrl network that reads --control-image: AnimateDiff's v3_sd15_sparsectrl_rgb.ckpt (pictures) or "
            "v3_sd15_sparsectrl_scribble.ckpt (drawings), a file or hf://owner/name/file; the default scale is 1.",
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


MAX_SEED = 2**63 - 1
MAX_PROMPT = 4_000  # characters; a text encoder reads fewer than a hundred words
MAX_SEEDS = 1_000_000


@dataclass(frozen=True)
class TransferOptions:
    """The options of `emt transfer` and `emt plan` that are not settings of a clip."""

    references: Annotated[
        list[str] | None,
        Field(
            "Reference clips, folders of clips or globs, on disk or by URL (s3://bucket/clips/*.mp4); - reads jobs as "
            "JSON Lines from standard input.",
            positional=True,
            show_default=False,
        ),
    ] = None
    prompt: Annotated[
        list[str] | None, Field("Text prompt of what the new clip shows; may be repeated.", _JOBS, short="-p")
    ] = None
    prompts: Annotated[
        list[Path] | None,
        Field(
            "File of prompts, or its URL: one per line (# starts a comment), or .csv/.jsonl with any field of a job: "
            "reference, prompt, seed and the options under “The clip”. Without any prompts, clip.txt beside clip.mp4 "
            "is read.",
            _JOBS,
        ),
    ] = None
    seeds: Annotated[
        str,
        Field(
            "Seeds: numbers and ranges, as in 0,7,10-15, or random:N for N that are drawn once for an output folder, "
            "which keeps them.",
            _JOBS,
            also=("--seed",),
        ),
    ] = "0"
    pair: Annotated[
        bool,
        Field(
            "Match references and prompts one to one, in order, instead of every reference with every prompt.", _JOBS
        ),
    ] = False
    recursive: Annotated[
        bool,
        Field("Search subfolders for clips too.", _JOBS, short="-r"),
    ] = False
    watch: Annotated[
        bool,
        Field(
            "Watch the folders until Ctrl-C: each clip that is dropped in is taken, with its prompts in clip.txt "
            "beside clip.mp4, or those of --prompt and --prompts.",
            _JOBS,
        ),
    ] = False
    out: Annotated[
        Path,
        Field("Output folder.", _JOBS, short="-o", also=("--output",)),
    ] = Path("out")
    overwrite: Annotated[bool, Field("Generate finished clips again and replace them.", _JOBS)] = False
    shard: Annotated[
        str,
        Field(
            "Do part i of n of the jobs, i from 0 to n-1, by a hash of each reference; n such runs share the list and "
            "the output folder.",
            _JOBS,
            metavar="i/n",
            show_default=False,
        ),
    ] = ""
    model: Annotated[
        str | None,
        Field(
            "Model folder (emt import-weights makes one), its URL, or hub id. Default: demo, a small model; "
            "emt doctor lists the words that it knows.",
            _RUN,
            short="-m",
            show_default=False,
        ),
    ] = None
    device: Annotated[str, Field("Device to run on: auto, cuda, cuda:N, mps or cpu.", _RUN, metavar="DEVICE")] = "auto"
    gpus: Annotated[
        str,
        Field(
            "GPUs of this machine to share the jobs: all, how many, or their numbers. Needs the extra ray.",
            _RUN,
            metavar="all|N|0,2,5",
            show_default=False,
        ),
    ] = ""
    workers: Annotated[
        int | None,
        Field(
            "With --device cpu: number of processes to share the jobs. Needs the extra ray.",
            _RUN,
            min=1,
            max=1024,
            show_default=False,
        ),
    ] = None
    ray: Annotated[
        str,
        Field(
            "Ray cluster whose GPUs (or CPUs, with --device cpu) share the jobs: auto for the one of this machine, or "
            "the address of its head. All of them, or as many as --gpus N or --workers N say.",
            _RUN,
            metavar="auto|ADDRESS",
            show_default=False,
        ),
    ] = ""
    precision: Annotated[
        Precision,
        Field(
            "Dtype of the network. auto: fp16 on a GPU, fp32 on a CPU.",
            _RUN,
        ),
    ] = Precision.AUTO
    engine: Annotated[
        str,
        Field(
            "Engine to run the network with: its folder (see emt build-engine), torch for none, or auto for a "
            "matching one from the engine cache, else torch.",
            _RUN,
            metavar="DIR|auto|torch",
        ),
    ] = "auto"
    kernels: Annotated[
        Kernels,
        Field("GPU kernels. triton: fused ones; reference: PyTorch's own; auto: triton where it runs.", _RUN),
    ] = Kernels.AUTO
    memory: Annotated[
        Memory,
        Field(
            "Use of GPU memory. low: the least possible, at lower speed and without an engine: a little over 4 GiB for "
            "16 frames of 512x512 in fp16.",
            _RUN,
        ),
    ] = Memory.AUTO
    batch_size: Annotated[
        str,
        Field(
            "Number of clips to denoise together, 1 to 64. auto: on a GPU as many, up to 8, as make each of them at "
            "least 3% cheaper, which is measured once; 1 on a CPU.",
            _RUN,
            metavar="N|auto",
        ),
    ] = "auto"
    cache_dir: Annotated[
        Path | None,
        Field(
            "Folder of the reference cache, or its URL for machines to share. Default: emt in the user's cache folder.",
            _RUN,
            show_default=False,
        ),
    ] = None
    cache_size: Annotated[float, Field("Maximum size of the reference cache in GB; 0 disables it.", _RUN, min=0.0)] = (
        20.0
    )
    json: Annotated[bool, Field("Print one JSON line per job on standard output.", _RUN)] = False
    evaluate: Annotated[
        bool,
        Field("Measure the results at the end, as emt evaluate OUT does; a report shows the measures.", _RUN),
    ] = False
    report: Annotated[bool, Field("Write a gallery of the results, OUT/report.html, at the end.", _RUN)] = False
    dry_run: Annotated[bool, Field("Print the plan and stop, as `emt plan` does.", _RUN)] = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # the settings given on the command line, by name
    background: Sequence[Mapping[str, Any]] = ()  # those of config files and of the environment, the weakest first
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the user's own: values by setting
    others: Sequence[Path] = ()  # further output folders, of `emt plan`

    @property
    def part(self) -> Shard:
        """The shard of the jobs.

        Raises:
            EmtError: `--shard` is not i/n.
        """
        return Shard.parse(self.shard)

    @property
    def disk_cache(self) -> Path | None:
        """Folder of the caches that are on disk in any case; None for the user's."""
        return None if is_url(self.cache_dir) else self.cache_dir

    def check(self) -> None:
        """Raise `UsageError` unless values and combinations of options are allowed."""
        given = {name: value for layer in (*self.background, self.settings) for name, value in layer.items()}
        with usage_errors():
            if self.cache_dir is not None and is_url(self.cache_dir):
                check_writable(normal(self.cache_dir))
            check_device(self.device)
            parse_batch_size(self.batch_size)
            parse_seeds(self.seeds)
            check_together(self.settings)
            check_sound(given)
            self.part  # noqa: B018
            gpus = parse_gpus(self.gpus) if self.gpus else None
        if self.gpus and self.device not in ("auto", "cuda"):
            raise UsageError(f"--gpus and --device {self.device} exclude each other", "Give one of them.")
        if self.workers and self.device != "cpu":
            raise UsageError("--workers goes with --device cpu", "GPUs are chosen with --gpus all, N or a list.")
        if self.ray and self.device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--ray and --device {self.device} exclude each other", "Allowed are cuda and cpu.")
        if self.ray.startswith("ray://"):
            problem = f"--ray is {self.ray!r}, an address for clients outside a cluster"
            raise UsageError(problem, "Run on one of its nodes, with --ray auto, or give the address of its head.")
        if self.ray and isinstance(gpus, list):
            raise UsageError("--ray takes --gpus all or N", "A cluster chooses which of its GPUs are used.")
        if self.watch and (self.pair or self.shard or "-" in (self.references or [])):
            problem = "--watch goes neither with --pair nor with --shard nor with - for standard input"
            raise UsageError(problem, "Name folders to watch.")
        named = self.engine not in ("auto", "torch")
        low = self.memory is Memory.LOW
        guided, controlled = given.get("method") is Method.GUIDANCE, given.get("control") is not None
        for both, text in (
            (low and named, "--memory low and --engine"),
            (guided and named, "--method guidance, which needs gradients, and --engine"),
            (controlled and named, "--control, which adds to the network's inside, and --engine"),
        ):
            if both:
                raise UsageError(f"{text} exclude each other", "Give one of them.")


def check_device(device: str) -> str:
    """The device if it is named as allowed.

    Raises:
        EmtError: it is not.
    """
    family, colon, index = device.partition(":")
    if family == "cuda" and (index.isdecimal() if colon else True):
        return device
    if device in ("auto", "mps", "cpu"):
        return device
    raise EmtError(f"--device is {device!r}", "Allowed are auto, cuda, cuda:N, mps and cpu.")


def parse_gpus(text: str) -> int | list[int] | None:
    """Number of GPUs that `--gpus` names, or their numbers; None for all.

    Raises:
        EmtError: it is neither all, nor a number from 1, nor a list of numbers from 0.
    """
    if text == "all":
        return None
    parts = text.split(",")
    if all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts) and len(set(map(int, parts))) == len(parts):
        if len(parts) > 1:
            return [int(part) for part in parts]
        if int(text) > 0:
            return int(text)
    hint = "Allowed are all, how many (from 1), and a list of numbers from 0, as in 0,2,5 (one alone: --device cuda:2)."
    raise EmtError(f"--gpus is {text!r:.100}", hint)


def parse_batch_size(text: str) -> int | None:
    """The number of `--batch-size`, None for auto.

    Raises:
        EmtError: it is neither auto nor 1 to 64.
    """
    if text == "auto":
        return None
    if text.isdecimal() and 1 <= int(text) <= 64:
        return int(text)
    raise EmtError(f"--batch-size is {text!r}", "Allowed are auto and 1 to 64.")


def parse_seeds(text: str, draw: Callable[[int], list[int]] = lambda count: []) -> list[int]:
    """Seeds from a list such as `0,7,10-15` or `random:4`.

    Args:
        text: The list.
        draw: Draws so many; none where the list is only checked.

    Raises:
        EmtError: something in it is no seed, or they are more than a million.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, colon, count = part.strip().partition(":")
        if first == "random":
            if not (count.isdecimal() if colon else not count) or not 1 <= int(count or 1) < MAX_SEEDS:
                raise EmtError(f"--seeds has {part!r}", f"Allowed are random:1 to random:{MAX_SEEDS - 1}.")
            seeds.extend(draw(int(count or 1)))
            continue
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            hint = "Seeds are whole numbers and ranges, as in 0,7,10-15, or random:N."
            raise EmtError(f"--seeds has {part!r}", hint)
        low, high = parse_field("seed", first), parse_field("seed", last if dash else first)
        if high < low or high - low + len(seeds) >= MAX_SEEDS:
            raise EmtError(f"--seeds has {part!r}", f"Ranges rise, and at most {MAX_SEEDS:,} seeds are taken.")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def _hints() -> dict[str, tuple[type, bool, Any]]:
    hints = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        annotation, info = get_args(hint)
        alternatives = get_args(annotation)
        optional = type(None) in alternatives
        kind = alternatives[0] if optional else annotation
        hints[name] = (tuple if get_origin(kind) is tuple else kind, optional, info)
    return hints


_HINTS = _hints()
SETTING_NAMES = tuple(_HINTS)
JOB_FIELDS = ("reference", "prompt", "seed", *SETTING_NAMES)
_ALSO = {other[2:].replace("-", "_"): name for name, (*_, info) in _HINTS.items() for other in info.also}


def field_name(name: str) -> str:
    """The name of a field of a job, which may be given by another one of its option, such as `guidance_scale`."""
    return _ALSO.get(name, name)


def unknown_field(name: str) -> EmtError:
    """The error that a job has no such field, with the nearest that it has."""
    near = nearest(name, (*JOB_FIELDS, *_ALSO))
    hint = f"Did you mean {near}?" if near else f"A job has the fields {', '.join(JOB_FIELDS)}."
    return EmtError(f"unknown field {name!r:.100}", hint)


def parse_field(name: str, value: Any) -> Any:
    """One field of a job, checked and converted.

    Args:
        name: One of `JOB_FIELDS`.
        value: A JSON value, or the text of a CSV cell or of a command-line option.

    Returns:
        The value in the type of its declaration, or one of its words.

    Raises:
        EmtError: the value is not allowed; says which are.
    """
    if name == "seed":
        return _number(name, value, int, 0, MAX_SEED)
    if name in ("prompt", "reference"):
        return _text(name, value)
    if name not in _HINTS:
        raise unknown_field(name)
    kind, optional, info = _HINTS[name]
    if value is None and optional:
        return None
    if kind is tuple:
        return tuple(dict.fromkeys(_source(name, text) for text in _texts(name, value)))
    if name in ("vae", "control"):
        return _source(name, value)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in kind)
            raise EmtError(f"{name} is {value!r}", f"Allowed are {allowed}.") from None
    if name == "size":
        return _size(value)
    if kind is str:
        return _text(name, value)
    if value in info.words:
        return value
    number = _number(name, value, kind, info.min, info.max, info.words)
    if name in ("height", "width") and number % 8:
        raise EmtError(
            f"{name} is {number}",
            f"It must be a multiple of 8, such as {number // 8 * 8 or 8} or {number // 8 * 8 + 8}.",
        )
    return number


def _size(value: Any) -> str:
    """A size as settings have it: a name in lower case, or WIDTHxHEIGHT."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in SIZE_NAMES:
        return text
    width, by, height = text.partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        allowed = f"Allowed are {', '.join(SIZE_NAMES)} and WIDTHxHEIGHT, such as 768x432."
        raise EmtError(f"size is {value!r:.100}", allowed)
    return f"{parse_field('width', width)}x{parse_field('height', height)}"


def check_together(given: Mapping[str, Any]) -> None:
    """Raise an `EmtError` if settings that are given together exclude each other.

    Args:
        given: Of one command line or of one line of jobs, by name.
    """
    if given.get("size") and (both := [name for name in ("width", "height") if name in given]):
        raise EmtError(f"size and {both[0]} exclude each other", "Give the size alone, or width and height.")


def check_sound(given: Mapping[str, Any]) -> None:
    """Raise an `EmtError` if a result is to have sound whose format has none; `given` are settings by name."""
    format = given.get("format", Settings.format)
    if given.get("audio") is Audio.COPY and format not in (Format.MP4, Format.WEBM):
        raise EmtError(
            f"clips in the format {format.value} have no sound", "Use --format mp4 or webm, or --audio none."
        )


def parse_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model folder sets (`emt.model_folder.Model.defaults`), checked.

    Raises:
        EmtError: one of them is not allowed.
    """
    try:
        if words := [value for value in defaults.values() if value == ALL_FRAMES]:
            raise EmtError(f"frames is {words[0]!r}", "A number is needed.")
        return {name: parse_field(name, value) for name, value in defaults.items()}
    except EmtError as error:
        raise EmtError(
            f"the model's defaults: {error.problem}", f"{error.hint} They are in its model_index.json."
        ) from None


def _texts(name: str, value: Any) -> list[Any]:
    """The entries of a setting that has several: a JSON list, or a text with semicolons between them."""
    if isinstance(value, str):
        return [part for part in map(str.strip, value.split(";")) if part]
    if isinstance(value, list | tuple):
        return list(value)
    raise EmtError(f"{name} is {value!r:.100}", "It must be a text or a list of texts.")


def _source(name: str, value: Any) -> str:
    """The file of a setting that names one, with what goes with it: `/x.safetensors:0.8`, `style=/y.pt`, `/a.png@0`.

    Paths become absolute; addresses and hub ids stay as they are.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > MAX_PROMPT:
        raise EmtError(f"{name} is {value!r:.100}", "Name a file, or hf://owner/name/file.")
    if name in ("lora", "control"):
        source, scale = split_scale(value, name)
        return f"{_place(source)}:{scale!r}"
    if name == "control_image":
        source, frame = split_frame(value)
        return f"{_place(source)}@{frame}"
    if name == "embedding":
        word, source = split_word(value)
        return f"{word}={_place(source)}"
    return _place(value)


def without_secrets(name: str, value: Any) -> Any:
    """A setting as records have it, which are for everybody: URLs of files over the model without secrets."""
    if name not in ("lora", "vae", "embedding", "control", "control_image") or not value:
        return value
    if isinstance(value, tuple):
        return tuple(without_secrets(name, text) for text in value)
    if "://" not in value:
        return value
    if name in ("lora", "control"):
        source, scale = split_scale(value, name)
        return f"{shown(source)}:{scale!r}"
    if name == "control_image":
        source, frame = split_frame(value)
        return f"{shown(source)}@{frame}"
    word, equals, source = value.partition("=") if name == "embedding" else ("", "", value)
    return f"{word}{equals}{shown(source)}"


def _place(source: str) -> str:
    """A path made absolute; another kind of address as it is."""
    if re.match(r"[\w+-]{2,}:/", source) or (_HUB_ID.fullmatch(source) and not os.path.lexists(source)):
        return source
    return os.path.abspath(source)


def _number(
    name: str, value: Any, kind: type, low: float | None, high: float | None, words: tuple[str, ...] = ()
) -> Any:
    allowed = f"{'a whole number' if kind is int else 'a number'} from {low if kind is int else f'{low:g}'}"
    allowed += f" to {high if kind is int else f'{high:g}'}" if high is not None else ""
    allowed += "".join(f", or {word}" for word in words)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and isinstance(value, float) and number != value:
            raise ValueError
        if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise EmtError(f"{name} is {value!r:.100}", f"Allowed is {allowed}.") from None
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise EmtError(f"{name} is {value!r:.100}", "It must be a text.")
    if name != "negative_prompt" and not value.strip():
        hints = {"prompt": "Say what the clip shows.", "reference": "Name a clip."}
        raise EmtError(f"the {name} is empty", hints.get(name, "Name one."))
    if name == "reference":
        if "\0" in value:
            raise EmtError(f"reference {value!r:.100} has a zero byte", "Name a clip.")
        return value
    what = name.replace("_", " ")
    if len(value) > MAX_PROMPT:
        raise EmtError(
            f"the {what} has {len(value):,} characters",
            f"At most {MAX_PROMPT:,} are allowed; the model reads fewer than a hundred words.",
        )
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            raise EmtError(f"the {what} is not valid text (UTF-8)", "Save it as UTF-8.")
        if category == "Cc" and character not in "\t\n\r":
            raise EmtError(f"the {what} has the control character U+{ord(character):04X}", "Remove it.")
    return value
