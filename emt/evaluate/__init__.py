"""Measures of a result against its reference and its prompt, behind `emt evaluate`.

Names are loaded on first use, so that importing one measure does not load OpenCV or torch for the others.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Tracklets": "emt.evaluate.tracks",
    "motion_fidelity": "emt.evaluate.motion",
    "CameraMotion": "emt.evaluate.camera",
    "camera_motion": "emt.evaluate.camera",
    "camera_agreement": "emt.evaluate.camera",
    "temporal_consistency": "emt.evaluate.consistency",
    "ImageTextModel": "emt.evaluate.text",
    "appearance_leakage": "emt.evaluate.leakage",
    "Judge": "emt.evaluate.judge",
    "evaluate_truth": "emt.evaluate.truth",
    "judge_floor": "emt.evaluate.truth",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'emt.evaluate' has no attribute {name!r}")
