"""`emt bench`: how long the parts of a clip take on this machine."""

from __future__ import annotations

import json as json_lines
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt.errors import EmtError
from emt_cli.batch.options import Precision, Settings, check_device, parse_defaults, parse_field, usage_errors
from emt_cli.messages import console as stderr_console

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from emt.device import Device
    from emt.model_folder import Model
    from emt.pipeline import MotionTransfer


@dataclass(frozen=True)
class Timings:
    """Times of one way to run the network: milliseconds, seconds a clip, GiB at the peak of a clip.

    An engine has no step without reference. `change` is how far a step's output is from that of the first row, relative
    to its norm.
    """

    way: str
    reference_pass_ms: float
    step_ms: float
    step_without_reference_ms: float | None
    encode_ms: float
    decode_ms: float
    clip_s: float
    peak_GiB: float | None
    change: float


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to time: model folder or hub id. Default: random weights of Stable Diffusion 1.5 size on a "
            "GPU; elsewhere demo, the small model.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Path | None,
        typer.Option(help="Engine folder of the model, timed beside PyTorch.", metavar="DIR", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Clip size in pixels, such as 768x512, width first. Default: the model's.",
            metavar="WxH",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames. Default: the model's.", min=2, max=81, show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Number of denoising steps. Default: the model's.", min=1, max=500, show_default=False),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to time: auto, cuda, cuda:N, mps or cpu.", metavar="DEVICE")
    ] = "auto",
    precision: Annotated[Precision, typer.Option(help="Precision, as in emt transfer.")] = Precision.AUTO,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Time emt transfer of one clip in two new processes instead, from their start to their end, by phase; "
            "the second finds what the first left in the caches of compilers.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line a row on standard output.")] = False,
) -> None:
    """Time the parts of a clip: plain PyTorch, what `emt transfer` uses here, and an engine if one is named.

    Reading the reference's motion, a guided denoising step with and without reference, encoding and decoding, a whole
    clip, and its peak memory. Times are medians after warming up; the clip is of noise, which takes as long as any.
    """
    from emt.device import Device

    with usage_errors():
        check_device(device)
        given = {name: parse_field(name, value) for name, value in _given(size, frames, steps).items()}
        if engine and not model:
            raise EmtError("--engine needs --model", "Name the model that it was built of.")
    place = Device.open(device, precision.value)
    rows = []
    with _found(model, place) as found, _status(json) as say:
        settings = Settings(**{**parse_defaults(found.defaults), **given})
        found.check("", settings.as_dict())
        if not found.facts.takes_frames(settings.frames):
            allowed = found.facts.allowed_frames()
            raise EmtError(f"--frames is {settings.frames}", f"What is timed is one window: {allowed} frames.")
        named = "random weights" if model is None and place.is_gpu else found.name
        if cold:
            _print_cold(cold_starts(found, settings, place, engine, say), place, named, json)
            return
        for row in _rows(found, place, settings, engine, say):
            rows.append(row)
            if json:
                where = {"device": place.name, "precision": place.precision, "model": named}
                shape = {name: getattr(settings, name) for name in ("width", "height", "frames", "steps", "guidance")}
                typer.echo(json_lines.dumps({**asdict(row), **where, **shape}))
    if not json:
        _print(rows, place, settings)


def cold_starts(
    model: Model, settings: Settings, device: Device, engine: Path | None, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Run `emt transfer` of a clip of noise in new processes, one after another, with caches of their own.

    Args:
        model: The model.
        settings: Of the clip.
        device: To compute on.
        engine: Folder of an engine; None for PyTorch.
        say: Called with what is done.

    Yields:
        The line with which the journal ends each run: seconds since the start of its process, and its phases.

    Raises:
        EmtError: a run failed.
    """
    import os
    import subprocess
    import sys

    import numpy as np

    from emt.video import write_clip
    from emt_cli.batch import journal

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape = (settings.frames, settings.height, settings.width, 3)
        write_clip(folder / "noise.mp4", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), fps=8)
        prompt = model.vocabulary.words[0] if model.vocabulary else "a red car"
        words = ["transfer", str(folder / "noise.mp4"), "--prompt", prompt, "--model", str(model.folder)]
        words += ["--engine", str(engine) if engine else "torch", "--device", device.torch_device]
        for name in ("width", "height", "frames", "steps"):
            words += [f"--{name}", str(getattr(settings, name))]
        words += ["--precision", device.precision, "--cache-dir", str(folder / "cache")]
        caches = {name: str(folder / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        for which in ("first", "second"):
            say(f"the {which} of two runs")
            out = folder / which
            command = [sys.executable, "-m", "emt_cli.app", *words, "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches)
            if done.returncode:
                failed = [line["error"] for line in journal.lines(out) if "error" in line] if out.is_dir() else []
                last = [*failed, *done.stderr.strip().splitlines()[-1:], "it said nothing"][0]
                raise EmtError(f"emt transfer failed: {last}", "Run it by itself: emt transfer --help")
            yield next(line for line in journal.lines(out) if line.get("event") == "run")


def _print_cold(found: Iterable[dict[str, Any]], device: Device, model: str, json: bool) -> None:
    if json:
        for line in found:
            typer.echo(json_lines.dumps({**line, "model": model, "precision": device.precision}))
        return
    lines = list(found)
    from rich.console import Console
    from rich.table import Table

    title = f"emt transfer of one clip, {model} on {device.name}, seconds from the start of the process"
    table = Table("", "first", "caches kept", title=title, title_justify="left", min_width=min(len(title), 100))
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in dict.fromkeys(phase for line in lines for phase in line["phases"]):
        table.add_row(phase, *(f"{line['phases'].get(phase, 0.0):.2f}" for line in lines))
    table.add_row("first clip", *(f"{line['first_clip']:.2f}" for line in lines))
    table.add_row("all", *(f"{line['seconds']:.2f}" for line in lines))
    table.add_row("device busy", *(f"{line.get('device_busy', 0.0):.0%}" for line in lines))
    Console().print(table)


def _given(size: str | None, frames: int | None, steps: int | None) -> dict[str, Any]:
    given: dict[str, Any] = {"frames": frames, "steps": steps}
    if size is not None:
        width, by, height = size.partition("x")
        if not (by and width.isdecimal() and height.isdecimal()):
            raise EmtError(f"--size is {size!r}", "Give width and height, as in 768x512.")
        given |= {"width": width, "height": height}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def _found(name: str | None, device: Device) -> Iterator[Model]:
    """The model, or one of random weights for as long as it is needed."""
    from emt.model_folder import find_model

    if name is not None or not device.is_gpu:
        yield find_model(name, download=True)
        return
    import torch

    from emt.backbone import PUBLISHED, module_of
    from emt_cli.batch.generator import silence_libraries

    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        random = module_of(PUBLISHED, "random_model").random_model(
            Path(folder) / "random", size="sd15", dtype=torch.float16
        )
        yield find_model(str(random), download=False)


@contextmanager
def _status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is being timed."""
    console = stderr_console()
    if quiet or console.quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("loading the model") as status:
        yield lambda text: status.update(text)


def _rows(
    model: Model, device: Device, settings: Settings, engine: Path | None, say: Callable[[str], None]
) -> Iterator[Timings]:
    """Time one way after another; what one does to the layout of the weights, the later ones want, too."""
    from emt.backends.torch import TorchBackend
    from emt_cli.batch.generator import open_pipeline
    from emt_kernels.selection import select

    pipe = open_pipeline(model, device)
    if device.is_gpu:
        select("reference")
    say("timing plain PyTorch")
    pipe.backend = TorchBackend(
        pipe,
        graphs=False,
        fuse_projections=False,
        fuse_residual_adds=False,
        channels_last=False,
        channels_last_vae=False,
    )
    row, truth = _measure("plain PyTorch", pipe, device, settings, None)
    yield row
    if device.is_gpu:
        select("triton" if device.kernels == "triton" else "reference")
    say("timing what emt transfer uses")
    pipe.backend = TorchBackend(pipe)
    yield _measure("torch", pipe, device, settings, truth)[0]
    if engine:
        from emt_cli.batch.session import SessionOptions, open_session
        from emt_engines.build import open_engine

        choice = open_session(SessionOptions(engine=str(engine)), device.torch_device, model=model).engines
        assert choice is not None
        choice.check(settings.width, settings.height, settings.frames, settings.cache_interval)
        found = choice.find(device, settings.width, settings.height, settings.frames)
        assert found is not None  # one that is named is found, or it raises
        say(f"timing the engine {engine}")
        pipe.backend = open_engine(found.folder, found.manifest, pipe)
        yield _measure(found.manifest.backend, pipe, device, settings, truth)[0]


def _measure(
    way: str, pipe: MotionTransfer, device: Device, settings: Settings, truth: Tensor | None
) -> tuple[Timings, Tensor]:
    """Time a way; also the output of its step, which is compared with the first way's."""
    import numpy as np

    shape = (settings.frames, settings.height, settings.width, 3)
    clip = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def make() -> None:
        pipe.generate("", pipe.extract_motion(clip), steps=settings.steps, guidance=settings.guidance)

    peak = None
    if device.is_gpu:  # as for the first clip of a run, before anything else of this way is in memory
        device.start_measuring()
        make()
        peak = device.memory()[1] / 2**30
    pipe.backend.capture_at_once = True  # type: ignore[attr-defined]
    times, output = _parts(pipe, device, settings, clip)
    change = 0.0 if truth is None else ((output - truth).norm() / truth.norm()).item()
    (seconds,) = _seconds(make, device, warm=0, most=1)
    times.setdefault("step_without_reference_ms", None)
    return Timings(way, **times, clip_s=seconds, peak_GiB=peak, change=change), output


def _parts(pipe: MotionTransfer, device: Device, settings: Settings, clip: np.ndarray) -> tuple[dict[str, Any], Tensor]:
    """Times of the parts of a clip, and the output of a step."""
    import torch

    from emt.backends.torch import TorchBackend

    backend, samples, generator = pipe.backend, 1 if settings.guidance == 1 else 2, torch.Generator().manual_seed(0)
    noise = pipe.initial_noise([generator], settings.frames, settings.height, settings.width)
    sample = torch.cat([noise] * samples).to(device.torch_device, pipe.unet.dtype)
    timestep = torch.tensor(601, device=device.torch_device)
    images = torch.from_numpy(clip).to(device.torch_device)
    with torch.no_grad():
        prompts = pipe.encode_prompts([""] * samples)
        text = pipe.unet.encode_text(prompts)
        text.guided = samples == 2
        moved = backend.prepare_motion(pipe.extract_motion(clip).features)
        output = backend.denoise(sample, timestep, text, moved).float().cpu()
        work: dict[str, Callable[[], object]] = {
            "reference_pass_ms": lambda: backend.encode_reference(sample[:1].clone(), timestep[None], prompts[:1]),
            "step_ms": lambda: backend.denoise(sample, timestep, text, moved),
            "encode_ms": lambda: pipe.codec.encode(backend, images, generator),
            "decode_ms": lambda: list(pipe.codec.decode(backend, sample[0])),
        }
        times = {name: 1e3 * median(_seconds(part, device)) for name, part in work.items()}
        if backend.name == TorchBackend.name:
            alone = _seconds(lambda: backend.denoise(sample, timestep, text, None), device)
            times["step_without_reference_ms"] = 1e3 * median(alone)
        return times, output


def _seconds(
    work: Callable[[], object], device: Device, warm: int = 1, most: int = 10, enough: float = 0.5
) -> list[float]:
    """Durations of `most` runs, or of as many as take `enough` seconds."""
    for _ in range(warm):
        work()
    times: list[float] = []
    while not times or (len(times) < most and sum(times) < enough):
        device.synchronize()
        begun = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - begun)
    return times


def _print(rows: list[Timings], device: Device, settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{device.name}, {device.precision}: {settings.frames} frames of {settings.width}x{settings.height}, "
        f"{settings.steps} steps, guidance {settings.guidance:g}"
    )
    table = Table("", *(row.way for row in rows), title=title, title_justify="left", min_width=min(len(title), 100))
    for column in table.columns[1:]:
        column.justify = "right"
    lines: list[tuple[str, Callable[[Timings], str]]] = [
        ("reference pass, ms", lambda row: f"{row.reference_pass_ms:.1f}"),
        ("step with reference, ms", lambda row: f"{row.step_ms:.1f}"),
        ("step without, ms", lambda row: f"{row.step_without_reference_ms or 0:.1f}"),
        ("encode, ms", lambda row: f"{row.encode_ms:.1f}"),
        ("decode, ms", lambda row: f"{row.decode_ms:.1f}"),
        ("clip, s", lambda row: f"{row.clip_s:.2f}"),
        ("peak memory of a clip, GiB", lambda row: "" if row.peak_GiB is None else f"{row.peak_GiB:.2f}"),
        ("change of a step", lambda row: f"{row.change:.1e}"),
    ]
    for name, cell in lines:
        if any(cell(row) for row in rows):
            table.add_row(name, *map(cell, rows))
    Console().print(table)
