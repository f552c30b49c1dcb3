"""The words of a model that reads a list of words and no others; Stable Diffusion spells any word, and has no list.

Nothing here imports torch: a plan warns of unknown words, too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from emt.errors import EmtError

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

            tokenizer, groups = Tokenizer.from_file(str(path)), {}
            path = folder / GROUPS
            if path.is_file():
                groups = {name: tuple(words) for name, words in json.loads(path.read_bytes()).items()}
            else:
                special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
                groups = {"words": tuple(sorted(set(kind["vocab"]) - special))}
        except Exception as error:  # tokenizers raises nothing narrower
            raise EmtError(f"{path} is damaged", str(error)) from None
        return cls(tokenizer, kind["unk_token"], groups)

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

    def check(self, prompt: str) -> None:
        """Say whether the model can read a prompt.

        Raises:
            EmtError: it does not know some of its words.
        """
        if unknown := self.unknown(prompt):
            asked, named = shorten(prompt, 200, placeholder=" …"), ", ".join(dict.fromkeys(unknown))
            raise EmtError(
                f"the prompt {asked!r} has words that the model does not know: {named}",
                "emt doctor lists those that it knows.",
            )

    def nearest(self, word: str) -> list[str]:
        """Up to two known words that are spelt most like another, the closest first."""
        return difflib.get_close_matches(word.lower(), self.words, n=2)

    def count(self) -> str:
        """How much it knows, as in `50 subjects, 8 colours, 16 scenes`."""
        return ", ".join(f"{len(words)} {kind}" for kind, words in self.groups.items())

    def lines(self) -> list[str]:
        """A line for each kind of words, with all of them."""
        return [f"{len(words)} {kind}: {', '.join(words)}" for kind, words in self.groups.items()]
