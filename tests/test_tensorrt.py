"""Engines of TensorRT and TensorRT for RTX, as far as they go without a GPU.

TensorRT for RTX builds without one, so that its engine here is a real one. What runs engines is tested on a stand-in
for the library that computes the file with onnxruntime, on the memory that it is pointed to. The plugin is compiled,
assembled and registered with TensorRT's own Python code (`tensorrt_stub`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import re
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import kernel_test, needs_triton
from tensorrt_stub import Creation, Expression, Expressions, Setter, stub

from emt.backbones.sd15.random_model import random_model
from emt.errors import EmtError
from emt.pipeline import load_pipeline
from emt.storage import sha256_of
from emt_engines import plugin, tensorrt
from emt_engines.base import CannotRun
from emt_engines.fingerprint import Host, Weights
from emt_engines.manifest import Manifest, Part, Request, Size, TensorSpec
from emt_engines.onnx_export import export, ranges
from emt_engines.parity import difference
from emt_engines.products import RTX, TENSORRT
from emt_engines.tensorrt import profile
from emt_kernels.temporal_attention import temporal_attention_reference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

FRAMES = 3
SIZES = (Size.parse("32x32"), Size.parse("48x32..64x64"))


def request(**changes) -> Request:
    values = {"backend": "tensorrt-rtx", "precision": "fp32", "device": "cpu", "sizes": SIZES, "frames": FRAMES}
    return Request(**values | {"batch": (1, 2), "weights": Weights({})} | changes)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    # Heads of 8 channels: narrower than any that TensorRT has fused attention for.
    sizes = {"block_out_channels": (16, 16), "attention_levels": [], "frames": FRAMES}
    folder = random_model(tmp_path_factory.mktemp("model") / "two-levels", **sizes)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def denoise(pipe, tmp_path_factory) -> tuple[Path, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The denoising part as an ONNX file, its inputs and its outputs."""
    file = tmp_path_factory.mktemp("onnx") / "denoise.onnx"
    return file, *export(pipe, "denoise", FRAMES, file)


@pytest.fixture(scope="module")
def profiles(denoise):
    return [profile(denoise[1], size, 16, ranges("denoise", request())) for size in SIZES]


# ------------------------------------------------------------------------------------------------------------ building


def test_profiles_hold_least_typical_and_greatest_shapes():
    inputs = [
        TensorSpec("sample", "float16", ("samples", 4, 16, "8*height", "8*width")),
        TensorSpec("motion/m/0/key", "float16", (1, 16, "2*height", "2*width", 640)),
        TensorSpec("motion/m/0/position_key", "float16", (16, 640)),
    ]
    shapes = {"samples": (1, 8), "frames": (16, 16), "width": (256, 768), "height": (256, 512)}
    found = profile(inputs, Size.parse("256x256..768x512"), 64, shapes)
    assert found == {
        "sample": ((1, 4, 16, 32, 32), (2, 4, 16, 48, 64), (8, 4, 16, 64, 96)),
        "motion/m/0/key": ((1, 16, 8, 8, 640), (1, 16, 12, 16, 640), (1, 16, 16, 24, 640)),
    }


def test_the_network_has_the_files_inputs_outputs_and_types(denoise):
    trt = pytest.importorskip("tensorrt_rtx")
    file, inputs, outputs = denoise
    log = tensorrt._log(trt)
    network, _parser = tensorrt.parse(trt, log, trt.Builder(log), file, plugin=False)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    assert [t.name for t in tensors] == [spec.name for spec in inputs]
    assert {t.dtype for t in tensors} == {trt.float32}
    for tensor, spec in zip(tensors, inputs):
        assert tuple(tensor.shape) == tuple(-1 if isinstance(extent, str) else extent for extent in spec.shape)
    assert [network.get_output(i).name for i in range(network.num_outputs)] == [spec.name for spec in outputs]


def test_an_rtx_engine_is_built_without_a_gpu(denoise, profiles, caplog):
    """For four kinds of GPUs, with a profile for each size; its layers read and write what the file says."""
    trt = pytest.importorskip("tensorrt_rtx")
    file, inputs, _ = denoise
    with caplog.at_level(logging.DEBUG, "emt_engines.tensorrt"):
        plan = tensorrt.build(trt, file, profiles, RTX.targets)
    for name in ("sample", "timestep", "prediction", *(spec.name for spec in inputs if "motion" in spec.name)):
        assert name.encode() in plan, name
    (listing,) = (text for text in map(logging.LogRecord.getMessage, caplog.records) if "\nI/O Tensors:" in text)
    layers, tensors = listing.split("\nI/O Tensors:")
    assert {"correlation", "gemm"} <= set(re.findall(r"LayerType: (\w+)", layers))  # convolutions and products
    assert "node__symbolic" in layers  # temporal integration, by its own definition
    assert re.findall(r"Name: (\S+), IOMode: Input, DataType: Float", tensors) == [spec.name for spec in inputs]
    assert re.findall(r"Name: (\S+), IOMode: Output, DataType: Float", tensors) == ["prediction"]
    for name in profiles[0]:
        line = next(line for line in tensors.splitlines() if f"Name: {name}," in line)
        for kind, place in (("MinShape", 0), ("OptShape", 1), ("MaxShape", 2)):
            shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(rf"{kind}: \[([\d,]+)\]", line)]
            assert shapes == [own[name][place] for own in profiles]


def test_sizes_that_the_levels_do_not_halve_evenly_are_refused(pipe, tmp_path):
    with pytest.raises(EmtError, match="multiples of 16"):
        tensorrt.TensorRTRTXBuilder().build(
            pipe, request(sizes=(Size.parse("40x32"),)), tmp_path, lambda what, done: None
        )


def test_a_file_that_cannot_be_read_is_refused_in_words(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    (tmp_path / "bad.onnx").write_bytes(b"no ONNX")
    with pytest.raises(EmtError, match=r"tensorrt_rtx cannot read bad\.onnx"):
        tensorrt.build(trt, tmp_path / "bad.onnx", [], RTX.targets)


def test_tensorrt_is_requested_where_it_is_missing():
    with pytest.raises(EmtError, match="tensorrt cannot be loaded") as caught:
        tensorrt.TensorRTBuilder().check(request(backend="tensorrt", device="cuda:0"))
    assert "pip install tensorrt" in caught.value.hint


@pytest.mark.slow
def test_a_full_size_rtx_engine(tmp_path):
    """Minutes of many cores, and 9 GB of memory, less than half of it before the build itself."""
    trt = pytest.importorskip("tensorrt_rtx")
    pipe = load_pipeline(random_model(tmp_path / "sd15", size="sd15", dtype=torch.float16), dtype=torch.float16)
    file = tmp_path / "denoise.onnx"
    inputs, _ = export(pipe, "denoise", 16, file)
    del pipe
    gc.collect()
    full = request(sizes=(Size.parse("512x512"),), frames=16, batch=(1, 1))
    plan = tensorrt.build(trt, file, [profile(inputs, full.sizes[0], 64, ranges("denoise", full))], RTX.targets)
    assert len(plan) > 2e9


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_gpus_that_run_rtx_engines(capability):
    assert not RTX.refuses(capability)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (10, 0)])
def test_gpus_that_do_not(capability, monkeypatch):
    assert RTX.refuses(capability)
    assert not TENSORRT.refuses(capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(CannotRun, match=rf"NVIDIA H100 has {capability[0]}\.{capability[1]}") as caught:
        tensorrt.refuse(RTX, torch.device("cuda:0"))
    assert "8.0, 8.6, 8.9 and 12.x" in caught.value.problem
    assert "--engine torch" in caught.value.hint


class StandIn:
    """The part of TensorRT's interface that runs engines, where an engine is an ONNX file with its weights in it."""

    __name__ = "stand-in"

    def __init__(self) -> None:
        self.contexts: list[Any] = []

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=0, INTERNAL_ERROR=1)

    def Runtime(self, log: Any) -> Any:
        runtime = pytest.importorskip("onnxruntime")

        def engine(plan: bytes) -> Any:
            session = runtime.InferenceSession(plan, providers=["CPUExecutionProvider"])

            def context() -> Any:
                self.contexts.append(StandInContext(session))
                return self.contexts[-1]

            return types.SimpleNamespace(create_execution_context=context)

        return types.SimpleNamespace(deserialize_cuda_engine=engine)


class StandInContext:
    def __init__(self, session: Any) -> None:
        self.session = session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def _memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape)

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {name: self._memory(name, shape) for name, shape in self.shapes.items()}
        self._memory("prediction", self.shapes["sample"])[:] = self.session.run(None, inputs)[0]
        return True


@pytest.fixture
def backend(pipe, denoise, profiles, tmp_path):
    file, inputs, outputs = denoise
    engine = tmp_path / "denoise.engine"
    engine.write_bytes(onnx.load(file).SerializeToString())
    shapes = ranges("denoise", request())
    part = Part("denoise", engine.name, sha256_of(engine), shapes, inputs, outputs, facts={"profiles": profiles})
    manifest = Manifest(
        backend="tensorrt-rtx",
        model="m",
        precision="fp32",
        sizes=SIZES,
        frames=FRAMES,
        batch=(1, 2),
        weights=Weights({}),
        refits=False,
        code="",
        host=Host.here("cpu"),
        bound=False,
        opset=23,
        parts=(part,),
        built="",
        seconds=0.0,
    )
    return tensorrt.TensorRTRTXBackend(tmp_path, manifest, pipe, trt=StandIn())


@torch.no_grad()
def clip(pipe, samples: int, width: int, height: int):
    features = pipe.unet.encode_reference(
        torch.randn(1, 4, FRAMES, height, width), torch.tensor(400), torch.randn(1, 77, 32)
    )
    text = pipe.unet.encode_text(torch.randn(samples, 77, 32))
    return torch.randn(samples, 4, FRAMES, height, width), text, features


def test_an_engine_computes_what_the_network_does(backend, pipe):
    """On shapes of both profiles, again and again, with other contents in the same and in other memory."""
    torch.manual_seed(0)
    with torch.no_grad():
        for samples, width, height in ((2, 4, 4), (1, 4, 4), (4, 8, 6), (2, 4, 4)):
            for timestep in (torch.tensor(981), torch.tensor(1.0)):
                sample, text, features = clip(pipe, samples, width, height)
                motion = backend.prepare_motion(features)
                found = backend.denoise(sample, timestep, text, motion)
                assert difference(found, pipe.unet(sample, timestep, text, motion)) <= 1e-5
    assert [context.profile for context in backend.trt.contexts] == [0, 0, 1]  # one context a shape


def test_steps_of_a_clip_read_the_motion_where_it_lies(backend, pipe):
    torch.manual_seed(0)
    sample, text, features = clip(pipe, 2, 4, 4)
    with torch.no_grad():
        motion = backend.prepare_motion(features)
        first = backend.denoise(sample, torch.tensor(1), text, motion)
        (context,) = backend.trt.contexts
        before = dict(context.addresses)
        second = backend.denoise(sample, torch.tensor(2), text, motion)
    assert context.addresses == before
    for path, pair in motion.layers.items():
        for i, prepared in enumerate(pair):
            assert before[f"motion/{path}/{i}/key"] == prepared.key.data_ptr()
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(first, backend.denoise(sample, torch.tensor(1), text, motion))


def test_a_shape_of_no_profile_is_refused(backend, pipe):
    sample, text, features = clip(pipe, 2, 4, 6)  # the width of one size and the height of the other
    with torch.no_grad(), pytest.raises(EmtError, match=r"32x32, 48x32\.\.64x64"):
        backend.denoise(sample, torch.tensor(1), text, backend.prepare_motion(features))


# ---------------------------------------------------------------------------------------------------------- the plugin

SHAPES = [(8, 320, 16, torch.float16), (8, 640, 16, torch.bfloat16), (8, 1280, 16, torch.float16)]


def ptxas() -> Path:
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.mark.parametrize(("heads", "channels", "frames", "dtype"), SHAPES)
def test_the_plugins_code_is_portable(heads, channels, frames, dtype, tmp_path):
    """PTX that old drivers read, with parameters in TensorRT's order and no others, for GPUs from 8.0 on."""
    assembler = ptxas()
    kernel = plugin.compile_kernel(heads, channels, frames, frames, dtype)
    assert ".version 8.0\n" in kernel.ptx
    assert ".target sm_80\n" in kernel.ptx
    types_ = [re.search(r"\.param \.(u\d+)", line)[1] for line in plugin.parameters(kernel.ptx)]
    assert types_ == ["u64"] * 8 + ["u32"] * 3 + ["u64"]
    assert kernel.shared <= 48 * 1024
    assert re.search(rf"\.reqntid {kernel.threads}\b", kernel.ptx)
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.ptx, encoding="utf-8")
    for target in ("sm_80", "sm_90", "sm_120"):
        subprocess.run(
            [assembler, "--gpu-name", target, source, "-o", tmp_path / "kernel.cubin"], check=True, capture_output=True
        )


@pytest.mark.parametrize("scratch", ["global_scratch_size", "profile_scratch_size"])
def test_code_that_wants_scratch_memory_is_not_taken(scratch):
    ptx = plugin.compile_kernel(*SHAPES[0][:3], 16, torch.float16).ptx if ptxas() else ""
    with pytest.raises(AssertionError, match=scratch):
        plugin._without_scratch(ptx, types.SimpleNamespace(**{scratch: 4}), 12)


@needs_triton
def test_code_that_reads_scratch_pointers_is_not_taken():
    ptx = (
        ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.u64 %rd1, [k_param_N]; }"
    )
    none = types.SimpleNamespace()
    assert plugin.parameters(plugin._without_scratch(ptx.replace("N", "0"), none, 1)) == [".param .u64 k_param_0"]
    with pytest.raises(AssertionError, match="k_param_1"):
        plugin._without_scratch(ptx.replace("N", "1"), none, 1)


@kernel_test
@pytest.mark.parametrize(("batch", "references"), [(1, 1), (4, 2)])
def test_the_plugins_kernel_computes_temporal_integration(device, batch, references):
    heads, channels, frames, others, tokens = 2, 32, 3, 2, 5
    torch.manual_seed(0)
    clip_, other = (batch, frames, tokens, channels), (references, others, tokens, channels)
    shapes = [clip_] * 3 + [other] * 2 + [(others, channels)] * 2 + [(batch, others, tokens)]
    given = [torch.randn(shape, device=device) for shape in shapes]
    out = torch.empty(clip_, device=device)
    constants = {"PIXELS": 2, "HEADS": heads, "HEAD_SIZE": 16, "FRAMES": frames, "REFERENCE_FRAMES": others}
    constants |= {"HEADS_TOGETHER": 2, "ROWS": 16, "REFERENCE_ROWS": 16, "COLUMNS": 16, "REST": 0, "STAGES": 1}
    constants |= {"SHARED": references < batch, "SOFTENING": 1.4426950408889634 / 4}
    plugin._plugin_kernel[(batch * 3,)](*given, batch, tokens, references, out, **constants, num_warps=2)
    wanted = temporal_attention_reference(*given[:3], heads, *given[3:])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("samples", "tokens"), [(2, 4096), (8, 600)])
def test_tensorrt_takes_the_plugin(samples, tokens):
    """TensorRT's own code registers it, checks its functions, and gets from them what it launches."""
    ptxas()
    heads, channels, frames = 8, 320, 16
    with stub() as trt:
        plugin.register(trt)
        plugin.register(trt)
        creator = trt.get_plugin_registry().get_creator("TemporalAttention", "1", "emt")
        heads_field = trt.PluginField("heads", np.array([heads]), trt.PluginFieldType.INT64)
        made = creator.create_plugin(
            *("TemporalAttention", "emt", trt.PluginFieldCollection([heads_field])),
            *(trt.TensorRTPhase.BUILD, Creation.PREFER_AOT),
        )
        known, varying = Expression, lambda x: Expression(x, constant=False)
        own = [varying(samples), known(frames), varying(tokens), known(channels)]
        other = [known(1), known(frames), varying(tokens), known(channels)]
        row, scale = [known(frames), known(channels)], [varying(samples), known(frames), varying(tokens)]
        inputs = [own, own, own, other, other, row, row, scale]
        assert made.get_output_data_types([trt.float16] * 8, [len(x) for x in inputs]) == [trt.float16]
        (out,) = made.get_output_shapes(inputs, [], Expressions())
        assert [x.value for x in out] == [samples, frames, tokens, channels]
        descriptions = []
        for _ in range(9):
            description = trt.DynamicPluginTensorDesc()
            description.desc.type, description.desc.format = trt.float16, trt.TensorFormat.LINEAR
            descriptions.append(description)
        assert len(made.get_supported_format_combinations(descriptions, 8)) == 9
        made.set_tactic(0)
        launch, extras = types.SimpleNamespace(), Setter()
        made.get_launch_params(inputs, descriptions, 8, launch, extras, Expressions())
        name, ptx = made.get_kernel([d.desc for d in descriptions[:8]], [descriptions[8].desc])
    kernel = plugin.compile_kernel(heads, channels, frames, frames, torch.float16)
    assert launch.grid_x.expr.value == samples * kernel.groups * -(-tokens // kernel.pixels)
    assert (launch.block_x.expr.value, launch.shared_mem.expr.value) == (kernel.threads, kernel.shared)
    assert [extras[i].expr.value for i in range(extras.nbSymExprs)] == [samples, tokens, 1]
    assert (name, ptx) == (kernel.name, kernel.ptx.encode())


def test_with_the_plugin_the_file_has_no_definition_to_fall_back_to(denoise):
    trt = pytest.importorskip("tensorrt_rtx")
    bare = tensorrt.without_definition(denoise[0])
    model = onnx.load(bare, load_external_data=False)
    assert not model.functions
    assert any(node.domain == "emt" for node in model.graph.node)
    log = tensorrt._log(trt)
    with pytest.raises(EmtError, match="plugin"):
        tensorrt.parse(trt, log, trt.Builder(log), bare, plugin=False)
