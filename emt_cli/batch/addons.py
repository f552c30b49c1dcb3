"""Add-ons of a job: LoRAs, a VAE and textual inversions that it lays over its model, and a control network's pictures.

A job names files; what decides its frames is their content, which its identity and its record have.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.hub import OnFetch, locate, matching, parse_hub, split_frame, split_scale, split_word
from emt.remote import child, exists, fetch, fetch_folder, fetched, is_url, normal, shown, stat
from emt.storage import check_readable

if TYPE_CHECKING:
    from emt_cli.batch.options import Settings

_VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_FOLDERS = {
    "lora": matching("adapter_model.*", "adapter_config.json"),
    "vae": matching(*(f"{inside}{name}" for inside in ("", "vae/") for name in _VAE_FILES)),
}
_DETAILS = {"lora": "scale", "embedding": "word", "control": "scale", "control_image": "frame"}
_KINDS = {
    "lora": "LoRA",
    "vae": "VAE",
    "embedding": "embedding",
    "control": "SparseCtrl network",
    "control_image": "control image",
}
_CONTROL = ("control", "control_image")


@dataclass(frozen=True)
class Addon:
    """A file over a model.

    Attributes:
        kind: lora, vae, embedding, control or control_image, the setting that names it.
        path: Where it is on this machine: a file, or a folder of PEFT's or of diffusers.
        sha256: Of its content.
        detail: The scale of a LoRA or of a control network, the word of an embedding, the frame of a picture; None for
            a VAE.
    """

    kind: str
    path: Path
    sha256: str
    detail: float | str | None = None

    @property
    def content(self) -> tuple[str, str, float | str | None]:
        """All of it but where it is."""
        return self.kind, self.sha256, self.detail


@dataclass(frozen=True)
class Addons:
    """The add-ons of a job, in an order that their content decides; hashable.

    Attributes:
        files: All of them.
        clip_skip: Layer of the text encoder that prompts are read from, counted from the last.
    """

    files: tuple[Addon, ...] = ()
    clip_skip: int = 1

    @property
    def weights(self) -> tuple[Addon, ...]:
        """Those that change the weights, or the words, of the model."""
        return tuple(file for file in self.files if file.kind not in _CONTROL)

    @property
    def control(self) -> tuple[Path, float] | None:
        """The control network's file and its scale; None without one."""
        return next(((file.path, float(file.detail or 0)) for file in self.files if file.kind == "control"), None)

    @property
    def pictures(self) -> dict[int, Path]:
        """Files of the pictures that frames are to show, by frame."""
        return {int(file.detail or 0): file.path for file in self.files if file.kind == "control_image"}

    @property
    def loras(self) -> list[tuple[Path, float]]:
        """Files of LoRAs and their scales."""
        return [(file.path, float(file.detail or 0)) for file in self.files if file.kind == "lora"]

    @property
    def vae(self) -> Path | None:
        """The VAE's file or folder; None for the model's own."""
        return next((file.path for file in self.files if file.kind == "vae"), None)

    @property
    def embeddings(self) -> dict[str, Path]:
        """Files of textual inversions by their words."""
        return {str(file.detail): file.path for file in self.files if file.kind == "embedding"}

    @property
    def changes_networks(self) -> bool:
        """True if the network or the VAE has other weights."""
        return any(file.kind != "embedding" for file in self.weights)

    def identity(self) -> dict[str, Any]:
        """Part of a job's identity in the place of the settings that name files."""
        found: dict[str, list[Any]] = {}
        for file in self.files:
            found.setdefault(file.kind, []).append([file.sha256, file.detail])
        return found

    def of_motion(self) -> list[Any]:
        """The part on which the reading of a reference depends, with the empty prompt; empty if nothing."""
        found: list[Any] = [file.content for file in self.weights if file.kind != "embedding"]
        return [*found, self.clip_skip] if found or self.clip_skip != 1 else []

    def record(self) -> dict[str, Any]:
        """The field of a record that says which contents were laid over the model; none without any."""
        listed = [{"kind": f.kind, "sha256": f.sha256, "file": f.path.name, **_detail(f)} for f in self.files]
        return {"addons": listed} if listed else {}

    def check_unchanged(self, index: ContentIndex) -> None:
        """Raise EmtError if a file is another than the one that its hash was taken of.

        Raises:
            EmtError: it is.
        """
        for file in self.files:
            if index.sha256(file.path) != file.sha256:
                raise EmtError(f"the {_KINDS[file.kind]} {file.path} changed while it was in use", "Run again.")


def _detail(file: Addon) -> dict[str, Any]:
    return {_DETAILS[file.kind]: file.detail} if file.kind in _DETAILS else {}


NONE = Addons()


class AddonFinder:
    """Finds the files of jobs and their hashes; fetches those of the hub. Threads may share it; needs no torch.

    Args:
        index: Content hashes.
        download: Fetch what the hub's cache lacks.
        say: Called with a line for each file that is fetched.
    """

    def __init__(
        self,
        index: ContentIndex,
        *,
        download: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.index, self._download, self._say = index, download, say
        self._guard = threading.Lock()
        self._places: dict[tuple[str, str], Path] = {}  # of what was fetched, which is looked for once

    def find(self, settings: Settings) -> Addons:
        """The add-ons that settings name.

        Raises:
            EmtError: a file is not there, or cannot be read or fetched; two embeddings have one word.
        """
        if not any(sources_of(settings).values()):
            return NONE if settings.clip_skip == 1 else Addons(clip_skip=settings.clip_skip)
        found = [self._file("lora", *split_scale(text)) for text in settings.lora]
        found += [self._file("vae", settings.vae)] if settings.vae else []
        found += [self._file("control", *split_scale(settings.control))] if settings.control else []
        found += [self._file("control_image", *split_frame(text)) for text in settings.control_image]
        words = [split_word(text) for text in settings.embedding]
        twice = [word for word, _ in words if sum(word == other for other, _ in words) > 1]
        if twice:
            raise EmtError(f"two embeddings have the word {twice[0]}", "Give each a word of its own.")
        found += [self._file("embedding", source, word) for word, source in words]
        return Addons(tuple(sorted(found, key=lambda file: str(file.content))), settings.clip_skip)

    def _file(self, kind: str, source: str, detail: float | str | None = None, *, download: bool = False) -> Addon:
        with self._guard:
            path = self._places.get((kind, source))
            if path is None:
                path = self._locate(kind, source, download=download or self._download)
                if parse_hub(source) or is_url(source):
                    self._places[kind, source] = path
        return Addon(kind, path, self.index.sha256(path), detail)

    def _locate(self, kind: str, source: str, *, download: bool) -> Path:
        said: set[str] = set()

        def on_fetch(name: str, done: int, total: int) -> None:
            if name not in said:
                said.add(name)
                self._say(f"fetching {name} of {named(source)}")

        name = _KINDS[kind]
        if is_url(source) and parse_hub(source) is None:
            path = self._behind_url(kind, normal(source), on_fetch, download)
        else:
            path = locate(source, name, _FOLDERS.get(kind), on_fetch=on_fetch, download=download)
        if kind == "vae" and (path / "vae").is_dir():
            path = path / "vae"
        if path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").is_file():
            path = path.parent  # what scales it is beside it
        check_readable(path)
        return path

    def _behind_url(self, kind: str, url: str, on_fetch: OnFetch, download: bool) -> Path:
        """The copy of a file or folder in a store; with a file of PEFT's, what scales it, too."""
        folder, choose = url, _FOLDERS.get(kind)
        parent, _, file = url.rpartition("/")
        if kind == "lora" and file.startswith("adapter_model.") and "?" not in file:
            folder, choose = parent, matching(file, "adapter_config.json")
        if not download:
            copy = fetched(folder, kind) or fetched(url)
            if copy is None:
                raise EmtError(f"the {_KINDS[kind]} {shown(url)} is not on this machine", "emt transfer fetches it.")
            return copy
        if choose and (exists(child(parent, "adapter_config.json")) if folder != url else stat(url).is_folder):
            return fetch_folder(folder, choose, on_fetch, part=kind)
        return fetch(url, on_fetch)

    def find_again(self, record: Mapping[str, Any], settings: Settings, given: Sequence[Path] = ()) -> Addons:
        """The add-ons that made a clip, by their hashes.

        Args:
            record: Of the clip.
            settings: Its settings, which say where the files were.
            given: Files that have moved; they are fetched if need be.

        Raises:
            EmtError: one is not there any more, or its content is another.
        """
        places = sources_of(settings)
        found, unread, unused = [], list[EmtError](), [str(path) for path in given]
        for listed in record.get("addons", ()):
            kind, detail = listed["kind"], listed.get(_DETAILS.get(listed["kind"], ""))
            sources = [(str(path), True) for path in given] + [(text, False) for text in places[kind]]
            for source, asked in sources:
                try:
                    file = self._file(kind, source, detail, download=asked)
                except EmtError as error:
                    unread += [error] if asked else []
                    continue
                if file.sha256 == listed["sha256"]:
                    found.append(file)
                    unused = [path for path in unused if path != source]
                    break
            else:
                if unread:
                    raise unread[0]
                urls = [text for text in places[kind] if is_url(text)]
                raise EmtError(
                    f"the {_KINDS[kind]} {listed.get('file', '')} that made it is not where it was, or is another now",
                    f"To fetch it: --addon {shlex.quote(urls[0])}" if urls else "Say where it is with --addon FILE.",
                )
        if len(found) != sum(map(len, places.values())):
            raise EmtError("the record does not say which LoRAs, VAE and other files made it", "Make the clip anew.")
        if unused:
            hint = "Leave it out; emt transfer makes clips with other files."
            raise EmtError(f"{unused[0]} is none of the files that made it", hint)
        return Addons(tuple(sorted(found, key=lambda file: str(file.content))), settings.clip_skip)


def named(source: str) -> str:
    """A file as messages and records have it: a URL without secrets."""
    return shown(normal(source)) if is_url(source) and parse_hub(source) is None else source


def sources_of(settings: Settings) -> dict[str, list[str]]:
    """Files that settings name, by kind."""
    return {
        "lora": [split_scale(text)[0] for text in settings.lora],
        "vae": [settings.vae] if settings.vae else [],
        "embedding": [split_word(text)[1] for text in settings.embedding],
        "control": [split_scale(settings.control)[0]] if settings.control else [],
        "control_image": [split_frame(text)[0] for text in settings.control_image],
    }


def settings_of(addons: Addons) -> dict[str, Any]:
    """The settings that name the files of add-ons where they are."""
    return {
        "lora": tuple(f"{file.path}:{file.detail!r}" for file in addons.files if file.kind == "lora"),
        "vae": None if addons.vae is None else str(addons.vae),
        "embedding": tuple(f"{file.detail}={file.path}" for file in addons.files if file.kind == "embedding"),
        "control": None if addons.control is None else f"{addons.control[0]}:{addons.control[1]!r}",
        "control_image": tuple(f"{path}@{frame}" for frame, path in addons.pictures.items()),
    }
