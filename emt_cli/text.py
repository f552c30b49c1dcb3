"""Text for people: escapes, durations, sizes."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

_ESCAPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text from the user made safe for a terminal: control and direction characters are shown as escapes."""
    return _ESCAPED.sub(lambda match: ascii(match[0])[1:-1], str(text))


def unbroken(problem: str) -> str:
    """A problem whose lines are its own: breaks within names are shown as escapes, before indented lists they stay."""
    return re.sub(r"\n(?!  )", r"\\n", problem)


def message(problem: str, hint: str = "") -> str:
    """A problem and a hint as sentences in one line."""
    return " ".join(f"{problem.rstrip('.')}. {hint}".split())


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that another one is most like; empty if it is like none."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else ""


def duration(seconds: float) -> str:
    """A duration as people say it: 3.4 s, 1.5 min, 12 min, 5.5 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes as people say it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """A short name for each path: the file's, after as many of its folders as no other path shares with it."""
    parts = {path: PurePath(path).parts for path in sorted(set(paths))}
    names, length = {path: own[-1:] for path, own in parts.items()}, 1
    while shared := {name for name, count in Counter(names.values()).items() if count > 1}:
        length += 1
        longer = {path: parts[path][-length:] if name in shared else name for path, name in names.items()}
        if longer == names:
            break
        names = longer
    return {path: "/".join(name) for path, name in names.items()}


def slug(text: str, limit: int = 80) -> str:
    """The letters, digits and marks of a text, of any language, with `-` between words, at most `limit` UTF-8 bytes."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded)
    name = "-".join(kept.split())
    if len(name.encode()) > limit:
        name = name.encode()[:limit].decode(errors="ignore")
        name = name[: name.rfind("-")] if "-" in name[limit // 2 :] else name
    return name
