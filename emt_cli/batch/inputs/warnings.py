"""Warnings about prompts: words that a model does not know, and syntax of other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from textwrap import shorten

from emt.errors import EmtError
from emt.prompt_syntax import WEBUI, has_weighted_break, parse_schedule, words_of
from emt.vocabulary import Vocabulary, without
from emt_cli.batch.jobs import Item, Job

_NAMED = 8  # unknown words, and parts of prompts, that a warning names
_LONGEST = 700  # characters of a line of known ones


class PromptWarnings:
    """Warnings about prompts: words that a model does not know, and syntax of other programs that it reads as text.

    Each word, and each kind of syntax, is named once.

    Args:
        model: Name of the model in warnings.
        vocabulary: Its words; None for a model that reads any.
        say: Called with each line.
        reads_syntax: The model reads weights, breaks and chunks, unless a job says `plain`.
    """

    def __init__(
        self, model: str, vocabulary: Vocabulary | None, say: Callable[[str], None], reads_syntax: bool = False
    ) -> None:
        self.model, self.vocabulary, self._say, self._reads = model, vocabulary, say, reads_syntax
        self._seen: set[str] = set()
        self._syntax: set[str] = set()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on as they come, after a look at each job."""
        for item in items:
            self.look([item])
            yield item

    def look(self, items: Iterable[Item]) -> None:
        """Warn of all that is new in the prompts, in one line each."""
        texts: dict[tuple[str, bool], None] = {}
        for job in (item for item in items if isinstance(item, Job)):
            read = self._reads and job.settings.prompt_syntax.value == WEBUI
            texts |= dict.fromkeys((text, read) for text in _texts(job))
        self._look_at_syntax(texts)
        if self.vocabulary is not None:
            self._look_at_words([_words(text) if read else text for text, read in texts], self.vocabulary)

    def _look_at_syntax(self, texts: Iterable[tuple[str, bool]]) -> None:
        found = {
            part: kind for text, read in texts for kind, part in unread_syntax(text, read) if kind not in self._syntax
        }
        self._syntax |= set(found.values())
        if found:
            self._say(f"warning: {_read_as_text(found)}")

    def _look_at_words(self, prompts: Iterable[str], vocabulary: Vocabulary) -> None:
        """Warn of unknown words; the first time with the known ones."""
        found = {word.lower(): None for prompt in prompts for word in vocabulary.unknown(prompt)}
        new = [word for word in found if word not in self._seen]
        if not new:
            return
        known = [] if self._seen else [shorten(line, _LONGEST, placeholder=" …") for line in vocabulary.lines()]
        self._seen.update(new)
        named = []
        for word in new[:_NAMED]:
            near = vocabulary.nearest(word)
            named.append(f"“{word}”" + (f" ({' or '.join(near)}?)" if near else ""))
        more = f" and {len(new) - _NAMED} more words of the prompts" if len(new) > _NAMED else ""
        warning = f"warning: the model {self.model} does not know {', '.join(named)}{more}"
        self._say(f"{warning}. Words that it knows (emt doctor lists all):" if known else warning)
        for line in known:
            self._say(f"  {line}")


def _texts(job: Job) -> Iterator[str]:
    """The prompts of a job, without the words of its embeddings."""
    words = [text.partition("=")[0] for text in job.settings.embedding]
    for text in (job.prompt, job.settings.negative_prompt):
        yield without(text, words)


def _words(prompt: str) -> str:
    """The words of a prompt without its syntax; all of it where that makes no sense, which is an error later on."""
    try:
        return words_of(prompt)
    except EmtError:
        return prompt


#: Syntax that other programs read in prompts, by what it means there.
_SYNTAX = {
    "weight": re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|\(\([^()]+\)\)"),
    "network": re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE),
    "break": re.compile(r"\bBREAK\b"),
    "bracket": re.compile(r"\[[^\[\]]+\]"),
    "choice": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "embedding": re.compile(r"\bembedding:\S+"),
}


#: What of it is read as text where weights and breaks are read: networks, choices, and editing from step to step.
_UNREAD = {kind: _SYNTAX[kind] for kind in ("network", "choice", "embedding")} | {
    "editing": re.compile(r"\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\[[^\[\]]*\|[^\[\]]*\]"),
    "composition": re.compile(r"\bAND\b"),
}

#: How a prompt by key frames begins, or where its second one does.
_KEYED = re.compile(r'\s*\{?\s*"\s*\d{1,6}\s*"\s*:|\s*\d{1,6}\s*:\s|.*?\|\s*\d{1,6}\s*:', re.DOTALL)


def unread_syntax(prompt: str, read: bool = False) -> Iterator[tuple[str, str]]:
    """Parts of a prompt that mean something else in other programs: the kind of syntax, and the part.

    Args:
        prompt: The prompt.
        read: Weights, breaks and chunks are read.
    """
    for kind, pattern in (_UNREAD if read else _SYNTAX).items():
        for match in pattern.finditer(prompt):
            yield kind, match[0]
    if read and has_weighted_break(prompt):
        yield "break", "BREAK in brackets"
    if (keyed := _KEYED.match(prompt)) and not (read and _is_schedule(prompt)):
        yield "key frames", keyed[0].strip()


def _is_schedule(prompt: str) -> bool:
    """Return whether a prompt has key frames; True as well for ones that make no sense, which are an error later on."""
    try:
        return parse_schedule(prompt) is not None
    except EmtError:
        return True


def syntax_warnings(job: Job) -> list[str]:
    """One line for a job's record if its prompts have syntax of other programs, else none."""
    texts, read = (job.prompt, job.settings.negative_prompt), bool(job.reading)
    parts = {part for text in texts for _, part in unread_syntax(text, read)}
    return [_read_as_text(sorted(parts))] if parts else []


def _read_as_text(parts: Collection[str]) -> str:
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    named = ", ".join(shorten(part, 60, placeholder=" …") for part in list(parts)[:_NAMED])
    return f"read as plain text, not as weights, LoRAs, breaks, choices or key frames: {named}{more}"
