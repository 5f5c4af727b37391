"""Prompt lookup: what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.decode.draft import Draft, Verified, chain

NGRAMS = (4, 3, 2)  # one token alone is found in every second text, and tells little


class Lookup:
    """Copies from the prompt and the output so far (Saxena, "Prompt Lookup Decoding", 2023).

    The longest of ``ngrams`` that stood in the text before decides, and of its occurrences the
    most recent. One dictionary for each n holds where every n-gram was last followed by a
    token, so a token costs the same however long the text is.
    """

    name = "lookup"

    def __init__(self, ngrams: Sequence[int] = NGRAMS) -> None:
        self.situation = 0  # the n of the last proposal, 0 where there was none
        self._ngrams = sorted(ngrams, reverse=True)
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        """Read a prompt of any length; forget the text before it."""
        self._text = list(prompt)
        # Later n-grams overwrite earlier ones; the last of the text has no successor yet.
        self._after: dict[int, dict[tuple[int, ...], int]] = {
            n: dict(
                zip(
                    zip(*(self._text[shift:] for shift in range(n)), strict=False),
                    range(n, len(self._text)),
                    strict=False,
                )
            )
            for n in self._ngrams
        }

    def observe(self, verified: Verified) -> None:
        """The text goes on; rows are not looked at."""
        text = self._text
        for token in verified.emitted:
            place = len(text)
            for n in self._ngrams:
                if place >= n:
                    self._after[n][tuple(text[place - n :])] = place
            text.append(token)

    def propose(self, budget: int) -> Draft:
        """The continuation of the longest match, or nothing."""
        for n in self._ngrams:
            place = self._after[n].get(tuple(self._text[-n:]))
            if place is not None:
                self.situation = n
                return copied(self._text, place, budget)
        self.situation = 0
        return Draft()


def copied(text: Sequence[int], place: int, budget: int) -> Draft:
    """A chain of ``budget`` tokens of ``text`` from index ``place`` on.

    Where the text ends, the copy goes on with what it has copied itself, as in LZ77: a text in
    a loop is foreseen for as long as one likes.
    """
    if budget < 1:
        return Draft()
    tokens = text[place : place + budget]
    rounds = -(-budget // len(tokens))
    return chain((list(tokens) * rounds)[:budget])
