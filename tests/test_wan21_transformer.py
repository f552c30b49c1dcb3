"""Wan 2.1's transformer against diffusers', and what holds for a reference of any size, dtype and batch."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from wan21_testing import (
    SIZES,
    diffusers_transformer,
    inputs,
    motion_of,
    relative_error,
    small_transformer,
    transformer_like,
)

from emt.backbone import Execution
from emt.backbones.wan21.facts import default_reference_blocks, trained_reference_blocks
from emt.backbones.wan21.transformer import WanMotionTransferTransformer, with_strength
from emt.features import Motion


@pytest.fixture(scope="module")
def model() -> WanMotionTransferTransformer:
    return small_transformer()


class TestWithoutReference:
    """The backbone is diffusers', whatever the adapter's weights."""

    @pytest.fixture(scope="class")
    def theirs(self) -> WanTransformer3DModel:
        return diffusers_transformer()

    @given(
        batch=st.integers(1, 3),
        frames=st.sampled_from([1, 5, 9, 17, 21]),
        height=st.integers(1, 4),
        width=st.integers(1, 4),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=25, deadline=None)
    @torch.no_grad()
    def test_it_predicts_what_diffusers_predicts(self, theirs, batch, frames, height, width, seed):
        sample, timestep, text = inputs(batch, (frames - 1) // 4 + 1, 2 * height, 2 * width, seed)
        expected = theirs(sample, timestep, text, return_dict=False)[0]
        assert relative_error(transformer_like(theirs)(sample, timestep, text), expected) <= 1e-5

    @pytest.mark.parametrize(("heads", "channels", "layers"), [(1, 8, 1), (3, 24, 2), (2, 64, 2), (1, 128, 1)])
    @torch.no_grad()
    def test_at_any_width_and_depth(self, heads, channels, layers):
        theirs = diffusers_transformer(num_attention_heads=heads, attention_head_dim=channels, num_layers=layers)
        sample, timestep, text = inputs()
        ours = transformer_like(theirs, reference_blocks=[0])
        assert (
            relative_error(ours(sample, timestep, text), theirs(sample, timestep, text, return_dict=False)[0]) <= 1e-5
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision_rounds_where_diffusers_rounds(self, theirs, tmp_path, dtype):
        theirs.save_pretrained(tmp_path / "theirs")
        transformer_like(theirs).save_pretrained(tmp_path / "ours")
        a = WanTransformer3DModel.from_pretrained(tmp_path / "theirs", dtype=dtype)
        b = WanMotionTransferTransformer.from_pretrained(tmp_path / "ours", dtype=dtype)
        kept = {name for name, p in a.named_parameters() if p.dtype == torch.float32}
        assert kept
        assert kept == {n for n, p in b.named_parameters() if p.dtype == torch.float32 and ".adapter." not in n}
        sample, timestep, text = inputs()
        x, c = sample.to(dtype), text.to(dtype)
        assert relative_error(b(x, timestep, c), a(x, timestep, c, return_dict=False)[0]) <= 1e-5

    @torch.no_grad()
    def test_gradients_are_those_of_diffusers(self, theirs):
        ours, theirs = transformer_like(theirs), copy.deepcopy(theirs)
        sample, timestep, text = inputs()
        with torch.enable_grad():
            ours(sample, timestep, text).square().mean().backward()
            theirs(sample, timestep, text, return_dict=False)[0].square().mean().backward()
        mine = dict(ours.named_parameters())
        for name, p in theirs.named_parameters():
            torch.testing.assert_close(mine[name].grad, p.grad, atol=1e-6, rtol=1e-4, msg=name)


class TestReference:
    @torch.no_grad()
    def test_it_changes_the_prediction(self, model):
        sample, timestep, text = inputs()
        alone, moved = (model(sample, timestep, text, motion) for motion in (None, motion_of(model)))
        assert relative_error(moved, alone) > 1e-2

    @torch.no_grad()
    def test_before_training_a_reference_that_is_the_clip_changes_nothing(self):
        model = small_transformer()
        model.initialize_adapter()
        sample, timestep, text = inputs()
        motion = model.encode_reference(sample, timestep, text)
        alone = model(sample, timestep, text)
        assert relative_error(model(sample, timestep, text, motion), alone) < 1e-5
        assert relative_error(model(sample, timestep, text, motion_of(model)), alone) > 1e-3

    @torch.no_grad()
    def test_the_weaker_it_is_the_nearer_is_the_backbone(self):
        model = small_transformer()
        model.initialize_adapter()
        sample, timestep, text = inputs()
        motion, alone = motion_of(model), model(sample, timestep, text)
        far = [
            relative_error(model(sample, timestep, text, with_strength(motion, s)), alone) for s in (3, 1, 0.1, 1e-4)
        ]
        assert far == sorted(far, reverse=True)
        assert far[-1] < 1e-4

    @torch.no_grad()
    def test_each_of_several_references_has_its_own_strength(self, model):
        sample, timestep, text = inputs(2)
        motion = motion_of(model, 2)
        both = model(sample, timestep, text, with_strength(motion, torch.tensor([0.5, 2.0])))
        for i, strength in enumerate((0.5, 2.0)):
            one = model(sample, timestep, text, with_strength(motion, strength))
            torch.testing.assert_close(both[i], one[i])

    @given(n=st.integers(1, 3), times=st.integers(1, 2), neighbours=st.sampled_from([None, 0, 1]))
    @settings(max_examples=12, deadline=None)
    @torch.no_grad()
    def test_sample_i_follows_reference_i_mod_n(self, n, times, neighbours):
        model = small_transformer(reference_neighbours=neighbours)
        sample, timestep, text = inputs(n * times)
        motion = motion_of(model, n)
        together = model(sample, timestep, text, motion)
        for i in range(n * times):
            layers = {path: tuple(x[i % n : i % n + 1] for x in layer) for path, layer in motion.layers.items()}
            one = type(motion)(layers)
            alone = model(sample[i : i + 1], timestep[i : i + 1], text[i : i + 1], one)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_what_is_prepared_once_predicts_the_same(self, model):
        sample, timestep, text = inputs()
        motion = motion_of(model)
        prepared = model(sample, timestep, model.encode_text(text), model.prepare(motion))
        assert torch.equal(prepared, model(sample, timestep, text, motion))

    @pytest.mark.parametrize("neighbours", [0, 1, 2])
    def test_a_frame_sees_reference_frames_of_its_own_time_and_its_neighbours(self, neighbours):
        model = small_transformer(reference_blocks=[2], reference_neighbours=neighbours)
        sample, timestep, text = inputs(1, frames=6)
        motion, other = motion_of(model, frames=6), motion_of(model, frames=6)
        other.layers["blocks.2"][0][:, 4] += 1
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                a, b = (model(sample, timestep, text, m) for m in (motion, other))
            changed = ((a - b).abs().amax(dim=(0, 1, 3, 4)) > 1e-6).tolist()
            assert changed == [abs(frame - 4) <= neighbours for frame in range(6)]

    @pytest.mark.parametrize("neighbours", [0, 1])
    def test_training_and_inference_predict_the_same(self, neighbours):
        model = small_transformer(reference_neighbours=neighbours)
        sample, timestep, text = inputs(frames=5)
        motion = motion_of(model, frames=5)
        trained = model(sample, timestep, text, motion)
        with torch.no_grad():
            torch.testing.assert_close(trained, model(sample, timestep, text, motion), atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_what_was_read_is_what_the_blocks_project(self, model):
        sample, timestep, text = inputs()
        motion = model.encode_reference(sample, timestep, text)
        seen = {}
        hooks = [
            model.blocks[i].attn1.to_k.register_forward_pre_hook(
                lambda _, args, i=i: seen.update({f"blocks.{i}": args[0]})
            )
            for i in (1, 2)
        ]
        model(sample, timestep, text)
        for hook in hooks:
            hook.remove()
        assert motion.layers.keys() == seen.keys()
        for path, (hidden, _) in motion.layers.items():
            assert hidden.shape == (2, 3, 2, 3, 32)
            torch.testing.assert_close(hidden.flatten(1, 3), seen[path])

    @torch.no_grad()
    def test_reading_ends_with_the_last_block_that_takes_it(self):
        model = small_transformer(reference_blocks=[0, 1], num_layers=4)
        ran = []
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: ran.append(i))
        motion_of(model)
        assert ran == [0, 1]

    @torch.no_grad()
    def test_predicting_and_reading_in_one_pass(self, model):
        sample, timestep, text = inputs()
        prediction, features, hidden = model.denoise_with_hidden_states(sample, timestep, text)
        assert torch.equal(prediction, model(sample, timestep, text))
        for path, (read, _) in model.encode_reference(sample, timestep, text).layers.items():
            assert torch.equal(features.layers[path][0], read)
        assert {path: h.shape for path, h in hidden.items()} == {f"blocks.{i}": (2, 3, 2, 3, 32) for i in range(3)}


class TestTraining:
    def test_the_adapter_alone_is_trained(self):
        model = small_transformer().requires_grad_(False)
        parameters = dict(model.adapter_parameters())
        assert parameters
        assert all(name.startswith(("blocks.1.adapter.", "blocks.2.adapter.")) for name in parameters)
        for p in parameters.values():
            p.requires_grad_(True)
        sample, timestep, text = inputs()
        model(sample, timestep, text, motion_of(model)).square().mean().backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert got == set(parameters)

    def test_the_adapter_of_wan_1_3b_has_about_21_million_weights(self):
        with torch.device("meta"):
            model = WanMotionTransferTransformer()
        trained = sum(p.numel() for _, p in model.adapter_parameters())
        assert 20e6 < trained < 22e6
        assert sum(p.numel() for p in model.parameters()) - trained == pytest.approx(1.42e9, rel=0.01)

    def test_it_learns_from_its_initial_state(self):
        """Two adapters' steps lower the loss: nothing of what is trained is stuck at zero."""
        model = small_transformer().requires_grad_(False)
        model.initialize_adapter()
        parameters = [p.requires_grad_() for _, p in model.adapter_parameters()]
        sample, timestep, text = inputs()
        motion, target = motion_of(model, 2), inputs(seed=3)[0]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        losses = []
        for _ in range(8):
            loss = (model(sample, timestep, text, motion) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] * 0.99
        assert all(p.grad.abs().sum() > 0 for p in parameters)

    @pytest.mark.parametrize("neighbours", [None, 1])
    def test_checkpointing_has_the_same_gradients(self, neighbours):
        plain = small_transformer(reference_neighbours=neighbours)
        saving = copy.deepcopy(plain)
        saving.enable_gradient_checkpointing()
        sample, timestep, text = inputs()
        motion = motion_of(plain)
        for model in (plain, saving):
            model(sample, timestep, text, motion).square().mean().backward()
        for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)


class TestGivenWrong:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"reference_blocks": (3,)}, "reference_blocks is [3], allowed are 0 to 2"),
            ({"reference_neighbours": -1}, "reference_neighbours is -1"),
            ({"attention_head_dim": 12}, "attention_head_dim is 12, allowed are multiples of 8"),
            ({"patch_size": (2, 2, 2)}, "patch_size is (2, 2, 2)"),
        ],
    )
    def test_configuration(self, change, named):
        with pytest.raises(ValueError, match=re.escape(named)):
            WanMotionTransferTransformer(**(SIZES | change))

    def test_shapes(self, model):
        sample, timestep, text = inputs()
        for bad, named in [
            ((sample[:, :3], timestep, text), "sample has shape (2, 3, 3, 4, 6), expected (batch, 4,"),
            ((sample[..., :5], timestep, text), "width by 2"),
            ((sample, timestep, text[..., :4]), "text has shape (2, 5, 4), expected (batch, tokens, 12)"),
            ((sample, timestep, text[:1]), "text has batch 1, sample has batch 2"),
            ((sample, timestep, text, motion_of(model, 3)), "3 motions do not divide the batch"),
            ((sample, timestep, text, motion_of(model, frames=2)), "the same frames and size"),
        ]:
            with pytest.raises(ValueError, match=re.escape(named)):
                model(*bad)

    def test_motion_of_another_network(self, model):
        sample, timestep, text = inputs()
        other = motion_of(small_transformer(reference_blocks=[0]))
        with pytest.raises(ValueError, match=r"read in \['blocks.0'\], but this network takes it in"):
            model(sample, timestep, text, other)

    @pytest.mark.parametrize("strength", [0, -1.0, torch.tensor([1.0, 0.0])])
    def test_strength(self, model, strength):
        with pytest.raises(ValueError, match="positive numbers"):
            with_strength(motion_of(model, 2), strength)


@torch.no_grad()
def test_saved_and_opened_it_predicts_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    opened = WanMotionTransferTransformer.from_pretrained(tmp_path)
    sample, timestep, text = inputs()
    motion = motion_of(model)
    assert torch.equal(opened(sample, timestep, text, motion), model(sample, timestep, text, motion))


@torch.no_grad()
def test_a_motion_is_saved_and_read_again(model, tmp_path):
    motion = Motion(with_strength(motion_of(model), 0.5), 9, 32, 48, seed=3)
    motion.save(tmp_path / "motion.safetensors")
    read = Motion.load(tmp_path / "motion.safetensors")
    sample, timestep, text = inputs()
    expected = model(sample, timestep, text, motion.features)
    torch.testing.assert_close(model(sample, timestep, text, read.features), expected, atol=1e-5, rtol=1e-5)


class TestExecution:
    @torch.no_grad()
    def test_a_feed_forward_layer_in_parts_is_the_same(self, model):
        sample, timestep, text = inputs()
        expected = model(sample, timestep, text)
        for tokens in (1, 7, 18, 36):
            got = model(sample, timestep, text, execution=Execution(feed_forward_tokens=tokens))
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)

    @torch.no_grad()
    def test_projections_in_one_matmul_are_the_same(self):
        model = small_transformer()
        sample, timestep, text = inputs()
        motion = motion_of(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = model(sample, timestep, text, motion)
        model.fuse_projections()
        model.fuse_projections()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(model(sample, timestep, text, motion), expected, atol=1e-6, rtol=1e-5)

    @torch.no_grad()
    def test_a_layer_is_prepared_as_all_are(self, model):
        motion = motion_of(model, 2)
        prepared = model.prepare(motion)
        assert list(prepared.layers) == model.reference_layers() == ["blocks.1", "blocks.2"]
        for path, (layer,) in prepared.layers.items():
            (one,) = model.prepare_layer(path, motion.layers[path])
            assert torch.equal(one.key, layer.key)
            assert torch.equal(one.scaler, layer.scaler)


def test_limits_follow_from_the_configuration(model):
    assert model.facts.max_frames == 81
    assert [n for n in range(1, 22) if model.facts.takes_frames(n)] == [5, 9, 13, 17, 21]
    assert model.facts.grid_step == 2
    assert (model.latent_channels, model.text_width) == (4, 12)


def test_blocks_that_take_the_reference():
    assert default_reference_blocks(30) == range(4, 19)
    assert default_reference_blocks(40) == range(5, 25)
    assert default_reference_blocks(1) == range(1)
    assert trained_reference_blocks(30) == range(8, 18)
    assert trained_reference_blocks(40) == range(11, 24)
    assert trained_reference_blocks(1) == range(1)
