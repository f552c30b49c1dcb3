"""Pairs from real clips: what a teacher makes of references and prompts, filtered and written in the layout of pairs.

A folder of pairs is an output folder of `emt transfer` as well, made by a teacher instead of the adapter: its journal
makes it resumable, keeps each failure to its own job, and lets `emt evaluate` and `emt report` read it. What comes on
top follows from the journal at any time: the sampled reference and `metadata.jsonl` in each motion's folder, and
`pairs.jsonl`, which says of every clip whether it was kept, and why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError
from emt.model_folder import Model
from emt.prompt_syntax import PLAIN, WEBUI
from emt.storage import write_atomically
from emt_cli.batch import journal
from emt_cli.batch.addons import AddonFinder
from emt_cli.batch.generator import Generator, playback_rate, read_reference
from emt_cli.batch.jobs import Job, Rejected, digest
from emt_cli.batch.options import Settings, parse_field
from emt_cli.batch.records import dumps
from emt_cli.batch.results import read_record, reference_of

if TYPE_CHECKING:
    import numpy as np

    from emt.features import Motion
    from emt.train.teacher import Guidance, Teacher

REPORT = "pairs.jsonl"
REFERENCE = "reference.mp4"
MEASURES = ("motion_fidelity", "temporal_consistency")
_OWN = ("steps", "guidance", "negative_prompt")  # settings that a line of prompts may have: others change the motion


class TeachingGenerator(Generator):
    """Makes clips by motion guidance on the model's backbone (`emt.train.teacher`).

    Args:
        model: The model; it is loaded when it is first needed.
        model_sha256: Hash of its content.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: auto, fp32, fp16 or bf16.
        guidance: How motions are imposed.
        kernels: auto, triton or reference.
        addons: Finds the files that jobs lay over the model; None makes one.
    """

    def __init__(
        self,
        model: Model,
        model_sha256: str,
        device: str,
        precision: str,
        guidance: Guidance,
        *,
        kernels: str = "auto",
        addons: AddonFinder | None = None,
    ) -> None:
        super().__init__(model, model_sha256, device, precision, kernels=kernels, addons=addons)
        self.guidance = guidance
        self._teacher: Teacher | None = None

    def check(self, job: Job) -> None:
        """As `Generator.check`; a teacher makes no clips in windows."""
        super().check(job)
        facts, frames = self.model.facts, job.settings.frames
        if not facts.takes_frames(frames):
            raise EmtError(f"frames is {frames}", f"Pairs are made with {facts.allowed_frames()} frames.")

    def prepare(self, job: Job) -> None:
        """Nothing: the teacher calls the network itself."""

    def generate(
        self, jobs: Sequence[Job], motions: Sequence[Motion], on_step: Callable[[int, int], None]
    ) -> tuple[list[np.ndarray], dict[str, float], int]:
        """Make the clips of jobs of one shape in one batch; see `Generator.generate`."""
        import time

        from emt.train.teacher import Teacher

        settings, pipe = jobs[0].settings, self.load(jobs[0].addons)
        self._teacher = self._teacher or Teacher(pipe, self.guidance)
        pipe.prompt_syntax = WEBUI if jobs[0].reading else PLAIN
        self.device.start_measuring()
        begun = time.monotonic()
        latents = self._teacher.sample(
            [job.prompt for job in jobs],
            motions,
            seeds=[job.seed for job in jobs],
            steps=settings.steps,
            text_guidance=settings.guidance,
            negative_prompts=[job.settings.negative_prompt for job in jobs],
            on_step=on_step,
        )
        self.device.synchronize()
        stepped = time.monotonic()
        clips = self._teacher.decode(latents)
        timings = {"steps": (stepped - begun) / len(jobs), "vae": (time.monotonic() - stepped) / len(jobs)}
        return clips, timings, self.device.memory()[1]

    def record(self, job: Job, identity: str, reference_sha256: str, batch: dict[str, Any]) -> dict[str, Any]:
        """All that it takes to make a clip again, `teacher` among it."""
        return {**super().record(job, identity, reference_sha256, batch), "teacher": asdict(self.guidance)}


def read_guidance(record: Mapping[str, Any]) -> Guidance | None:
    """Guidance that made a clip, by its record; None if no teacher did.

    Raises:
        TypeError: the record is damaged.
    """
    from emt.train.teacher import Guidance

    if "teacher" not in record:
        return None
    return Guidance(**{**record["teacher"], "blocks": tuple(record["teacher"]["blocks"])})


def method(guidance: Guidance) -> str:
    """Extra hash component that keeps teacher jobs apart from adapter jobs with the same settings."""
    return digest("teacher", asdict(guidance))


def check_motions(items: Iterable[Job | Rejected]) -> list[Job | Rejected]:
    """Turn away jobs whose own line reads the reference otherwise: clips of a folder share one motion."""
    checked: list[Job | Rejected] = []
    for item in items:
        others = sorted(set(item.overrides) - set(_OWN)) if isinstance(item, Job) else []
        if isinstance(item, Job) and others:
            hint = f"A line of prompts for pairs may set {', '.join(_OWN)}."
            error = EmtError(f"pairs cannot be made with a {others[0]} of their own", hint)
            item = Rejected(error, item.origin, item.named, item.prompt)
        checked.append(item)
    return checked


def complete(out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write what follows from a folder's journal: references, metadata and the report.

    Args:
        out: A folder of pairs, which no other process is writing.
        say: Called with what could not be written.

    Returns:
        The lines of the report, by reference, prompt and seed.

    Raises:
        EmtError: The folder cannot be written.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    report = []
    for line in journal.current(out):
        output, state = line.get("output", ""), line["state"]
        if output:
            clips = kept.setdefault(str(PurePosixPath(output).parent), [])
            if state == "done":
                state = "kept" if (out / output).exists() else "gone"
            if state == "kept":
                clips.append(line)
        fields = {key: line.get(key) for key in ("reference", "prompt", "seed", *MEASURES)}
        report.append({"file": output, "state": state, "reason": line.get("error", ""), **fields})
    report.sort(key=lambda row: (row["reference"] or "", row["prompt"] or "", row["seed"] or 0))
    try:
        for folder, lines in kept.items():
            if lines:
                _complete_motion(out / folder, sorted(lines, key=lambda line: line["output"]), say)
            else:
                _clear_motion(out / folder)
        write_atomically(out / REPORT, b"".join(dumps(row) + b"\n" for row in report))
    except OSError as error:
        raise EmtError(f"cannot write to {out}: {error.strerror}", "Check the free space and permissions.") from None
    return report


def _complete_motion(folder: Path, lines: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Write the reference of a motion as its clips saw it, and what its clips are."""
    from emt.train.data import METADATA

    records: list[dict[str, Any]] = []
    try:
        _write_reference(folder / REFERENCE, lines[0])
        records.append({"file": REFERENCE, "caption": "", "role": "reference"})
    except EmtError as error:
        say(f"{folder.name}: without its reference, {error.problem}")
    for line in lines:
        name = PurePosixPath(line["output"]).name
        known = {key: line[key] for key in ("seed", *MEASURES) if key in line}
        records.append({"file": name, "caption": line["prompt"], "role": "target", **known})
    write_atomically(folder / METADATA, b"".join(dumps(record) + b"\n" for record in records))


def _write_reference(path: Path, line: dict[str, Any]) -> None:
    """Write the frames that a job's motion was read from, unless they are there."""
    from emt.video import write_clip

    settings = Settings(**{name: parse_field(name, value) for name, value in line["settings"].items()})
    job = Job(reference_of(path.parent, line["reference"]), line["prompt"], line["seed"], settings)
    identity = digest("reference", line["reference_sha256"], job.sampling)
    if path.is_file() and read_record(path).get("id") == identity:
        return
    clip = read_reference(job)
    write_clip(path, clip.frames, playback_rate(job, clip.fps), metadata={"emt": dumps({"id": identity}).decode()})


def _clear_motion(folder: Path) -> None:
    """Leave nothing of a motion none of whose clips was kept."""
    from emt.train.data import METADATA

    for name in (REFERENCE, METADATA):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
