"""Jobs: one clip each, as the command line, prompt files and standard input request them (`emt_cli.batch.inputs`).

A job is a reference, a prompt, a seed and the settings of a clip. Its identity is a hash over the *contents* of
all that decides its frames; its output name is a function of the job alone, so that neither depends on what
else is in the run, on where files are, or on when they were changed. Only where that name has the clip of another
job, another name that follows from the identity is taken (`emt_cli.batch.results.find_place`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.prompt_syntax import WEBUI
from emt.remote import shown
from emt_cli.batch.addons import NONE, Addons
from emt_cli.batch.options import (
    Format,
    Kernels,
    Memory,
    Settings,
    TransferOptions,
)
from emt_cli.text import slug

#: Raised when the same inputs and settings would give other frames than before; part of every identity.
NUMERICS_VERSION = 2


@dataclass(frozen=True)
class Job:
    """One clip to make.

    Attributes:
        reference: Absolute path of the reference clip.
        prompt: What the new clip shows.
        seed: Seed of its noise.
        settings: Everything else that decides its frames.
        overrides: Names of the settings that the job's own line sets; they are part of its name.
        origin: Where it was read, such as `jobs.jsonl line 3`; empty for the command line.
        addons: What it lays over the model, once its files have been looked at.
        reading: How its prompts are read where that is not by the letter (`emt.prompt_syntax.reading_of`).
        source: URL of the reference, whose copy `reference` is once it is fetched; empty for one on disk.
    """

    reference: Path
    prompt: str
    seed: int
    settings: Settings
    overrides: tuple[str, ...] = ()
    origin: str = ""
    addons: Addons = NONE
    reading: tuple[Any, ...] = ()
    source: str = ""

    @property
    def named(self) -> str:
        """The reference as the user named it: its URL without secrets, or its absolute path."""
        return shown(self.source) if self.source else str(self.reference)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Key that the jobs of one batch share."""
        s = self.settings
        own = s.frames, s.height, s.width, s.steps, s.guidance, s.scheduler, s.guidance_until, s.cache_interval
        # Clips of one batch are made with one set of weights.
        files = s.lora, s.vae, s.embedding, s.control, s.control_image
        return *own, s.method, *files, s.clip_skip, self.addons, self.reading

    @property
    def has_long_text(self) -> bool:
        """True if the encoding of its prompts has another shape than that of one text of the text encoder."""
        return self.reading not in ((), (WEBUI, 1, False))

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling of the reference: the settings on which its motion features depend."""
        settings = self.settings.as_dict()
        return {name: settings[name] for name in ("frames", "height", "width", "fit", "start", "duration", "stride")}


@dataclass(frozen=True)
class Rejected:
    """A line or a reference that is no job, and why."""

    error: EmtError
    origin: str = ""
    reference: str = ""
    prompt: str = ""


#: None says that nothing more is at hand for the moment (a stream that waits): do not wait to fill a batch.
Item = Job | Rejected | None


def digest(*values: Any) -> str:
    """A hash of JSON values, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def identify(job: Job, *, reference: str, model: str, precision: str, method: str = "") -> str:
    """The identity of a job: a hash over everything that decides its frames.

    Args:
        job: The job.
        reference: SHA-256 of the reference's content.
        model: SHA-256 of the model's files.
        precision: The `numerics` of the run.
        method: How it is made if not as usual.
    """
    settings = job.settings.as_dict()
    for name in ("preset", "size"):  # what it sets decides, by whatever name
        settings.pop(name, None)
    settings.pop("prompt_syntax", None)  # how the prompts are read decides
    settings |= job.addons.identity()  # the contents of the files decide, wherever they are
    for name in ("best_of", "guidance_until", "cache_interval"):
        if settings[name] == 1:
            del settings[name]  # clips made before there was a choice are still these jobs'
    values = [reference, job.prompt, job.seed, settings, model, precision, *([method] if method else [])]
    if job.reading:
        values.append("prompts as the web UI reads them")
    if job.seed > 0xFFFFFFFF:
        values.append("seed of 64 bits")  # version 0.1.0 read the last 32
    return digest("job", NUMERICS_VERSION, *values)


def numerics(options: TransferOptions, engine: str = "auto") -> str:
    """Execution options that can change output bits, as one string for a job's identity.

    The precision, and engine, kernels and memory where they are not auto.

    Args:
        options: The command line.
        engine: The id of the engine that it names, or auto or torch.
    """
    given = [options.precision.value]
    given += [engine] if engine != "auto" else []
    given += [f"kernels {options.kernels.value}"] if options.kernels is not Kernels.AUTO else []
    given += ["memory low"] if options.memory is Memory.LOW else []
    return " ".join(given)


def output_name(job: Job, reference: str) -> str:
    """Path of a job's clip in the output folder: `<reference>/<prompt>-<seed>.<format>`.

    Distinct jobs get distinct names, whatever the prompts: a prompt that its slug does not spell exactly has a
    hash appended after `_`, which no slug contains, and so have settings that a job's own line sets. (Settings of the
    whole run are no part of it: where they differ from those of a clip that is there, see `own_name`.) The folder
    carries a hash of the reference's content and kind, so references of one name in different folders stay apart.

    Args:
        job: The job.
        reference: SHA-256 of the reference's content.
    """
    own = {key: value for key, value in job.settings.as_dict().items() if key in job.overrides and key != "format"}
    own |= {key: content for key, content in job.addons.identity().items() if key in own}
    suffix = f"_{digest(own)[:10]}" if own else ""
    extension = "" if job.settings.format is Format.PNG else f".{job.settings.format.value}"
    folder = _folder_name(job.reference.stem, job.reference.suffix, reference)
    return f"{folder}/{_prompt_name(job.prompt)}-{job.seed}{suffix}{extension}"


@functools.lru_cache(maxsize=1 << 12)
def _folder_name(stem: str, suffix: str, reference: str) -> str:
    return f"{slug(stem) or 'clip'}_{digest(reference, suffix.lower())[:8]}"


@functools.lru_cache(maxsize=1 << 12)
def _prompt_name(prompt: str) -> str:
    name = slug(prompt)
    return name if name.replace("-", " ") == prompt else f"{name or 'prompt'}_{digest(prompt)[:10]}"


def own_name(output: str, identity: str) -> str:
    """Path of a job's clip if another job's is at `output`: the same prompt and seed with other settings, model, ….

    Args:
        output: The job's `output_name`.
        identity: Its identity.
    """
    stem, dot, extension = output.rpartition(".")  # no slug has a dot
    return f"{stem}_{identity[:10]}{dot}{extension}" if dot else f"{output}_{identity[:10]}"
