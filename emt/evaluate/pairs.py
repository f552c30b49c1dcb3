"""Measures of pairs of clips, a reference and the result made from it, and their summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from emt.errors import EmtError, first_line
from emt.evaluate.camera import CameraMotion, camera_agreement, camera_from_tracklets
from emt.evaluate.consistency import embedding_consistency, temporal_consistency
from emt.evaluate.leakage import appearance, appearance_leakage
from emt.evaluate.measures import MEASURES
from emt.evaluate.motion import dynamic_degree, moving, path_fidelity, path_gain
from emt.evaluate.statistics import Estimate, mean
from emt.evaluate.text import ImageTextModel, text_alignment
from emt.evaluate.tracks import track
from emt.video import probe, read_clip

if TYPE_CHECKING:
    from emt.evaluate.judge import Judge

_SAMPLING = ("fit", "start", "duration", "stride")


@dataclass(frozen=True)
class Pair:
    """A reference and the result made from it.

    Attributes:
        reference, result: The clips.
        prompt: What the result should show, if known.
        seconds: What making the result took, if known.
        sampling: How the reference was read: `fit`, `start`, `duration`, `stride` of `emt.video.read_clip`.
        frames: How many frames to compare; all of the result's if not given.
        record: Further fields to carry into the row, such as the seed.
    """

    reference: Path
    result: Path
    prompt: str | None = None
    seconds: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """The measures of one pair.

    Attributes:
        pair: What was measured.
        values: One value for each of `MEASURES` (`None` where there is none), and the spans of the camera's curves.
        cameras: The reference's and the result's camera motion, for plots.
        error: Why the pair could not be measured; then `values` is empty.
    """

    pair: Pair
    values: dict[str, float | None] = field(default_factory=dict)
    cameras: tuple[CameraMotion, CameraMotion] | None = None
    error: EmtError | None = None
    looks: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        head = {"reference": str(self.pair.reference), "result": str(self.pair.result), "prompt": self.pair.prompt}
        if self.error is not None:
            return {**head, **self.pair.record, "error": self.error.problem}
        finite = {name: value for name, value in self.values.items() if value is not None and np.isfinite(value)}
        return {**head, **self.pair.record, **dict.fromkeys(self.values), **finite}


def evaluate_pairs(
    pairs: Iterable[Pair],
    *,
    text_model: ImageTextModel | Judge | None = None,
    workers: int = 1,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure pairs; one that cannot be read gets a row with its error, and the others go on.

    Args:
        pairs: What to measure.
        text_model: Measures text alignment. An `ImageTextModel` also measures temporal consistency and leakage, by
            its embeddings of frames; otherwise those are measured by optical flow and by colour.
        workers: Threads that read and track clips.
        progress: Called with each row when it is done.

    Raises:
        EmtError: Something that concerns every pair is missing, such as OpenCV.
    """
    from emt.evaluate.tracks import opencv

    opencv()
    prompts: dict[str, Tensor] = {}
    rows = []
    with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for row, clips in _measured(pairs, pool):
            if clips is not None:
                try:
                    _add_appearance(row, *clips, text_model, prompts)
                except Exception as error:
                    row = Row(row.pair, error=_as_read(error))
            rows.append(row)
            if progress is not None:
                progress(row)
    good = [row for row in rows if row.looks is not None]
    looks = [row.looks for row in good if row.looks is not None]
    leaks = appearance_leakage(
        [reference for reference, _ in looks],
        [result for _, result in looks],
        [str(row.pair.reference) for row in good],
    )
    for row, leak in zip(good, leaks):
        row.values["leakage"] = leak
        row.looks = None
    return rows


def _measured(
    pairs: Iterable[Pair], pool: Executor | None
) -> Iterator[tuple[Row, tuple[np.ndarray, np.ndarray] | None]]:
    """Rows with what concerns motion, in order, and the frames that they were measured on."""

    def measure(pair: Pair) -> tuple[Row, tuple[np.ndarray, np.ndarray] | None]:
        try:
            reference, result = read_pair(pair)
            return _measure_motion(pair, reference, result), (reference, result)
        except Exception as error:  # whatever is wrong with one pair, the others are measured
            return Row(pair, error=_as_read(error)), None

    waiting = iter(pairs)
    if pool is None:
        yield from map(measure, waiting)
        return
    # Only a few pairs are read ahead, as their frames are held until they are used.
    ahead = [pool.submit(measure, pair) for pair in islice(waiting, 32)]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(measure, pair) for pair in islice(waiting, 1)]


def _as_read(error: Exception) -> EmtError:
    """An error of one pair as users read it."""
    if isinstance(error, EmtError):
        return error
    return EmtError(f"it cannot be measured: {type(error).__name__}: {first_line(error)}")


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a pair: the result as it is, the reference sampled to the same number and size.

    Returns:
        Two uint8 arrays (frames, height, width, 3).

    Raises:
        EmtError: A clip is missing or damaged, or has fewer than two frames.
    """
    frames = pair.frames or probe(pair.result).frames
    result = read_clip(pair.result, frames=frames).frames
    sampling = {name: pair.sampling[name] for name in _SAMPLING if pair.sampling.get(name) is not None}
    size = (result.shape[2], result.shape[1])
    return read_clip(pair.reference, frames=frames, size=size, **sampling).frames, result


def _measure_motion(pair: Pair, reference: np.ndarray, result: np.ndarray) -> Row:
    first, second = (track(frames) for frames in (reference, result))
    cameras, paths = (camera_from_tracklets(first), camera_from_tracklets(second)), (moving(first), moving(second))
    values: dict[str, float | None] = dict.fromkeys(MEASURES)
    values |= {"motion_fidelity": path_fidelity(*paths), "path_gain": path_gain(*paths), "seconds": pair.seconds}
    values |= {"dynamic_degree": dynamic_degree(second)}
    return Row(pair, values | camera_agreement(*cameras), cameras)


def _add_appearance(
    row: Row,
    reference: np.ndarray,
    result: np.ndarray,
    model: ImageTextModel | Judge | None,
    prompts: dict[str, Tensor],
) -> None:
    """Fill in what concerns the frames' looks: consistency, text alignment, and what leakage is computed from."""
    prompt = row.pair.prompt
    if isinstance(model, ImageTextModel):
        seen, had = model.embed_frames(result), model.embed_frames(reference)
        row.values["temporal_consistency"] = embedding_consistency(seen)
        row.values["driving_similarity"] = float((seen * had).sum(1).mean())
        if prompt is not None:
            if prompt not in prompts:
                prompts[prompt] = model.embed_prompts([prompt])[0]
            row.values["text_alignment"] = text_alignment(seen, prompts[prompt])
        row.looks = tuple(_unit(part.mean(0).cpu().numpy()) for part in (had, seen))  # type: ignore[assignment]
        return
    row.values["temporal_consistency"] = temporal_consistency(result)
    row.looks = looks = appearance(reference), appearance(result)
    row.values["driving_similarity"] = float(looks[0] @ looks[1])
    if model is not None and prompt is not None:
        from emt.evaluate.judge import prompt_alignment

        row.values["text_alignment"] = prompt_alignment(model, result, prompt)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-8)


def summarise(rows: Iterable[Row]) -> dict[str, Estimate]:
    """Mean over the measured pairs of each of `MEASURES`, with a 95% bootstrap interval."""
    measured = [row for row in rows if row.error is None]
    return {name: mean([row.values[name] for row in measured]) for name in MEASURES}
