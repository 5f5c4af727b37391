"""Drafters without training: what a round costs, and how many tokens they foresee.

    python tools/bench_drafters.py STREAMS.json --record BUNDLE     record greedy answers first
    python tools/bench_drafters.py STREAMS.json                     then replay them
    python tools/bench_drafters.py STREAMS.json --shares            what the tree is cut from

A stream is a prompt, a greedy answer and the eight likeliest tokens at each place of it. They are
replayed through the speculative loop, so no model runs; what it would say behind a rejected token
is taken to be what it last said behind the same token. `fed` is the mean number of tokens in a
pass; `gain`, the speed-up over passes of one token, follows from the times of `TIMES`. A round is
propose and observe together, behind 1,000 tokens, with random rows of the whole vocabulary for
every token of the pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit.decode.draft import Drafter, Verified
from edgekit.decode.drafters import NAMES, drafter
from edgekit.decode.merged import followed
from edgekit.decode.recycling import WIDTH
from edgekit.decode.replay import Recording, Replay, recorded
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Rows
from edgekit.render import table
from edgekit.spec import Array

BUDGETS = (3, 7, 15)  # passes of 4, 8 and 16 tokens
# T(n) / T(1) of SmolLM2-135M in ONNX Runtime's 8-bit kernel, two threads.
WIDTHS, TIMES = (1, 2, 4, 8, 16), (1.0, 1.18, 1.52, 2.14, 3.44)
CONTEXT = 1000
PROMPTS = Path(edgekit.__file__).parent / "texts" / "prompts.txt"

CODE = """class Basket:
    def __init__(self):
        self.items = []
        self.prices = []

    def add(self, item, price):
        self.items.append(item)
        self.prices.append(price)

    def total(self):
        return sum(self.prices)

    def show(self):
        for item, price in zip(self.items, self.prices):
            print(item, price)
"""
STORY = (
    "The old mill stands at the bend of the river, where the water runs slow and deep. In spring "
    "the miller's daughter opened the sluice and the great wheel began to turn. Farmers came from "
    "five villages with carts of wheat and rye. They waited in the yard, told each other the news, "
    "and went home in the evening with sacks of white flour. When the railway came, the farmers "
    "sold their grain to the town, and the wheel stood still. Today the mill is a museum."
)
COPYING = (
    ("code-edit", f"Rename the class Basket to Cart and give back the whole code:\n\n{CODE}"),
    ("code-edit", f"Add a docstring to every method and give back the whole code:\n\n{CODE}"),
    ("rewrite", f"Rewrite this text in the present tense, and change little:\n\n{STORY}"),
    ("rewrite", f"Correct the spelling and give back the whole text: {STORY.replace('ll', 'l')}"),
    ("summarise", f"Summarise this text in three sentences:\n\n{STORY}"),
    ("rag", f"Answer with sentences of the text.\n\nText: {STORY}\n\nQuestion: Who came there?"),
)


def record(bundle: str, artifact: str | None, limit: int) -> list[dict[str, Any]]:
    """One stream for each prompt."""
    chat = [("chat", each.strip()) for each in PROMPTS.read_text("utf-8").split("\n\n")]
    streams = []
    with edgekit.TextModel(bundle, artifact, threads=1) as model:
        for kind, text in (*chat, *COPYING):
            prompt = model.encoded(text, chat=True)
            output = list(model.tokens(prompt, limit=limit, drafter="off"))
            top = recorded(model.stepper, prompt, output).ranks.tolist()
            streams.append({"kind": kind, "prompt": prompt, "output": output, "top": top})
            print(f"{kind}: {len(prompt)} tokens, answered by {len(output)}", flush=True)
    return streams


def replayed(drafts: Drafter, stream: dict[str, Any], budget: int, vocabulary: int) -> Tally:
    """What the passes of one stream, as wide as the budget allows, bring."""
    recording = Recording(stream["prompt"], stream["output"], np.array(stream["top"]))
    stepper, tally = Replay(recording, vocabulary, range(1, 65)), Tally()
    limit = len(recording.answer)
    words: dict[str, Any] = {"limit": limit, "widths": range(1, budget + 2), "tally": tally}
    for _ in speculate(stepper, recording.prompt, drafts, **words):
        pass
    return tally


def acceptance(streams: Sequence[dict[str, Any]], vocabulary: int) -> str:
    """Tokens a pass: each drafter, budget and kind; one drafter for all texts, as in use."""
    rows: list[tuple[object, ...]] = []
    kinds = list(dict.fromkeys(stream["kind"] for stream in streams))
    for name, trees in _forms():
        for budget in BUDGETS:
            drafts = drafter(name, vocabulary, trees=trees)
            tallies = [(s["kind"], replayed(drafts, s, budget, vocabulary)) for s in streams]
            means = [
                sum(each.tokens for kind, each in tallies if kind in wanted)
                / max(sum(each.passes for kind, each in tallies if kind in wanted), 1)
                for wanted in (kinds, *([kind] for kind in kinds))
            ]
            fed = [width for _, each in tallies for width in each.widths.elements()]
            gain = means[0] / statistics.fmean(np.interp(fed, WIDTHS, TIMES))
            cells = [f"{mean:.2f}" for mean in (statistics.fmean(fed), gain, *means)]
            rows.append((_label(name, trees), budget, *cells))
    return table(("drafter", "budget", "fed", "gain", "all", *kinds), rows)


def costs(streams: Sequence[dict[str, Any]], vocabulary: int) -> str:
    """Microseconds a round."""
    rng = np.random.default_rng(0)
    rows: list[tuple[object, ...]] = []
    whole = [token for s in streams for token in (*s["prompt"], *s["output"])]
    for name, trees in _forms():
        for budget in BUDGETS:
            logits = [
                rng.standard_normal((budget + 1, vocabulary)).astype(np.float32) for _ in range(4)
            ]
            drafts = drafter(name, vocabulary, trees=trees)
            start = time.perf_counter()
            drafts.start(whole[:CONTEXT])
            started = time.perf_counter() - start
            spent = sorted(_rounds(drafts, whole[CONTEXT:], budget, logits))
            middle, high = spent[len(spent) // 2], spent[len(spent) * 95 // 100]
            shown = (f"{1e6 * middle:.0f} µs", f"{1e6 * high:.0f} µs", f"{1e3 * started:.2f} ms")
            rows.append((_label(name, trees), budget, *shown))
    return table(("drafter", "budget", "median", "95 %", "start, per 1,000"), rows)


def _rounds(
    drafts: Drafter, text: Sequence[int], budget: int, logits: Sequence[Array]
) -> Iterator[float]:
    """Seconds of each round over a text, every pass as wide as the budget allows."""
    done = 1
    for index in range(400):
        if done >= len(text):
            return
        start = time.perf_counter()
        draft = drafts.propose(budget)
        spent = time.perf_counter() - start
        # A full pass, so that the cost is that of the budget and not of this text.
        fed = (text[done - 1], *draft.tokens, *text[:budget])[: budget + 1]
        parents = (-1, *(parent + 1 for parent in draft.parents), *range(budget))[: len(fed)]
        hits, _ = followed(draft, text[done:])
        accepted, emitted = tuple(range(hits + 1)), tuple(text[done : done + hits + 1])
        block = logits[index % len(logits)]
        verified = Verified(fed, parents, Rows(block, block[:, :1]), accepted, emitted)
        start = time.perf_counter()
        drafts.observe(verified)
        yield spent + time.perf_counter() - start
        done += hits + 1


def shares(streams: Sequence[dict[str, Any]], vocabulary: int, depths: int = 6) -> Array:
    """[depth, rank]: how often the next token was the one of that rank, all before it found."""
    counts = np.zeros((depths, WIDTH + 1))
    matrix = np.full((vocabulary, WIDTH), -1)
    for stream in streams:
        text = [stream["prompt"][-1], *stream["output"]]
        for place, top in enumerate(stream["top"]):
            for depth, (above, token) in enumerate(pairwise(text[place : place + depths + 1])):
                found = np.flatnonzero(matrix[above] == token)
                counts[depth, found[0] if len(found) else WIDTH] += 1
                if not len(found):
                    break
            matrix[text[place]] = top
    result: Array = counts[:, :WIDTH] / counts.sum(1, keepdims=True)
    return result


def grown(measured: Array, size: int) -> list[tuple[int, int]]:
    """The static tree: node by node the one with the highest product of shares, its parent and
    its likelier siblings first."""
    nodes: list[tuple[int, int]] = []
    values, depths = {-1: 1.0}, {-1: 0}
    while len(nodes) < size:
        ranks = {above: sum(parent == above for parent, _ in nodes) for above in values}
        value, above = max(
            (values[above] * measured[depths[above], rank], above)
            for above, rank in ranks.items()
            if depths[above] < len(measured) and rank < WIDTH
        )
        values[len(nodes)], depths[len(nodes)] = value, depths[above] + 1
        nodes.append((above, ranks[above]))
    return nodes


def _forms() -> list[tuple[str, bool]]:
    plain = [(name, False) for name in NAMES]
    return plain + [(name, True) for name in ("merged", "recycling")]


def _label(name: str, trees: bool) -> str:
    return f"{name}, trees" if trees else name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streams", type=Path)
    parser.add_argument("--record", metavar="BUNDLE")
    parser.add_argument("--artifact")
    parser.add_argument("--limit", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--shares", action="store_true", help="measure and grow the tree")
    chosen = parser.parse_args(arguments)
    if chosen.record:
        streams = record(chosen.record, chosen.artifact, chosen.limit)
        chosen.streams.write_text(json.dumps(streams), "utf-8")
        return
    streams = json.loads(chosen.streams.read_text("utf-8"))
    if chosen.shares:
        measured = shares(streams, chosen.vocabulary)
        print(np.round(measured, 3))
        print(grown(measured, max(BUDGETS)))
        return
    print("Tokens a pass\n" + acceptance(streams, chosen.vocabulary))
    print("\nA round\n" + costs(streams, chosen.vocabulary))


if __name__ == "__main__":
    main()
