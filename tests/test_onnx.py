"""Engines of ONNX files: what is in them, and that onnxruntime computes what the network does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emt.backbones.sd15.random_model import random_model
from emt.errors import EmtError
from emt.pipeline import load_pipeline
from emt_engines.build import build_engine, open_engine
from emt_engines.fingerprint import Weights
from emt_engines.manifest import Manifest, Request, Size
from emt_engines.onnx_export import PARTS, export
from emt_engines.parity import difference
from emt_kernels.temporal_attention import temporal_attention_reference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

FRAMES = 3


def request(**changes) -> Request:
    values = {"backend": "onnx", "precision": "fp32", "device": "cpu", "sizes": (Size.parse("32x32..64x48"),)}
    values |= {"frames": FRAMES, "batch": (1, 2), "weights": Weights({})}
    return Request(**values | changes)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    # One level: tracing takes most of the time. Networks of two levels are in test_tensorrt.py.
    own = [f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{name}" for name in "qk"]
    sizes = {"block_out_channels": (16,), "denoising_layers": [*own, "up_blocks.0.resnets.0.norm1"]}
    folder = random_model(tmp_path_factory.mktemp("model") / "one-level", **sizes, frames=FRAMES)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def engine(pipe, tmp_path_factory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("engine") / "onnx"
    return folder, build_engine(pipe, request(), folder)


def nodes(folder: Path, name: str):
    return onnx.load(folder / f"{name}.onnx", load_external_data=False)


# ---------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize(("batch", "references", "frames", "others", "tokens"), [(1, 1, 3, 3, 5), (6, 3, 4, 2, 1)])
def test_the_node_is_defined_as_the_network_computes_it(batch, references, frames, others, tokens):
    """For any number of references that divides the batch, and any number of their frames."""
    import onnx.parser
    from onnx import TensorProto, helper

    from emt_engines.onnx_export import DOMAIN, FUNCTION, NODE, OPSET

    heads, channels = 2, 8
    names = ("query", "key", "value", "reference_key", "reference_value", "position_key", "position_value", "scale")
    clip, other = (batch, frames, tokens, channels), (references, others, tokens, channels)
    shapes = [clip] * 3 + [other] * 2 + [(others, channels)] * 2 + [(batch, others, tokens)]
    torch.manual_seed(batch)
    given = {name: torch.randn(shape) for name, shape in zip(names, shapes)}
    node = helper.make_node(NODE, names, ["out"], domain=DOMAIN, heads=heads, plugin_namespace=DOMAIN)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in given.items()]
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 4)]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=[onnx.parser.parse_function(FUNCTION)], opset_imports=opsets, ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in given.items()})
    query, key, value, *reference = given.values()
    wanted = temporal_attention_reference(query, key, value, heads, *reference)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the files


def test_a_build_measures_each_part_to_a_hundred_thousandth(engine):
    """onnxruntime against the eager network: smallest, typical and largest size; one sample, and as many as fit."""
    _, manifest = engine
    assert [part.name for part in manifest.parts] == list(PARTS)
    for part in manifest.parts:
        assert part.parity is not None
        assert part.parity <= 1e-5, part.name


def test_files_hold_for_sizes_and_samples_that_nobody_requested(engine, pipe):
    from emt_engines.onnx_export import as_file_takes
    from emt_engines.parts import function

    folder, _ = engine
    session = onnxruntime.InferenceSession(str(folder / "denoise.onnx"), providers=["CPUExecutionProvider"])
    for samples, width, height in ((1, 16, 112), (5, 48, 16)):
        made = function(pipe, "denoise", width=width, height=height, frames=FRAMES, samples=samples)
        inputs = {name: x.numpy() for name, x in as_file_takes(made.inputs).items()}
        found = torch.from_numpy(session.run(None, inputs)[0])
        with torch.no_grad():
            assert difference(found, made.module(*made.inputs.values())) <= 1e-5


def test_samples_follow_their_references_in_turn(engine, pipe):
    """Sample i follows reference i mod n, as the network has it: an engine runs each reference's samples apart."""
    folder, manifest = engine
    backend = open_engine(folder, manifest, pipe)
    torch.manual_seed(0)
    with torch.no_grad():
        text = pipe.unet.encode_text(torch.randn(4, 77, pipe.unet.config.cross_attention_dim))
        clips = torch.randn(2, 4, FRAMES, 4, 6)
        prompts = torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
        features = backend.encode_reference(clips, torch.tensor(400), prompts)
        read = pipe.unet.encode_reference(clips, torch.tensor(400), prompts)
        for path, pair in read.layers.items():
            for own, wanted in zip(features.layers[path], pair):
                assert difference(own, wanted) <= 1e-5
        motion = backend.prepare_motion(features)
        sample, timestep = torch.randn(4, 4, FRAMES, 4, 6), torch.tensor(17)
        found = backend.denoise(sample, timestep, text, motion)
        assert difference(found, pipe.unet(sample, timestep, text, motion)) <= 1e-5


def test_temporal_integration_is_one_node_with_a_definition(engine, pipe):
    folder, _ = engine
    model = nodes(folder, "denoise")
    found = [node for node in model.graph.node if node.domain == "emt"]
    assert len(found) == 2 * len(pipe.unet.fusion_modules())
    for node in found:
        assert node.op_type == "TemporalAttention"
        assert len(node.input) == 8
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"heads": 2, "plugin_namespace": b"emt", "plugin_version": b"1"}
    assert [(f.domain, f.name) for f in model.functions] == [("emt", "TemporalAttention")]
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "emt": 1}


@pytest.mark.parametrize("name", PARTS)
def test_files_are_valid_and_say_what_varies(engine, name):
    folder, manifest = engine
    onnx.checker.check_model(str(folder / f"{name}.onnx"))
    model = nodes(folder, name)
    assert {tensor.data_location for tensor in model.graph.initializer if len(tensor.raw_data) > 1024} == set()
    assert {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"} == {
        f"{name}.onnx.data"
    }
    assert not any(node.metadata_props for node in model.graph.node)
    part = next(part for part in manifest.parts if part.name == name)
    words = {size for spec in part.inputs for size in spec.shape if isinstance(size, str)}
    counted = {"denoise": {"samples"}, "reference": set()}.get(name, {"images"})
    factors = {"vae_encoder": {"8*height", "8*width"}}
    assert words == counted | factors.get(name, {"height", "width"})


def test_inputs_have_the_names_of_the_network(engine, pipe):
    _, manifest = engine
    part = next(part for part in manifest.parts if part.name == "denoise")
    names = [spec.name for spec in part.inputs]
    assert names[:2] == ["sample", "timestep"]
    for path in pipe.unet.fusion_modules():
        assert f"motion/{path}/0/key" in names
        assert f"motion/{path}/1/scaler" in names
    key = next(spec for spec in part.inputs if spec.name.endswith("motion_modules.0/0/key"))
    assert key.shape == (1, FRAMES, "height", "width", 16)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_shapes_that_an_engine_was_not_built_for_are_refused(engine, pipe):
    folder, manifest = engine
    backend = open_engine(folder, manifest, pipe)
    with pytest.raises(EmtError, match="width 128") as caught:
        backend.decode_images(torch.zeros(1, 4, 4, 16))
    assert "32 to 64" in caught.value.problem


def test_clips_without_a_reference_are_refused(engine, pipe):
    folder, manifest = engine
    text = pipe.unet.encode_text(torch.zeros(1, 77, pipe.unet.config.cross_attention_dim))
    with pytest.raises(EmtError, match="reference"):
        open_engine(folder, manifest, pipe).denoise(torch.zeros(1, 4, FRAMES, 4, 4), torch.tensor(1), text, None)


# ------------------------------------------------------------------------------------------------------------- in fp16


def test_fp16_files_have_fp16_tensors(pipe, tmp_path):
    half = load_pipeline(pipe.name_or_path, dtype=torch.float16)
    inputs, outputs = export(half, "vae_decoder", FRAMES, tmp_path / "vae_decoder.onnx")
    assert {spec.dtype for spec in (*inputs, *outputs)} == {"float16"}
    weights = [t for t in nodes(tmp_path, "vae_decoder").graph.initializer if t.dims and not t.name.startswith("val_")]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
def test_a_full_size_file(tmp_path):
    """The network of Stable Diffusion 1.5's size, two frames of 64×64 in fp16: about 5 minutes and 12 GB of memory."""
    pipe = load_pipeline(random_model(tmp_path / "sd15", size="sd15", dtype=torch.float16), dtype=torch.float16)
    file = tmp_path / "denoise.onnx"
    export(pipe, "denoise", 2, file)
    model = onnx.load(file, load_external_data=False)
    assert sum(node.domain == "emt" for node in model.graph.node) == 2 * len(pipe.unet.fusion_modules())
    weights = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    # What prepares text and motion is not in it: keys and values of prompts, projections and scalers of references.
    assert 0.8 * weights < file.with_name("denoise.onnx.data").stat().st_size <= weights
