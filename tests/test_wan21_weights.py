"""`import_weights` on files of Wan 2.1 in every published layout, and on files that are something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from model_hub import Hub
from program import console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel
from wan21_published import (
    original_transformer,
    original_umt5,
    original_vae,
    small_parts,
    write_diffusers_folder,
    write_original_folder,
)
from wan21_testing import inputs, motion_of, small_transformer

from emt.backbones.wan21.adapter_file import read_adapter, save_adapter
from emt.backbones.wan21.import_weights import import_weights, write_weights
from emt.backbones.wan21.published import transformer_config
from emt.backbones.wan21.recognition import recognizes
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.errors import EmtError
from emt.model_folder import find_model
from emt.pipeline import load_pipeline


@pytest.fixture(scope="module")
def parts():
    return small_parts()


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory) -> Path:
    return write_diffusers_folder(tmp_path_factory.mktemp("published") / "diffusers")


def stored(folder: Path) -> dict[str, Tensor]:
    """All weights in a folder of a network."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def refused(tmp_path: Path, base: str | Path, **options) -> str:
    """The message of an import that fails; nothing is left behind."""
    with pytest.raises(EmtError) as error:
        import_weights(tmp_path / "out", base=base, **options)
    assert not list(tmp_path.glob("*out*"))
    return str(error.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model hub on loopback, with a cache of its own."""
    hub = Hub(tmp_path / "hub")
    with hub.serve():
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


class TestHub:
    """Repositories are of tens of gigabytes: only what is read is fetched, and nothing of what is refused."""

    def test_a_part_is_taken_from_a_repository_of_all_of_wan(self, tmp_path, hub, diffusers_folder):
        write_diffusers_folder(hub.folder / "Wan-AI" / "all")
        write_original_folder(hub.folder / "Wan-AI" / "original")
        hub.add("google/umt5-xxl", **{"pytorch_model.bin": b"0" * 99, "README.md": b"x", "config.json": b"{}"})
        for file in (hub.folder / "Wan-AI" / "all" / "tokenizer").iterdir():
            hub.add("google/umt5-xxl", **{file.name: file})
        given = {name: diffusers_folder / name for name in ("text_encoder", "vae", "tokenizer")}
        for option, repo, folder, fetched in (
            ("vae", "Wan-AI/all", "vae", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
            ("vae", "Wan-AI/original", "vae", {"Wan2.1_VAE.pth"}),
            ("text_encoder", "Wan-AI/original", "text_encoder", {"models_t5_umt5-xxl-enc-bf16.pth"}),
            ("tokenizer", "Wan-AI/all", None, {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}),
            ("tokenizer", "google/umt5-xxl", None, {"config.json", "tokenizer.json", "tokenizer_config.json"}),
        ):
            hub.requests.clear()
            base = {"base": diffusers_folder / "transformer", **given, option: repo}
            made = import_weights(tmp_path / "model", **base, dtype="fp32", overwrite=True).folder
            assert set(hub.fetched()) == fetched
            if folder:
                expected = stored(diffusers_folder / folder)
                found = stored(made / folder)
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_a_part_is_taken_from_a_folder_of_all_of_wan(self, tmp_path, diffusers_folder):
        given = dict.fromkeys(("text_encoder", "vae", "tokenizer"), diffusers_folder)
        made = import_weights(tmp_path / "model", base=diffusers_folder / "transformer", **given, dtype="fp32").folder
        expected = import_weights(tmp_path / "whole", base=diffusers_folder, dtype="fp32").folder
        for part in ("unet", "text_encoder", "vae"):
            assert stored(made / part).keys() == stored(expected / part).keys()

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                {"model_index.json": {"_class_name": "WanPipeline", "boundary_ratio": 0.875}},
                "is Wan 2.2, which has two",
            ),
            ({"model_index.json": {"_class_name": "WanImageToVideoPipeline"}}, "is Wan image to video"),
            ({"model_index.json": {"_class_name": "WanVACEPipeline"}}, "is Wan 2.1 VACE"),
            ({"config.json": {"model_type": "vace"}}, "is Wan 2.1 VACE"),
            ({"config.json": {"model_type": "i2v"}}, "is Wan image to video"),
            ({"config.json": {"model_type": "ti2v"}}, "is Wan 2.2 TI2V-5B"),
            ({"high_noise_model/config.json": {"model_type": "t2v"}}, "is Wan 2.2, which has two"),
        ],
    )
    def test_of_another_kind_nothing_large_is_fetched(self, tmp_path, hub, files, message):
        weights = ("transformer/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors")
        large = {name.replace("/", "__"): b"0" * 999 for name in (*weights, "models_t5_umt5-xxl-enc-bf16.pth")}
        hub.add("Wan-AI/other", **large, **{k.replace("/", "__"): json.dumps(v).encode() for k, v in files.items()})
        assert message in refused(tmp_path, "hf://Wan-AI/other")
        assert not [name for name in hub.fetched() if not name.endswith(".json")]


class TestFloat8:
    """Files of weights in float8, with and without scales beside them."""

    @staticmethod
    def scaled(state: dict[str, Tensor], scales: str, rows: bool = False) -> tuple[dict, dict]:
        """A state with its matrices in float8 and their scales, and what it stands for."""
        given, meant = {}, {}
        for name, tensor in state.items():
            if tensor.ndim != 2 or "norm" in name or "shared" in name or "token_embedding" in name:
                given[name] = meant[name] = tensor
                continue
            scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()) / 448
            given[name] = (tensor / scale).to(torch.float8_e4m3fn)
            given[name.removesuffix("weight") + scales] = scale.flatten()
            meant[name] = given[name].float() * scale
        return given, meant

    @pytest.mark.parametrize(
        ("scales", "rows"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
    )
    def test_scales_are_multiplied(self, tmp_path, parts, diffusers_folder, scales, rows):
        """Of the transformer, and of UMT5 as ComfyUI has it; marks and scales of inputs say nothing of weights."""
        transformer, _, text_encoder = parts
        with torch.no_grad():
            base, meant = self.scaled(
                {k: v.clone() for k, v in original_transformer(transformer).items()}, scales, rows
            )
            own = {n: t.clone() for n, t in text_encoder.state_dict().items() if "embed_tokens" not in n}
            text, meant_text = self.scaled(own, scales, rows)
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in base.items()}
        prefixed["model.diffusion_model.blocks.0.self_attn.q.scale_input"] = torch.ones(1)
        prefixed["scaled_fp8"] = text["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        save_file(prefixed, tmp_path / "base.safetensors")
        save_file(text, tmp_path / "text.safetensors")
        given = {"vae": diffusers_folder / "vae", "tokenizer": diffusers_folder / "tokenizer"}
        files = {"base": tmp_path / "base.safetensors", "text_encoder": tmp_path / "text.safetensors"}
        made = import_weights(tmp_path / "model", **files, **given, dtype="fp32").folder
        save_file(meant, tmp_path / "meant.safetensors")
        save_file(meant_text, tmp_path / "meant-text.safetensors")
        files = {"base": tmp_path / "meant.safetensors", "text_encoder": tmp_path / "meant-text.safetensors"}
        exact = import_weights(tmp_path / "exact", **files, **given, dtype="fp32").folder
        for part in ("unet", "text_encoder"):
            found, expected = stored(made / part), stored(exact / part)
            assert found.keys() == expected.keys()
            assert all(
                torch.allclose(found[name], expected[name], rtol=1e-6) for name in found if "adapter" not in name
            )

    @pytest.mark.parametrize("change", ["whole numbers", "another length", "not finite"])
    def test_k7_what_is_quantized_otherwise_is_refused(self, tmp_path, parts, diffusers_folder, change):
        with torch.no_grad():
            base, _ = self.scaled({k: v.clone() for k, v in original_transformer(parts[0]).items()}, "weight_scale")
        name = "blocks.0.self_attn.q.weight"
        if change == "whole numbers":
            base[name] = base[name].float().to(torch.int8)
        else:
            base[f"{name}_scale"] = torch.full((3,) if change == "another length" else (1,), float("nan"))
        save_file(base, tmp_path / "base.safetensors")
        given = {name: diffusers_folder / name for name in ("text_encoder", "vae", "tokenizer")}
        assert "is quantized" in refused(tmp_path, tmp_path / "base.safetensors", **given)


class TestLayouts:
    """Whatever the layout, the same networks come out."""

    @pytest.fixture(params=["diffusers", "shards", "original", "single files", "ComfyUI's files"])
    def given(self, request, tmp_path, parts) -> dict:
        kind = request.param
        if kind in ("diffusers", "shards"):
            return {"base": write_diffusers_folder(tmp_path / "base", shards=kind == "shards")}
        if kind == "original":
            return {"base": write_original_folder(tmp_path / "base")}
        transformer, vae, text_encoder = parts
        base = original_transformer(transformer)
        if kind == "ComfyUI's files":
            base = {f"model.diffusion_model.{name}": tensor for name, tensor in base.items()}
            text = {n: t.clone() for n, t in text_encoder.state_dict().items() if "embed_tokens" not in n}
            text["spiece_model"] = torch.zeros(5, dtype=torch.uint8)
        else:
            text = original_umt5(text_encoder)
        for name, state in (("base", base), ("text", text), ("vae", original_vae(vae))):
            save_file(state, tmp_path / f"{name}.safetensors")
        tokenizer = write_diffusers_folder(tmp_path / "other") / "tokenizer"
        files = {"text_encoder": "text.safetensors", "vae": "vae.safetensors"}
        return {"base": tmp_path / "base.safetensors", "tokenizer": tokenizer} | {
            name: tmp_path / file for name, file in files.items()
        }

    @torch.no_grad()
    def test_the_networks_are_the_published_ones(self, tmp_path, parts, given):
        report = import_weights(tmp_path / "model", **given, dtype="fp32")
        theirs, vae, text_encoder = parts
        ours = WanMotionTransferTransformer.from_pretrained(report.folder / "unet")
        sample, timestep, text = inputs(channels=16)
        text = torch.nn.functional.pad(text, (0, 20))
        expected = theirs.eval()(sample, timestep, text, return_dict=False)[0]
        assert (ours(sample, timestep, text) - expected).abs().max() < 1e-5
        opened = AutoencoderKLWan.from_pretrained(report.folder / "vae")
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), vae.parameters(), strict=True))
        encoder = UMT5EncoderModel.from_pretrained(report.folder / "text_encoder")
        tokens = AutoTokenizer.from_pretrained(report.folder / "tokenizer")("a cat", return_tensors="pt").input_ids
        assert torch.equal(encoder(tokens).last_hidden_state, text_encoder.eval()(tokens).last_hidden_state)

    def test_the_card_names_every_file_with_its_hash(self, tmp_path, given):
        report = import_weights(tmp_path / "model", **given)
        card = (report.folder / "README.md").read_text()
        for source in report.sources:
            for file, digest in source.files:
                assert f"`{file}` sha256 `{digest}`" in card
        assert {source.kind for source in report.sources} == {"base", "text encoder", "VAE", "tokenizer", "adapter"}


class TestStored:
    @pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_what_diffusers_keeps_in_float32_stays_so(self, tmp_path, diffusers_folder, name, dtype):
        import_weights(tmp_path / "model", base=diffusers_folder, dtype=name)
        weights = stored(tmp_path / "model" / "unet")
        kept = {n for n in weights if any(part in n for part in WanTransformer3DModel._keep_in_fp32_modules)}
        assert {weights[n].dtype for n in kept} == {torch.float32}
        assert {weights[n].dtype for n in weights.keys() - kept} == {dtype}
        assert {t.dtype for t in stored(tmp_path / "model" / "vae").values()} == {torch.float32}
        assert {t.dtype for t in stored(tmp_path / "model" / "text_encoder").values()} == {dtype}

    def test_guidance_leads_away_from_the_clip_with_neither_prompt_nor_reference(self, tmp_path, diffusers_folder):
        import_weights(tmp_path / "model", base=diffusers_folder, dtype="fp32")
        assert load_pipeline(tmp_path / "model").config.guided_by_reference

    def test_an_import_is_repeatable(self, tmp_path, diffusers_folder):
        for name in ("a", "b"):
            import_weights(tmp_path / name, base=diffusers_folder)
        a, b = (stored(tmp_path / name / "unet") for name in "ab")
        assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())

    def test_shards_are_written_one_by_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr("emt.backbones.wan21.import_weights._SHARD_BYTES", 1000)
        state = {f"w{i}": torch.full((100,), float(i)) for i in range(5)}
        held, most = set(), 0

        def change(name, weight):
            nonlocal most
            held.add(name)
            most = max(most, len(held))
            return weight

        def dtype_of(name):
            return torch.float32

        original = save_file

        def save(tensors, *args):
            original(tensors, *args)
            held.difference_update(tensors)

        monkeypatch.setattr("emt.backbones.wan21.import_weights.save_file", save)
        write_weights(tmp_path / "model", state, dtype_of, change)
        assert most <= 2
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == state.keys()
        assert stored(tmp_path).keys() == state.keys()

    def test_weights_that_are_not_finite_are_named(self, tmp_path, parts, diffusers_folder):
        folder = tmp_path / "base"
        write_diffusers_folder(folder)
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        state["blocks.1.ffn.net.2.bias"][3] = 1e6
        save_file(state, file, {"format": "pt"})
        message = refused(tmp_path, folder, dtype="fp16")
        assert "1 weights are not finite in torch.float16" in message
        assert "blocks.1.ffn.net.2.bias" in message
        assert "--dtype bf16" in message


class TestSizes:
    """The configurations of both published sizes, from nothing but shapes."""

    @pytest.mark.parametrize(("width", "layers", "inner", "heads"), [(1536, 30, 8960, 12), (5120, 40, 13824, 40)])
    @pytest.mark.parametrize("settings", [{}, {"num_heads": 0}, {"num_attention_heads": 0}])
    def test_of_wan(self, width, layers, inner, heads, settings):
        with torch.device("meta"):
            state = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=128, ffn_dim=inner, num_layers=layers
            ).state_dict()
        config = transformer_config(state, dict.fromkeys(settings, heads), "file")
        with torch.device("meta"):
            model = WanMotionTransferTransformer(**config)
        own = {n: t.shape for n, t in model.state_dict().items() if ".adapter." not in n}
        assert own == {name: tensor.shape for name, tensor in state.items()}
        assert model.config.num_attention_heads == heads


class TestRefused:
    def write(self, tmp_path: Path, change) -> Path:
        transformer, *_ = small_parts()
        state = original_transformer(transformer)
        state = {name: tensor.clone() for name, tensor in (change(state) or state).items()}
        path = tmp_path / "file.safetensors"
        save_file(state, path)
        return path

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda s: s.update({"img_emb.proj.0.weight": torch.zeros(1)}), "Wan image to video"),
            (lambda s: s.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(1)}), "Wan image to video"),
            (lambda s: s.update({"vace_blocks.0.after_proj.bias": torch.zeros(1)}), "Wan 2.1 VACE"),
            (lambda s: s.update({"face_adapter.fuser_blocks.0.k_norm.weight": torch.zeros(1)}), "Wan 2.2 Animate"),
            (lambda s: s.update({"audio_injector.x": torch.zeros(1)}), "Wan 2.2 S2V"),
            (lambda s: s.update({"control_adapter.conv.weight": torch.zeros(1)}), "Wan Fun Camera"),
            (lambda s: s.update({"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}), "takes 36 latent channels"),
            (lambda s: s.update({"patch_embedding.weight": torch.zeros(3072, 48, 1, 2, 2)}), "Wan 2.2 TI2V-5B"),
            (lambda s: {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, "is a LoRA"),
            (lambda s: {"model.diffusion_model.out.0.weight": torch.zeros(1), "first_stage_model.x": torch.zeros(1)},
             "is a Stable Diffusion"),
            (lambda s: {"encoder.conv1.weight": torch.zeros(1), "decoder.x": torch.zeros(1)}, "is a VAE"),
            (lambda s: {"something.weight": torch.zeros(1)}, "it has no patch_embedding.weight"),
        ],
    )  # fmt: skip
    def test_another_network_by_its_name(self, tmp_path, change, named):
        message = refused(tmp_path, self.write(tmp_path, change))
        assert named in message
        assert "T2V-1.3B" in message

    @pytest.mark.parametrize(
        "name", ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "Wan2_2-T2V-A14B-LOW_noise.safetensors"]
    )
    def test_half_of_wan_2_2_by_its_name(self, tmp_path, parts, name):
        """Its weights are named and shaped as those of Wan 2.1."""
        save_file(original_transformer(parts[0]), tmp_path / name)
        assert "is one of the two transformers of Wan 2.2" in refused(tmp_path, tmp_path / name)

    def test_wan_2_2_has_two_transformers(self, tmp_path):
        folder = write_diffusers_folder(tmp_path / "base", transformer_2=["diffusers", "WanTransformer3DModel"])
        assert "is Wan 2.2, which has two transformers" in refused(tmp_path, folder)

    def test_every_key_that_differs(self, tmp_path, diffusers_folder):
        def change(state):
            del state["blocks.1.cross_attn.norm_q.weight"]
            state["blocks.0.extra.weight"] = torch.zeros(3)
            state["blocks.0.ffn.2.bias"] = torch.zeros(7)

        message = refused(tmp_path, self.write(tmp_path, change))
        assert "3 keys differ" in message
        assert "missing: blocks.1.attn2.norm_q.weight (128,)" in message
        assert "unexpected: blocks.0.extra.weight (3,)" in message
        assert "wrong shape: blocks.0.ffn.net.2.bias is (7,), expected (128,)" in message

    def test_of_many_keys_at_most_eight_lines(self, tmp_path):
        def change(state):
            state |= {f"blocks.0.extra.{i}": torch.zeros(1) for i in range(40)}

        message = refused(tmp_path, self.write(tmp_path, change))
        lines = [line for line in message.splitlines() if line.startswith("  ")]
        assert "40 keys differ" in message
        assert 2 <= len(lines) <= 8
        assert lines[-1] == f"  … and {41 - len(lines)} more"

    def test_a_weight_that_is_missing_from_the_start(self, tmp_path):
        message = refused(tmp_path, self.write(tmp_path, lambda s: s.__delitem__("text_embedding.0.weight")))
        assert "has no condition_embedder.text_embedder.linear_1.weight" in message

    def test_a_transformer_alone_says_what_else_is_needed(self, tmp_path):
        message = refused(tmp_path, self.write(tmp_path, lambda s: None))
        assert "has no text encoder; it is the transformer alone" in message
        assert "--text-encoder" in message

    def test_a_shard_that_is_missing(self, tmp_path):
        folder = write_diffusers_folder(tmp_path / "base", shards=True)
        shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
        shard.unlink()
        message = refused(tmp_path, folder)
        assert "lacks what diffusion_pytorch_model.safetensors.index.json lists" in message
        assert shard.name in message

    @pytest.mark.parametrize("damage", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
    def test_a_damaged_file(self, tmp_path, damage):
        folder = write_diffusers_folder(tmp_path / "base")
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(damage)
        message = refused(tmp_path, folder)
        assert str(file) in message
        assert "Download it again" in message

    def test_a_vae_of_wan_2_2(self, tmp_path, diffusers_folder):
        other = AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=48, latents_mean=[0] * 48, latents_std=[1] * 48)
        other.save_pretrained(tmp_path / "vae")
        message = refused(tmp_path, diffusers_folder, vae=tmp_path / "vae")
        assert "has 48 latent channels, the transformer takes 16" in message

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("transformer", {"num_attention_heads": "x"}, "128 channels, which 'x' heads do not divide"),
            ("transformer", {"num_attention_heads": -1}, "128 channels, which -1 heads do not divide"),
            ("transformer", {"eps": None}, "has eps None"),
            ("transformer", {"eps": float("inf")}, "has eps inf"),
            ("vae", {"latents_mean": [0.0] * 4}, "latents_mean is"),
            ("vae", {"latents_std": [0.0] * 16}, "latents_std is"),
            ("vae", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16"),
            ("vae", {"attn_scales": 5}, "no network can be made of"),
            ("vae", {"dim_mult": [10**9] * 4}, "does not describe a network"),
        ],
    )
    def test_k5_values_of_a_configuration_that_wan_has_not(self, tmp_path, part, change, message):
        folder = write_diffusers_folder(tmp_path / "base")
        config = folder / part / "config.json"
        config.write_text(json.dumps((json.loads(config.read_text()) if config.exists() else {}) | change))
        assert message in refused(tmp_path, folder)

    @pytest.mark.parametrize(
        ("part", "name", "tensor", "message"),
        [
            ("transformer", "proj_out.weight", torch.tensor(1.0), "is no transformer of Wan: its weights have other"),
            ("transformer", "patch_embedding.weight", torch.zeros(128, 16, 0, 2, 2), "is not a transformer of Wan"),
            ("transformer", "blocks.999999999.attn1.to_q.weight", torch.ones(1), "num_layers is 1000000000"),
            ("text_encoder", "encoder.block.999999999.layer.0.x", torch.ones(1), "num_layers is 1000000000"),
            ("text_encoder", "shared.weight", torch.ones(3), "is not the text encoder UMT5"),
            ("vae", "post_quant_conv.weight", torch.tensor(1.0), "is not the VAE of Wan"),
        ],
    )
    def test_k5_weights_of_other_shapes(self, tmp_path, part, name, tensor, message):
        folder = write_diffusers_folder(tmp_path / "base")
        file = next((folder / part).glob("*.safetensors"))
        save_file(load_file(file) | {name: tensor}, file)
        assert message in refused(tmp_path, folder)

    @pytest.mark.parametrize("second", [None, [], [None, None]])
    def test_k5_an_index_without_a_second_transformer(self, tmp_path, second):
        folder = write_diffusers_folder(tmp_path / "base")
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"transformer_2": second}))
        assert import_weights(tmp_path / "out", base=folder).folder == tmp_path / "out"

    def test_a_text_encoder_that_is_none(self, tmp_path, diffusers_folder):
        message = refused(tmp_path, diffusers_folder, text_encoder=diffusers_folder / "vae")
        assert "is not the text encoder UMT5" in message

    def test_a_tokenizer_that_knows_more_than_the_encoder(self, tmp_path, diffusers_folder):
        folder = tmp_path / "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(diffusers_folder / "tokenizer")
        tokenizer.add_tokens([f"word{i}" for i in range(9)])
        tokenizer.save_pretrained(folder)
        assert "tokens, the text encoder knows" in refused(tmp_path, diffusers_folder, tokenizer=folder)

    def test_a_base_that_is_not_there(self, tmp_path):
        assert "does not exist" in refused(tmp_path, tmp_path / "nothing.safetensors")

    def test_a_dtype(self, tmp_path, diffusers_folder):
        assert "Allowed: bf16, fp16, fp32" in refused(tmp_path, diffusers_folder, dtype="fp8")


class TestAdapter:
    @torch.no_grad()
    def test_without_one_it_starts_untrained(self, tmp_path, diffusers_folder):
        """A reference that is the clip itself changes nothing where all of its frames are seen."""
        import_weights(tmp_path / "model", base=diffusers_folder, dtype="fp32", reference_neighbours=None)
        model = WanMotionTransferTransformer.from_pretrained(tmp_path / "model" / "unet")
        sample, timestep, text = inputs(channels=16)
        text = torch.nn.functional.pad(text, (0, 20))
        motion = model.encode_reference(sample, timestep, text)
        torch.testing.assert_close(model(sample, timestep, text, motion), model(sample, timestep, text))
        opened = find_model(str(tmp_path / "model"), download=False)
        assert not opened.has_adapter  # so that clips are made by guidance, and --method adapter is refused
        assert opened.defaults["method"] == "guidance"

    def test_one_to_be_trained_sees_neighbouring_frames_in_the_middle_third_of_the_blocks(
        self, tmp_path, diffusers_folder
    ):
        import_weights(tmp_path / "model", base=diffusers_folder, dtype="fp32")
        model = WanMotionTransferTransformer.from_pretrained(tmp_path / "model" / "unet")
        assert model.reference_layers() == ["blocks.1"]  # of two
        assert model.config.reference_neighbours == 1

    @pytest.mark.parametrize("as_folder", [False, True])
    def test_a_trained_one_is_taken_with_its_options(self, tmp_path, diffusers_folder, as_folder):
        sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2}
        trained = small_transformer(reference_blocks=[1], reference_neighbours=1, adapter_rank=3, **sizes)
        if as_folder:
            trained.save_pretrained(tmp_path / "run" / "unet")
            given = tmp_path / "run"
        else:
            given = tmp_path / "adapter.safetensors"
            save_adapter(trained, given)
        import_weights(tmp_path / "model", base=diffusers_folder, adapter=given, dtype="fp32")
        model = WanMotionTransferTransformer.from_pretrained(tmp_path / "model" / "unet")
        assert model.config.reference_blocks == [1]
        assert model.config.reference_neighbours == 1
        own = dict(model.adapter_parameters())
        for name, p in trained.adapter_parameters():
            assert torch.equal(own.pop(name), p)
        assert not own
        assert find_model(str(tmp_path / "model"), download=False).has_adapter

    def test_of_another_width_it_does_not_fit(self, tmp_path, diffusers_folder):
        save_adapter(small_transformer(reference_blocks=[1]), tmp_path / "adapter.safetensors")
        message = refused(tmp_path, diffusers_folder, adapter=tmp_path / "adapter.safetensors")
        assert "wrong shape: blocks.1.adapter.key.down.weight is (4, 32), expected (4, 128)" in message

    def test_a_file_without_one(self, tmp_path, diffusers_folder):
        given = diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors"
        assert "has no adapter of Wan" in refused(tmp_path, diffusers_folder, adapter=given)

    @pytest.mark.parametrize("text", ["{", "[]", '{"reference_neighbours": "x"}', "[" * 100_000])
    def test_k5_metadata_that_emt_train_does_not_write(self, tmp_path, diffusers_folder, text):
        given = tmp_path / "a.safetensors"
        names = ("blocks.0.adapter.query.down.weight", "blocks.0.adapter.scaler.own.weight")
        save_file({name: torch.ones(2, 2) for name in names}, given, {"emt_adapter": text})
        assert str(given) in refused(tmp_path, diffusers_folder, adapter=given)

    @torch.no_grad()
    def test_saved_and_read_it_moves_a_clip_as_before(self, tmp_path):
        model = small_transformer(reference_neighbours=0)
        save_adapter(model, tmp_path / "a.safetensors")
        trained = read_adapter(tmp_path / "a.safetensors")
        other = small_transformer(seed=0, **trained.options)
        other.initialize_adapter()
        other.load_state_dict(trained.state, strict=False)
        sample, timestep, text = inputs()
        assert torch.equal(*(m(sample, timestep, text, motion_of(m)) for m in (model, other)))


def test_names_are_those_that_diffusers_gives(parts):
    """The conversion to diffusers' names is its own one, for every weight of transformer and VAE."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    from emt.backbones.wan21.names import original_module, transformer_module, transformer_name, vae_names

    transformer, vae, _ = parts
    names = list(original_transformer(transformer))
    expected = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert {transformer_name(name): name for name in names} == expected
    modules = {re.sub(r"\.(weight|bias)$", "", name) for name in names}
    assert {original_module(transformer_module(name)) for name in modules} == modules
    names = list(original_vae(vae))
    assert {new: name for name, new in vae_names(names).items()} == convert_wan_vae_to_diffusers({n: n for n in names})


class TestCommand:
    """`emt import-weights --base` tells Wan from Stable Diffusion by itself."""

    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_it_makes_a_folder_that_opens(self, tmp_path, layout):
        write = {"diffusers": write_diffusers_folder, "original": write_original_folder}[layout]
        base = write(tmp_path / "base")
        done = console(tmp_path, "import-weights", "--base", base, "-o", tmp_path / "model")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "model")
        pipe = load_pipeline(tmp_path / "model")
        assert pipe.config.frames == 81
        motion = pipe.extract_motion(np.zeros((5, 16, 16, 3), np.uint8))
        assert pipe.generate("a cat", motion, steps=1)[0].shape == (5, 16, 16, 3)
        assert {t.dtype for t in stored(tmp_path / "model" / "text_encoder").values()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--motion-module", "mm.ckpt"], "--motion-module: not of Wan"),
            (["--prediction-type", "epsilon", "--dreambooth", "x"], "--dreambooth, --prediction-type: not of Wan"),
            (["--reference-blocks", "1-x"], "--reference-blocks has '1-x'"),
            (["--reference-blocks", "0,3-2"], "--reference-blocks has '3-2'"),
            (["--reference-neighbours", "1", "--adapter", "a"], "those of the adapter are in its file"),
        ],
    )
    def test_options_of_stable_diffusion_are_refused(self, tmp_path, diffusers_folder, options, message):
        done = console(tmp_path, "import-weights", "--base", diffusers_folder, "-o", tmp_path / "m", *options)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())

    @pytest.mark.parametrize(
        "options", [["--text-encoder", "t"], ["--reference-blocks", "1"], ["--reference-neighbours", "0"]]
    )
    def test_options_of_wan_are_refused_for_stable_diffusion(self, tmp_path, options):
        base = ["--base", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--motion-module", "mm.ckpt"]
        done = console(tmp_path, "import-weights", *base, "-o", tmp_path / "m", *options)
        assert done.returncode == 2
        assert f"{options[0]}: the base is no Wan" in " ".join(done.stderr.split())

    def test_an_adapter_to_be_trained_has_the_blocks_and_frames_that_were_chosen(self, tmp_path, diffusers_folder):
        options = ["--reference-blocks", "1", "--reference-neighbours", "0"]
        done = console(tmp_path, "import-weights", "--base", diffusers_folder, "-o", tmp_path / "model", *options)
        assert done.returncode == 0, done.stderr
        network = load_pipeline(tmp_path / "model").unet
        assert network.reference_layers() == ["blocks.1"]
        assert network.config.reference_neighbours == 0
        done = console(
            tmp_path, "import-weights", "--base", diffusers_folder, "-o", tmp_path / "m", *options[:1], "0-9"
        )
        assert done.returncode == 1
        assert "reference_blocks has 9" in done.stderr
        assert "has blocks 0 to 1." in " ".join(done.stderr.split())

    def test_another_network_of_the_family_is_named(self, tmp_path):
        base = write_diffusers_folder(tmp_path / "base", _class_name="WanVACEPipeline")
        file = base / "transformer" / "diffusion_pytorch_model.safetensors"
        state = load_file(file) | {"vace_blocks.0.proj_out.bias": torch.zeros(1)}
        save_file(state, file, {"format": "pt"})
        done = console(tmp_path, "import-weights", "--base", base, "-o", tmp_path / "m")
        assert done.returncode == 1
        assert "is Wan 2.1 VACE, which is not supported" in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


class TestRecognition:
    def test_wan_by_its_name_files_or_weights(self, tmp_path, diffusers_folder):
        for base in (
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "hf://Wan-AI/Wan2.1-I2V-14B-480P/diffusion_pytorch_model-00001-of-00007.safetensors",
            diffusers_folder,
            write_original_folder(tmp_path / "original"),
            tmp_path / "original" / "diffusion_pytorch_model.safetensors",
            diffusers_folder / "transformer",
        ):
            assert recognizes(base), base

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("name", ["wan.pth", "wan.ckpt", "wan.safetensors"])
    def test_k1_wan_in_files_of_torch_save(self, tmp_path, name, zipped):
        state = {"generator_ema": {"model.blocks.0.self_attn.q.weight": torch.ones(2, 2)}}
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert recognizes(tmp_path / name)
        torch.save({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, tmp_path / name)
        assert not recognizes(tmp_path / name)

    def test_all_else_is_left_to_stable_diffusion(self, tmp_path, diffusers_folder):
        (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
        for base in (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "hf://owner/name/file.ckpt",
            tmp_path,
            tmp_path / "damaged.safetensors",
            diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors",
        ):
            assert not recognizes(base), base
