"""The words of a model that reads a list of words and no others; Stable Diffusion spells any word, and has no list.

Nothing here imports torch: `emt plan` checks prompts too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from emt.errors import EmtError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GROUPS = "vocabulary.json"
"""In a model folder: the phrases that prompts are made of, by kind. The tokenizer alone decides what is known."""


@dataclass(frozen=True)
class Vocabulary:
    """Every word that a model knows.

    Attributes:
        tokenizer: Its tokenizer; it reads whole words.
        unknown_word: What the tokenizer reads any other word as.
        groups: Words and phrases by kind, as in `{"subjects": ("cat", …), "scenes": ("over the sea", …)}`.
    """

    tokenizer: Tokenizer
    unknown_word: str
    groups: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """The vocabulary of a model folder; None if its tokenizer spells words that it does not know.

        Raises:
            EmtError: its files are damaged.
        """
        path = folder / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            kind = json.loads(path.read_bytes())["model"]
            if kind.get("type") != "WordLevel":
                return None
            from tokenizers import Tokenizer

            tokenizer, groups = Tokenizer.from_file(str(path)), None
            path = folder / GROUPS
            if path.is_file():
                groups = {name: tuple(map(_phrase, words)) for name, words in json.loads(path.read_bytes()).items()}
        except Exception as error:  # tokenizers raises nothing narrower
            raise EmtError(f"{path} is damaged", first_line(error)) from None
        return cls.of(tokenizer, groups)

    @classmethod
    def of(cls, tokenizer: Tokenizer, groups: Mapping[str, tuple[str, ...]] | None = None) -> Vocabulary | None:
        """The vocabulary of a tokenizer; None if it spells words that it does not know.

        Args:
            tokenizer: Of the library `tokenizers`; `backend_tokenizer` of one of transformers.
            groups: Words and phrases by kind; by default all words of the tokenizer are one kind.
        """
        if type(tokenizer.model).__name__ != "WordLevel":
            return None
        if groups is None:
            special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
            groups = {"words": tuple(sorted(set(tokenizer.get_vocab()) - special))}
        return cls(tokenizer, tokenizer.model.unk_token, groups)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words that `nearest` looks among."""
        phrases = (phrase for group in self.groups.values() for phrase in group)
        return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split() if len(word) > 2))

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model does not know, as they are written there."""
        read = self.tokenizer.encode(prompt, add_special_tokens=False)
        words = zip(read.tokens, read.offsets)
        return [prompt[first:last] for token, (first, last) in words if token == self.unknown_word]

    def check(
        self, prompt: str, hint: str = "emt doctor lists those that it knows.", own: Collection[str] = ()
    ) -> None:
        """Raise EmtError with `hint` unless the model knows all words of a prompt, or they are of `own`."""
        if unknown := self.unknown(without(prompt, own)):
            shown, named = shorten(prompt, 200, placeholder=" …"), ", ".join(dict.fromkeys(unknown))
            raise EmtError(
                f"the prompt {shown!r} has words that the model does not know: {named}",
                hint,
            )

    def nearest(self, word: str) -> list[str]:
        """Up to two known words that are spelt most like another, the closest first."""
        return difflib.get_close_matches(word.lower(), self.words, n=2)

    def count(self) -> str:
        """Size of the vocabulary, as in `50 subjects, 8 colours, 16 scenes`."""
        return ", ".join(f"{len(words)} {kind}" for kind, words in self.groups.items())

    def lines(self) -> list[str]:
        """A line for each kind of words, with all of them."""
        return [f"{len(words)} {kind}: {', '.join(words)}" for kind, words in self.groups.items()]


def without(prompt: str, words: Collection[str]) -> str:
    """A prompt without some words, such as those of textual inversions."""
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", prompt)
    return prompt


def _phrase(words: object) -> str:
    if not isinstance(words, str):
        raise ValueError(f"{words!r:.100} is not a text")
    return words
