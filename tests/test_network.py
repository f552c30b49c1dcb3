"""The network against the published one's outputs, and what holds for any size, type and batch."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from published import KINDS, SMALL, relative_error, small_states, small_unet, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emt.backbone import PLAIN, Constants, Execution
from emt.backbones.sd15.layers import GEGLU, FeedForward, sinusoidal_positions, sinusoids
from emt.backbones.sd15.stable_diffusion import animatediff_scheduler
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.errors import EmtError
from emt.features import TextFeatures
from emt.sampling import make_sampler, run_sampler
from emt.train.objective import Objective

TEXT_TOKENS, TEXT_WIDTH = 5, 8


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def unet(kind) -> MotionTransferUNet:
    return small_unet(kind)


@pytest.fixture(scope="module")
def published(kind) -> dict[str, Tensor]:
    return tensors(kind)


@pytest.fixture(scope="module")
def motion(unet, published):
    with torch.no_grad():
        return unet.encode_reference(published["reference_noisy"], SMALL["reference_timestep"], published["text"][:1])


def tiny_unet(seed: int = 0, **config) -> MotionTransferUNet:
    """Two levels, random everywhere, scalers half open: small enough for properties."""
    torch.manual_seed(seed)
    defaults = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_heads": 2,
        "motion_attention_heads": 2,
        "norm_num_groups": 4,
        "attention_levels": (0, 1),
    }
    unet = MotionTransferUNet(**(defaults | config)).eval()
    for module in unet.fusion_modules().values():
        module.temporal_transformer.transformer_blocks[0].scaler.spatial_convs[2].bias.data.fill_(5.0)
    return unet


def inputs(batch: int, frames: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, frames, height, width, generator=g),
        torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=g),
    )


FUSED = {
    "adds": Execution(fuse_residual_adds=True),
    "adds and biases": Execution(fuse_residual_adds=True, defer_conv_biases=True),
    "in parts": Execution(fuse_residual_adds=True, defer_conv_biases=True, feed_forward_tokens=7),
    "skips": Execution(fuse_residual_adds=True, join_skips=True),
    "all": Execution(fuse_residual_adds=True, defer_conv_biases=True, join_skips=True, constants=Constants()),
}


class Fused(nn.Module):
    """The network with an execution, as engines export it."""

    def __init__(self, unet: MotionTransferUNet, execution: Execution) -> None:
        super().__init__()
        self.unet, self.execution = unet, execution

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, motion: Any = None) -> Tensor:
        return self.unet(sample, timestep, text, motion, execution=self.execution)


@pytest.fixture(scope="module", params=["eager", "precomputed", "fused", "exported"])
def denoise(request, kind, unet, published, motion):
    """The network as a function of sample, timestep, text and whether there is a reference, computed in some way."""
    way, execution = request.param, FUSED["adds and biases"]
    if way == "exported":
        if kind == "small":
            pytest.skip("an export of spatial, which has layers of both kinds, takes long enough")
        arguments = published["sample"], torch.tensor(5), published["text"], unet.prepare(motion)
        with torch.no_grad():
            exported = torch.export.export(Fused(unet, execution), arguments, strict=False).module()

    def call(sample: Tensor, timestep: int | Tensor, text: Tensor, reference: bool) -> Tensor:
        if way == "eager":
            return unet(sample, timestep, text, motion if reference else None)
        if way == "exported":
            if not reference:
                pytest.skip("engines are exported with a reference")
            return exported(sample, torch.as_tensor(timestep), text, unet.prepare(motion))
        known, prepared = unet.encode_text(text), unet.prepare(motion) if reference else None
        return unet(sample, timestep, known, prepared, execution=execution if way == "fused" else PLAIN)

    return call


class TestPublishedOutputs:
    """Every tensor of the published network, to float32 rounding."""

    def test_the_draw_of_the_weights_is_the_published_one(self, kind):
        backbone, _ = small_states(kind)
        for name, total in KINDS[kind]["checks"].items():
            assert backbone[name].double().sum().item() == pytest.approx(total, abs=1e-4), name

    def test_noising_the_reference(self, published):
        """As training does it; the pipeline's own is in the tests of the pipeline."""
        scheduler = DDIMScheduler(1000, 0.00085, 0.012, "linear", steps_offset=1, clip_sample=False)
        latents, noise = published["reference_latents"], published["reference_noise"]
        noisy = Objective.from_scheduler(scheduler).add_noise(latents, noise, SMALL["reference_timestep"])
        assert relative_error(noisy, published["reference_noisy"]) < 1e-6

    @torch.no_grad()
    @pytest.mark.parametrize("execution", ["plain", "fused"])
    def test_backbone(self, unet, published, execution):
        how = FUSED["adds and biases"] if execution == "fused" else PLAIN
        reference = published["reference_noisy"], SMALL["reference_timestep"], published["text"][:1]
        assert relative_error(unet(*reference, adapted=False, execution=how), published["backbone_out"]) < 1e-5
        features = unet.encode_reference(*reference, execution=how)
        names = [name for name in published if name.startswith("feature/")]
        assert len(names) == 8
        for name in names:
            path, index = name.removeprefix("feature/").rsplit("/", 1)
            feature = features.layers[path.split(".temporal_transformer")[0]][int(index)]
            assert relative_error(feature[0].flatten(1, 2), published[name]) < 1e-5, name

    @torch.no_grad()
    def test_adapted_network_without_reference(self, denoise, kind, published):
        out = denoise(published["sample"], KINDS[kind]["timestep"], published["text"], False)
        assert relative_error(out, published["without_reference"]) < 1e-5

    @torch.no_grad()
    def test_adapted_network_with_reference(self, denoise, kind, published):
        out = denoise(published["sample"], KINDS[kind]["timestep"], published["text"], True)
        assert relative_error(out, published["with_reference"]) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("kind", "denoise"),
        [("small", "fused"), *(("spatial", way) for way in ("eager", "precomputed", "fused", "exported"))],
        indirect=True,
    )
    def test_five_sampler_steps_with_guidance(self, denoise, published):
        """With the pipeline's own sampler and guidance; in every way where layers are of both kinds."""
        sampler = make_sampler("ddim", animatediff_scheduler("epsilon"), 5)

        def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
            assert guided
            return denoise(sample, timestep, published["text"], True)

        latents = run_sampler(predict, sampler, published["sample"][:1], guidance=6.0)
        assert relative_error(latents, published["five_steps"]) < 1e-4

    @torch.no_grad()
    def test_hidden_states_come_with_the_same_outputs(self, unet, kind, published, motion):
        reference = published["reference_noisy"], SMALL["reference_timestep"], published["text"][:1]
        out, features, read = unet.denoise_with_hidden_states(*reference)
        assert relative_error(out, published["backbone_out"]) < 1e-5
        assert all(
            torch.equal(a, b) for path in motion.layers for a, b in zip(motion.layers[path], features.layers[path])
        )
        timestep = KINDS[kind]["timestep"]
        moved, drawn = unet.move_with_hidden_states(published["sample"], timestep, published["text"], motion)
        assert relative_error(moved, published["with_reference"]) < 1e-5
        assert list(read) == list(drawn) == list(unet.motion_modules())

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["small"], indirect=True)
    def test_float16(self, published, motion):
        half, dtype = small_unet().half(), torch.float16
        sample, text, moved = published["sample"].to(dtype), published["text"].to(dtype), motion.to(dtype=dtype)
        out = half(sample, SMALL["timestep"], text, moved)
        assert out.dtype == dtype
        assert relative_error(out, published["with_reference"]) < 2e-2

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["small"], indirect=True)
    def test_bfloat16(self, published, motion):
        """The arithmetic alone: both sides hold the weights and inputs that bfloat16 can hold.

        Rounding the weights to its 8 bits already moves this network's float32 output by 1.2e-2.
        """
        half = small_unet().bfloat16()
        sample, text, moved = published["sample"].bfloat16(), published["text"].bfloat16(), motion.to(dtype=half.dtype)
        out = half(sample, SMALL["timestep"], text, moved)
        assert out.dtype == torch.bfloat16
        expected = half.float()(sample.float(), SMALL["timestep"], text.float(), moved.to(dtype=torch.float32))
        assert relative_error(out, expected) < 2e-2
        assert relative_error(out, published["with_reference"]) < 3e-2

    def test_the_reference_matters(self, published):
        # Guards the parity tests: with and without are far apart, so neither can pass in the other's place.
        assert relative_error(published["without_reference"], published["with_reference"]) > 0.05


class TestLayersOfDenoisingsOwn:
    """A checkpoint may hold any weight of the network: it denoises, and the reference pass keeps the backbone's."""

    @staticmethod
    def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A backbone and a whole network, every weight of which is another."""
        torch.manual_seed(1)
        unet = tiny_unet()
        shapes = unet.published_shapes()
        backbone = {n: torch.randn(s) / max(s[1:].numel(), 4) ** 0.5 for n, s in shapes.backbone.items()}
        whole = {
            n: torch.randn(s) / max(s[1:].numel(), 4) ** 0.5 for n, s in (shapes.backbone | shapes.adapter).items()
        }
        return backbone, whole

    @torch.no_grad()
    @pytest.mark.parametrize("execution", [PLAIN, FUSED["adds and biases"]], ids=["plain", "fused"])
    def test_k1_all_weights_of_a_whole_network_denoise_and_none_reads_the_reference(self, execution):
        backbone, whole = self.states()
        both, reader, denoiser = tiny_unet(), tiny_unet(), tiny_unet()
        both.load_published(backbone, whole)
        reader.load_published(backbone)
        shapes = denoiser.published_shapes()
        denoiser.load_published(*({name: whole[name] for name in part} for part in (shapes.backbone, shapes.adapter)))
        assert denoiser.denoising is None
        sample, text = inputs(2, 3, 8, 8)
        motion = both.encode_reference(sample[:1], 400, text[:1], execution=execution)
        expected = reader.encode_reference(sample[:1], 400, text[:1])
        for path, layer in expected.layers.items():
            for ours, theirs in zip(motion.layers[path], layer, strict=True):
                torch.testing.assert_close(ours, theirs)
        ours = both(sample, 7, both.encode_text(text), both.prepare(motion), execution=execution)
        torch.testing.assert_close(ours, denoiser(sample, 7, text, expected))
        assert not torch.allclose(ours, reader(sample, 7, text, expected))

    def test_weights_that_are_the_backbones_take_no_memory(self):
        unet = tiny_unet()
        shapes = unet.published_shapes()
        backbone = {name: torch.randn(shape) for name, shape in shapes.backbone.items()}
        adapter = {name: torch.randn(shape) for name, shape in shapes.adapter.items()}
        unet.load_published(backbone, backbone | adapter)
        assert unet.denoising is None
        name = "up_blocks.0.resnets.0.conv1.bias"
        unet.load_published(backbone, backbone | adapter | {name: torch.zeros(16)})
        own = {key: tensor for key, tensor in unet.state_dict().items() if key.startswith("denoising.")}
        assert set(own) == {f"denoising.{name}", f"denoising.{name}".replace("bias", "weight")}
        assert not own[f"denoising.{name}"].any()

    @torch.no_grad()
    def test_they_are_saved_and_opened_again(self, tmp_path):
        unet = tiny_unet()
        unet.load_published(*self.states())
        unet.save_pretrained(tmp_path)
        again = MotionTransferUNet.from_pretrained(tmp_path)
        assert again.config.denoising_layers == unet.config.denoising_layers
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in unet.state_dict().items())
        sample, text = inputs(1, 3, 8, 8)
        motion = unet.encode_reference(sample, 400, text)
        torch.testing.assert_close(again(sample, 7, text, motion), unet(sample, 7, text, motion))

    def test_training_writes_temporal_projections_and_scalers_alone(self):
        unet = tiny_unet()
        unet.load_published(*self.states())
        assert {name.replace(".adapter.", ".") for name, _ in unet.adapter_parameters()} == set(
            unet.published_shapes().adapter
        )

    @torch.no_grad()
    @pytest.mark.parametrize("own", [("to_q",), ("to_q", "to_k", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")])
    def test_projections_are_fused_all_the_same(self, own):
        unet = tiny_unet(block_out_channels=(16, 32), cross_attention_dim=16)
        block = "up_blocks.1.attentions.0.transformer_blocks.0"
        layers = [f"{block}.{attention}.{name}" for attention in ("attn1", "attn2") for name in own]
        unet.add_denoising_layers([*layers, f"{block}.norm1", f"{block}.ff.net.2"])
        for parameter in unet.denoising.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        sample, _ = inputs(1, 3, 8, 8)
        text = torch.randn(1, TEXT_TOKENS, 16)

        def both() -> list[Tensor]:
            motion = unet.encode_reference(sample, 400, text)
            return [unet(sample, 7, text, motion), *(x for layer in motion.layers.values() for x in layer)]

        expected = both()
        unet.fuse_projections()
        for ours, theirs in zip(both(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(
        "path",
        [
            "nothing",
            "up_blocks.0",
            "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q",
        ],
    )
    def test_a_layer_that_cannot_have_one_is_named(self, path):
        with pytest.raises(ValueError, match=re.escape(f"denoising_layers has {path!r}")):
            tiny_unet(denoising_layers=[path])


class TestReadableModule:
    def test_scale_map_follows_the_paper(self):
        """Conv 2C → C/4, GELU, conv → C/16, GELU, conv → 1, sigmoid(x − 5), on both features at once."""
        unet = tiny_unet(block_out_channels=(32, 32), norm_num_groups=8)
        block = unet.up_blocks[1].motion_modules[0].temporal_transformer.transformer_blocks[0]
        scaler, frames, height, width = block.scaler, 3, 4, 6
        own, reference = torch.randn(2, 1, frames, height * width, 32)
        positions = scaler.positions[:frames, None]
        h = torch.cat([own, reference], -1)[0] + positions  # double width
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        for i, conv in enumerate(scaler.spatial_convs):
            h = conv(h) if i == 0 else conv(torch.nn.functional.gelu(h))
        expected = torch.sigmoid(h - 5).reshape(1, frames, -1)
        added = torch.randn(frames, 32)  # whatever encoding the attention's features come with, it is made good
        prepared = scaler.prepare(reference.unflatten(2, (height, width)), added)
        actual = scaler(own + added[:, None], prepared)
        torch.testing.assert_close(actual, expected)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("path", "eps"),
        [
            ("up_blocks.0.resnets.0.norm1", 1e-5),
            ("up_blocks.0.resnets.0.norm2", 1e-5),
            ("up_blocks.0.attentions.0.norm", 1e-6),
            ("up_blocks.0.motion_modules.0.temporal_transformer.norm", 1e-6),
            ("conv_norm_out", 1e-5),
            ("up_blocks.0.attentions.0.transformer_blocks.0.norm1", 1e-5),
            ("up_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm", 1e-5),
        ],
    )
    def test_k9_norms_add_the_published_epsilon(self, path, eps):
        """An input whose deviation is √eps comes out at √½ of what a much larger one comes out at."""
        norm = tiny_unet().get_submodule(path)
        channels = norm.weight.shape[0]
        shape = (2, channels, 16, 16) if isinstance(norm, nn.GroupNorm) else (64, channels)
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
        norm.silu = False
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        large, small = (norm.double()(x * deviation) for deviation in (1.0, eps**0.5))
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
        variances = x.reshape(len(x), groups, -1).var(-1, unbiased=False, keepdim=True)
        ratio = ((variances + eps) / (variances + 1)).sqrt()
        # norm(√eps·x) = √eps·(x − mean) / √(eps·variance + eps), and norm(x) = (x − mean) / √(variance + eps).
        expected = large.reshape(len(x), groups, -1) * ratio
        torch.testing.assert_close(small.reshape(len(x), groups, -1), expected, rtol=1e-5, atol=1e-7)

    @torch.no_grad()
    def test_attention_maps_are_softmaxed_products_of_queries_and_keys(self):
        """Of the up blocks that are asked for, at each pixel and head, frames with their positions to each other."""
        unet, heads, frames, height, width = tiny_unet(), 2, 3, 8, 16
        sample, text = inputs(2, frames, height, width)
        features = unet.encode_reference(sample, 400, text)
        maps = unet.attention_maps(features, [1])
        modules = [module for path, module in unet.fusion_modules().items() if path.startswith("up_blocks.1.")]
        layers = [
            (attention, feature)
            for module in modules
            for attention, feature in zip(module.block.attention_blocks, features.layers[module.path], strict=True)
        ]
        assert len(maps) == len(layers) == 4
        for found, (attention, feature) in zip(maps, layers, strict=True):
            assert found.shape == (2, height * width, heads, frames, frames)
            for clip, y, x, head in ((0, 0, 0, 0), (1, 2, 9, 1)):
                at_pixel = feature[clip, :, y, x] + attention.positions[:frames]  # (frames, channels)
                query, key = (layer(at_pixel).chunk(heads, -1)[head] for layer in (attention.to_q, attention.to_k))
                expected = (query @ key.T / query.shape[1] ** 0.5).softmax(1)
                torch.testing.assert_close(found[clip, y * width + x, head], expected)
        assert unet.attention_maps(features, []) == []

    def test_encodings_are_those_of_the_papers(self):
        """A timestep as diffusers encodes it for Stable Diffusion; positions by Vaswani et al. 2017, section 3.5."""
        timesteps = torch.tensor([0, 1, 400, 999])
        expected = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
        torch.testing.assert_close(sinusoids(timesteps, 32), expected)
        positions = sinusoidal_positions(7, 6)
        for position in range(7):
            for i in range(3):
                angle = position / 10_000 ** (2 * i / 6)
                assert positions[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert positions[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)

    @torch.no_grad()
    def test_every_way_into_the_network_brings_it_to_its_device(self):
        """Where accelerate moves it in and out, by a hook that it puts on the network for `forward` alone."""
        unet, moved = tiny_unet(), []
        unet._hf_hook = SimpleNamespace(pre_forward=moved.append)
        sample, text = inputs(1, 2, 8, 8)
        motion = MotionTransferUNet.encode_reference.__wrapped__(unet, sample, 400, text)
        _, deep = unet.denoise_deep.__wrapped__(unet, sample, 3, text, motion)
        for enter in (
            lambda: unet.encode_reference(sample, 400, text),
            lambda: unet.denoise_with_features(sample, 3, text),
            lambda: unet.denoise_with_hidden_states(sample, 3, text),
            lambda: unet.denoise_deep(sample, 3, text, motion),
            lambda: unet.denoise_shallow(sample, 3, text, motion, deep),
            lambda: unet.encode_text(text),
            lambda: unet.encode_text_without_adapter(text),
        ):
            moved.clear()
            enter()
            assert moved[:1] == [unet]

    @torch.no_grad()
    def test_a_layer_in_the_place_of_a_feed_forward_layers_linear_one_computes(self, monkeypatch):
        """Such as one with a low-rank branch: a kernel that reads the weight alone is not for it."""

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        monkeypatch.setattr("emt.backbones.sd15.layers.fuses", lambda x, weight: True)
        layer, x = GEGLU(8, 16), torch.randn(3, 8)
        doubled = Doubled(8, 32)
        doubled.load_state_dict(layer.proj.state_dict())
        values, gates = layer.proj(x).chunk(2, -1)
        torch.testing.assert_close(layer(x), values * nn.functional.gelu(gates))
        layer.proj = doubled
        torch.testing.assert_close(layer(x), 2 * values * nn.functional.gelu(2 * gates))

    def test_inference_feeds_forward_a_part_of_the_tokens_at_a_time(self, monkeypatch):
        """The wide tensor in between is the largest of the network; gradients need all of it at once anyway."""
        layer, x, seen = FeedForward(8), torch.randn(2, 3, 5, 8), []
        layer.net[0].register_forward_hook(lambda module, given, out: seen.append(out.shape))
        whole = layer(x)
        assert seen == [(2, 3, 5, 32)]
        monkeypatch.setattr("emt.backbones.sd15.layers.FEED_FORWARD_TOKENS", 12)
        with torch.no_grad():
            in_parts = layer(x)
        assert seen[1:] == [(12, 32), (12, 32), (6, 32)]
        torch.testing.assert_close(in_parts, whole)

    def test_adapter_parameters_are_the_published_trained_ones(self, unet):
        trained = {name.replace(".adapter.", ".") for name, _ in unet.adapter_parameters()}
        assert trained == set(SMALL["adapter_keys"])

    def test_adapter_starts_from_the_backbone(self):
        unet = tiny_unet()
        backbone = {k: v for k, v in unet.state_dict().items() if ".adapter." not in k and ".scaler." not in k}
        unet.load_published(backbone)
        sample, text = inputs(1, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(unet(sample, 5, text), unet(sample, 5, text, adapted=False))

    @pytest.mark.parametrize(("fused", "modules"), [(None, 8), ((1,), 2), ((1, 2), 4), ((), 0)])
    def test_fusion_blocks_are_configuration(self, fused, modules):
        unet = tiny_unet(block_out_channels=(8,) * 4, attention_levels=None, fusion_blocks=fused)
        sample, text = inputs(1, 2, 8, 8)
        motion = unet.encode_reference(sample, 400, text)
        assert len(motion.layers) == modules
        changed = unet(sample, 100, text, motion) != unet(sample, 100, text)
        assert changed.any() == bool(modules)

    @pytest.mark.parametrize("levels", [1, 2, 3])
    def test_any_number_of_levels(self, levels):
        unet = tiny_unet(block_out_channels=(8,) * levels, attention_levels=(0,), motion_mid_block=True)
        sample, text = inputs(1, 2, 8, 8)
        assert unet(sample, 1, text).shape == sample.shape
        assert "mid_block.motion_modules.0.temporal_transformer.norm.weight" in unet.state_dict()

    def test_saving_and_loading(self, tmp_path):
        unet = tiny_unet()
        unet.save_pretrained(tmp_path)
        again = MotionTransferUNet.from_pretrained(tmp_path)
        sample, text = inputs(1, 3, 8, 8)
        motion = unet.encode_reference(sample, 400, text)
        torch.testing.assert_close(again(sample, 7, text, motion), unet(sample, 7, text, motion), rtol=0, atol=0)

    def test_gradient_checkpointing_changes_nothing(self):
        unet = tiny_unet().train()
        sample, text = inputs(1, 3, 8, 8)
        with torch.no_grad():  # the reference pass runs the backbone, which is not trained
            motion = unet.encode_reference(sample, 400, text)
        gradients = []
        for checkpointed in (False, True):
            if checkpointed:
                unet.enable_gradient_checkpointing()
            unet.zero_grad()
            unet(sample, 9, text, motion).square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in unet.adapter_parameters()})
        assert all(g.abs().sum() > 0 for g in gradients[0].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)


class TestShapes:
    @settings(max_examples=10, deadline=None)
    @given(
        frames=st.integers(2, 32),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        batch=st.integers(1, 2),
    )
    @torch.no_grad()
    def test_any_frames_and_any_multiple_of_8_pixels(self, frames, height, width, batch):
        unet = tiny_unet()
        sample, text = inputs(batch, frames, height, width)
        motion = unet.encode_reference(sample, 400, text)
        out = unet(sample, 3, text, motion)
        assert out.shape == sample.shape
        assert out.isfinite().all()

    @torch.no_grad()
    def test_non_square_clips_are_read_right(self):
        """A convolution commutes with transposing the image if its kernel is transposed too.

        The published scaler misreads non-square clips (it takes the square root of the token count); transposing
        clip, reference and all kernels must transpose the result.
        """
        unet, mirrored = tiny_unet(), tiny_unet()
        for p in mirrored.parameters():
            if p.ndim == 4:
                p.data = p.data.transpose(2, 3).contiguous()
        sample, text = inputs(1, 4, 4, 10)
        out = unet(sample, 3, text, unet.encode_reference(sample, 400, text))
        turned = sample.transpose(3, 4)
        expected = mirrored(turned, 3, text, mirrored.encode_reference(turned, 400, text)).transpose(3, 4)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_sample_depends_on_its_own_reference_alone(self):
        """Samples [a, b, a, b] of guidance share references [a, b]: sample i follows reference i mod n."""
        unet = tiny_unet()
        references, _ = inputs(2, 4, 8, 8, seed=1)
        sample, text = inputs(4, 4, 8, 8, seed=2)
        motion = unet.encode_reference(references, 400, text[:2])
        out = unet(sample, 3, text, motion)
        for i in range(4):
            alone = unet.encode_reference(references[i % 2 : i % 2 + 1], 400, text[i % 2 : i % 2 + 1])
            expected = unet(sample[i : i + 1], 3, text[i : i + 1], alone)
            torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("sample", "text", "message"),
        [
            ((1, 4, 2, 8), (1, 5, 8), r"sample has shape \(1, 4, 2, 8\)"),
            ((1, 3, 2, 8, 8), (1, 5, 8), r"sample has shape \(1, 3, 2, 8, 8\), expected \(batch, 4"),
            ((1, 4, 1, 8, 8), (1, 5, 8), "sample has 1 frames"),
            ((1, 4, 33, 8, 8), (1, 5, 8), "sample has 33 frames"),
            ((1, 4, 2, 8, 8), (1, 5, 9), r"text has shape \(1, 5, 9\)"),
            ((1, 4, 2, 8, 8), (5, 8), r"text has shape \(5, 8\)"),
            ((2, 4, 2, 8, 8), (1, 5, 8), "text has batch 1, sample has batch 2"),
        ],
    )
    def test_a_wrong_shape_is_named(self, sample, text, message):
        with pytest.raises(ValueError, match=message):
            tiny_unet()(torch.zeros(sample), 3, torch.zeros(text))

    @torch.no_grad()
    @pytest.mark.parametrize("shape", [(1, 4, 5, 8, 8), (1, 4, 4, 8, 16), (3, 4, 4, 8, 8)])
    def test_a_motion_of_another_shape_is_named(self, shape):
        unet = tiny_unet()
        sample, text = inputs(2, 4, 8, 8)
        reference, reference_text = inputs(*[shape[0], *shape[2:]])
        motion = unet.encode_reference(reference, 400, reference_text)
        with pytest.raises(ValueError, match=r"the motion has|motions do not divide"):
            unet(sample, 3, text, motion)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"block_out_channels": (10, 16)}, r"\[10\] are not divisible by norm_num_groups=4"),
            ({"fusion_blocks": (2,)}, "fusion_blocks is \\[2\\], allowed are 0 to 1"),
            ({"attention_levels": (5,)}, "attention_levels is \\[5\\]"),
        ],
    )
    def test_an_impossible_configuration_is_named(self, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_unet(**config)


class TestFusedPass:
    """Adds that matmuls make in place, and biases that norms add, are the published network's, in float64."""

    @staticmethod
    def network(**config) -> MotionTransferUNet:
        """Biases of all sizes: PyTorch's own are small, and norms take them away again."""
        unet = tiny_unet(**config)
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.data += torch.randn_like(parameter)
        return unet.double()

    @pytest.mark.parametrize("execution", FUSED.values(), ids=FUSED.keys())
    @settings(max_examples=8, deadline=None)
    @given(
        config=st.sampled_from(
            [
                {},
                {"layers_per_block": 2},
                {"block_out_channels": (8,), "attention_levels": (0,)},
                {"block_out_channels": (8, 8, 16), "attention_levels": (1,), "motion_mid_block": True},
            ]
        ),
        frames=st.integers(2, 4),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
    )
    @torch.no_grad()
    def test_all_ways_through_the_network(self, execution, config, frames, height, width):
        unet = self.network(**config)
        sample, text = (x.double() for x in inputs(2, frames, height, width))
        given = sample.clone()
        if execution.constants is not None:
            execution = replace(execution, constants=Constants())  # they are of one network

        def everything(how: Execution, deep: Tensor | None = None) -> list[Tensor]:
            motion = unet.encode_reference(sample[:1], 400, text[:1], execution=how)
            prediction, found = unet.denoise_deep(sample, 3, text, motion, execution=how)
            taken = found if deep is None else deep
            shallow = unet.denoise_shallow(sample, 9, text, motion, taken, execution=how)
            features = [x for layer in motion.layers.values() for x in layer]
            return [unet(sample, 3, text, execution=how), prediction, found, shallow, *features]

        expected = everything(PLAIN)
        deep = expected[2].clone()
        for ours, theirs in zip(everything(execution, deep), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert torch.equal(sample, given)
        assert torch.equal(deep, expected[2])

    @pytest.mark.parametrize("execution", FUSED.values(), ids=FUSED.keys())
    @torch.no_grad()
    def test_each_sample_may_have_a_timestep_of_its_own(self, execution):
        unet = self.network()
        if execution.constants is not None:
            execution = replace(execution, constants=Constants())
        sample, text = (x.double() for x in inputs(2, 3, 8, 8))
        both = unet(sample, torch.tensor([3, 500]), text, execution=execution)
        alone = [unet(sample[i : i + 1], t, text[i : i + 1]) for i, t in enumerate((3, 500))]
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        "execution", [PLAIN, FUSED["adds and biases"], FUSED["all"]], ids=["plain", "fused", "all"]
    )
    @pytest.mark.parametrize("attended", [(0,), (1,), ()])
    @torch.no_grad()
    def test_what_the_halves_of_guidance_share_is_computed_once(self, execution, attended):
        """Also with deep features, of prompts that change from frame to frame, and if no layer reads the prompts."""
        unet = self.network(attention_levels=attended, layers_per_block=2)
        once, text = (x.double() for x in inputs(2, 3, 8, 8))
        sample = torch.cat([once, once])
        motion = unet.prepare(unet.encode_reference(sample[:1], 400, text[:1]))
        for prompts in (torch.cat([text, text.flip(1)]), torch.cat([text, text.flip(1)]).repeat_interleave(3, 0)):
            features = [unet.encode_text(prompts), TextFeatures(unet.encode_text(prompts).layers, guided=True)]
            found = []
            for known in features:
                how = replace(execution, constants=execution.constants and Constants())
                with Called() as called:
                    prediction, deep = unet.denoise_deep(sample, 3, known, motion, execution=how)
                shallow = unet.denoise_shallow(sample, 9, known, motion, deep, execution=how)
                found.append((prediction, deep, shallow, called.sizes))
            for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
            assert found[1][3].count(6) > found[0][3].count(6) == 0

    @torch.no_grad()
    def test_constants_follow_weights_that_are_written_in_place(self):
        unet, constants = self.network(), Constants()
        execution = replace(FUSED["all"], constants=constants)
        sample, text = (x.double() for x in inputs(1, 2, 4, 4))
        unet(sample, 3, text, execution=execution)
        kept = len(constants)
        for parameter in unet.parameters():
            parameter.data.mul_(1.5)
        expected = unet(sample, 3, text)
        assert not torch.allclose(unet(sample, 3, text, execution=execution), expected)
        constants.refresh()
        torch.testing.assert_close(unet(sample, 3, text, execution=execution), expected, rtol=1e-10, atol=1e-10)
        assert len(constants) == kept

    @torch.no_grad()
    def test_matmuls_add_and_convolutions_have_no_biases(self):
        """Fewer adds, and none of a bias over all pixels but before other resolutions."""
        unet = self.network().float()
        sample, text = inputs(1, 2, 8, 8)
        counts = []
        for execution in (PLAIN, FUSED["adds"], FUSED["adds and biases"]):
            with Called() as called:
                unet(sample, 3, text, execution=execution)
            matmuls = called.names.count("aten.addmm_.default")
            counts.append((matmuls, sum("convolution" in name for name in called.with_bias)))
        transformers = sum(".proj_out.weight" in name for name in unet.state_dict())
        shortcuts = sum("conv_shortcut.weight" in name for name in unet.state_dict())
        assert counts[0][0] == 0
        assert counts[1][0] == counts[2][0] == 4 * transformers + shortcuts
        assert counts[1][1] == counts[0][1] - shortcuts
        assert counts[2][1] == 1  # the last one, which nothing follows

    @torch.no_grad()
    def test_exports_have_matmuls_add_too(self):
        """Also an export for any batch, of which it is what the network computes; one level has all layers."""
        unet = self.network(block_out_channels=(8,), attention_levels=(0,)).float()
        sample, text = inputs(2, 3, 4, 4)
        time = torch.tensor([3.0, 3.0])
        expected = unet(sample, time, text)
        samples = torch.export.Dim("samples", min=1, max=4)
        shapes = {"sample": {0: samples}, "timestep": {0: samples}, "text": {0: samples}}
        fused = Fused(unet, FUSED["adds and biases"])
        exported = torch.export.export(fused, (sample, time, text), strict=False, dynamic_shapes=shapes)
        called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        transformers = sum(".proj_out.weight" in name for name in unet.state_dict())
        shortcuts = sum("conv_shortcut.weight" in name for name in unet.state_dict())
        assert shortcuts
        assert called.count("emt.add_matmul_.default") == 4 * transformers + shortcuts
        module = exported.module()
        for count in (1, 2, 4):
            given = [part[:1].expand(count, *part.shape[1:]).contiguous() for part in (sample, time, text)]
            torch.testing.assert_close(module(*given), unet(*given))
        torch.testing.assert_close(module(sample, time, text), expected)

    def test_training_is_what_it_was(self):
        unet = self.network()
        sample, text = (x.double() for x in inputs(1, 2, 4, 4))
        motion = unet.encode_reference(sample, 400, text)
        gradients = []
        for execution in (PLAIN, FUSED["adds and biases"]):
            unet.zero_grad()
            unet(sample, 9, text, motion, execution=execution).square().mean().backward(retain_graph=True)
            gradients.append({name: p.grad.clone() for name, p in unet.adapter_parameters()})
        for name, gradient in gradients[0].items():
            assert gradient.any()
            assert torch.equal(gradients[1][name], gradient)


class Called(TorchDispatchMode):
    """Operators that were called: their names, those given a bias as third argument, images that were convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.with_bias: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if "convolution" in str(func):
            self.sizes.append(args[0].shape[0])
        if len(args) > 2 and args[2] is not None:
            self.with_bias.append(str(func))
        return func(*args, **(kwargs or {}))


class TestLoadingPublished:
    def test_every_bad_key_is_named(self):
        backbone, adapter = small_states()
        missing = backbone.pop("conv_in.bias")
        backbone["conv_in.bais"] = missing
        backbone["conv_out.weight"] = torch.zeros(4, 31, 3, 3)
        unet = small_unet()
        with pytest.raises(EmtError) as error:
            unet.load_published(backbone, adapter)
        for text in ("missing: conv_in.bias (32,)", "unexpected: conv_in.bais", "wrong shape: conv_out.weight"):
            assert text in str(error.value)

    def test_stored_position_encodings_are_checked_and_dropped(self):
        backbone, adapter = small_states()
        name = (
            "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"
        )
        unet = small_unet()
        unet.load_published(backbone | {name: sinusoidal_positions(24, 64)[None]}, adapter)
        with pytest.raises(EmtError, match="not the sinusoidal position encoding"):
            unet.load_published(backbone | {name: torch.randn(1, 24, 64)}, adapter)


class TestCompilers:
    @torch.no_grad()
    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_as_one_graph(self, backend):
        """Export alone; compiling the exported graph is tested in test_engines.py."""
        unet = tiny_unet()
        sample, text = inputs(2, 4, 8, 8)
        motion = unet.prepare(unet.encode_reference(sample[:1], 400, text[:1]))
        features = unet.encode_text(text)
        compiled = torch.compile(unet, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(sample, torch.tensor(3), features, motion), unet(sample, 3, text, motion))

    @torch.no_grad()
    def test_exports(self):
        unet = tiny_unet()
        sample, text = inputs(2, 4, 8, 8)
        motion = unet.prepare(unet.encode_reference(sample[:1], 400, text[:1]))
        arguments = (sample, torch.tensor(3), unet.encode_text(text), motion)
        exported = torch.export.export(unet, arguments, strict=False).module()
        other, _ = inputs(2, 4, 8, 8, seed=5)
        torch.testing.assert_close(exported(other, *arguments[1:]), unet(other, *arguments[1:]))
