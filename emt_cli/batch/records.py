"""Records of clips, as journals, sidecars and the clips themselves carry them, checked once, when they are read.

Anybody may have written them: what is not as declared here is left out, so that what reads records can rely on it. A
number that is not finite counts as missing. Fields that are not declared are kept, for other versions may know them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any

#: Characters that JSON leaves as they are and terminals obey: control characters of C1, directions, line separators.
_UNSAFE = re.compile(r"[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: An absolute path, of Windows too, a way up, or no path at all.
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")
_DEEPEST = 16  # lists and objects in each other
_LARGEST = 1e300  # of numbers
_MISSING = object()
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def dumps(value: Any) -> bytes:
    """One line of JSON in UTF-8, safe for a terminal.

    Bytes of odd file names, which are no Unicode, and characters that a terminal obeys are JSON escapes.
    """
    text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", _ENCODER.encode(value))
    return text.encode("utf-8", "backslashreplace")


def parse(content: bytes | str, only: Collection[str] | None = None) -> dict[str, Any]:
    """A JSON object, its fields checked; empty if it is none.

    Args:
        content: Its text.
        only: Names of the fields that are needed; None for all.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deep to be read
        return {}
    if only is not None and isinstance(value, dict):
        value = {name: value[name] for name in only if name in value}
    return check(value)


def check(value: Any) -> dict[str, Any]:
    """The fields of an object that are as declared; empty if it is none, or of a clip outside of its folder."""
    if not isinstance(value, dict) or not is_output(value.get("output", "clip")):
        return {}
    record = {}
    for name, given in value.items():
        found = _FIELDS.get(name, _any)(given)
        if found is not _MISSING:
            record[name] = found
    if "best_of" in record and not _is_choice(record):
        del record["best_of"]
    return record


def is_output(text: Any) -> bool:
    """Return whether a text is the path of a clip in an output folder: relative, and not out of it."""
    return isinstance(text, str) and text != "" and not _OUTSIDE.search(text)


def _any(value: Any, depth: int = 0) -> Any:
    """A JSON value without numbers that are not finite, if it is not nested too deep."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int) or value is None:
        return value
    if depth >= _DEEPEST:
        return _MISSING
    if isinstance(value, list):
        items = [_any(item, depth + 1) for item in value]
        return _MISSING if _MISSING in items else items
    pairs = {key: _any(item, depth + 1) for key, item in value.items()}
    return _MISSING if _MISSING in pairs.values() else pairs


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _MISSING


def _flag(value: Any) -> Any:
    return value if isinstance(value, bool) else _MISSING


def _number(value: Any) -> Any:
    # A whole number of any length is JSON, and most have no float.
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    return value if fits else _MISSING


def _whole(value: Any) -> Any:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if fits else _MISSING


def _each(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        return value if isinstance(value, dict) and all(check(v) is not _MISSING for v in value.values()) else _MISSING

    return checked


def _setting(value: Any) -> Any:
    if isinstance(value, list):
        return _texts(value)
    return value if isinstance(value, str | bool) or value is None else _number(value)


def _texts(value: Any) -> Any:
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else _MISSING


def _addons(value: Any) -> Any:
    """Files that were laid over a model: a LoRA with its scale, an embedding with its word, …."""
    details: dict[str, dict[str, Callable[[Any], Any]]] = {
        "lora": {"scale": _number},
        "vae": {},
        "embedding": {"word": _text},
        "control": {"scale": _number},
        "control_image": {"frame": _whole},
    }
    if not isinstance(value, list):
        return _MISSING
    for file in value:
        if not isinstance(file, dict) or file.get("kind") not in details:
            return _MISSING
        checks = {"sha256": _text, "file": _text} | details[file["kind"]]
        if any(check(file.get(name)) is _MISSING for name, check in checks.items()):
            return _MISSING
    return value


def _batch(value: Any) -> Any:
    kinds = {"size": _whole, "index": _whole, "shared_reference": _flag}
    if not isinstance(value, dict) or any(check(value.get(name)) is _MISSING for name, check in kinds.items()):
        return _MISSING
    return value if value["index"] < value["size"] else _MISSING


def _choice(value: Any) -> Any:
    listed = value.get("candidates") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed or _whole(value.get("first_seed")) is _MISSING:
        return _MISSING
    for candidate in listed:
        if not isinstance(candidate, dict) or _whole(candidate.get("seed")) is _MISSING:
            return _MISSING
        if _number(candidate.get("motion_fidelity")) is _MISSING and _text(candidate.get("error")) is _MISSING:
            return _MISSING
    return value


def _is_choice(record: dict[str, Any]) -> bool:
    """Return whether the clip that was kept is one of the candidates, and has a score."""
    kept = [c for c in record["best_of"]["candidates"] if c["seed"] == record.get("seed")]
    return bool(kept) and _number(kept[0].get("motion_fidelity")) is not _MISSING


_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("event", "state", "id", "reference", "reference_sha256", "prompt", "origin"), _text),
    **dict.fromkeys(("model", "model_folder", "model_sha256", "device", "precision", "kernels", "memory"), _text),
    **dict.fromkeys(("engine", "engine_id", "engine_folder", "error", "hint", "finished", "etag"), _text),
    "prompt_syntax": _whole,
    **dict.fromkeys(
        ("seed", "window", "arithmetic", "bytes", "mtime_ns", "done", "skipped", "failed", "dropped"), _whole
    ),
    **dict.fromkeys(("motion_fidelity", "temporal_consistency", "peak_memory", "seconds", "first_clip"), _number),
    **dict.fromkeys(("device_wait", "device_busy"), _number),
    **dict.fromkeys(("adopted", "duplicate", "interrupted"), _flag),
    "settings": _each(_setting),
    "versions": _each(_text),
    "timings": _each(_number),
    "phases": _each(_number),
    "batch": _batch,
    "best_of": _choice,
    "warnings": _texts,
    "addons": _addons,
}
