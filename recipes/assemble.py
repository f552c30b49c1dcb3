"""Stage 7: the model folder, in half precision, from what the stages wrote.

python -m recipes.assemble --out build/small
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from emt.pipeline import MotionTransferPipeline
from recipes.networks import SMALL, TINY, Sizes, load_vae, load_weights, make_base, make_scheduler, make_unet
from recipes.text import make_tokenizer, name_portably, write_vocabulary

LIMIT = 22.5 * 2**20
"""Bytes that the weights may take; the judge takes what is left of 24 MiB."""


def assemble(
    out: Path, folder: Path, sizes: Sizes = SMALL, *, adapter: str = "adapter", steps: int = 25, guidance: float = 4.0
) -> int:
    """Write the model folder; returns the bytes of its weights.

    Args:
        out: folder of the stages' results.
        folder: where to write.
        sizes: of the networks.
        adapter: name of the adapter's result.
        steps: default of the model.
        guidance: default of the model.

    Raises:
        ValueError: if the small model is larger than it may be.
    """
    base, text = make_base(sizes, out / "video.safetensors")
    path = out / f"{adapter}.safetensors"
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    fusion_blocks = json.loads(metadata["fusion_blocks"])
    unet = make_unet(sizes, fusion_blocks)
    unet.load_state_dict(base.state_dict() | load_weights(path, "adapter"))
    pipeline = MotionTransferPipeline(
        vae=load_vae(out).half(),
        text_encoder=text.half(),
        tokenizer=make_tokenizer(),
        unet=unet.half(),
        scheduler=make_scheduler(),
        frames=sizes.frames,
        height=sizes.side,
        width=sizes.side,
        steps=steps,
        guidance=guidance,
        reference_timestep=int(metadata["reference_timestep"]),
    )
    return save_model(pipeline, folder, LIMIT)


def save_model(pipeline: MotionTransferPipeline, folder: Path, limit: float) -> int:
    """Write a model folder with the words of the rendered world; returns the bytes of its weights.

    Raises:
        ValueError: if the weights are larger than `limit`, in bytes.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    name_portably(folder)
    write_vocabulary(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if size > limit:
        raise ValueError(f"the weights take {size / 2**20:.2f} MiB, allowed are {limit / 2**20} MiB")
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    """Write OUT/model, or OUT/model-ADAPTER for another adapter than the usual one."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--adapter", default="adapter", help="name of the adapter's result")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--tiny", action="store_true", help="the stages ran with --tiny")
    o = parser.parse_args(arguments)
    folder = o.out / ("model" if o.adapter == "adapter" else f"model-{o.adapter}")
    sizes = TINY if o.tiny else SMALL
    size = assemble(o.out, folder, sizes, adapter=o.adapter, steps=o.steps, guidance=o.guidance)
    print(f"{folder}: {size / 2**20:.2f} MiB of weights", flush=True)


if __name__ == "__main__":
    main()
