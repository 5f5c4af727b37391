"""Saved programs against what they should give: models of coremltools, and programs built here."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import BadInput, RuntimeFailed
from edgekit.graph import quiet
from edgekit_coreml.interpreter import Interpreter, Overflow
from edgekit_coreml.package import Operation, Package

with quiet():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, types

mb = Builder
HALF, SINGLE = types.fp16, types.fp32
# A table of one's own, so that what is tested here is the runner.
OPS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "identity": lambda x: x,
    "concat": lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    "cast": lambda x, dtype: x if dtype == "int32" else x.float(),
    "relu": torch.relu,
    "log": lambda x, epsilon: torch.log(x + epsilon),
    "split": lambda x, num_splits, axis: torch.tensor_split(x, int(num_splits), int(axis)),
}


def _read(model: Any) -> Package:
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "m.mlpackage"
        model.save(str(path))
        return Package.read(
            {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        )


def _built(body: Callable[..., Any], *specs: Any) -> Package:
    """A program as written: no pass of coremltools changes it."""
    with quiet():
        inputs = [mb.TensorSpec(shape=shape, dtype=dtype) for shape, dtype in specs]
        program = mb.program(input_specs=inputs, opset_version=ct.target.iOS18)(body)
        return _read(
            ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                pass_pipeline=ct.PassPipeline.EMPTY,
            )
        )


def _converted(model: nn.Module, example: Tensor, **options: Any) -> Package:
    options = {"minimum_deployment_target": ct.target.iOS18, **options}
    with quiet():
        exported = torch.export.export(model.eval(), (example,)).run_decompositions({})
        return _read(ct.convert(exported, **options))


def _run(package: Package, **feeds: Any) -> dict[str, Any]:
    return Interpreter(package, ops=OPS).run({k: np.asarray(v) for k, v in feeds.items()})


class Net(nn.Module):
    """A small net with what nets have: convolution, norm, attention, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.gate = nn.Linear(16, 16)
        self.mix = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        q, k, v = self.mix(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        found: Tensor = ((q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v).mean(1)
        return found


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("FLOAT32", 110, 200), ("FLOAT16", 50, 90)]
)
def test_a_converted_net_gives_what_torch_gives(precision: str, least: int, most: int) -> None:
    torch.manual_seed(0)
    net = Net().train()
    net(torch.randn(8, 3, 16, 16))  # the norm's statistics
    x = torch.randn(1, 3, 16, 16)
    expected = net.eval()(x).detach().numpy()
    package = _converted(
        net,
        x,
        compute_precision=getattr(ct.precision, precision),
        inputs=[ct.TensorType("x", x.shape, dtype=np.float32)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
    )
    interpreter = Interpreter(package)
    assert interpreter.unknown_ops == ()
    for _ in range(2):
        found: Any = interpreter.run({"x": x.numpy()})["y"]
        noise = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
        assert least < noise < most
        assert found.dtype == np.float32
        assert interpreter.overflow is None


def test_float16_is_rounded_at_every_operation() -> None:
    def body(x: Any) -> Any:
        return mb.add(x=mb.add(x=x, y=np.float16(1)), y=np.float16(-2048), name="y")

    # 2048 + 1 is no float16, and float32 would keep it.
    found = _run(_built(body, ((1,), HALF)), x=[2048])["y"]
    assert found.dtype == np.float16
    assert found.tolist() == [0.0]
    wide = _built(
        lambda x: mb.add(x=mb.add(x=x, y=np.float32(1)), y=np.float32(-2048), name="y"),
        ((1,), SINGLE),
    )
    assert _run(wide, x=[2048])["y"].tolist() == [1.0]


@pytest.mark.parametrize(("x", "is_inf"), [(255.87, False), (255.99, True), (-1e4, True)])
def test_an_overflow_is_named_where_it_happens(x: float, is_inf: bool) -> None:
    def body(x: Any) -> Any:
        square = mb.mul(x=x, y=x, name="square")
        return mb.relu(x=mb.mul(x=square, y=square, name="again"), name="y")

    small = np.float16(0.5)
    interpreter = Interpreter(_built(body, ((2,), HALF)), ops=OPS)
    interpreter.run({"x": np.array([x, small])})
    first = interpreter.overflow
    assert first is not None
    held = float(np.float16(x))
    if is_inf:
        assert first == Overflow("mul", "square", held * held)
    else:
        assert first.output == "again"
    interpreter.run({"x": np.array([small, small])})
    assert interpreter.overflow is None


def test_what_was_infinite_before_is_no_overflow() -> None:
    def body(x: Any) -> Any:
        return mb.add(x=x, y=np.array([-np.inf, 0], np.float16), name="y")

    interpreter = Interpreter(_built(body, ((2,), HALF)), ops=OPS)
    found: Any = interpreter.run({"x": np.array([1.0, 2.0])})["y"]
    assert found.tolist() == [-np.inf, 2.0]
    assert interpreter.overflow is None
    interpreter.run({"x": np.array([1.0, 1e9])})  # infinite already as an input
    assert interpreter.overflow is None


def test_nan_from_finite_values_counts_too() -> None:
    package = _built(lambda x: mb.log(x=x, epsilon=np.float16(0), name="y"), ((2,), HALF))
    interpreter = Interpreter(package, ops=OPS)
    interpreter.run({"x": np.array([-1.0, 2.0])})
    assert interpreter.overflow is not None
    assert interpreter.overflow.op == "log"
    assert interpreter.overflow.largest == pytest.approx(np.log(2))


def test_results_are_held_to_the_declared_integer_type() -> None:
    package = _built(lambda x: mb.cast(x=x, dtype="int32", name="y"), ((5,), SINGLE))
    found = _run(package, x=[2.9, -2.9, np.nan, np.inf, -3e9])["y"]
    assert found.dtype == np.int32
    assert found.tolist() == [2, -2, 0, 2**31 - 1, -(2**31)]


def test_trace_and_release() -> None:
    def body(x: Any) -> Any:
        first = mb.add(x=x, y=np.float32(1), name="first")
        second = mb.mul(x=first, y=first, name="second")
        mb.relu(x=second, name="unused")
        return mb.concat(values=[second, x], axis=0, name="y")

    alive: dict[str, weakref.ref[Tensor]] = {}
    seen = []

    def trace(operation: Operation, name: str, value: Tensor) -> None:
        gc.collect()
        others = {one for one, held in alive.items() if held() is not None}
        seen.append((operation.type, name, others))
        alive[name] = weakref.ref(value)

    package = _built(body, ((2,), SINGLE))
    out: Any = Interpreter(package, ops=OPS).run({"x": np.array([1.0, 2.0])}, trace=trace)
    assert out["y"].tolist() == [4.0, 9.0, 1.0, 2.0]
    # "first" still counts while the step that uses it last is traced, and not after that.
    assert seen == [
        ("add", "first", set()),
        ("mul", "second", {"first"}),
        ("relu", "unused", {"second"}),
        ("concat", "y", {"second"}),
    ]


def test_constants_are_decoded_once_and_outputs_are_the_callers() -> None:
    def body(x: Any) -> Any:
        kept = mb.const(val=np.arange(16, dtype=np.float32), name="kept")
        return mb.add(x=x, y=kept, name="y"), mb.identity(x=kept, name="z")

    seen: list[Tensor] = []

    def add(x: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return x + y

    ops = OPS | {"add": add}
    interpreter = Interpreter(_built(body, ((16,), SINGLE)), ops=ops)
    first: Any = interpreter.run({"x": np.zeros(16)})
    first["z"][:] = -1
    first["y"][:] = -1
    second: Any = interpreter.run({"x": np.zeros(16)})
    assert second["y"].tolist() == second["z"].tolist() == list(range(16))
    assert seen[0] is seen[1]


def test_several_outputs_and_their_number() -> None:
    package = _built(lambda x: tuple(mb.split(x=x, num_splits=2, axis=0, name="y")), ((4,), SINGLE))
    assert [one.tolist() for one in _run(package, x=[1, 2, 3, 4]).values()] == [[1, 2], [3, 4]]
    with pytest.raises(RuntimeFailed, match=r"split 'y': it gave 1 results, and declares 2"):
        Interpreter(package, ops=OPS | {"split": lambda **_: (torch.zeros(2),)}).run(
            {"x": np.zeros(4)}
        )


def test_unknown_operations_are_found_before_any_run() -> None:
    package = _built(lambda x: mb.relu(x=mb.sin(x=mb.cos(x=x)), name="y"), ((1,), SINGLE))
    interpreter = Interpreter(package, ops=OPS)
    assert interpreter.unknown_ops == ("cos", "sin")
    with pytest.raises(RuntimeFailed, match=r"the operations 'cos', 'sin' are not known here"):
        interpreter.run({"x": np.zeros(1)})


@pytest.mark.parametrize(
    ("relu", "why"),
    [
        (lambda x: x @ x.new_zeros(3), "relu 'y': .*3"),
        (lambda y: y, "relu 'y': .*unexpected keyword argument"),
        (lambda x: x[None], r"relu 'y': it gave the shape \(1, 2\), and declares 2"),
        (lambda x: {}[x], "relu 'y': "),
        (lambda x: x.nothing, "relu 'y': .*no attribute 'nothing'"),
        (lambda x: 1 // 0, "relu 'y': .*zero"),
    ],
)
def test_what_an_operation_raises_is_one_sentence(relu: Any, why: str) -> None:
    package = _built(lambda x: mb.relu(x=x, name="y"), ((2,), SINGLE))
    with pytest.raises(RuntimeFailed, match=f"^coreml could not run the model: {why}"):
        Interpreter(package, ops=OPS | {"relu": relu}).run({"x": np.zeros(2)})


@pytest.mark.parametrize(
    ("feeds", "why"),
    [
        ({}, "the input 'x' is missing"),
        ({"x": np.zeros((2, 3)), "z": np.zeros(1)}, "no input 'z'; it takes: x"),
        ({"x": np.zeros((3, 2))}, r"'x' cannot have the shape \(3, 2\)"),
        ({"x": np.zeros(6)}, "'x' cannot have the shape"),
    ],
)
def test_feeds_that_do_not_fit(feeds: dict[str, Any], why: str) -> None:
    package = _built(lambda x: mb.relu(x=x, name="y"), ((2, 3), SINGLE))
    with pytest.raises(BadInput, match=why):
        Interpreter(package, ops=OPS).run(feeds)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def _flexible(shape: Any) -> Package:
    batch = torch.export.Dim("batch", min=1, max=8)
    with quiet():
        exported = torch.export.export(
            Twice(), (torch.zeros(2, 3),), dynamic_shapes={"x": {0: batch}}
        ).run_decompositions({})
        return _read(
            ct.convert(
                exported,
                minimum_deployment_target=ct.target.iOS18,
                inputs=[ct.TensorType("x", shape=shape)],
            )
        )


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        ((ct.RangeDim(2, 4), 3), (2, 3, 4), (1, 5)),
        (ct.EnumeratedShapes([(2, 3), (5, 3)]), (2, 5), (3, 4)),
    ],
)
def test_flexible_shapes(shape: Any, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    interpreter = Interpreter(_flexible(shape))
    for rows in good:
        x = np.random.default_rng(rows).integers(0, 9, (rows, 3))
        (found,) = interpreter.run({"x": x}).values()
        np.testing.assert_array_equal(np.asarray(found), 2 * x)
    for rows in bad:
        with pytest.raises(BadInput, match="cannot have the shape"):
            interpreter.run({"x": np.zeros((rows, 3))})


def test_optional_input_has_its_default() -> None:
    default = np.full((2, 3), 1.5, np.float32)
    package = _converted(
        Twice(), torch.zeros(2, 3), inputs=[ct.TensorType("x", (2, 3), default_value=default)]
    )
    assert package.inputs[0].optional
    (found,) = Interpreter(package).run({}).values()
    np.testing.assert_array_equal(np.asarray(found), 2 * default)


def test_images_in_and_out() -> None:
    package = _converted(
        Twice(),
        torch.zeros(1, 3, 2, 4),
        inputs=[ct.ImageType("x", shape=(1, 3, 2, 4), scale=0.5, bias=[0, -64, 0])],
        outputs=[ct.ImageType("y", color_layout=ct.colorlayout.RGB)],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 2, 4)).astype(np.uint8)
    wanted = 2 * (pixels * 0.5 + np.array([0, -64, 0]).reshape(1, 3, 1, 1))
    for x in (pixels, pixels.astype(np.float32)):
        found: Any = Interpreter(package).run({"x": x})["y"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted.clip(0, 255))


@pytest.mark.parametrize("labels", [["cat", "dog", "owl"], [7, 8, 9]])
def test_classifier(labels: list[Any]) -> None:
    package = _converted(
        Twice(),
        torch.zeros(1, 3),
        inputs=[ct.TensorType("x", (1, 3))],
        classifier_config=ct.ClassifierConfig(labels),
    )
    found: Any = Interpreter(package).run({"x": np.array([[0.25, 0.5, 0.5]])})
    assert found == {
        "classLabel": labels[1],
        "classLabel_probs": dict(zip(labels, [0.5, 1.0, 1.0], strict=True)),
    }
    assert type(found["classLabel"]) is type(labels[0])


class Counter(nn.Module):
    """Adds its input to what it has, and tells the sum times ``factor``."""

    kept: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("kept", torch.zeros(2))
        self.weight = nn.Parameter(torch.arange(64.0).reshape(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.add_(x)
        return F.linear(self.kept * self.factor, self.weight)


def _counters() -> Package:
    with tempfile.TemporaryDirectory() as folder, quiet():
        several = ct.utils.MultiFunctionDescriptor()
        for name, factor in (("once", 1.0), ("twice", 2.0)):
            exported = torch.export.export(Counter(factor).eval(), (torch.zeros(2),))
            model = ct.convert(
                exported.run_decompositions({}),
                minimum_deployment_target=ct.target.iOS18,
                inputs=[ct.TensorType("x", (2,), dtype=np.float32)],
                outputs=[ct.TensorType("y", dtype=np.float32)],
            )
            model.save(f"{folder}/{name}.mlpackage")
            several.add_function(f"{folder}/{name}.mlpackage", "main", name)
        several.default_function_name = "twice"
        path = Path(folder) / "both.mlpackage"
        ct.utils.save_multifunction(several, str(path))
        return Package.read(
            {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        )


def test_functions_share_a_state() -> None:
    package = _counters()
    assert package.default_function == "twice"
    assert sorted(package.functions) == ["once", "twice"]
    once, twice = Interpreter(package, "once"), Interpreter(package)
    state = once.new_state()
    assert {name: one.dtype for name, one in state.items()} == {"kept": torch.float16}
    weight = np.arange(64.0).reshape(32, 2)
    kept = state["kept"]
    for interpreter, factor, total in ((once, 1, 1), (twice, 2, 2), (once, 1, 3)):
        found: Any = interpreter.run({"x": np.ones(2)}, state)["y"]
        np.testing.assert_array_equal(found, weight @ np.full(2, factor * total))
        assert state["kept"].tolist() == [total, total]
    assert kept.tolist() == [0, 0]
    found = once.run({"x": np.ones(2)})["y"]  # without one, it starts from zeros
    np.testing.assert_array_equal(found, weight @ np.ones(2))
    with pytest.raises(BadInput, match=r"the state 'kept' of shape \(2,\) is missing"):
        once.run({"x": np.ones(2)}, {"kept": torch.zeros(3)})
    with pytest.raises(RuntimeFailed, match=r"no function 'thrice'; there is: once, twice"):
        Interpreter(package, "thrice")


def test_a_state_keeps_float16() -> None:
    package = _counters()
    once = Interpreter(package, "once")
    state = once.new_state()
    for _ in range(2):
        once.run({"x": np.array([2048.0, 1.0])}, state)
    once.run({"x": np.array([1.0, 1.0])}, state)
    assert state["kept"].tolist() == [4096.0, 3.0]
