"""LoRAs of Wan in every public dialect, merged as W + scale · alpha/rank · BA."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from wan21_testing import small_transformer

from emt.backbones.wan21.lora import LoraMerge
from emt.errors import EmtError

RANK = 3
# diffusers' name → original one, of some layers of every kind.
MODULES = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
DIALECTS = {
    "diffusers": ("transformer.{new}", "lora_A.weight", "lora_B.weight"),
    "PEFT": ("base_model.model.{new}", "lora_A.default.weight", "lora_B.default.weight"),
    "original": ("diffusion_model.{old}", "lora_A.weight", "lora_B.weight"),
    "lightx2v": ("diffusion_model.{old}", "lora_down.weight", "lora_up.weight"),
    "DiffSynth": ("{old}", "lora_A.default.weight", "lora_B.default.weight"),
    "UniAnimate": ("pipe.dit.{old}", "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": ("lora_unet_{flat}", "lora_down.weight", "lora_up.weight"),
    "Wan Fun": ("lora_unet__{flat}", "lora_down.weight", "lora_up.weight"),
    "LyCORIS": ("lycoris_{flat}", "lora_down.weight", "lora_up.weight"),
    "OneTrainer": ("lora_transformer_{flat_new}", "lora_down.weight", "lora_up.weight"),
    "of a network called unet": ("unet.{old}", "lora_A.weight", "lora_B.weight"),
    "of a network called model": ("model.{new}", "lora_A.weight", "lora_B.weight"),
    "kohya of diffusers' names": ("lora_unet_{flat_new}", "lora_down.weight", "lora_up.weight"),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return small_transformer().state_dict()


def shapes(weights):
    return {name: tensor.shape for name, tensor in weights.items()}


def halves(weights, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for module in MODULES:
        rows, columns = weights[f"{module}.weight"].shape
        layers[module] = torch.randn(RANK, columns, generator=g), torch.randn(rows, RANK, generator=g)
    return layers


def written(path, dialect: str, layers, alpha: float | None = None, **others):
    """A file of these layers in a dialect; `others` are further tensors."""
    template, down_name, up_name = DIALECTS[dialect]
    state = dict(others)
    for new, (down, up) in layers.items():
        old = MODULES[new]
        module = template.format(new=new, old=old, flat=old.replace(".", "_"), flat_new=new.replace(".", "_"))
        state |= {f"{module}.{down_name}": down.clone(), f"{module}.{up_name}": up.clone()}
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(tmp_path, weights, dialect):
    layers = halves(weights)
    merge = LoraMerge(shapes(weights))
    origin = merge.read(written(tmp_path / "lora.safetensors", dialect, layers), 0.5)
    assert "9 layers of low rank" in origin.note
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected = weight + 0.5 * layers[module][1] @ layers[module][0] if module in layers else weight
        torch.testing.assert_close(merge(name, weight), expected)


@given(scale=st.floats(-2, 2), alpha=st.none() | st.floats(0.1, 64), dialect=st.sampled_from(list(DIALECTS)))
@settings(max_examples=20, deadline=None)
def test_scale_and_alpha(tmp_path_factory, weights, scale, alpha, dialect):
    layers = halves(weights)
    path = written(tmp_path_factory.mktemp("lora") / "l.safetensors", dialect, layers, alpha)
    merge = LoraMerge(shapes(weights))
    merge.read(path, scale)
    factor = scale * (1 if alpha is None else alpha / RANK)
    for module, (down, up) in layers.items():
        weight = weights[f"{module}.weight"]
        torch.testing.assert_close(
            merge(f"{module}.weight", weight), weight + factor * (up @ down), atol=1e-4, rtol=1e-4
        )


def test_k2_all_adapters_of_one_file_add_up(tmp_path, weights):
    module, state, expected = "blocks.0.attn1.to_q", {}, weights["blocks.0.attn1.to_q.weight"].clone()
    for seed, adapter in enumerate(("default", "style")):
        down, up = halves(weights, seed)[module]
        state |= {f"{module}.lora_A.{adapter}.weight": down, f"{module}.lora_B.{adapter}.weight": up}
        expected += up @ down
    save_file(state, tmp_path / "lora.safetensors")
    merge = LoraMerge(shapes(weights))
    merge.read(tmp_path / "lora.safetensors", 1.0)
    torch.testing.assert_close(merge(f"{module}.weight", weights[f"{module}.weight"]), expected)
    save_file(state | {f"{module}.lora_down.default.weight": down + 1}, tmp_path / "twice.safetensors")
    with pytest.raises(EmtError, match="a half of one layer by two names"):
        merge.read(tmp_path / "twice.safetensors", 1.0)


def test_k1_the_bias_of_pefts_low_rank_layers_is_scaled_as_they_are(tmp_path, weights):
    module = "blocks.0.attn1.to_q"
    down, up = halves(weights)[module]
    bias = torch.randn_like(weights[f"{module}.bias"])
    state = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    settings = json.dumps({"transformer.lora_alpha": 2 * RANK})
    save_file(state | {f"transformer.{module}.lora_B.bias": bias}, tmp_path / "l", {"lora_adapter_metadata": settings})
    merge = LoraMerge(shapes(weights))
    assert "1 layers of low rank" in merge.read(tmp_path / "l", 0.5).note
    for name, change in ((f"{module}.weight", up @ down), (f"{module}.bias", bias)):
        torch.testing.assert_close(merge(name, weights[name]), weights[name] + change)
    save_file(state | {f"transformer.{module}.lora_B.bias": bias[1:]}, tmp_path / "short")
    with pytest.raises(EmtError, match="wrong shape: the bias of"):
        merge.read(tmp_path / "short", 1.0)


def test_several_add_up_and_are_rounded_once(tmp_path, weights):
    merge = LoraMerge(shapes(weights))
    expected = {name: weight.bfloat16().float() for name, weight in weights.items()}
    for seed, scale in ((0, 1.0), (1, -0.3), (2, 0.7)):
        layers = halves(weights, seed)
        merge.read(written(tmp_path / f"{seed}.safetensors", "lightx2v", layers), scale)
        for module, (down, up) in layers.items():
            expected[f"{module}.weight"] += scale * (up @ down)
    for module in MODULES:
        got = merge(f"{module}.weight", weights[f"{module}.weight"].bfloat16())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected[f"{module}.weight"])


def test_whole_differences_of_lightx2v(tmp_path, weights):
    """`.diff` of a weight, `.diff_b` of a bias, `.diff_m` of a modulation."""
    changed = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }
    others = {f"diffusion_model.{key}": torch.randn_like(weights[name]) for key, name in changed.items()}
    merge = LoraMerge(shapes(weights))
    layers = {"blocks.0.attn1.to_q": halves(weights)["blocks.0.attn1.to_q"]}
    origin = merge.read(written(tmp_path / "l.safetensors", "lightx2v", layers, **others), 0.5)
    assert "9 whole differences" in origin.note
    for key, name in changed.items():
        torch.testing.assert_close(merge(name, weights[name]), weights[name] + 0.5 * others[f"diffusion_model.{key}"])


def test_alpha_of_peft_is_beside_the_file(tmp_path, weights):
    layers = halves(weights)
    written(tmp_path / "adapter_model.safetensors", "PEFT", layers)
    config = {"lora_alpha": 6, "alpha_pattern": {"proj_out": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merge = LoraMerge(shapes(weights))
    merge.read(tmp_path / "adapter_model.safetensors", 1.0)
    for module, (down, up) in layers.items():
        factor = (12 if module == "proj_out" else 6) / RANK
        weight = weights[f"{module}.weight"]
        torch.testing.assert_close(merge(f"{module}.weight", weight), weight + factor * (up @ down))


@pytest.mark.parametrize("zero", ["down", "up", "alpha"])
def test_k2_a_lora_that_changes_nothing_is_refused(tmp_path, weights, zero):
    layers = {
        module: (torch.zeros_like(down) if zero == "down" else down, torch.zeros_like(up) if zero == "up" else up)
        for module, (down, up) in halves(weights).items()
    }
    path = written(tmp_path / "l.safetensors", "kohya", layers, alpha=0.0 if zero == "alpha" else None)
    with pytest.raises(EmtError, match=f"changes nothing: all of its {len(layers)} layers are zero"):
        LoraMerge(shapes(weights)).read(path, 1.0)


class TestRefused:
    def refused(self, tmp_path, weights, state) -> str:
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "l.safetensors")
        with pytest.raises(EmtError) as error:
            LoraMerge(shapes(weights)).read(tmp_path / "l.safetensors", 1.0)
        assert str(tmp_path / "l.safetensors") in error.value.problem
        return str(error.value)

    @pytest.mark.parametrize(
        ("shapes_given", "message"),
        [
            ({"blocks.0.self_attn.q.lora_A.weight": (2, 32)}, "missing: the up half of diffusion_model.blocks.0.self"),
            ({"blocks.7.ffn.0.lora_A.weight": (2, 32)}, "no such weight in the model: diffusion_model.blocks.7.ffn.0"),
            (
                {"blocks.0.self_attn.q.dora_scale": (32, 1)},
                "unexpected: diffusion_model.blocks.0.self_attn.q.dora_scale",
            ),
            (
                {"blocks.0.ffn.0.diff_b": (5,)},
                "wrong shape: diffusion_model.blocks.0.ffn.0.diff_b is (5,), the weight (24",
            ),
            ({"blocks.0.something.diff": (5,)}, "no such weight in the model: diffusion_model.blocks.0.something.diff"),
            (
                {"blocks.0.self_attn.k.lora_A.weight": (2, 32), "blocks.0.self_attn.k.lora_B.weight": (32, 3)},
                "is (32, 3) × (2, 32), the weight (32, 32)",
            ),
        ],
    )
    def test_a_key_that_has_no_place(self, tmp_path, weights, shapes_given, message):
        state = {f"diffusion_model.{name}": torch.zeros(shape) for name, shape in shapes_given.items()}
        told = self.refused(tmp_path, weights, state)
        assert "1 key differs" in told
        assert message in told

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"alpha": torch.tensor(float("nan"))}, "not finite reals"),
            ({"alpha": torch.tensor(1 + 1j)}, "not finite reals"),
            ({"alpha": torch.ones(2)}, "2 numbers instead of one"),
            ({"lora_up.weight": torch.full((32, 2), float("inf"))}, "not finite reals"),
            ({"lora_up.weight": torch.ones(32, 2, dtype=torch.int8)}, "not finite reals"),
            ({"lora_down.weight": torch.tensor(1.0)}, "wrong shape"),
            ({"diff_b": torch.ones(32, dtype=torch.int32)}, "not finite reals"),
        ],
    )
    def test_k5_numbers_that_no_layer_has(self, tmp_path, weights, change, message):
        name = "diffusion_model.blocks.0.self_attn.q"
        state = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)} | change
        assert message in self.refused(tmp_path, weights, {f"{name}.{role}": t for role, t in state.items()})

    def test_k2_one_weight_by_two_names(self, tmp_path, weights):
        state = {}
        for name in ("diffusion_model.blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q"):
            state |= {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
        assert "one weight by two names" in self.refused(tmp_path, weights, state)

    def test_k7_of_another_network_it_says_so(self, tmp_path, weights):
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        halves = {f"{name}.lora_down.weight": torch.zeros(2, 320), f"{name}.lora_up.weight": torch.zeros(320, 2)}
        assert "it looks like one of Stable Diffusion" in self.refused(tmp_path, weights, halves)

    def test_of_many_keys_at_most_eight_lines(self, tmp_path, weights):
        state = {f"lora_unet_down_blocks_{i}_to_q.lora_down.weight": torch.zeros(2, 3) for i in range(50)}
        lines = [line for line in self.refused(tmp_path, weights, state).splitlines() if line.startswith("  ")]
        assert 2 <= len(lines) <= 8
        assert lines[-1] == f"  … and {51 - len(lines)} more"

    @pytest.mark.parametrize("name", ["diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q"])
    def test_of_another_size_it_says_so(self, tmp_path, weights, name):
        halves = {f"{name}.lora_down.weight": torch.zeros(2, 5120), f"{name}.lora_up.weight": torch.zeros(5120, 2)}
        assert "it is of a width of 5120, the model's is 32" in self.refused(tmp_path, weights, halves)

    def test_of_image_to_video_it_says_so(self, tmp_path, weights):
        name = "diffusion_model.blocks.0.cross_attn.k_img"
        halves = {f"{name}.lora_down.weight": torch.zeros(2, 32), f"{name}.lora_up.weight": torch.zeros(32, 2)}
        assert "it is of image to video" in self.refused(tmp_path, weights, halves)

    def test_a_refused_file_leaves_nothing_half_merged(self, tmp_path, weights):
        layers = halves(weights)
        path = written(tmp_path / "l.safetensors", "lightx2v", layers, **{"x.diff": torch.zeros(3)})
        merge = LoraMerge(shapes(weights))
        with pytest.raises(EmtError):
            merge.read(path, 1.0)
        assert all(merge(name, weight) is weight for name, weight in weights.items())
