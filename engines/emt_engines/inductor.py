"""AOTInductor engines: PyTorch's compiler, ahead of time, into packages that load in seconds.

A package has the compiled code of one part for one size, and no weights: it reads the model's own, in place. So it is
small, all sizes share one set of weights, and what is merged into those, such as a LoRA, shows at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emt.backbone import Execution
from emt.backends.base import Networks
from emt.backends.codec import ImageCodec, codec_of
from emt.backends.cuda_graphs import Recorder
from emt.backends.torch import TorchBackend
from emt.backends.vae import VAE_PIXELS
from emt.errors import EmtError, first_line
from emt.features import MotionFeatures, PreparedMotion, TextFeatures
from emt.storage import sha256_of
from emt_engines.attempts import ATTEMPTS, failed, new_log, repeat, summary
from emt_engines.compiler_hooks import Phases, declared_size_arrays, rare_collections, remembered_writes
from emt_engines.manifest import Manifest, Part, Request, Size
from emt_engines.parts import Function, by_reference, features_of, function, text_tokens, times_of
from emt_engines.toolchain import missing_compiler, missing_toolkit, toolchain
from emt_kernels.precompile import processors

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer

#: What an engine is made of, for each size.
PARTS = ("denoise", "reference", "vae_encoder", "vae_decoder")
#: Those of a model whose autoencoder is of video: PyTorch runs that, some frames at a time.
_PARTS_OF_VIDEO = ("denoise", "reference")


def _options(device: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        # Short vectors, such as the four biases of the last convolution, would be written into the code.
        "always_keep_tensor_constants": True,
        # What is computed from a weight of one value throughout, such as the scaler's last bias, would be too.
        "joint_graph_constant_folding": False,
        # Most of a build is the C++ that calls the kernels; optimising it gains nothing that a CUDA graph leaves.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    if device != "cpu":
        # Do not find out which vector instructions the CPU has: a minute, and no kernel of the GPU's uses them.
        options["cpp.vec_isa_ok"] = False
    return options


class InductorBuilder:
    """Exports each part for each size and has AOTInductor compile it for the device that it is on."""

    name = "inductor"
    depends = ("torch", "cuda", "triton", "diffusers")
    bound = True
    refits = True
    opset = None

    def check(self, request: Request) -> None:
        """Raise EmtError unless an engine for a request can be built here.

        Raises:
            EmtError: a compiler is missing, PyTorch is too old, or the request has a range of sizes.
        """
        ranges = [str(size) for size in request.sizes if not size.exact]
        if ranges:
            raise EmtError(
                f"--size has the range {', '.join(ranges)}",
                "The backend inductor compiles one size after another: list them, as in --size 512x512,768x512.",
            )
        problem = missing_compiler() or (missing_toolkit() if request.device.startswith("cuda") else "")
        if problem:
            raise EmtError(f"an inductor engine cannot be built here: {problem}", "Ask `emt doctor`.")
        if "user_managed" not in inspect.signature(_model_class().load_constants).parameters:
            raise EmtError(f"PyTorch {torch.__version__} is too old for engines", "Install torch 2.8 or newer.")

    def build(
        self, pipe: MotionTransfer, request: Request, folder: Path, progress: Callable[[str, float], None]
    ) -> list[Part]:
        """Compile every part for every size into `folder`; see `emt_engines.base.Builder`."""
        networks = _Configurations.of(pipe)
        names = PARTS if isinstance(codec_of(pipe.vae, pipe.unet.latent_channels), ImageCodec) else _PARTS_OF_VIDEO
        jobs = [_Job(networks, request, name, size, folder) for size in request.sizes for name in names]
        workers = _workers(pipe, len(jobs))
        if workers == 1:
            parts: list[Part] = []
            for job in jobs:

                def report(what: str) -> None:
                    progress(what, len(parts) / len(jobs))

                parts.append(repeat(job.step, functools.partial(_compile, pipe, job, report), report))
            return parts
        progress(f"compiling {len(jobs)} parts, {workers} at a time", 0.0)
        with _compile_threads(workers):
            return _side_by_side(jobs, workers, progress)


@dataclass(frozen=True)
class _Shell:
    """Networks with any weights, in place of a pipeline."""

    unet: Any
    vae: Any
    tokenizer: SimpleNamespace
    vae_scale_factor: int
    device: torch.device


@dataclass(frozen=True)
class _Configurations:
    """The parts of a pipeline that decide the code of a package, without weights: enough for another process."""

    network: type[Any]
    autoencoder: type[Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    tokens: int
    dtypes: tuple[dict[str, torch.dtype], dict[str, torch.dtype]]  # of weights and buffers: some may stay in float32

    @classmethod
    def of(cls, pipe: MotionTransfer) -> _Configurations:
        """Those of a pipeline."""
        unet, vae = pipe.unet, pipe.vae
        one, other = ({name: x.dtype for name, x in _tensors(part)} for part in (unet, vae))
        return cls(type(unet), type(vae), dict(unet.config), dict(vae.config), text_tokens(pipe), (one, other))

    def make(self, device: str) -> _Shell:
        """Make them."""
        with torch.device(device):
            unet = self.network.from_config(self.unet).eval()
            vae = self.autoencoder.from_config(self.vae).eval()
        for part, dtypes in zip((unet, vae), self.dtypes):
            for name, tensor in _tensors(part):
                tensor.data = tensor.data.to(dtypes[name])
        factor = codec_of(vae, unet.latent_channels).pixels
        return _Shell(unet, vae, SimpleNamespace(model_max_length=self.tokens), factor, torch.device(device))


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers of a network with their names, those that no file holds included."""
    return itertools.chain(part.named_parameters(), part.named_buffers())


@dataclass(frozen=True)
class _Job:
    """A package to make."""

    networks: _Configurations
    request: Request
    name: str
    size: Size
    folder: Path

    @property
    def step(self) -> str:
        """The job in words."""
        return f"compiling {self.name} for {self.size}"


@dataclass(frozen=True)
class _Failure:
    """A compiler's error in another process, whose log has all of it."""

    reason: str


def _workers(pipe: MotionTransfer, jobs: int) -> int:
    """Processes that compile at once: each keeps some cores busy and, on a GPU, has networks of its own there."""
    on_gpu = pipe.device.type == "cuda"  # where most of the time is spent in Python, on one core
    workers = min(jobs, max(1, processors() // (2 if on_gpu else 4)))
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(pipe.device)
        own = sum(p.numel() * p.element_size() for part in (pipe.unet, pipe.vae) for p in part.parameters())
        workers = min(workers, max(1, free // (4 * own)))
    return workers


@contextlib.contextmanager
def _compile_threads(workers: int) -> Iterator[None]:
    """Have each of several compilers started meanwhile use its share of the cores."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, min(32, processors()) // workers))
    try:
        yield
    finally:
        del os.environ[name]


def _side_by_side(jobs: Sequence[_Job], workers: int, progress: Callable[[str, float], None]) -> list[Part]:
    """Compile each part in a process of its own, some at a time; a part whose process fails is compiled once more.

    What the processes print goes to logs, which stay only if a part fails again.

    Raises:
        EmtError: a part cannot be compiled, or its process was ended by the system, twice.
    """
    context = multiprocessing.get_context("spawn")
    logs = [new_log(job.step) for job in jobs]
    waiting = list(range(len(jobs)))
    attempts = [0] * len(jobs)
    running: dict[Connection, tuple[int, Any]] = {}
    found: dict[int, Part] = {}

    def fail(number: int, reason: str) -> None:
        if attempts[number] == ATTEMPTS:
            raise failed(jobs[number].step, reason, logs[number])
        waiting.append(number)
        progress(f"{jobs[number].step}: {reason}; trying once more", len(found) / len(jobs))

    try:
        while len(found) < len(jobs):
            while waiting and len(running) < workers:
                number = waiting.pop(0)
                attempts[number] += 1
                here, there = context.Pipe(duplex=False)
                arguments = there, jobs[number], logs[number]
                process = context.Process(target=_compile_apart, args=arguments, daemon=True)
                process.start()
                running[here] = number, process
                there.close()  # so that its end is seen here when the process ends
            multiprocessing.connection.wait(list(running))
            for pipe, (number, process) in [item for item in running.items() if item[0].poll()]:
                try:
                    what = pipe.recv()
                except EOFError:
                    del running[pipe]
                    process.join()
                    fail(number, f"its process ended with {_ending(process.exitcode)}")
                    continue
                if isinstance(what, str):
                    progress(what, len(found) / len(jobs))
                    continue
                del running[pipe]
                process.kill()  # ending by itself it would wait, for seconds, for compilers that have nothing to do
                process.join()
                if isinstance(what, EmtError):
                    raise what
                if isinstance(what, _Failure):
                    fail(number, what.reason)
                else:
                    found[number] = what
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
        for number, log in enumerate(logs):
            if number in found or attempts[number] < ATTEMPTS:
                log.unlink(missing_ok=True)
    return [found[i] for i in range(len(jobs))]


def _ending(code: int | None) -> str:
    """The exit code of a process, in words."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _compile_apart(pipe: Any, job: _Job, log: Path) -> None:
    """Run `_compile` in a process of its own: it sends its phases, then a `Part`, an error or a `_Failure`."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):  # compilers and crashes write to these
        os.dup2(file, stream)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the parent process ends this one
    # Locks that libraries make have no name then, which a process that is killed would leave behind, with a warning.
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
    try:
        networks = job.networks.make(job.request.device)
        pipe.send(_compile(networks, job, pipe.send))
    except EmtError as error:
        pipe.send(error)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(_Failure(summary(error)))


@torch.no_grad()
def _compile(pipe: Any, job: _Job, report: Callable[[str], None]) -> Part:
    phases = Phases(lambda phase: report(f"{job.step}: {phase}"))
    _import_ops()
    with (
        TorchBackend(pipe, graphs=False).prepared() as execution,
        toolchain(job.request.device),
        declared_size_arrays(),
        remembered_writes(),
        rare_collections(),
        phases.of_compiler(),
    ):
        part = _package(pipe, execution, job, phases)
    report(f"compiled {job.name} for {job.size}: {phases.summary()}")
    return part


def _package(pipe: Networks, execution: Execution, job: _Job, phases: Phases) -> Part:
    request, name, size = job.request, job.name, job.size
    width, height = size.least
    most = 2 * request.batch[1]
    images = images_at_once(request.frames, width, height)
    # Compiled code takes other numbers of samples, and is tuned for this one: a clip and its guidance.
    shape: dict[str, Any] = {"width": width, "height": height, "frames": request.frames, "samples": 2, "images": images}
    from torch._inductor import aoti_compile_and_package

    made = function(pipe, name, **shape, execution=execution)
    frames = codec_of(pipe.vae, pipe.unet.latent_channels).latent_frames(request.frames)
    ranges = {"frames": (frames, frames), "width": (width, width), "height": (height, height)}
    if made.varying:
        ranges["samples"] = (1, most)
    elif name.startswith("vae"):
        ranges = {"images": (images, images), "width": (width, width), "height": (height, height)}
    phases.begin("export")
    exported = _export(made, most)
    outputs = [x.meta["val"] for x in next(n for n in exported.graph.nodes if n.op == "output").args[0]]
    file = job.folder / f"{name}-{size}.pt2"
    phases.begin("tracing")
    aoti_compile_and_package(exported, package_path=str(file), inductor_configs=_options(pipe.device.type))
    return Part(
        name=name,
        file=file.name,
        sha256=sha256_of(file),
        shapes=ranges,
        inputs=made.input_specs(),
        outputs=made.output_specs(outputs),
        facts={"layout": _layout(made.module), "orders": [_order(x) for x in made.inputs.values()]},
    )


def _export(made: Function, most: int) -> torch.export.ExportedProgram:
    dimension = torch.export.Dim(made.varying, min=1, max=most) if made.varying else None
    shapes = [{0: dimension} if made.varies(name) else None for name in made.inputs]
    named = [p for p in inspect.signature(made.module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    own, rest = shapes[: len(named)], shapes[len(named) :]
    return torch.export.export(
        made.module.eval(),
        tuple(made.inputs.values()),
        strict=False,
        dynamic_shapes=(*own, tuple(rest)) if rest else tuple(own),
    )


def images_at_once(frames: int, width: int, height: int) -> int:
    """Images that a call of the VAE takes: as many as fill a GPU, and divide the frames of a clip."""
    return max(n for n in range(1, frames + 1) if frames % n == 0 and (n == 1 or n * width * height <= VAE_PIXELS))


# ------------------------------------------------------------------------------------------------- weights and layouts


def _model_class() -> Any:
    from torch.export.pt2_archive._package import AOTICompiledModel

    return AOTICompiledModel


def _load_package(file: Path, device: torch.device) -> Any:
    _import_ops()
    index = device.index if device.type == "cuda" and device.index is not None else -1
    # `aoti_load_package` looks first which instructions the CPU has, by compiling programs: seconds, and a compiler.
    # What Python wraps around this loader imports the compiler, and does nothing but flatten inputs that are flat.
    return torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, index)


def _import_ops() -> None:
    """Register the kernels' ops: a package that calls one that is not there cannot be loaded."""
    import emt_kernels

    for module in pkgutil.iter_modules(emt_kernels.__path__):
        importlib.import_module(f"emt_kernels.{module.name}")


def _layout(module: nn.Module) -> str:
    """A hash of the names, types, shapes and strides of all weights, which compiled code takes for granted."""
    weights = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    listing = [(name, str(x.dtype), list(x.shape), list(x.stride())) for name, x in sorted(weights.items())]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _order(x: Tensor) -> list[int]:
    """The dimensions of a dense tensor, from the slowest to the fastest in memory."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: (-strides[d] if x.shape[d] > 1 else -sys.maxsize, d))
    return order if x.permute(order).is_contiguous() else list(range(x.ndim))


def _in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor itself, or a copy whose memory has the dimensions in this order."""
    permuted = x.permute(*order)
    if permuted.is_contiguous():
        return x
    return permuted.contiguous().permute(*(list(order).index(d) for d in range(x.ndim)))


class _Package:
    """A part, loaded: a function of tensors."""

    def __init__(self, folder: Path, part: Part, module: nn.Module, device: torch.device) -> None:
        self.part = part
        self._layout, self._orders = part.facts.get("layout"), part.facts.get("orders", ())
        try:
            # Any value may stand there: the manifest of an engine can be forged, with a hash that fits.
            if [sorted(order) for order in self._orders] != [[*range(len(spec.shape))] for spec in part.inputs]:
                raise TypeError("its manifest lacks how inputs are laid out")
            self.model = _load_package(folder / part.file, device)
        except (RuntimeError, TypeError) as error:
            raise EmtError(
                f"the engine's {part.name} cannot be loaded: {first_line(error)}",
                "Build the engine again with emt build-engine, or use --engine torch.",
            ) from error
        self._module = module
        paths = [name.rpartition(".") for name in sorted(self.model.get_constant_fqns())]
        self.weights: dict[str, Tensor] = {}
        self._owners = [(module.get_submodule(path), name, f"{path}.{name}") for path, _, name in paths]
        self._pointers: list[int] = []
        self.bind()

    def bind(self) -> None:
        """Point the package at the model's weights, if they have moved since the last call.

        Raises:
            EmtError: they are not laid out in memory as they were when it was compiled.
        """
        pointers = [getattr(owner, name).data_ptr() for owner, name, _ in self._owners]
        if pointers == self._pointers:
            return
        self._pointers = pointers
        # Kept: the package only points at them.
        self.weights = {path: getattr(owner, name).detach() for owner, name, path in self._owners}
        if _layout(self._module) != self._layout:
            raise EmtError(
                f"the engine's {self.part.name} was compiled for weights of other shapes, dtypes or strides",
                "Build the engine again with emt build-engine.",
            )
        self.model.load_constants(self.weights, False, True, True)  # in use, all of them, and kept alive here

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it on the inputs of `part.inputs`.

        Raises:
            ValueError: an input has another shape or type, which it names.
        """
        self.bind()
        given = []
        for spec, order, x in zip(self.part.inputs, self._orders, inputs, strict=True):
            fits = len(spec.shape) == x.ndim and all(
                wanted == found for wanted, found in zip(spec.shape, x.shape) if isinstance(wanted, int)
            )
            if not fits or str(x.dtype) != f"torch.{spec.dtype}":
                raise ValueError(
                    f"{spec.name} is {x.dtype} {tuple(x.shape)}, the engine takes {spec.dtype} {spec.shape}"
                )
            given.append(_in_order(x, order))
        return tuple(self.model.run(given))


# ------------------------------------------------------------------------------------------------------------- running


class InductorBackend(TorchBackend):
    """Runs an engine of AOTInductor; on a CUDA GPU its calls are recorded as CUDA graphs, as those of PyTorch are.

    Args:
        folder: The engine.
        manifest: Its manifest, which matches (`Manifest.match`).
        pipe: The model, whose weights it reads.
        recorder: As `TorchBackend` has it.
    """

    name = "inductor"
    reuses = False

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        pipe: MotionTransfer,
        *,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        super().__init__(pipe, recorder=recorder)
        self.folder, self.manifest = folder, manifest
        self._packages: dict[str, _Package] = {}
        with self.prepared():
            pass  # weights are laid out now as the packages were compiled for

    def prepare_shape(self, frames: int, height: int, width: int) -> None:
        """Open the packages of a size."""
        for name in PARTS:
            with contextlib.suppress(EmtError):  # which is raised where the part is used
                self._package(self._find(name, height=height, width=width))

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """Read the motion of references, one after another.

        Raises:
            EmtError: the engine has no such shape.
        """
        self._prepare_weights(latents.device)
        part = self._find("reference", frames=latents.shape[2], **self._pixels(latents))
        count = latents.shape[0]
        times = times_of(timestep, latents)
        names = [spec.name for spec in part.outputs]

        def read(i: int) -> tuple[Tensor, ...]:
            return self._package(part)([latents[i : i + 1], times[i : i + 1], text[i : i + 1]])

        self._compile_ahead(latents, ("reference", part.file), lambda: read(0))
        found = [read(i) for i in range(count)]
        return features_of(dict(zip(names, (torch.cat(x) if count > 1 else x[0] for x in zip(*found)))))

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (n, channels, h/8, w/8) of images (n, 3, h, w) from -1 to 1.

        Raises:
            EmtError: the engine has no such shape.
        """
        found = self._in_parts("vae_encoder", images, height=images.shape[2], width=images.shape[3])
        mean, std = (torch.cat(x) for x in zip(*found))
        return mean, std

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) from about -1 to 1 of latents (n, channels, h/8, w/8), not scaled.

        Raises:
            EmtError: the engine has no such shape.
        """
        return torch.cat([image for (image,) in self._in_parts("vae_decoder", latents, **self._pixels(latents))])

    def _in_parts(self, name: str, x: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, ...]]:
        part = self._find(name, height=height, width=width)
        at_once = part.shapes["images"][0]
        if x.shape[0] % at_once:
            raise EmtError(
                f"the engine's {name} takes {at_once} images at once, which do not divide {x.shape[0]}",
                f"Its clips have {self.manifest.frames} frames.",
            )
        for chunk in x.split(at_once):
            yield self._package(part)([chunk])

    def _compile_for_step(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> None:
        """Nothing: packages have their kernels, and those that they lack were compiled for the reference pass."""

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextFeatures,
        motion: PreparedMotion | None,
        execution: Execution,
    ) -> Tensor:
        def call(inputs: dict[str, Tensor]) -> Tensor:
            own = inputs["sample"]
            part = self._find("denoise", samples=own.shape[0], frames=own.shape[2], **self._pixels(own))
            return self._package(part)(list(inputs.values()))[0]

        return by_reference(sample, timestep, text, motion, call)

    # ------------------------------------------------------------------------------------------------------- packages

    def _pixels(self, latents: Tensor) -> dict[str, int]:
        factor = self.pipe.vae_scale_factor
        return {"height": latents.shape[-2] * factor, "width": latents.shape[-1] * factor}

    def _find(self, name: str, **shape: int) -> Part:
        for part in self.manifest.parts:
            if part.name == name and all(part.shapes[d][0] <= n <= part.shapes[d][1] for d, n in shape.items()):
                return part
        requested = ", ".join(f"{dimension} {n}" for dimension, n in shape.items())
        raise EmtError(
            f"the engine has no {name} for {requested}; its sizes are {', '.join(map(str, self.manifest.sizes))} of "
            f"{self.manifest.frames} frames, up to {2 * self.manifest.batch[1]} samples",
            "Build one that has it with emt build-engine.",
        )

    def _package(self, part: Part) -> _Package:
        package = self._packages.get(part.file)
        if package is None:
            module = nn.Module()
            if part.name.startswith("vae"):
                module.vae = self.pipe.vae
            else:
                module.unet = self.unet
            package = self._packages[part.file] = _Package(self.folder, part, module, self.pipe.device)
        return package
