"""SparseCtrl: its network against diffusers', its files, and what it adds to the denoising network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn

from emt.backbone import Execution
from emt.backbones.sd15.passes import Constants
from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.sparse_control import RGB, SCRIBBLE, SparseControl, open_control
from emt.control import Control
from emt.errors import EmtError
from emt.parts import Config
from emt.pipeline import load_pipeline

CONFIG = Config(
    in_channels=4,
    block_out_channels=[32, 64],
    layers_per_block=1,
    cross_attention_dim=24,
    attention_heads=4,
    motion_attention_heads=4,
    norm_num_groups=8,
    motion_max_frames=16,
)
BATCH, FRAMES, SHOWN = 2, 6, [0, 3]


class PerFrameNorm(nn.GroupNorm):
    """A group norm of each frame, (n, channels, frames, …), as AnimateDiff has it; diffusers norms them together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def theirs(kind: str) -> SparseControlNetModel:
    torch.manual_seed(0)
    model = SparseControlNetModel(
        in_channels=4,
        conditioning_channels=4 if kind == RGB else 3,
        use_simplified_condition_embedding=kind == RGB,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=16,
    ).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if type(module).__name__ == "AnimateDiffTransformer3D":
            module.norm.__class__ = PerFrameNorm
    return model


@pytest.fixture(scope="module", params=[RGB, SCRIBBLE])
def both(request, tmp_path_factory) -> tuple[SparseControlNetModel, SparseControl, Path]:
    """diffusers' network with random weights, ours with the same from a file, and the file."""
    model, path = theirs(request.param), tmp_path_factory.mktemp("control") / "sparsectrl.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model, open_control(path, CONFIG), path


def conditions(control: SparseControl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side, channels = (8, 4) if control.reads_latents else (64, 3)
    torch.manual_seed(1)
    mask = torch.zeros(BATCH, 1, FRAMES, side, side)
    mask[:, :, SHOWN] = 1
    return torch.tensor([7, 400]), torch.randn(BATCH, 5, 24), torch.rand(BATCH, channels, FRAMES, side, side), mask


@torch.no_grad()
def test_residuals_are_those_of_diffusers(both):
    model, control, _ = both
    timestep, text, pictures, mask = conditions(control)
    down, mid = model(
        torch.randn(BATCH, 4, FRAMES, 8, 8),  # which it replaces by zeros
        timestep,
        text.repeat_interleave(FRAMES, 0),
        pictures * mask,
        conditioning_mask=mask,
        conditioning_scale=0.7,
        return_dict=False,
    )
    found = control(timestep, text, pictures * mask, mask, 0.7)
    assert len(found) == len(down) + 1
    for wanted, got in zip([*down, mid], found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_file_is_read_strictly(both, tmp_path):
    _, control, _ = both
    state = {name: tensor.clone() for name, tensor in control.state_dict().items() if not name.endswith("positions")}
    state.pop("controlnet_mid_block.bias")
    state["down_blocks.0.odd.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(EmtError, match=r"SparseCtrl network .*broken") as caught:
        open_control(tmp_path / "broken.safetensors", CONFIG)
    assert "controlnet_mid_block.bias" in str(caught.value)
    assert "down_blocks.0.odd.weight" in str(caught.value)


def test_published_files_have_position_encodings_in_a_dictionary(both, tmp_path):
    _, control, _ = both
    state = {name: tensor for name, tensor in control.state_dict().items() if not name.endswith("positions")}
    name = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0"
    state[f"{name}.pos_encoder.pe"] = control.get_buffer(f"{name}.positions")[None].clone()
    torch.save({"state_dict": state}, tmp_path / "v3_sd15_sparsectrl.ckpt")
    again = open_control(tmp_path / "v3_sd15_sparsectrl.ckpt", CONFIG)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), control.parameters(), strict=True))


def test_another_file_is_named(tmp_path):
    save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(EmtError, match="is a UNet in diffusers layout, not a SparseCtrl network"):
        open_control(tmp_path / "unet.safetensors", CONFIG)


# ------------------------------------------------------------------------------------------------------- in a pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_pipeline(random_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def network(pipe) -> SparseControl:
    torch.manual_seed(2)
    control = SparseControl.of_network(pipe.unet.config).eval().requires_grad_(False)
    control.start_from(pipe.unet)
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding):
        nn.init.normal_(layer.weight, std=0.1)
    return control


def picture(pipe, seed: int = 0) -> np.ndarray:
    shape = (pipe.config.height, pipe.config.width, 3)
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


def test_pictures_change_the_clip_and_a_scale_of_zero_does_not(pipe, network):
    how = {"steps": 2, "seed": 3}
    plain = pipe.generate("a star", **how)[0]
    changed = pipe.generate("a star", control=Control(network, {0: picture(pipe)}), **how)[0]
    none = pipe.generate("a star", control=Control(network, {0: picture(pipe)}, 0.0), **how)[0]
    assert (plain != changed).any()
    assert np.abs(none.astype(int) - plain).max() <= 1


def test_a_clip_does_not_depend_on_the_pictures_of_its_batch(pipe, network):
    controls = [Control(network, {0: picture(pipe, i)}) for i in range(2)]
    both = pipe.generate(["a star", "a ball"], seed=[1, 2], control=controls, steps=2)
    alone = pipe.generate("a ball", seed=2, control=controls[1], steps=2)[0]
    assert np.abs(both[1].astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    "execution",
    [
        Execution(fuse_residual_adds=True, defer_conv_biases=True),
        Execution(fuse_residual_adds=True, defer_conv_biases=True, join_skips=True, constants=Constants()),
    ],
)
@torch.no_grad()
def test_fused_layers_take_residuals_as_others_do(pipe, network, execution):
    torch.manual_seed(4)
    config, frames = pipe.unet.config, 4
    sample = torch.randn(2, config.in_channels, frames, 8, 8)
    text = torch.randn(2, 5, config.cross_attention_dim)
    mask = torch.ones(2, 1, frames, 8, 8)
    residuals = network(torch.tensor(9), text, torch.randn_like(sample), mask)
    plain = pipe.unet(sample, 9, text, control=residuals)
    fused = pipe.unet(sample, 9, text, control=residuals, execution=execution)
    without = pipe.unet(sample, 9, text)
    assert not torch.allclose(plain, without, atol=1e-3)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_pictures_have_a_frame_and_the_clips_size(pipe, network):
    with pytest.raises(ValueError, match=r"of frames \[99\], allowed are 0 to"):
        pipe.generate("a star", control=Control(network, {99: picture(pipe)}), steps=1)
    with pytest.raises(ValueError, match="control pictures have shape"):
        pipe.generate("a star", control=Control(network, {0: picture(pipe)[1:]}), steps=1)
    with pytest.raises(EmtError, match="a control network makes no clips of a cache interval of 2"):
        pipe.generate("a star", control=Control(network, {0: picture(pipe)}), steps=2, cache_interval=2)
