"""`emt rerun`: makes a result again from what it carries."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from emt.errors import EmtError
from emt_cli.batch.options import Kernels, Precision, Settings, check_device, parse_field


def rerun(
    result: Annotated[Path, typer.Argument(help="A clip that emt made, or the .json beside it.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File of the new clip. Default: RESULT-rerun beside RESULT.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Path of the reference, if it has moved.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, if it has moved.", show_default=False)] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine folder, or torch. Default: the engine that made the clip.",
            metavar="DIR|torch",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to compute on: auto, cuda, cuda:N, mps or cpu.", metavar="DEVICE")
    ] = "auto",
    kernels: Annotated[
        Kernels | None,
        typer.Option(
            help="Kernels to run: auto, triton or reference. Default: those that made the clip, if they run here."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
) -> None:
    """Make a result again from the settings it carries: on the same kind of device, the very same frames.

    The reference and the model are checked against their hashes. A clip that was made in a batch is made in a
    batch of the same size, since the order of additions, and with it the last bits, depends on it.
    """
    from emt.cache import ContentIndex, default_dir
    from emt.model_folder import find_model
    from emt_cli.batch.generator import Generator, playback_rate, read_reference
    from emt_cli.batch.jobs import NUMERICS_VERSION, Job
    from emt_cli.batch.results import write_result
    from emt_cli.batch.teaching import TeachingGenerator, read_guidance
    from emt_engines.choice import EngineChoice

    record = _find_record(result)
    clip = result.with_suffix("") if result.suffix == ".json" else result
    output = output or clip.with_name(f"{clip.stem}-rerun{clip.suffix}")
    if output.exists() and not overwrite:
        raise EmtError(f"{output} exists", "Name another clip with --output, or replace it with --overwrite.")
    try:
        settings = Settings(**{name: parse_field(name, value) for name, value in record["settings"].items()})
        prompt, seed = parse_field("prompt", record["prompt"]), parse_field("seed", record["seed"])
        job = Job(Path(record["reference"]), prompt, seed, settings)
        batch, precision = record["batch"], Precision(record["precision"])
        size, index, shared = int(batch["size"]), int(batch["index"]), bool(batch["shared_reference"])
        identity, made_on = record["id"], record["device"]
        reference_sha256, made_by = record["reference_sha256"], record["model_sha256"]
        taught = read_guidance(record)
        made_with, low_memory = Kernels(record.get("kernels", "reference")), record.get("memory") == "low"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EmtError(f"the settings in {result} are damaged: {error!r}", "Try the .json beside the clip.") from None
    job = replace(job, reference=reference.absolute()) if reference else job
    contents = ContentIndex(default_dir())
    _check_reference(contents, job.reference, reference_sha256)
    found = replace(find_model(model or _recorded_model(record), download=True), name=record["model"])
    model_sha256 = found.sha256(contents)
    if model_sha256 != made_by:
        raise EmtError(
            f"the model {found.folder} is not the one that made {clip.name}: its files have changed",
            "Name the one that did with --model.",
        )
    choice = None
    if not low_memory:
        choice = EngineChoice(engine or _recorded_engine(record), found, contents)
        choice.check(settings.width, settings.height, settings.frames, settings.cache_interval)
    kernels = kernels or (Kernels.AUTO if made_with is Kernels.TRITON else made_with)
    where = found, model_sha256, check_device(device), precision.value
    generator = Generator(*where, choice, kernels=kernels.value, low_memory=low_memory)
    if taught:
        generator = TeachingGenerator(*where, taught, kernels=kernels.value)
    if record.get("arithmetic") != NUMERICS_VERSION:
        typer.echo("note: it was made by another version of emt, whose arithmetic differs in the last bits", err=True)
    if generator.device.kernels != made_with.value:
        told = f"made with the kernels {made_with.value}, made again with {generator.device.kernels}"
        typer.echo(f"note: {told}: bits may differ", err=True)
    if generator.device.name != made_on:
        typer.echo(f"note: made on {made_on}, made again on {generator.device.name}: bits may differ", err=True)

    frames = read_reference(job)
    try:
        motion = generator.encode(job, frames)
        motions = [motion] * size if shared else [replace(motion) for _ in range(size)]
        clips, _, _ = generator.generate([job] * size, motions, lambda done, steps: None)
    except Exception as error:
        raise generator.explain(error, job) from None
    new = generator.record(job, identity, reference_sha256, batch)
    new |= {name: record[name] for name in _KEPT if name in record}
    write_result(output, clips[index], playback_rate(job, frames.fps), new)
    typer.echo(output)


#: What a run found out about a clip, and making it again does not.
_KEPT = ("best_of", "motion_fidelity", "temporal_consistency")


def _find_record(result: Path) -> dict[str, Any]:
    from emt_cli.batch.results import read_record

    if result.suffix != ".json":
        record = read_record(result)
        if not record:
            raise EmtError(f"{result} carries no settings of emt", "Name a clip that emt made, or the .json beside it.")
        return record
    try:
        record = json.loads(result.read_bytes())
    except OSError as error:
        raise EmtError(f"cannot read {result}: {error.strerror}") from None
    except ValueError:
        record = {}
    if not isinstance(record, dict) or not record:
        raise EmtError(f"{result} is not the record of a clip", "Name a clip that emt made, or the .json beside it.")
    return record


def _check_reference(contents: Any, path: Path, sha256: str) -> None:
    hint = "Say where it is now with --reference."
    try:
        found = contents.sha256(path)
    except EmtError as error:
        raise EmtError(f"the reference is not where it was: {error.problem}", f"It was {path}. {hint}") from None
    if found != sha256:
        raise EmtError(f"the reference {path} is not the one that was used: its content differs", hint)


def _recorded_model(record: dict[str, Any]) -> str:
    folder = record.get("model_folder", "")
    return folder if Path(folder).is_dir() else record["model"]


def _recorded_engine(record: dict[str, Any]) -> str:
    """What executed the network for a clip: torch, or the folder of an engine where it was or in the cache."""
    from emt_engines.choice import TORCH, Engine, engines_dir, list_engines
    from emt_engines.manifest import Manifest

    wanted = record.get("engine_id")
    if not wanted:
        return TORCH
    with suppress(EmtError):
        folder = Path(record["engine_folder"])
        if Manifest.read(folder).id == wanted:
            return str(folder)
    known: list[Engine] = [engine for engine in list_engines(engines_dir())[0] if engine.manifest.id == wanted]
    if known:
        return str(known[0].folder)
    text = f"the engine that made it ({record.get('engine')}, {record.get('engine_folder')}) is gone"
    typer.echo(f"note: {text}; made again by torch: bits may differ", err=True)
    return TORCH
