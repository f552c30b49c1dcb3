"""Samplers at few steps, with and without distilled weights: how well clips follow, on held-out truth.

    python -m recipes.samplers --out build/lcm --model emt/demo
    python -m recipes.samplers --out build/lcm --model emt/demo --lora build/lcm/lcm-lora.safetensors --rows lcm:4 lcm:8

A row is a sampler, or a preset such as `fast`, and its steps, with a guidance scale if it is not its own. Every row
makes the same held-out clips from the same noise. Motion fidelity is that of `emt evaluate`, by tracked points, of the
first clips.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.evaluate.motion import tracklet_fidelity
from emt.evaluate.statistics import mean
from emt.evaluate.tracks import Tracklets, track
from emt.evaluate.truth import Truth, evaluate_truth
from emt.presets import PRESETS
from recipes.evaluate_small import Cases, frames_of, play
from recipes.networks import make_world
from recipes.opening import Measured, measuring_parser

ROWS = (
    "ddim:25",
    *(f"{name}:{steps}" for name in ("ddim", "euler", "dpm++", "unipc", "deis", "euler_a") for steps in (4, 8)),
)
DISTILLED = ("lcm:2", "lcm:4", "lcm:8", "tcd:4", "euler:4:1")
COLUMNS = {
    "displacement": "displacement",
    "position_error": "position, pixels",
    "size": "size",
    "rotation": "rotation",
    "pan_x": "pan x",
    "pan_y": "pan y",
    "zoom": "zoom",
    "roll": "roll",
    "two_displacement": "two subjects",
    "subject": "subject right",
    "colour": "colour right",
    "scene": "scene right",
}


@dataclass(frozen=True)
class SamplerRow:
    """A row of the table: how its clips are made."""

    scheduler: str
    steps: int
    guidance: float | None = None
    distilled: bool = False

    @classmethod
    def parse(cls, text: str, distilled: bool = False) -> SamplerRow:
        """`NAME:STEPS` or `NAME:STEPS:GUIDANCE`."""
        name, steps, *rest = text.split(":")
        return cls(name, int(steps), float(rest[0]) if rest else None, distilled)

    def __str__(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance is not None else ""
        return f"{self.scheduler}, {self.steps} steps{guided}{', LoRA' if self.distilled else ''}"


def format_rows(rows: Sequence[tuple[SamplerRow, Truth, Any, float]]) -> str:
    """The table as Markdown: of each row the measures of the truth, motion fidelity, and seconds a clip."""
    lines = [f"| sampler | {' | '.join(COLUMNS.values())} | motion fidelity | seconds a clip |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for row, truth, fidelity, seconds in rows:
        cells = [f"{truth[name].value:.3f}" for name in COLUMNS]
        lines.append(f"| {row} | {' | '.join(cells)} | {fidelity} | {seconds:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a model with several samplers; writes OUT/NAME.md and .json, after each row."""
    parser = measuring_parser(main.__doc__, "samplers")
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), help="NAME:STEPS or NAME:STEPS:GUIDANCE, of a sampler or preset"
    )
    parser.add_argument("--lora", type=Path, help="distilled weights of the rows that follow")
    parser.add_argument("--distilled", nargs="*", default=list(DISTILLED), help="rows with the LoRA")
    parser.add_argument("--tracked", type=int, default=32, help="clips whose points are tracked")
    o = parser.parse_args(arguments)
    opened = Measured.open(o)
    pipeline = opened.pipeline
    cases = Cases.draw(make_world(opened.device, opened.sizes), o.clips, o.seed)
    rows = [SamplerRow.parse(text) for text in o.rows]
    rows += [SamplerRow.parse(text, distilled=True) for text in o.distilled] if o.lora else []
    done: list[tuple[SamplerRow, Truth, list[Future[float]], float]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        references = [pool.submit(track, frames) for frames in frames_of(cases.references[: o.tracked])]

        def fidelity(reference: Future[Tracklets], clip: Any) -> float:
            return tracklet_fidelity(reference.result(), track(clip))

        def write(made: Sequence[tuple[SamplerRow, Truth, list[Future[float]], float]]) -> str:
            shown = [(row, truth, mean([f.result() for f in found]), seconds) for row, truth, found, seconds in made]
            numbers = {}
            for row, truth, followed, seconds in shown:
                measures = {name: estimate.as_dict() for name, estimate in truth.items()}
                numbers[str(row)] = {"fidelity": followed.as_dict(), "seconds": seconds, **measures}
            table = format_rows(shown)
            opened.write(table, numbers)
            return table

        for row in rows:
            if row.distilled and not pipeline.get_active_adapters():
                pipeline.load_lora_weights(o.lora)
            how = PRESETS.get(row.scheduler, {"scheduler": row.scheduler}) | {"steps": row.steps}
            how |= {} if row.guidance is None else {"guidance": row.guidance}
            play(
                pipeline, cases.references[: o.batch], cases.captions[: o.batch], o.seed, o.batch, **how | {"steps": 2}
            )
            begun = time.monotonic()
            clips = play(pipeline, cases.references, cases.captions, o.seed, o.batch, **how)
            seconds = (time.monotonic() - begun) / o.clips
            truth = evaluate_truth(opened.judge, clips, cases.motions, cases.requested, cases.worn)
            tracked = [pool.submit(fidelity, *pair) for pair in zip(references, frames_of(clips[: o.tracked]))]
            done.append((row, truth, tracked, seconds))
            opened.say(str(row))
            write([entry for entry in done if entry[0] is not row])
        table = write(done)
    print(table, flush=True)


if __name__ == "__main__":
    main()
