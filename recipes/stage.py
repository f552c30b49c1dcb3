"""One stage of training: its options, clock, log and loop."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emt.backbones.sd15.unet import MotionTransferUNet
from emt.synthetic.renderer import World
from emt_kernels import selection
from recipes.distributed import from_rank_0, join, rank, ranks
from recipes.networks import SMALL, TINY, make_world
from recipes.optimizer import GraphTrainer, schedule

MINUTES = {"vae": 2.7, "latents": 3.7, "frames": 4.0, "motion": 3.0, "video": 15.0, "adapter": 4.0}
"""Time of each stage."""


def stage_parser(description: str | None, minutes: float, batch: int) -> argparse.ArgumentParser:
    """The options that every stage has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--minutes", type=float, default=minutes, help="time for this stage")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead")
    parser.add_argument("--batch", type=int, default=batch, help="of each process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--compile", action="store_true", help="fuse the network's kernels with torch.compile")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache for this stage and end")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the recipe on a CPU")
    return parser


@dataclass
class Stage:
    """One run of a stage: where and how it computes, its log, and whether a stop was requested."""

    name: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        o = self.options
        self.out: Path = o.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = join(o.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.sizes = TINY if o.tiny else SMALL
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.graph = self.device.type == "cuda" and not o.eager
        # The compiler fuses norms with what stands around them, in both directions; a kernel would be a wall to it.
        selection.select("reference")
        # Networks start alike in all processes, what they are shown differs.
        torch.manual_seed(o.seed)
        self.generator = torch.Generator(self.device).manual_seed(o.seed + 1_000_003 * rank())
        self.started = time.monotonic()
        self._printed = 0.0
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    @functools.cached_property
    def world(self) -> World:
        """The rendered world on this stage's device."""
        return make_world(self.device, self.sizes)

    def share(self, step: int) -> float:
        """The share of the stage that is done, by steps if given, else by the clock; 1 once a stop is requested."""
        if stop_requested():
            return 1.0
        if self.options.steps is not None:
            return step / self.options.steps
        return (time.monotonic() - self.started) / (60 * self.options.minutes)

    def elapsed(self) -> float:
        """Seconds since the start, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - self.started

    def log(self, step: int, force: bool = False, **numbers: float) -> None:
        """Append a line of JSON to OUT/log.jsonl, and print one every 15 seconds, in the first process."""
        if rank():
            return
        seconds = time.monotonic() - self.started
        done = min(max(self.share(step), 1e-6), 1.0)
        record = {"stage": self.name, "step": step, "time": seconds, "left": seconds * (1 / done - 1), **numbers}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n")
        if force or time.monotonic() - self._printed > 15:
            self._printed = time.monotonic()
            shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            print(f"[{self.name}] step {step}, {seconds:.0f} s, {record['left']:.0f} s left: {shown}", flush=True)


_stop = False


def stop_requested() -> bool:
    """Return whether SIGTERM or Ctrl-C came: stages then end as if their time was over, and save."""
    return _stop


def save_on_signals() -> None:
    """Make SIGTERM and Ctrl-C end the running stage in order; a second one ends at once."""

    def handle(number: int, _: Any) -> None:
        global _stop
        _stop = True
        signal.signal(number, signal.SIG_DFL)
        print("stopping: the running stage saves what it has", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def train(
    stage: Stage,
    trainer: GraphTrainer,
    batches: Callable[[], dict[str, Tensor]],
    *,
    warmup: int = 100,
    hold: float = 0.4,
    measure: Callable[[], dict[str, float]] | None = None,
    save: Callable[[], None] | None = None,
) -> None:
    """Run a stage's steps until its time is over or a stop is requested; the averaged weights are then in place.

    What `measure` finds since its last call goes into the log with the losses. `save` is called every
    `save_minutes`, an option of the stage, with the averaged weights in place.

    Of several processes the first has the clock and gets the signals: it sends the others its state every 20 steps,
    since each time they wait for each other, and all keep to the last one.
    """
    if stage.options.compile_only:
        trainer.try_once(batches())
        stage.log(1, force=True, seconds=stage.elapsed())
        return
    step, every = 0, 20 if stage.options.steps is None else 1
    stage.started = time.monotonic()
    share = from_rank_0(stage.share(step))
    since, counted, saved = time.monotonic(), 0, time.monotonic()
    while share < 1:
        trainer.step(batches(), schedule(step, share, warmup, hold))
        step += 1
        if step % every == 0:
            numbers = trainer.read() | (measure() if measure is not None else {})
            now = time.monotonic()
            rate = (step - counted) / (now - since)
            since, counted = now, step
            memory = torch.cuda.max_memory_reserved() / 2**30 if stage.device.type == "cuda" else 0.0
            clips = rate * stage.options.batch * ranks()
            stage.log(step, steps_per_second=rate, clips_per_second=clips, gib=memory, **numbers)
            if save is not None and rank() == 0 and now - saved > 60 * stage.options.save_minutes:
                with trainer.averaged_weights():
                    save()
                saved = time.monotonic()
        if ranks() == 1 or step % every == 0:
            share = from_rank_0(stage.share(step))
    apart = {"apart": trainer.apart()} if ranks() > 1 else {}
    trainer.use_average()
    trainer.close()
    stage.log(step, force=True, seconds=stage.elapsed(), **apart)


@contextlib.contextmanager
def kernel_attention(stage: Stage) -> Iterator[None]:
    """Context manager: temporal attention trains through its kernel, where that runs.

    PyTorch's fused attention is made for long sequences and spends most of a tile on nothing at 16 frames: forward and
    backward, a layer of 48 or 64 clips takes 1.5 to 1.8 ms on an H100 through the kernel (4.4 once, beside compilers),
    3.1 to 5.3 without.
    """
    if stage.device.type != "cuda" or selection.unavailable():
        yield
        return
    with selection.substitutes(temporal_attention=torch.ops.emt.temporal_attention):
        yield


@contextlib.contextmanager
def compiled(stage: Stage, unet: MotionTransferUNet, *passes: str) -> Iterator[None]:
    """Context manager: compile these passes of the network; a training step takes 0.6 of the time (109 for 179 ms).

    Compiling takes one and a half to four minutes; `--compile-only`, in a process of its own, does it ahead of time.
    """
    with _compiled(stage, {unet: passes}):
        yield


@contextlib.contextmanager
def compiled_blocks(stage: Stage, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: compile blocks of one class, each kind of use of them once, however many there are."""
    with _compiled(stage, dict.fromkeys(blocks, ("forward",))):
        yield


@contextlib.contextmanager
def _compiled(stage: Stage, methods: Mapping[nn.Module, Sequence[str]]) -> Iterator[None]:
    if not (stage.options.compile or stage.options.compile_only):
        yield
        return
    # Sizes of the stage before would count as sizes that change, and nothing that was compiled ahead would be found.
    torch.compiler.reset()
    for module, names in methods.items():
        for name in names:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    try:
        yield
    finally:
        for module, names in methods.items():
            for name in names:
                delattr(module, name)
