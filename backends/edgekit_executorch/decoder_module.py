"""A decoder as PyTorch sees it: the table of tokens, the cache, and calls of ready-made delegates.

A delegate is opaque to the capture, which needs the shapes of its results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.blocks import Blocks
from edgekit.decoder import Decoder, DecoderSpec, Weight
from edgekit.graph import quiet
from edgekit_executorch.decoder_delegates import Delegates
from edgekit_executorch.xnnpack_graph import Graph

with quiet():
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir.lowered_backend_module import LoweredBackendModule

Shapes = Callable[..., list[Tensor]]


class _Shapes:
    """What ExecuTorch asks of the program that a delegate was made from: results for arguments of
    some shapes, and how many."""

    def __init__(self, shapes: Shapes, results: int) -> None:
        output = SimpleNamespace(args=([None] * results,))
        self._shapes = shapes
        self.graph = SimpleNamespace(nodes=(), output_node=lambda: output)

    def module(self) -> Shapes:
        return self._shapes


class _Delegate(nn.Module):
    """A graph of XNNPACK, with the constants that it wants as arguments."""

    def __init__(self, graph: Graph, shapes: Shapes, results: int) -> None:
        super().__init__()
        for index, values in enumerate(graph.given):
            self.register_buffer(f"factor_{index}", torch.from_numpy(values))
        self._factors = len(graph.given)
        content, constants = graph.payload()
        self._lowered = LoweredBackendModule(
            _Shapes(shapes, results), XnnpackBackend.__name__, content, [], constants
        )
        self._lowered.meta = {"debug_handle_map": {}}

    def forward(self, *args: Tensor) -> list[Tensor]:
        factors = [getattr(self, f"factor_{index}") for index in range(self._factors)]
        results: list[Tensor] = self._lowered(*args, *factors)
        return results


class Table(nn.Module):
    """Rows of a matrix, float32, from the codes that it has."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._blocks = isinstance(weight, Blocks)
        if not isinstance(weight, Blocks):
            self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(weight)))
            return
        # Symmetric bytes also for 4 bits: the runtime has no kernel that takes two from a byte.
        signed = (weight.codes.astype(np.int16) - weight.middle).astype(np.int8)
        self.register_buffer("codes", torch.from_numpy(signed))
        self.register_buffer("scales", _narrow(weight.scales))
        offsets = None if weight.offsets is None else _narrow(weight.offsets)
        self.register_buffer("offsets", offsets)

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 [n] to float32 [n, columns]."""
        codes = self.codes.index_select(0, tokens)
        if not self._blocks:
            return codes
        scales = self.scales.index_select(0, tokens).float().unsqueeze(-1)
        rows = codes.float().view(-1, scales.shape[1], codes.shape[1] // scales.shape[1]) * scales
        if self.offsets is not None:
            rows = rows + self.offsets.index_select(0, tokens).float().unsqueeze(-1)
        return rows.view(-1, codes.shape[1])


def _narrow(values: np.ndarray) -> Tensor:
    """Float16 where that is exact, as for scales that a file has so."""
    half = values.astype(np.float16)
    exact = bool((half.astype(np.float32) == values).all())
    return torch.from_numpy(half if exact else np.ascontiguousarray(values))


class Steps(nn.Module):
    """One pass over N tokens: results for R rows of them.

    Tokens, slots and rows are int64; cosines and sines float32 [N, 1, head_dim]; the mask is
    float32 [heads / kv_heads * N, S], added to the scores of the first S slots.
    """

    def __init__(
        self,
        decoder: Decoder,
        delegates: Delegates,
        slots: int,
        report: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.spec = spec = decoder.spec
        self.table = Table(decoder.weights["embedding"])
        # One slot more than is ever seen: to see all might be no copy, which the capture would
        # have to decide for every size at once.
        shape = (spec.kv_heads, slots + 1, spec.head_dim)
        for index in range(spec.layers):
            self.register_buffer(f"keys_{index}", torch.zeros(shape))
            self.register_buffer(f"values_{index}", torch.zeros(shape))
        self.first = _Delegate(delegates.first(), lambda *args: _queries(spec, args[0]), 3)
        self.layers = nn.ModuleList()
        for index in range(spec.layers):
            report(f"layer {index + 1} of {spec.layers}")
            last = index + 1 == spec.layers
            shapes = _hidden if last else _layer(spec)
            self.layers.append(_Delegate(delegates.layer(index), shapes, 1 if last else 4))
        self.head = _Delegate(delegates.head(), _head(spec), 2)

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, slots: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [R, vocabulary] and the hidden state after the last norm [R, hidden]."""
        x = self.table(tokens)
        queries, *new = self.first(x, cos, sin)
        seen = mask.shape[1]
        for index, layer in enumerate(self.layers):
            held = self._write(index, new, slots, seen)
            inputs = (x, queries, *held, mask)
            if index + 1 < len(self.layers):
                x, queries, *new = layer(*inputs, cos, sin)
            else:
                (x,) = layer(*inputs)
        hidden, logits = self.head(x.index_select(0, rows))
        return logits, hidden

    def _write(
        self, index: int, new: Sequence[Tensor], slots: Tensor, seen: int
    ) -> tuple[Tensor, ...]:
        held = (getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"))
        for buffer, rows in zip(held, new, strict=True):
            buffer[:, slots] = rows
        return tuple(buffer[:, :seen] for buffer in held)


def _queries(spec: DecoderSpec, hidden: Tensor) -> list[Tensor]:
    tokens = hidden.shape[0]
    group = spec.heads // spec.kv_heads
    return [
        hidden.new_zeros((spec.kv_heads, count, spec.head_dim))
        for count in (group * tokens, tokens, tokens)
    ]


def _hidden(*args: Tensor) -> list[Tensor]:
    return [torch.zeros_like(args[0])]


def _layer(spec: DecoderSpec) -> Shapes:
    return lambda *args: [torch.zeros_like(args[0]), *_queries(spec, args[0])]


def _head(spec: DecoderSpec) -> Shapes:
    return lambda x, *_: [torch.zeros_like(x), x.new_zeros((x.shape[0], spec.vocabulary))]
