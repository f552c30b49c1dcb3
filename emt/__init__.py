"""EfficientMT (Cai et al., ICCV 2025): motion transfer with an adapted text-to-video network.

    import emt

    pipe = emt.load_pipeline(emt.demo.path())
    images = pipe("a yellow penguin in the desert", "clip.mp4").frames[0]  # as any pipeline of diffusers

    motion = pipe.extract_motion(emt.read_clip("clip.mp4", size=(128, 128)))
    frames = pipe.generate("a yellow penguin in the desert", motion)[0]
    emt.write_clip("penguin.mp4", frames, fps=8)

Names are loaded on first use, so that `import emt` alone stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emt import demo as demo
    from emt.backbones.sd15.import_weights import import_weights as import_weights
    from emt.errors import EmtError as EmtError
    from emt.features import Motion as Motion
    from emt.pipeline import MotionTransferPipeline as MotionTransferPipeline
    from emt.pipeline import load_pipeline as load_pipeline
    from emt.presets import PRESETS as PRESETS
    from emt.sampling import SCHEDULERS as SCHEDULERS
    from emt.video import Clip as Clip
    from emt.video import probe as probe
    from emt.video import read_clip as read_clip
    from emt.video import write_clip as write_clip

__version__ = "0.1.0"

_EXPORTS = {
    "Clip": "emt.video",
    "EmtError": "emt.errors",
    "Motion": "emt.features",
    "MotionTransferPipeline": "emt.pipeline",
    "PRESETS": "emt.presets",
    "SCHEDULERS": "emt.sampling",
    "demo": "emt",
    "import_weights": "emt.backbones.sd15.import_weights",
    "load_pipeline": "emt.pipeline",
    "probe": "emt.video",
    "read_clip": "emt.video",
    "write_clip": "emt.video",
}

__all__ = [
    "PRESETS",
    "SCHEDULERS",
    "Clip",
    "EmtError",
    "Motion",
    "MotionTransferPipeline",
    "__version__",
    "demo",
    "import_weights",
    "load_pipeline",
    "probe",
    "read_clip",
    "write_clip",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'emt' has no attribute {name!r}")
    module = _EXPORTS[name]
    if module == __name__:
        return importlib.import_module(f"{module}.{name}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
