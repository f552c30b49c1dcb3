"""Declarations of options as typer's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from emt_cli.batch.options import SETTING_NAMES, Field, Settings, TransferOptions, parse_field, usage_errors


def takes_options(command: Callable[[TransferOptions], None]) -> Callable[..., None]:
    """Give a command one parameter for each option and setting; it is called with the `TransferOptions`.

    Settings left out on the command line are absent from `TransferOptions.settings`, so that a model's own
    defaults can be distinguished from what the user gave. A value that is not allowed is a `UsageError`.
    """

    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in SETTING_NAMES}
        with usage_errors():
            # An option that may be repeated is an empty list where it is left out.
            settings = {name: parse_field(name, value) for name, value in values.items() if value not in (None, [])}
        options = TransferOptions(**given, settings=settings)
        options.check()
        command(options)

    parameters = []
    hints = get_type_hints(TransferOptions, include_extras=True) | get_type_hints(Settings, include_extras=True)
    for option in fields(TransferOptions):
        if option.name != "settings":
            kind, declared = get_args(hints[option.name])
            parameters.append(_parameter(option.name, kind, declared, option.default))
    for name in SETTING_NAMES:
        kind, declared = get_args(hints[name])
        kind = list[str] if get_origin(kind) is tuple else kind
        parameters.append(_parameter(name, kind | None, declared, None))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _parameter(name: str, kind: Any, declared: Field, default: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    known: dict[str, Any] = {"help": declared.help, "show_default": declared.show_default}
    known |= {"min": declared.min, "max": declared.max}
    known |= {"rich_help_panel": declared.panel or None, "metavar": declared.metavar or None}
    if declared.positional:
        info = typer.Argument(**known)
    else:
        # Names are spelled out where typer would add others: of flags, a --no-… beside them.
        long = f"--{name.replace('_', '-')}"
        names = [long, declared.short] if declared.short else [long] if kind is bool else []
        info = typer.Option(*names, **known)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)
