"""Layers: what is kept of each, how it is compared, what is said of the first that differs."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DamagedFile
from edgekit.layers import (
    KEPT,
    Layer,
    LayerDeviation,
    by_module,
    compare_layers,
    first_divergence,
    layer_from_values,
    layers_to_bytes,
    positions,
    read_layers,
    sentence,
)
from edgekit.spec import Array

quick = settings(deadline=None, max_examples=60, derandomize=True)
NORMAL = np.random.default_rng(0).standard_normal((1, 64, 7, 7), dtype=np.float32)
CONV = layer_from_values("conv2d", "aten.conv2d.default", "stem.conv", NORMAL)


def only(result: Array, *, limit_db: float = 80.0, layer: Layer = CONV) -> LayerDeviation:
    (deviation,) = compare_layers([layer], {layer.node: result}, limit_db)
    return deviation


@pytest.mark.parametrize("size", [0, 1, 2, KEPT - 1, KEPT])
def test_all_of_a_small_array_is_kept(size: int) -> None:
    assert positions(size).tolist() == list(range(size))


@quick
@given(size=st.integers(KEPT + 1, 10**9))
def test_of_a_large_array_each_of_64_channels_is_kept(size: int) -> None:
    chosen = positions(size)
    assert len(chosen) == KEPT
    assert 0 <= chosen.min() <= chosen.max() < size
    assert set((chosen * 64 // size).tolist()) == set(range(64))


def test_values_are_kept_in_float32_with_the_size_of_all() -> None:
    layer = layer_from_values("mul", "aten.mul.Tensor", "", np.arange(1000.0).reshape(10, 100))
    assert (layer.size, layer.values.dtype.name, len(layer.values)) == (1000, "float32", KEPT)
    assert layer.values.tolist() == positions(1000).tolist()


def test_a_layer_equal_to_the_bit_is_infinitely_near_and_null_in_json() -> None:
    deviation = only(NORMAL.copy())
    assert (deviation.sqnr_db, deviation.finite, deviation.diverges) == (math.inf, True, False)
    assert json.loads(json.dumps(deviation.to_json(), allow_nan=False)) == {
        "node": "conv2d",
        "op": "aten.conv2d.default",
        "module": "stem.conv",
        "sqnr_db": None,
        "finite": True,
        "diverges": False,
    }


@pytest.mark.parametrize(("limit_db", "diverges"), [(39.9, False), (40.1, True)])
def test_a_layer_beyond_the_limit_diverges(limit_db: float, diverges: bool) -> None:
    deviation = only(NORMAL * np.float32(1.01), limit_db=limit_db)
    assert deviation.sqnr_db == pytest.approx(40, abs=0.01)
    assert deviation.diverges is diverges
    assert deviation.to_json()["sqnr_db"] == deviation.sqnr_db


@pytest.mark.parametrize("channel", range(0, 64, 9))
def test_one_wrong_channel_of_64_is_seen(channel: int) -> None:
    result = NORMAL.copy()
    result[:, channel] = 0
    assert only(result).diverges


@quick
@given(
    place=st.integers(0, NORMAL.size - 1), value=st.sampled_from([math.nan, math.inf, -math.inf])
)
def test_one_value_that_is_not_finite_is_found_though_it_is_not_kept(
    place: int, value: float
) -> None:
    result = NORMAL.copy()
    result.flat[place] = value
    deviation = only(result)
    assert (deviation.finite, deviation.diverges) == (False, True)
    json.dumps(deviation.to_json(), allow_nan=False)


def test_layers_are_compared_in_the_order_of_the_graph_and_only_where_they_can_be() -> None:
    layers = [
        layer_from_values(name, "op", "", np.ones(size, np.float32))
        for name, size in (("last", 2), ("fused", 2), ("wider", 2), ("empty", 0), ("first", 3))
    ]
    found: dict[str, Array] = {
        "first": np.ones((3, 1)),
        "wider": np.ones(4),
        "empty": np.ones(0),
        "unknown": np.ones(2),
        "last": np.ones(2, np.float16),
    }
    assert [each.node for each in compare_layers(layers, found, 80.0)] == ["last", "first"]
    assert compare_layers(layers, {}, 80.0) == []


def deviation(
    node: str, module: str = "", *, diverges: bool = True, finite: bool = True
) -> LayerDeviation:
    return LayerDeviation(node, "aten.add.Tensor", module, 9.87, finite, diverges)


def test_the_first_that_diverges_is_found() -> None:
    near, far = deviation("a", diverges=False), deviation("b")
    assert first_divergence([near, far, deviation("c")]) is far
    assert first_divergence([near]) is None
    assert first_divergence([]) is None


def test_in_half_precision_the_remedy_is_float32() -> None:
    assert sentence(deviation("add_1", "head.norm"), "fp16", "net.py:7: x + y") == (
        "It first differs at module 'head.norm', aten.add.Tensor, node 'add_1' (net.py:7: x + y), "
        "which is 9.9 dB from eager. Keep it in float32: export with --precision fp32."
    )


def test_in_float32_the_remedy_is_another_op_and_the_root_is_the_model_itself() -> None:
    said = sentence(deviation("add_1", finite=False), "fp32")
    assert said.startswith(
        "It first differs at module 'the model itself', aten.add.Tensor, node 'add_1', which "
        "holds NaN or infinity. In float32 no layer should differ: "
    )
    assert said.endswith("else write it with other ops.")
    assert "--precision" not in said


def test_a_module_is_shown_by_what_it_returns() -> None:
    found = [deviation(*names) for names in (("a", "one"), ("b", "two"), ("c", "one"), ("d", ""))]
    assert [(each.module, each.node) for each in by_module(found)] == [
        ("one", "c"),
        ("two", "b"),
        ("", "d"),
    ]


def some_layers() -> list[Layer]:
    generator = np.random.default_rng(1)
    return [
        layer_from_values(f"node_{size}", "aten.add.Tensor", "été", generator.standard_normal(size))
        for size in (1, KEPT, KEPT + 1, 0, 5000)
    ]


@pytest.mark.parametrize("layers", [some_layers(), []], ids=["some", "none"])
def test_layers_are_read_back_as_written_and_written_the_same_each_time(
    tmp_path: Path, layers: list[Layer]
) -> None:
    content = layers_to_bytes(layers)
    assert layers_to_bytes(layers) == content
    path = tmp_path / "layers.npz"
    path.write_bytes(content)
    for read, wrote in zip(read_layers(path), layers, strict=True):
        assert {**vars(read), "values": 0} == {**vars(wrote), "values": 0}
        assert read.values.tobytes() == wrote.values.tobytes()


def test_what_the_model_returns_is_found_by_the_models_own_name_for_it() -> None:
    values = np.arange(6, dtype=np.float32)
    layer = layer_from_values("linear", "aten.linear.default", "head", values, "scores")
    (deviation,) = compare_layers([layer], {"scores": values}, 80)
    assert not deviation.diverges
    assert compare_layers([layer], {"others": values}, 80) == []


def names_of(value: object) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


TWO = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            {"names": names_of([["n", "op", "", 3, ""]]), "values": TWO},
            "names 3 values and holds 2",
        ),
        (
            {"names": names_of([["n", "op", "", 1, ""]]), "values": TWO},
            "names 1 values and holds 2",
        ),
        ({"names": names_of([["n", "op", "", 2, ""]])}, "values"),
        ({"values": TWO}, "names"),
        ({"names": names_of([["n", "op", 2]]), "values": TWO}, "not enough values"),
        ({"names": names_of([["n", "op", "", None, ""]]), "values": TWO}, "NoneType"),
        ({"names": names_of([["n", "op", "", 10**400, ""]]), "values": TWO}, "too large"),
        ({"names": names_of(7), "values": TWO}, "not iterable"),
        ({"names": np.frombuffer(b"{", np.uint8), "values": TWO}, "Expecting property name"),
        ({"names": names_of([["n", "op", "", 2, ""]]), "values": np.zeros(2)}, "are float64"),
        (
            {"names": names_of([["n", "op", "", 2, ""]]), "values": TWO[None]},
            r"are float32 \(1, 2\)",
        ),
    ],
)
def test_values_that_belong_to_no_layer_are_damage(
    tmp_path: Path, arrays: dict[str, Array], reason: str
) -> None:
    path = tmp_path / "layers.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]  # its stub takes the flag first
    with pytest.raises(
        DamagedFile, match=rf"layers\.npz cannot be read: .*{reason}.*Export the model again\."
    ):
        read_layers(path)


@pytest.mark.parametrize("content", [b"", b"text", layers_to_bytes(some_layers())[:-30]])
def test_a_file_of_layers_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layers.npz"
    with pytest.raises(DamagedFile, match=r"^there is no file .*\. Export the model again\.$"):
        read_layers(path)
    path.write_bytes(content)
    with pytest.raises(
        DamagedFile,
        match=r"^\S+ is not an \.npz of arrays that can be read: .*Export the model again",
    ):
        read_layers(path)


def test_a_flipped_bit_in_a_file_of_layers_is_damage_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "layers.npz"
    layers = [layer_from_values("node", "op", "", np.arange(9))]
    whole = layers_to_bytes(layers)
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with suppress(DamagedFile):
            assert layers_to_bytes(read_layers(path)) == whole
