"""Opening of a model that is there, by recipes that train something beside it or measure it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel

from emt.backbones.sd15.unet import MotionTransferUNet
from emt.evaluate import judge as judges
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.train.objective import Objective
from recipes.latents import tokenize
from recipes.networks import SMALL, TINY, Sizes, add_adapter, make_base, make_scheduler, network_weights
from recipes.stage import Stage
from recipes.text import make_tokenizer


@dataclass(frozen=True)
class Frozen:
    """A model folder's networks on a stage's device, in its dtype, of which nothing is trained."""

    unet: MotionTransferUNet  # with the adapter
    encoder: CLIPTextModel
    empty: Tensor  # encoding of the empty prompt, (1, tokens, width)
    objective: Objective

    @classmethod
    def open(cls, stage: Stage, folder: Path) -> Frozen:
        """Read the networks from `folder`."""
        base, encoder = make_base(stage.sizes, folder)
        unet = add_adapter(base, stage.sizes)
        unet.load_state_dict(network_weights(folder))
        unet.requires_grad_(False).to(stage.device, stage.dtype, memory_format=torch.channels_last)
        encoder.requires_grad_(False).to(stage.device, stage.dtype).eval()
        with torch.no_grad():
            empty = encoder(tokenize(make_tokenizer(), [""]).long().to(stage.device))[0].clone()
        return cls(unet, encoder, empty, Objective.from_scheduler(make_scheduler(), stage.device))


def measuring_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every recipe that measures a model; `name` is the default of its results'."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--judge", type=Path, default=judges.SHIPPED)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default=name, help="of the results")
    parser.add_argument("--tiny", action="store_true", help="the model is one of the recipes' --tiny")
    return parser


@dataclass(frozen=True)
class Measured:
    """A model, the judge that reads its clips, and where results go."""

    out: Path
    name: str  # of the results
    device: torch.device
    sizes: Sizes
    pipeline: MotionTransferPipeline
    judge: judges.Judge
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, options: argparse.Namespace) -> Measured:
        """Read model and judge by the options of `measuring_parser`; in half precision on a GPU."""
        started, device = time.monotonic(), torch.device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        pipeline = load_pipeline(options.model, device, dtype)
        judge = judges.Judge.load(options.judge, device)
        sizes = TINY if options.tiny else SMALL
        return cls(options.out, options.name, device, sizes, pipeline, judge, started)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.started:.0f} s: {text}", flush=True)

    def write(self, table: str, numbers: Mapping[str, Any]) -> None:
        """Write OUT/NAME.md and OUT/NAME.json."""
        (self.out / f"{self.name}.md").write_text(table + "\n")
        (self.out / f"{self.name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
