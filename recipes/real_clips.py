"""Real clips as references: makes clips that should follow them, measures whether they do, and shows them.

    python -m recipes.real_clips --clips FOLDER --model build/small/model --out build/real
    python -m recipes.real_clips --clips walk.mp4 pan.mp4 --prompts "a red car over the city" --seeds 2 --out build/real

Every reference is played with every prompt and seed. Writes OUT/clips, OUT/pairs.jsonl (for `emt evaluate`),
OUT/real_clips.md, .jsonl and .png. Clips whose motion is mostly the camera's are separated from those of subjects
by their tracked points, and the correlation of global motion is averaged over the former. A clip takes about 20 seconds
on two CPU cores, measuring a pair two seconds of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from emt.contact_sheet import contact_sheet
from emt.errors import EmtError
from emt.evaluate import judge as judges
from emt.evaluate.camera import CURVES, camera_share
from emt.evaluate.pairs import Pair, Row, evaluate_pairs
from emt.evaluate.statistics import mean
from emt.evaluate.tracks import track
from emt.features import Motion
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.video import Clip, is_clip, read_clip, write_clip

PROMPTS = ("a red balloon over the sea", "a white rocket over the mountains")
CAMERA = 0.4
"""Least part of a reference's motion that its camera explains, for the clip to count as one of camera motion.

Clips over uneven ground have about 0.5, of subjects before a camera that follows them 0.3 at most."""
TARGET = 0.7
"""Target of the correlation of global motion where the camera moves."""


@dataclass(frozen=True)
class RealClip:
    """A real clip, as the model sees it."""

    path: Path
    clip: Clip
    motion: Motion
    share: float

    @property
    def kind(self) -> str:
        """Kind of motion: camera or subject."""
        return "camera" if self.share >= CAMERA else "subject"


def find_clips(given: Sequence[Path]) -> list[Path]:
    """The clips that are given, and those in the folders that are given."""
    folders = [path for path in given if path.is_dir() and not is_clip(path)]
    found = [path for path in given if path not in folders]
    found += [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and is_clip(path)]
    if not found:
        raise EmtError(f"there is no clip in {', '.join(map(str, given))}", "Give clips, or a folder of some.")
    return found


def make(
    pipeline: MotionTransferPipeline,
    references: Sequence[RealClip],
    prompts: Sequence[str],
    seeds: int,
    out: Path,
    batch: int,
) -> list[Pair]:
    """Write OUT/clips and OUT/pairs.jsonl."""
    jobs = [(reference, prompt, seed) for reference in references for prompt in prompts for seed in range(seeds)]
    pairs = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        begun = time.perf_counter()
        made = pipeline.generate([p for _, p, _ in part], [r.motion for r, _, _ in part], seed=[s for _, _, s in part])
        seconds = (time.perf_counter() - begun) / len(part)
        for (reference, prompt, seed), frames in zip(part, made, strict=True):
            name = f"{reference.path.stem} {prompts.index(prompt)} {seed}.mp4"
            path = write_clip(out / "clips" / name, frames, reference.clip.fps)
            pairs.append(Pair(reference.path, path, prompt, seconds, record={"seed": seed, "kind": reference.kind}))
        print(f"{len(pairs)} of {len(jobs)} clips, {seconds:.1f} s each", flush=True)
    lines = [
        {
            "reference": str(pair.reference.absolute()),
            "result": str(pair.result.relative_to(out)),
            "prompt": pair.prompt,
            "seconds": pair.seconds,
            **pair.record,
        }
        for pair in pairs
    ]
    (out / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pairs


def show(references: Sequence[RealClip], rows: Sequence[Row]) -> Image.Image:
    """Of each reference its frames, and below those of its results, each with its measures and prompt."""
    blocks = []
    for reference in references:
        blocks.append((f"{reference.path.stem}: {reference.kind}", [reference.clip.frames]))
        for row in rows:
            if row.pair.reference != reference.path or row.error is not None:
                continue
            camera = row.values["camera"]
            label = f"fidelity {row.values['motion_fidelity']:.2f}"
            label += f", camera {camera:.2f}" if camera is not None else ""
            frames = read_clip(row.pair.result, frames=len(reference.clip.frames)).frames
            blocks.append((f"  {label}: {row.pair.prompt}", [frames]))
    return contact_sheet(blocks)


def format_table(references: Sequence[RealClip], rows: Sequence[Row]) -> str:
    """A row for each reference, the mean over its results; and the global motion of all whose camera moves."""
    measures = ("camera", *CURVES, "motion_fidelity", "text_alignment", "temporal_consistency")
    heads = ["camera, Pearson", *(curve.replace("_", " ") for curve in CURVES), "motion fidelity", "text", "temporal"]
    lines = [f"| reference | moves | camera's share | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
    for reference in references:
        own = [row.values for row in rows if row.pair.reference == reference.path and row.error is None]
        found = [mean([values[name] for values in own]) for name in measures]
        cells = [f"{estimate.value:.2f}" if estimate.clips else "–" for estimate in found]
        lines.append(f"| {reference.path.stem} | {reference.kind} | {reference.share:.2f} | {' | '.join(cells)} |")
    moved = [row.values["camera"] for row in rows if row.pair.record["kind"] == "camera" and row.error is None]
    estimate = mean(moved)
    if estimate.clips:
        outcome = "met" if estimate.value >= TARGET else "missed"
        lines += [
            "",
            f"Global motion of {estimate.clips} results of camera clips: {estimate}, target {TARGET}: {outcome}.",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Play real clips with several prompts and seeds; measure and show the results."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="+", required=True, help="clips, or folders of them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="model folder or hub id; the shipped one by default")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--judge", type=Path, default=judges.SHIPPED, help="measures text alignment, if it is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="clips at once: 16 on a GPU, 1 on a CPU", default=None)
    o = parser.parse_args(arguments)
    started = time.monotonic()
    on_gpu = o.device.startswith("cuda")
    paths = find_clips(o.clips)
    folder = find_model(o.model, download=True).folder
    pipeline = load_pipeline(folder, torch.device(o.device), torch.float16 if on_gpu else torch.float32)
    size, frames = (pipeline.config.width, pipeline.config.height), pipeline.config.frames
    references = []
    for path in paths:
        clip = read_clip(path, frames=frames, size=size)
        references.append(RealClip(path, clip, pipeline.extract_motion(clip), camera_share(track(clip.frames))))
    o.out.mkdir(parents=True, exist_ok=True)
    pairs = make(pipeline, references, o.prompts, o.seeds, o.out, o.batch or (16 if on_gpu else 1))
    judge = judges.Judge.load(o.judge, o.device) if o.judge.is_file() else None
    rows = evaluate_pairs(pairs, text_model=judge, workers=os.cpu_count() or 1)
    table = format_table(references, rows)
    print(table)
    (o.out / "real_clips.md").write_text(table + "\n")
    (o.out / "real_clips.jsonl").write_text("".join(json.dumps(row.as_dict()) + "\n" for row in rows))
    show(references, rows).save(o.out / "real_clips.png")
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except EmtError as problem:
        raise SystemExit(f"error: {problem}") from None
