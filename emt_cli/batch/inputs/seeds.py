"""Seeds that are drawn once for an output folder and kept in it: run again, it has the same clips to make."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path

from emt.errors import EmtError
from emt.storage import exclusive, open_file, write_atomically

FILE_NAME = "seeds.json"
_LOCK_NAME = ".seeds.lock"
_LARGEST = 2**32 - 1  # as other programs draw them: short enough to be typed again


def draw_seeds(out: Path, count: int, *, keep: bool, say: Callable[[str], None] = lambda text: None) -> list[int]:
    """The first seeds of an output folder: those that it keeps, and new ones as far as these are too few.

    Args:
        out: The output folder. Several processes may draw at once, and get the same.
        count: Number of seeds.
        keep: Keep new ones; a plan keeps none.
        say: Called with a line where seeds are shown that are not kept.

    Raises:
        EmtError: the folder cannot be written to, or what it keeps is damaged.
    """
    if not keep:
        known = _read(out / FILE_NAME)
        if len(known) < count:
            say(f"note: of the {count} random seeds {count - len(known)} are not drawn yet: others stand for them here")
        return _filled(known, count)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / _LOCK_NAME):
            known = _read(out / FILE_NAME)
            drawn = _filled(known, count)
            if len(known) < count:
                write_atomically(out / FILE_NAME, json.dumps({"seeds": drawn}).encode() + b"\n")
    except OSError as error:
        raise EmtError(f"cannot write to {out}: {error.strerror}", "Name another folder with --out.") from None
    return drawn


def _filled(known: list[int], count: int) -> list[int]:
    drawn = dict.fromkeys(known)
    while len(drawn) < count:
        drawn[secrets.randbelow(_LARGEST + 1)] = None
    return list(drawn)[:count]


def _read(path: Path) -> list[int]:
    try:
        with open_file(path) as file:
            seeds = json.loads(file.read())["seeds"]
        if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed <= _LARGEST for seed in seeds):
            raise ValueError
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EmtError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise EmtError(f"{path} is damaged", "Remove it, and random seeds are drawn anew.") from None
    return list(dict.fromkeys(seeds))
