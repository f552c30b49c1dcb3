"""An adapter's checkpoint with more than temporal projections: its weights denoise, the base's read the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weight_files import Files, State, assert_same_weights

from emt.backbones.sd15.adapter_checkpoint import _kinds, read_adapter
from emt.backbones.sd15.switching import merge_loras
from emt.errors import EmtError

TO_Q = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def projections(files: Files) -> State:
    """Query, key and value of the spatial and text attentions of the up blocks, other ones than the base's."""
    pattern = re.compile(r"up_blocks\.\d\.attentions\..*\.to_[qkv]\.weight")
    return {name: tensor + 1 for name, tensor in files.base.unet.items() if pattern.match(name)}


@pytest.fixture(scope="module")
def checkpoint(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "checkpoint.ckpt"
    torch.save({"global_step": 1, "state_dict": files.adapter | projections(files)}, path)
    return path


def test_k1_spatial_projections_denoise_and_the_card_says_so(files: Files, checkpoint: Path, tmp_path: Path) -> None:
    model = files.run(tmp_path / "m", adapter=checkpoint)
    own = {f"denoising.{name}": tensor for name, tensor in projections(files).items()}
    assert len(own) == 54
    assert_same_weights(model.weights, files.weights() | own)
    assert "144 trained tensors" in model.card
    assert "54 more layers, which denoise while the base's read the reference" in model.card
    assert "equal the base's" not in model.card
    assert "`up_blocks.N.attentions.N.transformer_blocks.N.attn1.to_q` (9)" in model.card
    unet = model.open().unet
    reads, denoises = (unet._layers(adapted).get_submodule(TO_Q).weight for adapted in (False, True))
    assert torch.equal(reads, files.base.unet[f"{TO_Q}.weight"])
    assert torch.equal(denoises, files.base.unet[f"{TO_Q}.weight"] + 1)


@pytest.mark.parametrize(
    "prefix", ["unet.", "module.denoising_unet.", "model.diffusion_model.", "_fsdp_wrapped_module."]
)
def test_k1_an_adapter_below_any_prefix(prefix: str, files: Files, tmp_path: Path) -> None:
    """Averages of it, and other networks beside it, are left and listed."""
    beside = {f"ema.{name}": tensor + 1 for name, tensor in files.adapter.items()}
    if prefix != "_fsdp_wrapped_module.":
        beside["vae.decoder.conv_in.bias"] = torch.ones(3)
    save_file({f"{prefix}{name}": x for name, x in files.adapter.items()} | beside, tmp_path / "adapter.safetensors")
    read = read_adapter(tmp_path / "adapter.safetensors")
    assert_same_weights(read.state, files.adapter)
    assert sorted(read.origin.dropped) == sorted(beside)


def test_k1_what_is_beside_an_adapter_without_a_prefix_is_no_other_network(files: Files, tmp_path: Path) -> None:
    save_file(files.adapter | {"vae.decoder.conv_in.bias": torch.ones(3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(EmtError, match=r"unexpected: vae\.decoder\.conv_in\.bias"):
        files.run(tmp_path / "m", adapter=tmp_path / "adapter.safetensors")


def test_weights_that_are_the_bases_are_shared(files: Files, tmp_path: Path) -> None:
    whole = files.base.unet | files.motion | files.adapter
    save_file(whole, tmp_path / "whole.safetensors")
    model = files.run(tmp_path / "m", adapter=tmp_path / "whole.safetensors")
    assert_same_weights(model.weights, files.weights())
    assert f"{len(whole) - 144} tensors equal the base's" in model.card


def test_a_network_of_emt_train_is_read_with_all_that_denoises(files: Files, checkpoint: Path, tmp_path: Path) -> None:
    """Its own backbone, which it names apart, is not taken."""
    files.run(tmp_path / "first", adapter=checkpoint)
    stored = tmp_path / "first" / "unet" / "diffusion_pytorch_model.safetensors"
    model = files.run(tmp_path / "m", adapter=stored)
    own = {f"denoising.{name}": tensor for name, tensor in projections(files).items()}
    assert_same_weights(model.weights, files.weights() | own)
    assert "not read, as nothing here uses it: `conv_in.bias`" in model.card or "`down_blocks.*`" in model.card


@pytest.mark.parametrize("when", ["at the import", "later"])
def test_a_lora_changes_what_denoises_as_it_changes_the_base(
    when: str, files: Files, checkpoint: Path, tmp_path: Path
) -> None:
    weight, generator = files.base.unet[f"{TO_Q}.weight"], torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
    save_file({f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    lora = [(tmp_path / "lora.safetensors", 0.5)]
    pipe = files.run(tmp_path / "m", adapter=checkpoint, loras=lora if when == "at the import" else []).open()
    if when == "later":
        merge_loras(pipe, lora)
    for adapted, before in ((False, weight), (True, weight + 1)):
        after = pipe.unet._layers(adapted).get_submodule(TO_Q).weight
        torch.testing.assert_close(after, before + 0.5 * up @ down)


def test_a_key_that_names_no_weight_is_named(files: Files, tmp_path: Path) -> None:
    save_file(files.adapter | {"up_blocks.0.nothing.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(EmtError, match=r"unexpected: up_blocks\.0\.nothing\.weight"):
        files.run(tmp_path / "m", adapter=tmp_path / "a.safetensors")


def test_an_adapter_is_a_file(files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmtError, match=r"the adapter .* is a folder"):
        files.run(tmp_path / "m", adapter=tmp_path)


def test_the_card_lists_eight_kinds_of_layers_and_counts_the_others() -> None:
    """`N` stands for the numbers in their paths, so that a network's hundred layers are a few kinds."""
    kinds = [f"up_blocks.N.{letter}" for letter in "abcdefghij"]
    paths = [kind.replace("N", number) for kind in kinds for number in ("0", "13")]
    assert _kinds(paths[:4]) == "`up_blocks.N.a` (2), `up_blocks.N.b` (2)"
    assert _kinds(paths[:16]) == ", ".join(f"`{kind}` (2)" for kind in kinds[:8])
    assert _kinds(paths) == ", ".join([*(f"`{kind}` (2)" for kind in kinds[:8]), "and 2 kinds more"])
