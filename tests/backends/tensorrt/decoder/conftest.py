"""Tiny decoders, lowered once each, and the eager truth about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.artifact import Artifact
from edgekit.block_quantize import quantized_decoder
from edgekit.decoder import Decoder
from edgekit.recipe import PRECISIONS
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_tensorrt import BACKEND
from edgekit_zoo.llama import llama_from_weights

# What the members of the family have that others lack.
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2.5": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "untied": {"tied": False, "kv_heads": 4},
    "all": {"qkv_bias": True, "qk_norm": True, "tied": False},
}
Lowered = Callable[..., tuple[Decoder, Artifact]]


def decoder_of(precision: str, form: str) -> Decoder:
    if not PRECISIONS[precision].quantized:
        return tiny_decoder(**FORMS[form])
    if precision == "int4":  # from a file: its own codes with offsets
        return quantized_decoder(tiny_decoder(bits=4, **FORMS[form]), 4)
    return quantized_decoder(tiny_decoder(**FORMS[form]), 8)


@pytest.fixture(scope="session")
def lowered(tensorrt: None, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A decoder and its artifact, made once for each precision and form."""
    made: dict[tuple[str, str], tuple[Decoder, Artifact]] = {}

    def make(precision: str = "fp32", form: str = "llama") -> tuple[Decoder, Artifact]:
        key = precision, form
        if key not in made:
            decoder, recipe = decoder_of(precision, form), PRECISIONS[precision]
            folder = tmp_path_factory.mktemp("decoder")
            made[key] = decoder, BACKEND.lower_decoder(decoder, recipe, folder, lambda _step: None)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(0, 128, 24)]


@pytest.fixture(scope="session")
def eager() -> Callable[[Decoder, Sequence[int]], Array]:
    """Logits [tokens, vocabulary] of the eager module, with the floats that codes stand for."""

    def run(decoder: Decoder, tokens: Sequence[int]) -> Array:
        weights = {name: decoder.floats(name) for name in decoder.weights}
        module = llama_from_weights(decoder.spec, weights)
        logits: Array = module(torch.tensor([list(tokens)])).numpy()[0]
        return logits

    return run


@pytest.fixture(scope="session")
def relative() -> Callable[[Array, Array], float]:
    """The largest error as a share of the largest value."""
    return lambda found, wanted: float(np.abs(found - wanted).max() / np.abs(wanted).max())
