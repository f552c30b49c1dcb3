"""`emt config`: options that hold, and where they come from."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from emt.errors import EmtError
from emt_cli import messages
from emt_cli.batch.options import SETTING_NAMES, TransferOptions, UsageError, parse_field
from emt_cli.commands.arguments import configuration
from emt_cli.commands.group import all_options, command_group, default_of
from emt_cli.config import Config, Option, user_file
from emt_cli.text import nearest, printable

config = command_group("Show the options in effect where the command line leaves them out, and their sources.")


@config.callback()
def _group() -> None: ...


@config.command()
def show(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="Command, such as train or engines list. Default: transfer."),
    ] = None,
) -> None:
    """Show the value of each option of a command, and its source: a variable, a config file, a preset, or the default.

    All sections of the config files are checked.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    commands = all_options()
    name = " ".join(command or ["transfer"])
    if name not in commands:
        near = nearest(name, commands)
        raise UsageError(f"no such command: {name}" + (f" (did you mean {near}?)" if near else ""))
    loaded, _ = configuration(context)
    loaded.check(commands)
    for path in loaded.files or (user_file(),):
        print(printable(f"# {path}" + ("" if loaded.files else ": not there, nor emt.toml here")))
    table = Table("option", "value", "from")
    for option, value, source in _rows(name, commands[name], loaded):
        table.add_row(Text(option), Text(printable(value)), Text(printable(source)))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    for preset, values in loaded.presets.items():
        shown = ", ".join(f"{key} = {getattr(value, 'value', value)}" for key, value in values.items())
        print(printable(f"preset {preset}: {shown}"))
    _check_variables(commands)


def _rows(command: str, options: list[Option], loaded: Config) -> list[tuple[str, str, str]]:
    """Name, value and source of each option."""
    found = loaded.values(command, options, all_options)
    variables = {
        option.parameter: next((name for name in option.variables(command) if os.environ.get(name)), "")
        for option in options
    }
    settings, sources = _settings(command, options, loaded, found, variables)
    rows = []
    for option in options:
        name, value, source = option.parameter, default_of(command, option.parameter), "default"
        if variable := variables[name]:
            value, source = os.environ[variable], f"variable {variable}"
        elif name in found:
            value, source = found[name][0], str(found[name][1])
        if name in settings:
            if source == "default" or settings[name] != _plain(parse_field(name, value)):
                source = sources.get(name, "default")
            value = settings[name]
        rows.append((f"--{option.names[0]}", _text(value), source))
    return rows


def _settings(
    command: str, options: list[Option], loaded: Config, found: dict[str, Any], variables: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of a clip as they hold, and the sources of those that a preset or the model sets; none elsewhere."""
    if command not in ("transfer", "plan"):
        return {}, {}
    from emt.model_folder import find_model
    from emt_cli.batch.inputs import preset_of, settings_of

    files = {name: parse_field(name, value) for name, (value, _) in found.items() if name in SETTING_NAMES}
    given = {}
    for name, variable in variables.items():
        if variable and name in SETTING_NAMES:
            with _from(f"the environment variable {variable}"):
                given[name] = parse_field(name, os.environ[variable])
    named, where = None, ""
    if variable := variables.get("model", ""):
        named, where = os.environ[variable], f"the environment variable {variable}"
    elif "model" in found:
        named, where = found["model"][0], str(found["model"][1])
    with _from(where):
        model = find_model(named, download=False)
    options_given = TransferOptions(background=(files, given), presets=loaded.presets)
    settings = settings_of(options_given, model.defaults)
    sources = dict.fromkeys(model.defaults, f"model {model.name}")
    sources |= dict.fromkeys(preset_of(options_given, settings.preset, model.defaults), f"preset {settings.preset}")
    return settings.as_dict(), sources


@contextmanager
def _from(where: str) -> Iterator[None]:
    """Context manager: an error is one of the usage, and names where the value is from."""
    try:
        yield
    except EmtError as error:
        raise UsageError(f"{where}: {error.problem}" if where else error.problem, error.hint) from None


def _plain(value: Any) -> Any:
    """A setting as `Settings.as_dict` has it."""
    return list(value) if isinstance(value, tuple) else getattr(value, "value", value)


def _text(value: Any) -> str:
    if value is None or value == "" or value is inspect.Parameter.empty:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(getattr(value, "value", value))


def _check_variables(commands: dict[str, list[Option]]) -> None:
    """Warn of variables that look like ours and set nothing."""
    known = {v for name, options in commands.items() for option in options for v in option.variables(name)}
    known |= {"EMT_CONFIG", "EMT_QUIET", "EMT_VERBOSE", "EMT_LOG_FILE"}
    for name in sorted(name for name in os.environ if name.startswith("EMT_") and name not in known):
        near = nearest(name, known)
        messages.say(f"warning: the variable {name} sets no option" + (f" (did you mean {near}?)" if near else ""))
