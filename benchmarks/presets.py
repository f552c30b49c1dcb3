"""Choose what --preset fast is: time, motion fidelity and change of clips, for candidates, on a model.

    python benchmarks/presets.py --model MODEL --candidates "exact;fast" --pairs --seeds 8    # what fast loses
    python benchmarks/presets.py --candidates "exact;fast"              # what it takes, at Stable Diffusion 1.5 size
    python benchmarks/presets.py --model MODEL [--references DIR] [--prompts FILE] [--seeds 4] [--output presets.json]

Every candidate makes the same clips, of every reference with every prompt and seed, as the exact one (the model's own
defaults), from the same noise. A row has seconds a clip (median, without reading the reference and after warming up),
motion fidelity against the reference (`emt.evaluate.motion`) with a 95% confidence interval, its loss against the same
clips of the exact one, in percent of their mean, and how far frames are from theirs, relative to their spread. At the
end: the fastest candidate that loses less than 5%. Without --model, weights are random, and three clips of each are
timed: on a GPU of Stable Diffusion 1.5 size, 16 frames of 512×512.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emt.backbones.sd15.random_model import random_model
from emt.backends.torch import TorchBackend
from emt.evaluate.motion import tracklet_fidelity
from emt.evaluate.statistics import mean
from emt.evaluate.tracks import track
from emt.pipeline import load_pipeline
from emt.presets import PRESETS, preset_values
from emt.video import VIDEO_SUFFIXES, read_clip

#: What `MotionTransferPipeline.generate` is given; the names say what differs from the model's defaults.
CANDIDATES: dict[str, dict[str, Any]] = {
    "exact": {},
    **{f"{s} {n}": {"scheduler": s, "steps": n} for s, n in itertools.product(("dpm++", "unipc"), (15, 12, 10, 8))},
    "guidance 0.6": {"guidance_until": 0.6},
    "cache 2": {"cache_interval": 2},
    "cache 3": {"cache_interval": 3},
    **{
        f"{s} {n}, guidance {g}, cache {c}": {
            "scheduler": s,
            "steps": n,
            "guidance_until": g,
            "cache_interval": c,
        }
        for s, n, g, c in itertools.product(("dpm++", "unipc"), (12, 10, 8, 7, 6, 5), (0.8, 0.6, 0.5, 0.34), (1, 2, 3))
    },
    "fast": PRESETS["fast"],
}
#: Most of the motion fidelity that a preset may lose.
LOSS = 0.05
#: Clips of each candidate that are timed without a model.
TIMED = 3


def main() -> None:
    """Measure, print, choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = Path(__file__).parents[1] / "examples"
    parser.add_argument("--model", type=Path, help="model folder; random weights without")
    parser.add_argument("--references", type=Path, default=examples / "references", help="a clip, or a folder of them")
    parser.add_argument("--prompts", type=Path, default=examples / "prompts.txt", help="a prompt a line")
    parser.add_argument("--seeds", type=int, default=2, help="clips of each reference and prompt")
    parser.add_argument("--pairs", action="store_true", help="the first reference with the first prompt, and so on")
    parser.add_argument("--candidates", help="some of them, with semicolons between")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    chosen = options.candidates.split(";") if options.candidates else list(CANDIDATES)
    if unknown := [name for name in chosen if name not in CANDIDATES]:
        parser.error(f"unknown candidates: {unknown}; there are {list(CANDIDATES)}")
    names = ["exact", *(name for name in chosen if name != "exact")]

    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            size = "sd15" if options.device.startswith("cuda") else "tiny"
            dtype = torch.float16 if size == "sd15" else torch.float32
            model = random_model(Path(folder) / "random", size=size, dtype=dtype)
        rows = measure(model, names, options)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    good = [row for row in rows if row["loss"]["value"] is not None and row["loss"]["value"] < LOSS]
    if good:
        best = min(good, key=lambda row: row["seconds"])
        print(f"\nfastest with a loss under {LOSS:.0%}: {best['name']} {CANDIDATES[best['name']]}")


@torch.no_grad()
def measure(model: Path, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a candidate, printed as soon as it is known."""
    dtype = torch.float16 if options.device.startswith("cuda") else torch.float32
    pipe = load_pipeline(model, options.device, dtype)
    size = pipe.config.width, pipe.config.height
    paths = [options.references]
    if options.references.is_dir():
        paths = sorted(path for path in options.references.iterdir() if path.suffix in VIDEO_SUFFIXES)
    prompts = [line.strip() for line in options.prompts.read_text().splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    references = [read_clip(path, frames=pipe.config.frames, size=size).frames for path in paths]
    motions = [pipe.extract_motion(frames) for frames in references]
    trained = options.model is not None
    wanted = [track(frames) for frames in references] if trained else []
    both = zip(range(len(paths)), prompts) if options.pairs else itertools.product(range(len(paths)), prompts)
    jobs = list(itertools.product(both, range(options.seeds)))
    if not trained:
        jobs = jobs[:1] * TIMED
    print(f"{model}: {len(jobs)} clips of {pipe.config.frames} frames of {size[0]}×{size[1]} each")
    print(f"{'':34} {'s/clip':>8}  {'motion fidelity':24} {'loss, %':24} {'change':>8}")
    rows: list[dict[str, Any]] = []
    exact: list[np.ndarray] = []
    baseline = np.array([])
    for name in names:
        values = dict(CANDIDATES[name])
        if name in PRESETS:
            values = preset_values(name, pipe.config.steps)
        pipe.backend = TorchBackend(pipe)
        (i, prompt), _ = jobs[0]
        pipe.generate(prompt, motions[i], **values)
        times, fidelities, changes = [], [], []
        for job, ((i, prompt), seed) in enumerate(jobs):
            begun = time.perf_counter()
            (clip,) = pipe.generate(prompt, motions[i], seed=seed, **values)
            times.append(time.perf_counter() - begun)
            if name == "exact":
                exact.append(clip)
            if trained:
                fidelities.append(tracklet_fidelity(wanted[i], track(clip)))
            truth = exact[job].astype(np.float32)
            changes.append(float(np.linalg.norm(clip - truth) / np.linalg.norm(truth - truth.mean())))
        fidelity = mean(fidelities)
        if name == "exact":
            baseline = np.array(fidelities)
        loss = mean((baseline - fidelities) / np.nanmean(baseline) if trained else [])
        row = {
            "name": name,
            "values": values,
            "seconds": statistics.median(times),
            "fidelity": fidelity.as_dict(),
            "loss": loss.as_dict(),
            "change": statistics.mean(changes),
            "clips": len(jobs),
        }
        rows.append(row)
        percent = f"{100 * loss.value:.1f} [{100 * loss.low:.1f}, {100 * loss.high:.1f}]" if trained else "–"
        print(f"{name:34} {row['seconds']:8.3f}  {fidelity!s:24} {percent:24} {row['change']:8.3f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
