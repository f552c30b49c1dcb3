"""The commands of the `emt` program, each imported when it is run."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from emt import __version__
from emt_cli.text import nearest

if TYPE_CHECKING:
    from emt_cli.config import Option

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
    "rerun": "Reproduce a result from the settings embedded in it.",
    "doctor": "Check GPU, driver, PyTorch, Triton, TensorRT, compiler, ffmpeg, model, disk and cache.",
    "config": "Show the options in effect where the command line leaves them out, and their sources.",
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


class Command(TyperCommand):
    """A command with flags that the command line can turn off, too, where a config file turns them on."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, listed among the options that every command has."""
        from emt_cli.commands.arguments import COMMON_PANEL

        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.metavar, option.rich_help_panel = "", COMMON_PANEL
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; an empty one, as of a variable that is not set, would name the working folder."""
        from emt_cli.config import MAY_BE_EMPTY

        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        parameter: Any
        for parameter in self.params:
            value = given[parameter.name] if parameter.name in given else parameter.value_from_envvar(ctx)
            if parameter.name not in MAY_BE_EMPTY and (
                value == "" or (isinstance(value, (list, tuple)) and "" in value)
            ):
                raise typer.BadParameter("it is empty", ctx=ctx, param=parameter)
        return list(super().parse_args(ctx, args))

    def make_parser(self, ctx: Any) -> Any:
        """The parser, which knows `--no-…` of every flag; help names the flags alone."""
        flags: list[Any] = [
            parameter
            for parameter in self.params
            if getattr(parameter, "is_flag", False) and not parameter.secondary_opts and not parameter.is_eager
        ]
        for flag in flags:
            flag.secondary_opts = [f"--no-{name[2:]}" for name in flag.opts if name.startswith("--")]
        try:
            return super().make_parser(ctx)
        finally:
            for flag in flags:
                flag.secondary_opts = []


class LazyGroup(TyperGroup):
    """Commands that are imported when they are run: `emt --help` answers before a large option table is built."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of a user's day."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build one command; its module and function are named after it."""
        if cmd_name not in COMMANDS:
            return None
        from emt_cli.commands.arguments import completed

        function = _function(cmd_name)
        if isinstance(function, typer.Typer):
            group = copy.copy(function)
            group.registered_commands = [copy.copy(known) for known in function.registered_commands]
            for known in group.registered_commands:
                assert known.callback is not None
                known.callback = completed(known.callback, f"{cmd_name} {_name(known)}", all_options)
                known.cls = Command
            return typer.main.get_command(group)
        single = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
        # A terminal has its own width: only paragraphs are kept of the lines that a docstring has.
        text = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        single.command(
            cmd_name, cls=Command, help=_literal(text), epilog=f"Example: {EXAMPLES[cmd_name]}", context_settings=_HELP
        )(completed(function, cmd_name, all_options))
        command = typer.main.get_command(single)
        for parameter in command.params:
            parameter.help = _literal(getattr(parameter, "help", None) or "")  # type: ignore[attr-defined]
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _literal(text: str) -> str:
    """Text for rich, which takes words in brackets for its markup."""
    return text.replace("[", r"\[")


def _function(command: str) -> Any:
    """The function of a command, or the group that it is."""
    name = command.replace("-", "_")
    return getattr(importlib.import_module(f"emt_cli.commands.{name}"), name)


def _name(known: Any) -> str:
    """Name of a command of a group."""
    return known.name or known.callback.__name__.replace("_", "-")


def all_options() -> dict[str, list[Option]]:
    """The options of all commands by name; imports them all."""
    from emt_cli.commands.arguments import options_of

    return {name: options_of(function) for name, function in _functions()}


def _functions() -> Iterator[tuple[str, Any]]:
    """All commands by name, those of groups as `engines list`, with their functions."""
    for command in COMMANDS:
        function = _function(command)
        if isinstance(function, typer.Typer):
            yield from ((f"{command} {_name(known)}", known.callback) for known in function.registered_commands)
        else:
            yield command, function


def default_of(command: str, parameter: str) -> Any:
    """Default of a command's parameter."""
    function = dict(_functions())[command]
    return inspect.signature(function).parameters[parameter].default


def describe_error(error: Any) -> str:
    """An error of the parser in one line: the argument, the nearest that there is, and where all are listed."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    text = " ".join(error.format_message().split()).removeprefix("Invalid value: ").rstrip(".")
    if context is None:
        return text
    near = ""
    if parameter is not None and (value := re.match("Invalid value for .*?: (.*)", text)):
        problem = value[1].removeprefix("Value error, ")
        text = f"invalid value for {_source_of(context, parameter)}: {problem}"
        if chosen := re.match("'(.*?)' is not one of (.*)", problem):
            near = nearest(chosen[1], re.findall("'(.*?)'", chosen[2]))
    elif unknown := re.match(r"No such option:? '?(\S+?)'?\.?(?: |$)", text):  # newer parsers quote it
        options = [name for known in context.command.params for name in (*known.opts, *known.secondary_opts)]
        text, near = f"no such option: {unknown[1]}", nearest(unknown[1], [*options, "--help"])
    elif unknown := re.match("No such command '(.*?)'", text):
        text, near = f"no such command: {unknown[1]}", nearest(unknown[1], context.command.list_commands(context))
    text = text[:1].lower() + text[1:] + (f" (did you mean {near}?)" if near else "")
    return f"{text}; {context.command_path} --help lists what is allowed"


def _source_of(context: Any, parameter: Any) -> str:
    """An option or argument as the user gave it."""
    source = getattr(context.get_parameter_source(parameter.name), "name", "")
    if source == "ENVIRONMENT":
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
        return next((f"the environment variable {name}" for name in names if os.environ.get(name)), parameter.name)
    return max(parameter.opts, key=lambda name: name.startswith("--"), default=parameter.name)


_HELP = {"help_option_names": ["-h", "--help"]}


def command_group(text: str) -> typer.Typer:
    """A group of commands inside the program, such as `emt engines`.

    Args:
        text: Its help.
    """
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings=_HELP,
    )


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
