"""Drafter: what proposes the tokens that one wide pass of the model then verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekit.decode.stepper import Rows


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow: a tree whose root is the last token of the text.

    ``parents`` gives each token's parent, an index before its own, or -1 for the root. Of
    siblings, the likelier stands first. ``chances``, where the drafter knows them, say how
    likely each token is where its parent is right.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    @property
    def is_chain(self) -> bool:
        """Whether each token hangs on the one before it."""
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, count: int) -> Draft:
        """Its first ``count`` tokens; their parents are among them."""
        if len(self) <= count:
            return self
        return Draft(self.tokens[:count], self.parents[:count], self.chances[:count])


def chain(tokens: Sequence[int]) -> Draft:
    """Tokens one behind the other."""
    return Draft(tuple(tokens), tuple(range(-1, len(tokens) - 1)))


@dataclass(frozen=True, slots=True)
class Verified:
    """What a pass found: the tokens it was fed, each with its row of ``rows``, padding left out.

    ``accepted`` are the indices of the fed tokens that became text, in order, the root first;
    ``emitted`` are the new tokens of the text: those of ``accepted`` behind the root, and the one
    that the model chose at the end.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    rows: Rows
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]


class Drafter(Protocol):
    """Proposes; never decides. All that it proposes is a function of what it was told, so that
    to draw from the model and follow the draft where it matches loses nothing at any temperature
    (Leviathan et al., arXiv 2211.17192, where each proposal is certain)."""

    @property
    def name(self) -> str: ...

    def start(self, prompt: Sequence[int]) -> None:
        """A text begins; what was learnt from others may be kept."""
        ...

    def observe(self, verified: Verified) -> None:
        """A pass is done: its text goes on by ``verified.emitted``."""
        ...

    def propose(self, budget: int) -> Draft:
        """At most ``budget`` tokens after the text so far; empty where nothing is worth it."""
        ...
