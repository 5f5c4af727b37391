"""Compressed weights: each form against coremltools' own decompression, then whole models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgekit.graph import quiet
from edgekit.spec import Array
from edgekit_coreml import constexpr
from edgekit_coreml.control import Plan, Weight
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Constant, Package

with quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.ops.defs import iOS16, iOS18
    from coremltools.optimize import _utils as oracle

few = settings(max_examples=40, deadline=None, derandomize=True)
BITS = (1, 2, 3, 4, 6, 8)


def _decoded(form: str, **given: Any) -> Array:
    return constexpr.decode(form, given)[-1]


def _codes(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Array:
    return rng.integers(0, 1 << bits, shape).astype(np.uint8)


shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3)


@given(pairs=shapes, seed=st.integers(0, 999), half=st.booleans(), offset=st.sampled_from("nif"))
@few
def test_blockwise_shift_scale(
    pairs: list[tuple[int, int]], seed: int, half: bool, offset: str
) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(-128, 128, [a * b for a, b in pairs]).astype(np.int8)
    groups = [a for a, _ in pairs]
    scale = rng.normal(size=groups).astype(np.float16 if half else np.float32)
    shift = {
        "n": None,
        "i": rng.integers(-128, 128, groups).astype(np.int8),
        "f": rng.normal(size=groups, scale=9).astype(scale.dtype),
    }[offset]
    expected = iOS18.constexpr_blockwise_shift_scale.decompress(data, scale, shift)
    found = _decoded("constexpr_blockwise_shift_scale", data=data, scale=scale, offset=shift)
    assert found.dtype == scale.dtype
    np.testing.assert_array_equal(found, expected)


@given(
    pairs=shapes,
    bits=st.sampled_from(BITS),
    width=st.integers(1, 3),
    axis=st.integers(-3, 2),
    seed=st.integers(0, 999),
)
@few
def test_lut_with_groups_and_vectors(
    pairs: list[tuple[int, int]], bits: int, width: int, axis: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    axis = axis % len(pairs)
    indices = _codes(rng, tuple(a * b for a, b in pairs), bits)
    table = rng.normal(size=(*[a for a, _ in pairs], 1 << bits, width)).astype(np.float16)
    where = None if width == 1 else np.int32(axis)
    np.testing.assert_array_equal(
        _decoded("constexpr_lut_to_dense", indices=indices, lut=table, vector_axis=where),
        iOS18.constexpr_lut_to_dense.decompress(indices, table, where),
    )
    mask = rng.integers(0, 2, indices.shape).astype(np.uint8)
    sparse = {"indices_mask": mask, "indices_nonzero_data": indices[mask != 0], "lut": table}
    found = constexpr.decode("constexpr_lut_to_sparse", {**sparse, "vector_axis": where})
    expected = iOS18.constexpr_lut_to_sparse.decompress(*sparse.values(), where)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 999))
@few
def test_sparse_of_both_kinds(shape: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-9, 9, shape).astype(np.int8) * rng.integers(0, 2, shape).astype(np.int8)
    mask = (dense != 0).astype(np.uint8)
    data = dense[dense != 0]
    np.testing.assert_array_equal(
        _decoded("constexpr_sparse_to_dense", mask=mask, nonzero_data=data), dense
    )
    packed = np.packbits(mask, bitorder="little")
    sizes = np.array(shape, np.uint32)
    np.testing.assert_array_equal(
        _decoded("constexpr_sparse_to_dense", mask=packed, nonzero_data=data, shape=sizes), dense
    )
    scale = rng.normal(size=(shape[0], *[1] * (len(shape) - 1))).astype(np.float16)
    given = {"data_mask": mask, "nonzero_data": data, "scale": scale, "offset": None}
    found = constexpr.decode("constexpr_sparse_blockwise_shift_scale", given)
    expected = iOS18.constexpr_sparse_blockwise_shift_scale.decompress(*given.values())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@given(bits=st.sampled_from((1, 2, 4, 6, 8)), rows=st.integers(1, 7), seed=st.integers(0, 999))
@few
def test_flat_lut(bits: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = _codes(rng, (rows, 5), bits)
    table = rng.normal(size=1 << bits).astype(np.float32)
    packed = oracle.pack_elements_into_bits(codes.reshape(-1), bits)
    shape = np.array(codes.shape, np.uint32)
    found = _decoded("constexpr_lut_to_dense", indices=packed, lut=table, shape=shape)
    np.testing.assert_array_equal(found, table[codes])


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_affine_dequantize(axis: int | None, dtype: Any) -> None:
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, (3, 4, 2)).astype(np.uint8)
    size = () if axis is None else data.shape[axis]
    scale = rng.normal(size=size).astype(dtype)
    zero = rng.integers(0, 256, size).astype(np.uint8)
    given = {"quantized_data": data, "zero_point": zero, "scale": np.asarray(scale)}
    expected = iOS16.constexpr_affine_dequantize.decompress(*given.values(), axis or 0)
    found = _decoded("constexpr_affine_dequantize", **given, axis=np.int32(axis or 0))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_cast() -> None:
    value = np.array([1.5, 65504], np.float16)
    found = _decoded("constexpr_cast", source_val=value, output_dtype="fp32")
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, 65504.0]
    with pytest.raises(ValueError, match="cannot be cast to int8"):
        _decoded("constexpr_cast", source_val=value, output_dtype="int8")


def test_what_float16_cannot_hold_is_infinite() -> None:
    data, scale = np.array([[127, 1]], np.int8), np.array([[1000]], np.float16)
    assert _decoded("constexpr_blockwise_shift_scale", data=data, scale=scale).tolist() == [
        [np.inf, 1000]
    ]


ONES = np.ones((2, 4), np.uint8)
WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("do not divide data", "blockwise_shift_scale", {"data": ONES, "scale": np.ones((2, 3))}),
    ("do not divide data", "blockwise_shift_scale", {"data": ONES, "scale": np.ones((0, 1))}),
    ("do not fit data of 2 axes", "blockwise_shift_scale", {"data": ONES, "scale": np.ones(2)}),
    ("out of bounds", "lut_to_dense", {"indices": ONES, "lut": np.ones((1, 1, 1, 1))}),
    ("needs the axis", "lut_to_dense", {"indices": ONES, "lut": np.ones((1, 1, 2, 2))}),
    ("1 values do not fit", "sparse_to_dense", {"mask": ONES, "nonzero_data": np.ones(1)}),
    (
        "fits no number of bits",
        "lut_to_dense",
        {"indices": ONES[0], "lut": np.ones(3), "shape": np.array([2])},
    ),
    (
        "hold less than",
        "lut_to_dense",
        {"indices": ONES[0], "lut": np.ones(2), "shape": np.array([1 << 31])},
    ),
]


@pytest.mark.parametrize(("why", "form", "given_"), WRONG)
def test_what_does_not_fit_together_is_an_error(
    why: str, form: str, given_: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, IndexError), match=why):
        constexpr.decode("constexpr_" + form, given_)


class Net(nn.Module):
    """A convolution and a linear layer, both large enough for coremltools to compress them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(F.avg_pool2d(F.relu(self.conv(x)), 4).flatten(1))
        return found


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


SHAPE = (1, 8, 8, 4)


@pytest.fixture(scope="module")
def converted(net: Net) -> dict[tuple[str, str], Any]:
    found = {}
    for target in ("iOS16", "iOS18"):
        for precision in ("FLOAT16", "FLOAT32"):
            with quiet():
                exported = torch.export.export(net, (torch.zeros(SHAPE),)).run_decompositions({})
                found[target, precision] = ct.convert(
                    exported,
                    minimum_deployment_target=getattr(ct.target, target),
                    compute_precision=getattr(ct.precision, precision),
                    inputs=[ct.TensorType("x", SHAPE, dtype=np.float32)],
                    outputs=[ct.TensorType("y", dtype=np.float32)],
                )
    return found


def _palettized(bits: int, **more: Any) -> Any:
    mode = "uniform" if bits == 8 else "kmeans"
    settings = {"mode": mode, "nbits": bits, "weight_threshold": 100, "num_kmeans_workers": 1}
    settings |= more
    return lambda model, joint=False: cto.palettize_weights(
        model,
        cto.OptimizationConfig(cto.OpPalettizerConfig(**settings)),
        **({"joint_compression": True} if joint else {}),
    )


def _quantized(**more: Any) -> Any:
    settings = {"weight_threshold": 100, **more}
    return lambda model, joint=False: cto.linear_quantize_weights(
        model,
        cto.OptimizationConfig(cto.OpLinearQuantizerConfig(**settings)),
        **({"joint_compression": True} if joint else {}),
    )


def _pruned(**more: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(weight_threshold=100, **more)
    return lambda model, joint=False: cto.prune_weights(model, cto.OptimizationConfig(config))


GROUPS = {"granularity": "per_grouped_channel", "group_size": 8}
BLOCKS = {"granularity": "per_block", "block_size": 8}
# By name: the target, the passes, and the forms that the outcome consists of.
RECIPES: dict[str, tuple[str, list[Any], set[str]]] = {
    **{f"{bits} bits": ("iOS18", [_palettized(bits)], {"lut_to_dense"}) for bits in BITS},
    "4 bits, groups": ("iOS18", [_palettized(4, **GROUPS)], {"lut_to_dense"}),
    "2 bits, vectors": ("iOS18", [_palettized(2, cluster_dim=4)], {"lut_to_dense"}),
    "4 bits, channel scale": (
        "iOS18",
        [_palettized(4, enable_per_channel_scale=True)],
        {"lut_to_dense", "blockwise_shift_scale"},
    ),
    "4 bits of int8": (
        "iOS18",
        [_palettized(4), _quantized(granularity="per_tensor")],
        {"lut_to_dense", "blockwise_shift_scale"},
    ),
    "int8": ("iOS18", [_quantized(mode="linear_symmetric")], {"blockwise_shift_scale"}),
    "uint8": ("iOS18", [_quantized(mode="linear", dtype="uint8")], {"blockwise_shift_scale"}),
    "int4": ("iOS18", [_quantized(dtype="int4", **BLOCKS)], {"blockwise_shift_scale"}),
    "uint4": (
        "iOS18",
        [_quantized(dtype="uint4", mode="linear", **BLOCKS)],
        {"blockwise_shift_scale"},
    ),
    "pruned": ("iOS18", [_pruned(target_sparsity=0.5)], {"sparse_to_dense"}),
    "2 of 4": ("iOS18", [_pruned(n_m_ratio=(2, 4))], {"sparse_to_dense"}),
    "pruned, 4 bits": (
        "iOS18",
        [_pruned(target_sparsity=0.5), _palettized(4)],
        {"sparse_to_dense", "lut_to_sparse"},
    ),
    "pruned, int8": (
        "iOS18",
        [_pruned(target_sparsity=0.5), _quantized()],
        {"sparse_to_dense", "sparse_blockwise_shift_scale"},
    ),
    "iOS 16, 4 bits": ("iOS16", [_palettized(4)], {"lut_to_dense"}),
    "iOS 16, 6 bits": ("iOS16", [_palettized(6)], {"lut_to_dense"}),
    "iOS 16, int8": ("iOS16", [_quantized()], {"affine_dequantize"}),
    "iOS 16, uint8": (
        "iOS16",
        [_quantized(mode="linear", dtype="uint8")],
        {"affine_dequantize"},
    ),
    "iOS 16, pruned": ("iOS16", [_pruned(target_sparsity=0.5)], {"sparse_to_dense"}),
}


def _package(model: Any) -> Package:
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "m.mlpackage"
        model.save(str(path))
        return Package.read(
            {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        )


def _weights(plan: Plan) -> Iterator[Weight]:
    for step in plan.steps:
        for sources in step.sources.values():
            yield from (one for one in sources if isinstance(one, Weight))


def _forms(weight: Weight) -> Iterator[str]:
    yield weight.operation.type
    for source in weight.parameters.values():
        if isinstance(source, Weight):
            yield from _forms(source)


ORDERS = {
    (iOS16, "constexpr_affine_dequantize"): "quantized_data zero_point scale axis",
    (iOS16, "constexpr_lut_to_dense"): "lut indices shape",
    (iOS16, "constexpr_sparse_to_dense"): "nonzero_data mask shape",
    (iOS18, "constexpr_lut_to_dense"): "indices lut vector_axis",
    (iOS18, "constexpr_blockwise_shift_scale"): "data scale offset",
    (iOS18, "constexpr_sparse_to_dense"): "nonzero_data mask",
    (iOS18, "constexpr_lut_to_sparse"): "indices_mask indices_nonzero_data lut vector_axis",
    (iOS18, "constexpr_sparse_blockwise_shift_scale"): "data_mask nonzero_data scale offset",
}


def _oracle(weight: Weight) -> Array:
    """The same tree of operations through coremltools' functions."""
    given: dict[str, Any] = {
        name: source.value if isinstance(source, Constant) else _oracle(source)
        for name, source in weight.parameters.items()
    }
    form = weight.operation.type
    family = iOS16 if {"shape", "quantized_data"} & given.keys() else iOS18
    order = ORDERS[family, form].split()
    found = getattr(family, form).decompress(*[given.get(name) for name in order])
    result: Array = found[weight.index] if isinstance(found, tuple) else found
    return result


@pytest.mark.parametrize("precision", ["FLOAT16", "FLOAT32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_models(
    recipe: str, precision: str, net: Net, converted: dict[tuple[str, str], Any]
) -> None:
    target, passes, forms = RECIPES[recipe]
    model = converted[target, precision]
    with quiet():
        for number, compress in enumerate(passes):
            model = compress(model, joint=number > 0)
    package = _package(model)
    interpreter = Interpreter(package)
    weights = {one.operation.outputs[0].shape: one for one in _weights(interpreter._plan)}
    restored = Net().eval()
    restored.load_state_dict(net.state_dict())
    assert set(weights) >= {(32, 8, 3, 3), (64, 64)}
    for parameter in (restored.conv.weight, restored.linear.weight):
        weight = weights[tuple(parameter.shape)]
        assert {form.removeprefix("constexpr_") for form in _forms(weight)} == forms
        values = interpreter._constant(weight)
        np.testing.assert_array_equal(values.numpy(), _oracle(weight).astype(np.float32))
        assert not torch.equal(values, parameter)
        parameter.data.copy_(values)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    found: Any = interpreter.run({"x": x.numpy()})["y"]
    tolerance = 1e-5 if precision == "FLOAT32" else 4e-3
    np.testing.assert_allclose(found, restored(x).detach().numpy(), atol=tolerance, rtol=0)
