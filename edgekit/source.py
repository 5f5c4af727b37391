"""MODEL, as typed or passed, to a ``Model``: a zoo name, the user's file, or a module in hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from edgekit.errors import (
    BadInput,
    BadModel,
    EdgekitError,
    MissingRuntime,
    UnknownName,
    UsageError,
)
from edgekit.language import LanguageModel
from edgekit.model import Model
from edgekit.registry import language_models, load_language, load_zoo_model, zoo_models
from edgekit.samples import draw_samples, read_samples, regroup
from edgekit.spec import TensorSpec, parse_spec

if TYPE_CHECKING:
    from torch import nn

Inputs = object  # example tensors, input specs, or texts like "x=1x3x224x224"


def resolve(
    model: str | nn.Module | Model,
    inputs: Inputs = None,
    *,
    weights: Path | None = None,
    samples: Path | None = None,
) -> Model:
    """The model with its inputs, weights and samples, ready to capture.

    Raises ``UnknownName``, ``BadModel`` or ``BadInput``.
    """
    if find_torch() is None:
        raise MissingRuntime("making artifacts", "torch", extra="export")
    if isinstance(model, str):
        found = _from_text(model, inputs, weights)
    elif isinstance(model, Model):
        found = _with_inputs(model, inputs)
    else:
        found = _from_module(model, inputs, origin=f"the model passed ({type(model).__name__})")
    if weights is not None and not _is_zoo(model):
        from edgekit.weights import load_weights

        load_weights(found.module, weights)
    if samples is not None:
        read = read_samples(samples, found.inputs, found.image)
        return found.with_samples(read, f"the user's files: {samples.name}")
    if found.samples:
        return replace(found, samples=regroup(found.samples, found.inputs))
    drawn = draw_samples(found.inputs, found.image)
    return found.with_samples(drawn, "random, seed 0", drawn=True)


def find_language(model: object, *, weights: Path | None = None) -> LanguageModel | None:
    """The language model that ``model`` names or is, or None where it is something else.

    A name of the zoo, a Hugging Face folder, or a GGUF file. Raises ``BadModel``, ``DamagedFile``
    or ``MissingRuntime``.
    """
    if isinstance(model, LanguageModel):
        return model
    if not isinstance(model, str) or _is_file_reference(model):
        return None
    published = Path(model)
    is_files = model.endswith(".gguf") or os.path.isdir(model)
    if not is_files and model not in language_models():
        return None
    if find_torch() is None:
        raise MissingRuntime("making artifacts", "torch", extra="export")
    if is_files:
        if weights is not None:
            raise UsageError(f"{model} is the model and its weights; leave out --weights.")
        return load_language(published)
    found = load_zoo_model(model, weights=weights)
    return found if isinstance(found, LanguageModel) else None


def find_torch() -> object | None:
    """torch's import spec, or None where it is not installed."""
    return importlib.util.find_spec("torch")


def _is_zoo(model: object) -> bool:
    return isinstance(model, str) and not _is_file_reference(model)


def _is_file_reference(text: str) -> bool:
    return ".py:" in text or text.endswith(".py")


def _from_text(text: str, inputs: Inputs, weights: Path | None) -> Model:
    if _is_file_reference(text):
        return _from_file(text, inputs)
    if "/" in text or "\\" in text:
        raise UnknownName("model", text, zoo_models(), hint="Write path/to/file.py:factory.")
    specs = _specs(inputs) if inputs else ()
    found = load_zoo_model(text, weights=weights, inputs=specs or ())
    if isinstance(found, LanguageModel):
        raise BadModel(f"{text} is a language model; edgekit export and generate are for it.")
    return _with_inputs(found, inputs)


def _from_file(text: str, inputs: Inputs) -> Model:
    name, _, factory_name = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    path = Path(name)
    if not factory_name:
        raise BadModel(f"{text}: name the factory too: {path}:FACTORY.")
    user_file = _import(path)
    factory = getattr(user_file, factory_name, None)
    if not callable(factory):
        there = [
            key
            for key, value in vars(user_file).items()
            if callable(value) and getattr(value, "__module__", "") == user_file.__name__
        ]
        raise UnknownName("factory", factory_name, there, hint=f"It is looked for in {path}.")
    made = _call(factory, text)
    if isinstance(made, Model):
        return _with_inputs(replace(made, name=_name(made, path)), inputs)
    if inputs is None and callable(getattr(user_file, "example_inputs", None)):
        inputs = _call(user_file.example_inputs, f"{path}:example_inputs")
    return replace(_from_module(made, inputs, origin=text), name=path.stem)


def _name(model: Model, path: Path) -> str:
    return model.name if model.name != "model" else path.stem


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadModel(f"there is no file {path}; write path/to/file.py:factory.")
    name = f"edgekit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadModel(f"{path} is not a Python file.")
    user_file = importlib.util.module_from_spec(spec)
    sys.modules[name] = user_file  # dataclasses and pickling look a class's module up there
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that the file can import its neighbours, now and later
    _call(lambda: spec.loader.exec_module(user_file), str(path))  # type: ignore[union-attr]
    return user_file


def _call(function: Callable[[], object], what: str) -> object:
    """Call the user's code; whatever it raises becomes a sentence with its line."""
    from edgekit.graph import source_line

    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            return function()
    except EdgekitError:
        raise
    except (Exception, SystemExit) as cause:  # the user's code may raise anything
        line = source_line(cause)
        raise BadModel(
            f"{what} raised {type(cause).__name__}{line and ' at ' + line}: {cause}"
        ) from cause


def _from_module(module: object, inputs: Inputs, *, origin: str) -> Model:
    from edgekit.capture import arrays_from_examples, check_module, specs_from_examples

    checked = check_module(module, origin)
    if inputs is None:
        raise BadInput(
            f"{origin}: the inputs are not known; add a function example_inputs() beside the "
            "factory, or say --input NAME=1x3x224x224."
        )
    specs = _specs(inputs)
    if specs is not None:
        return Model(checked, specs)
    model = Model(checked, specs_from_examples(checked, inputs))
    given = arrays_from_examples(checked, inputs)
    drawn = draw_samples(model.inputs)[1:] if all(_free(spec) for spec in model.inputs) else ()
    extra = f" and {len(drawn)} random ones, seed 0" if drawn else ""
    source = f"the example inputs{extra}"
    return model.with_samples((given, *drawn), source, drawn=bool(drawn))


def _free(spec: TensorSpec) -> bool:
    """Whether any value will do: an integer may index a table, so only the user's is safe."""
    return spec.dtype == "float32"


def _with_inputs(model: Model, inputs: Inputs) -> Model:
    """A ready-made model, checked, with other input sizes; samples that do not fit are dropped."""
    from edgekit.capture import check_module

    check_module(model.module, model.name)
    specs = _specs(inputs) if inputs else None
    if not specs or specs == model.inputs:
        return model
    known = {spec.name for spec in model.inputs}
    for spec in specs:
        if spec.name not in known:
            raise UnknownName("input", spec.name, sorted(known))
    sizes = {spec.name: spec for spec in specs}
    merged = tuple(sizes.get(spec.name, spec) for spec in model.inputs)
    fits = all(
        new.shape[1:] == old.shape[1:] and new.dtype == old.dtype
        for new, old in zip(merged, model.inputs, strict=True)
    )
    return replace(model, inputs=merged, samples=model.samples if fits else ())


def _specs(inputs: Inputs) -> tuple[TensorSpec, ...] | None:
    """Input specs where ``inputs`` are texts or specs; None where they are example values."""
    given = [inputs] if isinstance(inputs, (str, TensorSpec)) else inputs
    if not isinstance(given, Sequence) or isinstance(given, Mapping) or not given:
        return None
    if not all(isinstance(item, (str, TensorSpec)) for item in given):
        return None
    specs = tuple(parse_spec(item) if isinstance(item, str) else item for item in given)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise BadInput(f"an input is given twice: {', '.join(names)}.")
    return specs
