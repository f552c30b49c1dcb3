"""Damaged and hostile files of weights: LoRAs, checkpoints, motion modules, embeddings, model folders.

Each is read by the functions that the program reads it with. It must be refused by one `EmtError` of a few lines, or be
read; what is read must be finite. Run by `bad_inputs.py`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from emt.backbones.sd15.lora import LoraMerge
from emt.backbones.sd15.motion_checkpoint import read_motion_module
from emt.backbones.sd15.textual_inversion import read_embedding
from emt.checkpoints import read_checkpoint, read_weights
from emt.errors import EmtError
from emt.pipeline import load_pipeline

MOST_LINES = 8
_SHAPES = ((), (0,), (1,), (3,), (0, 3), (4, 0), (1, 1, 1), (2, 2, 2, 2, 2), (32, 32), (4, 32))
_DTYPES = (torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64)
_VALUES: tuple[Any, ...] = (
    *(None, True, "x", "", "../..", -1, 0, 3, 10**12, 1e300, float("nan"), float("inf")),
    *([], [[]], {}, ["x"], [1, 2], {"a": 1}, [10**9] * 3),
)
_DEEP = "[" * 100_000


def cases(model: Path, work: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(kind, what it is, how it is read) of each bad file.

    Args:
        model: a model folder.
        work: where to write.
        chance: that the files are drawn from.
    """
    work.mkdir()
    transformers.utils.logging.set_verbosity_error()  # it warns of values that it replaces
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    unet = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    text = {
        name.removeprefix("text_model."): tensor
        for name, tensor in load_file(model / "text_encoder" / "model.safetensors").items()
    }
    yield from _loras(unet, text, work, chance)
    yield from _motion_modules(unet, work, chance)
    yield from _files(unet, work, chance)
    yield from _embeddings(work, chance)
    yield from _mixed_layers(unet, text, work, chance)
    yield from _pickles(work, chance)
    yield from _indexes(work / "split", chance)
    yield from _folders(model, work, chance)


def attempt(read: Callable[[], object]) -> tuple[str, str]:
    """How a file was received, "refused" or "served", and what was wrong with that, if anything was."""
    try:
        read()
    except EmtError as error:
        lines = str(error).splitlines()
        return "refused", f"{len(lines)} lines: {error}" if len(lines) > MOST_LINES or not error.problem else ""
    except Exception as error:  # every other one is a violation
        return "refused", f"{type(error).__name__}: {error}"
    return "served", ""


def _odd(chance: random.Random) -> Tensor:
    return torch.zeros(chance.choice(_SHAPES)).to(chance.choice(_DTYPES))


def _mutated(state: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """A state dict with a few tensors dropped, replaced, renamed or added."""
    state = dict(state)
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(sorted(state))
        what = chance.choice(("drop", "replace", "rename", "add"))
        if what == "drop" and len(state) > 1:
            del state[name]
        elif what == "replace":
            state[name] = _odd(chance)
        elif what == "rename":
            state[name.replace(chance.choice(".0123"), chance.choice(("", "9", ".", "_", "0")), 1)] = state.pop(name)
        else:
            prefix, suffix = chance.choice(("", "a.", ".", "model.")), chance.choice(("x", ".weight", ".1"))
            state[f"{prefix}{name}{suffix}"] = _odd(chance)
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def _loras(
    unet: dict[str, Tensor], text: dict[str, Tensor], work: Path, chance: random.Random
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    layers = sorted(n for n, t in unet.items() if n.endswith(".weight") and t.ndim > 1 and ".scaler." not in n)
    path = work / "lora.safetensors"
    settings = ("lora_alpha", "alpha_pattern", "use_rslora", "peft_type", "r", "rank_pattern")
    for i in range(250):
        state: dict[str, Tensor] = {}
        for name in chance.sample(layers, 3):
            rows, columns, *kernel = unet[name].shape
            flat = unet[name].flatten(1).shape[1]
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            family = chance.choice(("LoRA", "LoHa", "LoKr", "difference"))
            if family == "LoRA":
                up = torch.randn(rows, 4, *[1] * len(kernel))
                state |= {
                    f"{module}.lora_down.weight": torch.randn(4, columns, *kernel),
                    f"{module}.lora_up.weight": up,
                }
                state[f"{module}.alpha"] = torch.tensor(4.0)
            elif family == "LoHa":
                halves = {"w1_a": (rows, 4), "w1_b": (4, flat), "w2_a": (rows, 4), "w2_b": (4, flat)}
                state |= {f"{module}.hada_{half}": torch.randn(shape) for half, shape in halves.items()}
            elif family == "LoKr":
                state[f"{module}.lokr_w1"] = torch.randn(4, 4)
                state[f"{module}.lokr_w2"] = torch.randn(rows // 4, columns // 4, *kernel)
                state[f"{module}.dora_scale"] = torch.ones(rows, 1)
            else:
                state[f"{module}.diff"] = torch.randn(rows, columns, *kernel)
        bad = _mutated(state, chance) if i % 5 else state
        metadata = json.dumps({chance.choice(("", "unet.")) + chance.choice(settings): chance.choice(_VALUES)})
        metadata = chance.choice((metadata, metadata, metadata, _DEEP, "{", "1"))
        given = {"lora_adapter_metadata": metadata} if i % 2 else None

        def read(bad: dict[str, Tensor] = bad, given: dict[str, str] | None = given) -> None:
            save_file(bad, path, given)
            merge = LoraMerge(dict(unet), dict(text))
            merge.read(path, 1.0)
            for part, name in merge.apply(torch.float32):
                assert torch.isfinite(merge.states[part][name]).all(), name

        yield "LoRA", f"{sorted(bad)} {given}", read


def _mixed_layers(
    unet: dict[str, Tensor], text: dict[str, Tensor], work: Path, chance: random.Random
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Layers of two kinds, or of two adapters, for one weight: all of a file is read, or none."""
    path, name = work / "mixed.safetensors", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    rows, columns = unet[f"{name}.weight"].shape
    parts = {
        "lora_down.weight lora_up.weight": [(4, columns), (rows, 4)],
        "lora_A.weight lora_B.weight": [(2, columns), (rows, 2)],
        "lora_A.other.weight lora_B.other.weight": [(2, columns), (rows, 2)],
        "lora_mid.weight": [(4, 4)],
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b": [(rows, 2), (2, columns), (rows, 2), (2, columns)],
        "lokr_w1 lokr_w2": [(4, 4), (rows // 4, columns // 4)],
        "lokr_w1_a lokr_w1_b": [(4, 2), (2, 4)],
        "diff": [(rows, columns)],
        "w_norm": [(rows, columns)],
        "diff_b": [(rows,)],
        "b_norm": [(rows,)],
        "dora_scale": [(rows, 1)],
        "lora_magnitude_vector.weight": [(rows,)],
        "scalar": [()],
    }
    for _ in range(60):
        chosen = chance.sample(sorted(parts), chance.randint(1, 3))
        state = {
            f"unet.{name}.{role}": torch.rand(shape) + 0.1
            for part in chosen
            for role, shape in zip(part.split(), parts[part])
        }

        def read(state: dict[str, Tensor] = state) -> None:
            def merged(state: dict[str, Tensor]) -> list[Tensor]:
                save_file(state, path)
                merge = LoraMerge(dict(unet), dict(text))
                merge.read(path, 1.0)
                merge.apply(torch.float32)
                return [merge.states["unet"][f"{name}.{leaf}"] for leaf in ("weight", "bias")]

            before = merged(state)
            for key, tensor in state.items():
                after = merged(state | {key: 1.5 * tensor})
                assert not all(map(torch.equal, before, after)), f"{key} changes nothing"

        yield "LoRA", f"{chosen} for one weight", read


def _pickles(work: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Files of torch.save with sets of tensors in each other, names of wrappers, and tensors of every layout."""
    path = work / "odd.ckpt"
    leaves: dict[str, Callable[[], object]] = {
        "plain": lambda: torch.ones(2, 2),
        "sparse": lambda: torch.ones(2, 2).to_sparse(),
        "compressed": lambda: torch.ones(2, 2).to_sparse_csr(),
        "meta": lambda: torch.ones(2, 2, device="meta"),
        "complex": lambda: torch.ones(2, 2, dtype=torch.complex64),
        "bits": lambda: torch.ones(2, 2, dtype=torch.bool),
        "a parameter": lambda: torch.nn.Parameter(torch.ones(2, 2)),
        "no tensor": lambda: [1, None],
    }
    wrappers = ("", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "unet.")
    for _ in range(60):
        names = [chance.choice(wrappers) + chance.choice(("a.", "b.")) + chance.choice(wrappers) + "weight"]
        names.append(names[0].replace("a.", "b.") if chance.random() < 0.7 else "a.weight")
        kinds = [chance.choice(sorted(leaves)) if chance.random() < 0.4 else "plain" for _ in names]
        content: Any = {name: leaves[kind]() for name, kind in zip(names, kinds)}
        for entry in chance.sample(("state_dict", "model", "ema", "optimizer", "epoch"), chance.randint(0, 2)):
            content = {entry: content, chance.choice(("model_ema", "other", "lr")): chance.choice((content, 3, None))}

        def read(content: Any = content) -> None:
            torch.save(content, path)
            for name, tensor in read_checkpoint(path).state.items():
                assert "_mod" not in name, name
                torch.empty_like(tensor).copy_(tensor)

        yield "checkpoint", f"{names} {kinds} in {list(content)}", read


def _indexes(motion: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Indexes of weights that are split over several files, with other values: they name files beside them alone."""
    index = motion / "diffusion_pytorch_model.safetensors.index.json"
    names = ("../odd.safetensors", "/etc/passwd", "", ".", "..", "a\0b", "x" * 300, "gone.safetensors")
    for value in (*_VALUES, *({"a": name} for name in names), *({"a": value} for value in _VALUES)):

        def read(value: Any = value) -> None:
            motion.mkdir(exist_ok=True)
            index.write_text(json.dumps({"weight_map": value}), encoding="utf-8")
            read_weights(motion)
            raise AssertionError("there are no weights")

        yield "index of weights", f"{value!r:.100}", read


def _motion_modules(
    unet: dict[str, Tensor], work: Path, chance: random.Random
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    motion = {n: t for n, t in unet.items() if ".motion_modules." in n and not (".adapter." in n or ".scaler." in n)}
    path = work / "motion.safetensors"
    for _ in range(80):
        bad = _mutated(motion | {next(iter(motion)).rpartition(".")[0] + ".pos_encoder.pe": _odd(chance)}, chance)

        def read(bad: dict[str, Tensor] = bad) -> None:
            save_file(bad, path)
            read_motion_module(path)

        yield "motion module", f"{sorted(bad)[:3]} …", read


def _files(
    unet: dict[str, Tensor], work: Path, chance: random.Random
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Files that are cut short, or with bytes changed, of each format."""
    state = dict(list(unet.items())[:6])
    save_file(state, work / "a.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, work / "b.ckpt")
    torch.save(state, work / "c.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.ckpt", "c.ckpt"):
        whole = (work / name).read_bytes()
        for i in range(40):
            content = bytearray(whole[: chance.randrange(len(whole))] if i % 2 else whole)
            for _ in range(chance.randint(0, 6)):
                if content:
                    content[chance.randrange(min(len(content), 4000))] = chance.randrange(256)
            path = work / f"bad-{name}"

            def read(path: Path = path, content: bytes = bytes(content)) -> None:
                path.write_bytes(content)
                read_checkpoint(path)

            yield "checkpoint", f"{name}, {len(content)} bytes", read


def _embeddings(work: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    path = work / "embedding.pt"
    for _ in range(40):
        word = chance.choice(("*", "", "clip_l", "clip_g", "emb_params", 7, None))
        value = chance.choice((_odd(chance), torch.ones(2, 32), *_VALUES))
        content = chance.choice(
            ({word: value}, {"string_to_param": {word: value}}, {"string_to_param": value}, [value])
        )

        def read(content: Any = content) -> None:
            torch.save(content, path)
            assert torch.isfinite(read_embedding(path, 32)).all()

        yield "embedding", f"{content!r:.100}", read


def _folders(model: Path, work: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Model folders with a value of a configuration changed, or with tensors dropped, renamed or of another kind."""
    folder = work / "model"
    for i in range(200):
        if i % 4:
            file = chance.choice(sorted(model.rglob("*.json")))
            config = json.loads(file.read_text(encoding="utf-8"))
            name = chance.choice(sorted(config))
            config[name] = chance.choice(_VALUES)
            what, content = f"{file.relative_to(model)}: {name} {config[name]!r:.40}", json.dumps(config)
            if i % 25 == 1:
                what, content = f"{file.relative_to(model)}: nested without end", _DEEP
        else:
            file = chance.choice(sorted(model.rglob("*.safetensors")))
            what, content = f"{file.relative_to(model)}: tensors", ""

        def read(file: Path = file, content: str = content) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
            target = folder / file.relative_to(model)
            if content:
                target.write_text(content, encoding="utf-8")
            else:
                save_file(_mutated(load_file(file), chance), target, {"format": "pt"})
            load_pipeline(folder)

        yield "model folder", what, read
