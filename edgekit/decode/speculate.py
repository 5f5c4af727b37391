"""The speculative loop: draft, verify in one pass, keep what plain decoding would have written.

Leviathan et al., arXiv 2211.17192, for drafts that are certain: the model's own choice is drawn
from each row, and the draft followed where it holds that token. Since a choice depends on its row
and its index alone, the text is that of the plain loop, token for token, greedy or sampled,
wherever rows are equal to the bit.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from edgekit.decode.draft import Draft, Drafter, Verified, chain
from edgekit.decode.paying import Round, Switch, likely
from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.stepper import Rows, Stepper, feed, fitting
from edgekit.errors import UsageError

_WIDEST = 64  # rows of logits that one pass answers: 12.6 MB at 49,152 tokens


@dataclass(slots=True)
class Tally:
    """What the passes behind the prompt's took and brought; counts go on from text to text.

    ``tokens`` leaves out the first of each text, which the prompt's own pass gives. ``widths``
    counts passes by their width, padding included. ``tested`` and ``accepted`` count, for each
    depth, drafted tokens whose parents were all right, and those of them that were right too.
    Seconds are wall time.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    tested: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 for plain decoding; 0 before the first pass."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The share of right tokens at each depth, where all before were right."""
        return tuple(right / tried for right, tried in zip(self.accepted, self.tested, strict=True))

    def add(self, done: Round) -> None:
        """Count one pass."""
        self.passes += 1
        self.tokens += done.tokens
        self.drafted += done.drafted
        self.widths[done.width] += 1
        while len(self.tested) < done.tested:
            self.tested.append(0)
            self.accepted.append(0)
        for depth in range(done.tested):
            self.tested[depth] += 1
            self.accepted[depth] += depth < done.accepted


def speculate(
    stepper: Stepper,
    prompt: Sequence[int],
    drafter: Drafter,
    *,
    limit: int,
    stops: Container[int] = (),
    sampling: Sampling = GREEDY,
    widths: Sequence[int] | None = None,
    switch: Switch | None = None,
    before: Sequence[int] = (),
    tally: Tally | None = None,
    report: Callable[[int], None] = lambda _fed: None,
) -> Iterator[int]:
    """Yield what ``generate`` yields, in fewer passes where ``drafter`` foresees tokens.

    Passes keep to the stepper's exact widths, and of a draft's tree the first path alone is fed,
    since side branches are not equal to the bit; without exact widths nothing is drafted.
    ``widths``, where given, are taken instead, and trees are fed whole. ``switch`` says how much
    to draft, else as much as passes hold. The drafter is told of ``before``, the tokens that the
    stepper has kept. ``tally`` is added to.

    The last token yielded is not fed, also where the caller closes the iterator early or a pass
    is interrupted; behind a tree some before it may not be either: whoever goes on begins with
    the first that ``stepper.length`` leaves out. Raises ``BadInput`` where the prompt does not
    fit, ``UsageError`` where someone else moves the stepper in between.
    """
    text = _Text(stepper, drafter, limit, stops, sampling, widths, switch, tally or Tally())
    given = 0
    try:
        fresh = text.begin(before, prompt, report)
        while fresh:
            for token in fresh:
                yield token
                given += 1
            fresh = () if text.ended else text.go_on()
    except BaseException:
        text.cut(given)  # what was not yielded is no text to the caller
        raise


class _Text:
    """One text: ``kept`` tokens lie in the cache, ``_pending`` and ``_root`` follow unfed."""

    def __init__(
        self,
        stepper: Stepper,
        drafter: Drafter,
        limit: int,
        stops: Container[int],
        sampling: Sampling,
        widths: Sequence[int] | None,
        switch: Switch | None,
        tally: Tally,
    ) -> None:
        self._stepper, self._drafter, self._sampling = stepper, drafter, sampling
        self._stops, self._limit = stops, limit
        exact = stepper.exact_widths if widths is None else sorted(widths)
        narrow = [width for width in exact if width <= _WIDEST] or list(exact[:1])
        self._narrowest = stepper.widths[0]
        self._widths = narrow or [self._narrowest]
        self._drafts, self._trees = bool(exact), widths is not None
        self._switch, self._tally = switch, tally
        self.kept = self._start = stepper.length  # the start is that of the answer
        self._pending: list[int] = []
        self._root = -1
        self._index = 0
        self.ended = False

    def begin(
        self, before: Sequence[int], prompt: Sequence[int], report: Callable[[int], None]
    ) -> tuple[int, ...]:
        """Feed the prompt; the first token, if any is wanted."""
        self._drafter.start([*before, *prompt])
        try:
            rows = feed(self._stepper, prompt, report=report)
            self.kept = self._start = self.kept + len(prompt)
        finally:
            self._settle()
        if self._limit < 1:
            return ()
        verified, _, _ = self._walk(prompt[-1], Draft(), rows)
        self._root, self._index = verified.emitted[0], 1
        self._drafter.observe(verified)
        return verified.emitted

    def go_on(self) -> tuple[int, ...]:
        """One round: the tokens it brings, none where the cache is full."""
        if self._stepper.length != self.kept:
            raise UsageError(
                "the stepper was moved by someone else while this text was being decoded; "
                "decode one text at a time."
            )
        fits = self._fits()
        if not fits:
            return ()
        start = time.perf_counter()
        draft = self._draft(fits[-1])
        drafted = time.perf_counter()
        verified, done = self._verify(draft, fits)
        stepped = time.perf_counter()
        self._drafter.observe(verified)
        learnt = time.perf_counter()
        self._tally.add(done)
        self._tally.verifying_seconds += stepped - drafted
        self._tally.drafting_seconds += drafted - start + learnt - stepped
        if self._switch is not None:
            self._switch.note(done)
        return verified.emitted

    def cut(self, given: int) -> None:
        """Keep what lies before the last of ``given`` + 1 tokens, unless the stepper has moved."""
        wanted = min(self.kept, self._start + given)
        if self._stepper.length == self.kept > wanted:
            self._stepper.rewind(wanted)

    def _settle(self) -> None:
        """Forget padding, what was rejected, and what an interrupted pass may have left."""
        if self._stepper.length > self.kept:
            self._stepper.rewind(self.kept)

    def _fits(self) -> Sequence[int]:
        """The widths that hold what must be fed and for which the cache has room."""
        room = self._stepper.capacity - self.kept
        widths = self._widths
        fits = widths[bisect_right(widths, len(self._pending)) : bisect_right(widths, room)]
        if fits or self._narrowest > room:
            return fits
        if not self._pending:
            # A cache's last few tokens, where every width that we keep to is too wide.
            return [self._narrowest]
        try:
            feed(self._stepper, self._pending, widths=widths)
            self.kept += len(self._pending)
        finally:
            self._settle()
        self._pending = []
        return self._fits()

    def _draft(self, widest: int) -> Draft:
        """What the drafter proposes, in what room there is for it."""
        # Plain decoding takes its last tokens in narrower passes, which are not equal to the bit;
        # so no draft reaches where our narrowest pass would not fit.
        head = self.kept + len(self._pending)
        room = self._stepper.capacity - self._widths[0] - head
        budget = min(widest - len(self._pending) - 1, room, self._limit - self._index - 1)
        if self._switch is not None:
            budget = min(budget, self._switch.budget())
        if budget < 1 or not self._drafts:
            return Draft()
        draft = self._drafter.propose(budget)
        if not (self._trees or draft.is_chain):
            draft = _first_path(draft)
        worth = likely(draft) if self._switch is None else self._switch.worth(draft)
        return draft.cut(min(budget, worth))

    def _verify(self, draft: Draft, fits: Sequence[int]) -> tuple[Verified, Round]:
        """Feed the pending tokens, the root and the draft; keep what is accepted."""
        head = len(self._pending)
        tokens = [*self._pending, self._root, *draft.tokens]
        width = fitting(fits, len(tokens))
        padding = width - len(tokens)
        parents = None
        if not draft.is_chain:
            hung = [parent + head + 1 for parent in draft.parents]
            parents = [*range(-1, head), *hung, *[head] * padding]
        # Where a pass of one row is not exact, a head that multiplies one row need not be either.
        asked = max(len(tokens), min(width, head + self._widths[0]))
        padded = tokens + [0] * padding
        try:
            rows = self._stepper.step(padded, parents=parents, rows=range(head, asked))
            verified, tested, right = self._walk(self._root, draft, rows)
            self._keep(verified)
        finally:
            self._settle()
        return verified, Round(width, len(draft), tested, right, len(verified.emitted))

    def _walk(self, root: int, draft: Draft, rows: Rows) -> tuple[Verified, int, int]:
        """Draw from each row and follow the draft; how many of its depths were tested, and right.

        The token that ends the text is not among the accepted: its row is not kept.
        """
        tokens = (root, *draft.tokens)
        parents = (-1, *[parent + 1 for parent in draft.parents])
        # Of equal siblings the first counts, so it is written last.
        backwards = range(len(tokens) - 1, 0, -1)
        children = {(parents[place], tokens[place]): place for place in backwards}
        accepted, emitted, tested, right = [0], list[int](), 0, 0
        while True:
            node = accepted[-1]
            token = self._sampling.choose(rows.logits[node], self._index + len(emitted))
            emitted.append(token)
            child = children.get((node, token))
            tested += node in parents
            right += child is not None
            self.ended = token in self._stops or self._index + len(emitted) >= self._limit
            if self.ended or child is None:
                break
            accepted.append(child)
        count = len(tokens)
        answers = Rows(rows.logits[:count], rows.hidden[:count])
        return Verified(tokens, parents, answers, tuple(accepted), tuple(emitted)), tested, right

    def _keep(self, verified: Verified) -> None:
        """Of the accepted, keep those that lie in the cache as a chain's would; feed the rest
        again, so that the state is what a chain leaves."""
        accepted = verified.accepted
        whole = next((i for i, node in enumerate(accepted) if node != i), len(accepted))
        self.kept += len(self._pending) + whole
        self._pending = [verified.tokens[node] for node in accepted[whole:]]
        self._root = verified.emitted[-1]
        self._index += len(verified.emitted)


def _first_path(draft: Draft) -> Draft:
    """The chain of first children."""
    tokens, node = [], -1
    for place, parent in enumerate(draft.parents):
        if parent == node:
            tokens.append(draft.tokens[place])
            node = place
    return chain(tokens)
