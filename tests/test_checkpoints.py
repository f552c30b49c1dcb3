"""Files that people have: what is read of them, what is left, what is refused, and by which words."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file
from weight_files import (
    TEXT_WIDTH,
    VAE_SIZES,
    WIDTHS,
    Files,
    Payload,
    assert_same_weights,
    diffusers_folder,
    ldm_file,
    ldm_text_encoder,
    ldm_unet,
    ldm_vae,
    motion_adapter,
    own_names,
    positions,
)

from emt import EmtError
from emt.backbones.sd15.few_steps import find_few_steps
from emt.backbones.sd15.motion_checkpoint import read_motion_module
from emt.backbones.sd15.random_model import byte_tokenizer, random_model
from emt.backbones.sd15.stable_diffusion import StableDiffusion, apply_dreambooth, read_base, read_vae
from emt.checkpoints import (
    check_keys,
    check_sizes,
    check_varied,
    read_checkpoint,
    read_config,
    read_weights,
    shorten,
    without_memory,
)
from emt.features import Motion, MotionFeatures
from emt.lora_files import peft_scale
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline, open_model

DEEP = "[" * 100_000


def lines(error: pytest.ExceptionInfo[EmtError]) -> int:
    return len(str(error.value).splitlines())


# ---------------------------------------------------------------------------------- single files in the original layout

EXTRAS = {
    # Shapes do not matter: nothing reads these.
    "CLIP's scale": "cond_stage_model.logit_scale",
    "CLIP's projection": "cond_stage_model.text_projection.weight",
    "CLIP's projection, transformers": "cond_stage_model.transformer.text_projection.weight",
    "CLIP's vision": "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    "textual inversion": "embedding_manager.embedder.transformer.text_model.embeddings.position_embedding.weight",
    "averaged weights": "model_ema.diffusion_modelinput_blocks00weight",
    "schedule": "alphas_cumprod_prev",
    "the VAE's loss": "first_stage_model.loss.discriminator.main.0.weight",
    "the VAE's averaged weights": "first_stage_model.model_ema.decay",
    "a ControlNet": "control_model.zero_convs.0.0.weight",
    "another text encoder": "cond_stage_model.clip_h.transformer.text_model.final_layer_norm.bias",
    "zero terminal noise": "ztsnr",
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_k1_what_nothing_reads_is_left_and_listed(extra: str, files: Files, tmp_path: Path) -> None:
    key = EXTRAS[extra]
    save_file(ldm_file(files.base) | {key: torch.ones(3)}, tmp_path / "merged.safetensors")
    model = read_base(tmp_path / "merged.safetensors")
    assert model.dropped == [key]
    assert_same_weights(model.unet.state, files.base.unet)
    assert_same_weights(model.vae.state, files.base.vae)
    assert_same_weights(model.text_encoder.state, files.base.text_encoder)


def test_k1_the_card_lists_what_was_left(files: Files, tmp_path: Path) -> None:
    extras = {key: torch.ones(2) for key in EXTRAS.values()} | {f"model_ema.{i}": torch.ones(1) for i in range(50)}
    save_file(ldm_file(files.base) | extras, tmp_path / "merged.safetensors")
    motion = tmp_path / "mm.safetensors"
    save_file(files.motion | {"img_encoder.weight": torch.ones(2)}, motion)
    model = files.run(tmp_path / "m", base=tmp_path / "merged.safetensors", motion_module=motion)
    assert_same_weights(model.weights, files.weights())
    assert "`model_ema.*` (51)" in model.card
    for key in {*EXTRAS.values()} - {"model_ema.diffusion_modelinput_blocks00weight"}:
        assert f"`{key}`" in model.card
    assert "not read, as nothing here uses it: `img_encoder.weight`" in model.card


@pytest.mark.parametrize("both", [False, True])
def test_k1_the_older_names_of_the_text_encoder(both: bool, files: Files, tmp_path: Path) -> None:
    """Some merges have both: the present ones count."""
    text = ldm_text_encoder(files.base.text_encoder)
    old = {k.replace(".text_model.", "."): v + 1 if both else v for k, v in text.items()}
    save_file(ldm_unet(files.base.unet) | ldm_vae(files.base.vae) | old | (text if both else {}), tmp_path / "nai.ckpt")
    model = read_base(tmp_path / "nai.ckpt")
    assert_same_weights(model.text_encoder.state, files.base.text_encoder)
    assert len(model.dropped) == (len(old) if both else 0)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_k1_a_unet_alone_by_any_prefix(prefix: str, files: Files, tmp_path: Path) -> None:
    own = {k.removeprefix("model."): v for k, v in ldm_unet(files.other.unet).items()}
    save_file({prefix + k.removeprefix("diffusion_model."): v for k, v in own.items()}, tmp_path / "u.safetensors")
    model = read_base(files.sd)
    origin = apply_dreambooth(model, tmp_path / "u.safetensors")
    assert_same_weights(model.unet.state, files.other.unet)
    assert origin.note == "UNet replace the base's; it has no VAE or text encoder"


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("first_stage_model.quant_conv.bias", "quant_conv.bias"),
        ("first_stage_model.decoder.up.0.block.0.norm1.bias", "decoder.up_blocks.3.resnets.0.norm1.bias"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.layer_norm1.weight", "encoder.layers.1.layer_norm1"),
        (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.bias",
            "attentions.0.transformer_blocks.0.",
        ),
    ],
)
def test_k1_what_is_missing_stays_an_error(key: str, shown: str, files: Files, tmp_path: Path) -> None:
    state = ldm_file(files.base) | {"cond_stage_model.logit_scale": torch.ones(1)}
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "odd.safetensors")
    with pytest.raises(EmtError, match=rf"odd\.safetensors(.|\n)*missing: .*{shown}"):
        files.run(tmp_path / "m", base=tmp_path / "odd.safetensors")


# ----------------------------------------------------------------------------------------- pickles of training programs


def write_with_fakes(path: Path, content: Any, fakes: dict[str, str]) -> None:
    """Save what names classes of packages that are not installed: module → class; each dictionary class is a dict."""
    import types

    made = []
    for module, name in fakes.items():
        for i in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:i])
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                made.append(parent)
        base = (dict,) if name == "AttributeDict" else ()
        setattr(sys.modules[module], name, type(name, base, {"__module__": module}))
    try:
        torch.save(content({name: getattr(sys.modules[module], name) for module, name in fakes.items()}), path)
    finally:
        for parent in made:
            del sys.modules[parent]


CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint"
LIGHTNING: dict[str, tuple[dict[str, str], Any]] = {
    # packages and their classes → what is beside the state dict
    "Lightning's callback": (
        {CHECKPOINT: "ModelCheckpoint"},
        lambda c: {"callbacks": {c["ModelCheckpoint"]: {"a": 1}}},
    ),
    "Lightning 2's callback": (
        {"lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint"},
        lambda c: {"callbacks": {c["ModelCheckpoint"]: {}}},
    ),
    "its settings": (
        {"pytorch_lightning.utilities.parsing": "AttributeDict"},
        lambda c: {"hyper_parameters": c["AttributeDict"](lr=1e-4)},
    ),
    "a callback as an object": ({CHECKPOINT: "ModelCheckpoint"}, lambda c: {"callbacks": [c["ModelCheckpoint"]()]}),
    "a numpy number": ({}, lambda c: {"best": np.float64(0.1)}),
    "numpy numbers of other types": ({}, lambda c: {"best": [np.float32(0.1), np.int64(3), np.bool_(True)]}),
    "a numpy array": ({}, lambda c: {"losses": np.ones(3)}),
    "a numpy type": ({}, lambda c: {"dtype": np.dtype("float64"), "kind": type(np.dtype("float64"))}),
}


@pytest.mark.parametrize("kind", LIGHTNING)
@pytest.mark.parametrize("zipped", [True, False])
def test_k1_what_training_leaves_beside_the_tensors(kind: str, zipped: bool, tmp_path: Path) -> None:
    fakes, beside = LIGHTNING[kind]
    state = {"model.diffusion_model.out.2.bias": torch.arange(4.0)}
    path = tmp_path / "sd-v1-4.ckpt"
    write_with_fakes(path, lambda c: {"epoch": 0, "state_dict": state} | beside(c), fakes)
    if not zipped:
        content = torch.load(path, weights_only=True) if not fakes and kind == "nothing" else None
        assert content is None
        write_with_fakes(path, lambda c: {"state_dict": state} | beside(c), fakes)
    assert torch.equal(read_checkpoint(path).state["model.diffusion_model.out.2.bias"], torch.arange(4.0))


def test_k1_no_class_that_a_pickle_names_is_imported(tmp_path: Path) -> None:
    """Not even one that stands in: a package of that name on the path must not be used."""
    path = tmp_path / "sd.ckpt"
    write_with_fakes(
        path,
        lambda c: {"state_dict": {"a": torch.ones(2)}, "callbacks": {c["ModelCheckpoint"]: 1}},
        {CHECKPOINT: "ModelCheckpoint"},
    )
    package = tmp_path / "site" / "pytorch_lightning"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    code = f"from pathlib import Path; from emt.checkpoints import read_checkpoint as r; r(Path({str(path)!r}))"
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=300)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_k6_what_could_run_code_stays_refused_beside_harmless_classes(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "created"
    content = {"state_dict": {"a": torch.ones(2)}, "best": np.float64(1), "callbacks": Payload(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(EmtError, match=r"evil\.ckpt is unsafe and was refused.*system"):
        read_checkpoint(path)
    assert not target.exists()


def test_k1_a_unet_alone_by_diffusers_names(files: Files, tmp_path: Path) -> None:
    save_file(files.other.unet, tmp_path / "unet.safetensors")
    model = files.run(tmp_path / "m", dreambooth=tmp_path / "unet.safetensors")
    assert_same_weights(model.weights, files.weights(unet=files.other.unet))
    assert "UNet replace the base's; it has no VAE or text encoder" in model.card


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"a.b": torch.ones(2)}, "epoch": 3},
        {"state_dict": {"state_dict": {"a.b": torch.ones(2)}}},
        {"a.b": torch.ones(2), "epoch": 3, "note": "x", 7: None},
        {"module._orig_mod.a.b": torch.ones(2)},
        {"_forward_module.module.a._fsdp_wrapped_module.b": torch.ones(2)},
        {"a._orig_mod._checkpoint_wrapped_module.b": torch.ones(2)},
        {"model": {"a.b": torch.ones(2)}, "model_ema": {"a.b": torch.zeros(2)}, "optimizer": {"m": torch.ones(2)}},
        {"params": {"a.b": torch.ones(2)}, "params_ema": {"a.b": torch.zeros(2)}},
        {"module": {"a.b": torch.ones(2)}, "lr_scheduler": {"last": torch.ones(2)}, "param_shapes": [{}]},
    ],
)
def test_k1_tensors_are_found_within_what_was_saved(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    assert checkpoint.state.keys() == {"a.b"}
    assert checkpoint.state["a.b"].tolist() == [1, 1]
    beside = {str(name) for name in content} - {"a.b", "model", "params", "module", "state_dict"}
    assert set(checkpoint.dropped) >= {name for name in beside if "module" not in name and "_mod" not in name}


def test_k2_of_several_sets_of_tensors_none_is_guessed(tmp_path: Path) -> None:
    torch.save({"unet": {"a": torch.ones(2)}, "text_encoder": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(EmtError, match="holds several sets of tensors: unet, text_encoder"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested"])
@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_k5_tensors_without_plain_values_are_refused(kind: str, tmp_path: Path) -> None:
    tensors = {
        "sparse": lambda: torch.ones(2, 2).to_sparse(),
        "meta": lambda: torch.ones(2, 2, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    torch.save({"a": torch.ones(2), "b.weight": tensors[kind]()}, tmp_path / "x.ckpt")
    with pytest.raises(EmtError, match=r"sparse, nested or without values: b\.weight"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("TorchScript", "is a program of TorchScript"),
        ("numpy", "is an archive of arrays of numpy"),
        ("zip", "is a zip archive of model.safetensors, notes.txt, not one of torch.save"),
        ("HDF5", "is an HDF5 file"),
        ("gzip", "is a gzip archive"),
        ("PNG", "is a PNG picture, which is neither safetensors nor"),
        ("MP4", "is an MP4 or QuickTime video"),
        ("PDF", "is a PDF"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_k7_a_file_of_another_format_is_named(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    if kind == "TorchScript":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
                archive.writestr(f"x/{name}", b"")
    elif kind == "numpy":
        with path.open("wb") as file:
            np.savez(file, weight=np.ones(3))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.safetensors", b"")
            archive.writestr("notes.txt", b"")
    else:
        start = {
            "HDF5": b"\x89HDF\r\n\x1a\n",
            "gzip": b"\x1f\x8b\x08",
            "PNG": b"\x89PNG\r\n\x1a\n",
            "PDF": b"%PDF-1.7\n",
        }
        path.write_bytes((start | {"MP4": b"\0\0\0\x20ftypisom"})[kind] + bytes(100))
    with pytest.raises(EmtError, match=message):
        read_checkpoint(path)


def test_k5_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(EmtError, match="holds what is no tensor"):
        read_checkpoint(tmp_path / "x.ckpt")


# ----------------------------------------------------------------------------------------------------- prediction types


def stored_type(model: StableDiffusion) -> str:
    return model.prediction_type


def test_k1_a_marker_says_v_prediction(files: Files, tmp_path: Path) -> None:
    save_file(ldm_file(files.base) | {"v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    model = read_base(tmp_path / "v.safetensors")
    assert (model.prediction_type, model.prediction_sign) == ("v_prediction", "its key v_pred")
    assert model.dropped == []


@pytest.mark.parametrize(("stated", "expected"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("other", "epsilon")])
def test_k1_metadata_says_v_prediction(stated: str, expected: str, files: Files, tmp_path: Path) -> None:
    save_file(ldm_file(files.base), tmp_path / "v.safetensors", {"modelspec.prediction_type": stated})
    assert read_base(tmp_path / "v.safetensors").prediction_type == expected


@pytest.mark.parametrize("marked", [False, True])
def test_k1_the_prediction_type_is_of_the_file_that_gives_the_unet(
    marked: bool,
    files: Files,
    tmp_path: Path,
) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    save_file(
        ldm_unet(files.other.unet) | ({"v_pred": torch.ones(1)} if marked else {}), tmp_path / "style.safetensors"
    )
    model = read_base(base)
    assert model.prediction_type == "v_prediction"
    apply_dreambooth(model, tmp_path / "style.safetensors")
    assert model.prediction_type == ("v_prediction" if marked else "epsilon")


def test_k1_the_user_has_the_last_word_on_the_prediction_type(files: Files, tmp_path: Path) -> None:
    model = files.run(tmp_path / "m", prediction_type="v_prediction")
    config = json.loads((model.folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    assert "predicts v_prediction (as the user said)" in model.card
    with pytest.raises(EmtError, match="there is no prediction type 'flow'"):
        files.run(tmp_path / "n", prediction_type="flow")


@pytest.mark.parametrize("value", ["sample", None, 3, ["epsilon"]])
def test_k2_a_prediction_type_that_no_sampler_knows(value: Any, files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": value}))
    with pytest.raises(EmtError, match=r"scheduler_config\.json has the prediction_type"):
        read_base(base)


# ---------------------------------------------------------------------------------------------------- motion modules


def write_motion(kind: str, files: Files, folder: Path) -> Path:
    """A motion module in one of the containers that people have."""
    motion, path = files.motion, folder / "mm.safetensors"
    if kind == "a prefix of training":
        save_file({f"module.unet.{k}": v for k, v in motion.items()}, path)
    elif kind == "a whole network":
        save_file({f"unet.{k}": v for k, v in (files.base.unet | motion).items()}, path)
    elif kind == "merged into a single file":
        save_file(ldm_file(files.base) | {f"model.diffusion_model.{k}": v for k, v in motion.items()}, path)
    elif kind == "averaged weights beside":
        ema = {f"ema.{k}": v + 1 for k, v in motion.items()}
        save_file({f"model.{k}": v for k, v in motion.items()} | ema, path)
    elif kind == "a Lightning checkpoint":
        path = folder / "mm.ckpt"
        state = {f"module.{k}": v for k, v in motion.items()}
        torch.save({"epoch": 1, "state_dict": state, "best": np.float64(0.5)}, path)
    elif kind == "AnimateLCM, an image encoder beside":
        save_file(motion | {"img_encoder.conv.weight": torch.ones(3)}, path)
    elif kind == "PIA, another first convolution beside":
        save_file(motion | {"conv_in.weight": torch.ones(32, 9, 3, 3), "conv_in.bias": torch.ones(32)}, path)
    elif kind == "half precision of 8 bits":
        save_file({k: v.to(torch.float8_e4m3fn) for k, v in (motion | positions(motion, 32)).items()}, path)
    elif kind == "a pipeline's folder":
        motion_adapter(motion, mid=False).save_pretrained(folder / "pipe" / "motion_adapter")
        path = folder / "pipe"
    elif kind == "diffusers' network with motion":
        unet = UNet2DConditionModel(block_out_channels=WIDTHS, cross_attention_dim=TEXT_WIDTH, attention_head_dim=4)
        unet.load_state_dict(files.base.unet)
        UNetMotionModel.from_unet2d(unet, motion_adapter(motion, mid=False)).save_pretrained(folder / "pipe" / "unet")
        path = folder / "pipe"
    elif kind == "a model folder of this program":
        path = files.run(folder / "model").folder
    elif kind == "a network of this program that denoises with layers of its own":
        own = {f"denoising.{k}": v + 1 for k, v in motion.items()}
        save_file(own | files.base.unet | motion | own_names(files.adapter), path)
    elif kind == "names of wrappers inside":
        save_file(
            {k.replace(".transformer_blocks.0.", ".transformer_blocks.0._orig_mod."): motion[k] for k in motion}, path
        )
    elif kind == "a folder, split over several files":
        path = folder / "adapter"
        motion_adapter(motion, mid=False).save_pretrained(path, max_shard_size="200KB")
        assert len(list(path.glob("*.safetensors"))) > 2
    elif kind == "a folder with one checkpoint":
        path = folder / "one"
        path.mkdir()
        torch.save(motion, path / "v3_sd15_mm.ckpt")
    return path


MOTION_KINDS = [
    "a prefix of training",
    "a whole network",
    "merged into a single file",
    "averaged weights beside",
    "a Lightning checkpoint",
    "AnimateLCM, an image encoder beside",
    "PIA, another first convolution beside",
    "half precision of 8 bits",
    "a pipeline's folder",
    "diffusers' network with motion",
    "a model folder of this program",
    "a network of this program that denoises with layers of its own",
    "names of wrappers inside",
    "a folder, split over several files",
    "a folder with one checkpoint",
]


@pytest.mark.parametrize("kind", MOTION_KINDS)
def test_k1_a_motion_module_is_taken_out_of_whatever_holds_one(
    kind: str,
    files: Files,
    tmp_path: Path,
) -> None:
    part, origin = read_motion_module(write_motion(kind, files, tmp_path))
    expected = files.motion
    if kind == "half precision of 8 bits":
        expected = {k: v.to(torch.float8_e4m3fn) for k, v in expected.items()}
        part.state = {k: v.float() for k, v in part.state.items()}
        expected = {k: v.float() for k, v in expected.items()}
        assert "stored as float8_e4m3fn" in origin.note
    assert_same_weights(part.state, expected)
    assert part.config == {"motion_mid_block": False, "motion_max_frames": 32, "motion_attention_heads": 8}
    if kind in ("averaged weights beside", "AnimateLCM, an image encoder beside"):
        assert origin.dropped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_k7_position_encodings_are_compared_in_the_precision_that_they_are_stored_in(
    dtype: torch.dtype,
    files: Files,
    tmp_path: Path,
) -> None:
    good = {k: v.to(dtype) for k, v in (files.motion | positions(files.motion, 24)).items()}
    save_file(good, tmp_path / "mm.safetensors")
    assert read_motion_module(tmp_path / "mm.safetensors")[0].config["motion_max_frames"] == 24
    bad = {k: v.roll(1, 1) if k.endswith(".pe") else v for k, v in good.items()}
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(EmtError, match="is not the sinusoidal position encoding"):
        read_motion_module(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda k: k.replace("motion_modules.", "temporal_attentions."),
            "is HotshotXL, a motion module of Stable Diff",
        ),
        (lambda k: k.replace(".", "_"), "names the layers of a motion module in another way: down_blocks_0_motion"),
        (
            lambda k: k.replace("_blocks.", "_stages."),
            "names the layers of a motion module in another way: down_stages",
        ),
    ],
)
def test_k7_a_motion_module_by_other_names_is_reported_in_a_few_lines(
    rename: Any,
    message: str,
    files: Files,
    tmp_path: Path,
) -> None:
    save_file({rename(k): v for k, v in files.motion.items()}, tmp_path / "mm.safetensors")
    with pytest.raises(EmtError, match=message) as caught:
        files.run(tmp_path / "m", motion_module=tmp_path / "mm.safetensors")
    assert lines(caught) <= 8


def test_k7_a_motion_module_of_sdxl_is_reported_in_a_few_lines(files: Files, tmp_path: Path) -> None:
    three = {k: v for k, v in files.motion.items() if not k.startswith(("down_blocks.3", "up_blocks.3"))}
    torch.save({"state_dict": three | positions(three, 32)}, tmp_path / "mm_sdxl_v10_beta.ckpt")
    with pytest.raises(EmtError, match="it looks like one of Stable Diffusion XL") as caught:
        files.run(tmp_path / "m", motion_module=tmp_path / "mm_sdxl_v10_beta.ckpt")
    assert lines(caught) <= 8


def test_a_motion_module_is_not_taken_of_an_adapters_network(files: Files, tmp_path: Path) -> None:
    """By the published names its projections have replaced the backbone's; by the program's own they are beside."""
    save_file(files.base.unet | files.motion | files.adapter, tmp_path / "whole.safetensors")
    with pytest.raises(EmtError, match="is an adapter, not a motion module"):
        read_motion_module(tmp_path / "whole.safetensors")
    save_file(files.base.unet | files.motion | own_names(files.adapter), tmp_path / "own.safetensors")
    assert_same_weights(read_motion_module(tmp_path / "own.safetensors")[0].state, files.motion)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (32, 0)])
def test_k5_a_position_encoding_of_another_shape(
    shape: tuple[int, ...],
    files: Files,
    tmp_path: Path,
) -> None:
    odd = {k: torch.zeros(shape) for k in positions(files.motion, 2)}
    save_file(files.motion | odd, tmp_path / "mm.safetensors")
    with pytest.raises(EmtError, match=r"mm\.safetensors"):
        read_motion_module(tmp_path / "mm.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_k1_a_suffix_that_says_something_else(zipped: bool, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "mm.safetensors"
    torch.save(files.motion, path, _use_new_zipfile_serialization=zipped)
    assert_same_weights(read_motion_module(path)[0].state, files.motion)


def test_k1_a_configuration_that_begins_with_a_mark(files: Files, tmp_path: Path) -> None:
    motion_adapter(files.motion, mid=False).save_pretrained(tmp_path / "mm")
    config = tmp_path / "mm" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert_same_weights(read_motion_module(tmp_path / "mm")[0].state, files.motion)


def test_k7_one_of_several_files_and_a_folder_of_several_are_told(files: Files, tmp_path: Path) -> None:
    motion_adapter(files.motion, mid=False).save_pretrained(tmp_path / "mm", max_shard_size="1MB")
    with pytest.raises(EmtError, match=r"one of \d+ files that weights are split over\nGive the folder"):
        read_motion_module(next((tmp_path / "mm").glob("*-of-*")))
    (tmp_path / "mm" / "config.json").unlink()
    for given, read in (("a", read_motion_module), ("b", read_vae), ("c", read_base)):
        (tmp_path / given).mkdir()
        for name in ("x.ckpt", "y.ckpt"):
            torch.save(files.motion, tmp_path / given / name)
        with pytest.raises(EmtError, match=r"holds 2 files of weights: x\.ckpt, y\.ckpt"):
            read(tmp_path / given)


@pytest.mark.parametrize("variant", ["fp32", "fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_k1_a_variant_is_read_where_it_is_alone(variant: str, suffix: str, tmp_path: Path) -> None:
    def write(name: str, value: float) -> Path:
        state = {"w": torch.full((2, 2), value)}
        (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
        return tmp_path / name

    alone = write(f"diffusion_pytorch_model.{variant}.{suffix}", 1)
    checkpoint, read = read_weights(tmp_path)
    assert read == [alone]
    assert checkpoint.state["w"].eq(1).all()
    plain = write(f"diffusion_pytorch_model.{suffix}", 2)
    assert read_weights(tmp_path)[1] == [plain]


def test_k2_of_two_motion_modules_in_one_file_none_is_guessed(files: Files, tmp_path: Path) -> None:
    two = {f"{name}.{k}": v.clone() for name in ("student", "teacher") for k, v in files.motion.items()}
    save_file(two, tmp_path / "mm.safetensors")
    with pytest.raises(EmtError, match=r"holds a motion module 2 times: below student\., teacher\."):
        read_motion_module(tmp_path / "mm.safetensors")


@pytest.mark.parametrize("name", ["../away.safetensors", "/etc/passwd", 7, None, "", "gone.safetensors", "x" * 300])
def test_k6_an_index_of_weights_names_files_beside_it_alone(name: Any, files: Files, tmp_path: Path) -> None:
    motion_adapter(files.motion, mid=False).save_pretrained(tmp_path / "mm", max_shard_size="1MB")
    index = tmp_path / "mm" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= {next(iter(content["weight_map"])): name}
    index.write_text(json.dumps(content))
    save_file(files.motion, tmp_path / "away.safetensors")
    with pytest.raises(EmtError, match=r"index of weights|lacks what .* lists"):
        read_motion_module(tmp_path / "mm")


# ------------------------------------------------------------------------------------------------------------------ VAE


def write_vae(kind: str, files: Files, folder: Path) -> Path:
    path, vae = folder / "vae.safetensors", files.other.vae
    if kind == "original":
        extras = {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
        save_file({k.removeprefix("first_stage_model."): v for k, v in ldm_vae(vae).items()} | extras, path)
    elif kind == "a whole model's":
        save_file(ldm_file(files.other), path)
    elif kind == "diffusers":
        save_file(vae, path)
    elif kind == "diffusers folder":
        return diffusers_folder(folder / "sd", files.other) / "vae"
    elif kind == "a prefix, and a UNet and averages beside":
        copies = {f"vae_ema.{k}": v + 1 for k, v in vae.items()}
        save_file({f"model.vae.{k}": v for k, v in vae.items()} | copies | {"unet.conv_in.bias": torch.ones(3)}, path)
    elif kind == "diffusers folder, split":
        made = AutoencoderKL(**VAE_SIZES)
        made.load_state_dict(vae)
        made.save_pretrained(folder / "vae", max_shard_size="300KB")
        assert len(list((folder / "vae").glob("*.safetensors"))) > 2
        return folder / "vae"
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "original",
        "a whole model's",
        "diffusers",
        "diffusers folder",
        "a prefix, and a UNet and averages beside",
        "diffusers folder, split",
    ],
)
def test_a_vae_alone_replaces_the_others(kind: str, files: Files, tmp_path: Path) -> None:
    part, origin = read_vae(write_vae(kind, files, tmp_path))
    assert_same_weights(part.state, files.other.vae)
    assert (origin.dropped == ["loss.logvar", "model_ema.decay"]) == (kind == "original")
    assert ("unet.conv_in.bias" in origin.dropped) == (kind == "a prefix, and a UNet and averages beside")
    if kind == "original":
        model = files.run(tmp_path / "m", vae=tmp_path / "vae.safetensors")
        stored = load_file(model.folder / "vae" / "diffusion_pytorch_model.safetensors")
        assert_same_weights(stored, files.other.vae)
        assert_same_weights(model.weights, files.weights())


def test_a_vae_must_be_one(files: Files) -> None:
    with pytest.raises(EmtError, match="is a motion module, not a VAE"):
        read_vae(files.motion_ckpt)


@pytest.mark.parametrize("kind", ["folder", "name", "metadata", "shifted", "normalised"])
def test_k2_a_vae_of_other_latents_and_the_same_shapes_is_refused(kind: str, files: Files, tmp_path: Path) -> None:
    changes = {
        "folder": {"scaling_factor": 0.13025},
        "shifted": {"shift_factor": 0.1159},
        "normalised": {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4},
    }
    path = tmp_path / "vae"
    if kind in changes:
        AutoencoderKL(**VAE_SIZES | changes[kind]).save_pretrained(path)
    elif kind == "name":
        path = tmp_path / "sdxl_vae.safetensors"
        save_file(files.other.vae, path)
    else:
        path = tmp_path / "vae.safetensors"
        save_file(files.other.vae, path, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"})
    with pytest.raises(EmtError) as caught:
        read_vae(path)
    assert ("Stable Diffusion XL" in str(caught.value)) == (kind in ("folder", "name", "metadata"))
    assert kind in ("name", "metadata") or re.search(r": \w+ is \S", " ".join(str(caught.value).split()))
    assert lines(caught) <= 8


# ------------------------------------------------------------------------------------ what is opened is what was stored


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("opened") / "m")


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def changed(model: Path, target: Path, part: str, change: Any) -> Path:
    """A copy of a model folder with the weights of one part changed."""
    shutil.copytree(model, target)
    file = target / part / WEIGHTS[part]
    save_file(change(load_file(file)), file, {"format": "pt"})
    return target


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("opener", [load_pipeline, MotionTransferPipeline.from_pretrained])
def test_k2_a_tensor_that_is_missing_or_too_many_is_named(opener: Any, part: str, model: Path, tmp_path: Path) -> None:
    first = min(load_file(model / part / WEIGHTS[part]))
    folder = changed(model, tmp_path / "less", part, lambda state: {k: v for k, v in state.items() if k != first})
    with pytest.raises(EmtError, match=rf"the {part} of the model (.|\n)*missing: {first.removeprefix('text_model.')}"):
        opener(folder)
    folder = changed(model, tmp_path / "more", part, lambda state: state | {"odd.weight": torch.ones(1)})
    with pytest.raises(EmtError, match=rf"the {part} of the model (.|\n)*unexpected: odd\.weight"):
        opener(folder)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("opener", [load_pipeline, MotionTransferPipeline.from_pretrained])
def test_k2_weights_of_one_value_throughout_are_named(opener: Any, part: str, model: Path, tmp_path: Path) -> None:
    """Where a download left a hole, all is zero: the clip would be noise."""
    first = next(name for name, x in load_file(model / part / WEIGHTS[part]).items() if min(x.shape) > 1 < x.ndim)

    def emptied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {first: torch.zeros_like(state[first])}

    own = first.removeprefix("text_model.")
    with pytest.raises(EmtError, match=rf"1 weight of the {part} of (.|\n)*{re.escape(own)} .*: all 0"):
        opener(changed(model, tmp_path / "hole", part, emptied))
    folder = changed(model, tmp_path / "zeros", part, lambda state: {k: torch.zeros_like(x) for k, x in state.items()})
    with pytest.raises(EmtError, match=r"never trained") as caught:
        opener(folder)
    assert lines(caught) <= 8


def test_k1_a_motion_module_that_changes_nothing_yet_is_opened(model: Path, tmp_path: Path) -> None:
    """AnimateDiff's training begins with zeros in its last layer."""

    def begun(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.zeros_like(x) if ".temporal_transformer.proj_out." in k else x for k, x in state.items()}

    assert open_model(changed(model, tmp_path / "m", "unet", begun)) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_k2_weights_of_one_value_are_found_in_any_dtype_and_no_others(dtype: torch.dtype) -> None:
    """Norms begin at one, and rows of zeros are words that nothing trained."""
    table = torch.cat([torch.zeros(1, 8), torch.rand(3, 8) + 1]).to(dtype)
    check_varied("part", {"norm": torch.ones(8, 1, 1).to(dtype), "table": table, "scalar": torch.ones(1, 1).to(dtype)})
    with pytest.raises(EmtError, match=r"1 weight of the part .*\n  flat \(4, 8\): all 1"):
        check_varied("part", {"table": table, "flat": torch.ones(4, 8).to(dtype)})


@pytest.mark.parametrize("part", WEIGHTS)
def test_k2_weights_by_names_that_the_library_does_not_read(part: str, model: Path, tmp_path: Path) -> None:
    """As transformers 5.0 to 5.5 does not those that later ones write: its networks would keep random weights."""
    folder = changed(model, tmp_path / "m", part, lambda state: {f"network.{k}": v for k, v in state.items()})
    with pytest.raises(EmtError, match=rf"the {part} of the model (.|\n)*missing: ") as caught:
        load_pipeline(folder)
    assert lines(caught) <= 8


@pytest.mark.parametrize("damage", ["no marks", "a gap"])
def test_k2_a_tokenizer_that_is_not_of_the_text_encoder_is_refused(damage: str, model: Path, tmp_path: Path) -> None:
    """Without the tokens around a prompt, or with numbers that have no embedding."""
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_bytes())
    if damage == "no marks":
        content["post_processor"] = None
    else:
        vocabulary = content["model"]["vocab"]
        vocabulary[next(iter(vocabulary))] = 10 * len(vocabulary)
    file.write_text(json.dumps(content))
    with pytest.raises(EmtError, match=r"cannot be opened: (what the tokenizer makes|the vocabulary)"):
        open_model(folder)


def test_k2_weights_that_were_opened_with_other_values_are_noticed(model: Path, monkeypatch: Any) -> None:
    """What a version of a library reads by the same names but leaves random."""
    from transformers import CLIPTextModel

    opened = CLIPTextModel.from_pretrained

    def other(*arguments: Any, **options: Any) -> Any:
        network = opened(*arguments, **options)
        network.get_parameter(next(n for n, _ in network.named_parameters())).data.add_(1)
        return network

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", other)
    with pytest.raises(
        EmtError, match=r"text_encoder .* was opened with other weights(.|\n)*not loaded: (.|\n)*install"
    ):
        load_pipeline(model)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("text_encoder/config.json", "hidden_size", 1e300),
        ("text_encoder/config.json", "num_hidden_layers", {}),
        ("tokenizer/tokenizer.json", "normalizer", -1),
        ("tokenizer/tokenizer.json", "version", None),
        ("model_index.json", "vae", []),
        ("model_index.json", "text_encoder", "x"),
        ("unet/config.json", "block_out_channels", "x"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
    ],
)
def test_k5_a_model_folder_with_a_damaged_configuration(
    file: str, name: str, value: Any, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((model / file).read_text())
    (tmp_path / "m" / file).write_text(json.dumps(config | {name: value}))
    with pytest.raises(EmtError, match=r"the model .* cannot be opened") as caught:
        load_pipeline(tmp_path / "m")
    assert lines(caught) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_models_are_opened_in_every_dtype(dtype: torch.dtype, model: Path) -> None:
    assert load_pipeline(model, dtype=dtype).unet.dtype == dtype


# --------------------------------------------------------------------------------- damaged, hostile, of another version


def test_k5_json_without_end_is_a_damaged_file(files: Files, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(EmtError, match=r"config\.json cannot be read"):
        read_config(tmp_path / "config.json")
    header = ('{"a": ' + DEEP).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(EmtError, match=r"odd\.safetensors is truncated or damaged"):
        read_checkpoint(tmp_path / "odd.safetensors")
    tokenizer = tmp_path / "tokenizer"
    byte_tokenizer(tokenizer).save_pretrained(tokenizer)
    odd_length = json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": [77]})
    for name, text in (
        ("tokenizer_config.json", DEEP),
        ("tokenizer.json", DEEP),
        ("tokenizer_config.json", odd_length),
    ):
        content = (tokenizer / name).read_text()
        (tokenizer / name).write_text(text)
        with pytest.raises(EmtError, match=r"the tokenizer .* cannot be loaded"):
            files.run(tmp_path / "m", tokenizer=tokenizer)
        (tokenizer / name).write_text(content)


HOSTILE = [None, "x", -1, 0, 10**12, 1e300, [], [[]], {}, ["x"], True]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_k5_values_of_a_configuration_that_no_network_has(
    part: str,
    value: Any,
    sd_folder: Path,
    files: Files,
    tmp_path: Path,
) -> None:
    path = sd_folder / part / "config.json"
    good = path.read_text()
    name = {"unet": "block_out_channels", "vae": "layers_per_block", "text_encoder": "num_hidden_layers"}[part]
    try:
        path.write_text(json.dumps(json.loads(good) | {name: value}))
        with pytest.raises(EmtError, match=str(sd_folder)) as caught:
            files.run(tmp_path / "m", base=sd_folder)
        assert lines(caught) <= 8
    finally:
        path.write_text(good)


@pytest.fixture(scope="module")
def sd_folder(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_folder(tmp_path_factory.mktemp("sd"), files.base)


def test_k6_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}})
    )
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import CLIPTokenizer as OwnTokenizer\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted on the terminal"))
    with pytest.raises(EmtError, match="cannot be loaded: it has code of its own, which is not run"):
        files.run(tmp_path / "m", tokenizer=folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_k6_files_of_a_model_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        random_model(tmp_path / "m")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_k6_a_motion_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Motion(MotionFeatures({"up": (torch.ones(1), torch.ones(1))}), 2, 8, 8, 0).save(tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (3,)}, "Stable Diffusion XL"),
        ({"model.diffusion_model.label_emb.0.0.weight": (3, 3)}, "Stable Diffusion XL"),
        ({"cond_stage_model.model.ln_final.weight": (3,)}, "Stable Diffusion 2"),
        ({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 2048)}, "Diffusion XL"),
        ({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 1024)}, "Diffusion 2"),
    ],
)
def test_k7_a_single_file_of_another_version_says_which(
    extra: dict[str, Any],
    message: str,
    files: Files,
    tmp_path: Path,
) -> None:
    state = ldm_unet(files.base.unet) | {k: torch.zeros(shape) for k, shape in extra.items()}
    save_file(state, tmp_path / "xl.safetensors")
    with pytest.raises(EmtError, match=message) as caught:
        read_base(tmp_path / "xl.safetensors")
    assert lines(caught) <= 8


@pytest.mark.parametrize(("channels", "message"), [(9, "an inpainting model"), (8, "InstructPix2Pix")])
def test_k7_a_unet_that_reads_more_channels_is_named(
    channels: int,
    message: str,
    files: Files,
    tmp_path: Path,
) -> None:
    state = ldm_file(files.base)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(state | {key: torch.zeros(WIDTHS[0], channels, 3, 3)}, tmp_path / "inpaint.safetensors")
    with pytest.raises(EmtError, match=message) as caught:
        files.run(tmp_path / "m", base=tmp_path / "inpaint.safetensors")
    assert lines(caught) <= 8


def test_k7_a_folder_of_sdxl_says_so(files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "xl", files.base)
    path = base / "unet" / "config.json"
    other = {
        "addition_embed_type": "text_time",
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(EmtError, match="Stable Diffusion XL") as caught:
        read_base(base)
    assert lines(caught) <= 8


def test_k7_a_folder_without_a_unet_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(EmtError, match="is a FluxPipeline without a UNet"):
        read_base(tmp_path)


@pytest.mark.parametrize("sign", ["scaled_fp8", "a.scale_weight", "a.absmax", "a.qweight"])
def test_k7_quantized_weights_are_refused_by_name(sign: str, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4), sign: torch.ones(1)}, tmp_path / "q.safetensors")
    with pytest.raises(EmtError, match=f"is quantized .*{sign}(.|\n)*Give the fp16 version"):
        read_checkpoint(tmp_path / "q.safetensors")


def test_k5_weights_of_whole_numbers_are_refused(files: Files, tmp_path: Path) -> None:
    state = {k: v.to(torch.int8) if v.ndim > 1 else v for k, v in ldm_file(files.base).items()}
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(EmtError, match=r"no floating point: .* is torch\.int8"):
        files.run(tmp_path / "m", base=tmp_path / "q.safetensors")


def test_k7_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "sd.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    with pytest.raises(EmtError, match="is a GGUF file"):
        read_base(tmp_path / "sd.gguf")


def test_k7_a_prefix_too_many_is_said_in_a_few_lines(files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"net.{k}": v for k, v in load_file(file).items()}, file)
    with pytest.raises(EmtError, match=r"1368 keys differ: its names begin with `net\.`") as caught:
        files.run(tmp_path / "m", base=base)
    assert lines(caught) <= 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
def test_k4_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(EmtError, match="is neither a file nor a folder"):
        read_motion_module(tmp_path / "pipe.safetensors")


def test_a_message_has_four_keys_of_all_kinds_and_counts_the_others() -> None:
    assert shorten([["a"]]) == ":\n  a"
    assert shorten([["a1", "a2", "a3"], [], ["c1"]]) == ":\n  a1\n  a2\n  a3\n  c1"
    many = [[f"{kind}{number}" for number in range(1, 6)] for kind in "abc"]
    assert shorten(many) == ":\n  a1\n  a2\n  b1\n  c1\n  … and 11 more"
    assert shorten(many[:1]) == ":\n  a1\n  a2\n  a3\n  a4\n  … and 1 more"


def test_keys_that_differ_are_counted_and_named_by_kind() -> None:
    wanted = {name: torch.Size([2]) for name in "abc"}
    check_keys("UNet", {name: torch.zeros(2) for name in "abc"}, wanted)
    with pytest.raises(EmtError, match="does not fit this network, 1 key differs") as caught:
        check_keys("UNet", {name: torch.zeros(2) for name in "bc"}, wanted)
    assert "missing: a (2,)" in caught.value.problem
    given = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.int8), "d": torch.zeros(2)}
    with pytest.raises(EmtError, match="4 keys differ") as caught:
        check_keys("UNet", given, wanted)
    for line in (
        "missing: c (2,)",
        "unexpected: d (2,)",
        "wrong shape: a is (3,), expected (2,)",
        "no floating point: b is torch.int8",
    ):
        assert f"\n  {line}" in caught.value.problem


def test_a_prefix_too_many_is_named_with_its_dot() -> None:
    wanted = {"conv.bias": torch.Size([1]), "conv.weight": torch.Size([1])}
    for prefixes, guess in ((("net.", "net."), "names begin with `net.`, which"), (("net.", "ema."), None)):
        given = {f"{prefix}{name}": torch.zeros(1) for prefix, name in zip(prefixes, wanted)}
        with pytest.raises(EmtError) as caught:
            check_keys("UNet", given, wanted)
        assert (guess is None) == ("begin with" not in caught.value.problem)
        assert (guess or "") in caught.value.problem


@pytest.mark.parametrize(
    ("name", "largest"), [("num_hidden_layers", 128), ("layers_per_block", 128), ("sample_size", 1_000_000)]
)
def test_k5_sizes_that_no_network_has_are_refused_before_it_is_built(name: str, largest: int) -> None:
    for value in (largest, -largest, [largest] * 1000, True, "auto", None, 0.5):
        check_sizes({name: value}, "config.json")
    for value in (largest + 1, -largest - 1, [1, largest + 1], [1] * 1001, float("inf"), float("nan")):
        with pytest.raises(EmtError, match=r"config\.json does not describe a network"):
            check_sizes({name: value}, "config.json")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says which files are mapped")
@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
def test_k8_weights_are_mapped_from_disk_not_copied(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / name, {"w": torch.arange(100_000.0)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    read = read_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert torch.equal(read.state["w"], state["w"])


def test_names_with_and_without_a_wrappers_prefix_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"module._orig_mod.{name}": torch.zeros(1) for name in "ab"}, path)
    assert set(read_checkpoint(path).state) == {"a", "b"}
    save_file({f"{prefix}{name}": torch.zeros(1) for name in "abcd" for prefix in ("", "module.")}, path)
    with pytest.raises(EmtError, match=r"with and without `module\.`: module\.a, module\.b, module\.c, …"):
        read_checkpoint(path)


def test_tensors_that_have_no_names_are_no_weights(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(1), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(EmtError, match="holds what is no tensor: 0, epoch"):
        read_checkpoint(tmp_path / "w.pt")
    torch.save({0: torch.zeros(1), "w": torch.zeros(1), "epoch": 3}, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert (list(read.state), read.dropped) == (["w"], ["0", "epoch"])


def test_the_scale_of_a_layer_is_that_of_the_last_pattern_of_its_name() -> None:
    """A name, or the end of one, as an expression; other layers have `lora_alpha`, and without it a scale of 1."""
    settings = {"lora_alpha": 2, "alpha_pattern": {"to_q": 8, r"attn2\.to_[qk]": 16}}
    scales = {
        name: peft_scale(settings, name, rank=4) for name in ("attn1.to_q", "attn2.to_q", "attn1.to_v", "not_to_q")
    }
    assert scales == {"attn1.to_q": 2.0, "attn2.to_q": 4.0, "attn1.to_v": 0.5, "not_to_q": 0.5}
    assert peft_scale({}, "to_q", rank=4) == 1.0
    assert peft_scale({"alpha": 2}, "to_q", rank=4) == 0.5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"alpha_pattern": {"(a+)+(b+)+": 1}}, "is not read"),  # four repetitions
        ({"alpha_pattern": {"a" * 301: 1}}, "is not read"),
        ({"alpha_pattern": {"(a": 1}}, "is no regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 1}}, "is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"lora_alpha": True}, "alpha is True"),
        ({"lora_alpha": "1"}, "alpha is '1'"),
        ({"lora_alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_k5_settings_that_peft_does_not_write_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        peft_scale(settings, "to_q", rank=4)
    peft_scale({"alpha_pattern": {"(a+)+b+": 1, "a" * 300: 1}}, "to_q", rank=4)


def test_networks_are_built_without_memory_for_their_weights() -> None:
    def build() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
        layer = torch.nn.Linear(10**6, 10**6)
        return layer, torch.nn.init.normal_(layer.weight, 0.0, 0.1), torch.arange(3)

    layer, drawn, buffer = without_memory(build)
    assert layer.weight.is_meta
    assert drawn is layer.weight
    assert buffer.tolist() == [0, 1, 2], "what is computed is computed"


# ---------------------------------------------------------------------------------------------------- distilled weights


@pytest.mark.parametrize(
    ("names", "sampling"),
    [
        (["animatediff_lightning_4step_diffusers.safetensors"], ("euler", 4, 1.0, "trailing")),
        (["hf://a/Lightning/animatediff_lightning_8step_comfyui.safetensors"], ("euler", 8, 1.0, "trailing")),
        (["AnimateLCM_sd15_t2v.ckpt"], ("lcm", 6, 1.5, None)),
        (["hf://wangfuyun/AnimateLCM"], ("lcm", 6, 1.5, None)),
        (["v3_sd15_mm.ckpt", "hf://latent-consistency/lcm-lora-sdv1-5"], ("lcm", 6, 1.0, None)),
        (["v3_sd15_mm.ckpt", "LCM_LoRA_SD15.safetensors"], ("lcm", 6, 1.0, None)),
        (["v3_sd15_mm.ckpt", "talcmatte.safetensors", "lightning_strikes.safetensors"], None),
    ],
)  # fmt: skip
def test_distilled_weights_are_recognized_by_their_published_names(names: list[str], sampling: Any) -> None:
    found = find_few_steps(names)
    assert (found and (found.sampler, found.steps, found.guidance, found.spacing)) == sampling


def test_distilled_weights_set_the_sampling_of_their_model(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "animatediff_lightning_4step_comfyui.safetensors"
    save_file(files.motion | positions(files.motion, 32), path)
    folder = files.run(tmp_path / "m", motion_module=path).folder
    model = find_model(str(folder), download=False)
    defaults = {name: model.defaults[name] for name in ("scheduler", "steps", "guidance")}
    assert defaults == {"scheduler": "euler", "steps": 4, "guidance": 1.0}
    assert load_pipeline(folder).scheduler.config.timestep_spacing == "trailing"
    assert "**sampling** `AnimateDiff-Lightning`: euler, 4 steps, guidance 1" in (folder / "README.md").read_text()
    assert find_model(str(random_model(tmp_path / "r")), download=False).defaults["scheduler"] == "ddim"


def test_only_names_of_what_can_be_distilled_set_the_sampling(files: Files, tmp_path: Path) -> None:
    """Not those of a VAE or an adapter, which are trained for themselves."""
    vae, adapter = tmp_path / "AnimateLCM_vae.safetensors", tmp_path / "animatediff_lightning_4step.safetensors"
    save_file(files.base.vae, vae)
    save_file(files.adapter, adapter)
    folder = files.run(tmp_path / "m", vae=vae, adapter=adapter).folder
    assert find_model(str(folder), download=False).defaults["scheduler"] == "ddim"


@torch.no_grad()
def test_a_models_own_sampling_is_what_a_call_without_options_does(tmp_path: Path) -> None:
    pipe = load_pipeline(random_model(tmp_path / "m", frames=2, height=16, width=16, steps=3, sampler="lcm"))
    steps: list[int] = []
    own = pipe.generate("a fox", guidance=1, on_step=lambda _, total: steps.append(total))[0]
    assert steps == [3, 3, 3]
    assert np.array_equal(own, pipe.generate("a fox", guidance=1, scheduler="lcm")[0])
    assert not np.array_equal(own, pipe.generate("a fox", guidance=1, scheduler="ddim")[0])


def test_every_row_of_the_documentation_has_its_test() -> None:
    folder = Path(__file__).parent
    text = (folder.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    defined = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    named = re.findall(r"\| (test_\w+) \|$", text, re.MULTILINE)
    assert len(named) > 45
    assert [name for name in named if f"def {name}(" not in defined] == []
