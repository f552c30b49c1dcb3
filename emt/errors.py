"""The errors that a user is meant to read, and words of messages."""

from __future__ import annotations


class EmtError(Exception):
    """Something the user gave cannot be used, said in one message.

    Args:
        problem: What was given and what is wrong with it, naming the file or value.
        hint: What is allowed and what to type next; empty if `problem` says it all.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}\n{hint}" if hint else problem)
        self.problem = problem
        self.hint = hint

    def __reduce__(self) -> tuple[type[EmtError], tuple[str, str]]:
        # Exceptions cross process and thread boundaries in the batch runtime; the default
        # pickling would pass the joined message as `problem`.
        return type(self), (self.problem, self.hint)


def first_line(error: BaseException) -> str:
    """First line of the message of another library's error; its class name if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def count(number: int, noun: str) -> str:
    """Number with its noun: `1 frame`, `16 frames`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
