"""Ops against coremltools' own numpy: the value inference with which it folds constants.

An oracle written by others for the same reference. ``CASES`` draws arguments for each op; ops that
have value inference and no case are named with the reason. One long file, because it is one table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekit.graph import quiet
from edgekit_coreml.ops import OPS

with quiet():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil.operation import Operation
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

Case = Callable[[np.random.Generator], dict[str, Any]]

NOT_HERE = {
    "_const_symbolic": "a value of the converter, never stored",
    "const": "the runner's",
    "cond": "the runner's",
    "list_length": "the runner's",
    "reverse_sequence": "its inference raises 'TODO'",
    "scatter_along_axis": "its inference ignores the mode: a case for 'update' alone",
}
# A list, because a size of 1 and a scalar are where broadcasting goes wrong.
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (3, 1), (2, 3, 4), (1, 2, 1, 3), (2, 1, 2, 3, 2)]


def _floats(rng: np.random.Generator, *shape: int, low: float = -3, high: float = 3) -> Any:
    return rng.uniform(low, high, shape).astype(np.float32)


def _whole(rng: np.random.Generator, low: int, high: int, *shape: int) -> Any:
    return rng.integers(low, high, shape).astype(np.int32)


def _int32(values: Any) -> Any:
    return np.asarray(values, np.int32)


def _shape(rng: np.random.Generator, least: int = 0, most: int = 5) -> tuple[int, ...]:
    fitting = [shape for shape in SHAPES if least <= len(shape) <= most]
    return fitting[rng.integers(len(fitting))]


def _pair(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast, of different ranks or with ones."""
    shape = _shape(rng, 1)
    other = tuple(1 if rng.integers(2) else size for size in shape)[rng.integers(len(shape)) :]
    return (shape, other) if rng.integers(2) else (other, shape)


def _unary(low: float = -3, high: float = 3) -> Case:
    return lambda rng: {"x": _floats(rng, *_shape(rng, 1), low=low, high=high)}


def _with(**parameters: float) -> Case:
    return lambda rng: {
        "x": _floats(rng, *_shape(rng, 1)),
        **{name: np.float32(value) for name, value in parameters.items()},
    }


def _binary(rng: np.random.Generator) -> dict[str, Any]:
    left, right = _pair(rng)
    if rng.integers(2):
        return {"x": _floats(rng, *left), "y": _floats(rng, *right)}
    return {"x": _whole(rng, -9, 9, *left), "y": _whole(rng, -9, 9, *right)}


def _division(rng: np.random.Generator) -> dict[str, Any]:
    """No zero divides, and the signs are mixed."""
    arguments = _binary(rng)
    y = arguments["y"]
    arguments["y"] = np.where(np.abs(y) < 1, np.array(2, y.dtype), y).astype(y.dtype)
    return arguments


def _real_division(rng: np.random.Generator) -> dict[str, Any]:
    # Of integers the inference returns a fraction, which no integer result holds.
    left, right = _pair(rng)
    return {"x": _floats(rng, *left), "y": _floats(rng, *right, low=0.5)}


def _power(rng: np.random.Generator) -> dict[str, Any]:
    left, right = _pair(rng)
    if rng.integers(2):
        return {"x": _floats(rng, *left, low=0.1), "y": _floats(rng, *right)}
    return {"x": _whole(rng, -4, 5, *left), "y": _whole(rng, 0, 4, *right)}


def _logical(rng: np.random.Generator) -> dict[str, Any]:
    left, right = _pair(rng)
    return {"x": rng.integers(0, 2, left) > 0, "y": rng.integers(0, 2, right) > 0}


def _reduced(low: float = -3) -> Case:
    def case(rng: np.random.Generator) -> dict[str, Any]:
        shape = _shape(rng, 1)
        arguments: dict[str, Any] = {"x": _floats(rng, *shape, low=low)}
        if rng.integers(4):
            count = rng.integers(1, len(shape) + 1)
            axes = rng.permutation(len(shape))[:count]
            arguments["axes"] = np.where(rng.integers(0, 2, count), axes, axes - len(shape))
        arguments["keep_dims"] = bool(rng.integers(2))
        return arguments

    return case


def _reduced_integers(rng: np.random.Generator) -> dict[str, Any]:
    return {**_reduced()(rng), "x": _whole(rng, -9, 9, 2, 3), "axes": _int32([1])}


def _either(*cases: Case) -> Case:
    return lambda rng: cases[rng.integers(len(cases))](rng)


def _argument(rng: np.random.Generator) -> dict[str, Any]:
    shape = _shape(rng, 1)
    axis = int(rng.integers(-len(shape), len(shape)))
    return {"x": _floats(rng, *shape), "axis": axis, "keep_dims": bool(rng.integers(2))}


def _on_axis(rng: np.random.Generator) -> dict[str, Any]:
    shape = _shape(rng, 1)
    return {"x": _floats(rng, *shape), "axis": int(rng.integers(-len(shape), len(shape)))}


def _sorted(rng: np.random.Generator) -> dict[str, Any]:
    return {**_on_axis(rng), "ascending": bool(rng.integers(2))}


def _topk(rng: np.random.Generator) -> dict[str, Any]:
    arguments = _sorted(rng)
    size = arguments["x"].shape[arguments["axis"]]
    return {**arguments, "k": int(rng.integers(1, size + 1))}


def _channels(rng: np.random.Generator, low: float, *names: str) -> dict[str, Any]:
    shape = (2, 3, *_shape(rng, 1, 3))
    return {
        "x": _floats(rng, *shape),
        **{name: _floats(rng, 3, low=low, high=2) for name in names},
    }


def _prelu(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": _floats(rng, 2, 3, 4, 2), "alpha": _floats(rng, 3)}


def _layer_norm(rng: np.random.Generator) -> dict[str, Any]:
    axes = [[-1], [1, 2], [2, 0], [0, 1, 2]][rng.integers(4)]
    sizes = [(2, 3, 4)[axis] for axis in sorted(axis % 3 for axis in axes)]
    return {
        "x": _floats(rng, 2, 3, 4),
        "axes": _int32(axes),
        "gamma": _floats(rng, *sizes),
        "beta": _floats(rng, *sizes),
        "epsilon": np.float32(1e-3),
    }


def _linear(rng: np.random.Generator) -> dict[str, Any]:
    lead = _shape(rng, 0, 2)
    return {
        "x": _floats(rng, *lead, 4),
        "weight": _floats(rng, 3, 4),
        "bias": _floats(rng, 3),
    }


def _matmul(rng: np.random.Generator) -> dict[str, Any]:
    left, right = [(2, 1, 3, 4), (3, 4)][rng.integers(2)], [(5, 4, 2), (4, 2)][rng.integers(2)]
    x, y = _floats(rng, *left), _floats(rng, *right)
    turn_x, turn_y = bool(rng.integers(2)), bool(rng.integers(2))
    return {
        "x": np.ascontiguousarray(np.swapaxes(x, -1, -2)) if turn_x else x,
        "y": np.ascontiguousarray(np.swapaxes(y, -1, -2)) if turn_y else y,
        "transpose_x": turn_x,
        "transpose_y": turn_y,
    }


def _einsum(rng: np.random.Generator) -> dict[str, Any]:
    if rng.integers(2):
        values = (_floats(rng, 2, 3, 4, 5), _floats(rng, 1, 5, 1, 2))
        return {"values": values, "equation": "nchw,nwhu->nchu"}
    return {"values": (_floats(rng, 3, 1, 5), _floats(rng, 5, 4, 2)), "equation": "chw,whr->chr"}


def _attention(rng: np.random.Generator) -> dict[str, Any]:
    arguments = {
        "query": _floats(rng, 2, 3, 4, 5),
        "key": _floats(rng, 2, 3, 6, 5),
        "value": _floats(rng, 2, 3, 6, 2),
    }
    masks = [None, _floats(rng, 4, 6), np.tril(np.ones((1, 4, 6))) > 0]
    mask = masks[rng.integers(3)]
    return arguments if mask is None else {**arguments, "attn_mask": mask}


def _band(rng: np.random.Generator) -> dict[str, Any]:
    lower, upper = (int(n) for n in rng.integers(-1, 3, 2))
    return {"x": _floats(rng, 2, 3, 4), "lower": lower, "upper": upper}


def _cumsum(rng: np.random.Generator) -> dict[str, Any]:
    # Its exclusive form raises in the inference.
    shape = _shape(rng, 1)
    return {
        "x": _floats(rng, *shape),
        "axis": int(rng.integers(len(shape))),
        "reverse": bool(rng.integers(2)),
    }


def _pad(rng: np.random.Generator) -> dict[str, Any]:
    mode = ["constant", "reflect", "replicate"][rng.integers(3)]
    count = int(rng.integers(1, 4))
    return {
        "x": _floats(rng, 3, 4, 3),
        "pad": _whole(rng, 0, 3, 2 * count),
        "mode": mode,
        "constant_val": np.float32(1.5),
    }


def _concat(rng: np.random.Generator) -> dict[str, Any]:
    axis = int(rng.integers(-2, 2))
    sizes = [(2, 3), (1, 3), (4, 3)] if axis % 2 == 0 else [(2, 3), (2, 1), (2, 2)]
    return {"values": tuple(_floats(rng, *size) for size in sizes), "axis": axis}


def _stack(rng: np.random.Generator) -> dict[str, Any]:
    return {"values": (_floats(rng, 2, 3), _floats(rng, 2, 3)), "axis": int(rng.integers(-2, 3))}


def _split(rng: np.random.Generator) -> dict[str, Any]:
    if rng.integers(2):
        return {"x": _floats(rng, 2, 6, 1), "num_splits": 3, "axis": -2}
    return {"x": _floats(rng, 2, 6, 1), "split_sizes": _int32([1, 3, 2]), "axis": 1}


def _expand(rng: np.random.Generator) -> dict[str, Any]:
    axes = [[0], [-1], [0, 2], [-1, 1], [-3, -1]][rng.integers(5)]
    return {"x": _floats(rng, 2, 3), "axes": _int32(axes)}


def _squeeze(rng: np.random.Generator) -> dict[str, Any]:
    axes = [[0], [-2], [0, 2], None][rng.integers(4)]
    x = {"x": _floats(rng, 1, 2, 1, 3)}
    return x if axes is None else {**x, "axes": _int32(axes)}


def _reshape(rng: np.random.Generator) -> dict[str, Any]:
    shape = [[6, 4], [-1], [0, -1], [1, 0, -1, 0], [2, 0, 0], [4, 3, 2, 1]][rng.integers(6)]
    return {"x": _floats(rng, 2, 3, 4), "shape": _int32(shape)}


def _slice(rng: np.random.Generator) -> dict[str, Any]:
    sizes, begin, end, stride = (5, 4, 6), [], [], []
    for size in sizes:
        step = int(rng.choice([1, 2, -1, -2]))
        low = int(rng.integers(0, size - 1))
        high = int(rng.integers(low + 1, size))
        first, last = (low, high) if step > 0 else (high, low)
        begin.append(first - size if rng.integers(2) else first)
        end.append(last - size if rng.integers(2) else last)
        stride.append(step)
    return {
        "x": _floats(rng, *sizes),
        "begin": _int32(begin),
        "end": _int32(end),
        "stride": _int32(stride),
        "begin_mask": rng.integers(0, 3, 3) == 0,
        "end_mask": rng.integers(0, 3, 3) == 0,
        "squeeze_mask": np.array([False, rng.integers(3) == 0, False]),
    }


def _update(rng: np.random.Generator) -> dict[str, Any]:
    arguments = _slice(rng)
    taken = _ours("slice_by_index", arguments)[0]
    return {**arguments, "update": _floats(rng, *taken.shape)}


def _slice_size(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "x": _floats(rng, 5, 4, 3),
        "begin": _int32([rng.integers(3), -2, 1]),
        "size": _int32([2, rng.choice([-1, 1, 2]), -1]),
    }


def _gather(rng: np.random.Generator) -> dict[str, Any]:
    batch = int(rng.integers(3))
    axis = int(rng.integers(batch, 4))
    sizes = (2, 3, 4, 5)
    shape = sizes[:batch] + [(), (2,), (3, 2)][rng.integers(3)] if batch else (2, 2)
    return {
        "x": _floats(rng, *sizes),
        "indices": _whole(rng, -sizes[axis], sizes[axis], *shape),
        # Its batched form takes no negative axis.
        "axis": axis if batch or rng.integers(2) else axis - 4,
        "batch_dims": batch,
    }


def _along(rng: np.random.Generator) -> dict[str, Any]:
    axis = int(rng.integers(3))
    shape = [2, 3, 4]
    indices = _whole(rng, -shape[axis], shape[axis], *shape[:axis], 5, *shape[axis + 1 :])
    return {"x": _floats(rng, *shape), "indices": indices, "axis": axis - 3}


def _scatter(rng: np.random.Generator) -> dict[str, Any]:
    order = np.stack([rng.permutation(4)[:3] for _ in range(6)]).reshape(2, 3, 3)
    return {
        "data": _floats(rng, 2, 3, 4),
        "indices": _int32(order),
        "updates": _floats(rng, 2, 3, 3),
        "axis": -1,
        "mode": "update",
    }


def _quantize(rng: np.random.Generator) -> dict[str, Any]:
    name = ["int8", "uint8"][rng.integers(2)]
    zero = rng.integers(0, 9, 3).astype(name)
    x = _floats(rng, 2, 3, 4, low=-30, high=30)
    if rng.integers(2):
        scale = np.array([0.5, 0.25, 2.0], np.float32)  # halves are met exactly
        x = np.round(x * 4) / np.float32(4)
        return {
            "input": x, "scale": scale, "zero_point": zero, "axis": -2, "output_dtype": name,
        }  # fmt: skip
    return {"input": x, "scale": np.float32(0.1), "output_dtype": name}


def _cast(rng: np.random.Generator) -> dict[str, Any]:
    names = ["int32", "fp32", "bool", "int8", "int16", "uint8", "uint16"]
    name = names[rng.integers(len(names))]
    low = 0 if name.startswith("u") else -100
    x = _floats(rng, 3, 2, low=low, high=100)
    return {"x": x if rng.integers(2) else _int32(np.round(x)), "dtype": name}


def _range(rng: np.random.Generator) -> dict[str, Any]:
    kind = [np.int32, np.float32][rng.integers(2)]
    start, end, step = [(0, 7, 2), (5, -4, -3), (-1, 1, 1), (2, 3, 5)][rng.integers(4)]
    return {"start": kind(start), "end": kind(end), "step": kind(step)}


def _select(rng: np.random.Generator) -> dict[str, Any]:
    left, right = _pair(rng)
    return {
        "cond": rng.integers(0, 2, left) > 0,
        "a": _floats(rng, *left),
        "b": _floats(rng, *right),
    }


PLAIN = (
    *("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "round", "sign", "sin"),
    *("sinh", "square", "tan", "tanh", "relu", "relu6", "sigmoid", "softplus", "softsign"),
    *("identity", "shape", "non_zero", "reverse"),
)
COMPARED = (
    *("add", "equal", "greater", "greater_equal", "less", "less_equal", "maximum", "minimum"),
    *("mul", "not_equal", "sub"),
)
REDUCED = (
    *("reduce_l1_norm", "reduce_l2_norm", "reduce_max", "reduce_mean", "reduce_min"),
    *("reduce_prod", "reduce_sum", "reduce_sum_square"),
)
CASES: dict[str, Case] = {
    **dict.fromkeys(PLAIN, _unary()),
    **dict.fromkeys(("acos", "asin", "atanh"), _unary(-0.99, 0.99)),
    **dict.fromkeys(("inverse", "log", "rsqrt", "sqrt"), _unary(0.05)),
    **dict.fromkeys(COMPARED, _binary),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), _logical),
    **dict.fromkeys(("floor_div", "mod"), _division),
    **dict.fromkeys(REDUCED, _either(_reduced(), _reduced_integers)),
    "reduce_log_sum": _reduced(low=0.1),
    "reduce_log_sum_exp": _reduced(),
    "reduce_argmax": _argument,
    "reduce_argmin": _argument,
    "argsort": _sorted,
    "band_part": _band,
    "cast": _cast,
    "clamped_relu": _with(alpha=0.3, beta=1.5),
    "clip": _with(alpha=-1.0, beta=0.5),
    "concat": _concat,
    "cumsum": _cumsum,
    "einsum": _einsum,
    "elu": _with(alpha=0.7),
    "expand_dims": _expand,
    "fill": lambda rng: {"shape": _int32([2, 1, 3]), "value": np.float32(1.5)},
    "fill_like": lambda rng: {"ref_tensor": _floats(rng, 2, 3), "value": np.int32(4)},
    "flatten2d": lambda rng: {"x": _floats(rng, 2, 3, 4), "axis": int(rng.choice([-2, -1, 1, 2]))},
    "gather": _gather,
    "gather_along_axis": _along,
    "gelu": lambda rng: {
        "x": _floats(rng, 3, 4),
        "mode": ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"][rng.integers(3)],
    },
    "l2_norm": lambda rng: {"x": _floats(rng, *_shape(rng, 3)), "epsilon": np.float32(1e-3)},
    "layer_norm": _layer_norm,
    "leaky_relu": _with(alpha=0.3),
    "linear": _linear,
    "linear_activation": _with(alpha=0.3, beta=-0.5),
    "logical_not": lambda rng: {"x": rng.integers(0, 2, (2, 3)) > 0},
    "matmul": _matmul,
    "pad": _pad,
    "pow": _power,
    "prelu": _prelu,
    "quantize": _quantize,
    "range_1d": _range,
    "real_div": _real_division,
    "reshape": _reshape,
    "scaled_dot_product_attention": _attention,
    "scaled_tanh": _with(alpha=0.3, beta=-0.5),
    "scatter_along_axis": _scatter,
    "select": _select,
    "sigmoid_hard": _with(alpha=0.3, beta=0.5),
    "slice_by_index": _slice,
    "slice_by_size": _slice_size,
    "slice_update": _update,
    "softmax": _on_axis,
    "softplus_parametric": lambda rng: _channels(rng, 0.2, "alpha", "beta"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "threshold": _with(alpha=0.4),
    "thresholded_relu": _with(alpha=0.4),
    "tile": lambda rng: {"x": _floats(rng, 2, 1, 3), "reps": _whole(rng, 1, 4, 3)},
    "topk": _topk,
    "transpose": lambda rng: {"x": _floats(rng, 2, 3, 4), "perm": _int32(rng.permutation(3))},
}


def _tensor(value: Any) -> Any:
    """As the runner hands values over."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return tuple(_tensor(part) for part in value)
    array = np.asarray(value)
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    return torch.from_numpy(array.copy())


def _ours(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    result = OPS[name](**{key: _tensor(value) for key, value in arguments.items()})
    return list(result) if isinstance(result, tuple) else [result]


def _folded(name: str, arguments: dict[str, Any]) -> list[Any]:
    """What coremltools folds the op to, in the types that the op declares."""
    found: list[Any] = []

    @mb.program(input_specs=[], opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program() -> Any:
        result = getattr(mb, name)(**arguments)
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        found.extend(part.val for part in parts)
        return result

    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_op_folds_to_what_it_computes(name: str) -> None:
    rng = np.random.default_rng(sum(name.encode()))
    for _ in range(12):
        arguments = CASES[name](rng)
        copies = {
            key: value.copy() if isinstance(value, np.ndarray) else value
            for key, value in arguments.items()
        }
        with quiet():
            expected = _folded(name, copies)
        for ours, theirs in zip(_ours(name, arguments), expected, strict=True):
            assert theirs is not None
            assert tuple(ours.shape) == np.shape(theirs), arguments
            assert ours.is_floating_point() == np.issubdtype(np.asarray(theirs).dtype, np.floating)
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-6)


def test_every_op_with_inference_has_a_case() -> None:
    folding = {
        name
        for name, versions in SSAOpRegistry.core_ops.items()
        if list(versions.values())[-1].value_inference is not Operation.value_inference
    }
    assert folding - CASES.keys() == NOT_HERE.keys() - CASES.keys()
    assert CASES.keys() <= folding
