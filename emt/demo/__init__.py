"""The small model that ships with the package: 16 frames of 128×128, the default of `emt transfer`.

Its folder is an ordinary model folder; `README.md` there is its model card. `recipes/` trained it from nothing.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The model folder."""
    return Path(__file__).parent
