"""The interpreted decoder against eager: chains, rewinds, trees, the family, precisions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.contract import Evidence
from edgekit.decode.stepper import Stepper
from edgekit.decoder import Decoder
from edgekit.errors import BadInput, DamagedFile
from edgekit.recipe import FP16
from edgekit.spec import Array
from edgekit_tensorrt import BACKEND
from edgekit_tensorrt.stepper import NetworkStepper

Lowered = Callable[..., tuple[Decoder, Artifact]]
Eager = Callable[[Decoder, Sequence[int]], Array]
Relative = Callable[[Array, Array], float]
# The root's two children 1 and 2; 3 below 1; 4 below 3; 5 below 2.
PARENTS = (-1, 0, 0, 1, 3, 2)


def opened(artifact: Artifact) -> NetworkStepper:
    stepper = BACKEND.open_decoder(artifact)
    assert isinstance(stepper, NetworkStepper)
    return stepper


def fed(stepper: Stepper, tokens: Sequence[int], cuts: Sequence[int]) -> Array:
    """Logits of all tokens, fed in passes that end at ``cuts``."""
    starts = [0, *cuts]
    ends = [*cuts, len(tokens)]
    passes = (tokens[start:end] for start, end in zip(starts, ends, strict=True))
    return np.concatenate([stepper.step(part).logits.copy() for part in passes])


def ancestors(node: int) -> list[int]:
    """The path to a node of the tree, itself included."""
    return [] if node < 0 else [*ancestors(PARENTS[node]), node]


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8), (3, 10, 11, 12), tuple(range(1, 24))])
def test_a_chain_is_eagers_however_it_is_cut(
    lowered: Lowered, eager: Eager, relative: Relative, tokens: list[int], cuts: tuple[int, ...]
) -> None:
    decoder, artifact = lowered()
    with opened(artifact) as stepper:
        found = fed(stepper, tokens, cuts)
        assert stepper.length == len(tokens)
    assert relative(found, eager(decoder, tokens)) < 1e-5  # 7e-7 measured


@pytest.mark.parametrize(
    ("form", "precision", "bound"),
    [
        ("qwen2.5", "fp32", 1e-5),
        ("qwen3", "fp32", 1e-5),
        ("untied", "fp32", 1e-5),
        ("all", "int4", 5e-3),
    ],
)
def test_the_whole_family_is_eagers(
    lowered: Lowered,
    eager: Eager,
    relative: Relative,
    tokens: list[int],
    form: str,
    precision: str,
    bound: float,
) -> None:
    decoder, artifact = lowered(precision, form)
    with opened(artifact) as stepper:
        assert relative(fed(stepper, tokens, (9, 10)), eager(decoder, tokens)) < bound


@pytest.mark.parametrize("precision", ["fp16", "int8-weights", "int4"])
def test_in_float16_the_logits_are_those_of_the_codes(
    lowered: Lowered, eager: Eager, relative: Relative, tokens: list[int], precision: str
) -> None:
    decoder, artifact = lowered(precision)
    with opened(artifact) as stepper:
        found = fed(stepper, tokens, (9, 10))
        assert stepper.cause == ""
    # Every value is rounded to float16: 1.5e-3 to 2.4e-3 measured. Codes that are one off, or a
    # lost offset, would be above 5e-2.
    assert relative(found, eager(decoder, tokens)) < 5e-3


def test_hidden_is_what_the_head_multiplied(lowered: Lowered, tokens: list[int]) -> None:
    decoder, artifact = lowered()
    with opened(artifact) as stepper:
        answer = stepper.step(tokens[:5])
    assert answer.hidden.dtype == answer.logits.dtype == np.float32
    wanted = answer.hidden @ decoder.floats("embedding").T
    np.testing.assert_allclose(answer.logits, wanted, atol=1e-4)


def test_after_a_rewind_nothing_is_left_of_what_was_forgotten(
    lowered: Lowered, eager: Eager, relative: Relative, tokens: list[int]
) -> None:
    decoder, artifact = lowered()
    with opened(artifact) as stepper:
        stepper.step(tokens[:6])
        stepper.step([1, 2, 3, 4, 5])
        stepper.rewind(6)
        found = stepper.step(tokens[6:12]).logits
        assert stepper.length == 12
    assert relative(found, eager(decoder, tokens[:12])[6:]) < 1e-5


def test_a_node_of_a_tree_is_the_chain_of_its_ancestors(
    lowered: Lowered, eager: Eager, relative: Relative, tokens: list[int]
) -> None:
    decoder, artifact = lowered()
    kept, tree = tokens[:5], tokens[5:11]
    with opened(artifact) as stepper:
        stepper.step(kept)
        found = stepper.step(tree, parents=PARENTS).logits
    for node in range(len(tree)):
        chain = [*kept, *(tree[index] for index in ancestors(node))]
        assert relative(found[node], eager(decoder, chain)[-1]) < 1e-5, node


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_token_that_is_no_ancestor_changes_nothing(
    lowered: Lowered, tokens: list[int], precision: str
) -> None:
    _, artifact = lowered(precision)
    tree = tokens[5:11]
    with opened(artifact) as stepper:
        stepper.step(tokens[:5])
        before = stepper.step(tree, parents=PARENTS).logits.copy()
        for changed in range(len(tree)):
            stepper.rewind(5)
            other = [*tree]
            other[changed] = (tree[changed] + 1) % 128
            after = stepper.step(other, parents=PARENTS).logits
            for node in range(len(tree)):
                same = np.array_equal(before[node], after[node])
                assert same is (changed not in ancestors(node)), (changed, node)


def test_the_head_sees_the_rows_that_are_wanted_alone(lowered: Lowered, tokens: list[int]) -> None:
    _, artifact = lowered()
    rows: dict[str, int] = {}
    with opened(artifact) as stepper:
        every = stepper.step(tokens[:8]).logits.copy()
        stepper.rewind(0)
        some = stepper.step(tokens[:8], rows=[7, 2])
        stepper.rewind(0)
        none = stepper.step(tokens[:8], rows=[])
        stepper.rewind(0)
        empty = np.zeros((0, 2, 2, 16), np.float32)
        inputs = stepper.inputs_of(tokens[:8], None, [7, 2])
        stepper._opened.run(
            {**inputs, "past_keys": empty, "past_values": empty},
            trace=lambda name, value: rows.update({name: len(value)}),
        )
    np.testing.assert_allclose(some.logits, every[[7, 2]], atol=1e-5)
    assert some.hidden.shape == (2, 64)
    assert none.logits.shape == (0, 128)
    assert rows["layers.1.down.product"] == 8
    assert rows["embedding.product"] == 2


def test_what_the_stepper_says_of_itself(lowered: Lowered) -> None:
    decoder, artifact = lowered("int4")
    with opened(artifact) as stepper:
        assert isinstance(stepper, Evidence)
        assert (stepper.level, stepper.faults, stepper.cause) == ("emulated", (), "")
        assert stepper.notes[0].startswith("Parsed by tensorrt")
        assert stepper.notes[1].startswith("Planned for sm86: 9 of 9 products read 4-bit codes")
        assert stepper.capacity == decoder.capacity == 96
        assert stepper.vocabulary == 128
        assert list(stepper.widths) == list(range(1, 65))
        assert tuple(stepper.exact_widths) == ()


def test_a_value_beyond_float16_is_the_cause(lowered: Lowered, tmp_path: Path) -> None:
    decoder, _ = lowered("fp16")
    weights = {**decoder.weights, "layers.1.up": 3e4 * decoder.floats("layers.1.up")}
    loud = replace(decoder, weights=weights)
    with opened(BACKEND.lower_decoder(loud, FP16, tmp_path, lambda _step: None)) as stepper:
        stepper.step([1, 2, 3])
        assert "float16 ends at 65504" in stepper.cause
        assert stepper.cause.endswith("--precision fp32.")


@pytest.mark.parametrize(
    ("tokens", "options", "sentence"),
    [
        ([], {}, "1 to 64 tokens; it was given 0"),
        ([1] * 65, {}, "1 to 64 tokens; it was given 65"),
        ([128], {}, "a token is 128; it must be from 0 to 127"),
        ([-1], {}, "a token is -1"),
        ([1.5], {}, "a token is a whole number"),
        ([1, 2], {"parents": [-1]}, "2 tokens have 2 parents; there are 1"),
        ([1, 2], {"parents": [-1, 1]}, "the parent of token 1 is 1; it must be from -1 to 0"),
        ([1, 2], {"parents": [-2, 0]}, "the parent of token 0 is -2"),
        ([1, 2], {"rows": [2]}, "a row is 2; it must be from 0 to 1"),
        ([1, 2], {"rows": [-1]}, "a row is -1"),
    ],
)
def test_a_pass_that_is_none_is_refused(
    lowered: Lowered, tokens: list[Any], options: dict[str, Any], sentence: str
) -> None:
    stepper = opened(lowered()[1])
    with pytest.raises(BadInput, match=sentence):
        stepper.inputs_of(tokens, options.get("parents"), options.get("rows"))
    assert stepper.length == 0


def test_a_full_cache_is_a_sentence_and_keeps_what_it_has(lowered: Lowered) -> None:
    with opened(lowered()[1]) as stepper:
        stepper.step([1] * 64)
        stepper.step([1] * 31)
        with pytest.raises(BadInput, match="97 tokens do not fit the 96"):
            stepper.step([1, 2])
        assert stepper.length == 95
        stepper.step([3])
        with pytest.raises(BadInput, match="there are 96 tokens to keep; it was asked for 97"):
            stepper.rewind(97)


def test_files_that_were_moved_are_found(
    lowered: Lowered, eager: Eager, relative: Relative, tokens: list[int], tmp_path: Path
) -> None:
    decoder, artifact = lowered()
    names = ("model.onnx", "model.weights")
    together, apart = tmp_path / "together", {name: tmp_path / name for name in names}
    together.mkdir()
    for name in names:
        shutil.copy(str(artifact.files[name]), together / name)
        apart[name].mkdir()
        shutil.copy(str(artifact.files[name]), apart[name] / "renamed")
    held = {name: (together / name).read_bytes() for name in names}
    for files in (
        {name: together / name for name in names},
        {name: apart[name] / "renamed" for name in names},
        held,
    ):
        with opened(replace(artifact, files=files)) as stepper:
            assert relative(stepper.step(tokens[:4]).logits, eager(decoder, tokens[:4])) < 1e-5


def test_an_artifact_without_its_weights_is_damaged(lowered: Lowered) -> None:
    _, artifact = lowered()
    files = {"model.onnx": artifact.files["model.onnx"]}
    with (
        pytest.raises(DamagedFile, match=r"lacks model\.weights"),
        opened(replace(artifact, files=files)),
    ):
        pass
    with pytest.raises(DamagedFile, match="does not describe its decoder"):
        BACKEND.open_decoder(replace(artifact, provenance={"decoder": {"capacity": 3}}))
