"""Branches, loops, lists and labels, as coremltools' builder writes them, run after saving."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekit.errors import RuntimeFailed
from edgekit.graph import quiet
from edgekit_coreml import control
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Package

with quiet():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, types

mb = Builder
OPS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "less": lambda x, y: x < y,
    "greater": lambda x, y: x > y,
    "reduce_sum": lambda x, axes=None, keep_dims=False: x.sum(),
    "identity": lambda x: x,
    "gather": lambda x, indices, axis, batch_dims, validate_indices=False: x[int(indices)],
    "cast": lambda x, dtype: x,
}
VECTOR = ((3,), types.fp32)
WHOLE = ((1,), types.int32)


def _built(body: Callable[..., Any], *specs: Any) -> Package:
    """A program as written: no pass of coremltools changes it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        inputs = [mb.TensorSpec(shape=shape, dtype=dtype) for shape, dtype in specs]
        model = ct.convert(
            mb.program(input_specs=inputs, opset_version=ct.target.iOS16)(body),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        path = Path(folder) / "m.mlpackage"
        model.save(str(path))
        return Package.read(
            {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        )


def _scalar(x: Any) -> Any:
    return mb.gather(x=x, indices=np.int32(0), axis=0, batch_dims=0)


def _total(x: Any) -> Any:
    return mb.reduce_sum(x=x, axes=[0], keep_dims=False)


def _branch(x: Any) -> Any:
    doubled = mb.add(x=x, y=x)
    return mb.cond(
        pred=mb.greater(x=_total(x), y=np.float32(0)),
        _true_fn=lambda: mb.mul(x=doubled, y=np.float32(10)),
        _false_fn=lambda: mb.sub(x=mb.mul(x=x, y=np.float32(0)), y=np.float32(1)),
        name="y",
    )


@pytest.mark.parametrize(
    ("x", "expected"), [([1, 2, 3], [20, 40, 60]), ([-1, -2, -3], [-1, -1, -1])]
)
def test_cond(x: list[int], expected: list[int]) -> None:
    interpreter = Interpreter(_built(_branch, VECTOR), ops=OPS)
    assert interpreter.unknown_ops == ()
    found: Any = interpreter.run({"x": np.array(x)})["y"]
    assert found.tolist() == expected


def _loop(x: Any, count: Any) -> Any:
    step = mb.mul(x=x, y=np.float32(2))  # of the block around, needed in each round

    def body(i: Any, total: Any) -> Any:
        return mb.add(x=i, y=np.int32(1)), mb.add(x=total, y=step)

    results = mb.while_loop(
        _cond=lambda i, total: mb.less(x=i, y=_scalar(count)),
        _body=body,
        loop_vars=(np.int32(0), x),
    )
    return mb.identity(x=results[1], name="y")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_while_loop(count: int) -> None:
    interpreter = Interpreter(_built(_loop, VECTOR, WHOLE), ops=OPS)
    for x in (np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])):
        found: Any = interpreter.run({"x": x, "count": np.array([count])})["y"]
        assert found.tolist() == (x * (1 + 2 * count)).tolist()


def test_a_loop_variable_is_read_before_it_changes() -> None:
    def body(x: Any, count: Any) -> Any:
        first, second, _ = mb.while_loop(
            _cond=lambda a, b, i: mb.less(x=i, y=_scalar(count)),
            _body=lambda a, b, i: (b, a, mb.add(x=i, y=np.int32(1))),
            loop_vars=(x, mb.add(x=x, y=x), np.int32(0)),
        )
        return mb.identity(x=first, name="a"), mb.identity(x=second, name="b")

    package = _built(body, VECTOR, WHOLE)
    for count in (0, 1, 2):
        found: Any = Interpreter(package, ops=OPS).run(
            {"x": np.ones(3), "count": np.array([count])}
        )
        assert (found["a"][0], found["b"][0]) == ((1, 2), (2, 1))[count % 2]


def test_a_branch_inside_a_loop() -> None:
    def body(i: Any, total: Any) -> Any:
        more = mb.cond(
            pred=mb.less(x=i, y=np.int32(2)),
            _true_fn=lambda: mb.add(x=total, y=np.float32(1)),
            _false_fn=lambda: mb.mul(x=total, y=np.float32(10)),
        )
        return mb.add(x=i, y=np.int32(1)), more

    def program(x: Any, count: Any) -> Any:
        results = mb.while_loop(
            _cond=lambda i, total: mb.less(x=i, y=_scalar(count)),
            _body=body,
            loop_vars=(np.int32(0), x),
        )
        return mb.identity(x=results[1], name="y")

    seen = []
    interpreter = Interpreter(_built(program, VECTOR, WHOLE), ops=OPS)
    found: Any = interpreter.run(
        {"x": np.zeros(3), "count": np.array([4])},
        trace=lambda operation, name, value: seen.append(operation.type),
    )
    assert found["y"].tolist() == [200, 200, 200]
    assert [seen.count(one) for one in ("cond", "mul", "less")] == [4, 2, 9]


def test_a_loop_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_ITERATIONS", 50)
    interpreter = Interpreter(_built(_loop, VECTOR, WHOLE), ops=OPS)
    interpreter.run({"x": np.zeros(3), "count": np.array([49])})
    with pytest.raises(RuntimeFailed, match=r"while_loop .*: it did not end within 50 iterations"):
        interpreter.run({"x": np.zeros(3), "count": np.array([50])})


def test_nothing_of_a_loop_stays_in_memory() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def trace(operation: Any, name: str, value: Tensor) -> None:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        alive.append(weakref.ref(value))

    interpreter = Interpreter(_built(_loop, VECTOR, WHOLE), ops=OPS)
    interpreter.run({"x": np.zeros(3), "count": np.array([30])}, trace=trace)
    assert len(alive) > 60
    assert most <= 6


def test_an_overflow_inside_a_branch_is_named_there() -> None:
    def body(x: Any) -> Any:
        return mb.cond(
            pred=mb.greater(x=_total(x), y=np.float16(0)),
            _true_fn=lambda: mb.mul(x=x, y=x, name="square"),
            _false_fn=lambda: mb.add(x=x, y=np.array([-np.inf, 0, 0], np.float16)),
            name="y",
        )

    interpreter = Interpreter(_built(body, ((3,), types.fp16)), ops=OPS)
    interpreter.run({"x": np.array([300.0, 1, 1])})
    assert interpreter.overflow is not None
    assert interpreter.overflow.output == "square"
    interpreter.run({"x": np.array([-300.0, 1, 1])})
    assert interpreter.overflow is None


def _list(x: Any, at: Any) -> Any:
    ls = mb.make_list(init_length=3, dynamic_length=False, elem_shape=(3,), dtype="fp32")
    zeroth = mb.list_write(ls=ls, index=0, value=x)
    both = mb.list_write(ls=zeroth, index=1, value=mb.add(x=x, y=x))
    filled = mb.list_scatter(
        ls=both, indices=[2, 0], value=np.array([[7, 8, 9], [4, 5, 6]], np.float32)
    )
    length = mb.list_length(ls=filled)
    read = mb.list_read(ls=filled, index=_scalar(at))
    before = mb.list_read(ls=both, index=0)
    gathered = mb.list_gather(ls=filled, indices=[1, 2])
    return (
        mb.identity(x=read, name="read"),
        mb.identity(x=before, name="before"),
        mb.identity(x=gathered, name="gathered"),
        mb.add(x=length, y=np.int32(0), name="length"),
    )


def test_lists() -> None:
    interpreter = Interpreter(_built(_list, VECTOR, WHOLE), ops=OPS)
    assert interpreter.unknown_ops == ()
    found: Any = interpreter.run({"x": np.array([1, 2, 3]), "at": np.array([0])})
    assert {name: one.tolist() for name, one in found.items()} == {
        "read": [4, 5, 6],
        "before": [1, 2, 3],  # what is written later does not change an earlier list
        "gathered": [[2, 4, 6], [7, 8, 9]],
        "length": 3,
    }
    with pytest.raises(RuntimeFailed, match=r"list_read .*: a list of 3 elements has none at 3"):
        interpreter.run({"x": np.zeros(3), "at": np.array([3])})
    with pytest.raises(RuntimeFailed, match="none at -1"):
        interpreter.run({"x": np.zeros(3), "at": np.array([-1])})


def test_a_list_carried_through_a_loop_grows() -> None:
    def program(x: Any, count: Any) -> Any:
        ls = mb.make_list(init_length=1, dynamic_length=True, elem_shape=(3,), dtype="fp32")

        def body(i: Any, found: Any) -> Any:
            return mb.add(x=i, y=np.int32(1)), mb.list_write(
                ls=found, index=i, value=mb.mul(x=x, y=mb.cast(x=i, dtype="fp32"))
            )

        results = mb.while_loop(
            _cond=lambda i, found: mb.less(x=i, y=_scalar(count)),
            _body=body,
            loop_vars=(np.int32(0), ls),
        )
        last = mb.list_read(ls=results[1], index=mb.sub(x=_scalar(count), y=np.int32(1)))
        return mb.identity(x=last, name="y")

    interpreter = Interpreter(_built(program, VECTOR, WHOLE), ops=OPS)
    found: Any = interpreter.run({"x": np.ones(3), "count": np.array([5])})["y"]
    assert found.tolist() == [4, 4, 4]
    with pytest.raises(RuntimeFailed, match="has none at -1"):
        interpreter.run({"x": np.ones(3), "count": np.array([0])})


@pytest.mark.parametrize(
    ("function", "given", "why"),
    [
        ("make_list", {"init_length": torch.tensor(1 << 30)}, "is not possible"),
        ("make_list", {"init_length": torch.tensor(-1)}, "is not possible"),
        ("list_read", {"ls": [None], "index": torch.tensor(0)}, "before it is written"),
        (
            "list_write",
            {"ls": [], "index": torch.tensor(1 << 30), "value": torch.ones(1)},
            "cannot be written",
        ),
        (
            "list_scatter",
            {"ls": [None], "indices": torch.tensor([-1]), "value": torch.ones(1, 2)},
            "cannot be written",
        ),
    ],
)
def test_lists_have_their_limits(function: str, given: dict[str, Any], why: str) -> None:
    with pytest.raises((ValueError, IndexError), match=why):
        control.CONTROL[function](None, None, **given)
