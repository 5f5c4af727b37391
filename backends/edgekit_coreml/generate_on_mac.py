"""Decodes with a language model's Core ML package on a Mac, and compares with the eager model.

Run it in the artifact's folder of a bundle:

    python3 generate_on_mac.py

It needs macOS 15, Python 3.10, numpy and coremltools. On each of Core ML's compute units it feeds
the bundle's prompts, decodes greedily what follows, and prints how many tokens are those that the
eager model gave, how long a prompt and a token took, and where the first difference is. It reports
and writes nothing. Exit code: 0 it ran on a unit, 3 not possible here, 4 damaged bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036  (the Mac's Python, not the host's)
    sys.stderr.write("generate_on_mac.py needs Python 3.10 or newer.\n")
    raise SystemExit(3)
if __package__:
    from edgekit import evidence
else:  # a script in a bundle: the copy beside it, whose hash the manifest holds
    sys.dont_write_bytecode = True  # a bundle holds what was exported and nothing else
    try:
        import evidence  # type: ignore[import-not-found,no-redef]
    except ImportError as missing:
        sys.stderr.write(
            f"generate_on_mac.py needs numpy, and evidence.py beside it ({missing}); run it in the "
            "artifact's folder of a bundle, after: pip install numpy coremltools\n"
        )
        raise SystemExit(3) from None

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
PACKAGE = "model.mlpackage"
HIDDEN = -30000.0  # added to the score of a slot that a token must not see


def core_ml() -> Any:
    """The coremltools module, on a Mac. Raises ``NotPossible``."""
    if platform.system() != "Darwin":
        raise evidence.NotPossible(
            f"Core ML runs on macOS and this is {platform.system()}; copy the whole bundle to a "
            "Mac and run this script there."
        )
    try:
        import coremltools
    except ImportError as cause:
        raise evidence.NotPossible(
            f"coremltools does not load ({cause}); run: pip install coremltools"
        ) from cause
    return coremltools


class OnUnit:
    """Two functions of the package on one compute unit, over one state: prompts, and tokens."""

    def __init__(self, tools: Any, package: Path, unit: str, facts: Mapping[str, Any]) -> None:
        self._capacity = int(facts["capacity"])
        single = [each for each in facts["functions"] if each["rows"] == 1]
        self._sizes = sorted(single, key=lambda each: int(each["width"]))
        try:
            self._models = [
                tools.models.MLModel(
                    str(package),
                    function_name=each["name"],
                    compute_units=getattr(tools.ComputeUnit, unit),
                )
                for each in (self._sizes[0], self._sizes[-1])
            ]
        except Exception as cause:  # coremltools raises plain Exception
            raise evidence.NotPossible(f"Core ML could not load the package: {cause}") from cause
        self.start()

    def start(self) -> None:
        """Forget everything."""
        self._state, self._length = self._models[0].make_state(), 0

    def feed(self, tokens: Sequence[int]) -> int:
        """Feed any number of tokens; the likeliest next one."""
        best = 0
        while tokens:
            widest = int(self._sizes[-1]["width"])
            fits = len(tokens) > 1 and self._length + widest <= self._capacity
            width = widest if fits else 1
            best = self._pass(self._models[1 if fits else 0], tokens[:width], width)
            tokens = tokens[width:]
        return best

    def _pass(self, model: Any, tokens: Sequence[int], width: int) -> int:
        """One pass, what is left over padded: the padding is written over by the next."""
        mask = np.full((1, 1, width, self._capacity), HIDDEN, np.float32)
        for row in range(width):
            mask[0, 0, row, : self._length + row + 1] = 0
        feed = {
            "tokens": np.array([[*tokens, *[0] * (width - len(tokens))]], np.int32),
            "positions": np.arange(self._length, self._length + width, dtype=np.int32),
            "start": np.array([self._length], np.int32),
            "mask": mask,
            "rows": np.array([len(tokens) - 1], np.int32),
        }
        try:
            answer = model.predict(feed, self._state)
        except Exception as cause:  # coremltools raises plain Exception
            raise evidence.NotPossible(f"Core ML could not run the package: {cause}") from cause
        self._length += len(tokens)
        return int(np.asarray(answer["logits"]).reshape(-1).argmax())


@dataclass(frozen=True)
class Continuations:
    """The bundle's prompts, and what the eager model decodes after each."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]


def continuations(shipped: evidence.Shipped) -> Continuations:
    """What the bundle holds of them. Raises ``Refused``."""
    language = shipped.manifest.get("language")
    if not language:
        raise evidence.NotPossible("this bundle holds no language model; run predict_on_mac.py.")
    path = shipped.folder.parent / str(language["reference"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != shipped.manifest["files"][str(language["reference"])]:
        raise evidence.Refused(f"{path} was altered or cut short; copy the bundle again, whole.")
    with np.load(path, allow_pickle=False) as arrays:
        found = [_rows(arrays, name) for name in ("prompts", "continuations")]
    return Continuations(*found)


def _rows(arrays: Any, name: str) -> list[list[int]]:
    ends = np.cumsum(arrays[f"{name}.lengths"])[:-1]
    return [part.tolist() for part in np.split(arrays[name], ends)]


def compared(unit: OnUnit, wanted: Continuations, limit: int) -> str:
    """Decodes up to ``limit`` tokens after each prompt; a line of what was found."""
    equal = total = whole = 0
    first, prompt_ms, token_ms = "", 0.0, 0.0
    for index, (prompt, answer) in enumerate(zip(wanted.prompts, wanted.answers, strict=True)):
        unit.start()
        began = time.perf_counter()
        token = unit.feed(prompt)
        fed = time.perf_counter()
        decoded = [token]
        while len(decoded) < min(limit, len(answer)):
            decoded.append(unit.feed([decoded[-1]]))
        done = time.perf_counter()
        prompt_ms += 1e3 * (fed - began)
        token_ms += 1e3 * (done - fed)
        pairs = list(zip(decoded, answer))  # noqa: B905  (as far as was decoded)
        # What follows a difference is another text; it is no difference of its own.
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal, total, whole = equal + same, total + len(pairs), whole + (same == len(pairs))
        if same < len(pairs) and not first:
            first = f"; first difference: prompt {index}, token {same}"
    count = len(wanted.prompts)
    steps = max(total - count, 1)
    return (
        f"{whole} of {count} continuations are the eager model's, {equal} of {total} tokens before "
        f"a difference; {prompt_ms / count:.1f} ms a prompt, {token_ms / steps:.2f} ms a token"
        f"{first}"
    )


def _report(folder: Path, limit: int, most: int) -> int:
    shipped = evidence.open_shipped(folder)
    held = continuations(shipped)
    wanted = Continuations(held.prompts[:most], held.answers[:most])
    facts = shipped.entry["provenance"]["decoder"]
    tools = core_ml()
    ran = False
    for name in UNITS:
        try:
            unit = OnUnit(tools, folder / PACKAGE, name, facts)
            line = compared(unit, wanted, limit)
            ran = True
        except evidence.NotPossible as refusal:
            line = str(refusal)
        sys.stdout.write(f"{name}: {line}\n")
        sys.stdout.flush()
    return 0 if ran else evidence.NotPossible.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and do the work; every failure is a sentence and an exit code."""
    command = argparse.ArgumentParser(description="Decode with the Core ML package on this Mac.")
    command.add_argument("--tokens", type=evidence.positive, default=64, help="default: 64")
    command.add_argument("--prompts", type=evidence.positive, default=20, help="default: 20")
    options = command.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    return evidence.run_script(lambda: _report(folder, options.tokens, options.prompts))


if __name__ == "__main__":
    sys.exit(main())
