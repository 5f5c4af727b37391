"""Suffix automaton: what followed the longest end of the text that had occurred before."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.decode.draft import Draft, Verified
from edgekit.decode.lookup import copied

# A text in a loop has a suffix for each round of it. The longest ones are the ones asked for,
# and to mark more than this many would make a token cost what the text is long.
_MARKED = 16


class Automaton:
    """Copies what followed the longest suffix of prompt and output that occurred before.

    SAM-Decoding's dynamic part (Hu et al., arXiv 2411.10666) on the online construction of
    Blumer et al. (1985): amortised O(1) a token. The suffix link of the whole text's state is
    by definition the longest suffix with a second occurrence, so the match is kept by
    extending alone. Matches shorter than ``minimum`` tokens propose nothing.
    """

    name = "automaton"

    def __init__(self, minimum: int = 2) -> None:
        self.situation = 0  # the length of the match of the last proposal, 0 without one
        self._minimum = max(minimum, 1)  # the empty suffix occurs everywhere and says nothing
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        """Read a prompt of any length; forget the text before it."""
        self._text: list[int] = []
        # Of each state: its longest string's length, the index of a token at which it ended
        # last, its suffix link, and where each token leads. State 0 is the empty string.
        self._length, self._end, self._link = [0], [-1], [-1]
        self._next: list[dict[int, int]] = [{}]
        self._last = 0
        for token in prompt:
            self._extend(token)

    @property
    def match(self) -> int:
        """How many tokens the longest suffix has that occurred before."""
        link = self._link[self._last]
        return self._length[link] if link > 0 else 0

    def observe(self, verified: Verified) -> None:
        """The text goes on; rows are not looked at."""
        for token in verified.emitted:
            self._extend(token)

    def propose(self, budget: int) -> Draft:
        """The continuation of the match, or nothing."""
        match = self.match
        if match < self._minimum:
            self.situation = 0
            return Draft()
        self.situation = match
        return copied(self._text, self._end[self._link[self._last]] + 1, budget)

    def _extend(self, token: int) -> None:
        """Append one token: one state, and a clone where two ends of the text part."""
        self._mark()
        following, length, link = self._next, self._length, self._link
        state, new = self._last, len(length)
        length.append(length[state] + 1)
        self._end.append(len(self._text))
        following.append({})
        self._text.append(token)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state < 0:
            link.append(0)
        else:
            link.append(-1)  # set next, when the clone's own index is known
            link[new] = self._suffix(state, token)
        self._last = new

    def _mark(self) -> None:
        """Let the suffixes of the text remember that they have just ended here.

        Done when the next token comes and not sooner: until then the earlier end is wanted.
        """
        state, here = self._link[self._last], len(self._text) - 1
        for _ in range(_MARKED):
            if state <= 0:
                return
            self._end[state] = here
            state = self._link[state]

    def _suffix(self, state: int, token: int) -> int:
        """The state of ``state``'s longest string followed by ``token``; split off if need be."""
        target, size = self._next[state][token], self._length[state] + 1
        if self._length[target] == size:
            return target
        clone = len(self._length)
        self._length.append(size)
        self._end.append(self._end[target])
        self._link.append(self._link[target])
        self._next.append(self._next[target].copy())
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        self._link[target] = clone
        return clone
