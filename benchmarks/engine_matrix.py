"""Build, verify and run inductor engines of every kind of request, and print a table of them.

    python benchmarks/engine_matrix.py --folder FOLDER                # all rows; a GPU, some 2 to 3 minutes a row
    python benchmarks/engine_matrix.py --folder FOLDER --rows 1-3     # some of them; the table has all that are done
    python benchmarks/engine_matrix.py --size tiny --device cpu       # toy sizes, to try it

A request has five properties: clips at once, sizes, frames, precision, and whether a LoRA is merged. Rows are chosen
so that any two values of two properties meet in one of them. Each row builds an engine as `emt build-engine` does,
which compares it with eager PyTorch; opens it again; makes, at each of its sizes, as many clips as it takes at once;
and times a step of one clip with classifier-free guidance beside PyTorch's own. What fails is a row, too, and exit
code 1 at the end.

FOLDER keeps the model of random weights, the LoRA, and a line of JSON for each row (rows.jsonl); engines are removed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.switching import merge_loras
from emt.backends.torch import TorchBackend
from emt.errors import EmtError
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt_engines.build import build_engine, open_engine
from emt_engines.fingerprint import weights_of
from emt_engines.manifest import Manifest, Request, Size

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALE = 0.8
"""Of the LoRA."""
STEPS = 2
"""Of the clips that each engine makes."""


@dataclass(frozen=True)
class Combination:
    """A request: clips at once, sizes and the number of frames as `emt build-engine` takes them."""

    batch: str
    sizes: str
    frames: int
    precision: str
    lora: bool


#: Arguments of `random_model`, by size of the network; one level and one layer have every kind of block.
NETWORKS: dict[str, dict[str, Any]] = {
    "sd15": {"size": "sd15", "dtype": torch.float16},
    "tiny": {
        "block_out_channels": (8,),
        "attention_levels": (),
        "attention_heads": 1,
        "motion_attention_heads": 1,
    },
}
#: Values of a request's properties, by size of the network.
VALUES: dict[str, tuple[Sequence[Any], ...]] = {
    "sd15": (("1..4", "1", "4"), ("512x512", "512x512,384x640", "768x512"), (16, 24), ("fp16", "bf16"), (False, True)),
    "tiny": (("1..2", "1", "2"), ("32x32", "32x32,16x48", "48x32"), (4, 6), ("fp32",), (False, True)),
}


def pairwise(values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Combinations in which any two values of two properties meet, found greedily: few, not the fewest.

    Args:
        values: The values of each property.
    """
    products = list(itertools.product(*values))

    def pairs(row: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    missing = set().union(*map(pairs, products))
    chosen = []
    while missing:
        best = max(products, key=lambda row: len(pairs(row) & missing))  # the first of those that are equally good
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def rows(size: str) -> list[Combination]:
    """The requests for a size of the network."""
    return [Combination(*values) for values in pairwise(VALUES[size])]


def write_lora(path: Path, pipe: MotionTransferPipeline) -> Path:
    """A LoRA of rank 4 with random weights for spatial and temporal attentions."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("attn1.to_v.weight", "attention_blocks.0.to_v.weight")):
            module = name.removesuffix(".weight")
            outputs, inputs = parameter.shape
            state[f"{module}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) / inputs**0.5
            state[f"{module}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) / 4
    save_file(state, path)
    return path


def request_of(row: Combination, device: str, model: Path, lora: Path) -> Request:
    """The request of a row."""
    low, _, high = row.batch.partition("..")
    loras = [(lora, SCALE)] if row.lora else []
    return Request(
        backend="inductor",
        precision=row.precision,
        device=device,
        sizes=tuple(map(Size.parse, row.sizes.split(","))),
        frames=row.frames,
        batch=(int(low), int(high or low)),
        weights=weights_of(model, loras),
        model=str(model),
        loras=tuple(f"{file}:{scale}" for file, scale in loras),
    )


@torch.no_grad()
def step_ms(pipe: MotionTransferPipeline, size: Size, frames: int) -> float:
    """Median duration of a step of one clip with classifier-free guidance."""
    (width, height), scale, device = size.least, pipe.vae_scale_factor, pipe.device
    channels = pipe.unet.latent_channels
    shape = (2, channels, frames, height // scale, width // scale)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, pipe.unet.dtype)
    timestep, prompts = torch.tensor(601, device=device), pipe.encode_prompts(["", "a red car"])
    text = pipe.unet.encode_text(prompts)
    features = pipe.backend.encode_reference(sample[:1].clone(), timestep[None], prompts[:1])
    motion = pipe.backend.prepare_motion(features)
    pipe.backend.capture_at_once = True
    times = []
    for _ in range(13):
        _synchronize(device)
        begun = time.perf_counter()
        pipe.backend.denoise(sample, timestep, text, motion)
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[3:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_clips(pipe: MotionTransferPipeline, size: Size, frames: int, count: int) -> None:
    """Make as many clips at once as an engine takes, of one reference.

    Raises:
        EmtError: a clip is of one colour throughout.
    """
    width, height = size.least
    reference = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    motion = pipe.extract_motion(reference)
    made = pipe.generate([f"a red car {i}" for i in range(count)], motion, steps=STEPS, seed=list(range(count)))
    if any(clip.std() < 1 for clip in made):
        raise EmtError(f"a clip of {width}x{height} is of one colour")


def run(row: Combination, model: Path, lora: Path, device: str, folder: Path) -> dict[str, Any]:
    """Build, verify and run the engine of a row; returns what the table shows of it."""
    pipe = load_pipeline(model, "cpu", DTYPES[row.precision])
    request = request_of(row, device, model, lora)
    if row.lora:
        merge_loras(pipe, [(lora, SCALE)])
    pipe = pipe.to(device)
    manifest = build_engine(pipe, request, folder, lambda what, done: print(f"  {what}", file=sys.stderr, flush=True))
    ok, reason = Manifest.read(folder).match(request)
    if not ok:
        raise EmtError(f"the engine does not match its own request: {reason}")
    found = {
        "built_s": manifest.seconds,
        "parity": manifest.parity,
        "MiB": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
    }
    pipe.backend = TorchBackend(pipe)
    found["torch_ms"] = step_ms(pipe, request.sizes[0], row.frames)
    pipe.backend = open_engine(folder, manifest, pipe)
    found["engine_ms"] = step_ms(pipe, request.sizes[0], row.frames)
    for size in request.sizes:
        make_clips(pipe, size, row.frames, request.batch[1])
    return found


def table(records: Iterable[dict[str, Any]]) -> str:
    """Rows in Markdown, a request once, as it went last."""
    last = {(r["network"], r["row"]): r for r in records}
    head = ("clips", "sizes", "frames", "", "LoRA", "built, s", "MiB", "parity", "PyTorch, ms", "engine, ms", "")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in (last[key] for key in sorted(last)):
        cells = [
            record["batch"],
            record["sizes"].replace(",", ", "),
            str(record["frames"]),
            record["precision"],
            "yes" if record["lora"] else "no",
        ]
        if "error" in record:
            cells += ["", "", "", "", "", f"failed: {record['error']}"]
        else:
            ratio = record["engine_ms"] / record["torch_ms"]
            cells += [f"{record['built_s']:.0f}", f"{record['MiB']:.1f}", f"{record['parity']:.1e}"]
            cells += [f"{record['torch_ms']:.1f}", f"{record['engine_ms']:.1f}", f"{ratio:.3f} of PyTorch's"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen(text: str | None, count: int) -> list[int]:
    """Numbers of rows, from 1 on, of `--rows`: `3`, `1-4`, `1,5-6`; all if it is not given."""
    numbers: list[int] = []
    for part in text.split(",") if text else [f"1-{count}"]:
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [number for number in numbers if 1 <= number <= count]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; prints the table. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the model and rows.jsonl; default: a temporary one")
    parser.add_argument("--rows", help="numbers of rows, as in 1-3,7; default: all")
    parser.add_argument("--size", choices=list(VALUES), default="sd15", help="of the network")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        return measure(options, options.folder or Path(temporary))


def measure(options: argparse.Namespace, work: Path) -> int:
    """Run the rows in a folder."""
    model, lora, log = work / f"model-{options.size}", work / f"lora-{options.size}.safetensors", work / "rows.jsonl"
    if not model.exists():
        print("making the model", file=sys.stderr, flush=True)
        random_model(model, **NETWORKS[options.size])
    if not lora.exists():
        write_lora(lora, load_pipeline(model))
    requests = rows(options.size)
    failed = False
    for number in chosen(options.rows, len(requests)):
        row = requests[number - 1]
        print(f"row {number} of {len(requests)}: {row}", file=sys.stderr, flush=True)
        record: dict[str, Any] = {"network": options.size, "row": number, **asdict(row)}
        engine = work / f"engine-{number}"
        try:
            record |= run(row, model, lora, options.device, engine)
        except (EmtError, RuntimeError) as error:
            failed = True
            record["error"] = str(error).strip().splitlines()[0]
            print(f"  failed: {error}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(engine, ignore_errors=True)
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(table(json.loads(line) for line in log.read_text().splitlines()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
