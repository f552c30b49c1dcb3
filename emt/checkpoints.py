"""Reading of checkpoints of any network: files and their formats, configurations, key checks, allocation."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emt.errors import EmtError, count, first_line
from emt.signatures import LENGTH, kind_of
from emt.storage import check_readable, open_file, sha256_of

State = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# Entries of what training programs save that hold the tensors; the second of textual inversion.
_STATES = ("state_dict", "string_to_param")
# Entries beside the weights that hold tensors, too: averages of them, and the state of training.
_BESIDE = re.compile(r"(^|_)(ema|averaged?|optim\w*|opt|sched\w*|lr|rng\w*)(_|$)", re.IGNORECASE)
# What wrappers of training put into names: torch.compile, FSDP, checkpointed gradients, Lightning Fabric.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
_MOST_LINES = 4  # of keys in a message, which is read in a terminal


@dataclass
class Checkpoint:
    """Tensors of a file by name.

    Args:
        state: the tensors, mapped from disk where the format allows.
        metadata: a safetensors file's own.
        dropped: names of what is beside the tensors and is no tensor.
        scales: by which weights in float8 count, by the weights' names.
    """

    state: State
    metadata: dict[str, str]
    dropped: list[str] = field(default_factory=list)
    scales: State = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Origin of a part of a model, as its model card records it.

    Args:
        kind: of the source, such as "motion module".
        name: path, hf:// address or hub id as given.
        files: (path, sha256) of every file read.
        note: what was taken from it.
        dropped: names in the files that nothing reads.
    """

    kind: str
    name: str
    files: tuple[tuple[str, str], ...]
    note: str
    dropped: tuple[str, ...] = ()


@dataclass
class Origin:
    """A source before its files are hashed."""

    kind: str
    name: str
    files: list[Path]
    note: str
    dropped: list[str] = field(default_factory=list)

    def hashed(self) -> Source:
        """The source, with the sha256 of every file."""
        files = tuple((str(path), sha256_of(path)) for path in self.files)
        return Source(self.kind, self.name, files, self.note, tuple(self.dropped))


def read_config(path: Path) -> tuple[dict[str, Any], Path]:
    """A JSON configuration, and its path.

    Raises:
        EmtError: if it is missing or damaged.
    """
    try:
        with open_file(path) as file:
            config = json.loads(file.read().decode("utf-8-sig"))  # editors on Windows begin a file with a mark
    except FileNotFoundError as error:
        raise EmtError(
            f"{path.parent} has no {path.name}",
            "Give a folder in diffusers layout: unet, vae, text_encoder and tokenizer, each with its configuration.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested thousands deep
        raise EmtError(f"{path} cannot be read: {first_line(error)}", "Download it again.") from error
    if not isinstance(config, dict):
        raise EmtError(f"{path} is not a configuration: it holds a {type(config).__name__}", "Download it again.")
    return config, path


def weights_names(names: Iterable[str]) -> list[str]:
    """The files of weights to read among a folder's of diffusers or transformers; safetensors, full precision first.

    What diffusers calls a variant is taken where nothing else is there: repositories have one alone to save space.

    One file, or an index and the files that the weights are split over; none if there are no weights.
    """
    present = set(names)
    kinds = itertools.product(("safetensors", "bin"), _VARIANTS)
    for suffix, variant in (*kinds, ("ckpt", "")):
        for stem in _WEIGHTS:
            if f"{stem}{variant}.{suffix}" in present:
                return [f"{stem}{variant}.{suffix}"]
            if (index := f"{stem}.{suffix}.index{variant}.json") in present:
                shard = re.compile(rf"{stem}-\d+-of-\d+{re.escape(variant)}\.{suffix}")
                return [index, *sorted(name for name in present if shard.fullmatch(name))]
    return []


def weights_files(path: Path) -> list[Path]:
    """A file of weights, or those of a folder of diffusers or transformers: one, or all that its index lists.

    Raises:
        EmtError: if there are none, one is missing, or the path is one of those that weights are split over.
    """
    if not path.is_dir():
        split = re.search(r"-\d{5}-of-(\d{5})\.", path.name)
        if split and int(split[1]) > 1:
            raise EmtError(
                f"{path} is one of {int(split[1])} files that weights are split over", f"Give the folder: {path.parent}"
            )
        return [path]
    present = {file.name for file in path.glob("*") if file.is_file()}
    names = weights_names(present)
    if not names:
        others = sorted(name for name in present if name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin")))
        raise EmtError(
            f"{path} has no weights: neither {' nor '.join(f'{stem}.safetensors' for stem in _WEIGHTS)} nor a .bin",
            f"Give one of its files{shorten([others])}" if others else "Download the folder again.",
        )
    if not names[0].endswith(".json"):
        return [path / names[0]]
    listed = read_config(path / names[0])[0].get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(_is_plain_name(name) for name in listed.values()):
        raise EmtError(
            f"{path / names[0]} is not an index of weights: its weight_map does not name files beside it",
            "Download it again.",
        )
    if missing := sorted(set(listed.values()) - present):
        raise EmtError(f"{path} lacks what {names[0]} lists{shorten([missing])}", "Download the folder again.")
    return [path / name for name in sorted(set(listed.values()))]


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def read_weights(path: Path, *, scaled: bool = False) -> tuple[Checkpoint, list[Path]]:
    """Read the weights of a file or folder, which may be split over several files; and those files.

    `scaled` is as `read_checkpoint` has it.

    Raises:
        EmtError: if there are none, a file is damaged, or a weight is in two.
    """
    whole, files = Checkpoint({}, {}), weights_files(path)
    for file in files:
        part = read_checkpoint(file, scaled=scaled)
        if twice := sorted(whole.state.keys() & part.state.keys()):
            raise EmtError(f"{file} has weights that another file has{shorten([twice])}", "Download it again.")
        whole.state |= part.state
        whole.metadata |= part.metadata
        whole.dropped += part.dropped
        whole.scales |= part.scales
    return whole, files


@contextmanager
def sizes_of_weights(problem: str, hint: str) -> Iterator[None]:
    """Context manager in which sizes of a network are taken from its weights.

    Raises:
        EmtError: `problem`, for a weight that is missing or has another number of axes.
    """
    try:
        yield
    except KeyError as error:
        raise EmtError(f"{problem}: it has no {error.args[0]}", hint) from error
    except (IndexError, ValueError, TypeError, ArithmeticError, StopIteration) as error:
        raise EmtError(f"{problem}: its weights have other shapes ({first_line(error)})", hint) from error


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise an EmtError if numbers of a configuration are none that a network has: building it might never end."""
    wrong = []
    for name, value in config.items():
        most = 128 if "layers" in name else 10**6
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [x for x in values if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if len(values) > 1000 or any(not -most <= x <= most for x in numbers):
            wrong.append(f"{name} is {value!r:.60}")
    if wrong:
        raise EmtError(f"{where} does not describe a network" + shorten([wrong]), "Download it again.")


class _Inert:
    """Stand-in for a class or function that a pickle names beside its tensors; nothing done to it has an effect."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _InertDict:
    """Stand-in for a class of dictionaries: becomes a plain one, which alone may be filled."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


class _Parameters:
    """Stand-in for torch's dictionary of parameters, of which it keeps the tensors."""

    def __setstate__(self, state: Any) -> None:
        self.tensors = state.get("_parameters") if isinstance(state, dict) else None


# Training code of Stable Diffusion leaves these in its files. None of them is imported, and none is called.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(
        (_Inert, f"{package}.callbacks.{name}")
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
    ),
    (_InertDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_InertDict, "lightning_fabric.utilities.data.AttributeDict"),
    (_InertDict, "lightning.fabric.utilities.data.AttributeDict"),
    *((_Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.ndarray"),
    *(
        (_Inert, f"numpy.dtypes.{name}DType")
        for name in ("Float64", "Float32", "Float16", "Int64", "Int32", "Int16", "Int8", "UInt8", "Bool")
    ),
    (_Inert, "_codecs.encode"),
    (_Parameters, "torch.nn.modules.container.ParameterDict"),
]


def read_checkpoint(path: Path, *, scaled: bool = False) -> Checkpoint:
    """Read the tensors of a .safetensors, .ckpt, .pt or .bin file, mapped from disk where the format allows.

    Tensors under "state_dict", or under the one entry that holds weights, are taken out of it, and what wrappers of
    training put into names, such as `module.` and `_orig_mod.`, is taken out of them.

    Args:
        path: of the file.
        scaled: read weights in float8 that have scales beside them, which are kept apart.

    Raises:
        EmtError: if the file is missing, damaged, unsafe, quantized, or holds no tensors.
    """
    check_readable(path)
    metadata: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            head = file.read(LENGTH)
        if head[8:9] == b"{":
            with safe_open(path, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                content: Any = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        elif head[:2] == b"PK" or head[:1] == b"\x80":
            if head[:2] == b"PK" and (other := _other_archive(path)):
                raise EmtError(f"{path} is {other}", "Give a file of safetensors or torch.save.")
            # Files of before PyTorch 1.6 are bare pickles, which cannot be mapped. Whatever is named .safetensors
            # PyTorch takes for that, unless it is opened already.
            mapped = head[:2] == b"PK" and path.suffix != ".safetensors"
            with torch.serialization.safe_globals(_STAND_INS), nullcontext(path) if mapped else path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        else:
            what = "is empty" if not head else f"is {_format(head)}"
            again = "Download it again; a page or a Git LFS pointer may have been saved instead."
            quantized = "Give the fp16 version of this file, as safetensors."
            raise EmtError(f"{path} {what}", quantized if head.startswith(b"GGUF") else again)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit is None:
            raise EmtError(
                f"{path} is damaged, or was not written by torch.save: it is no pickle of tensors", "Download it again."
            ) from error
        raise EmtError(
            f"{path} is unsafe and was refused: besides tensors it holds {culprit[1]}, and could run code",
            "Give the .safetensors version of this file.",
        ) from error
    except EmtError:
        raise
    except Exception as error:  # damaged bytes fail in any way at all in the parsers of pickles and archives
        raise EmtError(f"{path} is truncated or damaged: {first_line(error)}", "Download it again.") from error
    content, beside = _inner(content)
    content, dropped = _tensors(path, content)
    dropped = [*beside, *dropped]
    state = {re.sub(r"^(?:module\.)+", "", _WRAPPERS.sub("", name)): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        names = sorted(name for name in content if name not in state)
        wrapper = _WRAPPERS.search(names[0])
        raise EmtError(
            f"{path} has keys with and without `{wrapper[0] if wrapper else 'module.'}`: {', '.join(names[:3])}, …",
            "Give a file with one of them.",
        )
    odd = [name for name, x in state.items() if x.layout != torch.strided or x.is_meta or x.is_nested]
    if odd:
        raise EmtError(
            f"{path} holds tensors that are sparse, nested or without values: {', '.join(odd[:3])}",
            "Give a file that was saved with all of its weights in memory.",
        )
    scales = _take_scales(state) if scaled else {}
    marks = [n for n in state if n == "scaled_fp8" or n.endswith((".scale_weight", ".weight_scale", ".comfy_quant"))]
    packed = [n for n in state if n.endswith((".absmax", ".quant_map", ".qweight"))]
    if marks or packed:
        raise EmtError(
            f"{path} is quantized ({len(marks or packed)} keys such as {(marks or packed)[0]}), which is not read",
            "Give the fp16 version of this file.",
        )
    return Checkpoint(state, metadata, dropped, scales)


def _take_scales(state: State) -> dict[str, Tensor]:
    """Scales of weights in float8, by the weights' names, taken out of a state; what is quantized otherwise stays.

    ComfyUI's files have `NAME.scale_weight` or `NAME.weight_scale`, one number or one of each row, by which
    `NAME.weight` counts; scales of inputs and marks beside them say how a GPU multiplies.
    """
    scales: dict[str, Tensor] = {}
    for key in [key for key in state if key.endswith((".scale_weight", ".weight_scale"))]:
        module, scale = key.rpartition(".")[0], state[key]
        weight = state.get(f"{module}.weight")
        if weight is None or weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or not weight.ndim:
            return {}
        if scale.numel() not in (1, len(weight)) or not scale.is_floating_point():
            return {}
        scales[f"{module}.weight"] = scale.float().view(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale
    if not scales or not all(bool(scale.float().isfinite().all()) for scale in scales.values()):
        return {}
    beside = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
    for key in [key for key in state if key == "scaled_fp8" or key.endswith(beside)]:
        del state[key]
    return scales


def _format(head: bytes) -> str:
    """A file's format in words, by its first bytes."""
    if kind := kind_of(head):
        return f"{kind}, which is neither safetensors nor a PyTorch checkpoint"
    return f"neither safetensors nor a PyTorch checkpoint: it begins {head[:24]!r}"


def _other_archive(path: Path) -> str:
    """Zip archive that is none of torch.save, in words; empty for one of it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in names):
        return "a program of TorchScript, which holds code besides weights"
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of arrays of numpy"
    return f"a zip archive of {', '.join(names[:3])}{', …' if len(names) > 3 else ''}, not one of torch.save"


def _inner(content: Any) -> tuple[Any, list[str]]:
    """The dictionary of tensors within what a training program saved, and the names of what is beside it."""
    beside: list[str] = []
    for _ in range(8):  # a pickle can hold itself
        if isinstance(content, _Parameters):
            content = content.tensors
        if not isinstance(content, dict):
            return content, beside
        chosen = [name for name in _STATES if isinstance(content.get(name), (dict, _Parameters))][:1]
        if not chosen and not _any_tensor(content):
            chosen = [name for name, x in content.items() if isinstance(x, dict) and _any_tensor(x)]
            if len(chosen) > 1:
                chosen = [name for name in chosen if not _BESIDE.search(str(name))]
        if len(chosen) != 1:
            break
        beside += [f"{name!s:.80}" for name in content if name != chosen[0]]
        content = content[chosen[0]]
    return content, beside


def _any_tensor(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(x, Tensor) for x in content.values())


def _tensors(path: Path, content: Any) -> tuple[State, list[str]]:
    """Tensors by name, and the names of all else."""
    if not isinstance(content, dict):
        raise EmtError(f"{path} holds no tensors by name but a {type(content).__name__}", "Give a state dict.")
    state = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    others = [f"{name!s:.80}" for name in content if name not in state]
    if not state:
        sets = [f"{name!s:.80}" for name, x in content.items() if isinstance(x, dict) and _any_tensor(x)]
        if sets:
            raise EmtError(
                f"{path} holds several sets of tensors: {', '.join(sets[:8])}", "Give a file that holds one of them."
            )
        what = f"holds what is no tensor: {', '.join(others[:8])}" if others else "holds no tensors"
        raise EmtError(f"{path} {what}", "Give a file that holds the weights by name.")
    return state, others


def check_keys(part: str, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], guess: str = "") -> None:
    """Compare the names and shapes of weights with those of a network.

    Args:
        part: of the network, and the file; for messages.
        given: the weights.
        wanted: shapes by name.
        guess: what the file may be instead, if the caller knows.

    Raises:
        EmtError: if they differ; it counts the keys that do and names the first of each kind.
    """
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    both = sorted(wanted.keys() & given.keys())
    groups = [
        [f"missing: {k} {tuple(wanted[k])}" for k in missing],
        [f"unexpected: {k} {tuple(given[k].shape)}" for k in unexpected],
        [
            f"wrong shape: {k} is {tuple(given[k].shape)}, expected {tuple(wanted[k])}"
            for k in both
            if given[k].shape != wanted[k]
        ],
        [f"no floating point: {k} is {given[k].dtype}" for k in both if not given[k].is_floating_point()],
    ]
    count = sum(map(len, groups))
    if not count:
        return
    if not guess and (prefix := _extra_prefix(missing, unexpected)):
        guess = f"its names begin with `{prefix}`, which is to be taken off"
    because = f": {guess}" if guess else ""
    raise EmtError(
        f"the {part} does not fit this network, {differ(count)}{because}{shorten(groups)}",
        "Give weights of the same architecture.",
    )


def check_varied(part: str, weights: Mapping[str, Tensor], hint: str = "Download it again.") -> None:
    """Raise an EmtError if a weight with several axes has one value throughout, as where a file has a hole.

    Nothing that was trained has, and a clip of such weights is noise or one colour, which nothing else may notice.

    Args:
        part: of the network, and the file; for the message.
        weights: by name, but for those that training starts from zero.
        hint: what to do.
    """
    flat = [
        f"{name} {tuple(x.shape)}: all {x.flatten()[0].item():g}" for name, x in weights.items() if _has_one_value(x)
    ]
    if flat:
        some = count(len(flat), "weight")
        raise EmtError(f"{some} of the {part} have one value throughout, so were never trained{shorten([flat])}", hint)


def _has_one_value(x: Tensor) -> bool:
    if sum(side > 1 for side in x.shape) < 2 or x.is_meta or not x.is_floating_point():
        return False
    if x.element_size() == 1:
        x = x.view(torch.uint8)  # float8 is not compared
    start = x[(0,) * (x.ndim - 1)][:16]  # of most tensors this is all that is looked at
    return bool((start == start[0]).all()) and bool((x == start[0]).all())


def without_zeros(network: nn.Module, weights: Mapping[str, Tensor]) -> State:
    """Weights of a network, by their names in it, without those that training starts from zero.

    They are of its adapter, and the last layer of AnimateDiff's motion modules: with zeros there, it changes nothing.
    """
    learnt = getattr(network, "adapter_parameters", None)
    own = {name for name, _ in learnt()} if learnt is not None else set()
    last = ".temporal_transformer.proj_out."
    return {name: weight for name, weight in weights.items() if name not in own and last not in name}


def differ(count: int) -> str:
    """`1 key differs`, `3 keys differ`."""
    return "1 key differs" if count == 1 else f"{count} keys differ"


def shorten(groups: Sequence[Sequence[str]]) -> str:
    """A colon and lines of a message, indented: the first of each group, more of each, and how many are left out.

    Where a message is shown on one line, the colon is what parts them from what is said before.
    """
    rounds = max(map(len, groups))
    chosen = [(i, g) for i in range(min(rounds, _MOST_LINES)) for g, group in enumerate(groups) if i < len(group)]
    lines = [groups[g][i] for i, g in sorted(chosen[:_MOST_LINES], key=lambda place: place[::-1])]
    left = sum(map(len, groups)) - len(lines)
    return ":" + "".join(f"\n  {line}" for line in [*lines, *([f"… and {left} more"] if left else [])])


def _extra_prefix(missing: Iterable[str], unexpected: Sequence[str]) -> str:
    """The prefix that all unexpected names have before names that are missing; empty if there is none."""
    for name in missing:
        for other in unexpected:
            if other.endswith(f".{name}"):
                prefix = other[: -len(name)]
                return prefix if all(x.startswith(prefix) for x in unexpected) else ""
        break
    return ""


class _WithoutMemory(TorchFunctionMode):
    """Has weights, which layers allocate by `torch.empty`, take no memory and no time to draw; all else is computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]  # for which PyTorch would import its compiler
        if func is torch.empty:
            kwargs = {"device": "meta"} | {name: value for name, value in (kwargs or {}).items() if name != "device"}
        return func(*args, **(kwargs or {}))


def without_memory(build: Callable[[], T]) -> T:
    """Result of `build`, with its weights on the meta device and its computed buffers as they are."""
    with _WithoutMemory():
        return build()


def allocate(build: Callable[[], M], dtype: torch.dtype) -> M:
    """Build a model with parameters allocated in `dtype` but not initialised: drawing gigabytes takes long."""
    model = without_memory(build)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=dtype)))
    return model.eval()


def naming_file(path: Path, check: Callable[[State], State], state: State) -> State:
    """`check(state)`, with the file named in its error."""
    try:
        return check(state)
    except EmtError as error:
        raise EmtError(f"{path}: {error.problem}", error.hint) from error


def check_loaded(parts: Mapping[str, nn.Module], folder: Path, variant: str | None = None) -> None:
    """Ensure that what a library opened has every weight of its files, and the files every weight of it.

    diffusers and transformers open what lacks weights, or names them as another version does, with random ones instead.

    Args:
        parts: opened networks, by the names of their subfolders.
        folder: of the model.
        variant: of the files, such as "fp16"; as it was given to the library.

    Raises:
        EmtError: naming the tensors that are missing, unexpected, or not what the file holds.
    """
    for name, model in parts.items():
        if (folder / name).is_dir():
            _check_part(name, model, folder / name, variant)


def _check_part(name: str, model: nn.Module, folder: Path, variant: str | None) -> None:
    own = {_bare(key): tensor for key, tensor in model.state_dict().items() if not key.endswith(".position_ids")}
    given: State = {}
    for file in opened_files(folder, variant):
        given |= {_bare(key): tensor for key, tensor in read_checkpoint(file).state.items()}
    given = {key: tensor for key, tensor in given.items() if not key.endswith(".position_ids")}
    # Of two names of one weight, such as UMT5's embeddings, files have one.
    stored = {own[key].data_ptr() for key in own.keys() & given.keys()} - {0}
    own = {key: tensor for key, tensor in own.items() if key in given or tensor.data_ptr() not in stored}
    where = f"{name} of the model {folder.parent}"
    check_keys(where, given, {key: tensor.shape for key, tensor in own.items()})
    check_varied(where, without_zeros(model, given))
    wrong = [f"not loaded: {key}" for key in own if not _same_ends(own[key], given[key])]
    if wrong:
        from diffusers import __version__ as diffusers_version
        from transformers import __version__ as transformers_version

        raise EmtError(
            f"the {where} was opened with other weights than its file holds, {differ(len(wrong))}{shorten([wrong])}",
            f"transformers {transformers_version} or diffusers {diffusers_version} reads the file in another way than "
            "the one that wrote it: install a newer version.",
        )


def opened_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of weights that diffusers and transformers open in a folder."""
    inner = f".{variant}" if variant else ""
    if list(folder.glob(f"*.safetensors.index{inner}.json")):
        return sorted(folder.glob(f"*-of-*{inner}.safetensors"))
    files = [folder / f"{stem}{inner}.safetensors" for stem in _WEIGHTS]
    return [file] if (file := next((file for file in files if file.is_file()), None)) else weights_files(folder)


def _bare(name: str) -> str:
    """A text encoder's weight without the prefix that versions of transformers differ in."""
    return name.removeprefix("text_model.")


def _same_ends(own: Tensor, given: Tensor) -> bool:
    """Return whether the first and last numbers of a tensor are those of a file, in the tensor's dtype."""
    if own.is_meta:
        return False
    pairs = [(own.flatten()[:16], given.flatten()[:16]), (own.flatten()[-16:], given.flatten()[-16:])]
    return all(torch.equal(a.cpu().nan_to_num(), b.to(own.dtype).nan_to_num()) for a, b in pairs)
