"""LoRA files in the dialects that people have: each changes weights by its definition, or is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from weight_files import CONV, OUT, POINTWISE, SPATIAL, TEXT, Files, State, kohya, ldm_unet

from emt import EmtError
from emt.backbones.sd15.lora import LoraMerge

NORM = "down_blocks.1.attentions.0.norm"


def read(path: Path, files: Files, scale: float = 1.0) -> tuple[LoraMerge, str]:
    """The networks with a LoRA merged, and the note of the model card."""
    merge = LoraMerge(files.base.unet | files.motion, dict(files.base.text_encoder))
    note = merge.read(path, scale).note
    merge.apply(torch.float32)
    return merge, note


def gained(state: State, files: Files, tmp_path: Path, scale: float = 1.0, **metadata: str) -> State:
    """What each weight gains by a LoRA of these tensors; those that gain nothing are left out."""
    save_file(state, tmp_path / "lora.safetensors", metadata or None)
    merge, _ = read(tmp_path / "lora.safetensors", files, scale)
    before = {"unet": files.base.unet | files.motion, "text_encoder": files.base.text_encoder}
    return {
        name: after - before[part][name]
        for part, weights in merge.states.items()
        for name, after in weights.items()
        if not torch.equal(after, before[part][name])
    }


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(files: Files, name: str) -> Tensor:
    return (files.base.unet | files.base.text_encoder)[f"{name}.weight"]


def assert_only(gains: State, name: str, expected: Tensor) -> None:
    assert list(gains) == [name]
    torch.testing.assert_close(gains[name], expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- what each kind computes


def test_k1_tucker_cores_and_scalars_of_a_convolution(files: Files, tmp_path: Path) -> None:
    """The change is one convolution after another: down, the core with the kernel, up."""
    outputs, inputs, *kernel = weight(files, CONV).shape
    down, core, up = draw(4, inputs, 1, 1), draw(3, 4, *kernel), draw(outputs, 3, 1, 1)
    state = {
        f"{kohya(CONV)}.lora_down.weight": down,
        f"{kohya(CONV)}.lora_mid.weight": core,
        f"{kohya(CONV)}.lora_up.weight": up,
        f"{kohya(CONV)}.alpha": torch.tensor(2.0),
        f"{kohya(CONV)}.scalar": torch.tensor([0.5]),
    }
    gain = gained(state, files, tmp_path)[f"{CONV}.weight"]
    image = draw(1, inputs, 6, 6)
    convolve = torch.nn.functional.conv2d
    expected = convolve(convolve(convolve(image, down), core, padding=1), up) * 0.5 * 2.0 / 4
    torch.testing.assert_close(convolve(image, gain, padding=1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [SPATIAL, CONV])
def test_k1_loha_is_the_entrywise_product_of_two_loras(layer: str, files: Files, tmp_path: Path) -> None:
    shape = weight(files, layer).shape
    flat = weight(files, layer).flatten(1).shape
    halves = {f"w{i}_{x}": draw(*s, seed=i) for i in (1, 2) for x, s in (("a", (flat[0], 4)), ("b", (4, flat[1])))}
    state = {f"{kohya(layer)}.hada_{name}": tensor for name, tensor in halves.items()}
    gains = gained(state | {f"{kohya(layer)}.alpha": torch.tensor(1.0)}, files, tmp_path, scale=0.5)
    expected = 0.5 / 4 * (halves["w1_a"] @ halves["w1_b"]) * (halves["w2_a"] @ halves["w2_b"])
    assert_only(gains, f"{layer}.weight", expected.reshape(shape))


def test_k1_loha_with_tucker_cores(files: Files, tmp_path: Path) -> None:
    outputs, inputs, height, width = weight(files, CONV).shape
    t = {f"t{i}": draw(4, 4, height, width, seed=i) for i in (1, 2)}
    t |= {f"w{i}_{x}": draw(4, n, seed=i) for i in (1, 2) for x, n in (("a", outputs), ("b", inputs))}
    gains = gained({f"{kohya(CONV)}.hada_{name}": tensor for name, tensor in t.items()}, files, tmp_path)
    factors = [
        sum(core[i, j] * a[i][:, None, None, None] * b[j][None, :, None, None] for i in range(4) for j in range(4))
        for core, a, b in ((t[f"t{n}"], t[f"w{n}_a"], t[f"w{n}_b"]) for n in (1, 2))
    ]
    assert_only(gains, f"{CONV}.weight", factors[0] * factors[1])


@pytest.mark.parametrize("form", ["whole", "second decomposed", "both decomposed", "convolution", "tucker"])
def test_k1_lokr_is_a_kronecker_product(form: str, files: Files, tmp_path: Path) -> None:
    layer = CONV if form in ("convolution", "tucker") else SPATIAL
    outputs, inputs, *kernel = weight(files, layer).shape
    o, i = outputs // 4, inputs // 4
    t = {"w1": draw(4, 4), "w2": draw(o, i, *kernel)}
    parts, scale = dict(t), 1.0
    if form == "both decomposed":
        parts = {"w1_a": draw(4, 2), "w1_b": draw(2, 4, seed=1)}
        t["w1"] = parts["w1_a"] @ parts["w1_b"]
    if form in ("second decomposed", "both decomposed", "convolution"):
        a, b = draw(o, 2, seed=2), draw(2, i, *kernel, seed=3)
        t["w2"] = torch.einsum("or,ri...->oi...", a, b)
        parts = {k: v for k, v in parts.items() if k != "w2"} | {"w2_a": a, "w2_b": b}
        scale = 3.0 / 2  # alpha / rank; whole matrices are not scaled
    if form == "tucker":
        core, a, b = draw(2, 2, *kernel), draw(2, o, seed=2), draw(2, i, seed=3)
        t["w2"] = torch.einsum("rs...,ro,si->oi...", core, a, b)
        parts = {"w1": t["w1"], "t2": core, "w2_a": a, "w2_b": b}
        scale = 3.0 / 2
    state = {f"{kohya(layer)}.lokr_{name}": tensor for name, tensor in parts.items()}
    gains = gained(state | {f"{kohya(layer)}.alpha": torch.tensor(3.0)}, files, tmp_path)
    expected = torch.zeros(outputs, inputs, *kernel)
    for row in range(4):
        for column in range(4):
            block = expected[row * o : (row + 1) * o, column * i : (column + 1) * i]
            block.copy_(t["w1"][row, column] * t["w2"])
    assert_only(gains, f"{layer}.weight", scale * expected)


@pytest.mark.parametrize("kind", ["kohya, outputs", "kohya, inputs", "PEFT", "LoHa", "convolution"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_k1_dora_sets_the_norms_of_the_sum(kind: str, scale: float, files: Files, tmp_path: Path) -> None:
    """Liu et al. 2024, equation 5; at another scale than 1 it goes that part of the way."""
    layer = CONV if kind == "convolution" else OUT
    before = weight(files, layer)
    rows, columns = before.flatten(1).shape
    down, up = draw(4, *before.shape[1:]), draw(rows, 4, seed=1)
    change = torch.einsum("or,ri...->oi...", up, down) * 2.0 / 4
    name = kohya(layer)
    up = up.reshape(rows, 4, *[1] * (before.ndim - 2))
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    sides, axis = set(range(1, before.ndim)), 0
    shape = (rows, *[1] * (before.ndim - 1))
    if kind == "kohya, inputs":
        sides, axis, shape = {0}, 1, (1, columns)
    magnitudes = draw(before.shape[axis]).abs() + 1
    if kind == "PEFT":
        base = f"base_model.model.{layer}"
        state = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
        state[f"{base}.lora_magnitude_vector"] = magnitudes
        change = change * 2  # no alpha: the scale is in the weights
    elif kind == "LoHa":
        t = {f"w{i}_{x}": draw(*s, seed=i) for i in (1, 2) for x, s in (("a", (rows, 4)), ("b", (4, columns)))}
        state = {f"{name}.hada_{k}": v for k, v in t.items()}
        change = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    if kind != "PEFT":
        state[f"{name}.dora_scale"] = magnitudes.reshape(shape)
    whole = before + change
    merged = whole * magnitudes.reshape(shape) / torch.linalg.vector_norm(whole, dim=tuple(sides), keepdim=True)
    assert_only(gained(state, files, tmp_path, scale), f"{layer}.weight", scale * (merged - before))


def test_k1_full_differences_of_weights_biases_and_norms(files: Files, tmp_path: Path) -> None:
    state = {
        f"{kohya(CONV)}.diff": draw(*weight(files, CONV).shape),
        f"{kohya(CONV)}.diff_b": draw(*files.base.unet[f"{CONV}.bias"].shape),
        f"{kohya(NORM)}.w_norm": draw(*weight(files, NORM).shape),
        f"{kohya(NORM)}.b_norm": draw(*weight(files, NORM).shape, seed=1),
    }
    gains = gained(state, files, tmp_path, scale=0.5)
    names = [f"{CONV}.weight", f"{CONV}.bias", f"{NORM}.weight", f"{NORM}.bias"]
    assert gains.keys() == {*names}
    for name, tensor in zip(names, state.values(), strict=True):
        torch.testing.assert_close(gains[name], 0.5 * tensor, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- names of the layers


def original_name(layer: str, files: Files) -> str:
    """A layer's name in the original code, by the tests' own renaming of whole files."""
    marked = {k: torch.full((1,), float(k == f"{layer}.weight")) for k in files.base.unet}
    found = next(name for name, tensor in ldm_unet(marked).items() if tensor.item() == 1)
    return found.removeprefix("model.diffusion_model.").removesuffix(".weight")


NAMES: dict[str, tuple[str, str]] = {
    # dialect → layer, and how it is written before `.lora_down.weight`; {o} is the original code's name
    "kohya's first text encoder": (TEXT, "lora_te1_text_model_" + TEXT.replace(".", "_")),
    "LyCORIS' own prefix": (SPATIAL, "lycoris_" + SPATIAL.replace(".", "_")),
    "ComfyUI": (OUT, "diffusion_model.{o}"),
    "ComfyUI, resnet": (CONV, "diffusion_model.{o}"),
    "ComfyUI, projection": (POINTWISE, "diffusion_model.{o}"),
    "LyCORIS, text": (TEXT, "lycoris_text_model_" + TEXT.replace(".", "_")),
    "ComfyUI, text": (TEXT, f"text_encoders.clip_l.transformer.text_model.{TEXT}"),
    "original names, underscores": (SPATIAL, "lora_unet_{u}"),
    "downsampler": ("down_blocks.0.downsamplers.0.conv", "diffusion_model.{o}"),
    "upsampler with attention": ("up_blocks.1.upsamplers.0.conv", "diffusion_model.{o}"),
    "upsampler without attention": ("up_blocks.0.upsamplers.0.conv", "diffusion_model.{o}"),
    "time embedding": ("time_embedding.linear_1", "lora_unet_time_embedding_linear_1"),
}


@pytest.mark.parametrize("dialect", NAMES)
def test_k1_names_of_a_dialect(dialect: str, files: Files, tmp_path: Path) -> None:
    layer, pattern = NAMES[dialect]
    original = original_name(layer, files) if "{" in pattern else ""
    name = pattern.format(o=original, u=original.replace(".", "_"))
    before = weight(files, layer)
    down, up = draw(4, *before.shape[1:]), draw(before.shape[0], 4, *[1] * (before.ndim - 2))
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4)}
    expected = torch.einsum("or,ri...->oi...", up.flatten(1), down)
    assert_only(gained(state, files, tmp_path), f"{layer}.weight", expected)


@pytest.mark.parametrize("end", ["lora_A.default.weight", "lora_A.style-1.weight"])
def test_k1_adapter_names_of_peft(end: str, files: Files, tmp_path: Path) -> None:
    before = weight(files, SPATIAL)
    down, up = draw(4, before.shape[1]), draw(before.shape[0], 4)
    name = f"base_model.model.{SPATIAL}.{end}"
    gains = gained({name: down, name.replace("lora_A", "lora_B"): up}, files, tmp_path)
    assert_only(gains, f"{SPATIAL}.weight", up @ down)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 8 / 4), (True, 8 / 2)])
def test_k9_rank_stabilised_scales_and_patterns(
    rslora: bool,
    expected: float,
    files: Files,
    tmp_path: Path,
) -> None:
    """Kalajdzievski 2023 (arXiv 2312.03732): alpha / √rank."""
    settings = {"r": 4, "lora_alpha": 1, "use_rslora": rslora, "alpha_pattern": {r"attn2\.to_k": 8, "attn1.to_q": 100}}
    metadata = json.dumps({f"unet.{k}": v for k, v in settings.items()})
    before = weight(files, SPATIAL)
    down, up = draw(4, before.shape[1]), draw(before.shape[0], 4)
    state = {f"unet.{SPATIAL}.lora_A.weight": down, f"unet.{SPATIAL}.lora_B.weight": up}
    assert_only(
        gained(state, files, tmp_path, lora_adapter_metadata=metadata), f"{SPATIAL}.weight", expected * up @ down
    )


def test_k2_patterns_of_peft_may_be_anchored(files: Files, tmp_path: Path) -> None:
    """diffusers writes `^` before the modules that its patterns name; what is before a network's modules is no part."""
    before = weight(files, SPATIAL)
    down, up = draw(4, before.shape[1]), draw(before.shape[0], 4)
    settings = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {f"^{SPATIAL}": 8}}
    for prefix in ("unet.", "base_model.model."):
        state = {f"{prefix}{SPATIAL}.lora_A.weight": down, f"{prefix}{SPATIAL}.lora_B.weight": up}
        gains = gained(state, files, tmp_path, lora_adapter_metadata=json.dumps(settings))
        assert_only(gains, f"{SPATIAL}.weight", 2 * up @ down)


def test_k1_embeddings_beside_the_layers_are_left_with_a_word(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = weight(files, SPATIAL)
    layers = {f"{kohya(SPATIAL)}.lora_down.weight": draw(4, before.shape[1])}
    layers[f"{kohya(SPATIAL)}.lora_up.weight"] = draw(before.shape[0], 4)
    key = "bundle_emb.my.word.string_to_param.*"
    save_file(layers | {key: draw(2, 32)}, tmp_path / "l.safetensors")
    origin = LoraMerge(dict(files.base.unet), dict(files.base.text_encoder)).read(tmp_path / "l.safetensors", 1.0)
    assert origin.dropped == [key]
    assert "brings textual inversions (my.word), which are not read with it: give them by --embedding" in caplog.text


def test_loras_of_one_weight_add_up_in_any_order(files: Files, tmp_path: Path) -> None:
    before = weight(files, OUT)
    name = kohya(OUT)
    plain = {f"{name}.lora_down.weight": draw(4, before.shape[1]), f"{name}.lora_up.weight": draw(before.shape[0], 4)}
    save_file(plain, tmp_path / "a.safetensors")
    save_file(plain | {f"{name}.dora_scale": torch.ones(before.shape[0], 1)}, tmp_path / "b.safetensors")
    results = []
    for order in ("ab", "ba"):
        merge = LoraMerge(dict(files.base.unet), dict(files.base.text_encoder))
        for letter in order:
            merge.read(tmp_path / f"{letter}.safetensors", 1.0)
        merge.apply(torch.float32)
        results.append(merge.states["unet"][f"{OUT}.weight"])
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------- every tensor of a file counts


def test_k2_all_adapters_of_one_file_add_up(files: Files, tmp_path: Path) -> None:
    rows, columns = weight(files, SPATIAL).shape
    state, expected = {}, torch.zeros(rows, columns)
    for number, adapter in enumerate(("default", "style")):
        down, up = draw(4, columns, seed=number), draw(rows, 4, seed=number)
        state[f"base_model.model.{SPATIAL}.lora_A.{adapter}.weight"] = down
        state[f"base_model.model.{SPATIAL}.lora_B.{adapter}.weight"] = up
        expected += up @ down
    assert_only(gained(state, files, tmp_path), f"{SPATIAL}.weight", expected)


def test_k2_a_low_rank_change_beside_that_of_the_bias(files: Files, tmp_path: Path) -> None:
    rows, columns = weight(files, OUT).shape
    name = f"diffusion_model.{OUT}"
    state = {f"{name}.lora_down.weight": draw(4, columns), f"{name}.lora_up.weight": draw(rows, 4)}
    gains = gained(state | {f"{name}.diff_b": draw(rows)}, files, tmp_path)
    torch.testing.assert_close(gains.pop(f"{OUT}.bias"), draw(rows), rtol=1e-4, atol=1e-4)
    assert_only(gains, f"{OUT}.weight", draw(rows, 4) @ draw(4, columns))


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_k1_the_bias_of_pefts_low_rank_layers_is_scaled_as_they_are(adapter: str, files: Files, tmp_path: Path) -> None:
    """PEFT's lora_bias: W x + b + alpha / rank · (B A x + b')."""
    rows, columns = weight(files, OUT).shape
    name, settings = f"base_model.model.{OUT}", {"unet.r": 4, "unet.lora_alpha": 8}
    state = {f"{name}.lora_A{adapter}.weight": draw(4, columns), f"{name}.lora_B{adapter}.weight": draw(rows, 4)}
    state[f"{name}.lora_B{adapter}.bias"] = draw(rows)
    gains = gained(state, files, tmp_path, scale=0.5, lora_adapter_metadata=json.dumps(settings))
    torch.testing.assert_close(gains.pop(f"{OUT}.bias"), draw(rows), rtol=1e-4, atol=1e-4)
    assert_only(gains, f"{OUT}.weight", draw(rows, 4) @ draw(4, columns))


def test_k2_a_bias_for_a_layer_that_has_none_is_refused_unless_it_is_zero(files: Files, tmp_path: Path) -> None:
    rows, columns = weight(files, SPATIAL).shape
    state = {f"{SPATIAL}.lora_A.weight": draw(4, columns), f"{SPATIAL}.lora_B.weight": draw(rows, 4)}
    with pytest.raises(EmtError, match="no such bias in the model: the layer"):
        gained(state | {f"{SPATIAL}.lora_B.bias": draw(rows)}, files, tmp_path)
    assert list(gained(state | {f"{SPATIAL}.lora_B.bias": torch.zeros(rows)}, files, tmp_path))


N = 32  # width of the layer OUT, (N, N) with a bias
PARTS: dict[str, State] = {
    "LoRA": {"lora_down.weight": draw(4, N), "lora_up.weight": draw(N, 4)},
    "another adapter": {"lora_A.other.weight": draw(2, N), "lora_B.other.weight": draw(N, 2)},
    "half an adapter": {"lora_A.half.weight": draw(2, N)},
    "the same halves by other names": {"lora_A.weight": draw(4, N), "lora_B.weight": draw(N, 4)},
    "LoHa": {f"hada_w{i}_{half}": draw(*((N, 3), (3, N))[half == "b"]) for i in (1, 2) for half in "ab"},
    "LoKr": {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8)},
    "factors of LoKr": {"lokr_w1_a": draw(4, 2), "lokr_w1_b": draw(2, 4), "lokr_w2": draw(8, 8)},
    "difference": {"diff": draw(N, N)},
    "of a norm": {"w_norm": draw(N, N)},
    "bias": {"diff_b": draw(N)},
    "bias of low rank": {"lora_B.bias": draw(N)},
    "bias of a norm": {"b_norm": draw(N)},
    "DoRA": {"dora_scale": draw(N, 1).abs() + 1},
    "PEFT's DoRA": {"lora_magnitude_vector": draw(N).abs() + 1},
    "scalar": {"scalar": torch.tensor(0.5)},
    "core": {"lora_mid.weight": draw(4, 4)},
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.sets(st.sampled_from(sorted(PARTS)), min_size=1, max_size=3))
def test_k2_every_tensor_of_a_layer_changes_the_weights_or_the_file_is_refused(
    parts: set[str], files: Files, tmp_path: Path
) -> None:
    assert weight(files, OUT).shape == (N, N)
    state = {f"unet.{OUT}.{role}": tensor for part in sorted(parts) for role, tensor in PARTS[part].items()}
    try:
        before = gained(state, files, tmp_path)
    except EmtError:
        return
    for key, tensor in state.items():
        after = gained(state | {key: 1.5 * tensor}, files, tmp_path)
        assert any(not torch.equal(before[name], after[name]) for name in before), key


def test_k2_one_weight_by_two_names_is_refused(files: Files, tmp_path: Path) -> None:
    state = halves(files)
    state |= {key.replace(kohya(SPATIAL), f"unet.{SPATIAL}"): tensor + 1 for key, tensor in state.items()}
    with pytest.raises(EmtError, match="one weight by two names"):
        gained(state, files, tmp_path)


@pytest.mark.parametrize("name", [f"unet._orig_mod.{SPATIAL}", f"model.unet.{SPATIAL}", f"lora_unet_{SPATIAL}"])
def test_k1_names_of_wrappers_and_prefixes(name: str, files: Files, tmp_path: Path) -> None:
    rows, columns = weight(files, SPATIAL).shape
    state = {f"{name}.lora_A.weight": draw(4, columns), f"{name}.lora_B.weight": draw(rows, 4)}
    assert_only(gained(state, files, tmp_path), f"{SPATIAL}.weight", draw(rows, 4) @ draw(4, columns))


def test_k1_a_folder_with_one_file_of_weights(files: Files, tmp_path: Path) -> None:
    save_file(halves(files), tmp_path / "pytorch_lora_weights.safetensors")
    assert read(tmp_path, files)[1].startswith("scale 1; 1 layers of the UNet")
    save_file(halves(files), tmp_path / "other.safetensors")
    with pytest.raises(
        EmtError, match=r"holds 2 files of weights: other\.safetensors, pytorch_lora_weights\.safetensors"
    ):
        read(tmp_path, files)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("OFT", {"oft_blocks": (4, 8, 8)}),
        ("IA3", {"weight": (32,), "on_input": (1,)}),
        ("GLoRA", {"a1.weight": (4, 32), "a2.weight": (32, 4), "b1.weight": (4, 32), "b2.weight": (32, 4)}),
        ("OFT", {"oft_R.default.weight": (4, 28)}),
        ("OFT", {"boft_R": (1, 4, 8, 8), "boft_s": (32, 1)}),
        ("IA3", {"ia3_l.default": (32, 1)}),
        ("VeRA", {"vera_lambda_b": (32,), "vera_lambda_d": (4,)}),
        ("AdaLoRA", {"lora_A": (4, 32), "lora_B": (32, 4), "lora_E": (4, 1)}),
        ("embedding", {"lora_embedding_A": (4, 32), "lora_embedding_B": (32, 4)}),
    ],
)
def test_k1_relatives_that_are_no_sum_are_named(
    kind: str,
    tensors: dict[str, Any],
    files: Files,
    tmp_path: Path,
) -> None:
    save_file({f"{kohya(SPATIAL)}.{k}": draw(*shape) for k, shape in tensors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(EmtError, match=f"it holds {kind} layers, which are not read"):
        read(tmp_path / "l.safetensors", files)


def halves(files: Files) -> State:
    rows, columns = weight(files, SPATIAL).shape
    name = kohya(SPATIAL)
    return {f"{name}.lora_down.weight": draw(4, columns), f"{name}.lora_up.weight": draw(rows, 4)}


@pytest.mark.parametrize("zero", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_k2_a_lora_that_changes_nothing_is_refused(zero: str, files: Files, tmp_path: Path) -> None:
    state = halves(files)
    name = f"{kohya(SPATIAL)}.{zero}"
    state[name] = torch.zeros_like(state[name]) if name in state else torch.tensor(0.0)
    with pytest.raises(EmtError, match="changes nothing: all of its 1 layers are zero"):
        gained(state, files, tmp_path)
    trained = {f"{kohya(OUT)}.diff": draw(*weight(files, OUT).shape)}
    assert_only(gained(state | trained, files, tmp_path), f"{OUT}.weight", trained[f"{kohya(OUT)}.diff"])


def test_a_lora_at_scale_0_is_what_was_asked_for(files: Files, tmp_path: Path) -> None:
    assert not gained(halves(files), files, tmp_path, scale=0.0)


def test_k2_dora_by_its_settings_without_magnitudes_is_refused(files: Files, tmp_path: Path) -> None:
    asked = json.dumps({"unet.use_dora": True})
    with pytest.raises(EmtError, match=r"use_dora.*has no magnitudes"):
        gained(halves(files), files, tmp_path, lora_adapter_metadata=asked)
    rows = weight(files, SPATIAL).shape[0]
    whole = halves(files) | {f"{kohya(SPATIAL)}.dora_scale": torch.ones(rows, 1)}
    assert gained(whole, files, tmp_path, lora_adapter_metadata=asked)


DEEP = "[" * 100_000
DAMAGES: dict[str, tuple[State, Any]] = {
    "metadata is no JSON": ({}, "{not json"),
    "metadata is nested without end": ({}, DEEP),
    "metadata is a list": ({}, "[1]"),
    "alpha is null": ({}, {"unet.lora_alpha": None}),
    "alpha is a word": ({}, {"unet.lora_alpha": "four"}),
    "alpha is infinite": ({}, {"unet.lora_alpha": float("inf")}),
    "patterns are a list": ({}, {"unet.alpha_pattern": [4]}),
    "pattern is no expression": ({}, {"unet.alpha_pattern": {"([": 4}}),
    "pattern would search for ever": ({}, {"unet.alpha_pattern": {"(((a+)+)+)+!": 4}}),
    "start that changed the model": ({}, {"unet.init_lora_weights": "pissa_niter_16"}),
    "method of another kind": ({}, {"unet.peft_type": "HRA"}),
    "alpha of a truth value": ({"alpha": torch.tensor(True)}, None),
    "alpha is complex": ({"alpha": torch.tensor(1 + 1j)}, None),
    "alpha of four numbers": ({"alpha": torch.ones(4)}, None),
    "alpha is not a number": ({"alpha": torch.tensor(float("nan"))}, None),
    "rank 0": ({"lora_down.weight": torch.zeros(0, 32), "lora_up.weight": torch.zeros(32, 0)}, None),
    "no dimensions": ({"lora_down.weight": torch.tensor(1.0)}, None),
    "not finite": ({"lora_up.weight": torch.full((32, 4), float("inf"))}, None),
    "whole numbers": ({"lora_up.weight": torch.ones(32, 4, dtype=torch.int8)}, None),
    "a core that does not fit": ({"lora_mid.weight": torch.ones(5, 5, 3, 3)}, None),
    "magnitudes that do not fit": ({"dora_scale": torch.ones(7, 1)}, None),
    "Kronecker factors that do not fit": ({"lokr_w1": torch.ones(5, 5), "lokr_w2": torch.ones(3, 3)}, None),
    "half a LoHa": ({"hada_w1_a": torch.ones(32, 4)}, None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_k5_a_damaged_file_is_one_message_that_names_it(damage: str, files: Files, tmp_path: Path) -> None:
    changes, metadata = DAMAGES[damage]
    state = halves(files) | {f"{kohya(SPATIAL)}.{key}": tensor for key, tensor in changes.items()}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(state, tmp_path / "odd.safetensors", {"lora_adapter_metadata": text} if metadata else None)
    with pytest.raises(EmtError, match=r"odd\.safetensors") as caught:
        read(tmp_path / "odd.safetensors", files)
    assert len(str(caught.value).splitlines()) <= 8


def test_k7_a_lora_of_sdxl_says_so_in_a_few_lines(files: Files, tmp_path: Path) -> None:
    state = {}
    for block in range(3, 9):
        for depth in range(10):
            name = f"lora_unet_input_blocks_{block}_1_transformer_blocks_{depth}_attn2_to_k"
            state |= {f"{name}.lora_down.weight": draw(1, 2048), f"{name}.lora_up.weight": draw(640, 1)}
    save_file(state, tmp_path / "xl.safetensors")
    with pytest.raises(EmtError, match="it looks like one of Stable Diffusion XL") as caught:
        read(tmp_path / "xl.safetensors", files)
    assert len(str(caught.value).splitlines()) <= 8


@pytest.mark.parametrize(
    ("shape", "metadata", "version"),
    [
        ((4, 1024), {}, "Stable Diffusion 2"),
        ((4, 7), {"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ((4, 7), {"modelspec.architecture": "Flux.1-dev/lora"}, "Flux"),
    ],
)
def test_k7_other_versions_are_recognized_by_widths_and_metadata(
    shape: tuple[int, int],
    metadata: dict[str, str],
    version: str,
    files: Files,
    tmp_path: Path,
) -> None:
    state = halves(files) | {f"{kohya(SPATIAL)}.lora_down.weight": draw(*shape)}
    save_file(state, tmp_path / "l.safetensors", metadata or None)
    with pytest.raises(EmtError, match=f"it looks like one of {version}"):
        read(tmp_path / "l.safetensors", files)


def test_a_lora_whose_metadata_is_of_another_model_but_fits_is_read(files: Files, tmp_path: Path) -> None:
    assert gained(halves(files), files, tmp_path, ss_base_model_version="sdxl_base_v1-0")
