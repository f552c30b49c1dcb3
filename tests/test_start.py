"""The start of a run: what is imported for it, and that the parts opened without diffusers compute the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

import emt.demo
from emt.backbones.sd15.opening import open_parts
from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.stable_diffusion import animatediff_scheduler
from emt.backends.measured import MeasuredBackend
from emt.backends.torch import TorchBackend
from emt.backends.upload import upload
from emt.device import BusyClock, Device, start_gpu
from emt.errors import EmtError
from emt.pipeline import MotionTransfer, load_pipeline, open_model
from emt.solvers import DDIM, DPMSolver, Solver
from emt_cli.batch import generator

#: Each takes about as long to import as PyTorch, or belongs to what does.
HEAVY = "torch._dynamo torch._inductor sympy diffusers transformers accelerate"


@pytest.mark.parametrize(
    "imported",
    [
        "from emt.pipeline import open_model; import emt.demo; assert open_model(emt.demo.path()) is not None",
        "import emt_engines.build, emt_engines.inductor as inductor; inductor._import_ops()",
    ],
    ids=["opening a model", "opening an engine"],
)
def test_making_clips_imports_little_more_than_torch(imported):
    code = f"import sys; {imported}; print(*(name for name in '{HEAVY}'.split() if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}])
def test_threads_sleep_while_they_wait_unless_the_user_has_said_how(own):
    code = (
        "import os, sys; sys.argv = ['emt', '--version']\n"
        "from emt_cli.app import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules; print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    expected = "PASSIVE" if not own else own.get("OMP_WAIT_POLICY", "None")
    assert done.stdout.split()[-1] == expected, done.stderr


def test_a_gpu_is_started_by_its_driver_alone(monkeypatch):
    """As far as a machine without one shows: the driver's own calls, in order, of the GPU that is named."""
    calls = []

    class Driver:
        def cuInit(self, flags):
            calls.append("init")
            return 0

        def cuDeviceGet(self, gpu, number):
            calls.append(f"gpu {number}")
            return 0 if number < 2 else 101

        def cuDevicePrimaryCtxRetain(self, context, gpu):
            calls.append("context")
            return 0

    assert start_gpu(Driver(), "auto")
    assert calls == ["init", "gpu 0", "context"]
    assert start_gpu(Driver(), "cuda:1")
    assert not start_gpu(Driver(), "cuda:2")
    monkeypatch.setattr(generator, "cuda_driver", lambda: Driver())
    calls.clear()
    with generator.start_ahead("cpu"):
        pass
    assert not calls
    with generator.start_ahead("cuda:0"):
        pass
    assert calls == ["init", "gpu 0", "context"]


def test_the_driver_is_started_by_one_thread_at_a_time(monkeypatch):
    """A driver that finds no GPU undoes its start, which a call of another thread does not survive."""
    inside, most, together = [], [], threading.Barrier(3)

    def enter(result):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return result

    class Driver:
        def cuInit(self, flags):
            return enter(100)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: enter(False))

    def open_device():
        together.wait()
        with pytest.raises(EmtError, match="PyTorch finds 0 CUDA devices"):
            Device.open("cuda:99", "auto")

    def start():
        together.wait()
        assert not start_gpu(Driver(), "cuda:99")

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work) for work in (start, start, open_device)]:
            done.result()
    assert most == [1, 1, 1]


def test_weights_are_uploaded_in_pieces_and_shared_ones_once(folder, monkeypatch):
    monkeypatch.setattr("emt.backends.upload._BUFFER_BYTES", 100)
    opened = open_model(folder)
    parts = [opened.unet, opened.vae]
    opened.unet.again = opened.unet.conv_out  # a second name of the same weights
    opened.vae.odd = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
    before = [{name: p.clone() for name, p in part.named_parameters()} for part in parts]
    addresses = {p.data_ptr() for part in parts for p in part.parameters()}
    upload(parts, "cpu")
    for part, expected in zip(parts, before, strict=True):
        for name, p in part.named_parameters():
            torch.testing.assert_close(p, expected[name], rtol=0, atol=0)
            assert p.data_ptr() not in addresses
    assert opened.unet.again.weight is opened.unet.conv_out.weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("start") / "model", frames=2, height=16, width=16)


@pytest.fixture(scope="module")
def both(folder):
    """A model opened without diffusers, and by it."""
    opened = open_model(folder)
    assert isinstance(opened, MotionTransfer)
    return opened.to("cpu"), load_pipeline(folder)


@pytest.mark.parametrize("which", ["demo", "random"])
@torch.no_grad()
def test_parts_compute_what_the_libraries_own_do(which, folder):
    folder = emt.demo.path() if which == "demo" else folder
    index = json.loads((folder / "model_index.json").read_bytes())
    pipe, parts = load_pipeline(folder, dtype=torch.bfloat16), open_parts(folder, index, torch.bfloat16)
    assert parts is not None
    prompts = ["a red cat, over the sea!", "", "a yellow penguin " * 40, "  zürich <|endoftext|> 東京  "]
    options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
    ids = pipe.tokenizer(prompts, **options).input_ids
    assert torch.equal(parts["tokenizer"](prompts, **options).input_ids, ids)
    assert [len(parts["tokenizer"](p).input_ids) for p in prompts] == [
        len(pipe.tokenizer(p).input_ids) for p in prompts
    ]
    assert torch.equal(parts["text_encoder"](ids)[0], pipe.text_encoder(ids)[0])
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, wanted = (vae.encode(images).latent_dist for vae in (parts["vae"], pipe.vae))
    assert torch.equal(got.mean, wanted.mean)
    assert torch.equal(got.std, wanted.std)
    assert torch.equal(parts["vae"].decode(got.mean).sample, pipe.vae.decode(got.mean).sample)
    for (name, buffer), (other, theirs) in zip(parts["unet"].named_buffers(), pipe.unet.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, theirs)
        assert buffer.dtype == theirs.dtype


def test_clips_are_the_same_however_a_model_is_opened(both):
    opened, pipe = both
    frames = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    (got,), (wanted,) = (p.generate("a cat", p.extract_motion(frames), steps=2) for p in both)
    assert (got == wanted).all()
    assert opened.config.items() >= {"frames": 2, "height": 16, "steps": pipe.config.steps}.items()


def test_a_word_of_several_vectors_is_read_as_all_of_them(folder, tmp_path):
    pipe = load_pipeline(folder)
    pipe.load_textual_inversion({"cat-toy": torch.randn(3, pipe.unet.text_width)}, token="cat-toy")
    pipe.save_pretrained(tmp_path / "m")
    opened = open_model(tmp_path / "m")
    assert opened is not None
    assert torch.equal(opened.to("cpu").encode_prompts(["a cat-toy, red"]), pipe.encode_prompts(["a cat-toy, red"]))


def damage(folder: Path, change) -> None:
    (file,) = (folder / "vae").glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.conv_in.weight"), r"vae of the model .*1 key differs.*missing: encoder.conv"),
        (lambda state: state.update(more=torch.zeros(1)), r"unexpected: more \(1,\)"),
        (lambda state: state.update({"quant_conv.bias": torch.zeros(3)}), r"wrong shape: quant_conv.bias is \(3,\)"),
    ],
)
def test_weights_are_those_of_the_file_and_all_of_them(folder, tmp_path, change, message):
    import shutil

    damage(shutil.copytree(folder, tmp_path / "m"), change)
    with pytest.raises(EmtError, match=f"(?s){message}"):
        open_model(tmp_path / "m")


def test_other_kinds_of_models_are_left_to_diffusers(folder, tmp_path):
    import shutil

    for i, (part, name, value) in enumerate(
        [
            ("vae", "act_fn", "relu"),
            ("text_encoder", "hidden_act", "selu"),
            ("", "vae", ["diffusers", "AutoencoderTiny"]),
        ]
    ):
        copy = shutil.copytree(folder, tmp_path / str(i))
        file = copy / part / ("config.json" if part else "model_index.json")
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {name: value}))
        assert open_model(copy) is None


SCHEDULES = [
    animatediff_scheduler("epsilon"),
    animatediff_scheduler("v_prediction"),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", thresholding=True),
    DDIMScheduler(trained_betas=torch.linspace(1e-4, 0.02, 1000).tolist(), set_alpha_to_one=False),
    DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
]


@pytest.mark.parametrize(("own", "theirs"), [(DDIM, DDIMScheduler), (DPMSolver, DPMSolverMultistepScheduler)])
def test_solvers_compute_what_diffusers_schedulers_do(own: type[Solver], theirs):
    for schedule, steps, spacing in itertools.product(SCHEDULES, (1, 2, 8, 25), ("leading", "trailing", "linspace")):
        made = [cls.from_config(schedule.config, timestep_spacing=spacing) for cls in (own, theirs)]
        for sampler in made:
            sampler.set_timesteps(steps, device="cpu")
        assert made[0].timesteps.tolist() == made[1].timesteps.tolist()
        generator = torch.Generator().manual_seed(0)
        samples = [torch.randn(1, 4, 2, 3, 3, generator=generator)] * 2
        for timestep in made[0].timesteps[made[0].timesteps < 1000]:
            prediction = torch.randn(samples[0].shape, generator=generator)
            samples = [s.step(prediction, timestep, x).prev_sample for s, x in zip(made, samples, strict=True)]
            assert torch.equal(samples[0].nan_to_num(), samples[1].nan_to_num()), (schedule, steps, spacing)


def test_noise_is_added_as_diffusers_does():
    sample, noise = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).half()
    for schedule in SCHEDULES:
        timesteps = torch.tensor([400])
        assert torch.equal(
            DDIM(schedule.config).add_noise(sample, noise, timesteps), schedule.add_noise(sample, noise, timesteps)
        )


def test_a_clock_counts_what_the_device_computes_and_nothing_else():
    time = iter([0.0, 1.0, 10.0, 12.0, 20.0, 21.0, 24.0, 26.0])
    clock = BusyClock(now=lambda: next(time))
    with clock(), clock():  # a call within a call
        pass
    assert clock.seconds == 1.0
    with clock.paused(), clock():
        pass
    assert clock.seconds == 3.0
    with clock(), clock.paused():  # kernels are compiled from 21 to 24
        pass
    assert clock.seconds == 6.0


def test_computing_is_measured_and_preparations_are_told_apart(both):
    opened, _ = both
    begun: list[str] = []

    @contextlib.contextmanager
    def told(name: str = "computing"):
        begun.append(name)
        yield

    plain = TorchBackend(opened, recorder=lambda: pytest.fail("nothing is captured"), graphs=False)
    opened.backend = MeasuredBackend(plain, told)
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8).numpy()
    opened.generate("a cat", opened.extract_motion(frames), steps=2)
    assert begun == ["computing"] * 6, "images in, the reference, its constants, two steps, images out"
    plain.phase = told
    with pytest.raises(ZeroDivisionError):
        plain._capture(lambda: 1 // 0)
    assert begun[6:] == ["capturing graphs"]
    assert opened.backend.name == "torch"
    opened.backend = TorchBackend(opened)
