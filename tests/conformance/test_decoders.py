"""What every target's stepper must do, in every precision that it makes of a language model.

The decoder is tiny and random; the truth is the eager module with the same weights, quantized ones
as the floats that their codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgekit
from edgekit.artifact import Artifact
from edgekit.block_quantize import quantized_decoder
from edgekit.contract import Decodes
from edgekit.decode.scoring import measured_exact_widths
from edgekit.decode.stepper import Stepper, feed
from edgekit.decoder import Decoder
from edgekit.errors import BadInput
from edgekit.recipe import PRECISIONS
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_zoo.llama import llama_from_weights
from tests.conformance.conftest import SHIPPED

ONE_PRECISION = {"fp32": 1e-5, "fp16": 5e-3, "int8-weights": 5e-2, "int4": 5e-2}
TEXT = [(37 * i * i + 11 * i + 5) % 128 for i in range(60)]
CASES = [(name, precision) for name in SHIPPED for precision in ONE_PRECISION]


@dataclass(frozen=True)
class Lowered:
    """One target and precision, with the truth."""

    decodes: Decodes
    artifact: Artifact
    decoder: Decoder
    precision: str

    def eager(self, tokens: Sequence[int]) -> Array:
        """Logits [tokens, vocabulary] of the eager module."""
        module = llama_from_weights(self.decoder.spec, self.decoder.weights)
        with torch.inference_mode():
            logits: Array = module(torch.tensor([list(tokens)]))[0].numpy()
            return logits

    @property
    def bound(self) -> float:
        """Of the error, as a share of the logits' own spread."""
        return ONE_PRECISION[self.precision]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    name, precision = request.param
    try:
        backend = edgekit.backend(name)
    except edgekit.MissingRuntime as missing:
        pytest.skip(str(missing))
    assert isinstance(backend, Decodes)
    recipe = PRECISIONS[precision]
    if precision not in [each.precision for each in backend.decoder_recipes]:
        pytest.skip(f"{name} makes no {precision} of language models, and says so")
    decoder = tiny_decoder(bits=4 if recipe.quantized else None)
    if recipe.quantized:
        decoder = quantized_decoder(decoder, int(recipe.weights.removeprefix("int")))
    folder = tmp_path_factory.mktemp(f"{name}-{precision}")
    artifact = backend.lower_decoder(decoder, recipe, folder, lambda _step: None)
    return Lowered(backend, artifact, decoder, precision)


@pytest.fixture
def stepper(lowered: Lowered) -> Iterator[Stepper]:
    with lowered.decodes.open_decoder(lowered.artifact, threads=1) as opened:
        yield opened


def off(got: Array, expected: Array) -> float:
    """Root of the mean square difference, as a share of the expected spread."""
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


def rows_of(stepper: Stepper, tokens: Sequence[int], width: int) -> Array:
    """Logits of every token, fed in passes of ``width``, the last padded."""
    stepper.rewind(0)
    found = []
    for start in range(0, len(tokens), width):
        part = list(tokens[start : start + width])
        answer = stepper.step(part + [0] * (width - len(part)), rows=range(len(part)))
        found.append(answer.logits.copy())
        stepper.rewind(start + len(part))
    return np.concatenate(found)


def some_widths(stepper: Stepper) -> list[int]:
    return [width for width in (1, 4, 8, 16, 32) if width in stepper.widths]


def test_it_answers_as_eager_however_a_text_is_cut(lowered: Lowered, stepper: Stepper) -> None:
    expected = lowered.eager(TEXT[:24])
    for width in some_widths(stepper):
        got = rows_of(stepper, TEXT[:24], width)
        assert got.dtype == np.float32
        assert off(got, expected) < lowered.bound, width


def test_one_token_is_always_a_width(stepper: Stepper) -> None:
    assert stepper.widths[0] == 1
    assert list(stepper.widths) == sorted(set(stepper.widths))
    assert set(stepper.exact_widths) <= set(stepper.widths)


def test_hidden_is_what_the_head_multiplies(lowered: Lowered, stepper: Stepper) -> None:
    answer = feed(stepper, TEXT[:9])
    head = lowered.decoder.floats(lowered.decoder.head)
    assert answer.hidden.shape == (1, lowered.decoder.spec.hidden)
    assert off(answer.hidden @ head.T, answer.logits) < max(lowered.bound, 1e-4)


def test_what_is_rewound_leaves_no_trace(stepper: Stepper) -> None:
    plain = feed(stepper, TEXT[:12]).logits.copy()
    stepper.rewind(5)
    feed(stepper, [9, 9, 9, 9, 9, 9])
    stepper.rewind(5)
    again = feed(stepper, TEXT[5:12]).logits
    np.testing.assert_allclose(again, plain, atol=np.abs(plain).max() * 2e-2)
    assert stepper.length == 12


def tree(stepper: Stepper) -> tuple[list[int], list[int]]:
    """A root, two children, a grandchild of the second, padding that hangs on the root."""
    tokens, parents = [21, 50, 77, 33], [-1, 0, 0, 2]
    width = next(w for w in stepper.widths if w >= len(tokens))
    extra = width - len(tokens)
    return tokens + [0] * extra, parents + [0] * extra


def test_a_node_of_a_tree_sees_its_ancestors_alone(lowered: Lowered, stepper: Stepper) -> None:
    feed(stepper, TEXT[:10])
    tokens, parents = tree(stepper)
    got = stepper.step(tokens, parents=parents, rows=[0, 1, 2, 3]).logits.copy()
    for node, path in enumerate(([21], [21, 50], [21, 77], [21, 77, 33])):
        expected = lowered.eager([*TEXT[:10], *path])[-1]
        assert off(got[node], expected) < 2 * lowered.bound, node


def test_a_sibling_changes_nothing(stepper: Stepper) -> None:
    feed(stepper, TEXT[:10])
    tokens, parents = tree(stepper)
    before = stepper.step(tokens, parents=parents, rows=[0, 2, 3]).logits.copy()
    stepper.rewind(10)
    tokens[1] = 99  # node 1 is no ancestor of 0, 2, 3
    after = stepper.step(tokens, parents=parents, rows=[0, 2, 3]).logits
    np.testing.assert_array_equal(after, before)


def test_the_exact_widths_are_exact(stepper: Stepper) -> None:
    claimed = [width for width in (1, 2, 3, 4, 8, 16, 32) if width in stepper.exact_widths]
    if not claimed:
        pytest.skip("nothing is claimed for this runtime")
    assert set(measured_exact_widths(stepper, TEXT[:40], claimed)) == set(claimed)


def test_a_second_session_gives_the_same_numbers(lowered: Lowered, stepper: Stepper) -> None:
    first = feed(stepper, TEXT[:9]).logits.copy()
    with lowered.decodes.open_decoder(lowered.artifact, threads=1) as second:
        np.testing.assert_array_equal(feed(second, TEXT[:9]).logits, first)


def test_the_last_slot_can_be_used_and_no_more(lowered: Lowered, stepper: Stepper) -> None:
    capacity = lowered.decoder.capacity
    assert stepper.capacity == capacity
    long = (TEXT * 4)[:capacity]
    last = feed(stepper, long).logits[0]
    assert stepper.length == capacity
    assert off(last, lowered.eager(long)[-1]) < lowered.bound
    with pytest.raises(BadInput, match=str(capacity)):
        stepper.step([1])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([128], {}),
        ([-1], {}),
        ([], {}),
        ([1], {"rows": [1]}),
        ([1], {"parents": [0]}),
        ([1], {"parents": [-1, 0]}),
    ],
    ids=["beyond", "negative", "none", "row", "own parent", "parents"],
)
def test_what_makes_no_sense_is_a_sentence(
    stepper: Stepper, tokens: list[int], words: dict[str, Any]
) -> None:
    with pytest.raises(BadInput):
        stepper.step(tokens, **words)
    assert stepper.length == 0


FAMILIES: dict[str, dict[str, Any]] = {
    "biases": {"qkv_bias": True},
    "norms": {"qk_norm": True, "head_dim": 32},
    "own head": {"tied": False, "kv_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_family_is_answered_as_eager(name: str, family: str, tmp_path: Path) -> None:
    try:
        backend = edgekit.backend(name)
    except edgekit.MissingRuntime as missing:
        pytest.skip(str(missing))
    assert isinstance(backend, Decodes)
    made = [recipe.precision for recipe in backend.decoder_recipes]
    precision = "fp32" if "fp32" in made else "fp16"
    decoder = tiny_decoder(**FAMILIES[family])
    artifact = backend.lower_decoder(decoder, PRECISIONS[precision], tmp_path, lambda _step: None)
    case = Lowered(backend, artifact, decoder, precision)
    with backend.open_decoder(artifact, threads=1) as stepper:
        width = max(some_widths(stepper))
        assert off(rows_of(stepper, TEXT[:20], width), case.eager(TEXT[:20])) < case.bound
