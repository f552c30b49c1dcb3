"""The commands of the `emt` program, each imported when it is run."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from emt import __version__

COMMANDS = {
    "transfer": "Make clips that move like the references and show what the prompts say.",
    "plan": "Show what `emt transfer` with the same arguments would do, without loading anything.",
    "evaluate": "Measure how well results follow their references' motion and their prompts.",
    "report": "Write a page that shows references and results side by side, playing in sync.",
    "make-pairs": "Make pairs of clips with the same motion and different content, to train on.",
    "train": "Train the motion transfer adapter of a model on pairs of clips.",
    "build-engine": "Compile a model ahead of time for this GPU and chosen shapes.",
    "engines": "List, show, verify and prune the engines in the cache.",
    "bench": "Time the parts of a clip on this machine.",
    "rerun": "Make a result again from the settings it carries.",
    "doctor": "Look at GPU, driver, PyTorch, Triton, TensorRT, compiler, ffmpeg, model, disk and cache.",
    "import-weights": "Make one model folder from Stable Diffusion 1.5, a motion module and the adapter.",
}


#: A command line of each that works as it stands, or with names of the user's own; shown at the end of its help.
EXAMPLES = {
    "transfer": 'emt transfer clips/ --prompt "a red fox in the snow" --prompt "a yellow penguin in the desert" -o out',
    "plan": "emt plan clips/ --prompts prompts.txt -o out",
    "evaluate": "emt evaluate out",
    "report": "emt report out",
    "make-pairs": "emt make-pairs pairs --motions 1000",
    "train": "emt train --model models/rv --pairs pairs -o run --batch-size 4 --gradient-checkpointing",
    "build-engine": "emt build-engine --model models/rv --size 512x512,768x512 --batch 1..4",
    "bench": "emt bench --model models/rv --size 512x512",
    "rerun": "emt rerun out/clip_1f0c9a2e/a-fox-in-the-snow-0.mp4",
    "doctor": "emt doctor --model models/rv",
    "import-weights": "emt import-weights --base sd15/ --motion-module v3_sd15_mm.ckpt --adapter emt.ckpt -o models/rv",
}


class LazyGroup(TyperGroup):
    """Commands that are imported when they are run: `emt --help` answers before a large option table is built."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of a user's day."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build one command; its module and function are named after it."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        function = getattr(importlib.import_module(f"emt_cli.commands.{name}"), name)
        if isinstance(function, typer.Typer):
            return typer.main.get_command(function)
        single = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
        # A terminal has its own width: only paragraphs are kept of the lines that a docstring has.
        text = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        single.command(cmd_name, help=text, epilog=f"Example: {EXAMPLES[cmd_name]}", context_settings=_HELP)(function)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=LazyGroup,
    name="emt",
    help="Video motion transfer in batches: new clips that move like the references and show what the prompts say.",
    no_args_is_help=True,
    # Plain text: rich's Markdown alone takes as long to import as everything else here.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"emt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...
