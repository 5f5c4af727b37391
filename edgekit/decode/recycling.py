"""Token Recycling: the tokens that the model ranked highest the last time it saw each token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit.decode.draft import Draft, Verified, chain
from edgekit.spec import Array

WIDTH = 8  # successors remembered of each token

# (parent, rank) of each node of the tree, -1 for the root, the most valuable first: a prefix is
# the best tree of its size. Node by node the highest product of the shares in which each rank
# came true, on greedy answers of SmolLM2-135M: `tools/bench_drafters.py --shares`.
TREE = (
    (-1, 0),
    (0, 0),
    (1, 0),
    (-1, 1),
    (2, 0),
    (3, 0),
    (4, 0),
    (-1, 2),
    (0, 1),
    (-1, 3),
    (6, 0),
    (5, 0),
    (8, 0),
    (7, 0),
    (1, 1),
)

# Rows of a pass that teach, besides accepted ones: a wider tree's least likely nodes, which are
# its last, would cost more than the rest of a round together.
_LEARNT = 6

# Long rows are cut into interleaved pieces, and these into groups: so numpy's maximum runs along
# consecutive numbers, and few of the pieces hold a candidate.
_PIECES, _GROUPS = 2048, 64


class Recycling:
    """A matrix of last seen successors (Luo et al., "Token Recycling", arXiv 2408.08696).

    Every pass overwrites the rows of all tokens it was fed, the rejected ones too, with the
    best of what the model answered; a proposal reads the matrix and computes nothing. It is
    kept from text to text. A chain follows the best successors alone, and remembers no others;
    ``trees`` remembers ``WIDTH`` of each token, 1.6 MB for 49,152 tokens, and proposes
    prefixes of ``TREE``.
    """

    name = "recycling"

    def __init__(self, vocabulary: int, *, trees: bool = False) -> None:
        width = min(WIDTH, vocabulary) if trees else 1
        self.successors = np.full((vocabulary, width), -1, np.int32)  # -1: not seen yet
        self._trees = trees
        self._last = -1

    def start(self, prompt: Sequence[int]) -> None:
        """Stand behind a prompt; what was learnt stays."""
        self._last = prompt[-1] if prompt else -1

    def observe(self, verified: Verified) -> None:
        """Learn from each row. Of a token fed twice: its deepest place in the text counts, and
        where it did not become text, the first."""
        tokens = verified.tokens
        source = {tokens[place]: place for place in reversed(range(len(tokens)))}
        source.update((tokens[place], place) for place in verified.accepted)
        rows, width = verified.rows.logits, self.successors.shape[1]
        block = min(len(tokens), _LEARNT) if self._trees else len(tokens)
        best = likeliest(rows[:block], width)
        for token, place in source.items():
            if place < block:
                self.successors[token] = best[place]
            elif place in verified.accepted:
                self.successors[token] = likeliest(rows[place : place + 1], width)[0]
        if verified.emitted:
            self._last = verified.emitted[-1]

    def propose(self, budget: int) -> Draft:
        """The tree, or the chain, as far as the matrix is filled."""
        if self._trees:
            return self._filled(_CUTS[max(0, min(budget, len(TREE)))])
        path, token = list[int](), self._last
        while token >= 0 and len(path) <= budget:
            path.append(token)
            token = int(self.successors[token, 0])
        return chain(path[1:])

    def _filled(self, nodes: Sequence[tuple[int, int]]) -> Draft:
        """The nodes that have a token; a node without one has no children either."""
        tokens: list[int] = []
        parents: list[int] = []
        places: dict[int, int] = {-1: -1}  # from the template's indices to the draft's
        width = self.successors.shape[1]
        for node, (parent, rank) in enumerate(nodes):
            above = places.get(parent)
            if above is None or rank >= width:
                continue
            holder = self._last if above < 0 else tokens[above]
            token = int(self.successors[holder, rank]) if holder >= 0 else -1
            if token >= 0:
                places[node] = len(tokens)
                tokens.append(token)
                parents.append(above)
        return Draft(tuple(tokens), tuple(parents))


def likeliest(logits: Array, count: int) -> Array:
    """The ids [rows, count] of the highest of float32 ``logits`` [rows, vocabulary], exactly.

    The highest first; of equals, the lowest id first. Takes a tenth of the time of a sort: the
    ``count`` highest maxima of groups are ``count`` elements, so nothing below the least of
    them can be among the highest, and little is left to sort.
    """
    rows, vocabulary = logits.shape
    if count == 1:
        return np.asarray(logits.argmax(-1)[:, None])
    if vocabulary < _PIECES or count > _GROUPS:
        return np.asarray(np.argsort(-logits, axis=-1, kind="stable")[:, :count])
    whole = vocabulary - vocabulary % _PIECES
    cut = logits[:, :whole].reshape(rows, -1, _PIECES)
    maxima = cut.max(axis=1)  # [rows, pieces]
    grouped = np.sort(maxima.reshape(rows, -1, _GROUPS).max(axis=1))  # [rows, groups]
    floors = grouped[:, _GROUPS - count, None]
    # "Not below" and not "at least": a row that is not numbers is all candidates then.
    row, piece = np.divmod(np.flatnonzero(~(maxima < floors)), _PIECES)
    values = cut[row, :, piece]  # [candidate pieces, elements of a piece]
    which, element = np.divmod(np.flatnonzero(~(values < floors[row])), values.shape[1])
    row, ids, values = row[which], element * _PIECES + piece[which], values[which, element]
    if whole < vocabulary:
        more, rest = np.nonzero(~(logits[:, whole:] < floors))
        row, ids = np.concatenate([row, more]), np.concatenate([ids, rest + whole])
        values = np.concatenate([values, logits[more, rest + whole]])
    order = np.lexsort((ids, -values, row))
    first = np.searchsorted(row[order], np.arange(rows))
    return np.asarray(ids[order[first[:, None] + np.arange(count)]])


def _cut(size: int) -> tuple[tuple[int, int], ...]:
    """The first ``size`` nodes of ``TREE``, its path of best successors in front.

    A runtime's rows along the first path of a tree equal a chain's to the bit.
    """
    path, parent = [], -1
    for node in range(size):
        if TREE[node] == (parent, 0):
            path.append(node)
            parent = node
    order = path + [node for node in range(size) if node not in path]
    index = {-1: -1, **{node: place for place, node in enumerate(order)}}
    return tuple((index[TREE[node][0]], TREE[node][1]) for node in order)


_CUTS = [_cut(size) for size in range(len(TREE) + 1)]
