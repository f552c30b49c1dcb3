"""Syntax of prompts: weights, breaks and chunks as the web UI of Stable Diffusion reads them, and prompts over time.

`(word)` weighs a word 1.1 times, `(word:1.3)` 1.3 times, `[word]` 1/1.1 times, within each other, and to the end where
a bracket is not closed; after a backslash a bracket is itself. `BREAK` begins a new chunk (within brackets that weigh
it is the word, with the weight's opposite), and so does what is longer than the text encoder reads, at the last comma
if it is near. `0: a fox | 8: a wolf`, or the same as a JSON object, is a
prompt for each key frame. Nothing here imports torch: plans read prompts too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from emt.errors import EmtError

PLAIN, WEBUI = "plain", "webui"
#: Tokens that the web UI moves to the next chunk, at most, so that it begins after a comma.
COMMA_REACH = 20
_STRONGER = 1.1
_BREAKS = -1.0  # weight by which the web UI knows a BREAK
_LARGEST = 1000.0  # weight, and its inverse the smallest but 0
_TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_KEY = re.compile(r"\s*(\d{1,6})\s*:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        text: As the tokenizer reads it.
        weight: Factor of its tokens' encodings.
        breaks: Begins a new chunk.
    """

    text: str
    weight: float = 1.0
    breaks: bool = False


def parse(prompt: str) -> list[Piece]:
    """The parts of a prompt; those of one weight that are next to each other are one.

    Raises:
        EmtError: a weight is no number that makes sense.
    """
    found: list[str] = []
    weights: list[float] = []
    breaks: set[int] = set()  # of the parts, those that were written BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    def add(text: str, weight: float = 1.0) -> None:
        found.append(text)
        weights.append(weight)

    for match in _TOKENS.finditer(prompt):
        kind, text = match.lastgroup, match[0]
        if kind == "open":
            opened[text].append(len(weights))
        elif kind == "weight" and opened["("]:
            weigh("(", _weight(prompt, match["weight"]))
        elif kind == "close" and opened["(" if text == ")" else "["]:
            weigh("(", _STRONGER) if text == ")" else weigh("[", 1 / _STRONGER)
        elif kind == "escaped":
            add(match["escaped"])  # a backslash before anything else is nothing
        else:
            for i, part in enumerate(_BREAK.split(text)):
                if i > 0:
                    breaks.add(len(found))
                    add("BREAK", _BREAKS)
                add(part)
    for bracket, factor in (("(", _STRONGER), ("[", 1 / _STRONGER)):
        while opened[bracket]:
            weigh(bracket, factor)
    pieces, begins = [], False
    for i, (text, weight) in enumerate(zip(found, weights)):
        # The web UI weighs its marks as it does words; those that are changed mean nothing to it any more.
        if i in breaks and weight == _BREAKS:
            begins = True
            continue
        pieces.append(Piece(text, weight, begins))
        begins = False
    return _joined(pieces)


def _weight(prompt: str, text: str) -> float:
    weight = float(text)
    if abs(weight) > _LARGEST:
        raise EmtError(f"the prompt {prompt[:60]!r} has the weight {text}", f"Weights go up to {_LARGEST:g}.")
    return weight


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and not piece.breaks and piece.weight == last.weight:
            joined[-1] = Piece(last.text + piece.text, last.weight, last.breaks)
        else:
            joined.append(piece)
    return joined or [Piece("")]


def is_simple(prompt: str) -> bool:
    """Return whether a prompt has no syntax, so that it means the same by the letter."""
    return parse(prompt) == [Piece(prompt)]


def has_weighted_break(prompt: str) -> bool:
    """Return whether a BREAK within brackets is read as the word; False for a prompt that makes no sense."""
    with suppress(EmtError):
        return "BREAK" in prompt and any("BREAK" in p.text and p.weight < 0 for p in parse(prompt))
    return False


def words_of(prompt: str) -> str:
    """The text of a prompt without its syntax, of all of its key frames."""
    prompts = (parse_schedule(prompt) or {0: prompt}).values()
    return " ".join(piece.text for text in prompts for piece in parse(text))


@dataclass
class Chunk:
    """Tokens that the text encoder reads at once, without those at its beginning and end, and their weights."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def chunks_of(
    pieces: Sequence[Piece], tokenize: Callable[[str], Sequence[int]], size: int, comma: int | None = None
) -> list[Chunk]:
    """The chunks of a prompt.

    Args:
        pieces: Of the prompt.
        tokenize: Ids of the tokens of a text.
        size: Most tokens of a chunk.
        comma: Id of a comma's token, None if there is none: where there is one among the last `COMMA_REACH` tokens of
            a chunk that is full, what follows it is moved to the next one.
    """
    chunks = [Chunk()]
    last_comma: int | None = None

    def begin() -> None:
        nonlocal last_comma
        chunks.append(Chunk())
        last_comma = None

    for piece in pieces:
        if piece.breaks:
            begin()
        for token in tokenize(piece.text):
            chunk = chunks[-1]
            if token == comma:
                last_comma = len(chunk.ids)
            elif len(chunk.ids) == size and last_comma is not None and size - last_comma <= COMMA_REACH:
                cut = last_comma + 1
                moved = Chunk(chunk.ids[cut:], chunk.weights[cut:])
                del chunk.ids[cut:], chunk.weights[cut:]
                begin()
                chunks[-1] = moved
            if len(chunks[-1].ids) == size:
                begin()
            chunks[-1].ids.append(token)
            chunks[-1].weights.append(piece.weight)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks


# ---- prompts over time ---------------------------------------------------------------------------------------------


def parse_schedule(prompt: str) -> dict[int, str] | None:
    """Prompts by their key frames, in order; None for a prompt of the whole clip.

    `0: a fox | 8: a wolf`; `{"0": "a fox", "8": "a wolf"}`, also without the braces.

    Raises:
        EmtError: two key frames are the same, or one has no prompt.
    """
    entries = _json_entries(prompt)
    if entries is None:
        parts = [_KEY.fullmatch(part) for part in prompt.split("|")]
        if len(parts) < 2 or not all(parts):
            return None
        entries = [(match[1], match[2].strip()) for match in parts if match]
    frames = [int(key) for key, _ in entries]
    shown = f"the prompt {prompt[:60]!r}"
    hint = 'Write prompts by frames, as in "0: a fox | 8: a wolf".'
    if len(set(frames)) < len(frames):
        twice = next(frame for frame in frames if frames.count(frame) > 1)
        raise EmtError(f"{shown} has frame {twice} twice", hint)
    if empty := [frame for frame, (_, text) in zip(frames, entries) if not text]:
        raise EmtError(f"{shown} has nothing for frame {empty[0]}", hint)
    return dict(sorted(zip(frames, (text for _, text in entries))))


def _json_entries(prompt: str) -> list[tuple[str, str]] | None:
    text = prompt.strip().rstrip(",")
    if not re.match(r'\{?\s*"', text):
        return None
    try:
        pairs: Any = json.loads(text if text.startswith("{") else f"{{{text}}}", object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not pairs:
        return None
    fits = all(isinstance(value, str) and re.fullmatch(r"\s*\d{1,6}\s*", key) for key, value in pairs)
    return [(key, value.strip()) for key, value in pairs] if fits else None


def shares(schedule: Mapping[int, str], frames: int) -> list[tuple[int, int, float]]:
    """For each frame the key frames before and after it, and the share of the later one, rising evenly in between.

    Before the first key frame and after the last one their prompts hold.
    """
    keys = sorted(schedule)
    found = []
    for frame in range(frames):
        before = max((key for key in keys if key <= frame), default=keys[0])
        after = min((key for key in keys if key >= frame), default=keys[-1])
        found.append((before, after, (frame - before) / (after - before) if after != before else 0.0))
    return found


def expanded(prompt: str, tokenizer: Any) -> str:
    """A prompt in which words of several vectors (textual inversions) are written once for each of them.

    Words are found as the tokenizer finds them, which may write them in small letters.

    Args:
        prompt: As given.
        tokenizer: Of the library `tokenizers`.
    """
    added = {number: t.content for number, t in tokenizer.get_added_tokens_decoder().items() if not t.special}
    words = set(added.values())
    if not words:
        return prompt
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    for number, (start, end) in reversed(list(zip(encoding.ids, encoding.offsets))):
        if number in added:
            names = [added[number]]
            while (name := f"{names[0]}_{len(names)}") in words:
                names.append(name)
            prompt = f"{prompt[:start]}{' '.join(names)}{prompt[end:]}" if len(names) > 1 else prompt
    return prompt


# ---- how a model reads prompts -------------------------------------------------------------------------------------


def reading_of(
    prompts: Sequence[str], syntax: str, size: int, count: Callable[[str], Sequence[int]] | None
) -> tuple[Any, ...]:
    """The way in which prompts of one clip are read; empty if by the letter. Clips of a batch have the same one.

    Args:
        prompts: Of the clip, the negative one too.
        syntax: `PLAIN` or `WEBUI`.
        size: Most tokens of a chunk.
        count: Ids of the tokens of a text; None if they are not known: then clips of one batch have the same prompts.

    Returns:
        `WEBUI`, the chunks of the longest, and whether a prompt changes over the clip.

    Raises:
        EmtError: a prompt has no sense.
    """
    if syntax == PLAIN:
        return ()
    schedules = [parse_schedule(prompt) for prompt in prompts]
    texts = [text for prompt, parts in zip(prompts, schedules) for text in (parts.values() if parts else [prompt])]
    moving = any(parts is not None for parts in schedules)
    simple = not moving and all(is_simple(text) for text in texts)
    if count is None:
        return () if simple and all(len(text) * 4 <= size for text in texts) else (WEBUI, *prompts, moving)
    # A token stands for a byte or more, but for letters that lower case or Unicode's composition takes apart.
    short = [text for text in texts if 4 * len(text) <= size] if simple else []
    comma = next(iter(count(",")), None) if len(short) < len(texts) else None
    chunks = max(1 if simple and text in short else len(chunks_of(parse(text), count, size, comma)) for text in texts)
    return () if simple and chunks == 1 else (WEBUI, chunks, moving)
