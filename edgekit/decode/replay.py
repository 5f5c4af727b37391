"""Replay: recorded texts in place of a model, to tell what a drafter would have brought."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from edgekit.decode.recycling import likeliest
from edgekit.decode.scoring import logits_of
from edgekit.decode.stepper import Rows, Stepper
from edgekit.spec import Array

RANKS = 8  # of each row, so many of the likeliest tokens are kept


@dataclass(frozen=True, slots=True)
class Recording:
    """A prompt, the model's greedy answer, and int64 [answer, RANKS]: the likeliest tokens of the
    row that each token of the answer was chosen from, that token itself first."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ranks: Array


def recorded(stepper: Stepper, prompt: Sequence[int], answer: Sequence[int]) -> Recording:
    """Read prompt and answer once more, in wide passes, and keep what the rows rank highest.

    Where those passes are not equal to the bit to the ones that the answer came from, another
    token may be the likeliest now: the answer's stands first all the same.
    """
    tokens, start = [*prompt, *answer][:-1], len(prompt) - 1
    ranks = []
    for token, (_, row) in zip(answer, logits_of(stepper, tokens, start=start), strict=True):
        best = likeliest(row[None], RANKS)[0].tolist()
        ranks.append([token, *(other for other in best if other != token)][: len(best)])
    return Recording(tuple(prompt), tuple(answer), np.array(ranks, np.int64))


class Replay:
    """Answers as the model did along one text, for passes of ``widths`` tokens.

    Greedy decoding of it gives the recorded answer. What the model would say behind a token that
    is not of the text nobody knows: it is taken to be what it last said behind the same token.
    ``seconds`` counts what the steps themselves take, which a model's would take in their place.
    """

    def __init__(self, recording: Recording, vocabulary: int, widths: Sequence[int]) -> None:
        self._text = [*recording.prompt, *recording.answer]
        self._first = len(recording.prompt) - 1
        self._ranks = recording.ranks
        self._after: dict[int, Array] = {}
        for token, following in zip(recording.prompt, recording.prompt[1:], strict=False):
            self._after[token] = np.array([following])
        self.vocabulary, self.widths, self.exact_widths = vocabulary, widths, widths
        self.capacity = len(self._text) + widths[-1]
        self.length, self.seconds = 0, 0.0
        # Below whatever was recorded, and no two alike: with ties, to find the likeliest takes
        # longer than it does in a model's rows.
        self._below = -np.random.default_rng(0).random(vocabulary, np.float32)
        self._logits = self._below[None].copy()
        self._written: list[tuple[int, Array]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens, which are those of the text."""
        self.length = length

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """What was recorded, for each row asked for."""
        start = time.perf_counter()
        above = range(-1, len(tokens) - 1) if parents is None else parents
        places: list[int] = []  # of each token in the text, -1 where it left it
        for token, parent in zip(tokens, above, strict=True):
            place = self.length if parent < 0 else places[parent] + 1
            known = (parent < 0 or place > 0) and place < len(self._text)
            places.append(place if known and self._text[place] == token else -1)
        wanted = range(len(tokens)) if rows is None else rows
        logits = self._cleared(len(wanted))
        for row, index in enumerate(wanted):
            ranks = self._said(tokens[index], places[index])
            logits[row, ranks] = np.arange(len(ranks), 0, -1)
            self._written.append((row, ranks))
        self.length += len(tokens)
        self.seconds += time.perf_counter() - start
        return Rows(logits, logits[:, :1])

    def _said(self, token: int, place: int) -> Array:
        known = self._first <= place < self._first + len(self._ranks)
        if known:
            self._after[token] = self._ranks[place - self._first]
        return self._after.get(token, np.array([token]))

    def _cleared(self, count: int) -> Array:
        """Rows of a whole vocabulary; to write them anew takes longer than all the rest."""
        for row, ranks in self._written:
            self._logits[row, ranks] = self._below[ranks]
        self._written = []
        if count > len(self._logits):
            self._logits = np.tile(self._below, (count, 1))
        return self._logits[:count]
