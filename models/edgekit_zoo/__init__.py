"""The models that ship with edgekit. Importing this package loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.language import LanguageModel
    from edgekit.model import Model
    from edgekit.spec import TensorSpec

_NANO = {"partialnet-nano": "trained on Fashion-MNIST, 1x32x32, 0.3 M parameters"}
_PAPER = {
    "partialnet-t0": "4.3 M parameters, 0.25 G MACs",
    "partialnet-t1": "7.8 M parameters, 0.55 G MACs",
    "partialnet-t2": "12.7 M parameters, 1.03 G MACs",
    "partialnet-s": "29.0 M parameters, 2.71 G MACs",
    "partialnet-m": "61.4 M parameters, 6.68 G MACs",
    "partialnet-l": "104.5 M parameters, 11.89 G MACs",
}
_REPO = {
    "partialnet-t0-repo": "3.5 M parameters, 0.23 G MACs",
    "partialnet-t1-repo": "6.1 M parameters, 0.52 G MACs",
    "partialnet-t2-repo": "12.3 M parameters, 1.03 G MACs",
    "partialnet-s-repo": "28.0 M parameters, 2.70 G MACs",
    "partialnet-m-repo": "59.2 M parameters, 6.67 G MACs",
    "partialnet-l-repo": "100.6 M parameters, 11.88 G MACs",
}
_FASTERNET = {
    "fasternet-t0": "3.9 M parameters, 0.34 G MACs",
    "fasternet-t1": "7.6 M parameters, 0.85 G MACs",
    "fasternet-t2": "15.0 M parameters, 1.90 G MACs",
    "fasternet-s": "31.2 M parameters, 4.55 G MACs",
    "fasternet-m": "53.5 M parameters, 8.72 G MACs",
    "fasternet-l": "93.5 M parameters, 15.49 G MACs",
}
_LANGUAGE = {
    "tiny-llama": "language model, 0.8 M parameters, trained on this repository's own words",
    "smollm2-135m": "language model, 134.5 M parameters, Apache-2.0",
    "smollm2-360m": "language model, 361.8 M parameters, Apache-2.0",
    "smollm2-1.7b": "language model, 1711.4 M parameters, Apache-2.0",
    "llama-3.2-1b": "language model, 1235.8 M parameters, Llama 3.2 Community licence",
    "qwen2.5-0.5b": "language model, 494.0 M parameters, Apache-2.0",
    "qwen3-0.6b": "language model, 596.0 M parameters, Apache-2.0",
}
_UNTRAINED = "untrained: give --weights"


_KINDS = (
    ("PartialNet", _PAPER),
    ("PartialNet as its released settings", _REPO),
    ("FasterNet: PartialNet without attention", _FASTERNET),
)


class _Zoo:
    def __init__(self) -> None:
        self.models = _NANO | {
            name: f"{kind}, {line}; {_UNTRAINED}"
            for kind, lines in _KINDS
            for name, line in lines.items()
        }
        self.models |= _LANGUAGE
        self.language_models = _LANGUAGE

    def load(
        self, name: str, *, weights: Path | None = None, inputs: tuple[TensorSpec, ...] = ()
    ) -> Model | LanguageModel:
        if name in _LANGUAGE:
            return self._load_language(name, weights, inputs)
        from edgekit_zoo.catalog import load_model

        return load_model(name, weights=weights, inputs=inputs)

    def _load_language(
        self, name: str, weights: Path | None, inputs: tuple[TensorSpec, ...]
    ) -> LanguageModel:
        from edgekit.errors import BadInput
        from edgekit_zoo.language_catalog import load_named

        if inputs:
            raise BadInput(f"{name} takes tokens; leave out --input, and give --context its size.")
        return load_named(name, weights=weights)

    def load_language(self, path: Path) -> LanguageModel:
        """From a Hugging Face folder or a GGUF file. Raises ``BadModel`` or ``DamagedFile``."""
        from edgekit_zoo.language_catalog import load_path

        return load_path(path)


ZOO = _Zoo()
