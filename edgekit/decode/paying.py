"""Whether drafting pays: what passes cost, what they bring, and a switch that decides as it goes.

All of it is arithmetic on measured seconds and on counts; no clock is read here, so the same
text takes the same passes every time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from edgekit.decode.draft import Draft
from edgekit.errors import BadInput, DamagedFile


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds measured on one device: ``passes`` holds (width, seconds of one pass), ascending.

    ``drafting`` is what a round spends outside of its pass. Raises ``BadInput`` where nothing was
    measured, or no time passed.
    """

    passes: tuple[tuple[int, float], ...]
    drafting: float = 0.0

    def __post_init__(self) -> None:
        widths = [width for width, _ in self.passes]
        if not widths or widths != sorted(set(widths)) or widths[0] < 1:
            raise BadInput(
                f"passes of {widths} tokens; give one or more widths, ascending, from 1."
            )
        times = [seconds for _, seconds in self.passes]
        if not all(math.isfinite(each) and each > 0 for each in times):
            raise BadInput(f"passes of {times} seconds; each is a number above 0.")
        if not (math.isfinite(self.drafting) and self.drafting >= 0):
            raise BadInput(f"drafting takes {self.drafting:g} seconds; it is a number from 0 up.")

    def seconds(self, width: int) -> float:
        """Of one pass: between two measured widths on the straight line through them.

        Below the narrowest, its own time; beyond the widest, as the last line goes on.
        """
        passes = self.passes
        if width <= passes[0][0] or len(passes) == 1:
            return passes[0][1]
        above = min(bisect_left(passes, (width,)), len(passes) - 1)
        (low, before), (high, after) = passes[above - 1], passes[above]
        # A wider pass is never taken for a cheaper one because two timings were noisy.
        return max(before + (after - before) * (width - low) / (high - low), passes[0][1])

    def to_json(self) -> dict[str, object]:
        """Widths are keys, as text."""
        return {
            "passes": {str(width): seconds for width, seconds in self.passes},
            "drafting": self.drafting,
        }

    @classmethod
    def from_json(cls, value: object) -> Costs:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields = dict(value)  # type: ignore[call-overload]
            passes = sorted((int(width), float(each)) for width, each in fields["passes"].items())
            return cls(tuple(passes), float(fields["drafting"]))
        except (TypeError, KeyError, ValueError, AttributeError) as cause:
            raise DamagedFile(f"the costs of passes are malformed: {cause!r}.") from cause


@dataclass(frozen=True, slots=True)
class Round:
    """One pass in counts. Of the draft's depths, ``tested`` had a token on offer behind a right
    one, and ``accepted`` of those, the first ones, were right; ``tokens`` became text."""

    width: int
    drafted: int
    tested: int
    accepted: int
    tokens: int


# Where costs are not known: a token that is accepted less often takes more time than it saves.
# Fed beside others, one takes 0.1 to 0.2 of a plain pass, and a pass brings some 1.5 tokens.
FLOOR = 0.3


def likely(draft: Draft) -> int:
    """How many tokens of a chain are likely enough to be fed; all where no chances are known."""
    reached = accumulate(draft.chances, mul)
    return sum(chance >= FLOOR for chance in reached) if draft.chances else len(draft)


_WEIGHT = 1 / 16  # of a new round in the acceptance of a depth, once it rests on enough
_SLOWLY = 1 / 64  # and in the speed-up: rounds differ so much that fewer of them say nothing
_BEGUN = 8  # the speed-up that was predicted counts as that many rounds
# Of several uncertain proposals the most hopeful is taken, which is seldom as good as it looks.
_MARGIN = 1.5
_TRUST = 4  # what an average begins with counts as that many rounds
_LONGER = 1 / 4  # how fast a draft that was all right makes longer ones be tried
_PROBE = 6  # drafted rounds that a probe takes
_HOPELESS = 3  # of them, where none brings a drafted token
_PAUSE = 32  # tokens before the first probe; twice as many after each that fails
_LONGEST_PAUSE = 1024
_UNTRIED = 0.5  # acceptance of a depth of which nothing is known
_IDLE = 0.1  # share of a plain pass: this much drafting in vain counts as a round of its own


class Switch:
    """Says how many tokens to draft next, from how earlier rounds went; 0 is plain decoding.

    It keeps the acceptance of each depth and the speed-up over plain passes of the narrowest of
    ``widths`` as running averages. A draft that knows its chances is fed as far as its tokens are
    worth their time at the rate of the text so far; any other, as far as brings most tokens a
    second by the running acceptance. Where the speed-up falls below 1, it decodes plainly, and
    tries again after a pause that grows each time. ``acceptance`` [depth] is what to begin with,
    as measured on other texts. Lengths are weighed as for chains: for drafts of trees give two
    ``widths``, the narrowest and the tree's. Raises ``BadInput`` where no width holds a draft.
    """

    def __init__(
        self,
        costs: Costs,
        widths: Sequence[int],
        *,
        acceptance: Sequence[float] = (),
        longest: int = 16,
    ) -> None:
        if longest < 1 or max(widths) < 2:
            raise BadInput(
                f"no pass of {list(widths)} tokens holds a draft of 1 to {longest}; give a width "
                "of 2 or more, and a longest draft of 1 or more."
            )
        self._costs = costs
        self._plain = costs.seconds(min(widths))
        # Padding costs as much as a draft, so drafts fill their width; of equals, the narrowest.
        wide = sorted((width for width in widths if width > 1), reverse=True)
        useful = {min(width - 1, longest): width for width in wide}
        self._lengths = [
            (length, costs.seconds(width) + costs.drafting)
            for length, width in sorted(useful.items())
        ]
        deepest = self._lengths[-1][0]
        known = list(acceptance) or [_UNTRIED]
        self._acceptance = [*known, *[known[-1]] * (deepest - len(known))][:deepest]
        self._tested = [_TRUST] * deepest
        self._rounds = _BEGUN
        self._length, rate = self._fastest()
        # The averages begin as predicted, at what one plain pass of that speed would bring.
        self._tokens, self._seconds = rate * self._plain, self._plain
        # Of the whole text, rounds without a draft too, begun as a few plain ones.
        self._text = float(_TRUST), _TRUST * self._plain
        self._vain = 0.0  # seconds of drafting without a draft, not yet counted
        self._pause = _PAUSE
        self._left = 0  # tokens until a probe
        self._probe: list[tuple[int, float]] | None = None
        if self.speedup < 1:
            self._rest()

    @property
    def speedup(self) -> float:
        """The running average over plain decoding."""
        return self._tokens * self._plain / self._seconds

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The running average for each depth."""
        return tuple(self._acceptance)

    @property
    def is_on(self) -> bool:
        """Whether the next round drafts."""
        return self._left <= 0

    def budget(self) -> int:
        """How many tokens may be drafted in the next round; see ``worth``."""
        return self._lengths[-1][0] if self.is_on else 0

    def worth(self, draft: Draft) -> int:
        """How many tokens of a draft to feed.

        Each second would else bring what it has brought so far, so a chain that knows its chances
        is cut where its expected tokens, less those of its pass's seconds, are the most.
        """
        if not draft.chances:
            return self._length
        tokens, seconds = self._text
        rate = _MARGIN * max(tokens / seconds, 1 / self._plain)
        best, most = 0, 1.0 - rate * self._costs.seconds(1)
        reached = accumulate(accumulate(draft.chances, mul))
        for length, expected in enumerate(reached, 1):
            left = 1.0 + expected - rate * self._costs.seconds(length + 1)
            if left > most:
                best, most = length, left
        return best

    def note(self, done: Round) -> None:
        """Learn from a round."""
        tokens, spent = self._text
        self._text = tokens + done.tokens, spent + self._costs.seconds(done.width)
        if not self.is_on:
            self._left -= done.tokens
            if self._left <= 0:
                self._probe = []
            return
        self._vain += self._costs.drafting
        if not done.drafted and self._vain < _IDLE * self._plain:
            return
        seconds = self._costs.seconds(done.width) + self._vain
        self._vain = 0.0
        self._learn(done)
        self._length, _ = self._fastest()
        if self._probe is not None:
            self._judge(self._probe, done.tokens, seconds)
            return
        self._rounds += 1
        weight = max(_SLOWLY, 1 / self._rounds)
        self._tokens += weight * (done.tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)
        if self.speedup < 1:
            self._rest()

    def _learn(self, done: Round) -> None:
        shares = self._acceptance
        tested = min(done.tested, len(shares))
        for depth in range(tested):
            self._tested[depth] += 1
            weight = max(_WEIGHT, 1 / self._tested[depth])
            shares[depth] += weight * ((depth < done.accepted) - shares[depth])
        if done.drafted and done.accepted == tested:
            # All was right: what a longer draft is worth is not known, only what it followed.
            for depth in range(max(1, tested), len(shares)):
                shares[depth] += _LONGER * (shares[depth - 1] - shares[depth])

    def _fastest(self) -> tuple[int, float]:
        """The length of most tokens a second, and how many those are."""
        best, most = 0, 0.0
        expected, product, depth = 1.0, 1.0, 0
        for length, seconds in self._lengths:
            while depth < length:
                product *= self._acceptance[depth]
                expected += product
                depth += 1
            if expected / seconds > most:
                best, most = length, expected / seconds
        return best, most

    def _judge(self, probe: list[tuple[int, float]], tokens: int, seconds: float) -> None:
        """End a probe after its rounds: go on drafting where they paid."""
        probe.append((tokens, seconds))
        self._tokens = sum(each for each, _ in probe) / len(probe)
        self._seconds = sum(each for _, each in probe) / len(probe)
        hopeless = len(probe) == _HOPELESS and self._tokens == 1
        if len(probe) < _PROBE and not hopeless:
            return
        self._probe, self._rounds = None, len(probe)
        if self.speedup < 1:
            self._rest()
        else:
            self._pause = max(_PAUSE, self._pause // 2)

    def _rest(self) -> None:
        self._left = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
