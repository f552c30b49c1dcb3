"""Gains of pans: how far those of footage-like references go in a model's clips, on held-out footage.

    python -m recipes.pans --out build/pans --model emt/demo

References look like footage of textures that no training drew, and their cameras pan, as often far as near. A gain is
the slope of the result's pan over the reference's, frame by frame: 1 is as far. The camera of results is found by
aligning frames (`Judge.observe`) and, with OpenCV, by tracked points as well, as `emt evaluate` finds it; the floor is
what they find in renders that play the motion exactly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from emt.evaluate.truth import camera_curves
from emt.synthetic.motions import CAMERA_FAMILIES, HELD_OUT_CAMERA_FAMILIES, Motions
from emt.synthetic.renderer import World
from emt.synthetic.scenes import SCENES
from recipes.evaluate_small import play
from recipes.opening import Measured, measuring_parser

FOOTAGE_SEED = 1
"""Seed of textures that no training draws: training's is 0."""
KINDS = ("footage", "rendered", "floor")
"""Kinds of references, and renders that play the motion exactly."""
LEAST = 4.0
"""Pixels of 128 that a pan spans at least, for its axis to be compared."""
_FAMILIES = CAMERA_FAMILIES + HELD_OUT_CAMERA_FAMILIES


def panning(motions: Motions) -> Tensor:
    """Which clips have cameras that pan: (n,) bool."""
    names = [i for i, name in enumerate(_FAMILIES) if name.startswith("pan") or name in ("circle", "drift")]
    return torch.isin(motions.camera_family, torch.tensor(names, device=motions.camera_family.device))


def draw_pans(world: World, clips: int, generator: torch.Generator) -> Motions:
    """So many motions whose cameras pan, half of them of families that training never draws."""
    parts: list[Motions] = []
    for held_out in (False, True):
        wanted, found = clips // 2 + (clips % 2) * held_out, 0
        while found < wanted:
            drawn = world.motions(64, generator, held_out=held_out, two_subjects=0.0, camera=1.0, swift=0.7)
            chosen = drawn[panning(drawn)][: wanted - found]
            parts.append(chosen)
            found += len(chosen)
    names = ("position", "scale", "rotation", "subjects", "camera", "family", "camera_family", "attached")
    return Motions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def agreement(true: Tensor, found: Tensor, seed: int = 0) -> dict[str, float]:
    """Correlation and gain of one curve of clips whose reference spans enough, with a 95% interval of the gain.

    Args:
        true: (n, frames) of the references, pixels.
        found: as `true`, of the results.
        seed: of the bootstrap over clips.
    """
    moves = (true.amax(1) - true.amin(1)) > LEAST
    x, y = true[moves].double().numpy(), found[moves].double().numpy()
    if len(x) < 2:
        return {"clips": len(x)}

    def slope(which: np.ndarray) -> float:
        return float((x[which] * y[which]).sum() / (x[which] ** 2).sum())

    draws = np.random.default_rng(seed).integers(0, len(x), (1000, len(x)))
    low, high = np.quantile([slope(draw) for draw in draws], (0.025, 0.975))
    pearson = float(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    # The median share of clips one by one does not hang on those that go furthest.
    each = (x * y).sum(1) / (x**2).sum(1)
    return {
        "clips": len(x),
        "pearson": pearson,
        "gain": slope(np.arange(len(x))),
        "low": float(low),
        "high": float(high),
        "median": float(np.median(each)),
    }


def format_gains(numbers: dict[str, dict[str, float]]) -> str:
    """The table as Markdown."""
    lines = ["| pans | clips | gain | median of clips | Pearson |", "|---|---|---|---|---|"]
    for name, row in numbers.items():
        if "gain" not in row:
            lines.append(f"| {name} | {row['clips']} | – | – | – |")
            continue
        gain = f"{row['gain']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(f"| {name} | {row['clips']} | {gain} | {row['median']:.3f} | {row['pearson']:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure gains of pans; writes OUT/NAME.md and .json, after each kind of reference."""
    parser = measuring_parser(main.__doc__, "pans")
    parser.add_argument("--steps", type=int, help="the model's default if not given")
    parser.add_argument("--tracked", type=int, help="so many clips are read by tracked points, too; all if not given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of references, and the floor")
    o = parser.parse_args(arguments)
    opened = Measured.open(o)
    judge, sizes = opened.judge, opened.sizes
    world = World(
        opened.device,
        sizes.side,
        sizes.frames,
        seed=FOOTAGE_SEED,
        variants=1,
        textures=sizes.textures,
        free_views=False,
    )
    generator = torch.Generator(opened.device).manual_seed(o.seed)
    motions = draw_pans(world, o.clips, generator)
    requested = world.appearances(motions, generator, held_out=False)
    captions = world.captions(requested, motions)
    choice = torch.stack([requested.subject, requested.colour], -1)
    numbers: dict[str, dict[str, float]] = {}

    def measure(kind: str, clips: Tensor) -> None:
        aligned = judge.observe(clips, motions.subjects, choice, align=True).camera.float().cpu()
        found = {"aligned": aligned}
        if o.tracked != 0 and find_spec("cv2"):
            found["tracked"] = camera_curves(clips[: o.tracked], workers=os.cpu_count() or 1)
        for how, curves in found.items():
            for index, name in enumerate(("pan x", "pan y")):
                true = motions.camera[: len(curves), :, index].cpu()
                numbers[f"{kind}, {name}, {how}"] = agreement(true, curves[:, :, index])
        # Which scenes the results show decides how far they go: the same reference is followed over some only.
        for scene, place in enumerate(SCENES):
            shown = (requested.scene == scene).cpu()
            numbers[f"{kind}, {place}, both"] = agreement(
                motions.camera[shown, :, :2].cpu().transpose(1, 2).flatten(0, 1),
                aligned[shown, :, :2].transpose(1, 2).flatten(0, 1),
            )
        opened.write(format_gains(numbers), numbers)
        opened.say(kind)

    for kind, realism in (("footage", 1.0), ("rendered", 0.0)):
        if kind not in o.kinds:
            continue
        worn = world.appearances(motions, generator, held_out=False)
        references = world.render(motions, worn, realism=realism, generator=generator).cpu()
        measure(kind, play(opened.pipeline, references, captions, o.seed, o.batch, steps=o.steps))
    if "floor" in o.kinds:
        measure("floor", world.render(motions, requested, generator=generator).cpu())
    print(format_gains(numbers), flush=True)


if __name__ == "__main__":
    main()
