"""PyTorch module to captured program, and its eager outputs. Torch stands at its top."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

import numpy as np
import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from edgekit.errors import BadInput, BadModel, CaptureFailed, NotProven
from edgekit.graph import first_line, quiet, source_line
from edgekit.model import Model
from edgekit.program import Program, Reference
from edgekit.spec import DTYPES, Array, Arrays, Dim, TensorSpec, check_arrays


def specs_from_examples(module: nn.Module, examples: object) -> tuple[TensorSpec, ...]:
    """Input specs from example tensors: one, a sequence in ``forward``'s order, or a mapping."""
    named: Mapping[str, object]
    if isinstance(examples, Mapping):
        named = examples
    else:
        given = examples if isinstance(examples, (tuple, list)) else (examples,)
        names = _parameters(module)
        if len(given) > len(names):
            raise BadModel(
                f"there are {len(given)} example inputs and forward takes {len(names)}: "
                f"{', '.join(names) or 'nothing'}."
            )
        named = dict(zip(names, given, strict=False))
    if not named:
        raise BadModel("there is no example input; give at least one tensor.")
    return tuple(_spec_from_value(name, value) for name, value in named.items())


def _spec_from_value(name: str, value: object) -> TensorSpec:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise BadModel(
            f"example input {name!r} is a {type(value).__name__}; give tensors or numpy arrays."
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadModel(
            f"example input {name!r} is {dtype}; edgekit takes {', '.join(DTYPES)}. "
            "Convert it, for example with .float()."
        )
    return TensorSpec(name, tuple(value.shape), dtype)


def arrays_from_examples(module: nn.Module, examples: object) -> dict[str, Array]:
    """The same examples as numpy, by name."""
    specs = specs_from_examples(module, examples)
    if isinstance(examples, Mapping):
        values = list(examples.values())
    else:
        values = list(examples) if isinstance(examples, (tuple, list)) else [examples]
    arrays = (value.numpy(force=True) if isinstance(value, Tensor) else value for value in values)
    return {spec.name: np.asarray(array) for spec, array in zip(specs, arrays, strict=True)}


def check_module(module: object, origin: str) -> nn.Module:
    """``module`` if it is one that edgekit can take. Raises ``BadModel`` with the remedy."""
    if not isinstance(module, nn.Module):
        raise BadModel(
            f"{origin} returned {_a(type(module).__name__)}; return a torch.nn.Module "
            "(or an edgekit.Model)."
        )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise BadModel(f"{origin}: {name} is on {tensor.device}; call .cpu() on the model.")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise BadModel(
                f"{origin}: {name} is {str(tensor.dtype).removeprefix('torch.')}; edgekit starts "
                "from float32. Call .float() on the model and choose --precision instead."
            )
    return module


def _a(noun: str) -> str:
    return "None" if noun == "NoneType" else f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the modes the user had set come back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def reference_from(model: Model) -> Reference:
    """Run the eager model on its samples, twice.

    Raises ``NotProven`` for outputs that are not finite or not the same both times: nothing
    could be proven against them.
    """
    samples = tuple(check_arrays(model.inputs, sample) for sample in model.samples)
    with _inference(model.module):
        with _unchanged_buffers(model.module):
            expected = tuple(_run_eager(model, sample) for sample in samples)
        again = [_run_eager(model, sample) for sample in samples]
    for index, (first, second) in enumerate(zip(expected, again, strict=True)):
        for name, values in first.items():
            if not np.isfinite(values).all():
                raise NotProven(
                    f"the eager model's output {name!r} holds NaN or infinity on sample {index}; "
                    "an export of it could not be proven. Check the weights and the samples."
                )
            if not np.array_equal(values, second[name]):
                raise NotProven(
                    f"the eager model's output {name!r} changes from run to run (dropout or "
                    "random numbers in eval mode?); an export of it could not be proven."
                )
    return Reference(samples, expected, model.samples_source)


def eager_outputs(model: Model, samples: Sequence[Arrays]) -> list[dict[str, Array]]:
    """What the eager model answers to inputs that need no proof of their own: labelled data."""
    with _inference(model.module):
        return [_run_eager(model, check_arrays(model.inputs, sample)) for sample in samples]


def _run_eager(model: Model, sample: Arrays) -> dict[str, Array]:
    call = _bind(model.module, [spec.name for spec in model.inputs])
    tensors = [torch.from_numpy(np.array(sample[spec.name])) for spec in model.inputs]
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results, forward may print
            result = call(*tensors)
    except Exception as cause:  # the user's code may raise anything
        line = source_line(cause)
        raise BadModel(
            f"the model raised {type(cause).__name__}{line and ' at ' + line} when run on its "
            f"sample inputs ({', '.join(map(str, model.inputs))}): {first_line(cause)}"
        ) from cause
    for spec, tensor in zip(model.inputs, tensors, strict=True):
        if not np.array_equal(tensor.numpy(), sample[spec.name]):
            raise CaptureFailed(
                f"the model writes into its input {spec.name!r}; a device's runtime does not "
                "hand that back. Work on a copy, and return what is needed."
            )
    return {name: tensor.numpy(force=True).copy() for name, tensor in _named_outputs(model, result)}


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Refuses a model that keeps state between runs, and gives it back as it was."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    after = dict(module.named_buffers())
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    for name in changed:
        after[name].copy_(before[name])
    if changed:
        raise CaptureFailed(
            f"the model changes its own buffer {changed[0]!r} when it runs; edgekit exports models "
            "without state. Take the value as an input, and return the new one."
        )


def _named_outputs(model: Model, result: object) -> list[tuple[str, Tensor]]:
    """Tensors in the order of the graph's outputs, named after their place in the result."""
    leaves = pytree.tree_flatten_with_path(result)[0]
    named = [(_name(path), leaf) for path, leaf in leaves if leaf is not None]
    for name, leaf in named:
        if not isinstance(leaf, Tensor) or str(leaf.dtype).removeprefix("torch.") not in DTYPES:
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise BadModel(
                f"the model's output {name!r} is {kind}; return tensors of {', '.join(DTYPES)}."
            )
    if not named:
        raise BadModel("the model returns nothing; return at least one tensor.")
    if model.outputs and len(model.outputs) != len(named):
        raise BadModel(
            f"{len(model.outputs)} output names were given ({', '.join(model.outputs)}) and the "
            f"model returns {len(named)} tensors."
        )
    names = model.outputs or tuple(name for name, _ in named)
    return [(name, leaf) for name, (_, leaf) in zip(names, named, strict=True)]


def _name(path: Sequence[object]) -> str:
    """``("features", 1)`` becomes ``features_1``; a lone output is called ``output``."""
    keys = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    text = "_".join(keys)
    return text if text and not text[0].isdigit() else f"output_{text}".rstrip("_")


def _parameters(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind in (*kinds, inspect.Parameter.KEYWORD_ONLY)
    ]


class _ByKeyword(nn.Module):
    """Calls a model by keyword: for inputs that are not the first of ``forward``'s."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> object:
        return self.module(**dict(zip(self.names, tensors, strict=True)))


def _bind(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A module that takes tensors in the order of ``names``. Raises ``BadInput``."""
    parameters = _parameters(module)
    variadic = any(
        parameter.kind is inspect.Parameter.VAR_POSITIONAL
        for parameter in inspect.signature(module.forward).parameters.values()
    )
    # Converters make variables of parameter names; "0.weight", as in a bare nn.Sequential, is none.
    numbered = any(name[:1].isdigit() for name, _ in module.named_children())
    if (parameters[: len(names)] == list(names) or variadic) and not numbered:
        return module
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise BadInput(
            f"the model has no input {unknown[0]!r}; forward takes: "
            f"{', '.join(parameters) or 'nothing'}."
        )
    return _ByKeyword(module, names)


def capture(model: Model, reference: Reference, *, form: str | None = None) -> Program:
    """Capture ``model`` with ``torch.export``, in ``form`` where the model knows forms.

    Raises ``CaptureFailed`` with the user's source line.
    """
    module = model.module
    with _inference(module):
        if model.deploy is not None and form is not None:
            module = model.deploy(module, form, model.inputs).eval()
        exported = export_module(module, model.inputs)
    outputs = output_specs(exported, list(reference.expected[0]), model.inputs)
    return Program(
        exported,
        model.inputs,
        outputs,
        reference,
        name=model.name,
        licence=model.licence,
        image=model.image,
        labels=model.labels,
    )


def export_module(module: nn.Module, inputs: Sequence[TensorSpec]) -> ExportedProgram:
    """``torch.export`` of a module for inputs of these specs. Raises ``CaptureFailed``."""
    call = _bind(module, [spec.name for spec in inputs])
    chosen = {dim.name: _trace_size(dim) for spec in inputs for dim in spec.dims}
    examples = tuple(
        torch.zeros(spec.sizes(chosen), dtype=getattr(torch, spec.dtype)) for spec in inputs
    )
    dims = {
        dim.name: ExportDim(dim.name, min=dim.minimum, max=dim.maximum)
        for spec in inputs
        for dim in spec.dims
    }
    shapes: tuple[object, ...] = tuple(
        {axis: dims[dim.name] for axis, dim in enumerate(spec.shape) if isinstance(dim, Dim)}
        for spec in inputs
    )
    first = next(iter(inspect.signature(call.forward).parameters.values()))
    if first.kind is inspect.Parameter.VAR_POSITIONAL:
        shapes = (shapes,)
    with torch.no_grad(), quiet():
        try:
            return torch.export.export(call, examples, dynamic_shapes=shapes if dims else None)
        except Exception as cause:  # torch.export raises many classes, most of them private
            raise _capture_failed(cause, inputs) from cause


def _trace_size(dim: Dim) -> int:
    """A size to trace with: torch.export would fix a dim that is 1 in the example."""
    return min(max(dim.minimum, 2), dim.maximum)


def _capture_failed(cause: Exception, inputs: Sequence[TensorSpec]) -> CaptureFailed:
    line, text = source_line(cause), str(cause)
    place = f" at {line}" if line else ""
    if "data-dependent" in text:
        return CaptureFailed(
            f"the model cannot be captured{place}: its path depends on the values of a tensor. "
            "Write the choice with torch.where, or take the branch out of forward."
        )
    if "Constraints violated" in text:
        wanted = text.partition("Suggested fixes:")[2].strip().split("\n\n")[0]
        return CaptureFailed(
            f"the model does not allow every size of {', '.join(map(str, inputs))}: PyTorch asks "
            f"for {' and '.join(wanted.split(chr(10))) or first_line(cause)}. "
            "Narrow or fix that dim in --input."
        )
    return CaptureFailed(
        f"the model cannot be captured{place}: {type(cause).__name__}: {first_line(cause)}"
    )


def output_specs(
    exported: ExportedProgram, names: Sequence[str], inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """The outputs of ``exported`` under these names, in dims of ``inputs``.

    Raises ``CaptureFailed``.
    """
    nodes = {node.name: node for node in exported.graph.nodes}
    outputs = [
        output.arg.name
        for output in exported.graph_signature.output_specs
        if output.kind is OutputKind.USER_OUTPUT and getattr(output.arg, "name", None) in nodes
    ]
    constants = {
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    for name, node in zip(names, outputs, strict=True):
        if node in constants:
            raise CaptureFailed(
                f"the output {name!r} is a weight of the model and depends on no input; leave it "
                "out of what forward returns."
            )
    symbols = _symbols(exported, nodes, inputs)
    specs = []
    for name, node in zip(names, outputs, strict=True):
        value = nodes[node].meta["val"]
        shape = tuple(_dim_from_size(size, symbols) for size in value.shape)
        specs.append(TensorSpec(name, shape, str(value.dtype).removeprefix("torch.")))
    return tuple(specs)


def _symbols(
    exported: ExportedProgram, nodes: Mapping[str, torch.fx.Node], inputs: Sequence[TensorSpec]
) -> dict[object, Dim]:
    """PyTorch's symbol of each named input dim (it calls them s77 and the like)."""
    placeholders = [
        nodes[spec.arg.name].meta["val"]
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    return {
        size.node.expr: dim
        for value, spec in zip(placeholders, inputs, strict=True)
        for size, dim in zip(value.shape, spec.shape, strict=True)
        if isinstance(size, torch.SymInt) and isinstance(dim, Dim)
    }


def _dim_from_size(size: int | torch.SymInt, symbols: Mapping[object, Dim]) -> int | Dim:
    if isinstance(size, int):
        return size
    low = high = named = size.node.expr
    if named.free_symbols - symbols.keys():
        raise CaptureFailed(
            "an output's size depends on the values of a tensor (nonzero, unique or a boolean "
            "mask does that); return a mask or a fixed number of results instead."
        )
    for symbol, dim in symbols.items():
        # The sizes that models make of a dim (batch, 2 * batch, length // 2) grow with it.
        low, high = low.subs(symbol, dim.minimum), high.subs(symbol, dim.maximum)
        named = named.subs(symbol, sympy.Symbol(dim.name, integer=True, positive=True))
    return int(named) if named.is_number else Dim(str(named), int(low), int(high))
