"""Declarations of options as typer's parameters, and what all commands have in common."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from emt.errors import EmtError
from emt.remote import distinct
from emt_cli import messages
from emt_cli.batch.options import (
    SETTING_NAMES,
    Field,
    Settings,
    TransferOptions,
    UsageError,
    parse_field,
    usage_errors,
)
from emt_cli.config import COMMON, FILE_NAME, OWN, Config, Option

#: Other names of an option, by which users of other commands, or of other programs, know it.
_ALSO = {"--out": ("--output",), "--output": ("--out",), "--model": ("-m",)}

#: Names of values in `--help`, by their types; typer's own are Python's.
_METAVARS: dict[Any, str] = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}
COMMON_PANEL = "Common options"  # heading of those that every command has


def takes_options(command: Callable[[TransferOptions], None]) -> Callable[..., None]:
    """Give a command one parameter for each option and setting; it is called with the `TransferOptions`.

    Settings left out on the command line are absent from `TransferOptions.settings`, so that a model's own
    defaults can be distinguished from what the user gave. A value that is not allowed is a `UsageError`.
    """
    return _taking(command)


def takes_options_and_folders(command: Callable[[TransferOptions], None]) -> Callable[..., None]:
    """As `takes_options`, but `--out` may be repeated: `TransferOptions.others` has those after the first."""
    return _taking(command, several=True)


def _taking(command: Callable[[TransferOptions], None], several: bool = False) -> Callable[..., None]:
    def run(context: typer.Context, **given: Any) -> None:
        config, files = configuration(context)
        layers: dict[str, dict[str, Any]] = {"DEFAULT_MAP": {}, "ENVIRONMENT": {}, "COMMANDLINE": {}}
        for name in SETTING_NAMES:
            # An option that may be repeated is an empty list where it is left out.
            if (value := given.pop(name)) not in (None, [], ()):
                source = getattr(context.get_parameter_source(name), "name", "")
                try:
                    layers.get(source, layers["COMMANDLINE"])[name] = parse_field(name, value)
                except EmtError as error:
                    raise UsageError(f"{_origin(context, files, name)}{error.problem}", error.hint) from None
        settings = layers.pop("COMMANDLINE")
        if several:
            given["out"], *given["others"] = distinct(given["out"])
        options = TransferOptions(**given, settings=settings, background=tuple(layers.values()), presets=config.presets)
        try:
            options.check()
        except UsageError as error:
            name = error.problem.partition(" ")[0].removeprefix("--").replace("-", "_")
            raise UsageError(f"{_origin(context, files, name)}{error.problem}", error.hint) from None
        command(options)

    parameters = []
    hints = get_type_hints(TransferOptions, include_extras=True) | get_type_hints(Settings, include_extras=True)
    for option in fields(TransferOptions):
        if option.name in hints and get_origin(hints[option.name]) is Annotated:
            kind, declared = get_args(hints[option.name])
            default: Any = option.default
            if several and option.name == "out":
                kind, default = list[Path], [default]
                declared = replace(declared, help=f"{declared.help} Repeated: what another one has is done, too.")
            parameters.append(_parameter(option.name, kind, declared, default))
    for name in SETTING_NAMES:
        kind, declared = get_args(hints[name])
        kind = list[str] if get_origin(kind) is tuple else kind
        parameters.append(_parameter(name, kind | None, declared, None))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return _with_parameters(run, [context, *parameters], command)


def _origin(context: typer.Context, files: Mapping[str, Path], name: str) -> str:
    """The file or the variable that sets an option, before what is said of it; nothing on the command line."""
    source = getattr(context.get_parameter_source(name), "name", "") if name in context.params else ""
    if source == "ENVIRONMENT":
        return "an environment variable: "
    return f"{files[name]}: " if source == "DEFAULT_MAP" and name in files else ""


def _parameter(name: str, kind: Any, declared: Field, default: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    known: dict[str, Any] = {"help": declared.help, "show_default": declared.show_default}
    if declared.words:  # `parse_field` checks numbers, too
        kind = str | None
    else:
        known |= {"min": declared.min, "max": declared.max}
    known |= {"rich_help_panel": declared.panel or None, "metavar": declared.metavar or None}
    for choice in get_args(kind):
        if "_missing_" in vars(choice):  # the parser's own list of choices would refuse the spellings that it takes
            known |= {"parser": _reader(choice), "metavar": f"<{'|'.join(member.value for member in choice)}>"}
    if declared.positional:
        info = typer.Argument(**known)
    else:
        # Names are spelled out: typer would add others to flags, a --no-… beside them.
        names = [f"--{name.replace('_', '-')}", *declared.also, *([declared.short] if declared.short else [])]
        info = typer.Option(*names, **known)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def _reader(choice: type[Enum]) -> Callable[[str], str]:
    """A parser of the values of a choice, in any spelling that it takes."""

    def read(text: str) -> str:
        try:
            return str(choice(text).value)
        except ValueError:
            allowed = ", ".join(repr(str(member.value)) for member in choice)
            raise typer.BadParameter(f"{text!r} is not one of {allowed}") from None

    return read


def completed(
    command: Callable[..., None], name: str, others: Callable[[], Mapping[str, Sequence[Option]]]
) -> Callable[..., None]:
    """A command as all of them are.

    Its options have the names, too, by which users of other commands and programs know them; where the command line
    leaves one out, the environment and config files set it; and it has the options of `_Common`.

    Args:
        command: The command.
        name: Its name, such as `transfer` or `engines list`.
        others: Called for the options of all commands, where a config file names one that this command lacks.
    """
    parameters, options = [], options_of(command)
    by_name = {option.parameter: option for option in options}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        info = option_info(parameter)
        if info is not None:
            info = copy.copy(info)
            info.default, info.param_decls = ..., _names(parameter)
            info.envvar, info.show_envvar = by_name[parameter.name].variables(name) or None, False
            if info.metavar is None:
                info.metavar = _metavar(by_name[parameter.name].kind)
            parameter = parameter.replace(annotation=Annotated[get_args(parameter.annotation)[0], info])
        parameters.append(parameter)

    running: list[typer.Context] = []

    def load(context: typer.Context, config: Path | None) -> Path | None:
        if not context.resilient_parsing:
            running[:] = [context]
            loaded = Config.load(config)
            found = loaded.values(name, options, others)
            context.default_map = {parameter: value for parameter, (value, _) in found.items()}
            context.meta[_META] = loaded, {parameter: path for parameter, (_, path) in found.items()}
        return config

    def run(**given: Any) -> None:
        common = {parameter: given.pop(parameter) for parameter in COMMON}
        config = common.pop("config")
        with usage_errors():
            messages.start(**_one_loudness(running[0], **common))
        if config is None and Path(FILE_NAME).is_file():  # a file that nobody has named may be anybody's
            messages.say(f"options from {FILE_NAME}")
        command(**given)

    for common, (kind, info) in _common(load).items():
        known = {"annotation": Annotated[kind, info], "default": False if kind is bool else None}
        parameters.append(inspect.Parameter(common, inspect.Parameter.KEYWORD_ONLY, **known))
    return _with_parameters(run, parameters, command)


_META = "emt.config"


def _one_loudness(context: typer.Context, quiet: bool, verbose: bool, **others: Any) -> dict[str, Any]:
    """These options, of --quiet and --verbose that of the command line where an environment variable sets the other.

    Raises:
        EmtError: both are given, or both are set.
    """
    if quiet and verbose:
        given = [getattr(context.get_parameter_source(name), "name", "") for name in ("quiet", "verbose")]
        if given[0] == given[1]:
            raise EmtError("--quiet and --verbose exclude each other", "Give one of them.")
        quiet, verbose = (name == "COMMANDLINE" for name in given)
    return {"quiet": quiet, "verbose": verbose, **others}


def _common(load: Callable[..., Any]) -> dict[str, tuple[Any, OptionInfo]]:
    """Options that every command has."""
    panel: dict[str, Any] = {"rich_help_panel": COMMON_PANEL, "show_envvar": False}
    config = typer.Option(
        "--config",
        help=f"Config file. Default: {FILE_NAME} here, over the one in your config folder (emt config show).",
        metavar="FILE",
        envvar="EMT_CONFIG",
        is_eager=True,
        callback=load,
        show_default=False,
        **panel,
    )
    quiet = typer.Option(
        "--quiet", "-q", help="Show warnings and errors alone.", envvar="EMT_QUIET", metavar="", **panel
    )
    verbose = typer.Option("--verbose", "-v", help="Show details too.", envvar="EMT_VERBOSE", metavar="", **panel)
    log = typer.Option(
        "--log-file",
        help="Keep all messages in this file, whatever is shown.",
        metavar="FILE",
        envvar="EMT_LOG_FILE",
        show_default=False,
        **panel,
    )
    return {
        "config": (Path | None, config),
        "quiet": (bool, quiet),
        "verbose": (bool, verbose),
        "log_file": (Path | None, log),
    }


def configuration(context: typer.Context) -> tuple[Config, dict[str, Path]]:
    """The config files of a running command, and the file that sets each parameter that they set."""
    return context.meta.get(_META, (Config(), {}))


def _metavar(kind: Any) -> str | None:
    """Name of an option's value in `--help`: that of its type, or all values that there are."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return _METAVARS.get(kind)


def options_of(command: Callable[..., Any]) -> list[Option]:
    """The options of a command, from its parameters."""
    found, general = [], command.__module__ == __name__  # made by `takes_options`
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        info = option_info(parameter)
        if info is None:
            continue
        kind = get_args(parameter.annotation)[0]
        alternatives = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        kind = next(one for one in alternatives if one is not type(None))
        multiple = get_origin(kind) is list
        kind = get_args(kind)[0] if multiple else kind
        long = tuple(name.partition("/")[0][2:] for name in _names(parameter) if name.startswith("--"))
        own = parameter.name in OWN and not general
        metavar = info.metavar if isinstance(info.metavar, str) and kind is str else ""
        found.append(Option(parameter.name, long, kind, multiple, info.min, info.max, own, metavar))
    return found


def _names(parameter: inspect.Parameter) -> tuple[str, ...]:
    """All names of an option with their dashes: those of its declaration, and those that all commands know."""
    names = option_names(parameter)
    return (*names, *(other for name in names for other in _ALSO.get(name, ()) if other not in names))


def option_info(parameter: inspect.Parameter) -> OptionInfo | None:
    """Declaration of an option; None for another parameter."""
    if get_origin(parameter.annotation) is not Annotated:
        return None
    return next((info for info in get_args(parameter.annotation)[1:] if isinstance(info, OptionInfo)), None)


def option_names(parameter: inspect.Parameter) -> list[str]:
    """Names of an option with their dashes, as typer gives them where the declaration does not."""
    info = option_info(parameter)
    declared = (info.default, *(info.param_decls or ())) if info is not None else ()
    if names := [name for name in declared if isinstance(name, str)]:
        return names  # typer keeps the first one as the default, as it has none of its own in an annotation
    name = parameter.name.replace("_", "-")
    return [f"--{name}/--no-{name}" if get_args(parameter.annotation)[0] is bool else f"--{name}"]


def _with_parameters(
    run: Callable[..., None], parameters: Sequence[inspect.Parameter], command: Callable[..., Any]
) -> Callable[..., None]:
    """Give a function the parameters that typer is to see, and the name and the text of a command."""
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
