"""Fields of a job, checked against the declarations of settings: of job files, options and model folders."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from emt.errors import EmtError
from emt.hub import split_word
from emt.prompt_syntax import parse_schedule
from emt_cli.batch.options.settings import ALL_FRAMES, SIZE_NAMES, Audio, Format, Settings, with_source
from emt_cli.text import nearest

MAX_SEED = 2**63 - 1
MAX_PROMPT = 4_000  # characters; a text encoder reads fewer than a hundred words
MAX_SEEDS = 1_000_000
_HUB_ID = re.compile(r"[\w.-]+/[\w-]+")


def _hints() -> dict[str, tuple[type, bool, Any]]:
    hints = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        annotation, info = get_args(hint)
        alternatives = get_args(annotation)
        optional = type(None) in alternatives
        kind = alternatives[0] if optional else annotation
        hints[name] = (tuple if get_origin(kind) is tuple else kind, optional, info)
    return hints


_HINTS = _hints()
SETTING_NAMES = tuple(_HINTS)
JOB_FIELDS = ("reference", "prompt", "seed", *SETTING_NAMES)
#: Fields that are texts, or may be.
TEXT_FIELDS = ("reference", "prompt", *(n for n, (kind, *_) in _HINTS.items() if kind in (str, tuple)))
_ALSO = {other[2:].replace("-", "_"): name for name, (*_, info) in _HINTS.items() for other in info.also}


def field_name(name: str) -> str:
    """The name of a field of a job, which may be given by another one of its option, such as `guidance_scale`.

    Capitals, dashes for underscores and spaces around it do not count.
    """
    name = name.strip().lower().replace("-", "_")
    return _ALSO.get(name, name)


def unknown_field(name: str) -> EmtError:
    """The error that a job has no such field, with the nearest that it has."""
    near = nearest(name, (*JOB_FIELDS, *_ALSO))
    hint = f"Did you mean {near}?" if near else f"A job has the fields {', '.join(JOB_FIELDS)}."
    return EmtError(f"unknown field {name!r:.100}", hint)


def parse_field(name: str, value: Any) -> Any:
    """One field of a job, checked and converted.

    Args:
        name: One of `JOB_FIELDS`.
        value: A JSON value, or the text of a CSV cell or of a command-line option.

    Returns:
        The value in the type of its declaration, or one of its words.

    Raises:
        EmtError: the value is not allowed; says which are.
    """
    if name == "seed":
        return _number(name, value, int, 0, MAX_SEED)
    if name in ("prompt", "reference"):
        return _text(name, value)
    if name not in _HINTS:
        raise unknown_field(name)
    kind, optional, info = _HINTS[name]
    if value is None and optional:
        return None
    if kind is tuple:
        return tuple(dict.fromkeys(_source(name, text) for text in _texts(name, value)))
    if name in ("vae", "control"):
        return _source(name, value)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in kind)
            raise EmtError(f"{name} is {value!r:.100}", f"Allowed are {allowed}.") from None
    if name == "size":
        return _size(value)
    if kind is str:
        return _text(name, value)
    if value in info.words:
        return value
    number = _number(name, value, kind, info.min, info.max, info.words)
    if name in ("height", "width") and number % 8:
        raise EmtError(
            f"{name} is {number}",
            f"It must be a multiple of 8, such as {number // 8 * 8 or 8} or {number // 8 * 8 + 8}.",
        )
    return number


def parse_seeds(text: str, draw: Callable[[int], list[int]] = lambda count: []) -> list[int]:
    """Seeds from a list such as `0,7,10-15` or `random:4`.

    Args:
        text: The list.
        draw: Draws so many; none where the list is only checked.

    Raises:
        EmtError: something in it is no seed, or they are more than a million.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, colon, count = part.strip().partition(":")
        if first == "random":
            if not (re.fullmatch("[0-9]{1,9}", count) if colon else not count) or not 1 <= int(count or 1) < MAX_SEEDS:
                raise EmtError(f"--seeds has {part!r:.100}", f"Allowed are random:1 to random:{MAX_SEEDS - 1}.")
            seeds.extend(draw(int(count or 1)))
            continue
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            hint = "Seeds are whole numbers and ranges, as in 0,7,10-15, or random:N."
            raise EmtError(f"--seeds has {part!r:.100}", hint)
        low, high = parse_field("seed", first), parse_field("seed", last if dash else first)
        if high < low or high - low + len(seeds) >= MAX_SEEDS:
            raise EmtError(f"--seeds has {part!r:.100}", f"Ranges rise, and at most {MAX_SEEDS:,} seeds are taken.")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def _size(value: Any) -> str:
    """A size as settings have it: a name in lower case, or WIDTHxHEIGHT."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in SIZE_NAMES:
        return text
    width, by, height = text.partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        allowed = f"Allowed are {', '.join(SIZE_NAMES)} and WIDTHxHEIGHT, such as 768x432."
        raise EmtError(f"size is {value!r:.100}", allowed)
    return f"{parse_field('width', width)}x{parse_field('height', height)}"


def check_together(given: Mapping[str, Any]) -> None:
    """Raise an `EmtError` if settings that are given together exclude each other.

    Args:
        given: Of one command line or of one line of jobs, by name.
    """
    if given.get("size") and (both := [name for name in ("width", "height") if name in given]):
        raise EmtError(f"size and {both[0]} exclude each other", "Give the size alone, or width and height.")


def check_sound(given: Mapping[str, Any]) -> None:
    """Raise an `EmtError` if a result is to have sound whose format has none; `given` are settings by name."""
    format = given.get("format", Settings.format)
    if given.get("audio") is Audio.COPY and format not in (Format.MP4, Format.WEBM):
        raise EmtError(
            f"clips in the format {format.value} have no sound", "Use --format mp4 or webm, or --audio none."
        )


def parse_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model folder sets (`emt.model_folder.Model.defaults`), checked.

    Raises:
        EmtError: one of them is not allowed.
    """
    try:
        if words := [value for value in defaults.values() if value == ALL_FRAMES]:
            raise EmtError(f"frames is {words[0]!r}", "A number is needed.")
        return {name: parse_field(name, value) for name, value in defaults.items()}
    except EmtError as error:
        raise EmtError(
            f"the model's defaults: {error.problem}", f"{error.hint} They are in its model_index.json."
        ) from None


def _texts(name: str, value: Any) -> list[Any]:
    """The entries of a setting that has several: a JSON list, or a text with semicolons between them."""
    if isinstance(value, str):
        return [part for part in map(str.strip, value.split(";")) if part]
    if isinstance(value, list | tuple):
        return list(value)
    raise EmtError(f"{name} is {value!r:.100}", "It must be a text or a list of texts.")


def _source(name: str, value: Any) -> str:
    """The file of a setting that names one, with what goes with it: `/x.safetensors:0.8`, `style=/y.pt`, `/a.png@0`.

    Paths become absolute; addresses and hub ids stay as they are.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > MAX_PROMPT:
        raise EmtError(f"{name} is {value!r:.100}", "Name a file, or hf://owner/name/file.")
    if name == "embedding":
        split_word(value)
    return with_source(name, value, _place)


def _place(source: str) -> str:
    """A path made absolute; another kind of address as it is."""
    if re.match(r"[\w+-]{2,}:/", source) or (_HUB_ID.fullmatch(source) and not os.path.lexists(source)):
        return source
    return os.path.abspath(source)


def _number(
    name: str, value: Any, kind: type, low: float | None, high: float | None, words: tuple[str, ...] = ()
) -> Any:
    allowed = f"{'a whole number' if kind is int else 'a number'} from {low if kind is int else f'{low:g}'}"
    allowed += f" to {high if kind is int else f'{high:g}'}" if high is not None else ""
    allowed += "".join(f", or {word}" for word in words)
    try:
        if isinstance(value, bool):
            raise ValueError
        if kind is int and isinstance(value, str):  # programs of tables write whole numbers so
            value = re.sub(r"\.0+\s*$", "", value)
        number = kind(value)
        if kind is int and isinstance(value, float) and number != value:
            raise ValueError
        if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise EmtError(f"{name} is {value!r:.100}", f"Allowed is {allowed}.") from None
    return number


_PROMPTS = ("prompt", "negative_prompt")


def _scheduled(name: str, value: Mapping[str, Any]) -> str:
    """An object of prompts by their key frames as a prompt."""
    text = json.dumps(value, ensure_ascii=False)
    if parse_schedule(text) is None:
        hint = 'Write a text, or texts by frames, as in {"0": "a fox", "8": "a wolf"}.'
        raise EmtError(f"{name} is {value!r:.100}", hint)
    return text


def _text(name: str, value: Any) -> str:
    if name in _PROMPTS and isinstance(value, Mapping):  # prompts by key frames, as a text has them
        value = _scheduled(name, value)
    if not isinstance(value, str):
        raise EmtError(f"{name} is {value!r:.100}", "It must be a text.")
    # Characters of no width say nothing either.
    said = "".join(c for c in value if unicodedata.category(c) != "Cf") if name in _PROMPTS else value
    if name != "negative_prompt" and not said.strip():
        hints = {"prompt": "Say what the clip shows.", "reference": "Name a clip."}
        raise EmtError(f"the {name} is empty", hints.get(name, "Name one."))
    if name == "reference":
        if "\0" in value:
            raise EmtError(f"reference {value!r:.100} has a zero byte", "Name a clip.")
        return value
    what = name.replace("_", " ")
    if len(value) > MAX_PROMPT:
        raise EmtError(
            f"the {what} has {len(value):,} characters",
            f"At most {MAX_PROMPT:,} are allowed; the model reads fewer than a hundred words.",
        )
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            raise EmtError(f"the {what} is not valid text (UTF-8)", "Save it as UTF-8.")
        if category == "Cc" and character not in "\t\n\r":
            raise EmtError(f"the {what} has the control character U+{ord(character):04X}", "Remove it.")
    return value
