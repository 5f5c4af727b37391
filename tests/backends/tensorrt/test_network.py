"""The parsed network as plain values: files, and the checks on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DamagedFile
from edgekit_tensorrt.network import (
    Layer,
    Network,
    Tensor,
    Weights,
    duplicate_names,
    lost_inputs,
    read_network,
    topological_order,
    write_network,
)


def layer(name: str, reads: str, makes: str, kind: str = "IDENTITY") -> Layer:
    """One letter is one tensor; a dot is an input that is left out."""
    inputs = tuple(None if letter == "." else letter for letter in reads)
    return Layer(kind, name, inputs, tuple(makes), {})


def network(*layers: Layer, inputs: str = "x", outputs: str = "y") -> Network:
    names = {*inputs, *(name for one in layers for name in one.outputs)}
    tensors = {name: Tensor(name, "FLOAT", (2, -1)) for name in sorted(names)}
    return Network("made", tuple(inputs), tuple(outputs), tensors, layers)


def test_it_survives_the_disk(tmp_path: Path) -> None:
    kernel = np.arange(6, dtype=np.float32)
    attributes = {"stride_nd": [1, 2], "alpha": float("inf"), "axes": None, "mode": "FILL"}
    convolution = Layer(
        "CONVOLUTION",
        "node/conv",
        ("x", None),
        ("y",),
        attributes,
        {"kernel": Weights("FLOAT", 6, kernel), "bias": Weights("FP8", 3, None)},
        "[ONNX Layer: node/conv]",
    )
    written = network(convolution)
    write_network(written, tmp_path)
    read = read_network(tmp_path)
    assert read == written
    (found,) = read.layers
    assert found.attributes == attributes
    assert found.weights["bias"].values is None
    assert (found.weights["bias"].dtype, found.weights["bias"].count) == ("FP8", 3)
    values = found.weights["kernel"].values
    assert values is not None
    np.testing.assert_array_equal(values, kernel)


def test_a_damaged_dump_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="is damaged"):
        read_network(tmp_path)
    write_network(network(layer("a", "x", "y")), tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "network.json").write_text(text)
        with pytest.raises(DamagedFile, match="is damaged"):
            read_network(tmp_path)


def test_an_input_that_no_layer_reads_is_lost() -> None:
    made = network(layer("a", "x.", "y"), inputs="xzw", outputs="yw")
    assert lost_inputs(made) == ("z",)  # w goes straight to the output


def test_names_borne_twice() -> None:
    made = network(layer("a", "x", "b"), layer("a", "b", "y"))
    assert duplicate_names(made) == ("a",)
    tensors = Network("n", ("x",), (), {}, (), duplicates=("t",))
    assert duplicate_names(tensors) == ("t",)


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(order=st.permutations(range(6)), data=st.data())
def test_the_order_has_every_layer_after_what_it_reads(
    order: list[int], data: st.DataObject
) -> None:
    letters = "xabcdey"
    layers = []
    for index in range(6):
        earlier = st.sampled_from(letters[: index + 1])
        reads = "".join(data.draw(st.lists(earlier, min_size=1, max_size=3)))
        layers.append(layer(f"l{index}", reads, letters[index + 1]))
    made = network(*(layers[index] for index in order))
    known = {"x"}
    found = topological_order(made)
    assert len(found) == 6
    for one in found:
        assert set(one.inputs) <= known
        known |= set(one.outputs)


def test_the_way_back_of_a_loop_is_no_circle() -> None:
    made = network(layer("step", "ab", "c"), layer("carry", "xc", "a", "RECURRENCE"), inputs="xb")
    assert [one.name for one in topological_order(made)] == ["carry", "step"]


def test_what_nothing_makes_is_named() -> None:
    with pytest.raises(DamagedFile, match="no value for: q"):
        topological_order(network(layer("a", "xq", "b"), layer("b", "b", "y")))
    with pytest.raises(DamagedFile, match="no value for: a, b"):
        topological_order(network(layer("one", "b", "a"), layer("two", "a", "b")))
