"""Stepper: a decoder with its key-value cache, opened for running; and what feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from edgekit.errors import BadInput
from edgekit.spec import Array


@dataclass(frozen=True, slots=True)
class Rows:
    """What one pass answers, for each row asked for: arrays that hold until the next pass.

    ``logits`` are float32 [rows, vocabulary]; ``hidden``, float32 [rows, hidden], is what the
    head multiplied: the state after the last norm.
    """

    logits: Array
    hidden: Array


class Stepper(Protocol):
    """A language model in a runtime. Nothing is loaded before entry; all is freed after exit."""

    @property
    def capacity(self) -> int:
        """How many tokens the cache holds, padding included."""
        ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def length(self) -> int:
        """How many tokens it has seen and kept."""
        ...

    @property
    def widths(self) -> Sequence[int]:
        """The numbers of tokens that one pass may have, ascending: buckets, or a ``range``."""
        ...

    @property
    def exact_widths(self) -> Sequence[int]:
        """Those of ``widths`` among which a row's result is equal to the bit, whatever its
        neighbours are and however the tokens before it were cut into passes; () where nobody
        has measured it on this runtime."""
        ...

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """Feed tokens, ``len(tokens)`` one of ``widths``; all are kept until rewound.

        A chain, unless ``parents`` gives each token's parent, an index before its own, -1 for
        what was kept before: then a token sees its ancestors and itself, and stands one position
        behind its parent. ``rows`` are the indices whose results are wanted, all by default.
        Raises ``BadInput`` where the cache would overflow.
        """
        ...

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens and forget the rest."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def lineage(parents: Sequence[int]) -> tuple[Array, Array]:
    """Of a pass's tokens, each one's depth, int64 [n], and which of them it sees, bool [n, n]:
    its ancestors and itself. ``parents`` as ``Stepper.step`` takes them."""
    count = len(parents)
    depths, seen = np.zeros(count, np.int64), np.eye(count, dtype=bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            depths[index] = depths[parent] + 1
            seen[index] |= seen[parent]
    return depths, seen


def fitting(widths: Sequence[int], count: int) -> int:
    """The least of ``widths`` that holds ``count`` tokens, else the widest."""
    return next((width for width in widths if width >= count), widths[-1])


def next_pass(stepper: Stepper, left: int, allowed: Sequence[int]) -> tuple[int, int]:
    """How many of ``left`` tokens go into the next pass, and its width, of ``allowed``.

    Where the cache has no room for the padding: the most that any width takes whole.
    """
    count = min(left, allowed[-1])
    width = fitting(allowed, count)
    if stepper.length + width <= stepper.capacity:
        return count, width
    whole = max((width for width in stepper.widths if width <= count), default=1)
    return whole, whole


def _last_rows(count: int, width: int) -> list[int]:
    """The row of token ``count - 1``, and another behind it where there is one.

    A head may take another kernel for one row than for several, so where one row is not exact
    a lone one must not be asked for. Two of 49,152 logits cost a pass of many tokens nothing.
    """
    return [count - 1] if width == 1 else [count - 1, 0 if count > 1 else width - 1]


def feed(
    stepper: Stepper,
    tokens: Sequence[int],
    *,
    widths: Sequence[int] | None = None,
    chunk: int = 256,
    report: Callable[[int], None] = lambda _fed: None,
) -> Rows:
    """Feed any number of tokens in passes of ``widths``; the results of the last token alone.

    What is left over is padded with token 0, and the padding rewound, so it costs time and no
    number. No pass is wider than ``chunk``, which bounds the memory of a long prompt. ``report``
    hears how many tokens have been fed. Raises ``BadInput`` where they do not fit.
    """
    if not tokens:
        raise BadInput("there is no token to feed; a prompt has at least one.")
    allowed = [w for w in (widths or stepper.exact_widths or stepper.widths) if w <= chunk]
    allowed = allowed or list(stepper.widths)[:1]
    start = stepper.length
    if start + len(tokens) > stepper.capacity:
        raise BadInput(
            f"{start + len(tokens)} tokens do not fit the {stepper.capacity} that the cache holds; "
            "shorten the text, or export with a larger --context."
        )
    fed, answer = 0, None
    while fed < len(tokens):
        count, width = next_pass(stepper, len(tokens) - fed, allowed)
        part = [*tokens[fed : fed + count], *[0] * (width - count)]
        answer = stepper.step(part, rows=_last_rows(count, width))
        fed += count
        stepper.rewind(start + fed)
        report(fed)
    assert answer is not None
    return Rows(answer.logits[:1], answer.hidden[:1])
