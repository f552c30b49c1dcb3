"""Encodings of prompts with weights, in chunks and over time, as `emt.prompt_syntax` reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emt.errors import EmtError
from emt.prompt_syntax import Chunk, chunks_of, parse, parse_schedule, shares


def embeddings_of(tokenizer: Any) -> int:
    """Number of embeddings that a text encoder needs for a tokenizer's tokens, whose ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=0) + 1


@dataclass(frozen=True)
class TextReader:
    """Text encoder and tokenizer, as functions.

    Args:
        tokenize: ids of the tokens of a text.
        encode: encoding (texts, tokens, width) of ids (texts, tokens).
        around: ids at the beginning and at the end of every text.
        pad: id after them.
        limit: tokens of a text, all told.
    """

    tokenize: Callable[[str], Sequence[int]]
    encode: Callable[[Tensor], Tensor]
    around: tuple[Sequence[int], Sequence[int]]
    pad: int
    limit: int

    def __call__(self, prompts: Sequence[str], frames: int | None = None) -> Tensor:
        """Encodings of prompts: (prompts, tokens, width), tokens a multiple of `limit`, the chunks of the longest one.

        Shorter prompts have chunks of the empty text at their end. If a prompt changes over the clip, they are
        (prompts·frames, tokens, width), a prompt's frames next to each other: between two key frames the encoding goes
        from the one to the other in a straight line.

        Args:
            prompts: with their syntax.
            frames: of the clip; None if no prompt may change over it.

        Raises:
            EmtError: a prompt has no sense, or changes over a clip of no known length.
        """
        schedules = [parse_schedule(prompt) for prompt in prompts]
        moving = any(schedule is not None for schedule in schedules)
        if moving and frames is None:
            raise EmtError("a prompt that changes over the clip is not read here", "Give one prompt for all frames.")
        keyed = [schedule or {0: prompt} for schedule, prompt in zip(schedules, prompts)]
        texts = list(dict.fromkeys(text for schedule in keyed for text in schedule.values()))
        known = dict(zip(texts, self._encode(texts)))
        if not moving:
            return torch.stack([known[prompt] for prompt in prompts])
        rows = []
        for schedule in keyed:
            for before, after, share in shares(schedule, frames or 0):
                first, second = known[schedule[before]], known[schedule[after]]
                mixed = torch.lerp(first.float(), second.float(), share) if share else first
                rows.append(mixed.to(first.dtype))
        return torch.stack(rows)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Encodings of texts, (texts, tokens, width)."""
        size, comma = self.limit - sum(map(len, self.around)), next(iter(self.tokenize(",")), None)
        chunks = [chunks_of(parse(text), self.tokenize, size, comma) for text in texts]
        most = max(map(len, chunks))
        padded = [[*own, *(Chunk() for _ in range(most - len(own)))] for own in chunks]
        ids, weights = zip(*(self._row(chunk) for own in padded for chunk in own))
        encoded = self.encode(torch.tensor(ids))
        encoded = weighted(encoded, torch.tensor(weights, device=encoded.device))
        return encoded.unflatten(0, (len(texts), most)).flatten(1, 2)

    def _row(self, chunk: Chunk) -> tuple[list[int], list[float]]:
        """Ids and weights of a text as the encoder reads it."""
        (first, last), count = self.around, len(chunk.ids)
        ids = [*first, *chunk.ids, *last]
        rest = self.limit - len(ids)
        weights = [*(1.0 for _ in first), *chunk.weights, *(1.0 for _ in range(self.limit - len(first) - count))]
        return ids + [self.pad] * rest, weights


def weighted(encoded: Tensor, weights: Tensor) -> Tensor:
    """Encodings (texts, tokens, width) times the weights of their tokens (texts, tokens), each with the mean it had.

    This is what the web UI calls its original emphasis. Encodings whose weights are all 1 stay to the bit.
    """
    found = encoded.float() * weights[..., None].float()
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (encoded.float(), found))
    ratio = before / after
    found = found * torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))
    untouched = (weights == 1).all(1)[:, None, None]
    return torch.where(untouched, encoded, found.to(encoded.dtype))
