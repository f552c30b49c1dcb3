"""`model_index.json` of a model folder of Wan: which parts it has, and the model's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PIPELINE = "WanMotionTransferPipeline"

#: What a clip is made with unless told otherwise; these are Wan 2.1 T2V-1.3B's.
DEFAULTS: dict[str, Any] = {
    "frames": 81,
    "height": 480,
    "width": 832,
    "steps": 50,
    "guidance": 5.0,
    "reference_timestep": 100,
}

_PARTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "AutoTokenizer"],
    "transformer": ["emt.backbones.wan21.transformer", "WanMotionTransferTransformer"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_model_index(folder: Path, **defaults: Any) -> None:
    """Write the file, with defaults of the model that differ from `DEFAULTS`."""
    index = {"_class_name": PIPELINE, **_PARTS, **DEFAULTS, **defaults}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
