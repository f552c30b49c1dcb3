"""The small models that ship, each a model folder with its card, `README.md`.

`demo`, here, is of the published method's network; `demo-dit`, in `emt/demo_dit`, is a diffusion transformer of Wan's
kind with the same autoencoder, text encoder and words.
"""

from __future__ import annotations

from pathlib import Path

NAME = "demo"
"""Name in the program of the model that runs where none is named."""
NAMES = {NAME: "demo", "demo-dit": "demo_dit"}
"""Folders in this package by the models' names."""


def path(name: str = NAME) -> Path:
    """A model folder, for `MotionTransferPipeline.from_pretrained`.

    Args:
        name: one of `NAMES`.

    Raises:
        KeyError: it is none.
    """
    return Path(__file__).parents[1] / NAMES[name]
