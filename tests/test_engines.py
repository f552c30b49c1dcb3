"""Engines: their manifests, what they refuse, and real ones that the CPU runs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from failing_networks import FailsOnce, KillsItself
from hypothesis import given, settings
from hypothesis import strategies as st
from program import EMT, clip, console, environment
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.exc import CppCompileError

from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.switching import WeightSwitch
from emt.backbones.wan21.random_model import random_model as wan_model
from emt.backends.base import Backend
from emt.backends.torch import TorchBackend
from emt.cache import ContentIndex
from emt.device import Device
from emt.errors import EmtError
from emt.features import Motion
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.storage import sha256_of
from emt.windowed import WindowedDenoiser, read_in_windows
from emt.windows import Windows
from emt_cli.batch.generator import Generator
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import Settings
from emt_cli.commands.build_engine import insistent_interrupts
from emt_engines.attempts import repeat
from emt_engines.build import build_engine, open_engine
from emt_engines.choice import EngineChoice, engines_dir, list_engines
from emt_engines.compiler_hooks import (
    Phases,
    declared_size_arrays,
    loses_declarations,
    rare_collections,
    remembered_writes,
)
from emt_engines.fingerprint import Host, Weights, _instructions, _tensor_digests, code_sha256, weights_of
from emt_engines.inductor import InductorBackend, _Configurations, _Job, _side_by_side, images_at_once
from emt_engines.manifest import FILE, FORMAT, Manifest, Part, Request, Size, TensorSpec
from emt_engines.parts import feature_tensors, features_of, function, text_tensors
from emt_engines.registry import builder_modules, load_builder
from emt_engines.toolchain import links_statically, toolchain
from emt_kernels.selection import _decompose

FRAMES, SIDE = 4, 32
#: One level and one layer: the least that has every kind of block.
MICRO = {
    "block_out_channels": (8,),
    "attention_levels": (),
    "attention_heads": 1,
    "motion_attention_heads": 1,
    "denoising_layers": [
        *(f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "qkv"),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.resnets.0.conv1",
    ],
    "frames": FRAMES,
    "height": SIDE,
    "width": SIDE,
    "steps": 2,
}
SIZE = Size((SIDE, SIDE), (SIDE, SIDE))
SHAPES = {"samples": (1, 4), "frames": (FRAMES, FRAMES), "width": (SIDE, SIDE), "height": (SIDE, SIDE)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "micro", **MICRO)


@pytest.fixture
def pipe(model: Path) -> MotionTransferPipeline:
    return load_pipeline(model)


def request_for(model: Path, **changes: object) -> Request:
    wanted = Request("inductor", "fp32", "cpu", (SIZE,), FRAMES, (1, 2), weights_of(model), str(model))
    return replace(wanted, **changes)  # type: ignore[arg-type]


def manifest_for(request: Request, parts: tuple[Part, ...] = (), **changes: object) -> Manifest:
    """A manifest of an engine as it would be built here for a request."""
    host = Host.here("cpu")
    versions = {name: host.versions[name] for name in ("torch", "diffusers")}
    own = Manifest(
        backend="inductor",
        model=request.model,
        precision=request.precision,
        sizes=request.sizes,
        frames=request.frames,
        batch=request.batch,
        weights=request.weights,
        refits=False,
        code=code_sha256(*builder_modules("inductor")),
        host=replace(host, versions=versions),
        bound=True,
        opset=None,
        parts=parts,
        built="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    return replace(own, **changes)  # type: ignore[arg-type]


def put_engine(folder: Path, manifest: Manifest, content: bytes = b"compiled") -> Path:
    """An engine on disk with one file, which is not compiled code."""
    folder.mkdir(parents=True)
    (folder / "denoise.pt2").write_bytes(content)
    spec = TensorSpec("sample", "float32", ("samples", 4, FRAMES, 4, 4))
    part = Part("denoise", "denoise.pt2", sha256_of(folder / "denoise.pt2"), SHAPES, (spec,), (spec,), 1e-6)
    (folder / FILE).write_bytes(replace(manifest, parts=(part,)).as_bytes())
    return folder


# ------------------------------------------------------------------------------------------------------------ manifest

sides = st.integers(1, 512).map(lambda n: 8 * n)
pairs = st.tuples(sides, sides)


@given(pairs, pairs)
def test_a_size_is_read_as_it_is_written(a, b):
    least, most = (min(a[0], b[0]), min(a[1], b[1])), (max(a[0], b[0]), max(a[1], b[1]))
    size = Size(least, most)
    assert Size.parse(str(size)) == size
    assert size.contains(Size(least, least))
    assert size.contains(Size(size.typical, size.typical))
    assert Size(least, least).contains(size) == size.exact


@pytest.mark.parametrize("text", ["", "512", "512x", "12x512", "512x512..256x512", "8192x8", "x8", "512x512,", "0x0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(EmtError) as caught:
        Size.parse(text)
    assert text in caught.value.problem


@settings(max_examples=25)
@given(
    sizes=st.lists(pairs.map(lambda a: Size(a, a)), min_size=1, max_size=3),
    frames=st.integers(2, 32),
    parity=st.none() | st.floats(0, 1),
    scale=st.floats(-4, 4),
    model=st.text(max_size=20),
)
def test_a_manifest_is_read_as_it_was_written_and_matches_itself(tmp_path_factory, sizes, frames, parity, scale, model):
    folder = tmp_path_factory.mktemp("engine")
    spec = TensorSpec("sample", "float16", ("samples", 4, frames))
    part = Part("denoise", "a.pt2", "0" * 64, SHAPES, (spec,), (spec,), parity, {"b": "1" * 64}, {"n": [1]})
    request = Request("inductor", "fp16", "cpu", tuple(sizes), frames, (1, 4), Weights({"unet": "u"}, (("l", scale),)))
    own = manifest_for(replace(request, model=model), (part,))
    (folder / FILE).write_bytes(own.as_bytes())
    found = Manifest.read(folder)
    assert found == own
    assert found.id == own.id
    assert found.match(request) == (True, "")
    assert found.parity == parity


HOST = Host("H100", "9.0", (), {"torch": "2.11.0", "cuda": "13.0"})
CHANGES = {
    "backend": ({"backend": "tensorrt"}, {}, "of the backend tensorrt, not inductor"),
    "precision": ({"precision": "bf16"}, {}, "computes in bf16, not fp16"),
    "weights": ({"weights": Weights({"unet": "other", "adapter": "a", "vae": "v"})}, {}, "another network"),
    "adapter": ({"weights": Weights({"unet": "u", "adapter": "other", "vae": "v"})}, {}, "another adapter"),
    "vae": ({"weights": Weights({"unet": "u", "adapter": "a", "vae": "other"})}, {}, "another VAE"),
    "config": ({"weights": Weights({"unet": "u", "config": "other"}), "refits": True}, {}, "networks of other sizes"),
    "lora": (
        {"weights": Weights({"unet": "u", "adapter": "a", "vae": "v"}, (("f" * 64, 0.8),))},
        {},
        "LoRAs ['ffffffff…:0.8'], not ['eeeeeeee…:1']",
    ),
    "lora scale": (
        {"weights": Weights({"unet": "u", "adapter": "a", "vae": "v"}, (("e" * 64, 0.5),))},
        {},
        "LoRAs ['eeeeeeee…:0.5'], not ['eeeeeeee…:1']",
    ),
    "lora order": (
        {"weights": Weights({"unet": "u", "adapter": "a", "vae": "v"}, (("e" * 64, 1.0), ("f" * 64, 1.0)))},
        {},
        "LoRAs ['eeeeeeee…:1', 'ffffffff…:1'], not ['eeeeeeee…:1']",
    ),
    "code": ({"code": "other"}, {}, "code of the network has changed"),
    "gpu": ({}, {"device": "A100"}, "built for H100, here is A100"),
    "capability": ({}, {"capability": "8.0"}, "compute capability 9.0, here is 8.0"),
    "torch": ({}, {"versions": {"torch": "2.12.0", "cuda": "13.0"}}, "built with torch 2.11.0, here is 2.12.0"),
    "cuda": ({}, {"versions": {"torch": "2.11.0"}}, "built with cuda 13.0, here is none"),
    "instructions": ({"host": replace(HOST, instructions=("avx512f",))}, {}, "processor with avx512f"),
    "frames": ({"frames": 8}, {}, "clips of 8 frames, not 16"),
    "size": ({"sizes": (Size((256, 256), (256, 256)),)}, {}, "256x256 pixels, not 512x512"),
    "batch": ({"batch": (1, 2)}, {}, "1..2 clips at once, not 1..4"),
    "one at once": ({"batch": (1, 1)}, {}, "makes 1 clip at once, not 1..4"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_said(what):
    """One thing is not as when it was built: the engine may not run, and the reason names it."""
    engine, here, reason = CHANGES[what]
    wanted = Size((512, 512), (512, 512))
    weights = Weights({"unet": "u", "adapter": "a", "vae": "v"}, (("e" * 64, 1.0),))
    request = Request("inductor", "fp16", "cuda:0", (wanted,), 16, (1, 4), weights)
    own = manifest_for(request, code="code", host=HOST)
    assert own.match(request, HOST, "code") == (True, "")
    ok, reported = replace(own, **engine).match(request, replace(HOST, **here), "code")
    assert not ok
    assert reason in reported


def test_an_engine_that_takes_the_models_weights_takes_any_of_its_sizes():
    request = Request("inductor", "fp16", "cuda:0", (), 0, (0, 0), Weights({"unet": "u", "config": "c"}))
    own = manifest_for(replace(request, frames=16), code="code", host=HOST, refits=True)
    other = Weights({"unet": "other", "config": "c"}, (("f" * 64, 1.0),))
    assert own.match(replace(request, weights=other), HOST, "code") == (True, "")


@given(st.data())
def test_damage_to_a_manifest_is_found(tmp_path_factory, data):
    """Whatever byte of it is changed, it is refused, or says the very same."""
    folder = tmp_path_factory.mktemp("engine")
    own = manifest_for(Request("inductor", "fp16", "cpu", (SIZE,), FRAMES, (1, 2), Weights({"unet": "u"})))
    content = bytearray(own.as_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / FILE).write_bytes(content)
    try:
        found = Manifest.read(folder)
    except EmtError:
        return
    assert found == own


#: Text of a manifest, or a change to a field of one whose hash is right all the same.
PART = asdict(Part("denoise", "a", "0" * 64, SHAPES, (), (TensorSpec("sample", "float32", ()),)))
HOSTILE = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "no object": "[1, 2]",
    "empty": "",
    "not a number": {"seconds": float("nan")},
    "infinite": {"seconds": float("inf")},
    "unknown backend": {"backend": "../evil"},
    "unknown precision": {"precision": "fp64"},
    "a number for a name": {"model": 3},
    "a name for a number": {"frames": "16"},
    "a truth for a number": {"frames": True},
    "no frames": {"frames": 0},
    "a size of nothing": {"sizes": [{"least": [0, 0], "most": [0, 0]}]},
    "half a size": {"sizes": [{"least": [8], "most": [8, 8]}]},
    "batch that falls": {"batch": [4, 1]},
    "no date": {"built": "yesterday"},
    "no time zone": {"built": "2026-01-01T00:00:00"},
    "nested": {"parts": [[[[]]]]},
    "null": {"host": None},
    "a part without a hash": {"parts": [{"name": "denoise", "file": "denoise.pt2"}]},
    "a part without shapes": {"parts": [PART | {"shapes": {}}]},
    "a shape that no part varies in": {"parts": [PART | {"shapes": {**SHAPES, "depth": (1, 1)}}]},
    "shapes that fall": {"parts": [PART | {"shapes": {**SHAPES, "samples": (4, 1)}}]},
    "a part of no network": {"parts": [PART | {"name": "upscale"}]},
    "a part without outputs": {"parts": [PART | {"outputs": []}]},
    "versions of no libraries": {"host": {"device": "cpu", "capability": "", "instructions": [], "versions": [1]}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_k5_hostile_manifests_are_damaged_ones(tmp_path, case):
    """Also where the hash of the content is right: whoever wrote it could compute one."""
    content = HOSTILE[case]
    if isinstance(content, dict):
        own = manifest_for(Request("inductor", "fp16", "cpu", (SIZE,), FRAMES, (1, 2), Weights({"unet": "u"})))
        body = {**json.loads(json.dumps(asdict(own))), **content}
        identity = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
        content = json.dumps({"format": FORMAT, "id": identity, **body})
    folder = tmp_path / "engines" / "hostile"
    folder.mkdir(parents=True)
    (folder / FILE).write_text(content)
    with pytest.raises(EmtError, match=r"damaged|another version"):
        Manifest.read(folder)
    found, damaged = list_engines(folder.parent)
    assert not found
    assert [path for path, _ in damaged] == [folder]


def test_k5_a_cache_that_may_not_be_read_has_no_engine_for_auto(tmp_path, capfd):
    folder = tmp_path / ("x" * 300)  # as one in the home folder of another user
    with pytest.raises(EmtError, match="cannot be looked for"):
        list_engines(folder)
    said: list[str] = []
    choice = EngineChoice("auto", SimpleNamespace(), ContentIndex(tmp_path), folder, said.append)
    assert choice._fits(SimpleNamespace()) == []
    assert said == [f"engine: torch, since engines in {folder} cannot be looked for: File name too long"]


def test_k5_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(EmtError, match="is not a file"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "elsewhere"])
def test_damaged_files_are_refused(tmp_path, harm):
    folder = put_engine(
        tmp_path / "engine", manifest_for(Request("", "fp32", "cpu", (SIZE,), FRAMES, (1, 2), Weights({})))
    )
    file = folder / "denoise.pt2"
    own = Manifest.read(folder)
    own.check_files(folder)
    if harm == "changed":
        file.write_bytes(b"compilee")
    elif harm == "cut":
        file.write_bytes(b"compile")
    elif harm == "missing":
        file.unlink()
    else:
        (tmp_path / "other.pt2").write_bytes(b"compiled")
        own = replace(own, parts=(replace(own.parts[0], file="../other.pt2"),))
    with pytest.raises(EmtError, match="other.pt2" if harm == "elsewhere" else "denoise.pt2"):
        own.check_files(folder)


def test_hashes_of_weights_tell_network_adapter_and_vae_apart(model, tmp_path):
    before = weights_of(model)
    for part, file, name in (
        ("unet", "unet", "conv_in.bias"),
        ("adapter", "unet", ".adapter.to_q.weight"),
        ("adapter", "unet", ".scaler.spatial_convs.0.bias"),
        ("vae", "vae", "decoder.conv_in.bias"),
    ):
        other = tmp_path / name
        shutil.copytree(model, other)
        (path,) = (other / file).glob("*.safetensors")
        state = load_file(path)
        key = next(key for key in state if key.endswith(name))
        state[key] = state[key] + 1
        save_file(state, path)
        after = weights_of(other)
        assert {p for p in before.parts if before.parts[p] != after.parts[p]} == {part}
    config = other / "unet" / "config.json"
    config.write_text(json.dumps(dict(reversed(json.loads(config.read_bytes()).items()))))
    assert weights_of(other) == after, "the order of a configuration says nothing"


def test_every_byte_of_a_tensor_is_in_one_of_the_two_hashes(tmp_path):
    """Of the backbone, or of what only denoising reads; the order in the file, and its metadata, are in none."""
    names = ("a", "b.adapter.to_q.weight", "c.scaler.bias", "d", "denoising.e", "z")
    state = {name: torch.arange(3) + 10 * n for n, name in enumerate(names)}
    adapter = {name: len(name) > 1 for name in names}
    path = tmp_path / "w.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    before, content = _tensor_digests(path), path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    for name, tensor in state.items():
        for place in (0, tensor.nbytes - 1):
            at = len(content) - len(data) + data.index(tensor.numpy().tobytes()) + place
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            changed = [one != other for one, other in zip(before, _tensor_digests(path), strict=True)]
            assert changed == [not adapter[name], adapter[name]], name
    header = {
        name: {"dtype": "I64", "shape": [3], "data_offsets": [24 * n, 24 * n + 24]}
        for n, name in enumerate(reversed(names))
    }
    written = json.dumps(header).encode()
    tensors = b"".join(state[name].numpy().tobytes() for name in reversed(names))
    path.write_bytes(struct.pack("<Q", len(written)) + written + tensors)
    assert _tensor_digests(path) == before


def test_the_host_is_described_by_what_the_processor_says_of_itself():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    found = Host.here("cpu").instructions
    assert set(found) <= set(flags)
    assert {"avx2", "avx512f"} & set(flags) <= set(found)
    versions = Host.here("cpu").versions
    assert ("cuda" in versions) == bool(torch.version.cuda)
    for library in ("diffusers", "onnx", "onnxruntime"):
        assert versions[library] == importlib.metadata.version(library)


@pytest.mark.parametrize("said", [None, "processor : 0\n"], ids=["no /proc, as on macOS", "no such line"])
def test_a_processor_that_says_nothing_of_itself_has_no_instructions_of_its_own(said, monkeypatch):
    def read_text(path, **options):
        if said is None:
            raise FileNotFoundError(path)
        return said

    monkeypatch.setattr(Path, "read_text", read_text)
    assert _instructions.__wrapped__() == ()


@pytest.mark.parametrize(
    "harm",
    [
        "deep configuration",
        "configuration is a list",
        "no configuration",
        "deep header",
        "header is a number",
        "header is no JSON",
        "header longer than its file",
        "no header",
        "no tensor",
        "no place of a tensor",
        "tensor beyond the end",
    ],
)
def test_k5_weights_that_cannot_be_hashed_are_an_error_that_names_the_model(model, tmp_path, harm):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (weights,) = (other / "unet").glob("*.safetensors")
    place = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    headers = {
        "deep header": b"[" * 100_000,
        "header is a number": b"7",
        "header is no JSON": b"{",
        "no tensor": b'{"a": []}',
        "no place of a tensor": b'{"a": {"dtype": "F32", "shape": [1]}}',
        "tensor beyond the end": place,
    }
    if harm in headers:
        weights.write_bytes(struct.pack("<Q", len(headers[harm])) + headers[harm])
    elif harm == "deep configuration":
        (other / "vae" / "config.json").write_text("[" * 100_000)
    elif harm == "configuration is a list":
        (other / "vae" / "config.json").write_text("[]")
    elif harm == "no configuration":
        (other / "vae" / "config.json").unlink()
    else:
        weights.write_bytes(b"\0" if harm == "no header" else struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(EmtError, match=f"the weights of {other} cannot be read"):
        weights_of(other)


def test_a_backend_that_builds_no_engines_of_a_network_says_which_does(tmp_path):
    folder = wan_model(tmp_path / "wan")
    done = console(tmp_path, "build-engine", "--model", folder, "--device", "cpu", "--backend", "onnx")
    assert done.returncode == 1
    assert "the backend onnx builds no engines of the network of" in done.stderr
    assert "Use --backend inductor" in done.stderr
    done = console(tmp_path, "build-engine", "--model", folder, "--device", "cpu", "--lora", "a.safetensors")
    assert done.returncode == 1
    assert "import-weights --lora" in done.stderr


@pytest.mark.parametrize(
    ("make", "options", "problem", "allowed"),
    [
        (wan_model, ["--frames", "8"], "frames is 8", "takes 5, 9, … up to 81 frames at once"),
        (wan_model, ["--size", "64x64,40x64"], "width is 40", "makes clips of multiples of 16: --width 32"),
        (random_model, ["--frames", "81"], "frames is 81", "takes 2 to 32 frames at once"),
    ],
)
def test_a_shape_that_the_network_does_not_take_is_refused_before_anything_is_compiled(
    tmp_path, make, options, problem, allowed
):
    folder = make(tmp_path / "model")
    done = console(tmp_path, "build-engine", "--model", folder, "--device", "cpu", *options)
    assert done.returncode == 1
    assert problem in done.stderr
    assert allowed in " ".join(done.stderr.split())
    assert "compiling" not in done.stderr


def test_the_command_of_a_request_is_one_that_build_engine_takes(tmp_path):
    request = Request("inductor", "bf16", "cpu", (SIZE,), 8, (1, 4), Weights({}), "my model", ("a b.safetensors:0.5",))
    words = request.command
    assert words == (
        "emt build-engine --model 'my model' --backend inductor --size 32x32 --frames 8 --batch 1..4 --precision bf16 "
        "--device cpu --lora 'a b.safetensors:0.5'"
    )
    done = console(tmp_path, *shlex.split(words)[1:])
    assert "there is no model folder my model" in done.stderr


# ----------------------------------------------------------------------------------------------- what is not built


def test_inductor_takes_no_range_of_sizes(model):
    with pytest.raises(EmtError, match=r"256x256\.\.512x512"):
        load_builder("inductor")().check(request_for(model, sizes=(Size.parse("256x256..512x512"),)))


def test_a_missing_compiler_is_said(model, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EmtError, match="no C\\+\\+ compiler"):
        load_builder("inductor")().check(request_for(model))


@pytest.mark.skipif(sys.platform != "linux", reason="libraries of a process are read from /proc")
def test_packages_share_the_processs_cpp_library(monkeypatch, tmp_path):
    # As a machine has it whose compiler came without the shared library's name: it links the static one.
    static = subprocess.check_output(["g++", "-print-file-name=libstdc++.a"], text=True).strip()
    (tmp_path / "libstdc++.a").symlink_to(static)
    command = tmp_path / "g++"
    command.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -L{tmp_path}\n')
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    assert links_statically(str(command))
    with toolchain("cpu"):
        (wrapper,) = inductor_config.cpp.cxx
        assert not links_statically(wrapper)
    assert not links_statically("g++")


def test_a_folder_that_is_no_engine_is_left_alone(model, pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(EmtError, match="is no engine"):
        build_engine(pipe, request_for(model), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_interrupted_build_leaves_nothing(model, tmp_path):
    """Ctrl-C while the compiler is at work; what was there stays as it was."""
    old = put_engine(tmp_path / "engine", manifest_for(request_for(model)))
    before = (old / FILE).read_bytes()
    words = [EMT, "build-engine", "--model", model, "--device", "cpu", "--batch", "1", "-o", old]
    reported = tmp_path / "reported"
    with reported.open("w") as file:
        surroundings = os.environ | environment(tmp_path)
        process = subprocess.Popen(words, stderr=file, stdout=file, env=surroundings, start_new_session=True)
    deadline = time.monotonic() + 60
    while "compiling denoise" not in reported.read_text():
        assert process.poll() is None, reported.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) == 130
    assert "Traceback" not in reported.read_text()
    reported.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "engine"]
    assert (old / FILE).read_bytes() == before


def test_an_interrupt_that_is_swallowed_comes_again():
    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in a callback of a library
            signal.raise_signal(signal.SIGINT)
        time.sleep(20)

    before = signal.getsignal(signal.SIGINT)
    with insistent_interrupts(0.05), pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------- functions to compile


@torch.no_grad()
def test_flat_functions_are_those_of_the_network(pipe):
    options = {"width": SIDE, "height": SIDE, "frames": FRAMES}
    made = function(pipe, "denoise", samples=2, **options)
    text = pipe.unet.encode_text(torch.randn(2, 77, pipe.unet.config.cross_attention_dim))
    inputs = {**made.inputs, **text_tensors(text)}
    assert list(inputs) == list(made.inputs)
    out = made.module(*inputs.values())
    assert out.shape == inputs["sample"].shape
    assert bool(torch.isfinite(out).all())
    made = function(pipe, "reference", **options)
    features = pipe.unet.encode_reference(*made.inputs.values())
    flat = dict(zip(made.outputs, made.module(*made.inputs.values())))
    assert list(flat) == list(feature_tensors(features))
    again = features_of(flat)
    for path, pair in features.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again.layers[path]))


@pytest.mark.parametrize(
    ("frames", "size", "images"), [(16, 512, 2), (16, 64, 16), (15, 512, 1), (16, 1024, 1), (6, 256, 6)]
)
def test_images_at_once_divide_a_clip(frames, size, images):
    assert images_at_once(frames, size, size) == images


# ----------------------------------------------------------------------------------------------------- the compiler


CXX_ERROR = CppCompileError(
    ["g++", "wrapper.cpp"],
    "wrapper.cpp: In function f:\nwrapper.cpp:7:3: error: ‘int_array_792’ was not declared\n" * 50,
)


@pytest.fixture
def logs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "emt" / "logs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_another_process_have_the_dtypes_of_the_pipelines(model, dtype):
    """Tables of positions included, which no file holds: in float32 they would turn what follows into float32."""
    pipe = load_pipeline(model, dtype=dtype)
    there = _Configurations.of(pipe).make("cpu")
    for part in ("unet", "vae"):
        one, other = getattr(pipe, part), getattr(there, part)
        for tensors in ("named_parameters", "named_buffers"):
            found, wanted = ({name: x.dtype for name, x in getattr(each, tensors)()} for each in (other, one))
            assert found == wanted
    sample, timestep = torch.zeros(1, 4, FRAMES, 4, 4, dtype=dtype), torch.tensor([1])
    prompt = torch.zeros(1, 77, there.unet.config["cross_attention_dim"], dtype=dtype)
    assert TorchBackend(there).encode_reference(sample, timestep, prompt)


def test_a_compiler_that_dies_twice_is_reported_in_three_lines_with_its_log(model, tmp_path, logs, capfd, monkeypatch):
    """Of those that compile parts side by side; a pool of processes would wait for it."""
    # Forked from one that has imported PyTorch; processes that are started anew, as they are, are in the next test.
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    job = _Job(KillsItself(), request_for(model), "vae_decoder", SIZE, tmp_path)
    said: list[str] = []
    with pytest.raises(EmtError, match="decoder for 32x32 failed 2 times: its process ended with signal SIG") as caught:
        _side_by_side([job], 1, lambda what, done: said.append(what))
    assert len(said) == 1
    assert said[0].endswith("trying once more")
    [log] = logs.iterdir()
    assert str(log) in caught.value.hint
    assert str(caught.value).count("\n") < 3
    assert capfd.readouterr() == ("", "")


def test_a_compiler_error_is_tried_once_more(model, tmp_path, logs, capfd):
    """What the first attempt printed is gone with it: the second one got further."""
    job = _Job(FailsOnce(tmp_path / "seen", CXX_ERROR), request_for(model), "vae_decoder", SIZE, tmp_path)
    said: list[str] = []
    with pytest.raises(EmtError, match="the second attempt was made"):
        _side_by_side([job], 1, lambda what, done: said.append(what))
    assert said == [
        "compiling vae_decoder for 32x32: CppCompileError: ‘int_array_792’ was not declared; trying once more"
    ]
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "seen").read_text() == "None"


def test_a_step_in_this_process_is_tried_once_more_too(logs):
    errors, said = [CXX_ERROR], []

    def work() -> str:
        if errors:
            raise errors.pop()
        return "made"

    assert repeat("exporting denoise", work, said.append) == "made"
    assert len(said) == 2
    assert not list(logs.iterdir())
    errors += [CXX_ERROR, ValueError("first line\nsecond line")]
    with pytest.raises(EmtError, match="exporting denoise failed 2 times: CppCompileError: ‘int_array_792’") as caught:
        repeat("exporting denoise", work, said.append)
    [log] = logs.iterdir()
    assert "second line" in log.read_text()
    assert str(log) in caught.value.hint
    with pytest.raises(EmtError, match="refused"):
        repeat("exporting denoise", lambda: (_ for _ in ()).throw(EmtError("refused", "")), said.append)


def test_every_size_array_that_generated_code_names_is_declared():
    """PyTorch takes a buffer for another one that had its address: pull request 193628 says so of 2.10 to 2.13."""
    if "2.10" <= ".".join(torch.__version__.split(".")[:2]) <= "2.13":
        assert loses_declarations()
    with declared_size_arrays():
        assert not loses_declarations()
        generator = object.__new__(CppWrapperCpu)
        generator.int_array_id, generator.declared_int_array_vars = itertools.count(), set()
        generator.codegen_int_array_var_cache = {}
        for _ in range(1000):  # as short-lived as those of the code generator
            lines: list[str] = []
            name = generator.codegen_int_array_var("{2L, 3L}", lines.append, known_statically=True)
            assert [name in line for line in lines] == [True]
        kept: list[str] = []
        names = {generator.codegen_int_array_var("{2L, 3L}", kept.append, known_statically=True) for _ in range(10)}
        assert len(names) == len(kept) == 1, "a buffer that lives on has one declaration"


def test_phases_are_reported_and_timed():
    new = time.time_ns() % 1_000_003  # what has been compiled before is not compiled again
    reported: list[str] = []
    phases = Phases(reported.append)
    with phases.of_compiler():
        torch.compile(lambda x: x + new, fullgraph=True)(torch.ones(3))
        phases.begin("loading")
    assert [phase for phase in reported if phase != "C++"] == ["lowering", "scheduling", "kernels", "loading"]
    assert [word for word in phases.summary().split() if word.isalpha() and word != "s"][-1] == "loading"
    torch.compile(lambda x: x - new, fullgraph=True)(torch.ones(3))
    assert reported[-1] == "loading", "it is followed within the block alone"


def test_the_kernels_of_an_operator_are_looked_up_once_however_often_a_compiler_meets_it(monkeypatch):
    """Reading and parsing their source for each of 500 calls was a tenth of the tracing of a full-size network."""
    from torch._library import triton as known

    looked_up: list[object] = []
    monkeypatch.setattr(known, "triton_ops_to_kernels", {})
    monkeypatch.setattr(known, "get_inner_triton_kernels", lambda body: looked_up.append(body) or [], raising=False)

    def double(x: int) -> int:
        return 2 * x

    found = [_decompose("emt::double", double, contextlib.nullcontext(), None, (), (n,), {}) for n in range(3)]
    assert found == [0, 2, 4]
    assert looked_up == [double]
    assert known.triton_ops_to_kernels == {"emt::double": []}


def test_garbage_is_looked_for_rarely_while_compiling_and_as_before_afterwards():
    usual = gc.get_threshold()
    with contextlib.suppress(KeyError), rare_collections():
        assert gc.get_threshold() == (100 * usual[0], *usual[1:])
        assert gc.get_freeze_count() > 1000
        raise KeyError
    assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, 0)


def test_what_a_kernel_writes_is_found_once_for_all_calls_that_are_translated_alike(monkeypatch):
    triton_kernel_wrap = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    triton = pytest.importorskip("triton")
    from emt_kernels.layer_norm import _layer_norm_kernel

    name = next(n for n in dir(triton_kernel_wrap) if n in ("identify_mutated_tensors", "identify_accessed_tensors"))
    requested: list[dict[str, object]] = []

    def find(kernel: object, arguments: dict[str, object], descriptors: object) -> int:
        requested.append(arguments)
        return len(requested)

    monkeypatch.setattr(triton_kernel_wrap, name, find)
    half, single = torch.empty(2, dtype=torch.float16), torch.empty(2)
    given = {p.name: half for p in _layer_norm_kernel.params} | {"rows": 32, "ROWS": 8, "PLAIN": True}
    tuned = triton.autotune([triton.Config({}, num_warps=4)], [])(_layer_norm_kernel)
    with remembered_writes():
        ask = getattr(triton_kernel_wrap, name)
        assert ask(_layer_norm_kernel, given, {}) == 1
        assert ask(_layer_norm_kernel, given | {"x": torch.empty(5, dtype=torch.float16), "rows": 64}, {}) == 1
        assert ask(tuned, given, {}) == 1, "a number of warps changes nothing"
        for i, other in enumerate(({"x": single}, {"rows": 1}, {"rows": 33}, {"ROWS": 16}, {"PLAIN": False})):
            assert ask(_layer_norm_kernel, given | other, {}) == i + 2
    assert getattr(triton_kernel_wrap, name) is find


# ---------------------------------------------------------------------------------------------------------- the choice


def choice(requested: str, model: Path, folder: Path, said: list[str]) -> EngineChoice:
    return EngineChoice(
        requested, find_model(str(model), download=False), ContentIndex(folder), folder / "engines", said.append
    )


def test_engines_with_weights_built_in_take_no_loras_and_none_takes_long_text(model, tmp_path):
    own = replace(manifest_for(request_for(model)), refits=True)
    reads = put_engine(tmp_path / "engines" / "reads", own)
    built_in = put_engine(tmp_path / "other" / "built in", replace(own, refits=False))
    cpu, said = Device.open("cpu", "auto"), []
    chosen = choice("auto", model, tmp_path, said)
    assert chosen.find(cpu, SIDE, SIDE, FRAMES, changed=True).folder == reads
    shutil.rmtree(reads)
    shutil.copytree(built_in, reads)
    chosen = choice("auto", model, tmp_path, said)
    assert chosen.find(cpu, SIDE, SIDE, FRAMES) is not None
    assert chosen.find(cpu, SIDE, SIDE, FRAMES, changed=True) is None
    assert "torch for clips with --lora or --vae" in said[-1]
    assert not any(chosen.applies(1, has_long_text=True) for _ in range(2))
    assert chosen.applies(1)
    assert [line for line in said if "longer prompts" in line] == [said[-1]]

    named = choice(str(built_in), model, tmp_path, said)
    named.check(SIDE, SIDE, FRAMES, 1)
    named.check_text(False)
    with pytest.raises(EmtError, match="has the model's weights built in, and takes no --lora"):
        named.check(SIDE, SIDE, FRAMES, 1, changed=True)
    with pytest.raises(EmtError, match="reads one text of the text encoder"):
        named.check_text(True)


def test_auto_takes_the_newest_that_matches_and_says_so(model, tmp_path):
    own = manifest_for(request_for(model))
    put_engine(tmp_path / "engines" / "old", own)
    new = put_engine(tmp_path / "engines" / "new", replace(own, built="2026-02-01T00:00:00+00:00"))
    put_engine(tmp_path / "engines" / "newest", replace(own, built="2026-03-01T00:00:00+00:00", code="other"))
    said: list[str] = []
    chosen = choice("auto", model, tmp_path, said)
    cpu = Device.open("cpu", "auto")
    for _ in range(2):
        engine = chosen.find(cpu, SIDE, SIDE, FRAMES)
        assert engine is not None
        assert engine.folder == new
        assert chosen.find(cpu, 2 * SIDE, SIDE, FRAMES) is None
    assert len(said) == 2
    assert str(new) in said[0]
    assert "torch for 4 frames of 64x32" in said[1]


@pytest.mark.parametrize("window", [3, FRAMES])
def test_a_named_engine_makes_longer_clips_in_windows_of_its_frames(model, tmp_path, window):
    folder = put_engine(tmp_path / "mine", manifest_for(request_for(model, frames=window)))
    found, cpu = find_model(str(model), download=False), "cpu"
    engines = choice(str(folder), model, tmp_path, [])
    generator = Generator(found, "m", cpu, "auto", engines)
    long = Job(tmp_path / "a.mp4", "x", 0, Settings(frames=80, height=SIDE, width=SIDE))
    generator.check(long)
    assert generator.engine(long).folder == folder
    record = generator.record(long, "id", "r", {})
    assert (record["engine_id"], record["window"]) == (engines.named.manifest.id, window)
    with pytest.raises(EmtError, match=f"makes clips of {window} frames"):
        generator.check(replace(long, settings=replace(long.settings, frames=window + 1)))
    generator = Generator(found, "m", cpu, "auto", choice("torch", model, tmp_path, []))
    assert generator.record(long, "id", "r", {})["window"] == found.defaults["frames"]


def test_auto_says_why_it_takes_torch(model, tmp_path):
    put_engine(tmp_path / "engines" / "a", replace(manifest_for(request_for(model)), precision="fp16"))
    said: list[str] = []
    assert choice("auto", model, tmp_path, said).find(Device.open("cpu", "auto"), SIDE, SIDE, FRAMES) is None
    assert said == ["engine: torch, since no engine matches (a: it computes in fp16, not fp32)"]
    for name in "bcd":
        put_engine(tmp_path / "engines" / name, replace(manifest_for(request_for(model)), precision="fp16"))
    choice("auto", model, tmp_path, said).find(Device.open("cpu", "auto"), SIDE, SIDE, FRAMES)
    reasons = "; ".join(f"{name}: it computes in fp16, not fp32" for name in "abc")
    assert said[1:] == [f"engine: torch, since no engine matches ({reasons})"], "three are enough"


def test_engines_are_in_a_folder_of_the_cache(tmp_path):
    assert engines_dir(tmp_path) == tmp_path / "engines"


def test_auto_says_nothing_where_there_are_no_engines(model, tmp_path):
    said: list[str] = []
    chosen = choice("auto", model, tmp_path, said)
    assert chosen.find(Device.open("cpu", "auto"), SIDE, SIDE, FRAMES) is None
    assert not chosen.applies(2)
    assert not chosen.applies(1, has_long_text=True)
    assert not said


def test_a_named_engine_runs_or_says_what_to_build(model, tmp_path):
    folder = put_engine(tmp_path / "mine", replace(manifest_for(request_for(model)), code="other"))
    named = choice(str(folder), model, tmp_path, [])
    with pytest.raises(EmtError, match="the code of the network has changed") as caught:
        named.find(Device.open("cpu", "auto"), SIDE, SIDE, FRAMES)
    assert f"emt build-engine --model {model} --backend inductor --size 32x32" in caught.value.hint
    with pytest.raises(EmtError, match="the code of the network has changed"):
        choice(str(folder), model, tmp_path, []).check_match(Device.open("cpu", "auto"))
    with pytest.raises(EmtError, match="not 4 frames of 64x32") as caught:
        named.check(width=64, height=32, frames=FRAMES, cache_interval=1)
    assert "--size 32x32,64x32" in caught.value.hint
    with pytest.raises(EmtError, match="is no engine"):
        choice(str(tmp_path / "nothing"), model, tmp_path, [])


# ---------------------------------------------------------------------------------------------------------- emt engines


def engines(folder: Path, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return console(folder, "engines", *words, **options)


def test_engines_are_listed_shown_verified_and_pruned(model, tmp_path):
    kept = tmp_path / "cache" / "emt" / "engines"
    nothing = engines(tmp_path, "list")
    assert not nothing.stdout
    assert "build one with: emt build-engine" in nothing.stderr
    assert f"there is no engine whole, neither as a folder nor in {kept}" in engines(tmp_path, "show", "whole").stderr
    whole = put_engine(kept / "whole", manifest_for(request_for(model)))
    stale = put_engine(kept / "stale", manifest_for(request_for(model), code="other"))
    harmed = put_engine(kept / "harmed", manifest_for(request_for(model), code="other"))
    (harmed / "denoise.pt2").write_bytes(b"other")
    broken = put_engine(kept / "broken", manifest_for(request_for(model)))
    (broken / FILE).write_text("{}")

    listed = [json.loads(line) for line in engines(tmp_path, "list", "--json").stdout.splitlines()]
    assert {Path(line["folder"]).name: line.get("parity") for line in listed} == {
        "whole": 1e-6, "stale": 1e-6, "harmed": 1e-6, "broken": None,
    }  # fmt: skip
    assert "damaged" in engines(tmp_path, "list").stdout

    shown = engines(tmp_path, "show", "stale").stdout
    assert "the code of the network has changed" in shown
    body = json.loads(engines(tmp_path, "show", "whole", "--json").stdout)
    assert body["id"] == Manifest.read(whole).id
    assert {**body, "parts": None} == {
        **json.loads(json.dumps(asdict(Manifest.read(whole)))), "id": body["id"], "folder": str(whole), "parts": None,
    }  # fmt: skip

    verified = engines(tmp_path, "verify", "stale", "harmed", "--json")
    lines = [json.loads(line) for line in verified.stdout.splitlines()]
    assert [line["state"] for line in lines] == ["whole", "failed"]
    assert "the code of the network has changed" in lines[0]["reason"]
    assert "SHA-256 differs" in lines[1]["error"]
    assert verified.returncode == 1

    requested = engines(tmp_path, "prune", input="n\n")
    assert requested.returncode == 1
    assert "Remove 3?" in requested.stderr
    assert len(list(kept.iterdir())) == 4
    pruned = engines(tmp_path, "prune", "--yes")
    assert sorted(pruned.stdout.split()) == sorted(map(str, (broken, harmed, stale)))
    assert [path.name for path in kept.iterdir()] == ["whole"]
    engines(tmp_path, "prune", "--yes", "--older-than", "1")
    assert not list(kept.iterdir())


def test_k6_escapes_in_a_manifest_do_not_reach_the_terminal(model, tmp_path):
    kept = tmp_path / "cache" / "emt" / "engines"
    own = manifest_for(request_for(model))
    put_engine(kept / "hostile", replace(own, model="\x1b]0;title\x07", host=replace(own.host, device="\x1b[2J")))
    for words in (["list"], ["show", "hostile"], ["verify"], ["prune"]):
        done = engines(tmp_path, *words, input="n\n")
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stdout + done.stderr, words


# -------------------------------------------------------------------------------------------------------- real engines


def build(model: Path, folder: Path) -> Path:
    steps: list[float] = []
    build_engine(load_pipeline(model), request_for(model), folder, lambda what, done: steps.append(done))
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return folder


@pytest.fixture(scope="module")
def network(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine without the VAE, built for this processor: the slowest thing here that is no slow test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emt_engines.inductor.PARTS", ("denoise", "reference"))
        return build(model, tmp_path_factory.mktemp("network") / "micro")


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one."""
    return build(model, tmp_path_factory.mktemp("engine") / "micro")


def opened(folder: Path, pipe: MotionTransferPipeline) -> InductorBackend:
    backend = open_engine(folder, Manifest.read(folder), pipe)
    assert isinstance(backend, InductorBackend)
    return backend


@torch.no_grad()
def test_an_engine_denoises_a_long_clip_window_by_window(network, pipe):
    count, side = 2 * FRAMES + 1, SIDE // 8
    windows, generator = Windows(count, FRAMES), torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    latents, noisy = (torch.randn(n, 4, count, side, side, generator=generator) for n in (1, 2))

    def denoised(backend: Backend) -> torch.Tensor:
        features = read_in_windows(windows, latents, lambda x: backend.encode_reference(x, torch.tensor(400), text[:1]))
        denoise = WindowedDenoiser(windows, backend, [Motion(features, count, SIDE, SIDE, 0)], 1)
        return denoise(noisy, torch.tensor(500), pipe.unet.encode_text(text), True)

    torch.testing.assert_close(denoised(opened(network, pipe)), denoised(TorchBackend(pipe)), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def step(backend: Backend, pipe: MotionTransferPipeline, references: int = 1, samples: int = 4) -> torch.Tensor:
    """A reference pass and a denoising step on random numbers, the same for every backend."""
    generator = torch.Generator().manual_seed(0)

    def clips(count: int) -> torch.Tensor:
        return torch.randn(count, 4, FRAMES, SIDE // 8, SIDE // 8, generator=generator)

    text = torch.randn(samples, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    features = backend.encode_reference(clips(references), torch.tensor(400), text[:references])
    motion = backend.prepare_motion(features)
    return backend.denoise(clips(samples), torch.tensor(500), pipe.unet.encode_text(text), motion)


def test_an_engine_is_as_good_as_pytorch_and_says_so(model, network):
    own = Manifest.read(network)
    assert own.match(request_for(model)) == (True, "")
    assert {part.name for part in own.parts} == {"denoise", "reference"}
    assert own.parity is not None
    assert own.parity < 1e-4
    assert sorted(path.name for path in network.iterdir()) == sorted([FILE, *own.files()])


@pytest.mark.parametrize(("references", "samples"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4)])
def test_any_number_of_samples_and_references(network, pipe, references, samples):
    """One clip without guidance, up to two with it; one reference for all of them, and one for each clip."""
    found = step(opened(network, pipe), pipe, references, samples)
    torch.testing.assert_close(found, step(TorchBackend(pipe), pipe, references, samples), atol=1e-5, rtol=1e-4)


def test_an_engine_of_a_diffusion_transformer_is_as_good_as_pytorch(tmp_path):
    """Wan's network, whose autoencoder of video PyTorch runs; one engine serves all weights of its shapes."""
    shape = {"frames": 5, "height": SIDE, "width": SIDE, "steps": 2}
    folders = [
        wan_model(tmp_path / f"wan-{seed}", num_layers=1, reference_blocks=(0,), seed=seed, **shape) for seed in (0, 1)
    ]
    target = tmp_path / "engine"
    request = request_for(folders[0], frames=5, batch=(1, 1))
    build_engine(load_pipeline(folders[0]), request, target)
    own = Manifest.read(target)
    assert [part.name for part in own.parts] == ["denoise", "reference"]
    assert own.parity is not None
    assert own.parity < 1e-4
    clip = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    for folder, by_reference in zip(folders, (False, True), strict=True):
        pipe = load_pipeline(folder)
        pipe.register_to_config(guided_by_reference=by_reference)
        wanted = pipe.generate("a cat", pipe.extract_motion(clip), seed=1)[0]
        pipe.backend = opened(target, pipe)
        found = pipe.generate("a cat", pipe.extract_motion(clip), seed=1)[0]
        assert found.std() > 1
        assert np.abs(found.astype(int) - wanted).max() <= 1


def test_shapes_that_an_engine_lacks_are_refused_by_name(network, pipe):
    backend = opened(network, pipe)
    with pytest.raises(EmtError, match="no denoise for samples 6, frames 4, height 32, width 32; its sizes are 32x32"):
        step(backend, pipe, samples=6)
    with pytest.raises(EmtError, match="no reference for frames 4, height 32, width 64"):
        backend.encode_reference(torch.randn(1, 4, FRAMES, 4, 8), torch.tensor(400), torch.randn(1, 77, 32))
    pipe.backend = backend
    with pytest.raises(EmtError, match="without a reference"):
        pipe.generate("a cat")
    with pytest.raises(ValueError, match=r"latents is torch\.float64"):
        backend.encode_reference(torch.randn(1, 4, FRAMES, 4, 4).double(), torch.tensor(400), torch.randn(1, 77, 32))


def write_lora(path: Path, pipe: MotionTransferPipeline, seed: int) -> Path:
    """A LoRA of spatial and temporal attentions."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("attn1.to_v.weight", "attention_blocks.0.to_v.weight")):
            module = name.removesuffix(".weight")
            state[f"{module}.lora_down.weight"] = torch.randn(2, parameter.shape[1], generator=generator)
            state[f"{module}.lora_up.weight"] = torch.randn(parameter.shape[0], 2, generator=generator)
    save_file(state, path)
    return path


def test_a_lora_and_another_and_the_first_again(network, pipe, tmp_path):
    """As `emt transfer` lays them over a model: the engine reads the weights where they lie, and A after B is A."""
    first, second = (write_lora(tmp_path / f"{name}.safetensors", pipe, seed) for seed, name in enumerate("ab"))
    backend, switch = opened(network, pipe), WeightSwitch(pipe)

    def made(*loras: Path) -> torch.Tensor:
        switch.set([(lora, 1.0) for lora in loras])
        found = step(backend, pipe)
        torch.testing.assert_close(found, step(TorchBackend(pipe), pipe), atol=1e-5, rtol=1e-4)
        return found

    none, a, b, again, both, none_again = made(), made(first), made(second), made(first), made(first, second), made()
    assert torch.equal(a, again)
    assert torch.equal(none, none_again)
    for one, other in itertools.combinations((none, a, b, both), 2):
        assert (one - other).abs().max() > 0.01


def test_k5_a_package_that_cannot_be_loaded_is_an_error_in_words(network, pipe, tmp_path):
    """Its hash is right: only whoever reads it finds that it is none, or that the manifest says too little of it."""
    own = Manifest.read(network)
    [part] = [part for part in own.parts if part.name == "reference"]
    (tmp_path / "no package.pt2").write_bytes(b"no archive")
    for harmed in (replace(part, facts={}), replace(part, file="no package.pt2")):
        backend = InductorBackend(tmp_path, replace(own, parts=(harmed,)), pipe)
        with pytest.raises(EmtError, match="the engine's reference cannot be loaded"):
            step(backend, pipe)


@pytest.mark.parametrize("moved", [False, True])
def test_every_weight_is_read_where_it_lies(network, pipe, moved):
    """Nothing that a weight decides is in the code: change them all, in place or elsewhere, and it shows."""
    backend, eager = opened(network, pipe), TorchBackend(pipe)
    before = step(backend, pipe)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.unet.parameters():
        changed = parameter.data * 0.9 + 0.1 * torch.rand(parameter.shape, generator=generator)
        if moved:
            parameter.data = changed
        else:
            parameter.data.copy_(changed)
    found = step(backend, pipe)
    torch.testing.assert_close(found, step(eager, pipe), atol=1e-5, rtol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_an_engine_of_another_network_is_refused(network, tmp_path):
    """By its manifest; and where that was not checked, by the layout of the weights."""
    other = random_model(tmp_path / "other", **{**MICRO, "block_out_channels": (16,)})
    ok, reason = Manifest.read(network).match(request_for(other))
    assert not ok
    assert "networks of other sizes" in reason
    pipe = load_pipeline(other)
    with pytest.raises(EmtError, match="reference was compiled for weights of other shapes"):
        step(opened(network, pipe), pipe)


def frames_of(path: Path) -> bytes:
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-"]
    return subprocess.run(words, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_transfer_uses_an_engine_and_rerun_makes_the_same_clip(engine, model, tmp_path):
    reference = clip(tmp_path / "a.mp4")
    kept = tmp_path / "cache" / "emt" / "engines"
    kept.mkdir(parents=True)
    shutil.copytree(engine, kept / "micro")
    words = ["transfer", reference, "--prompt", "a cat", "--model", model, "--device", "cpu", "--json"]

    auto = console(tmp_path, *words, "-o", "auto", "--seeds", "0-2", "--batch-size", "3")
    assert f"engine: inductor, {kept / 'micro'}" in auto.stderr
    lines = list(map(json.loads, auto.stdout.splitlines()))
    assert {(line["engine"], line["engine_id"]) for line in lines} == {("inductor", Manifest.read(engine).id)}
    assert sorted(line["batch"]["size"] for line in lines) == [1, 2, 2]  # two clips at once are the engine's most
    line = next(line for line in lines if line["batch"]["size"] == 1)

    again = console(tmp_path, "rerun", line["path"], "-o", "again.mp4")
    assert again.returncode == 0, again.stderr
    assert frames_of(tmp_path / "again.mp4") == frames_of(tmp_path / line["path"])

    named = console(tmp_path, *words, "-o", "named", "--engine", engine, "--width", "64")
    assert named.returncode == 1
    (refused,) = map(json.loads, named.stdout.splitlines())
    assert "not 4 frames of 64x32" in refused["error"]
    assert "emt build-engine" in refused["hint"]

    other = console(tmp_path, *words, "-o", "auto", "--engine", "torch")
    (made,) = map(json.loads, other.stdout.splitlines())
    assert (made["engine"], made["state"]) == ("torch", "done")
    assert made["id"] not in {line["id"] for line in lines}


@pytest.mark.slow
def test_a_tampered_engine_is_not_run(engine, model, tmp_path):
    tampered = tmp_path / "tampered"
    shutil.copytree(engine, tampered)
    file = next(tampered.glob("denoise*.pt2"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    words = ["transfer", clip(tmp_path / "a.mp4"), "--prompt", "a cat", "--model", model, "--device", "cpu"]
    done = console(tmp_path, *words, "--engine", tampered)
    assert done.returncode == 1
    assert "denoise-32x32.pt2 is damaged or was changed" in done.stderr


@pytest.mark.slow
def test_build_engine_from_end_to_end(model, tmp_path):
    """Two sizes in one engine, by the program; verified, and used."""
    words = [EMT, "build-engine", "--model", model, "--device", "cpu", "--size", "32x32,48x32", "--batch", "2"]
    surroundings = os.environ | environment(tmp_path)
    done = subprocess.run(words, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path / "cache" / "emt" / "engines"
    (line,) = map(json.loads, engines(tmp_path, "verify", "--json").stdout.splitlines())
    assert line["state"] == "ok"
    assert set(line["parity"]) == {"denoise", "reference", "vae_encoder", "vae_decoder"}
    reference = clip(tmp_path / "a.mp4")
    for width in (32, 48):
        words = ["transfer", reference, "--prompt", "a cat", "--model", model, "--device", "cpu", "--width", width]
        made = console(tmp_path, *words, "-o", f"out{width}", "--engine", folder)
        assert made.returncode == 0, made.stderr
