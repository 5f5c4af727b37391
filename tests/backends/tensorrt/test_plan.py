"""The builder's list of kernels and the engine's header."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DamagedFile
from edgekit_tensorrt.plan import (
    COMPUTE_CAPABILITIES,
    EngineHeader,
    PlanTensor,
    engine_header,
    plan_from_dump,
)


def logged(name: str, shape: str, dtype: str) -> str:
    """A tensor as version 1.7 logs it."""
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], "
        f"Datatype: {dtype}, Format: (Linear) Row major linear format }}"
    )


X, W, S = logged("x", "1,3,16,16", "Int8"), logged("w", "8,3,3,3", "Int8"), logged("s", "", "Float")
A, Y = logged("a", "1,8,14,14", "Half"), logged("y", "-1,5", "Int4")
# Two kernels, and one line of a form not known.
DUMP = f"""Layers:
Name: conv_myl0_0, LayerType: correlation, Inputs: [ {X}], Constants: [ {W}, {S}], \
Outputs: [ {A}], TacticName: sm86, StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: relu]
Name: move_myl0_1, LayerType: kgen, Inputs: [ {A}, {A}], Constants: [], \
Outputs: [ {Y}], TacticName: , StreamId: 0, Metadata:
something new

I/O Tensors:
 Name: input, IOMode: Input, DataType: Float"""


def test_kernels_are_read_with_their_tensors() -> None:
    plan = plan_from_dump(DUMP)
    first, second, third = plan.layers
    assert (first.name, first.kind, first.tactic) == ("conv_myl0_0", "correlation", "sm86")
    assert first.inputs == (PlanTensor("x", (1, 3, 16, 16), "Int8"),)
    assert first.outputs == (PlanTensor("a", (1, 8, 14, 14), "Half"),)
    assert first.constants == (PlanTensor("w", (8, 3, 3, 3), "Int8"), PlanTensor("s", (), "Float"))
    assert first.nodes == ("conv", "relu")
    assert not second.constants
    assert not second.nodes
    assert (third.kind, third.name) == ("unknown", "something new")


def test_streams_that_wait_for_each_other_are_no_kernels() -> None:
    line = "Name: s{}, LayerType: {}, Inputs: [], Constants: [], Outputs: [], TacticName: , "
    waits = [
        line.format(index, kind) + f"StreamId: {index}, EventId: 1, Metadata: "
        for index, kind in enumerate(("signal", "wait"))
    ]
    plan = plan_from_dump("\n".join([*DUMP.partition("\nsomething")[0].splitlines(), *waits]))
    assert plan.kinds == {"correlation": 1, "kgen": 1, "signal": 1, "wait": 1}
    assert plan.to_json()["layer_count"] == 2


def test_totals() -> None:
    plan = plan_from_dump(DUMP)
    assert plan.kinds == {"correlation": 1, "kgen": 1, "unknown": 1}
    assert plan.dtypes == {"Half": 1, "Int4": 1}
    activation = 8 * 14 * 14 * 2
    assert plan.moved_bytes == 3 * 16 * 16 + activation + activation + 3  # 5 nibbles in 3 bytes
    assert plan.constant_bytes == 8 * 27 + 4


def test_a_plan_is_json() -> None:
    value = json.loads(json.dumps(plan_from_dump(DUMP).to_json()))
    assert value["layer_count"] == 3
    assert value["layers"][0]["inputs"][0] == {
        "name": "x",
        "shape": [1, 3, 16, 16],
        "dtype": "Int8",
    }


def test_no_dump_is_an_empty_plan() -> None:
    assert plan_from_dump("").layers == ()


def header(mask: int, *, weights: int = 7, length: int | None = None) -> bytes:
    content = bytearray(80)
    content[:4] = b"vtrt"
    struct.pack_into("<QQ", content, 8, 2, len(content) if length is None else length)
    content[24:28] = bytes((1, 7, 1, 116))
    struct.pack_into("<Q", content, 32, mask)
    struct.pack_into("<Q", content, 56, weights)
    return bytes(content)


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(targets=st.sets(st.sampled_from(COMPUTE_CAPABILITIES)), later=st.booleans())
def test_the_header_names_version_and_targets(targets: set[str], later: bool) -> None:
    mask = sum(1 << COMPUTE_CAPABILITIES.index(name) for name in targets) | later << 6
    ordered = tuple(name for name in COMPUTE_CAPABILITIES if name in targets)
    assert engine_header(header(mask)) == EngineHeader("1.7.1.116", ordered, later, 7)


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(DamagedFile, match="not a TensorRT-RTX engine"):
        engine_header(b"PK" + bytes(100))
    with pytest.raises(DamagedFile, match="not a TensorRT-RTX engine"):
        engine_header(b"vtrt")
    with pytest.raises(DamagedFile, match="has 80 bytes and says 81"):
        engine_header(header(4, length=81))
