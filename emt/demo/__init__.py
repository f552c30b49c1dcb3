"""The small model, in the folder of this package; its card is `README.md` there."""

from __future__ import annotations

from pathlib import Path

NAME = "demo"
"""Name of the model in the program."""


def path() -> Path:
    """The model folder, for `MotionTransferPipeline.from_pretrained`."""
    return Path(__file__).parent
