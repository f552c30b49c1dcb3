"""Config files: options of commands and presets, in TOML.

    model = "models/rv"          # of every command that has such an option

    [transfer]                   # of one command; emt plan reads them too
    steps = 12
    lora = ["film.safetensors:0.7"]

    [presets.draft]              # --preset draft, and "preset": "draft" in job lines
    steps = 6
    scheduler = "dpm++"

Of several files the later one wins, option by option; in a file a command's own section wins over the top. Nothing is
declared here: which options there are, and of which type, follows from the parameters of the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from emt.errors import EmtError
from emt.presets import PRESETS
from emt_cli.batch.options import SETTING_NAMES, UsageError, field_name, parse_field
from emt_cli.text import nearest

FILE_NAME = "emt.toml"
_PRESETS = "presets"
_MOST = 4 << 20  # bytes of a file
#: Options that an empty text says something about; elsewhere it would name the working folder or the demo model.
MAY_BE_EMPTY = ("prompt", "negative_prompt")
#: Options of a command that its own section alone sets: elsewhere the name means another kind of file.
OWN = ("out", "output")
#: Options that every command has, which files do not set.
COMMON = ("config", "quiet", "verbose", "log_file")
_SECTIONS = {"plan": ("transfer", "plan")}  # of a command, where they are more than its own


@dataclass(frozen=True)
class Option:
    """An option of a command, as files and the environment name it.

    Attributes:
        parameter: Name of the command's parameter.
        names: Its long names without dashes in front, such as `guidance-scale`.
        kind: Type of its value, or of each of its values.
        multiple: It takes several.
        min: Smallest number allowed.
        max: Largest number allowed.
        own: Set by the command's own section, or its own variable, alone.
        metavar: What its help shows in place of a value, such as `WxH|NAME`; empty where that says no more than `kind`.
    """

    parameter: str
    names: tuple[str, ...]
    kind: type
    multiple: bool = False
    min: float | None = None
    max: float | None = None
    own: bool = False
    metavar: str = ""

    def variables(self, command: str) -> list[str]:
        """Environment variables that set it, the first that is set wins; none if it takes several texts."""
        names = [name.upper().replace("-", "_") for name in self.names]
        prefix = command.upper().replace("-", "_").replace(" ", "_")
        found = [f"EMT_{prefix}_{name}" for name in names] + ([] if self.own else [f"EMT_{name}" for name in names])
        return [] if self.multiple and self.kind is not Path else found  # others would be taken apart at spaces

    def read(self, value: Any, where: str) -> Any:
        """A value of a file in the type of the option.

        Raises:
            EmtError: it is of another type, or not allowed.
        """
        if self.multiple:
            return [self._read_one(one, where) for one in (value if isinstance(value, list) else [value])]
        return self._read_one(value, where)

    def _read_one(self, value: Any, where: str) -> Any:
        given, number = value, isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is bool:
            allowed, fits = "true or false", isinstance(value, bool)
        elif issubclass(self.kind, Enum):
            values = [str(member.value) for member in self.kind]
            near = nearest(value, values) if isinstance(value, str) else ""
            allowed = ", ".join(values) + (f" (did you mean {near}?)" if near else "")
            try:
                value, fits = self.kind(value).value, True
            except ValueError:
                fits = False
        elif self.kind in (int, float):
            low, high = (f" {text} {limit:g}" if limit is not None else "" for text, limit in self._limits())
            allowed = ("a whole number" if self.kind is int else "a number") + low + high
            number = number and (self.kind is float or isinstance(value, int))
            low_enough = number and (self.max is None or value <= self.max)
            fits = low_enough and (self.min is None or value >= self.min)
        else:
            may_be_empty = self.parameter in MAY_BE_EMPTY
            allowed = "a text" if may_be_empty else "a text that is not empty"
            allowed += " without zero bytes" if isinstance(value, str) and "\0" in value else ""
            allowed += f" ({self.metavar})" if self.metavar else ""
            fits = number or (isinstance(value, str) and "\0" not in value and (value != "" or may_be_empty))
            value = str(value)
        if not fits:
            alone = ", and no list" if isinstance(given, list) and not self.multiple else ""
            raise EmtError(f"{where} is {_toml(given):.80}; allowed: {allowed}{alone}")
        return value

    def _limits(self) -> tuple[tuple[str, float | None], tuple[str, float | None]]:
        return ("from", self.min), ("to" if self.min is not None else "up to", self.max)


def _toml(value: Any) -> str:
    """A value as the file has it, nearly."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())}}}"
    return value.isoformat() if isinstance(value, date | time) else repr(value)


@dataclass(frozen=True)
class Config:
    """Config files that hold, the strongest last.

    Attributes:
        files: Their paths.
        tables: Their contents.
        presets: Presets that they define, checked: values by setting.
    """

    files: tuple[Path, ...] = ()
    tables: tuple[Mapping[str, Any], ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, given: Path | None = None) -> Config:
        """Read the file that is given, or else those that are found: the user's, and the working folder's over it.

        Raises:
            UsageError: one cannot be read or is no TOML, or a preset is not allowed.
        """
        # Another user's home folder, as in a container, has no file of this one's, and may not be looked into.
        files = (
            [given] if given is not None else [path for path in (user_file(), Path(FILE_NAME)) if os.path.isfile(path)]
        )
        tables = tuple(_parse(path) for path in files)
        presets: dict[str, Mapping[str, Any]] = {}
        for path, table in zip(files, tables):
            presets |= _presets(path, table.get(_PRESETS, {}))
        return cls(tuple(files), tables, presets)

    def values(
        self, command: str, options: Sequence[Option], others: Callable[[], Mapping[str, Sequence[Option]]]
    ) -> dict[str, tuple[Any, Path]]:
        """Values of a command's options, each with the file that sets it.

        Args:
            command: Its name, such as `transfer` or `engines list`.
            options: Its options.
            others: Called for the options of all commands where a name may be another command's.

        Raises:
            UsageError: a section or a key is unknown, or a value not allowed.
        """
        found: dict[str, tuple[Any, Path]] = {}
        known = {name: option for option in options for name in option.names}
        sections = _SECTIONS.get(command, (command,))
        for path, table in zip(self.files, self.tables):
            top = {key: value for key, value in table.items() if not isinstance(value, dict)}
            _check_sections(path, table, others)
            _check_names(path, top, known, "the top")
            for key, value in top.items():
                option = known.get(key.replace("_", "-"))
                if option is not None and not option.own:
                    found[option.parameter] = _read(option, value, path, key), path
                elif option is None or option.own:
                    _check_top(path, key, others)
            for section in sections:
                _check_names(path, _section(table, section), known, f"[{section}]")
                for key, value in _section(table, section).items():
                    option = known.get(key.replace("_", "-"))
                    if option is None:
                        raise _unknown(path, f"[{section}] has no option {key!r}", key, known)
                    found[option.parameter] = _read(option, value, path, f"[{section}] {key}"), path
        return found

    def check(self, commands: Mapping[str, Sequence[Option]]) -> None:
        """Check the sections of all commands.

        Raises:
            UsageError: as for `values`.
        """
        for command, options in commands.items():
            self.values(command, options, lambda: commands)


def user_file() -> Path:
    """The user's config file: in ~/.config/emt (or $XDG_CONFIG_HOME), %APPDATA%\\emt, or Application Support."""
    return Path(typer.get_app_dir("emt")) / FILE_NAME


def _parse(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST + 1)
        if len(content) > _MOST:  # such as /dev/zero, which has no end
            raise UsageError(f"{path} is larger than {_MOST >> 20} MiB, so no config file", "Name a TOML file.")
        return tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Name a TOML file with --config.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {' '.join(str(error).split())}") from None


def _presets(path: Path, table: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(table, dict) or not all(isinstance(values, dict) for values in table.values()):
        raise UsageError(f"{path}: presets are sections, as in [{_PRESETS}.draft]")
    for name, values in table.items():
        if name in PRESETS:
            raise UsageError(f"{path}: [{_PRESETS}.{name}] is a preset of emt; give yours another name")
        allowed = [setting for setting in SETTING_NAMES if setting != "preset"]
        seen: dict[str, str] = {}
        for key in values:
            if (setting := field_name(key.replace("-", "_"))) not in allowed:
                raise _unknown(path, f"[{_PRESETS}.{name}] has no setting {key!r}", key, allowed)
            _check_once(path, seen, setting, key, f"[{_PRESETS}.{name}]")
    try:
        return {
            name: {
                (setting := field_name(key.replace("-", "_"))): parse_field(setting, value)
                for key, value in values.items()
            }
            for name, values in table.items()
        }
    except EmtError as error:
        raise UsageError(f"{path}: [{_PRESETS}]: {error.problem}. {error.hint}") from None


def _section(table: Mapping[str, Any], command: str) -> Mapping[str, Any]:
    """The section of a command; of a command in a group, such as `engines list`, the section in the group's."""
    for name in command.split():
        inner = table.get(name, table.get(name.replace("-", "_"), {}))
        table = inner if isinstance(inner, dict) else {}
    return {key: value for key, value in table.items() if not isinstance(value, dict)}


def _check_sections(path: Path, table: Mapping[str, Any], others: Callable[[], Mapping[str, Sequence[Option]]]) -> None:
    sections = {key: value for key, value in table.items() if isinstance(value, dict)}
    nested = any(isinstance(value, dict) for value in sections.get("transfer", {}).values())
    if not nested and not sections.keys() - {_PRESETS, "transfer"}:
        return
    commands = others()
    groups = {name.partition(" ")[0] for name in commands}
    for key, value in sections.items():
        if key.replace("_", "-") not in groups | {_PRESETS}:
            for options in commands.values():
                _check_no_table(path, options, key, value, key)
            raise _unknown(path, f"there is no section [{key}]", key, groups | {_PRESETS})
        for inner, content in value.items() if key != _PRESETS else ():
            if isinstance(content, dict) and f"{key} {inner}" not in commands:
                _check_no_table(path, commands.get(key.replace("_", "-"), ()), inner, content, f"[{key}] {inner}")
                raise _unknown(path, f"there is no section [{key}.{inner}]", f"{key} {inner}", commands)
            for last, table in content.items() if isinstance(content, dict) else ():
                if isinstance(table, dict):
                    _check_no_table(path, commands[f"{key} {inner}"], last, table, f"[{key}.{inner}] {last}")
                    raise UsageError(f"{path}: there is no section [{key}.{inner}.{last}]")
            if not isinstance(content, dict) and key.replace("_", "-") not in commands:
                own = ", ".join(f"[{name.replace(' ', '.')}]" for name in commands if name.startswith(f"{key} "))
                raise UsageError(f"{path}: [{key}] has no options, so no {inner!r}: its commands have, as in {own}")


def _check_no_table(path: Path, options: Sequence[Option], name: str, table: Any, where: str) -> None:
    """Raise the `UsageError` of an option's value if a table has the name of one."""
    for option in options:
        if name.replace("_", "-") in option.names:
            _read(option, table, path, where)


def _check_top(path: Path, key: str, others: Callable[[], Mapping[str, Sequence[Option]]]) -> None:
    """Raise `UsageError` unless a key at the top is an option of another command."""
    commands = others()
    names = {name for options in commands.values() for option in options for name in option.names}
    if key.replace("_", "-") not in names:
        raise _unknown(path, f"no command has an option {key!r}", key, names)


def _check_names(path: Path, table: Mapping[str, Any], known: Mapping[str, Option], where: str) -> None:
    """Raise `UsageError` if a table has an option by two of its names."""
    seen: dict[str, str] = {}
    for key in table:
        if (option := known.get(key.replace("_", "-"))) is not None:
            _check_once(path, seen, option.parameter, key, where)


def _check_once(path: Path, seen: dict[str, str], parameter: str, key: str, where: str) -> None:
    if (first := seen.setdefault(parameter, key)) != key:
        raise UsageError(f"{path}: {where} has {first!r} and {key!r}, which are one option: leave one of them out")


def _read(option: Option, value: Any, path: Path, where: str) -> Any:
    try:
        return option.read(value, where)
    except EmtError as error:
        raise UsageError(f"{path}: {error.problem}") from None


def _unknown(path: Path, problem: str, key: str, known: Any) -> UsageError:
    if (parameter := key.replace("-", "_")) in COMMON:
        option, variable = parameter.replace("_", "-"), f"EMT_{parameter.upper()}"
        return UsageError(f"{path}: {key!r} is not set by config files: give --{option}, or set {variable}")
    near = nearest(key, known) or nearest(key.replace("_", "-"), known)
    return UsageError(f"{path}: {problem}" + (f" (did you mean {near}?)" if near else ""))
