"""Drafters by name."""

from __future__ import annotations

from collections.abc import Callable

from edgekit.decode.automaton import Automaton
from edgekit.decode.draft import Drafter
from edgekit.decode.lookup import Lookup
from edgekit.decode.merged import Merged
from edgekit.decode.recycling import Recycling
from edgekit.errors import UnknownName


def _merged(vocabulary: int, trees: bool) -> Drafter:
    # Prompt lookup finds what the automaton finds, and less.
    return Merged([Automaton(), Recycling(vocabulary, trees=trees)])


_MAKERS: dict[str, Callable[[int, bool], Drafter]] = {
    "automaton": lambda _vocabulary, _trees: Automaton(),
    "lookup": lambda _vocabulary, _trees: Lookup(),
    "merged": _merged,
    "recycling": lambda vocabulary, trees: Recycling(vocabulary, trees=trees),
}

NAMES = tuple(_MAKERS)
TREES = ("merged", "recycling")  # those that can propose them


def drafter(name: str, vocabulary: int, *, trees: bool = False) -> Drafter:
    """A new drafter that has seen nothing, for ids below ``vocabulary``.

    All but those of ``trees`` propose chains, which are exact on every runtime that is exact
    at all. Raises ``UnknownName``.
    """
    if name not in _MAKERS:
        raise UnknownName("drafter", name, NAMES)
    return _MAKERS[name](vocabulary, trees)
