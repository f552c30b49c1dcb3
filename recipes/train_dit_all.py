"""The small diffusion transformer from nothing to its model folder and its table; finished stages are not repeated.

    python -m recipes.train_dit_all --out build/dit --minutes 14
    torchrun --nproc-per-node 2 -m recipes.train_dit_all --out build/dit --minutes 14    # twice the batch
    python -m recipes.train_dit_all --out build/further --minutes 14 --start-from build/dit/model    # going on

`--minutes` are all until the adapter is trained, shared among the stages that are left whenever one begins; the
evaluation comes on top, a minute or two on an H200. SIGTERM makes the running stage
save what it has, and every stage leaves what it has so far every minute (`OUT/<stage>-so-far.safetensors`).
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from emt import demo
from emt.evaluate.judge import SHIPPED
from recipes import evaluate_small, render_latents, train_dit
from recipes.assemble_dit import assemble
from recipes.distributed import from_rank_0, join, leave, rank, say, wait_for_ranks
from recipes.stage import save_on_signals, stop_requested
from recipes.train_all import Compiler

STAGES: dict[str, tuple[float, Callable[[Sequence[str]], None]]] = {
    "latents": (1.6, render_latents.main),
    **{
        name: (defaults.minutes, lambda arguments, name=name: train_dit.main([name, *arguments]))
        for name, defaults in train_dit.DEFAULTS.items()
    },
}
"""Minutes and command of each stage, whose result is OUT/<name>.safetensors."""
FURTHER = {"latents": 1.3, "video": 9.2, "adapter": 3.0}
"""Minutes of the stages of a backbone that goes on from a model: it sees what moves, and has to learn to draw it."""
TOLD = 0.5
"""Share of the clips that such a backbone is told the motion of."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet, in all of the given minutes, and measure what comes out."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    anew, going_on = sum(minutes for minutes, _ in STAGES.values()), sum(FURTHER.values())
    parser.add_argument("--minutes", type=float, help=f"for all stages left ({anew:.3g}, or {going_on:.3g} going on)")
    parser.add_argument("--parts", type=Path, default=demo.path(), help="model folder to share with")
    parser.add_argument(
        "--start-from", type=Path, help="model folder whose backbone to go on from: no frames stage, a new adapter"
    )
    parser.add_argument("--motions", type=int, default=30_000, help="that are rendered")
    parser.add_argument("--clips", type=int, default=256, help="of the evaluation, for each of its seeds; 0 for none")
    parser.add_argument("--seeds", type=int, default=1, help="of the evaluation")
    parser.add_argument("--until", choices=(*STAGES, "evaluation"), default="evaluation", help="last stage to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="no fused kernels: nothing is compiled ahead")
    parser.add_argument("--steps", type=int, help="so many steps of every stage, to try the recipe")
    parser.add_argument("--batch", type=int, help="batch of every stage, to try the recipe")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the recipe on a CPU")
    o = parser.parse_args(arguments)
    o.out.mkdir(parents=True, exist_ok=True)
    device, started = join(o.device), time.monotonic()
    stages = {name: (minutes, run, list[str]()) for name, (minutes, run) in STAGES.items()}
    stages["latents"][2].extend(["--motions", str(o.motions), "--swift", "0.25" if o.start_from is None else "0.5"])
    if o.start_from is not None:
        o.parts = o.start_from
        stages = {name: (minutes, *stages[name][1:]) for name, minutes in FURTHER.items()}
        further = ["--start-from", str(o.start_from), "--reading", "1", "--references", "0.2", "--hold", "0.3"]
        further += ["--told", str(TOLD)]
        stages["video"][2].extend(further)
    for name in train_dit.DEFAULTS.keys() & stages.keys():
        stages[name][2].extend(["--parts", str(o.parts)])
    if rank() == 0 and not (o.out / "vae").exists():
        shutil.copytree(o.parts / "vae", o.out / "vae")
    wait_for_ranks()
    done = {name for name in stages if from_rank_0((o.out / f"{name}.safetensors").exists())}
    left = {name: minutes for name, (minutes, *_) in stages.items() if name not in done}
    whole = o.minutes if o.minutes is not None else sum(left.values())
    common = ["--out", str(o.out), "--device", str(device), "--seed", str(o.seed)]
    common += [f"--{flag}" for flag in ("eager", "tiny") if getattr(o, flag)]
    for flag in ("steps", "batch"):
        common += [f"--{flag}", str(getattr(o, flag))] if getattr(o, flag) is not None else []
    compiler = None
    if device.type == "cuda" and not o.eager and not o.no_compile and o.batch is None:
        commands = {name: ("recipes.train_dit", name) for name in train_dit.DEFAULTS if name in left}
        compiler = Compiler(o.out, str(device), commands)
    try:
        for name, (minutes, run, further) in stages.items():
            if name in done:
                say(f"[{name}] is done: {o.out / name}.safetensors")
            else:
                fused = ["--compile"] if compiler is not None and compiler.ready(name) else []
                spare = from_rank_0(whole - (time.monotonic() - started) / 60)
                share = max(spare, 0.1) * minutes / sum(left.values())
                run([*common, "--minutes", str(share), *further, *fused])
                del left[name]
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            say(f"[all] {name} ended at {time.monotonic() - started:.0f} s")
            if name == o.until or from_rank_0(stop_requested()):
                break
    finally:
        if compiler is not None:
            compiler.stop()
    first = rank() == 0
    leave()
    if not first or not (o.out / "adapter.safetensors").exists():
        return
    size = assemble(o.out, o.out / "model", o.parts, tiny=o.tiny)
    print(f"{o.out / 'model'}: {size / 2**20:.2f} MiB of weights", flush=True)
    if o.until == "evaluation" and o.clips and not stop_requested():
        options = ["--out", str(o.out), "--device", str(device), "--clips", str(o.clips), "--seeds", str(o.seeds)]
        evaluate_small.main([*options, "--judge", str(SHIPPED), *(["--tiny"] if o.tiny else [])])
    print(f"[all] {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    save_on_signals()
    main()
