"""Training of Wan's adapter on pairs of clips, on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emt.backbones.wan21.adapter_file import read_adapter
from emt.backbones.wan21.random_model import random_model
from emt.pipeline import load_pipeline
from emt.train.latents import LatentCache
from emt.train.objective import FlowObjective
from emt.train.trainer import Trainer, TrainingSettings
from emt.video import write_clip

FRAMES, SIDE = 5, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"frames": FRAMES, "height": SIDE, "width": SIDE, "steps": 2, "reference_neighbours": 1}
    return random_model(tmp_path_factory.mktemp("wan") / "model", **sizes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for seed, caption in enumerate(("a red square", "a blue square")):
        frames = np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        (root / "motion").mkdir(exist_ok=True)
        write_clip(root / "motion" / f"{caption}.mp4", frames, 8)
    return root


def start(model: Path, pairs: Path, run: Path, **given) -> Trainer:
    usual = {"steps": 2, "workers": 0, "sample_every": 0, "learning_rate": 1e-2}
    return Trainer(model, pairs, run, TrainingSettings(**usual | given), say=lambda text: None)


@pytest.fixture(scope="module")
def run(model, pairs, tmp_path_factory, monkeypatch_module) -> tuple[Path, list[list[str]]]:
    """A finished run, and the prompts that the text encoder was opened for."""
    from emt.prompts import PromptEncoder

    opened: list[list[str]] = []
    encode = PromptEncoder._encode
    monkeypatch_module.setattr(
        PromptEncoder,
        "_encode",
        lambda self, prompts, device: (opened.append(list(prompts)), encode(self, prompts, device)),
    )
    folder = tmp_path_factory.mktemp("run")
    monkeypatch_module.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    trainer = start(model, pairs, folder / "run", sample_every=2, gradient_checkpointing=True, precision="bf16")
    assert isinstance(trainer.objective, FlowObjective)
    assert trainer.objective.shift == 3.0
    assert trainer.train()
    return folder / "run", opened


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_only_the_adapter_changes(run, model):
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(run[0] / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".adapter." in name for name in changed)


def test_the_adapter_s_file_goes_with_the_network(run):
    """Names of the network, and the options that weights do not show: `emt import-weights --adapter` takes it."""
    read = read_adapter(run[0] / "adapter.safetensors")
    assert read.options["reference_blocks"] == [1, 2]
    assert read.options["reference_neighbours"] == 1
    trained = load_file(run[0] / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, trained[name]) for name, weight in read.state.items())


def test_the_result_makes_clips_and_a_sheet_was_drawn(run):
    pipe = load_pipeline(run[0] / "model")
    clip = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
    assert pipe.generate("a red square", pipe.extract_motion(clip))[0].shape == clip.shape
    assert (run[0] / "samples" / "step-00000002.png").is_file()


def test_text_and_latents_are_encoded_once(run, model, pairs, monkeypatch):
    folder, opened = run
    assert len([prompts for prompts in opened if "a red square" in prompts]) == 1, "all captions in one go"
    assert len(list((folder / "latents").iterdir())) == 2
    again = start(model, pairs, folder.parent / "again")
    again._latents.folder = folder / "latents"
    monkeypatch.setattr(again.pipe, "encode_frames", lambda *given: pytest.fail("known latents are encoded"))
    batch = again.prepare([again.dataset[0]], step=0, part=0)
    assert batch["target"].shape == (1, 16, 2, SIDE // 8, SIDE // 8)


@pytest.mark.parametrize("damage", [b"", b"no latents", None])
def test_latents_that_cannot_be_read_are_made_again(tmp_path, damage):
    (tmp_path / "vae").mkdir()
    cache, frames = LatentCache(tmp_path / "latents", tmp_path / "vae"), np.zeros((1, 8, 8, 3), np.uint8)
    made = cache.get(frames, lambda: torch.ones(2))
    (path,) = (tmp_path / "latents").iterdir()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert torch.equal(cache.get(frames, lambda: 2 * made), 2 * made)
    assert torch.equal(cache.get(frames, lambda: pytest.fail("made twice")), 2 * made)


def test_another_autoencoder_has_other_latents(tmp_path):
    frames, caches = np.zeros((1, 8, 8, 3), np.uint8), []
    for number in range(2):
        vae = tmp_path / f"vae{number}"
        vae.mkdir()
        (vae / "weights").write_bytes(bytes([number]))
        caches.append(LatentCache(tmp_path / "latents", vae))
    assert caches[0].get(frames, lambda: torch.zeros(1)).item() == 0
    assert caches[1].get(frames, lambda: torch.ones(1)).item() == 1
