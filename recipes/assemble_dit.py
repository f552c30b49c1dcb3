"""The model folder of the small diffusion transformer, in half precision, from what the stages wrote.

python -m recipes.assemble_dit --out build/dit
python -m recipes.assemble_dit --out build/dit --adapter no-scaler
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from emt import demo
from emt.pipeline import MotionTransferPipeline
from recipes import networks
from recipes.assemble import save_model
from recipes.dit import SMALL, TINY, SharedParts, make_transformer
from recipes.train_dit import weights_of

LIMIT = 24 * 2**20
"""Bytes that the weights may take, with those that are shared."""
SHIFT = 3.0
"""Shift of the sampler's noise levels towards noise."""


def assemble(
    out: Path,
    folder: Path,
    parts: Path,
    *,
    tiny: bool = False,
    adapter: str = "adapter",
    steps: int = 25,
    guidance: float = 3.0,
) -> int:
    """Write the model folder; returns the bytes of its weights.

    Args:
        out: folder of the stages' results.
        folder: where to write.
        parts: model folder with the autoencoder and text encoder.
        tiny: the stages ran with --tiny.
        adapter: name of the adapter's result.
        steps: default of the model.
        guidance: default of the model.

    Raises:
        ValueError: if the model is larger than it may be.
    """
    path, shared = out / f"{adapter}.safetensors", SharedParts.load(parts)
    with safe_open(str(path), "pt") as file:
        options = json.loads(file.metadata()["options"])
    sizes, clips = (TINY, networks.TINY) if tiny else (SMALL, networks.SMALL)
    model = make_transformer(sizes, shared, options["reference_blocks"], clips.frames, options["reference_neighbours"])
    model.load_state_dict(weights_of(out / "video.safetensors", "transformer") | weights_of(path, "adapter"))
    pipeline = MotionTransferPipeline(
        vae=shared.vae.half(),
        text_encoder=shared.text.half(),
        tokenizer=shared.tokenizer,
        unet=model.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        frames=clips.frames,
        height=clips.side,
        width=clips.side,
        steps=steps,
        guidance=guidance,
        reference_timestep=int(options["reference_timestep"]),
        guided_by_reference=True,
    )
    return save_model(pipeline, folder, LIMIT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write OUT/model, or OUT/model-ADAPTER for another adapter than the usual one."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--parts", type=Path, default=demo.path(), help="model folder to share with")
    parser.add_argument("--adapter", default="adapter", help="name of the adapter's result")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--tiny", action="store_true", help="the stages ran with --tiny")
    o = parser.parse_args(arguments)
    folder = o.out / ("model" if o.adapter == "adapter" else f"model-{o.adapter}")
    size = assemble(o.out, folder, o.parts, tiny=o.tiny, adapter=o.adapter, steps=o.steps, guidance=o.guidance)
    print(f"{folder}: {size / 2**20:.2f} MiB of weights", flush=True)


if __name__ == "__main__":
    main()
