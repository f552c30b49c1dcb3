"""Clips longer than the network's window: what its seams show, by ways to lay windows and to blend them.

    python benchmarks/long_clips.py [--seconds 10] [--clips 2 | --real FOLDER] [--schemes quarter apart …] [--out FILE]

References are rendered: motions of the demo model's training families that swing to and fro, at 8 frames a second, so
that the truth is known for any length; or they are clips of a folder, whole. Each scheme makes each clip twice, with
windows that begin half a stride later in the second, so that the same moments of a reference are once at a seam, where
one window gives way to the next in the first step of the sampler, and once inside a window. Nothing else is compared
with each other: what happens at one moment of a clip is more difficult to follow than what happens at another.

- fidelity: motion fidelity of the 8 frames around a moment, at seams as a share of inside;
- consistency: `emt.evaluate.consistency` of the frame before a moment and the one after, likewise;
- alone: the same at seams as a share of clips of one window around each moment, each by itself (scheme `alone`): what
  the model can do at best, as nothing has to be kept from one window to the next;
- whole: motion fidelity of all frames, where what is not kept is missed;
- looks: share of the seconds in which the judge finds the prompt's subject, colour and scene.

A ratio has the standard error over moments behind it. A result is a line of FILE; what is there is not made again. A
table follows on standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from emt.windows import Reading, Windows

FPS, SWING = 8, 21  # frames a second, and of a swing: as fast as the motions of training's 16 frames
AROUND = 4  # frames before and after a moment that its fidelity is of
INSIDE = 4  # frames from a moment to the nearest seam, at least, if it is inside a window


@dataclass(frozen=True)
class Scheme(Windows):
    """A way to lay windows and to blend them.

    Args:
        frames: of the clip.
        size: of a window.
        overlap: share of each window that is in the next one, too.
        layouts: ways to lay windows, one after the other; 0 for another one in each step.
        middles: features of a frame are those of the window in whose middle it is, whatever window it is denoised in;
            they are so where there is another layout in each step.
        flat: all frames of a window count alike.
        repeated: windows begin with the same noise, its frames shuffled (FreeNoise, Qiu et al. 2023, arXiv 2310.15169).
        dilated: first steps in which a window has every n-th frame, and so shows more of the motion.
        both: in those, there are windows of neighbouring frames, too.
        reach: n, if the clip is long enough.
        reading: share of each window of the reference that is in the next one, too; None for that of the clip.
        offset: frames by which windows begin later.
    """

    overlap: float = 0.25
    layouts: int = 2
    middles: bool = False
    flat: bool = False
    repeated: bool = False
    dilated: int = 0
    both: bool = False
    reach: int = 4
    reading: float | None = None
    offset: int = 0

    @property
    def stride(self) -> int:
        """Frames between the beginnings of windows."""
        return max(1, round(self.size * (1 - self.overlap)))

    def starts(self, shift: int) -> list[int]:
        """Beginnings of the windows of a step."""
        if self.layouts:
            first = (shift % self.layouts * self.stride // self.layouts + self.offset) % self.stride
        else:
            first = (int(self.stride * int(f"{shift:08b}"[::-1], 2) / 256) + self.offset) % self.stride
        last = self.frames - self.size
        return sorted({0, *range(first, last, self.stride), last})

    def laid(self, shift: int) -> list[slice]:
        """Frames of the windows of a step."""
        found = super().laid(shift)
        step = min(self.reach, self.frames // self.size)
        if shift >= self.dilated or step < 2:
            return found
        wide = []
        for first in range(step):
            count = len(range(first, self.frames, step))
            inner = Windows(count, self.size).laid(shift) if count > self.size else [slice(0, self.size)]
            wide += [slice(first + step * w.start, first + step * (w.stop - 1) + 1, step) for w in inner]
        return [*wide, *found] if self.both else wide

    def weights(self) -> list[int]:
        """Weights of a window's frames."""
        return [1] * self.size if self.flat else super().weights()

    def readings(self) -> list[Reading]:
        """Readings of the reference."""
        if self.layouts and not self.middles:
            starts = sorted({start for shift in range(self.layouts) for start in self.starts(shift)})
            return [Reading(start, slice(start, start + self.size), i * self.size) for i, start in enumerate(starts)]
        starts = replace(self, overlap=self.overlap if self.reading is None else self.reading).starts(0)
        ends = [0, *((a + b + self.size) // 2 for a, b in itertools.pairwise(starts)), self.frames]
        return [Reading(start, slice(a, b), a) for start, (a, b) in zip(starts, itertools.pairwise(ends))]

    def features_of(self, part: slice) -> slice:
        """Place in the features where a window's are."""
        return super().features_of(part) if self.layouts and not self.middles else part

    @property
    def seams(self) -> list[int]:
        """Frames that are the first of another window than the one before them, in the first step."""
        return [(a + b + self.size) // 2 for a, b in itertools.pairwise(self.starts(0))]


#: By their names; `quarter` is `emt.windows.Windows`.
SCHEMES: dict[str, dict[str, Any]] = {
    "quarter": {},
    "quarter-fixed": {"layouts": 1},
    "half": {"overlap": 0.5},
    "half-fixed": {"overlap": 0.5, "layouts": 1},
    "quarter-flat": {"flat": True},
    "quarter-repeated": {"repeated": True},
    "three-quarters": {"overlap": 0.75},
    "middles": {"layouts": 0},
    "middles-fixed": {"layouts": 1, "middles": True},
    "middles-half": {"layouts": 0, "overlap": 0.5},
    "middles-read-dense": {"layouts": 0, "reading": 0.875},
    "dilated-1": {"layouts": 0, "dilated": 1},
    "dilated-2-both": {"layouts": 0, "dilated": 2, "both": True},
    "dilated-4-both": {"layouts": 0, "dilated": 4, "both": True},
    "apart": {"overlap": 0.0, "layouts": 1},
    "alone": {},
}


def repeat_noise(pipe: MotionTransferPipeline, size: int, step: int) -> None:
    """Let windows begin with the same noise, its frames shuffled."""
    plain = pipe.initial_noise

    def initial_noise(generators, frames, height, width):  # type: ignore[no-untyped-def]
        noise = plain(generators, frames, height, width)
        for start in range(size, frames, step):
            order = torch.randperm(step, generator=generators[0])
            part = noise[:, :, start - size : start - size + step][:, :, order]
            noise[:, :, start : start + step] = part[:, :, : frames - start]
        return noise

    pipe.initial_noise = initial_noise  # type: ignore[method-assign]


def swinging(frames: np.ndarray, count: int) -> np.ndarray:
    """A clip forwards, backwards, forwards, …, to a number of frames."""
    last = len(frames) - 1
    return frames[last - np.abs(np.arange(count) % (2 * last) - last)]


def moments(count: int) -> list[int]:
    """Frames of a clip around which it is measured."""
    return list(range(2 * AROUND, count - 2 * AROUND + 1, 2))


def at_seams(seams: list[list[int]], places: list[int]) -> Iterator[tuple[int, int, int]]:
    """Index of each moment that is at a seam of one of two layouts and inside a window of the other, and of both."""
    for i, place in enumerate(places):
        away = [min((abs(place - seam) for seam in layout), default=place) for layout in seams]
        for seam, inside in ((0, 1), (1, 0)):
            if away[seam] <= 1 and away[inside] >= min(INSIDE, AROUND):
                yield i, seam, inside


def at_moments(reference: np.ndarray, clip: np.ndarray, places: list[int]) -> dict[str, list[float]]:
    """Fidelity and consistency of a clip around moments of it."""
    parts = [slice(place - AROUND, place + AROUND) for place in places]
    return {
        "fidelity": [motion_fidelity(reference[part], clip[part]) for part in parts],
        "consistency": [temporal_consistency(clip[place - 1 : place + 1]) for place in places],
    }


def alone(reference: np.ndarray, clips: list[np.ndarray], places: list[int], size: int) -> dict[str, list[float]]:
    """`at_moments` of clips of one window around each moment."""
    found = []
    for place, clip in zip(places, clips, strict=True):
        start = window_around(place, len(reference), size)
        found.append(at_moments(reference[start : start + size], clip, [place - start]))
    return {name: [x for measured in found for x in measured[name]] for name in found[0]}


def window_around(place: int, count: int, size: int) -> int:
    """Beginning of a window in whose middle a frame is, as far as the clip goes."""
    return min(max(place - size // 2, 0), count - size)


def looks(judge: Judge, clip: np.ndarray, prompt: str) -> dict[str, float]:
    """Shares of a clip's seconds that show what the prompt says."""
    wanted = read_prompt(prompt, judge.vocabulary)
    assert wanted is not None
    seconds = torch.from_numpy(clip[: len(clip) // FPS * FPS]).permute(0, 3, 1, 2).unflatten(0, (-1, FPS))

    def share(found: torch.Tensor, wanted: int | None) -> float:
        return float((found == torch.tensor(wanted)).double().mean())

    reading = judge.observe(seconds, torch.ones(len(seconds), dtype=torch.long))
    return {
        "subject": share(reading.subject[:, 0].argmax(-1), wanted.subjects[0]),
        "colour": share(reading.colour[:, 0].argmax(-1), wanted.colours[0]),
        "scene": share(reading.scene.argmax(-1), wanted.scene),
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


def make(pipe: MotionTransferPipeline, o: argparse.Namespace, reference: np.ndarray, prompt: str) -> np.ndarray:
    """A clip of a reference."""
    motion = pipe.extract_motion(reference)
    return pipe.generate(prompt, motion, steps=o.steps, scheduler="dpm++", guidance_until=0.5, seed=o.seed)[0]


@contextmanager
def laid_by(pipe: MotionTransferPipeline, scheme: Scheme) -> Iterator[None]:
    """Context manager: windows are those of a scheme."""
    pipe.windows_over = lambda frames, window=None: scheme  # type: ignore[method-assign]
    if scheme.repeated:
        repeat_noise(pipe, scheme.size, scheme.stride)
    try:
        yield
    finally:
        for changed in ("windows_over", "initial_noise"):
            pipe.__dict__.pop(changed, None)


def make_in_windows(
    pipe: MotionTransferPipeline, o: argparse.Namespace, reference: np.ndarray, prompt: str, scheme: Scheme
) -> np.ndarray:
    """A clip of a reference by a scheme."""
    with laid_by(pipe, scheme):
        return make(pipe, o, reference, prompt)


def measure(o: argparse.Namespace, pipe: MotionTransferPipeline, judge: Judge, pool: ProcessPoolExecutor) -> None:
    """Make and measure what is missing in the file; clips are measured while others are made."""
    there = {(r["scheme"], r["frames"], r["clip"], r["steps"], r["seed"]) for r in results(o.out)}
    waiting: list[tuple[dict[str, Any], dict[str, Future[Any]]]] = []
    for name, reference, prompt in cases(o):
        count, size = len(reference), pipe.config.frames
        for chosen in o.schemes:
            if (chosen, count, name, o.steps, o.seed) in there or count <= size:
                continue
            begun = time.monotonic()
            scheme, line = Scheme(count, size, **SCHEMES[chosen]), {"scheme": chosen, "frames": count, "clip": name}
            schemes = [scheme, replace(scheme, offset=scheme.stride // 2)]
            places, seams = moments(count), [each.seams for each in schemes]
            if chosen == "alone":
                starts = [window_around(place, count, size) for place in places]
                clips = [make(pipe, o, reference[start : start + size], prompt) for start in starts]
                futures: dict[str, Future[Any]] = {"moments": pool.submit(alone, reference, clips, places, size)}
            else:
                places = [places[i] for i, _, _ in at_seams(seams, places)]
                clips = [make_in_windows(pipe, o, reference, prompt, each) for each in schemes]
                futures = {
                    "moments": pool.submit(at_moments, reference, clips[0], places),
                    "others": pool.submit(at_moments, reference, clips[1], places),
                    "whole": pool.submit(motion_fidelity, reference, clips[0]),
                }
                line |= {"seams": seams, **looks(judge, clips[0], prompt)}
                show(o, name, chosen, prompt, reference, clips[0])
            seconds = round(time.monotonic() - begun, 1)
            line |= {"places": places, "steps": o.steps, "seed": o.seed, "prompt": prompt, "time": seconds}
            waiting.append((line, futures))
            print(chosen, name, f"{seconds} s", flush=True)
            while waiting and (o.workers == 1 or all(future.done() for future in waiting[0][1].values())):
                keep(o, *waiting.pop(0))
    for line, futures in waiting:
        keep(o, line, futures)


def keep(o: argparse.Namespace, line: dict[str, Any], futures: dict[str, Future[Any]]) -> None:
    """Write a line of results."""
    with o.out.open("a") as file:
        print(json.dumps(line | {name: future.result() for name, future in futures.items()}), file=file)


def show(o: argparse.Namespace, name: str, scheme: str, prompt: str, reference: np.ndarray, clip: np.ndarray) -> None:
    """Write a clip, and a picture of it, where they are wanted."""
    if o.sheet:
        rows = [(f"{prompt}: {part}", [x[frames] for x in (reference, clip)]) for part, frames in halves(len(clip))]
        contact_sheet(rows, frames=2 * FPS, labels=("reference", "result")).save(o.sheet, quality=88)
    if o.keep:
        o.keep.mkdir(parents=True, exist_ok=True)
        both = np.concatenate([reference, clip], axis=2)
        write_clip(o.keep / f"{name} {scheme} {len(clip)}.mp4", both, FPS, metadata={"prompt": prompt})


def halves(count: int) -> list[tuple[str, slice]]:
    """The first and the last half of a clip, and their seconds."""
    middle = count // 2
    return [
        (f"{part.start / FPS:g} to {part.stop / FPS:g} s", part) for part in (slice(0, middle), slice(middle, count))
    ]


def results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


MEASURES = ("fidelity", "consistency")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over moments and clips by scheme and kind, as Markdown."""
    head = ["scheme", "clips", "frames", "moments"]
    head += [f"{name}: seams, inside, ratio" for name in MEASURES] + ["fidelity: seams, alone, ratio"]
    head += ["whole", "subject", "colour", "scene", "seconds"]
    lines = [_row(head), f"|{'---|' * len(head)}"]
    single = {_clip(row): row for row in rows if row["scheme"] == "alone"}
    for group in dict.fromkeys(_group(row) for row in rows if row["scheme"] != "alone"):
        own = [row for row in rows if _group(row) == group]
        pairs = [pair for row in own for pair in _pairs(row, single.get(_clip(row)))]
        means = {name: f"{np.mean([row[name] for row in own]):.3f}" for name in ("whole", *head[-4:-1])}
        cells = [group[0], f"{len(own)} {group[1]}", group[2], str(len(pairs))]
        cells += [_ratio([(p[name][0], p[name][1]) for p in pairs]) for name in MEASURES]
        cells.append(_ratio([(p["fidelity"][0], p["fidelity"][2]) for p in pairs if len(p["fidelity"]) > 2]))
        lines.append(_row([*cells, *means.values(), f"{np.mean([row['time'] for row in own]) / 2:.1f}"]))
    return "\n".join(lines)


def _pairs(row: dict[str, Any], single: dict[str, Any] | None) -> Iterator[dict[str, list[float]]]:
    """Measures of a moment at a seam, inside a window, and of a clip of its own, where there is one."""
    made = (row["moments"], row["others"])
    for i, seam, inside in at_seams(row["seams"], row["places"]):
        found = {name: [made[seam][name][i], made[inside][name][i]] for name in MEASURES}
        if single:
            own = single["places"].index(row["places"][i])
            found = {name: [*values, single["moments"][name][own]] for name, values in found.items()}
        yield found


def _ratio(pairs: list[tuple[float, float]]) -> str:
    """Means of both, and their ratio with its standard error over pairs."""
    if not pairs:
        return ""
    first, second = np.array(pairs).T
    ratio = first.mean() / second.mean()
    error = np.std(first - ratio * second) / second.mean() / len(pairs) ** 0.5
    return f"{first.mean():.3f}, {second.mean():.3f}, **{ratio:.3f}** ± {error:.3f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _clip(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["clip"], row["frames"], row["steps"], row["seed"]


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
    parser.add_argument("--seed", type=int, default=0, help="of prompts, rendered references and clips")
    parser.add_argument("--schemes", nargs="+", default=["quarter"], choices=list(SCHEMES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure clips")
    parser.add_argument("--out", type=Path, default=Path("long_clips.jsonl"))
    parser.add_argument("--keep", type=Path, help="folder for the clips, beside their references")
    parser.add_argument("--sheet", type=Path, help="picture of the last clip, below its reference")
    o = parser.parse_args()
    with ProcessPoolExecutor(o.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        measure(o, load_pipeline(demo.path(), o.device), Judge.load(), pool)
    print(table(results(o.out)))


if __name__ == "__main__":
    main()
