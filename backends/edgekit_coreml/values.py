"""Values on their way into, through and out of a program, in the types that it declares.

A float16 value is held in float32 after it was rounded to float16; ``HELD`` has the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import BadInput
from edgekit.spec import Array
from edgekit_coreml.package import Feature, Function, Variable

# MIL's types as they are held while a program runs. Of the unsigned types wider than a byte torch
# has hardly more than the name, and int64 is in no program but for labels.
HELD = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float32,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int32,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int32,
    "uint64": torch.int32,
}
STORED = {"fp16": torch.float16}  # of a state, where not as held


def fixed_shape(variable: Variable) -> tuple[int, ...]:
    """The shape of a state, which has no open size."""
    return tuple(size or 0 for size in variable.shape)


def upheld(stored: Tensor) -> Tensor:
    """A state's value as operations take it."""
    return stored.float() if stored.dtype == torch.float16 else stored


def held(value: Any, variable: Variable) -> Any:
    """A result in the type and shape that its operation declares."""
    if not isinstance(value, Tensor):
        return value  # a list, or what a classifier gives
    if not _has_shape(variable, value.shape):
        declared = "x".join("?" if size is None else str(size) for size in variable.shape)
        raise ValueError(f"it gave the shape {tuple(value.shape)}, and declares {declared}")
    return _rounded(value, variable.dtype)


def _has_shape(variable: Variable, shape: Sequence[int]) -> bool:
    return len(variable.shape) == len(shape) and all(
        size is None or size == found for size, found in zip(variable.shape, shape, strict=True)
    )


def _rounded(tensor: Tensor, dtype: str) -> Tensor:
    if dtype == "fp16":
        return tensor.to(torch.float16).to(torch.float32)
    wanted = HELD[dtype]
    if wanted.is_floating_point or tensor.dtype == wanted:
        return tensor.to(wanted)
    if wanted == torch.bool:
        return tensor != 0
    if tensor.is_floating_point():
        # As ARM converts: toward zero, to the nearest end of the range, NaN to 0.
        range_ = torch.iinfo(wanted)
        tensor = tensor.double().nan_to_num(0.0).clamp(range_.min, range_.max)
    return tensor.to(torch.int64).to(wanted)


def held_constant(value: Any) -> Any:
    """A constant as operations take it."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype in (np.int64, np.uint32, np.uint64):
        # Of an array without axes clip makes a scalar.
        value = np.asarray(np.clip(value, *_int32_range(value))).astype(np.int32)
    elif value.dtype == np.uint16:
        value = value.astype(np.int32)
    tensor = torch.from_numpy(np.asarray(value) if value.flags.writeable else value.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


def _int32_range(value: Array) -> tuple[Any, Any]:
    top = value.dtype.type(2**31 - 1)
    return (value.dtype.type(0 if value.dtype.kind == "u" else -(2**31)), top)


def fed(function: Function, feeds: Mapping[str, Array]) -> tuple[Tensor, ...]:
    """The function's inputs, in its order and its types. Raises ``BadInput``."""
    features = {one.name: one for one in function.input_features}
    for name in feeds:
        if name not in features:
            raise BadInput(f"the model has no input {name!r}; it takes: {', '.join(features)}")
    return tuple(_fed_input(one, features[one.name], feeds) for one in function.inputs)


def _fed_input(variable: Variable, feature: Feature, feeds: Mapping[str, Array]) -> Tensor:
    array = feeds.get(variable.name)
    if array is None:
        if not feature.optional:
            raise BadInput(f"the input {variable.name!r} is missing")
        array = np.full(feature.shape, feature.default, np.float32)
    tensor = torch.from_numpy(np.array(array))  # a copy: the array may be read-only
    if not variable.shape and tensor.numel() == 1:
        tensor = tensor.reshape(())  # the description cannot say scalar, and says 1
    _check_shape(variable, feature, tuple(tensor.shape))
    return _rounded(tensor, variable.dtype)


def _check_shape(variable: Variable, feature: Feature, shape: tuple[int, ...]) -> None:
    fits = _has_shape(variable, shape)
    if fits and feature.ranges and shape:
        fits = len(feature.ranges) == len(shape) and all(
            low <= size and (high < 0 or size <= high)
            for size, (low, high) in zip(shape, feature.ranges, strict=True)
        )
    if fits and feature.shapes:
        fits = shape in feature.shapes
    if not fits:
        raise BadInput(f"the input {variable.name!r} cannot have the shape {shape}")


def checked_state(function: Function, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for one in function.states:
        if one.name not in state or tuple(state[one.name].shape) != one.shape:
            raise BadInput(f"the state {one.name!r} of shape {one.shape} is missing")
    return state


_EXPORTED = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int8": torch.int8,
}


def exported(feature: Feature, value: Any) -> object:
    """A result as the model's user gets it, with memory of its own."""
    match feature.kind:
        case "string" | "int64" | "double" | "dictionary":
            return value
        case "image" if feature.dtype == "uint8":
            return value.round().nan_to_num(0.0).clamp(0, 255).to(torch.uint8).numpy()
    array: object = value.to(_EXPORTED[feature.dtype], copy=True).contiguous().numpy()
    return array
