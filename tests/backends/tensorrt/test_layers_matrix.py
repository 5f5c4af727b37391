"""MATRIX_MULTIPLY, EINSUM, attention and rotary embedding against ONNX Runtime or numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)

SHAPES = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (6, 4, 5)),
    ((4,), (4, 5)),
    ((3, 4), (4,)),
    ((4,), (4,)),
    ((2, 3, 4), (4,)),
]


def test_matrix_products_of_all_ranks(ops: type[Ops]) -> None:
    graph = ops()
    for left, right in SHAPES:
        graph.add("MatMul", ops.normal(*left), ops.normal(*right, seed=1))
    network = graph.check()
    modes = {layer.attributes["op0"] for layer in network.layers if layer.kind == "MATRIX_MULTIPLY"}
    assert {"NONE", "VECTOR"} <= modes


@few
@given(
    left=st.booleans(), right=st.booleans(), alpha=st.sampled_from([1.0, 0.5]), biased=st.booleans()
)
def test_gemm(ops: type[Ops], left: bool, right: bool, alpha: float, biased: bool) -> None:
    graph = ops()
    a = ops.normal(4, 3) if left else ops.normal(3, 4)
    b = ops.constant(ops.normal(5, 4) if right else ops.normal(4, 5))
    bias = [ops.constant(ops.normal(5))] if biased else []
    graph.add("Gemm", a, b, *bias, transA=int(left), transB=int(right), alpha=alpha, beta=0.25)
    graph.check()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))),
        ("bhqd,bhkd->bhqk", ((1, 2, 3, 4), (1, 2, 5, 4))),
        ("ij->ji", ((3, 4),)),
        ("i,j->ij", ((3,), (4,))),
        ("ijk->k", ((2, 3, 4),)),
    ],
)
def test_einsum(ops: type[Ops], equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    graph = ops()
    arrays = (ops.normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    graph.add("Einsum", *arrays, equation=equation)
    graph.check()


@pytest.mark.parametrize("mask", ["none", "bias", "allowed", "causal"])
def test_attention_with_heads_that_share_keys(ops: type[Ops], mask: str) -> None:
    graph = ops(23)
    query, key, value = (
        ops.normal(1, heads, length, 16, seed=heads).astype(np.float16)
        for heads, length in ((8, 5), (4, 7), (4, 7))
    )
    allowed = np.tri(5, 7, 2, dtype=np.bool_)
    masks: dict[str, list[Any]] = {
        "bias": [np.where(allowed, 0, -1e4).astype(np.float16)],
        "allowed": [allowed],
    }
    graph.add("Attention", query, key, value, *masks.get(mask, []), is_causal=int(mask == "causal"))
    graph.check(4e-3)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [0, 4])
def test_rotary_embedding(ops: type[Ops], interleaved: int, width: int) -> None:
    graph = ops(23)
    x = ops.normal(2, 3, 5, 8)
    angles = ops.normal(10, (width or 8) // 2)
    positions = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": width, "num_heads": 3}
    tables = (ops.constant(np.cos(angles)), ops.constant(np.sin(angles)))
    graph.add("RotaryEmbedding", x, *tables, positions, **attributes)
    graph.check()
