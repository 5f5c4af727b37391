"""What a pass of a language model may be, checked before any runtime sees it; needs numpy alone."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.artifact import Artifact
from edgekit.decoder import DecoderSpec
from edgekit.errors import BadInput, DamagedFile
from edgekit.spec import Array
from edgekit_tensorrt.generate_on_jetson import pass_inputs

MAIN, WEIGHTS = "model.onnx", "model.weights"


class CountedDecoder:
    """What each stepper of this target knows without running: sizes, and the tokens kept."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        try:
            decoder: Mapping[str, Any] = artifact.provenance["decoder"]  # type: ignore[assignment]
            self.spec = DecoderSpec.from_json(decoder["spec"])
            self.capacity, self.widest = int(decoder["capacity"]), int(decoder["widest"])
            self._dtype = str(decoder["dtype"])
        except (KeyError, TypeError, ValueError) as cause:
            raise DamagedFile(f"the artifact does not describe its decoder: {cause!r}") from cause
        self.length = 0

    @property
    def vocabulary(self) -> int:
        return self.spec.vocabulary

    @property
    def widths(self) -> range:
        return range(1, self.widest + 1)

    @property
    def exact_widths(self) -> tuple[int, ...]:
        """Nobody has measured it: TensorRT's kernels do not run here."""
        return ()

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ``BadInput``."""
        if not 0 <= length <= self.length:
            raise BadInput(f"there are {self.length} tokens to keep; it was asked for {length}.")
        self.length = length

    def inputs_of(
        self,
        tokens: Sequence[int],
        parents: Sequence[int] | None,
        rows: Sequence[int] | None,
    ) -> dict[str, Array]:
        """All inputs of a pass but the cache. Raises ``BadInput``."""
        count = len(tokens)
        if count not in self.widths:
            raise BadInput(f"a pass takes 1 to {self.widest} tokens; it was given {count}.")
        if self.length + count > self.capacity:
            raise BadInput(
                f"{self.length + count} tokens do not fit the {self.capacity} that the cache "
                "holds; rewind, or export with a larger --context."
            )
        wanted = _within("a token", tokens, 0, self.vocabulary)
        if parents is not None:
            if len(parents) != count:
                raise BadInput(f"{count} tokens have {count} parents; there are {len(parents)}.")
            for index, parent in enumerate(parents):
                _within(f"the parent of token {index}", [parent], -1, index)
        places = _within("a row", range(count) if rows is None else rows, 0, count)
        return pass_inputs(wanted, parents, places, self.length, self._dtype)


def _within(what: str, values: Sequence[int], least: int, end: int) -> list[int]:
    try:
        whole = [operator.index(value) for value in values]
    except TypeError as cause:
        raise BadInput(f"{what} is a whole number: {cause}.") from cause
    for value in whole:
        if not least <= value < end:
            raise BadInput(f"{what} is {value}; it must be from {least} to {end - 1}.")
    return whole


def files_together(artifact: Artifact, spare: Path) -> Path:
    """The main file with the weights beside it: where they lie, or in ``spare``, an empty folder.

    Raises ``DamagedFile``.
    """
    files = artifact.files
    if missing := [name for name in (MAIN, WEIGHTS) if name not in files]:
        raise DamagedFile(f"the artifact lacks {', '.join(missing)}; export the model again.")
    main = files[MAIN]
    if isinstance(main, Path) and files[WEIGHTS] == main.with_name(WEIGHTS):
        return main
    for name in (MAIN, WEIGHTS):
        _put(files[name], spare / name)
    return spare / MAIN


def _put(content: bytes | Path, place: Path) -> None:
    if isinstance(content, bytes):
        place.write_bytes(content)
        return
    try:  # no symbolic link: the parser looks for weights where one leads to
        place.hardlink_to(content.resolve())
    except OSError:  # another file system
        shutil.copyfile(content, place)
