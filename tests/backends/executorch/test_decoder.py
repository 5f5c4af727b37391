"""Decoders on ExecuTorch: lowered, run as chains and trees, and held to the eager module."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("executorch")
import torch

from edgekit.artifact import Artifact
from edgekit.block_quantize import blocks_from_floats, quantized_decoder
from edgekit.decode.stepper import Stepper
from edgekit.decoder import Decoder
from edgekit.errors import BadInput, DamagedFile, RuntimeFailed, UnsupportedRecipe
from edgekit.graph import quiet
from edgekit.recipe import PRECISIONS
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_executorch import BACKEND
from edgekit_zoo.llama import llama_from_weights

with quiet():
    from executorch.extension.pybindings import portable_lib

TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 128, 80)]
QUANTIZED = ("int8-weights", "int4")


def made(decoder: Decoder, precision: str, folder: Path) -> Artifact:
    folder.mkdir()
    return BACKEND.lower_decoder(decoder, PRECISIONS[precision], folder, lambda _line: None)


def source(precision: str) -> Decoder:
    """As the export gives it: in blocks where the precision is one of integers."""
    decoder = tiny_decoder(bits=None if precision == "fp32" else 4)
    return decoder if precision == "fp32" else quantized_decoder(decoder, bits_of(precision))


def bits_of(precision: str) -> int:
    return 8 if precision == "int8-weights" else 4


Make = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The artifact of a precision, lowered once."""
    kept: dict[str, Artifact] = {}

    def artifact(precision: str) -> Artifact:
        if precision not in kept:
            folder = tmp_path_factory.mktemp("decoder") / precision
            kept[precision] = made(source(precision), precision, folder)
        return kept[precision]

    return artifact


@pytest.fixture
def stepper(make: Make) -> Iterator[Stepper]:
    with BACKEND.open_decoder(make("fp32"), threads=2) as opened:
        yield opened


def eager(decoder: Decoder, tokens: list[int]) -> Array:
    module = llama_from_weights(decoder.spec, decoder.weights)
    with torch.inference_mode():
        logits: Array = module(torch.tensor([tokens]), [])[0].numpy()
    return logits


def fed(stepper: Stepper, tokens: list[int], width: int) -> Array:
    """Logits of all tokens, fed from an empty cache in passes of ``width``."""
    stepper.rewind(0)
    parts = [tokens[at : at + width] for at in range(0, len(tokens), width)]
    return np.concatenate([stepper.step(part).logits.copy() for part in parts])


def distance(found: Array, expected: Array) -> float:
    """The largest difference, by the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("width", [1, 7, 64])
def test_logits_are_those_of_the_eager_module_however_a_chain_is_cut(
    stepper: Stepper, width: int
) -> None:
    assert distance(fed(stepper, TOKENS, width), eager(source("fp32"), TOKENS)) < 1e-4


def test_what_was_fed_before_a_rewind_leaves_no_trace(stepper: Stepper) -> None:
    fresh = fed(stepper, TOKENS[:30], 10)
    stepper.rewind(12)
    stepper.step(TOKENS[40:70])
    stepper.rewind(12)
    assert stepper.length == 12
    np.testing.assert_array_equal(stepper.step(TOKENS[12:30]).logits, fresh[12:])


def test_a_node_of_a_tree_has_the_logits_of_the_chain_through_its_ancestors(
    stepper: Stepper,
) -> None:
    stepper.step(TOKENS[:9])
    nodes, parents = [3, 5, 7, 11, 13, 17], [-1, 0, 0, 2, -1, 3]
    found = stepper.step(nodes, parents=parents).logits.copy()
    paths = [[0], [0, 1], [0, 2], [0, 2, 3], [4], [0, 2, 3, 5]]
    for node, path in enumerate(paths):
        stepper.rewind(9)
        chain = stepper.step([nodes[at] for at in path]).logits
        assert distance(found[node], chain[-1]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", *QUANTIZED])
def test_a_token_that_is_no_ancestor_changes_nothing_at_all(make: Make, precision: str) -> None:
    with BACKEND.open_decoder(make(precision)) as stepper:
        stepper.step(TOKENS[:5])
        before = stepper.step([1, 2, 3, 4], parents=[-1, 0, 0, 1]).logits.copy()
        stepper.rewind(5)
        after = stepper.step([1, 2, 99, 4], parents=[-1, 0, 0, 1]).logits
        np.testing.assert_array_equal(after[[0, 1, 3]], before[[0, 1, 3]])
        assert not np.array_equal(after[2], before[2])


@pytest.mark.parametrize("precision", ["fp32", *QUANTIZED])
def test_rows_are_equal_to_the_bit_at_every_exact_width(make: Make, precision: str) -> None:
    with BACKEND.open_decoder(make(precision)) as stepper:
        assert stepper.exact_widths == range(1, 65)
        single = fed(stepper, TOKENS, 1)
        for width in (2, 3, 4, 8, 16, 31, 32, 64):
            np.testing.assert_array_equal(fed(stepper, TOKENS, width), single)


def test_one_thread_and_two_agree_to_the_bit(make: Make) -> None:
    with BACKEND.open_decoder(make("int4"), threads=1) as stepper:
        assert portable_lib._threadpool_get_thread_count() == 1
        single = fed(stepper, TOKENS, 16)
    with BACKEND.open_decoder(make("int4"), threads=2) as stepper:
        assert portable_lib._threadpool_get_thread_count() == 2
        np.testing.assert_array_equal(fed(stepper, TOKENS, 16), single)


@pytest.mark.parametrize(
    "sizes",
    [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 32}, {"tied": False, "kv_heads": 4}],
    ids=["qwen2.5", "qwen3", "untied"],
)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_variants_of_the_family_are_those_of_the_eager_module(
    tmp_path: Path, precision: str, sizes: dict[str, int]
) -> None:
    bits = None if precision == "fp32" else 4
    decoder = tiny_decoder(bits=bits, **sizes)
    artifact = made(decoder, precision, tmp_path / "made")
    with BACKEND.open_decoder(artifact) as stepper:
        limit = 1e-4 if precision == "fp32" else LIMIT
        assert distance(fed(stepper, TOKENS, 20), eager(decoder, TOKENS)) < limit


# Rows of activations in 8 bits. Random weights make of that up to 4 % of the largest logit here;
# a layer left out, or an offset, makes 30 % and more.
LIMIT = 0.08


@pytest.mark.parametrize("precision", QUANTIZED)
def test_integers_stay_near_the_eager_module_with_the_weights_that_they_stand_for(
    make: Make, precision: str
) -> None:
    with BACKEND.open_decoder(make(precision)) as stepper:
        found = fed(stepper, TOKENS, 16)
    assert distance(found, eager(source(precision), TOKENS)) < LIMIT


@pytest.mark.parametrize("block", [16, 64])
def test_other_blocks_than_32_stay_near_too(tmp_path: Path, block: int) -> None:
    floats = tiny_decoder(ffn=128)
    weights = {
        name: blocks_from_floats(weight, 4, block) if weight.ndim == 2 else weight
        for name, weight in ((name, floats.floats(name)) for name in floats.weights)
    }
    decoder = replace(floats, weights=weights)
    with BACKEND.open_decoder(made(decoder, "int4", tmp_path / "made")) as stepper:
        assert distance(fed(stepper, TOKENS, 16), eager(decoder, TOKENS)) < LIMIT


def test_four_bit_codes_are_in_the_file_as_they_came(make: Make) -> None:
    artifact, decoder = make("int4"), source("int4")
    held = Path(artifact.files["model.pte"]).read_bytes()  # type: ignore[arg-type]
    for name in ("layers.1.gate", "layers.0.down"):
        codes = decoder.weights[name].codes  # type: ignore[union-attr]
        assert (codes[:, ::2] | (codes[:, 1::2] << 4)).tobytes() in held


def test_no_table_of_floats_is_in_a_quantized_file(make: Make) -> None:
    table = tiny_decoder(bits=4).floats("embedding")
    held = Path(make("int4").files["model.pte"]).read_bytes()  # type: ignore[arg-type]
    assert table[:4].tobytes() not in held


def test_only_the_rows_asked_for_come_back_and_in_that_order(stepper: Stepper) -> None:
    every = stepper.step(TOKENS[:8])
    logits, hidden = every.logits.copy(), every.hidden.copy()
    stepper.rewind(0)
    some = stepper.step(TOKENS[:8], rows=[7, 2])
    np.testing.assert_array_equal(some.logits, logits[[7, 2]])
    np.testing.assert_array_equal(some.hidden, hidden[[7, 2]])


def test_the_head_multiplies_the_hidden_state_that_is_given(stepper: Stepper) -> None:
    answer = stepper.step(TOKENS[:4])
    head = source("fp32").floats("embedding")
    assert distance(answer.hidden @ head.T, answer.logits) < 1e-5


def test_the_cache_takes_what_it_holds_and_no_more(stepper: Stepper) -> None:
    stepper.step(TOKENS[:64])
    assert np.isfinite(stepper.step(TOKENS[:32]).logits).all()
    assert stepper.length == stepper.capacity == 96
    with pytest.raises(BadInput, match="97 tokens do not fit the 96 that the cache holds"):
        stepper.step([1])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"tokens": []}, "a pass takes 1 to 64 tokens, not 0"),
        ({"tokens": [0] * 65}, "a pass takes 1 to 64 tokens, not 65"),
        ({"tokens": [128]}, "tokens are 0 to 127"),
        ({"tokens": [-1]}, "tokens are 0 to 127"),
        ({"tokens": [1, 2], "parents": [-1]}, "2 tokens need 2 parents"),
        ({"tokens": [1, 2], "parents": [-1, 1]}, "an earlier token or -1"),
        ({"tokens": [1], "rows": [1]}, "rows are indices from 0 to 0"),
        ({"tokens": [1], "rows": []}, "rows are indices from 0 to 0"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_kept(
    stepper: Stepper, call: dict[str, list[int]], says: str
) -> None:
    stepper.step(TOKENS[:3])
    with pytest.raises(BadInput, match=says):
        stepper.step(**call)
    with pytest.raises(BadInput, match="cannot rewind to 4 tokens: the cache holds 3"):
        stepper.rewind(4)
    assert stepper.length == 3


def test_a_file_that_was_moved_opens_and_starts_empty_each_time(make: Make, tmp_path: Path) -> None:
    artifact = make("int8-weights")
    moved = tmp_path / "elsewhere.pte"
    shutil.copy(Path(artifact.files["model.pte"]), moved)  # type: ignore[arg-type]
    stepper = BACKEND.open_decoder(replace(artifact, files={"model.pte": moved}))
    with stepper:
        first = stepper.step(TOKENS[:6]).logits.copy()
    with stepper:
        assert stepper.length == 0
        np.testing.assert_array_equal(stepper.step(TOKENS[:6]).logits, first)


def test_half_precision_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedRecipe, match="int8-weights, int4, fp32"):
        made(tiny_decoder(), "fp16", tmp_path / "made")


def test_damage_is_told_in_a_sentence(make: Make, tmp_path: Path) -> None:
    artifact = make("fp32")
    with pytest.raises(DamagedFile, match="does not say what decoder"):
        BACKEND.open_decoder(replace(artifact, provenance={}))
    cut = tmp_path / "cut.pte"
    cut.write_bytes(Path(artifact.files["model.pte"]).read_bytes()[:5000])  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeFailed, match="could not load the language model"),
        BACKEND.open_decoder(replace(artifact, files={"model.pte": cut})),
    ):
        pass


def test_each_layer_is_reported(tmp_path: Path) -> None:
    heard: list[str] = []
    (tmp_path / "made").mkdir()
    BACKEND.lower_decoder(tiny_decoder(), PRECISIONS["fp32"], tmp_path / "made", heard.append)
    assert heard == ["layer 1 of 2", "layer 2 of 2", "joining the layers", "writing"]
