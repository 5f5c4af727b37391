"""The seams: what a backend, a session and a zoo must offer.

These are protocols, not base classes: an adapter fits by its shape and needs no import from
here. Changing one changes every adapter there is, ours and others', so do it as a design, with
the conformance suite, not in passing. Members are read-only properties because writable ones
would reject an adapter whose attribute has a narrower type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from edgekit.artifact import Artifact
from edgekit.decode.stepper import Stepper
from edgekit.decoder import Decoder
from edgekit.language import LanguageModel
from edgekit.model import Model
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.spec import Array, Arrays, TensorSpec


@dataclass(frozen=True, slots=True)
class Finding:
    """One op that a target would refuse, or run outside its fast path."""

    op: str  # the op's name in the captured graph
    effect: Literal["refused", "outside"]  # refused: no artifact; outside: portable kernel
    source: str  # "file.py:12: the code", or "" where the graph does not know
    module: str  # the path of the module in the user's model, "" for its root
    remedy: str

    def __str__(self) -> str:
        place = f" at {self.source}" if self.source else ""
        owner = f" in module {self.module!r}" if self.module else ""
        effect = "is refused" if self.effect == "refused" else "stays outside the delegate"
        return f"{self.op}{place}{owner} {effect}: {self.remedy}"

    def to_json(self) -> dict[str, str]:
        """Every field, as strings."""
        return asdict(self)


class Session(Protocol):
    """An artifact opened for running. Nothing is loaded before entry; all is freed after exit."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name; the arrays belong to the caller. Raises ``BadInput``."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Backend(Protocol):
    """One runtime: what it can take, how a program becomes its artifact, how that is opened."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules that running needs; lowering may need more and says so when called."""
        ...

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        """What the target would refuse, or run outside its fast path, before lowering."""
        ...

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        """The artifact. Raises ``UnsupportedModel`` where ``check`` would find a refusal."""
        ...

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """A session; ``threads`` is the number of compute threads, None the runtime's default."""
        ...


@runtime_checkable
class Preferences(Protocol):
    """What a backend may add: its precisions, best first, and the model form it is fast on."""

    @property
    def recipes(self) -> tuple[Recipe, ...]: ...

    @property
    def form(self) -> str:
        """A form of ``Model.deploy``: ``"concat"`` or ``"two-stream"``."""
        ...


@dataclass(frozen=True, slots=True)
class OpTime:
    """Time of one graph node, averaged over runs."""

    op: str
    node: str
    microseconds: float


@runtime_checkable
class OpTimings(Protocol):
    """A session whose runtime tells where the time goes."""

    def op_timings(self, arrays: Arrays, runs: int) -> list[OpTime]: ...


@runtime_checkable
class Evidence(Protocol):
    """A session that says itself what its answers are worth; without it they are ``executed``."""

    @property
    def level(self) -> Literal["static", "emulated", "executed"]:
        """``emulated``: our interpreter runs the artifact. ``static``: it lacks an op."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a proof should know; the ops that are lacking, by name."""
        ...

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the artifact, whatever its numbers."""
        ...

    @property
    def cause(self) -> str:
        """After a run: the likely reason, and the remedy, if the numbers are wrong; or ""."""
        ...


@runtime_checkable
class Inside(Protocol):
    """A session that shows the intermediate values of the very artifact it runs."""

    def layers(self, arrays: Arrays) -> dict[str, Array]:
        """Every value by the name of the captured graph's node that made it."""
        ...


@runtime_checkable
class AsWritten(Protocol):
    """A session whose runtime fuses integer arithmetic, and can also run what the file says."""

    def run_as_written(self, arrays: Arrays) -> dict[str, Array]:
        """The outputs without fusion: as ``run`` but for rounding, where nothing saturates."""
        ...

    @property
    def saturation(self) -> str:
        """What to do where ``run`` loses against ``run_as_written``; "" where it cannot."""
        ...


@runtime_checkable
class Switchable(Protocol):
    """A session of an artifact made with ``any``: its weights have several bit-widths."""

    def set_bits(self, bits: int | Mapping[str, int]) -> None:
        """Run at ``bits`` from now on: 8, 6, 4 or 2, or by layer; the file is not read again.

        Raises ``UsageError`` where the artifact has one width, or not that one.
        """
        ...


@runtime_checkable
class Quantizes(Protocol):
    """A backend that says which ops its integer recipes touch, for the search of the guilty."""

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        """Short names of ATen ops whose inputs and results become integers: ``conv2d``, ``add``."""
        ...


@runtime_checkable
class Emulation(Protocol):
    """A backend whose sessions may be an interpreter here, whose times would say nothing."""

    @property
    def emulation(self) -> str:
        """How to measure on the device instead; "" where the vendor's runtime runs here."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """A backend that runs language models."""

    @property
    def name(self) -> str: ...

    @property
    def decoder_recipes(self) -> tuple[Recipe, ...]:
        """The recipes that it makes of them, best first: of fp32, fp16, int8-weights, int4."""
        ...

    def lower_decoder(
        self, decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
    ) -> Artifact:
        """The artifact, its files written into ``folder``, which is empty and the caller's.

        ``report`` hears of each step. Raises ``UnsupportedRecipe`` or ``LoweringFailed``.
        """
        ...

    def open_decoder(self, artifact: Artifact, *, threads: int | None = None) -> Stepper:
        """A stepper; it may be an ``Evidence`` too, and is then worth what it says."""
        ...


@dataclass(frozen=True, slots=True)
class Option:
    """A setting of a backend: ``--<target>-<name>`` on the command line."""

    name: str
    default: str
    help: str


@runtime_checkable
class Configurable(Protocol):
    """A backend with settings of its own."""

    @property
    def options(self) -> tuple[Option, ...]: ...

    def with_options(self, values: Mapping[str, str]) -> Backend:
        """The same backend, set otherwise. Raises ``UsageError`` for a value it does not take."""
        ...


class Zoo(Protocol):
    """A set of models by name, listed without importing torch."""

    @property
    def models(self) -> Mapping[str, str]:
        """Name to one line about it."""
        ...

    def load(
        self, name: str, *, weights: Path | None = None, inputs: tuple[TensorSpec, ...] = ()
    ) -> Model | LanguageModel:
        """The model, with the user's weights and input sizes where given."""
        ...


@runtime_checkable
class LoadsLanguage(Protocol):
    """A zoo that reads language models as others publish them."""

    @property
    def language_models(self) -> Mapping[str, str]:
        """Those of ``models`` that ``load`` gives as a ``LanguageModel``."""
        ...

    def load_language(self, path: Path) -> LanguageModel:
        """From a Hugging Face folder or a GGUF file. Raises ``BadModel`` or ``DamagedFile``."""
        ...
