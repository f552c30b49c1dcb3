"""SparseCtrl: its network against diffusers', its files, and what it adds to the denoising network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from PIL import Image
from program import FRAMES as CLIP_FRAMES
from program import clip, emt, environment, journal, lines, model, transfer
from safetensors.torch import save_file
from torch import Tensor, nn

from emt.backbone import Execution
from emt.backbones.sd15.passes import Constants
from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.sparse_control import RGB, SCRIBBLE, SparseControl, open_control
from emt.cache import ContentIndex
from emt.control import Control
from emt.errors import EmtError
from emt.hub import split_frame
from emt.parts import Config
from emt.pipeline import load_pipeline
from emt.video import read_clip
from emt_cli.batch.addons import AddonFinder
from emt_cli.batch.jobs import Job, identify
from emt_cli.batch.options import Settings, parse_field

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


# ------------------------------------------------------------------------------------------------------------- in jobs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", ("a.png", 0)),
        ("a.png@15", ("a.png", 15)),
        (r"C:\\x\\a.png@3", (r"C:\\x\\a.png", 3)),
        ("me@home/a.png", ("me@home/a.png", 0)),
        ("hf://o/n@main/a.png@2", ("hf://o/n@main/a.png", 2)),
        pytest.param("x" * 300 + "@2", ("x" * 300, 2), id="a name longer than file systems take"),
    ],
)
def test_an_at_before_a_number_begins_a_frame(text, expected):
    assert split_frame(text) == expected


def test_content_scale_and_frame_are_the_identity(tmp_path):
    finder = AddonFinder(ContentIndex(tmp_path / "cache"))
    for name, content in (("net", b"net"), ("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)

    def identity(**settings):
        own = Settings(**{name: parse_field(name, value) for name, value in settings.items()})
        job = Job(tmp_path / "x.mp4", "x", 0, own, addons=finder.find(own))
        return identify(job, reference="r", model="m", precision="auto"), job.addons.of_motion()

    net, a, b, c = (f"{tmp_path}/{name}" for name in ("net", "a", "b", "c"))
    plain = identify(Job(tmp_path / "x.mp4", "x", 0, Settings()), reference="r", model="m", precision="auto")
    assert identity() == (plain, [])
    assert identity(control=net, control_image=[a]) == identity(control=f"{net}:1.0", control_image=[f"{b}@0"])
    several = [
        {"control_image": [a]},
        {"control_image": [c]},
        {"control_image": [f"{a}@1"]},
        {"control_image": [a, f"{a}@1"]},
    ]
    several += [{"control_image": [a], "control": f"{net}:0.5"}]
    found = [identity(**{"control": net} | settings) for settings in several]
    assert len({own for own, _ in found} | {plain}) == len(several) + 1
    assert all(motion == [] for _, motion in found), "what is read of a reference is the same"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with clips of three jobs: without pictures, with one of the first frame, and with two."""
    folder = tmp_path_factory.mktemp("run")
    clip(folder / "a.mp4", 1)
    torch.manual_seed(5)
    unet = load_pipeline(model()).unet
    control = SparseControl.of_network(unet.config)
    control.start_from(unet)
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding):
        nn.init.normal_(layer.weight, std=0.2)
    save_file({name: p.detach().contiguous() for name, p in control.named_parameters()}, folder / "net.safetensors")
    for name, seed in (("first", 1), ("last", 2)):
        pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    own = [
        {},
        {"control": "net.safetensors", "control_image": "first.png"},
        {"control": "net.safetensors:0.5", "control_image": ["first.png", f"last.png@{CLIP_FRAMES - 1}"]},
    ]
    rows = [{"reference": "a.mp4", "prompt": "x", **more} for more in own]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = transfer(folder, "--prompts", "jobs.jsonl", "--json")
    assert [line["state"] for line in lines(ended)] == ["done"] * 3, ended.err
    return folder


def test_each_clip_is_made_with_its_own_pictures_and_says_so(run):
    made = journal(run / "out")
    assert len({read_clip(run / "out" / line["output"], frames=CLIP_FRAMES).frames.tobytes() for line in made}) == 3
    [two] = [line for line in made if len(line["settings"].get("control_image", ())) == 2]
    assert [(file["kind"], file["file"], file.get("scale", file.get("frame"))) for file in two["addons"]] == [
        ("control", "net.safetensors", 0.5),
        ("control_image", "first.png", 0),
        ("control_image", "last.png", CLIP_FRAMES - 1),
    ]


def test_options_are_the_fields_of_a_line_and_rerun_makes_the_same_clip(run, tmp_path):
    options = ["a.mp4", "--prompt", "x", "--control", "net.safetensors", "--control-image", "first.png@0", "--json"]
    [wanted] = [x for x in journal(run / "out") if len(x["settings"].get("control_image", ())) == 1]
    [line] = lines(transfer(run, *options, "-o", "alone"))
    assert line["id"] == wanted["id"]
    plan = ["plan", *options, "-o", "alone", "--model", str(model()), "--device", "cpu"]
    ended = emt(*plan, folder=run, environment=environment(run))
    assert json.loads(ended.out.splitlines()[0])["state"] == "done"
    again = ["rerun", f"out/{wanted['output']}", "--device", "cpu", "--overwrite", "-o", str(tmp_path / "again.mp4")]
    ended = emt(*again, folder=run, environment=environment(run))
    assert "identical with the original" in ended.err, ended.err
    (run / "first.png").rename(run / "moved.png")
    try:
        ended = emt(*again, folder=run, environment=environment(run))
        assert "the control image first.png that made it is not where it was" in ended.err
        ended = emt(*again, "--addon", "moved.png", folder=run, environment=environment(run))
        assert "identical with the original" in ended.err, ended.err
    finally:
        (run / "moved.png").rename(run / "first.png")


def test_what_makes_no_sense_is_one_line(run):
    both = ["--control", "net.safetensors", "--control-image", "first.png"]
    for options, message in (
        (both[:2], "--control is given without --control-image"),
        (both[2:], "--control-image is given without --control"),
        ([*both[:3], "first.png@99"], "a control image is of frame 99"),
        ([*both, "--control-image", "last.png"], "two control images are of frame 0"),
        ([*both, "--method", "guidance"], "method guidance takes no control network"),
        ([*both, "--cache-interval", 2], "cache_interval is 2 with a control network"),
        ([*both, "--frames", 40], "frames is 40 with a control network, which takes no windows"),
        (["--control", "first.png", *both[2:]], "first.png"),
        ([*both[:3], "net.safetensors"], "net.safetensors is no image"),
        ([*both[:3], "nowhere.png"], "nowhere.png does not exist"),
        ([*both[:3], "first.png@last"], "the frame 'last' is no number of a frame"),
    ):
        ended = transfer(run, "a.mp4", "--prompt", "x", *options, "-o", "bad", "--json")
        assert message in ended.err + ended.out, (options, ended.err)
        assert ended.code != 0
        assert "Traceback" not in ended.err
