"""Asks the eager module of a language model: continuations, losses, logits. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.language import LanguageModel
from edgekit.language_reference import LanguageReference

_CHUNK = 256  # tokens of the text at once: their logits lie in memory together

Report = Callable[[str], None]


@torch.inference_mode()
def reference_of(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    text: Sequence[int],
    *,
    count: int,
    source: str,
    report: Report,
) -> LanguageReference:
    """What eager answers to ``prompts``, greedily, ``count`` tokens each, and to ``text``."""
    continuations, margins, logits = [], [], []
    for index, prompt in enumerate(prompts):
        report(f"asking the eager model: prompt {index + 1} of {len(prompts)}")
        tokens, gaps, first = _greedy(model.module, prompt, count, model.stops)
        continuations.append(tokens)
        margins.append(gaps)
        logits.append(first)
    report("asking the eager model to read the text")
    losses, likeliest = _read(model.module, text)
    return LanguageReference(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        continuations=tuple(map(tuple, continuations)),
        margins=tuple(map(tuple, margins)),
        logits=np.stack(logits),
        text=tuple(text),
        losses=losses,
        likeliest=likeliest,
        source=source,
    )


def _greedy(
    module: nn.Module, prompt: Sequence[int], count: int, stops: Sequence[int]
) -> tuple[list[int], list[float], Any]:
    cache: list[Any] = []
    row: Tensor = module(torch.tensor([list(prompt)]), cache)[0, -1]
    first, tokens, gaps = row.numpy().copy(), [], []
    for _ in range(count):
        best = row.topk(2).values
        tokens.append(int(row.argmax()))
        gaps.append(float(best[0] - best[1]))
        if tokens[-1] in stops:
            break
        row = module(torch.tensor([tokens[-1:]]), cache)[0, -1]
    return tokens, gaps, first


def _read(module: nn.Module, text: Sequence[int]) -> tuple[Any, Any]:
    cache: list[Any] = []
    losses, likeliest = [], []
    for start in range(0, len(text), _CHUNK):
        part = torch.tensor([list(text[start : start + _CHUNK])])
        rows = module(part, cache)[0]
        following = torch.tensor(list(text[start + 1 : start + 1 + _CHUNK]))
        rows = rows[: len(following)]
        chosen = rows.double().log_softmax(-1).gather(1, following[:, None])[:, 0]
        losses.append(-chosen.numpy())
        likeliest.append(rows.argmax(-1).numpy())
    return np.concatenate(losses), np.concatenate(likeliest)
