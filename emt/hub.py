"""Sources that a user names: a path, `hf://owner/name/file`, `hf://owner/name` or, for folders, a bare hub id.

What is fetched stays in huggingface_hub's cache, from which it is read where there is no network.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from emt.errors import EmtError, first_line
from emt.storage import check_readable

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

OnFetch = Callable[[str, int, int], None]
"""Called while a file is fetched with its name, the bytes that are here and all its bytes (0: not known)."""

Choose = Callable[[Sequence[str]], list[str]]
"""Names the files to fetch among those of a folder, relative to it; none if it is no such folder."""

_HUB = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(?!/)(.*))?")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def split_scale(value: str, option: str = "lora") -> tuple[str, float]:
    """`FILE` or `FILE:SCALE` → path or address, and scale, 1 unless given.

    The colon of a drive (`C:\\x.safetensors`), of an address (`hf://…`, `https://host:8080/…`) and of a file whose name
    has one begins no scale.

    Raises:
        EmtError: if the scale is no finite number, or there is no file.
    """
    path, colon, scale = value.rpartition(":")
    if not colon or re.search(r"[/\\]", scale) or os.path.exists(value):
        return value, 1.0
    try:
        number = float(scale)
    except ValueError:
        if "://" in path and "?" in path:  # a time in the parameters of a signed URL
            return value, 1.0
        number = math.nan
    hint = f"Write --{option} FILE or --{option} FILE:0.8."
    if not path.strip():
        raise EmtError(f"--{option} {value}: no file is named", hint)
    if not math.isfinite(number):
        raise EmtError(f"--{option} {value}: the scale {scale!r} is not a number", hint)
    return path, number


def split_frame(value: str) -> tuple[str, int]:
    """`FILE` or `FILE@FRAME` → path or address, and the number of a frame, 0 unless given.

    Raises:
        EmtError: if the frame is no whole number from 0, or there is no file.
    """
    path, at, frame = value.rpartition("@")
    if not at or re.search(r"[/\\]", frame) or os.path.exists(value):
        return value, 0
    hint = "Write --control-image FILE or --control-image FILE@15; frames count from 0."
    if not path.strip():
        raise EmtError(f"--control-image {value}: no file is named", hint)
    if not (frame.isascii() and frame.isdecimal() and len(frame) < 8):
        raise EmtError(f"--control-image {value}: the frame {frame!r} is no number of a frame", hint)
    return path, int(frame)


def parse_lora(value: str) -> tuple[Path, float]:
    """`split_scale`, with a path.

    Raises:
        EmtError: if the scale is no finite number.
    """
    path, scale = split_scale(value)
    return Path(path), scale


def split_word(value: str) -> tuple[str, str]:
    """`NAME=FILE` → a word of prompts and the path or address of its embedding.

    Raises:
        EmtError: if the name is none, or is no single word.
    """
    name, equals, path = value.partition("=")
    if not equals or not path or not re.fullmatch(r"[^\s,=]+", name):
        raise EmtError(
            f"--embedding {value}: not a word and a file",
            "Write --embedding NAME=FILE, with a NAME without spaces, and use it in prompts.",
        )
    return name, path


def matching(*patterns: str) -> Choose:
    """Chooses the files of a folder whose names match shell patterns."""
    return lambda names: [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class HubPath:
    """A place on a model hub.

    Args:
        repo: owner/name.
        path: of a file or folder in it; empty for all of it.
        revision: branch, tag or commit; None for the main branch.
    """

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")


def parse_hub(given: str | Path) -> HubPath | None:
    """The place that `hf://owner/name[@revision][/path]` names; None for what does not begin with hf://.

    Raises:
        EmtError: if what follows is no such address.
    """
    text = str(given)
    if not text.startswith("hf:/"):
        return None
    match = _HUB.fullmatch(re.sub(r"^hf:/+", "hf://", text))  # a Path has one slash
    parts = PurePosixPath(match[3] or "").parts if match else ()
    if match is None or ".." in parts or "." in match[1].split("/") or ".." in match[1].split("/"):
        raise EmtError(
            f"{text} is no address on the hub",
            "Write hf://owner/name, hf://owner/name/file or hf://owner/name@branch/file.",
        )
    return HubPath(match[1], "/".join(parts), match[2])


def locate(
    given: str | Path,
    kind: str,
    folder: Choose | None = None,
    *,
    hint: str = "",
    on_fetch: OnFetch | None = None,
    download: bool = True,
) -> Path:
    """The path of a file or folder that is given by path, by `hf://` address or by hub id; fetched if need be.

    Args:
        given: as the user wrote it. A bare hub id is allowed where a folder is.
        kind: of the source, such as "motion module"; for messages.
        folder: chooses the files of a folder; None where a single file is meant. A repository that is no such folder
            must hold a single file of weights; so may a folder here, whose path is returned if it does not.
        hint: of messages, where another than the usual one helps.
        on_fetch: Called with the progress.
        download: Fetch what the hub's cache lacks.

    Raises:
        EmtError: if there is nothing of the name, or it cannot be fetched.
    """
    place = parse_hub(given)
    if place is None:
        path = Path(given)
        if not _is_missing(path):
            check_readable(path)
            return _only_file(path, folder) if path.is_dir() else path
        expect_there(given, kind, folder is not None, hint)
        place = HubPath(str(given))
    try:
        return _fetch(place, kind, folder, on_fetch, download)
    except EmtError:
        raise
    except Exception as error:  # of network, authentication, cache and disk, which have no common base
        where = f"{given} is no path here and" if not str(given).startswith("hf:") else f"{given}"
        raise EmtError(
            f"the {kind} {where} cannot be fetched from the hub: {_reason(error)}",
            hint or f"Check the name and the network, or give what `hf download {place.repo}` fetched elsewhere.",
        ) from error


def expect_there(given: str | Path, kind: str, folder: bool, hint: str = "") -> None:
    """Raise EmtError if a source is a path of nothing; an address, or a hub id where a folder is allowed, may be right.

    Args:
        given: as the user wrote it.
        kind: of the source; for the message.
        folder: whether it may be a folder.
        hint: of the message, where another than the usual one helps.
    """
    path = Path(given)
    if parse_hub(given) is not None or not _is_missing(path):
        return
    if not folder or path.suffix in CHECKPOINT_SUFFIXES or not _ID.fullmatch(str(given)):
        allowed = "a folder, a hub id such as owner/name, or a file" if folder else "a file"
        raise EmtError(
            f"the {kind} {given} does not exist", hint or f"Give {allowed}, or hf://owner/name/file from the hub."
        )


def _is_missing(path: Path) -> bool:
    """Return whether there is nothing of the name; False for what cannot be looked at, such as a name too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _fetch(place: HubPath, kind: str, choose: Choose | None, on_fetch: OnFetch | None, download: bool) -> Path:
    """The path in the cache of a file, or of a folder with the chosen files."""
    # The list is requested first: without a network it fails at once, where a file would be tried for half a minute.
    names, online = _list(place) if download else (_cached(place), False)
    if not names:
        raise EmtError(f"the {kind} {place} is not on this machine", "emt transfer fetches it.")
    if PurePosixPath(place.path).suffix in CHECKPOINT_SUFFIXES:
        return _fetch_file(place, place.path, on_fetch, online=online)
    inside = f"{place.path}/" if place.path else ""
    names = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    if not names:
        raise EmtError(f"the {kind} {place} does not exist: {place.repo} has no {place.path}", "Check the name.")
    chosen = choose(names) if choose else []
    if not chosen:
        return _fetch_file(place, inside + _only_checkpoint(place, names), on_fetch, online=online)
    paths = {name: _fetch_file(place, inside + name, on_fetch, online=online) for name in chosen}
    folders = {path.parents[name.count("/")] for name, path in paths.items()}
    if len(folders) > 1:
        raise EmtError(f"{place} changed while it was being fetched", "Give the command again.")
    return folders.pop()


def _fetch_file(place: HubPath, name: str, on_fetch: OnFetch | None, *, online: bool) -> Path:
    from huggingface_hub import hf_hub_download

    bar = _progress_bar(PurePosixPath(name).name, on_fetch)
    return Path(hf_hub_download(place.repo, name, revision=place.revision, local_files_only=not online, tqdm_class=bar))


def _list(place: HubPath) -> tuple[list[str], bool]:
    """Names of a repository's files, and whether the hub answered; else those that the cache has."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(place.repo, revision=place.revision).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        return [name for name in names if ".." not in name.split("/") and not name.startswith("/")], True
    except Exception:  # whatever keeps the hub from answering: what is cached serves without it
        if not (names := _cached(place)):
            raise
        return names, False


def _cached(place: HubPath) -> list[str]:
    """Names of a repository's files that the cache has."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    revision = place.revision or "main"
    ref = cache / "refs" / revision
    snapshot = cache / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]


def _only_checkpoint(place: HubPath, names: Sequence[str]) -> str:
    """The one file of weights of a repository's folder."""
    found = _checkpoints(names)
    if len(found) != 1:
        raise several_files(place, found, "Name another repository, or a file: hf://owner/name/file.")
    return found[0]


def _only_file(path: Path, choose: Choose | None) -> Path:
    """The one file of weights of a folder here, if it is none of the folders that are meant; else the folder."""
    names = [file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()]
    found = [] if choose and choose(sorted(names)) else _checkpoints(names)
    return path / found[0] if len(found) == 1 else path


def _checkpoints(names: Sequence[str]) -> list[str]:
    """Files of weights in a folder; safetensors stands for another format of the same stem."""
    by_stem: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
        stem, _, suffix = name.rpartition(".")
        if f".{suffix}" in CHECKPOINT_SUFFIXES and "/" not in name:
            by_stem[stem] = name
    return sorted(by_stem.values())


def several_files(place: object, found: Sequence[str], hint: str) -> EmtError:
    """The error of a folder that holds several files of weights, or none, where one is meant."""
    listed = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    return EmtError(
        f"{place} holds {len(found) or 'no'} files of weights" + (f": {listed}" if found else ""),
        f"Name one: {place}/{found[0]}" if found else hint,
    )


def folder_instead(path: Path, hint: str) -> EmtError:
    """The error of a folder here that is given where a file of weights is meant."""
    return several_files(path, _checkpoints([file.name for file in path.glob("*") if file.is_file()]), hint)


def _progress_bar(name: str, on_fetch: OnFetch | None) -> type[Any]:
    from tqdm import tqdm

    class Bar(tqdm):
        """A progress bar that draws nothing and reports bytes."""

        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            super().__init__(total=total, initial=initial, disable=True)
            self._fetched, self._all = int(initial), int(total or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self._fetched += int(n or 0)
            if on_fetch:
                on_fetch(name, self._fetched, int(self.total or self._all))
            return None

    return Bar


def _reason(error: Exception) -> str:
    """An error of the hub in a few words."""
    from huggingface_hub import errors

    reasons: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "its terms must be accepted on its page; then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private (`hf auth login`)"),
        (errors.RevisionNotFoundError, "there is no such branch, tag or commit"),
        (errors.LocalEntryNotFoundError, "it is not in the cache, and there is no network or HF_HUB_OFFLINE is set"),
        (errors.EntryNotFoundError, "there is no such file in the repository"),
        (errors.OfflineModeIsEnabled, "it is not in the cache, and HF_HUB_OFFLINE is set"),
    ]
    return next((text for kind, text in reasons if isinstance(error, kind)), first_line(error))


def megabytes(done: int, total: int) -> str:
    """`812 of 1,674 MB`, for progress; without the total if it is not known."""
    return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
