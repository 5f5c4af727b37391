"""Runs a decoder's graph, a chain or a tree of tokens at a time. Needs numpy and the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime

from edgekit.artifact import Artifact
from edgekit.decode.stepper import Rows, lineage
from edgekit.errors import BadInput, DamagedFile
from edgekit.spec import Array
from edgekit_ort.decoder_codes import expanded
from edgekit_ort.decoder_layout import DATA, Layout
from edgekit_ort.session import FATAL, translated

_UNSEEN = np.float32(-1e30)  # finite: a row of infinities alone would be NaN after softmax
_KEPT_PASSES = 8  # buffers of so many shapes are kept


class OrtStepper:
    """A decoder on the CPU provider, from entry to exit of the context."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        self._artifact, self._threads = artifact, threads
        self._layout = Layout.from_provenance(artifact.provenance)
        self._session: Any = None
        self._binding: Any = None
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._bound: _Pass | None = None
        self._zeros = np.zeros(0, np.float32)
        self._length = 0

    @property
    def capacity(self) -> int:
        return self._layout.capacity

    @property
    def vocabulary(self) -> int:
        return self._layout.spec.vocabulary

    @property
    def length(self) -> int:
        return self._length

    @property
    def widths(self) -> Sequence[int]:
        return range(1, self.capacity + 1)

    @property
    def exact_widths(self) -> Sequence[int]:
        return range(self._layout.exact_from, self.capacity + 1)

    def __enter__(self) -> Self:
        with translated("load the model"):
            self._session = _session(self._artifact, self._layout, self._threads)
            self._binding = self._session.io_binding()
            self._bind_buffers()
        self._length = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = self._binding = self._bound = None
        self._passes.clear()

    def _bind_buffers(self) -> None:
        """Key-value buffers, each both what goes in and what comes out: appended to in place."""
        spec, slots = self._layout.spec, self.capacity + self._layout.padded
        for index in range(spec.layers):
            for name in f"key.{index}", f"value.{index}":
                zeros = np.zeros((1, spec.kv_heads, slots, spec.head_dim), np.float32)
                value = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
                self._binding.bind_ortvalue_input(f"past_{name}", value)
                self._binding.bind_ortvalue_output(name, value)

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """Feed tokens; see ``Stepper.step``. Raises ``BadInput`` or ``RuntimeFailed``."""
        count = len(tokens)
        wanted = range(count) if rows is None else rows
        self._check(tokens, parents, wanted)
        current = self._pass(count, len(wanted))
        current.tokens[:] = tokens
        if len(wanted):
            current.rows[:] = wanted
        start, attended = self._length, current.attended
        total = start + attended
        current.last[0] = total - 1
        if parents is None:
            current.positions[0] = np.arange(start, total)
            mask = self._open_mask(attended, total)
        else:
            depths, seen = lineage(parents)
            current.positions[0, :count] = start + depths
            # The kernel numbers the tokens itself where the pass is all there is; say it is not.
            total += start == 0
            mask = _tree_mask(seen, start, attended, total)
        current.total[0] = total
        value = onnxruntime.OrtValue.ortvalue_from_numpy(mask)
        with translated("run the model"):
            self._binding.bind_ortvalue_input("mask", value)
            self._session.run_with_iobinding(self._binding)
        self._length += count
        return Rows(current.logits[: len(wanted)], current.hidden[: len(wanted)])

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ``BadInput``."""
        if not 0 <= length <= self._length:
            raise BadInput(
                f"the cache holds {self._length} tokens and cannot be rewound to {length}."
            )
        self._length = length

    def _check(
        self, tokens: Sequence[int], parents: Sequence[int] | None, rows: Sequence[int]
    ) -> None:
        count = len(tokens)
        if self._session is None:
            raise BadInput("the model is not open; use it inside its with block.")
        if not count:
            raise BadInput("there is no token to feed; a pass has at least one.")
        if self._length + count > self.capacity:
            raise BadInput(
                f"{count} tokens after {self._length} do not fit the {self.capacity} that the "
                "cache holds; rewind, or export with a larger --context."
            )
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise BadInput(
                f"tokens {min(tokens)} to {max(tokens)} were given; the vocabulary has 0 to "
                f"{self.vocabulary - 1}."
            )
        if len(rows) and (min(rows) < 0 or max(rows) >= count):
            raise BadInput(
                f"rows {min(rows)} to {max(rows)} were asked for; the pass has 0 to {count - 1}."
            )
        if parents is None:
            return
        if len(parents) != count:
            raise BadInput(f"{len(parents)} parents were given for {count} tokens.")
        for index, parent in enumerate(parents):
            if not -1 <= parent < index:
                raise BadInput(
                    f"token {index} has the parent {parent}; a parent stands before its child, or "
                    "is -1 for what was kept before."
                )

    def _pass(self, count: int, rows: int) -> _Pass:
        """The bound buffers of a pass of ``count`` tokens and ``rows`` results."""
        key = count, max(rows, 1)
        found = self._passes.pop(key, None)
        if found is None:
            found = _Pass(self._layout, *key)
            while len(self._passes) >= _KEPT_PASSES:
                del self._passes[next(iter(self._passes))]
        self._passes[key] = found  # the latest stands last
        if found is not self._bound:
            found.bind(self._binding)
            self._bound = found
        return found

    def _open_mask(self, rows: int, columns: int) -> Array:
        """A mask that hides nothing beyond what causality does: zeros, never written to."""
        if rows * columns > self._zeros.size:
            self._zeros = np.zeros(2 * rows * columns, np.float32)
        return self._zeros[: rows * columns].reshape(1, 1, rows, columns)


class _Pass:
    """Inputs and outputs of one shape: arrays that the runtime reads and writes in place."""

    def __init__(self, layout: Layout, count: int, rows: int) -> None:
        spec = layout.spec
        padding = int(layout.padded and count == 1)
        self.attended = count + padding
        self.tokens = np.zeros(count, np.int64)
        self.rows = np.zeros(rows, np.int64)
        self.last, self.total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.positions = np.zeros((1, self.attended), np.int64)
        inputs: dict[str, Array] = {
            **{"tokens": self.tokens, "rows": self.rows, "last": self.last, "total": self.total},
            "positions": self.positions,
        }
        if layout.padded:
            features = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
            inputs["pad"] = np.zeros((padding, features), np.float32)
            inputs["count"] = np.array([count], np.int64)
        self.logits = np.zeros((rows, spec.vocabulary), np.float32)
        self.hidden = np.zeros((rows, spec.hidden), np.float32)
        outputs = {"logits": self.logits, "hidden": self.hidden}
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {name: make(array) for name, array in inputs.items()}
        self._outputs = {name: make(array) for name, array in outputs.items()}

    def bind(self, binding: Any) -> None:
        """From now on a run reads and writes here."""
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value)


def _tree_mask(seen: Array, start: int, rows: int, columns: int) -> Array:
    """0 where a token sees, a large negative number where not: [1, 1, rows, columns]."""
    mask = np.full((1, 1, rows, columns), _UNSEEN, np.float32)
    mask[..., :start] = 0
    count = len(seen)
    mask[0, 0, :count, start : start + count][seen] = 0
    return mask


def _session(artifact: Artifact, layout: Layout, threads: int | None) -> Any:
    """The runtime's session of the graph, its weights mapped from the file beside it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    # Idle threads of one session must not spin on the cores of another.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    data = artifact.files.get(DATA)
    if data is None:
        raise DamagedFile(f"the artifact lacks its weights, {DATA}; export again.")
    if isinstance(data, Path):
        _known(data)
        folder = str(data.resolve().parent)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    else:
        options.add_external_initializers_from_files_in_memory([DATA], [data], [len(data)])
    if layout.expand:
        names, values = _expanded_codes(data, layout)
        options.add_external_initializers(names, values)
    source = artifact.source
    content = source.read_bytes() if isinstance(source, Path) else source
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _known(data: Path) -> None:
    if data.name != DATA:
        raise DamagedFile(f"the weights lie in {data.name}; the graph looks for {DATA} there.")
    if not data.is_file():
        raise DamagedFile(f"the weights of the model are gone: there is no {data}.")


def _expanded_codes(data: bytes | Path, layout: Layout) -> tuple[list[str], list[Any]]:
    """Names and values of the initializers that are 4-bit codes in the file."""
    content: Array = (
        np.memmap(data, np.uint8, "r") if isinstance(data, Path) else np.frombuffer(data, np.uint8)
    )
    values = []
    for each in layout.expand:
        end = each.offset + int(np.prod(each.shape))
        if end > content.size:
            raise DamagedFile(f"{DATA} is cut short: {content.size} bytes, {end} are needed.")
        codes = expanded(content[each.offset : end].reshape(each.shape))
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(codes))
    return [each.name for each in layout.expand], values
