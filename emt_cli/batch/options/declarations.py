"""Declarations of options, and the error of an invalid command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emt.errors import EmtError


class UsageError(EmtError):
    """Invalid command line: exit code 2."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Context manager: values of the command line are checked here, so an `EmtError` is a `UsageError`."""
    try:
        yield
    except EmtError as error:
        raise UsageError(error.problem, error.hint) from None


@dataclass(frozen=True)
class Field:
    """Declaration of one option of the command line.

    Attributes:
        help: Text of `--help`.
        panel: Heading under which `--help` lists it; empty for none.
        min: Smallest number allowed.
        max: Largest number allowed.
        metavar: Name of its value in `--help`; empty for its type's.
        short: Its one-letter name, such as `-o`; empty for none.
        also: Other long names, by which users of other programs know it.
        positional: Takes the arguments that no option claims.
        show_default: `--help` shows the default.
        words: Words that may stand in place of a number.
    """

    help: str
    panel: str = ""
    min: float | None = None
    max: float | None = None
    metavar: str = ""
    short: str = ""
    also: tuple[str, ...] = ()
    positional: bool = False
    show_default: bool = True
    words: tuple[str, ...] = ()
