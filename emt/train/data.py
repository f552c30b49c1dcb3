"""Pairs of clips that share a motion: their layout on disk, written from the rendered world and read for training.

    ROOT/<motion>/<caption>.mp4      a folder a motion; its clips show the same motion with different content
    ROOT/<motion>/metadata.jsonl     optional, also in ROOT: {"file": "clip.mp4", "caption": "...", "role": "target"}

A clip's caption is its file name, unless metadata say another. Any two clips of a motion make a pair, the target being
one that has a caption; a clip whose role is "reference" is only ever read for its motion.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from emt.errors import EmtError
from emt.storage import open_file, remove_partials, write_atomically
from emt.synthetic.renderer import World
from emt.train.run_folder import PAIRS_LAYOUT
from emt.video import describe_unread, is_clip, read_clip, write_clip

METADATA = "metadata.jsonl"
SETTINGS = "pairs.json"
# What `emt report` writes beside the motions: a page, and a folder of its own copies of their clips.
_REPORT = "report"
ROLES = ("reference", "target")
_NAMED = 8  # lines of metadata that cannot be used


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a place in a run: what is drawn there depends on these numbers alone."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class TrainingPair:
    """A clip to read the motion from, and one with the same motion to learn to make from its caption."""

    reference: Path
    target: Path
    caption: str


@dataclass
class Sample:
    """A decoded pair.

    Attributes:
        pair: What was decoded.
        reference: uint8, (frames, height, width, 3).
        target: The same.
        problems: What had to be skipped to get here, a message for each file.
    """

    pair: TrainingPair
    reference: np.ndarray
    target: np.ndarray
    problems: dict[str, str]


def find_pairs(
    root: Path, say: Callable[[str], None], check_caption: Callable[[str], None] = lambda caption: None
) -> list[TrainingPair]:
    """List the pairs under `root`, in order of their names; no clip is opened.

    Args:
        root: Folder of motions.
        say: Called once for each motion, clip or line of metadata that is skipped, with its name and the reason.
        check_caption: Raises an `EmtError` for a caption that the model cannot read.

    Raises:
        EmtError: If `root` is no folder, or no pair is left.
    """
    if not root.is_dir():
        raise EmtError(f"{root} is not a folder of pairs", PAIRS_LAYOUT)
    shared = _read_metadata(root, say)
    pairs = []
    for motion in _listed(root):
        if not motion.is_dir() or (motion.name == _REPORT and (root / f"{_REPORT}.html").is_file()):
            continue
        records = shared | _read_metadata(motion, say)
        try:
            clips = [path for path in _listed(motion) if is_clip(path)]
        except OSError as error:
            say(f"{motion}: skipped, {error.strerror}")
            continue
        if clips and (left := describe_unread(motion, known=(METADATA,))):
            say(left)
        for path in sorted(path for path in records if motion in path.parents and path not in clips):
            say(f"{path}: skipped, it is in {METADATA} but is no clip there")
        if len(clips) < 2:
            say(f"{motion}: skipped, it has {'only one clip' if clips else 'no clip'} and a pair needs two")
            continue
        for target in clips:
            record = records.get(target, {})
            if record.get("role") == "reference":
                continue
            caption = record.get("caption", target.stem if target.is_file() else target.name).strip()
            if all(unicodedata.category(character) == "Cf" for character in caption):  # of no width, if any
                say(f"{target}: skipped as a target, its caption is empty")
                continue
            try:
                check_caption(caption)
            except EmtError as error:
                say(f"{target}: skipped as a target, {error.problem}")
                continue
            pairs += [TrainingPair(reference, target, caption) for reference in clips if reference != target]
    if not pairs:
        raise EmtError(f"{root} has no usable pair", PAIRS_LAYOUT)
    return pairs


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_metadata(folder: Path, say: Callable[[str], None]) -> dict[Path, dict[str, Any]]:
    """Metadata of a folder's clips, by path; lines that cannot be used are named and left out.

    A clip whose line says something that is not allowed is never a target: its name is no caption for it.
    """
    path = folder / METADATA
    try:
        with open_file(path) as file:
            data = file.read()
    except FileNotFoundError:
        return {}
    except OSError as error:
        say(f"{path}: skipped, {error.strerror}")
        return {}
    records: dict[Path, dict[str, Any]] = {}
    problems = []
    # Line ends within a line's texts, such as U+2028, are none of the file's.
    text = data.decode(json.detect_encoding(data), "surrogateescape").lstrip("\ufeff")
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            clip = folder / os.path.normpath(record["file"])
        except (ValueError, KeyError, TypeError, RecursionError):
            problems.append(
                f'{path}:{number}: skipped, a line is {{"file": "...", "caption": "...", "role": "target"}}'
            )
            continue
        if folder not in clip.parents or ".." in clip.parts[len(folder.parts) :]:
            problems.append(f"{path}:{number}: skipped, {record['file']!r:.100} is outside of the folder")
            continue
        if clip in records:
            problems.append(f"{path}:{number}: it replaces an earlier line on {clip.name}")
        if problem := _problem_of(record):
            problems.append(f"{path}:{number}: {clip.name} is no target, {problem}")
            record = {"role": "reference"}
        records[clip] = record
    for problem in problems[:_NAMED]:
        say(problem)
    if more := problems[_NAMED:]:
        say(f"{path}: and so {len(more)} more lines")
    return records


def _problem_of(record: dict[str, Any]) -> str:
    """Reason why a line of metadata is not allowed; empty if it is."""
    if (role := record.get("role", "target")) not in ROLES:
        return f"its role is {role!r:.100}, allowed are {' and '.join(ROLES)}"
    if not isinstance(caption := record.get("caption", ""), str):
        return f"its caption is {caption!r:.100}, which is no text"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in caption if character not in "\t\n\r"):
        return "its caption is not valid text (UTF-8), or has control characters"
    return ""


class PairDataset(Dataset[Sample]):
    """Decoded pairs at the places of an endless, shuffled order.

    What stands at a place depends on the seed, the place and the files alone, so that a run may start anywhere in it.
    A pair that cannot be decoded is replaced by the next of its epoch.

    Args:
        pairs: To draw from.
        frames: Of a clip.
        size: Width and height in pixels.
        seed: Of the order.
    """

    def __init__(self, pairs: Sequence[TrainingPair], *, frames: int, size: tuple[int, int], seed: int) -> None:
        self.pairs = list(pairs)
        self.frames, self.size, self.seed = frames, size, seed
        self._bad: dict[Path, str] = {}
        self._order = lru_cache(2)(self._shuffled)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = lru_cache(2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.pairs), generator=seeded(self.seed, epoch)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the list of pairs."""
        content = json.dumps([[str(p.reference), str(p.target), p.caption] for p in self.pairs])
        return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()

    def pair(self, place: int, further: int = 0) -> TrainingPair:
        """The pair whose turn it is at a place, or one further on in the same epoch."""
        epoch, turn = divmod(place, len(self.pairs))
        return self.pairs[self._order(epoch)[(turn + further) % len(self.pairs)]]

    def __getitem__(self, place: int) -> Sample:
        """The pair at a place, from 0 on without end.

        Raises:
            EmtError: If no pair is left that can be decoded.
        """
        problems: dict[str, str] = {}
        for further in range(len(self.pairs)):
            pair = self.pair(place, further)
            clips = []
            for path in (pair.reference, pair.target):
                try:
                    clips.append(self._read(path))
                except EmtError as error:
                    self._bad[path] = problems[str(path)] = error.problem
                    break
            else:
                return Sample(pair, clips[0], clips[1], problems)
        raise EmtError(
            f"none of the {len(self.pairs)} pairs can be used; the last: {problems[str(path)]}",
            f"Clips need at least {self.frames} frames.",
        )

    def _read(self, path: Path) -> np.ndarray:
        if path in self._bad:
            raise EmtError(self._bad[path])
        return read_clip(path, frames=self.frames, size=self.size).frames


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Rendering:
    """Options of rendered pairs.

    Attributes:
        appearances: Clips of a motion.
        realism: Share of motions one of whose clips looks like real footage: it has no caption, and is a reference.
        two_subjects: Share of motions with two subjects.
        camera: Share of motions with a moving camera.
        seed: Of everything that is drawn.
        fps: Frames a second of the written clips.
    """

    appearances: int = 2
    realism: float = 0.3
    two_subjects: float = 0.2
    camera: float = 0.5
    seed: int = 0
    fps: float = 8.0


@dataclass
class _Clip:
    file: str
    caption: str
    role: str
    frames: np.ndarray = field(repr=False)


def write_pairs(
    out: Path, motions: int, rendering: Rendering, make_world: Callable[[], World], *, workers: int = 1
) -> Iterator[tuple[int, bool]]:
    """Render motions into the layout, the same ones for the same seed.

    A motion depends on its number and on the seed alone. Clips are written whole or not at all and a motion's metadata
    come last, so that a run that was cut off goes on where it stopped, and more motions can be added later.

    Args:
        out: Folder to write.
        motions: How many there shall be, with those that are there.
        rendering: How.
        make_world: Called when a motion is missing; painting a world takes seconds.
        workers: Clips encoded at once.

    Yields:
        Motions that are there, and whether the last was made now.

    Raises:
        EmtError: If `out` holds something else, or cannot be written.
    """
    _claim(out, rendering)
    world: World | None = None
    with ThreadPoolExecutor(workers) as pool:
        for number in range(motions):
            folder = out / f"motion-{number:06}"
            if missing := not (folder / METADATA).is_file():
                world = world or make_world()
                remove_partials(folder)
                clips = _render(world, rendering, number)
                fresh = [clip for clip in clips if not (folder / clip.file).is_file()]
                paths = [folder / clip.file for clip in fresh]
                list(pool.map(write_clip, paths, [clip.frames for clip in fresh], [rendering.fps] * len(fresh)))
                records = [{"file": clip.file, "caption": clip.caption, "role": clip.role} for clip in clips]
                write_text(folder / METADATA, "".join(json.dumps(record) + "\n" for record in records))
            yield number + 1, missing


def _claim(out: Path, rendering: Rendering) -> None:
    """Record how the pairs of a folder are made, or ensure that they were made in the same way."""
    path = out / SETTINGS
    wanted = asdict(rendering)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            found = _recorded(path)
            differ = [f"{k} {found.get(k)} there, {v} requested" for k, v in wanted.items() if found.get(k) != v]
            if differ:
                raise EmtError(
                    f"{out} holds pairs that were made otherwise: {'; '.join(differ)}",
                    "Give the same options to go on, or another folder.",
                )
        elif any(_listed(out)):
            raise EmtError(f"{out} holds something else than rendered pairs", "Give another folder.")
        else:
            write_text(path, json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise EmtError(f"cannot write pairs to {out}: {reason}", "Give another folder.") from None


def _recorded(path: Path) -> dict[str, Any]:
    """Settings that the pairs of a folder were made with."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise EmtError(f"{path} is damaged: it does not say how these pairs were made", "Give another folder.")
    return found


def _render(world: World, rendering: Rendering, number: int) -> list[_Clip]:
    generator = seeded(rendering.seed, number)
    filmed = bool(torch.rand((), generator=generator) < rendering.realism)
    motion = world.motions(1, generator, two_subjects=rendering.two_subjects, camera=rendering.camera)
    looks: dict[str, Tensor] = {}
    while len(looks) < rendering.appearances - filmed:
        appearance = world.appearances(motion, generator, held_out=False)
        caption = world.captions(appearance, motion)[0]
        if caption not in looks:
            looks[caption] = world.render(motion, appearance)
    clips = [_Clip(f"{caption}.mp4", caption, "target", _pixels(video)) for caption, video in looks.items()]
    if filmed:
        appearance = world.appearances(motion, generator)
        video = world.render(motion, appearance, realism=1.0, generator=generator)
        clips.append(_Clip("reference.mp4", "", "reference", _pixels(video)))
    return clips


def _pixels(video: Tensor) -> np.ndarray:
    return video[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        EmtError: If it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise EmtError(f"cannot write {path}: {error.strerror}", "Check the free space and permissions.") from None
