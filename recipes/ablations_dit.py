"""Ablations on the small diffusion transformer, in the form of the paper's table.

    python -m recipes.ablations_dit --out build/dit

Rows of two kinds. Options of the model as it is: in which part of the steps its reference is attended to, at which
noise level references are read, how many of their frames a frame sees, and which blocks take them, where the others
were taken out after training. And variants of the adapter, each trained for `--steps` on the same frozen backbone:
what training makes up for shows between the two. Results are written after every row; SIGTERM ends after the running
one. `--names` chooses rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from emt import demo
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.evaluate.judge import SHIPPED, Judge
from emt.evaluate.tracks import track
from emt.pipeline import MotionTransferPipeline
from emt_kernels import selection
from recipes import assemble_dit, train_dit
from recipes.ablations import Variant, shared_parser, start_worker, trained_steps, write_rows
from recipes.dit import REFERENCE_TIMESTEP, SMALL, TINY
from recipes.evaluate_small import Cases, frames_of
from recipes.networks import SMALL as CLIPS
from recipes.networks import TINY as TINY_CLIPS
from recipes.networks import make_world
from recipes.stage import save_on_signals, stop_requested


def thirds(blocks: Sequence[int]) -> dict[str, list[int]]:
    """Early, middle and late blocks of those that take the reference."""
    n = len(blocks)
    cuts = [0, max(n // 3, 1), max(n - n // 3, 2), n]
    names = ("early", "middle", "late")
    return {name: list(blocks[a:b]) for name, a, b in zip(names, cuts, cuts[1:], strict=False) if a < b}


def parts_of(blocks: Sequence[int]) -> dict[str, list[int]]:
    """Parts of the blocks that take the reference, by name: thirds, and two in the middle, as five of Wan's thirty."""
    middle = len(blocks) // 2
    return thirds(blocks) | {"two": list(blocks[middle - 1 : middle + 1])}


@dataclasses.dataclass(frozen=True)
class Option:
    """A row of the model as it is, used in another way."""

    row: str
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the pipeline
    neighbours: int | None = None
    blocks: tuple[int, ...] | None = None
    reference: bool = True


def options_of(blocks: Sequence[int]) -> dict[str, Option]:
    """Names and rows of what can be changed without training, for a model with these blocks."""
    named = {
        "full": Option("full method"),
        "backbone": Option("backbone without reference", reference=False),
        "until-0.3": Option("reference in the first 30% of the steps", {"motion_until": 0.3}),
        "until-0.6": Option("reference in the first 60%", {"motion_until": 0.6}),
        "same-frame-only": Option("reference tokens of the same frame alone, not trained so", neighbours=0),
        "one-neighbour-only": Option("of the same frame ±1, not trained so", neighbours=1),
    }
    for name, some in parts_of(blocks).items():
        listed = ", ".join(map(str, some))
        named[f"{name}-only"] = Option(f"{name} blocks ({listed}) alone, not trained so", blocks=tuple(some))
    for level in (10, 100, 200, 400):
        if level != REFERENCE_TIMESTEP:
            row = f"references read at σ = {level / 1000:g}, trained at {REFERENCE_TIMESTEP / 1000:g}"
            named[f"level-{level}"] = Option(row, config={"reference_timestep": level})
    return named


def variants_of(blocks: Sequence[int]) -> dict[str, tuple[str, list[str]]]:
    """Names of trained variants: row of the table, and arguments of `recipes.train_dit adapter`."""
    named = {"short": ("full method", []), "no-scaler": ("without scaler", ["--no-scaler"])}
    parts = {name: list(map(str, some)) for name, some in parts_of(blocks).items()}
    for name, listed in parts.items():
        named[name] = (f"{name} blocks ({', '.join(listed)})", ["--blocks", *listed])
    named |= {
        f"{name}-one-neighbour": (f"{named[name][0]}, same frame ±1", ["--blocks", *parts[name], "--neighbours", "1"])
        for name in ("middle", "two")
    }
    named |= {
        "same-frame": ("reference tokens of the same frame", ["--neighbours", "0"]),
        "one-neighbour": ("of the same frame ±1", ["--neighbours", "1"]),
        "level-400": ("references read at σ = 0.4", ["--reference-timestep", "400"]),
    }
    return {f"trained-{name}": value for name, value in named.items()}


def with_option(folder: Path, option: Option, device: torch.device, dtype: torch.dtype) -> MotionTransferPipeline:
    """The model, changed as an option says."""
    pipeline = MotionTransferPipeline.from_pretrained(folder, dtype=dtype)
    network: WanMotionTransferTransformer = pipeline.unet
    if option.blocks is not None:
        for i, block in enumerate(network.blocks):
            block.adapter = block.adapter if i in option.blocks else None
    network.register_to_config(reference_neighbours=option.neighbours)
    pipeline.register_to_config(**option.config)
    return pipeline.to(device)


def rows_of(names: Sequence[str], blocks: Sequence[int], o: argparse.Namespace) -> Iterator[Variant]:
    """Each row's model, trained first if it is a variant that is not there; ends when a stop is requested."""
    device = torch.device(o.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    options, variants = options_of(blocks), variants_of(blocks)
    steps = trained_steps(o.out / "adapter.safetensors")
    for name in names:
        if stop_requested():
            return
        if name in options:
            option = options[name]
            pipeline = with_option(o.model or o.out / "model", option, device, dtype)
            yield Variant(option.row, steps if option.reference else 0, pipeline, option.reference, option.sampler)
            continue
        row, arguments = variants[name]
        path = o.out / f"{name}.safetensors"
        if trained_steps(path) != o.steps:
            common = ["--out", str(o.out), "--name", name, "--steps", str(o.steps), "--batch", str(o.batch)]
            common += ["--device", o.device, "--seed", str(o.seed), "--parts", str(o.parts)]
            common += [f"--{flag}" for flag in ("compile", "eager", "tiny") if getattr(o, flag)]
            train_dit.main(["adapter", *common, *arguments])
            selection.select("auto")  # training has selected plain PyTorch
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if stop_requested():
                return
        folder = o.out / f"model-{name}"
        assemble_dit.assemble(o.out, folder, o.parts, tiny=o.tiny, adapter=name)
        yield Variant(
            f"{row}, trained so", o.steps, MotionTransferPipeline.from_pretrained(folder, dtype=dtype).to(device)
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = shared_parser(main.__doc__, steps=400, clips=96)
    parser.add_argument("--names", nargs="+", help="rows, in this order; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="clips that a row's time is the median of")
    parser.add_argument("--model", type=Path, help="OUT/model by default")
    parser.add_argument("--parts", type=Path, default=demo.path(), help="model folder to share with")
    parser.add_argument("--judge", type=Path, default=SHIPPED)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the model's options and train and measure variants of its adapter; write OUT/ablations.md and .json."""
    o = parse(arguments)
    started = time.monotonic()
    blocks = (TINY if o.tiny else SMALL).blocks
    names = o.names or [*options_of(blocks), *variants_of(blocks)]
    unknown = set(names) - {*options_of(blocks), *variants_of(blocks)}
    if unknown:
        raise SystemExit(f"no rows are {sorted(unknown)}; there are {[*options_of(blocks), *variants_of(blocks)]}")
    judge = Judge.load(o.judge, o.device)
    cases = Cases.draw(make_world(torch.device(o.device), TINY_CLIPS if o.tiny else CLIPS), o.clips, o.seed)
    how = {} if o.sampler_steps is None else {"steps": o.sampler_steps}
    rows: list[Variant] = []
    with ProcessPoolExecutor(o.workers, multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        tracklets = [pool.submit(track, frames) for frames in frames_of(cases.references)]
        for row in rows_of(names, blocks, o):
            row.time_a_clip(cases, o.repeats, **how)
            row.make_clips(cases, judge, tracklets, pool, o.clips_at_once, **how)
            del row.pipeline
            rows.append(row)
            brief = {name: round(row.truth[name].value, 3) for name in ("displacement", "camera")}
            print(f"[ablations] {row.name}: {brief}, {time.monotonic() - started:.0f} s", flush=True)
            write([row for row in rows if all(future.done() for future in row.tracked)], o)
        table = write(rows, o)
    print(table, flush=True)


def write(rows: Sequence[Variant], o: argparse.Namespace) -> str:
    """Write rows; waits for what is still being measured of them. Returns the table."""
    return write_rows(o.out, {row.name: {"steps": row.steps} | row.estimates() for row in rows})


if __name__ == "__main__":
    save_on_signals()
    main()
