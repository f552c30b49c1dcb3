"""`emt engines`: looks after the engines in the cache."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt.errors import EmtError
from emt.storage import write_atomically
from emt_cli.commands.group import command_group
from emt_cli.messages import WARNING, say
from emt_cli.text import printable

if TYPE_CHECKING:
    from emt_engines.choice import Engine

engines = command_group("List, show, verify and prune the engines in the cache.")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON Lines on standard output.")]
_Cache = Annotated[
    Path | None,
    typer.Option(help="Cache folder that holds the engines. Default: emt in the user's cache folder."),
]
_Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="ENGINE", help="Engine folders, or names in the cache. Default: all.", show_default=False),
]


@engines.command("list")
def list_engines(cache_dir: _Cache = None, json: _Json = False) -> None:
    """List the engines in the cache, the newest first."""
    found, damaged = _kept(cache_dir)
    if json:
        for engine in found:
            _print_json(_fields(engine))
        for folder, error in damaged:
            _print_json({"folder": str(folder), "error": error.problem})
        return
    if not found and not damaged:
        say("no engines yet; build one with: emt build-engine --model MODEL")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from emt_cli.text import size
    from emt_engines.manifest import range_text

    table = Table("engine", "made for", "parity", "on disk")
    table.columns[0].no_wrap = True  # it is what the other commands are given
    for engine in found:
        fields, own = _fields(engine), engine.manifest
        parity = "not verified" if own.parity is None else f"{own.parity:.1e}"
        clips = f"{range_text(own.batch)} clip{'s' * (own.batch[1] > 1)}"
        made_for = (
            f"{own.model}, {own.backend}, {own.precision}: {own.frames} frames of {', '.join(fields['sizes'])}, "
            f"{clips}, {own.host.device}"
        )
        table.add_row(*(Text(printable(c)) for c in [engine.folder.name, made_for, parity, size(fields["bytes"])]))
    for folder, _ in damaged:
        table.add_row(Text(printable(folder.name)), Text("damaged", "red"))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


@engines.command()
def show(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Engine folder, or its name in the cache.")],
    cache_dir: _Cache = None,
    json: _Json = False,
) -> None:
    """Print what an engine is made from and for, and whether its libraries and its code are those of this machine."""
    found = _find(engine, cache_dir)
    body = {**asdict(found.manifest), "id": found.manifest.id, "folder": str(found.folder)}
    if json:
        _print_json(body)
        return
    from emt_engines.manifest import range_text

    fields, own = _fields(found), found.manifest
    lines = {
        "folder": fields["folder"],
        "backend": fields["backend"],
        "model": fields["model"],
        "precision": fields["precision"],
        "sizes": ", ".join(fields["sizes"]),
        "frames": fields["frames"],
        "clips at once": range_text(own.batch),
        "built": f"{fields['built']} in {own.seconds:.0f} s",
        "for" if own.bound else "built on": f"{own.host.device} ({own.host.capability})",
        "with": ", ".join(f"{name} {version}" for name, version in own.host.versions.items()) or "anything",
        "weights": "the model's when it is loaded" if own.refits else "its own, from the model's",
        "here": _fits_here(found) or "its code and its libraries are these",
    }
    for name, value in lines.items():
        print(f"{name:<14} {printable(str(value))}")
    for part in own.parts:
        parity = "not verified" if part.parity is None else f"parity {part.parity:.1e}"
        print(printable(f"{'part':<14} {part.name} {parity}  {part.file}  {part.sha256[:12]}…"))


@engines.command()
def verify(
    names: _Names = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub id, to compare with PyTorch again. Default: the engine's.", show_default=False
        ),
    ] = None,
    cache_dir: _Cache = None,
    json: _Json = False,
) -> None:
    """Check the SHA-256 of every file, and compare again with PyTorch where the engine can run and its model is here.

    An engine that had not been compared yet is from then on one that has. Exit code 1 if one is damaged or differs too
    much.
    """
    from emt_engines.choice import Engine

    failed = False
    listed: list[Engine | tuple[Path, EmtError]]
    if names:
        listed = [_find(name, cache_dir) for name in names]
    else:
        found, damaged = _kept(cache_dir)
        listed = [*found, *damaged]
    for item in listed:
        line: dict[str, Any] = {"folder": str(item.folder if isinstance(item, Engine) else item[0])}
        try:
            if not isinstance(item, Engine):
                raise item[1]
            line |= _verify(item, model)
        except EmtError as error:
            failed = True
            line |= {"state": "failed", "error": error.problem}
        if json:
            _print_json(line)
        else:
            parity = line.get("parity")
            message = "; ".join(f"{name} {p:.1e}" for name, p in parity.items()) if parity else line.get("reason", "")
            print(printable(f"{line['state']:<7} {line['folder']}  {line.get('error', message)}"))
    if failed:
        raise typer.Exit(1)


@engines.command()
def prune(
    older_than: Annotated[
        float | None,
        typer.Option(help="Days; remove engines built before that too.", min=0, max=36_500, show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without confirmation.")] = False,
    cache_dir: _Cache = None,
    json: _Json = False,
) -> None:
    """Remove engines that cannot run any more: damaged, of other versions, code, devices, or a model that is gone.

    Asks before it removes anything, unless --yes is given.
    """
    import shutil
    from datetime import datetime, timedelta, timezone

    found, damaged = _kept(cache_dir)
    to_remove = [(folder, error.problem) for folder, error in damaged]
    for engine in found:
        built = datetime.fromisoformat(engine.manifest.built)
        reason = _fits_here(engine) or _model_gone(engine)
        if older_than is not None and datetime.now(timezone.utc) - built > timedelta(days=older_than):
            reason = reason or f"built {engine.manifest.built}"
        if reason:
            to_remove.append((engine.folder, reason))
    if not to_remove:
        say("nothing to remove")
        return
    for folder, reason in to_remove:
        say(f"{folder}: {reason}", WARNING)
    if not yes and not typer.confirm(f"Remove {len(to_remove)}?", err=True):
        raise typer.Exit(1)
    for folder, reason in to_remove:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise EmtError(f"{folder} cannot be removed: {error.strerror or error}", "Check its permissions.") from None
        if json:
            _print_json({"folder": str(folder), "removed": True, "reason": reason})
        else:
            print(printable(folder))


def _kept(cache_dir: Path | None) -> tuple[list[Engine], list[tuple[Path, EmtError]]]:
    from emt_engines.choice import engines_dir, list_engines

    return list_engines(engines_dir(cache_dir))


def _find(name: str, cache_dir: Path | None) -> Engine:
    from emt_engines.choice import Engine, engines_dir
    from emt_engines.manifest import Manifest

    kept = engines_dir(cache_dir) / name
    folder = kept if Path(name).name == name and kept.is_dir() else Path(name)
    if not folder.is_dir():
        raise EmtError(f"there is no engine {name}, neither as a folder nor in {kept.parent}", "See: emt engines list")
    return Engine(folder, Manifest.read(folder))


def _fields(engine: Engine) -> dict[str, Any]:
    own = engine.manifest
    return {
        "folder": str(engine.folder),
        "id": own.id,
        "backend": own.backend,
        "model": own.model,
        "precision": own.precision,
        "sizes": [str(size) for size in own.sizes],
        "frames": own.frames,
        "batch": own.batch,
        "device": own.host.device,
        "parity": own.parity,
        "bytes": sum(path.stat().st_size for path in engine.folder.iterdir() if path.is_file()),
        "built": own.built,
    }


def _fits_here(engine: Engine) -> str:
    """Reason why an engine cannot run on this machine; empty if it can."""
    import torch

    from emt_engines.manifest import Request

    own = engine.manifest
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if own.host.device != "cpu" else []
    reason = ""
    for device in [*gpus, "cpu"]:
        request = Request("", own.precision, device, (), 0, (0, 0), own.weights)
        ok, message = own.match(request)
        if ok:
            return ""
        reason = reason or message
    return reason


def _model_gone(engine: Engine) -> str:
    from emt.model_folder import find_model

    try:
        find_model(engine.manifest.model, download=False)
    except EmtError as error:
        return error.problem
    return ""


def _verify(engine: Engine, model: str | None) -> dict[str, Any]:
    """Check an engine's files, and its numbers where it can run."""
    own = engine.manifest
    own.check_files(engine.folder)
    reason = _fits_here(engine)
    if reason:
        return {"state": "whole", "reason": f"not compared: {reason}"}
    from emt.cache import ContentIndex, default_dir
    from emt.device import Device
    from emt.model_folder import find_model
    from emt_cli.batch.generator import open_pipeline
    from emt_engines.base import CannotRun
    from emt_engines.build import verified
    from emt_engines.choice import EngineChoice
    from emt_engines.manifest import FILE

    try:
        found = find_model(model or own.model, download=False)
    except EmtError as error:
        return {"state": "whole", "reason": f"not compared: {error.problem}"}
    device = Device.open("cpu" if own.host.device == "cpu" else "cuda", own.precision)
    EngineChoice(str(engine.folder), found, ContentIndex(default_dir())).check_match(device)
    try:
        parts = verified(engine.folder, own, open_pipeline(found, device))
    except CannotRun as error:
        return {"state": "whole", "reason": f"not compared: {error.problem}"}
    if own.parity is None:
        try:
            write_atomically(engine.folder / FILE, replace(own, parts=parts).as_bytes())
        except OSError as error:
            raise EmtError(f"{engine.folder / FILE} cannot be written: {error.strerror}") from None
    return {"state": "ok", "parity": {part.name: part.parity for part in parts if part.parity is not None}}


def _print_json(value: dict[str, Any]) -> None:
    from emt_cli.batch.records import dumps

    sys.stdout.buffer.write(dumps(value) + b"\n")
    sys.stdout.buffer.flush()
