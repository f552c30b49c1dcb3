"""`emt import-weights`: one model folder out of the published files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_FILES = "Files"


class StoredType(str, Enum):
    """Number types that a model folder can be stored in."""

    FP16 = "fp16"
    FP32 = "fp32"


def import_weights(
    base: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|HUB_ID|FILE",
            help="Stable Diffusion 1.5: a diffusers folder, a hub id, or one .safetensors/.ckpt file.",
            rich_help_panel=_FILES,
        ),
    ],
    motion_module: Annotated[
        str,
        typer.Option(
            metavar="FILE|FOLDER|HUB_ID",
            help="AnimateDiff motion module (.ckpt, .safetensors), or a diffusers MotionAdapter.",
            rich_help_panel=_FILES,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Model folder to write.")],
    dreambooth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Single file whose VAE, UNet and text encoder replace the base's, e.g. Realistic Vision.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The motion transfer adapter; without it, it starts from the motion module's own projections.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="LoRA merged into the weights, at scale 1 unless told; may be repeated.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID",
            help="Tokenizer, where the base is a single file. [default: openai/clip-vit-large-patch14]",
            rich_help_panel=_FILES,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[StoredType, typer.Option(help="Number type to store.")] = StoredType.FP16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Make one model folder from Stable Diffusion 1.5, an AnimateDiff motion module and the adapter.

    Prints the folder on stdout. Every file is checked key by key, and the folder's README.md records where each came
    from, its sha256 and what was merged.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers.utils.logging import disable_progress_bar

    from emt.backbone import PUBLISHED, module_of

    importer = module_of(PUBLISHED, "import_weights")
    disable_progress_bar()  # it would write over ours
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Importing", total=1)

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        report = importer.import_weights(
            output,
            base=base,
            motion_module=motion_module,
            dreambooth=dreambooth,
            adapter=adapter,
            loras=[importer.parse_lora(value) for value in lora or []],
            tokenizer=tokenizer,
            dtype=dtype.value,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    typer.echo(report.folder)
