"""Measures of `emt evaluate`: names, titles and one line each that says what a number means. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number that describes a result, alone or beside its reference.

    Attributes:
        title: In tables.
        short: In narrow places.
        meaning: What is measured and how to read it, one sentence.
        better: "more", "less", or "" where neither is better as such.
        main: Whether it belongs on every card of a report.
    """

    title: str
    short: str
    meaning: str
    better: str = "more"
    main: bool = False


_CURVES = {"pan_x": "pan sideways", "pan_y": "pan up and down", "zoom": "zoom", "roll": "roll"}

MEASURES: dict[str, Measure] = {
    "temporal_consistency": Measure(
        "temporal consistency",
        "consistency",
        "How steadily the result shows the same thing from frame to frame, motion aside: 1 is perfectly steady.",
        main=True,
    ),
    "dynamic_degree": Measure(
        "dynamic degree",
        "dynamic",
        "1 if the fastest twentieth of the result's points move far in a quarter of its steps, else 0; over clips, the "
        "share of those in which much moves.",
        "",
    ),
    "text_alignment": Measure(
        "text alignment",
        "text",
        "How much of its prompt is seen in the result; comparable only where the same model has measured it.",
        main=True,
    ),
    "driving_similarity": Measure(
        "driving similarity",
        "likeness",
        "How much the result looks like its reference, frame by frame: 1 is the same; what is high may be leakage.",
        "",
    ),
    "motion_fidelity": Measure(
        "motion fidelity",
        "fidelity",
        "How much the points of the result move as those of the reference do: 1 the same, 0 unrelated or at rest, −1 "
        "opposite.",
        main=True,
    ),
    "path_gain": Measure(
        "gain of paths",
        "paths ×",
        "How far the result's moving points go, as a share of how far the reference's go: 1 is as far.",
        "",
    ),
    "seconds": Measure("time, seconds", "seconds", "Time that making the result took.", "less"),
    "camera": Measure(
        "camera motion, Pearson",
        "camera",
        "Correlation over time of the camera's pan, zoom and roll with the reference's, in equal units; empty where "
        "that rests.",
        main=True,
    ),
    **{
        name: Measure(
            f"camera {name.replace('_', ' ')}, Pearson",
            title,
            f"Correlation over time of the camera's {title} with the reference's; empty where that rests.",
        )
        for name, title in _CURVES.items()
    },
    **{
        f"{name}_gain": Measure(
            f"gain of camera {name.replace('_', ' ')}",
            f"{title} ×",
            f"How far the result's {title} of the camera goes, as a share of the reference's: 1 is as far.",
            "",
        )
        for name, title in _CURVES.items()
    },
    "leakage": Measure(
        "leakage of the reference's appearance",
        "leakage",
        "How much more the result looks like its own reference than like others: 0 not at all, 1 the same look.",
        "less",
        main=True,
    ),
}
"""In the order of tables: first the columns of the paper's, then the rest."""
