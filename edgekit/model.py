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
    ``samples_drawn`` says that some samples are random numbers, which no range is measured on.
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
    samples_drawn: bool = False

    def with_samples(
        self, samples: tuple[Arrays, ...], source: str, *, drawn: bool = False
    ) -> Model:
        """The same model, proven on other samples; ``drawn`` where some are random numbers."""
        return replace(self, samples=samples, samples_source=source, samples_drawn=drawn)
