"""Clips longer than the network's window: what its seams show, by ways to lay windows and to blend them.

    python benchmarks/long_clips.py [--seconds 10] [--clips 2 | --real FOLDER] [--schemes quarter apart …] [--out FILE]

References are rendered: motions of the demo model's training families that swing to and fro, at 8 frames a second, so
that the truth is known for any length. Measured on the clips that the demo model makes of them:

- consistency: `emt.evaluate.consistency` of frames at seams (a step on either side of where one window gives way to
  the next, at the first step of the sampler) as a share of that of the frames between them;
- fidelity: motion fidelity of the 8 frames around a seam, as a share of that of 8 frames between seams. What happens
  there differs, however: the scheme `alone` makes the control, a clip of one window around each seam, by itself, and
  measures the 8 frames in its middle;
- looks: share of the seconds in which the judge finds the prompt's subject, colour and scene.

A result is a line of FILE; what is there is not made again. A table follows on standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emt import demo
from emt.contact_sheet import contact_sheet
from emt.evaluate.consistency import temporal_consistency
from emt.evaluate.judge import Judge, read_prompt
from emt.evaluate.motion import motion_fidelity
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.synthetic.renderer import World
from emt.video import count_frames, is_clip, read_clip, write_clip
from emt.windows import Windows

FPS, SWING = 8, 21  # frames a second, and of a swing: as fast as the motions of training's 16 frames


class Fixed(Windows):
    """The same windows in every step."""

    def starts(self, shift: int) -> list[int]:
        """Beginnings of the windows of a step."""
        return super().starts(0)


class Flat(Windows):
    """All frames of a window count alike."""

    def weights(self) -> list[int]:
        """Weights of a window's frames."""
        return [1] * self.size


class Half(Windows):
    """Windows that overlap by half: half as much time again."""

    @property
    def stride(self) -> int:
        """Frames between the beginnings of windows."""
        return self.size // 2


class HalfFixed(Half, Fixed):
    """Both."""


class HalfFlat(Half, Flat):
    """Both."""


class Apart(Fixed):
    """Windows side by side, each a clip of its own."""

    @property
    def stride(self) -> int:
        """Frames between the beginnings of windows."""
        return self.size


#: Ways to lay windows and to blend them; `quarter` is `emt.windows.Windows`.
SCHEMES = {
    "quarter": Windows,
    "quarter-fixed": Fixed,
    "quarter-flat": Flat,
    "quarter-repeated": Windows,
    "half": Half,
    "half-fixed": HalfFixed,
    "half-flat": HalfFlat,
    "half-repeated": Half,
    "apart": Apart,
    "alone": Windows,
}


def repeat_noise(pipe: MotionTransferPipeline, size: int, step: int) -> None:
    """Let windows begin with the same noise, its frames shuffled (FreeNoise, Qiu et al. 2023, arXiv 2310.15169)."""
    plain = pipe.initial_noise

    def initial_noise(generators, frames, height, width):  # type: ignore[no-untyped-def]
        noise = plain(generators, frames, height, width)
        for start in range(size, frames, step):
            order = torch.randperm(step, generator=generators[0])
            part = noise[:, :, start - size : start - size + step][:, :, order]
            noise[:, :, start : start + step] = part[:, :, : frames - start]
        return noise

    pipe.initial_noise = initial_noise  # type: ignore[method-assign]


def measure_alone(
    pipe: MotionTransferPipeline, reference: np.ndarray, windows: Windows, make: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    """The measures at seams, of clips of one window each, in whose middle the seams are."""
    size, fidelity, consistency = windows.size, [], []
    for _, taken in list(windows.readings())[1:]:
        start = min(max(taken.start - size // 2, 0), len(reference) - size)
        clip, place = make(reference[start : start + size]), taken.start - start
        part = slice(place - 4, place + 4)
        fidelity.append(motion_fidelity(reference[start : start + size][part], clip[part]))
        consistency += [temporal_consistency(clip[i : i + 2]) for i in range(place - 2, place + 1)]
    return {"consistency_at_seams": float(np.mean(consistency)), "fidelity_at_seams": float(np.mean(fidelity))}


def swinging(frames: np.ndarray, count: int) -> np.ndarray:
    """A clip forwards, backwards, forwards, …, to a number of frames."""
    last = len(frames) - 1
    return frames[last - np.abs(np.arange(count) % (2 * last) - last)]


def measure(judge: Judge, reference: np.ndarray, clip: np.ndarray, prompt: str, windows: Windows) -> dict[str, float]:
    """Measures of one clip, as the module describes them."""
    seams = [taken.start for _, taken in windows.readings()][1:]
    steps = np.array([temporal_consistency(clip[i : i + 2]) for i in range(len(clip) - 1)])
    away = np.min([np.abs(np.arange(len(steps)) + 1 - seam) for seam in seams], axis=0)
    middles = [(a + b) // 2 for a, b in itertools.pairwise(seams)]

    def fidelity(places: list[int]) -> float:
        parts = [slice(place - 4, place + 4) for place in places]
        return float(np.mean([motion_fidelity(reference[part], clip[part]) for part in parts]))

    wanted = read_prompt(prompt, judge.vocabulary)
    assert wanted is not None
    seconds = torch.from_numpy(clip[: len(clip) // FPS * FPS]).permute(0, 3, 1, 2).unflatten(0, (-1, FPS))
    reading = judge.observe(seconds, torch.ones(len(seconds), dtype=torch.long))
    return {
        "consistency_at_seams": float(steps[away <= 1].mean()),
        "consistency_inside": float(steps[away >= 3].mean()),
        "fidelity_at_seams": fidelity(seams),
        "fidelity_inside": fidelity(middles),
        "fidelity": motion_fidelity(reference, clip),
        "subject": float((reading.subject[:, 0].argmax(-1) == wanted.subjects[0]).float().mean()),
        "colour": float((reading.colour[:, 0].argmax(-1) == wanted.colours[0]).float().mean()),
        "scene": float((reading.scene.argmax(-1) == wanted.scene).float().mean()),
    }


def cases(o: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, str]]:
    """Name, reference and prompt of each clip to make."""
    world, generator = World(frames=SWING, variants=2, textures=2), torch.Generator().manual_seed(o.seed)
    files = sorted(path for path in o.real.iterdir() if is_clip(path)) if o.real else []
    count = len(files) or o.clips
    motions = world.motions(count, generator, two_subjects=0.0, camera=0.3)
    requested, shown = (world.appearances(motions, generator, held_out=False) for _ in range(2))
    prompts = world.captions(requested, motions)
    if files:
        for path, prompt in zip(files, prompts):
            yield path.stem, read_clip(path, frames=count_frames(path), size=(128, 128)).frames, prompt
        return
    rendered = world.render(motions, shown).permute(0, 1, 3, 4, 2).numpy()
    for i in range(count):
        yield f"rendered {i}", swinging(rendered[i], round(o.seconds * FPS)), prompts[i]


def run(o: argparse.Namespace) -> None:
    """Make and measure what is missing in the file."""
    there = {(r["scheme"], r["frames"], r["clip"], r["steps"]) for r in results(o.out)}
    pipe, judge = load_pipeline(demo.path()), Judge.load()
    for name, reference, prompt in cases(o):
        count = len(reference)
        for scheme in o.schemes:
            if (scheme, count, name, o.steps) in there or count <= pipe.config.frames:
                continue
            windows = SCHEMES[scheme](count, pipe.config.frames)

            def make(reference: np.ndarray, prompt: str = prompt) -> np.ndarray:
                motion = pipe.extract_motion(reference)
                return pipe.generate(prompt, motion, steps=o.steps, scheduler="dpm++", guidance_until=0.5)[0]

            begun = time.monotonic()
            if scheme == "alone":
                clip, found = None, measure_alone(pipe, reference, windows, make)
            else:
                pipe.windows_over = lambda frames, window=None, windows=windows: windows
                if scheme.endswith("repeated"):
                    repeat_noise(pipe, windows.size, windows.stride)
                clip = make(reference)
                for changed in ("windows_over", "initial_noise"):
                    pipe.__dict__.pop(changed, None)
                found = measure(judge, reference, clip, prompt, windows)
            taken = round(time.monotonic() - begun, 1)
            line = {"scheme": scheme, "frames": count, "clip": name, "steps": o.steps, "prompt": prompt, "time": taken}
            with o.out.open("a") as file:
                print(json.dumps(line | found), file=file)
            if o.sheet and clip is not None:
                rows = [(f"{prompt}: {part}", [x[frames] for x in (reference, clip)]) for part, frames in halves(count)]
                contact_sheet(rows, frames=2 * FPS, labels=("reference", "result")).save(o.sheet, quality=88)
            if o.keep and clip is not None:
                both = np.concatenate([reference, clip], axis=2)
                write_clip(o.keep / f"{name} {scheme} {count}.mp4", both, FPS, metadata={"prompt": prompt})


def halves(count: int) -> list[tuple[str, slice]]:
    """The first and the last half of a clip, and their seconds."""
    middle = count // 2
    return [
        (f"{part.start / FPS:g} to {part.stop / FPS:g} s", part) for part in (slice(0, middle), slice(middle, count))
    ]


def results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Means over clips by scheme and kind, as Markdown."""
    measures = ("consistency", "fidelity")
    head = ["scheme", "clips", "frames"]
    head += [f"{name}: seams, between, ratio" for name in measures] + [f"{name}: seams / alone" for name in measures]
    head += ["fidelity", "subject", "colour", "scene"]
    lines = [_row(head), f"|{'---|' * len(head)}"]
    alone = {(r["clip"], r["frames"]): r for r in rows if r["scheme"] == "alone"}
    for group in dict.fromkeys(_group(row) for row in rows if row["scheme"] != "alone"):
        own = [row for row in rows if _group(row) == group]
        mean = {name: float(np.mean([row[name] for row in own])) for name in own[0] if isinstance(own[0][name], float)}
        scheme, kind, frames = group
        cells = [scheme, f"{len(own)} {kind}", frames]
        for name in measures:
            seams, inside = mean[f"{name}_at_seams"], mean[f"{name}_inside"]
            cells.append(f"{seams:.3f}, {inside:.3f}, **{seams / inside:.3f}**")
        pairs = [(row, alone[key]) for row in own if (key := (row["clip"], row["frames"])) in alone]
        for name in (f"{name}_at_seams" for name in measures):
            seams, control = (sum(pair[i][name] for pair in pairs) for i in range(2))
            cells.append(f"**{seams / control:.3f}**" if pairs else "")
        lines.append(_row([*cells, *(f"{mean[name]:.3f}" for name in head[-4:])]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _group(row: dict[str, Any]) -> tuple[str, str, str]:
    rendered = row["clip"].startswith("rendered")
    return row["scheme"], "rendered" if rendered else "real", str(row["frames"]) if rendered else "whole"


def main() -> None:
    """Run as the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of rendered references")
    parser.add_argument("--clips", type=int, default=2, help="rendered references")
    parser.add_argument("--real", type=Path, help="folder of clips, whole, in place of rendered ones")
    parser.add_argument("--steps", type=int, default=8, help="of dpm++, the first half of them guided")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="+", default=["quarter"], choices=list(SCHEMES))
    parser.add_argument("--out", type=Path, default=Path("long_clips.jsonl"))
    parser.add_argument("--keep", type=Path, help="folder for the clips, beside their references")
    parser.add_argument("--sheet", type=Path, help="picture of the last clip, below its reference")
    o = parser.parse_args()
    run(o)
    print(table(results(o.out)))


if __name__ == "__main__":
    main()
