"""Options of `emt transfer` and `emt plan` that are not settings of a clip: which jobs, and how they run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from emt.errors import EmtError
from emt.remote import check_writable, is_url, normal
from emt_cli.batch.options.declarations import Field, UsageError, usage_errors
from emt_cli.batch.options.fields import check_sound, check_together, parse_seeds
from emt_cli.batch.options.settings import Method
from emt_cli.batch.shards import Shard

_JOBS, _RUN = "Jobs", "Running"  # headings of --help


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
            metavar="REFERENCE",
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
            "demo-dit is a small diffusion transformer; emt doctor lists the words that they know.",
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
        if self.memory is Memory.LOW and self.device in ("cpu", "mps"):
            raise UsageError(f"--memory low and --device {self.device} exclude each other", "It spares CUDA GPUs'.")
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
    if family == "cuda" and (re.fullmatch("[0-9]{1,4}", index) if colon else True):
        return device
    if device in ("auto", "mps", "cpu"):
        return device
    raise EmtError(f"--device is {device!r:.100}", "Allowed are auto, cuda, cuda:N, mps and cpu.")


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
    if re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= 64:
        return int(text)
    raise EmtError(f"--batch-size is {text!r:.100}", "Allowed are auto and 1 to 64.")
