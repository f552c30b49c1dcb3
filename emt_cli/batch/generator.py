"""The model on its device: encodes references and makes batches of clips."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt import __version__
from emt.backbone import module_of
from emt.cache import ContentIndex, default_dir
from emt.device import BusyClock, Device, cuda_driver, is_out_of_memory, start_gpu
from emt.errors import EmtError, count
from emt.model_folder import Model
from emt.prompt_syntax import PLAIN, WEBUI
from emt_cli import messages
from emt_cli.batch.addons import NONE, AddonFinder, Addons
from emt_cli.batch.estimates import size_that_fits
from emt_cli.batch.jobs import NUMERICS_VERSION, Job, digest
from emt_cli.batch.options import Audio, Method
from emt_cli.batch.phases import Pace
from emt_cli.text import printable, size
from emt_engines.choice import TORCH, Engine, EngineChoice

if TYPE_CHECKING:
    import numpy as np

    from emt.backends.base import Backend
    from emt.control import Control
    from emt.features import Motion
    from emt.pipeline import MotionTransfer
    from emt.prompts import PromptEncoder
    from emt.train.teacher import Teacher
    from emt.video import Clip, Sound


_IMPORTS = threading.Lock()


def describe(job: Job) -> dict[str, Any]:
    """A job as records describe it."""
    line = {
        "reference": job.named,
        "prompt": job.prompt,
        "seed": job.seed,
        "settings": job.settings.as_dict(),
    }
    return {**line, "origin": job.origin} if job.origin else line


def is_guided(job: Job) -> bool:
    """Return whether a job's clip is made by motion guidance, without the adapter."""
    return job.settings.method is Method.GUIDANCE


def read_reference(job: Job, path: Path | None = None) -> Clip:
    """The frames of a job's reference, as the job sees them.

    Raises:
        EmtError: they cannot be read.
    """
    from emt.video import read_clip

    sampling = job.sampling
    shape = {"frames": sampling.pop("frames"), "size": (sampling.pop("width"), sampling.pop("height"))}
    return read_clip(path or job.reference, **shape, **sampling)


def read_sound(job: Job, path: Path | None = None) -> Sound | None:
    """The sound that goes along with a job's clip, of the time that `read_reference` samples; None for none.

    Raises:
        EmtError: the reference cannot be read.
    """
    from emt.video import sampled_sound

    if job.settings.audio is Audio.NONE:
        return None
    s = job.settings
    return sampled_sound(path or job.reference, frames=s.frames, start=s.start, duration=s.duration, stride=s.stride)


def silence_warnings(job: Job, sound: Sound | None) -> list[str]:
    """A line if there was sound to take along, and the reference has none."""
    missing = job.settings.audio is Audio.COPY and sound is None
    return [f"{printable(job.reference.name)} has no sound: the clip is silent"] if missing else []


def playback_rate(job: Job, reference_fps: float) -> float:
    """Frames per second of a result: as requested, or the reference's pace, as far as the format can."""
    fastest = 50.0 if job.settings.format.value == "gif" else 240.0
    return job.settings.fps or min(max(reference_fps, 0.1), fastest)


@functools.cache
def installed_versions() -> dict[str, str]:
    """Versions of what decides the frames of a clip."""
    versions = {"emt": __version__}
    for name in ("torch", "diffusers", "transformers", "imageio-ffmpeg"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """Context manager: the warnings that the library logs in this thread, which nobody else hears then."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, message: logging.LogRecord) -> None:
            if message.thread == thread and (text := message.getMessage()) not in heard:
                heard.append(text)

    thread, ear, logger = threading.get_ident(), Ear(logging.WARNING), logging.getLogger("emt")
    logger.addHandler(ear)
    try:
        yield heard
    finally:
        logger.removeHandler(ear)


def import_libraries() -> None:
    """Import PyTorch and what uses it; thread-safe: two threads that import it at once trip over each other."""
    with _IMPORTS:
        import emt.pipeline  # noqa: F401


@contextmanager
def start_ahead(device: str) -> Iterator[None]:
    """Context manager: PyTorch is imported and the GPU started, in threads, beside what is done first in here.

    Nothing is started where there is no NVIDIA GPU. It is left when the threads have come to their ends, since a
    process cannot end in the middle of an import.

    Args:
        device: auto, cuda, cuda:N, mps or cpu.
    """
    driver = cuda_driver() if device.startswith(("auto", "cuda")) else None
    if driver is None:
        yield
        return
    works = (import_libraries, functools.partial(start_gpu, driver, device))
    threads = [threading.Thread(target=_quietly, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _quietly(work: Callable[[], object]) -> None:
    with suppress(Exception):  # who needs it meets the error
        work()


def silence_libraries() -> None:
    """No progress bars of libraries from here on, nor, unless details are shown, warnings, which are for developers."""
    import transformers
    from diffusers.utils import logging as diffusers_logging

    if not messages.shows(messages.DETAIL):
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def open_pipeline(
    model: Model,
    device: Device,
    prepare: Callable[[MotionTransfer], None] | None = None,
    low_memory: bool = False,
) -> MotionTransfer:
    """A model on a device, the libraries' own messages silenced.

    Args:
        model: The model.
        device: Where to.
        prepare: Changes it before it goes there.
        low_memory: Let it go there part by part, as each is needed.

    Raises:
        EmtError: the model cannot be opened, or does not fit in the device's memory.
    """
    from emt.pipeline import load_pipeline, open_model

    if not messages.shows(messages.DETAIL):
        warnings.simplefilter("ignore")
    try:
        pipe = None if low_memory else open_model(model.folder, device.dtype)
        if pipe is None:
            silence_libraries()
            pipe = full = load_pipeline(model.folder, "cpu", device.dtype)
        if prepare:
            prepare(pipe)
        if low_memory:
            full.save_memory(device.torch_device)
            return full
        return pipe.to(device.torch_device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = f"the model {model.name} does not fit in the memory of {device.name}"
        raise EmtError(problem, "Use --precision fp16, or --device cpu.") from None


class Generator:
    """The model on its device: encodes references and makes batches of clips. One thread may use it.

    Args:
        model: The model; it is loaded when it is first needed.
        model_sha256: Hash of its content.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: auto, fp32, fp16 or bf16.
        engines: Chooses what executes the network; None for PyTorch.
        kernels: auto, triton or reference.
        low_memory: Spare the GPU's memory, at the expense of time.
        cache_dir: Folder of the caches, where encodings of prompts are kept, too; None for the user's.
        shared: URL of a folder of caches that machines share; empty for none.
        say: Called with what was chosen and why.
        addons: Finds the files that jobs lay over the model; None makes one.
    """

    def __init__(
        self,
        model: Model,
        model_sha256: str,
        device: str,
        precision: str,
        engines: EngineChoice | None = None,
        *,
        kernels: str = "auto",
        low_memory: bool = False,
        cache_dir: Path | None = None,
        shared: str = "",
        say: Callable[[str], None] = lambda text: None,
        addons: AddonFinder | None = None,
    ) -> None:
        self.addons = addons or AddonFinder(ContentIndex(cache_dir or default_dir()), say=say)
        self._laid = NONE
        self._weights: Any = None  # the `WeightSwitch` of the pipeline
        #: Prompts that are known before the model is opened, for one whose text encoder is not open beside its network.
        self.prompts: Collection[str] = ()
        self.cache_dir, self._shared = cache_dir, shared
        self.model = model
        self.model_sha256 = model_sha256
        self.low_memory = low_memory
        #: Frames of a window of clips that are longer than the network takes; None for the engine's or the model's.
        self.window: int | None = None
        self._requested = device, precision, kernels
        self._say = say
        self._guard = threading.Lock()
        #: Makes a context manager of a phase of a run (`emt_cli.batch.phases`), in which nobody else is told of it.
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self._busy: BusyClock | None = None
        #: Seconds a step and clip of the last batch, in its second half; None if it had only one step.
        self.pace: float | None = None
        self._pace = Pace()  # of the batch that is being made
        self._device: Device | None = None
        self._pipe: MotionTransfer | None = None
        self._teacher: Teacher | None = None
        self._control: tuple[Path, MotionTransfer, Any] | None = None  # the file of a control network, and it
        self._engines = engines
        self._backends: dict[Path, Backend] = {}
        self._peaks: dict[tuple[Any, ...], int] = {}
        if low_memory:  # little of little memory may be lost between what is in use
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    def import_libraries(self) -> None:
        """Import PyTorch and what uses it, and start the GPU beside that."""
        if self._device is None:
            with start_ahead(self._requested[0]):
                import_libraries()

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the device computed references, steps and images so far; waits for the device."""
        return self._busy.seconds if self._busy else 0.0

    @property
    def device(self) -> Device:
        """The device, opened on first use; thread-safe.

        Raises:
            EmtError: there is none such.
        """
        import_libraries()
        with self._guard:
            if self._device is None:
                device = Device.open(*self._requested)
                if self.low_memory and not device.is_gpu:
                    problem = f"--memory low spares the memory of CUDA GPUs, the device is {device.torch_device}"
                    raise EmtError(problem, "Leave it out.")
                if device.is_gpu:
                    self._say(f"kernels: {device.kernels} ({device.why})")
                self._device = device
            return self._device

    def load(self, addons: Addons | None = None) -> MotionTransfer:
        """The pipeline, loaded on first use.

        Args:
            addons: Laid over it; None leaves those that are.

        Raises:
            EmtError: there is no such device, the model cannot be opened on it, or a file does not fit it.
        """
        if self._pipe is None:
            device = self.device  # first: it takes its turn at importing
            if self._engines:
                self._engines.check_match(device)
            encoder = self._encode_prompts(device) if self.model.encodes_prompts_apart else None
            libraries = threading.Thread(target=_quietly, args=(device.load_libraries,), daemon=True)
            libraries.start()
            try:
                self._pipe = open_pipeline(
                    self.model, device, low_memory=self.low_memory, prepare=lambda pipe: self._lay(pipe, NONE)
                )
            finally:
                libraries.join()
            self._pipe.prompt_encoder = encoder
            self._torch = self._pipe.backend
        if addons is not None and addons != self._laid:
            self._lay(self._pipe, addons)
        return self._pipe

    def _lay(self, pipe: MotionTransfer, addons: Addons) -> None:
        """Have these add-ons over the model, and no others."""
        fresh = self._weights is None or self._weights.pipe is not pipe
        if addons.files != (() if fresh else self._laid.files):
            addons.check_unchanged(self.addons.index)
        if addons.weights != (() if fresh else self._laid.weights):
            if self._weights is None or fresh:
                self._weights = module_of(self.model.network, "switching").WeightSwitch(pipe)
            self._weights.set(addons.loras, addons.vae, addons.embeddings)
        pipe.clip_skip = addons.clip_skip
        self._laid = addons

    def _encode_prompts(self, device: Device) -> PromptEncoder:
        """Encode known prompts while the device has room for the text encoder."""
        from emt.prompts import PromptEncoder

        silence_libraries()
        encoder = PromptEncoder.of_model(self.model.folder, self.cache_dir, self._shared)
        prompts = dict.fromkeys(["", *self.prompts])
        try:
            encoded = encoder.encode(prompts, device.torch_device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            encoded = encoder.encode(prompts, "cpu")
        if encoded:
            self._say(f"{count(encoded, 'prompt')} encoded and kept for later runs")
        return encoder

    def check(self, job: Job) -> None:
        """Raise EmtError unless the model, and the engine that the user named, can make a job's clip; needs no torch.

        Raises:
            EmtError: it cannot.
        """
        self.model.check(job.prompt, job.settings.as_dict())
        if is_guided(job) and self._engines and self._engines.named:
            raise EmtError("method guidance needs gradients, which --engine has not", "Leave --engine out.")
        if job.settings.control and self._engines and self._engines.named:
            problem = "a control network adds to the inside of the network, which engines do not take"
            raise EmtError(problem, "Leave --engine out.")
        if self._engines:
            s = job.settings
            changed = bool(s.lora or s.vae)
            self._engines.check(s.width, s.height, self.frames_at_once(job), s.cache_interval, changed=changed)
            self._engines.check_text(job.has_long_text)

    def engine(self, job: Job) -> Engine | None:
        """The engine that makes a job's clip; None for PyTorch.

        Raises:
            EmtError: there is no such device, or the engine that the user named may not run on it.
        """
        s = job.settings
        if is_guided(job) or s.control or self._engines is None:
            return None
        if not self._engines.applies(s.cache_interval, job.has_long_text):
            return None
        changed = job.addons.changes_networks
        return self._engines.find(self.device, s.width, s.height, self.frames_at_once(job), changed=changed)

    def frames_at_once(self, job: Job) -> int:
        """Frames that the network is given at once for a job's clip: all of them, or a window."""
        frames = job.settings.frames
        if self.model.facts.takes_frames(frames):
            return frames
        engine = self._engines.frames if self._engines else None
        return self.window or engine or self.model.frames_at_once(frames)

    def _switch(self, pipe: MotionTransfer, engine: Engine | None) -> None:
        """Let an engine, or PyTorch, execute the network from here on."""
        backend = self._torch
        if engine:
            if engine.folder not in self._backends:
                from emt_engines.build import open_engine

                with self.phase("opening the engine"):
                    self._backends[engine.folder] = open_engine(engine.folder, engine.manifest, pipe)
            backend = self._backends[engine.folder]
        self._measure(pipe, backend)

    def _measure(self, pipe: MotionTransfer, backend: Backend) -> None:
        """Have a backend execute the network, its computing measured and its preparations told apart."""
        from emt.backends.measured import MeasuredBackend

        busy = self._busy = self._busy or BusyClock(self.device.torch_device if self.device.is_gpu else None)

        @contextmanager
        def prepare(what: str) -> Iterator[None]:
            with self.phase(what), busy.paused(), self._pace.preparing():
                yield

        backend.phase = prepare  # type: ignore[attr-defined]
        pipe.backend = MeasuredBackend(backend, busy)  # type: ignore[assignment]

    def most_clips(self, job: Job) -> int | None:
        """The most clips like a job's that can be made in one batch; None if only memory limits them."""
        engine = self.engine(job)
        return engine.manifest.batch[1] if engine else None

    def batch_key(self, job: Job) -> str:
        """Key of what decides how a batch's size changes a clip's time: model, device, shape, code."""
        engine, device, s = self.engine(job), self.device, job.settings
        where = [device.name, device.precision, device.kernels, engine.manifest.id if engine else TORCH]
        shape: list[Any] = [s.frames, s.height, s.width, s.guidance == 1, s.guidance_until, s.cache_interval]
        shape += [s.method.value] if is_guided(job) else []
        shape += ["control"] if s.control else []
        return digest("batch", NUMERICS_VERSION, self.model_sha256, where, shape, installed_versions())

    def motion_key(self, job: Job, reference_sha256: str) -> str:
        """Cache key of motion features, which depend on the device too: a clip can be made again exactly."""
        engine = self.engine(job)
        device = self.device
        where: list[Any] = [device.name, device.precision, device.kernels, *([engine.manifest.id] if engine else [])]
        where += [laid] if (laid := job.addons.of_motion()) else []
        if (window := self.frames_at_once(job)) < job.settings.frames:
            where.append(f"features of all windows of {window}")
        return digest("motion", NUMERICS_VERSION, reference_sha256, job.sampling, self.model_sha256, *where)

    def prepare(self, job: Job) -> None:
        """Prepare for clips of a job's shape while its reference is read; the model is open."""
        from emt.backends.codec import ImageCodec

        pipe, s = self.load(), job.settings
        if not self.low_memory and not is_guided(job) and isinstance(pipe.codec, ImageCodec):
            self._switch(pipe, self.engine(job))
            pipe.backend.prepare_shape(self.frames_at_once(job), s.height, s.width)  # type: ignore[attr-defined]

    def encode(self, job: Job, source: Clip | Motion) -> Motion:
        """The motion of a job's clip, on the device; a motion that was read from the cache is moved there.

        That of a clip in windows stays in the computer's memory or on its disk.
        """
        from emt.features import Motion

        if isinstance(source, Motion):
            motion = source
        else:
            pipe = self.load(job.addons)
            self._switch(pipe, self.engine(job))
            motion = pipe.extract_motion(source, window=self.frames_at_once(job))
        if self.frames_at_once(job) == job.settings.frames:
            motion = motion.to(self.device.torch_device)
        self.device.synchronize()
        return motion

    def generate(
        self, jobs: Sequence[Job], motions: Sequence[Motion], on_step: Callable[[int, int], None]
    ) -> tuple[list[np.ndarray], dict[str, float], int]:
        """Make the clips of jobs of one shape in one batch.

        Returns:
            The frames of each; a clip's share of the time of steps and VAE, in seconds; peak memory in bytes.
        """
        pipe, settings = self.load(jobs[0].addons), jobs[0].settings
        self._switch(pipe, self.engine(jobs[0]))
        self.device.start_measuring()
        pace = self._pace = Pace()
        begun = stepped = time.monotonic()
        wait_for_last = self.device.mark()

        def stepped_to(done: int, steps: int) -> None:
            nonlocal stepped, wait_for_last
            # One step ahead of the device is enough to keep it busy; further ahead, progress would be too early.
            wait_for_last()
            wait_for_last = self.device.mark()
            if done == 1 or pace.is_due(done, steps):
                self.device.synchronize()
                stepped = time.monotonic()
            if pace.is_due(done, steps):
                pace.step(done, steps)
            on_step(done, steps)

        shared = all(motion is motions[0] for motion in motions)
        pipe.prompt_syntax = WEBUI if jobs[0].reading else PLAIN
        make: Callable[..., list[np.ndarray]] = pipe.generate
        own: dict[str, Any] = {"cache_interval": settings.cache_interval, "window": self.frames_at_once(jobs[0])}
        computing: AbstractContextManager[Any] = nullcontext()
        if is_guided(jobs[0]):
            make, own = self._open_teacher(pipe).generate, {}  # of whole passes and clips alone (`Model.check`)
            computing = self._busy() if self._busy else computing  # it calls the network itself
        elif settings.control:
            own["control"] = self._open_control(pipe, jobs[0])
        with computing:
            clips = make(
                [job.prompt for job in jobs],
                motions[0] if shared else list(motions),
                steps=settings.steps,
                guidance=settings.guidance,
                seed=[job.seed for job in jobs],
                negative_prompt=[job.settings.negative_prompt for job in jobs],
                scheduler=settings.scheduler.value,
                guidance_until=settings.guidance_until,
                on_step=stepped_to,
                **own,
            )
        ended = time.monotonic()
        self.pace = pace.seconds and pace.seconds / len(jobs)
        timings = {"steps": (stepped - begun) / len(jobs), "vae": (ended - stepped) / len(jobs)}
        # A graph that is replayed works in memory that is counted only when it is recorded.
        kind = (*jobs[0].shape, len(jobs), shared)
        peak = self._peaks[kind] = max(self._peaks.get(kind, 0), self.device.memory()[1])
        return clips, timings, peak

    def _open_control(self, pipe: MotionTransfer, job: Job) -> Control:
        """The control network of a job, and its pictures in the clip's size."""
        from emt.control import Control
        from emt.video.pictures import read_picture

        assert job.addons.control is not None
        path, scale = job.addons.control
        if self._control is None or self._control[0] != path or self._control[1] is not pipe:
            self._control = None  # let go of one before another is opened
            opening = module_of(self.model.network, "sparse_control")
            opened = opening.open_control(path, pipe.unet.config, pipe.unet.dtype)
            self._control = path, pipe, opened.to(self.device.torch_device)
        s = job.settings
        pictures = {
            frame: read_picture(picture, (s.width, s.height), s.fit.value)
            for frame, picture in job.addons.pictures.items()
        }
        return Control(self._control[2], pictures, scale)

    def _open_teacher(self, pipe: MotionTransfer) -> Teacher:
        """The teacher on the pipeline's network, which makes clips by motion guidance."""
        from emt.train.teacher import Teacher

        self._teacher = self._teacher or Teacher(pipe)
        return self._teacher

    def record(self, job: Job, identity: str, reference_sha256: str, batch: dict[str, Any]) -> dict[str, Any]:
        """All that it takes to make a clip again: what the clip and its sidecar carry."""
        engine = self.engine(job)
        ran: dict[str, Any] = {"engine": TORCH}
        if engine:
            own = engine.manifest
            ran = {"engine": own.backend, "engine_id": own.id, "engine_folder": str(engine.folder.absolute())}
        if self.low_memory:
            ran["memory"] = "low"
        if (window := self.frames_at_once(job)) < job.settings.frames:
            ran["window"] = window
        return {
            "id": identity,
            **describe(job),
            **job.addons.record(),
            **({"prompt_syntax": 1} if job.reading else {}),
            "reference_sha256": reference_sha256,
            "model": self.model.name,
            "model_folder": str(self.model.folder.absolute()),
            "model_sha256": self.model_sha256,
            "device": self.device.name,
            "precision": self.device.precision,
            "kernels": self.device.kernels,
            **ran,
            "batch": batch,
            "arithmetic": NUMERICS_VERSION,
            "versions": installed_versions(),
        }

    def explain(self, error: Exception, job: Job) -> EmtError:
        """Any error in a user's words; out of memory says what size would fit."""
        if isinstance(error, EmtError):
            return error
        if isinstance(error, OSError):
            place = error.filename2 or error.filename  # of a file that takes its final name: that one
            name = f" ({place})" if place else ""
            return EmtError(f"{error.strerror or error}{name}")
        if not is_out_of_memory(error):
            first = next(iter(str(error).splitlines()), "")
            return EmtError(f"{type(error).__name__}: {first}" if first else type(error).__name__)
        settings, available = job.settings, self.device.memory()[2]
        shape = f"{settings.frames} frames of {settings.width}x{settings.height}"
        half = self.device.precision != "fp32"
        return EmtError(
            f"out of memory: a clip of {shape} needs more than the {size(available)} of {self.device.name}",
            f"This should fit: {size_that_fits(self.model, settings, available, half)}",
        )
