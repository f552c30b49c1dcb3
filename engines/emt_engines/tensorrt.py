"""TensorRT and TensorRT for RTX: engines built from the ONNX files, and run on PyTorch's tensors.

Both have one programming interface, in modules of different names; what differs is said by a `Product`.

| | tensorrt | tensorrt-rtx |
|---|---|---|
| builds | on the GPU that runs it | anywhere, also without a GPU |
| runs | on that GPU | on compute capabilities 8.0, 8.6, 8.9 and 12.x |
| temporal integration | the plugin of `emt_engines.plugin`, or the file's own definition | the file's own definition |

An engine has a profile for each size that it was built for. At run time each shape has an execution context and its
buffers of its own, so that a call allocates nothing, and is recorded as a CUDA graph.
"""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emt.errors import EmtError
from emt.features import MotionFeatures, PreparedMotion
from emt.storage import sha256_of
from emt_engines import onnx_export
from emt_engines.attempts import repeat
from emt_engines.base import CannotRun
from emt_engines.manifest import Manifest, Part, Request, Size, TensorSpec
from emt_engines.onnx_export import OPSET, PARTS, FileBackend, OnnxBuilder, check_sizes, coarsest, ranges
from emt_engines.products import RTX, TENSORRT, Product

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ building


class _Builder:
    """Exports a part, has the library build an engine of it, and keeps that alone."""

    product: Product
    name: str
    depends: tuple[str, ...]
    bound: bool
    refits = False
    opset = OPSET
    plugs = False  # whether it takes the plugin

    def check(self, request: Request) -> None:
        """Raise EmtError unless an engine can be built here.

        Raises:
            EmtError: a library is missing or too old.
        """
        OnnxBuilder().check(request)
        self.product.load()

    def build(
        self, pipe: MotionTransfer, request: Request, folder: Path, progress: Callable[[str, float], None]
    ) -> list[Part]:
        """Build an engine of each part into `folder`; see `emt_engines.base.Builder`."""
        check_sizes(pipe, request)
        trt = self.product.load()
        plugin = self.plugs and request.plugin
        parts = []
        for i, name in enumerate(PARTS):

            def say(what: str, done: float = i / len(PARTS)) -> None:
                progress(what, done)

            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                source = Path(temporary) / f"{name}.onnx"
                work = functools.partial(onnx_export.export, pipe, name, request.frames, source)
                inputs, outputs = repeat(f"exporting {name}", work, say)
                shapes = ranges(name, request)
                unit = pipe.vae_scale_factor * (1 if name.startswith("vae") else coarsest(pipe, name))
                profiles = [profile(inputs, size, unit, shapes) for size in request.sizes]
                progress(f"building {name}", (i + 0.3) / len(PARTS))
                plan = build(trt, source, profiles, self.product.targets, plugin=plugin and name == "denoise")
            file = folder / f"{name}.engine"
            file.write_bytes(plan)
            facts = {"profiles": profiles, "plugin": plugin and name == "denoise"}
            parts.append(Part(name, file.name, sha256_of(file), shapes, inputs, outputs, facts=facts))
        return parts


class TensorRTBuilder(_Builder):
    """Builds with TensorRT, on the GPU that is to run the engine."""

    product, name = TENSORRT, TENSORRT.backend
    depends, bound = ("tensorrt",), True
    plugs = True

    def check(self, request: Request) -> None:
        """Raise EmtError unless an engine can be built here.

        Raises:
            EmtError: TensorRT is missing or too old, or there is no CUDA GPU.
        """
        super().check(request)
        version = str(self.product.load().__version__)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < (10, 10):
            raise EmtError(f"TensorRT {version} is too old", self.product.install)
        if not request.device.startswith("cuda"):
            raise EmtError(
                f"TensorRT builds engines on the GPU that runs them, not on {request.device}",
                "Name one with --device cuda:0, or build anywhere with --backend tensorrt-rtx.",
            )


class TensorRTRTXBuilder(_Builder):
    """Builds with TensorRT for RTX, anywhere."""

    product, name = RTX, RTX.backend
    depends, bound = ("tensorrt-rtx",), False


Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Least, typical and greatest shape of each input that varies."""


def profile(inputs: Sequence[TensorSpec], size: Size, unit: int, shapes: Mapping[str, tuple[int, int]]) -> Profile:
    """The shapes that an engine takes for a size.

    Args:
        inputs: Of the part, as its file declares them.
        size: In pixels.
        unit: Pixels of a row or column of the part's coarsest grid.
        shapes: Of the part, `samples` or `images` among them.
    """
    counted = next((name for name in ("samples", "images") if name in shapes), None)
    low, high = shapes[counted] if counted else (1, 1)
    typical = high if counted == "images" else min(2, high)
    values = []
    for (width, height), count in ((size.least, low), (size.typical, typical), (size.most, high)):
        # A size in the middle need not be a multiple of the unit; the least and the greatest are.
        values.append({"width": -(-width // unit), "height": -(-height // unit), counted: count})
    found: Profile = {}
    for spec in inputs:
        if any(isinstance(extent, str) for extent in spec.shape):
            least, middle, most = (tuple(_extent(extent, v) for extent in spec.shape) for v in values)
            found[spec.name] = least, middle, most
    return found


def _extent(extent: int | str, values: Mapping[str | None, int]) -> int:
    if isinstance(extent, int):
        return extent
    factor, _, name = extent.rpartition("*")
    return int(factor or 1) * values[name]


def build(trt: Any, source: Path, profiles: Sequence[Profile], targets: Sequence[str], plugin: bool = False) -> bytes:
    """Build an engine.

    Args:
        trt: The library's module.
        source: An ONNX file.
        profiles: For each size.
        targets: Compute capabilities, by the library's names.
        plugin: Have the plugin compute temporal integration, instead of the file's own definition.

    Raises:
        EmtError: with what the library says, if it cannot.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network, parser = parse(trt, log, builder, source, plugin)
    _allow_attention_in_steps(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the engine can be inspected
    for shapes in profiles:
        own = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            own.set_shape(name, least, typical, most)
        config.add_optimization_profile(own)
    if targets:
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    plan = builder.build_serialized_network(network, config)
    del network, parser
    if plan is None:
        raise EmtError(f"{trt.__name__} cannot build {source.stem}: {log.problem()}", "See --help for other backends.")
    return bytes(plan)


def parse(trt: Any, log: Any, builder: Any, source: Path, plugin: bool) -> tuple[Any, Any]:
    """The network of an ONNX file, strongly typed: every type is the file's; and the parser, which has the weights.

    Raises:
        EmtError: with what the parser says, if it cannot.
    """
    flags = ["STRONGLY_TYPED"]
    if plugin:
        from emt_engines.plugin import register

        register(trt)
        flags.append("PREFER_AOT_PYTHON_PLUGINS")
    known = trt.NetworkDefinitionCreationFlag.__members__  # from TensorRT 11 on every network is strongly typed
    network = builder.create_network(sum(1 << int(known[flag]) for flag in flags if flag in known))
    parser = trt.OnnxParser(network, log)
    file = without_definition(source) if plugin else source
    if not parser.parse_from_file(str(file)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EmtError(f"{trt.__name__} cannot read {source.name}: {said} {log.problem()}".strip())
    return network, parser


def without_definition(source: Path) -> Path:
    """A file beside an ONNX file that lacks the definition of temporal integration, so that it must be a plugin."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    model.ClearField("functions")
    file = source.with_name(f"plugin-{source.name}")
    file.write_bytes(model.SerializeToString(deterministic=True))
    return file


def _allow_attention_in_steps(trt: Any, network: Any) -> None:
    """Let attention without a fused kernel, as in fp32 or of narrow heads, be computed in steps: else it is refused."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _log(trt: Any) -> Any:
    """A logger of the library's class that keeps errors for an EmtError's message."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            logger.debug("%s: %s", severity.name, message)

        def problem(self) -> str:
            return "; ".join(self.errors[-3:])

    return Log()


# ------------------------------------------------------------------------------------------------------------- running


class _CapturedCall:
    """A part at one shape: an execution context, and the buffers that it reads and writes.

    Inputs are copied into buffers, but for those of motion, a GiB, which are read in place.
    """

    def __init__(self, engine: Any, profile: int, part: Part, inputs: Mapping[str, Tensor], stream: int) -> None:
        self.context = engine.create_execution_context()
        self.context.set_optimization_profile_async(profile, stream)
        self.given: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        for name, x in inputs.items():
            self.context.set_input_shape(name, tuple(x.shape))
            if not name.startswith("motion/"):
                self.buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                self.context.set_tensor_address(name, self.buffers[name].data_ptr())
        device = next(iter(inputs.values())).device
        self.outputs = []
        for spec in part.outputs:
            shape = tuple(self.context.get_tensor_shape(spec.name))
            self.outputs.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device))
            self.context.set_tensor_address(spec.name, self.outputs[-1].data_ptr())
        self.replay: Callable[[], None] | None = None
        self.calls = 0

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        """Have it read these inputs."""
        own = [name for name in inputs if name in self.buffers]
        torch._foreach_copy_([self.buffers[name] for name in own], [inputs[name] for name in own])
        moved = False
        for name in inputs.keys() - self.buffers.keys():
            x = inputs[name]
            known = self.given.get(name)
            if known is None or known.data_ptr() != x.data_ptr() or not x.is_contiguous():
                x = x.contiguous()
                self.context.set_tensor_address(name, x.data_ptr())
                moved = True
            self.given[name] = x  # kept, so that its memory cannot become another tensor's
        if moved:
            self.replay, self.calls = None, 0


class _Backend(FileBackend):
    """Runs engines of one of the two libraries.

    Args:
        folder: The engine.
        manifest: Its manifest, which matches (`Manifest.match`).
        pipe: The model.
        trt: The library's module, if not the one that is installed.
    """

    product: Product

    def __init__(self, folder: Path, manifest: Manifest, pipe: MotionTransfer, *, trt: Any | None = None) -> None:
        super().__init__(folder, manifest, pipe)
        if trt is None:
            refuse(self.product, pipe.device)
            try:
                trt = self.product.load()
            except EmtError as error:
                raise CannotRun(error.problem, error.hint) from None
        self.trt = trt
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engines: dict[str, Any] = {}
        self._calls: dict[tuple[Any, ...], _CapturedCall] = {}

    def prepare_motion(self, features: MotionFeatures) -> PreparedMotion:
        """Constants of references for all steps, in the memory layout that an engine reads without a copy."""
        prepared = super().prepare_motion(features)
        for pair in prepared.layers.values():
            for reference in pair:
                reference.scaler = reference.scaler.contiguous()  # a convolution leaves it channels-last
        return prepared

    def call(self, part: Part, inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        """Run a part; see `FileBackend`. Its outputs are copies, which the next call leaves alone."""
        key = (part.name, *(tuple(x.shape) for x in inputs.values()))
        call = self._calls.get(key)
        device = next(iter(inputs.values())).device
        stream = _stream(device)
        if call is None:
            call = self._calls[key] = _CapturedCall(
                self._engine(part), self._profile(part, inputs), part, inputs, stream
            )
        call.take(inputs)
        self._execute(call, device)
        return [x.clone() for x in call.outputs]

    def _execute(self, call: _CapturedCall, device: torch.device) -> None:
        if call.replay is not None:
            call.replay()
            return
        # The first call chooses and compiles kernels, which cannot be recorded.
        if call.calls and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._enqueue(call, device)
            call.replay = graph.replay
            graph.replay()
        else:
            self._enqueue(call, device)
        call.calls += 1

    def _enqueue(self, call: _CapturedCall, device: torch.device) -> None:
        if not call.context.execute_async_v3(_stream(device)):
            raise EmtError(f"{self.trt.__name__} failed: {self._log.problem()}", "Use --engine torch.")

    def _engine(self, part: Part) -> Any:
        engine = self._engines.get(part.name)
        if engine is None:
            engine = self._runtime.deserialize_cuda_engine((self.folder / part.file).read_bytes())
            if engine is None:
                raise EmtError(
                    f"the engine's {part.name} cannot be loaded: {self._log.problem()}",
                    "Build it again with emt build-engine.",
                )
            self._engines[part.name] = engine
        return engine

    def _profile(self, part: Part, inputs: Mapping[str, Tensor]) -> int:
        try:
            for i, shapes in enumerate(part.facts["profiles"]):
                if all(
                    low <= extent <= high
                    for name, (least, _, most) in shapes.items()
                    for low, extent, high in zip(least, inputs[name].shape, most)
                ):
                    return i
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a forged manifest may have any value there
            raise EmtError(
                f"the engine's {part.name} has no profiles of its inputs", "Build it again with emt build-engine."
            ) from error
        first = next(iter(inputs.values()))
        raise EmtError(
            f"the engine's {part.name} takes no input of shape {tuple(first.shape)}: it was built for "
            f"{', '.join(map(str, self.manifest.sizes))}",
            "Build one that does with emt build-engine.",
        )


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def refuse(product: Product, device: torch.device) -> None:
    """Raise `CannotRun` if a device cannot run a library's engines, before the library is loaded.

    Raises:
        CannotRun: naming the device, and what can be used on it.
    """
    if device.type != "cuda":
        raise CannotRun(f"engines of {product.backend} run on a CUDA GPU, not on {device}", "Use --engine torch.")
    capability = torch.cuda.get_device_capability(device)
    if product.refuses(capability):
        raise CannotRun(
            f"engines of {product.backend} run on compute capability {product.runs}; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}",
            "Use --engine torch here, or an engine of --backend inductor or tensorrt.",
        )


class TensorRTBackend(_Backend):
    """Runs engines of TensorRT."""

    product, name = TENSORRT, TENSORRT.backend


class TensorRTRTXBackend(_Backend):
    """Runs engines of TensorRT for RTX."""

    product, name = RTX, RTX.backend
