"""A session: a model on a device with its engines and caches, opened from options that can be sent anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from emt.cache import ContentIndex, MotionCache, default_dir
from emt.model_folder import Model, find_model
from emt.remote import is_url, normal
from emt.shared_cache import SharedMotionCache
from emt_cli.batch.addons import AddonFinder
from emt_cli.batch.generator import Generator
from emt_cli.batch.options import Memory, TransferOptions, parse_batch_size
from emt_engines.choice import EngineChoice, engines_dir

if TYPE_CHECKING:
    from emt.train.teacher import Filter, Guidance


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session, for any device; plain values, so that other processes can be given them.

    Attributes:
        model: Folder or hub id; None for the small model.
        precision: auto, fp32, fp16 or bf16.
        engine: The folder of an engine, auto or torch.
        kernels: auto, triton or reference.
        low_memory: Spare the GPU's memory, at the expense of time.
        cache_dir: Folder of the caches; or the URL of one for motion features and encodings of prompts; None for the
            user's.
        cache_size: Most gigabytes of motion features in it.
        teacher: Make clips by motion guidance, without the adapter.
        download: Fetch a hub model that is not on this machine.
    """

    model: str | None = None
    precision: str = "auto"
    engine: str = "auto"
    kernels: str = "auto"
    low_memory: bool = False
    cache_dir: Path | None = None
    cache_size: float = 20.0
    teacher: Guidance | None = None
    download: bool = True

    @classmethod
    def of(cls, options: TransferOptions, teacher: Guidance | None = None) -> SessionOptions:
        """Those of a command line."""
        return cls(
            options.model,
            options.precision.value,
            options.engine,
            options.kernels.value,
            options.memory is Memory.LOW,
            options.cache_dir,
            options.cache_size,
            teacher,
        )


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, for any worker; plain values.

    Attributes:
        numerics: Execution options that can change output bits, part of each job's identity.
        method: How clips are made if not as usual, part of it too.
        batch_size: Clips in a batch; None to measure what pays.
        overwrite: Do finished jobs again.
        filter: Drops clips that do not pass; None keeps all.
    """

    numerics: str = "auto"
    method: str = ""
    batch_size: int | None = None
    overwrite: bool = False
    filter: Filter | None = None

    @classmethod
    def of(cls, options: TransferOptions, numerics: str) -> RunOptions:
        """Those of a command line.

        Raises:
            EmtError: `--batch-size` is neither auto nor 1 to 64.
        """
        size = parse_batch_size(options.batch_size) or (1 if options.memory is Memory.LOW else None)
        return cls(numerics, batch_size=size, overwrite=options.overwrite)


@dataclass(frozen=True)
class Session:
    """Model, device and caches of one process.

    Attributes:
        model: The model.
        index: Content hashes of files.
        motions: Motion features of earlier runs.
        generator: The model on its device, loaded when it is first used.
        engines: Choice of what executes the network; None if it is PyTorch in any case.
    """

    model: Model
    index: ContentIndex
    motions: MotionCache
    generator: Generator
    engines: EngineChoice | None = None


def open_session(
    options: SessionOptions,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    model: Model | None = None,
) -> Session:
    """Assemble a session; neither the model's weights nor PyTorch are loaded yet.

    Args:
        options: How clips are made.
        device: auto, cuda, cuda:N, mps or cpu.
        say: Called with what was chosen and why.
        model: The model of the options, where it has been found already.

    Raises:
        EmtError: there is no such model, or files of it are missing; the engine is none.
    """
    shared = normal(options.cache_dir) if options.cache_dir and is_url(options.cache_dir) else ""
    options = replace(options, cache_dir=None) if shared else options
    folder = options.cache_dir or default_dir()
    index = ContentIndex(folder, say)
    motions = MotionCache(folder / "motion", options.cache_size * 1e9, say)
    if shared:
        motions = SharedMotionCache(shared, folder / "motion", options.cache_size * 1e9, say)
    model = model or find_model(options.model, download=options.download)
    sha256 = model.sha256(index)
    addons = AddonFinder(index, download=options.download, say=say)
    engines = None
    if options.teacher:
        from emt_cli.batch.teaching import TeachingGenerator

        generator: Generator = TeachingGenerator(
            model, sha256, device, options.precision, options.teacher, kernels=options.kernels, addons=addons
        )
        return Session(model, index, motions, generator)
    if not options.low_memory:
        engines = EngineChoice(options.engine, model, index, engines_dir(options.cache_dir), say)
    generator = Generator(
        model,
        sha256,
        device,
        options.precision,
        engines,
        kernels=options.kernels,
        low_memory=options.low_memory,
        cache_dir=options.cache_dir,
        shared=shared,
        say=say,
        addons=addons,
    )
    return Session(model, index, motions, generator, engines)
