"""A model as edgekit takes it: a module, what goes in, and what a user of it must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit.image import ImageInput
from edgekit.spec import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Model:
    """A ``torch.nn.Module`` with its example inputs. Only ``module`` and ``inputs`` are needed.

    ``samples`` are inputs to prove on, one mapping of name to array each; without them edgekit
    draws random ones. ``samples_source`` says in words where they come from. ``deploy``
    rebuilds ``module`` as an equal module in a form (``"concat"``, ``"two-stream"``) that a
    backend is fast on; it must change no number but by rounding, and the proof holds it to
    that: the reference is always ``module`` itself. ``card`` is Markdown about the model.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    name: str = "model"
    outputs: tuple[str, ...] = ()
    samples: tuple[Arrays, ...] = ()
    samples_source: str = ""
    image: ImageInput | None = None
    labels: tuple[str, ...] = ()
    licence: str = ""
    card: str = ""
    deploy: Callable[[nn.Module, str, tuple[TensorSpec, ...]], nn.Module] | None = None

    @property
    def samples_are_real(self) -> bool:
        """Whether the samples came with the model or the user, rather than from a generator."""
        return bool(self.samples) and "random" not in self.samples_source

    def with_samples(self, samples: tuple[Arrays, ...], source: str) -> Model:
        """The same model, proven on other samples."""
        return replace(self, samples=samples, samples_source=source)
