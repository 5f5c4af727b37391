"""A language model as edgekit takes it: the eager module, its weights as data, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.decoder import Decoder, DecoderSpec, Weight

if TYPE_CHECKING:
    from torch import nn

SPARE = 32  # slots of the cache beyond the context, so that a padded pass fits at its end


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with everything that generating text needs.

    ``module`` is eager: ``module(tokens, cache)`` takes int64 [1, n] and a list that it fills, and
    returns float32 logits [1, n, vocabulary]. ``tokenizer`` is the text of a ``tokenizer.json``,
    ``template`` the Jinja template of a conversation or "", ``stops`` the tokens that end an
    answer. ``card`` is Markdown about the model.
    """

    module: nn.Module
    spec: DecoderSpec
    weights: Mapping[str, Weight]
    tokenizer: str
    stops: tuple[int, ...]
    template: str = ""
    name: str = "model"
    licence: str = ""
    card: str = ""

    def decoder(self, context: int) -> Decoder:
        """What adapters lower, for conversations of up to ``context`` tokens."""
        return Decoder(self.spec, self.weights, context + SPARE)
