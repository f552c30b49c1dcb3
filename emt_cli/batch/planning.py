"""The plan of a run: its jobs, what is done, what will fail, and what the rest will cost."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emt.cache import ContentIndex, default_dir
from emt.errors import EmtError, count
from emt.model_folder import Model, find_model
from emt.remote import Downloads, is_url
from emt.storage import check_readable
from emt_cli.batch import estimates, journal
from emt_cli.batch.addons import AddonFinder
from emt_cli.batch.best_of import check_measuring, check_tracking
from emt_cli.batch.inputs import PromptWarnings, expand
from emt_cli.batch.inputs.shapes import Shapes
from emt_cli.batch.jobs import Item, Job, Rejected, identify, numerics, output_name
from emt_cli.batch.options import Kernels, Precision, TransferOptions
from emt_cli.batch.published import Published
from emt_cli.batch.results import find_place
from emt_cli.messages import say
from emt_cli.text import message, size
from emt_engines.choice import engine_id

TO_DO = ("open", "replaces", "failed")
STATES = (*TO_DO, "done", "problem")
_CONTAINER_BYTES = 4096  # of a sidecar and a journal line


@dataclass
class PlannedJob:
    """One line of a plan.

    Attributes:
        item: The job, or what is none.
        state: open; done; replaces (a finished clip is made again or gives way, as --overwrite says); failed (it failed
            the last time, and is tried again); or problem (it cannot be done).
        output: Where its clip goes.
        identity: Of the job.
        seconds: Estimated time.
        error: What is wrong, or was the last time.
    """

    item: Job | Rejected
    state: str = "open"
    output: str = ""
    identity: str = ""
    seconds: float = 0.0
    error: EmtError | None = None

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON values."""
        line: dict[str, Any] = {"event": "job", "state": self.state}
        line |= {"output": self.output, "id": self.identity} if self.output else {}
        if isinstance(self.item, Job):
            line |= {"reference": self.item.named, "prompt": self.item.prompt, "seed": self.item.seed}
            line |= {"settings": self.item.settings.as_dict()}
        else:
            line |= {"reference": self.item.reference, "prompt": self.item.prompt}
        line |= {"origin": self.item.origin} if self.item.origin else {}
        line |= {"seconds": round(self.seconds, 3)} if self.state in TO_DO else {}
        return line | ({"error": self.error.problem, "hint": self.error.hint} if self.error else {})


@dataclass
class Plan:
    """Plan of a command line.

    Attributes:
        jobs: Its jobs.
        model: The model.
        device: The device that the estimates are for.
        source: Where the estimates come from.
        memory: Estimated peak memory of the largest clip, in bytes.
        disk: Estimated bytes of the clips to come.
        problems: What is wrong with the run as a whole.
        workers: Devices that share the jobs.
    """

    jobs: list[PlannedJob]
    model: Model
    device: str
    source: str
    memory: float = 0.0
    disk: float = 0.0
    problems: list[str] = field(default_factory=list)
    workers: int = 1

    @property
    def counts(self) -> Counter[str]:
        """Jobs by state."""
        return Counter(job.state for job in self.jobs)

    @property
    def seconds(self) -> float:
        """Estimated time of what is open, if its workers share it evenly."""
        times = [job.seconds for job in self.jobs if job.seconds]
        return sum(times) / max(1, min(self.workers, len(times)))

    def as_dict(self) -> dict[str, Any]:
        """The sum of the plan as JSON values."""
        line = {"event": "plan", **{state: self.counts[state] for state in STATES}}
        line |= {"model": self.model.name, "device": self.device, "workers": self.workers, "estimate": self.source}
        line |= {"seconds": round(self.seconds, 1), "memory": round(self.memory), "disk": round(self.disk)}
        return line | {"problems": self.problems}


def make_plan(options: TransferOptions) -> Plan:
    """Plan a run without loading anything: no torch, no weights; a job that one of several folders has is done.

    Raises:
        EmtError: the model or files of it are missing.
        UsageError: the command line makes no sense.
    """
    options = replace(options, watch=False)  # what is there now
    published = Published(options.out, say) if is_url(options.out) else None
    folder = published.folder if published else options.out
    model = find_model(options.model, download=False)
    index = ContentIndex(options.disk_cache or default_dir())
    shapes = Shapes(model, index)
    listed, streamed = expand(options, model.defaults, say, shapes, keep_seeds=False, folder=folder)
    options = replace(options, out=folder)
    items = _both(listed, streamed)
    PromptWarnings(model.name, model.vocabulary, say, model.reads_syntax).look(items)
    model_sha256 = model.sha256(index)
    gpu, total = find_gpu() if options.device != "cpu" else ("", 0.0)
    device = gpu or "cpu"
    known = journal.Known()
    known.store = published
    fields = (*journal.Known.FIELDS, *estimates.PastTimings.FIELDS)
    past = estimates.PastTimings.read(_remembering(journal.lines(options.out, fields), known), model_sha256, device)
    source = (
        f"{past.jobs} earlier clip{'' if past.jobs == 1 else 's'} on this device"
        if past
        else "a rough model of the arithmetic, as nothing was made here with this model on this device"
    )
    elsewhere = [_known(out) for out in options.others]
    planned = list(_planned(items, options, model, model_sha256, shapes, index, known, elsewhere))
    plan = Plan(planned, model, device, source)
    half = bool(gpu) if options.precision is Precision.AUTO else options.precision is not Precision.FP32
    for line in planned:
        if line.state in TO_DO and isinstance(line.item, Job):
            settings = line.item.settings
            window = model.frames_at_once(settings.frames)
            pixels = window * settings.height * settings.width
            if past:
                own = settings.as_dict()
                line.seconds = past.seconds * estimates.work(own, window) * estimates.unfused(own, bool(gpu))
                plan.memory = max(plan.memory, past.memory * pixels * estimates.activations(own, bool(gpu)))
            else:
                line.seconds = estimates.seconds(model, settings, bool(gpu))
                plan.memory = max(plan.memory, estimates.memory(model, settings, half=half, gpu=bool(gpu)))
            plan.disk += estimates.clip_bytes(settings, past) + _CONTAINER_BYTES
    if gpu and plan.memory > total:
        plan.problems.append(f"the largest clip needs about {size(plan.memory)}, {gpu} has {size(total)}")
    if options.kernels is Kernels.TRITON and options.device in ("cpu", "mps"):
        plan.problems.append(f"Triton's kernels need a CUDA GPU, the device is {options.device}")
    plan.problems += _disk_problems(options.out, plan.disk)
    if options.evaluate:
        try:
            check_measuring()
        except EmtError as error:
            plan.problems.append(message(error.problem, error.hint))
    return plan


def _known(out: Path) -> tuple[Path, journal.Known]:
    """Another output folder on this machine, and what its journal knows."""
    known = journal.Known()
    if is_url(out):
        known.store = published = Published(out, say)
        out = published.folder
    for line in journal.lines(out, journal.Known.FIELDS):
        known.add(line)
    return out, known


def _both(listed: list[Job | Rejected], streamed: Iterator[Item]) -> list[Job | Rejected]:
    return [*listed, *(item for item in streamed if item is not None)]


def _remembering(lines: Iterable[dict[str, Any]], known: journal.Known) -> Iterator[dict[str, Any]]:
    """Lines, as they are; what is needed of them later is kept."""
    for line in lines:
        known.add(line)
        yield line


def _planned(
    items: list[Job | Rejected],
    options: TransferOptions,
    model: Model,
    model_sha256: str,
    shapes: Shapes,
    index: ContentIndex,
    known: journal.Known,
    elsewhere: Sequence[tuple[Path, journal.Known]],
) -> Iterator[PlannedJob]:
    from emt.video.names import describe_part

    precision = numerics(options, engine_id(options.engine))
    downloads = Downloads(say)
    references = {item.reference: item.source for item in items if isinstance(item, Job)}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked = dict(
            zip(references, pool.map(lambda named: _look(named[0], named[1], index, downloads), references.items()))
        )
    addons = AddonFinder(index, download=False)
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Rejected):
            yield PlannedJob(item, "problem", error=item.error)
            continue
        found = looked[item.reference]
        if isinstance(found, EmtError):
            yield PlannedJob(item, "problem", error=found)
            continue
        sha256, frames = found
        try:
            reading = model.reading(item.prompt, item.settings.as_dict())
            item = replace(item, addons=addons.find(item.settings), reading=reading)
        except EmtError as error:
            yield PlannedJob(item, "problem", error=error)
            continue
        output = output_name(item, sha256)
        if output in seen:
            continue
        seen.add(output)
        identity = identify(item, reference=sha256, model=model_sha256, precision=precision)
        line = PlannedJob(item, "open", output, identity)
        try:
            model.check(item.prompt, item.settings.as_dict())
            check_tracking(item)
            needed = (item.settings.frames - 1) * (item.settings.stride or 1) + 1
            start, duration, part = item.settings.start, item.settings.duration, ""
            if start or duration is not None:
                frames, part = shapes.count(item.reference, start, duration), describe_part(start, duration)
            if frames < needed:
                problem = f"{item.reference.name} has {count(frames, 'frame')}{part}, but {needed} are needed"
                raise EmtError(problem, "Name a longer clip, or use fewer --frames.")
        except EmtError as error:
            line.state, line.error = "problem", error
        if not line.error:
            try:
                place = find_place(options.out, known, item, output, identity, options.overwrite)
                for other, its in elsewhere if place.state == "open" else ():
                    there = find_place(other, its, item, output, identity, overwrite=False)
                    place = there if there.state in ("done", "made") else place
            except EmtError as error:
                line.state, line.error = "problem", error
                yield line
                continue
            line.output, line.state = place.output, "done" if place.state == "made" else place.state
            failed = known.failed.get(line.output, {})
            if place.state == "open" and failed.get("id") == identity:
                line.state, line.error = "failed", EmtError(failed["error"], "It is tried again.")
        yield line


def _look(path: Path, source: str, index: ContentIndex, downloads: Downloads) -> tuple[str, int] | EmtError:
    """Hash and number of frames of a reference, or what is wrong with it; one behind a URL is fetched."""
    from emt.video import probe

    try:
        if source:
            downloads.fetch(source)
        status = check_readable(path)
        if path.is_dir():
            return index.sha256(path), probe(path).frames
        return index.sha256(path), index.remember("frames", path, status, lambda: probe(path).frames, int)
    except EmtError as error:
        return error


def _disk_problems(out: Path, needed: float) -> list[str]:
    place = next(folder for folder in [out, *out.absolute().parents] if os.path.exists(folder))
    problems = []
    free = shutil.disk_usage(place).free
    if free < needed:
        problems.append(f"the clips need about {size(needed)}, the disk of {out} has {size(free)} left")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problems.append(f"cannot write to {place}")
    return problems


def find_gpu() -> tuple[str, float]:
    """Name and memory in bytes of the first NVIDIA GPU, by its driver; an empty name without one."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        name, memory = output.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(memory) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0.0
