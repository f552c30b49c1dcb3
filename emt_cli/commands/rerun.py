"""`emt rerun`: makes a result again from what it carries."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emt.errors import EmtError
from emt.remote import (
    Announcer,
    MissingError,
    check_writable,
    copy_of,
    exists,
    fetch,
    file_name,
    is_url,
    normal,
    put,
    shown,
    to_path,
)
from emt_cli.batch.options import Kernels, Precision, PromptSyntax, Settings, check_device, parse_field, usage_errors

if TYPE_CHECKING:
    import numpy as np

    from emt.cache import ContentIndex
    from emt.train.teacher import Guidance
    from emt_cli.batch.jobs import Job

_MOST_CLIPS = 64  # of a batch, as for --batch-size


def rerun(
    result: Annotated[
        Path,
        typer.Argument(
            metavar="CLIP", help="A clip that emt made, or the .json beside it; or its URL.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File of the new clip. Default: RESULT-rerun beside RESULT.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Path or URL of the reference, if it has moved.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder, its URL, or hub id, if the model has moved.", show_default=False)
    ] = None,
    addon: Annotated[
        list[Path] | None,
        typer.Option(
            "--addon", "--lora", help="LoRA, VAE or embedding that has moved; may be repeated.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine folder, or torch. Default: the engine that made the clip, if it is in your cache.",
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
    """Reproduce a result from the settings embedded in it: on the same kind of device, the very same frames.

    The reference and the model are checked against their hashes. A clip that was made in a batch is made in a
    batch of the same size, since the order of additions, and with it the last bits, depends on it. Where the original
    is there, the new clip is compared with it.

    A record may be anybody's: nothing is downloaded on its word, no engine is opened that is not in your own cache,
    and files are looked for where it says only if their paths are absolute. A reference behind a URL is taken from the
    copies on this machine; --reference URL fetches it.
    """
    from emt_cli.terminal import ProgressReporter

    with usage_errors():
        check_device(device)
    named = Path(normal(result)) if is_url(result) else to_path(result)
    named = named.with_suffix("") if named.suffix == ".json" else named
    if not named.name:
        raise EmtError(f"{named} is no clip", "Name a clip that emt made, or the .json beside it.")
    output = output or named.with_name(f"{named.stem}-rerun{named.suffix}")
    if (exists(str(output)) if is_url(output) else output.exists()) and not overwrite:
        problem = f"{normal(output) if is_url(output) else output} exists"
        raise EmtError(problem, "Name another clip with --output, or replace it with --overwrite.")
    with TemporaryDirectory(prefix="emt-") as folder, ProgressReporter() as reporter:
        reporter.total = 1
        reporter.phase("looking for the clip")
        result, clip = _find(result)
        made = _Made.read(result)
        here = output
        if is_url(output):
            check_writable(normal(output))
            here = Path(folder) / file_name(normal(output))
        else:
            from emt.video import check_place

            check_place(output)
        place = shown(normal(output)) if is_url(output) else str(output)
        _make_again(made, clip, here, place, reporter, reference, model, addon or [], engine, device, kernels)
        if is_url(output):
            _publish(here, normal(output))
    typer.echo(os.fsencode(place))


def _find(result: Path) -> tuple[Path, Path]:
    """A clip or its sidecar on this machine, and the clip, which may be missing then.

    Raises:
        EmtError: it is in a store, and cannot be read.
    """
    if not is_url(result):
        result = to_path(result)
        return result, result.with_suffix("") if result.suffix == ".json" else result
    url = normal(result)
    clip = url.removesuffix(".json")
    here = fetch(url)
    if clip != url:
        with suppress(MissingError):
            fetch(clip)
    return here, copy_of(clip)


def _publish(clip: Path, url: str) -> None:
    """Put a clip into a store, and then its sidecar.

    Raises:
        EmtError: it cannot be put, or is a folder of frames.
    """
    from emt_cli.batch.results import sidecar

    if clip.is_dir():
        raise EmtError(f"{shown(url)} would be a folder of frames", "Write it on disk: -o FOLDER")
    put(clip, url)
    put(sidecar(clip), f"{url}.json")


@dataclass(frozen=True)
class _Made:
    """Record of a clip, checked."""

    record: dict[str, Any]
    job: Job
    size: int
    index: int
    shared: bool
    precision: Precision
    kernels: Kernels
    teacher: Guidance | None

    @classmethod
    def read(cls, result: Path) -> _Made:
        """Read the record of a clip, from the clip or the file beside it.

        Raises:
            EmtError: there is none, or it is damaged.
        """
        from emt_cli.batch.jobs import Job
        from emt_cli.batch.results import reference_of
        from emt_cli.batch.teaching import read_guidance

        record = _find_record(result)
        precision, known = record.get("precision"), [name.value for name in Precision]
        if isinstance(precision, str) and precision not in known:
            problem = f"the clip of {result} was made with precision {precision}, which is none of {', '.join(known)}"
            raise EmtError(problem, "Make a new one: emt transfer with its reference, prompt and seed.")
        try:
            settings = Settings(**{name: parse_field(name, value) for name, value in record["settings"].items()})
            prompt, seed = parse_field("prompt", record["prompt"]), parse_field("seed", record["seed"])
            batch = record["batch"]
            for name in ("id", "device", "model", "reference_sha256", "model_sha256"):
                record[name]
            if not isinstance(settings.frames, int):
                raise ValueError(f"frames is {settings.frames!r}")
            if batch["size"] > _MOST_CLIPS:
                raise ValueError(f"a batch of {batch['size']}")
            source = normal(record["reference"]) if is_url(record["reference"]) else ""
            return cls(
                record,
                Job(reference_of(Path(), record["reference"]), prompt, seed, settings, source=source),
                batch["size"],
                batch["index"],
                batch["shared_reference"],
                Precision(record["precision"]),
                Kernels(record.get("kernels", "reference")),
                read_guidance(record),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            hint = "Try the .json beside the clip."
            raise EmtError(f"the settings in {result} are damaged: {error!r}", hint) from None


def _make_again(
    made: _Made,
    clip: Path,
    output: Path,
    place: str,
    reporter: Any,
    reference: Path | None,
    model: str | None,
    moved: list[Path],
    engine: str | None,
    device: str,
    kernels: Kernels | None,
) -> None:
    from emt_cli.batch.addons import AddonFinder, settings_of
    from emt_cli.batch.generator import (
        heard_warnings,
        playback_rate,
        read_reference,
        read_sound,
        silence_warnings,
    )
    from emt_cli.batch.results import write_result
    from emt_cli.batch.session import SessionOptions, open_session

    record = made.record
    reporter.phase("looking for the model and the reference")
    job = made.job
    if reference is not None and is_url(reference):
        url = normal(reference)
        job = replace(job, reference=fetch(url, Announcer(reporter.say)), source=url)
    elif reference is not None:
        job = replace(job, reference=to_path(reference).absolute(), source="")
    options = SessionOptions(
        model=model or _recorded_model(record),
        precision=made.precision.value,
        engine=engine or _recorded_engine(record, reporter.say),
        kernels=(kernels or (Kernels.AUTO if made.kernels is Kernels.TRITON else made.kernels)).value,
        low_memory=record.get("memory") == "low",
        teacher=made.teacher,
        download=model is not None,
    )
    session = open_session(options, device, reporter.say)
    generator = session.generator
    generator.window = record.get("window")
    _check_reference(session.index, job, record["reference_sha256"])
    if generator.model_sha256 != record["model_sha256"]:
        raise EmtError(
            f"the model {session.model.folder} is not the one that made {clip.name}: its files have changed",
            "Name the one that did with --model.",
        )
    # Nothing is fetched on a record's word.
    addons = AddonFinder(session.index, download=False).find_again(record, job.settings, moved)
    if addons.files:
        job = replace(job, settings=replace(job.settings, **settings_of(addons)))
    reading = session.model.reading(job.prompt, job.settings.as_dict())
    if reading and "prompt_syntax" not in record:  # it was made by the letter
        job = replace(job, settings=replace(job.settings, prompt_syntax=PromptSyntax.PLAIN))
        reading = ()
    job = replace(job, addons=addons, reading=reading)
    generator.check(job)
    reporter.phase("importing")
    for text in _differences(record, generator.device.name, generator.device.kernels):
        reporter.say(f"note: {text}: bits may differ")
    try:
        reporter.phase("reading")
        source, sound = read_reference(job), read_sound(job)
        reporter.phase("loading")
        with heard_warnings() as heard:
            motion = generator.encode(job, source)
            motions = [motion] * made.size if made.shared else [replace(motion) for _ in range(made.size)]
            reporter.phase("sampling")
            prompts = [job.prompt] * made.size
            clips, _, _ = generator.generate(
                [job] * made.size, motions, lambda done, steps: reporter.step(prompts, done, steps, 0)
            )
    except Exception as error:
        raise generator.explain(error, job) from None
    warnings = [*source.warnings, *heard, *silence_warnings(job, sound)]
    for text in warnings:
        reporter.say(f"warning: {text}")
    new = generator.record(job, record["id"], record["reference_sha256"], record["batch"])
    new |= {"model": record["model"], **({"warnings": warnings} if warnings else {})}
    new |= {name: record[name] for name in _KEPT if name in record}
    reporter.phase("writing")
    original = _all_frames(clip) if clip.exists() else None
    write_result(output, clips[made.index], playback_rate(job, source.fps), new, sound)
    versions = _other_versions(record)
    if original is not None:
        reporter.phase("comparing")
        text = compare(original, _all_frames(output), (clip.suffix.lower(), output.suffix.lower()))
        versions = "" if text.startswith("identical") else versions
        reporter.say(f"{place} is {text}" if "compared" not in text else text)
    if versions:
        reporter.say(f"note: the original was made with {versions}: bits may differ")


#: What a run found out about a clip, and making it again does not.
_KEPT = ("best_of", "motion_fidelity", "temporal_consistency")


def _differences(record: dict[str, Any], device: str, kernels: str) -> list[str]:
    """Differences from the time when the clip was made, which may change the last bits."""
    from emt_cli.batch.jobs import NUMERICS_VERSION

    found = []
    if record.get("arithmetic") != NUMERICS_VERSION:
        found.append("it was made by another version of emt, whose arithmetic differs")
    if kernels != (made_with := record.get("kernels", "reference")):
        found.append(f"made with the kernels {made_with}, made again with {kernels}")
    if device != record["device"]:
        found.append(f"made on {record['device']}, made again on {device}")
    return found


def _other_versions(record: dict[str, Any]) -> str:
    """Libraries that were others when the clip was made; empty if none was."""
    from emt_cli.batch.generator import installed_versions

    here = installed_versions()
    others = {n: v for n, v in record.get("versions", {}).items() if n != "emt" and n in here and here[n] != v}
    return ", ".join(f"{name} {version} (here {here[name]})" for name, version in others.items())


def _all_frames(clip: Path) -> np.ndarray | EmtError:
    """The frames of a clip, (frames, height, width, 3), or why there are none."""
    from emt.video import probe, read_clip

    try:
        return read_clip(clip, frames=probe(clip).frames, stride=1).frames
    except EmtError as error:
        return error


def compare(original: np.ndarray | EmtError, again: np.ndarray | EmtError, formats: tuple[str, str] = ("", "")) -> str:
    """Difference of two clips, in words.

    Args:
        original: uint8, (frames, height, width, 3), or why it cannot be read.
        again: The same of the new one.
        formats: Suffixes of both; empty for a folder of PNG. Frames of one format differ from those of another.
    """
    import numpy as np

    if isinstance(original, EmtError) or isinstance(again, EmtError):
        problem = next(clip.problem for clip in (original, again) if isinstance(clip, EmtError))
        return f"not compared with the original: {problem}"
    if original.shape != again.shape:
        shapes = [f"{clip.shape[0]} frames of {clip.shape[2]}x{clip.shape[1]}" for clip in (original, again)]
        return f"not identical with the original, which has {shapes[0]}, not {shapes[1]}"
    apart = np.abs(original.astype(np.int16) - again)
    if not apart.any():
        return "identical with the original"
    before, now = (suffix or ".png" for suffix in formats)
    other = f"another format ({now} for {before}), in which " if before != now else ""
    return (
        f"not identical with the original: {other}{(apart > 0).mean():.1%} of the values differ, by {apart.mean():.3f} "
        f"of 255 on average and {apart.max()} at most"
    )


def _find_record(result: Path) -> dict[str, Any]:
    from emt.storage import open_file
    from emt_cli.batch import journal
    from emt_cli.batch.records import parse
    from emt_cli.batch.results import read_record

    if journal.exists(result):
        raise EmtError(
            f"{result} is an output folder", "Name one of its clips; emt transfer makes all that are missing."
        )
    if result.suffix != ".json":
        record = read_record(result)
        if not record:
            raise EmtError(f"{result} carries no settings of emt", "Name a clip that emt made, or the .json beside it.")
        return record
    try:
        with open_file(result) as file:
            record = parse(file.read())
    except OSError as error:
        raise EmtError(f"cannot read {result}: {error.strerror}") from None
    if not record:
        raise EmtError(f"{result} is not the record of a clip", "Name a clip that emt made, or the .json beside it.")
    return record


def _check_reference(contents: ContentIndex, job: Job, sha256: str) -> None:
    path, hint = job.reference, "Say where it is now with --reference."
    if job.source:
        hint = f"To fetch it from where the record says: --reference {shlex.quote(job.named)}"
        if not path.exists():
            raise EmtError(f"the reference, {job.named}, has not been fetched to this machine", hint)
    if not path.is_absolute():
        raise EmtError(f"the record names the reference by a relative path, {path}", hint)
    try:
        found = contents.sha256(path)
    except EmtError as error:
        raise EmtError(f"the reference is not where it was: {error.problem}", f"It was {path}. {hint}") from None
    if found != sha256:
        raise EmtError(f"the reference {job.named} is not the one that was used: its content differs", hint)


def _recorded_model(record: dict[str, Any]) -> str:
    """The model that a record names: an absolute folder, a model that ships, or one of the hub's on this machine.

    Raises:
        EmtError: it is none of these.
    """
    from emt import demo

    folder, name = Path(record.get("model_folder", "")), record["model"]
    if folder.is_absolute() and folder.is_dir():
        return str(folder)
    if name in demo.NAMES:
        return name
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) and not Path(name).exists():
        return name  # it is not downloaded
    hint = f"To fetch it: --model {shlex.quote(name)}" if is_url(name) else "Say where it is now with --model."
    raise EmtError(f"the model that made it, {name} in {folder}, is not there", hint)


def _recorded_engine(record: dict[str, Any], say: Callable[[str], None]) -> str:
    """Engine that made a clip: torch, or the folder of an engine in the user's cache."""
    from emt_engines.choice import TORCH, engines_dir, list_engines

    wanted = record.get("engine_id")
    if not wanted:
        return TORCH
    known = []
    with suppress(EmtError):  # then there is none of one's own
        known = [engine for engine in list_engines(engines_dir())[0] if engine.manifest.id == wanted]
    if known:
        return str(known[0].folder)
    say(
        f"note: the engine that made it ({record.get('engine')}, {wanted}) is not in your cache; made again by torch: "
        "bits may differ (if you trust it, name its folder with --engine)"
    )
    return TORCH
