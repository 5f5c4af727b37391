"""Every op of coremltools' registry has a place: in the table, with the runner, or a reason."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from edgekit.graph import quiet
from edgekit_coreml.ops import NONDETERMINISTIC, OPS

with quiet():
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

# Written out on purpose: what the runner carries out itself.
RUNNER = {
    *("const", "cond", "while_loop", "read_state", "classify"),
    *("make_list", "list_gather", "list_length", "list_read", "list_scatter", "list_write"),
    *("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_cast"),
    *("constexpr_lut_to_dense", "constexpr_lut_to_sparse", "constexpr_sparse_to_dense"),
    "constexpr_sparse_blockwise_shift_scale",
}
EXCEPTIONS = {"_const_symbolic": "a value of the converter; no file holds one"}


def test_every_op_has_a_place() -> None:
    registered = set(SSAOpRegistry.core_ops)
    assert registered == OPS.keys() | RUNNER | EXCEPTIONS.keys()
    assert not OPS.keys() & RUNNER
    assert len(OPS.keys() | RUNNER) >= 150


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_takes_every_input_of_every_opset(name: str) -> None:
    """And asks for none that an opset makes optional."""
    parameters = inspect.signature(OPS[name]).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for version in SSAOpRegistry.core_ops[name].values():
        inputs = version.input_spec.input_types
        assert open_ended or inputs.keys() <= parameters.keys()
        stated = {key for key, value in inputs.items() if not value.optional}
        needed = {key for key, p in parameters.items() if p.default is p.empty}
        needed -= {key for key, p in parameters.items() if p.kind is p.VAR_KEYWORD}
        assert needed <= stated


# Vectors that the reference defaults by rank: the table has None, and works them out.
BY_RANK = {"strides", "dilations", "pad", "axes", "bias", "box_indices"}


def _defaults(version: Any) -> dict[str, Any]:
    """An op's own defaults; it wants to look at some of its inputs."""
    op = version.__new__(version)
    op.x = SimpleNamespace(rank=4, dtype=types.fp32, shape=(3, 2, 4, 4))
    op.boxes = SimpleNamespace(shape=(2, 4))
    op.weight = SimpleNamespace(shape=(2, 2), dtype=types.fp32)
    op.return_indices, op.box_indices = None, ()
    return {
        key: value.val if hasattr(value, "val") else value
        for key, value in op.default_inputs().items()
    }


@pytest.mark.parametrize("name", sorted(OPS))
def test_defaults_are_those_of_the_reference(name: str) -> None:
    parameters = inspect.signature(OPS[name]).parameters
    for version in SSAOpRegistry.core_ops[name].values():
        for key, stated in _defaults(version).items():
            if key not in parameters:
                assert name == "conv_quantized"  # hands the rest on to conv
                continue
            ours = parameters[key].default
            if ours is None:
                assert stated is None or key in BY_RANK
            else:
                assert ours == pytest.approx(stated) if isinstance(ours, float) else ours == stated


def test_the_ops_that_draw_are_in_the_table() -> None:
    assert OPS.keys() >= NONDETERMINISTIC
