"""Turns a parsed ``INetworkDefinition`` into the plain ``Network``; runs in the child process.

``get_layer`` returns the base class, whatever the layer is. The kind must be read before the class
is set, because the activation and pooling classes reuse ``type`` for a type of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from edgekit.spec import Array
from edgekit_tensorrt.network import Layer, Network, Tensor, Weights

# LayerType to the class of the bindings and the attributes to keep. What an older version lacks
# is left out.
_CONVOLUTION = (
    "num_output_maps num_groups kernel_size_nd stride_nd dilation_nd pre_padding post_padding "
    "padding_mode kernel bias"
)
_QUANTIZE = "axis block_shape to_type"
_ATTENTION = "attention"
KINDS = {
    "ACTIVATION": ("IActivationLayer", "type alpha beta"),
    "ASSERTION": ("IAssertionLayer", "message"),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _ATTENTION),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _ATTENTION),
    "CAST": ("ICastLayer", "to_type"),
    "CONCATENATION": ("IConcatenationLayer", "axis"),
    "CONDITION": ("IConditionLayer", "conditional"),
    "CONDITIONAL_INPUT": ("IIfConditionalInputLayer", "conditional"),
    "CONDITIONAL_OUTPUT": ("IIfConditionalOutputLayer", "conditional"),
    "CONSTANT": ("IConstantLayer", "shape weights"),
    "CONVOLUTION": ("IConvolutionLayer", _CONVOLUTION),
    "CUMULATIVE": ("ICumulativeLayer", "op exclusive reverse"),
    "DECONVOLUTION": ("IDeconvolutionLayer", _CONVOLUTION),
    "DEQUANTIZE": ("IDequantizeLayer", _QUANTIZE),
    "DYNAMIC_QUANTIZE": ("IDynamicQuantizeLayer", _QUANTIZE + " block_size scale_type"),
    "EINSUM": ("IEinsumLayer", "equation"),
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "FILL": ("IFillLayer", "operation shape alpha beta is_alpha_beta_int64 to_type"),
    "GATHER": ("IGatherLayer", "axis mode num_elementwise_dims"),
    "GRID_SAMPLE": ("IGridSampleLayer", "interpolation_mode align_corners sample_mode"),
    "IDENTITY": ("IIdentityLayer", ""),
    "ITERATOR": ("IIteratorLayer", "loop axis reverse"),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", "cache_mode update_form"),
    "LOOP_OUTPUT": ("ILoopOutputLayer", "loop axis kind"),
    "LRN": ("ILRNLayer", "window_size alpha beta k"),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", "op0 op1"),
    "NMS": ("INMSLayer", "bounding_box_format topk_box_limit"),
    "NON_ZERO": ("INonZeroLayer", ""),
    "NORMALIZATION": ("INormalizationLayer", "epsilon axes num_groups is_v2"),
    "ONE_HOT": ("IOneHotLayer", "axis"),
    "PADDING": ("IPaddingLayer", "pre_padding_nd post_padding_nd"),
    "PARAMETRIC_RELU": ("IParametricReLULayer", ""),
    "POOLING": (
        "IPoolingLayer",
        "type window_size_nd stride_nd pre_padding post_padding padding_mode blend_factor "
        "average_count_excludes_padding",
    ),
    "QUANTIZE": ("IQuantizeLayer", _QUANTIZE),
    "RECURRENCE": ("IRecurrenceLayer", "loop"),
    "REDUCE": ("IReduceLayer", "op axes keep_dims"),
    "RESIZE": (
        "IResizeLayer",
        "shape scales resize_mode coordinate_transformation selector_for_single_pixel "
        "nearest_rounding cubic_coeff exclude_outside",
    ),
    "REVERSE_SEQUENCE": ("IReverseSequenceLayer", "batch_axis sequence_axis"),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", "interleaved rotary_embedding_dim"),
    "SCALE": ("IScaleLayer", "mode channel_axis shift scale power"),
    "SCATTER": ("IScatterLayer", "axis mode"),
    "SELECT": ("ISelectLayer", ""),
    "SHAPE": ("IShapeLayer", ""),
    "SHUFFLE": (
        "IShuffleLayer",
        "first_transpose reshape_dims second_transpose zero_is_placeholder",
    ),
    "SLICE": ("ISliceLayer", "start shape stride axes mode"),
    "SOFTMAX": ("ISoftMaxLayer", "axes"),
    "SQUEEZE": ("ISqueezeLayer", ""),
    "TOPK": ("ITopKLayer", "op k axes"),
    "TRIP_LIMIT": ("ITripLimitLayer", "loop kind"),
    "UNARY": ("IUnaryLayer", "op"),
    "UNSQUEEZE": ("IUnsqueezeLayer", ""),
}
_WEIGHTS = {"weights", "kernel", "bias", "shift", "scale", "power"}
# Attributes of what groups layers; each group gets a number, the same for all its layers.
_GROUPS = {"loop", "conditional", "attention"}
_OF_ATTENTION = ("causal", "causal_kind", "norm_op", "decomposable", "normalization_quantize_scale")


def network_from(module: Any, definition: Any) -> Network:
    """The plain form of ``definition``, a network of the bindings ``module``."""
    return _Dump(module).network(definition)


class _Dump:
    """Names for tensors and groups. The bindings give one object for one tensor while it lives."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []  # an id is unique only as long as its object lives
        self._groups: dict[int, int] = {}
        self._tensors: dict[str, Tensor] = {}
        self._duplicates: list[str] = []

    def network(self, definition: Any) -> Network:
        inputs = [definition.get_input(index) for index in range(definition.num_inputs)]
        outputs = [definition.get_output(index) for index in range(definition.num_outputs)]
        return Network(
            name=str(definition.name),
            inputs=tuple(self._name(tensor) for tensor in inputs),
            outputs=tuple(self._name(tensor) for tensor in outputs),
            layers=tuple(
                self._layer(definition.get_layer(index)) for index in range(definition.num_layers)
            ),
            tensors=self._tensors,
            duplicates=tuple(self._duplicates),
        )

    def _name(self, tensor: Any) -> str:
        known = self._names.get(id(tensor))
        if known is not None:
            return known
        name = str(tensor.name)
        if name in self._tensors:
            self._duplicates.append(name)
            number = 2
            while f"{name}#{number}" in self._tensors:
                number += 1
            name = f"{name}#{number}"
        self._names[id(tensor)] = name
        self._alive.append(tensor)
        shape = _plain(tensor.shape)
        self._tensors[name] = Tensor(name, tensor.dtype.name, tuple(shape or ()))
        return name

    def _layer(self, layer: Any) -> Layer:
        kind = layer.type.name
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        class_name, attributes = KINDS.get(kind, ("", ""))
        weights: dict[str, Weights] = {}
        values: dict[str, Any] = {}
        if hasattr(self._module, class_name):
            layer.__class__ = getattr(self._module, class_name)
            for attribute in attributes.split():
                value = _get(layer, attribute)
                if attribute in _GROUPS:
                    values |= self._group(attribute, value)
                elif attribute in _WEIGHTS and not isinstance(value, (int, float)):
                    weights |= {attribute: _weights(value)} if value is not None else {}
                else:
                    values[attribute] = _plain(value)
        return Layer(
            kind=kind,
            name=str(layer.name),
            inputs=tuple(None if tensor is None else self._name(tensor) for tensor in inputs),
            outputs=tuple(self._name(tensor) for tensor in outputs if tensor is not None),
            attributes=values,
            weights={role: one for role, one in weights.items() if one.count},
            metadata=str(_get(layer, "metadata") or ""),
        )

    def _group(self, attribute: str, group: Any) -> dict[str, Any]:
        if group is None:
            return {}
        self._alive.append(group)
        number = self._groups.setdefault(id(group), len(self._groups))
        more = {name: _plain(_get(group, name)) for name in _OF_ATTENTION if hasattr(group, name)}
        return {attribute: number} | (more if attribute == "attention" else {})


def _get(owner: Any, attribute: str) -> Any:
    """None where this version lacks it, or where it is not set: then reading may raise."""
    try:
        return getattr(owner, attribute)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """A JSON value: an enumeration's name, dims as a list, None for dims that are not set."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(type(value), "__members__") or hasattr(value, "is_network_input"):
        return value.name  # of an enumeration's value, or of a tensor
    try:
        return [_plain(one) for one in value] if isinstance(value, Iterable) else _listed(value)
    except ValueError:  # the length of unset dims is negative
        return None


def _listed(value: Any) -> list[Any] | None:
    try:
        return [_plain(value[index]) for index in range(len(value))]
    except TypeError:
        return None


def _weights(value: Any) -> Weights:
    """From an array or, for dtypes that numpy has no name for, from a ``Weights`` object."""
    if not isinstance(value, np.ndarray):
        dtype, count = str(value.dtype.name), int(value.size)
        raw = _raw(value)
        return Weights(dtype, count, raw if raw is not None else _named(value))
    named = {"float32": "FLOAT", "float16": "HALF"}
    return Weights(named.get(value.dtype.name, value.dtype.name.upper()), value.size, value.copy())


_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "FP8": 8, "E8M0": 8, "INT4": 4, "FP4": 4}
_BITS |= {"INT8": 8, "UINT8": 8, "INT32": 32, "INT64": 64, "BOOL": 8}
_NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
}
_NUMPY |= {"INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


class _NativeWeights(ctypes.Structure):
    """``nvinfer1::Weights``."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _raw(weights: Any) -> Array | None:
    """The array behind a ``Weights`` object, which offers no way to its own BF16, FP8 or INT4.

    The bindings keep a pointer to the native value right behind the object's head (two words).
    Its type and count must match what the object itself says.
    """
    dtype, count = str(weights.dtype.name), int(weights.size)
    if not count:
        return None
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    if not address:
        return None
    native = _NativeWeights.from_address(address)
    if (native.type, native.count) != (int(weights.dtype), count) or not native.values:
        return None
    content = ctypes.string_at(native.values, (count * _BITS[dtype] + 7) // 8)
    return np.frombuffer(content, dtype=_NUMPY.get(dtype, np.uint8))


def _named(weights: Any) -> Array | None:
    """What ``Weights.numpy`` gives, if that is an array: for some dtypes it is the object."""
    value = weights.numpy()
    return value.copy() if isinstance(value, np.ndarray) else None
