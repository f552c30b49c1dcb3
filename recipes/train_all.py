"""All stages in order, from nothing to the model folder and its table; finished stages are not repeated.

    python -m recipes.train_all --out build/small
    torchrun --nproc-per-node 2 -m recipes.train_all --out build/small     # on two GPUs, with twice the batch

About half an hour on one H100 (80 GB): see `MINUTES` for the time of each. The judge that reads the results trains
beside the first stages, as a process of its own on the same GPU (of several, the first). SIGTERM makes the running
stage save what it has.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from recipes import assemble, evaluate_small, render_latents, train_adapter, train_base, train_vae
from recipes.distributed import all_agree, from_rank_0, join, leave, rank, say, wait_for_ranks
from recipes.stage import MINUTES, save_on_signals, stop_requested

STAGES: dict[str, tuple[float, str, Callable[[Sequence[str]], None]]] = {
    "vae": (MINUTES["vae"], "vae/diffusion_pytorch_model.safetensors", train_vae.main),
    "latents": (MINUTES["latents"], "latents.safetensors", render_latents.main),
    "frames": (MINUTES["frames"], "frames.safetensors", lambda a: train_base.main(["frames", *a])),
    "motion": (MINUTES["motion"], "motion.safetensors", lambda a: train_base.main(["motion", *a])),
    "video": (MINUTES["video"], "video.safetensors", lambda a: train_base.main(["video", *a])),
    "adapter": (MINUTES["adapter"], "adapter.safetensors", train_adapter.main),
}
"""Minutes, result and command of each stage."""


COMPILED = {
    "frames": ("recipes.train_base", "frames"),
    "motion": ("recipes.train_base", "motion"),
    "video": ("recipes.train_base", "video"),
    "adapter": ("recipes.train_adapter",),
}
"""Commands of the stages that can be compiled ahead."""


class Compiler:
    """Fills torch.compile's cache for the stages that are left, all at once, while the first ones run.

    A stage whose network does not compile is trained without: `ready` says which do. Of several processes each
    compiles for its own device, whose number is a part of the cache's keys.

    Args:
        out: folder of all stages' results.
        device: where they run.
        commands: module and arguments of each stage that is left and can be compiled ahead.
    """

    def __init__(self, out: Path, device: str, commands: Mapping[str, Sequence[str]]) -> None:
        folder = out / (f"compile-{rank()}" if rank() else "compile")
        folder.mkdir(parents=True, exist_ok=True)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        for name, command in commands.items():
            arguments = ["--out", str(folder), "--device", device, "--compile-only"]
            with (folder / f"{name}.log").open("wb") as log:
                command = [sys.executable, "-m", *command, *arguments]
                self._started[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def ready(self, stage: str) -> bool:
        """Return whether a stage can be compiled, in all processes; waits until it is known."""
        if stage not in self._started:
            return False
        code = self._started[stage].wait()
        say(f"[all] compiling {stage} ended with {code}")
        return all_agree(code == 0)

    def stop(self) -> None:
        """End what is still compiling."""
        for process in self._started.values():
            if process.poll() is None:
                process.terminate()


def start_judge(out: Path, device: str, minutes: float) -> subprocess.Popen[bytes] | None:
    """Train the judge beside the other stages, unless it is there."""
    result = out / "judge.safetensors"
    if result.exists():
        return None
    command = [sys.executable, "-m", "emt.evaluate.train_judge", "train", str(result), "--minutes", str(minutes)]
    with (out / "judge.log").open("wb") as log:
        return subprocess.Popen([*command, "--device", device, "--vae", str(out / "vae")], stdout=log, stderr=log)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet, in all of the given minutes; the evaluation comes on top."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--minutes", type=float, default=sum(s[0] for s in STAGES.values()), help="for all stages left")
    parser.add_argument("--judge-minutes", type=float, default=3.0, help="0 trains none, and nothing is evaluated")
    parser.add_argument("--clips", type=int, default=256, help="of the evaluation, for each of its seeds")
    parser.add_argument("--seeds", type=int, default=3, help="of the evaluation")
    parser.add_argument(
        "--start-from", type=Path, help="model folder to go on from: its autoencoder stays, no frames and motion stages"
    )
    parser.add_argument("--until", choices=(*STAGES, "evaluation"), default="evaluation", help="last stage to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--steps", type=int, help="so many steps of every stage, to try the recipe")
    parser.add_argument("--batch", type=int, help="batch of every stage, in each process, to try the recipe")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the recipe on a CPU")
    o = parser.parse_args(arguments)
    o.out.mkdir(parents=True, exist_ok=True)
    device = join(o.device)
    stages = dict(STAGES)
    further: dict[str, list[str]] = {}
    if o.start_from is not None:
        # A network that sees what moves already learns from cameras that go far, too.
        further = {"latents": ["--swift", "0.5"], "video": ["--start-from", str(o.start_from)]}
        for name in ("vae", "frames", "motion"):
            del stages[name]
        if rank() == 0 and not (o.out / "vae").exists():
            shutil.copytree(o.start_from / "vae", o.out / "vae")
        wait_for_ranks()
    done = {name for name, (_, result, _) in stages.items() if from_rank_0((o.out / result).exists())}
    left = {name: minutes for name, (minutes, _, _) in stages.items() if name not in done}
    scale = o.minutes / max(sum(left.values()), 1e-6)
    common = ["--out", str(o.out), "--device", str(device), "--seed", str(o.seed)]
    common += [f"--{flag}" for flag in ("eager", "tiny") if getattr(o, flag)]
    for flag in ("steps", "batch"):
        common += [f"--{flag}", str(getattr(o, flag))] if getattr(o, flag) is not None else []
    started, judge = time.monotonic(), None
    on_gpu = device.type == "cuda"
    compiler = None
    if on_gpu and not o.eager and o.batch is None:
        compiler = Compiler(o.out, str(device), {name: command for name, command in COMPILED.items() if name in left})
    try:
        for name, (minutes, result, run) in stages.items():
            if name in ("frames", "video") and judge is None and o.judge_minutes and rank() == 0:
                judge = start_judge(o.out, str(device), o.judge_minutes)
            if name in done:
                say(f"[{name}] is done: {o.out / result}")
            else:
                fused = ["--compile"] if compiler is not None and compiler.ready(name) else []
                run([*common, "--minutes", str(minutes * scale), *further.get(name, []), *fused])
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            say(f"[all] {name} ended at {time.monotonic() - started:.0f} s")
            if name == o.until or from_rank_0(stop_requested()):
                break
        first = rank() == 0
        leave()
        if not first:
            return
        tiny = ["--tiny"] if o.tiny else []
        if (o.out / STAGES["adapter"][1]).exists():
            assemble.main(["--out", str(o.out), *tiny])
        if stop_requested():
            return
        if judge is not None and judge.wait() != 0:
            raise SystemExit(f"the judge was not trained: see {o.out / 'judge.log'}")
        if o.until == "evaluation" and o.judge_minutes:
            evaluate_small.main(
                ["--out", str(o.out), "--device", str(device), "--clips", str(o.clips), "--seeds", str(o.seeds), *tiny]
            )
    finally:
        if judge is not None and judge.poll() is None:
            judge.terminate()
        if compiler is not None:
            compiler.stop()
    print(f"[all] {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    save_on_signals()
    main()
