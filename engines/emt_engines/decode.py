"""Strict decoding of JSON into dataclasses: every value has the type of its field, or the text is damaged."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def loads(content: bytes) -> Any:
    """Parse JSON from an untrusted file.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has NaN or an infinity, which JSON does not know.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(content, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def decode(kind: type[T], value: Any) -> T:
    """An instance of a dataclass from parsed JSON.

    Args:
        kind: A dataclass of str, int, float, bool, None, Any, tuples, mappings, unions and dataclasses.
        value: Objects as dicts with exactly the dataclass's fields, tuples as lists.

    Raises:
        ValueError: a value is of another type, is missing or unexpected; names it by its path.
    """
    found: T = _decode(kind, value, "")
    return found


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {field.name for field in fields(kind)}
        if not isinstance(value, dict) or value.keys() != names:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{path or 'it'} has {found}, expected {sorted(names)}")
        return kind(**{name: _decode(hints[name], item, f"{path}.{name}".strip(".")) for name, item in value.items()})
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin is tuple and isinstance(value, list):
        kinds = (arguments[0],) * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(_decode(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(kinds, value)))
    elif origin is Mapping and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    elif kind is Any:
        return value
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif origin is None and type(value) is kind:  # a bool is no int here
        return value
    raise ValueError(f"{path} is {str(value)[:80]!r}")


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    for kind in kinds:
        try:
            return _decode(kind, value, path)
        except ValueError:
            continue
    raise ValueError(f"{path} is {str(value)[:80]!r}")
