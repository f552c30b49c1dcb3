"""`emt import-weights`: one model folder out of the published files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from emt.backbone import BACKBONES, PUBLISHED, module_of
from emt_cli.batch.options import UsageError
from emt_cli.messages import console as stderr_console
from emt_cli.messages import say

_FILES = "Files"
_PUBLISHED_FILES = module_of(PUBLISHED, "published").PUBLISHED
OTHERS = [name for name in BACKBONES if name != PUBLISHED]
_LOG_INTERVAL = 5.0  # seconds


class StoredType(str, Enum):
    """Dtypes that a model folder can be stored in."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class PredictionType(str, Enum):
    """Targets that a UNet can have been trained to predict."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"


def import_weights(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Model folder to write.")],
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Download and import the published set listed above (9 GB); other options replace parts of it.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Stable Diffusion 1.5 or Wan 2.1 (text to video): a diffusers folder, a hub id, or a file of weights.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    motion_module: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="AnimateDiff motion module: its checkpoint, a diffusers MotionAdapter, or a network with one.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Motion-transfer adapter. Default: an untrained one, with the motion module's projections.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    dreambooth: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Single-file checkpoint whose UNet, VAE and text encoder replace the base's, e.g. Realistic Vision.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="VAE to use instead of the base's or --dreambooth's, e.g. vae-ft-mse.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text encoder of Wan (UMT5), needed if its base is the transformer alone.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[:SCALE]",
            help="LoRA to merge into the weights; the default scale is 1. May be repeated.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Tokenizer folder for a base that is a single file. Default: openai/clip-vit-large-patch14.",
            rich_help_panel=_FILES,
            show_default=False,
        ),
    ] = None,
    prediction_type: Annotated[
        PredictionType | None,
        typer.Option(
            help="Prediction target that the UNet was trained for, if its file lacks it. Default: the file's.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        StoredType | None,
        typer.Option(
            help="Dtype of the stored weights. [default: fp16, of Wan bf16]",
            show_default=False,
        ),
    ] = None,
    reference_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks of Wan that take the reference, such as 10-14 or 4,8,12: those of an adapter that is to be "
            "trained. Default: 8-17 of 30, as many in proportion of others.",
            show_default=False,
        ),
    ] = None,
    reference_neighbours: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Frames of the reference on either side of its own that a frame of Wan sees, of latents: 20 are all "
            "of 81 frames. Default: 1.",
            min=0,
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Make one model folder from Stable Diffusion 1.5, an AnimateDiff motion module and the adapter, or from Wan 2.1.

    Prints the folder on stdout. The keys of every file are checked, and the folder's README.md records where each came
    from, its sha256, what was merged and what nothing reads.

    A SOURCE is a path, hf://owner/name/file, or hf://owner/name where a repository is the folder or holds one file of
    weights. What is fetched stays in the hub's cache, and needs no network from then on.

    The published files, which --published fetches (9 GB):

    Stable Diffusion 1.5: hf://stable-diffusion-v1-5/stable-diffusion-v1-5 (CreativeML Open RAIL-M).

    AnimateDiff v3: hf://guoyww/animatediff/v3_sd15_mm.ckpt (Apache-2.0).

    EfficientMT's adapter: hf://yfcai/EfficientMT/checkpoint.ckpt (Apache-2.0).

    Realistic Vision V6.0 B1: hf://guoyww/animatediff_t2i_backups/realisticVisionV60B1_v51VAE.safetensors, or
    civitai.com/models/4201 (CreativeML Open RAIL-M, with its author's terms).

    Wan 2.1, which needs no motion module: --base hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers (Apache-2.0; T2V-14B too).

    This program was written by the names and shapes that public code shows of these files. No file of the authors was
    opened in its making: what does not fit is named.
    """
    if published:
        addresses = {file.option: file.address for file in _PUBLISHED_FILES}
        base, motion_module = base or addresses["base"], motion_module or addresses["motion_module"]
        adapter, dreambooth = adapter or addresses["adapter"], dreambooth or addresses["dreambooth"]
    of_sd15 = {"motion_module": motion_module, "dreambooth": dreambooth}
    of_sd15["prediction_type"] = prediction_type.value if prediction_type else None
    of_reference = {"reference_blocks": reference_blocks, "reference_neighbours": reference_neighbours}
    network, parts = _network_and_parts(base, adapter, of_sd15, {"text_encoder": text_encoder}, of_reference)

    from emt.hub import expect_there, parse_lora

    # Before libraries are imported, which takes seconds.
    sources = (("base", base, True), ("motion module", motion_module, True), ("adapter", adapter, False))
    for kind, source, folder in (*sources, ("DreamBooth model", dreambooth, False), ("VAE", vae, True)):
        if source is not None:
            expect_there(source, kind, folder)

    from emt.remote import check_on_disk

    check_on_disk(output, "--output")
    importer = module_of(network, "import_weights")
    with _shown_progress() as on_progress:
        report = importer.import_weights(
            output,
            base=base,
            adapter=adapter,
            vae=vae,
            loras=[parse_lora(value) for value in lora or []],
            tokenizer=tokenizer,
            overwrite=overwrite,
            on_progress=on_progress,
            **parts,
            **({"dtype": dtype.value} if dtype else {}),
        )
    typer.echo(os.fsencode(report.folder))


def _network_and_parts(
    base: str | None,
    adapter: str | None,
    of_sd15: dict[str, str | None],
    of_wan: dict[str, str | None],
    of_reference: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The network that a base is of, by its name in `BACKBONES`, and what its importer takes besides.

    Args:
        base: the source.
        adapter: of which network it is depends on the base.
        of_sd15: options of Stable Diffusion 1.5 alone, by their parameters; None where they are not given.
        of_wan: of Wan alone.
        of_reference: of an adapter of Wan that is to be trained.

    Raises:
        UsageError: an option is of the other network, or one that is needed is missing.
    """
    network = next((name for name in OTHERS if base and module_of(name, "recognition").recognizes(base)), PUBLISHED)
    if network == PUBLISHED:
        if given := _given(of_wan | of_reference):
            raise UsageError(f"{', '.join(given)}: the base is no Wan", "Leave it out.")
        needed = {"--base": base, "--motion-module": of_sd15["motion_module"]}
        if missing := [name for name, source in needed.items() if source is None]:
            raise UsageError(f"{' and '.join(missing)} missing", "Give both, or --published for the published files.")
        return network, of_sd15
    if given := _given(of_sd15):
        raise UsageError(f"{', '.join(given)}: not of Wan, which {base} is", "Leave it out.")
    blocks = of_reference["reference_blocks"]
    parts = of_wan | of_reference | ({"reference_blocks": parse_blocks(blocks)} if blocks is not None else {})
    if adapter is not None and _given(of_reference):
        problem = "--reference-blocks and --reference-neighbours: those of the adapter are in its file"
        raise UsageError(problem, "Leave them out, or --adapter.")
    return network, parts


@contextmanager
def _shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, and in a log a line now and then; called with what is done, the steps done and all steps."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write over ours
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = stderr_console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Importing", total=1)
        written = time.monotonic()

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal written
            progress.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - written > _LOG_INTERVAL:
                say(f"{what} ({done} of {total} steps done)")
                written = time.monotonic()

        yield on_progress


def _given(options: Mapping[str, object]) -> list[str]:
    """Options, by their parameters, that have a value."""
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]


def parse_blocks(text: str) -> list[int]:
    """Numbers of blocks from a list such as `4-18` or `4,8,12`.

    Raises:
        UsageError: something in it is no number or rising range.
    """
    blocks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"--reference-blocks has {part!r}", "Blocks are as in 4-18 or 4,8,12.")
        blocks.update(range(first, last + 1))
    return sorted(blocks)
