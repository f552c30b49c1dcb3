"""The paper's table and its ablations on the small model: trains the variants that are missing and measures all.

    python -m recipes.ablations --out build/small

needs what the stages before the adapter wrote, the judge, and for the row of the model itself OUT/model. Every variant
is trained for the same number of steps, the full method among them: the comparison is between those. A variant of
450 steps is meant to take about 75 seconds on an H100, and measuring about two minutes; neither was timed. SIGTERM or
Ctrl-C ends after the variant that is being trained, which is trained again the next time; complete ones are kept. With
--compile a step takes 0.6 of the time, but compiling takes more than a minute for each of three networks: worth it
from about 1,600 steps on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from emt.errors import EmtError
from emt.evaluate.consistency import temporal_consistency
from emt.evaluate.judge import Judge, prompt_alignments
from emt.evaluate.motion import tracklet_fidelity
from emt.evaluate.statistics import Estimate, mean
from emt.evaluate.tracks import Tracklets, opencv, track
from emt.evaluate.truth import Truth, evaluate_truth
from emt.pipeline import MotionTransferPipeline
from emt_kernels import selection
from recipes import assemble, train_adapter
from recipes.evaluate_small import Cases, frames_of, play
from recipes.networks import SMALL, TINY, make_world
from recipes.stage import save_on_signals, stop_requested

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "full": ("full method", []),
    "no-scaler": ("without scaler", ["--no-scaler"]),
    "up-block-1": ("reference in up block 1 only", ["--fusion-blocks", "1"]),
    "unfiltered": ("without pair filter", ["--mismatched", "0.3"]),
}
"""Name of the result, row of the table, and arguments of `recipes.train_adapter`."""

COLUMNS = {
    "temporal_consistency": "temporal consistency",
    "text_alignment": "text alignment",
    "motion_fidelity": "motion fidelity",
    "seconds": "seconds a clip",
    "displacement": "object displacement",
    "camera": "camera",
}
"""The columns of the paper's table, and two of the truth's (Pearson)."""

NOTES = """\
Means over {clips} held-out clips, with 95% intervals; steps are those of the adapter's training. Temporal consistency
is by optical flow, text alignment by the judge (mean probability of the subjects, colours and scene of the prompt),
motion fidelity by tracklets (`emt.evaluate.motion`; unrelated motions score about half). Seconds: one clip alone,
reference included, median of {repeats}, on {device}. Displacement and camera: Pearson with the exact truth
(`emt.evaluate.truth`). Up block 1 is the finer of the small model's two levels."""

REPEATS = 5
"""Clips that a row's time is the median of."""


def trained_steps(path: Path) -> int:
    """Steps that an adapter was trained for, 0 if it is not there."""
    if not path.is_file():
        return 0
    with safe_open(str(path), "pt") as file:
        return int((file.metadata() or {}).get("steps", 0))


def train_variants(names: Sequence[str], o: argparse.Namespace) -> None:
    """Train the variants that have not been trained for `o.steps` steps."""
    for name in names:
        path = o.out / f"{name}.safetensors"
        done = trained_steps(path)
        if done == o.steps:
            print(f"[{name}] is done: {path}", flush=True)
        else:
            arguments = ["--out", str(o.out), "--name", name, "--steps", str(o.steps), "--batch", str(o.batch)]
            arguments += ["--device", o.device, "--seed", str(o.seed)]
            arguments += [f"--{flag}" for flag in ("compile", "eager", "tiny") if getattr(o, flag)]
            # The video stage has trained an adapter in full: going on from there would favour the full method.
            train_adapter.main([*arguments, "--from-backbone", *VARIANTS[name][1]])
            gc.collect()
            if o.device.startswith("cuda"):
                torch.cuda.empty_cache()
        if stop_requested():
            raise SystemExit(130)


# ---------------------------------------------------------------------------------------------------------- measures


def start_worker() -> None:
    """A worker has one core, and leaves signals that reach all of a job to the process that started it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    opencv().setNumThreads(1)
    torch.set_num_threads(1)


def _measure(reference: Tracklets, frames: np.ndarray) -> tuple[float, float]:
    """Motion fidelity and temporal consistency of a clip."""
    return tracklet_fidelity(reference, track(frames)), temporal_consistency(frames)


@dataclasses.dataclass
class Variant:
    """A row of the table: a model, and what has been measured of it."""

    name: str
    steps: int
    pipeline: MotionTransferPipeline
    reference: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the sampler
    seconds: list[float] = dataclasses.field(default_factory=list)
    truth: Truth = dataclasses.field(default_factory=dict)
    alignment: list[float | None] = dataclasses.field(default_factory=list)
    tracked: list[Future[tuple[float, float]]] = dataclasses.field(default_factory=list)

    def time_a_clip(self, cases: Cases, repeats: int = REPEATS, **how: Any) -> None:
        """Make single clips, each with its reference, after one to warm up."""
        reference, how = frames_of(cases.references[:1])[0], how | self.options
        for repeat in range(repeats + 1):
            begun = time.perf_counter()
            motion = self.pipeline.extract_motion(reference) if self.reference else None
            self.pipeline.generate(cases.captions[0], motion, **how)
            if repeat:
                self.seconds.append(time.perf_counter() - begun)

    def make_clips(
        self, cases: Cases, judge: Judge, tracklets: Sequence[Future[Tracklets]], pool: Executor, batch: int, **how: Any
    ) -> None:
        """Play the cases, and hand the clips to the judge and to the workers."""
        how |= self.options
        clips = play(self.pipeline, cases.references if self.reference else None, cases.captions, 0, batch, **how)
        pairs = zip(tracklets, frames_of(clips), strict=True)
        self.tracked = [pool.submit(_measure, reference.result(), frames) for reference, frames in pairs]
        self.truth = evaluate_truth(judge, clips, cases.motions, cases.requested, cases.worn)
        self.alignment = prompt_alignments(judge, clips, cases.captions)

    def estimates(self) -> dict[str, Estimate]:
        """All measures: those of `COLUMNS` and the rest of the truth's; waits for the workers."""
        found = [future.result() for future in self.tracked]
        middle = statistics.median(self.seconds)
        return self.truth | {
            "temporal_consistency": mean([consistency for _, consistency in found]),
            "text_alignment": mean(self.alignment),
            "motion_fidelity": mean([fidelity for fidelity, _ in found]),
            "seconds": Estimate(middle, min(self.seconds), max(self.seconds), len(self.seconds)),
        }


def load_rows(names: Sequence[str], o: argparse.Namespace) -> list[Variant]:
    """The models to measure: the backbone, the variants, and the model itself where it is.

    Raises:
        EmtError: if there is none.
    """
    device = torch.device(o.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32

    def load(name: str, folder: Path, adapter: Path) -> Variant:
        pipeline = MotionTransferPipeline.from_pretrained(folder, dtype=dtype).to(device)
        return Variant(name, trained_steps(adapter), pipeline)

    rows = []
    for name in names:
        folder = o.out / f"model-{name}"
        assemble.assemble(o.out, folder, TINY if o.tiny else SMALL, adapter=name)
        rows.append(load(VARIANTS[name][0], folder, o.out / f"{name}.safetensors"))
    model = o.model or o.out / "model"
    if model.is_dir():
        rows.append(load("full method, all steps", model, o.out / "adapter.safetensors"))
    if not rows:
        raise EmtError("There is nothing to measure.", "Train the variants first, without --evaluate-only.")
    return [Variant("backbone without reference", 0, rows[0].pipeline, reference=False), *rows]


@torch.no_grad()
def evaluate(rows: Sequence[Variant], judge: Judge, cases: Cases, o: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of the table by name: the steps of the training, and all measures."""
    how = {"steps": o.sampler_steps}
    for row in rows:  # while nothing else runs
        row.time_a_clip(cases, **how)
    # Workers are started afresh: a fork of a process that has used CUDA cannot go on.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(o.workers, context, initializer=start_worker) as pool:
        tracklets = [pool.submit(track, frames) for frames in frames_of(cases.references)]
        for row in rows:
            row.make_clips(cases, judge, tracklets, pool, o.clips_at_once, **how)
            print(f"[{row.name}] {row.seconds[0]:.2f} s a clip, made and judged", flush=True)
            if stop_requested():
                pool.shutdown(cancel_futures=True)
                raise SystemExit(130)
        return {row.name: {"steps": row.steps} | row.estimates() for row in rows}


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [f"| | steps | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in rows.items():
        cells = [f"{row[column].value:.2f}" if column == "seconds" else str(row[column]) for column in COLUMNS]
        lines.append(f"| {name} | {row['steps'] or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shared_parser(description: str | None, steps: int, clips: int) -> argparse.ArgumentParser:
    """The options that the ablations of every model have, with these defaults of `--steps` and `--clips`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--steps", type=int, default=steps, help="of every variant's training")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step of training")
    parser.add_argument("--clips", type=int, default=clips, help="held-out clips to measure on")
    parser.add_argument("--clips-at-once", type=int, default=128)
    parser.add_argument("--sampler-steps", type=int, help="the model's default if not given")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that track points")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="fuse the network's kernels in training")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph in training")
    parser.add_argument("--tiny", action="store_true", help="the stages ran with --tiny")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = shared_parser(main.__doc__, steps=450, clips=128)
    parser.add_argument("--names", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--model", type=Path, help="for the last row, OUT/model by default")
    parser.add_argument("--judge", type=Path, help="OUT/judge.safetensors by default")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the variants that are there")
    return parser.parse_args(arguments)


def write_rows(out: Path, rows: Mapping[str, Mapping[str, Any]], notes: str = "") -> str:
    """Write OUT/ablations.md, with notes below the table, and OUT/ablations.json; returns the table."""
    table = format_table(rows)
    (out / "ablations.md").write_text(f"{table}\n\n{notes}\n" if notes else f"{table}\n")
    numbers = {
        name: {key: value.as_dict() if isinstance(value, Estimate) else value for key, value in row.items()}
        for name, row in rows.items()
    }
    (out / "ablations.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the variants of the adapter that are missing; write OUT/ablations.md and .json."""
    o = parse(arguments)
    started = time.monotonic()
    # First of all: without a judge the training would be for nothing.
    judge = Judge.load(o.judge or o.out / "judge.safetensors", o.device)
    names = list(o.names)
    if o.evaluate_only:
        names = [name for name in names if (o.out / f"{name}.safetensors").is_file()]
    else:
        train_variants(names, o)
        print(f"[ablations] trained after {time.monotonic() - started:.0f} s", flush=True)
    # Training has selected plain PyTorch.
    selection.select("auto")
    cases = Cases.draw(make_world(torch.device(o.device), TINY if o.tiny else SMALL), o.clips, o.seed)
    rows = evaluate(load_rows(names, o), judge, cases, o)
    device = torch.cuda.get_device_name(o.device) if o.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    print(write_rows(o.out, rows, NOTES.format(clips=o.clips, repeats=REPEATS, device=device)))
    print(f"[ablations] {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    save_on_signals()
    try:
        main()
    except EmtError as problem:
        raise SystemExit(f"error: {problem}") from None
