"""Every error edgekit raises on purpose. Each says what was asked, what there is, what to do.

EdgekitError                 exit code 1
├── UsageError               2  what was asked for makes no sense                (also ValueError)
│   ├── UnknownName          2  a model, target or precision that does not exist (also LookupError)
│   ├── BadModel             2  the user's model file or factory is not usable
│   ├── BadInput             2  data that does not fit the model's inputs
│   └── BadRecipe            2  a recipe that is unreadable or contradicts itself
├── MissingRuntime           3  the adapter is here, its runtime is not          (also ImportError)
├── UnsupportedRecipe        3  the target cannot make that precision            (also ValueError)
├── CaptureFailed            3  PyTorch could not turn the model into a graph    (also ValueError)
├── UnsupportedModel         3  the target cannot take some of the model's ops   (also ValueError)
├── LoweringFailed           3  the vendor's converter gave up                   (also RuntimeError)
├── RuntimeFailed            3  the vendor's runtime refused to load or to run   (also RuntimeError)
├── StorageError             3  the disk is full, or a folder is not writable    (also OSError)
├── NewerSchema              3  the bundle was written by a newer edgekit        (also ValueError)
├── NotProven                1  a number differs from the eager model            (also ValueError)
├── DoesNotPay               1  quantized, and less accurate, slower or larger   (also ValueError)
├── NoisyMachine             1  the machine is too busy for a figure to mean anything
└── DamagedFile              4  a bundle or a weight file is not what it was     (also ValueError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

DISTRIBUTION = "edgekit-sdk"


class EdgekitError(Exception):
    """Base of every error edgekit raises on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class UsageError(EdgekitError, ValueError):
    """What was asked for makes no sense; the message says what would."""

    exit_code = 2


class UnknownName(UsageError, LookupError):
    """A model, target, precision or artifact that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        close = difflib.get_close_matches(name.lower(), self.known, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]!r}?" if close else "."
        listed = ", ".join(self.known) or "none"
        super().__init__(f"unknown {kind} {name!r}{guess} There is: {listed}.{hint and ' ' + hint}")


class BadModel(UsageError):
    """The user's model file, factory or weights cannot be used."""


class BadInput(UsageError):
    """Data whose name, shape, dtype or format does not fit what the model takes."""


class BadRecipe(UsageError):
    """A recipe that cannot be read, or whose parts contradict each other."""


class MissingRuntime(EdgekitError, ImportError):
    """An adapter is installed and a module it needs is not."""

    exit_code = 3

    def __init__(self, what: str, module: str, *, extra: str | None = None) -> None:
        self.what, self.module = what, module
        super().__init__(
            f"{what} needs the module {module!r}, which is not installed; "
            f"run: pip install '{DISTRIBUTION}[{extra or what}]'",
            name=module,
        )


class UnsupportedRecipe(EdgekitError, ValueError):
    """A target that cannot make the precision asked for."""

    exit_code = 3

    def __init__(self, target: str, precision: str, supported: Iterable[str]) -> None:
        super().__init__(
            f"{target} cannot make {precision} in this version; it can make: "
            f"{', '.join(supported)}. Choose one of these with --precision."
        )


class CaptureFailed(EdgekitError, ValueError):
    """PyTorch could not turn the model into a graph; the message names the source line."""

    exit_code = 3


class UnsupportedModel(EdgekitError, ValueError):
    """The model has ops that the target cannot take; each is named with its source line."""

    exit_code = 3

    def __init__(self, target: str, findings: Iterable[Any]) -> None:
        self.findings = tuple(findings)
        lines = "\n".join(f"  - {finding}" for finding in self.findings)
        super().__init__(f"{target} cannot take this model:\n{lines}")


class LoweringFailed(EdgekitError, RuntimeError):
    """The vendor's converter gave up on a captured model."""

    exit_code = 3


class RuntimeFailed(EdgekitError, RuntimeError):
    """The vendor's runtime refused to load or to run an artifact."""

    exit_code = 3


class StorageError(EdgekitError, OSError):
    """Files could not be written or read; nothing half-written was left under the name asked."""

    exit_code = 3


class NewerSchema(EdgekitError, ValueError):
    """A manifest from a newer edgekit."""

    exit_code = 3

    def __init__(self, path: object, found: int, known: int) -> None:
        super().__init__(
            f"{path} has schema {found} and this edgekit reads up to {known}; "
            f"run: pip install --upgrade {DISTRIBUTION}"
        )


class NotProven(EdgekitError, ValueError):
    """An artifact's numbers differ from the eager model's, or there is nothing to compare."""


class DoesNotPay(EdgekitError, ValueError):
    """A quantized artifact that loses more than the budget, or wins neither time nor size."""


class NoisyMachine(EdgekitError):
    """The machine is too busy for a latency figure to mean anything."""


class DamagedFile(EdgekitError, ValueError):
    """A bundle, manifest, artifact or weight file that is truncated, altered or foreign."""

    exit_code = 4
