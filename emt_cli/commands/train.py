"""`emt train`: the adapter, on pairs of clips."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt.errors import EmtError, count
from emt.remote import check_on_disk
from emt_cli.messages import NOTE, keep, shows
from emt_cli.messages import console as stderr_console

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_SECONDS = 15.0
_RUN, _STEP = "The run", "A step"


class TrainPrecision(str, Enum):
    """Arithmetic of the network; trained weights are in float32 in any case."""

    FP32 = "fp32"
    BF16 = "bf16"


def train(
    pairs: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder of pairs: a folder for each motion, with clips named <caption>.mp4 (see emt make-pairs).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Output folder of the run.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID", help="Model to train: a model folder, a hub id, or demo.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.", min=1, rich_help_panel=_RUN)] = 50_000,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="latest|FOLDER",
            help="Continue from a checkpoint folder; latest: the newest of RUN, or the beginning if it has none.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed (data order and noise).", min=0, rich_help_panel=_RUN)] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(help="Save a checkpoint every N steps.", min=1, rich_help_panel=_RUN)
    ] = 1000,
    keep: Annotated[int, typer.Option(help="Number of latest checkpoints to keep.", min=1, rich_help_panel=_RUN)] = 3,
    sample_every: Annotated[
        int,
        typer.Option(help="Write a sheet of sample clips every N steps; 0 writes none.", min=0, rich_help_panel=_RUN),
    ] = 1000,
    workers: Annotated[
        int,
        typer.Option(help="Number of processes that decode clips, for each GPU.", min=0, max=64, rich_help_panel=_RUN),
    ] = 4,
    batch_size: Annotated[
        int, typer.Option(help="Pairs per batch, on each GPU.", min=1, max=1024, rich_help_panel=_STEP)
    ] = 1,
    accumulate: Annotated[int, typer.Option(help="Gradient-accumulation steps.", min=1, rich_help_panel=_STEP)] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="AdamW learning rate.", min=0, max=10, rich_help_panel=_STEP)
    ] = 1e-4,
    drop_text: Annotated[
        float, typer.Option(help="Share of captions replaced by the empty prompt.", min=0, max=1, rich_help_panel=_STEP)
    ] = 0.1,
    ema: Annotated[
        float,
        typer.Option(
            help="Decay of the exponential moving average of the weights.", min=0, max=1, rich_help_panel=_STEP
        ),
    ] = 0.9999,
    precision: Annotated[
        TrainPrecision,
        typer.Option(
            help="Precision of the forward pass; bf16 is autocast, trained weights stay in fp32.", rich_help_panel=_STEP
        ),
    ] = TrainPrecision.FP32,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in the backward pass: less memory, more time.",
            rich_help_panel=_STEP,
        ),
    ] = False,
) -> None:
    """Train the motion transfer adapter of a model on pairs of clips with the same motion.

    Writes RUN/model, a model folder for `emt transfer --model`, and RUN/adapter.safetensors; prints the former on
    stdout. On the way: RUN/log.jsonl, RUN/tensorboard, RUN/samples and RUN/checkpoints. Ctrl-C finishes the step and
    saves a checkpoint. On several GPUs: accelerate launch --multi_gpu --num_processes N -m emt_cli.app train …
    """
    if model is None:  # a run takes hours: what it starts from is not to be guessed
        raise typer.BadParameter("--model says what to train: a model folder, a hub id, or demo, the small one")
    check_on_disk(output, "--output")
    import logging

    # The model's warning about long prompts would come at every step.
    logging.getLogger("emt.pipeline").setLevel(logging.ERROR)
    from emt.model_folder import find_model
    from emt.train.run_folder import check_run, find_start

    start = find_start(output, resume)
    check_run(pairs, output, start)
    folder = find_model(model, download=True).folder
    if os.environ.get("RANK", "0") == "0":  # the only process, or the first of several
        _say("loading the model")
    stop = _stop_on_signals()
    import diffusers.utils.logging
    import transformers.utils.logging

    from emt.device import is_out_of_memory
    from emt.train.trainer import Trainer, TrainingSettings

    for library in (diffusers, transformers):  # bars for files that load in a second
        library.utils.logging.disable_progress_bar()
    settings = TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        drop_text=drop_text,
        precision=precision.value,
        gradient_checkpointing=gradient_checkpointing,
        ema_decay=ema,
        seed=seed,
        checkpoint_every=checkpoint_every,
        keep=keep,
        sample_every=sample_every,
        workers=workers,
    )
    try:
        trainer = Trainer(folder, pairs, output, settings, resume=start, say=_say)
        weights = sum(p.numel() for p in trainer.trained.values())
        trainer.say(
            f"{count(len(trainer.dataset.pairs), 'pair')}, {weights:,} trained weights, "
            f"{trainer.accelerator.num_processes} × {trainer.accelerator.device.type}, "
            f"from step {trainer.step} to {steps}"
        )
        with _ProgressReporter(steps, trainer.step, trainer.accelerator.is_main_process) as progress:
            complete = trainer.train(stop, progress.step)
    except OSError as error:
        raise EmtError(
            f"cannot write to {output}: {error.strerror or error}", "Check space and permissions."
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EmtError(
            f"a step of {batch_size} pairs does not fit into memory",
            "Try --gradient-checkpointing, --precision bf16, or a smaller --batch-size with more --accumulate; "
            "--resume latest goes on from a checkpoint.",
        ) from error
    if not complete:
        trainer.say(f"stopped at step {trainer.step}; go on with the same command and --resume latest")
        raise typer.Exit(130)
    if trainer.accelerator.is_main_process:
        typer.echo(os.fsencode(output / "model"))


def _say(text: str) -> None:
    """A line for people, above the bar."""
    keep(text, NOTE)
    if shows(NOTE):
        print(text, file=sys.stderr, flush=True)


def _stop_on_signals() -> Callable[[], bool]:
    """Make the first SIGINT, SIGTERM or SIGHUP only be remembered; a second one ends the process at once.

    Not under a launcher: it passes the terminal's signal on, which may come twice, and ends the process itself.
    """
    import signal

    from emt_cli.executors.interrupts import heeded

    launched = "LOCAL_RANK" in os.environ
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        if not launched:
            _say("stopping after this step; once more to stop at once")
            for each in numbers:
                signal.signal(each, signal.SIG_DFL)

    numbers = heeded()
    for number in numbers:
        signal.signal(number, handle)
    return lambda: bool(came)


class _ProgressReporter:
    """A bar on a terminal, a plain line now and then elsewhere; nothing in processes that are not the first."""

    def __init__(self, steps: int, first: int, shown: bool) -> None:
        self._steps, self._shown = steps, shown
        self._bar: Progress | None = None
        self._printed = -_PLAIN_SECONDS
        if shown and shows(NOTE) and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=stderr_console(),
                redirect_stdout=False,
                redirect_stderr=True,  # what is said meanwhile goes above the bar
            )
            self._task = self._bar.add_task("", total=steps, completed=first, note="")

    def __enter__(self) -> _ProgressReporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, record: dict[str, Any]) -> None:
        """A step has ended."""
        note = f"loss {record['loss']:.4f}  {record['steps_per_second']:.2f} steps/s"
        note += f"  {record['skipped']} skipped" if record["skipped"] else ""
        if self._bar:
            self._bar.update(self._task, completed=record["step"], note=note)
        elif self._shown and (time.monotonic() - self._printed > _PLAIN_SECONDS or record["step"] == self._steps):
            from emt_cli.text import duration

            self._printed = time.monotonic()
            left = duration((self._steps - record["step"]) / record["steps_per_second"])
            _say(f"step {record['step']}/{self._steps}  {note}  {left} left")
