"""Runs a decoder's ``.pte``: a chain or a tree of tokens at a time, any number up to ``WIDEST``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from edgekit.artifact import Artifact
from edgekit.decode.stepper import Rows, lineage
from edgekit.decoder import DecoderSpec
from edgekit.errors import BadInput, DamagedFile
from edgekit.graph import quiet
from edgekit.spec import Array
from edgekit_executorch.session import coded, set_threads, translated

with quiet():
    from executorch.extension.pybindings import portable_lib

MAIN = "model.pte"
# A pass sees this many slots, or a multiple of it: softmax adds up in lanes, and whole lanes of
# zeros more should change no bit of a sum. The tests measure that they do not.
SPAN = 64
WIDEST = 64  # tokens of a pass; wider ones were not tried
_HIDDEN = np.float32(-1e30)  # added to the score of a slot that is not to be seen


class ExecutorchStepper:
    """One decoder and its cache, from entry to exit of the context."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        facts: Any = artifact.provenance.get("decoder")
        try:
            self._spec = DecoderSpec.from_json(facts["spec"])
            self._capacity, self._slots = int(facts["capacity"]), int(facts["slots"])
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile("the artifact does not say what decoder it holds.") from cause
        self._artifact, self._threads = artifact, threads
        self._program: Any = None
        self._method: Any = None
        self._length = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def vocabulary(self) -> int:
        return self._spec.vocabulary

    @property
    def length(self) -> int:
        return self._length

    @property
    def widths(self) -> range:
        return range(1, min(WIDEST, self._capacity) + 1)

    @property
    def exact_widths(self) -> range:
        """All: measured on x86-64 with AVX-512, at the widths that README.md names."""
        return self.widths

    def __enter__(self) -> Self:
        source = self._artifact.source
        with translated("load the language model"):
            set_threads(self._threads)
            if isinstance(source, Path):
                self._program = portable_lib._load_program(str(source))
            else:
                self._program = portable_lib._load_program_from_buffer(source)
            self._method = self._program.load_method("forward")
            for index in range(self._spec.layers):
                # What was never written is multiplied by 0: it must be finite.
                self._method.get_attribute(f"keys_{index}").zero_()
                self._method.get_attribute(f"values_{index}").zero_()
        cos, sin = self._spec.rotation(self._capacity)
        self._cos = np.concatenate([cos, cos], -1)[:, None]
        self._sin = np.concatenate([sin, sin], -1)[:, None]
        self._length = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._method = self._program = None

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ``BadInput`` for more than there are."""
        if not 0 <= length <= self._length:
            raise BadInput(
                f"cannot rewind to {length} tokens: the cache holds {self._length}; rewind to 0 up "
                "to that."
            )
        self._length = length

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """Feed tokens and keep them. Raises ``BadInput`` or ``RuntimeFailed``."""
        fed = self._checked_tokens(tokens)
        wanted = _checked_rows(rows, len(fed))
        start, count = self._length, len(fed)
        seen = -(-(start + count) // SPAN) * SPAN
        if parents is None:
            depths, mask = np.arange(count), _chain_mask(start, count, seen)
        else:
            depths, ancestors = lineage(_checked_parents(parents, count))
            mask = _tree_mask(ancestors, start, seen)
        positions = start + depths
        group = self._spec.heads // self._spec.kv_heads
        arrays = (
            *(fed, self._cos[positions], self._sin[positions], np.tile(mask, (group, 1))),
            *(np.arange(start, start + count), wanted),
        )
        with coded("run the language model"):
            inputs = [torch.from_numpy(array) for array in arrays]
            logits, hidden = self._method(inputs, clone_outputs=False)
        self._length += count
        return Rows(logits.numpy(), hidden.numpy())

    def _checked_tokens(self, tokens: Sequence[int]) -> Array:
        count = len(tokens)
        if not 1 <= count <= self.widths[-1]:
            raise BadInput(
                f"a pass takes 1 to {self.widths[-1]} tokens, not {count}; feed them in parts."
            )
        if self._length + count > self._capacity:
            raise BadInput(
                f"{self._length + count} tokens do not fit the {self._capacity} that the cache "
                "holds; rewind, or export with a larger --context."
            )
        fed = np.asarray(tokens, np.int64)
        if fed.min() < 0 or fed.max() >= self._spec.vocabulary:
            raise BadInput(
                f"tokens are 0 to {self._spec.vocabulary - 1}, and {fed.tolist()} are not all."
            )
        return fed


def _checked_rows(rows: Sequence[int] | None, count: int) -> Array:
    if rows is None:
        return np.arange(count)
    wanted = np.asarray(rows, np.int64)
    if not 1 <= wanted.size <= count or wanted.min() < 0 or wanted.max() >= count:
        raise BadInput(f"rows are indices from 0 to {count - 1}, at most {count}, not {rows}.")
    return wanted


def _checked_parents(parents: Sequence[int], count: int) -> Sequence[int]:
    if len(parents) != count or any(not -1 <= p < i for i, p in enumerate(parents)):
        raise BadInput(
            f"{count} tokens need {count} parents, each the index of an earlier token or -1; "
            f"these are {list(parents)}."
        )
    return parents


def _chain_mask(start: int, count: int, seen: int) -> Array:
    """Float32 [count, seen]: each token sees what was kept, those before it, and itself."""
    mask = np.zeros((count, seen), np.float32)
    for row in range(count):
        mask[row, start + row + 1 :] = _HIDDEN
    return mask


def _tree_mask(seen: Array, start: int, span: int) -> Array:
    """Float32 [count, span]: each node sees what was kept, its ancestors and itself."""
    count = len(seen)
    mask = np.full((count, span), _HIDDEN)
    mask[:, :start] = 0
    mask[:, start : start + count][seen] = 0
    return mask
