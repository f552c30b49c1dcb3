"""EfficientMT (Cai et al., ICCV 2025): motion transfer with an adapted text-to-video UNet.

Names are loaded on first use, so that `import emt` alone stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "EmtError": "emt.errors",
    "MotionTransferUNet": "emt.backbones.sd15.unet",
    "MotionFeatures": "emt.backbones.sd15.motion_module",
    "TextFeatures": "emt.backbones.sd15.unet",
    "MotionTransferPipeline": "emt.pipeline",
    "Motion": "emt.pipeline",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'emt' has no attribute {name!r}")
