"""Model folders from outside: where one is, what is missing, its defaults, its hash, its vocabulary and its size.

They are written here as well: under their names they appear whole or not at all. Nothing here imports torch, so that
a plan over thousands of jobs is there at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from emt import demo
from emt.backbone import BACKBONES, LARGE_TEXT_ENCODERS, SWITCHING, Facts, facts_of
from emt.cache import ContentIndex
from emt.errors import EmtError, first_line
from emt.hub import OnFetch, split_frame
from emt.prompt_syntax import PLAIN, WEBUI, parse_schedule, reading_of, words_of
from emt.remote import fetch_folder, fetched, is_url, normal, shown, to_path
from emt.storage import apply_umask, open_file, replace_folder, sync, sync_tree, try_lock
from emt.vocabulary import Vocabulary

_IMPORT = "Make one with `emt import-weights --base … --motion-module … --adapter … -o FOLDER`."
_HOW_TO_GET = f"Leave --model out for the small model, or name a model folder with `--model FOLDER`. {_IMPORT}"
_CONTENT = (".safetensors", ".json", ".txt", ".model")

#: Settings that a model may set for itself in `model_index.json`, and the published ones.
DEFAULTS: Mapping[str, Any] = {
    "frames": 16,
    "height": 512,
    "width": 512,
    "steps": 25,
    "guidance": 6.0,
    "scheduler": "ddim",
}
#: Names of settings in `model_index.json` that differ: its "scheduler" is a part of the model.
_LISTED = {"scheduler": "sampler"}
#: Settings that lay files over a model, or read its text encoder in another way.
_OVER = ("lora", "vae", "embedding", "control", "control_image", "clip_skip")
#: Value of "adapter" in the `model_index.json` of a model without a trained one.
UNTRAINED = "none"
_LCM_STEPS = 50  # of the distillation, `original_inference_steps` of its scheduler


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        name: What the user called it.
        folder: Where it is.
        defaults: Values of `DEFAULTS`: its own as its `model_index.json` has them, unchecked, else the published ones;
            and the method of a model without a trained adapter.
    """

    name: str
    folder: Path
    defaults: Mapping[str, Any]

    def sha256(self, index: ContentIndex) -> str:
        """Hash over the names and contents of its weights, configurations and vocabulary."""
        files = sorted(path for path in _files(self.folder) if path.suffix in _CONTENT)
        listing = [(path.relative_to(self.folder).as_posix(), index.sha256(path)) for path in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, from the headers of the weight files."""
        return {
            folder.name: sum(_parameters(file) for file in folder.glob("*.safetensors"))
            for folder in self.folder.iterdir()
            if folder.is_dir()
        }

    @cached_property
    def network(self) -> str:
        """Name of the network's class, one of `emt.backbone.BACKBONES`.

        Raises:
            EmtError: the network is of no known kind.
        """
        listed = _read_json(self.folder / "model_index.json").get("unet")
        name = listed[-1] if isinstance(listed, list) and listed else None
        if not isinstance(name, str) or name not in BACKBONES:
            known = ", ".join(BACKBONES)
            raise EmtError(f"the network of {self.name} is {name!r:.100}, known are: {known}", _HOW_TO_GET)
        return name

    @cached_property
    def facts(self) -> Facts:
        """Limits and costs of the network.

        Raises:
            EmtError: the network is of no known kind, or its configuration makes no sense.
        """
        path = self.folder / "unet" / "config.json"
        try:
            return facts_of(self.network, _read_json(path))
        except ValueError as error:
            raise EmtError(f"{error} in {path}", _HOW_TO_GET) from None

    def frames_at_once(self, frames: int) -> int:
        """Frames that the network is given at once for a clip: all, or a window of the model's own number of frames."""
        if self.facts.takes_frames(frames):
            return frames
        return min(self.defaults["frames"], self.facts.max_frames)

    @property
    def size_multiple(self) -> int:
        """Height and width of its clips are multiples of this, in pixels: of eight for each latent."""
        return 8 * self.facts.grid_step

    @cached_property
    def encodes_prompts_apart(self) -> bool:
        """True if its text encoder is too large to be open beside the network."""
        listed = _read_json(self.folder / "model_index.json").get("text_encoder")
        return isinstance(listed, list) and bool(listed) and listed[-1] in LARGE_TEXT_ENCODERS

    @cached_property
    def text_layers(self) -> int:
        """Number of layers of its text encoder; 1 if its configuration does not say."""
        layers = _read_json(self.folder / "text_encoder" / "config.json").get("num_hidden_layers")
        return layers if isinstance(layers, int) else 1

    @cached_property
    def reads_syntax(self) -> bool:
        """True if its prompts may have weights, breaks, chunks and key frames."""
        return self.network in SWITCHING

    def reading(self, prompt: str, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """The way in which a clip's prompts are read, where not by the letter (`emt.prompt_syntax.reading_of`).

        Raises:
            EmtError: a prompt has no sense.
        """
        syntax = settings.get("prompt_syntax", WEBUI) if self.reads_syntax else PLAIN
        return self._readings(prompt, settings["negative_prompt"], syntax, bool(settings.get("embedding")))

    @cached_property
    def _readings(self) -> Callable[[str, str, str, bool], tuple[Any, ...]]:
        """`reading` by what it depends on: jobs of many references and seeds share a few prompts."""

        @lru_cache(maxsize=4096)
        def read(prompt: str, negative_prompt: str, syntax: str, has_embeddings: bool) -> tuple[Any, ...]:
            # How many vectors the words of embeddings stand for, their files say.
            count = None if has_embeddings else self._tokenize
            return reading_of((prompt, negative_prompt), syntax, self._chunk_size, count)

        return read

    @cached_property
    def _chunk_size(self) -> int:
        """Tokens of a prompt that its text encoder reads at once, without the first and the last."""
        limits = [
            _read_json(self.folder / "tokenizer" / "tokenizer_config.json").get("model_max_length"),
            _read_json(self.folder / "text_encoder" / "config.json").get("max_position_embeddings"),
        ]
        return int(min([limit for limit in limits if isinstance(limit, int | float)], default=77)) - 2

    @cached_property
    def _tokenize(self) -> Callable[[str], Sequence[int]] | None:
        """Ids of the tokens of a text; None if its tokenizer is in an older format."""
        path = self.folder / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            return None
        found: list[Any] = []

        def tokenize(text: str) -> Sequence[int]:
            if not found:  # most prompts are so short that they need not be counted
                from tokenizers import Tokenizer

                try:
                    found.append(Tokenizer.from_file(str(path)))
                except Exception as error:  # tokenizers raises nothing narrower
                    raise EmtError(f"{path} is damaged", first_line(error)) from None
                found[0].no_truncation()
                found[0].no_padding()
            ids: list[int] = found[0].encode(text, add_special_tokens=False).ids
            return ids

        return tokenize

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words that it knows; None if it reads any."""
        return Vocabulary.read(self.folder)

    def introduction(self) -> str:
        """One line for a user who has not chosen the model: the clips that it makes and the words that it knows."""
        frames, width, height = (self.defaults[name] for name in ("frames", "width", "height"))
        known = f" that show {self.vocabulary.count()} (emt doctor lists them)" if self.vocabulary else ""
        return (
            f"model: {self.name}, a small one: clips of {frames} frames of {width}x{height}{known}. "
            "For all else give --model one of Stable Diffusion 1.5: see emt import-weights --help"
        )

    @cached_property
    def has_adapter(self) -> bool:
        """False if its adapter is as an import without one leaves it: not trained."""
        return _read_json(self.folder / "model_index.json").get("adapter") != UNTRAINED

    def check(self, prompt: str, settings: Mapping[str, Any]) -> None:
        """Raise EmtError unless the model can make a clip of a prompt.

        Args:
            prompt: The prompt.
            settings: Of the clip, as plain values; not all of them are read.
        """
        given = [f"--{name.replace('_', '-')}" for name in _OVER if settings.get(name)]
        if given and self.network not in SWITCHING:
            hint = "Leave it out; a LoRA is merged by emt import-weights --lora."
            raise EmtError(f"{' and '.join(given)}: not with {self.name}, which is no Stable Diffusion 1.5", hint)
        if (skip := settings.get("clip_skip", 1)) > self.text_layers:
            layers = "1 layer" if self.text_layers == 1 else f"{self.text_layers} layers"
            raise EmtError(f"clip_skip is {skip}", f"The text encoder of {self.name} has {layers}.")
        read = self.reads_syntax and settings.get("prompt_syntax", WEBUI) == WEBUI
        for text in (prompt, settings["negative_prompt"]):
            if read and (keys := parse_schedule(text)):
                self._check_key_frames(keys, settings)
            if self.vocabulary is not None:
                words = [text.partition("=")[0] for text in settings.get("embedding", ())]
                self.vocabulary.check(words_of(text) if read else text, own=words)
        self._check_method(settings)
        self._check_control(settings)
        frames, steps = settings["frames"], settings["steps"]
        if not self.facts.makes_frames(frames):
            allowed = self.facts.allowed_clips()
            raise EmtError(f"frames is {frames}", f"The model {self.name} makes clips of {allowed} frames.")
        self.check_size(settings["width"], settings["height"])
        if (name := settings["scheduler"]) in ("lcm", "tcd") and steps > _LCM_STEPS:
            raise EmtError(f"steps is {steps}", f"The scheduler {name} takes at most {_LCM_STEPS}; 4 to 8 are usual.")

    def check_size(self, width: int, height: int) -> None:
        """Raise EmtError unless the model makes clips of this size."""
        multiple = self.size_multiple
        for name, side in (("height", height), ("width", width)):
            if side % multiple:
                near = max(multiple, round(side / multiple) * multiple)
                allowed = f"The model {self.name} makes clips of multiples of {multiple}: --{name} {near}"
                raise EmtError(f"{name} is {side}", allowed)

    def _check_key_frames(self, keys: Mapping[int, str], settings: Mapping[str, Any]) -> None:
        if (last := max(keys)) >= settings["frames"]:
            raise EmtError(f"the prompt has frame {last}", f"The clip has frames 0 to {settings['frames'] - 1}.")
        if settings.get("method") == "guidance":
            raise EmtError("method guidance takes one prompt for all frames", "Give one, or use --method adapter.")

    def _check_control(self, settings: Mapping[str, Any]) -> None:
        control, pictures, frames = settings.get("control"), settings.get("control_image") or (), settings["frames"]
        if not control and not pictures:
            return
        if not (control and pictures):
            given, lacks = ("control", "control-image") if control else ("control-image", "control")
            raise EmtError(f"--{given} is given without --{lacks}", "A control network reads pictures: give both.")
        at = [split_frame(text)[1] for text in pictures]
        if max(at) >= frames:
            raise EmtError(f"a control image is of frame {max(at)}", f"The clip has frames 0 to {frames - 1}.")
        if twice := [frame for frame in at if at.count(frame) > 1]:
            raise EmtError(f"two control images are of frame {twice[0]}", "Give each a frame: --control-image FILE@15")
        if settings.get("method") == "guidance":
            raise EmtError("method guidance takes no control network", "Use --method adapter, or leave --control out.")
        if not self.facts.takes_frames(frames) and self.facts.makes_frames(frames):
            problem = f"frames is {frames} with a control network, which takes no windows of a long clip"
            raise EmtError(problem, f"Use {self.facts.allowed_frames()} frames.")
        if (interval := settings["cache_interval"]) > 1:
            problem = f"cache_interval is {interval} with a control network, which adds to all layers in each step"
            raise EmtError(problem, "Use --cache-interval 1.")

    def _check_method(self, settings: Mapping[str, Any]) -> None:
        if settings.get("method", "adapter") == "adapter":
            if not self.has_adapter:
                problem = f"the model {self.name} has no trained adapter: it was imported without one"
                raise EmtError(problem, "Use --method guidance, or train one: emt train --help")
        elif not self.facts.motion_guidance:
            problem = f"the model {self.name} cannot be guided: the attention over time that it would need is not read"
            raise EmtError(problem, "Use --method adapter, or a model of Stable Diffusion 1.5 with motion modules.")
        elif not self.facts.takes_frames(settings["frames"]) and self.facts.makes_frames(settings["frames"]):
            problem = f"frames is {settings['frames']} with method guidance, which takes no windows of a long clip"
            raise EmtError(problem, f"Use {self.facts.allowed_frames()} frames, or --method adapter.")
        elif settings["cache_interval"] > 1:
            problem = (
                f"cache_interval is {settings['cache_interval']} with method guidance, which computes all in each step"
            )
            raise EmtError(problem, "Use --cache-interval 1.")


def find_model(name: str | None, *, download: bool, on_fetch: OnFetch | None = None) -> Model:
    """The model of `--model`: a folder, its URL, a hub id, or one that ships (`emt.demo`).

    Args:
        name: What the user gave; None is `demo`. A folder of such a name is `./demo`.
        download: Fetch a model of the hub or of a URL that is not on this machine yet; of a URL, what has changed, too.
        on_fetch: Called with the progress of a URL's files.

    Raises:
        EmtError: there is no such model, or files of it are missing.
    """
    name = name or demo.NAME
    if is_url(name):
        folder, name = _fetch(normal(name), download, on_fetch), shown(normal(name))
    else:
        folder = demo.path(name) if name in demo.NAMES else _locate(name, download)
    listed = _read_json(folder / "model_index.json")
    for _ in _files(folder):  # all are what can be opened
        pass
    missing = []
    for part, kind in listed.items():
        if part.startswith("_") or not isinstance(kind, list) or not all(kind):
            continue
        weights = part in ("unet", "vae", "text_encoder")
        if not (folder / part).is_dir() or (weights and not any((folder / part).glob("*.safetensors"))):
            missing.append(f"{part}/*.safetensors" if weights else f"{part}/")
        elif weights and not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        missing += _missing_shards(folder / part)
    if missing or "unet" not in listed:
        raise EmtError(f"the model {name} lacks {', '.join(missing) or 'a unet'} (in {folder})", _HOW_TO_GET)
    defaults = {name: listed.get(_LISTED.get(name, name), value) for name, value in DEFAULTS.items()}
    for setting in ("frames", "height", "width", "steps"):
        if type(defaults[setting]) is not int or defaults[setting] < 1:
            raise EmtError(
                f"the model's defaults: {setting} is {defaults[setting]!r:.100}",
                f"A whole number is needed. It is in {folder / 'model_index.json'}.",
            )
    if listed.get("adapter") == UNTRAINED:
        defaults["method"] = "guidance"
    return Model(name, folder, defaults)


def _fetch(url: str, download: bool, on_fetch: OnFetch | None) -> Path:
    """The copy of the model folder behind a URL."""

    def content(names: list[str]) -> list[str]:
        return [name for name in names if Path(name).suffix in _CONTENT]

    folder = fetch_folder(url, content, on_fetch) if download else fetched(url)
    if folder is None:
        raise EmtError(
            f"the model {shown(url)} is not on this machine yet", "`emt transfer` with the same --model downloads it."
        )
    if not (folder / "model_index.json").is_file():
        raise EmtError(f"{shown(url)} is not a model folder: it has no model_index.json", _HOW_TO_GET)
    return folder


def _locate(name: str, download: bool) -> Path:
    folder = to_path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise EmtError(f"{name} is not a model folder: it has no model_index.json", _HOW_TO_GET)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise EmtError(f"there is no model folder {name}", _HOW_TO_GET)
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in _CONTENT]
        return Path(huggingface_hub.snapshot_download(name, local_files_only=not download, allow_patterns=patterns))
    except Exception as error:  # network, authentication and cache errors have no common base
        reason = first_line(error) if download else "it is not on this machine yet"
        raise EmtError(f"there is no folder {name}, and no such model from the hub: {reason}", _HOW_TO_GET) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file:
            value = json.loads(file.read())
    except OSError as error:
        raise EmtError(f"cannot read {path}: {error.strerror}", _HOW_TO_GET) from None
    except (ValueError, RecursionError):
        raise EmtError(f"{path} is not JSON", _HOW_TO_GET) from None
    if not isinstance(value, dict):
        raise EmtError(f"{path} is not a JSON object", _HOW_TO_GET)
    return value


def _files(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """All files in a folder and its folders; links to files and folders are followed, as opening a model does.

    Raises:
        EmtError: something there is neither: whatever opens it may wait for ever.
    """
    status = folder.stat()
    above |= {(status.st_dev, status.st_ino)}
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir():
            own = path.stat()
            if (own.st_dev, own.st_ino) not in above:  # a link to a folder that it is in leads nowhere else
                yield from _files(path, above)
        elif path.exists():
            raise EmtError(f"{path} is a pipe, socket or device, not a file", _HOW_TO_GET)


def _missing_shards(part: Path) -> list[str]:
    """Files that the indices of a part's weights name and that are not beside them."""
    missing = []
    for index in part.glob("*.safetensors.index.json"):
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise EmtError(f"{index} names no weights", _HOW_TO_GET)
        for name in sorted({str(shard) for shard in shards.values()}):
            if Path(name).name != name or not (part / name).is_file():
                missing.append(f"{part.name}/{name}")
    return missing


def _parameters(path: Path) -> int:
    """Parameters in a safetensors file, from its header."""
    try:
        with open_file(path) as file:
            length, most = struct.unpack("<Q", file.read(8))[0], os.fstat(file.fileno()).st_size
            if length > most:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
        total = sum(math.prod(shape) for shape in shapes)
        if type(total) is not int or total < 0:
            raise ValueError("a shape is no list of numbers")
        return total
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error, MemoryError):
        raise EmtError(f"{path} is damaged", _HOW_TO_GET) from None


# ---- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(output: Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """Context manager: a folder to write into, renamed to `output` once it is complete and on disk.

    Raises:
        EmtError: if `output` exists and may not be replaced, if another process is writing it, or if writing fails.
    """
    output = output.resolve()
    in_use = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if in_use and not overwrite:
        raise EmtError(f"{output} exists", "Give another -o FOLDER, or --overwrite to replace it.")
    if in_use and not (output / "model_index.json").is_file():
        raise EmtError(f"{output} is not a model folder and is not replaced", "Give another -o FOLDER.")
    inside = [
        str(x) for x in inputs if x is not None and Path(x).exists() and output in [p := Path(x).resolve(), *p.parents]
    ]
    if in_use and inside:
        raise EmtError(f"{output} holds what is imported: {', '.join(inside)}", "Give another -o FOLDER.")
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        # The lock goes with the process that holds it: what a killed import left is distinguishable from one at work.
        lock = try_lock(output.with_name(f".{output.name}.lock"))
        if lock is None:
            raise EmtError(f"{output} is being written by another import", "Wait for it to end.")
        try:
            try:
                _empty(partial)
                yield partial
                apply_umask(partial)
                sync_tree(partial)
                if in_use:
                    replace_folder(partial, output)
                else:
                    partial.rename(output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(output.parent)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise EmtError(
            f"{output} cannot be written: {first_line(error)}", "Check the free space and permissions."
        ) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def model_card(title: str, text: str) -> str:
    """The README.md of a model folder, with the front matter that model hubs read."""
    return (
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags:\n- motion-transfer\n---\n\n"
        f"# {title}\n\n{text}\n\n"
        "```python\nfrom emt.pipeline import MotionTransferPipeline\n\n"
        'pipe = MotionTransferPipeline.from_pretrained("this folder or its hub id")\n```\n'
    )
