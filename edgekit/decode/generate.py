"""The plain loop: a prompt in, tokens out one by one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.stepper import Stepper, feed


def generate(
    stepper: Stepper,
    prompt: Sequence[int],
    *,
    limit: int,
    stops: Container[int] = (),
    sampling: Sampling = GREEDY,
    widths: Sequence[int] | None = None,
    report: Callable[[int], None] = lambda _fed: None,
) -> Iterator[int]:
    """Feed ``prompt`` behind what ``stepper`` has kept, then yield up to ``limit`` tokens.

    Passes have one token, unless ``widths``, such as a stepper's exact ones, has no 1: then they
    are padded. A token of ``stops``, if one comes, is the last. The last token yielded is not
    fed: whoever goes on begins with it. ``report`` hears how much of the prompt has been fed.
    Ends early where the cache is full. Raises ``BadInput`` where the prompt does not fit.
    """
    rows = feed(stepper, prompt, report=report)
    for index in range(limit):
        token = sampling.choose(rows.logits[0], index)
        yield token
        full = stepper.length >= stepper.capacity
        if token in stops or full or index + 1 == limit:
            return
        rows = stepper.step([token]) if widths is None else feed(stepper, [token], widths=widths)
