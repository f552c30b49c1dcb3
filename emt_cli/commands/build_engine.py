"""`emt build-engine`: compiles a model's network ahead of time, for this machine and for chosen shapes."""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from emt.errors import EmtError
from emt.remote import check_on_disk
from emt_cli.batch.options import Precision, check_device, parse_defaults
from emt_cli.messages import console as stderr_console
from emt_cli.messages import say

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer


class EngineBackend(str, Enum):
    """Compilers of engines."""

    INDUCTOR = "inductor"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    ONNX = "onnx"


def build_engine(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to compile: model folder or hub id. Default: demo, the small model.",
            show_default=False,
            metavar="FOLDER|HUB_ID",
        ),
    ] = None,
    backend: Annotated[EngineBackend, typer.Option(help="Compiler of the engine.")] = EngineBackend.INDUCTOR,
    size: Annotated[
        str | None,
        typer.Option(
            help="Clip sizes in pixels, width first, such as 512x512,768x512; tensorrt also takes a range MIN..MAX. "
            "Default: the model's size.",
            metavar="WxH[,WxH…]",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Number of frames of a clip. Default: the model's.", min=2, max=81, show_default=False),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Number of clips denoised together: N or MIN..MAX.", metavar="N|MIN..MAX")
    ] = "1..4",
    precision: Annotated[
        Precision, typer.Option(help="Precision of the engine; auto is fp16 on a GPU and fp32 on a CPU.")
    ] = Precision.AUTO,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA to merge into the weights: a path or hf:// address; may be repeated.",
            metavar="SOURCE[:SCALE]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to build for: auto, cuda, cuda:N or cpu.", metavar="DEVICE")
    ] = "auto",
    plugin: Annotated[
        bool,
        typer.Option("--plugin/--no-plugin", help="tensorrt: run the temporal integration in emt's own kernel."),
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Engine folder to write. Default: one in the cache, where emt transfer finds it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compile a model's network and VAE ahead of time, for the GPU (or CPU) of this machine and for chosen shapes.

    Prints the engine's folder on standard output; progress is on standard error. `emt transfer` uses a matching engine
    of the cache by itself, or the one that `--engine` names. The engine is compared with PyTorch, and not kept if it
    differs too much; Ctrl-C leaves nothing half-written.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from emt.cache import ContentIndex, default_dir
    from emt.device import Device
    from emt.model_folder import find_model
    from emt_cli.batch.generator import open_pipeline
    from emt_cli.batch.jobs import digest
    from emt_cli.text import printable
    from emt_engines.choice import engines_dir, model_weights
    from emt_engines.manifest import Request, Size
    from emt_engines.registry import check_network, load_builder

    check_on_disk(output, "--output")
    try:
        clips = parse_batch(batch)
        sizes = tuple(Size.parse(text) for text in size.split(",")) if size else ()
        check_device(device)
    except EmtError as error:
        raise typer.BadParameter(f"{error.problem}. {error.hint}") from None
    found = find_model(model, download=True)
    check_network(found.name, found.network, backend.value)
    defaults = parse_defaults(found.defaults)
    width, height = defaults["width"], defaults["height"]
    sizes = sizes or (Size((width, height), (width, height)),)
    for width, height in dict.fromkeys(side for each in sizes for side in (each.least, each.most)):
        found.check_size(width, height)
    if not found.facts.takes_frames(frames := frames or defaults["frames"]):
        allowed = found.facts.allowed_frames()
        raise EmtError(f"frames is {frames}", f"The network of {found.name} takes {allowed} frames at once.")
    target = Device.open(device, precision.value)

    from emt.backbone import SWITCHING, module_of
    from emt.hub import parse_lora
    from emt_engines.build import build_engine as build
    from emt_engines.build import check_target

    loras: list[tuple[Path, float]] = []
    if lora:
        if found.network not in SWITCHING:
            hint = "A LoRA is merged by emt import-weights --lora."
            raise EmtError(f"--lora: not with {found.name}, which is no Stable Diffusion 1.5", hint)
        find_lora = module_of(found.network, "lora").find_lora
        loras = [(find_lora(path), scale) for path, scale in map(parse_lora, lora)]
    request = Request(
        backend=backend.value,
        precision=target.precision,
        device=target.torch_device,
        sizes=sizes,
        frames=frames,
        batch=clips,
        weights=model_weights(found, ContentIndex(default_dir()), loras),
        model=str(found.folder.absolute()) if Path(found.name).is_dir() else found.name,
        loras=tuple(lora or ()),
        plugin=plugin,
    )
    load_builder(backend.value)().check(request)
    name = (
        f"{found.folder.absolute().name}-{backend.value}-{target.precision}-{digest(request.command, target.name)[:8]}"
    )
    folder = output or engines_dir() / name
    check_target(folder)
    console = stderr_console()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("loading the model", total=1.0)

        def progress(what: str, done: float) -> None:
            bars.update(task, description=printable(what), completed=done)
            if not console.is_terminal:
                say(what)

        def prepare(pipe: MotionTransfer) -> None:
            if loras:
                module_of(found.network, "switching").merge_loras(pipe, loras)

        pipe = open_pipeline(found, target, prepare=prepare)
        with insistent_interrupts():
            manifest = build(pipe, request, folder, progress)
    parity = "not verified: this machine cannot run it" if manifest.parity is None else f"parity {manifest.parity:.1e}"
    say(f"built in {manifest.seconds:.0f} s; {parity}")
    typer.echo(os.fsencode(folder))


@contextlib.contextmanager
def insistent_interrupts(seconds: float = 5.0) -> Iterator[None]:
    """Context manager: raise Ctrl-C again every few seconds until it has ended the block.

    A KeyboardInterrupt that comes while Python is in a callback of a compiler's library is reported and dropped there.
    """
    ended, requested, main = threading.Event(), threading.Event(), threading.get_ident()

    def insist() -> None:
        while not ended.wait(seconds):
            # A signal of its own, which also wakes the thread from whatever it waits for, where threads can have one.
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main, signal.SIGINT)
            else:
                _thread.interrupt_main()

    def handle(number: int, frame: FrameType | None) -> None:
        if not requested.is_set():
            requested.set()
            threading.Thread(target=insist, daemon=True).start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)


def parse_batch(text: str) -> tuple[int, int]:
    """The range of `--batch`: `4` or `1..4`.

    Raises:
        EmtError: it is neither, or not within 1 to 16.
    """
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= 16:
        raise EmtError(f"--batch is {text!r}", "Allowed are numbers from 1 to 16 and ranges of them, as in 1..4.")
    return low, high
