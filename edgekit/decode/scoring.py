"""What a stepper's answers are worth: perplexity, agreement, rows that are equal to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.decode.stepper import Stepper, next_pass
from edgekit.spec import Array

WIDEST = 64  # rows of logits held at once: 64 x 49,152 floats are 12.6 MB


def logits_of(
    stepper: Stepper, tokens: Sequence[int], *, start: int = 0
) -> Iterator[tuple[int, Array]]:
    """Feed ``tokens`` from an empty cache; yield (index, float32 logits) from index ``start``.

    The row of an index is what follows its token.
    """
    stepper.rewind(0)
    allowed = [w for w in stepper.exact_widths or stepper.widths if w <= WIDEST]
    allowed = allowed or [min(stepper.widths)]
    done = 0
    while done < len(tokens):
        count, width = next_pass(stepper, len(tokens) - done, allowed)
        part = [*tokens[done : done + count], *[0] * (width - count)]
        wanted = [i for i in range(count) if done + i >= start]
        rows = stepper.step(part, rows=wanted or [count - 1])
        for place, index in enumerate(wanted):
            yield done + index, rows.logits[place]
        done += count
        stepper.rewind(done)


@dataclass(frozen=True, slots=True)
class Reading:
    """A text read token by token: nats lost at each, and the likeliest next token."""

    losses: Array  # float64 [tokens - 1]
    likeliest: Array  # int64 [tokens - 1]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(float(np.mean(self.losses)))


def read(
    stepper: Stepper, tokens: Sequence[int], report: Callable[[int], None] = lambda _read: None
) -> Reading:
    """How well ``stepper`` foresees each token of a text; cut to what its cache holds."""
    tokens = list(tokens[: stepper.capacity])
    losses, likeliest = [], []
    for index, logits in logits_of(stepper, tokens):
        report(index)
        if index + 1 < len(tokens):
            losses.append(loss_of(logits, tokens[index + 1]))
            likeliest.append(int(logits.argmax()))
    return Reading(np.array(losses), np.array(likeliest, np.int64))


def loss_of(logits: Array, token: int) -> float:
    """``-log p(token)``, in nats, by float64 softmax."""
    exact = logits.astype(np.float64)
    highest = float(exact.max())
    return math.log(float(np.exp(exact - highest).sum())) + highest - float(exact[token])


def foreseen(stepper: Stepper, prompt: Sequence[int], continuation: Sequence[int]) -> list[bool]:
    """For each token of ``continuation``, whether it is the likeliest after all before it.

    Where all are, plain greedy decoding of the prompt gives this continuation.
    """
    tokens = [*prompt, *continuation][:-1]
    rows = logits_of(stepper, tokens, start=len(prompt) - 1)
    return [
        int(logits.argmax()) == token for (_, logits), token in zip(rows, continuation, strict=True)
    ]


# Cuts of one text into passes: each is fed in passes of this many tokens.
_PROBED = (1, 2, 3, 4, 5, 8, 13, 16, 32, 64)


def measured_exact_widths(
    stepper: Stepper, tokens: Sequence[int], widths: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The largest set of ``widths`` among which the rows of ``tokens`` are equal to the bit.

    Each width reads the text alone, padded at its end with other tokens, so that a row that
    depends on its neighbours, or on the cut of what came before, shows. The default probes a
    few of those the stepper has.
    """
    probed = [w for w in (widths or _PROBED) if w in stepper.widths and w <= len(tokens)]
    classes: dict[bytes, list[int]] = {}
    for width in probed:
        classes.setdefault(_all_rows(stepper, tokens, width).tobytes(), []).append(width)
    largest = max(classes.values(), key=len, default=[])
    return tuple(largest) if len(largest) > 1 or len(probed) == 1 else ()


def _all_rows(stepper: Stepper, tokens: Sequence[int], width: int) -> Array:
    """Logits of every token, read in passes of ``width``."""
    stepper.rewind(0)
    read = []
    for start in range(0, len(tokens), width):
        part = list(tokens[start : start + width])
        padding = [(width * 7 + i) % stepper.vocabulary for i in range(width - len(part))]
        read.append(stepper.step(part + padding).logits[: len(part)].copy())
        stepper.rewind(start + len(part))
    return np.concatenate(read)
