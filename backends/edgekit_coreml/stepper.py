"""Runs a decoder's package with our own interpreter: one function a pass, one set of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.decode.stepper import Rows, lineage
from edgekit.errors import BadInput, DamagedFile
from edgekit.spec import Array
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Package
from edgekit_coreml.session import PREFIX

# Added to the score of a slot that a token must not see. A float16 has no -1e9, and a row that is
# infinite throughout has no softmax.
HIDDEN = -30000.0


@dataclass(frozen=True)
class _Size:
    """A function of the package: tokens of a pass, and rows that it answers."""

    name: str
    width: int
    rows: int


class InterpreterStepper:
    """A decoder's package, interpreted op by op in its own precisions.

    Functions share the package's states, and here the decoded weights too. ``exact_widths`` is
    empty: how a device adds up is not known.
    """

    exact_widths: Sequence[int] = ()
    faults: tuple[str, ...] = ()

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        facts: Any = artifact.provenance.get("decoder")
        try:
            sizes = [_Size(**each) for each in facts["functions"]]
            self._capacity = int(facts["capacity"])
            self._vocabulary = int(facts["spec"]["vocabulary"])
            self._states = list(facts["states"])
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"a decoder's provenance is malformed: {cause!r}") from cause
        self._sizes = sorted(sizes, key=lambda size: (size.width, size.rows))
        self._package: Package | None = None
        self._interpreters: dict[str, Interpreter] = {}
        self._decoded: dict[Any, Any] = {}  # weights, once for all functions
        self._state: dict[str, Any] = {}
        self._length = 0
        self.cause = ""

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    @property
    def length(self) -> int:
        return self._length

    @property
    def widths(self) -> Sequence[int]:
        return tuple(dict.fromkeys(size.width for size in self._sizes))

    @property
    def level(self) -> Literal["static", "emulated"]:
        """``static`` where the package holds an op that the interpreter lacks."""
        return "static" if self._unknown() else "emulated"

    @property
    def notes(self) -> tuple[str, ...]:
        split = any(name.startswith("keys_rest") for name in self._states)
        unknown = self._unknown()
        notes = (
            "Core ML's states are float16: each key and value is held as two, a float16 and what "
            "it lacks."
            if split
            else "Keys and values are held in float16."
        )
        if not unknown:
            return (notes,)
        return (notes, f"The MIL interpreter has no {', '.join(unknown)}; nothing was run.")

    def _unknown(self) -> list[str]:
        found = {op for size in self._sizes for op in self._function(size.name).unknown_ops}
        return sorted(found)

    def __enter__(self) -> Self:
        files = {
            name.removeprefix(PREFIX): content
            for name, content in self._artifact.files.items()
            if name.startswith(PREFIX)
        }
        self._package = Package.read(files)
        self._state = self._function(self._sizes[0].name).new_state()
        self._length = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._package = None
        self._interpreters, self._decoded, self._state = {}, {}, {}

    def _function(self, name: str) -> Interpreter:
        assert self._package is not None, "the stepper is not open"
        if name not in self._interpreters:
            self._interpreters[name] = Interpreter(self._package, name, decoded=self._decoded)
        return self._interpreters[name]

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens; what lies behind is masked, and written over later."""
        if not 0 <= length <= self._length:
            raise BadInput(f"{length} tokens cannot be kept of the {self._length} there are.")
        self._length = length

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """See ``edgekit.decode.Stepper``. Raises ``BadInput`` or ``RuntimeFailed``."""
        ids, wanted = self._checked(tokens, rows)
        depths, seen = _checked_lineage(len(ids), parents)
        size = next(
            each
            for each in self._sizes
            if each.width == len(ids) and each.rows >= min(len(wanted), each.width)
        )
        answered = np.zeros(size.rows, np.int32)
        answered[: len(wanted)] = wanted
        interpreter = self._function(size.name)
        answer = interpreter.run(
            {
                "tokens": ids[None],
                "positions": (self._length + depths).astype(np.int32),
                "start": np.array([self._length], np.int32),
                "mask": self._mask(seen),
                "rows": answered,
            },
            self._state,
        )
        if (overflow := interpreter.overflow) is not None and not self.cause:
            self.cause = (
                f"The first value beyond float16 is {overflow.output!r}, made by {overflow.op}: "
                f"{overflow.largest:.3g}, where 65504 is the most. Export with --precision fp32."
            )
        self._length += len(ids)
        logits, hidden = (
            np.asarray(answer[name])[0, : len(wanted)].astype(np.float32, copy=False)
            for name in ("logits", "hidden")
        )
        return Rows(logits, hidden)

    def _checked(self, tokens: Sequence[int], rows: Sequence[int] | None) -> tuple[Array, Array]:
        count = len(tokens)
        if count not in self.widths:
            listed = ", ".join(map(str, self.widths))
            raise BadInput(f"{count} tokens are no width of this model; one pass takes {listed}.")
        ids = np.asarray(tokens, np.int64)
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            wrong = next(int(each) for each in ids if not 0 <= each < self._vocabulary)
            raise BadInput(f"there is no token {wrong}; there are {self._vocabulary}, from 0.")
        if self._length + count > self._capacity:
            raise BadInput(
                f"{count} tokens behind {self._length} do not fit the {self._capacity} that the "
                "cache holds; rewind, or export with a larger --context."
            )
        wanted = np.arange(count) if rows is None else np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) > count or (len(wanted) and not 0 <= wanted.min() <= wanted.max() < count):
            raise BadInput(f"rows {list(wanted)} are not among the {count} tokens of the pass.")
        return ids.astype(np.int32), wanted

    def _mask(self, seen: Array) -> Array:
        """What is added to the scores: float32 [1, 1, N, S]."""
        count, length = len(seen), self._length
        mask = np.full((1, 1, count, self._capacity), HIDDEN, np.float32)
        mask[..., :length] = 0
        mask[0, 0, :, length : length + count][seen] = 0
        return mask


def _checked_lineage(count: int, parents: Sequence[int] | None) -> tuple[Array, Array]:
    """Each token's depth, [N], and what it sees of the others, bool [N, N].

    Raises ``BadInput`` where ``parents`` are not one earlier index, or -1, for each token.
    """
    if parents is None:
        return np.arange(count), np.tri(count, dtype=bool)
    wrong = [at for at, parent in enumerate(parents) if not -1 <= parent < at]
    if len(parents) != count or wrong:
        raise BadInput(
            f"the parents {list(parents)} do not fit {count} tokens: each has one, an index before "
            "its own, or -1."
        )
    return lineage(parents)
