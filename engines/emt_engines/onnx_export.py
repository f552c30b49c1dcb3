"""ONNX: the files that TensorRT and TensorRT-RTX build their engines from, and that onnxruntime runs as they are.

One file a part, with its weights beside it, for any number of samples and any size that the network's levels halve
evenly. Temporal integration is one node, `TemporalAttention` of the domain `emt`, which the same file defines in
standard operators (`FUNCTION`): onnxruntime and TensorRT-RTX run that definition, TensorRT may take a plugin of that
name instead.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emt.backends.base import PipelineBackend
from emt.errors import EmtError
from emt.features import MotionFeatures, PreparedMotion, TextFeatures
from emt.storage import sha256_of
from emt_engines.attempts import repeat
from emt_engines.base import CannotRun
from emt_engines.inductor import images_at_once
from emt_engines.manifest import PIXELS, Manifest, Part, Request, TensorSpec
from emt_engines.parts import by_reference, features_of, function, times_of
from emt_kernels.selection import substitutes

if TYPE_CHECKING:
    import onnx

    from emt.pipeline import MotionTransfer

OPSET = 23
DOMAIN = "emt"
NODE = "TemporalAttention"
#: For how many samples, and rows and columns of the coarsest grid, a graph is traced: diffusers' VAE takes another way
#: from 64 images on. The files hold for more as well.
_MOST = 63
INSTALL = "Install what engines need: pip install 'emt-cli[engines]'"
PARTS = ("denoise", "reference", "vae_encoder", "vae_decoder")

#: What a `TemporalAttention` node computes, in ONNX's textual form: attention of every pixel's own frames to
#: themselves and to the reference's, whose keys are `scale · reference_key + position_key`, values alike. Shapes are
#: those of `emt_kernels.temporal_attention`; any number n of references that divides the batch.
FUNCTION = """
<domain: "emt", opset_import: ["" : 23]>
TemporalAttention <heads, plugin_namespace, plugin_version> (query, key, value, reference_key, reference_value,
    position_key, position_value, scale) => (out)
{
    frames = Shape <start: int = 1, end: int = 2> (query)
    channels = Shape <start: int = 3, end: int = 4> (query)
    any = Constant <value_ints: ints = [-1]> ()
    one = Constant <value_ints: ints = [1]> ()

    # The clips that share a reference: (batch, frames, tokens) -> (batch/n, n, frames, tokens, 1).
    references = Shape <start: int = 0, end: int = 3> (reference_key)
    shared = Concat <axis: int = 0> (any, references, one)
    s = Reshape (scale, shared)
    position_k = Unsqueeze (position_key, one)
    position_v = Unsqueeze (position_value, one)
    scaled_k = Mul (s, reference_key)
    scaled_v = Mul (s, reference_value)
    moved_k = Add (scaled_k, position_k)
    moved_v = Add (scaled_v, position_v)
    sizes = Shape <start: int = 1, end: int = 4> (reference_key)
    flat = Concat <axis: int = 0> (any, sizes)
    other_k = Reshape (moved_k, flat)
    other_v = Reshape (moved_v, flat)
    all_k = Concat <axis: int = 1> (key, other_k)
    all_v = Concat <axis: int = 1> (value, other_v)

    # Pixels become the batch of one attention: (batch, frames, tokens, channels) -> (pixels, frames, channels).
    pixel_q = Transpose <perm: ints = [0, 2, 1, 3]> (query)
    pixel_k = Transpose <perm: ints = [0, 2, 1, 3]> (all_k)
    pixel_v = Transpose <perm: ints = [0, 2, 1, 3]> (all_v)
    all_frames = Shape <start: int = 1, end: int = 2> (all_k)
    shape_q = Concat <axis: int = 0> (any, frames, channels)
    shape_k = Concat <axis: int = 0> (any, all_frames, channels)
    q = Reshape (pixel_q, shape_q)
    k = Reshape (pixel_k, shape_k)
    v = Reshape (pixel_v, shape_k)
    attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q, k, v)
    pixel_shape = Shape (pixel_q)
    pixels = Reshape (attended, pixel_shape)
    out = Transpose <perm: ints = [0, 2, 1, 3]> (pixels)
}
"""


# ------------------------------------------------------------------------------------------------------------ exporting


def _node(
    query: Tensor, key: Tensor, value: Tensor, heads: int, reference_key: Tensor | None = None, *reference: Tensor
) -> Tensor:
    """`temporal_attention` as an exported graph has it: the node, or ONNX's attention where there is no reference."""
    from torch.onnx import ops

    if reference_key is not None:
        return ops.symbolic(
            f"{DOMAIN}::{NODE}",
            [query, key, value, reference_key, *reference],
            {"heads": heads, "plugin_namespace": DOMAIN, "plugin_version": "1"},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out, *_ = ops.attention(q, k, v, q_num_heads=heads, kv_num_heads=heads)
    return out.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _is_tokens(name: str) -> bool:
    return name.startswith("motion/") and name.endswith(("/key", "/value"))


def grid_of(name: str, ndim: int) -> tuple[int, int] | None:
    """The dimensions of an input, as a file takes it, that are height and width; None if it has none."""
    if _is_tokens(name):
        return 2, 3
    if name in ("sample", "latents", "images") or name.endswith("/scaler"):
        return ndim - 2, ndim - 1
    return None


def as_file_takes(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with a reference's keys and values as images, (1, frames, height, width, channels), not tokens.

    So a file states how the sizes of all its inputs depend on each other; of tokens it has height times width alone.
    """
    height, width = next(iter(inputs.values())).shape[-2:]
    taken = dict(inputs)
    for name, x in inputs.items():
        if _is_tokens(name):
            scale = math.isqrt(height * width // x.shape[2])
            taken[name] = x.unflatten(2, (height // scale, width // scale))
    return taken


class _Traced(nn.Module):
    """A part whose inputs are as its file takes them; `scales` says how often their grids fit into the first one's."""

    def __init__(self, part: nn.Module, scales: Mapping[str, int]) -> None:
        super().__init__()
        self.part = part
        self.scales = scales

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """Call the part."""
        first = next(iter(inputs.values()))
        for name, scale in self.scales.items():
            # Compared before anything is computed: until then each input's size is a size of its own to the tracer,
            # and what it notes about shapes grows until tracing takes minutes.
            x = inputs[name]
            row, column = grid_of(name, x.ndim) or (0, 0)
            if x.shape[row] * scale != first.shape[-2] or x.shape[column] * scale != first.shape[-1]:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, which is no {scale}th of {tuple(first.shape)}")
        return self.part(*(x.flatten(2, 3) if _is_tokens(name) else x for name, x in inputs.items()))


def coarsest(pipe: MotionTransfer, name: str) -> int:
    """Number of rows of a part's first input for one of its coarsest grid."""
    if name.startswith("vae"):
        return pipe.vae_scale_factor if name == "vae_encoder" else 1
    return pipe.unet.facts.even_step


def _dimensions(inputs: Mapping[str, Tensor], varies: Callable[[str], bool], unit: int) -> list[dict[int, Any]]:
    """Which dimensions of each input vary, and how they depend on each other."""
    rows = next(iter(inputs.values())).shape[-2]
    count, height, width = (torch.export.Dim(name, min=1, max=_MOST) for name in ("count", "height", "width"))
    dimensions = []
    for name, x in inputs.items():
        varying: dict[int, Any] = {0: count} if varies(name) else {}
        grid = grid_of(name, x.ndim)
        if grid:
            times = unit * x.shape[grid[0]] // rows
            varying |= {d: times * size if times > 1 else size for d, size in zip(grid, (height, width))}
        dimensions.append(varying)
    return dimensions


@torch.no_grad()
def export(
    pipe: MotionTransfer, name: str, frames: int, file: Path
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Write one part of an engine as an ONNX file, and its weights beside it in a file of that name and ``.data``.

    Args:
        pipe: The model.
        name: Of the part, see `emt_engines.manifest.Part`.
        frames: Of a clip.
        file: To write.

    Returns:
        Its inputs and its outputs. Names of varying dimensions are `samples` or `images`, and `height` and `width`,
        rows and columns of the coarsest grid.
    """
    import onnx.parser

    rows = coarsest(pipe, name)
    # An ordinary shape: no size is 1, and none is another's.
    unit = PIXELS * (rows if name != "vae_encoder" else 1) * (2 if rows < PIXELS else 1)
    made = function(pipe, name, height=2 * unit, width=3 * unit, frames=frames, samples=3, images=3)
    inputs = as_file_takes(made.inputs)
    first, *others = inputs
    scales = {
        n: inputs[first].shape[-2] // inputs[n].shape[grid[0]]
        for n in others
        if (grid := grid_of(n, inputs[n].ndim)) is not None
    }
    counted = "images" if name.startswith("vae") else "samples"
    dimensions = _dimensions(inputs, lambda n: counted == "images" or made.varies(n), rows)
    with substitutes(temporal_attention=_node), _quiet():
        program = torch.export.export(
            _Traced(made.module, scales).eval(), (inputs,), dynamic_shapes=(dict(zip(inputs, dimensions)),)
        )
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=list(made.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    exported.save(str(file), external_data=True)
    model = onnx.load(file, load_external_data=False)
    _name_dimensions(model, dimensions, (counted, "height", "width"))
    for node in model.graph.node:
        node.ClearField("metadata_props")  # where in whose source code it was traced
    if any(node.domain == DOMAIN for node in model.graph.node):
        model.functions.append(onnx.parser.parse_function(FUNCTION))
    file.write_bytes(model.SerializeToString(deterministic=True))
    return tuple(_spec(value) for value in model.graph.input), tuple(_spec(value) for value in model.graph.output)


def _name_dimensions(model: onnx.ModelProto, dimensions: Sequence[Mapping[int, Any]], names: Sequence[str]) -> None:
    """Replace the tracer's symbols by names."""
    found: dict[str, str] = {}
    for value, varying in zip(model.graph.input, dimensions):
        sizes = value.type.tensor_type.shape.dim
        for dimension, name in zip(sorted(varying), names[len(names) - len(varying) :] if len(varying) > 1 else names):
            symbol = re.search(r"[a-z]\w*", sizes[dimension].dim_param)
            assert symbol is not None, value.name
            found[symbol[0]] = name
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"[a-z]\w*", lambda m: found.get(m[0], m[0]), size.dim_param)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx import helper

    kind = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return TensorSpec(value.name, dtype, tuple(size.dim_param or size.dim_value for size in kind.shape.dim))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: silence the exporter's messages on packages that are missing and on its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class OnnxBuilder:
    """Exports every part to one file for all sizes."""

    name = "onnx"
    depends: tuple[str, ...] = ()
    bound = False
    refits = False
    opset = OPSET

    def check(self, request: Request) -> None:
        """Raise EmtError unless ONNX files can be written here.

        Raises:
            EmtError: a library is missing or too old.
        """
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise EmtError(f"ONNX files cannot be written: {', '.join(missing)} is not installed", INSTALL)
        if importlib.util.find_spec("torch.onnx.ops") is None:
            raise EmtError(
                f"PyTorch {torch.__version__} is too old to write ONNX files", "Install torch 2.11 or newer."
            )

    def build(
        self, pipe: MotionTransfer, request: Request, folder: Path, progress: Callable[[str, float], None]
    ) -> list[Part]:
        """Write a file for each part into `folder`; see `emt_engines.base.Builder`."""
        check_sizes(pipe, request)
        parts = []
        for i, name in enumerate(PARTS):

            def say(what: str, done: float = i / len(PARTS)) -> None:
                progress(what, done)

            file = folder / f"{name}.onnx"
            work = functools.partial(export, pipe, name, request.frames, file)
            inputs, outputs = repeat(f"exporting {name}", work, say)
            data = file.with_name(f"{file.name}.data")
            parts.append(
                Part(
                    name=name,
                    file=file.name,
                    sha256=sha256_of(file),
                    shapes=ranges(name, request),
                    inputs=inputs,
                    outputs=outputs,
                    files={data.name: sha256_of(data)},
                )
            )
        return parts


def check_sizes(pipe: MotionTransfer, request: Request) -> None:
    """Raise EmtError unless the network's levels halve all sizes evenly.

    Raises:
        EmtError: names the sizes that they do not.
    """
    unit = pipe.vae_scale_factor * coarsest(pipe, "denoise")
    wrong = [str(s) for s in request.sizes if any(side % unit for side in (*s.least, *s.most))]
    if wrong:
        raise EmtError(
            f"--size has {', '.join(wrong)}", f"Engines made from ONNX take multiples of {unit} pixels of this model."
        )


def ranges(name: str, request: Request) -> dict[str, tuple[int, int]]:
    """The shapes that a part takes for a request: least and greatest values by dimension."""
    least, most = zip(*(s.least for s in request.sizes)), zip(*(s.most for s in request.sizes))
    (width, height), (widest, highest) = map(min, least), map(max, most)
    shapes = {"width": (width, widest), "height": (height, highest)}
    if name.startswith("vae"):
        return shapes | {"images": (1, images_at_once(request.frames, widest, highest))}
    shapes["frames"] = (request.frames, request.frames)
    return shapes | {"samples": (1, 2 * request.batch[1])} if name == "denoise" else shapes


# ------------------------------------------------------------------------------------------------------------- running


class FileBackend(PipelineBackend):
    """Runs the parts of an engine that was made from ONNX files; what derives from it says how to call one.

    Args:
        folder: The engine.
        manifest: Its manifest, which matches (`Manifest.match`).
        pipe: The model.
    """

    def __init__(self, folder: Path, manifest: Manifest, pipe: MotionTransfer) -> None:
        super().__init__(pipe)
        self.folder, self.manifest = folder, manifest
        self.parts = {part.name: part for part in manifest.parts}

    def call(self, part: Part, inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        """Run a part on inputs as its file takes them, whose shapes have been checked; its outputs, in order."""
        raise NotImplementedError

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """Read the motion of references, one after another.

        Raises:
            EmtError: the engine has no such shape.
        """
        times = times_of(timestep, latents)
        names = [spec.name for spec in self._part("reference").outputs]
        found = [
            self._run("reference", {"latents": latent, "timestep": time, "text": prompt})
            for latent, time, prompt in zip(latents.split(1), times.split(1), text.split(1))
        ]
        return features_of(dict(zip(names, (torch.cat(x) for x in zip(*found)))))

    def denoise(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """One call of the network for each reference: sample i follows reference i mod their number.

        Raises:
            EmtError: the engine has no such shape, or no reference is given.
        """
        return by_reference(sample, timestep, text, motion, lambda inputs: self._run("denoise", inputs)[0])

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (n, channels, h/8, w/8) of images (n, 3, h, w) from -1 to 1.

        Raises:
            EmtError: the engine has no such shape.
        """
        chunks = images.split(self._part("vae_encoder").shapes["images"][1])
        mean, std = (torch.cat(x) for x in zip(*(self._run("vae_encoder", {"images": chunk}) for chunk in chunks)))
        return mean, std

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) from about -1 to 1 of latents (n, channels, h/8, w/8), not scaled.

        Raises:
            EmtError: the engine has no such shape.
        """
        chunks = latents.split(self._part("vae_decoder").shapes["images"][1])
        return torch.cat([self._run("vae_decoder", {"latents": chunk})[0] for chunk in chunks])

    def _part(self, name: str) -> Part:
        if name not in self.parts:
            raise EmtError(f"the engine {self.folder} has no part {name}", "Build it again with emt build-engine.")
        return self.parts[name]

    def _run(self, name: str, inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        part = self._part(name)
        first = next(iter(inputs.values()))
        pixels = 1 if name == "vae_encoder" else self.pipe.vae_scale_factor
        requested = {"width": first.shape[-1] * pixels, "height": first.shape[-2] * pixels}
        requested["images" if name.startswith("vae") else "samples"] = first.shape[0]
        if first.ndim == 5:
            requested["frames"] = first.shape[2]
        wrong = [d for d, (low, high) in part.shapes.items() if not low <= requested[d] <= high]
        if wrong:
            given = ", ".join(f"{d} {requested[d]}" for d in wrong)
            allowed = ", ".join(f"{d} from {part.shapes[d][0]} to {part.shapes[d][1]}" for d in wrong)
            raise EmtError(
                f"the engine's {name} takes no {given}, only {allowed}", "Build one that does with emt build-engine."
            )
        return self.call(part, as_file_takes(inputs))


class OnnxBackend(FileBackend):
    """Runs ONNX files with onnxruntime, on the CPU."""

    name = "onnx"

    def __init__(self, folder: Path, manifest: Manifest, pipe: MotionTransfer) -> None:
        super().__init__(folder, manifest, pipe)
        if importlib.util.find_spec("onnxruntime") is None:
            raise CannotRun("ONNX files cannot be run: onnxruntime is not installed", INSTALL)
        if manifest.precision == "bf16":
            raise CannotRun("onnxruntime takes no bf16 on the CPU", "Build with --precision fp32 to run it there.")
        self._sessions: dict[str, Any] = {}

    def call(self, part: Part, inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        """Run a part; see `FileBackend`."""
        import onnxruntime

        session = self._sessions.get(part.file)
        if session is None:
            path = str(self.folder / part.file)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            self._sessions[part.file] = session
        device = next(iter(inputs.values())).device
        found = session.run(None, {name: x.cpu().numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x).to(device) for x in found]
