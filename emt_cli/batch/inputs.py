"""Reading what the user gave: jobs as they come, looked at in passing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from textwrap import shorten

from emt.vocabulary import Vocabulary
from emt_cli.batch.jobs import Item, Job

_NAMED = 8  # unknown words that a warning names
_LONGEST = 700  # characters of a line of known ones


class WordWatch:
    """Warns of words that a model does not know, once of each.

    Args:
        model: What to call the model.
        vocabulary: Its words; None for a model that reads any.
        say: Is told.
    """

    def __init__(self, model: str, vocabulary: Vocabulary | None, say: Callable[[str], None]) -> None:
        self.model, self.vocabulary, self._say = model, vocabulary, say
        self._seen: set[str] = set()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Items as they come; jobs are looked at in passing."""
        for item in items:
            self.look([item])
            yield item

    def look(self, items: Iterable[Item]) -> None:
        """Read the prompts of jobs; all that is new in them is told in one line, the first time with what is known."""
        if self.vocabulary is None:
            return
        jobs = (item for item in items if isinstance(item, Job))
        prompts = dict.fromkeys(text for job in jobs for text in (job.prompt, job.settings.negative_prompt))
        found = {word.lower(): None for prompt in prompts for word in self.vocabulary.unknown(prompt)}
        new = [word for word in found if word not in self._seen]
        if not new:
            return
        known = [] if self._seen else [shorten(line, _LONGEST, placeholder=" …") for line in self.vocabulary.lines()]
        self._seen.update(new)
        named = []
        for word in new[:_NAMED]:
            near = self.vocabulary.nearest(word)
            named.append(f"“{word}”" + (f" ({' or '.join(near)}?)" if near else ""))
        more = f" and {len(new) - _NAMED} more words of the prompts" if len(new) > _NAMED else ""
        told = f"warning: the model {self.model} does not know {', '.join(named)}{more}"
        self._say(f"{told}. It knows, as emt doctor tells, too:" if known else told)
        for line in known:
            self._say(f"  {line}")
