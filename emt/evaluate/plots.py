"""Plots of an evaluation: how the measures are distributed, and each clip's camera curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emt.errors import EmtError
from emt.evaluate.camera import CURVES, CameraMotion
from emt.evaluate.measures import MEASURES
from emt.evaluate.pairs import Row

_UNITS = ("of the frame", "of the frame", "log", "radians")


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `summary.png` and one `camera-….png` for each measured pair.

    Returns:
        The files written.

    Raises:
        EmtError: matplotlib is not installed, or the folder cannot be written to.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EmtError(
            "matplotlib is needed for plots and is not installed.", "pip install 'emt-cli[evaluate]'"
        ) from error

    def save(figure: Figure, name: str) -> Path:
        figure.savefig(folder / name, dpi=110)
        return folder / name

    measured = [row for row in rows if row.error is None]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [save(_summary(measured), "summary.png")]
        for number, row in enumerate(measured):
            if row.cameras is not None:
                name = re.sub(r"[^\w-]+", "-", row.pair.result.stem)[:60]
                written.append(save(_curves(row, *row.cameras), f"camera-{number:04d}-{name}.png"))
    except OSError as error:
        raise EmtError(f"Plots cannot be written to {folder}: {error.strerror}.", "Choose another folder.") from error
    return written


def _summary(rows: Sequence[Row]):  # type: ignore[no-untyped-def]
    """One strip a measure: every clip a dot, the mean a line."""
    from matplotlib.figure import Figure

    present = [name for name in MEASURES if any(row.values[name] is not None for row in rows)]
    figure = Figure(figsize=(7, 0.9 + 0.7 * max(1, len(present))), layout="constrained")
    axes = figure.subplots(max(1, len(present)), 1, squeeze=False)[:, 0]
    rng = np.random.default_rng(0)
    for axis, name in zip(axes, present):
        values = np.array([value for row in rows if (value := row.values[name]) is not None])
        axis.scatter(values, rng.uniform(-0.3, 0.3, len(values)), s=14, alpha=0.6, edgecolors="none")
        axis.axvline(values.mean(), color="black", linewidth=1)
        axis.set_title(f"{MEASURES[name].title}: {values.mean():.3f} ({len(values)} clips)", fontsize=9, loc="left")
        axis.set_yticks([])
        axis.set_ylim(-0.6, 0.6)
        axis.tick_params(labelsize=8)
    return figure


def _curves(row: Row, reference: CameraMotion, result: CameraMotion):  # type: ignore[no-untyped-def]
    """Pan, zoom and roll of a reference and its result over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axis, index, name, unit in zip(figure.subplots(1, 4), range(4), CURVES, _UNITS):
        axis.plot(reference.curves[:, index], label="reference", color="0.6", linewidth=3)
        axis.plot(result.curves[:, index], label="result", color="tab:red", linewidth=1.5)
        value = row.values[name]
        axis.set_title(f"{name.replace('_', ' ')}: {'at rest' if value is None else f'{value:.2f}'}", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=7)
        low, high = axis.get_ylim()
        if high - low < 0.05:  # noise of a camera at rest should look small
            axis.set_ylim((low + high) / 2 - 0.025, (low + high) / 2 + 0.025)
    figure.axes[0].legend(fontsize=7)
    fidelity = row.values["motion_fidelity"]
    figure.suptitle(f"{row.pair.reference.name} → {row.pair.result.name}   motion fidelity {fidelity:.2f}", fontsize=9)
    return figure
